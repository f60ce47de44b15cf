"""What PyTorch's DistributedDataParallel does in a training step: which work, which all-reduces, when each is ready.

The durations of the computation come from `costs.step`, those of the collectives from `costs.collectives`; here they
become a `StepPlan`. Buckets close in gradient-ready order, and a bucket's all-reduce may start when the backward pass
of its `ready_layer` is done. Regularizer and optimizer run on the reduced gradients, after the last all-reduce. With
gradient accumulation all but the last micro-batch run under `no_sync`. Gradients are views of the buckets
(`gradient_as_bucket_view`), as in `ptsim train`: nothing is copied out of them.

Every gradient tensor has a hook that copies it into its bucket; what that takes is measured (`costs.scaling`).

Source: torch/nn/parallel/distributed.py and torch/csrc/distributed/c10d/reducer.cpp (PyTorch 2.8).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from ptsim.costs.buckets import Bucket
from ptsim.costs.collectives import AllReduceTime
from ptsim.costs.times import StepTime
from ptsim.network import LayerKind, Network
from ptsim.setting import StepSetting
from ptsim.sim.work import Collective, Piece, StepPlan

AllReduce = Callable[[int], AllReduceTime]
Bound = Literal["low", "expected", "high"]


# An all-reduce is a reduce-scatter and an all-gather, or a reduction and a broadcast, of the same bytes.
_HALF = 0.5


class Shards(msgspec.Struct, frozen=True, kw_only=True):
    """ZeRO: every GPU keeps the optimizer's state of its share of the parameters, and updates it.

    Attributes:
        share: of the parameters.
        parameter_bytes: of all parameters, which are gathered after the update.

    Source: Rajbhandari et al., ZeRO, SC 2020, sections 5 and 7: stages 1 and 2 send as many bytes as an all-reduce.
    What the two halves take is said by `costs.collectives.made_of_halves`.
    """

    share: float
    parameter_bytes: int


def shards_of(network: Network, setting: StepSetting) -> Shards | None:
    """The shards of a step; None where nothing is sharded."""
    if setting.sharding == "none" or not setting.data_parallel:
        return None
    return Shards(share=setting.update_share, parameter_bytes=gradient_bytes(network))


class Wire(msgspec.Struct, frozen=True, kw_only=True):
    """How a gradient travels.

    Attributes:
        ratio: bytes sent / bytes of the fp32 gradient.
        conversion_s_per_byte: seconds per fp32 gradient byte that compressing and restoring take.
    """

    ratio: float = 1.0
    conversion_s_per_byte: float = 0.0


def memory_bound_conversion(ratio: float, memory_bandwidth_bytes_per_s: float) -> Wire:
    """A compression as DDP's fp16 and bf16 hooks do it, at the memory's speed.

    Sending reads the gradient and writes `ratio` of it, divides that by the number of GPUs in place (reads and writes
    it), and receiving reads it and writes the gradient.

    Source: torch/distributed/algorithms/ddp_comm_hooks/default_hooks.py, `_compress_hook`.
    """
    if ratio == 1:
        return Wire()
    return Wire(ratio=ratio, conversion_s_per_byte=(2 * (1 + ratio) + 2 * ratio) / memory_bandwidth_bytes_per_s)


def plan_step(
    step: StepTime,
    buckets: Sequence[Bucket],
    all_reduce: AllReduce,
    *,
    wire: Wire | None = None,
    buffer_bytes: int = 0,
    num_micro_batches: int = 1,
    tensor_s: float = 0.0,
    shards: Shards | None = None,
    bound: Bound = "expected",
) -> StepPlan:
    """The plan of one optimizer step: `compute_plan` with its `with_communication`."""
    share = 1.0 if shards is None else shards.share
    computation = compute_plan(
        step, buckets, num_micro_batches=num_micro_batches, tensor_s=tensor_s, update_share=share
    )
    return with_communication(
        computation,
        buckets,
        all_reduce,
        wire=wire,
        buffer_bytes=buffer_bytes,
        shards=shards,
        bound=bound,
        scale=computation_scale(step, bound),
    )


def computation_scale(step: StepTime, bound: Bound) -> float:
    """The bound of the step's computation as a multiple of the expected one."""
    compute_s = step.compute_s
    if bound == "expected" or not compute_s:
        return 1.0
    return (step.low_s if bound == "low" else step.high_s) / compute_s


