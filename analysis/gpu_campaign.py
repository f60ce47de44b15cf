r"""What should a machine with one NVIDIA GPU record, if it is lent for minutes at a time?

    python analysis/gpu_campaign.py --plan
    python analysis/gpu_campaign.py --out results --work work --cifar cifar10-jpeg.tar.xz

`--plan` prints every piece, what it does and how long it may take. One call works for at most `--minutes`, piece after
piece in the order of their worth, and says what is left; call it again until nothing is. Every piece is a process of
its own that goes on where it was, so one that fails, or that an error of the GPU takes down, costs no other piece
anything: it is noted in `campaign.json` and tried again later. Pieces go on as long as `--out` is kept; trainings also
need `--work` (checkpoints, unpacked images). What comes out, at most eight files of at most 16 MiB each:

    tests.txt           what the tests marked gpu said
    device.toml         the device profile: machine constants, whole steps of zoo networks, operators
    runs.tar            traces of dense and PruneTrain runs, side by side, with profiles of each architecture and NVML
    steps.json          steps of many networks, dense and pruned: time, power and peak memory, measured and predicted
    memory.json         the largest mini-batch that was said to fit, and whether it did, in a part of the memory
    validation.json     the runs predicted: from their own profiles, from device.toml alone, and from each other
    campaign.json       when which piece ran, for how long, and what stopped it

It needs no network and no git, but ptsim installed (`ptsim.models` exists only then). For a machine that has torch,
pandas, scikit-learn and the like and cannot fetch anything, bring wheels for its Python of what it lacks; fvcore,
iopath and yacs have to be built first. This list was tried with Python 3.12 and torch 2.11, from an empty folder:

    pip wheel --no-deps -w wheels . fvcore iopath yacs
    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 -d wheels \
        msgspec simpy cyclopts docstring-parser rich-rst tomli-w termcolor
    pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=site      # there

`--device cpu --tiny` rehearses everything in about a minute.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import functools
import gc
import hashlib
import io
import itertools
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import nn
from torch.nn import functional as F

import ptsim
from ptsim import zoo
from ptsim.capture.network import capture_network
from ptsim.costs.energy import step_energy
from ptsim.costs.memory import iteration_memory, largest_batch
from ptsim.costs.step import step_time
from ptsim.errors import PtsimError
from ptsim.hardware.catalog import match_device
from ptsim.hardware.profile_file import read_device_profile
from ptsim.measure.calibrate import make_optimizer
from ptsim.measure.nvml import open_meter
from ptsim.measure.profile import Budget, number_format, profile_network, tf32_allowed, tuned_convolutions
from ptsim.network import MemoryFormat, Network, Precision
from ptsim.prune.groups import find_groups
from ptsim.prune.reconfigure import remove_channels
from ptsim.setting import StepSetting
from ptsim.textfile import write_whole
from ptsim.units import GIB

MAX_FILE_BYTES = 16 * 2**20
MOST_ATTEMPTS = 3  # of a piece that fails and gets no further
_SHORTEST_S = 40.0  # what is left must be longer for a piece to begin
_GRACE_S = 25.0  # after its time a piece may write down what it has
Combination = tuple[str, int, str, MemoryFormat]
FORMATS: tuple[MemoryFormat, ...] = ("contiguous", "channels_last")
FIRST_STEPS: list[Combination] = [
    *itertools.product(("torchvision:resnet50",), (64,), ("fp32", "tf32", "bf16", "fp16"), FORMATS),
    *itertools.product(("vgg13", "resnet50", "resnet32"), (128,), ("fp32", "tf32", "bf16"), ("contiguous",)),
    *itertools.product(
        ("torchvision:vgg16_bn", "torchvision:mobilenet_v2", "torchvision:densenet121"),
        (32,),
        ("tf32", "bf16"),
        FORMATS,
    ),
]
MORE_STEPS: list[Combination] = [
    *itertools.product(
        ("torchvision:resnet18", "torchvision:efficientnet_b0", "torchvision:convnext_tiny", "torchvision:swin_t"),
        (64,),
        ("tf32", "bf16"),
        FORMATS,
    ),
    *itertools.product(("torchvision:resnet50", "torchvision:vgg16_bn"), (16, 256), ("fp32", "bf16"), FORMATS),
    *itertools.product(("torchvision:mobilenet_v2",), (128,), ("fp32", "tf32", "bf16", "fp16"), FORMATS),
    *itertools.product(("vgg13", "resnet50", "resnet32"), (512,), ("fp32", "tf32", "bf16"), FORMATS),
]
# One step each, for the allocator's peak: 20 networks of 14 families.
PEAKS: list[Combination] = [
    (f"torchvision:{name}", 32, "bf16", "channels_last")
    for name in (
        "alexnet", "convnext_small", "densenet169", "efficientnet_b3", "efficientnet_v2_s", "googlenet",
        "inception_v3", "maxvit_t", "mnasnet1_0", "mobilenet_v3_large", "regnet_x_8gf", "regnet_y_3_2gf", "resnet101",
        "resnext50_32x4d", "shufflenet_v2_x1_0", "squeezenet1_1", "swin_v2_t", "vgg11", "vit_b_16", "wide_resnet50_2",
    )
]  # fmt: skip
# ResNet-50 as pruning leaves it: this share of the prunable channels is gone.
PRUNED_STEPS: list[Combination] = [
    *itertools.product(
        [f"pruned {share} torchvision:resnet50" for share in (0.2, 0.4, 0.6)], (64,), ("fp32", "bf16"), FORMATS[1:]
    )
]
TINY_STEPS: list[Combination] = [
    ("resnet20", 4, "fp32", "contiguous"),
    # Not channels_last: oneDNN corrupts its memory there on a CPU without AVX-512 (torch 2.14.1, odd channel counts).
    ("pruned 0.5 resnet20", 2, "fp32", "contiguous"),
]
LIMITED: list[Combination] = [
    ("torchvision:resnet50", 0, "fp32", "contiguous"),
    ("torchvision:resnet50", 0, "bf16", "channels_last"),
    ("torchvision:mobilenet_v2", 0, "bf16", "channels_last"),
    ("torchvision:vgg16_bn", 0, "fp32", "contiguous"),
    ("resnet50", 0, "tf32", "contiguous"),
]
LIMIT_BYTES = 8 * GIB


class Pair(NamedTuple):
    """A dense and a PruneTrain run of one network and seed, trained side by side so that both meet the same machine."""

    model: str
    seed: int

    @property
    def runs(self) -> dict[str, float]:
        """Name of each run and its penalty ratio."""
        return {f"{self.model}-{kind}-s{self.seed}": ratio for kind, ratio in (("dense", 0.0), ("pruned", 0.25))}


class Piece(NamedTuple):
    """What it does, whether it is finished, what works on it, and how long it may take of one call."""

    about: str
    done: Callable[[], bool]
    work: Callable[[], None]
    minutes: float


class Campaign:
    """The pieces, and how far they are."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out: Path = options.out
        self.work: Path = options.work or options.out / "work"
        self.device = torch.device(options.device)
        self.tiny: bool = options.tiny
        self.cifar: Path | None = options.cifar
        self.deadline_s = time.monotonic() + 60 * options.minutes
        first, more = (TINY_STEPS, TINY_STEPS[:1]) if self.tiny else (FIRST_STEPS, MORE_STEPS)
        pruned, peaks = ([], []) if self.tiny else (PRUNED_STEPS, PEAKS)
        vgg, resnet, seeds = Pair("vgg11", 1), Pair("resnet32", 1), (Pair("vgg11", 2), Pair("vgg11", 3))
        if self.tiny:
            vgg, resnet, seeds = Pair("resnet20", 1), Pair("resnet20", 1), ()
        self.pairs = tuple(dict.fromkeys((vgg, resnet, *seeds)))
        steps_of = functools.partial(self._steps_piece, minutes=3.0)
        self.pieces: dict[str, Piece] = {
            "tests": Piece("pytest -m gpu: every branch that asks for CUDA", self.tested, self.test, 3.0),
            "calibrate": Piece("ptsim calibrate gpu: operators and whole steps", self.calibrated, self.calibrate, 8.5),
            "vgg11": self._pairs_piece((vgg,)),
            "peaks": steps_of("peak memory and one step of 20 networks", peaks),
            "pruned-steps": steps_of("ResNet-50 at 224², three pruned stages", pruned),
            "steps": steps_of("ResNet-50 and others at 224² and CIFAR networks, dense", first),
            "memory": Piece("largest mini-batch said to fit 8 GiB: does it?", self.limited, self.limits, 1.5),
            "resnet32": self._pairs_piece((resnet,)),
            "validate": Piece("the runs predicted in three ways", self.validated, self.validate, 2.0),
            "seeds": self._pairs_piece(seeds),
            "more-steps": steps_of("more networks, mini-batches and precisions", more, minutes=8.5),
        }
        self._networks: dict[str, tuple[nn.Module, Network]] = {}

    @property
    def log(self) -> list[dict[str, Any]]:
        """What ran so far."""
        return _rows(self.out / "campaign.json")

    def left(self) -> list[str]:
        """Names of the pieces that are not finished and not given up."""
        failures = collections.Counter(entry["piece"] for entry in self.log if entry["failed"] and not entry["further"])
        return [
            name for name, piece in self.pieces.items() if failures[name] < MOST_ATTEMPTS and not _safely(piece.done)
        ]

    def remaining_s(self) -> float:
        """Seconds until this call has to end."""
        return self.deadline_s - time.monotonic()

    def note(self, piece: str, seconds: float, failed: str | None, *, further: bool) -> None:
        """Write down that a piece ran."""
        entry = {"piece": piece, "seconds": round(seconds, 1), "failed": failed, "further": further}
        _write(self.out / "campaign.json", [*self.log, entry])

    def size(self) -> int:
        """Bytes of all results: a piece that made it larger got further."""
        return sum(path.stat().st_size for path in self.out.glob("*.*") if path.name != "campaign.json")

    def _steps_piece(self, about: str, wanted: Sequence[Combination], *, minutes: float) -> Piece:
        return Piece(
            f"{about}: time, power and memory", lambda: self.stepped(wanted), lambda: self.steps(wanted), minutes
        )

    def _pairs_piece(self, pairs: Sequence[Pair]) -> Piece:
        epochs = "182 epochs of CIFAR-10" if not self.tiny else "two epochs of digits"
        named = ", ".join(f"{pair.model} seed {pair.seed}" for pair in pairs)
        runs = {name: (pair, ratio) for pair in pairs for name, ratio in pair.runs.items()}
        return Piece(
            f"dense and PruneTrain side by side, {epochs}, NVML energy: {named}",
            lambda: all(self.trained(name) for name in runs),
            lambda: self.train(runs),
            8.5,
        )

    # ---- tests -------------------------------------------------------------------------------------------------

    def tested(self) -> bool:
        """The tests marked gpu ran to their end, whatever they said."""
        report = self.out / "tests.txt"
        return report.exists() and "pytest ended with status" in report.read_text(encoding="utf-8")

    def test(self) -> None:
        """Run them in the checkout that this script is in; failures are results, not failures of the piece."""
        root = Path(__file__).resolve().parent.parent
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(root / "tests")]
        if self.device.type != "cuda" or not (root / "tests").is_dir():
            report, status = f"not run: {'no tests beside this script' if self.device.type == 'cuda' else 'a CPU'}", 0
        else:
            ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
            report, status = ran.stdout + ran.stderr, ran.returncode
        write_whole(self.out / "tests.txt", f"{report}\npytest ended with status {status}\n")

    # ---- steps -------------------------------------------------------------------------------------------------

    def stepped(self, wanted: Sequence[Combination]) -> bool:
        """Every combination has a row."""
        return not wanted or {_combination(row) for row in _rows(self.out / "steps.json")}.issuperset(wanted)

    def steps(self, wanted: Sequence[Combination]) -> None:
        """One row per network, mini-batch, precision and memory format; a failure is a row with its reason."""
        table = self.out / "steps.json"
        rows = _rows(table)
        known = {_combination(row) for row in rows}
        for combination in wanted:
            if combination not in known and self.remaining_s() > (0 if self.tiny else 10):
                row, broken = self.step(*combination)
                rows.append(row)
                _write(table, rows)
                if broken is not None:
                    raise broken

    def step(
        self, model_name: str, batch: int, precision_name: str, memory_format: MemoryFormat
    ) -> tuple[dict[str, Any], RuntimeError | None]:
        """Measured and predicted time and memory of one training step, and an error that may have broken the GPU."""
        precision = Precision(precision_name)
        row: dict[str, Any] = {
            "model": model_name,
            "batch": batch,
            "precision": precision_name,
            "memory_format": memory_format,
            "torch": str(torch.__version__),
        }
        meter = open_meter(self.device)
        known = match_device(meter.info().name)
        try:
            model, network = self.network(model_name)
            setting = StepSetting(batch=batch, precision=precision, memory_format=memory_format)
            need = iteration_memory(network, setting, device=known)
            row |= {"predicted_peak_bytes": need.peak_bytes, "predicted_device_bytes": need.device_bytes}
            if known is not None:
                step = step_time(network, known, setting)
                row |= {"predicted_step_s": step.compute_s, "low_s": step.low_s, "high_s": step.high_s}
                row |= {"tier": step.tier, "predicted_power_w": step_energy(step, known).mean_power_w}
            here = copy.deepcopy(model).to(self.device).to(memory_format=_layout(memory_format))
            meter.start()
            profile = profile_network(
                here,
                network,
                batch=batch,
                precision=precision,
                memory_format=memory_format,
                optimizer=make_optimizer("sgd", here.parameters()),
                device=self.device,
                budget=Budget(min_seconds=0.0 if self.tiny else 1.0, max_seconds=max(self.remaining_s(), 1.0)),
            )
            use = meter.stop()
            row |= {"measured_step_s": profile.step_s, "measured_peak_bytes": profile.peak_memory_bytes}
            if self.device.type == "cuda":
                row["reserved_bytes"] = torch.cuda.max_memory_reserved(self.device)
            row |= {"device": profile.device, "use": None if use is None else msgspec.to_builtins(use)}
            row["profile"] = msgspec.to_builtins(profile)
        except (PtsimError, torch.OutOfMemoryError) as error:
            row["failed"] = _sentence(error)
        except RuntimeError as error:  # after an error of CUDA itself nothing works in this process any more
            row["failed"] = _sentence(error)
            return row, error
        finally:
            _free(self.device)
        return row, None

    def network(self, name: str) -> tuple[nn.Module, Network]:
        """The model on the CPU and its description, made once; "pruned SHARE NAME" is NAME without that share."""
        if name not in self._networks:
            pruned, _, share = name.rpartition(" ")[0].partition(" ")
            base = name.rpartition(" ")[2]
            entry = zoo.find(base)
            torch.manual_seed(0)
            model = zoo.create(base)
            if pruned:
                remove_share(model, entry.input_shape, float(share))
            network = capture_network(model, name=name, input_shape=entry.input_shape, num_classes=entry.num_classes)
            self._networks[name] = model, network
        return self._networks[name]

    # ---- memory ------------------------------------------------------------------------------------------------

    def limited(self) -> bool:
        """Every network was tried; a CPU has no allocator that can be limited."""
        tried = _rows(self.out / "memory.json")
        return len(tried) == (1 if self.device.type != "cuda" else len(LIMITED))

    def limits(self) -> None:
        """In 8 GiB of the memory: does what is said to fit run, and how much more would have run?"""
        table = self.out / "memory.json"
        rows = _rows(table)
        if self.device.type != "cuda":
            _write(table, [{"failed": "a CPU has no allocator that can be limited"}])
            return
        for name, _, precision_name, memory_format in LIMITED[len(rows) :]:
            precision = Precision(precision_name)
            row: dict[str, Any] = {"model": name, "precision": precision_name, "memory_format": memory_format}
            model, network = self.network(name)
            known = match_device(open_meter(self.device).info().name)
            said = largest_batch(
                network,
                StepSetting(batch=1, precision=precision, memory_format=memory_format),
                capacity_bytes=LIMIT_BYTES,
                device=known,
            )
            shape = zoo.find(name).input_shape
            runs = functools.partial(
                runs_steps,
                model,
                shape,
                precision=precision,
                memory_format=memory_format,
                device=self.device,
            )
            with memory_limit(self.device, LIMIT_BYTES):
                fitted = around_the_limit(runs, said)
            row |= {"limit_bytes": LIMIT_BYTES, "said_to_fit": said, **fitted}
            rows.append(row)
            _write(table, rows)

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
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.jsonl"

    def train(self, runs: Mapping[str, tuple[Pair, float]]) -> None:
        """Begin or go on with all of them at once; at the deadline they are interrupted as by Ctrl-C."""
        commands = {name: self.train_arguments(name, *run) for name, run in runs.items() if not self.trained(name)}
        run_together(commands, self.remaining_s, lambda: self.keep(runs))

    def train_arguments(self, name: str, pair: Pair, penalty_ratio: float) -> list[str]:
        """The command line that begins the run, or goes on with it."""
        folder = self.work / name
        if (folder / "trace.jsonl").exists():
            return ["train", "--resume", str(folder)]
        return [
            "train", "--out", str(folder), "--model", pair.model, "--penalty-ratio", str(penalty_ratio),
            "--seed", str(pair.seed), "--set", f"device={self.device.type}", *self.data(),
        ]  # fmt: skip

    def keep(self, names: Iterable[str]) -> None:
        """Put the traces into the results, unless what is there has got further (the checkpoints were lost)."""
        for name in names:
            kept, here = self.kept(name), self.work / name / "trace.jsonl"
            if here.exists() and _num_epochs(here) >= _num_epochs(kept):
                write_whole(kept, here.read_bytes())
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for trace in sorted((self.work / "traces").glob("*.jsonl")):
                archive.add(trace, arcname=trace.name)
        write_whole(self.out / "runs.tar", packed.getvalue())

    def data(self) -> list[str]:
        """The paper's schedule on CIFAR-10 from its JPEG archive; on synthetic images of the same size without one."""
        if self.tiny:
            return ["--dataset", "digits", "--train-limit", "64", "--batch", "16", "--epochs", "2", "--interval", "1"]
        common = ["--batch", "128", "--epochs", "182", "--interval", "10", "--lr", "0.1"]
        if self.cifar is None:
            return [*common, "--dataset", "synthetic"]
        folder = self.work / "cifar10"
        if not (folder / "complete").exists():
            with tarfile.open(self.cifar) as archive:
                archive.extractall(folder, filter="data")
            (folder / "complete").touch()
        root = next(path.parent for path in sorted(folder.rglob("train")) if path.is_dir())
        return [*common, "--dataset", "imagefolder", "--data-dir", str(root)]

    # ---- calibration and validation ----------------------------------------------------------------------------

    def calibrated(self) -> bool:
        """The queue was finished; a rehearsal is content with a beginning."""
        profile = self.out / "device.toml"
        return profile.exists() and (self.tiny or read_device_profile(profile).complete)

    def calibrate(self) -> None:
        """Zoo steps first, then operators until time is over."""
        profile = self.out / "device.toml"
        more = ["--resume"] if profile.exists() else []
        more += ["--precision", "fp32", "--memory-format", "contiguous"] if self.tiny else []
        minutes = 0.1 if self.tiny else max(self.remaining_s() / 60 - 0.2, 0.1)
        options = ["--device", self.device.type, "--out", str(profile), "--minutes", str(minutes), *more]
        subprocess.run([sys.executable, "-m", "ptsim", "calibrate", "gpu", *options], check=True)

    def runs(self) -> list[Path]:
        """Traces with at least one epoch."""
        names = [name for pair in self.pairs for name in pair.runs]
        return [path for name in names if _num_epochs(path := self.kept(name))]

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
            except PtsimError as error:
                results[name] = {"failed": error.message}
        _write(self.out / "validation.json", results)


