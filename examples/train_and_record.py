"""Train a small network with PruneTrain, record it, and read the record back.

python examples/train_and_record.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import ptsim

SETTINGS = {"model": "resnet20", "dataset": "digits", "epochs": 2, "batch": 32, "train_limit": 128, "interval": 1}


def main(folder: Path) -> None:
    """Two epochs on 128 handwritten digits: enough to see the record, not enough to prune much."""
    run = ptsim.train(SETTINGS | {"penalty_ratio": 0.25}, out=folder)
    trace = ptsim.read_trace(run.trace)
    for epoch in trace.epochs:
        network = trace.network_of(epoch)
        print(f"epoch {epoch.epoch}: {epoch.time.wall_s:.2f} s, {network.num_parameters:,} parameters")
    print(f"λ = {run.penalty_coefficient:.3g}, accuracy {run.final_accuracy:.0%}")
    model = ptsim.load_model(folder)  # a torch.nn.Module in the shape that pruning left it
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in the stored network")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example"))
