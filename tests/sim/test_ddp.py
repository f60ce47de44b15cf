from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptsim.costs.buckets import Bucket, ddp_buckets
from ptsim.costs.collectives import AllReduceTime
from ptsim.costs.tiers import Tier
from ptsim.costs.times import LayerTime, StepTime
from ptsim.network import Network, Parameter
from ptsim.sim import ddp
from ptsim.sim.step import simulate_steps
from ptsim.sim.work import TrainingJob
from tests.traces import residual_network


def step_of(network: Network, *, forward: float = 1.0, backward: float = 2.0) -> StepTime:
    """Every layer takes the same time."""
    layers = tuple(
        LayerTime(layer=layer.name, kind=layer.kind, forward_s=forward, backward_s=backward, tier=Tier.DATASHEET)
        for layer in network.layers
    )
    total = len(layers) * (forward + backward) + 0.75
    return StepTime(
        layers=layers,
        optimizer_s=0.5,
        regularizer_s=0.25,
        overhead_s=0.0,
        low_s=total / 2,
        high_s=total * 2,
        tier=Tier.DATASHEET,
    )


def all_reduce(num_bytes: int) -> AllReduceTime:
    """One second a byte, on four GPUs."""
    return AllReduceTime(
        seconds=float(num_bytes),
        low_s=0.5 * num_bytes,
        high_s=3.0 * num_bytes,
        algorithm="ring",
        wire_bytes_per_gpu=1.5 * num_bytes,
        tier=Tier.DATASHEET,
    )


def one_bucket(network: Network) -> tuple[Bucket, ...]:
    return ddp_buckets(network, first_bucket_bytes=1 << 40)


def torch_buckets(shapes: list[tuple[int, ...]], limits: list[int]) -> list[list[int]]:
    tensors = [torch.empty(shape, device="meta") for shape in shapes]
    indices, _ = torch._C._distributed_c10d._compute_bucket_assignment_by_size(tensors, limits)
    return [list(bucket) for bucket in indices]


def network_of(shapes: list[tuple[int, ...]]) -> Network:
    """A network of nothing but parameters, in gradient-ready order."""
    parameters = tuple(Parameter(name=f"p{i}", shape=shape, layer="conv1") for i, shape in enumerate(shapes))
    return msgspec.structs.replace(residual_network(), parameters=parameters)


def test_buckets_are_those_of_torch() -> None:
    network = residual_network((64, 128, 256), (3, 4, 3))
    expected = torch_buckets([parameter.shape for parameter in network.parameters], [1 << 20, 25 << 20])
    assert [bucket.parameters for bucket in ddp_buckets(network)] == [
        tuple(network.parameters[i].name for i in bucket) for bucket in expected
    ]


_SHAPES = st.lists(
    st.one_of(st.tuples(st.integers(1, 5000)), st.tuples(st.integers(1, 3000), st.integers(1, 3000))),
    min_size=1,
    max_size=40,
)


@given(_SHAPES, st.integers(1, 2 << 20), st.integers(1, 30 << 20))
@settings(max_examples=100, deadline=None)
def test_buckets_of_any_parameters_and_caps_are_those_of_torch(
    shapes: list[tuple[int, ...]], first: int, others: int
) -> None:
    found = ddp_buckets(network_of(shapes), first_bucket_bytes=first, bucket_bytes=others)
    assert [[int(name[1:]) for name in bucket.parameters] for bucket in found] == torch_buckets(shapes, [first, others])


@given(_SHAPES)
@settings(max_examples=50, deadline=None)
def test_buckets_that_are_never_rebuilt_are_those_of_torch(shapes: list[tuple[int, ...]]) -> None:
    """`_ddp_init_helper` assigns in the order of definition, and reverses the list of buckets."""
    found = ddp_buckets(network_of(shapes), rebuilt=False)
    defined = shapes[::-1]  # gradients come in reverse
    expected = torch_buckets(defined, [1 << 20, 25 << 20])[::-1]
    last = len(shapes) - 1
    assert [sorted(int(name[1:]) for name in bucket.parameters) for bucket in found] == [
        sorted(last - i for i in bucket) for bucket in expected
    ]
    assert [name for bucket in found for name in bucket.parameters] == [f"p{i}" for i in range(len(shapes))]


