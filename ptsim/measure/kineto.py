"""What did a training step take that `torch.profiler` recorded, and what does it say of the device?

A step is what lies between two marks of the profiler (`ProfilerStep#N`), else between two optimizer updates, else the
whole file. The forward pass is made of the outermost ATen operators that autograd keeps a node for; each is linked to
its backward node by the sequence number that both carry. Times are those of kernels where a GPU was recorded, and of
the operators themselves on a CPU.

Communication is exposed while a collective runs and nothing computes. All files of one call are ranks of the same job:
times are means over the ranks.

Source of the format: see `kineto_events`.
"""

from __future__ import annotations

import datetime
import os
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from ptsim.errors import FileFormatError, UsageError
from ptsim.hardware.catalog import match_device
from ptsim.hardware.profile import (
    DeviceProfile,
    Operator,
    OperatorSetting,
    OperatorShape,
    OperatorTime,
    StepMeasurement,
)
from ptsim.hardware.profile_merge import mean_time
from ptsim.hardware.spec import Device
from ptsim.measure import kineto_operators as operators
from ptsim.measure.kineto_events import (
    Event,
    Recording,
    Span,
    clip,
    length,
    outside,
    read_recording,
    union,
)
from ptsim.network import LayerKind, MemoryFormat, Precision
from ptsim.operators import KIND_OF_OP
from ptsim.units import GIB

T = TypeVar("T")
UNKNOWN = "unknown"  # architecture of a step whose network nobody named
_STEP_MARK, _UPDATE, _BACKWARD = "ProfilerStep#", "Optimizer.step#", "autograd::engine::evaluate_function:"
_ACCUMULATE = "torch::autograd::AccumulateGrad"
_TF32 = re.compile(r"tf32|tensorop_s\d|_s1688|s1688gemm")  # kernels of cuDNN, cuBLAS and CUTLASS
_NEGLIGIBLE = 0.01  # of what all operators take
_WAITS = re.compile(r"(cuda|hip)(Device|Stream|Event)Synchronize")
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


class _Call(msgspec.Struct, kw_only=True):
    """One operator of the network in one step."""

    event: Event
    backward: list[Event]
    forward_s: float
    backward_s: float

    @property
    def seconds(self) -> float:
        return self.forward_s + self.backward_s


class _Step(msgspec.Struct, kw_only=True):
    step_s: float
    forward_s: float
    backward_s: float
    optimizer_s: float | None
    communication_s: float
    exposed_s: float
    host_idle: float
    device_idle: float | None
    calls: list[_Call]
    parameters: list[int]  # elements of every gradient; 0 where shapes were not recorded

    @property
    def compute_s(self) -> float:
        return self.forward_s + self.backward_s + (self.optimizer_s or 0.0)


