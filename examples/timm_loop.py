"""Prune in the loop of timm's train.py: its model, optimizer groups, schedule, clipping and weight average, kept.

python examples/timm_loop.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import timm.optim
import timm.scheduler
import timm.utils
import torch
import torch.nn.functional as F

import ptsim

EPOCHS = 3


def main(folder: Path, threshold: float = 1e-4) -> timm.utils.ModelEmaV3:
    """Three epochs on random images; the lines that mention `pruner` are what ptsim adds to timm's script."""
    torch.manual_seed(0)
    batches = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(4)]
    model = timm.create_model("resnet10t", pretrained=False, num_classes=10)
    optimizer = timm.optim.create_optimizer_v2(model, opt="momentum", lr=0.05, weight_decay=1e-4)
    scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=1)
    average = timm.utils.ModelEmaV3(model, decay=0.99)
    pruner = ptsim.PruneTrain(
        model, optimizer, input_shape=(3, 32, 32), interval=1, threshold=threshold, ema=average.module, record=folder
    )
    for epoch in range(EPOCHS):
        model.train()
        for images, labels in batches:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            # With timm.utils.NativeScaler the step is hidden. Scale, unscale_, prune, clip and step by hand there.
            pruner.step(loss)
            timm.utils.dispatch_clip_grad(model.parameters(), 1.0, mode="norm")
            optimizer.step()
            average.update(model)
        model.eval()
        with torch.no_grad():
            hits = [(model(images).argmax(1) == labels).float().mean() for images, labels in batches]
        outcome = pruner.end_epoch(validation_accuracy=float(torch.stack(hits).mean()))
        scheduler.step(epoch + 1)
        if outcome.pruned:
            print(f"epoch {epoch}: {pruner.summary().parameters[1]:,} parameters are left")
    pruner.close()
    trace = ptsim.read_trace(folder)
    print(f"{len(trace.epochs)} epochs, {len(trace.networks)} architectures")
    return average  # in the pruned shapes, too


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/timm"))
