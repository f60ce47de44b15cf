import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[2] / "analysis"))
import bench_training


def test_the_benchmark_runs_on_a_tiny_input(tmp_path):
    table = tmp_path / "benchmarks.csv"
    asked = ["--side=8", "--batch=8", "--iterations=2", "--repeats=1", f"--csv={table}"]
    assert bench_training.main(asked) == 0
    kept = pd.read_csv(table).set_index("figure").value
    plain, engine = (kept[f"2 iterations of resnet20 at mini-batch 8 on cpu, {by}"] for by in ("plain loop", "ptsim"))
    assert abs(kept["plain loop over ptsim, the median ratio of 1 turns"] - plain / engine) < 1e-9
    assert 0 < kept["one reconfiguration of CIFAR's ResNet-50"] < 30
