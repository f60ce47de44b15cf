"""Fig. 10: what the reconfiguration interval does to accuracy, cost and time.

The paper finds accuracy and compression insensitive to it; what it costs in time is counted here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import _common
import pandas as pd
from matplotlib.figure import Figure

import ptsim
from ptsim.report import figures


def table(traces: Sequence[ptsim.Trace]) -> pd.DataFrame:
    """One row per pruned run, sorted by interval."""
    rows = []
    for label, trace in _common.labelled(traces):
        names = _common.setting(trace, label)
        interval = trace.run.hyperparameters.get("interval")
        if not names["pruned"] or interval is None:
            continue
        training_s = sum(epoch.time.wall_s for epoch in trace.epochs)
        paid_s = sum(record.duration_s for record in trace.reconfigurations)
        rows.append(
            {
                **names,
                "batch_per_gpu": trace.epochs[0].batch_per_gpu,
                "interval_epochs": interval,
                "epochs": len(trace.epochs),
                "validation_accuracy": trace.epochs[-1].validation_accuracy,
                "training_flops_fraction": sum(_common.epoch_flops(trace, e) / e.num_images for e in trace.epochs)
                / (len(trace.epochs) * _common.first_flops(trace) / trace.epochs[0].num_images),
                "inference_flops_fraction": trace.network_of(trace.epochs[-1]).forward_macs
                / trace.network_of(trace.epochs[0]).forward_macs,
                "num_reconfigurations": len(trace.reconfigurations),
                "reconfiguration_seconds": paid_s,
                "reconfiguration_fraction": paid_s / (training_s + paid_s),
            }
        )
    frame = pd.DataFrame(rows)
    return frame.sort_values(["model", "penalty_ratio", "interval_epochs"]) if rows else frame


def figure(frame: pd.DataFrame) -> Figure:
    """Accuracy against training FLOPs, a point per run, labelled with its interval."""
    return _figure(frame)


@figures.styled
def _figure(frame: pd.DataFrame) -> Figure:
    fig, (axes,) = figures.panels(1, height_in=3.2)
    for number, (interval, rows) in enumerate(frame.groupby("interval_epochs")):
        axes.plot(
            100 * rows.training_flops_fraction,
            100 * rows.validation_accuracy,
            linestyle="-" if len(rows) > 1 else "",
            marker="osD^vPX"[number % 7],
            color=figures.COLOURS[(number + 1) % len(figures.COLOURS)],
            label=f"every {interval} epochs",
        )
    axes.set(xlabel="training FLOPs (% of dense)", ylabel="validation accuracy (%)")
    figures.legend_above(axes)
    return figures.finish(fig, frame, n="1 run per point", band="no band: single runs")


if __name__ == "__main__":
    sys.exit(_common.main(__file__, str(__doc__), table, figure, needs="a run with a penalty ratio and an interval"))
