"""`ptsim allreduce`: the time of one all-reduce, and what it is based on."""

from __future__ import annotations

import math
from typing import Annotated

from cyclopts import Parameter

from ptsim.cli.common import print_json, stdout_console
from ptsim.costs.collectives import Choice, all_reduce, nodes_for
from ptsim.errors import UsageError
from ptsim.hardware.catalog import load_cluster
from ptsim.units import format_bytes, format_seconds, parse_quantity


def allreduce(
    *,
    cluster: Annotated[str, Parameter(help="Catalog name or TOML file (ptsim clusters lists the catalog).")],
    gpus: Annotated[int, Parameter(help="GPUs that take part; they fill nodes one after the other.")],
    bytes_: Annotated[str, Parameter(name="--bytes", help="Message size: bytes, or with a unit (25MiB).")],
    algorithm: Annotated[
        Choice, Parameter(help="Ask for one algorithm, by topology; auto prefers measurements.")
    ] = "auto",
    json: Annotated[bool, Parameter(help="One JSON document.")] = False,
) -> None:
    """The time of one all-reduce on a cluster: measured table, scaled table or topology, whichever is there."""
    size = _parse_bytes(bytes_)
    place = load_cluster(cluster)
    result = all_reduce(size, place, gpus, algorithm=algorithm)
    bus = result.wire_bytes_per_gpu / result.seconds if result.seconds else 0.0
    if json:
        print_json(
            {
                "seconds": result.seconds,
                "low_seconds": result.low_s,
                "high_seconds": result.high_s,
                "algorithm": result.algorithm,
                "tier": result.tier,
                "bus_bandwidth_bytes_per_s": bus,
                "wire_bytes_per_gpu": result.wire_bytes_per_gpu,
                "bytes": size,
                "cluster": place.name,
                "gpus": gpus,
                "nodes": nodes_for(place, gpus),
            }
        )
        return
    console = stdout_console()
    console.print(
        f"{format_seconds(result.seconds)} ({format_seconds(result.low_s)} to {format_seconds(result.high_s)}) "
        f"for {format_bytes(size)} over {gpus} GPUs on {nodes_for(place, gpus)} node(s) of {place.name}"
    )
    console.print(
        f"{result.algorithm}, tier {result.tier}; {format_bytes(result.wire_bytes_per_gpu)} sent per GPU, "
        f"{bus / 1e9:.4g} GB/s bus bandwidth"
    )


def _parse_bytes(text: str) -> int:
    try:
        size = float(text) if text.replace(".", "", 1).lstrip("-").isdigit() else parse_quantity(text, "bytes")
    except ValueError as error:
        raise UsageError(f"--bytes {error}") from error
    if not math.isfinite(size) or size < 0 or size != int(size):
        raise UsageError(f"--bytes {text}: a message is a whole, non-negative number of bytes")
    return int(size)