def remove_share(model: nn.Module, input_shape: tuple[int, int, int], share: float) -> None:
    """Remove a random share of the prunable channels as a reconfiguration would."""
    groups = find_groups(model, input_shape)
    generator = torch.Generator().manual_seed(0)
    remove_channels(model, groups, torch.rand(groups.num_components, generator=generator) < share)


def around_the_limit(runs: Callable[[int], bool], said: int) -> dict[str, Any]:
    """Whether the mini-batch that is said to fit runs, and the range in which the largest that runs lies.

    A false "fits" is the grave error: then it looks below, else above.
    """
    if said < 1:
        return {"fits": None, "largest_that_ran": None, "smallest_that_failed": None}
    fits = runs(said)
    factors = (1.05, 1.1, 1.2, 1.4, 1.8) if fits else (0.95, 0.9, 0.8, 0.6)
    ran, failed = (said, None) if fits else (None, said)
    for factor in factors:
        batch = max(round(said * factor), 1)
        if runs(batch):
            ran = batch
            if not fits:
                break
        else:
            failed = batch
            if fits:
                break
    return {"fits": fits, "largest_that_ran": ran, "smallest_that_failed": failed}


def runs_steps(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    batch: int,
    precision: Precision,
    memory_format: MemoryFormat,
    device: torch.device,
) -> bool:
    """Whether two whole training steps of a copy of `model` fit into the memory that the process may have."""
    optimizer: torch.optim.Optimizer | None = None
    images = loss = None
    try:
        here = copy.deepcopy(model).to(device).to(memory_format=_layout(memory_format))
        optimizer = make_optimizer("sgd", here.parameters())
        images = torch.randn((batch, *input_shape), device=device).contiguous(memory_format=_layout(memory_format))
        labels = torch.zeros(batch, dtype=torch.int64, device=device)
        with tf32_allowed(precision), tuned_convolutions():
            for _ in range(2):
                optimizer.zero_grad(set_to_none=True)
                with number_format(precision, device):
                    loss = F.cross_entropy(here(images), labels)
                loss.backward()  # type: ignore[no-untyped-call] # torch's gap
                optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return False
    finally:
        here = optimizer = images = loss = None  # type: ignore[assignment] # or the memory stays taken
        _free(device)
    return True


