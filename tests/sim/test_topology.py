"""All-reduces over pipes: closed forms, bytes, sharing, and laws."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptsim.costs.collectives import (
    all_reduce,
    hierarchical_all_reduce_seconds,
    ring_all_reduce_seconds,
    ring_wire_bytes,
    tree_all_reduce_seconds,
)
from ptsim.hardware.spec import Cluster, Link
from ptsim.sim.schedules import double_binary_tree
from ptsim.sim.topology import Fabric, PlacedJob, simulate_all_reduces

FAST = Link(name="fast", bandwidth_bytes_per_s=1e11, latency_s=2e-6)
SLOW = Link(name="slow", bandwidth_bytes_per_s=1e10, latency_s=5e-6)
ONE_NODE = Cluster(name="one node", device=None, gpus_per_node=64, intra=SLOW)
ONE_GPU_NODES = Cluster(name="one GPU a node", device=None, gpus_per_node=1, intra=FAST, inter=SLOW)
FOURS = Cluster(name="four GPUs a node", device=None, gpus_per_node=4, intra=FAST, inter=SLOW)


def ranks(num: int) -> tuple[int, ...]:
    return tuple(range(num))


# latency-bound, between, bandwidth-bound on the slow link (50 kB take as long as its latency)
SIZES = (10.0, 1e3, 5e4, 1e6, 1e9)
TOLERANCE = 1e-3  # what the simulator promises
ROUNDING = 5e-15  # the largest relative difference of its fast path; docs/claims.toml quotes this number


@pytest.mark.parametrize("cluster", [ONE_NODE, ONE_GPU_NODES], ids=["ports", "NICs"])
@pytest.mark.parametrize("num", range(1, 65))
def test_a_ring_of_equal_ranks_is_the_closed_form(num: int, cluster: Cluster) -> None:
    for size in SIZES:
        result = simulate_all_reduces(cluster, [PlacedJob(ranks=ranks(num), message_bytes=size)])
        assert result.seconds[0] == pytest.approx(ring_all_reduce_seconds(size, num, SLOW), rel=ROUNDING, abs=0)


@pytest.mark.parametrize("cluster", [ONE_NODE, ONE_GPU_NODES], ids=["ports", "NICs"])
@pytest.mark.parametrize("num", range(1, 65))
def test_a_tree_of_equal_ranks_is_the_closed_form(num: int, cluster: Cluster) -> None:
    for size in SIZES:
        for chunks in (1, 7, 64):
            job = PlacedJob(ranks=ranks(num), message_bytes=size, algorithm="tree", num_chunks=chunks)
            expected = tree_all_reduce_seconds(size, num, SLOW, num_chunks=chunks)
            assert simulate_all_reduces(cluster, [job]).seconds[0] == pytest.approx(expected, rel=ROUNDING, abs=0)


@pytest.mark.parametrize("nics", [1, 2, 4])
@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 8, 16])
def test_hierarchical_on_equal_nodes_is_the_closed_form(nodes: int, nics: int) -> None:
    cluster = msgspec.structs.replace(FOURS, nics_per_node=nics)
    for size in SIZES:
        job = PlacedJob(ranks=ranks(4 * nodes), message_bytes=size, algorithm="hierarchical")
        expected = hierarchical_all_reduce_seconds(size, 4, nodes, FAST, SLOW)
        assert simulate_all_reduces(cluster, [job]).seconds[0] == pytest.approx(expected, rel=ROUNDING, abs=0)
        if nodes < 3:
            assert simulate_all_reduces(cluster, [job], events=True).seconds[0] == pytest.approx(expected, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["ring", "tree", "hierarchical"]),
    st.integers(2, 9),
    st.floats(1, 1e9),
    st.integers(1, 6),
    st.floats(0, 1e-3),
    st.floats(1e8, 1e12),
)
def test_events_give_the_closed_forms_too(
    algorithm: str, num: int, size: float, chunks: int, latency: float, bandwidth: float
) -> None:
    link = Link(name="any", bandwidth_bytes_per_s=bandwidth, latency_s=latency)
    cluster = msgspec.structs.replace(ONE_GPU_NODES, inter=link, intra=msgspec.structs.replace(link, latency_s=0.0))
    expected = {
        "ring": ring_all_reduce_seconds(size, num, link),
        "tree": tree_all_reduce_seconds(size, num, link, num_chunks=chunks),
        "hierarchical": ring_all_reduce_seconds(size, num, link),
    }
    job = PlacedJob(ranks=ranks(num), message_bytes=size, algorithm=algorithm, num_chunks=chunks)
    found = simulate_all_reduces(cluster, [job], events=True).seconds[0]
    assert found == pytest.approx(expected[algorithm], rel=TOLERANCE)


def test_with_many_chunks_a_tree_costs_latency_and_two_messages() -> None:
    job = PlacedJob(ranks=ranks(16), message_bytes=1e8, algorithm="tree", num_chunks=20_000)
    expected = tree_all_reduce_seconds(1e8, 16, SLOW)
    assert simulate_all_reduces(ONE_NODE, [job]).seconds[0] == pytest.approx(expected, rel=TOLERANCE)
    assert expected == pytest.approx(8 * 5e-6 + 2e8 / 1e10)


@pytest.mark.parametrize("algorithm", ["ring", "tree", "hierarchical"])
@pytest.mark.parametrize("num", [4, 8, 16])
def test_bytes_on_the_simulated_wire_are_the_formula(algorithm: str, num: int) -> None:
    job = PlacedJob(ranks=ranks(num), message_bytes=1.2e6, algorithm=algorithm, num_chunks=4)
    sent = simulate_all_reduces(FOURS, [job]).sent_bytes
    assert sum(sent.values()) / num == pytest.approx(ring_wire_bytes(1.2e6, num))
    if algorithm != "tree":  # a tree's ranks send unequal amounts
        assert set(map(round, sent.values())) == {round(ring_wire_bytes(1.2e6, num))}


def test_two_nodes_exchange_one_message_each_way_in_a_tree() -> None:
    job = PlacedJob(ranks=ranks(8), message_bytes=1e6, algorithm="tree")
    assert simulate_all_reduces(FOURS, [job]).pipe_bytes["node 0 out"] == pytest.approx(1e6)
    unused = simulate_all_reduces(FOURS, [job], num_gpus=9).pipe_bytes
    assert {pipe for pipe, num_bytes in unused.items() if not num_bytes} == {
        "gpu 8 out", "gpu 8 in", "node 2 out", "node 2 in"
    }  # fmt: skip


@given(st.integers(1, 300))
def test_both_trees_have_the_least_depth_and_nobody_works_in_both(size: int) -> None:
    trees = double_binary_tree(size)
    for parents in trees:
        assert sum(parent is None for parent in parents) == 1
        depths = []
        for rank in range(size):
            depth, node = 0, parents[rank]
            while node is not None:
                depth, node = depth + 1, parents[node]
            depths.append(depth)
        assert max(depths) == math.ceil(math.log2(size))
    busiest = max(sum(parents.count(rank) + (parents[rank] is not None) for parents in trees) for rank in range(size))
    assert busiest == (0, 0, 2, 3, 4)[min(size, 4)]


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        (
            12,
            [
                {0: (8,), 8: (4, 10), 4: (2, 6), 2: (1, 3), 6: (5, 7), 10: (9, 11)},
                {11: (3,), 3: (1, 7), 1: (0, 2), 7: (5, 9), 5: (4, 6), 9: (8, 10)},
            ],
        ),
        (
            13,
            [
                {0: (8,), 8: (4, 12), 4: (2, 6), 2: (1, 3), 6: (5, 7), 12: (10,), 10: (9, 11)},
                {1: (9,), 9: (5, 0), 5: (3, 7), 3: (2, 4), 7: (6, 8), 0: (11,), 11: (10, 12)},
            ],
        ),
    ],
)
def test_both_trees_are_those_that_nccl_draws(size: int, drawn: list[dict[int, tuple[int, ...]]]) -> None:
    """NCCL's graph/trees.cc, `ncclGetDtree`: a mirror image for an even number of ranks, else a shift by one."""
    expected = [{child: parent for parent, children in tree.items() for child in children} for tree in drawn]
    found = [{child: p for child, p in enumerate(parents) if p is not None} for parents in double_binary_tree(size)]
    assert found == expected


