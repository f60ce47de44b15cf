"""The rehearsal of the GPU campaign on a CPU: every piece, in turn, each going on where it was."""

import json

import pytest

import ptsim
from analysis.gpu_campaign import main
from ptsim.hardware.profile import read_device_profile


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("campaign")
    said = [main(["--out", str(out), "--device", "cpu", "--tiny"]) for _ in range(5)]
    return out, said


def test_every_call_does_one_piece_and_the_last_one_leaves_nothing(results):
    _, said = results
    assert said == [3, 3, 3, 3, 0]


def test_there_are_at_most_eight_small_files(results):
    out, _ = results
    files = [path for path in out.iterdir() if path.is_file()]
    assert {path.name for path in files} == {
        "device.toml",
        "steps.json",
        "dense.jsonl",
        "pruned.jsonl",
        "validation.json",
    }
    assert all(path.stat().st_size <= 16 * 2**20 for path in files)


def test_steps_are_measured_beside_their_prediction(results):
    rows = json.loads((results[0] / "steps.json").read_text())
    assert [row["model"] for row in rows] == ["resnet20", "resnet20"]
    assert all(row["measured_step_s"] > 0 and row["predicted_peak_bytes"] > 0 for row in rows)
    assert all("failed" not in row for row in rows)


def test_both_runs_are_whole_and_have_profiles(results):
    for name in ("dense", "pruned"):
        trace = ptsim.read_trace(results[0] / f"{name}.jsonl")
        assert trace.complete
        assert trace.profiles
    assert trace.run.hyperparameters["penalty_ratio"] == 0.25


def test_the_profile_can_be_read_and_the_validation_says_what_was_possible(results):
    assert read_device_profile(results[0] / "device.toml").kind == "cpu"
    validation = json.loads((results[0] / "validation.json").read_text())
    assert set(validation) == {"own_profiles", "device_profile", "each_other"}
    assert validation["own_profiles"]["epoch_mape"] >= 0


def test_an_unknown_piece_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--piece", "lunch"])
    assert "known: steps, dense, pruned, calibrate, validate" in capsys.readouterr().err
