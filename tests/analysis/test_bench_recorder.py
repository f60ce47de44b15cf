"""The recorder's benchmark runs."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "analysis"))
import bench_recorder


def test_it_prints_what_a_step_costs_without_the_recorder_and_with_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_recorder", "--steps", "5", "--rounds", "1"])
    bench_recorder.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["a step without a recorder", "the recorder adds"]
