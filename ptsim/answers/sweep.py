"""Many projections at once: the configurations of a study file (`answers.study`) run on an executor.

Results are appended to a JSON Lines file while they are computed, each under a key that is a digest of everything it
depends on, the cost model itself included. A study that is started again computes only what is missing or has failed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from ptsim.answers.study import Configuration, Study, configurations
from ptsim.errors import FileFormatError, PtsimError, UsageError
from ptsim.hardware.catalog import is_called, load_device
from ptsim.hardware.profile import DeviceProfile
from ptsim.hardware.profile_file import read_device_profile
from ptsim.sim.budget import unlimited
from ptsim.sim.projection import projection_row
from ptsim.sim.run import StepCache, project
from ptsim.textfile import decode_json, drop_torn_line, read_bytes, split_lines, take_lock
from ptsim.trace.io import read_trace
from ptsim.trace.trace import Trace

MANY = 100_000  # configurations from which on a study asks first
_CHUNK = 32  # configurations per task: a task costs about a millisecond, a configuration several
_ROW = b'{"index":'  # how every line of results begins

Whole: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
NotNegative: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1e30)]  # no answer is larger


class _Stored(msgspec.Struct):
    """What every line of results has; a grid adds its options."""

    index: Whole
    key: str
    what_if: str
    trace: str
    cluster: str
    gpus: Annotated[int, msgspec.Meta(ge=1)]
    status: Literal["ok", "failed"]


class _Result(_Stored):
    """What is shown of a row of `projection_row`, checked."""

    tier: str
    total_seconds: NotNegative
    low_seconds: NotNegative
    high_seconds: NotNegative
    compute_seconds: NotNegative
    exposed_communication_seconds: NotNegative
    allreduce_bytes_per_gpu: NotNegative
    peak_memory_bytes: NotNegative
    gpu_hours: NotNegative
    energy_joules: NotNegative | None
    cost_usd: NotNegative | None
    mfu_fraction: NotNegative | None = None


_STORED, _RESULT = msgspec.json.Decoder(_Stored), msgspec.json.Decoder(_Result)


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a study is."""

    done: int
    failed: int
    total: int


def run_study(
    study: Study,
    executor: Executor,
    out: Path,
    *,
    progress: Callable[[Progress], None] | None = None,
    window: int = 64,
    any_length: bool = False,
) -> list[dict[str, Any]]:
    """Compute what is missing, and give all rows in the study's order.

    A row is that of `ptsim.sim.projection.projection_row` with `index`, `key`, `what_if`, the grid's options, and
    `status`: "ok", or "failed" with the reason under `error`. Lines of `out` that belong to other studies stay and are
    ignored.

    Args:
        study: what to compute.
        executor: any `concurrent.futures` executor; a Dask client has one (`client.get_executor()`).
        out: the JSON Lines file that results are appended to.
        progress: called after every task.
        window: tasks that wait in the executor at a time.
        any_length: also simulate what takes more events than `sim.budget` allows.

    Raises:
        FileFormatError: `out` is not such a file.
        UsageError: `out` cannot be written, or another process writes it.
        PtsimError: the executor broke; what was computed is in `out`.
    """
    known = _known_rows(out)
    rows: dict[int, dict[str, Any]] = {}
    total, failed = study.num_configurations, 0

    def missing() -> Iterator[Configuration]:
        for configuration in configurations(study):
            row = known.get(configuration.key)
            if row is None:
                yield configuration
            else:
                rows[configuration.index] = _asked_again(configuration, row)

    with _said_of_a_failure(out, rows, total):
        out.parent.mkdir(parents=True, exist_ok=True)
        todo, compute = _chunks(missing()), project_of_any_length if any_length else project_all
        with out.open("ab") as file, contextlib.closing(_Tasks(executor, compute, todo, window)) as tasks:
            if not take_lock(file):
                raise UsageError(
                    f"{out} is being written by another process",
                    hint="wait for that sweep, or name another file with --out",
                )
            drop_torn_line(out)
            for computed in tasks.finished():
                for row in computed:
                    rows[row["index"]] = row
                    failed += row["status"] == "failed"
                    file.write(msgspec.json.encode(row) + b"\n")
                file.flush()
                if progress is not None:
                    progress(Progress(done=len(rows), failed=failed, total=total))
    return [rows[index] for index in sorted(rows)]


@contextlib.contextmanager
def _said_of_a_failure(out: Path, rows: Sized, total: int) -> Iterator[None]:
    """What keeps a study from its end, as one sentence; `rows` are those that are already in `out`."""
    try:
        yield
    except BrokenExecutor as error:
        raise PtsimError(
            f"a worker process died (out of memory?); {len(rows)} of {total} configurations are in {out}",
            hint="start the study again: it goes on from there; fewer --workers need less memory",
        ) from error
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}") from error


