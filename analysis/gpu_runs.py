"""How does the GPU campaign train a dense and a PruneTrain run in turn, and keep their traces?

`gpu_campaign.py` calls it; it is no script of its own.
"""

from __future__ import annotations

import contextlib
import io
import math
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gpu_parts
import msgspec
import torch
from processes import epochs_of, num_epochs, run_together

import ptsim
from ptsim.errors import FileFormatError
from ptsim.textfile import write_whole
from ptsim.trace.io import CONFIG
from ptsim.training.config import Config
from ptsim.training.datasets import load_data
from ptsim.training.runfolder import CHECKPOINTS

MAX_FILE_BYTES = 16 * 2**20
_TAR_BYTES = 2048  # of every file in an archive, at most: a header and the end of its last block
# The paper's run on CIFAR-10: Lym et al., SC 2019, section 5.
IMAGES, EPOCHS, BATCH, INTERVAL = 50_000, 182, 128, 10
# A turn begins with imports, images to decode and convolutions to tune; a shorter one would be little else.
SHORTEST_TURN_S = 45.0


class Pair(NamedTuple):
    """A dense and a PruneTrain run of one network and seed, which take turns on the GPU."""

    model: str
    seed: int

    @property
    def runs(self) -> dict[str, float]:
        """Name of each run and its penalty ratio."""
        return {f"{self.model}-{kind}-s{self.seed}": ratio for kind, ratio in (("dense", 0.0), ("pruned", 0.25))}


class Turn(NamedTuple):
    """Which run goes on, until it has so many epochs or so many seconds have passed.

    It does not end before `least_s`: whoever catches up ends a few epochs ahead, since a trace is looked at every few
    seconds, and a turn of the other one for these alone would be little else than its beginning.
    """

    name: str
    epochs: float
    seconds: float
    least_s: float


def next_turn(epochs: Mapping[str, int], remaining_s: float) -> Turn:
    """Whose turn it is, of the unfinished runs of a pair and their epochs.

    The one that is behind catches up; of equals the first has its part of the time that remains. So they can be
    compared as far as both got, whenever time is over.
    """
    name = min(epochs, key=lambda name: epochs[name])
    ahead = max(epochs.values())
    part_s = remaining_s / len(epochs)
    if ahead > epochs[name]:
        return Turn(name, ahead, remaining_s, part_s)
    return Turn(name, math.inf, part_s, part_s)


