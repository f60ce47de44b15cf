"""Figures by public functions: each takes a tidy frame of `ptsim.report.frames` or `ptsim.report.projected`.

from ptsim import plots
from ptsim.report import frames

plots.accuracy_figure(frames.epochs_frame([ptsim.read_trace("runs/mine")])).savefig("accuracy.svg")
"""

from ptsim.report.figures import (
    accuracy_figure,
    allreduce_figure,
    blocks_figure,
    break_even_figure,
    breakdown_figure,
    epoch_breakdown_figure,
    layers_figure,
    memory_figure,
    roofline_figure,
    saving_figure,
    scaling_figure,
    shrinking_figure,
    tradeoff_figure,
    validation_figure,
)

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
