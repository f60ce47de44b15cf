"""How sure is a saving? The interval of a ratio of two times on the same device, software and host.

Dense and pruned share most of their error: a device that is slower than predicted is slower for both. What is left
grows with how different the two are, so the standard deviation of the ratio's logarithm is a share of that logarithm,
and at least what two measurements of the same step differ by. Both are measured, per tier, on published pairs of
networks of one family on one GPU (`analysis/fit_saving.py`, which writes `saving.toml`).
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import msgspec

from ptsim.costs.tiers import Tier
from ptsim.costs.times import Z90
from ptsim.errors import FileFormatError
from ptsim.textfile import read_toml


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
    """The measured error of a ratio, per tier.

    Raises:
        FileFormatError: the installation's `saving.toml` is damaged.
    """
    path = Path(__file__).with_name("saving.toml")
    try:
        return {**msgspec.convert(read_toml(path), dict[Tier, SavingError])}
    except msgspec.ValidationError as error:
        raise FileFormatError(path, str(error)) from error


def saving_interval(ratio: float, tier: str, *, draws: float = 0.0) -> tuple[float, float]:
    """The 90 % interval of a time ratio, pruned over dense, on the same device, software and host.

    Args:
        ratio: predicted time of the pruned run over that of the dense one.
        tier: the worst tier of the two; one of another package is taken for no better than the data sheet.
        draws: standard deviation of the ratio's logarithm among planned trajectories that agree with what was given.

    Raises:
        ValueError: the ratio is not a positive number.
    """
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"the ratio of two times is {ratio}, expected a positive number")
    errors = saving_errors()
    error = errors.get(tier, errors[Tier.DATASHEET])
    half = math.hypot(error.half_width(ratio), Z90 * draws)
    return ratio * math.exp(-half), ratio * math.exp(half)
