import pytest

from analysis.validate_cpu import TakingTurns, main
from ptsim.measure import calibrate


def test_calibrating_training_and_predicting_is_one_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "_MIN_STEPS_S", 0.0)
    small = ["--dataset", "digits", "--batch", "16", "--epochs", "2", "--interval", "1", "--train-limit", "48"]
    (result,) = main(["--folder", str(tmp_path), *small])
    assert result.source == "device profile"
    assert result.tiers == ("profiled",)
    assert [run.dense for run in result.runs] == [True, False]
    assert [len(run.epochs) for run in result.runs] == [2, 2]
    assert len(result.savings) == 1
    assert "worst of 1: whole run" in capsys.readouterr().out


def test_a_run_that_fails_in_its_own_process_is_no_silence(tmp_path):
    run = TakingTurns({"model": "nowhere", "num_threads": 1}, tmp_path / "run")
    with pytest.raises(RuntimeError, match="has failed"):
        run.epoch()
    run.close()