def compute_plan(
    step: StepTime,
    buckets: Sequence[Bucket],
    *,
    num_micro_batches: int = 1,
    tensor_s: float = 0.0,
    update_share: float = 1.0,
) -> StepPlan:
    """What the GPU computes in one optimizer step, and when its buckets are ready.

    Args:
        step: computation of one micro-batch.
        buckets: of the gradient, in ready order; none on a single GPU. An empty `ready_layer` is the end of backward.
        num_micro_batches: gradient accumulation.
        tensor_s: seconds of every gradient tensor's hook and copy, in front of its bucket; none where the step was
            recorded with them.
        update_share: which part of the parameters a GPU updates; the group lasso is computed whole.

    Raises:
        ValueError: a bucket names a layer that the step does not have.
    """
    ready_after: dict[str, list[int]] = {layer.layer: [] for layer in step.layers}
    for i, bucket in enumerate(buckets):
        name = bucket.ready_layer or step.layers[0].layer  # "": gradients that never come
        if name not in ready_after:
            raise ValueError(f"a bucket is ready after layer {name!r}, which the step does not have")
        ready_after[name].append(i)
    forward = [Piece(name=layer.layer, seconds=layer.forward_s) for layer in step.layers]
    if step.overhead_s:
        forward.append(Piece(name="host and loss", seconds=step.overhead_s))
    backward: list[Piece] = []
    for layer in reversed(step.layers):
        ready = ready_after[layer.layer]
        copied_s = hooks_s(step, [buckets[bucket] for bucket in ready], tensor_s)
        if copied_s:
            backward.append(Piece(name="gradient hooks", seconds=copied_s / num_micro_batches))
        backward.append(Piece(name=layer.layer, seconds=layer.backward_s, bucket=ready[0] if ready else None))
        backward += [Piece(name=layer.layer, seconds=0.0, bucket=bucket) for bucket in ready[1:]]
    own_s = step.accumulated(num_micro_batches).updating(update_share).optimizer_s
    tail = [
        Piece(name=name, seconds=seconds)
        for name, seconds in (("regularizer", step.regularizer_s), ("optimizer", own_s))
        if seconds
    ]
    return StepPlan(
        forward=tuple(forward),
        backward=tuple(backward),
        tail=tuple(tail),
        buckets=(),
        num_micro_batches=num_micro_batches,
        slowed=step.data_parallel,
    )


def hooks_s(step: StepTime, buckets: Sequence[Bucket], tensor_s: float) -> float:
    """Seconds that the hooks of all gradient tensors in these buckets add to a step, `tensor_s` each.

    Nothing to one that was recorded on one of several GPUs: its backward pass holds them.
    """
    return 0.0 if step.data_parallel else tensor_s * sum(len(bucket.parameters) for bucket in buckets)


def with_communication(
    computation: StepPlan,
    buckets: Sequence[Bucket],
    all_reduce: AllReduce,
    *,
    wire: Wire | None = None,
    buffer_bytes: int = 0,
    used_bytes: int = 0,
    shards: Shards | None = None,
    bound: Bound = "expected",
    scale: float = 1.0,
) -> StepPlan:
    """The plan with its collectives.

    Args:
        computation: `compute_plan` of this step and these buckets, whole or merged.
        buckets: of the gradient.
        all_reduce: the time of an all-reduce of so many bytes, with its interval.
        wire: compression of the gradient.
        buffer_bytes: broadcast before the forward pass; 0 for none.
        used_bytes: of the map of used parameters, reduced after the last bucket (find_unused_parameters); 0 for none.
        shards: gradients are reduce-scattered, and the updated parameters are gathered before the next forward pass:
            either is half of an all-reduce.
        bound: whether a collective takes its expected time or that at an end of its 90 % interval.
        scale: of all computation.
    """
    wire = wire or Wire()
    kind, part = ("AllReduce", 1.0) if shards is None else ("ReduceScatter", _HALF)
    collectives = [
        _collective(
            f"{kind} of bucket {i}",
            all_reduce(num_bytes := round(bucket.num_bytes * wire.ratio)),
            num_bytes,
            bound,
            conversion_s=bucket.num_bytes * wire.conversion_s_per_byte,
            part=part,
        )
        for i, bucket in enumerate(buckets)
    ]
    backward = computation.backward
    if used_bytes and buckets:
        collectives.append(_collective("AllReduce of used parameters", all_reduce(used_bytes), used_bytes, bound))
        backward = (*backward, Piece(name="used parameters", seconds=0.0, bucket=len(buckets)))
    head: list[Collective] = []
    if shards is not None and buckets:
        size = shards.parameter_bytes
        gathered = _collective("AllGather of parameters", all_reduce(size), size, bound, part=_HALF)
        head.append(msgspec.structs.replace(gathered, carries="parameters"))
    if buffer_bytes:
        broadcast = _collective("Broadcast of buffers", all_reduce(buffer_bytes), buffer_bytes, bound, part=_HALF)
        head.append(msgspec.structs.replace(broadcast, carries="buffers"))
    return StepPlan(
        forward=_scaled(computation.forward, scale),
        backward=_scaled(backward, scale),
        tail=_scaled(computation.tail, scale),
        buckets=tuple(collectives),
        head=tuple(head),
        num_micro_batches=computation.num_micro_batches,
        slowed=computation.slowed,
    )


