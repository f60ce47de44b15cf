"""What of a run goes into its trace, and in which order. Only rank 0 has a recorder."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import torch

import ptsim
from ptsim.errors import TrainingError
from ptsim.network import Network
from ptsim.trace.io import TraceWriter, read_trace
from ptsim.trace.schema import SCHEMA_VERSION, AnyRecord, Architecture, Dataset, DeviceInfo, End, Run
from ptsim.training.checkpoint import writing
from ptsim.training.config import Config, to_settings


class Recorder:
    """Writes the trace of one run; describes each architecture once."""

    def __init__(self, path: Path, *, keep_bytes: int | None = None) -> None:
        """A new trace, or with `keep_bytes` the going on with one after that many bytes."""
        self.path = path
        self._known: set[str] = set()
        with writing(path):
            if keep_bytes is None:
                path.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
            self._writer = TraceWriter(path, append=keep_bytes is not None, keep_bytes=keep_bytes)
        if keep_bytes is not None:
            self._known = set(read_trace(path).networks)

    @property
    def num_bytes(self) -> int:
        """The trace's length so far."""
        return self._writer.num_bytes

    def rewind(self, num_bytes: int) -> None:
        """Go on from where the trace was `num_bytes` long: what came later is recorded anew."""
        self._writer.close()
        with writing(self.path):
            self._writer = TraceWriter(self.path, append=True, keep_bytes=num_bytes)
        self._known = set(read_trace(self.path).networks)

    def write(self, record: AnyRecord) -> None:
        """Append a record.

        Raises:
            TrainingError: the disk is full; the trace ends with the last whole record.
        """
        with writing(self.path):
            self._writer.write(record)

    def architecture(self, network: Network) -> bool:
        """Describe `network` unless the trace already does; whether it was new."""
        if network.id in self._known:
            return False
        self.write(Architecture(id=network.id, network=network))
        self._known.add(network.id)
        return True

    def fail(self, record: End) -> None:
        """Write the end of a failed run if the disk still takes it; the failure itself is what the user must hear."""
        with contextlib.suppress(TrainingError):
            self.write(record)

    def close(self) -> None:
        """Close the trace."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_record(config: Config, *, dataset: Dataset, device: DeviceInfo, world_size: int, backend: str | None) -> Run:
    """The first line of a trace that begins now on this machine."""
    return Run(
        schema_version=SCHEMA_VERSION,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=config.model,
        dataset=dataset,
        hyperparameters=to_settings(config),
        seed=config.seed,
        precision=config.precision,
        memory_format=config.memory_format,
        world_size=world_size,
        backend=backend,
        device=device,
        versions=library_versions(("torch", "torchvision", "fvcore", "safetensors")),
        git_revision=git_revision(Path(ptsim.__file__).parent),
    )


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
