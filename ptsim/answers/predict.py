"""What is the throughput of a training step on a device, alone or data-parallel on a cluster, and how sure are we?"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import msgspec

from ptsim import zoo
from ptsim.costs.buckets import ddp_buckets
from ptsim.costs.collectives import all_reduce
from ptsim.costs.energy import step_energy
from ptsim.costs.flops import flops_utilization, training_macs
from ptsim.costs.memory import iteration_memory, usable_bytes
from ptsim.costs.step import Measurements, StepTime, Tier, step_time
from ptsim.errors import UsageError
from ptsim.hardware.catalog import UNSPECIFIED, load_cluster, load_device, measured_device, profiled_device
from ptsim.hardware.profile import DeviceProfile
from ptsim.hardware.profile_file import read_device_profile
from ptsim.hardware.spec import Cluster, Device
from ptsim.network import LayerKind, MemoryFormat, Network, Precision
from ptsim.setting import StepSetting, parse_precision
from ptsim.sim import ddp
from ptsim.sim.options import Options
from ptsim.sim.step import Job, StepResult, simulate_steps
from ptsim.trace.io import read_trace

PrecisionName = Literal["fp32", "tf32", "amp", "fp16", "bf16"]


class KindTime(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of all layers of one kind."""

    kind: LayerKind
    forward_seconds: float
    backward_seconds: float


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """One training step, predicted.

    Attributes:
        batch: images per GPU.
        step_seconds: of the whole step; on a cluster with the communication that computation does not hide.
        low, high: 90 % interval of `step_seconds`, in seconds.
        images_per_second: of all GPUs together; `low_images_per_second` goes with `high`, and the other way round.
        tier: the worst that the computation comes from; `network_tier` that of the all-reduces, None on one GPU.
        exposed_communication_seconds: what the all-reduces add to the step; 0 on one GPU.
        peak_memory_bytes: of one GPU, as the framework's allocator counts; `fits` compares what the process needs on
            the device with what it can have of the device's memory.
        mfu_fraction: FLOPs of the step over what the GPUs' arithmetic could do meanwhile; None where the device's peak
            for the precision is not known.
        energy_joules: of one step on all GPUs; None for a CPU.
        notes: what makes the numbers doubtful: a profile that was not measured on a quiet machine.
    """

    model: str
    device: str
    cluster: str | None
    gpus: int
    batch: int
    precision: Precision
    memory_format: MemoryFormat
    step_seconds: float
    low: float
    high: float
    images_per_second: float
    low_images_per_second: float
    high_images_per_second: float
    mfu_fraction: float | None
    tier: Tier
    network_tier: Tier | None
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    overhead_seconds: float
    exposed_communication_seconds: float
    communication_seconds: float
    allreduce_bytes_per_gpu: float
    peak_memory_bytes: int
    memory_bytes: int
    fits: bool
    energy_joules: float | None
    low_energy_joules: float | None
    high_energy_joules: float | None
    by_kind: tuple[KindTime, ...]
    notes: tuple[str, ...] = ()


def predict(
    model: str | Path | Network,
    *,
    gpu: str | Path | None = None,
    batch: int,
    precision: PrecisionName = "fp32",
    memory_format: MemoryFormat = "contiguous",
    cluster: str | Path | None = None,
    gpus: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    optimizer: str = "sgd",
    profile: str | Path | None = None,
) -> Prediction:
    """Time and throughput of one training step.

    Args:
        model: a zoo name, `torchvision:NAME`, `file.py:function` (these import torch), a trace, whose last architecture
            is taken together with its measurements, or a `Network`.
        gpu: catalog name or TOML file; the cluster's own if None, or without a cluster what the profile is of.
        batch: images per GPU.
        precision: of the matrix products; "amp" is fp16 autocast.
        memory_format: layout of the activations.
        cluster: catalog name or TOML file for data-parallel training.
        gpus: of the cluster; all of one node if None.
        input_shape: of one image; what the model usually takes if None.
        num_classes: outputs; the model's usual number if None.
        optimizer: "sgd" (with momentum), "adam", "adamw" or "rmsprop".
        profile: a device profile from `ptsim calibrate gpu`, used where it is of this device.

    Raises:
        PtsimError: an unknown name, a broken file, a mini-batch that is not positive, a precision that the device
            lacks, more GPUs than the cluster has, or a GPU count without a cluster.
    """
    machine = load_cluster(cluster) if cluster is not None else None
    if gpus is not None and machine is None:
        raise UsageError(f"{gpus} GPUs were asked for without a cluster", hint="name one with --cluster")
    if gpus is not None and gpus < 1:
        raise UsageError(f"{gpus} GPUs; at least 1 is needed")
    calibrated = None if profile is None else read_device_profile(Path(profile))
    device = _device(gpu, machine, calibrated)
    count = 1 if machine is None else (machine.gpus_per_node if gpus is None else gpus)
    numbers = parse_precision(precision)
    network, measurements = _network(model, device, input_shape, num_classes)
    if calibrated is not None:
        measurements = msgspec.structs.replace(measurements, device_profile=calibrated)
    step = step_time(
        network,
        device,
        StepSetting(batch=batch, precision=numbers, memory_format=memory_format, optimizer=optimizer),
        measurements=measurements,
    )
    expected: StepResult | None = None
    low_s, high_s, network_tier = step.low_s, step.high_s, None
    if machine is not None and count > 1:
        expected, low_s, high_s, network_tier = _data_parallel(network, step, machine, count)
    step_s = step.compute_s if expected is None else expected.step_s
    need = iteration_memory(
        network,
        batch=batch,
        precision=numbers,
        optimizer=optimizer,
        memory_format=memory_format,
        device=device,
        data_parallel=count > 1,
    )
    energy = None
    if device.architecture != "cpu":
        energy = step_energy(step, device, waiting_s=max(0.0, step_s - step.compute_s))
    return Prediction(
        model=network.name,
        device=device.name,
        cluster=None if machine is None else machine.name,
        gpus=count,
        batch=batch,
        precision=numbers,
        memory_format=memory_format,
        step_seconds=step_s,
        low=low_s,
        high=high_s,
        images_per_second=count * batch / step_s,
        low_images_per_second=count * batch / high_s,
        high_images_per_second=count * batch / low_s,
        mfu_fraction=flops_utilization(
            training_macs(network, images=batch), step_s, device.peak_flops_per_s.get(numbers)
        ),
        tier=step.tier,
        network_tier=network_tier,
        forward_seconds=step.forward_s,
        backward_seconds=step.backward_s,
        optimizer_seconds=step.optimizer_s,
        overhead_seconds=step.overhead_s,
        exposed_communication_seconds=0.0 if expected is None else expected.exposed_communication_s,
        communication_seconds=0.0 if expected is None else expected.communication_s,
        allreduce_bytes_per_gpu=0.0 if expected is None else expected.wire_bytes_per_gpu,
        peak_memory_bytes=need.peak_bytes,
        memory_bytes=device.memory_bytes,
        fits=need.device_bytes <= usable_bytes(device),
        energy_joules=None if energy is None else count * energy.joules,
        low_energy_joules=None if energy is None else count * energy.low_j,
        high_energy_joules=None if energy is None else count * energy.high_j,
        by_kind=_by_kind(step),
        notes=() if calibrated is None or step.tier is not Tier.PROFILED else calibrated.doubts(),
    )


