"""All-reduce algorithms are rows of a registry; another package adds one as one row."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec
import pytest

import ptsim
from ptsim.cli.main import run
from ptsim.costs.algorithms import (
    CollectiveAlgorithm,
    MessageWork,
    add_algorithm,
    all_algorithms,
    find_algorithm,
    remove_algorithm,
)
from ptsim.costs.collectives import all_reduce
from ptsim.errors import UnknownNameError, UsageError
from ptsim.hardware.spec import Cluster, Link, LinkKind
from ptsim.sim.options import Options
from ptsim.sim.run import change
from ptsim.sim.schedules import Connection, Placement, Stage
from ptsim.sim.topology import PlacedJob, simulate_all_reduces

LINK = Link(name="l", bandwidth_bytes_per_s=1e9, latency_s=1e-3)
CLUSTER = Cluster(name="c", device=None, gpus_per_node=8, intra=LINK)


def _to_one(cluster: Cluster, gpus: int, nodes: int) -> MessageWork:
    """Everybody sends to GPU 0, which sends the sum back: p-1 messages over its link, each way."""
    return MessageWork(2.0, 0.0, 2.0 * (gpus - 1), 0.0)


def star_schedule(placement: Placement, message_bytes: float, *, num_chunks: int) -> tuple[Stage, ...]:
    """To GPU 0, and back."""
    first, *others = placement.ranks
    there = tuple(Connection(rank, first, ()) for rank in others)
    back = tuple(Connection(first, rank, ()) for rank in others)
    return tuple(Stage(connections=c, num_chunks=1, chunk_bytes=message_bytes, lag=0) for c in (there, back))


@pytest.fixture
def star() -> Iterator[None]:
    add_algorithm(CollectiveAlgorithm(name="star", work=_to_one, schedule=f"{__name__}:star_schedule"))
    yield
    remove_algorithm("star")


def test_an_algorithm_from_outside_has_its_time_by_formula_and_link_by_link(star: None) -> None:
    """By hand, 5 GPUs and 10 MB: twice (1 ms + 4 · 10 MB / 1 GB/s) = 82 ms."""
    assert all_reduce(10_000_000, CLUSTER, 5, algorithm="star").seconds == pytest.approx(0.082)
    job = PlacedJob(ranks=tuple(range(5)), message_bytes=1e7, algorithm="star")
    assert simulate_all_reduces(CLUSTER, [job]).seconds == pytest.approx((0.082,))
    assert change(Options(), {"algorithm": "star"}).algorithm == "star"
    assert run(["allreduce", "--cluster", "dgx-a100", "--gpus", "8", "--bytes", "1e6", "--algorithm", "star"]) == 0


def test_auto_chooses_only_among_what_says_so(star: None) -> None:
    assert [row.name for row in all_algorithms() if row.automatic] == ["ring", "tree"]
    assert all_reduce(10_000_000, CLUSTER, 5).algorithm in ("ring", "tree")


def test_an_unknown_algorithm_says_which_exist() -> None:
    for ask in (
        lambda: ptsim.allreduce("dgx-a100", 8, 1000, algorithm="star"),
        lambda: change(Options(), {"algorithm": "star"}),
    ):
        with pytest.raises(UnknownNameError, match="'star'; known: hierarchical, ring, tree"):
            ask()


def test_names_are_taken_once() -> None:
    for name in ("ring", "auto"):
        with pytest.raises(UsageError, match=r"exists already|cannot be called"):
            add_algorithm(CollectiveAlgorithm(name=name, work=_to_one))


def test_without_a_schedule_it_cannot_be_simulated_link_by_link() -> None:
    add_algorithm(CollectiveAlgorithm(name="bare", work=_to_one))
    try:
        with pytest.raises(UsageError, match="'bare' has no schedule"):
            simulate_all_reduces(CLUSTER, [PlacedJob(ranks=(0, 1), message_bytes=1.0, algorithm="bare")])
    finally:
        remove_algorithm("bare")


@pytest.mark.parametrize(
    ("name", "gpus", "nodes", "nics", "expected"),
    [
        # Every rank sends 2(p-1) shards of 1/p; 2(N-1) of the hops go between nodes.
        ("ring", 8, 1, 1, MessageWork(14, 0, 14 / 8, 14 / 8)),
        ("ring", 16, 2, 1, MessageWork(28, 2, 30 / 16, 30 / 16)),
        ("ring", 4, 4, 1, MessageWork(0, 6, 0, 6 / 4)),
        # Up and down a chain of 8, then a double binary tree; of two nodes each sends once where every GPU has a NIC.
        ("tree", 16, 2, 1, MessageWork(14, 2, 2, 2)),
        ("tree", 16, 2, 8, MessageWork(14, 2, 2, 1)),
        ("tree", 4, 2, 2, MessageWork(2, 2, 1, 1)),
        ("tree", 32, 4, 8, MessageWork(14, 4, 2, 2)),
        ("tree", 8, 1, 8, MessageWork(14, 0, 2, 0)),
        ("tree", 24, 3, 8, MessageWork(14, 2 * math.log2(3), 2, 2)),
        ("tree", 2, 2, 1, MessageWork(0, 2, 0, 1)),
        ("tree", 4, 4, 1, MessageWork(0, 4, 0, 2)),
        # Nodes that are not full count as their fullest.
        ("ring", 15, 2, 1, MessageWork(26, 2, 28 / 15, 28 / 15)),
        ("tree", 15, 2, 7, MessageWork(14, 2, 2, 2)),
        ("tree", 15, 2, 8, MessageWork(14, 2, 2, 1)),
        ("hierarchical", 15, 2, 1, MessageWork(14, 2, 14 / 8, 1)),
        ("hierarchical", 32, 4, 1, MessageWork(14, 6, 14 / 8, 6 / 4)),
        ("hierarchical", 8, 1, 1, MessageWork(14, 0, 14 / 8, 0)),
        # Nodes are filled one after the other: eight and one, not five and four. Three nodes for nine have three each.
        ("ring", 9, 2, 1, MessageWork(14, 2, 16 / 9, 16 / 9)),
        ("tree", 9, 2, 7, MessageWork(14, 2, 2, 2)),
        ("tree", 9, 2, 8, MessageWork(14, 2, 2, 1)),
        ("hierarchical", 9, 2, 1, MessageWork(14, 2, 14 / 8, 1)),
        ("tree", 9, 3, 2, MessageWork(4, 2 * math.log2(3), 2, 2)),
        ("hierarchical", 17, 3, 1, MessageWork(14, 4, 14 / 8, 4 / 3)),
    ],
)
def test_hops_and_messages_of_an_all_reduce_are_those_counted_by_hand(
    name: str, gpus: int, nodes: int, nics: int, expected: MessageWork
) -> None:
    cluster = msgspec.structs.replace(CLUSTER, inter=LINK, nics_per_node=nics, max_nodes=8)
    assert find_algorithm(name).work(cluster, gpus, nodes) == pytest.approx(expected)


@pytest.mark.parametrize(("nodes", "between"), [(1, 0.0), (2, 1.0), (4, 2.0)])
def test_two_nodes_of_aws_exchange_one_message_though_they_share_nics(nodes: int, between: float) -> None:
    inter = msgspec.structs.replace(LINK, kind=LinkKind.EFA)
    cluster = msgspec.structs.replace(CLUSTER, inter=inter if nodes > 1 else None, nics_per_node=1)
    assert find_algorithm("tree").work(cluster, 8 * nodes, nodes).sent_per_node_between == between


def test_gloo_has_rings_and_hierarchies_and_no_trees() -> None:
    cpus = msgspec.structs.replace(CLUSTER, library="gloo")
    # 8 ranks: 14 hops of 1 ms, 14/8 of 4 MB at 1 GB/s.
    for name in ("ring", "hierarchical", "auto"):
        assert all_reduce(4_000_000, cpus, 8, algorithm=name).seconds == pytest.approx(0.014 + 0.007)
    with pytest.raises(UsageError, match="runs gloo, which has no tree"):
        all_reduce(4_000_000, cpus, 8, algorithm="tree")