@pytest.mark.parametrize("nics", [1, 2])
@pytest.mark.parametrize("algorithm", ["ring", "tree", "hierarchical"])
def test_a_gpu_hands_on_what_came_to_it_and_every_gpu_gets_something(algorithm: str, nics: int) -> None:
    cluster = msgspec.structs.replace(FOURS, nics_per_node=nics)
    job = PlacedJob(ranks=ranks(12), message_bytes=1.0, algorithm=algorithm)
    for stage in Fabric(cluster, 12).stages(job):
        for connection in stage.connections:
            assert {stage.connections[before].target for before in connection.after} <= {connection.source}
        assert {connection.target for connection in stage.connections} == set(range(12))


def test_a_ring_keeps_the_order_of_its_gpus_where_a_node_has_one_nic() -> None:
    """0, 4, 1, 5, 0: two of node 0's GPUs send over its NIC, each 2 · 3/4 of the message."""
    job = PlacedJob(ranks=(0, 4, 1, 5), message_bytes=1e6)
    assert simulate_all_reduces(FOURS, [job]).pipe_bytes["node 0 out"] == pytest.approx(3e6)


def test_a_node_that_has_several_nics_uses_all_of_them() -> None:
    for algorithm in ("ring", "tree"):
        job = PlacedJob(ranks=ranks(16), message_bytes=1e8, algorithm=algorithm)
        one = simulate_all_reduces(FOURS, [job])
        rails = simulate_all_reduces(msgspec.structs.replace(FOURS, nics_per_node=4), [job])
        assert rails.seconds[0] == pytest.approx(one.seconds[0], rel=0.02)  # the chains' ports differ a little
        used = [rails.pipe_bytes[f"node 1 out nic {nic}"] for nic in range(4)]
        assert sum(used) == pytest.approx(one.pipe_bytes["node 1 out"])
        assert used == pytest.approx([used[0]] * 4)


