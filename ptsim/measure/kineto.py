"""What did a training step take that `torch.profiler` recorded, and what does it say of the device?

A step is what lies between two marks of the profiler (`ProfilerStep#N`), up to an update of the optimizer; several that
are alike between two marks are as many steps. Without marks it is what lies between two updates, else the whole file.
The forward pass is made of the outermost operators that autograd keeps a node for, custom functions included; each is
linked to its backward node by the sequence number that both carry. Times are those of kernels where a GPU was recorded,
and of the operators themselves on a CPU.

Communication is exposed while a collective runs and nothing computes. All files of one call are ranks of the same job:
times are means over the ranks.

Source of the format: see `kineto_events`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from ptsim.consistency import MOST_COUNTED
from ptsim.errors import UnknownNameError, UsageError
from ptsim.hardware.catalog import device_names, load_device, match_device
from ptsim.hardware.profile import (
    DeviceProfile,
    Operator,
    OperatorSetting,
    OperatorShape,
    OperatorTime,
    StepMeasurement,
    operator_of,
)
from ptsim.hardware.profile_merge import mean_time
from ptsim.hardware.spec import Device
from ptsim.measure import kineto_operators as operators
from ptsim.measure.kineto_events import Recording, read_recording
from ptsim.measure.kineto_steps import UPDATE_MARK, Call, Step, read_steps
from ptsim.network import LayerKind, MemoryFormat, Network, Precision
from ptsim.operators import KIND_OF_OP
from ptsim.units import GIB, counted, time_stamp

T = TypeVar("T")
UNKNOWN = "unknown"  # architecture of a step whose network nobody named
_TF32 = re.compile(r"tf32|tensorop_s\d|_s1688|s1688gemm")  # kernels of cuDNN, cuBLAS and CUTLASS
_OF_NETWORK = "--input and --classes must be those of the profiled network"
_ON_GPU = tuple(f"aten::{library}_{op}" for library in ("cudnn", "miopen") for op in ("convolution", "batch_norm"))
_LAUNCHES = re.compile(r"(?:cuda|hip|cu)\w*Launch|runFunction")  # calls of CUDA, ROCm and MTIA
_NEGLIGIBLE = 0.01  # of what all operators take
_PRECISIONS = {"c10::half": Precision.FP16, "half": Precision.FP16, "c10::bfloat16": Precision.BF16}


class KernelTime(msgspec.Struct, frozen=True, kw_only=True):
    """One operator with its shapes, as often as it ran: seconds of a single call."""

    op: str
    shape: OperatorShape | None
    calls_per_step: float
    forward_seconds: float
    backward_seconds: float


class RankTimes(msgspec.Struct, frozen=True, kw_only=True):
    """What one file says of its median step.

    Attributes:
        step_seconds: from the begin of one step to that of the next.
        forward_seconds, backward_seconds, optimizer_seconds: of the phases, without exposed communication.
        communication_seconds: for which at least one collective ran.
        exposed_communication_seconds: for which one ran and nothing computed.
        host_idle_fraction: of the step, for which the host ran no operator and no call of the CUDA runtime but waiting;
            Python code between operators counts as idle, since the file does not show it.
        device_idle_fraction: of the step, for which nothing ran on the GPU; None without a GPU.
    """

    file: str
    rank: int | None
    num_steps: int
    step_seconds: float
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float | None
    communication_seconds: float
    exposed_communication_seconds: float
    host_idle_fraction: float
    device_idle_fraction: float | None


class KinetoImport(msgspec.Struct, frozen=True, kw_only=True):
    """Recorded steps of another program: means over the ranks, and the device profile that they make."""

    device: str
    batch: int | None
    precision: Precision
    memory_format: MemoryFormat
    optimizer: str | None
    world_size: int | None
    step_seconds: float
    images_per_second: float | None
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float | None
    communication_seconds: float
    exposed_communication_seconds: float
    overlap_fraction: float | None
    host_idle_fraction: float
    device_idle_fraction: float | None
    operators: tuple[KernelTime, ...]
    ranks: tuple[RankTimes, ...]
    notes: tuple[str, ...]
    profile: DeviceProfile


def _passes(steps: Sequence[Step], notes: list[str]) -> int:
    """How many passes a step usually adds up."""
    passes = _most([step.passes for step in steps]) or 1
    if passes > 1:
        notes.append(f"a step adds up the gradients of {passes} passes; the profile's step is one pass with the update")
    return passes


def _check_kernels(recording: Recording, device: Device | str | None) -> None:
    """Refuse a GPU's work without its kernels: the host only launches it, and takes other times."""
    if recording.on_gpu:
        return
    gpu = device.name if isinstance(device, Device) and device.is_gpu else None
    names = (event.name for event in itertools.chain(recording.host, recording.calls))
    launched = next((name for name in names if name.startswith(_ON_GPU) or _LAUNCHES.match(name)), None)
    if launched or gpu:
        says = f"holds {launched}, which runs on a GPU, but no kernels" if launched else f"holds no kernels of {gpu}"
        hint = "record with activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]"
        raise UsageError(f"{recording.path} {says}", hint=hint)


