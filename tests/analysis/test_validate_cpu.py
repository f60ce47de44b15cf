import msgspec
import pytest

import ptsim
from analysis.validate_cpu import main, medians
from ptsim.measure import calibrate
from tests.traces import dense_trace, shrinking_trace


def test_calibrating_training_and_predicting_is_one_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "_MIN_STEPS_S", 0.0)
    (result,) = main(["--folder", str(tmp_path), "--epochs", "2", "--interval", "1", "--train-limit", "48"])
    assert result.source == "device profile"
    assert result.tiers == ("profiled",)
    assert [run.dense for run in result.runs] == [True, False]
    assert len(result.savings) == 1
    assert "median of 1 turns: dense" in capsys.readouterr().out


def test_one_turn_of_three_that_was_disturbed_does_not_decide(tmp_path):
    runs = [dense_trace(tmp_path / "dense.jsonl"), shrinking_trace(tmp_path / "pruned.jsonl")]
    good = ptsim.validate(runs)
    bad = msgspec.structs.replace(good, runs=tuple(msgspec.structs.replace(run, error=-0.5) for run in good.runs))
    assert medians([good, bad, good])["dense"] == pytest.approx(abs(good.runs[0].error))
    assert medians([bad, bad, good])["pruned"] == 0.5
