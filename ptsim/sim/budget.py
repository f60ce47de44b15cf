"""How many events a simulation may take: they are counted beforehand, so that nobody waits for hours unasked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ptsim.errors import UsageError

MOST_EVENTS = 1e7  # SimPy does about 200,000 a second
_limit: ContextVar[float] = ContextVar("most events of a simulation", default=MOST_EVENTS)


def check_events(events: float, what: str, hint: str) -> None:
    """Refuse a simulation that would take too long.

    Args:
        events: about how many it takes.
        what: is simulated, as the beginning of the sentence.
        hint: what takes fewer.

    Raises:
        UsageError: more events than the budget allows.
    """
    if not events <= _limit.get():
        raise UsageError(
            f"{what} would take about {events:.2g} events, more than the limit of {_limit.get():.0e}",
            hint=f"--yes of simulate and sweep simulates them all the same; {hint}",
        )


@contextmanager
def unlimited() -> Iterator[None]:
    """Simulations inside may take as long as they like."""
    token = _limit.set(float("inf"))
    try:
        yield
    finally:
        _limit.reset(token)
