"""How a trace is read and written: JSON Lines, appended and flushed, checked on the way in.

A line that was being written when the run died is dropped with a warning; any other damage is an error that names
file, line and field.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import msgspec

from ptsim.errors import FileFormatError, NewerVersionError, UsageError
from ptsim.network import Network
from ptsim.textfile import decode_json, drop_torn_line, read_lines, take_lock, write_whole
from ptsim.trace.checks import order_problem, record_problem, tag_of
from ptsim.trace.schema import (
    SCHEMA_VERSION,
    AnyRecord,
    Architecture,
    Draw,
    End,
    Epoch,
    PenaltyCosts,
    Profile,
    Reconfiguration,
    Run,
)
from ptsim.trace.trace import Trace

_DECODER: msgspec.json.Decoder[AnyRecord] = msgspec.json.Decoder(AnyRecord)
_ENCODER = msgspec.json.Encoder()
MOST_BYTES = 512 * 2**20  # of a trace: 1000 epochs of a network of 40,000 channels
MOST_LINE_BYTES = 64 * 2**20  # of a record
TRACE, CONFIG = "trace.jsonl", "config.toml"  # in a run's folder; only `ptsim train` writes the second
_EXPECTED = "expected a trace whose first line is a run record"


def trace_path(path: str | Path) -> Path:
    """The trace file that `path` means: the file itself, or `trace.jsonl` in a run folder.

    Raises:
        FileFormatError: there is no such file.
    """
    path = Path(path)
    file = path / TRACE if os.path.isdir(path) else path
    if not os.path.exists(file):
        raise FileFormatError(path, "no trace here; expected a trace.jsonl file or a run folder that holds one")
    return file


def run_folder(path: str | Path) -> Path:
    """The folder of a run of `ptsim train` that is there.

    Raises:
        UsageError: there is no such run.
        FileFormatError: a file is in its place.
    """
    folder = Path(path)
    if os.path.isfile(folder):
        raise FileFormatError(folder, "found a file, expected a run folder")
    if not os.path.isfile(folder / CONFIG):
        if not os.path.isfile(folder / TRACE):
            raise UsageError(f"{folder} holds no run (no {CONFIG})")
        raise UsageError(
            f"{folder} holds no run of ptsim train (no {CONFIG}), only a trace, and a trace has no weights",
            hint="the loop that recorded it has its network: PruneTrain.state_dict(), ptsim.load_pruned",
        )
    return folder


def trace_name(path: str | Path) -> str:
    """What to call the run of a trace file: its folder's name where the file is a run's trace.jsonl, else its own."""
    path = Path(path)
    return path.parent.name or str(path) if path.name == TRACE else path.stem


def read_records(path: str | Path) -> Iterator[tuple[int, AnyRecord]]:
    """Line numbers and records of a trace, checked one by one; a torn last line is dropped with a `UserWarning`.

    The file is read line by line; one of more than 512 MiB is refused.

    Raises:
        FileFormatError: a line that is not a record; says line, field, found and expected. Or too large a file.
        NewerVersionError: written by a newer schema version.
    """
    return _records(trace_path(path), lambda problem: warnings.warn(problem, stacklevel=3))


def _records(file: Path, torn: Callable[[str], object]) -> Iterator[tuple[int, AnyRecord]]:
    """As `read_records`; `torn` is told of an incomplete last line."""
    number = 0
    for number, line in enumerate(read_lines(file, most=MOST_BYTES, most_of_line=MOST_LINE_BYTES), start=1):
        if not line.endswith(b"\n"):
            if number == 1:
                raise FileFormatError(file, f"found no complete line, {_EXPECTED}")
            torn(f"{file}:{number}: dropped an incomplete last line ({len(line)} bytes); the run was cut off here")
            return
        if number == 1:
            _check_version(file, line)
        yield number, decode_json(file, line, _DECODER, line=number)
    if number == 0:
        raise FileFormatError(file, f"found an empty file, {_EXPECTED}")


def read_trace(path: str | Path) -> Trace:
    """Read and check a whole trace from a file or a run folder.

    Raises:
        FileFormatError: a broken line, records out of order, or a record that cannot be true (`checks.py`).
        NewerVersionError: written by a newer schema version.
    """
    file = trace_path(path)
    run: Run | None = None
    end: End | None = None
    networks: dict[str, Network] = {}
    epochs: list[Epoch] = []
    reconfigurations: list[Reconfiguration] = []
    profiles: list[Profile] = []
    draws: list[Draw] = []
    penalties: dict[str, PenaltyCosts] = {}
    torn: list[str] = []
    records = list(_records(file, torn.append))
    for what in torn:
        warnings.warn(what, stacklevel=2)
    for number, record in records:
        problem = order_problem(record, run=run, epochs=epochs, ended=end is not None)
        if (problem := problem or record_problem(record, networks)) is not None:
            raise FileFormatError(file, problem, line=number)
        match record:
            case Run():
                run = record
            case Architecture():
                networks[record.id] = record.network
                if record.penalty is not None:
                    penalties[record.id] = record.penalty
            case Profile():
                profiles.append(record)
            case Epoch():
                epochs.append(record)
            case Reconfiguration():
                reconfigurations.append(record)
            case Draw():
                draws.append(record)
            case End():
                end = record
    assert run is not None  # read_records yields at least one record, and the loop refuses any other first one
    return Trace(
        path=file,
        run=run,
        networks=networks,
        epochs=tuple(epochs),
        reconfigurations=tuple(reconfigurations),
        profiles=tuple(profiles),
        end=end,
        draws=tuple(draws),
        penalties=penalties,
        truncated=bool(torn),
    )


def records_of(trace: Trace) -> Iterator[AnyRecord]:
    """The records of a trace in the order of a file: every architecture in front of the first record that names it.

    They are of today's schema, whichever the trace was read from.
    """
    yield msgspec.structs.replace(trace.run, schema_version=SCHEMA_VERSION)
    written: set[str] = set()

    def architectures(*names: str) -> Iterator[Architecture]:
        for name in names:
            if name not in written:
                written.add(name)
                yield Architecture(id=name, network=trace.networks[name], penalty=trace.penalties.get(name))

    events: dict[int, list[Reconfiguration]] = {}  # two of an epoch: pruning, and what a stranger changed after it
    for event in trace.reconfigurations:
        events.setdefault(event.epoch, []).append(event)
    profiled: set[str] = set()
    for epoch in trace.epochs:
        yield from architectures(epoch.architecture)
        if epoch.architecture not in profiled:
            profiled.add(epoch.architecture)
            yield from (profile for profile in trace.profiles if profile.architecture == epoch.architecture)
        yield epoch
        for event in events.get(epoch.epoch, ()):
            yield from architectures(event.before, event.after)
            yield event
    yield from architectures(*trace.networks)
    yield from (profile for profile in trace.profiles if profile.architecture not in profiled)
    yield from trace.draws
    if trace.end is not None:
        yield trace.end


def write_trace(path: str | Path, trace: Trace) -> Path:
    """Write a whole trace as a new file and return its path; a file that is there already is replaced as a whole."""
    file = Path(path)
    write_whole(file, b"".join(_ENCODER.encode(record) + b"\n" for record in records_of(trace)))
    return file


_FOUND = {errno.ELOOP: "a link", errno.ENOENT: "nothing", errno.EISDIR: "a folder"}


class TraceWriter:
    """Appends records to a trace; each is on disk when `write` returns, so a crash loses at most one line.

    A trace of an older schema that is gone on with becomes one of today's: new lines have today's fields, and what
    older ones lack has the meaning of its default.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        append: bool = False,
        keep_bytes: int | None = None,
        keep_sha256: str | None = None,
    ) -> None:
        """Open `path` for a new trace, or with `append` to go on after the last complete line.

        Args:
            path: the file.
            append: go on with an existing trace.
            keep_bytes: with `append`, cut the trace to this length, which a `num_bytes` once told; checked before.
            keep_sha256: what `sha256` told at that length.

        Raises:
            FileExistsError: a new trace is asked for where one is.
            FileFormatError: the trace to go on with is no regular file, is too short, or is another run's.
            UsageError: another process writes it.
        """
        self.path = Path(path)
        # In append mode whatever is written goes to the end of the file, also after a cut. Unbuffered: nothing of a
        # failed line may follow later.
        flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | (os.O_CREAT if keep_bytes is None else 0)
        try:
            descriptor = os.open(self.path, flags if append else flags | os.O_EXCL, 0o666)
        except OSError as error:
            if append and error.errno in _FOUND:
                found = f"found {_FOUND[error.errno]}, expected the trace of this run"
                nothing = error.errno == errno.ENOENT
                hint = (
                    "go on in the folder of the run that the checkpoint is of, or copy its trace" if nothing else None
                )
                raise FileFormatError(self.path, found, hint=hint) from error
            raise
        self._file = os.fdopen(descriptor, "ab", buffering=0)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            self._file.close()
            raise FileFormatError(self.path, "found a pipe or a device, expected the trace of this run")
        if not take_lock(descriptor):
            self._file.close()
            raise UsageError(
                f"{self.path} is being written by another process",
                hint="wait for that run, or end it; in this program: close() its pruner or recorder",
            )
        if append and keep_bytes is None:  # not before the lock: another process may be writing the line
            drop_torn_line(self.path)
        content = os.pread(descriptor, os.fstat(descriptor).st_size, 0) if append else b""
        if keep_bytes is not None:
            content = self._kept(content, keep_bytes, keep_sha256)
            os.ftruncate(descriptor, keep_bytes)
        if _version_of(content) < SCHEMA_VERSION:
            content = self._brought_up_to_date(content)
        self.num_bytes = len(content)
        self._hash = hashlib.sha256(content)

    @property
    def sha256(self) -> str:
        """Digest of the whole trace so far, in hexadecimal digits."""
        return self._hash.hexdigest()

    def _kept(self, content: bytes, keep_bytes: int, keep_sha256: str | None) -> bytes:
        """The part of the trace that stays, checked; its head may be newer than the checkpoint."""
        problem = None
        kept = content[:keep_bytes]
        older = (_of_version(kept, version) for version in range(_version_of(kept), 0, -1))
        if len(content) < keep_bytes:
            problem = f"shorter than the {keep_bytes} bytes that the checkpoint tells of"
        elif keep_sha256 is not None and all(hashlib.sha256(one).hexdigest() != keep_sha256 for one in older):
            problem = "this is the trace of another run than the checkpoint's, or it was edited"
        elif not kept.endswith(b"\n"):
            problem = f"no line ends after {keep_bytes} bytes, where the checkpoint says that one does"
        if problem is not None:
            self._file.close()
            raise FileFormatError(self.path, problem)
        return kept

    def _brought_up_to_date(self, content: bytes) -> bytes:
        """The content with today's version in its head, in the file too: one byte, which a kill leaves whole."""
        newer = _of_version(content, SCHEMA_VERSION)
        assert len(newer) == len(content), "versions have one digit"
        with open(os.open(self.path, os.O_WRONLY | os.O_NOFOLLOW), "wb", buffering=0) as head:  # not in append mode
            head.write(newer[: newer.index(b"\n") + 1])
            os.fsync(head.fileno())
        return newer

    def write(self, record: AnyRecord) -> None:
        """Append one record as one line and flush it to the disk, or leave the file as it was, by an interrupt, too.

        Raises:
            ValueError: the record could not be read back, for instance because a loss is not finite.
            OSError: the disk is full.
        """
        line = _ENCODER.encode(record)
        try:
            _DECODER.decode(line)
        except msgspec.ValidationError as error:
            raise ValueError(f"no reader would accept the {tag_of(record)} record: {error}") from error
        for place in _not_finite(msgspec.to_builtins(record)):  # JSON would say null, which means "not measured"
            raise ValueError(f"{place} of the {tag_of(record)} record is not finite")
        rest = memoryview(line + b"\n")
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except BaseException:
            os.ftruncate(self._file.fileno(), self.num_bytes)
            raise
        self.num_bytes += len(line) + 1
        self._hash.update(line + b"\n")

    def close(self) -> None:
        """Close the file; writing afterwards is an error."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _not_finite(value: object, place: str = "") -> Iterator[str]:
    """The places of numbers that are NaN or infinite."""
    if isinstance(value, float):
        if not math.isfinite(value):
            yield place
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _not_finite(part, f"{place}.{name}" if place else str(name))
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _not_finite(part, f"{place}[{index}]")


_HEAD = re.compile(rb'\A(\{"record":"run","schema_version":)([1-9])(?=,)')  # as `TraceWriter` writes it


def _version_of(content: bytes) -> int:
    """The schema version in a trace's head; today's where there is none, so that it is left alone."""
    head = _HEAD.match(content)
    return int(head[2]) if head is not None else SCHEMA_VERSION


def _of_version(content: bytes, version: int) -> bytes:
    """The trace with another version in its head."""
    return _HEAD.sub(rb"\g<1>%d" % version, content, count=1)


class _FirstLine(msgspec.Struct):
    record: str = ""
    schema_version: int | None = None


_FIRST_DECODER = msgspec.json.Decoder(_FirstLine)


def _check_version(file: Path, first_line: bytes) -> None:
    """Refuse foreign and newer files. The one place where older versions will be converted."""
    first = decode_json(file, first_line, _FIRST_DECODER, line=1, what="a ptsim trace")
    if first.record != "run" or first.schema_version is None:
        raise FileFormatError(file, "not a ptsim trace: expected a run record with a schema_version", line=1)
    if first.schema_version > SCHEMA_VERSION:
        raise NewerVersionError(
            file,
            f"schema version {first.schema_version} is newer than the {SCHEMA_VERSION} that this ptsim reads",
            line=1,
            hint="update ptsim",
        )
    if first.schema_version < 1:
        raise FileFormatError(file, f"field 'schema_version' is {first.schema_version}, expected at least 1", line=1)
