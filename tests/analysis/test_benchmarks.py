"""The table of the benchmarks' figures: those of one benchmark are replaced, those of the others stay."""

import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "analysis"))
from benchmarks import Figure, tell


def test_a_later_call_replaces_its_own_figures_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "benchmarks.csv"
    tell("sweeps", [Figure("a sweep", 39.0, "s"), Figure("a configuration", 4.0, "ms")], table)
    tell("engine", [Figure("the penalty", 0.07, "%")], table)
    tell("sweeps", [Figure("a sweep", 38.0, "s")], table)
    kept = pd.read_csv(table)
    assert kept[["benchmark", "figure", "value", "unit"]].to_numpy().tolist() == [
        ["engine", "the penalty", 0.07, "%"],
        ["sweeps", "a sweep", 38.0, "s"],
    ]
    assert capsys.readouterr().out.splitlines()[-1].split() == ["a", "sweep", "38", "s"]


def test_without_a_file_the_figures_are_only_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell("engine", [Figure("plain loop over ptsim", 1.19, "")], None)
    assert capsys.readouterr().out.split()[-1] == "1.19"
    assert not list(tmp_path.iterdir())