class Runs:
    """Trains pairs into run folders in `work`, and keeps their traces in `runs.tar` of `out`."""

    def __init__(self, out: Path, work: Path, device: str, *, tiny: bool, cifar: Path | None) -> None:
        self.out, self.work, self.device, self.tiny, self.cifar = out, work, device, tiny, cifar
        self.remaining_s: Callable[[], float] = lambda: math.inf  # until the piece has to end
        self.parts = gpu_parts.Parts()
        self.turns: list[dict[str, Any]] = []  # with the parts of each

    def trained(self, name: str) -> bool:
        """The run reached its last epoch."""
        trace = self.kept(name)
        return trace.exists() and ptsim.read_trace(trace).complete

    def begun(self, pairs: Iterable[Pair]) -> bool:
        """One of the runs can go on from a checkpoint."""
        return any((self.work / name / CHECKPOINTS).exists() for pair in pairs for name in pair.runs)

    def epochs(self, name: str) -> int:
        """Epochs that the run has, if it goes on; a run whose checkpoints were lost begins again."""
        self.kept(name)  # unpacks what is known of it
        return max(num_epochs(self.work / name / "trace.jsonl"), 0)

    def kept(self, name: str) -> Path:
        """Where the trace of a run is kept; unpacked from the results where the work folder was lost."""
        folder = self.work / "traces"
        packed = self.out / "runs.tar"
        if not folder.exists() and packed.exists():
            with tarfile.open(packed) as archive:
                archive.extractall(folder, filter="data")
            for run in [path for path in folder.iterdir() if path.is_dir()]:  # one that can go on
                if not (self.work / run.name).exists():
                    run.rename(self.work / run.name)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.jsonl"

    def train(self, pairs: Sequence[Pair]) -> None:
        """Begin or go on with them, pair after pair; a run that fails takes no other's turn.

        Raises:
            RuntimeError: one of them failed by itself.
        """
        failures: dict[str, str] = {}
        shortest_s = 0.0
        for pair in pairs:
            over = set[str]()  # runs that have no turn any more: failed, or no further after their turn
            while self.remaining_s() > 0:
                left = {name: self.epochs(name) for name in pair.runs if name not in over and not self.trained(name)}
                if not left:
                    break
                turn = next_turn(left, self.remaining_s())
                if turn.seconds < shortest_s:
                    break
                try:
                    self.turn(turn, pair)
                except RuntimeError as error:
                    failures[turn.name] = str(error)
                if turn.name in failures or self.epochs(turn.name) <= left[turn.name]:
                    over.add(turn.name)
                shortest_s = 0.0 if self.tiny else SHORTEST_TURN_S
        self.keep()
        if failures:
            raise RuntimeError("; ".join(failures.values()))

    def turn(self, turn: Turn, pair: Pair) -> None:
        """Train one run for its turn, and note what it took."""
        began_s, before = time.monotonic(), self.epochs(turn.name)
        noted = self.work / f"{turn.name}.parts"
        noted.unlink(missing_ok=True)

        def remaining_s() -> float:
            reached = self.epochs(turn.name) >= turn.epochs
            return began_s + (turn.least_s if reached else turn.seconds) - time.monotonic()

        command = self.train_arguments(turn.name, pair, pair.runs[turn.name])
        program = (sys.executable, gpu_parts.__file__, str(noted))
        try:
            run_together({turn.name: command}, remaining_s, self.keep, program=program)
        finally:
            self._note(turn.name, before, time.monotonic() - began_s, gpu_parts.read(noted))

    def _note(self, name: str, before: int, seconds: float, parts: dict[str, gpu_parts.Part]) -> None:
        """Note the turn of a run that had so many epochs before."""
        epochs = [epoch.time for epoch in (epochs_of(self.work / name / "trace.jsonl") or ())[before:]]
        trained_s = math.fsum(took.wall_s + took.validation_s for took in epochs)
        parts["epochs"] = gpu_parts.Part(number=len(epochs), seconds=trained_s)
        self.turns.append({"run": name, "seconds": seconds, "parts": msgspec.to_builtins(parts)})

    def train_arguments(self, name: str, pair: Pair, penalty_ratio: float) -> list[str]:
        """The command line that begins the run, or goes on with it."""
        folder = self.work / name
        if (folder / CONFIG).exists():
            images = self.images()
            return ["train", "--resume", str(folder), *([] if images is None else ["--data-dir", str(images)])]
        return [
            "train", "--out", str(folder), "--model", pair.model, "--penalty-ratio", str(penalty_ratio),
            "--seed", str(pair.seed), "--set", f"device={self.device}", *self.data(),
        ]  # fmt: skip

    def keep(self) -> None:
        """Put the traces into the results, unless what is there has got further (the checkpoints were lost).

        Also what unfinished runs need to go on elsewhere, as far as the file's limit allows; of one that is running,
        too, since a call that is cut off comes back here no more.
        """
        names = sorted(path.parent.name for path in self.work.glob("*/trace.jsonl"))
        for name in names:
            kept, here = self.kept(name), self.work / name / "trace.jsonl"
            if num_epochs(here) >= max(num_epochs(kept), 0):
                write_whole(kept, whole_lines(here))
        files = {path.name: path.read_bytes() for path in sorted((self.work / "traces").glob("*.jsonl"))}
        for name in names:
            if not self.trained(name):
                taken = sum(_TAR_BYTES + len(content) for content in files.values())
                files |= run_files(self.work / name, MAX_FILE_BYTES - tarfile.RECORDSIZE - taken)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        write_whole(self.out / "runs.tar", packed.getvalue())

    def data(self) -> list[str]:
        """The paper's schedule on CIFAR-10 from its JPEG archive; without one as many synthetic images of that size.

        A rehearsal takes 64 images, of the archive if there is one.
        """
        images = self.images()
        if self.tiny:
            common = ["--train-limit", "64", "--set", "validation_limit=64", "--batch", "16", "--epochs", "2"]
            common += ["--interval", "1"]
            without = ["--dataset", "digits"]
        else:
            common = ["--batch", f"{BATCH}", "--epochs", f"{EPOCHS}", "--interval", f"{INTERVAL}", "--lr", "0.1"]
            without = ["--dataset", "synthetic", "--train-limit", f"{IMAGES}"]
        return [*common, *(without if images is None else ["--dataset", "imagefolder", "--data-dir", str(images)])]

    def images(self) -> Path | None:
        """The folder of CIFAR-10's images, unpacked once; None without its archive.

        Raises:
            FileFormatError: the archive has no folder of training images.
        """
        if self.cifar is None:
            return None
        folder = self.work / "cifar10"
        new = not (folder / "complete").exists()
        if new:
            try:
                with self.parts.timed("unpacked"), tarfile.open(self.cifar) as archive:
                    archive.extractall(folder, filter="data")
            except OSError:  # a disk that is full has none left for the other pieces
                shutil.rmtree(folder, ignore_errors=True)
                raise
            (folder / "complete").touch()
        found = next((path.parent for path in sorted(folder.rglob("train")) if path.is_dir()), None)
        if found is None:
            raise FileFormatError(self.cifar, "holds no folder called train")
        if new and self.tiny:  # or a rehearsal would not tell how long it takes to read all of them
            self._read(found)
        return found

    def _read(self, images: Path) -> None:
        """Read all images once, as a training does."""
        config = Config(model="vgg11", dataset="imagefolder", data_dir=str(images), augment="none", batch=1)
        began_s = time.monotonic()
        data = load_data(config, input_shape=(3, 32, 32), device=torch.device("cpu"))
        self.parts.add("data", time.monotonic() - began_s, size=gpu_parts.num_images(data))


def run_files(folder: Path, room: int) -> dict[str, bytes]:
    """What a run folder needs to go on, by name in an archive: settings, newest checkpoint, trace.

    Nothing where it lacks one of them or takes more than `room`, and where a run that is going on lets its checkpoint
    go meanwhile. The trace is read last, so that it has all that the checkpoint knows of.
    """
    checkpoints = sorted((folder / CHECKPOINTS).glob("epoch-*"))
    if not checkpoints:
        return {}
    trace = folder / "trace.jsonl"
    with contextlib.suppress(OSError):
        found = [folder / CONFIG, *sorted(checkpoints[-1].iterdir())]
        if sum(_TAR_BYTES + path.stat().st_size for path in (*found, trace)) < room:
            contents = {path: path.read_bytes() for path in found} | {trace: whole_lines(trace)}
            return {
                f"{folder.name}/{path.relative_to(folder).as_posix()}": content for path, content in contents.items()
            }
    return {}


def whole_lines(trace: Path) -> bytes:
    """What a trace that may be being written has but for a last line that has not ended."""
    return b"".join(trace.read_bytes().rpartition(b"\n")[:2])
