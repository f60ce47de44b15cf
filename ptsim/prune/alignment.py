"""Would the model's code mix up the channels of a smaller network? Tried out on shapes, rather than derived.

A reshape, chunk or index takes channels by their number. Random halves are removed, and the labels of what is left are
compared with those of the whole network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ptsim.capture.copies import copied
from ptsim.errors import UnsupportedModelError
from ptsim.prune.cut import cut_model
from ptsim.prune.labels import NO_SLOTS, UNKNOWN, State, connected, distinct
from ptsim.prune.propagate import Graphs, propagate
from ptsim.prune.selection import keep_one
from ptsim.prune.steps import same_steps

if TYPE_CHECKING:
    from ptsim.prune.groups import ChannelGroups

SHAPE_ERRORS = (  # what the model's code raises where shapes, or layers, are no longer those that it reckons with
    RuntimeError, ValueError, TypeError, AssertionError, AttributeError, LookupError, ZeroDivisionError,
    UnsupportedModelError,
)  # fmt: skip


def misaligned(
    bones: nn.Module, groups: ChannelGroups, removed: Tensor, operation: Callable[[nn.Module], object] | None = None
) -> Tensor | None:
    """The parts that would be mixed up if the components of the mask `removed` were gone; None if the network fails.

    `operation` takes them out of a copy; by default a plain cut.
    """
    seen = tried_out(bones, groups, removed, operation)
    if seen is None or (operation is None and not same_steps(groups.graphs, seen[1])):
        return None
    return seen[0]


def tried_out(
    bones: nn.Module, groups: ChannelGroups, removed: Tensor, operation: Callable[[nn.Module], object] | None = None
) -> tuple[Tensor, Graphs] | None:
    """What `misaligned` gives, and the graphs of the smaller network, whose steps are not compared yet."""
    smaller = copied(bones)
    seed = {}
    for key, components in groups.axes.items():
        kept = ~removed[components]
        seed[key] = torch.where(groups.prunable[components], groups.parts[key], -1)[kept]
    try:
        if operation is None:
            cut_model(smaller, groups.cut_for(removed))
        else:
            operation(smaller)
        state, graphs = propagate(smaller, groups.input_shape, seed, wider=groups.graphs)
    except SHAPE_ERRORS:
        return None
    return torch.cat([state.misaligned, _out_of_place(groups, removed, state)]), graphs


def _out_of_place(groups: ChannelGroups, removed: Tensor, state: State) -> Tensor:
    """The parts of which a slice, chunk or reshape of the smaller network gives others than are left of its own.

    No weight may tell: the halves of a chunk may go through different activations.
    """
    wrong = [NO_SLOTS]
    for key, labels in groups.moves.items():
        found = state.moves.get(key, labels)
        if len(found) != len(labels):  # a list of fewer parts: each is looked at where it is taken from the list
            continue
        for before, label in zip(labels, found, strict=True):
            parts, after = before.flatten(), label.flatten().clamp(min=-1)
            component = groups.part_of[parts.clamp(min=0)]
            stays = (parts < 0) | ~groups.prunable[component]
            expected = torch.where(stays, -1, parts)[stays | ~removed[component]]
            if label is before or bool((label == UNKNOWN).any()):
                continue
            if max(before.shape, default=1) < before.numel() or len(after) == 1:  # of what repeats, one is kept
                expected, after = torch.unique_consecutive(expected), torch.unique_consecutive(after)
            if not torch.equal(expected, after):
                wrong.append(parts[parts >= 0])
    return distinct(torch.cat(wrong))


MIXED_UP = "a reshape, split, index or condition of the model's code would mix up the channels that are left"
ALL_OR_NONE = "a reshape, split or index of the model's code lets these channels go only all together"


def settled(bones: nn.Module, base: ChannelGroups) -> ChannelGroups:
    """The groups but for components whose removal a reshape, chunk or index of the model's code would not follow.

    Tried out rather than derived: random halves are removed from the shapes, and the labels of what is left compared.
    Channels that get mixed up are tied to each other along one axis of the fold they pass; if no axis helps, whatever
    passes an operator together with them is refused.
    """
    base = dataclasses.replace(base, reasons=(*base.reasons, MIXED_UP, ALL_OR_NONE))
    generator = torch.Generator().manual_seed(0)
    ties: dict[int, int] = {}  # fold → the axis along which channels may go
    groups, successes = base, 0
    while True:
        suspects = groups.sensitive & groups.prunable
        # Parts of equal size may pass by chance: in small networks, where a try is quick, more of them are made.
        if not bool(suspects.any()) or successes == (2 if int(suspects.sum()) > 512 else 6):
            break
        wrong = misaligned(bones, groups, _random_part(groups, suspects, generator))
        if wrong is not None and len(wrong) == 0:
            successes += 1
            continue
        mixed = suspects.clone()
        if wrong is not None:
            mixed[:] = False
            mixed[groups.part_of[wrong[wrong >= 0]]] = True
        untried = [i for i, fold in enumerate(groups.folds) if ties.get(i, fold.ndim) > 0 and bool(mixed[fold].any())]
        if untried:
            ties |= {i: ties.get(i, base.folds[i].ndim) - 1 for i in untried}
        else:
            refused = _refused(bones, groups, suspects, None if wrong is None else mixed, generator)
            base = _without(base, refused[groups.part_of], MIXED_UP)
        groups, successes = _tied(base, ties), 0
    return _without_all_or_none(groups)


def _without_all_or_none(groups: ChannelGroups) -> ChannelGroups:
    """The groups but for components that are a whole axis of a layer."""
    together = torch.zeros_like(groups.prunable)
    for layer in groups.layers:
        for axis in (layer.inputs, layer.outputs):
            if len(axis) > 1 and bool((axis == axis[0]).all()):
                together[axis[0]] = True
    return _without(groups, together & groups.prunable, ALL_OR_NONE)


def _without(groups: ChannelGroups, refused: Tensor, reason: str) -> ChannelGroups:
    reason_of = torch.where(refused & (groups.reason_of < 0), groups.reasons.index(reason), groups.reason_of)
    return dataclasses.replace(groups, reason_of=reason_of, prunable=reason_of < 0)


def _tied(base: ChannelGroups, ties: dict[int, int]) -> ChannelGroups:
    """The groups with all channels of one index along the chosen axis of every fold tied to each other."""
    if not ties:
        return base
    pairs = []
    for index, axis in ties.items():
        rows = base.folds[index].movedim(axis, 0).flatten(1)
        pairs.append(torch.stack([rows[:, :1].expand_as(rows).flatten(), rows.flatten()]))
    part_of = connected(pairs, base.num_components)
    number = int(part_of.max()) + 1
    reason_of = torch.full((number,), -1).scatter_reduce(0, part_of, base.reason_of, "amax")
    sensitive = torch.zeros(number, dtype=torch.bool)
    sensitive[part_of[base.sensitive]] = True
    return dataclasses.replace(
        base,
        axes={key: part_of[axis] for key, axis in base.axes.items()},
        layers=tuple(
            dataclasses.replace(layer, inputs=part_of[layer.inputs], outputs=part_of[layer.outputs])
            for layer in base.layers
        ),
        prunable=reason_of < 0,
        reason_of=reason_of,
        sensitive=sensitive,
        sensitive_sets=tuple(part_of[members] for members in base.sensitive_sets),
        folds=tuple(part_of[fold] for fold in base.folds),
        numbers=tuple(
            (number, torch.where(rows >= 0, part_of[rows.clamp(min=0)], -1)) for number, rows in base.numbers
        ),
        part_of=part_of,
    )


def _refused(
    bones: nn.Module, groups: ChannelGroups, suspects: Tensor, mixed: Tensor | None, generator: torch.Generator
) -> Tensor:
    """A mask of some suspects, never empty."""
    refused = torch.zeros_like(suspects)
    if mixed is None:  # the network fails without saying where: try what hangs together
        for mask in _clusters(groups, suspects):
            if misaligned(bones, groups, _random_part(groups, mask, generator)) is None:
                refused |= mask
    else:
        for members in groups.sensitive_sets:
            if bool(mixed[members].any()):
                refused[members] = True
        refused &= suspects
    return refused if bool(refused.any()) else suspects


def _clusters(groups: ChannelGroups, suspects: Tensor) -> list[Tensor]:
    """The suspects as masks, those that pass an operator together in one."""
    clusters: list[Tensor] = []
    for members in groups.sensitive_sets:
        mask = torch.zeros_like(suspects)
        mask[members] = True
        mask &= suspects
        touching = [cluster for cluster in clusters if bool((cluster & mask).any())]
        clusters = [cluster for cluster in clusters if not bool((cluster & mask).any())]
        for cluster in touching:
            mask |= cluster
        if bool(mask.any()):
            clusters.append(mask)
    return clusters


def _random_part(groups: ChannelGroups, mask: Tensor, generator: torch.Generator) -> Tensor:
    chosen = mask & (torch.rand(len(mask), generator=generator) < 0.5)
    return keep_one(groups, chosen, torch.rand(len(mask), generator=generator))[0]
