"""What did every epoch of a recorded run cost: arithmetic, BatchNorm traffic, memory, communication?

A run's cost is the sum over epochs of what that epoch's architecture costs, times its images or iterations
(docs/method.md §6). Nothing here is a time.
"""

from __future__ import annotations

import msgspec

from ptsim.costs.collectives import ring_wire_bytes
from ptsim.costs.flops import Convention, inference_macs, training_macs
from ptsim.costs.memory import iteration_memory
from ptsim.costs.traffic import batch_norm_bytes
from ptsim.hardware.catalog import match_device
from ptsim.hardware.spec import Device
from ptsim.setting import StepSetting
from ptsim.trace.schema import Epoch
from ptsim.trace.trace import Trace


class EpochCost(msgspec.Struct, frozen=True, kw_only=True):
    """One epoch. Without "per_image", figures are of the whole epoch and of all devices together, but for memory.

    An image's share of what runs once a mini-batch is that of the epoch's own mini-batch and passes.

    Attributes:
        peak_memory_bytes: modelled, on each device.
        measured_peak_memory_bytes: the allocator's, as recorded.
        gradient_bytes: what each device hands to the all-reduce over the epoch: 4 bytes per iteration and parameter
            that gets a gradient.
        allreduce_bytes_per_gpu: what each device then sends in a ring, 2(p-1)/p of it; 0 on one device.
    """

    epoch: int
    architecture: str
    batch_per_gpu: int
    world_size: int
    num_iterations: int
    num_images: int
    parameters: int
    inference_macs_per_image: int
    training_macs_per_image: int
    training_macs: int
    bn_bytes_per_image: int
    bn_bytes: int
    peak_memory_bytes: int
    measured_peak_memory_bytes: int | None
    gradient_bytes: int
    allreduce_bytes_per_gpu: int


def run_cost(
    trace: Trace, convention: Convention = "exact", *, world_size: int | None = None, device: Device | None = None
) -> tuple[EpochCost, ...]:
    """The cost of every epoch that `trace` has, in order.

    Args:
        trace: a recorded run, whole or cut off.
        convention: how MACs are counted.
        world_size: count communication for so many devices instead of the recorded ones.
        device: whose memory is modelled; the recorded one if None.

    Raises:
        ValueError: the convention is unknown, or the world size is not positive.
    """
    if world_size is not None and world_size <= 0:
        raise ValueError(f"world_size is {world_size}, expected a positive number of devices")
    device = recorded_device(trace) if device is None else device
    needs: dict[tuple[str, StepSetting], int] = {}  # one iteration's peak; most epochs repeat the one before
    costs = []
    for epoch in trace.epochs:
        network = trace.network_of(epoch)
        size, batch = world_size or epoch.world_size, epoch.batch_per_gpu
        bn_bytes = batch_norm_bytes(network, trace.run.precision.activation_bytes)
        asked = epoch.architecture, trace.setting_of(epoch)
        if asked not in needs:
            needs[asked] = iteration_memory(network, asked[1], device=device).peak_bytes
        gradient_bytes = network.gradient_bytes * epoch.num_iterations
        inference, one_batch = (
            count(network, convention, images=batch, mini_batches=epoch.passes)
            for count in (inference_macs, training_macs)
        )
        costs.append(
            EpochCost(
                epoch=epoch.epoch,
                architecture=epoch.architecture,
                batch_per_gpu=epoch.batch_per_gpu,
                world_size=size,
                num_iterations=epoch.num_iterations,
                num_images=epoch.num_images,
                parameters=network.num_parameters,
                inference_macs_per_image=inference // batch,
                training_macs_per_image=one_batch // batch,
                training_macs=epoch_training_macs(trace, epoch, convention),
                bn_bytes_per_image=bn_bytes,
                bn_bytes=bn_bytes * epoch.num_images,
                peak_memory_bytes=needs[asked],
                measured_peak_memory_bytes=epoch.peak_memory_bytes,
                gradient_bytes=gradient_bytes,
                allreduce_bytes_per_gpu=round(ring_wire_bytes(gradient_bytes, size)),
            )
        )
    return tuple(costs)


def epoch_training_macs(trace: Trace, epoch: Epoch, convention: Convention = "exact") -> int:
    """MACs of all images of one of the trace's epochs, on all its devices together."""
    mini_batches = epoch.num_iterations * epoch.passes * epoch.world_size
    network = trace.network_of(epoch)
    return training_macs(network, convention, images=epoch.num_images, mini_batches=mini_batches)


def recorded_device(trace: Trace) -> Device | None:
    """The catalog's device that the run used; None for a CPU or a GPU that the catalog does not have."""
    return match_device(trace.run.device.name) if trace.run.device.kind == "cuda" else None
