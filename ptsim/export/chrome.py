"""What happened when, as a Chrome/Kineto trace that Perfetto, chrome://tracing and HolisticTraceAnalysis open.

A process is a GPU (or, for recorded profiles, an architecture on one), a thread is a stream. Times are microseconds
from the start of a step, kept with nanoseconds. Recorded and simulated steps have the same form, so that they can be
laid side by side.

Source: the Trace Event Format (Google, 2016) and the fields that PyTorch's Kineto adds to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from ptsim.errors import UsageError
from ptsim.network import Network
from ptsim.textfile import printable, write_whole
from ptsim.trace.schema import Profile
from ptsim.trace.trace import Trace
from ptsim.units import in_turn

COMPUTE_STREAM, COMMUNICATION_STREAM = 7, 20  # the numbers that PyTorch's own traces usually show
PHASES = 0  # the thread of annotations: steps and phases
LAUNCHES = 1  # the thread of the host; tools that follow a kernel back to its launch drop kernels without one


class Timeline:
    """Collects events; `document` is the whole trace as builtins."""

    def __init__(
        self, *, device_name: str, memory_bytes: int | None = None, world_size: int = 1, rank: int = 0
    ) -> None:
        self._events: list[dict[str, Any]] = []
        self._devices: dict[int, dict[str, Any]] = {}
        self._device = {"name": device_name, **({} if memory_bytes is None else {"totalGlobalMem": memory_bytes})}
        self._world_size = world_size
        self._rank = rank
        self._correlation = 0
        self._flows = 0

    def process(self, pid: int, name: str, streams: Sequence[int] = (COMPUTE_STREAM,)) -> None:
        """Name a process and its streams."""
        self._devices[pid] = {"id": pid, **self._device}
        names = {COMPUTE_STREAM: "compute", COMMUNICATION_STREAM: "communication"}
        self._meta("process_name", pid, 0, name=printable(name))
        self._meta("process_sort_index", pid, 0, sort_index=pid)
        self._meta("thread_name", pid, PHASES, name="phases")
        self._meta("thread_sort_index", pid, PHASES, sort_index=PHASES)
        for stream in streams:
            self._meta("thread_name", pid, stream, name=f"stream {stream}: {names.get(stream, 'other')}")
            self._meta("thread_sort_index", pid, stream, sort_index=stream)

    def launch(self, *, pid: int, time_s: float) -> None:
        """The host's launch of the last kernel; its duration is not modelled."""
        args = {"correlation": self._correlation}
        self._span("cudaLaunchKernel", "cuda_runtime", pid, LAUNCHES, time_s, 0.0, args)

    def annotation(self, name: str, *, pid: int, start_s: float, duration_s: float, **args: Any) -> None:
        """A step or a phase of one."""
        self._span(name, "user_annotation", pid, PHASES, start_s, duration_s, args)

    def kernel(
        self, name: str, *, pid: int, start_s: float, duration_s: float, stream: int = COMPUTE_STREAM, **args: Any
    ) -> None:
        """Work on a stream: an operator or a collective."""
        self._correlation += 1
        args = {"device": pid, "stream": stream, "correlation": self._correlation, **args}
        self._span(name, "kernel", pid, stream, start_s, duration_s, args)

    def flow(self, name: str, *, pid: int, start: tuple[int, float], end: tuple[int, float]) -> None:
        """An arrow from one (stream, time) to another: what waited for what."""
        self._flows += 1
        common = {"cat": "dependency", "name": name, "pid": pid, "id": self._flows}
        self._events.append({"ph": "s", **common, "tid": start[0], "ts": _micros(start[1])})
        self._events.append({"ph": "f", "bp": "e", **common, "tid": end[0], "ts": _micros(end[1])})

    def counter(self, name: str, *, pid: int, time_s: float, **values: float) -> None:
        """The value of something at an instant; it holds until the next one."""
        self._events.append({"ph": "C", "name": name, "pid": pid, "ts": _micros(time_s), "args": values})

    def document(self) -> dict[str, Any]:
        """The trace: what `json.dump` would write."""
        return {
            "schemaVersion": 1,
            "displayTimeUnit": "ms",
            "distributedInfo": {"backend": "nccl", "rank": self._rank, "world_size": self._world_size},
            "deviceProperties": list(self._devices.values()),
            "traceEvents": self._events,
        }

    def write(self, path: Path) -> Path:
        """Write the trace as JSON.

        Raises:
            UsageError: the file cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # with blanks after the colons: HolisticTraceAnalysis looks for the rank by a pattern that wants one
            write_whole(path, msgspec.json.format(msgspec.json.encode(self.document()), indent=0))
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}") from error
        return path

    def _span(
        self, name: str, category: str, pid: int, tid: int, start_s: float, duration_s: float, args: dict[str, Any]
    ) -> None:
        # both ends are rounded, not the duration: what follows without a gap must not begin before
        begin, end = round(start_s * 1e9), round((start_s + duration_s) * 1e9)
        event = {"ph": "X", "cat": category, "name": printable(name), "pid": pid, "tid": tid}
        self._events.append({**event, "ts": begin / 1e3, "dur": (end - begin) / 1e3, "args": args})

    def _meta(self, what: str, pid: int, tid: int, **args: Any) -> None:
        self._events.append({"ph": "M", "name": what, "pid": pid, "tid": tid, "ts": 0.0, "args": args})


def profile_timeline(trace: Trace) -> Timeline:
    """The recorded per-layer profiles, a process each: forward, backward, regularizer, optimizer.

    Layers follow each other without gaps. The annotation "step" is the whole step as measured without per-layer
    timers; that it is shorter or longer than its layers is what the timers cost, or what happens between them. The
    counter is an estimate: what the operators keep for backward.

    Raises:
        UsageError: the trace has no profile.
    """
    trace.require_measured("put on a time line")
    if not trace.profiles:
        raise UsageError(
            f"{trace.path} holds no per-layer profile, so there is no timeline to export",
            hint="train with profiles (in a loop of your own: profile=True)",
        )
    timeline = Timeline(
        device_name=trace.run.device.name,
        memory_bytes=trace.run.device.memory_bytes,
        world_size=max(trace.world_sizes),
    )
    for pid, profile in enumerate(trace.profiles):
        of = profile.architecture, profile.batch
        epochs = [e for e in trace.epochs if (e.architecture, trace.setting_of(e).pass_batch) == of]
        span = f"epochs {epochs[0].epoch} to {epochs[-1].epoch}" if epochs else "not trained"
        if epochs and len(trace.world_sizes) > 1:
            span += f", ranks: {in_turn(epoch.world_size for epoch in epochs)}"
        timeline.process(pid, f"{trace.run.model} {profile.architecture}, mini-batch {profile.batch}, {span}")
        _add_profile(timeline, pid, profile, trace.networks[profile.architecture])
    return timeline


def _add_profile(timeline: Timeline, pid: int, profile: Profile, network: Network) -> None:
    clock = held = 0.0
    timeline.annotation("step", pid=pid, start_s=0.0, duration_s=profile.step_s, num_samples=profile.num_samples)
    timeline.counter("saved for backward", pid=pid, time_s=0.0, bytes=0)
    element_bytes = profile.precision.activation_bytes
    for forward in (True, False):
        for measured in profile.layers if forward else reversed(profile.layers):
            layer = network.layer(measured.layer)
            seconds = measured.forward_s if forward else measured.backward_s
            if seconds is None:
                continue
            timeline.kernel(
                f"{layer.name} {'forward' if forward else 'backward'}",
                pid=pid,
                start_s=clock,
                duration_s=seconds,
                op=layer.op,
                kind=str(layer.kind),
                input_shapes=[
                    list(shape) if i in layer.shared_inputs else [profile.batch, *shape]
                    for i, shape in enumerate(layer.input_shapes)
                ],
                output_shape=list(layer.output_shape) if layer.once else [profile.batch, *layer.output_shape],
            )
            clock += seconds
            held += layer.saved_bytes(profile.batch, element_bytes) * (1 if forward else -1)
            timeline.counter("saved for backward", pid=pid, time_s=clock, bytes=held)
    for name, seconds in (("regularizer", profile.regularizer_s), ("optimizer", profile.optimizer_s)):
        if seconds > 0:
            timeline.kernel(name, pid=pid, start_s=clock, duration_s=seconds)
            clock += seconds


def _micros(seconds: float) -> float:
    return round(seconds * 1e6, 3)