@pytest.mark.parametrize(("algorithm", "messages"), [("ring", 2 * 4 / 5), ("tree", 1.0)])
def test_the_only_gpu_of_a_node_sends_and_gets_everything_over_its_own_nic(algorithm: str, messages: float) -> None:
    """Five GPUs, four and one. A NIC has a quarter of the node's 10 GB/s, and the formula says so, too."""
    four = msgspec.structs.replace(FOURS, nics_per_node=4)
    job = PlacedJob(ranks=ranks(5), message_bytes=1e9, algorithm=algorithm)
    assert simulate_all_reduces(four, [job]).seconds[0] == pytest.approx(messages * 1e9 / 2.5e9, rel=0.05)
    assert all_reduce(1e9, four, 5, algorithm=algorithm).seconds == pytest.approx(messages * 1e9 / 2.5e9, rel=0.01)


def test_one_slow_nic_of_four_holds_up_the_ring_that_runs_over_it() -> None:
    four = msgspec.structs.replace(FOURS, nics_per_node=4)
    job = PlacedJob(ranks=ranks(16), message_bytes=1e9)
    whole = simulate_all_reduces(four, [job]).seconds[0]
    slow = simulate_all_reduces(four, [job], bandwidth_factor={"node 2 out nic 1": 0.25}).seconds[0]
    # a quarter of the message at a quarter of a quarter of the node's 10 GB/s
    assert slow == pytest.approx(2 * 15 / 16 * (1e9 / 4) / (1e10 / 16), rel=0.01)
    assert slow == pytest.approx(4 * whole, rel=0.01)


