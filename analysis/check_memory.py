"""Does ptsim say "fits" of mini-batches that ran, and "does not fit" of mini-batches that ran out of memory?

    python analysis/check_memory.py                              # all networks of the published rows: some minutes
    python analysis/check_memory.py resnet50 vgg16_bn --csv traces/public/fits.csv

Every published training row (traces/public/training*.csv, with its source) is a mini-batch that ran on a GPU. The
rows of timm's benchmark say more: it starts at 512 images and, when it runs out of memory, tries the next smaller of
512, 384, 256, 192, 128, 96, … (`timm.utils.decay_batch_step`, two steps between powers of two). So the next larger
size than a published mini-batch ran out of memory. Rows in which the whole model is fp16 are left out: ptsim's half
precision is autocast.

Columns: `peak_bytes` is what `torch.cuda.max_memory_allocated` would show, `device_bytes` adds the margins of
`costs.memory`, `usable_bytes` is what it is compared with, `fits` is the verdict of `ptsim cost --gpu`, `ran` is
what happened.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from capture_public import build
from public_rows import training_table, version_of

from ptsim.capture.network import capture_network
from ptsim.costs.memory import iteration_memory, usable_bytes
from ptsim.hardware.catalog import load_device
from ptsim.network import Network, Precision
from ptsim.setting import StepSetting
from ptsim.textfile import write_whole

LADDER = (512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
LADDER_SOURCE = "huggingface/pytorch-image-models"
SETTING = ["model", "image_size", "device", "precision", "memory_format", "optimizer", "batch"]
KEY = [*SETTING, "ran"]


def published() -> pd.DataFrame:
    """Mini-batches that ran, and those that timm's ladder says did not; a row each, with its source."""
    rows = training_table()
    rows = rows[rows.framework.eq("PyTorch") & rows.with_optimizer & ~rows.whole_model_fp16.astype(bool)]
    rows = rows[[*SETTING, "software", "date", "framework", "source", "source_path", "source_rev"]]
    rows = rows.drop_duplicates(SETTING)
    failed = rows[rows.source.str.endswith(LADDER_SOURCE) & rows.batch.isin(LADDER[1:])]
    failed = failed.assign(batch=[LADDER[LADDER.index(batch) - 1] for batch in failed.batch])
    return pd.concat([rows.assign(ran=True), failed.assign(ran=False)], ignore_index=True)


def judged(rows: pd.DataFrame, network: Network) -> pd.DataFrame:
    """The rows with what ptsim says of them."""
    needs = [
        iteration_memory(
            network,
            StepSetting(
                batch=row.batch,
                precision=Precision(row.precision),
                optimizer=row.optimizer,
                memory_format=row.memory_format,
                torch_version=version_of(row),
            ),
            device=load_device(row.device),
        )
        for _, row in rows.iterrows()
    ]
    usable = [usable_bytes(load_device(device)) for device in rows.device]
    fits = [need.device_bytes <= most for need, most in zip(needs, usable, strict=True)]
    return rows.assign(
        peak_bytes=[need.peak_bytes for need in needs],
        device_bytes=[need.device_bytes for need in needs],
        usable_bytes=usable,
        fits=fits,
    )


def check(models: Sequence[str] = ()) -> Iterator[pd.DataFrame]:
    """The judged rows, network by network; of `models` or of all."""
    rows = published()
    for (model, size), part in rows.groupby(["model", "image_size"]):
        if models and model not in models:
            continue
        network = capture_network(build(model), name=model, input_shape=(3, size, size), num_classes=1000)
        yield judged(part, network)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """How often ptsim and the GPU agree; `peak` is the modelled peak as a share of the device's whole memory."""
    share = frame.peak_bytes / [load_device(device).memory_bytes for device in frame.device]
    lines = []
    for ran, part in frame.groupby("ran"):
        right = part.fits == ran
        lines.append(
            {
                "what happened": "ran" if ran else "out of memory",
                "mini-batches": len(part),
                "networks": part.model.nunique(),
                "ptsim agrees": int(right.sum()),
                "peak": f"{share[part.index].min():.2f} to {share[part.index].max():.2f}",
            }
        )
    return pd.DataFrame(lines)


def main() -> None:
    """Print the disagreements and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="torchvision's names; none: every network of the rows")
    parser.add_argument("--csv", type=Path, help="keep the rows in this file, replacing those of the same networks")
    options = parser.parse_args()
    kept = pd.read_csv(options.csv) if options.csv is not None and options.csv.is_file() else pd.DataFrame()
    for part in check(options.models):
        model, size = part.iloc[0].model, part.iloc[0].image_size
        print(model, len(part), "rows", file=sys.stderr, flush=True)
        others = kept[(kept.model != model) | (kept.image_size != size)] if len(kept) else kept
        kept = pd.concat([others, part], ignore_index=True)
        if options.csv is not None:
            write_whole(options.csv, kept.sort_values(KEY).to_csv(index=False))
    frame = kept.reset_index(drop=True)
    wrong = frame[frame.fits != frame.ran].copy()
    wrong["peak_gib"], wrong["needs_gib"], wrong["usable_gib"] = (
        wrong[name] / 2**30 for name in ("peak_bytes", "device_bytes", "usable_bytes")
    )
    print(wrong[[*KEY, "peak_gib", "needs_gib", "usable_gib"]].round(2).to_string(index=False))
    print()
    print(summary(frame).to_string(index=False))


if __name__ == "__main__":
    main()
