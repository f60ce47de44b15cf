"""Where in a recording is a training step, which operators made it, and how long did each of its phases take?"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from ptsim.errors import FileFormatError
from ptsim.measure import kineto_operators as operators
from ptsim.measure.kineto_events import Event, Recording, Span, clip, length, outside, union, within
from ptsim.network import LayerKind
from ptsim.operators import KIND_OF_OP

_STEP_MARK, UPDATE_MARK, _BACKWARD = "ProfilerStep#", "Optimizer.step#", "autograd::engine::evaluate_function:"
_SEQUENCE = "sequence number"
_HARDLY_ANY = 0.05  # of a GPU's kernels: another one with fewer takes no part
_SHORTEST_STEP_S, _LONGEST_STEP_S = 1e-9, 86_400.0
_ACCUMULATE = "torch::autograd::AccumulateGrad"
_SCALE = "aten::_amp_update_scale_"  # ends the step of a GradScaler, with an update or without
_WAITS = re.compile(r"(cuda|hip)(Device|Stream|Event)Synchronize")
_TRANSFER = ("Memcpy HtoD", "Memcpy DtoH")  # copies between host and device, which compute nothing
_FORWARD_ONLY = (LayerKind.CONV, LayerKind.LINEAR, LayerKind.BATCH_NORM, LayerKind.NORM)


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
    """One training step of a recording; what the fields mean is said at `kineto.RankTimes`.

    `passes` forward and backward passes make its gradients; they are in its times and calls, `parameters` are of one.
    `recomputed_s` of the backward pass went into activations that a checkpoint did not keep, `summed_s` into adding the
    gradients of its second and later passes to those that were there; no call has them.
    """

    step_s: float
    forward_s: float
    backward_s: float
    optimizer_s: float | None
    communication_s: float
    exposed_s: float
    host_idle: float
    device_idle: float | None
    calls: list[Call]
    passes: int
    recomputed_s: float
    summed_s: float
    parameters: list[int]  # elements of every gradient; 0 where shapes were not recorded

    @property
    def compute_s(self) -> float:
        """One pass, whose gradients are added to none, and the update; without exposed communication."""
        return (self.forward_s + self.backward_s - self.summed_s) / self.passes + (self.optimizer_s or 0.0)


def read_steps(recording: Recording) -> list[Step]:
    """The training steps of a file.

    Raises:
        FileFormatError: there is none, or one takes less than a nanosecond or more than a day, or its operators none,
            or one process ran several GPUs.
    """
    _check_one_gpu(recording)
    windows = _windows(recording)
    trained = [window for window in windows if _backward(recording, window)]
    updated = [window for window in trained if _updates(recording, window)]  # the last one may lack its end
    found = {window: step for window in updated or trained if (step := _step(recording, window)).calls}
    steps = list(found.values())
    if not any(event.number(_SEQUENCE) is not None for event in recording.host):
        problem = "tells no training step: its operators have no sequence numbers, which lead from forward to backward"
        advice = "record it with PyTorch 2, with gradients, and not from a CUDA graph"
        raise FileFormatError(recording.path, f"{problem}; {advice}")
    if not steps:
        raise FileFormatError(recording.path, "holds no forward pass with its backward pass; expected a training step")
    if recording.on_gpu:
        steps = _on_device(recording, windows, found)
    longest = max(max(step.step_s, step.compute_s) for step in steps)
    if longest > _LONGEST_STEP_S:
        raise FileFormatError(recording.path, f"holds a training step of {longest:g} s; expected at most a day")
    if min(step.compute_s for step in steps) < _SHORTEST_STEP_S:
        problem = "holds a training step whose operators took no time"
        raise FileFormatError(recording.path, f"{problem}; expected kernels with the id of the operator behind them")
    shortest = min(step.step_s for step in steps)
    if shortest < _SHORTEST_STEP_S:
        raise FileFormatError(recording.path, f"holds a training step of {shortest:g} s; expected a time above 0")
    return steps


def _check_one_gpu(recording: Recording) -> None:
    """Refuse a process that trained on several GPUs: nothing tells which of them an operator is part of."""
    ran = Counter(event.number("device") for event in recording.device_events if event.category == "kernel")
    most = max(ran.values(), default=0)
    used = sum(number > _HARDLY_ANY * most for number in ran.values())
    if used > 1:
        problem = f"holds kernels of {used} GPUs that one process ran, as DataParallel or a pipeline does"
        raise FileFormatError(recording.path, f"{problem}; expected one process a GPU")


def _windows(recording: Recording) -> list[Span]:
    """When the host worked on each step."""
    marks = [event for event in recording.host if event.name.startswith(_STEP_MARK)]
    if marks:
        begins = [mark.begin_s for mark in marks]
        marked = zip(begins, [*begins[1:], marks[-1].end_s], strict=True)
        return _joined(recording, [part for window in marked for part in _parted(recording, window)])
    begin, end = min(event.begin_s for event in recording.host), max(event.end_s for event in recording.host)
    updates = _updates(recording, (begin, math.inf))
    if not updates:
        return [(begin, end)]
    ends = [event.end_s for event in updates]
    return list(zip([begin, *ends[:-1]], ends, strict=True))


def _parted(recording: Recording, window: Span) -> list[Span]:
    """The steps of a window, and the passes behind the last one: programs mark several steps as one.

    They are alike, each up to its own update, or to where a GradScaler left it out. What updates several networks in
    turn (as a generator and its critic) is one step.
    """
    scales = [event for event in within(recording.host, window) if event.name == _SCALE]
    ends = [event.end_s for event in scales or _updates(recording, window)]
    if ends and not _backward(recording, (ends[-1], window[1])):
        ends.pop()
    if not ends:
        return [window]
    parts = list(zip([window[0], *ends], [*ends, window[1]], strict=True))
    passes = [_first_pass(recording, part) for part in parts]
    return parts if passes[0] and all(names == passes[0] for names in passes) else [window]


def _first_pass(recording: Recording, window: Span) -> list[str]:
    """The operators of the first forward pass in the window that has a backward pass; empty where none has."""
    backward = _backward(recording, window)
    calls, _ = _passes(_calls(recording, window, backward), backward)[0]
    return [call.event.name for call in calls]


def _joined(recording: Recording, windows: Sequence[Span]) -> list[Span]:
    """The windows with those of a step put together whose gradients add up: programs mark each of its passes, too.

    A step ends with its update, or where a GradScaler left it out; a window without a backward pass (validation)
    belongs to none.
    """
    found: list[Span] = []
    begun: list[Span] = []
    for window in windows:
        if _updates(recording, window) or any(e.name == _SCALE for e in within(recording.host, window)):
            found.append((begun[0][0] if begun else window[0], window[1]))
            begun = []
        elif _backward(recording, window):
            begun.append(window)
        else:
            found += [*begun, window]
            begun = []
    return [*found, *begun]


def _on_device(recording: Recording, windows: Sequence[Span], found: Mapping[Span, Step]) -> list[Step]:
    """The steps as the GPU saw them: each lasts from its first kernel to that of the next window.

    The host runs ahead, so that its marks do not tell how long the GPU takes.
    """
    busy = union(event.span for event in recording.device_events)
    following: float | None = None
    steps: list[Step] = []
    for window in reversed(windows):
        launched = [kernel for event in within(recording.host, window) for kernel in event.kernels]
        if window in found:
            launched = launched or list(_launched(recording, window))
            begin = min(event.begin_s for event in launched)
            end = max(event.end_s for event in launched) if following is None else following
            idle = 1 - _covered_s(busy, (begin, end)) / (end - begin) if end > begin else None
            steps.append(msgspec.structs.replace(found[window], step_s=end - begin, device_idle=idle))
        if launched:
            following = min(event.begin_s for event in launched)
    return steps[::-1]


def _covered_s(spans: Sequence[Span], window: Span) -> float:
    """Seconds of the window in which one of the spans lies, which are in order and do not touch each other."""
    first = max(bisect.bisect_right(spans, window[0], key=lambda span: span[0]) - 1, 0)
    last = bisect.bisect_left(spans, window[1], lo=first, key=lambda span: span[0])
    return length(clip(spans[first:last], window))


def _is_inside(event: Event, prefix: str) -> bool:
    around: Event | None = event
    while around is not None:
        if around.name.startswith(prefix):
            return True
        around = around.parent
    return False


def _backward(recording: Recording, window: Span) -> list[Event]:
    """Autograd's nodes, each with all that runs inside it."""
    nodes = [event for event in within(recording.host, window) if event.name.startswith(_BACKWARD)]
    return [node for node in nodes if node.parent is None or not _is_inside(node.parent, _BACKWARD)]


