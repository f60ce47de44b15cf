"""Fig. 7: measured time of every residual block under channel union and channel gating.

Gating computes less but gathers and scatters channels around every branch; the paper finds it slower on a V100.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import _common
import pandas as pd
from matplotlib.figure import Figure

import ptsim
from ptsim.report import figures


def table(traces: Sequence[ptsim.Trace]) -> pd.DataFrame:
    """One row per run and block: forward and backward time of an image in the last recorded profile."""
    rows = []
    for label, trace in _common.labelled(traces):
        names = _common.setting(trace, label)
        if not names["pruned"] or not trace.profiles:
            continue
        profile = trace.profiles[-1]
        kinds = {layer.name: layer.kind for layer in trace.networks[profile.architecture].layers}
        blocks: dict[str, list[float]] = {}
        for layer in profile.layers:
            total, reshaping = blocks.setdefault(layer.layer.rpartition(".")[0] or layer.layer, [0.0, 0.0])
            seconds = (layer.forward_s + (layer.backward_s or 0.0)) / profile.batch
            moved = seconds if kinds[layer.layer] == "reshape" else 0.0
            blocks[layer.layer.rpartition(".")[0] or layer.layer] = [total + seconds, reshaping + moved]
        rows += [
            {
                **names,
                "batch_per_gpu": profile.batch,
                "mode": trace.run.hyperparameters.get("mode", "union"),
                "block": block,
                "seconds_per_image": total,
                "reshaping_seconds_per_image": reshaping,
            }
            for block, (total, reshaping) in blocks.items()
        ]
    frame = pd.DataFrame(rows)
    return frame if not frame.empty and frame["mode"].nunique() == 2 else pd.DataFrame()


def figure(frame: pd.DataFrame) -> Figure:
    """A pair of bars per block."""
    return _figure(frame)


@figures.styled
def _figure(frame: pd.DataFrame) -> Figure:
    blocks = list(dict.fromkeys(frame.block))
    fig, (axes,) = figures.panels(1, height_in=1.4 + 0.26 * len(blocks))
    for offset, mode, colour, hatch in ((-0.2, "union", figures.COLOURS[1], ""), (0.2, "gating", "#8CC8EC", "///")):
        means = frame[frame["mode"] == mode].groupby("block").seconds_per_image.mean() * 1e6
        axes.barh(
            [i + offset for i in range(len(blocks))],
            [float(means.get(block, 0.0)) for block in blocks],
            height=0.38,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=f"channel {mode}",
        )
    axes.set_yticks(range(len(blocks)), blocks)
    axes.invert_yaxis()
    axes.set(xlabel="forward and backward per image (µs)")
    figures.legend_above(axes)
    return figures.finish(fig, frame, n="1 profile per mode, or their mean", band="no band: medians of a profile")


if __name__ == "__main__":
    sys.exit(_common.main(__file__, str(__doc__), table, figure, needs="a profiled run in each mode, union and gating"))
