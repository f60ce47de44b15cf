"""What was recorded: accuracy, its price, and predicted against measured epochs."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from ptsim.report.facts import Facts
from ptsim.report.figures import style
from ptsim.report.figures.registry import ReportFigure
from ptsim.units import percent


@style.styled
def accuracy_figure(epochs: pd.DataFrame) -> Figure:
    """Validation accuracy and channel sparsity over epochs, a line per run. Takes `frames.epochs_of_runs_frame`."""
    figure, (top, bottom) = style.panels(2, height_in=4.0)
    for axes, column, label in (
        (top, "validation_accuracy", "validation accuracy"),
        (bottom, "channel_sparsity", "channel sparsity"),
    ):
        style.lines(axes, epochs, "epoch", column)
        axes.set(ylabel=label, xlabel="")
        style.percent_axis(axes.yaxis)
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("epoch")
    style.legend_above(top)
    return style.finish(figure, epochs, n=style.repeats(epochs), band=style.spread(epochs))


@style.styled
def tradeoff_figure(savings: pd.DataFrame) -> Figure:
    """What pruning costs in accuracy and leaves of time and MACs. Takes `frames.measured_savings_frame`.

    A point per run; the time is against the run's own first epochs, so that a machine that changed its speed between
    the dense and the pruned run does not shift it.
    """
    figure, (axes,) = style.panels(1, height_in=3.4)
    for setting, (colour, _) in style.run_style(savings).items():
        rows = savings[savings.setting == setting]
        change = 100 * rows.accuracy_change
        axes.plot(100 * rows.own_start_fraction, change, "o", ms=6, color=colour, label=f"{setting}, time")
        axes.plot(
            100 * rows.training_macs_fraction, change, "o", ms=6, mfc="white", color=colour, label=f"{setting}, MACs"
        )
    style.zero_line(axes)
    axes.axvline(100, color="#666666", linewidth=0.7)
    axes.set(xlabel="left of dense (%)", ylabel="accuracy change (points)")
    style.legend_above(axes)
    return style.finish(figure, savings, n="1 run per point", band="no band: single runs")


@style.styled
def validation_figure(epochs: pd.DataFrame) -> Figure:
    """Predicted against measured epoch time. Takes a frame with run, epoch, predicted_ and measured_seconds."""
    figure, (axes,) = style.panels(1, height_in=3.2)
    scale, unit = style.scale_for(float(epochs.measured_seconds.max()), "seconds")
    for setting, (colour, _) in style.run_style(epochs).items():
        group = epochs[epochs.setting == setting]
        label = f"{setting}, measured"
        axes.plot(group.epoch, group.measured_seconds / scale, color=colour, label=label, lw=0, marker="o", ms=3)
        for number, (_, rows) in enumerate(group.groupby("run", sort=False)):
            label = "" if number else f"{setting}, predicted"
            axes.plot(rows.epoch, rows.predicted_seconds / scale, color=colour, label=label)
            low, high = rows.low_seconds / scale, rows.high_seconds / scale
            style.band(axes, rows.epoch, low, high, colour)
    axes.set(xlabel="epoch", ylabel=f"time per epoch ({unit})", ylim=(0, None))
    style.epoch_axis(axes)
    style.legend_above(axes)
    return style.finish(figure, epochs, n=f"{len(epochs)} epochs", band="90 % interval of the prediction")


def _accuracy(facts: Facts) -> pd.DataFrame:
    """Epochs with an accuracy; nothing where there are fewer than two, which make no line."""
    epochs = facts.epochs.dropna(subset=["validation_accuracy"]) if not facts.epochs.empty else facts.epochs
    return epochs if not epochs.empty and epochs.epoch.nunique() > 1 else pd.DataFrame()


ACCURACY = ReportFigure(
    section="runs",
    title="Accuracy and sparsity.",
    frame=_accuracy,
    draw=accuracy_figure,
    caption=lambda _: (
        "Validation accuracy after every epoch, and the share of the first architecture's channels that are removed or "
        "sparse."
    ),
    needs_projection=False,
)
TRADEOFF = ReportFigure(
    section="runs",
    title="Accuracy against time.",
    frame=lambda facts: facts.measured_savings,
    draw=tradeoff_figure,
    caption=lambda _: (
        "Measured where the runs were recorded: what every pruned setting costs in accuracy and how much of the "
        "training time and of the training MACs it leaves."
    ),
    needs_projection=False,
)
VALIDATION = ReportFigure(
    section="validation",
    title="Epoch times, predicted and measured.",
    frame=lambda facts: facts.checks,
    draw=validation_figure,
    caption=lambda facts: (
        "Predicted from the layer times that the run measured at the start of each architecture; input and loop as in "
        f"the first epoch. {percent(facts.validation.interval_coverage)} of the epochs lie in their 90 % interval."
        if facts.validation
        else ""
    ),
)