def import_kineto(
    paths: Sequence[str | Path],
    *,
    device: Device | str | None = None,
    memory_bytes: int | None = None,
    precision: Precision | None = None,
    memory_format: MemoryFormat | None = None,
    architecture: str = UNKNOWN,
    name: str | None = None,
) -> KinetoImport:
    """Read profiled training steps: one file, or one of each rank of the same job.

    Args:
        paths: Chrome trace files that torch.profiler wrote, gzip or not.
        device: what it ran on where the file does not say, or says it as the catalog does not know it.
        memory_bytes: of that device, where neither the file nor the catalog says.
        precision: of the products, where the file does not say.
        memory_format: of the activations, likewise.
        architecture: id of the profiled network, so that its steps are looked up whole.
        name: of the network; the first file's name if None.

    Raises:
        FileFormatError: a file is not what torch.profiler writes, or holds no training step.
        UsageError: no file, files of different devices, or nothing names the device or its memory.
    """
    if not paths:
        raise UsageError("no profile was named")
    recordings = [read_recording(path) for path in paths]
    steps = [_steps(recording) for recording in recordings]
    everything = [step for own in steps for step in own]
    calls = [call for step in everything for call in step.calls]
    notes: list[str] = []
    setting = _setting(calls, recordings[0].on_gpu, precision, memory_format, notes)
    named, driver_name, size = _device(recordings, device, memory_bytes, notes)
    times, rows = _operators(calls, setting, len(everything), notes)
    batch = _most([time.operator.batch for time in times])
    optimizer = _optimizer(recordings)
    if everything[0].optimizer_s is None:
        notes.append("no Optimizer.step was recorded, so predictions from this profile lack the update")
    ranks = tuple(_rank_times(recording, own) for recording, own in zip(recordings, steps, strict=True))

    def mean(field: str) -> float:
        return statistics.fmean(getattr(rank, field) or 0.0 for rank in ranks)

    communication_s, exposed_s = mean("communication_seconds"), mean("exposed_communication_seconds")
    world_size = next((recording.world_size for recording in recordings if recording.world_size), None)
    measured = _measurement(everything, setting, batch, optimizer, architecture, name or recordings[0].path.stem)
    has_optimizer, has_device = everything[0].optimizer_s is not None, recordings[0].on_gpu
    step_s = mean("step_seconds")
    return KinetoImport(
        device=named,
        batch=batch,
        precision=setting.precision,
        memory_format=setting.memory_format,
        optimizer=optimizer,
        world_size=world_size,
        step_seconds=step_s,
        images_per_second=None if batch is None else batch * (world_size or 1) / step_s,
        forward_seconds=mean("forward_seconds"),
        backward_seconds=mean("backward_seconds"),
        optimizer_seconds=mean("optimizer_seconds") if has_optimizer else None,
        communication_seconds=communication_s,
        exposed_communication_seconds=exposed_s,
        overlap_fraction=1 - exposed_s / communication_s if communication_s else None,
        host_idle_fraction=mean("host_idle_fraction"),
        device_idle_fraction=mean("device_idle_fraction") if has_device else None,
        operators=rows,
        ranks=ranks,
        notes=tuple(notes),
        profile=DeviceProfile(
            created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            complete=True,
            device=driver_name,
            kind="cuda" if has_device else "cpu",
            memory_bytes=size,
            num_threads=None,
            software={},
            sources=tuple(str(recording.path) for recording in recordings),
            operators=times,
            steps=(measured,),
        ),
    )


def _steps(recording: Recording) -> list[_Step]:
    """The training steps of a file.

    Raises:
        FileFormatError: there is none.
    """
    windows = [window for window in _windows(recording) if _backward(recording, window)]
    steps = [_step(recording, window) for window in windows]
    steps = [step for step in steps if step.calls]
    if not steps:
        raise FileFormatError(recording.path, "holds no forward pass with its backward pass; expected a training step")
    if recording.on_gpu:  # the host runs ahead, so that its marks do not tell how long the GPU takes
        begins = [min(e.begin_s for e in _launched(recording, window)) for window in windows[: len(steps)]]
        ends = [*begins[1:], max(e.end_s for e in _launched(recording, windows[-1]))]
        steps = [
            msgspec.structs.replace(step, step_s=end - begin)
            for step, begin, end in zip(steps, begins, ends, strict=True)
        ]
    return steps


def _windows(recording: Recording) -> list[Span]:
    """When the host worked on each step."""
    marks = [event for event in recording.host if event.name.startswith(_STEP_MARK)]
    if marks:
        begins = [mark.begin_s for mark in marks]
        return list(zip(begins, [*begins[1:], marks[-1].end_s], strict=True))
    updates = [event for event in recording.host if event.name.startswith(_UPDATE)]
    begin = min(event.begin_s for event in recording.host)
    if not updates:
        return [(begin, max(event.end_s for event in recording.host))]
    ends = [event.end_s for event in updates]
    return list(zip([begin, *ends[:-1]], ends, strict=True))


def _within(events: Iterable[Event], window: Span) -> list[Event]:
    return [event for event in events if window[0] <= event.begin_s < window[1]]


def _is_inside(event: Event, prefix: str) -> bool:
    around: Event | None = event
    while around is not None:
        if around.name.startswith(prefix):
            return True
        around = around.parent
    return False