def _updates(recording: Recording, window: Span) -> list[Event]:
    """The optimizers' updates, each with all that runs inside it."""
    marks = [event for event in within(recording.host, window) if event.name.startswith(UPDATE_MARK)]
    return [mark for mark in marks if mark.parent is None or not _is_inside(mark.parent, UPDATE_MARK)]


def _launched(recording: Recording, window: Span) -> Sequence[Event]:
    """What the host launched on the device within the window; all that ran there if nothing says who launched it."""
    events = itertools.chain(within(recording.host, window), within(recording.calls, window))
    mine = [kernel for event in events for kernel in event.kernels]
    return mine or within(recording.device_events, window) or recording.device_events


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
    for event in within(recording.host, window):
        number = event.number(_SEQUENCE)
        is_forward = event.category == "cpu_op" and not _is_inside(event, _BACKWARD)
        if number is not None and is_forward:
            creators[number] = event  # the last one with that number makes the node
    found: dict[int, Call] = {}
    for node in backward:
        creator = creators.get(node.number(_SEQUENCE))
        if creator is None or _ACCUMULATE in node.name:
            continue
        event = _outermost(creator)
        call = found.setdefault(id(event), Call(event=event, backward=[], forward_s=0.0, backward_s=0.0))
        call.backward.append(node)
    for call in found.values():
        call.forward_s = _busy_s(recording, [call.event])
        again = [event for node in call.backward for event in _recomputed(node)]
        call.backward_s = max(_busy_s(recording, call.backward) - _busy_s(recording, again), 0.0)
    return sorted(found.values(), key=lambda call: call.event.begin_s)


