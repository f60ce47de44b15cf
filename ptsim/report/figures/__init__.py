"""How the report's tables look as figures: each function takes one tidy frame and returns a Figure.

What they share stands in `ptsim.report.figures.style`.
"""

from ptsim.report.figures.layers import blocks_figure, layers_figure, roofline_figure
from ptsim.report.figures.runs import accuracy_figure, tradeoff_figure, validation_figure
from ptsim.report.figures.scaling import break_even_figure, saving_figure, scaling_figure
from ptsim.report.figures.shrinking import allreduce_figure, memory_figure, shrinking_figure
from ptsim.report.figures.time import breakdown_figure, epoch_breakdown_figure

__all__ = [
    "accuracy_figure",
    "allreduce_figure",
    "blocks_figure",
    "break_even_figure",
    "breakdown_figure",
    "epoch_breakdown_figure",
    "layers_figure",
    "memory_figure",
    "roofline_figure",
    "saving_figure",
    "scaling_figure",
    "shrinking_figure",
    "tradeoff_figure",
    "validation_figure",
]
