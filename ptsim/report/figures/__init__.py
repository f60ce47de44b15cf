"""How the report's tables look as figures: each function takes one tidy frame and returns a Figure."""

from ptsim.report.figures.layers import blocks_figure, layers_figure, roofline_figure
from ptsim.report.figures.runs import accuracy_figure, tradeoff_figure, validation_figure
from ptsim.report.figures.scaling import break_even_figure, saving_figure, scaling_figure
from ptsim.report.figures.shrinking import allreduce_figure, memory_figure, shrinking_figure
from ptsim.report.figures.style import (
    COLOURS,
    WIDTH_IN,
    finish,
    legend_above,
    lines,
    panels,
    percent_axis,
    repeats,
    run_style,
    spread,
    styled,
)
from ptsim.report.figures.time import breakdown_figure, epoch_breakdown_figure

__all__ = [
    "COLOURS",
    "WIDTH_IN",
    "accuracy_figure",
    "allreduce_figure",
    "blocks_figure",
    "break_even_figure",
    "breakdown_figure",
    "epoch_breakdown_figure",
    "finish",
    "layers_figure",
    "legend_above",
    "lines",
    "memory_figure",
    "panels",
    "percent_axis",
    "repeats",
    "roofline_figure",
    "run_style",
    "saving_figure",
    "scaling_figure",
    "shrinking_figure",
    "spread",
    "styled",
    "tradeoff_figure",
    "validation_figure",
]