@contextlib.contextmanager
def memory_limit(device: torch.device, limit_bytes: int) -> Iterator[None]:
    """As on a device with `limit_bytes`: the allocator gets what CUDA's own context leaves of it."""
    _free(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    context_bytes = total_bytes - free_bytes - torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction(max(limit_bytes - context_bytes, 1) / total_bytes, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def work_through(campaign: Campaign, run: Callable[[str, float], str | None]) -> list[str]:
    """Piece after piece until time is over, each at most once; `run` gets a name and minutes, and gives what failed.

    Returns:
        Names of the pieces that are left.
    """
    tried: set[str] = set()
    while campaign.remaining_s() > _SHORTEST_S:
        name = next((name for name in campaign.left() if name not in tried), None)
        if name is None:
            break
        tried.add(name)
        minutes = min(campaign.pieces[name].minutes, campaign.remaining_s() / 60)
        before, began_s = campaign.size(), time.monotonic()
        print(f"piece {name}, at most {minutes:.1f} minutes", flush=True)
        failed = run(name, minutes)
        campaign.note(name, time.monotonic() - began_s, failed, further=campaign.size() > before)
        if failed:
            print(f"piece {name} failed: {failed}", file=sys.stderr)
    for file in campaign.out.glob("*.*"):
        if file.stat().st_size > MAX_FILE_BYTES:
            print(f"{file} is larger than 16 MiB", file=sys.stderr)
    return campaign.left()


def in_own_process(arguments: Sequence[str], name: str, minutes: float, log: Path) -> str | None:
    """Run one piece with the command line `arguments` as a process; what failed, None if nothing did."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--piece", name, "--minutes", str(minutes)]
    with open(log, "w", encoding="utf-8") as errors:
        process = subprocess.Popen(command, process_group=0, stderr=errors)
        try:
            status = process.wait(timeout=60 * minutes + _GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped {_GRACE_S:.0f} s after its time"
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    if status == 0:
        return None
    said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"status {status}: {' '.join(said[-1:])[:300]}"


def main(arguments: list[str] | None = None) -> int:
    """Work on the pieces; 0 when nothing is left, 3 when there is more to do."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"), help="results; keep it between calls")
    parser.add_argument("--work", type=Path, help="checkpoints and images; OUT/work if left out")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 as JPEG images in a tar archive")
    parser.add_argument("--minutes", type=float, default=8.5, help="of this call")
    parser.add_argument("--piece", help="this one alone, in this process")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal")
    parser.add_argument("--plan", action="store_true", help="print the pieces in their order, and do nothing")
    options = parser.parse_args(arguments)
    campaign = Campaign(options)
    if options.piece is not None and options.piece not in campaign.pieces:
        parser.error(f"unknown piece {options.piece!r}; known: {', '.join(campaign.pieces)}")
    if options.plan:
        total = 0.0
        for name, piece in campaign.pieces.items():
            total += piece.minutes
            print(f"{name:14} at most {piece.minutes:4.1f} minutes a call ({total:4.1f} so far)  {piece.about}")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --tiny rehearses")
    campaign.out.mkdir(parents=True, exist_ok=True)
    campaign.work.mkdir(parents=True, exist_ok=True)
    if options.piece is not None:
        campaign.pieces[options.piece].work()
        return 0
    left = work_through(
        campaign, lambda name, minutes: in_own_process(arguments, name, minutes, campaign.work / f"{name}.log")
    )
    print(f"left: {', '.join(left) or 'nothing'}")
    return 3 if left else 0


