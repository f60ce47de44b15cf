"""Where the time goes: by kind of work and by epoch."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from ptsim.report.facts import Facts
from ptsim.report.figures import style
from ptsim.report.figures.registry import ReportFigure
from ptsim.report.frames import averaged
from ptsim.report.parts import CHANGES, COMMUNICATION, HOOKS, HOST, INPUT, MEMORY_BOUND, OTHER, PRODUCTS, UPDATE
from ptsim.report.projected import epoch_breakdown_frame
from ptsim.units import percent, together

# In the order in which they are stacked; neighbours differ in lightness.
PART_COLOURS = {
    PRODUCTS: "#0072B2",
    MEMORY_BOUND: "#8CC8EC",
    HOOKS: "#CC79A7",
    UPDATE: "#00664B",
    COMMUNICATION: "#D55E00",
    INPUT: "#F0E442",
    CHANGES: "#222222",
    HOST: "#BBBBBB",
    OTHER: "#E6E6E6",
}


@style.styled
def breakdown_figure(breakdown: pd.DataFrame) -> Figure:
    """Where the time goes, per setting and cluster size, in shares of the first setting's time at that size.

    Takes `projected.breakdown_frame`, averaged over repeats. The first setting of the frame is the reference (100 %).
    """
    settings = list(dict.fromkeys(breakdown.setting))
    sizes = sorted(breakdown.gpus.unique())
    names = {
        (setting, size): textwrap.fill(f"{style.shown_name(setting)}, {together(style.gpus(size))}", 26)
        for setting in settings
        for size in sizes
    }
    lines = max(2, *(name.count("\n") + 1 for name in names.values()))
    figure, (axes,) = style.panels(1, height_in=1.5 + 0.17 * lines * len(names))
    totals = breakdown.groupby(["gpus", "setting"]).seconds.sum()
    labels, position = [], 0.0
    for size in sizes:
        reference = totals[(size, settings[0])]
        for setting in settings:
            left = 0.0
            rows = breakdown[(breakdown.setting == setting) & (breakdown.gpus == size)].set_index("part").seconds
            for part, colour in PART_COLOURS.items():
                share = float(rows.get(part, 0.0)) / reference
                axes.barh(position, share, left=left, height=0.8, color=colour, edgecolor="white", linewidth=0.5)
                left += share
            axes.text(left + 0.01, position, percent(left), va="center", fontsize=8, color="#333333")
            labels.append((position, names[setting, size]))
            position += 1
        position += 0.5
    style.bar_names(axes, [place for place, _ in labels], [name for _, name in labels])
    axes.set(xlabel=textwrap.fill(f"share of the time of “{style.shown_name(settings[0])}” on as many GPUs", 40))
    axes.set_xlim(0, axes.get_xlim()[1] * 1.1)
    style.percent_axis(axes.xaxis)
    part_legend(figure, visible_parts(breakdown))
    n = style.repeats(breakdown).replace("line", "bar")
    return style.finish(figure, breakdown, n=n, band="no band: expected values")


@style.styled
def epoch_breakdown_figure(breakdown: pd.DataFrame) -> Figure:
    """Where one run's time goes, epoch by epoch. Takes `projected.epoch_breakdown_frame`."""
    figure, (axes,) = style.panels(1, height_in=3.6)
    wide = breakdown.pivot_table(index="epoch", columns="part", values="seconds", aggfunc="sum").fillna(0.0)
    parts = visible_parts(breakdown)
    scale, unit = style.scale_for(float(wide.sum(axis=1).max()), "seconds")
    axes.stackplot(
        wide.index,
        *(wide[part] / scale for part in parts),
        colors=[PART_COLOURS[part] for part in parts],
        step="mid",
        edgecolor="white",
        linewidth=0.3,
    )
    axes.set(xlabel="epoch", ylabel=f"time per epoch ({unit})", ylim=(0, None), xlim=(wide.index[0], wide.index[-1]))
    style.epoch_axis(axes)
    part_legend(figure, parts)
    return style.finish(figure, breakdown, n="1 run", band="no band: expected values")


def visible_parts(breakdown: pd.DataFrame) -> list[str]:
    """The parts of the time that make up at least a thousandth anywhere, in stacking order."""
    groups = [name for name in ("run", "gpus", "epoch") if name in breakdown]
    share = breakdown.seconds / breakdown.groupby(groups).seconds.transform("sum")
    seen = set(breakdown[share >= 1e-3].part)
    return [part for part in PART_COLOURS if part in seen]


def part_legend(figure: Figure, parts: Sequence[str]) -> None:
    """The parts' colours, in a legend above the whole figure."""
    handles = [
        mpl.patches.Patch(facecolor=PART_COLOURS[part], edgecolor="#888888", lw=0.4, label=part) for part in parts
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, handlelength=1.2, borderaxespad=0.2)


def _breakdown(facts: Facts) -> pd.DataFrame:
    few = len({run.setting for run in facts.labelled}) <= 3
    sizes = {facts.sizes[0], facts.focus, facts.sizes[-1]} if few else {facts.focus}
    return averaged(facts.breakdown[facts.breakdown.gpus.isin(sizes)], ["setting", "gpus", "part"])


BREAKDOWN = ReportFigure(
    section="time",
    title="By kind of work.",
    frame=_breakdown,
    draw=breakdown_figure,
    caption=lambda facts: f"Expected time of the whole run; 100 % is “{facts.labelled[0].setting}” on as many GPUs.",
)


def _epochs(facts: Facts) -> pd.DataFrame:
    if len(facts.shown.trace.epochs) < 2:
        return pd.DataFrame()
    return epoch_breakdown_frame(facts.shown, facts.projector, facts.focus)


EPOCHS = ReportFigure(
    section="time",
    title="Epoch by epoch.",
    frame=_epochs,
    draw=epoch_breakdown_figure,
    caption=lambda facts: (
        f"The same for “{facts.shown.label}” on {style.gpus(facts.focus)}, without what reconfigurations cost."
    ),
)