def test_a_bucket_is_ready_after_the_backward_pass_of_its_last_gradient() -> None:
    network = residual_network()
    buckets = ddp_buckets(network, first_bucket_bytes=50_000, bucket_bytes=100_000)
    plan = ddp.plan_step(step_of(network), buckets, all_reduce)
    assert len(buckets) > 3
    done: set[str] = set()
    for work in plan.backward:
        done.add(work.name)
        if work.bucket is not None:
            layers = {p.layer for p in network.parameters if p.name in buckets[work.bucket].parameters}
            assert layers <= done
            assert buckets[work.bucket].ready_layer == work.name
    assert [w.bucket for w in plan.backward if w.bucket is not None] == list(range(len(buckets)))


def test_backward_visits_the_layers_in_reverse() -> None:
    network = residual_network()
    plan = ddp.plan_step(step_of(network), (), all_reduce)
    assert [w.name for w in plan.backward] == [layer.name for layer in reversed(network.layers)]
    assert [w.name for w in plan.tail] == ["regularizer", "optimizer"]


def test_the_plan_takes_what_the_step_takes() -> None:
    step = step_of(residual_network())
    assert ddp.plan_step(step, (), all_reduce).compute_s == pytest.approx(step.compute_s)
    assert ddp.plan_step(step, (), all_reduce, bound="low").compute_s == pytest.approx(step.low_s)
    assert ddp.plan_step(step, (), all_reduce, bound="high").compute_s == pytest.approx(step.high_s)


def test_the_collectives_follow_the_bound() -> None:
    network = residual_network()
    plans = {
        bound: ddp.plan_step(step_of(network), one_bucket(network), all_reduce, bound=bound).communication_s
        for bound in ("low", "expected", "high")
    }
    num_bytes = 4 * network.num_parameters
    assert plans == {"low": 0.5 * num_bytes, "expected": num_bytes, "high": 3.0 * num_bytes}


def test_half_precision_gradients_halve_the_message_and_pay_for_the_conversion() -> None:
    network = residual_network()
    wire = ddp.memory_bound_conversion(0.5, memory_bandwidth_bytes_per_s=1e6)
    plan = ddp.plan_step(step_of(network), one_bucket(network), all_reduce, wire=wire)
    num_bytes = 4 * network.num_parameters
    assert plan.buckets[0].num_bytes == num_bytes // 2
    assert plan.wire_bytes_per_gpu == 1.5 * num_bytes // 2
    # read fp32 and write fp16, divide that in place, read fp16 and write fp32: 16 bytes for every 4
    assert plan.communication_s - num_bytes / 2 == pytest.approx(4 * num_bytes / 1e6)


def test_uncompressed_gradients_need_no_conversion() -> None:
    assert ddp.memory_bound_conversion(1.0, 1e12).conversion_s_per_byte == 0.0


def test_batch_norms_buffers_are_two_floats_a_channel_and_a_counter() -> None:
    network = residual_network((16,), (1,), input_shape=(3, 8, 8))  # three norms of 16 channels
    assert ddp.buffer_bytes(network) == 3 * (2 * 4 * 16 + 8)


def test_a_broadcast_is_half_an_all_reduce() -> None:
    network = residual_network()
    state = 4 * network.num_parameters + ddp.buffer_bytes(network)
    assert ddp.wrapping_s(network, all_reduce) == 0.5 * state + 0.5 * 4 * len(network.parameters)


def test_the_first_step_reduces_every_gradient_after_backward() -> None:
    network = residual_network()
    plan = ddp.plan_step(step_of(network), ddp_buckets(network), all_reduce, buffer_bytes=100)
    assert ddp.first_step_s(network, all_reduce, head=plan.head) == 4 * network.num_parameters + 100 / 2
    single = ddp.plan_step(step_of(network), one_bucket(network), all_reduce, buffer_bytes=100)
    unhidden = simulate_steps([TrainingJob(plan=msgspec.structs.replace(single, overlap=False))])[0]
    assert unhidden.exposed_communication_s == pytest.approx(ddp.first_step_s(network, all_reduce, head=plan.head))


def test_a_gradient_that_never_comes_is_reduced_at_the_end() -> None:
    network = residual_network()
    bucket = msgspec.structs.replace(one_bucket(network)[0], ready_layer="")
    plan = ddp.plan_step(step_of(network), (bucket,), all_reduce)
    assert plan.backward[-1].bucket == 0


def test_a_bucket_of_another_network_is_refused() -> None:
    network = residual_network()
    bucket = msgspec.structs.replace(one_bucket(network)[0], ready_layer="elsewhere")
    with pytest.raises(ValueError, match="'elsewhere'"):
        ddp.plan_step(step_of(network), (bucket,), all_reduce)


