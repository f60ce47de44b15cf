"""Table 1: accuracy, training FLOPs, training time and inference FLOPs of PruneTrain, relative to dense.

One row per setting: the mean of its runs (`num_runs`), with the lowest and highest change of accuracy. Time is
measured without validation. The paper leaves reconfigurations out, so there is one column with them and one without.
`own_pace` compares a run with its own unpruned epochs, so that a change of the machine's speed between the dense and
the pruned run does not matter. `pace` is the time of the same unpruned network in the pruned run, relative to the
dense run; at 1 the two runs' times compare. `paper_of` names the network of the paper that the paper's numbers
belong to: the nearest one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import _common
import pandas as pd

import ptsim
from ptsim.report.frames import averaged, numeric
from ptsim.trace.pairs import compare_runs, held_dense, pace

METRICS = {
    "validation accuracy change vs dense": "paper_accuracy_change_points",
    "training FLOPs relative to dense": "paper_training_flops_fraction",
    "training time relative to dense": "paper_time_fraction",
    "inference FLOPs of final model relative to dense": "paper_inference_flops_fraction",
}


def table(traces: Sequence[ptsim.Trace]) -> pd.DataFrame:
    """One row per pruned setting, the paper's numbers for that data set and network beside it where it has them."""
    frame = runs(traces)
    return frame if frame.empty else averaged(frame, ["setting"]).drop(columns="run")


def runs(traces: Sequence[ptsim.Trace]) -> pd.DataFrame:
    """One row per pruned run."""
    columns = {names["run"]: names for names, _ in _common.labelled(traces)}
    rows = []
    for comparison in compare_runs(traces):
        dense, pruned = comparison.baseline, comparison.pruned
        dense_s, pruned_s, held_s = (sum(e.time.wall_s for e in t.epochs) for t in (dense, pruned, held_dense(pruned)))
        paid_s = sum(r.duration_s for r in pruned.reconfigurations)
        last, first = pruned.final_network, dense.network_of(dense.epochs[0])
        change = None
        if comparison.trained:
            change = 100 * (pruned.final_accuracy - dense.final_accuracy)
        names = columns[comparison.label]
        rows.append(
            {
                **names,
                "baseline": comparison.baseline_label,
                "epochs": len(pruned.epochs),
                "accuracy_change_points": change,
                "accuracy_change_points_low": change,
                "accuracy_change_points_high": change,
                "training_flops_fraction": sum(_common.epoch_flops(pruned, e) for e in pruned.epochs)
                / sum(_common.epoch_flops(dense, e) for e in dense.epochs),
                "time_fraction": pruned_s / dense_s,
                "time_with_reconfiguration_fraction": (pruned_s + paid_s) / dense_s,
                "own_pace_time_fraction": pruned_s / held_s,
                "pace_fraction": pace(comparison),
                "inference_flops_fraction": last.forward_macs / first.forward_macs,
                **paper_row(names["dataset"], names["model"], names["penalty_ratio"]),
            }
        )
    return numeric(pd.DataFrame(rows))


def paper_row(dataset: str, model: str, ratio: object) -> dict[str, float | str]:
    """The paper's four numbers of the nearest network, for ImageNet of the nearest penalty ratio on its 1080 Ti."""
    rows, of = _common.nearest_paper("Table 1", dataset, model)
    if of is None:
        return {}
    rows = rows[~rows.setting.str.contains("fine-tuning") & ~rows.hardware.fillna("").str.contains("V100")]
    strength = rows.setting.str.extract(r"penalty ratio ([\d.]+)", expand=False).astype(float)
    if strength.notna().any():
        wanted = float(ratio) if isinstance(ratio, int | float) else 0.25
        rows = rows[(strength - wanted).abs() == (strength - wanted).abs().min()]
    numbers = {
        column: float(value) for metric, column in METRICS.items() for value in rows[rows.metric == metric].value
    }
    return numbers | {"paper_of": of}


if __name__ == "__main__":
    sys.exit(_common.main(__file__, str(__doc__), table, needs="a run with a penalty ratio above 0"))