def _recomputed(node: Event) -> list[Event]:
    """What a node of the backward pass runs of the forward pass once more, since a checkpoint kept no activations.

    Such operators have numbers of their own. So have those of a backward pass that is to be differentiated itself, but
    no convolution, linear layer or norm is among those.
    """
    found: list[Event] = []
    waiting = list(node.children)
    while waiting:
        event = waiting.pop()
        if event.name.startswith(_BACKWARD):
            continue  # of a backward pass inside this one, as a checkpoint of the older kind runs it
        if event.number(_SEQUENCE) in (None, node.number(_SEQUENCE)):
            waiting += event.children
        else:
            found.append(event)
    again = any(KIND_OF_OP.get(operators.operator_name(event)) in _FORWARD_ONLY for event in found)
    return found if again else []


def _busy_s(recording: Recording, events: Iterable[Event]) -> float:
    if not recording.on_gpu:
        return sum(event.seconds for event in events)
    kernels = (kernel for event in events for kernel in event.all_kernels())
    return sum(kernel.seconds for kernel in kernels if not kernel.is_collective)


def _passes(calls: Sequence[Call], backward: Sequence[Event]) -> list[tuple[list[Call], list[Event]]]:
    """The step's calls and backward nodes, pass by pass: gradients of several passes may add up in one step.

    Passes of different networks (as of a generator and its critic) are one.
    """
    found: list[tuple[list[Call], list[Event]]] = [([], [])]
    nodes = sorted(backward, key=lambda node: node.begin_s)
    taken = 0
    for call in calls:
        while taken < len(nodes) and nodes[taken].begin_s < call.event.begin_s:
            found[-1][1].append(nodes[taken])
            taken += 1
        if found[-1][1]:
            found.append(([], []))
        found[-1][0].append(call)
    found[-1][1].extend(nodes[taken:])
    first = [call.event.name for call in found[0][0]]
    alike = all([call.event.name for call in own] == first for own, _ in found)
    return found if alike else [(list(calls), nodes)]


