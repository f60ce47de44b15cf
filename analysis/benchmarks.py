"""How do the benchmarks show what they measured, and keep it? One line a figure; one row of a CSV file with `--csv`."""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ptsim.textfile import write_whole


class Figure(NamedTuple):
    """One measured figure: what it is, its value and the unit, which is empty for a ratio."""

    figure: str
    value: float
    unit: str


def add_option(parser: argparse.ArgumentParser) -> None:
    """The option `--csv`."""
    parser.add_argument(
        "--csv", type=Path, help="also keep the figures in this file, in the place of those of an earlier call"
    )


def tell(benchmark: str, figures: Sequence[Figure], path: Path | None) -> None:
    """Print the figures, and write them into `path` beside those of other benchmarks."""
    for figure, value, unit in figures:
        print(f"{figure:64} {value:10.4g} {unit}".rstrip())
    if path is None:
        return
    import pandas as pd  # not above: the memory of a process that imports this module is measured

    made = {"date": time.strftime("%F", time.gmtime()), "torch": importlib.metadata.version("torch")}
    rows = pd.DataFrame([{"benchmark": benchmark} | figure._asdict() | made for figure in figures])
    if path.exists():
        kept = pd.read_csv(path)
        rows = pd.concat([kept[kept.benchmark != benchmark], rows])
    write_whole(path, rows.sort_values("benchmark", kind="stable").to_csv(index=False))
