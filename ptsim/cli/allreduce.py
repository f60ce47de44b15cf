"""`ptsim allreduce`: the time of one all-reduce, and what it is based on."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from ptsim.cli.common import print_json, stdout_console
from ptsim.cli.options import Json
from ptsim.cli.reading import parse_bytes
from ptsim.costs.collectives import all_reduce, nodes_for
from ptsim.hardware.catalog import load_cluster
from ptsim.units import counted, format_bandwidth, format_bytes, format_seconds, interval


def allreduce(
    *,
    cluster: Annotated[str, Parameter(help="Cluster: catalog name (see ptsim clusters) or TOML file.")],
    gpus: Annotated[int, Parameter(help="Number of GPUs that take part. They fill one node after the other.")],
    bytes_: Annotated[
        str, Parameter(name="--bytes", help="Message size in bytes, or with a unit: 25MiB, or 128M as in nccl-tests.")
    ],
    algorithm: Annotated[
        str,
        Parameter(
            help="Algorithm to compute from the topology: ring, tree, hierarchical or one of another package. "
            "auto prefers measurements."
        ),
    ] = "auto",
    json: Json = False,
) -> None:
    """The time of one all-reduce on a cluster: measured table, scaled table or topology, whichever is there."""
    size = parse_bytes("--bytes", bytes_)
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
        f"{format_seconds(result.seconds)} ({interval(format_seconds(result.low_s), format_seconds(result.high_s))}) "
        f"for {format_bytes(size)} over {counted(gpus, 'GPU')} "
        f"on {counted(nodes_for(place, gpus), 'node')} of {place.name}"
    )
    console.print(
        f"{result.algorithm}, tier {result.tier}; {format_bytes(result.wire_bytes_per_gpu)} sent per GPU, "
        f"{format_bandwidth(bus)} bus bandwidth"
    )
