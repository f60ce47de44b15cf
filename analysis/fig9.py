"""Fig. 9: memory of a training iteration and the mini-batch per GPU, over epochs.

The measured peak is the allocator's, for runs recorded on a GPU. The estimate is ptsim's; on a CPU there is no
other. The PruneTrain paper: on ImageNet with 11 GB from 64 over 96 (epoch 10) to 128 (epoch 30); on CIFAR-100 from
128 to 320.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import _common
import pandas as pd
from matplotlib.figure import Figure

import ptsim
from ptsim.report import figures, frames


def table(traces: Sequence[ptsim.Trace]) -> pd.DataFrame:
    """One row per run and epoch: measured and estimated peak, at the recorded and at the first mini-batch."""
    labelled = _common.labelled(traces)
    if not labelled:
        return pd.DataFrame()
    runs = [trace for _, trace in labelled]
    frame = frames.costs_frame(runs)
    keep = ["run", "setting", "pruned", "device", "device_kind", "precision", "num_gpus", "epoch", "batch_per_gpu"]
    frame = frame[[*keep, "peak_memory_bytes", "estimated_memory_bytes"]].copy()
    names = {names["run"]: (names["dataset"], names["model"]) for names, _ in labelled}
    published = _common.paper("Fig. 9").assign(start=lambda rows: rows.epochs.str.extract(r"^(\d+)-").astype(float))
    frame["paper_batch_per_gpu"] = [
        _paper_batch(published, *names[run], epoch) for run, epoch in zip(frame.run, frame.epoch, strict=True)
    ]
    return frame


def _paper_batch(published: pd.DataFrame, dataset: str, model: str, epoch: int) -> float | None:
    """The paper's per-GPU mini-batch at that epoch; it gives CIFAR-100's only at the end of training."""
    rows = published[(published.dataset == dataset) & (published.model == model) & (published.start <= epoch)]
    return None if rows.empty else float(rows.sort_values("start").value.iloc[-1])


def figure(frame: pd.DataFrame) -> Figure:
    """Memory above, mini-batch below."""
    return figures.memory_figure(frame)


if __name__ == "__main__":
    sys.exit(_common.main(__file__, str(__doc__), table, figure, needs="a run with an epoch"))
