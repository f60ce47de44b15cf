"""The recorder's benchmark runs, and the recorder is as cheap as it has to be."""

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
    assert [line.partition("  ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "a step without a recorder, CPU time, the least of 1 rounds",
        "the recorder adds to the least",
        "the recorder adds to the least, share",
        "the recorder adds, median of pairs",
        "the recorder adds, median of pairs, share",
    ]


@pytest.mark.slow
def test_the_recorder_takes_at_most_a_hundredth_of_a_step_of_100_ms() -> None:
    """In CPU time, the least of several rounds: what else this machine does is not counted."""
    pairs = bench_recorder.measure(steps=200, rounds=5)
    added_s = min(recorded for _, recorded in pairs) - min(without for without, _ in pairs)
    assert 0 < added_s <= 0.01 * bench_recorder.STEP_S
