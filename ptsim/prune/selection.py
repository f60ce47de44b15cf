"""Which of the components that a criterion would remove may really go?

At least one channel of every axis stays, the groups of a grouped convolution stay equal, and where it is wished the
channels that are left are a multiple of a number.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ptsim.prune.groups import ChannelGroups
    from ptsim.prune.labels import Weighted


def keep_one(
    groups: ChannelGroups, removed: Tensor, importance: Tensor, skip: Collection[str] = ()
) -> tuple[Tensor, tuple[str, ...]]:
    """`removed` without the most important component of every axis that would end up empty, and their layers' names.

    The layers in `skip` may end up empty.
    """
    removed = removed.clone()
    rescued = []
    for layer in groups.layers:
        if layer.layer in skip:
            continue
        for axis in (layer.outputs, layer.inputs):
            if bool(removed[axis].all()):
                best = axis[importance[axis].argmax()]
                removed[best] = False
                rescued.append(layer.layer)
    return balanced(groups, removed, importance, skip), tuple(rescued)


def balanced(groups: ChannelGroups, removed: Tensor, importance: Tensor, skip: Collection[str] = ()) -> Tensor:
    """`removed` without what would leave the groups of a grouped convolution unequal.

    A group goes as a whole if all its inputs and all its outputs go. Of every other one the same number of inputs goes,
    and the same number of outputs, the least important ones first; one of each stays.
    """
    removed = removed.clone()
    grouped = [layer for layer in groups.layers if layer.grouped and layer.layer not in skip]
    changed = True
    while changed:
        changed = False
        for layer in grouped:
            for rows in _groups_left(layer, removed):
                if not len(rows):
                    continue
                gone = removed[rows]
                number = min(int(gone.sum(1).min()), rows.shape[1] - 1)
                least_first = torch.argsort(torch.where(gone, importance[rows], torch.inf), dim=1, stable=True)
                goes = torch.zeros_like(gone).scatter_(1, least_first[:, :number], True)
                back = rows[gone & ~goes]
                if len(back):
                    removed[back] = False
                    changed = True
    return removed


def _groups_left(layer: Weighted, removed: Tensor) -> list[Tensor]:
    """The inputs, and the outputs, of a grouped convolution without the groups of which all go: a row each."""
    axes = [axis.view(layer.groups, -1) for axis in (layer.inputs, layer.outputs)]
    whole = removed[axes[0]].all(1) & removed[axes[1]].all(1)
    return [axis[~whole] for axis in axes]


def round_up(
    groups: ChannelGroups, removed: Tensor, importance: Tensor, multiple: int, skip: Collection[str] = ()
) -> Tensor:
    """`removed` with components taken back until every channel count is a multiple, or is what it was.

    Of a grouped convolution as many are taken back in every group.
    """
    removed = removed.clone()
    if multiple <= 1:
        return removed
    layers = [layer for layer in groups.layers if layer.layer not in skip]
    changed = True
    while changed:
        changed = False
        for layer in layers:
            if layer.grouped:
                _round_up_groups(layer, removed, importance, multiple)
        for layer in layers:
            for axis in (layer.outputs, layer.inputs):
                gone = removed[axis]
                kept = int((~gone).sum())
                if not bool(gone.any()) or kept % multiple == 0:
                    continue
                order = torch.argsort(importance[axis], descending=True, stable=True)
                for component in axis[order].tolist():
                    if kept % multiple == 0:
                        break
                    if bool(removed[component]):
                        removed[component] = False
                        kept += int((axis == component).sum())
                changed = True
        even = balanced(groups, removed, importance, skip)
        changed, removed = changed or not torch.equal(even, removed), even
    return removed


def _round_up_groups(layer: Weighted, removed: Tensor, importance: Tensor, multiple: int) -> None:
    """Take back, in place, equally many components in every group of a convolution that is left."""
    for rows in _groups_left(layer, removed):
        gone = removed[rows]
        if not bool(gone.any()):
            continue
        step = math.lcm(multiple, len(rows)) // len(rows)
        kept = int((~gone).sum(1).max())
        target = min(-(-kept // step) * step, rows.shape[1])
        order = torch.argsort(torch.where(gone, importance[rows], torch.inf), dim=1, descending=True, stable=True)
        removed[rows.gather(1, order[:, :target])] = False
