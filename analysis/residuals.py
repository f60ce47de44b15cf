"""What residuals of rows left out of a fit say of one more GPU, or one more network: a prediction interval.

Rows of one GPU (or network) are alike, and so tell less than as many rows of different ones: by Kish's design effect n
rows of a group count as n / (1 + (n - 1) ρ), where ρ is their intraclass correlation. With ρ = 1 every group counts
once, however many rows it has. Student's t has a degree less than what counts in all, and sqrt(1 + 1/count) is for the
one more. The scale is that of the middle 80 % of the residuals, so that an odd row does not widen every interval.

Source: Kish, Survey Sampling, 1965, section 5.4; Donner and Koval, Biometrics 36 (1980), the estimator by analysis of
variance.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy.stats import norm as normal
from scipy.stats import t as student

from ptsim.hardware.catalog import load_device


def ends(scaled: pd.Series, groups: pd.Series, *, alike: float = 1.0) -> tuple[float, float]:
    """The ends of the 90 % interval of one more row of a group that is not among these, which reaches 0 at least.

    Args:
        scaled: residuals, one a row, in units of what the interval is to be in.
        groups: what each row is of.
        alike: the intraclass correlation of rows of one group, 0..1.
    """
    sizes = groups.map(groups.value_counts())
    order = np.argsort(scaled.to_numpy())
    weight = (1 / (1 + (sizes - 1) * alike)).to_numpy()[order]
    centers = (weight.cumsum() - weight / 2) / weight.sum()
    low, middle, high = np.interp([0.1, 0.5, 0.9], centers, scaled.to_numpy()[order])
    count = float(weight.sum())
    reach = student.ppf(0.95, count - 1) / normal.ppf(0.9) * math.sqrt(1 + 1 / count)
    return min(rounded(middle - reach * (middle - low)), 0.0), max(rounded(middle + reach * (high - middle)), 0.0)


def correlation(values: pd.Series, groups: pd.Series) -> float:
    """The intraclass correlation, 0..1, by analysis of variance: how alike values of one group are.

    1 where the values cannot tell: where every group has one, or there is one group.
    """
    sizes = groups.value_counts()
    count, rows = len(sizes), len(values)
    if count in (1, rows):
        return 1.0
    means = values.groupby(groups).transform("mean")
    within = float(((values - means) ** 2).sum()) / (rows - count)
    between = float(((means - values.mean()) ** 2).sum()) / (count - 1)
    usual = (rows - float((sizes**2).sum()) / rows) / (count - 1)  # size of a group
    spread = between + (usual - 1) * within
    return min(max((between - within) / spread, 0.0), 1.0) if spread > 0 else 1.0


def rounded(value: float) -> float:
    """To three digits, as the files of results have them."""
    return float(f"{value:.3g}")


def chip_name(name: str) -> str:
    """The chip of the board with this name."""
    return load_device(name).chip
