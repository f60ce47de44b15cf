"""The trace of a run as it is written, and what it says of this machine's software. Only rank 0 has one."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Self

import msgspec
import torch

import ptsim
from ptsim.criteria import told_penalty
from ptsim.errors import TrainingError, UsageError
from ptsim.network import Network
from ptsim.trace.io import TRACE, TraceWriter, read_trace
from ptsim.trace.schema import AnyRecord, Architecture, End, Epoch, PenaltyCosts, Profile, Run
from ptsim.training.checkpoint import writing
from ptsim.training.loggers import Logger, Mirror


def checked_folder(record: str | os.PathLike[str] | None) -> Path | None:
    """The folder for the trace; None where nothing is to be recorded.

    Raises:
        UsageError: it is no path.
    """
    if record is not None and not isinstance(record, str | os.PathLike):
        raise UsageError(f"record is {record!r}, expected the folder for the trace", hint='record="runs/mine"')
    return None if record is None else Path(record)


def refuse_trace(path: Path) -> None:
    """Make sure that no run has written its trace there.

    Raises:
        UsageError: one has.
    """
    if path.exists() and path.stat().st_size:
        raise UsageError(
            f"{path.parent} holds the trace of another run",
            hint="choose another folder; a PruneTrain goes on with that run after load_state_dict, called before the "
            "first step; a state from within its first epoch records that one anew, once the old trace is moved away",
        )


class RunTrace:
    """The trace that a run leaves in its folder: a new one, or the one that a stored state goes on with.

    It is there once `begin` was called. Ranks that do not lead write nothing, and runs without a folder neither.

    Attributes:
        writes: this rank writes a trace.
        begun: what is known before the first epoch stands in it; on ranks that do not write, too.
    """

    def __init__(self, folder: Path | None, *, leads: bool, loggers: Sequence[str | Logger]) -> None:
        """`loggers` mirror the trace.

        Raises:
            UsageError, UnknownNameError: loggers that cannot be used, or that have no trace to mirror.
        """
        self.writes = folder is not None and leads
        self.begun = False
        self._folder = folder
        self._mirror = Mirror(loggers if self.writes or folder is None else (), folder)
        self._file: TraceFile | None = None
        self._kept_bytes: int | None = None  # of the trace that a stored state goes on with
        self._kept_sha256: str | None = None

    @property
    def goes_on(self) -> bool:
        """A stored state goes on with a trace that is there."""
        return self._kept_bytes is not None

    @property
    def num_bytes(self) -> int:
        """Its length so far; 0 where nothing is written."""
        return self._kept_bytes or 0 if self._file is None else self._file.num_bytes

    @property
    def sha256(self) -> str | None:
        """Digest of as much of it; None where nothing is written."""
        return self._kept_sha256 if self._file is None else self._file.sha256

    def refuse_foreign(self) -> None:
        """Make sure that the folder holds no trace, unless a state goes on with it.

        Raises:
            UsageError: it holds another run's.
        """
        if self.writes and not self.goes_on and self._folder is not None:
            refuse_trace(self._folder / TRACE)

    def go_on(self, num_bytes: int, sha256: str | None) -> None:
        """Go on with the trace from where it had this length and digest: what came later is recorded anew."""
        self._kept_bytes = num_bytes or None
        self._kept_sha256 = sha256 if num_bytes else None
        self.abandon()
        self._file = None
        self.begun = False

    def begin(self, run: Callable[[], Run], *, resumable: bool) -> None:
        """Open the trace; a new one begins with what `run` gives. `resumable` as for `TraceFile`.

        Raises:
            FileFormatError, TrainingError: as `TraceFile`.
        """
        if self.writes:
            assert self._folder is not None, "asked by `writes`"
            self._file = TraceFile(
                self._folder / TRACE,
                keep_bytes=self._kept_bytes,
                keep_sha256=self._kept_sha256,
                mirror=self._mirror,
                resumable=resumable,
            )
            weakref.finalize(self, self._file.end_as_planned)
            if not self.goes_on:
                self._file.write(run())
        self.begun = True

    def write(self, record: AnyRecord) -> None:
        """Append a record."""
        if self._file is not None:
            self._file.write(record)
        elif isinstance(record, Epoch):  # no trace goes on behind an epoch that it lacks
            self._kept_bytes = None
            self._kept_sha256 = None

    def describe(self, network: Network, criterion: object) -> bool:
        """As `TraceFile.architecture`; nothing is new where nothing is written."""
        return self._file is not None and self._file.architecture(network, criterion)

    def has_profile(self, architecture: str, batch: int) -> bool:
        """Whether the trace says how long the layers of that network take at that mini-batch."""
        return self._file is not None and (architecture, batch) in self._file.profiled

    def plan_end(self, record: End) -> None:
        """What the trace ends with if nobody ends it."""
        if self._file is not None:
            self._file.planned_end = record

    def end(self, record: End) -> None:
        """Write the last record and close the trace."""
        if self._file is not None:
            self._file.end(record)

    def abandon(self) -> None:
        """Close the file without an end."""
        if self._file is not None:
            self._file.planned_end = None
            self._file.close()


class TraceFile:
    """The trace of one run; describes each architecture once."""

    def __init__(
        self,
        path: Path,
        *,
        keep_bytes: int | None = None,
        keep_sha256: str | None = None,
        mirror: Mirror | None = None,
        resumable: bool = False,
    ) -> None:
        """A new trace, or with `keep_bytes` the one that is there, cut to that length if its digest is the given one.

        `resumable`: it is of `ptsim train`, which goes on with the run after an error.

        Raises:
            FileFormatError: what is there is no regular file, too short, or another run's trace.
            TrainingError: it cannot be written.
        """
        self.path = path
        self._resumable = resumable
        self.planned_end: End | None = None
        self.ended = False
        self._before_end: tuple[int, str] | None = None  # length and digest
        self._known: set[str] = set()
        self.profiled: set[tuple[str, int]] = set()  # architectures and their mini-batches
        self._epochs = 0  # of its lines
        self._iterations = 0
        with writing(path, begun=resumable):
            if keep_bytes is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
            self._writer = TraceWriter(
                path, append=keep_bytes is not None, keep_bytes=keep_bytes, keep_sha256=keep_sha256
            )
        self._mirror = mirror or Mirror((), None)
        if keep_bytes is not None:
            kept = read_trace(path)
            self._known = set(kept.networks)
            self.profiled = {(profile.architecture, profile.batch) for profile in kept.profiles}
            self._epochs = len(kept.epochs)
            self._iterations = sum(epoch.num_iterations for epoch in kept.epochs)
            self._mirror.begin(kept.run, len(kept.epochs), kept.networks)

    @property
    def num_bytes(self) -> int:
        """The trace's length so far, without its end: a run that goes on has none yet."""
        return self._writer.num_bytes if self._before_end is None else self._before_end[0]

    @property
    def sha256(self) -> str:
        """Digest of as much of it."""
        return self._writer.sha256 if self._before_end is None else self._before_end[1]

    def write(self, record: AnyRecord) -> None:
        """Append a record.

        Raises:
            TrainingError: the disk is full; the trace ends with the last whole record.
        """
        with writing(self.path, begun=self._resumable):
            self._writer.write(record)
        if isinstance(record, Epoch):
            self._epochs += 1
            self._iterations += record.num_iterations
        elif isinstance(record, Profile):
            self.profiled.add((record.architecture, record.batch))
        self._mirror.write(record)

    def architecture(self, network: Network, criterion: object = None) -> bool:
        """Describe `network` unless the trace already does; whether it was new.

        Args:
            network: with what its penalty takes where `criterion` is another package's.
            criterion: its name, if the run has one.
        """
        if network.id in self._known:
            return False
        penalty = told_penalty(criterion, network)
        told = None if penalty is None else PenaltyCosts(num_bytes=penalty.num_bytes, num_launches=penalty.num_launches)
        self.write(Architecture(id=network.id, network=network, penalty=told))
        self._known.add(network.id)
        return True

    def end(self, record: End) -> None:
        """Write the last record and close the trace; nothing on a trace that has ended.

        It counts what stands in the trace: an interrupt may have come before the recorder counted the last epoch.
        Of a run that failed it is written if the disk still takes it: the failure itself is what the user must hear.
        """
        if self.ended:
            return
        self.ended = True
        self._before_end = self._writer.num_bytes, self._writer.sha256
        record = msgspec.structs.replace(record, epochs=self._epochs, num_iterations=self._iterations)
        try:
            if record.status == "clean":
                self.write(record)
            else:
                with contextlib.suppress(TrainingError):
                    self.write(record)
        finally:
            self.close()

    def end_as_planned(self) -> None:
        """End the trace of a recorder that nobody has closed; a program that ends by an error leaves it without end."""
        if self.planned_end is not None and not hasattr(sys, "last_value"):
            with contextlib.suppress(TrainingError):
                self.end(self.planned_end)

    def close(self) -> None:
        """Close the trace."""
        self._writer.close()
        self._mirror.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of Python, ptsim, the named packages, and CUDA and cuDNN where torch has them."""
    versions = {"python": platform.python_version(), "ptsim": ptsim.__version__}
    versions |= {name: importlib.metadata.version(name) for name in names}
    if torch.version.cuda and torch.cuda.is_available():
        versions |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call] # torch's gap
    return versions


def git_revision(folder: Path) -> str | None:
    """The commit that `folder` is checked out at, with "+changes" if files differ; None outside a repository."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    revision = git("rev-parse", "HEAD")
    if revision is None:
        return None
    return f"{revision}+changes" if git("status", "--porcelain", "--untracked-files=no", "--", ".") else revision
