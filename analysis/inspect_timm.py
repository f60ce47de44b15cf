"""How much of timm's CNNs can be pruned, and is it exact? One row for each family: its smallest network.

    pip install timm
    python analysis/inspect_timm.py --out FILE.csv                    # every family that FILE has no row of
    python analysis/inspect_timm.py --models skresnet18 resnest14d    # these alone

Weights are random. The share is that of the channels that no image and no class fixes.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import ptsim
from ptsim.errors import PtsimError

COLUMNS = ("model", "exact", "share", "prunable_channels", "refused_channels", "seconds", "reason")
FIXED = ("it is the network's input", "it is the network's output")
TRANSFORMERS = ("vit", "deit", "beit", "swin", "cait", "xcit", "eva", "naflex", "mvit", "maxvit", "coat", "crossvit")


def smallest_of_every_family() -> list[str]:
    """Timm's name of the network with the fewest parameters in every module of networks that are not transformers."""
    import timm

    names = []
    for family in timm.list_modules():
        if not family.startswith(TRANSFORMERS):
            models = timm.list_models(module=family)
            sizes = {name: _num_parameters(name) for name in models}
            names += [min(models, key=sizes.__getitem__)] if models else []
    return names


def _num_parameters(name: str) -> int:
    import timm

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name).parameters())


def row_of(name: str) -> dict[str, Any]:
    """Inspect one of timm's networks; what it cannot do is a row as well."""
    import timm

    start = time.perf_counter()
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    row: dict[str, Any] = {"model": name, "exact": False, "share": 0.0}
    try:
        found = ptsim.inspect(model, input_shape=tuple(model.default_cfg["input_size"]))
    except PtsimError as error:
        row["reason"] = error.message
    else:
        refused = Counter[str]()
        for group in found.groups:
            if not group.prunable and group.reason not in FIXED:
                refused[str(group.reason)] += group.width
        row |= {
            "exact": found.exact,
            "share": round(found.prunable_channels / max(1, found.prunable_channels + refused.total()), 3),
            "prunable_channels": found.prunable_channels,
            "refused_channels": refused.total(),
            "reason": refused.most_common(1)[0][0] if refused else "",
        }
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row for each network and how many are exact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=None, help="timm's names; by default one of every family")
    parser.add_argument("--out", type=Path, default=None, help="a CSV file that rows are added to")
    options = parser.parse_args(arguments)
    known: set[str] = set()
    if options.out is not None and options.out.exists():
        with options.out.open(newline="") as file:
            known = {row["model"] for row in csv.DictReader(file)}
    writer = csv.DictWriter(sys.stdout, COLUMNS, restval="")
    writer.writeheader()
    rows = []
    for name in options.models or smallest_of_every_family():
        if name in known:
            continue
        row = row_of(name)
        rows.append(row)
        writer.writerow(row)
        sys.stdout.flush()
        if options.out is not None:
            new = not options.out.exists()
            with options.out.open("a", newline="") as file:
                table = csv.DictWriter(file, COLUMNS, restval="")
                if new:
                    table.writeheader()
                table.writerow(row)
    print(f"{sum(bool(row['exact']) for row in rows)} of {len(rows)} networks are pruned exactly", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
