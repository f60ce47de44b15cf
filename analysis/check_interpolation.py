"""How well does the profiled tier interpolate convolutions that were never measured, on real GPUs?

    python analysis/check_interpolation.py layer_timing_random_conv.csv.gz

The file has random convolutions that were timed on six GPUs (github.com/CDECatapult/ml-performance-prediction,
TensorFlow 1.10): image size, channels, kernel, stride and mini-batch were all drawn at random. Some are given to the
interpolator, and it predicts the others. This is harder than a pruned network, whose shapes are close to measured
ones. The file also varies bias, padding and activation, which the interpolator is not told.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from ptsim.costs.interpolation import Interpolator
from ptsim.hardware.profile import Operator, OperatorSetting, OperatorTime
from ptsim.network import LayerKind, Precision

FP32 = OperatorSetting(precision=Precision.FP32, memory_format="contiguous")
FLOOR_MS = 0.6  # below, the file times its framework's 0.1 to 0.3 ms per call


def interpolation_errors(rows: pd.DataFrame, *, num_measured: int, num_predicted: int, seed: int = 0) -> pd.DataFrame:
    """One row per GPU: `median_error`, `p90_error` (fractions) and the `coverage` of the 90 % intervals."""
    rows = rows[rows["optimizer"].eq("none (forward only)") & rows["time_ms_median"].gt(FLOOR_MS)]
    results = []
    for gpu, of_gpu in rows.groupby("gpu_model"):
        drawn = of_gpu.sample(frac=1, random_state=seed)
        times = [
            OperatorTime(operator=convolution_of(row, FP32), forward_s=row["time_ms_median"] / 1e3, backward_s=None)
            for row in drawn.head(num_measured + num_predicted).to_dict("records")
        ]
        known = Interpolator(times[:num_measured], FP32)
        errors, inside = [], []
        for time in times[num_measured:]:
            estimate = known.estimate(time.operator, "forward")
            assert estimate is not None, "there are convolutions among the measured ones"
            error = np.log(estimate.seconds / time.forward_s)
            errors.append(abs(np.expm1(error)))
            inside.append(abs(error) <= 1.645 * estimate.log_error)
        results.append(
            {
                "gpu": gpu,
                "measured": num_measured,
                "predicted": len(errors),
                "median_error": float(np.median(errors)),
                "p90_error": float(np.quantile(errors, 0.9)),
                "coverage": float(np.mean(inside)),
            }
        )
    return pd.DataFrame(results)


def convolution_of(row: dict[str, float], setting: OperatorSetting) -> Operator:
    """The convolution of a row of published timings; the interpolator is told neither padding nor bias."""
    source, target, kernel, stride = (int(row[name]) for name in ("in_hw", "out_hw", "k", "stride"))
    return Operator(
        kind=LayerKind.CONV,
        op="conv2d",
        setting=setting,
        batch=int(row["batch"]),
        inputs=((int(row["in_c"]), source, source),),
        output=(int(row["out_c"]), target, target),
        kernel=(kernel, kernel),
        stride=(stride, stride),
    )


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--measured", type=int, default=300, help="convolutions that are given, per GPU")
    parser.add_argument("--predicted", type=int, default=300, help="convolutions that are predicted, per GPU")
    options = parser.parse_args(arguments)
    table = interpolation_errors(
        pd.read_csv(options.file), num_measured=options.measured, num_predicted=options.predicted
    )
    print(table.to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
