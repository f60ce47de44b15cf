"""Table 1: accuracy, training FLOPs, training time and inference FLOPs of PruneTrain, relative to dense.

Time is measured, without validation; the paper leaves reconfiguration out, so it has a column with and one without.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import _common
import pandas as pd

import ptsim
from ptsim.report.pairs import compare_runs

METRICS = {
    "validation accuracy change vs dense": "paper_accuracy_change_points",
    "training FLOPs relative to dense": "paper_training_flops_fraction",
    "training time relative to dense": "paper_time_fraction",
    "inference FLOPs of final model relative to dense": "paper_inference_flops_fraction",
}


def table(traces: Sequence[ptsim.Trace]) -> pd.DataFrame:
    """One row per pruned run, the paper's numbers for that data set and network beside it where it has them."""
    rows = []
    for comparison in compare_runs(traces):
        dense, pruned = comparison.baseline, comparison.pruned
        dense_s, pruned_s = (sum(e.time.wall_s for e in t.epochs) for t in (dense, pruned))
        paid_s = sum(r.duration_s for r in pruned.reconfigurations)
        last, first = pruned.network_of(pruned.epochs[-1]), dense.network_of(dense.epochs[0])
        change = pruned.epochs[-1].validation_accuracy - dense.epochs[-1].validation_accuracy
        names = _common.setting(pruned, comparison.label)
        rows.append(
            {
                **names,
                "baseline": comparison.baseline_label,
                "epochs": len(pruned.epochs),
                "accuracy_change_points": 100 * change if comparison.trained else None,
                "training_flops_fraction": sum(_common.epoch_flops(pruned, e) for e in pruned.epochs)
                / sum(_common.epoch_flops(dense, e) for e in dense.epochs),
                "time_fraction": pruned_s / dense_s,
                "time_with_reconfiguration_fraction": (pruned_s + paid_s) / dense_s,
                "inference_flops_fraction": last.forward_macs / first.forward_macs,
                **paper_row(str(names["dataset"]), str(names["model"]), names["penalty_ratio"]),
            }
        )
    return pd.DataFrame(rows)


def paper_row(dataset: str, model: str, ratio: object) -> dict[str, float]:
    """The paper's four numbers; for ImageNet those of the nearest penalty ratio, on its 1080 Ti."""
    rows = _common.paper("Table 1", dataset=dataset, model=model)
    rows = rows[~rows.setting.str.contains("fine-tuning") & ~rows.hardware.fillna("").str.contains("V100")]
    strength = rows.setting.str.extract(r"penalty ratio ([\d.]+)", expand=False).astype(float)
    if strength.notna().any():
        wanted = float(ratio) if isinstance(ratio, int | float) else 0.25
        rows = rows[(strength - wanted).abs() == (strength - wanted).abs().min()]
    return {column: float(value) for metric, column in METRICS.items() for value in rows[rows.metric == metric].value}


if __name__ == "__main__":
    sys.exit(_common.main(__file__, str(__doc__), table, needs="a run with a penalty ratio above 0"))
