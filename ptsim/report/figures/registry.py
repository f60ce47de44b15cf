"""Which figures a report has. A figure is one row: the table that it shows, how that is drawn, and what it says.

Other packages add theirs with `FIGURES.add(name, figure)`, or with an entry point in the group `ptsim.figures` whose
name is the figure's and whose object is a `ReportFigure`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import pandas as pd
from matplotlib.figure import Figure

from ptsim.registry import Registry
from ptsim.report.facts import Facts


class ReportFigure(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of the report.

    Attributes:
        section: name of the part of the page that shows it: "time", "scaling", "layers", "costs", "runs", "validation".
        title: in a few words, with a full stop.
        frame: the tidy table that it shows; an empty one where the report has nothing for it.
        draw: makes the figure of that table.
        caption: one sentence: what is to be seen.
        needs_projection: it is left out where no run can be projected.
    """

    section: str
    title: str
    frame: Callable[[Facts], pd.DataFrame]
    draw: Callable[[pd.DataFrame], Figure]
    caption: Callable[[Facts], str]
    needs_projection: bool = True


# In the order in which a section shows them.
_OWN = {
    "breakdown": "ptsim.report.figures.time:BREAKDOWN",
    "epochs": "ptsim.report.figures.time:EPOCHS",
    "scaling": "ptsim.report.figures.scaling:SCALING",
    "saving": "ptsim.report.figures.scaling:SAVING",
    "break_even": "ptsim.report.figures.scaling:BREAK_EVEN",
    "layers": "ptsim.report.figures.layers:LAYERS",
    "roofline": "ptsim.report.figures.layers:ROOFLINE",
    "blocks": "ptsim.report.figures.layers:BLOCKS",
    "shrinking": "ptsim.report.figures.shrinking:SHRINKING",
    "memory": "ptsim.report.figures.shrinking:MEMORY",
    "allreduce": "ptsim.report.figures.shrinking:ALLREDUCE",
    "accuracy": "ptsim.report.figures.runs:ACCURACY",
    "tradeoff": "ptsim.report.figures.runs:TRADEOFF",
    "validation": "ptsim.report.figures.runs:VALIDATION",
}

FIGURES: Registry[ReportFigure] = Registry("figure", entry_points="ptsim.figures", own=_OWN)


def figures_of(section: str, facts: Facts) -> Iterator[tuple[str, ReportFigure, pd.DataFrame]]:
    """Name, figure and table of everything that a section shows, ptsim's own first."""
    for name in (*_OWN, *(name for name in FIGURES.names() if name not in _OWN)):
        figure = FIGURES.find(name)
        if figure.section != section or (figure.needs_projection and not facts.is_projected):
            continue
        frame = figure.frame(facts)
        if not frame.empty:
            yield name, figure, frame
