"""What is the throughput of a training step on a device, alone or data-parallel on a cluster, and how sure are we?"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ptsim.answers.subject import BATCH_HINT, Subject, find_subject, is_run
from ptsim.costs.buckets import ddp_buckets
from ptsim.costs.collectives import reduction
from ptsim.costs.datasheet import load_fit
from ptsim.costs.energy import step_energy
from ptsim.costs.flops import flops_utilization, training_macs
from ptsim.costs.memory import iteration_memory
from ptsim.costs.scaling import among, contention_of, hook_seconds
from ptsim.costs.software import parse_torch_version, software_note
from ptsim.costs.step import Measurements, StepTime, step_time
from ptsim.costs.tiers import Tier, worst_tier
from ptsim.errors import UsageError
from ptsim.hardware.catalog import load_cluster, load_device, profiled_device
from ptsim.hardware.profile import DeviceProfile
from ptsim.hardware.profile_file import read_device_profile
from ptsim.hardware.spec import Cluster, Device
from ptsim.network import LayerKind, MemoryFormat, Network, Precision
from ptsim.setting import PrecisionName, Sharding, StepSetting, check_options, parse_sharding
from ptsim.sim import ddp
from ptsim.sim.bounded import BoundedStep, SecondsRange, data_parallel_step
from ptsim.trace.trace import Trace

if TYPE_CHECKING:
    from torch import nn


class KindTime(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of all layers of one kind."""

    kind: LayerKind
    forward_seconds: float
    backward_seconds: float


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """One training step, predicted.

    Attributes:
        input_shape: channels, height and width of the images.
        batch: images per GPU.
        step_seconds: of the whole step; on a cluster with the communication that computation does not hide.
        low, high: 90 % interval of `step_seconds`, in seconds.
        images_per_second: of all GPUs together; `low_images_per_second` goes with `high`, and the other way round.
        tier: the worst that the computation comes from; `network_tier` that of the all-reduces, None on one GPU.
        forward_seconds, backward_seconds, optimizer_seconds, overhead_seconds: of the computation, which takes a little
            longer on a GPU among others than on one alone (`costs.scaling`); `by_kind` has the first two.
        exposed_communication_seconds: what the all-reduces add to the step; 0 on one GPU.
        communication_wait_seconds: for which the GPU stands still of that; for the rest it computes more slowly.
        peak_memory_bytes: of one GPU, as the framework's allocator counts; `fits` compares what the process needs on
            the device with what it can have of the device's memory.
        mfu_fraction: FLOPs of the step over what the GPUs' arithmetic could do meanwhile; None where the device's peak
            for the precision is not known.
        energy_joules: of one step on all GPUs; None for a CPU.
        hook_seconds: of the gradients' hooks and copies into buckets; 0 on one GPU, and where the profile is of one of
            several GPUs, whose backward pass holds them.
        torch_version: the version of PyTorch that was asked for; None for today's.
        notes: what makes the numbers doubtful: a profile that was not measured on a quiet machine.
    """

    model: str
    input_shape: tuple[int, int, int]
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
    tier: str
    network_tier: str | None
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    overhead_seconds: float
    exposed_communication_seconds: float
    communication_wait_seconds: float
    communication_seconds: float
    allreduce_bytes_per_gpu: float
    peak_memory_bytes: int
    memory_bytes: int
    fits: bool
    energy_joules: float | None
    low_energy_joules: float | None
    high_energy_joules: float | None
    by_kind: tuple[KindTime, ...]
    hook_seconds: float = 0.0
    torch_version: str | None = None
    notes: tuple[str, ...] = ()


class PredictOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What is seldom given of a step.

    Attributes:
        memory_format: layout of the activations; a trace's own, else contiguous.
        input_shape: of one image; what the model usually takes if None.
        num_classes: outputs; the model's usual number if None.
        optimizer: "sgd" (with momentum), "adam", "adamw" or "rmsprop"; a trace's own, else sgd.
        sharding: "zero1" or "zero2": every GPU keeps its share of the optimizer's state, and of the gradients too.
        torch_version: of the PyTorch that runs the step, such as "1.8"; today's if None. `ptsim.costs.software` says
            what older ones take longer for.
    """

    memory_format: MemoryFormat | None = None
    input_shape: tuple[int, int, int] | None = None
    num_classes: int | None = None
    optimizer: str | None = None
    sharding: Sharding = "none"
    torch_version: str | None = None


def predict(
    model: str | Path | Trace | Network | nn.Module,
    *,
    gpu: str | Path | Device | None = None,
    batch: int | None = None,
    precision: PrecisionName | Precision | None = None,
    cluster: str | Path | Cluster | None = None,
    gpus: int | None = None,
    profile: str | Path | None = None,
    options: PredictOptions | None = None,
    **changes: Any,
) -> Prediction:
    """Time and throughput of one training step.

        ptsim.predict("torchvision:resnet50", gpu="a100", batch=64, precision="amp", memory_format="channels_last")

    Args:
        model: what `ptsim.answers.subject` says; of a trace the network that the run ended with is taken, together with
            the trace's measurements.
        gpu: catalog name, TOML file or device; the cluster's own if None, or without a cluster what the profile is of.
        batch: images per GPU; a trace's last one if None.
        precision: of the matrix products; "amp" is fp16 autocast; a trace's own, else fp32.
        cluster: catalog name, TOML file or cluster, for data-parallel training.
        gpus: of the cluster; all of one node if None.
        profile: a device profile from `ptsim calibrate gpu`, used where it is of this device.
        options: see `PredictOptions`.
        **changes: single ones of these options by name, on top of `options`.

    Raises:
        PtsimError: an unknown name or option, a broken file, a mini-batch that is not positive, a precision that the
            device lacks, more GPUs than the cluster has, or a GPU count or sharding without a cluster.
    """
    asked = options or PredictOptions()
    check_options(asked, changes)
    asked = msgspec.structs.replace(asked, **changes)  # what the values may be is checked where they are used
    machine = None if cluster is None else load_cluster(cluster)
    sharding = parse_sharding(asked.sharding)
    version = None if asked.torch_version is None else parse_torch_version(asked.torch_version)
    if machine is None and gpus is not None:
        raise UsageError(f"{gpus} GPUs were asked for without a cluster", hint="name one with --cluster")
    if machine is None and sharding != "none":
        raise UsageError(f"sharding {sharding} was asked for without a cluster", hint="name one with --cluster")
    calibrated = None if profile is None else read_device_profile(Path(profile))
    by_folder = isinstance(model, str) and os.path.isdir(model)  # of a run, perhaps: if not, that is said first
    _check_given(place=(gpu, machine, calibrated), batch=batch, needs_batch=not (is_run(model) or by_folder))
    device = _device(gpu, machine, calibrated)
    subject = find_subject(model, input_shape=asked.input_shape, num_classes=asked.num_classes)
    setting = subject.setting(
        batch=batch,
        precision=precision,
        memory_format=asked.memory_format,
        optimizer=asked.optimizer,
        num_gpus=1 if machine is None else (machine.gpus_per_node if gpus is None else gpus),
    )
    setting = msgspec.structs.replace(setting, sharding=sharding, torch_version=version or setting.torch_version)
    known = Measurements.of(subject.trace, device, calibrated)
    step = step_time(subject.network, device, setting, measurements=known)
    if version is not None and step.tier != Tier.DATASHEET:
        raise UsageError(f"torch_version is for steps that are predicted from the data sheet; this one is {step.tier}")
    parallel: BoundedStep | None = None
    network_tier = None
    if machine is not None and setting.data_parallel:
        step = among(step, machine, setting.num_gpus)
        parallel, network_tier = _data_parallel(subject, step, machine, setting)
    notes = () if calibrated is None or step.tier != Tier.PROFILED else calibrated.doubts(num_gpus=setting.num_gpus)
    if (
        step.tier == Tier.DATASHEET
        and (note := software_note(device, setting.torch_version, load_fit().young_software)) is not None
    ):
        notes = (*notes, note)
    if subject.trace is not None:
        often = subject.trace.reductions_note if setting.data_parallel and setting.passes > 1 else None
        notes = (*notes, *filter(None, (subject.trace.compiled_note, often)))
    made = _prediction(subject.network, device, machine, setting, step, parallel, network_tier, notes)
    return made if version is None else msgspec.structs.replace(made, torch_version=str(version))


def _data_parallel(
    subject: Subject, step: StepTime, cluster: Cluster, setting: StepSetting
) -> tuple[BoundedStep, str | None]:
    """The simulated step of several GPUs, and the worst tier that its all-reduces come from."""
    network = subject.network
    shards = ddp.shards_of(network, setting)
    times = functools.cache(lambda size: reduction(size, cluster, setting.num_gpus, sharded=shards is not None))
    simulated = data_parallel_step(
        network,
        step,
        times,
        contention=contention_of(cluster, setting.num_gpus),
        tensor_s=hook_seconds(cluster, setting.num_gpus),
        shards=shards,
        buffers=subject.broadcasts_buffers,
        overlap=subject.trace is None or not subject.trace.compiled,  # all gradients of a compiled step come at its end
    )
    sizes = [bucket.num_bytes for bucket in ddp_buckets(network)]
    if shards is not None and sizes:
        sizes.append(shards.parameter_bytes)  # which are gathered
    return simulated, worst_tier(times(size).tier for size in sizes)


def _prediction(
    network: Network,
    device: Device,
    cluster: Cluster | None,
    setting: StepSetting,
    step: StepTime,
    parallel: BoundedStep | None,
    network_tier: str | None,
    notes: tuple[str, ...],
) -> Prediction:
    """The step's answer; `parallel` is the simulated step of several GPUs."""
    took = SecondsRange(low_s=step.low_s, expected_s=step.compute_s, high_s=step.high_s)
    expected = None
    if parallel is not None:
        assert cluster is not None, "several GPUs are of a cluster"
        took, expected = parallel.interval().among(cluster, setting.num_gpus, step.tier), parallel.expected
    need = iteration_memory(network, setting, device=device)
    count, images = setting.num_gpus, setting.num_gpus * setting.batch
    own = step.updating(setting.update_share)
    waiting_s = max(0.0, took.expected_s - own.compute_s)
    within = took.low_s / took.expected_s, took.high_s / took.expected_s
    energy = step_energy(own, device, waiting_s=waiting_s, within=within) if device.is_gpu else None
    return Prediction(
        model=network.name,
        input_shape=network.input_shape,
        device=device.name,
        cluster=None if cluster is None else cluster.name,
        gpus=count,
        batch=setting.batch,
        precision=setting.precision,
        memory_format=setting.memory_format,
        step_seconds=took.expected_s,
        low=took.low_s,
        high=took.high_s,
        images_per_second=images / took.expected_s,
        low_images_per_second=images / took.high_s,
        high_images_per_second=images / took.low_s,
        mfu_fraction=flops_utilization(
            training_macs(network, images=setting.batch, mini_batches=setting.passes),
            took.expected_s,
            device.peak_flops_per_s.get(setting.precision),
        ),
        tier=step.tier,
        network_tier=network_tier,
        forward_seconds=step.forward_s,
        backward_seconds=step.backward_s,
        optimizer_seconds=own.optimizer_s,
        overhead_seconds=step.overhead_s,
        exposed_communication_seconds=0.0 if expected is None else expected.exposed_communication_s,
        communication_wait_seconds=0.0 if expected is None else expected.communication_wait_s,
        communication_seconds=0.0 if expected is None else expected.communication_s,
        allreduce_bytes_per_gpu=0.0 if expected is None else expected.wire_bytes_per_gpu,
        peak_memory_bytes=need.peak_bytes,
        memory_bytes=device.memory_bytes,
        fits=need.fits(device),
        energy_joules=None if energy is None else count * energy.joules,
        low_energy_joules=None if energy is None else count * energy.low_j,
        high_energy_joules=None if energy is None else count * energy.high_j,
        by_kind=_by_kind(step),
        hook_seconds=0.0 if cluster is None else ddp.hooks_s(step, ddp_buckets(network), hook_seconds(cluster, count)),
        notes=notes,
    )


def _check_given(*, place: Sequence[object], batch: int | None, needs_batch: bool) -> None:
    """Refuse a prediction for no device or of no mini-batch, before a network is traced.

    Raises:
        UsageError: names all that is missing.
    """
    missing, remedies = [], []
    if all(named is None for named in place):
        missing.append("neither a device nor a cluster was named")
        remedies.append("ptsim devices lists the catalog; --profile stands for the device that it was measured on")
    if needs_batch and batch is None:
        missing.append("no mini-batch was given")
        remedies.append(BATCH_HINT)
    if missing:
        raise UsageError(", and ".join(missing), hint="; ".join(remedies))


def _device(gpu: str | Path | Device | None, cluster: Cluster | None, calibrated: DeviceProfile | None) -> Device:
    """What was named, or else what was calibrated: a processor has no other name than in its profile.

    Raises:
        UsageError: a device or a cluster's GPU that nobody knows.
    """
    if gpu is not None:
        return load_device(gpu)
    if cluster is not None and (cluster.device is not None or calibrated is None):
        return cluster.gpu
    assert calibrated is not None, "one of the three was given"
    return profiled_device(calibrated)


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
