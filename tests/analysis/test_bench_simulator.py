from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.traces import shrinking_trace

SCRIPT = Path(__file__).parents[2] / "analysis" / "bench_simulator.py"


def test_the_benchmark_prints_ratios_and_figures(tmp_path: Path) -> None:
    trace = shrinking_trace(tmp_path, epochs=4)
    sizes = ["--gpus", "1", "8", "--unequal", "8", "16", "--most", "32", "--configurations", "10", "--workers", "2"]
    output = subprocess.run(
        [sys.executable, str(SCRIPT), str(trace), *sizes], check=True, capture_output=True, text=True
    ).stdout
    for expected in ("4 epochs", "link by link", "GPU by GPU, GPUs: 16", "peak memory", "of 2 times one process"):
        assert expected in output
