"""`ptsim report`: the cost-breakdown page of recorded runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ptsim.report.build import write_report


def report(
    *traces: Path,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
) -> None:
    """Write the cost-breakdown page of recorded runs: one self-contained HTML file, its figures and its tables.

    Dense and pruned runs of the same network and data are recognised and compared.

    Args:
        traces: Trace files or run folders.
        out: Folder for index.html, figures/ and tables/.
    """
    print(write_report(traces, out))
