r"""What should a machine with one NVIDIA GPU record, if it is lent for minutes at a time?

    python analysis/gpu_campaign.py --plan
    python analysis/gpu_campaign.py --out results --work work --cifar cifar10-jpeg.tar.xz

`--plan` prints every piece, what it does and how long it may take. One call works for at most `--minutes`, piece after
piece in the order of their worth, and says what is left; call it again until nothing is. Every piece is a process of
its own that goes on where it was, so one that fails, or that an error of the GPU takes down, costs no other piece
anything: it is noted in `campaign.json` and tried again later. Pieces go on as long as `--out` is kept, or the results
of an earlier call are given with `--earlier`; trainings also need `--work` (checkpoints, unpacked images), but for
small networks, whose last checkpoint is in `runs.tar`. A run on the GPU has the GPU for itself: the runs of a pair take
turns. What comes out, at most eight files of at most 16 MiB each:

    tests.txt           what the tests marked gpu said, and which lines that ask for CUDA none of them has run
    device.toml         the device profile: machine constants, whole steps of zoo networks, operators
    runs.tar            traces of dense and PruneTrain runs, with profiles of each architecture and NVML
    steps.json          steps of many networks, dense and pruned: time, power and peak memory, measured and predicted
    memory.json         the largest mini-batch that was said to fit, and whether it did, in a part of the memory
    validation.json     the runs predicted: from their own profiles, from device.toml alone, and from each other
    campaign.json       when which piece ran, for how long, and what stopped it
    logs.txt            the end of what each piece has said

Where the files of one folder come back, which is emptied before each call, that folder is `--out`, its last content is
`--earlier`, and `--work` is elsewhere, in memory perhaps (/dev/shm): a checkpoint is written after every epoch. Nothing
else belongs into `--out`; a log of the call would be the ninth file. Results of two kinds of GPU are not mixed: ask for
the same one every time.

It needs no network and no git, but ptsim installed (`ptsim.models` exists only then). The installed package is what
runs, also where the checkout is the current folder. For a machine that has torch, pandas, scikit-learn and the like and
cannot fetch anything, bring wheels for its Python of what it lacks; fvcore, iopath and yacs have to be built first:

    pip wheel --no-deps -w wheels . fvcore iopath yacs
    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 -d wheels \
        msgspec simpy cyclopts docstring-parser rich-rst docutils tomli-w termcolor
    pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=$PWD/site      # there

`--device cpu --tiny` rehearses the pieces in about a minute, as far as a CPU can: not the tests, the peaks, the limit
of memory, nor the data set of the whole runs. On 2026-11-28 it took 69 s, from an empty folder with the commands above:
Python 3.12.3, torch 2.11.0+cu130, torchvision 0.26.0, two cores of an AMD EPYC.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gpu_steps
import gpu_tests
import msgspec
import torch
from gpu_steps import board_name, rows, write
from processes import PTSIM, in_own_process, num_epochs, run_together, running_s

import ptsim
from ptsim.errors import PtsimError
from ptsim.hardware.profile_file import read_device_profile
from ptsim.textfile import write_whole
from ptsim.training.runfolder import CHECKPOINTS, CONFIG

MAX_FILE_BYTES = 16 * 2**20
MOST_ATTEMPTS = 3  # of a piece that fails and gets no further
_SHORTEST_S = 40.0  # what is left must be longer for a piece to begin
_SHORTEST_TRAINING_S = 120.0  # it loads and tunes for some seconds each time
_WHOLE = 0.7  # of its part must be left for a training to begin that cannot go on once the work folder is lost
_FIRST_SHARE = 0.4  # of a calibration is for the number format of the runs
_LOG_BYTES = 2**17  # of each piece


class Pair(NamedTuple):
    """A dense and a PruneTrain run of one network and seed, which take turns on the GPU."""

    model: str
    seed: int

    @property
    def runs(self) -> dict[str, float]:
        """Name of each run and its penalty ratio."""
        return {f"{self.model}-{kind}-s{self.seed}": ratio for kind, ratio in (("dense", 0.0), ("pruned", 0.25))}


class Piece(NamedTuple):
    """What it does, whether it is finished, what works on it, and its part of half an hour.

    With no part it is done when everything else is. `least_s` must be left of a call for it to begin.
    """

    about: str
    done: Callable[[], bool]
    work: Callable[[], None]
    minutes: float
    least_s: float = _SHORTEST_S


class Campaign:
    """The pieces, and how far they are."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out: Path = options.out
        self.work: Path = options.work or options.out / "work"
        # Some of torch's functions want the number of a GPU.
        self.device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
        self.board: str | None = None  # what the driver calls the GPU
        self.tiny: bool = options.tiny
        self.cifar: Path | None = options.cifar
        self.deadline_s = time.monotonic() + 60 * options.minutes
        self.steps = gpu_steps.Steps(self.out, self.device, tiny=self.tiny, remaining_s=self.remaining_s)
        first, more, pruned, peaks = (
            (gpu_steps.TINY_STEPS, gpu_steps.TINY_STEPS[:1], [], [])
            if self.tiny
            else (gpu_steps.FIRST_STEPS, gpu_steps.MORE_STEPS, gpu_steps.PRUNED_STEPS, gpu_steps.PEAKS)
        )
        vgg, resnet, seeds = Pair("vgg11", 1), Pair("resnet32", 1), (Pair("vgg11", 2), Pair("vgg11", 3))
        if self.tiny:
            vgg, resnet, seeds = Pair("resnet20", 1), Pair("resnet20", 1), ()
        self.pairs = tuple(dict.fromkeys((vgg, resnet, *seeds)))
        limits = self.steps.limits_done, self.steps.limits
        self.pieces: dict[str, Piece] = {
            "tests": Piece("pytest -m gpu: every branch that asks for CUDA", self.tested, self.test, 2.5),
            "calibrate": Piece("ptsim calibrate gpu: operators and whole steps", self.calibrated, self.calibrate, 4.0),
            "vgg11": self._pairs_piece((vgg,), 8.5, least_s=60 * _WHOLE * min(8.5, options.minutes)),
            "peaks": self._steps_piece("peak memory and one step of 20 networks", peaks, 2.0, power=False),
            "pruned-steps": self._steps_piece("ResNet-50 at 224², three pruned stages", pruned, 1.2),
            "steps": self._steps_piece("ResNet-50 and others at 224² and CIFAR networks, dense", first, 2.5),
            "memory": Piece("largest mini-batch said to fit 8 GiB: does it?", *limits, 1.0),
            "validate": Piece("the runs predicted in three ways", self.validated, self.validate, 1.0),
            "resnet32": self._pairs_piece((resnet,), 5.0),
            "seeds": self._pairs_piece(seeds, 0.0),
            "more-steps": self._steps_piece("more networks, mini-batches and precisions", more, 0.0),
        }

    @property
    def log(self) -> list[dict[str, Any]]:
        """What ran so far."""
        return rows(self.out / "campaign.json")

    def spent_s(self, name: str) -> float:
        """Seconds that a piece has had in all calls."""
        return sum(entry["seconds"] for entry in self.log if entry["piece"] == name)

    def left(self) -> list[str]:
        """Names of the pieces that are not finished and not given up; those that have had their time come last."""
        stuck = [entry["piece"] for entry in self.log if entry["failed"] and not entry["further"]]
        open_ = [
            name for name, piece in self.pieces.items() if stuck.count(name) < MOST_ATTEMPTS and not _safely(piece.done)
        ]
        return sorted(open_, key=lambda name: self.spent_s(name) >= 60 * self.pieces[name].minutes)

    def minutes_for(self, name: str) -> float:
        """What a piece may take now: what is left of its part; all that is left of the call once it has had that."""
        own_s = 60 * self.pieces[name].minutes - self.spent_s(name)
        return min(own_s if own_s > 0 else self.remaining_s(), self.remaining_s()) / 60

    def remaining_s(self) -> float:
        """Seconds until this call has to end."""
        return self.deadline_s - time.monotonic()

    def note(self, piece: str, seconds: float, failed: str | None, *, further: bool) -> None:
        """Write down that a piece ran."""
        entry = {"piece": piece, "seconds": round(seconds, 1), "failed": failed, "further": further}
        entry["device"] = self.board
        write(self.out / "campaign.json", [*self.log, entry])

    def keep_logs(self) -> None:
        """Put the end of what each piece has said into the results."""
        texts = [
            f"==== {path.stem} ====\n{path.read_bytes()[-_LOG_BYTES:].decode(errors='replace')}"
            for path in sorted(self.work.glob("*.log"))
        ]
        write_whole(self.out / "logs.txt", "\n".join(texts))

    def size(self) -> int:
        """Bytes of all results: a piece that made it larger got further."""
        notes = ("campaign.json", "logs.txt")
        return sum(path.stat().st_size for path in self.out.glob("*.*") if path.name not in notes)

    def take_over(self, earlier: Path) -> None:
        """Copy the results of an earlier call, where this folder has none of that name."""
        for path in sorted(earlier.glob("*.*")):
            if path.is_file() and not (self.out / path.name).exists():
                write_whole(self.out / path.name, path.read_bytes())

    def others(self) -> list[str]:
        """Names of other GPUs that the results are of: neither a profile nor a run goes on on another one."""
        known = {entry.get("device") for entry in self.log} - {None, self.board}
        return sorted(known) if self.board is not None else []

    def _steps_piece(
        self, about: str, wanted: Sequence[gpu_steps.Combination], minutes: float, *, power: bool = True
    ) -> Piece:
        what = "time, power and memory" if power else "time and memory"
        return Piece(
            f"{about}: {what}",
            lambda: self.steps.done(wanted),
            lambda: self.steps.measure(wanted, power=power),
            minutes,
        )

    def _pairs_piece(self, pairs: Sequence[Pair], minutes: float, least_s: float = 0.0) -> Piece:
        """With `least_s` so much must be left for the runs to begin: their checkpoints do not fit into the results."""
        epochs = "182 epochs of CIFAR-10" if not self.tiny else "two epochs of digits"
        named = ", ".join(f"{pair.model} seed {pair.seed}" for pair in pairs)
        runs = {name: (pair, ratio) for pair in pairs for name, ratio in pair.runs.items()}
        begun = any((self.work / name / CHECKPOINTS).exists() for name in runs)
        return Piece(
            f"dense and PruneTrain in turn, {epochs}, NVML energy: {named}",
            lambda: all(self.trained(name) for name in runs),
            lambda: self.train(runs),
            minutes,
            _SHORTEST_S if self.tiny else max(0.0 if begun else least_s, _SHORTEST_TRAINING_S),
        )

    # ---- tests -------------------------------------------------------------------------------------------------

    def tested(self) -> bool:
        """The tests marked gpu ran to their end, whatever they said."""
        report = self.out / "tests.txt"
        return report.exists() and gpu_tests.ENDED in report.read_text(encoding="utf-8")

    def test(self) -> None:
        """Run them in the checkout that this script is in; failures are results, not failures of the piece."""
        report = self.out / "tests.txt"
        if self.device.type != "cuda" or not (gpu_tests.ROOT / "tests").is_dir():
            why = "no tests beside this script" if self.device.type == "cuda" else "a CPU"
            write_whole(report, f"not run: {why}\n{gpu_tests.ENDED} 0\n")
        else:
            gpu_tests.run(report, self.work.resolve(), self.remaining_s())

    # ---- training ----------------------------------------------------------------------------------------------

    def trained(self, name: str) -> bool:
        """The run reached its last epoch."""
        trace = self.kept(name)
        return trace.exists() and ptsim.read_trace(trace).complete

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

    def train(self, runs: Mapping[str, tuple[Pair, float]]) -> None:
        """Begin or go on with them in turn, each for an equal part of the time; a failing one takes no other's turn."""
        left, failures = [name for name in runs if not self.trained(name)], []
        for index, name in enumerate(left):
            until_s = time.monotonic() + self.remaining_s() / (len(left) - index)
            try:
                run_together(
                    {name: self.train_arguments(name, *runs[name])},
                    lambda until_s=until_s: until_s - time.monotonic(),  # type: ignore[misc] # mypy types no default of a lambda
                    lambda: self.keep(runs),
                )
            except RuntimeError as error:
                failures.append(str(error))
        self.keep(runs, checkpoints=True)
        if failures:
            raise RuntimeError("; ".join(failures))

    def train_arguments(self, name: str, pair: Pair, penalty_ratio: float) -> list[str]:
        """The command line that begins the run, or goes on with it."""
        folder = self.work / name
        if (folder / CONFIG).exists():
            images = self.images()
            return ["train", "--resume", str(folder), *([] if images is None else ["--data-dir", str(images)])]
        return [
            "train", "--out", str(folder), "--model", pair.model, "--penalty-ratio", str(penalty_ratio),
            "--seed", str(pair.seed), "--set", f"device={self.device.type}", *self.data(),
        ]  # fmt: skip

    def keep(self, names: Iterable[str], *, checkpoints: bool = False) -> None:
        """Put the traces into the results, unless what is there has got further (the checkpoints were lost).

        With `checkpoints` also what unfinished runs need to go on elsewhere, as far as the file's limit allows.
        """
        for name in names:
            kept, here = self.kept(name), self.work / name / "trace.jsonl"
            if num_epochs(here) >= max(num_epochs(kept), 0):
                write_whole(kept, b"".join(here.read_bytes().rpartition(b"\n")[:2]))  # its whole lines
        files = {path.name: path for path in sorted((self.work / "traces").glob("*.jsonl"))}
        for name in names if checkpoints else ():
            more = run_files(self.work / name) if not self.trained(name) else {}
            # 2048: a header and whole blocks, and the rounding of a long name's.
            if sum(2048 + path.stat().st_size for path in (*files.values(), *more.values())) < MAX_FILE_BYTES:
                files |= more
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name, path in files.items():
                archive.add(path, arcname=name)
        write_whole(self.out / "runs.tar", packed.getvalue())

    def data(self) -> list[str]:
        """The paper's schedule on CIFAR-10 from its JPEG archive; on synthetic images of the same size without one."""
        if self.tiny:
            return ["--dataset", "digits", "--train-limit", "64", "--batch", "16", "--epochs", "2", "--interval", "1"]
        common = ["--batch", "128", "--epochs", "182", "--interval", "10", "--lr", "0.1"]
        images = self.images()
        if images is None:
            return [*common, "--dataset", "synthetic"]
        return [*common, "--dataset", "imagefolder", "--data-dir", str(images)]

    def images(self) -> Path | None:
        """The folder of CIFAR-10's images, unpacked once; None without its archive."""
        if self.cifar is None or self.tiny:
            return None
        folder = self.work / "cifar10"
        if not (folder / "complete").exists():
            with tarfile.open(self.cifar) as archive:
                archive.extractall(folder, filter="data")
            (folder / "complete").touch()
        return next(path.parent for path in sorted(folder.rglob("train")) if path.is_dir())

    # ---- calibration and validation ----------------------------------------------------------------------------

    def calibrated(self) -> bool:
        """The queue was finished; a rehearsal is content with a beginning."""
        profile = self.out / "device.toml"
        if self.tiny or not profile.exists():
            return profile.exists()
        found = read_device_profile(profile)
        return found.complete and len({step.setting for step in found.steps}) > 1

    def calibrate(self) -> None:
        """Zoo steps, then operators until time is over: in the number format of the runs first, then in every one."""
        profile = self.out / "device.toml"
        if self.tiny or not profile.exists():
            minutes = 0.1 if self.tiny else _FIRST_SHARE * self.remaining_s() / 60
            self._calibrate(profile, minutes, "--precision", "fp32", "--memory-format", "contiguous")
        if not self.tiny:
            self._calibrate(profile, max((self.remaining_s() - _SHORTEST_S / 2) / 60, 0.1))

    def _calibrate(self, profile: Path, minutes: float, *more: str) -> None:
        options = ["--device", self.device.type, "--out", str(profile), "--minutes", f"{minutes:.3f}"]
        options += ["--rounds", "1" if self.tiny else "3"]  # each network shortly, then again: time may be over soon
        going_on = ["--resume"] if profile.exists() else []
        subprocess.run([*PTSIM, "calibrate", "gpu", *options, *going_on, *more], check=True)

    def runs(self) -> list[Path]:
        """Traces with at least one epoch."""
        names = [name for pair in self.pairs for name in pair.runs]
        return [path for name in names if num_epochs(path := self.kept(name)) > 0]

    def inputs(self) -> dict[str, str]:
        """What a validation is made of; one of other inputs is out of date."""
        paths = [path for path in (*self.runs(), self.out / "device.toml") if path.exists()]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    def validated(self) -> bool:
        """What is there was made from what is there."""
        path = self.out / "validation.json"
        return path.exists() and msgspec.json.decode(path.read_bytes())["inputs"] == self.inputs()

    def validate(self) -> None:
        """The three ways to predict the runs; one that is not possible says why."""
        runs, profile = self.runs(), self.out / "device.toml"
        ways: dict[str, Callable[[], Any]] = {
            "own_profiles": lambda: ptsim.validate(runs),
            "device_profile": lambda: ptsim.validate(runs, profile, holdout=True),
            "each_other": lambda: ptsim.validate(runs, holdout=True),
        }
        results: dict[str, Any] = {"inputs": self.inputs()}
        for name, way in ways.items():
            try:
                results[name] = msgspec.to_builtins(way())
            except Exception as error:  # the other ways are results all the same
                results[name] = {"failed": gpu_steps.sentence(error)}
        write(self.out / "validation.json", results)