def test_a_name_stands_for_all_pipes_that_begin_with_it() -> None:
    four = msgspec.structs.replace(FOURS, nics_per_node=4)
    job = PlacedJob(ranks=ranks(16), message_bytes=1e9)
    every = {f"node 2 {way} nic {nic}": 0.5 for way in ("in", "out") for nic in range(4)}
    named = simulate_all_reduces(four, [job], bandwidth_factor={"node 2": 0.5}).seconds
    assert named == simulate_all_reduces(four, [job], bandwidth_factor=every).seconds


PIPES = ["gpu 0 out", "gpu 3 in", "gpu 2 out", "node 0", "node 1 in nic 1", "node 1 out nic 0"]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["ring", "tree", "hierarchical"]),
    st.sampled_from([8, 12, 20]),
    st.sampled_from([1.0, 4.0]),
    st.dictionaries(st.sampled_from(PIPES), st.floats(0, 1e-2)),
    st.dictionaries(st.sampled_from(PIPES), st.floats(0.05, 20)),
)
def test_events_and_recurrence_agree_on_unequal_links(
    algorithm: str, num: int, thin: float, latency: dict[str, float], factor: dict[str, float]
) -> None:
    cluster = msgspec.structs.replace(FOURS, nics_per_node=2, oversubscription=thin, nodes_per_leaf=2)
    job = PlacedJob(ranks=ranks(num), message_bytes=1e6, algorithm=algorithm, num_chunks=3, repeat=2)
    one, other = (
        simulate_all_reduces(cluster, [job], bandwidth_factor=factor, extra_latency_s=latency, events=events)
        for events in (True, False)
    )
    assert one.seconds[0] == pytest.approx(other.seconds[0], rel=1e-9)
    assert sum(one.sent_bytes.values()) == pytest.approx(2 * 2 * (num - 1) * 1e6)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["ring", "tree", "hierarchical"]),
    st.sampled_from([4, 8, 12]),
    st.dictionaries(st.sampled_from(["gpu 0 out", "gpu 3 in", "gpu 2 out"]), st.floats(0.05, 20)),
    st.floats(1, 50),
    st.floats(1, 50),
)
def test_more_bandwidth_never_costs_time(
    algorithm: str, num: int, factor: dict[str, float], inside: float, between: float
) -> None:
    def seconds(f: float, g: float) -> float:
        cluster = msgspec.structs.replace(
            FOURS,
            intra=msgspec.structs.replace(FAST, bandwidth_bytes_per_s=1e10 * f),
            inter=msgspec.structs.replace(SLOW, bandwidth_bytes_per_s=1e9 * g),
        )
        job = PlacedJob(ranks=ranks(num), message_bytes=1e6, algorithm=algorithm, num_chunks=3)
        return simulate_all_reduces(cluster, [job], bandwidth_factor=factor).seconds[0]

    assert seconds(inside, between) <= seconds(1, 1) * (1 + 1e-9)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["ring", "tree", "hierarchical"]), min_size=2, max_size=3),
    st.dictionaries(st.sampled_from(["gpu 0 out", "gpu 3 in", "node 0 out", "gpu 2 out"]), st.floats(0, 1e-2)),
    st.dictionaries(st.sampled_from(["gpu 1 out", "gpu 2 in", "node 1"]), st.floats(0.05, 20)),
    st.floats(0, 1e-3),
)
def test_jobs_of_any_kind_on_unequal_links_never_deadlock_and_never_gain(
    algorithms: list[str], latency: dict[str, float], factor: dict[str, float], start: float
) -> None:
    jobs = [
        PlacedJob(ranks=ranks(12), message_bytes=1e6, algorithm=algorithm, num_chunks=3, start_s=i * start)
        for i, algorithm in enumerate(algorithms)
    ]
    together = simulate_all_reduces(FOURS, jobs, bandwidth_factor=factor, extra_latency_s=latency)
    for job, seconds in zip(jobs, together.seconds, strict=True):
        alone = simulate_all_reduces(FOURS, [job], bandwidth_factor=factor, extra_latency_s=latency).seconds[0]
        assert seconds >= alone * (1 - 1e-9)
    assert sum(together.sent_bytes.values()) == pytest.approx(len(jobs) * 2 * 11 * 1e6)