def _check_one_network(recordings: Sequence[Recording], steps: Sequence[Sequence[Step]]) -> None:
    """Refuse files of different networks, as of several runs in one folder: their means would be of none of them."""
    first: tuple[int, int] | None = None
    for recording, own in zip(recordings, steps, strict=True):
        sizes = sorted(own, key=lambda step: step.compute_s)[len(own) // 2].parameters
        found = len(sizes), sum(sizes)
        first = first or found
        if found[0] != first[0] or (found[1] != first[1] and found[1] and first[1]):  # 0: shapes were not recorded
            words = [f"{num:,} tensors" + (f" of {size:,} elements" if size else "") for num, size in (first, found)]
            raise UsageError(
                f"{recordings[0].path} and {recording.path} are of different networks: the gradients of a step are "
                f"{' and '.join(words)}",
                hint="the files of one call are those of the ranks of one job",
            )


def _read(
    paths: Sequence[str | Path], device: Device | str | None
) -> tuple[list[Recording], list[list[Step]], list[Step]]:
    """Every rank's recording, its steps, and the steps of all ranks."""
    if not paths:
        raise UsageError("no profile was named")
    recordings = [read_recording(path) for path in paths]
    for recording in recordings:
        _check_kernels(recording, device)
    steps = [read_steps(recording) for recording in recordings]
    _check_one_network(recordings, steps)
    return recordings, steps, list(itertools.chain.from_iterable(steps))


def import_kineto(
    paths: Sequence[str | Path],
    *,
    device: Device | str | None = None,
    memory_bytes: int | None = None,
    precision: Precision | None = None,
    memory_format: MemoryFormat | None = None,
    network: Network | None = None,
    name: str | None = None,
) -> KinetoImport:
    """Read profiled training steps: one file, or one of each rank of the same job.

    Args:
        paths: Chrome trace files that torch.profiler wrote, gzip or not.
        device: what it ran on where the file does not say, or says it as the catalog does not know it: a name of the
            catalog, or of a processor any name.
        memory_bytes: of that device; None is what the file or the catalog says.
        precision: of the products, where the file does not say.
        memory_format: of the activations, likewise.
        network: the profiled one, so that its steps are looked up whole.
        name: of the network; the first file's name if None.

    Raises:
        FileFormatError: a file is not what torch.profiler writes, or holds no training step.
        UsageError: no file, files of different devices, networks or jobs, another device or network than the file's,
            nothing names the device or its memory, or a GPU without its kernels.
    """
    if isinstance(device, str):
        with contextlib.suppress(UnknownNameError):
            device = load_device(device)
    recordings, steps, everything = _read(paths, device)
    calls = [call for step in everything for call in step.calls]
    notes = _cut_off(recordings) + _recomputation(everything)
    setting = _setting(calls, recordings[0].on_gpu, precision, memory_format, notes)
    named, driver_name, size = _device(recordings, device, memory_bytes, notes)
    times, rows = _operators(calls, setting, len(everything), notes)
    recorded = [time.operator for time in times]
    named_network = name or recordings[0].path.stem
    batch = _batch(recorded, network, named_network)
    optimizer = _optimizer(recordings, everything, notes)
    passes = _passes(everything, notes)
    ranks = tuple(map(_rank_times, recordings, steps))
    mean = _mean_times(ranks)
    world_size = _world_size(recordings, mean, notes)
    measured = msgspec.structs.replace(
        _measurement(everything, setting, batch, optimizer, UNKNOWN if network is None else network.id, named_network),
        data_parallel=(world_size or 1) > 1 or mean.communication_seconds > 0,
    )
    if network is not None and measured.num_parameters not in (0, network.num_learnt):
        raise UsageError(
            f"{named_network} has {network.num_learnt:,} parameters that get a gradient, the profiled step has "
            f"{measured.num_parameters:,}",
            hint=_OF_NETWORK,
        )
    return KinetoImport(
        device=named,
        batch=batch,
        precision=setting.precision,
        memory_format=setting.memory_format,
        optimizer=optimizer,
        world_size=world_size,
        step_seconds=mean.step_seconds,
        images_per_second=None if batch is None else passes * batch * (world_size or 1) / mean.step_seconds,
        forward_seconds=mean.forward_seconds,
        backward_seconds=mean.backward_seconds,
        optimizer_seconds=mean.optimizer_seconds,
        communication_seconds=mean.communication_seconds,
        exposed_communication_seconds=mean.exposed_communication_seconds,
        overlap_fraction=_overlap(mean),
        host_idle_fraction=mean.host_idle_fraction,
        device_idle_fraction=mean.device_idle_fraction,
        operators=rows,
        ranks=ranks,
        notes=tuple(notes),
        profile=_profile(recordings, driver_name, size, times, measured),
    )


def _batch(recorded: Sequence[Operator], network: Network | None, name: str) -> int | None:
    """Images of a mini-batch: the batch of most operators, or what makes the network's convolutions the recorded ones.

    A network may fold more into the mini-batch of its convolutions, such as the frames of a clip.

    Raises:
        UsageError: most of the network's convolutions were not recorded.
    """
    batch = _most([operator.batch for operator in recorded])
    seen: dict[tuple[object, ...], set[int]] = defaultdict(set)
    for operator in recorded:
        if operator.kind is LayerKind.CONV:
            seen[_convolution(operator)].add(operator.batch)
    layers = [] if network is None else [layer for layer in network.layers if layer.kind is LayerKind.CONV]
    if not layers or not seen:
        return batch
    found: Counter[int] = Counter()
    missing = []
    for layer in layers:
        wanted = operator_of(layer, batch=1, setting=recorded[0].setting)
        sizes = [size // wanted.batch for size in seen[_convolution(wanted)] if size % wanted.batch == 0]
        found.update(sizes)
        if not sizes:
            missing.append(layer)
    if 2 * len(missing) > len(layers):
        first = missing[0]
        shapes = " to ".join("×".join(map(str, shape)) for shape in (first.input_shapes[0], first.output_shape))
        raise UsageError(
            f"{len(missing)} of the {counted(len(layers), 'convolution')} of {name} were not recorded, such as "
            f"{first.name} from {shapes}",
            hint=_OF_NETWORK,
        )
    return batch if batch in found else found.most_common(1)[0][0]


def _convolution(operator: Operator) -> tuple[object, ...]:
    """What tells it from convolutions of other networks, or of the same one with other images."""
    return operator.inputs, operator.output, operator.kernel, operator.groups


def _profile(
    recordings: Sequence[Recording],
    driver_name: str,
    memory_bytes: int,
    operators: tuple[OperatorTime, ...],
    step: StepMeasurement,
) -> DeviceProfile:
    """What the recordings say of their device."""
    return DeviceProfile(
        created=time_stamp(),
        complete=True,
        device=driver_name,
        kind="cuda" if recordings[0].on_gpu else "cpu",
        memory_bytes=memory_bytes,
        num_threads=None,
        software={},
        sources=tuple(str(recording.path) for recording in recordings),
        operators=operators,
        steps=(step,),
    )


def _setting(
    calls: Sequence[Call],
    on_gpu: bool,
    precision: Precision | None,
    memory_format: MemoryFormat | None,
    notes: list[str],
) -> OperatorSetting:
    """Number format and layout, as most convolutions and products had them."""
    types = [kind for call in calls if (kind := operators.number_type(call.event)) is not None]
    layouts = [layout for call in calls if (layout := operators.memory_format(call.event)) is not None]
    found = _most(types)
    if precision is None:
        precision = _PRECISIONS.get((found or "").lower(), Precision.FP32)
        if precision is Precision.FP32 and on_gpu:
            names = [k.name for call in calls for k in call.event.all_kernels()]
            precision = Precision.TF32 if any(_TF32.search(kernel) for kernel in names) else precision
        if found is None:
            notes.append(f"number formats were not recorded; {precision} was assumed")
    if memory_format is None:
        memory_format = _most(layouts) or "contiguous"
        if not layouts:
            notes.append("strides were not recorded; contiguous tensors were assumed")
    return OperatorSetting(precision=precision, memory_format=memory_format)


def _device(
    recordings: Sequence[Recording], device: Device | str | None, memory_bytes: int | None, notes: list[str]
) -> tuple[str, str, int]:
    """What it ran on: its name, what its driver calls it, and its memory."""
    names = {recording.device for recording in recordings}
    if len(names) > 1:
        raise UsageError(f"the profiles are of different devices: {', '.join(sorted(str(name) for name in names))}")
    first = recordings[0]
    if device is not None and (recorded := match_device(first.device or "")) is not None:
        asked = device.name if isinstance(device, Device) else device
        if asked != recorded.name and (isinstance(device, str) or asked in device_names()):
            raise UsageError(f"{first.path} was recorded on {first.device!r}, which is no {asked}")
    if isinstance(device, Device):
        driver_name = device.driver_names[0] if device.driver_names else device.name
        return device.name, driver_name, memory_bytes or first.memory_bytes or device.memory_bytes
    name = device or first.device
    if name is None and first.on_gpu:
        raise UsageError(f"{first.path} does not name the GPU that it was recorded on", hint="name it with --device")
    name = name or f"processor of {first.host_name or 'an unnamed machine'}"
    known = match_device(name)
    size = memory_bytes or first.memory_bytes or (known.memory_bytes if known else None)
    if size is None and not first.on_gpu:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        notes.append(
            f"the file does not say how much memory its machine has; this one's {size / GIB:.1f} GiB are written"
        )
    if not size:
        raise UsageError(f"nothing says how much memory {name} has", hint="name it with --memory")
    return name, name, size


def _cut_off(recordings: Sequence[Recording]) -> list[str]:
    """What has to be known of events that the profiler has cut off."""
    number = sum(recording.num_cut_off for recording in recordings)
    return [f"{number:,} events have a negative duration, which counts as none"] if number else []


def _recomputation(steps: Sequence[Step]) -> list[str]:
    """What has to be known of activations that were computed twice."""
    share = statistics.median(step.recomputed_s / step.backward_s if step.backward_s else 0.0 for step in steps)
    text = f"{share:.0%} of the backward pass computes activations again (checkpoints); no operator's time holds that"
    return [text] if share else []


def _world_size(recordings: Sequence[Recording], times: RankTimes, notes: list[str]) -> int | None:
    """How many ranks the job had; None where no file says.

    Raises:
        UsageError: the files are of different jobs.
    """
    sizes = sorted({recording.world_size for recording in recordings if recording.world_size is not None})
    if len(sizes) > 1:
        raise UsageError(f"the profiles are of jobs of {' and '.join(map(str, sizes))} ranks")
    if not sizes and times.communication_seconds:
        notes.append("no file says how many ranks the job had, so images per second are those of one")
    return sizes[0] if sizes else None


def _operators(
    calls: Sequence[Call], setting: OperatorSetting, num_steps: int, notes: list[str]
) -> tuple[tuple[OperatorTime, ...], tuple[KernelTime, ...]]:
    """Every operator once: as the profile keeps it, and as a list for people."""
    same: dict[Operator, list[OperatorTime]] = {}
    listed: dict[tuple[str, OperatorShape | None], list[Call]] = {}
    left_out: dict[str, float] = defaultdict(float)
    for call in calls:
        shape = operators.operator_shape(call.event)
        op = operators.operator_name(call.event)
        if shape is not None and not all(operators.computes_input_gradient(node) for node in call.backward):
            shape = msgspec.structs.replace(shape, input_needs_gradient=False)
        listed.setdefault((op, shape), []).append(call)
        if shape is None:
            if KIND_OF_OP.get(op) is not LayerKind.RESHAPE:
                left_out[call.event.name] += call.seconds
            continue
        operator = Operator(setting=setting, **msgspec.structs.asdict(shape))
        time = OperatorTime(operator=operator, forward_s=call.forward_s, backward_s=call.backward_s, context="step")
        same.setdefault(operator, []).append(time)
    if not same:
        notes.append("no shapes were recorded, so nothing can be predicted from it; profile with record_shapes=True")
    total_s = sum(call.seconds for call in calls)
    large = sorted(name for name, seconds in left_out.items() if seconds > _NEGLIGIBLE * total_s)
    if same and large:
        notes.append(f"the profile leaves out {', '.join(large)}, whose shapes cannot be told")
    rows = tuple(
        KernelTime(
            op=op,
            shape=shape,
            calls_per_step=len(own) / num_steps,
            forward_seconds=statistics.fmean(call.forward_s for call in own),
            backward_seconds=statistics.fmean(call.backward_s for call in own),
        )
        for (op, shape), own in listed.items()
    )
    return tuple(map(mean_time, same.values())), rows


def _measurement(
    steps: Sequence[Step],
    setting: OperatorSetting,
    batch: int | None,
    optimizer: str | None,
    architecture: str,
    name: str,
) -> StepMeasurement:
    """The median step as the profiled tier keeps it: one pass and the update, without communication and waiting."""
    typical = sorted(steps, key=lambda step: step.compute_s)[len(steps) // 2]
    passes = typical.passes
    num_parameters = sum(typical.parameters)
    if num_parameters > MOST_COUNTED:
        raise UsageError(f"the gradients have {num_parameters:,} elements, at most {MOST_COUNTED:,} are counted")
    shaped = [call for call in typical.calls if operators.operator_shape(call.event) is not None]
    return StepMeasurement(
        architecture=architecture,
        name=name,
        setting=setting,
        batch=batch or 1,
        optimizer=optimizer,
        num_parameters=num_parameters,
        num_tensors=len(typical.parameters),
        num_layers=(len(shaped) or len(typical.calls)) // passes,
        num_samples=len(steps),
        forward_s=typical.forward_s / passes,
        backward_s=(typical.backward_s - typical.summed_s) / passes,
        optimizer_s=typical.optimizer_s,
        regularizer_s=None,
        step_s=typical.compute_s,
        step_low_s=min(step.compute_s for step in steps),
        step_high_s=max(step.compute_s for step in steps),
        layers_forward_s=sum(call.forward_s for call in shaped) / passes,
        layers_backward_s=(sum(call.backward_s for call in shaped) + typical.recomputed_s) / passes,
    )


def _rank_times(recording: Recording, steps: Sequence[Step]) -> RankTimes:
    typical = sorted(steps, key=lambda step: step.step_s)[len(steps) // 2]
    return RankTimes(
        file=str(recording.path),
        rank=recording.rank,
        num_steps=len(steps),
        step_seconds=typical.step_s,
        forward_seconds=typical.forward_s,
        backward_seconds=typical.backward_s,
        optimizer_seconds=typical.optimizer_s,
        communication_seconds=typical.communication_s,
        exposed_communication_seconds=typical.exposed_s,
        host_idle_fraction=typical.host_idle,
        device_idle_fraction=typical.device_idle,
    )


def _mean_times(ranks: Sequence[RankTimes]) -> RankTimes:
    """The first rank's record with the means over the ranks that say something; None where none does."""
    means: dict[str, float] = {}
    for field in RankTimes.__struct_fields__:
        known = [value for rank in ranks if (value := getattr(rank, field)) is not None]
        if known and field.endswith(("_seconds", "_fraction")):
            means[field] = statistics.fmean(known)
    return msgspec.structs.replace(ranks[0], **means)


def _overlap(times: RankTimes) -> float | None:
    """The part of the communication that computation hid; None without communication."""
    whole_s, exposed_s = times.communication_seconds, times.exposed_communication_seconds
    return max(0.0, 1 - exposed_s / whole_s) if whole_s else None


def _optimizer(recordings: Sequence[Recording], steps: Sequence[Step], notes: list[str]) -> str | None:
    """The optimizer's class in lower case, from "Optimizer.step#SGD.step"."""
    if steps[0].optimizer_s is None:
        notes.append("no Optimizer.step was recorded, so predictions from this profile lack the update")
    for event in recordings[0].host:
        if event.name.startswith(UPDATE_MARK):
            return event.name.removeprefix(UPDATE_MARK).removesuffix(".step").lower()
    return None


def _most(values: Sequence[T]) -> T | None:
    return Counter(values).most_common(1)[0][0] if values else None
