"""Record the CPU runs that the documentation shows: dense and PruneTrain at the same time, each on a core of its own.

    python analysis/cpu_evidence.py --plan
    python analysis/cpu_evidence.py --data cifar10-jpeg --out runs/evidence [--only NAME,…] [--minutes 60]

A pair of runs takes hours. One call works for `--minutes` and then interrupts the two runs; the next call goes on where
they stopped (`ptsim train --resume`). The pairs are recorded in the order of the plan, one after the other. When one of
the two runs has ended, its last network is trained further on its core, only so that the other run keeps a neighbour of
the same kind: alone it would be faster. Every piece of work is noted in `pieces.jsonl` with its beginning, its end and
the load of the machine before it: a pair that was begun beside other work is visible there. Nothing else may run on the
machine.

The data are images in class folders, `train/CLASS/…` and `test/CLASS/…`. The network for images of ImageNet's kind gets
the same images at 64×64. The schedule is the paper's, shortened: milestones at 1/2 and 3/4 of the epochs, and a
reconfiguration every twentieth of them. The long pair of ResNet-20 has the schedule of `traces/cifar10-resnet20`,
four times as long.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from processes import run_together

import ptsim
from ptsim.errors import PtsimError
from ptsim.trace.io import CONFIG

EPOCHS = 40
IMAGES = 10_000
VALIDATION_IMAGES = 2_000
BATCH = 32


class Pair(NamedTuple):
    """Two runs that differ in one thing; `settings` are common to both."""

    about: str
    model: str
    runs: dict[str, tuple[str, ...]]
    seed: int = 1
    settings: tuple[str, ...] = ()
    epochs: int = EPOCHS
    images: int = IMAGES
    validation_images: int = VALIDATION_IMAGES


def _pruned(ratio: float, *more: str) -> dict[str, tuple[str, ...]]:
    return {"dense": ("penalty_ratio=0",), f"r{ratio}": (f"penalty_ratio={ratio}", *more)}


# As many images a step as in the paper. The learning rate grows with them (Goyal et al., 2017), after a warm-up.
_BATCH_128 = ("batch=128", "lr=0.4", "warmup_epochs=2")
PAIRS: dict[str, Pair] = {
    "vgg11": Pair("VGG-11, penalty ratio 0.25", "vgg11", _pruned(0.25)),
    "resnet32": Pair("ResNet-32, penalty ratio 0.25", "resnet32", _pruned(0.25)),
    "resnet18-64": Pair(
        "torchvision's ResNet-18 at 64×64, ratio 0.2", "torchvision:resnet18", _pruned(0.2), settings=("image_size=64",)
    ),
    "resnet32-s2": Pair("the same, second seed", "resnet32", _pruned(0.25), seed=2),
    "resnet32-s3": Pair("the same, third seed", "resnet32", _pruned(0.25), seed=3),
    "resnet32-r0.2": Pair("the first seed, penalty ratio 0.2", "resnet32", _pruned(0.2)),
    # The penalty takes the same time a step whatever the mini-batch; with more images it is a smaller part of the step.
    "vgg11-128": Pair(
        "VGG-11, ratio 0.25, the paper's 128 images a step",
        "vgg11",
        _pruned(0.25),
        settings=_BATCH_128,
    ),
    # Nothing is pruned before epoch 12, and little once the learning rate has fallen: of 40 epochs that leaves eight.
    "vgg11-128-long": Pair(
        "the same for 60 instead of 40 epochs",
        "vgg11",
        _pruned(0.25),
        settings=_BATCH_128,
        epochs=60,
    ),
    # In the contiguous layout oneDNN takes kernels that work on blocks of 16 channels, and reorders what they read and
    # write (ONEDNN_VERBOSE=1 shows both): 36 channels cost as much as 48. In this layout it takes others.
    "vgg11-128-channels-last": Pair(
        "the same in channels_last",
        "vgg11",
        _pruned(0.25),
        settings=(*_BATCH_128, "memory_format=channels_last"),
        epochs=60,
    ),
    "resnet20-long": Pair(
        "ResNet-20 on 4,000 images, 120 instead of 30 epochs",
        "resnet20",
        _pruned(0.2),
        settings=("lr=0.2", "lr_milestones=[0.67,0.87]", "interval=12", "memory_format=channels_last"),
        epochs=120,
        images=4_000,
        validation_images=1_000,
    ),
    "resnet32-dynamic": Pair(
        "ResNet-32, the mini-batch fixed and growing",
        "resnet32",
        {
            "fixed": ("penalty_ratio=0.25",),
            "dynamic": (
                # What the unpruned network does not fill with 40 images: 48 and 56 fit after the first prunings.
                "penalty_ratio=0.25", "dynamic_batch=true", "memory_budget=104 MiB", "batch_granularity=8",
            ),
        },
    ),
    "resnet32-gating": Pair(
        "ResNet-32, union and gating",
        "resnet32",
        {"union": ("penalty_ratio=0.25",), "gating": ("penalty_ratio=0.25", "mode=gating")},
    ),
}  # fmt: skip


def arguments_of(
    pair: Pair, run: str, folder: Path, data: Path, changes: Mapping[str, object] | None = None
) -> list[str]:
    """Arguments of `ptsim` that begin a run, with some settings changed, or go on with it."""
    if (folder / CONFIG).exists():
        return ["train", "--resume", str(folder)]
    common = (
        f"train_limit={pair.images}", f"validation_limit={min(pair.validation_images, pair.images)}",
        f"epochs={pair.epochs}", f"interval={max(1, pair.epochs // 20)}", f"batch={BATCH}", "num_threads=1",
    )  # fmt: skip
    told = dict(setting.split("=", 1) for setting in (*common, *pair.settings, *pair.runs[run]))
    settings = told | dict(changes or {})
    return [
        "train", "--out", str(folder), "--model", pair.model, "--dataset", "imagefolder", "--data-dir", str(data),
        "--seed", str(pair.seed), *(part for name, value in settings.items() for part in ("--set", f"{name}={value}")),
    ]  # fmt: skip


def neighbour_of(pair: Pair, run: str, folder: Path, data: Path) -> list[str]:
    """Arguments of `ptsim` that go on training the last network of a complete run, in a folder that nobody keeps."""
    changes = {"start_from": folder, "lr": 0.001, "warmup_epochs": 0, "interval": pair.epochs, "profile": "false"}
    return arguments_of(pair, run, neighbour_folder(folder), data, changes)


def neighbour_folder(folder: Path) -> Path:
    """Where the neighbour of a complete run trains."""
    return folder.with_name(f"{folder.name}-neighbour")


def is_complete(folder: Path) -> bool:
    """The run reached its last epoch."""
    trace = folder / "trace.jsonl"
    return trace.exists() and ptsim.read_trace(trace).complete


def record(name: str, options: argparse.Namespace, deadline_s: float) -> None:
    """Work on one pair until it is complete or time is over."""
    pair = PAIRS[name]
    pair = pair._replace(epochs=options.epochs or pair.epochs, images=options.images or pair.images)
    folders = {run: options.out / f"{name}-{run}" for run in pair.runs}
    commands = {
        run: arguments_of(pair, run, folder, options.data) for run, folder in folders.items() if not is_complete(folder)
    }
    if not commands:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))
    core_of = {run: cores[index % len(cores)] for index, run in enumerate(pair.runs)}
    neighbours = {core_of[run]: neighbour_of(pair, run, folder, options.data) for run, folder in folders.items()}
    note = {"pair": name, "runs": list(commands), "began": time.strftime("%FT%T%z"), "load_before": os.getloadavg()[0]}
    try:
        run_together(
            commands,
            lambda: deadline_s - time.monotonic(),
            lambda: None,
            cores=[core_of[run] for run in commands],
            neighbours=neighbours if len(neighbours) == len(pair.runs) else None,  # else both runs share a core
        )
    finally:
        for folder in folders.values():
            shutil.rmtree(neighbour_folder(folder), ignore_errors=True)
        note["ended"] = time.strftime("%FT%T%z")
        with (options.out / "pieces.jsonl").open("ab") as file:
            file.write(msgspec.json.encode(note) + b"\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Record what is left of the pairs, or print the plan; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="print the pairs and how far they are")
    parser.add_argument("--data", type=Path, help="folder with train/ and test/")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="folder of the runs")
    parser.add_argument("--only", help="names of pairs, separated by commas")
    parser.add_argument("--minutes", type=float, default=60.0, help="time of this call (default 60)")
    parser.add_argument("--epochs", type=int, help="length of a run (default: the pair's own)")
    parser.add_argument("--images", type=int, help="training images (default: the pair's own)")
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else list(PAIRS)
    if unknown := [name for name in names if name not in PAIRS]:
        parser.error(f"unknown pair {unknown[0]!r}; known: {', '.join(PAIRS)}")
    if options.plan:
        for name in names:
            folders = [options.out / f"{name}-{run}" for run in PAIRS[name].runs]
            print(f"{name:18}{PAIRS[name].about:46}{sum(map(is_complete, folders))} of {len(folders)} runs complete")
        return 0
    if options.data is None or not options.data.is_dir():
        parser.error("--data must be a folder with train/ and test/")
    deadline_s = time.monotonic() + 60 * options.minutes
    for name in names:
        if deadline_s - time.monotonic() <= 0:
            print(f"time is over before {name}; call again to go on", file=sys.stderr)
            break
        try:
            record(name, options, deadline_s)
        except (PtsimError, RuntimeError) as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