def run_files(folder: Path) -> dict[str, Path]:
    """What a run folder needs to go on, by name in an archive: settings, trace, newest checkpoint; else nothing."""
    checkpoints = sorted((folder / CHECKPOINTS).glob("epoch-*"))
    if not checkpoints or not (folder / CONFIG).exists():
        return {}
    found = [folder / CONFIG, folder / "trace.jsonl", *checkpoints[-1].iterdir()]
    return {f"{folder.name}/{path.relative_to(folder).as_posix()}": path for path in found}


def work_through(campaign: Campaign, run: Callable[[str, float], str | None]) -> list[str]:
    """Piece after piece until time is over; `run` gets a name and minutes, and gives what failed.

    A piece comes once, but again at once where it failed, has got further, and has not had its part of the time.

    Returns:
        Names of the pieces that are left.
    """
    tried: set[str] = set()
    while True:
        left_s = campaign.remaining_s()
        able = [name for name in campaign.left() if name not in tried and campaign.pieces[name].least_s < left_s]
        if not able:
            break
        name = able[0]
        minutes = campaign.minutes_for(name)
        before, began_s = campaign.size(), time.monotonic()
        print(f"piece {name}, at most {minutes:.1f} minutes", flush=True)
        failed = run(name, minutes)
        further = campaign.size() > before
        campaign.note(name, time.monotonic() - began_s, failed, further=further)
        campaign.keep_logs()
        if not (failed and further and campaign.spent_s(name) < 60 * campaign.pieces[name].minutes):
            tried.add(name)
        if failed:
            print(f"piece {name} failed: {failed}", file=sys.stderr)
    for file in campaign.out.glob("*.*"):
        if file.stat().st_size > MAX_FILE_BYTES:
            print(f"{file} is larger than 16 MiB", file=sys.stderr)
    return campaign.left()


