"""Fig. 7: measured time of every residual block under channel union and channel gating.

Gating computes less, but it gathers and scatters channels around every branch; PruneTrain's authors find it slower
on a V100 (they show bars without numbers). Layer times come from the trace's last profile, on the device that
recorded it; gathers cost a different share on a CPU than on a GPU. `dense_seconds_per_image` is the whole network's
time in the run's first profile: if it differs between the two modes, the machine ran at different speeds and the
bars cannot be compared.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence, Set

import _common
import pandas as pd
from matplotlib.figure import Figure

import ptsim
from ptsim.network import LayerKind
from ptsim.report.figures import style


def table(traces: Sequence[ptsim.Trace]) -> pd.DataFrame:
    """One row per run and block: forward and backward time of an image in the last recorded profile."""
    rows = []
    for names, trace in _common.modes(traces):
        if not trace.profiles:
            continue
        profile = trace.profiles[-1]
        unpruned = [layer.name for layer in trace.network_of(trace.epochs[0]).layers]
        blocks = {name.rpartition(".")[0] or name for name in unpruned}
        kinds = {layer.name: layer.kind for layer in trace.networks[profile.architecture].layers}
        for layer in profile.layers:
            seconds = (layer.forward_s + (layer.backward_s or 0.0)) / profile.batch
            rows.append(
                {
                    **names,
                    "batch_per_gpu": profile.batch,
                    "dense_seconds_per_image": (trace.profiles[0].forward_s + trace.profiles[0].backward_s)
                    / trace.profiles[0].batch,
                    "block": _block(layer.layer, blocks),
                    "seconds_per_image": seconds,
                    "reshaping_seconds_per_image": seconds if kinds[layer.layer] == LayerKind.RESHAPE else 0.0,
                }
            )
    if not rows or len({row["mode"] for row in rows}) < 2:
        return pd.DataFrame()
    frame = pd.DataFrame(rows)
    seconds = ["seconds_per_image", "reshaping_seconds_per_image"]
    return frame.groupby([c for c in frame if c not in seconds], sort=False, dropna=False)[seconds].sum().reset_index()


def _block(layer: str, blocks: Set[str]) -> str:
    """The block of the unpruned network that a layer belongs to: gating puts gathers and scatters into its modules."""
    path = layer
    while path not in blocks and "." in path:
        path = path.rpartition(".")[0]
    return path


def figure(frame: pd.DataFrame) -> Figure:
    """A pair of bars per block, of the first pair of runs."""
    return _figure(frame[frame.pair == frame.pair.iloc[0]])


@style.styled
def _figure(frame: pd.DataFrame) -> Figure:
    blocks = list(dict.fromkeys(frame.block))
    fig, (axes,) = style.panels(1, height_in=1.4 + 0.26 * len(blocks))
    for offset, mode, colour, hatch in ((-0.2, "union", style.COLOURS[1], ""), (0.2, "gating", "#8CC8EC", "///")):
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
    style.legend_above(axes)
    return style.finish(
        fig,
        frame,
        n=f"1 profile per mode, or their mean, of {frame.pair.iloc[0]}",
        band="no band: medians of a profile",
    )


if __name__ == "__main__":
    sys.exit(_common.main(__file__, str(__doc__), table, figure, needs="a profiled run in each mode, union and gating"))
