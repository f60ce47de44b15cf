"""How much of a calibrated device's error do a dense and a pruned network share? For `fit_saving.py`.

Convolutions with odd channel counts, timed on one GPU (`traces/public/odd_channels.csv`), are predicted as the profiled
tier predicts what nobody measured: each fifth of them by interpolation between the other four. A pair is two such
convolutions of one kernel and stride and about as many pixels, one with no more channels on either side. A network is
as many pairs as a ResNet-50 has different convolutions, drawn from one GPU's pairs whose ratios are alike: its time is
their sum, dense or pruned.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
from check_interpolation import convolution_of
from public_rows import PUBLIC

from ptsim.costs.interpolation import Interpolator
from ptsim.costs.times import Z90
from ptsim.hardware.profile import OperatorSetting, OperatorTime
from ptsim.setting import Precision

FOLDS = 5
LAYERS = 23  # different convolutions of a ResNet-50: stem, 4 in the first stage, 6 in each of the other three
NETWORKS = 500  # per GPU and range of ratios
RATIOS = (0.35, 0.5, 0.65, 0.8, 0.95)  # edges of the ranges
_SETTING = OperatorSetting(precision=Precision.FP32, memory_format="channels_last")


def interpolated(timed: pd.DataFrame, folds: int = FOLDS) -> pd.DataFrame:
    """The rows of `odd_channels.csv` with `fold` and the seconds `predicted` without the rows of their own fold.

    `log_error` is the standard deviation that the interpolator itself gives their logarithm.
    """
    parts = []
    for _, rows in timed.groupby("device"):
        operators = [convolution_of(row, _SETTING) for row in rows.to_dict("records")]
        seconds = rows.seconds.to_numpy()
        fold = np.random.default_rng(0).permutation(len(rows)) % folds
        predicted, log_error = np.full((2, len(rows)), math.nan)
        for left_out in range(folds):
            known = [
                OperatorTime(operator=operators[i], forward_s=float(seconds[i]), backward_s=None)
                for i in np.flatnonzero(fold != left_out)
            ]
            between = Interpolator(known, _SETTING)
            for i in np.flatnonzero(fold == left_out):
                estimate = between.estimate(operators[i], "forward")
                if estimate:
                    predicted[i], log_error[i] = estimate.seconds, estimate.log_error
        parts.append(rows.assign(fold=fold, predicted=predicted, log_error=log_error))
    return pd.concat(parts, ignore_index=True)


def layer_pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """Two convolutions each, the slower one as the dense one: times, and the error of the ratio's logarithm."""
    found = []
    rows = rows.assign(pixels=rows.batch * rows.out_hw**2)
    for (device, *_), group in rows.groupby(["device", "k", "stride", "fold"]):
        for one, other in itertools.combinations(group.to_dict("records"), 2):
            fast, slow = sorted((one, other), key=lambda row: row["predicted"])
            fewer = fast["in_c"] <= slow["in_c"] and fast["out_c"] <= slow["out_c"]
            ratio = fast["predicted"] / slow["predicted"]
            if fewer and 0.5 <= fast["pixels"] / slow["pixels"] <= 2 and RATIOS[0] <= ratio <= RATIOS[-1]:
                found.append(
                    {
                        "device": device,
                        "ratio": ratio,
                        **{f"dense_{name}": slow[name] for name in ("seconds", "predicted", "log_error")},
                        **{f"pruned_{name}": fast[name] for name in ("seconds", "predicted", "log_error")},
                    }
                )
    return pd.DataFrame(found)


def shared(pairs: pd.DataFrame) -> float:
    """Correlation of the error of a dense layer's logarithm with that of its pruned one, mean of the GPUs."""
    errors = pd.DataFrame(
        {side: np.log(pairs[f"{side}_seconds"] / pairs[f"{side}_predicted"]) for side in ("dense", "pruned")}
    )
    return float(np.mean([part.dense.corr(part.pruned) for _, part in errors.groupby(pairs.device)]))


def networks(pairs: pd.DataFrame) -> pd.DataFrame:
    """Sums of `LAYERS` pairs: `device`, `range` of the ratio, predicted `ratio`, `error` of its logarithm, absolute."""
    random, found = np.random.default_rng(0), []
    ranges = np.digitize(pairs.ratio, RATIOS[1:-1])
    columns = ["dense_seconds", "dense_predicted", "pruned_seconds", "pruned_predicted"]
    for (device, which), rows in pairs.groupby(["device", ranges]):
        times = rows[columns].to_numpy()
        sums = times[random.integers(len(times), size=(NETWORKS, LAYERS))].sum(axis=1)
        predicted, measured = sums[:, 3] / sums[:, 1], sums[:, 2] / sums[:, 0]
        error = np.abs(np.log(measured / predicted))
        found.append(pd.DataFrame({"device": device, "range": which, "ratio": predicted, "error": error}))
    return pd.concat(found, ignore_index=True)


def if_independent(pairs: pd.DataFrame, layers: int) -> pd.DataFrame:
    """A row per GPU: what would come of sums of `layers` pairs if the interpolator's own errors were independent.

    `coverage` of the 90 % intervals that the ratios would have, and the `mean_error` of the ratios' logarithm.
    """
    random, found = np.random.default_rng(0), []
    columns = [f"{side}_{name}" for side in ("dense", "pruned") for name in ("seconds", "predicted", "log_error")]
    for device, rows in pairs.groupby("device"):
        drawn = rows[columns].to_numpy()[random.integers(len(rows), size=(len(RATIOS) * NETWORKS, layers))]
        ratios, variance = [], 0.0
        for seconds, predicted, log_error in np.split(np.moveaxis(drawn, -1, 0), 2):
            total = predicted.sum(axis=1)
            ratios.append(np.log(seconds.sum(axis=1) / total))
            variance = variance + ((predicted * log_error) ** 2).sum(axis=1) / total**2
        error = ratios[1] - ratios[0]
        inside = np.abs(error) <= Z90 * np.sqrt(variance)
        found.append({"device": device, "coverage": inside.mean(), "mean_error": error.mean()})
    return pd.DataFrame(found)


def constant(table: pd.DataFrame) -> float:
    """The 90 % quantile of the error, whatever the ratio; every GPU and range counts once, with as many networks."""
    return float(table.error.quantile(0.9))


def coverage(table: pd.DataFrame) -> dict[str, float]:
    """Share of a GPU's networks inside the interval that the other GPUs give."""
    return {
        str(device): float((rows.error <= constant(table[table.device != device])).mean())
        for device, rows in table.groupby("device")
    }


def odd_channels() -> pd.DataFrame:
    """The published rows."""
    return pd.read_csv(PUBLIC / "odd_channels.csv")