def _collective(
    name: str, time: AllReduceTime, num_bytes: int, bound: Bound, *, conversion_s: float = 0.0, part: float = 1.0
) -> Collective:
    """What takes that part of an all-reduce of as many bytes."""
    return Collective(
        name=name,
        seconds=part * _at(time, bound) + conversion_s,
        num_bytes=num_bytes,
        wire_bytes_per_gpu=part * time.wire_bytes_per_gpu,
    )


def _scaled(pieces: tuple[Piece, ...], scale: float) -> tuple[Piece, ...]:
    if scale == 1:
        return pieces
    return tuple(Piece(name=work.name, seconds=work.seconds * scale, bucket=work.bucket) for work in pieces)


@functools.lru_cache(maxsize=1024)
def gradient_bytes(network: Network) -> int:
    """Bytes of the gradient in fp32."""
    return network.gradient_bytes


@functools.lru_cache(maxsize=1024)
def buffer_bytes(network: Network) -> int:
    """Bytes of the buffers that DDP broadcasts: BatchNorm's running mean and variance, and its step count (int64)."""
    norms = [layer for layer in network.layers if layer.kind is LayerKind.BATCH_NORM]
    return sum(2 * 4 * layer.out_channels + 8 for layer in norms)


def first_step_s(
    network: Network,
    all_reduce: AllReduce,
    wire: Wire | None = None,
    bound: Bound = "expected",
    head: Sequence[Collective] = (),
    shards: Shards | None = None,
) -> float:
    """Seconds of communication that the first step after wrapping does not hide.

    DDP does not know the order of the gradients yet: they travel in a single bucket, after backward. `head` are the
    collectives that the forward pass waits for. With `shards` the bucket is reduce-scattered, as all others.
    """
    wire = wire or Wire()
    num_bytes = gradient_bytes(network)
    part = 1.0 if shards is None else _HALF
    reduced_s = part * _at(all_reduce(round(num_bytes * wire.ratio)), bound) + num_bytes * wire.conversion_s_per_byte
    return reduced_s + sum(collective.seconds for collective in head)


def wrapping_s(network: Network, all_reduce: AllReduce, bound: Bound = "expected", *, rebuilds: bool = True) -> float:
    """Seconds of communication that wrapping a network costs besides its first step.

    The parameters and buffers are broadcast from rank 0 when it is wrapped, and the new order of the buckets (one
    int32 per parameter) when they are rebuilt after the first step.
    """
    state = broadcast_s(all_reduce(gradient_bytes(network) + buffer_bytes(network)), bound)
    return state + (broadcast_s(all_reduce(4 * len(network.parameters)), bound) if rebuilds else 0.0)


def broadcast_s(time: AllReduceTime, bound: Bound = "expected") -> float:
    """A broadcast moves every byte over every link once, where an all-reduce (reduce, then broadcast) does so twice."""
    return _HALF * _at(time, bound)


def _at(time: AllReduceTime, bound: Bound) -> float:
    return {"low": time.low_s, "expected": time.seconds, "high": time.high_s}[bound]
