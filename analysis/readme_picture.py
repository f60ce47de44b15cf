"""The picture of the README: how much of the FLOPs that PruneTrain saves becomes time, on three clusters.

    python analysis/readme_picture.py [--out docs/images/saving.svg]

The runs are planned, not trained: ResNet-50 on ImageNet for 90 epochs, dense and with the FLOPs that Table 1 of the
paper reports for penalty ratio 0.25. Both are projected from the GPUs' data sheets; the bands are 90 % intervals.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

import ptsim
from ptsim.hardware.catalog import load_cluster
from ptsim.report.figures.style import COLOURS, styled
from ptsim.report.projected import Projector, savings_frame
from ptsim.sim.options import Options
from ptsim.textfile import write_whole, writing_whole
from ptsim.trace.pairs import compare_runs

ROOT = Path(__file__).resolve().parents[1]
RUN = {"images": 1_281_167, "epochs": 90, "batch": 64, "gpus": 4, "interval": 5, "precision": "amp"}
PRUNING = "lym2019/resnet50-imagenet-r0.25"
CLUSTERS = {"dgx-1-v100": "V100", "dgx-a100": "A100", "dgx-h100": "H100"}
GPUS = (8, 16, 32, 64, 128, 256)


def runs() -> tuple[ptsim.Trace, ptsim.Trace]:
    """The planned runs, dense and pruned."""
    dense, pruned = (ptsim.plan("torchvision:resnet50", pruning=pruning, **RUN) for pruning in ("none", PRUNING))
    return dense, pruned


def table(dense: ptsim.Trace, pruned: ptsim.Trace) -> pd.DataFrame:
    """One row per cluster and number of GPUs: the saved share of the time, its interval, and that of the FLOPs."""
    (comparison,) = compare_runs([dense, pruned])
    before, after = (sum(epoch.training_macs for epoch in ptsim.cost(run).epochs) for run in (dense, pruned))
    frames = [
        savings_frame([comparison], Projector(load_cluster(name), Options()), GPUS).assign(gpu=gpu)
        for name, gpu in CLUSTERS.items()
    ]
    return pd.concat(frames, ignore_index=True).assign(saved_flops_fraction=1 - after / before)


@styled
def figure(rows: pd.DataFrame) -> Figure:
    """Saved time over the number of GPUs, a line and a band per GPU, under the line of the saved FLOPs."""
    drawing = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = drawing.subplots()
    saved = float(rows.saved_flops_fraction.iloc[0])
    axes.axhline(100 * saved, color="#4d4d4d", linestyle="--", label=f"training FLOPs saved: {100 * saved:.0f} %")
    for (gpu, part), colour in zip(rows.groupby("gpu", sort=False), COLOURS[1:], strict=False):
        low, high = 100 * part.saved_fraction_low, 100 * part.saved_fraction_high
        axes.fill_between(part.gpus, low, high, color=colour, alpha=0.16, lw=0)
        axes.plot(part.gpus, 100 * part.saved_fraction, color=colour, marker="o", ms=4, label=f"time saved on {gpu}")
    axes.set_xscale("log", base=2)
    sizes = sorted(rows.gpus.unique())
    axes.set_xticks(sizes, [str(count) for count in sizes])
    axes.set_ylim(bottom=min(0.0, 100 * float(rows.saved_fraction_low.min())))
    axes.set(xlabel="GPUs", ylabel="saved, % of the dense run")
    axes.set_title(
        "ResNet-50 on ImageNet, planned and projected; fp16 autocast, 64 images a GPU; bands: 90 %", fontsize=9
    )
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return drawing


def main(argv: list[str] | None = None) -> int:
    """Plan both runs, print the table and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "docs" / "images" / "saving.svg",
        help="file of the figure; its table goes beside it",
    )
    arguments = parser.parse_args(argv)
    rows = table(*runs())
    columns = [
        "gpu",
        "gpus",
        "saved_fraction",
        "saved_fraction_low",
        "saved_fraction_high",
        "saved_flops_fraction",
        "tier",
    ]
    print(rows[columns].round(3).to_string(index=False))
    with writing_whole(arguments.out) as file:
        figure(rows).savefig(file, format=arguments.out.suffix[1:])
    write_whole(arguments.out.with_suffix(".csv"), rows[columns].to_csv(index=False, float_format="%.5g"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
