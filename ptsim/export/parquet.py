"""Every table of a trace as Parquet files, for notebooks and databases."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ptsim.errors import UsageError
from ptsim.report import frames
from ptsim.textfile import writing_whole
from ptsim.trace.trace import Trace

TABLES = {
    "runs": frames.runs_frame,
    "epochs": frames.costs_frame,
    "reconfigurations": frames.reconfigurations_frame,
    "profiles": frames.profiles_frame,
    "densities": frames.densities_frame,
    "layers": frames.architectures_frame,
}


def write_parquet(trace: Trace, out: Path) -> list[Path]:
    """Write `TABLE.parquet` for every table of `TABLES` into the folder `out`; empty tables keep their columns.

    Parquet's whole numbers have 64 bits: a column with a larger one is written as floating-point numbers.

    Raises:
        UsageError: the folder cannot be written.
    """
    written = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, make in TABLES.items():
            file = out / f"{name}.parquet"
            with writing_whole(file) as content:
                _storable(make([trace])).to_parquet(content, index=False)
            written.append(file)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}") from error
    return written


def _storable(table: pd.DataFrame) -> pd.DataFrame:
    def is_huge(value: object) -> bool:
        return isinstance(value, int) and not -(2**63) <= value < 2**63

    huge = [name for name in table if table[name].dtype == object and table[name].map(is_huge).any()]
    return table.astype(dict.fromkeys(huge, float))
