"""`ptsim calibrate network`: all-reduces of this machine, or of logs, as a cluster that other commands take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from ptsim.errors import UsageError
from ptsim.units import format_bytes, format_seconds


def network(
    *,
    out: Annotated[Path, Parameter(help="The cluster file to write; --cluster takes it.")],
    nccl_log: Annotated[
        list[Path] | None,
        Parameter(help="nccl-tests output, text or JSON; repeat it for other GPU counts or further runs."),
    ] = None,
    base: Annotated[
        str | None, Parameter(help="Cluster of the catalog (or file) that says what was not measured.")
    ] = None,
    name: Annotated[str | None, Parameter(help="Name of the cluster; the file's stem otherwise.")] = None,
    backend: Annotated[str | None, Parameter(help="Live: gloo, nccl …; by default nccl with GPUs, else gloo.")] = None,
    max_bytes: Annotated[int, Parameter(help="Live: largest message.")] = 2**26,
    iterations: Annotated[int, Parameter(help="Live: all-reduces per size.")] = 20,
) -> None:
    """All-reduce times from nccl-tests logs, or live from torch.distributed under torchrun, as a cluster file."""
    from ptsim.hardware.catalog import check_file_name, load_cluster, write_cluster
    from ptsim.hardware.nccl_log import read_nccl_logs
    from ptsim.measure.network import calibrated_cluster, tables_from_logs

    check_file_name("cluster", out)
    origin = load_cluster(base) if base else None
    name = name or out.stem
    if nccl_log:
        logs = [log for path in nccl_log for log in read_nccl_logs(path)]
        gpus = sorted({gpu for log in logs for gpu in log.gpus})
        cluster = calibrated_cluster(tables_from_logs(logs), name=name, base=origin, gpus=gpus)
    else:
        measured = _live(backend, max_bytes, iterations)
        if measured is None:
            return  # not rank 0
        table, gpus, library = measured
        cluster = calibrated_cluster([table], name=name, base=origin, gpus=gpus, library=library)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_cluster(cluster, out)
    console = Console(stderr=True)
    for found in cluster.tables:
        console.print(
            f"{found.num_gpus} GPUs on {found.num_nodes} node(s): {len(found.size_bytes)} sizes, "
            f"{format_seconds(found.seconds[0])} for {format_bytes(found.size_bytes[0])} to "
            f"{format_seconds(found.seconds[-1])} for {format_bytes(found.size_bytes[-1])}, "
            f"jitter {found.relative_jitter:.1%}"
        )
        for line in found.segments:
            rate = f"{1 / line.seconds_per_byte / 1e9:.4g} GB/s" if line.seconds_per_byte else "no growth"
            console.print(f"  from {format_bytes(line.from_bytes)}: {format_seconds(line.latency_s)} + bytes / {rate}")
    console.print(f"wrote {out}")


def _live(backend: str | None, max_bytes: int, iterations: int):  # type: ignore[no-untyped-def] # its types need torch
    import torch
    import torch.distributed as dist

    from ptsim.measure.network import DEFAULT_SIZES, measure_table

    if "RANK" not in os.environ and not dist.is_initialized():
        raise UsageError(
            "calibrate network needs --nccl-log, or several processes",
            hint="torchrun --nproc-per-node 4 -m ptsim calibrate network --out FILE.toml",
        )
    if max_bytes < 1024:
        raise UsageError(f"--max-bytes {max_bytes}; at least 1024 is needed")
    use = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    gpus = []
    if "nccl" in use:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        gpus = [torch.cuda.get_device_name()]
    dist.init_process_group(use)
    try:
        table = measure_table(sizes=[size for size in DEFAULT_SIZES if size <= max_bytes], iterations=iterations)
        return (table, gpus, "nccl" if "nccl" in use else "gloo") if dist.get_rank() == 0 else None
    finally:
        dist.destroy_process_group()