class _Tasks:
    """The configurations of a study on an executor, so many chunks at a time."""

    def __init__(
        self,
        executor: Executor,
        compute: Callable[[Sequence[Configuration]], list[dict[str, Any]]],
        todo: Iterator[tuple[Configuration, ...]],
        window: int,
    ) -> None:
        self._executor, self._compute, self._todo, self._window = executor, compute, todo, window
        self._running: dict[Future[list[dict[str, Any]]], tuple[Configuration, ...]] = {}

    def finished(self) -> Iterator[list[dict[str, Any]]]:
        """The rows of every chunk, as chunks finish.

        Raises:
            BrokenExecutor: a worker died.
        """
        while True:
            for chunk in itertools.islice(self._todo, max(0, self._window - len(self._running))):
                self._submit(chunk)
            if not self._running:
                return
            for future in wait(self._running, return_when=FIRST_COMPLETED).done:
                chunk, error = self._running.pop(future), future.exception()
                if isinstance(error, BrokenExecutor):
                    raise error
                if error is None:
                    yield future.result()
                elif len(chunk) == 1:
                    yield [_failure(chunk[0], f"{type(error).__name__}: {error}")]
                else:  # one of them is to blame: find it
                    for configuration in chunk:
                        self._submit((configuration,))

    def close(self) -> None:
        """Forget what has not begun."""
        for future in self._running:
            future.cancel()

    def _submit(self, chunk: tuple[Configuration, ...]) -> None:
        self._running[self._executor.submit(self._compute, chunk)] = chunk


def die_with_parent() -> None:
    """For worker processes as they start: end when the process that started them ends, killed or not.

    A worker that waits for work would not notice: all workers hold both ends of the queue.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watches the parent").start()


def project_all(chunk: Sequence[Configuration]) -> list[dict[str, Any]]:
    """What a worker does: the rows of some configurations. What the user can mend becomes a failed row.

    Without warnings: of files that are doubted who reads the study has heard, and a row says `complete: false` of a
    torn last line.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return [_row_of(configuration) for configuration in chunk]


def _row_of(configuration: Configuration) -> dict[str, Any]:
    try:
        profile = configuration.profile
        trace, cache = _worker_trace(configuration.trace, configuration.trace_digest, profile)
        projection = project(
            trace,
            configuration.cluster,
            configuration.gpus,
            configuration.options,
            device_profile=None if profile is None else _profile_for(configuration, profile),
            cache=cache,
        )
        return {**_identity(configuration), "status": "ok", **projection_row(projection)}
    except (PtsimError, ValueError) as error:
        return _failure(configuration, str(error))


def project_of_any_length(chunk: Sequence[Configuration]) -> list[dict[str, Any]]:
    """The same without a limit on a simulation's events."""
    with unlimited():
        return project_all(chunk)


@functools.lru_cache(maxsize=8)
def _worker_trace(path: Path, digest: str, profile: tuple[Path, str] | None) -> tuple[Trace, StepCache]:
    """A trace with its cache, kept for the next configuration of the same worker; the digests tell versions apart."""
    return read_trace(path), StepCache()


def _profile_for(configuration: Configuration, profile: tuple[Path, str]) -> DeviceProfile | None:
    """The study's device profile where it is of the configuration's device: what-ifs may name others."""
    read = _worker_profile(*profile)
    named = configuration.options.device
    device = configuration.cluster.gpu if named is None else load_device(named)
    return read if is_called(device, read.device) else None


@functools.lru_cache(maxsize=8)
def _worker_profile(path: Path, digest: str) -> DeviceProfile:
    return read_device_profile(path)


def _identity(configuration: Configuration) -> dict[str, Any]:
    return {"index": configuration.index, "key": configuration.key, **configuration.labels}


def _asked_again(configuration: Configuration, row: dict[str, Any]) -> dict[str, Any]:
    """A stored row in its place in this study, of the files that this study names; what was computed stays."""
    labels = {name: value for name, value in configuration.labels.items() if name != "device"}  # a row has its name
    here = {"index": configuration.index, "trace": str(configuration.trace)}
    return {**_identity(configuration), **row, **labels, **here}


def _failure(configuration: Configuration, error: str) -> dict[str, Any]:
    return {
        **_identity(configuration),
        "status": "failed",
        "error": error,
        "trace": str(configuration.trace),
        "cluster": configuration.cluster.name,
        "gpus": configuration.gpus,
    }


def _chunks(stream: Iterator[Configuration]) -> Iterator[tuple[Configuration, ...]]:
    while chunk := tuple(itertools.islice(stream, _CHUNK)):
        yield chunk


def _known_rows(out: Path) -> dict[str, dict[str, Any]]:
    """Rows that earlier runs computed, by key; failed ones are tried again."""
    if not out.exists():
        return {}
    if not out.is_file():
        raise FileFormatError(out, "is not a regular file; a sweep writes its results into one")
    lines, torn = split_lines(read_bytes(out))
    if not torn.startswith(_ROW[: len(torn)]):
        raise FileFormatError(out, "not a line of sweep results", line=len(lines) + 1)
    known = {}
    for number, line in enumerate(lines, start=1):
        stored = decode_json(out, line, _STORED, line=number, what="a line of sweep results")
        if stored.status == "ok":
            decode_json(out, line, _RESULT, line=number, what="a line of sweep results")
            known[stored.key] = msgspec.json.decode(line)
    return known


def forget(out: Path) -> None:
    """Delete earlier results.

    Raises:
        FileFormatError: `out` holds something else.
        UsageError: `out` cannot be read or deleted.
    """
    try:
        _known_rows(out)
        out.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"{out} cannot be replaced: {error.strerror}") from error
