"""The all-reduce formulas against hand arithmetic."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptsim.costs.collectives import (
    all_reduce,
    allreduce,
    hierarchical_all_reduce_seconds,
    made_of_halves,
    nodes_for,
    ring_all_reduce_seconds,
    ring_wire_bytes,
    tree_all_reduce_seconds,
)
from ptsim.costs.nccl import default_fit
from ptsim.costs.tiers import Tier
from ptsim.errors import UsageError
from ptsim.hardware.catalog import load_cluster
from ptsim.hardware.spec import AllReduceTable, Cluster, Link, LinkKind

SLOW = Link(name="1 GB/s, 10 µs", bandwidth_bytes_per_s=1e9, latency_s=1e-5)
FAST = Link(name="10 GB/s, 1 µs", bandwidth_bytes_per_s=1e10, latency_s=1e-6)
CLUSTER = Cluster(name="two tiers", device=None, gpus_per_node=4, intra=FAST, inter=SLOW, max_nodes=4)


def test_ring_takes_two_p_minus_one_steps_of_one_chunk() -> None:
    # p = 4, 4 MB: 6 steps of 10 µs + 1 MB / (1 GB/s) = 1.01 ms
    assert ring_all_reduce_seconds(4_000_000, 4, SLOW) == pytest.approx(6.06e-3)


def test_tree_goes_up_and_down_log_p_levels() -> None:
    # p = 8: 6 hops of 10 µs and 2 x 1 MB / (1 GB/s)
    assert tree_all_reduce_seconds(1_000_000, 8, SLOW) == pytest.approx(2.06e-3)


def test_an_efficiency_that_the_user_states_is_taken_as_it_is() -> None:
    pcie = Link(name="half of 10 GB/s", bandwidth_bytes_per_s=1e10, kind=LinkKind.PCIE, efficiency=0.5)
    box = Cluster(name="a box", device=None, gpus_per_node=8, intra=pcie)
    # 2 x 7/8 x 100 GB at 5 GB/s; latencies are microseconds
    assert all_reduce(10**11, box, 8, algorithm="ring").seconds == pytest.approx(35.0, rel=1e-3)


def test_a_tree_in_chunks_fills_its_pipeline_first() -> None:
    # p = 8, 1 MB in halves of 10 chunks: a stage takes 4 x 50 kB / (1 GB/s) = 0.2 ms, 6 stages and 9 more chunks
    assert tree_all_reduce_seconds(1_000_000, 8, SLOW, num_chunks=10) == pytest.approx(6 * 1e-5 + 15 * 2e-4)
    # two ranks exchange their halves, three have three connections each way; 5 ranks are 3 levels deep
    assert tree_all_reduce_seconds(1_000_000, 2, SLOW) == pytest.approx(2 * 1e-5 + 1e-3)
    assert tree_all_reduce_seconds(1_000_000, 3, SLOW) == pytest.approx(4 * 1e-5 + 1.5e-3)
    assert tree_all_reduce_seconds(1_000_000, 5, SLOW) == pytest.approx(6 * 1e-5 + 2e-3)


def test_hierarchical_reduces_inside_the_node_first() -> None:
    # inside: 6 steps of 1 µs + 1 MB / (10 GB/s); between two nodes: 2 steps of 10 µs + 4 x 0.5 MB / (1 GB/s)
    expected = 6 * (1e-6 + 1e-4) + 2 * (1e-5 + 2e-3)
    assert hierarchical_all_reduce_seconds(4_000_000, 4, 2, FAST, SLOW) == pytest.approx(expected)


def test_every_gpu_sends_two_p_minus_one_over_p_of_the_message() -> None:
    assert ring_wire_bytes(1000, 1) == 0
    assert ring_wire_bytes(1000, 2) == 1000
    assert ring_wire_bytes(1000, 8) == 1750
    assert all_reduce(1000, CLUSTER, 8).wire_bytes_per_gpu == 1750


@pytest.mark.parametrize(
    ("nics", "per_node", "in_use"), [(8, 1, 1), (8, 4, 4), (4, 1, 1), (4, 4, 2), (16, 2, 4), (1, 1, 1)]
)
def test_a_table_of_few_gpus_a_node_is_of_the_nics_that_are_theirs(nics: int, per_node: int, in_use: int) -> None:
    """Every NIC carries 25 GB/s; two nodes exchange the message over those in use, as the table says to the byte.

    So the links are as fast as they are said to be, and whole nodes take what they take without a table.
    """
    inside = Link(name="i", bandwidth_bytes_per_s=1e15, latency_s=0.0)
    between = Link(name="o", bandwidth_bytes_per_s=nics * 25e9, latency_s=0.0)
    bare = Cluster(name="c", device=None, gpus_per_node=8, intra=inside, inter=between, nics_per_node=nics)
    size, gpus = 10**9, 2 * per_node
    volume = 1.0 if nics >= 8 or gpus == 2 else 2 * (gpus - 1) / gpus  # trees, where every GPU has a NIC; else rings
    table = AllReduceTable(
        num_gpus=gpus, num_nodes=2, size_bytes=(size,), seconds=(volume * size / (in_use * 25e9),),
        relative_jitter=0.0, source="made up",
    )  # fmt: skip
    found = all_reduce(size, msgspec.structs.replace(bare, tables=(table,)), 16)
    assert found.tier is Tier.SCALED
    assert found.seconds == pytest.approx(all_reduce(size, bare, 16).seconds, rel=1e-6)


@pytest.mark.parametrize(("mebibytes", "microseconds"), [(128, 3539.5), (512, 11625), (2048, 45662), (8192, 179880)])
def test_two_nodes_with_shared_tcpx_nics_run_at_the_rings_rate(mebibytes: int, microseconds: float) -> None:
    """Published nccl-tests of 2 A3 High machines (8 H100 and 4 NICs of 200 Gbit/s each, GPUDirect-TCPX)."""
    unmeasured = msgspec.structs.replace(load_cluster("gcp-a3-highgpu-8g"), tables=())
    taken = all_reduce(mebibytes * 2**20, unmeasured, 16)
    assert taken.seconds == pytest.approx(microseconds * 1e-6, rel=0.06)


def test_a_measured_catalog_cluster_speaks_for_more_nodes_than_were_measured() -> None:
    """The same run: small messages over GPUDirect-TCPX take 1.7 ms, which the topology alone puts at a quarter."""
    measured = allreduce("gcp-a3-highgpu-8g", 16, 4 * 2**20)
    assert (measured.tier, measured.seconds) == ("measured", pytest.approx(1701.3e-6))
    more = allreduce("gcp-a3-highgpu-8g", 32, 4 * 2**20)
    assert more.tier == "scaled"
    assert more.seconds > measured.seconds


def test_one_gpu_needs_no_all_reduce() -> None:
    assert all_reduce(10**9, CLUSTER, 1).seconds == 0


def test_a_measured_table_is_preferred_and_met_at_its_points() -> None:
    table = AllReduceTable(
        num_gpus=4, num_nodes=1, size_bytes=(1024, 4096), seconds=(1e-5, 2e-5), relative_jitter=0.02, source="test"
    )
    cluster = Cluster(name="t", device=None, gpus_per_node=4, intra=FAST, tables=(table,))
    result = all_reduce(4096, cluster, 4)
    assert result.algorithm == "table"
    assert result.seconds == pytest.approx(2e-5)
    assert result.low_s < result.seconds < result.high_s


@given(st.integers(0, 2**34), st.integers(1, 16), st.floats(1, 100))
def test_more_bandwidth_never_costs_time(message_bytes: int, num_gpus: int, factor: float) -> None:
    for kind in LinkKind:
        slow, fast = (
            Cluster(
                name="c",
                device=None,
                gpus_per_node=4,
                intra=Link(name="i", bandwidth_bytes_per_s=1e10 * f, kind=kind),
                inter=Link(name="o", bandwidth_bytes_per_s=1e9 * f, kind=kind),
            )
            for f in (1.0, factor)
        )
        assert all_reduce(message_bytes, fast, num_gpus).seconds <= all_reduce(
            message_bytes, slow, num_gpus
        ).seconds * (1 + 1e-12)


@pytest.mark.parametrize(
    ("message_bytes", "num_gpus", "says"), [(-1, 4, "negative"), (1, 0, "at least 1"), (1, 17, "16 GPUs")]
)
def test_wrong_arguments_are_named(message_bytes: int, num_gpus: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        all_reduce(message_bytes, CLUSTER, num_gpus)


def test_a_table_of_large_messages_does_not_measure_small_ones() -> None:
    # Two published runs of 8 A100 on NVSwitch took 75.4 and 74.8 µs for 1 MiB (traces/public/allreduce.csv).
    sizes = (2**33, 2**34)
    table = AllReduceTable(
        num_gpus=8, num_nodes=1, size_bytes=sizes, seconds=(0.0648, 0.1296), relative_jitter=0.01, source="made up"
    )
    base = load_cluster("dgx-a100")
    cluster = msgspec.structs.replace(base, tables=(table,))
    small = all_reduce(2**20, cluster, 8)
    assert small.tier is Tier.SCALED
    assert small.seconds == pytest.approx(75e-6, rel=0.3)
    assert small.low_s < 75e-6 / 2
    assert small.high_s > 2 * 75e-6
    large = all_reduce(2**36, cluster, 8)
    assert large.tier is Tier.SCALED
    assert large.seconds == pytest.approx(4 * 0.1296, rel=0.02)
    assert all_reduce(2**33, cluster, 8).tier is Tier.MEASURED


@pytest.mark.parametrize(("p", "hops", "halves"), [(1, 0, 0), (2, 2, 2), (4, 4, 4), (9, 8, 4)])
def test_a_trees_hops_and_shares_of_the_link(p: int, hops: int, halves: int) -> None:
    """⌈log₂ p⌉ hops up and as many down; at most 4 connections share the link. In one chunk every stage waits."""
    sent_s = halves * 0.5e-3
    assert tree_all_reduce_seconds(1_000_000, p, SLOW) == pytest.approx(hops * 1e-5 + sent_s)
    assert tree_all_reduce_seconds(1_000_000, p, SLOW, num_chunks=1) == pytest.approx(hops * (1e-5 + sent_s))


def test_a_link_without_a_latency_has_none() -> None:
    link = Link(name="1 GB/s", bandwidth_bytes_per_s=1e9)
    assert ring_all_reduce_seconds(4_000_000, 4, link) == pytest.approx(6e-3)
    assert tree_all_reduce_seconds(4_000_000, 4, link) == pytest.approx(8e-3)


@pytest.mark.parametrize(
    ("algorithm", "gpus", "expected"),
    [
        # 14 hops inside; 14/8 of 4 MB at 10 GB/s. Of 16 GPUs 28 inside and 2 between, 30/16 at 1 GB/s.
        ("ring", 8, 14 * 1e-6 + 7e-4),
        ("ring", 16, 28 * 1e-6 + 2 * 1e-5 + 7.5e-3),
        # Up and down the chain of 8 and one edge between the nodes, 2 messages each.
        ("tree", 16, 14 * 1e-6 + 2 * 1e-5 + 8e-3),
        # 14 hops and 14/8 inside, then 2 hops and one message between: one after the other.
        ("hierarchical", 16, 14 * 1e-6 + 7e-4 + 2 * 1e-5 + 4e-3),
        ("auto", 16, 28 * 1e-6 + 2 * 1e-5 + 7.5e-3),
    ],
)
def test_on_links_of_known_speed_an_all_reduce_takes_its_hops_and_messages(
    algorithm: str, gpus: int, expected: float
) -> None:
    cluster = msgspec.structs.replace(CLUSTER, gpus_per_node=8)
    found = all_reduce(4_000_000, cluster, gpus, algorithm=algorithm)
    assert found.seconds == pytest.approx(expected)
    assert found.algorithm == ("ring" if algorithm == "auto" else algorithm)


@pytest.mark.parametrize(("algorithm", "messages"), [("ring", 126 / 64), ("tree", None), ("hierarchical", None)])
def test_a_switch_that_adds_up_serves_trees_and_hierarchies(algorithm: str, messages: float | None) -> None:
    """64 GPUs on one switch: 126 hops of 1 µs, 4 GB at 10 GB/s; a switch takes less than 2 or 126/64 messages."""
    cluster = msgspec.structs.replace(CLUSTER, gpus_per_node=64, reduces_in_switch=True)
    messages = 1 / default_fit().nvls_share if messages is None else messages
    expected = pytest.approx(126 * 1e-6 + messages * 0.4)
    assert all_reduce(4 * 10**9, cluster, 64, algorithm=algorithm).seconds == expected


@pytest.mark.parametrize(("algorithm", "call_s"), [("ring", 6.6e-6), ("tree", 6.8e-6)])
def test_the_smallest_messages_take_nccls_constants_of_their_algorithm(algorithm: str, call_s: float) -> None:
    """NCCL's tuning table for LL over NVLink: the call, and 14 hops of 0.6 µs either way."""
    fit = default_fit()
    expected = fit.base_scale["LL"] * call_s + 14 * fit.kinds[LinkKind.NVLINK].latency_scale * 0.6e-6
    unmeasured = msgspec.structs.replace(load_cluster("dgx-1v"), tables=())
    assert all_reduce(0, unmeasured, 8, algorithm=algorithm).seconds == pytest.approx(expected)


