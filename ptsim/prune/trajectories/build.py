"""The architectures of a trajectory, made by the engine itself on tensors without storage.

Channel groups, union and layer removal are those of a real reconfiguration, so every planned network is one that a
reconfiguration could have made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptsim.capture.resized import Recapture
from ptsim.network import Network
from ptsim.prune.groups import ChannelGroups, find_groups
from ptsim.prune.propagate import skeleton
from ptsim.prune.reconfigure import Decision, only_in, remove_channels, repeat_removal, weighted_layers
from ptsim.prune.removal import Removal, find_removals
from ptsim.prune.trajectories.problem import Edge
from ptsim.prune.trajectories.roles import roles
from ptsim.prune.trajectories.table import CostTable, cost_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What one reconfiguration left, and what it took away."""

    network: Network
    channels_removed: int
    layers_removed: tuple[str, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """A network before pruning: its shapes, its channels, and the edges that a trajectory is about.

    `recapture` and `tried` learn with every network that is made, so that all trajectories of a plan share captures and
    rehearsals. What `tried` holds are the branches without a channel, and what was decided about them.
    """

    bones: nn.Module
    groups: ChannelGroups
    network: Network
    edges: tuple[Edge, ...]
    edge_of: Tensor
    table: CostTable
    recapture: Recapture
    tried: dict[tuple[Removal, ...], Decision] = dataclasses.field(default_factory=dict)

    @property
    def takes_trying_out(self) -> bool:
        """Whether a channel that can go passes a reshape."""
        return bool((self.groups.sensitive & self.groups.prunable).any())

    def reconfigured(self, widths: np.ndarray, *, sure: bool = True) -> Iterator[Step]:
        """The network after every reconfiguration; `widths` has a row for each and a column per edge.

        Every network is cut from the dense one, whose groups are known, and resized from a capture of the same
        structure. Only what was not tried out yet is tried out: a branch that goes, channels that pass a reshape.
        Trying these out takes most of the time: unless it has to be `sure`, they are taken to go as they should.

        Raises:
            Exception: what the model's code raises where it was not sure, and channels that pass a reshape cannot go.
        """
        network, bones = self.network, skeleton(self.bones)
        whole = _Parts(bones)
        before = _Cut(removed=torch.zeros_like(self.groups.prunable))
        for row in widths:
            whole.restore()
            cut = self._cut(bones, _beyond(self.groups, self.edge_of, torch.as_tensor(row)), sure=sure)
            if not torch.equal(cut.removed, before.removed) or cut.removals != before.removals:
                network = self.recapture.network(bones)
            gone = before.layers(self.groups)
            yield Step(
                network=network,
                channels_removed=sum(
                    int((cut.removed & ~before.removed)[layer.outputs].sum())
                    for layer in self.groups.layers
                    if layer.layer not in gone
                ),
                layers_removed=tuple(layer for layer in cut.layers(self.groups) if layer not in gone),
                notes=tuple(note for note in cut.notes if note not in before.notes),
            )
            before = cut

    def _cut(self, bones: nn.Module, sparse: Tensor, *, sure: bool) -> _Cut:
        """Take out of `bones` what goes once `sparse` components are without weight."""
        groups = self.groups
        empty = find_removals(groups, sparse)
        passes = bool((sparse & groups.sensitive).any())
        if (passes and sure) or (empty and empty not in self.tried):
            decision = remove_channels(bones, groups, sparse)
            if not passes:  # else it may be about the channels that pass a reshape
                self.tried[empty] = decision
            return _Cut(removed=decision.plan.removed, removals=decision.plan.removals, notes=decision.notes)
        known = self.tried.get(empty)
        removals, decided = (known.plan.removals, known.decided) if known else ((), ())
        removed, rescued = repeat_removal(bones, groups, sparse, removals)
        return _Cut(removed=removed, removals=removals, notes=(*rescued, *decided))


class _Parts:
    """The modules of a network as they are now: putting them back is quicker than a copy for every reconfiguration."""

    def __init__(self, model: nn.Module) -> None:
        self._was = [(module, self._copied(vars(module))) for module in model.modules()]

    def restore(self) -> None:
        for module, attributes in self._was:
            vars(module).clear()
            vars(module).update(self._copied(attributes))

    @staticmethod
    def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
        return {name: value.copy() if isinstance(value, dict) else value for name, value in attributes.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Cut:
    """What is gone of the dense network: a mask of components, and branches."""

    removed: Tensor
    removals: tuple[Removal, ...] = ()
    notes: tuple[str, ...] = ()

    def layers(self, groups: ChannelGroups) -> tuple[str, ...]:
        return tuple(name for removal in self.removals for name in weighted_layers(groups, removal))


def dense_network(
    build: Callable[[], nn.Module], *, name: str, input_shape: tuple[int, int, int], num_classes: int
) -> Dense:
    """The dense network of `build`, which is made without storage wherever its code allows it.

    Raises:
        UnsupportedModelError: the network cannot be traced.
    """
    bones = _without_storage(build)
    groups = find_groups(bones, input_shape)
    recapture = Recapture(bones, name=name, input_shape=input_shape, num_classes=num_classes)
    network = recapture.base
    places = roles(network)
    edges: list[Edge] = []
    edge_of = torch.full((groups.num_components,), -1)
    dies_with: dict[str, list[int]] = {}
    for edge in groups.edges():
        if not edge.prunable:
            continue
        role, depth = places.get(edge.name, ("plain", 0.5))
        components = torch.tensor(edge.components)
        alone = torch.zeros(groups.num_components, dtype=torch.bool)
        alone[components] = True
        gone = [layer for removal in find_removals(groups, alone) for layer in _layers(groups, removal)]
        if not bool(only_in(groups, set(gone))[components].all()):  # others keep a channel of it: a stream
            gone = []
        for layer in gone:
            dies_with.setdefault(layer, []).append(len(edges))
        edge_of[components] = len(edges)
        edges.append(Edge(name=edge.name, width=edge.width, role=role, depth=depth, removable=bool(gone)))
    full = np.array([edge.width for edge in edges])
    table = cost_table(network, groups, edge_of.numpy(), dies_with, full)
    return Dense(
        bones=bones,
        groups=groups,
        network=network,
        edges=tuple(edges),
        edge_of=edge_of,
        table=table,
        recapture=recapture,
    )


def _layers(groups: ChannelGroups, removal: Removal) -> tuple[str, ...]:
    """Everything that goes with a branch, its normalisations too."""
    return tuple(dict.fromkeys((*weighted_layers(groups, removal), *removal.dead, removal.constant)))


def _without_storage(build: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return skeleton(build())
    except Exception:  # a network whose code computes with values while it is built
        return skeleton(build())


def _beyond(groups: ChannelGroups, edge_of: Tensor, widths: Tensor) -> Tensor:
    """A mask of the components that go so that every edge keeps at most its width."""
    counts = groups.channel_counts()
    sparse = torch.zeros(groups.num_components, dtype=torch.bool)
    for edge, width in enumerate(widths.tolist()):
        members = torch.nonzero((edge_of == edge) & groups.prunable).flatten()
        sparse[members[counts[members].cumsum(0) > width]] = True
    return sparse
