"""Whole runs over cluster sizes, and what pruning saves there."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ptsim.report.figures import style
from ptsim.report.figures.registry import ReportFigure
from ptsim.report.frames import averaged
from ptsim.units import GBIT, given_number


@style.styled
def scaling_figure(projections: pd.DataFrame) -> Figure:
    """Whole-run time over cluster sizes, a line and a band per setting.

    Takes `projected.projections_frame`, averaged over repeats.
    """
    figure, (axes,) = style.panels(1, height_in=3.5)
    sizes = sorted(projections.gpus.unique())
    factor, unit = style.scale_for(float(projections.total_seconds.median()), "seconds")
    _curves(axes, projections, ("total_seconds", "low_seconds", "high_seconds"), factor)
    axes.set_yscale("log")
    style.plain_log_axes(axes, sizes)
    axes.set(xlabel="GPUs", ylabel=f"whole run ({unit})")
    style.legend_above(axes)
    return style.finish(figure, projections, n=style.repeats(projections), band="90 % interval of the projection")


@style.styled
def saving_figure(savings: pd.DataFrame) -> Figure:
    """Share of the dense time that pruning saves, over cluster sizes.

    Takes `projected.savings_frame`, averaged over repeats.
    """
    figure, (axes,) = style.panels(1, height_in=3.2)
    _curves(axes, savings, ("saved_fraction", "saved_fraction_low", "saved_fraction_high"))
    style.zero_line(axes)
    style.plain_log_axes(axes, sorted(savings.gpus.unique()))
    axes.set(xlabel="GPUs", ylabel="time saved against dense")
    style.percent_axis(axes.yaxis)
    style.legend_above(axes)
    return style.finish(
        figure,
        savings,
        n=style.repeats(savings).replace("run", "pair"),
        band="90 % interval of the saving",
    )


@style.styled
def break_even_figure(frame: pd.DataFrame) -> Figure:
    """What pruning saves as one thing changes at a time, a panel per lever. Takes `scenarios.break_even_frame`."""
    levers = list(dict.fromkeys(frame.lever))
    figure = Figure(figsize=(style.WIDTH_IN, 0.7 + 1.75 * len(levers)), layout="constrained")
    for axes, lever in zip(figure.subplots(len(levers), 1, squeeze=False)[:, 0], levers, strict=True):
        rows = frame[frame.lever == lever].sort_values("value")
        values = rows.value / GBIT if lever == "bandwidth" else rows.value
        style.band(axes, values, rows.saved_fraction_low, rows.saved_fraction_high, style.COLOURS[1])
        axes.plot(values, rows.saved_fraction, color=style.COLOURS[1], marker="o", ms=4)
        style.zero_line(axes)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(values), [given_number(value) for value in values])
        axes.xaxis.set_minor_locator(NullLocator())
        style.percent_axis(axes.yaxis)
        axes.set(xlabel=_LEVER_LABELS[lever], ylabel="time saved")
    return style.finish(figure, frame, n="1 pair of runs", band="90 % interval of the saving")


def _curves(axes: Axes, frame: pd.DataFrame, columns: tuple[str, str, str], factor: float = 1.0) -> None:
    """A line and a band per setting over cluster sizes: middle, low and high in units of `factor`."""
    middle, low, high = columns
    for setting, (colour, dash) in style.run_style(frame).items():
        rows = frame[frame.setting == setting].sort_values("gpus")
        style.band(axes, rows.gpus, rows[low] / factor, rows[high] / factor, colour)
        line = style.dash_style(dash)
        axes.plot(rows.gpus, rows[middle] / factor, color=colour, linestyle=line, marker="o", ms=4, label=setting)
    axes.set_xscale("log", base=2)


_LEVER_LABELS = {
    "GPUs": "GPUs",
    "bandwidth": "bandwidth (Gbit/s)",
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