@given(st.sampled_from(["ring", "tree", "hierarchical"]), st.permutations(range(8)))
@settings(max_examples=30, deadline=None)
def test_the_order_of_equal_gpus_of_a_node_does_not_matter(algorithm: str, order: list[int]) -> None:
    job = PlacedJob(ranks=tuple(order), message_bytes=1e6, algorithm=algorithm)
    ordered = msgspec.structs.replace(job, ranks=ranks(8))
    one, other = (simulate_all_reduces(ONE_NODE, [j]).seconds[0] for j in (job, ordered))
    assert one == pytest.approx(other, rel=1e-12)


@pytest.mark.parametrize("algorithm", ["ring", "tree", "hierarchical"])
def test_infinite_bandwidth_leaves_the_latency(algorithm: str) -> None:
    free = msgspec.structs.replace(FAST, bandwidth_bytes_per_s=math.inf, latency_s=0.0)
    cluster = msgspec.structs.replace(FOURS, intra=free, inter=free)
    assert simulate_all_reduces(
        cluster, [PlacedJob(ranks=ranks(12), message_bytes=1e9, algorithm=algorithm)]
    ).seconds == (0,)


def test_jobs_that_share_a_network_slow_each_other_and_others_do_not() -> None:
    even = PlacedJob(ranks=(0, 4, 8, 12), message_bytes=1e7)
    odd = PlacedJob(ranks=(1, 5, 9, 13), message_bytes=1e7)
    alone = simulate_all_reduces(FOURS, [even]).seconds[0]
    shared = simulate_all_reduces(FOURS, [even, odd]).seconds
    assert shared[0] > 1.8 * alone
    assert max(shared) == pytest.approx(2 * alone, rel=0.02)
    apart = [PlacedJob(ranks=(0, 1, 2, 3), message_bytes=1e7), PlacedJob(ranks=(4, 5, 6, 7), message_bytes=1e7)]
    assert simulate_all_reduces(FOURS, apart).seconds[0] == pytest.approx(ring_all_reduce_seconds(1e7, 4, FAST))


def test_an_oversubscribed_leaf_slows_what_crosses_it() -> None:
    # 4 nodes, 2 a leaf, 4:1: an uplink carries 2 x 10 / 4 = 5 GB/s, half of what the ring's one crossing needs
    thin = msgspec.structs.replace(ONE_GPU_NODES, oversubscription=4.0, nodes_per_leaf=2)
    job = PlacedJob(ranks=ranks(4), message_bytes=4e8)
    full = simulate_all_reduces(ONE_GPU_NODES, [job]).seconds[0]
    assert simulate_all_reduces(thin, [job]).seconds[0] == pytest.approx(2 * full, rel=1e-3)


def test_an_uplink_that_is_a_little_too_small_is_on_the_path_and_a_whole_one_is_not() -> None:
    # 2 nodes a leaf, 3:2: 2 x 10 / 1.5 = 13.3 GB/s up
    for oversubscription, pipes in ((1.5, ("leaf 0 up", "leaf 1 down")), (1.0, ())):
        thin = msgspec.structs.replace(ONE_GPU_NODES, oversubscription=oversubscription, nodes_per_leaf=2)
        fabric = Fabric(thin, 4)
        expected = ("gpu 0 out", "node 0 out", *pipes, "node 2 in", "gpu 2 in")
        assert fabric.path(0, 2)[0] == expected
        assert all(fabric.rates[pipe] == pytest.approx(2e10 / 1.5) for pipe in pipes)
        assert fabric.path(0, 1)[0] == ("gpu 0 out", "node 0 out", "node 1 in", "gpu 1 in")  # of one leaf


