"""Fig. 11: gradient bytes all-reduced per epoch, relative to dense, with the recorded and with a fixed mini-batch.

Counted from the recorded architectures, not measured on a network. Ring all-reduce: 2(p-1)/p of the gradients per
update for p GPUs, so the ratio does not depend on p. The paper saves 55 % on average on ImageNet with the dynamic
mini-batch (computed, not measured).
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
    """One row per pruned run and epoch, and the run's averages."""
    published = _common.paper("Fig. 11").value.iloc[0]
    rows = []
    for names, trace in _common.labelled(traces):
        if not names["pruned"]:
            continue
        first = trace.epochs[0]
        dense = trace.network_of(first).num_parameters
        model = [trace.network_of(epoch).num_parameters / dense for epoch in trace.epochs]
        updates = [epoch.num_iterations / first.num_iterations for epoch in trace.epochs]
        saved = 1 - sum(m * u for m, u in zip(model, updates, strict=True)) / len(model)
        rows += [
            {
                **names,
                "batch_per_gpu": epoch.batch_per_gpu,
                "num_gpus": epoch.world_size,
                "epoch": epoch.epoch,
                "bytes_fraction": m * u,
                "fixed_batch_bytes_fraction": m,
                "saved_fraction": saved,
                "fixed_batch_saved_fraction": 1 - sum(model) / len(model),
                "paper_saved_fraction": published if names["dataset"] == "ImageNet" else None,
            }
            for epoch, m, u in zip(trace.epochs, model, updates, strict=True)
        ]
    return pd.DataFrame(rows)


def figure(frame: pd.DataFrame) -> Figure:
    """A line per run; dotted where the mini-batch had stayed as it was."""
    return _figure(frame)


@style.styled
def _figure(frame: pd.DataFrame) -> Figure:
    fig, (axes,) = style.panels(1, height_in=3.2)
    style.lines(axes, frame, "epoch", "bytes_fraction", drawstyle="steps-post")
    for setting, (colour, _) in style.run_style(frame).items():
        rows = frame[frame.setting == setting].groupby("epoch", as_index=False).mean(numeric_only=True)
        if (rows.bytes_fraction != rows.fixed_batch_bytes_fraction).any():
            axes.step(
                rows.epoch,
                rows.fixed_batch_bytes_fraction,
                where="post",
                color=colour,
                lw=1,
                ls=":",
                label=f"{setting}, fixed mini-batch",
            )
    axes.set(xlabel="epoch", ylabel="bytes, dense = 100 %", ylim=(0, None))
    style.percent_axis(axes.yaxis)
    style.legend_above(axes)
    return style.finish(fig, frame, n=style.repeats(frame), band=style.spread(frame, otherwise="no band: a count"))


if __name__ == "__main__":
    sys.exit(_common.main(__file__, str(__doc__), table, figure, needs="a run with a penalty ratio above 0"))
