"""Was the machine quiet while something was measured? What other programs took of it, and whether its speed held.

A time that was measured beside other programs is right for that moment and wrong for every other one. What tells:

* the processor time of everything else on the machine, hypervisor's steal included (Linux, `/proc/stat`);
* the time for which this thread was ready and got no processor: wall time minus its processor time. On a CPU the thread
  that measures is never idle, so all of it is waiting (for a core, or for a container's quota);
* how much longer the same small kernel took at one moment than at another.

    watch = LoadWatch(device)
    with watch.measuring():
        ...
    watch.load()
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from ptsim.hardware.profile import MachineLoad

_STAT = Path("/proc/stat")
_REFERENCE_EVERY_S = 2.0
_FEWEST_REFERENCES = 5
_SHORTEST_S = 1.0  # the kernel counts processor time in hundredths of a second


class LoadWatch:
    """Watches the machine during measurements, and only then; `known` is what earlier sessions saw."""

    def __init__(self, device: torch.device, known: MachineLoad | None = None) -> None:
        self._device = device
        self._known = known
        self._wall_s = self._thread_s = 0.0
        self._others_s: float | None = 0.0
        self._reference = _Reference(device)
        self._references: list[float] = []
        self._next_reference_s = 0.0

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Around one measurement; the reference kernel runs in front of it where the last time is a while ago."""
        if time.perf_counter() >= self._next_reference_s:
            self._references.append(self._reference_s())
            self._next_reference_s = time.perf_counter() + _REFERENCE_EVERY_S
        busy_s, own_s = _busy_s(), time.process_time()
        begin_s, thread_s = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self._wall_s += time.perf_counter() - begin_s
            self._thread_s += time.thread_time() - thread_s
            after_s, own_after_s = _busy_s(), time.process_time()
            if busy_s is None or after_s is None:
                self._others_s = None
            elif self._others_s is not None:
                self._others_s += (after_s - busy_s) - (own_after_s - own_s)

    def load(self) -> MachineLoad | None:
        """What was seen so far, the worse of this session and the earlier ones; None after too short a time."""
        if self._wall_s < _SHORTEST_S:
            return self._known
        others = None if self._others_s is None else max(self._others_s / self._wall_s, 0.0)
        waited = max(1.0 - self._thread_s / self._wall_s, 0.0) if self._device.type == "cpu" else None
        drift = None
        if len(self._references) >= _FEWEST_REFERENCES:
            tenths = statistics.quantiles(self._references, n=10, method="inclusive")
            drift = tenths[-1] / tenths[0]
        cores = os.cpu_count() or 1
        before = self._known or MachineLoad(num_cores=cores)
        return MachineLoad(
            num_cores=cores,
            other_cores=_worse(others, before.other_cores),
            waited=_worse(waited, before.waited),
            drift=_worse(drift, before.drift),
        )

    def _reference_s(self) -> float:
        """The fastest of three: what an interruption adds is not the machine's speed."""
        seconds = []
        for _ in range(3):
            begin_s = time.perf_counter()
            self._reference()
            seconds.append(time.perf_counter() - begin_s)
        return min(seconds)


class _Reference:
    """A matrix product and a copy larger than the caches: a few milliseconds of each."""

    def __init__(self, device: torch.device) -> None:
        side, elements = (4096, 2**25) if device.type == "cuda" else (384, 2**22)
        self._device = device
        self._matrix = torch.ones((side, side), device=device)
        self._source = torch.ones(elements, device=device)
        self._target = torch.empty_like(self._source)
        self()  # allocates

    def __call__(self) -> None:
        torch.mm(self._matrix, self._matrix)
        self._target.copy_(self._source)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _busy_s() -> float | None:
    """Seconds that all processors of this machine were busy or stolen since it started; None where nobody tells."""
    try:
        first = _STAT.read_text(encoding="ascii").split("\n", 1)[0].split()
    except OSError:
        return None
    # proc(5): user nice system idle iowait irq softirq steal guest guest_nice; guests are in user and nice already.
    if len(first) < 9 or first[0] != "cpu":
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, first[1:9])
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") if ticks else None


def _worse(new: float | None, before: float | None) -> float | None:
    values = [value for value in (new, before) if value is not None]
    return max(values) if values else None