@pytest.mark.parametrize("algorithm", ["ring", "tree"])
def test_the_stages_of_one_byte_tell_the_time_of_any_message(algorithm: str) -> None:
    stages = Fabric(ONE_NODE, 8).stages(PlacedJob(ranks=ranks(8), message_bytes=1.0, algorithm=algorithm))
    expected = {
        "ring": ring_all_reduce_seconds(1e6, 8, SLOW),
        "tree": tree_all_reduce_seconds(1e6, 8, SLOW, num_chunks=64),
    }
    assert sum(stage.seconds(1e6) for stage in stages) == pytest.approx(expected[algorithm])


def test_a_thousand_ranks_take_the_closed_form_too() -> None:
    result = simulate_all_reduces(ONE_GPU_NODES, [PlacedJob(ranks=ranks(1024), message_bytes=1e8)])
    assert result.seconds[0] == pytest.approx(ring_all_reduce_seconds(1e8, 1024, SLOW), rel=1e-3)


@pytest.mark.parametrize(
    ("job", "says"),
    [
        (PlacedJob(ranks=(), message_bytes=1), "GPUs are needed"),
        (PlacedJob(ranks=(1, 1), message_bytes=1), "each once"),
        (PlacedJob(ranks=(0, 1), message_bytes=-1), "0 bytes or more"),
        (PlacedJob(ranks=(0, 1), message_bytes=1, num_chunks=0), "at least one chunk"),
        (PlacedJob(ranks=(0, 1), message_bytes=1, repeat=0), "one repetition"),
        (PlacedJob(ranks=(0, 1, 2, 3, 4), message_bytes=1, algorithm="hierarchical"), "as many GPUs on every node"),
    ],
)
def test_wrong_jobs_are_named(job: PlacedJob, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        simulate_all_reduces(FOURS, [job])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"bandwidth_factor": {"gpu 9 sideways": 2}},
            "no pipe 'gpu 9 sideways' among 2 GPUs of one node; there are 'gpu 0 out', 'gpu 0 in'",
        ),
        ({"bandwidth_factor": {"gpu": 2, "gpu 1": 0}}, "bandwidth factor 0"),
        ({"bandwidth_factor": {"gpu 1": math.nan}}, "bandwidth factor nan"),
        ({"bandwidth_factor": {"gpu 1": math.inf}}, "bandwidth factor inf"),
        ({"extra_latency_s": {"gpu 1": -1}}, "extra latency -1"),
        ({"extra_latency_s": {"gpu 1": math.inf}}, "extra latency inf"),
    ],
)
def test_wrong_links_are_named(arguments: dict[str, dict[str, float]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        simulate_all_reduces(ONE_NODE, [PlacedJob(ranks=(0, 1), message_bytes=1)], **arguments)


def test_paths_go_over_the_nics_and_leaf_switches_of_their_nodes() -> None:
    """5 nodes of 4 GPUs, two of which share a NIC; two nodes share a leaf switch, a third of whose traffic goes up."""
    cluster = msgspec.structs.replace(FOURS, nics_per_node=2, oversubscription=3.0, nodes_per_leaf=2)
    fabric = Fabric(cluster, 20, bandwidth_factor={"node 4 in": 0.5}, extra_latency_s={"leaf 2": 1e-3})
    assert fabric.path(0, 3) == (("gpu 0 out", "gpu 3 in"), 2e-6)
    assert fabric.path(2, 5) == (("gpu 2 out", "node 0 out nic 1", "node 1 in nic 0", "gpu 5 in"), 5e-6)
    pipes, latency_s = fabric.path(1, 18)
    assert pipes == ("gpu 1 out", "node 0 out nic 0", "leaf 0 up", "leaf 2 down", "node 4 in nic 1", "gpu 18 in")
    assert latency_s == pytest.approx(5e-6 + 1e-3)
    assert [fabric.rates[pipe] for pipe in pipes] == pytest.approx([1e11, 5e9, 2e10 / 3, 2e10 / 3, 2.5e9, 1e11])
    assert [gpu for gpu in range(8) if fabric.cluster.rail_of(gpu) == 1] == [2, 3, 6, 7]
    assert sum(pipe.startswith("leaf") for pipe in fabric.rates) == 6