def _safely(done: Callable[[], bool]) -> bool:
    """Whether a piece is done; results that cannot be read are not."""
    try:
        return done()
    except (PtsimError, msgspec.MsgspecError, KeyError):
        return False


def _combination(row: dict[str, Any]) -> Combination:
    return row["model"], row["batch"], row["precision"], row["memory_format"]


def run_together(
    commands: Mapping[str, Sequence[str]],
    remaining_s: Callable[[], float],
    meanwhile: Callable[[], None],
    *,
    cores: Sequence[int] | None = None,
) -> None:
    """Run `ptsim` commands at the same time; when no time remains they are interrupted as by Ctrl-C.

    Args:
        commands: arguments of `ptsim`, by the name that a failure is reported under.
        remaining_s: seconds until they have to end.
        meanwhile: called every few seconds and at the end.
        cores: one CPU core for each command, with one thread; None pins nothing.

    Raises:
        RuntimeError: one of them failed by itself.
    """
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "ptsim", *command],
            env=os.environ if cores is None else os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for name, command in commands.items()
    }
    for core, process in zip(cores or (), processes.values(), strict=False):
        os.sched_setaffinity(process.pid, {core})  # its threads begin later and inherit it
    stopped = False
    while any(process.poll() is None for process in processes.values()):
        time.sleep(min(5.0, max(remaining_s(), 0.5)))
        meanwhile()  # also if this process should not get to its end
        if remaining_s() <= 0 and not stopped:
            for process in processes.values():
                process.send_signal(signal.SIGINT)
            stopped = True
    meanwhile()
    failed = [f"{name}: status {process.returncode}" for name, process in processes.items() if process.returncode]
    if failed and not stopped:
        raise RuntimeError(f"ptsim train ended badly: {', '.join(failed)}")


def _num_epochs(trace: Path) -> int:
    return len(ptsim.read_trace(trace).epochs) if trace.exists() else 0


def _rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = msgspec.json.decode(path.read_bytes()) if path.exists() else []
    return rows


def _write(path: Path, content: Any) -> None:
    write_whole(path, msgspec.json.format(msgspec.json.encode(content)))


def _layout(memory_format: MemoryFormat) -> torch.memory_format:
    return torch.channels_last if memory_format == "channels_last" else torch.contiguous_format


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


if __name__ == "__main__":
    sys.exit(main())
