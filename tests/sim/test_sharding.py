"""ZeRO-1 and -2: bytes, memory and time by hand arithmetic."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest

import ptsim
from ptsim.costs.buckets import ddp_buckets
from ptsim.costs.collectives import AllReduceTime, all_reduce
from ptsim.costs.datasheet import load_fit
from ptsim.costs.memory import iteration_memory
from ptsim.costs.scaling import load_scaling
from ptsim.costs.tiers import Tier
from ptsim.costs.times import LayerTime, StepTime
from ptsim.errors import UsageError
from ptsim.hardware.catalog import load_cluster
from ptsim.network import LayerKind
from ptsim.setting import PrecisionName, Sharding, StepSetting
from ptsim.sim import ddp
from ptsim.sim.work import StepPlan
from tests.sim.plans import cluster
from tests.traces import residual_network

NETWORK = residual_network()
LARGER = residual_network(widths=(64, 128, 256))  # more than one bucket
GRADIENT_BYTES = 4 * NETWORK.num_parameters


def _plan(sharding: Sharding, num_gpus: int = 8) -> StepPlan:
    """Layers of 1 ms each way and an update of 8 ms."""
    layers = tuple(
        LayerTime(layer=layer.name, kind=layer.kind, forward_s=1e-3, backward_s=1e-3, tier=Tier.DATASHEET)
        for layer in NETWORK.layers
    )
    step = StepTime(
        layers=layers, optimizer_s=8e-3, regularizer_s=0.0, overhead_s=0.0, low_s=0.0, high_s=1.0, tier=Tier.DATASHEET
    )
    cluster = load_cluster("dgx-a100")
    setting = StepSetting(batch=8, num_gpus=num_gpus, sharding=sharding)
    return ddp.plan_step(
        step,
        ddp_buckets(NETWORK) if num_gpus > 1 else (),
        lambda num_bytes: all_reduce(num_bytes, cluster, num_gpus),
        shards=ddp.shards_of(NETWORK, setting),
    )


@pytest.mark.parametrize("sharding", ["zero1", "zero2"])
def test_as_many_bytes_are_sent_as_by_an_all_reduce(sharding: Sharding) -> None:
    """A reduce-scatter and an all-gather send 7/8 of the gradient each, an all-reduce 14/8."""
    plan = _plan(sharding)
    assert plan.wire_bytes_per_gpu == pytest.approx(14 / 8 * GRADIENT_BYTES)
    assert sum(c.wire_bytes_per_gpu for c in plan.buckets) == pytest.approx(7 / 8 * GRADIENT_BYTES)
    (gathered,) = plan.head
    assert gathered.num_bytes == GRADIENT_BYTES
    assert gathered.wire_bytes_per_gpu == pytest.approx(7 / 8 * GRADIENT_BYTES)


def test_a_bucket_takes_half_an_all_reduce_and_the_update_its_share() -> None:
    whole, sharded = _plan("none"), _plan("zero1")
    assert [c.seconds for c in sharded.buckets] == pytest.approx([c.seconds / 2 for c in whole.buckets])
    assert whole.compute_s - sharded.compute_s == pytest.approx(7e-3)  # 8 ms on one GPU, 1 ms on each of 8


def test_the_first_step_after_wrapping_scatters_its_single_bucket_too() -> None:
    """All gradients in one reduce-scatter, half of the all-reduce of as many bytes, and the gathering before it."""
    cluster = load_cluster("dgx-a100")

    def reduce(num_bytes: int) -> AllReduceTime:
        return all_reduce(num_bytes, cluster, 8)

    shards = ddp.shards_of(NETWORK, StepSetting(batch=8, num_gpus=8, sharding="zero1"))
    (gathered,) = _plan("zero1").head
    whole_s = reduce(GRADIENT_BYTES).seconds
    assert ddp.first_step_s(NETWORK, reduce) == pytest.approx(whole_s)
    assert gathered.seconds == pytest.approx(whole_s / 2)
    sharded_s = ddp.first_step_s(NETWORK, reduce, head=(gathered,), shards=shards)
    assert sharded_s == pytest.approx(whole_s)  # half is scattered, half was gathered


def test_a_compressed_gradient_is_converted_whole_though_only_half_an_all_reduce_follows() -> None:
    """Of a quarter of the bytes; every byte of the gradient takes 3 ns, in the first step and in all others."""
    cluster = load_cluster("dgx-a100")

    def reduce(num_bytes: int) -> AllReduceTime:
        return all_reduce(num_bytes, cluster, 8)

    shards = ddp.shards_of(NETWORK, StepSetting(batch=8, num_gpus=8, sharding="zero1"))
    wire = ddp.Wire(ratio=0.25, conversion_s_per_byte=3e-9)
    buckets = ddp_buckets(NETWORK)
    assert [bucket.num_bytes for bucket in buckets] == [GRADIENT_BYTES]
    expected_s = reduce(GRADIENT_BYTES // 4).seconds / 2 + 3e-9 * GRADIENT_BYTES
    assert ddp.first_step_s(NETWORK, reduce, wire, shards=shards) == pytest.approx(expected_s)
    computation = msgspec.structs.replace(_plan("zero1"), buckets=(), head=())
    scattered = ddp.with_communication(computation, buckets, reduce, wire=wire, shards=shards).buckets
    assert [collective.seconds for collective in scattered] == pytest.approx([expected_s])


def test_one_gpu_has_nothing_to_share() -> None:
    assert _plan("zero2", num_gpus=1) == _plan("none", num_gpus=1)


def test_memory_is_divided_as_the_stages_say() -> None:
    """Adam keeps two fp32 numbers a parameter; stage 2 keeps two buckets beside its share of the gradients."""
    gradient, buckets = 4 * LARGER.num_parameters, ddp_buckets(LARGER, bucket_bytes=2**20)
    need = {
        sharding: iteration_memory(
            LARGER, StepSetting(batch=8, optimizer="adam", num_gpus=8, sharding=sharding), buckets=buckets
        )
        for sharding in ("none", "zero1", "zero2")
    }
    assert need["none"].optimizer_bytes == 2 * gradient
    assert need["zero1"].optimizer_bytes == need["zero2"].optimizer_bytes == math.ceil(2 * gradient / 8)
    assert need["none"].peak_bytes - need["zero1"].peak_bytes == 2 * gradient - math.ceil(2 * gradient / 8)
    assert need["zero1"].gradient_bytes == gradient
    kept = math.ceil(gradient / 8) + max(a.num_bytes + b.num_bytes for a, b in itertools.pairwise(buckets))
    assert kept < gradient
    assert need["zero2"].gradient_bytes == kept
    assert need["zero1"].peak_bytes - need["zero2"].peak_bytes == gradient - kept


def test_predict_takes_the_option_and_refuses_another() -> None:
    whole, sharded = (
        ptsim.predict(NETWORK, cluster="dgx-a100", gpus=8, batch=8, optimizer="adam", sharding=sharding)
        for sharding in ("none", "zero1")
    )
    assert sharded.allreduce_bytes_per_gpu == pytest.approx(whole.allreduce_bytes_per_gpu)
    assert sharded.peak_memory_bytes < whole.peak_memory_bytes
    assert sharded.optimizer_seconds == pytest.approx(whole.optimizer_seconds / 8)
    with pytest.raises(UsageError, match="zero3"):
        ptsim.predict(NETWORK, cluster="dgx-a100", gpus=8, batch=8, sharding="zero3")  # type: ignore[arg-type]


@pytest.mark.parametrize("sharding", ["zero1", "zero2"])
def test_between_nodes_gradients_are_scattered_and_parameters_gathered_in_rings(sharding: Sharding) -> None:
    """16 GPUs on two nodes: 28 hops of 2 µs and 2 of 5, 15/8 of the message at 25 GB/s; a tree has fewer hops."""

    def ring_s(num_bytes: int) -> float:
        return 66e-6 + 15 / 8 * num_bytes / 25e9

    network = LARGER
    buffers = sum(8 * layer.out_channels + 8 for layer in network.layers if layer.kind is LayerKind.BATCH_NORM)
    sizes = [bucket.num_bytes for bucket in ddp_buckets(network)]
    assert len(sizes) > 1
    found = ptsim.predict(network, cluster=cluster(), gpus=16, batch=8, sharding=sharding)
    expected = sum(map(ring_s, (*sizes, 4 * network.num_parameters, buffers))) / 2
    assert found.communication_seconds == pytest.approx(expected, rel=1e-9)
    whole = ptsim.predict(network, cluster=cluster(), gpus=16, batch=8)
    assert whole.communication_seconds < sum(map(ring_s, sizes)) + ring_s(buffers) / 2


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_gpu_casts_all_weights_and_gradients_whatever_it_updates(precision: PrecisionName) -> None:
    """Two and four bytes of each of both; the rest of the update, with the scaler's division, is shared by 8."""
    whole, sharded = (
        ptsim.predict(NETWORK, cluster="dgx-a100", gpus=8, batch=8, precision=precision, sharding=sharding)
        for sharding in ("none", "zero1")
    )
    casts_s = 12 * NETWORK.num_parameters / (load_fit().efficiency.stream_bandwidth * 1555e9)
    casts_s *= 1 + load_scaling().slowdown
    assert 0 < casts_s < whole.optimizer_seconds
    assert sharded.optimizer_seconds == pytest.approx(casts_s + (whole.optimizer_seconds - casts_s) / 8)
