"""Count what your own network costs to train, and whether it fits: nothing is trained.

python examples/own_model.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import ptsim


def build(num_classes: int = 10) -> nn.Module:
    """Any network that torch.fx can trace; on the command line this is `examples/own_model.py:build`."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )


build.input_shape = (3, 64, 64)  # type: ignore[attr-defined]  # ptsim reads it; left out, images are 3×32×32


def main() -> None:
    """Print the counts, the memory on a V100, and which channels can be pruned."""
    torch.manual_seed(0)
    model = f"{Path(__file__)}:build"
    report = ptsim.cost(model, batch=128, gpu="v100-sxm2-16gb")
    print(f"{report.parameters:,} parameters, {report.training_macs_per_image:,} training MACs per image")
    print(f"peak memory {report.peak_memory_bytes / 2**20:.0f} MiB; fits: {report.fits}")
    print(f"largest mini-batch: {report.largest_batch}")
    found = ptsim.inspect(model)
    print(f"{found.prunable_channels} channels can be pruned; pruning is exact: {found.exact}")


if __name__ == "__main__":
    main()
