"""What residuals of rows left out of a fit say of one more GPU, or one more network: a prediction interval.

GPUs (or networks) are the sample: each counts once, however many rows it has. Student's t has a degree less than there
are, and sqrt(1 + 1/count) is for the one more. The scale is that of the middle 80 % of the residuals, so that an odd
row does not widen every interval.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy.stats import norm as normal
from scipy.stats import t as student

from ptsim.hardware.catalog import load_device


def ends(scaled: pd.Series, sample: pd.Series, parts: pd.Series | None = None) -> tuple[float, float]:
    """The ends of the 90 % interval of one more of `sample`, which reaches 0 at least.

    Args:
        scaled: residuals, one a row, in units of what the interval is to be in.
        sample: of which GPU, or network, each row is.
        parts: rows that count once together; those of a GPU (or network) if None.
    """
    order = np.argsort(scaled.to_numpy())
    parts = sample if parts is None else parts
    weight = (1 / parts.map(parts.value_counts())).to_numpy()[order]
    centers = (weight.cumsum() - weight / 2) / weight.sum()
    low, middle, high = np.interp([0.1, 0.5, 0.9], centers, scaled.to_numpy()[order])
    count = sample.nunique()
    reach = student.ppf(0.95, count - 1) / normal.ppf(0.9) * math.sqrt(1 + 1 / count)
    return min(rounded(middle - reach * (middle - low)), 0.0), max(rounded(middle + reach * (high - middle)), 0.0)


def rounded(value: float) -> float:
    """To three digits, as the files of results have them."""
    return float(f"{value:.3g}")


def chip_name(name: str) -> str:
    """What boards of the same silicon share."""
    device = load_device(name)
    return f"{device.architecture} {device.num_sms} SMs"
