"""The engine's benchmark runs, and its count of kernel launches holds."""

import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "analysis"))
import bench_engine


def test_it_prints_ratios_and_the_flat_regulariser_needs_at_most_20_launches(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    table = tmp_path / "benchmarks.csv"
    asked = ["--model", "resnet20", "--batch", "2", "--repeats", "1", "--reconfigure", "resnet20", "--csv", str(table)]
    assert bench_engine.main(asked) == 0
    kept = pd.read_csv(table).set_index("figure").value
    assert kept["kernels of the penalty, gathered"] <= 20
    assert kept["kernels of the penalty, per tensor"] > kept["kernels of the penalty, gathered"]
    share = kept["the penalty's gradient"] / kept["a step of resnet20 at mini-batch 2"]
    assert kept["the penalty's gradient, of the step"] == pytest.approx(100 * share)
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == list(kept.index)


def test_the_survey_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_engine.main(["--names", "resnet20", "resnet19", "--out", str(tmp_path / "survey.csv")]) == 0
    assert "1 of 2 networks prune exactly" in capsys.readouterr().out
    written = (tmp_path / "survey.csv").read_text()
    assert len(written.splitlines()) == 3
    assert bench_engine.main(["--names", "resnet20", "resnet19", "--out", str(tmp_path / "survey.csv")]) == 0
    assert "1 of 2 networks prune exactly" in capsys.readouterr().out
    assert (tmp_path / "survey.csv").read_text() == written
