"""What should a machine with one NVIDIA GPU record, if it is lent for minutes at a time?

    python analysis/gpu_campaign.py --out results --work work --cifar cifar10-jpeg.tar.xz

One call runs the first piece that is not finished, stops before nine minutes are over, and says what is left; call it
again until nothing is. Pieces go on where they were as long as `--out` is kept; trainings also need `--work`
(checkpoints, unpacked images). No network is used. What comes out, at most eight files of at most 16 MiB each:

    device.toml         the device profile: machine constants, whole steps of zoo networks, operators
    steps.json          steps of many networks: time and peak memory, measured and predicted
    dense.jsonl         trace of a dense run, with profiles of each architecture and NVML
    pruned.jsonl        trace of a PruneTrain run beside it
    validation.json     both predicted: from their own profiles, from device.toml alone, and from each other

`--device cpu --tiny` rehearses everything in under a minute.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

import ptsim
from ptsim import zoo
from ptsim.capture.network import capture_network
from ptsim.costs.memory import iteration_memory
from ptsim.costs.step import StepSetting, step_time
from ptsim.errors import MissingMeasurementError, PtsimError
from ptsim.hardware.catalog import match_device
from ptsim.hardware.profile import read_device_profile
from ptsim.measure.calibrate import make_optimizer
from ptsim.measure.nvml import open_meter
from ptsim.measure.profile import profile_network
from ptsim.network import MemoryFormat, Precision

MAX_FILE_BYTES = 16 * 2**20
Combination = tuple[str, int, str, MemoryFormat]
FORMATS: tuple[MemoryFormat, ...] = ("contiguous", "channels_last")
STEPS: list[Combination] = [
    *itertools.product(("resnet32", "resnet50", "vgg13"), (128, 512), ("fp32", "tf32", "bf16"), FORMATS),
    *itertools.product(
        ("torchvision:resnet50", "torchvision:vgg16_bn", "torchvision:mobilenet_v2", "torchvision:efficientnet_b0"),
        (32, 128),
        ("fp32", "tf32", "bf16", "fp16"),
        FORMATS,
    ),
    *itertools.product(
        ("torchvision:resnet18", "torchvision:densenet121", "torchvision:convnext_tiny", "torchvision:swin_t"),
        (64,),
        ("tf32", "bf16"),
        FORMATS,
    ),
]
TINY_STEPS: list[Combination] = [("resnet20", 4, "fp32", "contiguous"), ("resnet20", 2, "fp32", "channels_last")]


class Campaign:
    """The pieces, and how far they are."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out: Path = options.out
        self.work: Path = options.work or options.out / "work"
        self.device = torch.device(options.device)
        self.tiny: bool = options.tiny
        self.cifar: Path | None = options.cifar
        self.table, self.profile = self.out / "steps.json", self.out / "device.toml"
        self.validation = self.out / "validation.json"
        self.deadline_s = time.monotonic() + 60 * options.minutes
        self.pieces: dict[str, tuple[Callable[[], bool], Callable[[], None]]] = {
            "steps": (self.steps_done, self.steps),
            "dense": (lambda: self.trained("dense"), lambda: self.train("dense", 0.0)),
            "pruned": (lambda: self.trained("pruned"), lambda: self.train("pruned", 0.25)),
            "calibrate": (self.calibrated, self.calibrate),
            "validate": (self.validation.exists, self.validate),
        }

    def left(self) -> list[str]:
        """Names of the pieces that are not finished."""
        return [name for name, (done, _) in self.pieces.items() if not done()]

    def run(self, name: str) -> None:
        """Work on one piece until it is done or time is over."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)
        self.pieces[name][1]()
        for file in self.out.glob("*.*"):
            if file.stat().st_size > MAX_FILE_BYTES:
                print(f"{file} is larger than 16 MiB", file=sys.stderr)

    def remaining_s(self) -> float:
        """Seconds until this call has to end."""
        return self.deadline_s - time.monotonic()

    def calibrated(self) -> bool:
        """The queue was finished; a rehearsal is content with a beginning."""
        return self.profile.exists() and (self.tiny or read_device_profile(self.profile).complete)

    def calibrate(self) -> None:
        """Zoo steps first, then operators until time is over."""
        more = ["--resume"] if self.profile.exists() else []
        more += ["--precision", "fp32", "--memory-format", "contiguous"] if self.tiny else []
        minutes = 0.02 if self.tiny else max(self.remaining_s() / 60 - 0.5, 0.1)
        _ptsim(
            "calibrate", "gpu", "--device", self.device.type, "--out", str(self.profile), "--minutes", str(minutes),
            *more,
        )  # fmt: skip

    def steps_done(self) -> bool:
        """Every combination has a row."""
        return len(self.rows()) == len(TINY_STEPS if self.tiny else STEPS)

    def rows(self) -> list[dict[str, Any]]:
        """What is known so far."""
        return msgspec.json.decode(self.table.read_bytes()) if self.table.exists() else []

    def steps(self) -> None:
        """One row per network, mini-batch, precision and memory format; a failure is a row with its reason."""
        rows = self.rows()
        known = {(row["model"], row["batch"], row["precision"], row["memory_format"]) for row in rows}
        for combination in TINY_STEPS if self.tiny else STEPS:
            if combination not in known and self.remaining_s() > 45:
                rows.append(self.step(*combination))
                beside = self.table.with_suffix(".new")
                beside.write_bytes(msgspec.json.format(msgspec.json.encode(rows)))
                beside.replace(self.table)

    def step(self, model_name: str, batch: int, precision_name: str, memory_format: MemoryFormat) -> dict[str, Any]:
        """Measured and predicted time and memory of one training step."""
        precision = Precision(precision_name)
        row: dict[str, Any] = {
            "model": model_name,
            "batch": batch,
            "precision": precision_name,
            "memory_format": memory_format,
        }
        entry = zoo.find(model_name)
        torch.manual_seed(0)
        model = zoo.create(model_name).to(self.device)
        layout = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
        model.to(memory_format=layout)
        known = match_device(open_meter(self.device).info().name)
        meter = open_meter(self.device)
        try:
            network = capture_network(
                model, name=model_name, input_shape=entry.input_shape, num_classes=entry.num_classes
            )
            need = iteration_memory(
                network, batch=batch, precision=precision, memory_format=memory_format, device=known
            )
            row |= {"predicted_peak_bytes": need.peak_bytes, "predicted_device_bytes": need.device_bytes}
            if known is not None:
                setting = StepSetting(batch=batch, precision=precision, memory_format=memory_format)
                step = step_time(network, known, setting)
                row |= {"predicted_step_s": step.compute_s, "low_s": step.low_s, "high_s": step.high_s}
                row["tier"] = step.tier
            meter.start()
            profile = profile_network(
                model,
                network,
                batch=batch,
                precision=precision,
                memory_format=memory_format,
                optimizer=make_optimizer("sgd", model.parameters()),
                device=self.device,
                min_seconds=0.0 if self.tiny else 1.0,
            )
            use = meter.stop()
            row |= {"measured_step_s": profile.step_s, "measured_peak_bytes": profile.peak_memory_bytes}
            row |= {"device": profile.device, "use": None if use is None else msgspec.to_builtins(use)}
            row["profile"] = msgspec.to_builtins(profile)
        except (PtsimError, torch.OutOfMemoryError) as error:
            row["failed"] = " ".join(str(error).split())[:300]
        return row

    def trained(self, name: str) -> bool:
        """The run reached its last epoch."""
        trace = self.out / f"{name}.jsonl"
        return trace.exists() and ptsim.read_trace(trace).complete

    def train(self, name: str, penalty_ratio: float) -> None:
        """Begin or go on; at the deadline the run is interrupted as by Ctrl-C, and can be resumed."""
        folder = self.work / name
        if (folder / "trace.jsonl").exists():
            arguments = ["train", "--resume", str(folder)]
        else:
            arguments = [
                "train", "--out", str(folder), "--penalty-ratio", str(penalty_ratio), "--seed", "1",
                "--set", f"device={self.device.type}", *self.data(),
            ]  # fmt: skip
        process = subprocess.Popen([sys.executable, "-m", "ptsim", *arguments])
        try:
            process.wait(timeout=max(self.remaining_s() - 30, 1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait()
        if (folder / "trace.jsonl").exists():
            shutil.copyfile(folder / "trace.jsonl", self.out / f"{name}.jsonl")

    def data(self) -> list[str]:
        """CIFAR-10 from its JPEG archive; synthetic images of the same size without one."""
        if self.tiny:
            return [
                "--model", "resnet20", "--dataset", "digits", "--train-limit", "64", "--batch", "16", "--epochs", "2",
                "--interval", "1",
            ]  # fmt: skip
        common = ["--model", "resnet32", "--batch", "128", "--epochs", "30", "--interval", "5", "--lr", "0.1"]
        if self.cifar is None:
            return [*common, "--dataset", "synthetic"]
        folder = self.work / "cifar10"
        if not (folder / "complete").exists():
            with tarfile.open(self.cifar) as archive:
                archive.extractall(folder, filter="data")
            (folder / "complete").touch()
        root = next(path.parent for path in sorted(folder.rglob("train")) if path.is_dir())
        return [*common, "--dataset", "imagefolder", "--data-dir", str(root)]

    def validate(self) -> None:
        """The three ways to predict the two runs; one that is not possible says why."""
        runs = [self.out / "dense.jsonl", self.out / "pruned.jsonl"]
        ways: dict[str, Callable[[], Any]] = {
            "own_profiles": lambda: ptsim.validate(runs),
            "device_profile": lambda: ptsim.validate(runs, self.profile, holdout=True),
            "each_other": lambda: ptsim.validate(runs, holdout=True),
        }
        results: dict[str, Any] = {}
        for name, way in ways.items():
            try:
                results[name] = msgspec.to_builtins(way())
            except MissingMeasurementError as error:
                results[name] = {"failed": error.message}
        self.validation.write_bytes(msgspec.json.format(msgspec.json.encode(results)))


def main(arguments: list[str] | None = None) -> int:
    """Run one piece; 0 when nothing is left, 3 when there is more to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results; keep it between calls")
    parser.add_argument("--work", type=Path, help="checkpoints and images; OUT/work if left out")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 as JPEG images in a tar archive")
    parser.add_argument("--minutes", type=float, default=8.5, help="of this call")
    parser.add_argument("--piece", help="this one instead of the first unfinished")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal")
    options = parser.parse_args(arguments)
    campaign = Campaign(options)
    if options.piece is not None and options.piece not in campaign.pieces:
        parser.error(f"unknown piece {options.piece!r}; known: {', '.join(campaign.pieces)}")
    left = campaign.left()
    if options.piece or left:
        name = options.piece or left[0]
        print(f"piece {name}")
        campaign.run(name)
        left = campaign.left()
    print(f"left: {', '.join(left) or 'nothing'}")
    return 3 if left else 0


def _ptsim(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "ptsim", *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main())
