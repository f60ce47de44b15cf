"""Fig. 4: the largest |weight| of every output channel of a few layers, epoch by epoch.

Channels fall below the threshold (1e-4) and stay there. PruneTrain rests on the fact that they do not revive.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import _common
import pandas as pd
from matplotlib.figure import Figure

import ptsim
from ptsim.report.figures import style

THRESHOLD = 1e-4
LAYERS = 3


def table(traces: Sequence[ptsim.Trace]) -> pd.DataFrame:
    """One row per run, layer, epoch and channel that the network still has, for three layers spread over the depth."""
    rows = []
    for names, trace in _common.labelled(traces):
        recorded = [epoch for epoch in trace.epochs if epoch.channel_maxima]
        if not recorded:
            continue
        layers = list(recorded[0].channel_maxima or {})
        chosen = [layers[round(i * (len(layers) - 1) / max(LAYERS - 1, 1))] for i in range(LAYERS)]
        for epoch in recorded:
            for layer in dict.fromkeys(chosen):
                maxima = (epoch.channel_maxima or {}).get(layer, ())
                rows += [
                    {
                        **names,
                        "batch_per_gpu": epoch.batch_per_gpu,
                        "num_gpus": epoch.world_size,
                        "layer": layer,
                        "epoch": epoch.epoch,
                        "channel": channel,
                        "largest_weight": value,
                        "sparse": value < THRESHOLD,
                    }
                    for channel, value in enumerate(maxima)
                ]
    return pd.DataFrame(rows)


def figure(frame: pd.DataFrame) -> Figure:
    """A panel per layer of the run with most sparse channels: every channel's largest weight, logarithmic."""
    return _figure(frame[frame.run == frame.groupby("run", sort=False).sparse.mean().idxmax()])


@style.styled
def _figure(frame: pd.DataFrame) -> Figure:
    layers = list(dict.fromkeys(frame.layer))
    fig, panels = style.panels(len(layers), height_in=0.8 + 1.6 * len(layers))
    for axes, layer in zip(panels, layers, strict=True):
        rows = frame[frame.layer == layer]
        axes.plot(
            rows.epoch,
            rows.largest_weight.clip(lower=1e-12),
            ".",
            ms=2.5,
            color=style.COLOURS[1],
            alpha=0.5,
            rasterized=True,
        )
        axes.axhline(THRESHOLD, color=style.COLOURS[2], linewidth=1, linestyle="--", label="threshold")
        axes.set(yscale="log", title=layer, ylabel="largest |w|")
    panels[-1].set_xlabel("epoch")
    style.legend_above(panels[0])
    return style.finish(
        fig, frame, n=f"1 dot per output channel and epoch of “{frame.run.iloc[0]}”", band="no band: single values"
    )


if __name__ == "__main__":
    sys.exit(
        _common.main(__file__, str(__doc__), table, figure, needs="a run trained with record_channel_maxima = true")
    )
