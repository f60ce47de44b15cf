import msgspec
import pytest

import ptsim
from analysis.validate_cpu import fastest, main
from ptsim.measure import calibrate
from tests.traces import shrinking_trace


def test_calibrating_training_and_predicting_is_one_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "_MIN_STEPS_S", 0.0)
    result = main(["--folder", str(tmp_path), "--epochs", "2", "--interval", "1", "--train-limit", "48"])
    assert result.source == "device profile"
    assert result.tiers == ("profiled",)
    assert [run.dense for run in result.runs] == [True, False]
    assert len(result.savings) == 1
    assert "fastest of 1: whole runs dense" in capsys.readouterr().out


def test_the_fastest_of_several_repetitions_is_taken_epoch_by_epoch(tmp_path):
    trace = ptsim.read_trace(shrinking_trace(tmp_path / "a.jsonl"))
    slow = [
        msgspec.structs.replace(epoch, time=msgspec.structs.replace(epoch.time, wall_s=2 * epoch.time.wall_s))
        for epoch in trace.epochs
    ]
    first = msgspec.structs.replace(trace, epochs=(slow[0], *trace.epochs[1:]))
    second = msgspec.structs.replace(trace, epochs=(trace.epochs[0], *slow[1:]))
    assert fastest([first, second]).epochs == trace.epochs


def test_repetitions_that_are_not_the_same_run_are_refused(tmp_path):
    a = ptsim.read_trace(shrinking_trace(tmp_path / "a.jsonl"))
    b = ptsim.read_trace(shrinking_trace(tmp_path / "b.jsonl", keep=0.5))
    with pytest.raises(RuntimeError, match="not the same run"):
        fastest([a, b])
