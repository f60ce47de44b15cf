"""Selects the published measurements that the efficiency fit uses: writes traces/public/*.csv from full collections.

    python analysis/trim_public.py FOLDER

FOLDER holds cnn_training.csv, layer_timing.csv and pruned_layer_timing.csv. Kept are rows on GPUs of the catalog
that were not limited by their input pipeline; repeated measurements of one job become their median. The source
columns stay.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pandas as pd

from ptsim.textfile import write_whole

OUT = Path(__file__).parent.parent / "traces" / "public"
DEVICES = {
    "A100-SXM-80GB": "a100-sxm4-80gb",
    "NVIDIA A100-SXM4-80GB": "a100-sxm4-80gb",
    "GeForce GTX 1080 Ti": "gtx-1080-ti",
    "GeForce RTX 3090": "rtx-3090",
    "NVIDIA GeForce RTX 3090": "rtx-3090",
    "NVIDIA H100 80GB HBM3": "h100-sxm5-80gb",
    "TITAN Xp": "titan-xp",
    "Tesla P100-SXM2 (DGX-1)": "p100-sxm2-16gb",
    "Tesla P100-PCIE": "p100-pcie-16gb",
    "Tesla P100": "p100-pcie-16gb",
    "Tesla V100-SXM2-16GB": "v100-sxm2-16gb",
    "Tesla V100 (DGX-1)": "v100-sxm2-16gb",
    "Tesla V100": "v100-sxm2-16gb",
}
SOURCE = ["source", "source_path", "source_rev", "software"]


def training(folder: Path) -> pd.DataFrame:
    """One row per GPU, software, precision, layout, network and mini-batch: seconds of a training step."""
    rows = pd.read_csv(folder / "cnn_training.csv", low_memory=False)
    rows = rows[rows.input_bound.str.startswith("no") & rows.phase.str.startswith("train") & (rows.gpu_count == 1)]
    ampere = rows.gpu_model.str.contains("A100|3090|H100")
    rows = rows.assign(
        device=rows.gpu_model.map(DEVICES),
        framework=rows.framework.str.split().str[0],
        precision=rows.precision.str[:4]
        .map({"FP16": "fp16", "AMP-": "fp16"})
        .fillna("fp32")
        .where(~(rows.precision.str.startswith("FP32") & ampere), "tf32"),
        whole_model_fp16=rows.precision.str.startswith("FP16"),
        memory_format=rows.layout.map({"NCHW": "contiguous", "NHWC": "channels_last"}),
        model=rows.model.str.lower().str.replace("resnet-", "resnet").str.split().str[0],
        with_optimizer=~rows.phase.str.contains("no optimizer"),
        host_copy=rows.input_bound.str.contains("H2D"),
        torch=rows.software.map(_torch_version),
        software=rows.software.str.split("; driver").str[0],
        batch=rows.per_gpu_batch.astype(int),
    )
    keys = ["device", "framework", "torch", "software", "precision", "whole_model_fp16", "memory_format", "model",
            "batch", "with_optimizer", "host_copy"]  # fmt: skip
    grouped = rows.groupby(keys, dropna=False, sort=True)
    table = grouped.agg(
        images_per_s=("images_per_sec", "median"),
        num_runs=("images_per_sec", "size"),
        date=("date", "max"),
        **{column: (column, "first") for column in SOURCE[:3]},
    ).reset_index()
    return table


def layers(folder: Path) -> pd.DataFrame:
    """DeepBench: one convolution or matrix product per row, one pass."""
    rows = pd.read_csv(folder / "layer_timing.csv", low_memory=False)
    rows = rows.assign(
        device=rows.gpu_model.map(DEVICES),
        precision=rows.precision.map({"FP32": "fp32", "Psuedo FP16": "fp16", "FP16 ip, Mixed math": "fp16"}),
        seconds=rows.time_ms / 1e3,
    )
    columns = ["device", "precision", "op", "phase", "batch", "in_c", "in_h", "in_w", "out_c", "kh", "kw", "stride_h",
               "stride_w", "pad_h", "pad_w", "m", "n", "k", "seconds", "algo", *SOURCE]  # fmt: skip
    return rows[rows.device.notna()][columns]


def odd_channels(folder: Path) -> pd.DataFrame:
    """Single convolutions with random channel counts (TensorFlow 1, fp32), forward pass only."""
    rows = pd.read_csv(folder / "pruned_layer_timing.csv", low_memory=False)
    rows = rows[(rows.phase == "forward") & (rows.time_ms > 1.0)]  # below, the framework's own floor shows
    rows = rows.assign(device=rows.gpu_model.map(DEVICES), seconds=rows.time_ms / 1e3)
    columns = ["device", "batch", "in_c", "out_c", "k", "stride", "in_hw", "out_hw", "pad_mode", "seconds", *SOURCE]
    return rows[columns]


def _torch_version(software: str) -> float | None:
    """Minor releases as numbers that sort (1.13 is 1.13, 1.4 is 1.04); the TensorFlow rows have none."""
    match = re.search(r"torch (\d+)\.(\d+)|PyTorch (\d+)\.(\d+)", software)
    if match is None:
        return None
    major, minor = (int(group) for group in match.groups() if group)
    return major + minor / 100


def main() -> None:
    """Write the three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    OUT.mkdir(parents=True, exist_ok=True)
    for name, make in (("training", training), ("layers", layers), ("odd_channels", odd_channels)):
        table = make(folder)
        write_whole(OUT / f"{name}.csv", table.to_csv(index=False))
        print(f"{name}.csv: {len(table)} rows")


if __name__ == "__main__":
    main()
