"""How sure is a saving? The interval of a ratio of two times on the same device, software and host.

From a data sheet, dense and pruned share most of their error: a device that is slower than predicted is slower for
both. What is left grows with how different the two are: a share of the ratio's logarithm, and at least what two
measurements of the same step differ by. On a calibrated device the times of layers that lie between measured ones are
off by as much whatever the ratio, and dense and pruned share almost nothing of that. There the intervals of the two
times, as if independent, bound that of their ratio: a step that was measured has a narrow one. Shares and floors are
measured on published times (`analysis/fit_saving.py`, which writes `saving.toml`).
"""

from __future__ import annotations

import functools
import math

import msgspec

from ptsim.costs.shipped import shipped
from ptsim.costs.tiers import Tier
from ptsim.costs.times import Z90


class SavingError(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Half-width of the 90 % interval of a ratio's logarithm: at least `floor`, and `share` of the logarithm itself."""

    share: float
    floor: float
    source: str

    def half_width(self, ratio: float) -> float:
        """Of the logarithm of `ratio`."""
        return math.hypot(self.floor, self.share * math.log(ratio))


@functools.cache
def saving_errors() -> dict[str, SavingError]:
    """The measured error of a ratio, per tier."""
    return {str(tier): error for tier, error in shipped("saving.toml", dict[Tier, SavingError]).items()}


CALIBRATED = (Tier.MEASURED, Tier.PROFILED)


def saving_interval(
    ratio: float, tier: str, *, draws: float = 0.0, independent: float = math.inf
) -> tuple[float, float]:
    """The 90 % interval of a time ratio, pruned over dense, on the same device, software and host.

    Args:
        ratio: predicted time of the pruned run over that of the dense one.
        tier: the worst tier of the two; one of another package is taken for no better than the data sheet.
        draws: standard deviation of the ratio's logarithm among planned trajectories that agree with what was given.
        independent: half-width that the ratio's logarithm would have if the errors of the two times were independent,
            draws included; the interval is no wider on a calibrated device, and never narrower than two equal runs'.

    Raises:
        ValueError: the ratio is not a positive number.
    """
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"the ratio of two times is {ratio}, expected a positive number")
    errors = saving_errors()
    error = errors.get(tier, errors[Tier.DATASHEET])
    half = math.hypot(error.half_width(ratio), Z90 * draws)
    if tier in CALIBRATED:
        half = min(half, max(independent, errors[Tier.DATASHEET].floor))
    return ratio * math.exp(-half), ratio * math.exp(half)
