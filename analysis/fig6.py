"""Fig. 6: inference FLOPs of channel union and channel gating, relative to dense.

The paper finds a difference of 1 to 6 % of the dense FLOPs.
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
    """One row per run of a pair recorded in both modes: what its last network costs, and union minus gating."""
    rows = []
    for names, trace in _common.modes(traces):
        first, last = trace.network_of(trace.epochs[0]), trace.final_network
        rows.append({**names, "inference_flops_fraction": last.forward_macs / first.forward_macs})
    if not rows:
        return pd.DataFrame()
    frame = pd.DataFrame(rows)
    means = frame.pivot_table(index="pair", columns="mode", values="inference_flops_fraction", aggfunc="mean")
    difference = (means["union"] - means["gating"]).rename("union_minus_gating_fraction").reset_index()
    return frame.merge(difference, on="pair", how="left").assign(paper_difference="0.01 to 0.06")


def figure(frame: pd.DataFrame) -> Figure:
    """A pair of bars per network and penalty ratio."""
    return _figure(frame)


@style.styled
def _figure(frame: pd.DataFrame) -> Figure:
    fig, (axes,) = style.panels(1, height_in=3.2)
    groups = list(dict.fromkeys(frame.pair))
    for offset, mode, colour, hatch in ((-0.2, "union", style.COLOURS[1], ""), (0.2, "gating", "#8CC8EC", "///")):
        means = frame[frame["mode"] == mode].groupby("pair").inference_flops_fraction.mean()
        axes.bar(
            [i + offset for i in range(len(groups))],
            [float(means.get(group, float("nan"))) for group in groups],
            width=0.38,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=f"channel {mode}",
        )
    axes.set_xticks(range(len(groups)), groups)
    axes.set(ylabel="inference FLOPs, dense = 100 %")
    style.percent_axis(axes.yaxis)
    style.legend_above(axes)
    return style.finish(fig, frame, n="1 run per bar, or their mean", band="no band: a count")


if __name__ == "__main__":
    sys.exit(_common.main(__file__, str(__doc__), table, figure, needs="a run in each mode, union and gating"))
