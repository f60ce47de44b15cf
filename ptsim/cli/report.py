"""`ptsim report`: the cost-breakdown page of recorded runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ptsim.cli.common import print_json
from ptsim.cli.simulate import parse_gpus
from ptsim.report.build import make_report, summary, write


def report(
    *traces: Path,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    cluster: str | None = None,
    gpus: str | None = None,
    price: float | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Write the cost-breakdown page of recorded runs: one self-contained HTML file, its figures and its tables.

    Dense and pruned runs of the same network and data are recognised and compared.

    Args:
        traces: Trace files or run folders.
        out: Folder for index.html, figures/ and tables/.
        cluster: Catalog name or TOML file; left out, a catalog cluster of the recording device.
        gpus: Cluster sizes, such as 1,8,64; left out, powers of two up to eight nodes.
        price: USD per GPU-hour; left out, the cluster's, and no money where that has none.
        json: Print one JSON document.
    """
    made = make_report(
        traces, cluster=cluster, gpus=None if gpus is None else parse_gpus(gpus), price_usd_per_gpu_hour=price
    )
    page = write(made, out)
    if json:
        print_json({"report": str(page), **summary(made)})
        return
    print(made.answer.headline)
    print(page)
