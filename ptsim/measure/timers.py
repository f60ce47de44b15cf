"""Where does the time of a training step go? One object owns the clock of a training epoch.

On a CUDA device every phase is closed by an event in the stream; nothing waits for the GPU before the epoch ends, so
the clock costs a microsecond and no overlap. A phase then is the time that the *GPU* spent between the two events:
"data" is what the GPU waited for the next mini-batch, not what the loader took. On a CPU it is wall time.

    timer = StepTimer(device)
    for images in loader:              # timer.data(loader) yields the same and times it
        with timer.phase("forward"):
            ...
        timer.end_step()
    time, steps = timer.finish()
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Literal, TypeVar

import torch

from ptsim.trace.schema import EpochTime, StepDistribution

Phase = Literal["data", "forward", "backward", "regularizer", "optimizer", "communication", "validation"]
PHASES: tuple[Phase, ...] = ("data", "forward", "backward", "regularizer", "optimizer", "communication", "validation")

_T = TypeVar("_T")


class StepTimer:
    """The clock of one epoch; a new epoch gets a new timer. The clock starts when it is made.

    Attributes:
        last_step_s: when the device had done the last iteration, by `time.perf_counter`; None before `finish`.
        judged: from when to when validation ran between two steps, by the same clock; empty before `finish`.
    """

    last_step_s: float | None = None
    judged: tuple[tuple[float, float], ...] = ()

    def __init__(self, device: torch.device | str) -> None:
        """Waits for what the device still has to do, so that it is not counted here."""
        self._clock: _HostClock | _CudaClock = (
            _CudaClock(torch.device(device)) if torch.device(device).type == "cuda" else _HostClock()
        )
        self._phases: dict[Phase, list[tuple[int, int]]] = {phase: [] for phase in PHASES}
        self._step_ends: list[int] = []
        self._started_s = time.perf_counter()
        self._start = self._clock.mark()

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Everything inside belongs to the phase `name`; phases do not nest."""
        begin = self._clock.mark()
        yield
        self.add(name, begin, self._clock.mark())

    def mark(self) -> int:
        """This instant, to be given to `add` later."""
        return self._clock.mark()

    def add(self, name: Phase, begin: int, end: int) -> None:
        """The time between two marks belongs to the phase `name`."""
        self._phases[name].append((begin, end))

    def data(self, batches: Iterable[_T]) -> Iterator[_T]:
        """The batches, with the wait for each timed as "data"."""
        iterator = iter(batches)
        while True:
            with self.phase("data"):
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch

    def end_step(self) -> None:
        """One iteration is complete."""
        self._step_ends.append(self._clock.mark())

    @property
    def num_steps(self) -> int:
        """Iterations ended so far."""
        return len(self._step_ends)

    def finish(self, *, validation_s: float = 0.0, at_last_step: bool = False) -> tuple[EpochTime, StepDistribution]:
        """Wait for the device and give the epoch's parts and the spread of its iterations.

        The wall time ends here, or with `at_last_step` where the last step ended: what came after it is no part of the
        epoch's parts, either. Validation between two steps is part neither of the wall time nor of a step.

        Raises:
            ValueError: no step has ended.
        """
        if not self._step_ends:
            raise ValueError("an epoch without a single step has no step time")
        instants = self._clock.resolve()
        wall_s = time.perf_counter() - self._started_s
        ends = self._step_ends[-1] if at_last_step else len(instants)
        seconds = {
            phase: sum(instants[end] - instants[begin] for begin, end in spans if end <= ends)
            for phase, spans in self._phases.items()
        }
        boundaries = [instants[mark] for mark in (self._start, *self._step_ends)]
        self.last_step_s = self._started_s + (boundaries[-1] - boundaries[0])
        if at_last_step:
            wall_s = boundaries[-1] - boundaries[0]
        judged = [(instants[begin], instants[end]) for begin, end in self._phases["validation"]]
        origin_s = self._started_s - boundaries[0]
        self.judged = tuple((origin_s + begin, origin_s + end) for begin, end in judged)
        durations = [
            after - before - sum(end - begin for begin, end in judged if before < end <= after)
            for before, after in itertools.pairwise(boundaries)
        ]
        judged_s = sum(end - begin for begin, end in judged if end <= boundaries[-1] or not at_last_step)
        parts = EpochTime(
            wall_s=wall_s - judged_s,
            data_wait_s=seconds["data"],
            forward_s=seconds["forward"],
            backward_s=seconds["backward"],
            regularizer_s=seconds["regularizer"],
            optimizer_s=seconds["optimizer"],
            exposed_communication_s=seconds["communication"],
            validation_s=validation_s + seconds["validation"],
        )
        return parts, step_distribution(durations)


def step_distribution(durations_s: list[float]) -> StepDistribution:
    """Median, 10th and 90th percentile (linear interpolation) and standard deviation of iterations' seconds.

    Raises:
        ValueError: the list is empty.
    """
    if not durations_s:
        raise ValueError("no durations")
    ordered = sorted(durations_s)
    return StepDistribution(
        median_s=_quantile(ordered, 0.5),
        p10_s=_quantile(ordered, 0.1),
        p90_s=_quantile(ordered, 0.9),
        std_s=statistics.pstdev(ordered),
    )


def _quantile(ordered: list[float], fraction: float) -> float:
    place = fraction * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


class _HostClock:
    """Instants of the host's clock."""

    def __init__(self) -> None:
        self._instants: list[float] = []

    def mark(self) -> int:
        self._instants.append(time.perf_counter())
        return len(self._instants) - 1

    def resolve(self) -> list[float]:
        return self._instants


class _CudaClock:
    """Events in the device's current stream; seconds since the origin are known once the stream has passed them.

    An event costs about a microsecond. After `_BLOCK` of them the older half, long past, is turned into numbers and
    its events are used again, so an epoch of any length needs a bounded number.
    """

    _BLOCK = 8192

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._instants: list[float] = []  # resolved, seconds since the origin
        self._pending: list[torch.cuda.Event] = []
        self._free: list[torch.cuda.Event] = []
        torch.cuda.synchronize(device)
        self._last = cuda_event()
        self._last.record(torch.cuda.current_stream(device))

    def mark(self) -> int:
        event = self._free.pop() if self._free else cuda_event()
        event.record(torch.cuda.current_stream(self._device))
        self._pending.append(event)
        if len(self._pending) >= self._BLOCK:
            self._resolve(self._BLOCK // 2)
        return len(self._instants) + len(self._pending) - 1

    def resolve(self) -> list[float]:
        torch.cuda.synchronize(self._device)
        self._resolve(len(self._pending))
        return self._instants

    def _resolve(self, count: int) -> None:
        done, self._pending = self._pending[:count], self._pending[count:]
        if done:
            done[-1].synchronize()
        for event in done:
            # From event to event, because CUDA counts in single-precision milliseconds: 0.06 ms off after ten minutes.
            step_s = self._last.elapsed_time(event) / 1e3
            self._instants.append(step_s + (self._instants[-1] if self._instants else 0.0))
            self._free.append(self._last)
            self._last = event


def cuda_event() -> torch.cuda.Event:
    """An event that knows when the stream passed it."""
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # torch's gap
    return event
