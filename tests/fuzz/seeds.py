"""How many mutants: a few in the ordinary tests, or new ones until the time of `make fuzz` is over."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator

LONG = float(os.environ.get("PTSIM_FUZZ_SECONDS", "0"))
SHARES = 21  # of the time, of all tests together


def seeds(few: int, share: int = 1) -> Iterator[int]:
    """Those of the ordinary tests, or new ones until this test's share of the time is over."""
    if not LONG:
        yield from range(few)
    until = time.monotonic() + LONG * share / SHARES
    while time.monotonic() < until:
        yield random.randrange(10**6, 10**12)
