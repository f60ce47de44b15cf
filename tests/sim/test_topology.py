"""All-reduces over pipes: closed forms, bytes, sharing, and laws."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptsim.costs.collectives import (
    hierarchical_all_reduce_seconds,
    ring_all_reduce_seconds,
    ring_wire_bytes,
    tree_all_reduce_seconds,
)
from ptsim.hardware.spec import Cluster, Link
from ptsim.sim.topology import Algorithm, Job, double_binary_tree, simulate_all_reduces

FAST = Link(name="fast", bandwidth_bytes_per_s=1e11, latency_s=2e-6)
SLOW = Link(name="slow", bandwidth_bytes_per_s=1e10, latency_s=5e-6)
ONE_NODE = Cluster(name="one node", device="d", gpus_per_node=64, intra=SLOW)
ONE_GPU_NODES = Cluster(name="one GPU a node", device="d", gpus_per_node=1, intra=FAST, inter=SLOW)
FOURS = Cluster(name="four GPUs a node", device="d", gpus_per_node=4, intra=FAST, inter=SLOW)


def ranks(num: int) -> tuple[int, ...]:
    return tuple(range(num))


@pytest.mark.parametrize("num", [1, 2, 3, 8, 24])
@pytest.mark.parametrize("cluster", [ONE_NODE, ONE_GPU_NODES])
@pytest.mark.parametrize("events", [True, False])
def test_symmetric_ring_is_the_closed_form(num: int, cluster: Cluster, events: bool) -> None:
    result = simulate_all_reduces(cluster, [Job(ranks=ranks(num), message_bytes=1e7)], events=events)
    assert result.seconds[0] == pytest.approx(ring_all_reduce_seconds(1e7, num, SLOW), rel=1e-3)


@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
@pytest.mark.parametrize("message_bytes", [1e4, 1e7])
def test_symmetric_hierarchical_is_the_closed_form(nodes: int, message_bytes: float) -> None:
    job = Job(ranks=ranks(4 * nodes), message_bytes=message_bytes, algorithm="hierarchical")
    expected = hierarchical_all_reduce_seconds(message_bytes, 4, nodes, FAST, SLOW)
    assert simulate_all_reduces(FOURS, [job]).seconds[0] == pytest.approx(expected, rel=1e-3)


def test_tree_of_two_is_the_closed_form() -> None:
    job = Job(ranks=ranks(2), message_bytes=1e8, algorithm="tree", num_chunks=2000)
    expected = tree_all_reduce_seconds(1e8, 2, SLOW)
    assert simulate_all_reduces(ONE_NODE, [job]).seconds[0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("num", [4, 8])
def test_tree_with_small_chunks_approaches_the_closed_form(num: int) -> None:
    job = Job(ranks=ranks(num), message_bytes=1e8, algorithm="tree", num_chunks=200)
    expected = tree_all_reduce_seconds(1e8, num, SLOW)
    assert simulate_all_reduces(ONE_NODE, [job]).seconds[0] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("algorithm", ["ring", "tree", "hierarchical"])
@pytest.mark.parametrize("num", [4, 8, 16])
def test_bytes_on_the_simulated_wire_are_the_formula(algorithm: Algorithm, num: int) -> None:
    job = Job(ranks=ranks(num), message_bytes=1.2e6, algorithm=algorithm, num_chunks=4)
    sent = simulate_all_reduces(FOURS, [job]).sent_bytes
    assert sum(sent.values()) / num == pytest.approx(ring_wire_bytes(1.2e6, num))
    if algorithm != "tree":  # a tree's ranks send unequal amounts
        assert set(map(round, sent.values())) == {round(ring_wire_bytes(1.2e6, num))}


def test_two_nodes_exchange_one_message_each_way_in_a_tree() -> None:
    job = Job(ranks=ranks(8), message_bytes=1e6, algorithm="tree")
    assert simulate_all_reduces(FOURS, [job]).pipe_bytes["node 0 out"] == pytest.approx(1e6)


@given(st.integers(1, 70))
def test_both_trees_reach_every_rank_with_at_most_two_children(size: int) -> None:
    for parents in double_binary_tree(size):
        assert sum(parent is None for parent in parents) == 1
        assert all(parents.count(rank) <= 2 for rank in range(size))
        for rank in range(size):
            height, node = 0, parents[rank]
            while node is not None:
                height, node = height + 1, parents[node]
            assert height <= 2 * size.bit_length()


def test_events_and_recurrence_agree_on_unequal_links() -> None:
    job = Job(ranks=ranks(12), message_bytes=1e7)
    odd = {"gpu 3 out": 0.3, "gpu 7 in": 0.5}
    late = {"gpu 5 in": 1e-3}
    both = [
        simulate_all_reduces(ONE_NODE, [job], bandwidth_factor=odd, extra_latency_s=late, events=events)
        for events in (True, False)
    ]
    assert both[0].seconds[0] == pytest.approx(both[1].seconds[0], rel=1e-9)
    assert both[0].pipe_bytes == pytest.approx(both[1].pipe_bytes)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["ring", "tree", "hierarchical"]),
    st.sampled_from([4, 8, 12]),
    st.dictionaries(st.sampled_from(["gpu 0 out", "gpu 3 in", "node 0 out", "gpu 2 out"]), st.floats(0, 1e-2)),
    st.dictionaries(st.sampled_from(["gpu 1 out", "gpu 2 in", "gpu 3 out"]), st.floats(0.05, 20)),
)
def test_unequal_latencies_and_bandwidths_never_deadlock_and_move_all_bytes(
    algorithm: Algorithm, num: int, latency: dict[str, float], factor: dict[str, float]
) -> None:
    latency = {name: value for name, value in latency.items() if num > 4 or not name.startswith("node")}
    job = Job(ranks=ranks(num), message_bytes=1e6, algorithm=algorithm, num_chunks=3)
    result = simulate_all_reduces(FOURS, [job], bandwidth_factor=factor, extra_latency_s=latency)
    assert result.seconds[0] > 0
    assert sum(result.sent_bytes.values()) == pytest.approx(2 * (num - 1) * 1e6)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["ring", "hierarchical"]), st.sampled_from([2, 4, 8]), st.floats(1, 50), st.floats(1, 50))
def test_more_bandwidth_never_costs_time(algorithm: Algorithm, num: int, inside: float, between: float) -> None:
    def seconds(f: float, g: float) -> float:
        cluster = msgspec.structs.replace(
            FOURS,
            intra=msgspec.structs.replace(FAST, bandwidth_bytes_per_s=1e10 * f),
            inter=msgspec.structs.replace(SLOW, bandwidth_bytes_per_s=1e9 * g),
        )
        job = Job(ranks=ranks(num), message_bytes=1e6, algorithm=algorithm)
        return simulate_all_reduces(cluster, [job], events=True).seconds[0]

    assert seconds(inside, between) <= seconds(1, 1) * (1 + 1e-9)


def test_jobs_that_share_a_network_slow_each_other_and_others_do_not() -> None:
    even = Job(ranks=(0, 4, 8, 12), message_bytes=1e7)
    odd = Job(ranks=(1, 5, 9, 13), message_bytes=1e7)
    alone = simulate_all_reduces(FOURS, [even]).seconds[0]
    shared = simulate_all_reduces(FOURS, [even, odd]).seconds
    assert shared[0] > 1.8 * alone
    assert max(shared) == pytest.approx(2 * alone, rel=0.02)
    apart = [Job(ranks=(0, 1, 2, 3), message_bytes=1e7), Job(ranks=(4, 5, 6, 7), message_bytes=1e7)]
    assert simulate_all_reduces(FOURS, apart).seconds[0] == pytest.approx(ring_all_reduce_seconds(1e7, 4, FAST))


def test_an_oversubscribed_leaf_slows_what_crosses_it() -> None:
    # 4 nodes, 2 a leaf, 4:1: an uplink carries 2 x 10 / 4 = 5 GB/s, half of what the ring's one crossing needs
    thin = msgspec.structs.replace(ONE_GPU_NODES, oversubscription=4.0)
    job = Job(ranks=ranks(4), message_bytes=4e8)
    full = simulate_all_reduces(ONE_GPU_NODES, [job], nodes_per_leaf=2).seconds[0]
    assert simulate_all_reduces(thin, [job], nodes_per_leaf=2).seconds[0] == pytest.approx(2 * full, rel=1e-3)


def test_a_thousand_ranks_take_the_closed_form_too() -> None:
    result = simulate_all_reduces(ONE_GPU_NODES, [Job(ranks=ranks(1024), message_bytes=1e8)])
    assert result.seconds[0] == pytest.approx(ring_all_reduce_seconds(1e8, 1024, SLOW), rel=1e-3)


@pytest.mark.parametrize(
    ("job", "says"),
    [
        (Job(ranks=(), message_bytes=1), "GPUs are needed"),
        (Job(ranks=(1, 1), message_bytes=1), "each once"),
        (Job(ranks=(0, 1), message_bytes=-1), "0 bytes or more"),
        (Job(ranks=(0, 1, 2, 3, 4), message_bytes=1, algorithm="hierarchical"), "as many GPUs on every node"),
    ],
)
def test_wrong_jobs_are_named(job: Job, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        simulate_all_reduces(FOURS, [job])


def test_an_unknown_pipe_is_named() -> None:
    with pytest.raises(ValueError, match="no pipe 'gpu 9 sideways'"):
        simulate_all_reduces(ONE_NODE, [Job(ranks=(0, 1), message_bytes=1)], bandwidth_factor={"gpu 9 sideways": 2})
