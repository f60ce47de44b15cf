"""How does Ctrl-C reach a training loop? As a wish that the loop grants between two iterations."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_NOTED = "{}: the run ends after this iteration; once more ends it at once\n"


class Interruption:
    """Remembers that the user (SIGINT) or the scheduler (SIGTERM) wants the run to end."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._process = os.getpid()

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # one that loads data: Ctrl-C reaches it, too
            return
        if self.asked is not None:  # asked twice: at once
            raise KeyboardInterrupt(self.asked.name)
        self.asked = signal.Signals(number)
        with contextlib.suppress(OSError):  # not print: the signal may have come in the middle of another one
            os.write(2, _NOTED.format(self.asked.name).encode())


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Inside, the first SIGINT or SIGTERM is only noted; the second interrupts at once.

    Python delivers signals to the main thread only; in another thread nothing is changed.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {number: signal.signal(number, interruption._note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
