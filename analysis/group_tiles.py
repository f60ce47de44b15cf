"""Do groups of a convolution share tiles? Steps and inference of pycls's networks beside both answers.

    python analysis/group_tiles.py

By the channels of a group: how much longer inference of 64 images on a V100, and a training step of 8, were measured
than predicted if groups share tiles, and if they do not (as ptsim has it). Constants are what ptsim ships in either
case. Inference is predicted as the forward pass with BatchNorm as one element-wise kernel, without the host.
"""

from __future__ import annotations

import argparse

import msgspec
import numpy as np
import pandas as pd
from fit_scaling import cases
from public_rows import PUBLIC, PYCLS, many_table, network_name, networks, setting_of

from ptsim.costs.datasheet import chip_of, device_factor, kernel_seconds, load_fit
from ptsim.costs.kernels import BATCH_NORM_FORWARD, Kernels, Pass, Work, network_kernels
from ptsim.costs.scaling import load_scaling
from ptsim.hardware.catalog import load_device
from ptsim.network import Precision

CHANNELS = "channels of a group"
CLASSES = {0: "no groups", 1: "4", 8: "8", 16: "16 and 24", 25: "40 to 72", 80: "112 and more", 1000: ""}


def of_inference(kernels: Kernels) -> Kernels:
    """The kernels with those of BatchNorm as in inference, where statistics are given: one reads and writes once.

    Only those of the forward pass mean anything then.
    """
    norm = kernels.work == Work.NORM
    return msgspec.structs.replace(
        kernels,
        work=np.where(norm, Work.STREAM, kernels.work),
        blocks=np.where(norm, np.inf, kernels.blocks),
        moved_bytes=kernels.moved_bytes * np.where(norm, 2 / BATCH_NORM_FORWARD, 1),
    )


def kernels_s(row: pd.Series, *, shared: bool, inference: bool) -> float:
    """Seconds that a row's kernels are predicted to take if groups share tiles, or do not."""
    fit, device = load_fit(), load_device(row.device)
    kernels = network_kernels(networks()[network_name(row)], setting_of(row), tensor_cores=False)
    if inference:
        kernels = of_inference(kernels)
    if shared:
        kernels = msgspec.structs.replace(kernels, lone_groups=np.zeros_like(kernels.lone_groups))
    seconds = kernel_seconds(kernels, chip_of(device, Precision(row.precision)), fit.efficiency)
    if inference:
        seconds = seconds[kernels.step == Pass.FORWARD]
    return float(seconds.sum()) * (device_factor(device, fit) or 1.0)


def inference() -> pd.DataFrame:
    """One row per network: measured over predicted time of inference, either way."""
    table = pd.read_csv(PUBLIC / "inference.csv").assign(optimizer="sgd")
    return _table(table, [(row.milliseconds / 1e3, 0.0) for row in table.itertuples()], inference=True)


def training() -> pd.DataFrame:
    """The same of training steps."""
    table = pd.concat([many_table(), many_table("training_unseen")], ignore_index=True)
    table = table[table.source == PYCLS]
    scaling = load_scaling()
    others = [
        (case.seconds, case.predict(scaling, as_alone=False) - kernels_s(row, shared=False, inference=False))
        for (_, row), case in zip(table.iterrows(), cases(table=table), strict=True)
    ]
    return _table(table, others, inference=False)


def _table(table: pd.DataFrame, others: list[tuple[float, float]], *, inference: bool) -> pd.DataFrame:
    """Of rows with the seconds measured, and those predicted besides the kernels."""
    lines = []
    for (_, row), (seconds, beside_s) in zip(table.iterrows(), others, strict=True):
        layers = networks()[network_name(row)].layers
        widths = [layer.in_channels // layer.groups for layer in layers if layer.groups > 1 and not layer.is_depthwise]
        ways = {"shared": True, "own": False}
        predicted = {name: kernels_s(row, shared=way, inference=inference) + beside_s for name, way in ways.items()}
        ratios = {name: seconds / value for name, value in predicted.items()}
        lines.append({"model": row.model, CHANNELS: min(widths, default=0), **ratios})
    return pd.DataFrame(lines)


def medians(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Medians by the channels of a group, as the page has them."""
    found = {}
    for name, table in tables.items():
        groups = table.groupby(
            pd.cut(table[CHANNELS], list(CLASSES), right=False, labels=list(CLASSES.values())[:-1]), observed=True
        )
        found[f"{name}: networks"] = groups.size()
        for column, words in {"shared": "tiles shared", "own": "own tiles"}.items():
            found[f"{name}: {words}"] = groups[column].median().round(2)
    return pd.DataFrame(found).rename_axis(CHANNELS).reset_index()


def main() -> None:
    """Print the ratios of every network, and their medians by the channels of a group."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    tables = {"inference": inference(), "training": training()}
    for name, table in tables.items():
        print(f"{name}: measured over predicted time, tiles shared by groups or each group's own")
        print(table.round(2).to_string(index=False))
    print(medians(tables).to_string(index=False))


if __name__ == "__main__":
    main()