def main(arguments: list[str] | None = None) -> int:
    """Work on the pieces; 0 when nothing is left, 3 when there is more to do."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"), help="results; keep it between calls")
    parser.add_argument("--work", type=Path, help="checkpoints and images; OUT/work if left out")
    parser.add_argument("--earlier", type=Path, help="results of an earlier call, where OUT was not kept")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 as JPEG images in a tar archive")
    parser.add_argument("--minutes", type=float, default=8.5, help="of this call")
    parser.add_argument("--piece", help="this one alone, in this process")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal")
    parser.add_argument("--plan", action="store_true", help="print the pieces in their order, and do nothing")
    options = parser.parse_args(arguments)
    options.minutes -= running_s() / 60  # the first to import torch on a machine waits for its files
    campaign = Campaign(options)
    if options.piece is not None and options.piece not in campaign.pieces:
        parser.error(f"unknown piece {options.piece!r}; known: {', '.join(campaign.pieces)}")
    if options.plan:
        print_plan(campaign)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --tiny rehearses")
    for name in ("cifar", "earlier"):
        if (given := getattr(options, name)) is not None and not given.exists():
            parser.error(f"--{name} {given}: there is no such file or folder")
    campaign.out.mkdir(parents=True, exist_ok=True)
    campaign.work.mkdir(parents=True, exist_ok=True)
    if options.piece is not None:
        campaign.pieces[options.piece].work()
        return 0
    if options.earlier is not None:
        campaign.take_over(options.earlier)
    if options.device == "cuda":
        campaign.board = board_name()
    if others := campaign.others():
        parser.error(f"{campaign.out} has results of {others[0]}, and here is {campaign.board}: choose another --out")
    left = work_through(
        campaign,
        lambda name, minutes: in_own_process(Path(__file__), arguments, name, minutes, campaign.work / f"{name}.log"),
    )
    print(f"left: {', '.join(left) or 'nothing'}")
    return 3 if left else 0


def print_plan(campaign: Campaign) -> None:
    """Every piece in its order, with its part of half an hour of a machine."""
    total = 0.0
    for name, piece in campaign.pieces.items():
        total += piece.minutes
        part = f"{piece.minutes:4.1f} minutes ({total:4.1f} so far)" if piece.minutes else "with what is left over"
        print(f"{name:14}{part:28}{piece.about}")


def _safely(done: Callable[[], bool]) -> bool:
    """Whether a piece is done; results that cannot be read are not."""
    with contextlib.suppress(PtsimError, msgspec.MsgspecError, KeyError, tarfile.TarError):
        return done()
    return False


if __name__ == "__main__":
    sys.exit(main())
