"""The architectures of a trajectory, made by the engine itself on tensors without storage.

Channel groups, union and layer removal are those of a real reconfiguration, so every planned network is one that a
reconfiguration could have made.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ptsim.capture.resized import Recapture
from ptsim.network import Network
from ptsim.prune.groups import ChannelGroups, find_groups
from ptsim.prune.propagate import skeleton
from ptsim.prune.reconfigure import Surgery, remove_channels, weighted_layers
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
    """A network before pruning: its shapes, its channels, and the edges that a trajectory is about."""

    bones: nn.Module
    groups: ChannelGroups
    network: Network
    edges: tuple[Edge, ...]
    edge_of: Tensor
    table: CostTable

    def reconfigured(self, widths: np.ndarray) -> Iterator[Step]:
        """The network after every reconfiguration; `widths` has a row for each and a column per edge."""
        bones, groups, edge_of = copy.deepcopy(self.bones), self.groups, self.edge_of
        recapture = Recapture(
            bones,
            name=self.network.name,
            input_shape=self.network.input_shape,
            num_classes=self.network.num_classes,
            captured=self.network,
        )
        network = self.network
        for row in widths:
            sparse = _beyond(groups, edge_of, torch.as_tensor(row))
            if not bool(sparse.any()):
                yield Step(network=network, channels_removed=0, layers_removed=(), notes=())
                continue
            before = groups
            surgery = remove_channels(bones, groups, sparse)
            if surgery.changed:
                groups = surgery.groups
                edge_of = _followed(before, surgery, edge_of)
                network = recapture.network(bones)
            yield Step(
                network=network,
                channels_removed=surgery.channels_removed,
                layers_removed=surgery.layers_removed,
                notes=surgery.notes,
            )


def dense_network(
    build: Callable[[], nn.Module], *, name: str, input_shape: tuple[int, int, int], num_classes: int
) -> Dense:
    """The dense network of `build`, which is made without storage wherever its code allows it.

    Raises:
        UnsupportedModelError: the network cannot be traced.
    """
    bones = _without_storage(build)
    groups = find_groups(bones, input_shape)
    network = Recapture(bones, name=name, input_shape=input_shape, num_classes=num_classes).base
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
        for layer in gone:
            dies_with.setdefault(layer, []).append(len(edges))
        edge_of[components] = len(edges)
        edges.append(Edge(name=edge.name, width=edge.width, role=role, depth=depth, removable=bool(gone)))
    full = np.array([edge.width for edge in edges])
    table = cost_table(network, groups, edge_of.numpy(), dies_with, full)
    return Dense(bones=bones, groups=groups, network=network, edges=tuple(edges), edge_of=edge_of, table=table)


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
    counts = torch.zeros(groups.num_components, dtype=torch.int64)  # channels that a component stands for
    for layer in groups.layers:
        for axis in (layer.inputs, layer.outputs):
            counts = torch.maximum(counts, torch.bincount(axis, minlength=groups.num_components))
    sparse = torch.zeros(groups.num_components, dtype=torch.bool)
    for edge, width in enumerate(widths.tolist()):
        members = torch.nonzero((edge_of == edge) & groups.prunable).flatten()
        sparse[members[counts[members].cumsum(0) > width]] = True
    return sparse


def _followed(before: ChannelGroups, surgery: Surgery, edge_of: Tensor) -> Tensor:
    """The edge of every component after a surgery: what was kept of a tensor's axis, in order."""
    after = surgery.groups
    found = torch.full((after.num_components,), -1)
    for key, components in after.axes.items():
        old = before.axes.get(key)
        if old is not None:
            kept = edge_of[old][~surgery.removed[old]]
            if len(kept) == len(components):
                found[components] = kept
    return found
