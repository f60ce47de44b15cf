"""Fig. 6: inference FLOPs of channel union and channel gating, relative to dense.

The paper finds a difference of 1 to 6 % of the dense FLOPs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import _common
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

import ptsim
from ptsim.report import figures


def table(traces: Sequence[ptsim.Trace]) -> pd.DataFrame:
    """One row per pruned run: what its last network costs, by mode; union minus gating where both were recorded."""
    rows = []
    for label, trace in _common.labelled(traces):
        names = _common.setting(trace, label)
        if not names["pruned"]:
            continue
        first, last = (trace.network_of(trace.epochs[i]) for i in (0, -1))
        rows.append(
            {
                **names,
                "batch_per_gpu": trace.epochs[0].batch_per_gpu,
                "mode": trace.run.hyperparameters.get("mode", "union"),
                "inference_flops_fraction": last.forward_macs / first.forward_macs,
            }
        )
    frame = pd.DataFrame(rows)
    if frame.empty or frame["mode"].nunique() < 2:
        return pd.DataFrame()
    key = ["dataset", "model", "penalty_ratio"]
    modes = frame.pivot_table(index=key, columns="mode", values="inference_flops_fraction", aggfunc="mean")
    difference = (modes["union"] - modes["gating"]).rename("union_minus_gating_fraction").reset_index()
    return frame.merge(difference, on=key, how="left").assign(paper_difference="0.01 to 0.06")


def figure(frame: pd.DataFrame) -> Figure:
    """A pair of bars per network and penalty ratio."""
    return _figure(frame)


@figures.styled
def _figure(frame: pd.DataFrame) -> Figure:
    fig, (axes,) = figures.panels(1, height_in=3.2)
    names = frame.model + ", r=" + frame.penalty_ratio.map("{:g}".format)
    groups = list(dict.fromkeys(names))
    for offset, mode, colour, hatch in ((-0.2, "union", figures.COLOURS[1], ""), (0.2, "gating", "#8CC8EC", "///")):
        means = frame[frame["mode"] == mode].groupby(names).inference_flops_fraction.mean()
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
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    figures.legend_above(axes)
    return figures.finish(fig, frame, n="1 run per bar, or their mean", band="no band: a count")


if __name__ == "__main__":
    sys.exit(_common.main(__file__, str(__doc__), table, figure, needs="a run in each mode, union and gating"))
