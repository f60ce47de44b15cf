import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "analysis"))
import bench_training


def test_the_benchmark_runs_on_a_tiny_input(capsys):
    assert bench_training.main(["--side=8", "--batch=8", "--iterations=2", "--repeats=1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["speed_up"] > 0
    assert 0 < figures["reconfiguration_seconds"] < 30
