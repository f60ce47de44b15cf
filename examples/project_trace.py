"""Project two recorded runs onto a cluster: what does pruning save on 1, 8 and 64 GPUs? Needs no torch and no GPU.

python examples/project_trace.py
"""

from __future__ import annotations

from pathlib import Path

import ptsim

RUNS = Path(__file__).parents[1] / "traces" / "cifar10-resnet20"


def main() -> None:
    """Print seconds with their 90 % interval, dense and pruned."""
    for name in ("dense", "prunetrain-r0.2"):
        trace = ptsim.read_trace(RUNS / f"{name}.jsonl")
        rows = ptsim.simulate(trace, "dgx-a100", gpus=[1, 8, 64])
        for row in rows.itertuples():
            print(
                f"{name:16} {row.gpus:3} GPUs: {row.total_seconds:7.1f} s"
                f" ({row.low_seconds:.1f} to {row.high_seconds:.1f} s), from the {row.tier} tier"
            )


if __name__ == "__main__":
    main()
