"""When and how does the network shrink? PruneTrain's reconfiguration, in process (METHOD.md §2).

Decide which channels are sparse in every layer that touches them, take them out of the model, its optimizer and its
averaged copies, and remove residual branches that are left without an inner channel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ptsim.errors import UsageError
from ptsim.prune.cut import cut_model, cut_optimizer, unwrap
from ptsim.prune.density import THRESHOLD
from ptsim.prune.groups import (
    ChannelGroups,
    component_maxima,
    find_groups,
    keep_one,
    misaligned,
    round_up,
)
from ptsim.prune.propagate import skeleton


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surgery:
    """What one reconfiguration did.

    `channels_removed` counts output channels of convolutions and linear layers; `groups` are those of the network as it
    is now.
    """

    changed: bool
    channels_removed: int
    layers_removed: tuple[str, ...]
    notes: tuple[str, ...]
    groups: ChannelGroups


@torch.no_grad()
def reconfigure(
    model: nn.Module,
    groups: ChannelGroups,
    *,
    threshold: float = THRESHOLD,
    optimizer: torch.optim.Optimizer | None = None,
    shadows: Sequence[nn.Module] = (),
    mode: Literal["union", "gating"] = "union",
    channel_multiple: int = 1,
) -> Surgery:
    """Remove every channel whose weights are below `threshold` in all its producers and all its consumers, in place.

    Parameters that shrink are replaced by new ones; the optimizer's groups and state follow. Channel counts are rounded
    up to `channel_multiple` by keeping dead channels. At least one channel of every layer stays, with a note.

    Args:
        model: the network itself, not a DistributedDataParallel around it.
        groups: its channel groups, from `find_groups` or the last `Surgery`.
        threshold: a channel is sparse if the largest |w| is strictly below.
        optimizer: whose state is carried over; any torch optimizer with per-element state.
        shadows: averaged copies of the model (`AveragedModel` or plain modules) that are cut alike.
        mode: how channels are handled where branches meet at a sum (METHOD.md §2.3).
        channel_multiple: 8 keeps tensor cores fed.

    Raises:
        UsageError: a threshold or multiple out of bounds.
    """
    if not threshold > 0:
        raise UsageError(f"the threshold is {threshold}; it has to be positive")
    if channel_multiple < 1:
        raise UsageError(f"the channel multiple is {channel_multiple}; it has to be at least 1")
    if mode not in ("union", "gating"):
        raise UsageError(f"unknown reconfiguration mode {mode!r}; known: union, gating")
    importance = component_maxima(model, groups)
    sparse = groups.prunable & (importance < threshold)
    removed, rescued = keep_one(groups, sparse, importance)
    removed = round_up(groups, removed, importance, channel_multiple)
    notes = [f"{layer}: every channel is sparse; one is kept" for layer in rescued]
    if bool((removed & groups.sensitive).any()) and misaligned(skeleton(model), groups, removed):
        removed &= ~groups.sensitive
        notes.append("channels that pass a reshape or split are kept: what is left would be mixed up")
    if not bool(removed.any()):
        return Surgery(changed=False, channels_removed=0, layers_removed=(), notes=tuple(notes), groups=groups)
    channels_removed = sum(int(removed[layer.outputs].sum()) for layer in groups.layers)
    remove_components(model, groups, removed, optimizer=optimizer, shadows=shadows)
    return Surgery(
        changed=True,
        channels_removed=channels_removed,
        layers_removed=(),
        notes=tuple(notes),
        groups=find_groups(model, groups.input_shape),
    )


def remove_components(
    model: nn.Module,
    groups: ChannelGroups,
    removed: Tensor,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    shadows: Sequence[nn.Module] = (),
) -> None:
    """Take the components of the mask `removed` out of the model, its optimizer and its copies."""
    cut = groups.cut_for(removed)
    replacements = cut_model(model, cut)
    if optimizer is not None:
        cut_optimizer(optimizer, replacements)
    for shadow in shadows:
        cut_model(unwrap(shadow), cut)