def _backward(recording: Recording, window: Span) -> list[Event]:
    """Autograd's nodes, each with all that runs inside it."""
    nodes = [event for event in _within(recording.host, window) if event.name.startswith(_BACKWARD)]
    return [node for node in nodes if node.parent is None or not _is_inside(node.parent, _BACKWARD)]


def _launched(recording: Recording, window: Span) -> list[Event]:
    """What the host launched on the device within the window; all that ran there if nothing says who launched it."""
    mine = [kernel for event in _within(recording.host, window) for kernel in event.kernels]
    return mine or _within(recording.device_events, window) or recording.device_events


def _outermost(event: Event) -> Event:
    """The ATen operator that nothing but annotations surrounds."""
    found, around = event, event.parent
    while around is not None:
        if around.name.startswith("aten::"):
            found = around
        around = around.parent
    return found


def _calls(recording: Recording, window: Span, backward: Sequence[Event]) -> list[_Call]:
    """The network's operators in forward order, linked to their backward nodes."""
    creators: dict[int | None, Event] = {}
    for event in _within(recording.host, window):
        number = event.number("sequence number")
        is_forward = event.name.startswith("aten::") and not _is_inside(event, _BACKWARD)
        if number is not None and is_forward and not _is_inside(event, _UPDATE):
            creators[number] = event  # the last one with that number makes the node
    found: dict[int, _Call] = {}
    for node in backward:
        creator = creators.get(node.number("sequence number"))
        if creator is None or _ACCUMULATE in node.name:
            continue
        event = _outermost(creator)
        call = found.setdefault(id(event), _Call(event=event, backward=[], forward_s=0.0, backward_s=0.0))
        call.backward.append(node)
    for call in found.values():
        call.forward_s = _busy_s(recording, [call.event])
        call.backward_s = _busy_s(recording, call.backward)
    return sorted(found.values(), key=lambda call: call.event.begin_s)


def _busy_s(recording: Recording, events: Iterable[Event]) -> float:
    if not recording.on_gpu:
        return sum(event.seconds for event in events)
    kernels = (kernel for event in events for kernel in event.all_kernels())
    return sum(kernel.seconds for kernel in kernels if not kernel.is_collective)


def _step(recording: Recording, window: Span) -> _Step:
    backward = _backward(recording, window)
    calls = _calls(recording, window, backward)
    host = _within(recording.host, window)
    updates = [event for event in host if event.name.startswith(_UPDATE)]
    gradients = [event for event in host if event.name == _ACCUMULATE]
    sizes = [operators.number_of_elements(event) for event in gradients]
    on_device = _launched(recording, window) if recording.on_gpu else []
    work = on_device if recording.on_gpu else host
    collectives = union(event.span for event in work if event.is_collective)
    if recording.on_gpu:
        computing = union(event.span for event in on_device if not event.is_collective)
        whole = (min(event.begin_s for event in on_device), max(event.end_s for event in on_device))
        phases = _device_phases(calls, backward, updates)
    else:
        computing = union(event.span for event in host if _computes(event))
        whole, phases = window, _host_phases(calls, backward, updates)
    exposed = [outside(clip(collectives, phase), computing) if phase else 0.0 for phase in phases]
    forward_s, backward_s, optimizer_s = (
        None if phase is None else max(phase[1] - phase[0] - hidden, 0.0)
        for phase, hidden in zip(phases, exposed, strict=True)
    )
    host_busy = [event.span for event in host if event.category == "cpu_op" and not event.is_collective]
    host_busy += [call.span for call in _within(recording.calls, window) if not _WAITS.match(call.name)]
    waits = [call.span for call in _within(recording.calls, window) if _WAITS.match(call.name)]
    host_s = length(clip(host_busy, window)) - (length(waits) - outside(waits, host_busy) if waits else 0.0)
    step_s = window[1] - window[0]
    device_s = whole[1] - whole[0]
    return _Step(
        step_s=step_s,
        forward_s=forward_s or 0.0,
        backward_s=backward_s or 0.0,
        optimizer_s=optimizer_s,
        communication_s=length(collectives),
        exposed_s=outside(collectives, computing),
        host_idle=1 - host_s / step_s if step_s else 0.0,
        device_idle=1 - length(e.span for e in on_device) / device_s if on_device and device_s else None,
        calls=calls,
        parameters=sizes,
    )


