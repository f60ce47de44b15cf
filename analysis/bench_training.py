"""Is ptsim's dense training loop as fast as a plain PyTorch loop? What do reconfiguring and resuming cost?

    python analysis/bench_training.py [--model resnet20] [--side 32] [--batch 128] [--iterations 20] [--csv FILE.csv]

The plain loop is the usual one: a `TensorDataset` of decoded images behind a `DataLoader` that crops, flips and
normalises image by image, with the same model, mini-batch and SGD. Both loops take turns, so that a busy machine
slows both. Quote the ratio. The reconfiguration removes half of the channels of CIFAR's ResNet-50.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmarks import Figure, add_option, tell
from torch import Tensor
from torchvision.transforms import v2

import ptsim
from ptsim import zoo
from ptsim.measure.profile import tuned_convolutions
from ptsim.measure.tf32 import tf32_allowed
from ptsim.network import Precision
from ptsim.prune.groups import find_groups
from ptsim.prune.reconfigure import reconfigure


class Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Random photographs, augmented one by one."""

    def __init__(self, count: int, side: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
        self.transform = v2.Compose(
            [
                v2.RandomCrop(side, padding=side // 8),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5] * 3, [0.25] * 3),
            ]
        )

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image."""
        return self.transform(self.images[index]), index % 10

    def __len__(self) -> int:
        """All images."""
        return len(self.images)


def plain_epoch_s(model_name: str, images: Images, batch: int, device: torch.device, num_workers: int) -> float:
    """Seconds of the second epoch of a plain training loop."""
    torch.manual_seed(0)
    model = zoo.create(model_name).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    loader = torch.utils.data.DataLoader(
        images, batch, shuffle=True, drop_last=True, num_workers=num_workers, pin_memory=device.type == "cuda"
    )
    with tf32_allowed(Precision.FP32), tuned_convolutions():  # as ptsim trains; torch's own convolutions use TF32
        for _ in range(2):
            start = time.perf_counter()
            total = correct = 0.0
            for inputs, labels in loader:
                inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                optimizer.zero_grad()
                logits = model(inputs)
                loss = F.cross_entropy(logits, labels)
                loss.backward()
                optimizer.step()
                total += loss.item()
                correct += (logits.argmax(1) == labels).sum().item()
    return time.perf_counter() - start


def engine_epoch_s(model_name: str, side: int, batch: int, count: int, device: str) -> tuple[float, float]:
    """Seconds of the second epoch of a dense ptsim run, and of resuming it."""
    settings = {
        "model": model_name, "dataset": "synthetic", "image_size": side, "augment": "crop_flip", "batch": batch,
        "train_limit": count, "validation_limit": 10, "epochs": 2, "penalty_ratio": 0.0, "profile": False,
        "lr": 0.01, "device": device,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        result = ptsim.train(settings, out=Path(folder) / "run")
        start = time.perf_counter()
        ptsim.train(resume=result.folder)
        resume_s = time.perf_counter() - start
        return ptsim.read_trace(result.trace).epochs[1].time.wall_s, resume_s


def reconfiguration_s(device: torch.device) -> float:
    """Seconds in which half of the channels leave the CIFAR ResNet-50 and its momentum."""
    torch.manual_seed(0)
    model = zoo.create("resnet50").to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    F.cross_entropy(
        model(torch.randn(4, 3, 32, 32, device=device)), torch.zeros(4, dtype=torch.long, device=device)
    ).backward()
    optimizer.step()
    groups = find_groups(model, (3, 32, 32))
    with torch.no_grad():
        for layer, weight in ((m, m.weight) for m in model.modules() if isinstance(m, torch.nn.Conv2d)):
            weight[: layer.out_channels // 2] = 0
            if layer.in_channels > 3:
                weight[:, : layer.in_channels // 2] = 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    surgery = reconfigure(model, groups, optimizer=optimizer)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    assert surgery.changed
    return time.perf_counter() - start


def measure(model: str, side: int, batch: int, iterations: int, repeats: int = 3) -> list[Figure]:
    """All figures, medians over `repeats` turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = batch * iterations
    images = Images(count, side)
    plain, engine, resume = [], [], []
    for _ in range(repeats):
        plain.append(plain_epoch_s(model, images, batch, device, num_workers=8 if device.type == "cuda" else 0))
        epoch_s, resume_s = engine_epoch_s(model, side, batch, count, str(device))
        engine.append(epoch_s)
        resume.append(resume_s)
    ratios = [theirs / ours for theirs, ours in zip(plain, engine, strict=True)]
    surgery_s = statistics.median(reconfiguration_s(device) for _ in range(repeats))
    steps = f"{iterations} iterations of {model} at mini-batch {batch} on {device.type}"
    return [
        Figure(f"{steps}, plain loop", statistics.median(plain), "s"),
        Figure(f"{steps}, ptsim", statistics.median(engine), "s"),
        Figure(f"plain loop over ptsim, the median ratio of {repeats} turns", statistics.median(ratios), ""),
        Figure("resuming the run", statistics.median(resume), "s"),
        Figure("one reconfiguration of CIFAR's ResNet-50", surgery_s, "s"),
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    add_option(parser)
    options = parser.parse_args(argv)
    figures = measure(options.model, options.side, options.batch, options.iterations, options.repeats)
    tell("training", figures, options.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
