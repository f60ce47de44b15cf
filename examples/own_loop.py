"""Prune in your own training loop: three lines of ptsim in plain PyTorch.

python examples/own_loop.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import ptsim


def network() -> nn.Module:
    """A small CNN for 8×8 images with one channel."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def main(folder: Path) -> None:
    """Four epochs on random images; the trace goes to the folder."""
    torch.manual_seed(0)
    images, labels = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = ptsim.PruneTrain(model, optimizer, input_shape=(1, 8, 8), penalty_ratio=0.5, interval=2, record=folder)
    for _ in range(4):
        model.train()
        for batch, target in zip(images.split(16), labels.split(16), strict=True):
            loss = F.cross_entropy(model(batch), target)
            optimizer.zero_grad()
            loss.backward()
            pruner.step(loss)  # λ at the first call; adds the gradient of the group lasso
            optimizer.step()
        model.eval()
        with torch.no_grad():
            accuracy = (model(images).argmax(1) == labels).float().mean().item()
        pruner.end_epoch(validation_accuracy=accuracy)  # records; every second epoch it removes channels
    pruner.close()
    trace = ptsim.read_trace(folder)
    print(f"λ = {pruner.penalty_coefficient:.3g}; {len(trace.epochs)} epochs, {len(trace.networks)} architectures")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own-loop"))