def _computes(event: Event) -> bool:
    """Whether the host works in it, so that communication beside it is hidden; the waiting for one is no work."""
    return event.category == "cpu_op" and not event.is_collective and event.name.startswith(("aten::", _BACKWARD))


def _host_phases(
    calls: Sequence[_Call], backward: Sequence[Event], updates: Sequence[Event]
) -> tuple[Span, Span, Span | None]:
    """Forward, backward and update on a CPU."""
    if not calls:
        return (0.0, 0.0), (0.0, 0.0), None
    turn = min(node.begin_s for node in backward)
    update = (updates[0].begin_s, updates[-1].end_s) if updates else None
    return (calls[0].event.begin_s, turn), (turn, max(node.end_s for node in backward)), update


def _device_phases(
    calls: Sequence[_Call], backward: Sequence[Event], updates: Sequence[Event]
) -> tuple[Span, Span, Span | None]:
    """The same on a GPU: from a phase's first kernel to its last."""

    def kernels(events: Iterable[Event]) -> list[Event]:
        return [k for event in events for k in event.all_kernels() if not k.is_collective]

    forward, back, update = kernels(call.event for call in calls), kernels(backward), kernels(updates)
    if not forward or not back:
        return (0.0, 0.0), (0.0, 0.0), None
    turn = max(kernel.end_s for kernel in forward)
    updating = (min(k.begin_s for k in update), max(k.end_s for k in update)) if update else None
    return (min(k.begin_s for k in forward), turn), (turn, max(k.end_s for k in back)), updating


def _setting(
    calls: Sequence[_Call],
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
    if isinstance(device, Device):
        driver_name = device.driver_names[0] if device.driver_names else device.name
        return device.name, driver_name, device.memory_bytes
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


def _operators(
    calls: Sequence[_Call], setting: OperatorSetting, num_steps: int, notes: list[str]
) -> tuple[tuple[OperatorTime, ...], tuple[KernelTime, ...]]:
    """Every operator once: as the profile keeps it, and as a list for people."""
    same: dict[Operator, list[OperatorTime]] = {}
    listed: dict[tuple[str, OperatorShape | None], list[_Call]] = {}
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
    steps: Sequence[_Step],
    setting: OperatorSetting,
    batch: int | None,
    optimizer: str | None,
    architecture: str,
    name: str,
) -> StepMeasurement:
    """The median step as the profiled tier keeps it: without communication and without waiting for images."""
    typical = sorted(steps, key=lambda step: step.compute_s)[len(steps) // 2]
    shaped = [call for call in typical.calls if operators.operator_shape(call.event) is not None]
    return StepMeasurement(
        architecture=architecture,
        name=name,
        setting=setting,
        batch=batch or 1,
        optimizer=optimizer,
        num_parameters=sum(typical.parameters),
        num_tensors=len(typical.parameters),
        num_layers=len(shaped) or len(typical.calls),
        num_samples=len(steps),
        forward_s=typical.forward_s,
        backward_s=typical.backward_s,
        optimizer_s=typical.optimizer_s,
        regularizer_s=None,
        step_s=typical.compute_s,
        step_low_s=min(step.compute_s for step in steps),
        step_high_s=max(step.compute_s for step in steps),
        layers_forward_s=sum(call.forward_s for call in shaped),
        layers_backward_s=sum(call.backward_s for call in shaped),
    )


def _rank_times(recording: Recording, steps: Sequence[_Step]) -> RankTimes:
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


def _optimizer(recordings: Sequence[Recording]) -> str | None:
    """The optimizer's class in lower case, from "Optimizer.step#SGD.step"."""
    for event in recordings[0].host:
        if event.name.startswith(_UPDATE):
            return event.name.removeprefix(_UPDATE).removesuffix(".step").lower()
    return None


def _most(values: Sequence[T]) -> T | None:
    return Counter(values).most_common(1)[0][0] if values else None
