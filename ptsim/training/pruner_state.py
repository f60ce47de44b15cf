"""What does `PruneTrain.state_dict` hold, and is that which is loaded such a state? The tensors are `stored`'s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from ptsim.consistency import network_problem
from ptsim.errors import UsageError
from ptsim.network import Network
from ptsim.prune.cut import unwrap
from ptsim.prune.structure import apply_structure
from ptsim.training.checkpoint import Entry, NotNegative, Totals, Whole
from ptsim.training.formats import Seen
from ptsim.training.measured import LastEpoch, Unfinished
from ptsim.training.recipe import Count
from ptsim.training.recorder import Recorder
from ptsim.training.stored import group_settings, has_structure, load_full_state, part
from ptsim.training.wrapping import refuse_spread
from ptsim.units import counted

VERSION = 1


class StoredState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `PruneTrain.state_dict` gives, checked."""

    version: int
    structure: dict[str, Any]
    penalty_coefficient: NotNegative | None
    regularized: bool
    epoch: Whole
    initial_counts: tuple[Count, Count]
    first_network: Network
    first_batch: Count | None
    proposed_batch: Count | None
    last_epoch: LastEpoch | None = None
    seen: Seen | None = None
    learning_rate_scale: NotNegative
    num_reconfigurations: Whole
    layers_removed: tuple[str, ...]
    trace_bytes: Whole
    trace_sha256: str | None
    totals: Totals
    parameters: tuple[tuple[str, ...], ...]
    optimizer: dict[str, dict[str, Entry]] | None = None
    groups: list[dict[str, Any]] | None = None
    tensors: dict[str, Any] | None = None
    unfinished: Unfinished | None = None

    def named_tensors(self) -> dict[str, Tensor]:
        """Its tensors; none of a state without.

        Raises:
            UsageError: something else is among them.
        """
        tensors = self.tensors or {}
        if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise UsageError("not a state of PruneTrain: 'tensors' holds something else")
        return tensors


def checked(state: Mapping[str, Any], optimizer: torch.optim.Optimizer | None = None) -> StoredState:
    """The state, if it is one; of a run with such an `optimizer`, if there is one.

    Raises:
        UsageError: it is something else, of another version, or of another kind of optimizer.
    """
    version = state.get("version") if isinstance(state, Mapping) else None
    if version != VERSION:
        raise UsageError(f"not a state of PruneTrain: its version is {version!r}, this ptsim reads {VERSION}")
    try:
        found = msgspec.convert(dict(state), StoredState)
    except (msgspec.ValidationError, UnicodeError, RecursionError) as error:
        raise UsageError(f"not a state of PruneTrain: {error}") from error
    if problem := network_problem(found.first_network):
        raise UsageError(f"not a state of PruneTrain: its first network {problem}")
    if found.groups is not None and optimizer is not None:
        _check_same_kind(optimizer, found.groups)
    return found


def refuse_unrecorded(state: StoredState) -> None:
    """Make sure that a trace can go on with the state: it begins with the run's first epoch.

    Raises:
        UsageError: nobody has recorded the epochs before.
    """
    if state.epoch and not state.trace_bytes:
        before = counted(state.epoch, "epoch")
        raise UsageError(
            f"the {before} before this state were not recorded, and a trace begins with a run's first epoch",
            hint="without record= the run goes on; with it the run has to begin anew",
        )


def _check_same_kind(optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Make sure that the numbers by which the optimizer goes were stored; other versions of torch know other switches.

    Raises:
        UsageError: one of them was not.
    """
    own = {
        name
        for name, value in optimizer.defaults.items()
        if isinstance(value, int | float | tuple) and not isinstance(value, bool)
    }
    for stored, present in zip(groups, group_settings(optimizer), strict=False):
        if missing := (own & present.keys()) - stored.keys():
            raise UsageError(
                f"the state is of another kind of optimizer than {type(optimizer).__name__}, without {min(missing)!r}",
                hint="give PruneTrain the optimizer that the run was begun with",
            )


def recorded_entries(recorder: Recorder) -> dict[str, Any]:
    """The part of a state that says how far the recording has come."""
    return {
        "epoch": recorder.epoch,
        "initial_counts": list(recorder.initial_counts),
        "seen": msgspec.to_builtins(recorder.watch.seen),
        "trace_bytes": recorder.num_bytes,
        "trace_sha256": recorder.sha256,
        "totals": msgspec.to_builtins(recorder.spend_time()),
        "unfinished": msgspec.to_builtins(recorder.unfinished()),
    }


def continue_recording(recorder: Recorder, state: StoredState) -> None:
    """Go on where the recording was, with the network in the state's shapes."""
    recorder.epoch = state.epoch
    recorder.initial_counts = state.initial_counts
    recorder.totals = state.totals
    recorder.refresh()
    recorder.watch.forget(state.seen)
    recorder.continue_trace(state.trace_bytes, state.trace_sha256)
    recorder.continue_epoch(state.unfinished)


def load_pruned(model: nn.Module, state: Mapping[str, Any], *, average: bool = False) -> nn.Module:
    """A freshly built network with the shapes and weights of a `PruneTrain.state_dict`, to be used without pruning on.

    Args:
        model: as the training loop built it, on any device; it is changed in place, and returned.
        state: of `PruneTrain.state_dict`; one without tensors gives the shapes, for a `load_state_dict` of one's own.
        average: take the weights of the average that PruneTrain was given as `ema`.

    Raises:
        UsageError: not a state of PruneTrain, of another network, or one without an average.
    """
    refuse_spread(model)
    kept, network = checked(state), unwrap(model)
    if not has_structure(network, kept.structure):
        apply_structure(network, dict(kept.structure))
    tensors = kept.named_tensors()
    weights = part(tensors, "network/")
    if average:
        own = part(tensors, "ema/")
        weights = part(own, "module.") or own  # AveragedModel keeps the network as `module`
        if not weights:
            raise UsageError("the state holds no average of the weights", hint="PruneTrain(…, ema=average) adds it")
    if weights:
        load_full_state(network, weights)
    return model
