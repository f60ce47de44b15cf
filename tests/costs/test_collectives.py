"""The all-reduce formulas against hand arithmetic."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptsim.costs.collectives import (
    all_reduce,
    allreduce,
    hierarchical_all_reduce_seconds,
    ring_all_reduce_seconds,
    ring_wire_bytes,
    tree_all_reduce_seconds,
)
from ptsim.costs.tiers import Tier
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
