"""The generators of random numbers that a model's code may draw from: torch's, Python's and NumPy's."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy
import torch


class RandomState(NamedTuple):
    """Of the three generators on the CPU."""

    of_torch: torch.Tensor
    of_python: Any
    of_numpy: Any

    @classmethod
    def now(cls) -> RandomState:
        """As it is."""
        return cls(torch.get_rng_state(), random.getstate(), numpy.random.get_state())

    def is_now(self) -> bool:
        """True if nothing has been drawn since."""
        now = RandomState.now()
        of_numpy = zip(self.of_numpy, now.of_numpy, strict=True)
        return (
            torch.equal(self.of_torch, now.of_torch)
            and self.of_python == now.of_python
            and all(numpy.array_equal(before, after) for before, after in of_numpy)
        )

    def restore(self) -> None:
        """Let the three go on from it."""
        torch.set_rng_state(self.of_torch)
        random.setstate(self.of_python)
        numpy.random.set_state(self.of_numpy)


def seed_all(seed: int) -> None:
    """Let all three generators of the CPU start from `seed`."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


@contextlib.contextmanager
def random_state_kept(devices: Sequence[torch.device] | None = None) -> Iterator[None]:
    """Afterwards all three go on as if nothing had been drawn inside; torch also on `devices` (None: every GPU)."""
    before = RandomState.now()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            before.restore()