def test_accumulation_reduces_in_the_last_micro_batch_only() -> None:
    network = residual_network()
    buckets = ddp_buckets(network, first_bucket_bytes=50_000, bucket_bytes=100_000)
    plans = [ddp.plan_step(step_of(network), buckets, all_reduce, num_micro_batches=n) for n in (1, 4)]
    assert plans[0].wire_bytes_per_gpu == plans[1].wire_bytes_per_gpu == 1.5 * 4 * network.num_parameters
    spans = simulate_steps([TrainingJob(plan=plans[1])], record_gpus=1)[0].spans
    reduced = [span.start_s for span in spans if span.stream == "communication"]
    one_pass = sum(work.seconds for work in (*plans[1].forward, *plans[1].backward))
    assert len(reduced) == len(buckets)
    assert min(reduced) >= 3 * one_pass


def test_the_map_of_used_parameters_is_reduced_after_the_last_bucket() -> None:
    network = residual_network()
    step, buckets = step_of(network), ddp_buckets(network, rebuilt=False)
    plan = ddp.with_communication(
        ddp.compute_plan(step, buckets), buckets, all_reduce, used_bytes=4 * len(network.parameters)
    )
    assert plan.buckets[-1].num_bytes == 4 * len(network.parameters)
    assert plan.communication_s == 4 * network.num_parameters + 4 * len(network.parameters)
    assert [w.bucket for w in plan.backward if w.bucket is not None] == list(range(len(buckets) + 1))


def test_buckets_that_are_never_rebuilt_need_no_new_order() -> None:
    network = residual_network()
    assert ddp.wrapping_s(network, all_reduce) - ddp.wrapping_s(network, all_reduce, rebuilds=False) == pytest.approx(
        0.5 * 4 * len(network.parameters)
    )


def test_wrapping_has_an_interval() -> None:
    network = residual_network()
    low, expected, high = (ddp.wrapping_s(network, all_reduce, bound) for bound in ("low", "expected", "high"))
    assert (low, high) == (0.5 * expected, 3 * expected)


@pytest.mark.parametrize("passes", [1, 4])
def test_every_gradients_hook_costs_a_step_once_however_many_passes_it_has(passes: int) -> None:
    network = residual_network()
    step, buckets = step_of(network), ddp_buckets(network, first_bucket_bytes=50_000, bucket_bytes=100_000)
    plain, hooked = (
        ddp.compute_plan(step, buckets, num_micro_batches=passes, tensor_s=tensor_s).compute_s
        for tensor_s in (0.0, 0.01)
    )
    assert plain == pytest.approx(passes * 3.0 * len(network.layers) + 0.75)  # 1 s forward, 2 s backward, 0.75 s once
    assert hooked - plain == pytest.approx(0.01 * len(network.parameters))


def test_hooks_run_before_their_bucket_leaves() -> None:
    network = residual_network()
    plan = ddp.compute_plan(step_of(network), one_bucket(network), tensor_s=0.01)
    ready = next(i for i, work in enumerate(plan.backward) if work.bucket == 0)
    assert plan.backward[ready - 1].name == "gradient hooks"
    assert plan.backward[ready - 1].seconds == pytest.approx(0.01 * len(network.parameters))


@pytest.mark.parametrize(("bound", "share"), [("low", 0.5), ("expected", 1.0), ("high", 3.0)])
def test_the_first_step_after_wrapping_compresses_its_bucket_too(bound: ddp.Bound, share: float) -> None:
    network = residual_network()
    wire = ddp.memory_bound_conversion(0.5, memory_bandwidth_bytes_per_s=1e6)
    num_bytes = 4 * network.num_parameters
    # half of the bytes at one second each; converting 4 bytes reads and writes 16
    expected = share * num_bytes / 2 + 4 * num_bytes / 1e6
    assert ddp.first_step_s(network, all_reduce, wire, bound) == pytest.approx(expected)


def test_a_step_that_was_recorded_on_one_of_several_gpus_has_its_hooks_and_slowdown() -> None:
    network = residual_network()
    recorded = msgspec.structs.replace(step_of(network), data_parallel=True)
    plan = ddp.plan_step(recorded, ddp_buckets(network), all_reduce, tensor_s=0.01)
    assert plan.compute_s == pytest.approx(3.0 * len(network.layers) + 0.75)  # without hooks
    assert plan.slowed
    assert plan.merged().slowed
    assert not ddp.plan_step(step_of(network), ddp_buckets(network), all_reduce).slowed
