"""Where in a recording is a training step, which operators made it, and how long did each of its phases take?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import msgspec

from ptsim.errors import FileFormatError
from ptsim.measure import kineto_operators as operators
from ptsim.measure.kineto_events import Event, Recording, Span, clip, length, outside, union

_STEP_MARK, UPDATE_MARK, _BACKWARD = "ProfilerStep#", "Optimizer.step#", "autograd::engine::evaluate_function:"
_LONGEST_STEP_S = 86_400.0
_ACCUMULATE = "torch::autograd::AccumulateGrad"
_WAITS = re.compile(r"(cuda|hip)(Device|Stream|Event)Synchronize")


class Call(msgspec.Struct, kw_only=True):
    """One operator of the network in one step."""

    event: Event
    backward: list[Event]
    forward_s: float
    backward_s: float

    @property
    def seconds(self) -> float:
        """Forward and backward together."""
        return self.forward_s + self.backward_s


class Step(msgspec.Struct, kw_only=True):
    """One training step of a recording; what the fields mean is said at `kineto.RankTimes`."""

    step_s: float
    forward_s: float
    backward_s: float
    optimizer_s: float | None
    communication_s: float
    exposed_s: float
    host_idle: float
    device_idle: float | None
    calls: list[Call]
    parameters: list[int]  # elements of every gradient; 0 where shapes were not recorded

    @property
    def compute_s(self) -> float:
        """The phases without exposed communication."""
        return self.forward_s + self.backward_s + (self.optimizer_s or 0.0)


def read_steps(recording: Recording) -> list[Step]:
    """The training steps of a file.

    Raises:
        FileFormatError: there is none, or one takes more than a day.
    """
    windows = [window for window in _windows(recording) if _backward(recording, window)]
    found = [(window, step) for window in windows if (step := _step(recording, window)).calls]
    windows, steps = [window for window, _ in found], [step for _, step in found]
    if not steps:
        raise FileFormatError(recording.path, "holds no forward pass with its backward pass; expected a training step")
    if recording.on_gpu:  # the host runs ahead, so that its marks do not tell how long the GPU takes
        begins = [min(e.begin_s for e in _launched(recording, window)) for window in windows]
        ends = [*begins[1:], max(e.end_s for e in _launched(recording, windows[-1]))]
        steps = [
            msgspec.structs.replace(step, step_s=end - begin)
            for step, begin, end in zip(steps, begins, ends, strict=True)
        ]
    longest = max(step.step_s for step in steps)
    if longest > _LONGEST_STEP_S:
        raise FileFormatError(recording.path, f"holds a training step of {longest:g} s; expected at most a day")
    return steps


def _windows(recording: Recording) -> list[Span]:
    """When the host worked on each step."""
    marks = [event for event in recording.host if event.name.startswith(_STEP_MARK)]
    if marks:
        begins = [mark.begin_s for mark in marks]
        return list(zip(begins, [*begins[1:], marks[-1].end_s], strict=True))
    updates = [event for event in recording.host if event.name.startswith(UPDATE_MARK)]
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


def _calls(recording: Recording, window: Span, backward: Sequence[Event]) -> list[Call]:
    """The network's operators in forward order, linked to their backward nodes."""
    creators: dict[int | None, Event] = {}
    for event in _within(recording.host, window):
        number = event.number("sequence number")
        is_forward = event.name.startswith("aten::") and not _is_inside(event, _BACKWARD)
        if number is not None and is_forward and not _is_inside(event, UPDATE_MARK):
            creators[number] = event  # the last one with that number makes the node
    found: dict[int, Call] = {}
    for node in backward:
        creator = creators.get(node.number("sequence number"))
        if creator is None or _ACCUMULATE in node.name:
            continue
        event = _outermost(creator)
        call = found.setdefault(id(event), Call(event=event, backward=[], forward_s=0.0, backward_s=0.0))
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


def _step(recording: Recording, window: Span) -> Step:
    backward = _backward(recording, window)
    calls = _calls(recording, window, backward)
    host = _within(recording.host, window)
    updates = [event for event in host if event.name.startswith(UPDATE_MARK)]
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
    return Step(
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
    calls: Sequence[Call], backward: Sequence[Event], updates: Sequence[Event]
) -> tuple[Span, Span, Span | None]:
    """Forward, backward and update on a CPU."""
    if not calls:
        return (0.0, 0.0), (0.0, 0.0), None
    turn = min(node.begin_s for node in backward)
    update = (updates[0].begin_s, updates[-1].end_s) if updates else None
    return (calls[0].event.begin_s, turn), (turn, max(node.end_s for node in backward)), update


def _device_phases(
    calls: Sequence[Call], backward: Sequence[Event], updates: Sequence[Event]
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
