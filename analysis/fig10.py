"""Fig. 10: how the reconfiguration interval changes accuracy, cost and time.

PruneTrain's authors find accuracy and compression insensitive to it. What it costs in time is counted here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import _common
import pandas as pd
from matplotlib.figure import Figure

import ptsim
from ptsim.report.figures import style
from ptsim.report.frames import numeric

PAPER_INTERVALS = {
    str(row["dataset"]): float(row["value"])
    for row in _common.paper("Fig. 10", metric="reconfiguration interval used").to_dict(orient="records")
}


def table(traces: Sequence[ptsim.Trace]) -> pd.DataFrame:
    """One row per continuously pruned run with channel union, sorted by interval."""
    rows = []
    for names, trace in _common.labelled(traces):
        interval = trace.run.hyperparameters.get("interval")
        schedule = trace.run.hyperparameters.get("schedule", "continuous")
        mode = trace.run.hyperparameters.get("mode", "union")
        if not names["pruned"] or interval is None or (schedule, mode) != ("continuous", "union"):
            continue
        training_s = sum(epoch.time.wall_s for epoch in trace.epochs)
        paid_s = sum(record.duration_s for record in trace.reconfigurations)
        rows.append(
            {
                **names,
                "interval_epochs": interval,
                "epochs": len(trace.epochs),
                "validation_accuracy": trace.final_accuracy,
                "training_flops_fraction": sum(_common.epoch_flops(trace, e) / e.num_images for e in trace.epochs)
                / (len(trace.epochs) * _common.first_flops(trace) / trace.epochs[0].num_images),
                "inference_flops_fraction": trace.final_network.forward_macs
                / trace.network_of(trace.epochs[0]).forward_macs,
                "paper_interval_epochs": PAPER_INTERVALS.get(names["dataset"].rstrip("0")),
                "num_reconfigurations": len(trace.reconfigurations),
                "reconfiguration_seconds": paid_s,
                "reconfiguration_fraction": paid_s / (training_s + paid_s),
            }
        )
    frame = numeric(pd.DataFrame(rows))
    return frame.sort_values(["model", "penalty_ratio", "interval_epochs"]) if rows else frame


def figure(frame: pd.DataFrame) -> Figure:
    """Accuracy against training FLOPs, a line per penalty ratio; points are labelled with their interval."""
    return _figure(frame)


@style.styled
def _figure(frame: pd.DataFrame) -> Figure:
    fig, (axes,) = style.panels(1, height_in=3.2)
    for number, (ratio, rows) in enumerate(frame.groupby("penalty_ratio", sort=False)):
        points = rows.groupby("interval_epochs", as_index=False).mean(numeric_only=True)
        colour, accuracy = style.COLOURS[1 + number % 6], 100 * rows.validation_accuracy
        axes.plot(100 * rows.training_flops_fraction, accuracy, "o", ms=4, color=colour, alpha=0.5)
        at = 100 * points.training_flops_fraction, 100 * points.validation_accuracy
        axes.plot(*at, color=colour, marker="osD^v"[number % 5], label=f"r={ratio:g}")
        for x, y, interval in zip(*at, points.interval_epochs, strict=True):
            axes.annotate(f"{interval:g}", (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.set(xlabel="training FLOPs (% of dense)", ylabel="validation accuracy (%)")
    axes.margins(0.12)
    style.legend_above(axes)
    n = f"{len(frame)} runs, one per dot; lines join the means, numbers are epochs between reconfigurations"
    return style.finish(fig, frame, n=n, band="no band: single runs")


if __name__ == "__main__":
    sys.exit(_common.main(__file__, str(__doc__), table, figure, needs="a run with a penalty ratio and an interval"))
