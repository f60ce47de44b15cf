"""Fig. 2: training FLOPs over epochs, and one reconfiguration against PruneTrain's continuous ones.

FLOPs are counted from the recorded architectures. The one-time run (dotted) is a calculation, and an optimistic one
as in the paper: it knows the best epoch, stays dense before it, and then keeps the network that the recorded run had
at that epoch. Recorded one-time runs have lines of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import _common
import pandas as pd
from matplotlib.figure import Figure

import ptsim
from ptsim.report.figures import style
from ptsim.report.frames import numeric

PHASES = 3


def table(traces: Sequence[ptsim.Trace]) -> pd.DataFrame:
    """One row per pruned run and epoch: FLOPs of an image relative to the first epoch, and the run's summary."""
    rows = []
    for names, trace in _common.labelled(traces):
        if not names["pruned"]:
            continue
        per_image = [_common.epoch_flops(trace, e) / e.num_images for e in trace.epochs]
        relative = [flops / per_image[0] for flops in per_image]
        continuous = trace.run.hyperparameters.get("schedule", "continuous") == "continuous"
        summary = one_time_summary(relative) if continuous else dict.fromkeys(one_time_summary(relative))
        best = summary["one_time_best_epoch"]
        rows += [
            {
                **names,
                "batch_per_gpu": epoch.batch_per_gpu,
                "num_gpus": epoch.world_size,
                "epoch": epoch.epoch,
                "flops_fraction": fraction,
                "phase": min(PHASES * epoch.epoch // len(trace.epochs), PHASES - 1) + 1,
                "pruned_in_epoch_fraction": relative[max(i - 1, 0)] - fraction,
                "one_time_flops_fraction": None if best is None else 1.0 if i < best else relative[int(best)],
                **summary,
                "paper_one_time_extra_fraction_at_least": 0.25,
            }
            for i, (epoch, fraction) in enumerate(zip(trace.epochs, relative, strict=True))
        ]
    return numeric(pd.DataFrame(rows))


def one_time_summary(relative: Sequence[float]) -> dict[str, float | None]:
    """The best single reconfiguration: after which epoch, its FLOPs and what it costs above continuous pruning.

    Both as fractions of the dense run's FLOPs; `one_time_extra_fraction` is relative to the continuous run.
    """
    epochs = len(relative)
    totals = [k + relative[k] * (epochs - k) for k in range(epochs)]
    best = min(range(epochs), key=totals.__getitem__)
    return {
        "continuous_fraction": sum(relative) / epochs,
        "one_time_best_epoch": best,
        "one_time_fraction": totals[best] / epochs,
        "one_time_extra_fraction": totals[best] / sum(relative) - 1,
    }


def figure(frame: pd.DataFrame) -> Figure:
    """FLOPs of an image over epochs, a line per setting; dotted: with one reconfiguration, at the best epoch."""
    return _figure(frame)


@style.styled
def _figure(frame: pd.DataFrame) -> Figure:
    fig, (axes,) = style.panels(1, height_in=3.2)
    style.lines(axes, frame, "epoch", "flops_fraction", drawstyle="steps-post")
    for setting, (colour, _) in style.run_style(frame).items():
        rows = frame[frame.setting == setting].groupby("epoch", as_index=False).one_time_flops_fraction.mean()
        axes.step(rows.epoch, rows.one_time_flops_fraction, where="post", color=colour, lw=1, ls=":")
    axes.plot([], [], color="#333333", lw=1, ls=":", label="dotted: once, at the best epoch (calculated)")
    axes.set(xlabel="epoch", ylabel="FLOPs per image, dense = 100 %", ylim=(0, None))
    style.percent_axis(axes.yaxis)
    style.legend_above(axes)
    return style.finish(fig, frame, n=style.repeats(frame), band=style.spread(frame, otherwise="no band: a count"))


if __name__ == "__main__":
    sys.exit(_common.main(__file__, str(__doc__), table, figure, needs="a run with a penalty ratio above 0"))