def _step(recording: Recording, window: Span) -> Step:
    backward = _backward(recording, window)
    calls = _calls(recording, window, backward)
    passes = _passes(calls, backward)
    host = within(recording.host, window)
    updates = _updates(recording, window)
    gradients = [event for event in host if event.name == _ACCUMULATE]
    sizes = [operators.number_of_elements(event) for event in gradients]
    of_one = len(gradients) // len(passes)
    on_device = _launched(recording, window) if recording.on_gpu else []
    work = on_device if recording.on_gpu else host
    collectives = union(event.span for event in work if event.is_collective)
    if recording.on_gpu:
        computing = union(e.span for e in on_device if not e.is_collective and not e.name.startswith(_TRANSFER))
        phases = [_device_phases(*own) for own in passes]
        kernels = [_kernel_span(_after_closure(update, backward)[1]) for update in updates]
        updating = [span for span in kernels if span is not None]
    else:
        computing = union(event.span for event in host if _computes(event))
        phases = [_host_phases(*own) for own in passes]
        updating = [(_after_closure(update, backward)[0], update.end_s) for update in updates] if calls else []

    def own_s(spans: Iterable[Span], others: Sequence[Span] = ()) -> float:
        hidden = union([*computing, *others])
        return sum(
            max(s[1] - s[0] - length(clip(others, s)) - outside(clip(collectives, s), hidden), 0.0) for s in spans
        )

    step_s = window[1] - window[0]
    return Step(
        step_s=step_s,
        forward_s=own_s((forward for forward, _ in phases), updating),
        backward_s=own_s((back for _, back in phases), updating),
        optimizer_s=own_s(updating) if updating else None,
        communication_s=length(collectives),
        exposed_s=outside(collectives, computing),
        host_idle=1 - _host_s(recording, window, host) / step_s if step_s else 0.0,
        device_idle=None,
        calls=calls,
        passes=len(passes),
        recomputed_s=_busy_s(recording, [event for node in backward for event in _recomputed(node)]),
        summed_s=_busy_s(recording, gradients[of_one:]) if len(passes) > 1 else 0.0,
        parameters=sizes[:of_one],
    )


def _after_closure(update: Event, backward: Sequence[Event]) -> tuple[float, list[Event]]:
    """When the update itself begins, and the events that it is.

    A loop that gives the optimizer a closure (Lightning's own) runs forward and backward inside its mark.
    """
    inside = [node.end_s for node in backward if update.begin_s <= node.begin_s < update.end_s]
    if not inside:
        return update.begin_s, [update]
    turn = max(inside)
    return turn, [event for event in update.walk() if event.begin_s >= turn]


def _host_s(recording: Recording, window: Span, host: Sequence[Event]) -> float:
    """Seconds for which the host ran an operator or a call of the CUDA runtime other than waiting."""
    busy = [event.span for event in host if event.category == "cpu_op" and not event.is_collective]
    busy += [call.span for call in within(recording.calls, window) if not _WAITS.match(call.name)]
    waits = [call.span for call in within(recording.calls, window) if _WAITS.match(call.name)]
    return length(clip(busy, window)) - (length(waits) - outside(waits, busy) if waits else 0.0)


def _computes(event: Event) -> bool:
    """Whether the host works in it, so that communication beside it is hidden; the waiting for one is no work."""
    return event.category == "cpu_op" and not event.is_collective and event.name.startswith(("aten::", _BACKWARD))


def _host_phases(calls: Sequence[Call], backward: Sequence[Event]) -> tuple[Span, Span]:
    """Forward and backward of one pass on a CPU."""
    if not calls:
        return (0.0, 0.0), (0.0, 0.0)
    turn = min(node.begin_s for node in backward)
    return (calls[0].event.begin_s, turn), (turn, max(node.end_s for node in backward))


def _device_phases(calls: Sequence[Call], backward: Sequence[Event]) -> tuple[Span, Span]:
    """The same on a GPU: from a phase's first kernel to its last."""
    forward, back = _kernel_span(call.event for call in calls), _kernel_span(backward)
    if forward is None or back is None:
        return (0.0, 0.0), (0.0, 0.0)
    return forward, (forward[1], back[1])


def _kernel_span(events: Iterable[Event]) -> Span | None:
    """From the first to the last kernel that the events launched, without collectives; None without kernels."""
    kernels = [kernel for event in events for kernel in event.all_kernels() if not kernel.is_collective]
    return (min(k.begin_s for k in kernels), max(k.end_s for k in kernels)) if kernels else None