def _device(gpu: str | Path | None, cluster: Cluster | None, calibrated: DeviceProfile | None) -> Device:
    """What was named, or else what was calibrated: a processor has no other name than in its profile.

    Raises:
        UsageError: neither device nor cluster nor profile.
    """
    if gpu is not None:
        return load_device(gpu)
    if cluster is not None and (cluster.device != UNSPECIFIED or calibrated is None):
        return load_device(cluster.device)
    if calibrated is None:
        raise UsageError(
            "neither a device nor a cluster was named",
            hint="ptsim devices lists the catalog; --profile stands for the device that it was measured on",
        )
    return profiled_device(calibrated)


def _network(
    model: str | Path | Network, device: Device, input_shape: tuple[int, int, int] | None, num_classes: int | None
) -> tuple[Network, Measurements]:
    """The network that `model` means, and what its trace measured."""
    if isinstance(model, Network):
        return model, Measurements()
    path = Path(model)
    if path.suffix in (".jsonl", ".json") or path.is_dir():
        trace = read_trace(path)
        if not trace.networks:
            raise UsageError(f"{path} holds no architecture")
        if input_shape is not None or num_classes is not None:
            raise UsageError("a trace's architecture has its own input shape and classes; leave both out")
        network = trace.networks[trace.epochs[-1].architecture] if trace.epochs else [*trace.networks.values()][-1]
        source = measured_device(trace.run.device.name, device)
        return network, Measurements(profiles=trace.profiles, source_device=source)
    from ptsim.capture.network import capture_network  # imports torch, which a trace does not need

    entry = zoo.find(str(model))
    classes = entry.num_classes if num_classes is None else num_classes
    if classes < 1:
        raise UsageError(f"classes is {classes}, expected a positive number")
    built = zoo.create(str(model), num_classes=classes)
    network = capture_network(built, name=str(model), input_shape=input_shape or entry.input_shape, num_classes=classes)
    return network, Measurements()


def _data_parallel(
    network: Network, step: StepTime, cluster: Cluster, num_gpus: int
) -> tuple[StepResult, float, float, Tier | None]:
    """The simulated step with DDP's buckets and its default broadcast, its interval, and the all-reduces' tier."""
    times = functools.cache(lambda num_bytes: all_reduce(num_bytes, cluster, num_gpus))
    buckets = ddp_buckets(network)
    contention = Options().contention
    results = []
    bounds: tuple[tuple[ddp.Bound, float], ...] = (
        ("expected", contention),
        ("low", contention / 2),
        ("high", contention * 1.5),
    )
    for bound, slowdown in bounds:
        plan = ddp.plan_step(step, buckets, times, buffer_bytes=ddp.buffer_bytes(network), bound=bound)
        results.append(simulate_steps([Job(plan=plan)], contention=slowdown)[0])
    expected, low, high = results
    tiers = {times(bucket.num_bytes).tier for bucket in buckets}
    worst = max(tiers, key=list(Tier).index, default=None)
    return expected, min(low.step_s, expected.step_s), max(high.step_s, expected.step_s), worst


def _by_kind(step: StepTime) -> tuple[KindTime, ...]:
    kinds = sorted({layer.kind for layer in step.layers})
    times = (
        KindTime(
            kind=kind,
            forward_seconds=sum(layer.forward_s for layer in step.layers if layer.kind is kind),
            backward_seconds=sum(layer.backward_s for layer in step.layers if layer.kind is kind),
        )
        for kind in kinds
    )
    return tuple(sorted(times, key=lambda t: -t.forward_seconds - t.backward_seconds))
