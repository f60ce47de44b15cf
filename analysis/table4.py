"""Table 4: how much more time PruneTrain saves with a growing mini-batch, and what that does to accuracy and inference.

Measured, one row per pruned run: "naive" has a fixed mini-batch, "adjusted" a growing one. `paper_of` names the
network of the paper that the paper's numbers belong to: the nearest one, for CIFAR always on CIFAR-100.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import _common
import pandas as pd
import table1

import ptsim


def table(traces: Sequence[ptsim.Trace]) -> pd.DataFrame:
    """One row per pruned run."""
    growth = {n["run"]: (t.epochs[0].batch_per_gpu, t.epochs[-1].batch_per_gpu) for n, t in _common.labelled(traces)}
    dynamic = {n["run"]: bool(t.run.hyperparameters.get("dynamic_batch")) for n, t in _common.labelled(traces)}
    rows = []
    for row in table1.runs(traces).to_dict(orient="records"):
        first, last = growth[row["run"]]
        adjusted = dynamic[row["run"]] or last > first
        published, of = _common.nearest_paper("Table 4", row["dataset"], row["model"])
        published = published[published.setting.str.startswith("Adjusted" if adjusted else "Naive")]
        published = published[~published.hardware.fillna("").str.contains("V100")]

        def value(metric: str, rows: pd.DataFrame = published) -> float | None:
            return next(iter(rows[rows.metric.str.startswith(metric)].value), None)

        rows.append(
            {
                "run": row["run"],
                "dataset": row["dataset"],
                "model": row["model"],
                "device": row["device"],
                "mini_batch": "adjusted" if adjusted else "naive",
                "first_batch_per_gpu": first,
                "last_batch_per_gpu": last,
                "time_saved_fraction": 1 - row["time_fraction"],
                "inference_flops_fraction": row["inference_flops_fraction"],
                "accuracy_change_points": row["accuracy_change_points"],
                "paper_of": of,
                "paper_time_saved_fraction": value("training time reduction"),
                "paper_inference_flops_fraction": value("inference FLOPs"),
                "paper_accuracy_change_points": value("validation accuracy"),
            }
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    sys.exit(_common.main(__file__, str(__doc__), table, needs="a run with a penalty ratio above 0"))
