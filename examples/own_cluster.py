"""Ask about a cluster that the catalog does not have: describe it in a TOML file.

python examples/own_cluster.py
"""

from __future__ import annotations

from pathlib import Path

import ptsim

HERE = Path(__file__).parent
TRACE = HERE.parent / "traces" / "cifar10-resnet20" / "dense.jsonl"


def main() -> None:
    """Print one all-reduce and one whole run on `own_cluster.toml`."""
    cluster = HERE / "own_cluster.toml"
    for num_gpus in (4, 16):
        time = ptsim.allreduce(cluster, num_gpus, 25 * 2**20)
        print(f"all-reduce of 25 MiB on {num_gpus} GPUs: {1e3 * time.seconds:.2f} ms by {time.algorithm}")
    for row in ptsim.simulate(TRACE, cluster, gpus=[4, 16]).itertuples():
        print(f"the recorded run on {row.gpus} GPUs: {row.total_seconds:.1f} s, {row.cost_usd:.3f} USD")


if __name__ == "__main__":
    main()
