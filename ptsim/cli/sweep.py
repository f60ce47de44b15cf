"""`ptsim sweep`: many projections in parallel, from a study file."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Collection, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from ptsim.answers.study import read_study
from ptsim.answers.sweep import MANY, Progress, die_with_parent, forget, run_study
from ptsim.cli.common import mfu_cell, print_json, progress_console, say, stdout_console
from ptsim.cli.options import Json
from ptsim.errors import UsageError
from ptsim.trace.io import trace_name
from ptsim.trace.trace import planned_mark
from ptsim.units import format_seconds, interval

SHOWN = 200  # rows of the table; all are in the file


def sweep(
    study: Path,
    /,
    *,
    out: Path | None = None,
    workers: int | None = None,
    dask: str | None = None,
    fresh: bool = False,
    yes: bool = False,
    json: Annotated[Json, Parameter(help="Print the rows as one JSON document.")] = False,
) -> int:
    """Many projections in parallel, from a study file.

    A study that is started again computes only what is missing or has failed.

    Args:
        study: TOML file with the traces, clusters, gpus, what_ifs, options and grid of the study.
        out: JSON Lines file to which each result is added at once. Default: STUDY.results.jsonl beside the study.
        workers: Number of processes on this machine. Default: one per core.
        dask: Run on a Dask cluster: its scheduler's address (tcp://host:port), or "local" for one on this machine.
        fresh: Delete the file of results first, with all that it holds.
        yes: Run the study even if it expands to very many configurations, or its simulations to very many events.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"workers is {workers}, expected at least 1")
    if workers is not None and dask not in (None, "local"):
        raise UsageError("--workers has no effect on a Dask cluster that runs already, which has workers of its own")
    read = read_study(study)
    total = read.num_configurations
    if total > MANY and not yes:
        raise UsageError(f"{study} expands to {total:,} configurations", hint="--yes runs them all the same")
    results = out or study.with_suffix(".results.jsonl")
    if fresh:
        forget(results)
    console = progress_console()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console) as bar, _executor(workers, dask) as executor:
        task = bar.add_task(study.name, total=total)

        def show(progress: Progress) -> None:
            failed = f", {progress.failed} failed" if progress.failed else ""
            bar.update(task, completed=progress.done, description=f"{study.name}{failed}")

        rows = run_study(read, executor, results, progress=show, any_length=yes)
        bar.update(task, completed=len(rows))
    failures = [row for row in rows if row["status"] == "failed"]
    for row in failures[:10]:
        message = f"failed: {row['what_if']}, {row['trace']}, {row['cluster']}, {row['gpus']} GPUs: {row['error']}"
        say(message)
    if len(failures) > 10:
        say(f"failed: {len(failures) - 10} more")
    say(f"{len(rows) - len(failures)} of {len(rows)} configurations: {results}")
    if json:
        print_json(rows)
    else:
        _print_table([row for row in rows if row["status"] == "ok"], read.grid)
    return 1 if failures and len(failures) == len(rows) else 0


@contextmanager
def _executor(workers: int | None, dask: str | None) -> Iterator[Executor]:
    """Processes on this machine, or a Dask cluster."""
    if dask is None:
        # "spawn": a worker starts clean and does not inherit this process's threads
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context, initializer=die_with_parent) as pool:
            yield pool
        return
    try:
        distributed: Any = importlib.import_module("distributed")  # an extra, and untyped
    except ImportError as error:
        raise UsageError("dask needs the package distributed", hint="pip install 'ptsim[dask]'") from error
    try:
        if dask == "local":
            client = distributed.Client(n_workers=workers or os.cpu_count(), threads_per_worker=1)
        else:
            client = distributed.Client(dask, timeout="10s")
    except (OSError, ValueError) as error:
        raise UsageError(f"no Dask scheduler at {dask!r}: {error}") from error
    with client:
        yield client.get_executor()


def _print_table(rows: list[dict[str, Any]], options: Collection[str]) -> None:
    """The rows, with a column for each of the grid's options."""
    console = stdout_console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("what if", *(name.replace("_", " ") for name in options), "trace", "cluster"):
        table.add_column(column, overflow="fold")
    for column in ("GPUs", "time", "90 % interval", "MFU", "tier"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows[:SHOWN]:
        table.add_row(
            row["what_if"],
            *(str(row[name]) for name in options),
            planned_mark(row.get("origin", "recorded")) + trace_name(row["trace"]),
            row["cluster"],
            f"{row['gpus']:,}",
            format_seconds(row["total_seconds"]),
            interval(format_seconds(row["low_seconds"]), format_seconds(row["high_seconds"])),
            mfu_cell(row.get("mfu_fraction")),
            row["tier"],
        )
    console.print(table)
    if len(rows) > SHOWN:
        console.print(f"… and {len(rows) - SHOWN} more rows in the file")