def times(factor: float, num_gpus: int, num_nodes: int, cluster: Cluster = CLUSTER) -> AllReduceTable:
    """A table of 1 and 4 MB that took so many times as long as the links of `cluster` tell."""
    bare = msgspec.structs.replace(cluster, gpus_per_node=-(-num_gpus // num_nodes), max_nodes=None)
    sizes = 10**6, 4 * 10**6
    seconds = tuple(factor * all_reduce(size, bare, num_gpus).seconds for size in sizes)
    return AllReduceTable(
        num_gpus=num_gpus, num_nodes=num_nodes, size_bytes=sizes, seconds=seconds, relative_jitter=0.3, source="made up"
    )


@pytest.mark.parametrize(
    ("gpus", "tables", "factor", "tier"),
    [
        (4, [(2, 2, 1), (3, 7, 1)], 3, Tier.SCALED),  # 7/4 is nearer than 4/2
        (6, [(2, 8, 1), (3, 2, 1)], 2, Tier.SCALED),
        (16, [(2, 8, 1), (3, 64, 8)], 3, Tier.SCALED),  # one that leaves its node, too
        (16, [(2, 8, 1)], 1, Tier.DATASHEET),
        (8, [(2, 16, 2)], 1, Tier.DATASHEET),
        (16, [(2, 16, 4), (3, 16, 2)], 3, Tier.MEASURED),
        (16, [(2, 16, 4)], 2, Tier.SCALED),
    ],
)
def test_the_nearest_table_of_the_same_kind_speaks_for_other_counts(
    gpus: int, tables: list[tuple[float, int, int]], factor: float, tier: Tier
) -> None:
    bare = msgspec.structs.replace(CLUSTER, gpus_per_node=8, max_nodes=None)
    cluster = msgspec.structs.replace(bare, tables=tuple(times(*table) for table in tables))
    found, alone = (all_reduce(4 * 10**6, one, gpus) for one in (cluster, bare))
    assert (found.seconds, found.tier) == (pytest.approx(factor * alone.seconds), tier)
    named = all_reduce(4 * 10**6, cluster, gpus, algorithm="ring")
    assert (named.algorithm, named.tier) == ("ring", Tier.DATASHEET)


def test_a_table_of_two_gpus_is_carried_over_to_four_by_hand() -> None:
    # The links tell 2 µs + 4 MB / (10 GB/s) = 402 µs for two and 6 µs + 1.5 · 400 µs for four; measured was twice 402.
    cluster = msgspec.structs.replace(CLUSTER, tables=(times(2, 2, 1),))
    found = all_reduce(4 * 10**6, cluster, 4)
    assert found.seconds == pytest.approx(2 * 606e-6)
    spread = math.exp(1.645 * math.hypot(default_fit().residual, 0.3))  # of topology and table, independent
    assert (found.low_s, found.high_s) == pytest.approx((found.seconds / spread, found.seconds * spread))


def test_the_interval_is_the_jitter_of_a_measured_size_and_the_fits_residual_elsewhere() -> None:
    cluster = msgspec.structs.replace(CLUSTER, tables=(times(2, 4, 1),))
    measured = all_reduce(10**6, cluster, 4)
    assert measured.high_s / measured.seconds == pytest.approx(math.exp(1.645 * 0.3))
    fit = default_fit()
    for size, sigma in ((2**20, fit.residual), (2**20 - 1, fit.small_residual)):
        found = all_reduce(size, CLUSTER, 4)
        spread = math.exp(1.645 * sigma)
        assert (found.low_s, found.high_s) == pytest.approx((found.seconds / spread, found.seconds * spread))


@pytest.mark.parametrize(
    ("size", "tier"),
    [(10**6 - 1, Tier.SCALED), (10**6, Tier.MEASURED), (4 * 10**6, Tier.MEASURED), (4 * 10**6 + 1, Tier.SCALED)],
)
def test_a_table_measures_from_its_first_to_its_last_size(size: int, tier: Tier) -> None:
    assert all_reduce(size, msgspec.structs.replace(CLUSTER, tables=(times(1, 4, 1),)), 4).tier is tier


@pytest.mark.parametrize("kinds", [("pcie", "measured"), ("measured", "tcp"), ("measured", "measured")])
@pytest.mark.parametrize(("size", "line"), [(2**20, 1.0), (2**24, 4.0), (0, 1.0)])
def test_beyond_a_table_its_line_and_the_topology_share_the_say(kinds: tuple[str, str], size: int, line: float) -> None:
    """One size of 4 MiB: its line is flat below and in proportion above. Two halvings or doublings away both have half
    of the say; no bytes at all are 22 halvings away. Of measured links the line is all there is."""
    intra, inter = (Link(name=k, bandwidth_bytes_per_s=1e9, kind=LinkKind(k)) for k in kinds)
    bare = Cluster(name="c", device=None, gpus_per_node=4, intra=intra, inter=inter)
    tables = tuple(
        AllReduceTable(
            num_gpus=4 * n, num_nodes=n, size_bytes=(2**22,), seconds=(0.5,), relative_jitter=0.1, source="made up"
        )
        for n in (1, 2)
    )
    cluster = msgspec.structs.replace(bare, tables=tables)
    for nodes, kind in zip((1, 2), kinds, strict=True):
        topology = 1.0
        if kind != "measured":
            here, there = (all_reduce(n, bare, 4 * nodes).seconds for n in (size, 2**22))
            topology = here / there
        share = 1.0 if kind == "measured" else {2**20: 0.5, 2**24: 0.5, 0: 2.0**-11}[size]
        expected = 0.5 * line**share * topology ** (1 - share)
        assert all_reduce(size, cluster, 4 * nodes).seconds == pytest.approx(expected)


def test_a_table_is_of_nodes_that_were_equally_full() -> None:
    """Six GPUs, three on each of two nodes of four without a switch: links to two peers, a third less than to three.

    Measured was twice what they tell. Eight GPUs use all links.
    """
    nvlink = Link(name="i", bandwidth_bytes_per_s=100e9, kind=LinkKind.NVLINK)
    between = Link(name="o", bandwidth_bytes_per_s=1e12, kind=LinkKind.INFINIBAND)
    bare = Cluster(name="c", device=None, gpus_per_node=4, intra=nvlink, inter=between)
    three = msgspec.structs.replace(bare, gpus_per_node=3)
    size = 10**6
    table = AllReduceTable(
        num_gpus=6, num_nodes=2, size_bytes=(size,), seconds=(2 * all_reduce(size, three, 6).seconds,),
        relative_jitter=0.0, source="made up",
    )  # fmt: skip
    cluster = msgspec.structs.replace(bare, tables=(table,))
    assert all_reduce(size, three, 6).seconds > 1.01 * all_reduce(size, bare, 6).seconds  # which are four and two
    assert all_reduce(size, cluster, 8).seconds == pytest.approx(2 * all_reduce(size, bare, 8).seconds)
    here, there = (all_reduce(n, three, 6).seconds for n in (4 * size, size))
    beyond = (4 * table.seconds[0]) ** 0.5 * (table.seconds[0] * here / there) ** 0.5
    assert all_reduce(4 * size, cluster, 6).seconds == pytest.approx(beyond)


@pytest.mark.parametrize(("gpus", "nodes"), [(1, 1), (4, 1), (5, 2), (8, 2), (13, 4), (16, 4)])
def test_nodes_are_filled_one_after_the_other(gpus: int, nodes: int) -> None:
    assert nodes_for(CLUSTER, gpus) == nodes
    assert nodes_for(msgspec.structs.replace(CLUSTER, max_nodes=None), 100 * gpus) == 25 * gpus


def test_a_single_machine_has_no_second_node() -> None:
    alone = msgspec.structs.replace(CLUSTER, inter=None)
    assert nodes_for(alone, 4) == 1
    with pytest.raises(UsageError, match="has 4 GPUs, 5 were asked for"):
        nodes_for(alone, 5)


def test_the_formulas_refuse_what_no_all_reduce_has() -> None:
    with pytest.raises(UsageError, match="0 chunks; at least 1"):
        tree_all_reduce_seconds(1, 2, SLOW, num_chunks=0)
    for gpus, nodes in ((0, 1), (1, 0)):
        with pytest.raises(UsageError, match="0 GPUs; at least 1"):
            hierarchical_all_reduce_seconds(1, gpus, nodes, FAST, SLOW)
    assert hierarchical_all_reduce_seconds(0, 1, 1, FAST, SLOW) == 0


@pytest.mark.parametrize("size", [math.nan, math.inf, -1.0])
def test_a_message_of_no_size_is_refused(size: float) -> None:
    for ask in (lambda: all_reduce(size, CLUSTER, 4), lambda: ring_all_reduce_seconds(size, 4, SLOW)):
        with pytest.raises(UsageError, match="it must be a finite number and not negative"):
            ask()


def test_no_bytes_over_links_without_latency_take_no_time_beside_a_table_of_others() -> None:
    link = Link(name="l", bandwidth_bytes_per_s=1e9)
    table = AllReduceTable(
        num_gpus=2, num_nodes=1, size_bytes=(2**20,), seconds=(0.5,), relative_jitter=0.1, source="made up"
    )
    cluster = Cluster(name="c", device=None, gpus_per_node=4, intra=link, tables=(table,))
    assert all_reduce(0, cluster, 4).seconds == pytest.approx(0.5)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_between_nodes_a_reduce_scatter_and_an_all_gather_are_rings(factor: float) -> None:
    """8 GPUs on two nodes of CLUSTER, 1 MB. A tree has 6 hops of 1 µs and 2 of 10, and the message up and down at
    1 GB/s: 2.026 ms. A ring has 12 and 2, and 14/8 of the message: 1.782 ms. Of 1 kB they take 28 µs and 33.75 µs.

    A table that took twice as long as the links say makes both twice as long.
    """
    tables = (times(factor, 8, 2),) if factor > 1 else ()
    cluster = msgspec.structs.replace(CLUSTER, tables=tables)
    for size, choice, ring_s in ((10**6, 1.782e-3, 1.782e-3), (10**3, 28e-6, 33.75e-6)):
        time = all_reduce(size, msgspec.structs.replace(cluster, tables=()), 8)
        assert time.seconds == pytest.approx(choice)
        time = all_reduce(size, cluster, 8)
        halves = made_of_halves(time, size, cluster, 8)
        assert halves.seconds / time.seconds == pytest.approx(ring_s / choice)
        assert halves.low_s / halves.seconds == pytest.approx(time.low_s / time.seconds)
        assert halves.high_s / halves.seconds == pytest.approx(time.high_s / time.seconds)
        assert halves.wire_bytes_per_gpu == time.wire_bytes_per_gpu


@pytest.mark.parametrize(("gpus", "per_node", "algorithm"), [(4, 4, "auto"), (4, 1, "auto"), (8, 4, "tree")])
def test_inside_a_node_and_of_single_gpus_halves_are_those_of_any_all_reduce(
    gpus: int, per_node: int, algorithm: str
) -> None:
    cluster = msgspec.structs.replace(CLUSTER, gpus_per_node=per_node)
    time = all_reduce(1000, cluster, gpus, algorithm=algorithm)
    assert made_of_halves(time, 1000, cluster, gpus, algorithm=algorithm) == time
