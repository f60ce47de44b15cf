"""Fig. 8: accuracy against inference and training cost, for several penalty ratios and for SSL (prune after training).

Accuracy is measured, costs are counted. Runs that repeat a setting are drawn as their mean, with bars from lowest to
highest. The PruneTrain paper gives one point as a number: ResNet-50 on CIFAR with 150 MFLOPs per inference, dense
230 (1 FLOP = 1 MAC there).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import _common
import pandas as pd
from matplotlib.figure import Figure

import ptsim
from ptsim.costs.traffic import batch_norm_bytes
from ptsim.report.figures import style
from ptsim.report.frames import averaged, numeric


def table(traces: Sequence[ptsim.Trace]) -> pd.DataFrame:
    """One row per run: accuracy, inference FLOPs of its last network, training FLOPs and BatchNorm traffic in all."""
    rows = []
    for names, trace in _common.labelled(traces):
        settings = trace.run.hyperparameters
        schedule = str(settings.get("schedule", "continuous"))
        method = {"ssl": "SSL", "one_time": "one-time"}.get(schedule, "PruneTrain") if names["pruned"] else "dense"
        if names["pruned"] and settings.get("mode") == "gating":
            method += ", gating"
        element_bytes = trace.run.precision.activation_bytes
        rows.append(
            {
                **names,
                "method": method,
                "epochs": len(trace.epochs),
                "validation_accuracy": trace.final_accuracy,
                "inference_flops_per_image": 2.0 * trace.final_network.forward_macs,
                "paper_best_inference_macs_per_image": _paper_best(names["dataset"], names["model"]),
                "training_flops": sum(_common.epoch_flops(trace, epoch) for epoch in trace.epochs),
                "bn_traffic_bytes": float(
                    sum(batch_norm_bytes(trace.network_of(e), element_bytes) * e.num_images for e in trace.epochs)
                ),
            }
        )
    return numeric(pd.DataFrame(rows))


def _paper_best(dataset: str, model: str) -> float | None:
    """The inference MACs of the paper's most accurate PruneTrain network, where it says them."""
    rows = _common.paper("Fig. 8", model=model, metric="inference cost")
    return 1e6 * float(rows["value"].iloc[0]) if dataset.startswith("CIFAR") and len(rows) else None


def figure(frame: pd.DataFrame) -> Figure:
    """Accuracy against inference FLOPs and against training FLOPs; dense runs are triangles, as in the paper."""
    return _figure(frame)


@style.styled
def _figure(frame: pd.DataFrame) -> Figure:
    fig = Figure(figsize=(style.WIDTH_IN, 5.2), layout="constrained")
    panels = fig.subplots(2, 1)
    spread = frame.assign(accuracy_low=frame.validation_accuracy, accuracy_high=frame.validation_accuracy)
    means = averaged(spread, ["setting", "model", "method"])
    unit_flops, unit = (1e15, "PFLOP") if frame.training_flops.max() >= 1e15 else (1e12, "TFLOP")
    markers = {"dense": "^", "PruneTrain": "o", "SSL": "s", "one-time": "D"}
    for axes, column, label, factor in (
        (panels[0], "inference_flops_per_image", "inference (MFLOP per image)", 1e6),
        (panels[1], "training_flops", f"whole training ({unit})", unit_flops),
    ):
        for number, ((model, method), rows) in enumerate(means.groupby(["model", "method"], sort=False)):
            rows = rows.sort_values(column)
            accuracy = 100 * rows.validation_accuracy
            axes.errorbar(
                rows[column] / factor,
                accuracy,
                yerr=[accuracy - 100 * rows.accuracy_low, 100 * rows.accuracy_high - accuracy],
                marker=markers.get(method, "v"),
                linestyle="-" if method != "dense" else "",
                color=style.COLOURS[number % len(style.COLOURS)],
                elinewidth=1,
                label=f"{model}, {method}",
            )
        axes.set(xlabel=label, ylabel="validation accuracy (%)")
    style.legend_above(panels[0])
    return style.finish(fig, frame, n=style.repeats(frame).replace("line", "point"), band=style.spread(frame))


if __name__ == "__main__":
    sys.exit(_common.main(__file__, str(__doc__), table, figure, needs="a run with an epoch"))
