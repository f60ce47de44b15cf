"""How work proceeds whose speed changes while it is under way.

A compute stream slows down while a collective runs, a collective slows down while the GPU computes or other jobs use
the links. `WorkClock` measures progress in seconds of undisturbed work; changing its rate moves one timer, however
many actors wait, so that thousands of GPUs cost no more than their own events.
"""

from __future__ import annotations

import heapq
import itertools

import simpy

WorkDone = simpy.Event


class WorkClock:
    """A clock that runs at `rate` seconds of work per simulated second."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._rate = 1.0
        self._progress = 0.0
        self._since = env.now
        self._waiting: list[tuple[float, int, WorkDone]] = []
        self._order = itertools.count()  # first come, first served among equal targets
        self._timer: simpy.Event | None = None

    def after(self, work_s: float) -> WorkDone:
        """An event that happens when `work_s` more seconds of work are done.

        Raises:
            ValueError: negative work.
        """
        if work_s < 0:
            raise ValueError(f"work of {work_s} s; it must not be negative")
        self._advance()
        target = self._progress + work_s
        event = self._env.event()
        heapq.heappush(self._waiting, (target, next(self._order), event))
        if self._waiting[0][2] is event:
            self._set_timer()
        return event

    def set_rate(self, rate: float) -> None:
        """Go on at another speed.

        Raises:
            ValueError: the rate is not positive.
        """
        if rate <= 0:
            raise ValueError(f"rate {rate}; it must be positive")
        if rate != self._rate:
            self._advance()
            self._rate = rate
            self._set_timer()

    def _advance(self) -> None:
        now = self._env.now
        self._progress += (now - self._since) * self._rate
        self._since = now

    def _set_timer(self) -> None:
        if not self._waiting:
            self._timer = None
            return
        self._timer = self._env.timeout(max(0.0, self._waiting[0][0] - self._progress) / self._rate)
        self._timer.callbacks.append(self._fire)

    def _fire(self, timer: simpy.Event) -> None:
        if timer is not self._timer:
            return  # the rate has changed since
        self._since = self._env.now
        self._progress = target = self._waiting[0][0]  # exactly: rounding must not leave a crumb of work
        while self._waiting and self._waiting[0][0] <= target:
            heapq.heappop(self._waiting)[2].succeed()
        self._set_timer()
