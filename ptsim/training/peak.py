"""How much of a GPU's memory did training take at most, and training alone? What validation takes does not count."""

from __future__ import annotations

import torch


class PeakMemory:
    """The allocator's largest sum in the training passes of an epoch; resets the allocator's own mark."""

    def __init__(self, device: torch.device) -> None:
        """Nothing is counted before `begin`, and nothing on a CPU."""
        self._device = device
        self._bytes: int | None = None
        self._rests = True

    def begin(self) -> None:
        """An epoch begins."""
        self._bytes, self._rests = None, True
        self.go_on()

    def so_far(self) -> int | None:
        """Bytes since `begin`; None on a CPU, and where nothing was trained."""
        if self._rests or self._device.type != "cuda":
            return self._bytes
        return max(self._bytes or 0, torch.cuda.max_memory_allocated(self._device))

    def rest(self) -> None:
        """What comes is no training, until `go_on`."""
        self._bytes = self.so_far()
        self._rests = True

    def go_on(self) -> None:
        """What comes is training."""
        if self._rests and self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._rests = False

    def total(self) -> int | None:
        """As `so_far`; what comes is no training."""
        self.rest()
        return self._bytes
