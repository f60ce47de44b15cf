"""`ptsim calibrate network`: all-reduces of this machine, or of logs, as a cluster that other commands take."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ptsim.cli.common import progress_console
from ptsim.cli.reading import check_output
from ptsim.errors import UsageError
from ptsim.hardware.spec import AllReduceTable, Cluster
from ptsim.textfile import check_writable
from ptsim.units import counted, format_bandwidth, format_bytes, format_seconds

_LEAST_BYTES, _MOST_BYTES = 2**10, 2**34
_UP_TO, _ITERATIONS = 2**26, 20


def network(
    *,
    out: Annotated[Path, Parameter(help="The cluster file to write; --cluster takes it.")],
    nccl_log: Annotated[
        list[Path] | None,
        Parameter(
            consume_multiple=True,
            negative=(),
            help="Output of nccl-tests or rccl-tests, text, JSON or CSV; one file or several.",
        ),
    ] = None,
    nodes: Annotated[int | None, Parameter(help="Number of nodes, for a log that does not state it.")] = None,
    base: Annotated[
        str | None, Parameter(help="Cluster (catalog name or TOML file) that supplies whatever was not measured.")
    ] = None,
    name: Annotated[str | None, Parameter(help="Name of the cluster. Default: the file's name without .toml.")] = None,
    backend: Annotated[str | None, Parameter(help="Live: backend. Default: nccl with GPUs, otherwise gloo.")] = None,
    max_bytes: Annotated[int, Parameter(help="Live: size of the largest message in bytes.")] = _UP_TO,
    iterations: Annotated[int, Parameter(help="Live: number of all-reduces for each message size.")] = _ITERATIONS,
    resume: Annotated[bool, Parameter(help="Live: continue with an existing file.")] = False,
) -> None:
    """Make a cluster file of all-reduce times, from nccl-tests logs or measured live under torchrun."""
    from ptsim.hardware.catalog import check_file_name, load_cluster
    from ptsim.hardware.forms import write_cluster
    from ptsim.hardware.nccl_log import read_nccl_logs, with_nodes
    from ptsim.measure.collectives import calibrated_cluster, tables_from_logs

    check_file_name("cluster", out)
    check_writable(out)
    check_output(out, *(nccl_log or ()), *((Path(base),) if base else ()))
    live = {"--backend": backend is not None, "--max-bytes": max_bytes != _UP_TO, "--resume": resume}
    _refuse_idle_options(nccl_log, nodes, live | {"--iterations": iterations != _ITERATIONS})
    origin = None if base is None else load_cluster(base)
    name = name or out.stem
    if nccl_log:
        per_node = None if origin is None else origin.gpus_per_node
        logs = [with_nodes(log, nodes, per_node) for path in nccl_log for log in read_nccl_logs(path)]
        gpus = sorted({gpu for log in logs for gpu in log.gpus})
        cluster = calibrated_cluster(tables_from_logs(logs), name=name, base=origin, gpus=gpus)
    else:
        if out.is_file() and not resume:
            raise UsageError(f"{out} exists", hint="--resume goes on with it; or choose another file")
        known = load_cluster(out).tables if out.is_file() else ()

        def cluster_of(table: AllReduceTable, gpus: list[str], library: str) -> Cluster:
            return calibrated_cluster([table], name=name, base=origin, gpus=gpus, library=library)

        def keep(table: AllReduceTable, gpus: list[str], library: str) -> None:
            write_cluster(cluster_of(table, gpus, library), out)

        measured = _live(backend, max_bytes, iterations, known[0] if known else None, keep)
        if measured is None:
            return  # not rank 0
        cluster = cluster_of(*measured)
    write_cluster(cluster, out)
    _show(cluster)
    progress_console().print(f"wrote {out}")


def _refuse_idle_options(nccl_log: list[Path] | None, nodes: int | None, live: Mapping[str, bool]) -> None:
    """Refuse what would do nothing: options of a live measurement beside logs, and of logs where there are none.

    Args:
        nccl_log: the logs, if any.
        nodes: what --nodes says.
        live: option of a live measurement → whether it was given.

    Raises:
        UsageError: names the option.
    """
    idle = next((option for option, given in live.items() if given), None)
    if nccl_log and idle is not None:
        raise UsageError(f"{idle} has no effect on --nccl-log; it is for a live measurement")
    if not nccl_log and nodes is not None:
        raise UsageError("--nodes has no effect on a live measurement, whose ranks say where they are")


def _show(cluster: Cluster) -> None:
    """What was measured, a line per table and per straight piece of it."""
    console = progress_console()
    for found in cluster.tables:
        jitter = f"{found.relative_jitter:.1%}" if found.relative_jitter else "unknown"
        console.print(
            f"{counted(found.num_gpus, 'GPU')} on {counted(found.num_nodes, 'node')}: {len(found.size_bytes)} sizes, "
            f"{format_seconds(found.seconds[0])} for {format_bytes(found.size_bytes[0])} to "
            f"{format_seconds(found.seconds[-1])} for {format_bytes(found.size_bytes[-1])}, "
            f"jitter {jitter}; tier measured"
        )
        for line in found.segments:
            rate = format_bandwidth(1 / line.seconds_per_byte) if line.seconds_per_byte else "no growth"
            console.print(f"  from {format_bytes(line.from_bytes)}: {format_seconds(line.latency_s)} + bytes / {rate}")


def _live(
    backend: str | None,
    max_bytes: int,
    iterations: int,
    known: AllReduceTable | None,
    keep: Callable[[AllReduceTable, list[str], str], None],
) -> tuple[AllReduceTable, list[str], str] | None:
    """The table, the GPUs' names and the library; None on ranks other than 0."""
    import torch
    import torch.distributed as dist

    from ptsim.measure.collectives import measure_table
    from ptsim.training.joining import join, place

    if "RANK" not in os.environ and not dist.is_initialized():
        raise UsageError(
            "calibrate network needs --nccl-log, or several processes",
            hint="torchrun --nproc-per-node 4 -m ptsim calibrate network --out FILE.toml",
        )
    if not _LEAST_BYTES <= max_bytes <= _MOST_BYTES:
        raise UsageError(f"--max-bytes {max_bytes}; {_LEAST_BYTES} to {_MOST_BYTES} are possible")
    use = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    for part in use.split(","):  # "cpu:gloo,cuda:nccl"
        if not dist.is_backend_available(part.rpartition(":")[2]):
            raise UsageError(f"--backend {use}: this torch has no backend {part.rpartition(':')[2]!r}")
    library, me = "nccl" if "nccl" in use else "gloo", place()
    gpus = []
    if library == "nccl":
        if not torch.cuda.is_available():
            raise UsageError(f"--backend {use} needs GPUs, and there are none here")
        torch.cuda.set_device(me.local_rank)
        gpus = [torch.cuda.get_device_name()]
    join(me, use, shared={"work": "calibrate network"})
    try:
        sizes = [2**k for k in range(_LEAST_BYTES.bit_length() - 1, max_bytes.bit_length())]
        table = measure_table(
            sizes=sizes, iterations=iterations, known=known, keep=lambda table: keep(table, gpus, library)
        )
        return (table, gpus, library) if dist.get_rank() == 0 else None
    finally:
        dist.destroy_process_group()
