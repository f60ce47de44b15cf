"""The engine's benchmark runs, and its count of kernel launches holds."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "analysis"))
import bench_engine


def test_it_prints_ratios_and_the_flat_regulariser_needs_at_most_20_launches(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (
        bench_engine.main(["--model", "resnet20", "--batch", "2", "--repeats", "1", "--reconfigure", "resnet20"]) == 0
    )
    lines = dict(line.split(" = ") for line in capsys.readouterr().out.splitlines() if " = " in line)
    launches = {key.rpartition(" ")[2]: float(value) for key, value in lines.items()}
    assert launches["launches_gathered"] <= 20
    assert launches["launches_per_tensor"] > launches["launches_gathered"]


def test_the_survey_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_engine.main(["--names", "resnet20", "resnet19", "--out", str(tmp_path / "survey.csv")]) == 0
    assert "1 of 2 networks prune exactly" in capsys.readouterr().out
    written = (tmp_path / "survey.csv").read_text()
    assert len(written.splitlines()) == 3
    assert bench_engine.main(["--names", "resnet20", "resnet19", "--out", str(tmp_path / "survey.csv")]) == 0
    assert "1 of 2 networks prune exactly" in capsys.readouterr().out
    assert (tmp_path / "survey.csv").read_text() == written
