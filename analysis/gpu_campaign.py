r"""What should a machine with one NVIDIA GPU record, if it is lent for half an hour, minutes at a time?

    python analysis/gpu_campaign.py --plan --cifar cifar10-jpeg.tar.xz
    python analysis/gpu_campaign.py --out results --work work --cifar cifar10-jpeg.tar.xz

`--plan` prints every piece, what it does, what it is predicted to take on `--gpu`, and which calls that makes. With
`--noted results`, of a rehearsal or an earlier half hour, it prints below every piece what that has taken there and
which parts of it are known (starting processes, reading images, tracing networks, checkpoints, profiles), and allows
for as much where it would else assume; it says which numbers are measured.

One call works for at most `--minutes`, piece after piece in the order of their worth, and says what is left; call it
again until nothing is. Every piece is a process of its own that goes on where it was, so one that fails, or that an
error of the GPU takes down, costs no other piece anything: it is noted in `campaign.json` and tried again later. Pieces
go on as long as `--out` is kept, or the results of an earlier call are given with `--earlier`; trainings also need
`--work` (checkpoints, unpacked images), but for small networks, whose last checkpoint is in `runs.tar`. A run on the
GPU has the GPU for itself: the runs of a pair take turns, and the one that is behind catches up, so that a pair that is
not finished can be compared as far as both got. What comes out, at most eight files of at most 16 MiB each:

    tests.txt           what the tests marked gpu said, and which lines that ask for CUDA or NVML none of them has run
    device.toml         the device profile: machine constants, whole steps of zoo networks, operators
    runs.tar            traces of dense and PruneTrain runs, with profiles of each architecture and NVML
    steps.json          steps of many networks, dense and pruned: time, power and peak memory, measured and predicted
    memory.json         the largest mini-batch that was said to fit, and whether it did, in a part of the memory
    validation.json     the runs predicted: from their own profiles, from device.toml alone, and from each other
    campaign.json       when which piece ran, for how long, what of it took how long, and what stopped it
    logs.txt            the end of what each piece has said

The order of worth is: tests, calibration, VGG-11 at the paper's 182 epochs, peak memory, ResNet-50 dense and at three
pruned stages, other steps with power; and only then ResNet-32. (A piece that does not fit into what is left of a call
lets the next one go first.) ResNet-32's steps wait for their host: `--plan` predicts 30 minutes for its pair on an
H100, which would leave nothing for the pieces after it, and 10 for VGG-11's. And ResNet-32 loses nothing by an
interruption, since its checkpoints (4 MB a run) travel in `runs.tar`: the next half hours are its own. VGG-11's
(74 MB) do not fit there, so its pair has to be finished on the machine that began it. The last piece, `validate`, needs
no GPU. Where the machine is given back before, it is made of the results anywhere else:

    python analysis/gpu_campaign.py --device cpu --out results --piece validate

Where the files of one folder come back, which is emptied before each call, that folder is `--out`, its last content is
`--earlier`, and `--work` is elsewhere, in memory perhaps (/dev/shm, if it has 2 GiB): a checkpoint is written after
every epoch. Nothing else belongs into `--out`; a log of the call would be the ninth file. Results of two kinds of GPU
are not mixed: ask for the same one every time.

It needs no network and no git, but ptsim installed (`ptsim.models` exists only then). The installed package is what
runs, also where the checkout is the current folder. For a machine that has torch, pandas, scikit-learn and the like and
cannot fetch anything, bring wheels for its Python of what it lacks; fvcore, iopath and yacs have to be built first:

    pip wheel --no-deps -w wheels . fvcore iopath yacs
    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 -d wheels \
        msgspec simpy cyclopts docstring-parser rich-rst docutils tomli-w termcolor
    pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=$PWD/site      # there

`--device cpu --tiny` rehearses the pieces as far as a CPU can: the tests are collected and skip themselves, peaks are
those of the CPU's allocator, runs of two epochs take 64 images (with `--cifar` of the archive, which is also read once
as a whole; else digits). A pair of VGG-11 is among them for the size of its checkpoints. Not rehearsed are the memory
limit, power and energy, a calibration to its end, and how long the GPU takes for anything. On 2026-11-29 the rehearsal
ran to its end in 247 s beside the test suite (in 147 s the day before, alone), from an empty folder with the commands
above: Python 3.12.3, torch 2.11.0+cu130, torchvision 0.26.0, two cores of an AMD EPYC. To carry: the checkout,
`wheels` (2.5 MB), the archive (18 MB).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gpu_parts
import gpu_shown
import gpu_steps
import gpu_tests
import msgspec
import torch
from gpu_runs import EPOCHS, MAX_FILE_BYTES, Pair, Runs
from gpu_steps import board_name, rows, write
from processes import PTSIM, in_own_process, num_epochs, running_s

import ptsim
from ptsim.errors import PtsimError
from ptsim.hardware.profile_file import read_device_profile
from ptsim.textfile import write_whole
from ptsim.units import GIB, format_bytes

MOST_ATTEMPTS = 3  # of a piece that fails and gets no further
_SHORTEST_S = 40.0  # what is left must be longer for a piece to begin
_SHORTEST_TRAINING_S = 120.0  # it loads and tunes for some seconds each time
_WHOLE = 0.7  # of its part must be left for a training to begin that cannot go on once the work folder is lost
_FIRST_SHARE = 0.4  # of a calibration is for the number format of the runs
_LOG_BYTES = 2**17  # of each piece
_WORK_BYTES = 2 * GIB  # 60,000 images in blocks of 4 KiB; of each run of a pair the weights of every tenth epoch
# What comes out: the docstring says of each what it is.
RESULTS = (
    "tests.txt", "device.toml", "runs.tar", "steps.json", "memory.json", "validation.json", "campaign.json", "logs.txt",
)  # fmt: skip
_NOTES = ("campaign.json", "logs.txt")


class Piece(NamedTuple):
    """What it does, whether it is finished, what works on it, and its part of half an hour.

    With no part it is done when everything else is. `least_s` must be left of a call for it to begin. `pairs` and
    `steps` are what it trains and measures.
    """

    about: str
    done: Callable[[], bool]
    work: Callable[[], None]
    minutes: float
    least_s: float = _SHORTEST_S
    pairs: Sequence[Pair] = ()
    steps: Sequence[gpu_steps.Combination] = ()
    power: bool = False


class Campaign:
    """The pieces, and how far they are."""

    def __init__(
        self,
        options: argparse.Namespace,
        *,
        clock: Callable[[], float] = time.monotonic,
        trainings: Runs | None = None,
    ) -> None:
        """`clock` and `trainings` are other ones where the campaign is only planned."""
        self.out: Path = options.out
        self.work: Path = options.work or options.out / "work"
        # Some of torch's functions want the number of a GPU.
        self.device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
        self.board: str | None = None  # what the driver calls the GPU
        self.tiny: bool = options.tiny
        self.clock = clock
        self.deadline_s = clock() + 60 * options.minutes
        self.steps = gpu_steps.Steps(self.out, self.device, tiny=self.tiny, remaining_s=self.remaining_s)
        first, more, stages, peaks = (
            (gpu_steps.TINY_STEPS, gpu_steps.TINY_STEPS[:1], [], gpu_steps.TINY_PEAKS)
            if self.tiny
            else (gpu_steps.FIRST_STEPS, gpu_steps.MORE_STEPS, gpu_steps.STAGES, gpu_steps.PEAKS)
        )
        vgg, resnet = Pair("vgg11", 1), Pair("resnet32", 1)
        seeds: tuple[Pair, ...] = Pair("vgg11", 2), Pair("vgg11", 3)
        if self.tiny:
            # VGG-11, too: its checkpoints are as large as those of the campaign.
            vgg, resnet, seeds = Pair("resnet20", 1), Pair("resnet20", 1), seeds[:1]
        self.pairs = tuple(dict.fromkeys((vgg, resnet, *seeds)))
        self.trainings = trainings or Runs(self.out, self.work, self.device.type, tiny=self.tiny, cifar=options.cifar)
        self.trainings.remaining_s = self.remaining_s
        limits = self.steps.limits_done, self.steps.limits
        # ResNet-32 has no part: its pair is predicted to take 30 minutes, and can go on in the next half hour. VGG-11's
        # takes 10, and cannot.
        self.pieces: dict[str, Piece] = {
            "tests": Piece("pytest -m gpu: every branch that asks for CUDA", self.tested, self.test, 2.5),
            "calibrate": Piece("ptsim calibrate gpu: operators and whole steps", self.calibrated, self.calibrate, 4.0),
            "vgg11": self._pairs_piece((vgg,), 12.0, least_s=60 * _WHOLE * min(12.0, options.minutes)),
            "peaks": self._steps_piece("20 networks, a few steps each", peaks, 2.0, power=False),
            "resnet50": self._steps_piece(
                "ResNet-50 at 224², dense and three pruned stages, fp32 and AMP in bf16", stages, 1.5
            ),
            "steps": self._steps_piece("ResNet-50 in other formats, other networks", first, 2.3),
            "memory": Piece("largest mini-batch said to fit 8 GiB: does it?", *limits, 1.0),
            "resnet32": self._pairs_piece((resnet,), 0.0),
            "seeds": self._pairs_piece(seeds, 0.0),
            "more-steps": self._steps_piece("stages in fp16, more networks, mini-batches and precisions", more, 0.0),
            "validate": Piece("the runs predicted in three ways; needs no GPU", self.validated, self.validate, 0.0),
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
        return sorted(open_, key=lambda name: not self.part_left_s(name))

    def part_left_s(self, name: str) -> float:
        """What is left of a piece's part; 0 where that is too short to begin with."""
        piece = self.pieces[name]
        left_s = 60 * piece.minutes - self.spent_s(name)
        return left_s if left_s > (_SHORTEST_TRAINING_S if piece.pairs else _SHORTEST_S) else 0.0

    def minutes_for(self, name: str) -> float:
        """What a piece may take now: what is left of its part; all that is left of the call once it has had that."""
        return min(self.part_left_s(name) or self.remaining_s(), self.remaining_s()) / 60

    def remaining_s(self) -> float:
        """Seconds until this call has to end."""
        return self.deadline_s - self.clock()

    def note(self, piece: str, seconds: float, failed: str | None, *, further: bool) -> None:
        """Write down that a piece ran."""
        entry = {"piece": piece, "seconds": round(seconds, 1), "failed": failed, "further": further}
        entry["device"] = self.board
        noted = self._parts_of(piece)
        if noted.exists():  # not where the process was killed
            entry |= msgspec.json.decode(noted.read_bytes())
            noted.unlink()
        write(self.out / "campaign.json", [*self.log, entry])

    def note_parts(self, piece: str, started_s: float) -> None:
        """Leave what the parts of a piece took to the process that notes the piece; `started_s` is this one's start."""
        parts = gpu_parts.Parts()
        parts.add("start", started_s)
        found = parts.found | self.steps.parts.found | self.trainings.parts.found
        with contextlib.suppress(OSError):  # what the piece has done is worth more
            write(self._parts_of(piece), {"parts": found, "turns": self.trainings.turns})

    def _parts_of(self, piece: str) -> Path:
        return self.work / f"{piece}.parts"

    def keep_logs(self) -> None:
        """Put the end of what each piece has said into the results."""
        texts = [
            f"==== {path.stem} ====\n{path.read_bytes()[-_LOG_BYTES:].decode(errors='replace')}"
            for path in sorted(self.work.glob("*.log"))
        ]
        write_whole(self.out / "logs.txt", "\n".join(texts))

    def size(self) -> int:
        """Bytes of all results: a piece that made it larger got further."""
        paths = [self.out / name for name in RESULTS if name not in _NOTES]
        return sum(path.stat().st_size for path in paths if path.exists())

    def sweep(self) -> None:
        """Remove what a piece that was killed has half written (`write_whole`): it would be the ninth file."""
        for name in RESULTS:
            for path in self.out.glob(f".{name}.*"):
                path.unlink(missing_ok=True)

    def take_over(self, earlier: Path) -> None:
        """Copy the results of an earlier call, where this folder has none of that name."""
        for name in RESULTS:
            if (earlier / name).is_file() and not (self.out / name).exists():
                write_whole(self.out / name, (earlier / name).read_bytes())

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
            steps=wanted,
            power=power,
        )

    def _pairs_piece(self, pairs: Sequence[Pair], minutes: float, least_s: float = 0.0) -> Piece:
        """With `least_s` so much must be left for the runs to begin: their checkpoints do not fit into the results."""
        epochs = f"{EPOCHS} epochs of CIFAR-10" if not self.tiny else "two epochs of 64 images"
        named = ", ".join(f"{pair.model} seed {pair.seed}" for pair in pairs)
        begun = self.trainings.begun(pairs)
        return Piece(
            f"dense and PruneTrain in turn, {epochs}, NVML energy: {named}",
            lambda: all(self.trainings.trained(name) for pair in pairs for name in pair.runs),
            lambda: self.trainings.train(pairs),
            minutes,
            _SHORTEST_S if self.tiny else max(0.0 if begun else least_s, _SHORTEST_TRAINING_S),
            pairs=pairs,
        )

    # ---- tests -------------------------------------------------------------------------------------------------

    def tested(self) -> bool:
        """The tests marked gpu ran to their end, whatever they said."""
        report = self.out / "tests.txt"
        return report.exists() and gpu_tests.ENDED in report.read_text(encoding="utf-8", errors="replace")

    def test(self) -> None:
        """Run them in the checkout that this script is in; failures are results, not failures of the piece."""
        report = self.out / "tests.txt"
        if not (gpu_tests.ROOT / "tests").is_dir():
            write_whole(report, f"not run: no tests beside this script\n{gpu_tests.ENDED} 0\n")
        else:
            gpu_tests.run(report, self.work.resolve(), self.remaining_s())

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
        return [path for name in names if num_epochs(path := self.trainings.kept(name)) > 0]

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
        before, before_s = campaign.size(), campaign.remaining_s()
        print(f"piece {name}, at most {minutes:.1f} minutes", flush=True)
        failed = run(name, minutes)
        campaign.sweep()
        further = campaign.size() > before
        campaign.note(name, before_s - campaign.remaining_s(), failed, further=further)
        campaign.keep_logs()
        if not (failed and further and campaign.part_left_s(name)):
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
    parser.add_argument("--plan", action="store_true", help="print what each piece costs and which calls that makes")
    parser.add_argument("--gpu", default="h100-sxm5-80gb", help="of the catalog, whose costs the plan predicts")
    parser.add_argument(
        "--noted", type=Path, help="results of a rehearsal or earlier calls, whose times the plan takes"
    )
    options = parser.parse_args(arguments)
    if not 0 < options.minutes < math.inf:
        parser.error(f"--minutes {options.minutes:g}: expected a positive number")
    if options.plan:
        try:
            return gpu_shown.show(options, Campaign, work_through)
        except PtsimError as error:
            parser.error(error.message)
    started_s = running_s()
    options.minutes -= started_s / 60  # the first to import torch on a machine waits for its files
    campaign = Campaign(options)
    if options.piece is not None and options.piece not in campaign.pieces:
        parser.error(f"unknown piece {options.piece!r}; known: {', '.join(campaign.pieces)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --tiny rehearses")
    for name in ("cifar", "earlier"):
        if (given := getattr(options, name)) is not None and not given.exists():
            parser.error(f"--{name} {given}: there is no such file or folder")
    campaign.out.mkdir(parents=True, exist_ok=True)
    campaign.work.mkdir(parents=True, exist_ok=True)
    if options.piece is not None:
        try:
            campaign.pieces[options.piece].work()
        finally:
            campaign.note_parts(options.piece, started_s)
        return 0
    if options.cifar is None and not options.tiny:
        print("no --cifar: the runs train on synthetic images, whose accuracy says nothing", file=sys.stderr)
    if not options.tiny and (free := shutil.disk_usage(campaign.work).free) < _WORK_BYTES:
        room = f"{format_bytes(free)} free, and images and a pair of VGG-11 take about {format_bytes(_WORK_BYTES)}"
        print(f"--work {campaign.work} has {room}", file=sys.stderr)
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


def _safely(done: Callable[[], bool]) -> bool:
    """Whether a piece is done; results that cannot be read are not."""
    with contextlib.suppress(PtsimError, msgspec.MsgspecError, KeyError, tarfile.TarError):
        return done()
    return False


if __name__ == "__main__":
    sys.exit(main())
