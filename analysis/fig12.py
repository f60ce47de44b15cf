"""Fig. 12: density of channels and of weights in every layer of the trained network.

Channel density is the input density times the output density of the last architecture. PruneTrain's authors find
that about half of the weights inside the remaining channels are near zero.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import _common
import pandas as pd
from matplotlib.figure import Figure

import ptsim
from ptsim.report.figures import style


def table(traces: Sequence[ptsim.Trace]) -> pd.DataFrame:
    """One row per pruned run and layer, after the last epoch that recorded densities."""
    rows = []
    for names, trace in _common.labelled(traces):
        recorded = [epoch for epoch in trace.epochs if epoch.densities]
        if not recorded or not names["pruned"]:
            continue
        rows += [
            {
                **names,
                "batch_per_gpu": recorded[-1].batch_per_gpu,
                "num_gpus": recorded[-1].world_size,
                "epoch": recorded[-1].epoch,
                "removed_channels": recorded[-1].architecture != trace.epochs[0].architecture,
                "layer": density.layer,
                "channel_density": density.input_channels * density.output_channels,
                "weight_density": density.weights,
                "paper_weight_density": 0.5,
            }
            for density in recorded[-1].densities
        ]
    return pd.DataFrame(rows)


def figure(frame: pd.DataFrame) -> Figure:
    """Both densities by layer, of the run with the sparsest weights among those that removed channels in training."""
    running = frame[frame.removed_channels] if frame.removed_channels.any() else frame
    return _figure(running[running.run == running.groupby("run", sort=False).weight_density.mean().idxmin()])


@style.styled
def _figure(frame: pd.DataFrame) -> Figure:
    fig, (axes,) = style.panels(1, height_in=1.4 + 0.2 * len(frame))
    positions = range(len(frame))
    axes.barh(positions, frame.channel_density, height=0.7, color="#c9c9c9", label="channels")
    axes.barh(positions, frame.weight_density, height=0.34, color=style.COLOURS[1], label="weights")
    axes.set_yticks(positions, list(frame.layer), fontsize=7.5)
    axes.invert_yaxis()
    axes.set(xlabel="share that is not sparse")
    style.percent_axis(axes.xaxis)
    style.legend_above(axes)
    return style.finish(fig, frame, n=f"{len(frame)} layers of “{frame.run.iloc[0]}”", band="no band: a count")


if __name__ == "__main__":
    sys.exit(_common.main(__file__, str(__doc__), table, figure, needs="a pruned run that recorded densities"))
