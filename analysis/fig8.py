"""Fig. 8: accuracy against inference and training cost, over penalty ratios, with SSL (dense first, then pruned)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import _common
import pandas as pd
from matplotlib.figure import Figure

import ptsim
from ptsim.costs.traffic import batch_norm_bytes
from ptsim.report import figures


def table(traces: Sequence[ptsim.Trace]) -> pd.DataFrame:
    """One row per run: accuracy, inference FLOPs of its last network, training FLOPs and BatchNorm traffic in all."""
    rows = []
    for label, trace in _common.labelled(traces):
        names = _common.setting(trace, label)
        schedule = trace.run.hyperparameters.get("schedule", "continuous")
        method = (
            "dense" if not names["pruned"] else {"ssl": "SSL", "one_time": "one-time"}.get(str(schedule), "PruneTrain")
        )
        element_bytes = trace.run.precision.activation_bytes
        rows.append(
            {
                **names,
                "batch_per_gpu": trace.epochs[0].batch_per_gpu,
                "method": method,
                "epochs": len(trace.epochs),
                "validation_accuracy": trace.epochs[-1].validation_accuracy,
                "inference_flops_per_image": 2.0 * trace.network_of(trace.epochs[-1]).forward_macs,
                "training_flops": sum(_common.epoch_flops(trace, epoch) for epoch in trace.epochs),
                "bn_traffic_bytes": float(
                    sum(batch_norm_bytes(trace.network_of(e), element_bytes) * e.num_images for e in trace.epochs)
                ),
            }
        )
    return pd.DataFrame(rows)


def figure(frame: pd.DataFrame) -> Figure:
    """Accuracy against inference FLOPs and against training FLOPs; dense runs are triangles, as in the paper."""
    return _figure(frame)


@figures.styled
def _figure(frame: pd.DataFrame) -> Figure:
    fig = Figure(figsize=(figures.WIDTH_IN, 5.2), layout="constrained")
    panels = fig.subplots(2, 1)
    markers = {"dense": "^", "PruneTrain": "o", "SSL": "s", "one-time": "D"}
    for axes, column, label, factor in (
        (panels[0], "inference_flops_per_image", "inference (MFLOP per image)", 1e6),
        (panels[1], "training_flops", "whole training (PFLOP)", 1e15),
    ):
        for number, ((model, method), rows) in enumerate(frame.groupby(["model", "method"], sort=False)):
            rows = rows.sort_values(column)
            axes.plot(
                rows[column] / factor,
                100 * rows.validation_accuracy,
                marker=markers.get(method, "o"),
                linestyle="-" if method != "dense" else "",
                color=figures.COLOURS[number % len(figures.COLOURS)],
                label=f"{model}, {method}",
            )
        axes.set(xlabel=label, ylabel="validation accuracy (%)")
    figures.legend_above(panels[0])
    return figures.finish(fig, frame, n="1 run per point", band="no band: single runs")


if __name__ == "__main__":
    sys.exit(_common.main(__file__, str(__doc__), table, figure, needs="a run with an epoch"))
