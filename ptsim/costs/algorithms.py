"""Which all-reduce algorithms there are: what each one sends, who has it, and how it is simulated link by link.

An algorithm is one row. Another package adds one with `add_algorithm`, or as an entry point of the group
"ptsim.collectives".
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from ptsim.errors import UsageError
from ptsim.hardware.spec import Cluster, LinkKind
from ptsim.registry import Registry

AUTO = "auto"  # the name that asks for the fastest of the automatic ones


class MessageWork(NamedTuple):
    """What one all-reduce does: hops one after the other, and messages sent, counted in whole messages."""

    hops_inside: float
    hops_between: float
    sent_per_gpu_inside: float
    sent_per_node_between: float


class CollectiveAlgorithm(msgspec.Struct, frozen=True, kw_only=True):
    """One all-reduce algorithm.

    Attributes:
        name: what users and results call it.
        work: (cluster, GPUs, nodes) → what it sends.
        libraries: that have it.
        automatic: "auto" chooses among these.
        like_a_tree: NCCL's constants for trees count, not those for rings.
        levels_in_turn: the part inside a node and the part between nodes follow each other and do not overlap.
        uses_switch: a switch that adds up by itself does the part inside a node.
        schedule: "module:function" that says who sends what to whom, as `sim.schedules.ring_schedule` does; empty where
            the algorithm cannot be simulated link by link.
    """

    name: str
    work: Callable[[Cluster, int, int], MessageWork]
    libraries: tuple[str, ...] = ("nccl", "gloo")
    automatic: bool = False
    like_a_tree: bool = False
    levels_in_turn: bool = False
    uses_switch: bool = False
    schedule: str = ""


def fullest_node(cluster: Cluster, gpus: int, nodes: int) -> int:
    """GPUs of the node that has most of them: nodes are filled one after the other; where more are in use, evenly."""
    filled = -(-gpus // cluster.gpus_per_node)
    return min(gpus, cluster.gpus_per_node) if nodes == filled else -(-gpus // nodes)


def reachable_nics(cluster: Cluster, gpus: int, nodes: int) -> float:
    """Which part of a node's NICs the all-reduce can use: those of the GPUs of the node that has fewest.

    Every GPU sends over a NIC of its own or one that it shares. Where nodes are filled one after the other, the last
    one may have few.
    """
    last = gpus - (nodes - 1) * cluster.gpus_per_node
    if not 0 < last <= cluster.gpus_per_node:  # not so filled
        return 1.0
    return (cluster.rail_of(last - 1) + 1) / cluster.num_rails


def _ring(cluster: Cluster, gpus: int, nodes: int) -> MessageWork:
    """2(p-1) hops, 2(N-1) of them between nodes; 2(p-1)/p of the message over every link."""
    volume = 2 * (gpus - 1) / gpus
    return MessageWork(2.0 * (gpus - nodes), 2.0 * (nodes - 1), volume if gpus > nodes else 0.0, volume)


def _tree(cluster: Cluster, gpus: int, nodes: int) -> MessageWork:
    """A chain inside the node, so that a GPU sends up and down, and a double binary tree between nodes.

    Two nodes exchange one message each way, where every GPU has a NIC. Machines that share NICs show none of that gain:
    ABCI and Polaris over InfiniBand, Slingshot, GPUDirect-TCPX with 4 NICs for 8 GPUs and sockets run large messages at
    the ring's rate.
    """
    per_node = fullest_node(cluster, gpus, nodes)
    chain = 0.0 if per_node == 1 else (1.0 if per_node == 2 else 2.0)
    paired = cluster.inter is not None and cluster.inter.kind is LinkKind.EFA
    between = 0.0 if nodes == 1 else (1.0 if nodes == 2 and (paired or cluster.nics_per_node >= per_node) else 2.0)
    return MessageWork(2.0 * (per_node - 1), 2 * math.log2(nodes), chain, between)


def _hierarchical(cluster: Cluster, gpus: int, nodes: int) -> MessageWork:
    """Reduce-scatter inside the nodes, rings of the shards between them, all-gather inside."""
    per_node = fullest_node(cluster, gpus, nodes)
    return MessageWork(2.0 * (per_node - 1), 2.0 * (nodes - 1), 2 * (per_node - 1) / per_node, 2 * (nodes - 1) / nodes)


RING = CollectiveAlgorithm(name="ring", work=_ring, automatic=True, schedule="ptsim.sim.schedules:ring_schedule")
TREE = CollectiveAlgorithm(
    name="tree",
    work=_tree,
    libraries=("nccl",),
    automatic=True,
    like_a_tree=True,
    uses_switch=True,
    schedule="ptsim.sim.schedules:tree_schedule",
)
HIERARCHICAL = CollectiveAlgorithm(
    name="hierarchical",
    work=_hierarchical,
    levels_in_turn=True,
    uses_switch=True,
    schedule="ptsim.sim.schedules:hierarchical_schedule",
)

ALGORITHMS: Registry[CollectiveAlgorithm] = Registry(
    "all-reduce algorithm",
    entry_points="ptsim.collectives",
    own={
        "ring": "ptsim.costs.algorithms:RING",
        "tree": "ptsim.costs.algorithms:TREE",
        "hierarchical": "ptsim.costs.algorithms:HIERARCHICAL",
    },
)


def add_algorithm(row: CollectiveAlgorithm) -> None:
    """Make an algorithm available.

    Raises:
        UsageError: the name is taken.
    """
    if row.name == AUTO:
        raise UsageError(f"an algorithm cannot be called {AUTO!r}: that asks for the fastest one")
    ALGORITHMS.add(row.name, row)
    all_algorithms.cache_clear()


def remove_algorithm(name: str) -> None:
    """Forget an algorithm that `add_algorithm` made."""
    ALGORITHMS.remove(name)
    all_algorithms.cache_clear()


@functools.cache
def all_algorithms() -> tuple[CollectiveAlgorithm, ...]:
    """All algorithms, by name. Kept: a simulation asks some hundred thousand times."""
    return tuple(ALGORITHMS.find(name) for name in ALGORITHMS.names())


def find_algorithm(name: str) -> CollectiveAlgorithm:
    """The algorithm called `name`.

    Raises:
        UnknownNameError: there is none.
    """
    return next((row for row in all_algorithms() if row.name == name), None) or ALGORITHMS.find(name)


def check_choice(name: str) -> None:
    """Refuse what is neither "auto" nor an algorithm.

    Raises:
        UnknownNameError: `name` is neither.
    """
    if name != AUTO:
        find_algorithm(name)


def load_schedule(name: str) -> Callable[..., Any]:
    """The function that says who sends what to whom in the algorithm called `name`.

    Raises:
        UnknownNameError: there is no such algorithm.
        UsageError: it cannot be simulated link by link.
    """
    row = find_algorithm(name)
    if not row.schedule:
        raise UsageError(f"the all-reduce algorithm {name!r} has no schedule: it cannot be simulated link by link")
    module, _, function = row.schedule.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return loaded
