"""Whole runs over cluster sizes, and what pruning saves there."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from ptsim.report.figures.registry import ReportFigure
from ptsim.report.figures.style import (
    COLOURS,
    TIME_SCALES,
    WIDTH_IN,
    dash_style,
    finish,
    legend_above,
    panels,
    plain_log_axes,
    repeats,
    run_style,
    scale_for,
    styled,
)
from ptsim.report.frames import averaged


@styled
def scaling_figure(projections: pd.DataFrame) -> Figure:
    """Whole-run time over cluster sizes, a line and a band per setting.

    Takes `projected.projections_frame`, averaged over repeats.
    """
    figure, (axes,) = panels(1, height_in=3.5)
    sizes = sorted(projections.gpus.unique())
    factor, unit = scale_for(float(projections.total_seconds.median()), TIME_SCALES)
    for setting, (colour, dash) in run_style(projections).items():
        rows = projections[projections.setting == setting].sort_values("gpus")
        axes.fill_between(
            rows.gpus, rows.low_seconds / factor, rows.high_seconds / factor, color=colour, alpha=0.16, lw=0
        )
        axes.plot(
            rows.gpus,
            rows.total_seconds / factor,
            color=colour,
            linestyle=dash_style(dash),
            marker="o",
            ms=4,
            label=setting,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    plain_log_axes(axes, sizes)
    axes.set(xlabel="GPUs", ylabel=f"whole run ({unit})")
    legend_above(axes)
    return finish(figure, projections, n=repeats(projections), band="90 % interval of the projection")


@styled
def saving_figure(savings: pd.DataFrame) -> Figure:
    """Share of the dense time that pruning saves, over cluster sizes.

    Takes `projected.savings_frame`, averaged over repeats.
    """
    figure, (axes,) = panels(1, height_in=3.2)
    for setting, (colour, dash) in run_style(savings).items():
        rows = savings[savings.setting == setting].sort_values("gpus")
        axes.fill_between(rows.gpus, rows.saved_fraction_low, rows.saved_fraction_high, color=colour, alpha=0.16, lw=0)
        axes.plot(
            rows.gpus, rows.saved_fraction, color=colour, linestyle=dash_style(dash), marker="o", ms=4, label=setting
        )
    axes.axhline(0, color="#666666", linewidth=0.7)
    axes.set_xscale("log", base=2)
    plain_log_axes(axes, sorted(savings.gpus.unique()))
    axes.set(xlabel="GPUs", ylabel="time saved against dense")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    legend_above(axes)
    return finish(
        figure,
        savings,
        n=repeats(savings).replace("run", "pair"),
        band="90 % interval of the saving",
    )


@styled
def break_even_figure(frame: pd.DataFrame) -> Figure:
    """What pruning saves as one thing changes at a time, a panel per lever. Takes `scenarios.break_even_frame`."""
    levers = list(dict.fromkeys(frame.lever))
    figure = Figure(figsize=(WIDTH_IN, 0.7 + 1.75 * len(levers)), layout="constrained")
    for axes, lever in zip(figure.subplots(len(levers), 1, squeeze=False)[:, 0], levers, strict=True):
        rows = frame[frame.lever == lever].sort_values("value")
        values = rows.value * 8e-9 if lever == "bandwidth" else rows.value
        axes.fill_between(values, rows.saved_fraction_low, rows.saved_fraction_high, color=COLOURS[1], alpha=0.16, lw=0)
        axes.plot(values, rows.saved_fraction, color=COLOURS[1], marker="o", ms=4)
        axes.axhline(0, color="#666666", linewidth=0.7)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(values), [f"{value:,.4g}" for value in values])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axes.set(xlabel=_LEVER_LABELS[lever], ylabel="time saved")
    return finish(figure, frame, n="1 pair of runs", band="90 % interval of the saving")


_LEVER_LABELS = {
    "GPUs": "GPUs",
    "bandwidth": "bandwidth of a link (Gbit/s)",
    "mini-batch": "first mini-batch per GPU",
}


def _over_sizes(table: pd.DataFrame) -> pd.DataFrame:
    """The table averaged over repeats; empty where it holds a single size, which is no curve."""
    if table.empty or table.gpus.nunique() < 2:
        return pd.DataFrame()
    return averaged(table, ["setting", "gpus"])


SCALING = ReportFigure(
    section="scaling",
    title="Whole-run time.",
    frame=lambda facts: _over_sizes(facts.projections),
    draw=scaling_figure,
    caption=lambda _: "Expected time over cluster sizes, both axes logarithmic.",
)
SAVING = ReportFigure(
    section="scaling",
    title="What pruning saves.",
    frame=lambda facts: _over_sizes(facts.savings),
    draw=saving_figure,
    caption=lambda _: "Share of the dense run's time on as many GPUs.",
)
BREAK_EVEN = ReportFigure(
    section="scenarios",
    title="From where on pruning pays.",
    frame=lambda facts: facts.break_even,
    draw=break_even_figure,
    caption=lambda facts: (
        f"“{facts.shown.label}” against dense: above the line it pays. One thing changes at a time, the rest is as in "
        "the headline."
    ),
)
