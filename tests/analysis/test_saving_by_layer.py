from pathlib import Path

import msgspec
import pandas as pd
import pytest

from ptsim.costs.flops import training_macs
from ptsim.sim.rounding import rounded
from ptsim.trace.io import read_trace
from tests.traces import shrinking_trace

FOLDER = Path(__file__).parents[2] / "analysis"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def test_the_tables_agree_with_the_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import saving_by_layer

    source = shrinking_trace(tmp_path / "t.jsonl", keep=0.5, epochs=4, blocks=(1, 1, 1), widths=(4, 8, 8))
    options = ["--batch", "2", "--repeats", "2", "--multiples", "1,8", "--batches", "1,3", "--out"]
    assert saving_by_layer.main([str(source), *options, str(tmp_path)]) == 0
    trace = read_trace(source)
    dense, pruned = trace.network_of(trace.epochs[0]), trace.final_network
    layers, steps = pd.read_csv(tmp_path / "layers.csv"), pd.read_csv(tmp_path / "steps.csv")
    assert list(layers.layer) == [layer.name for layer in dense.layers]
    assert layers.dense_macs.sum() == training_macs(dense)
    assert layers.pruned_macs.sum() == training_macs(pruned)
    assert (layers.dense_seconds > 0).all()
    assert layers.share_of_dense_time.sum() == pytest.approx(1)
    assert list(steps.training_macs) == [training_macs(n) for n in (dense, pruned, rounded(pruned, 8))]
    assert steps.time_left[0] == 1
    row = steps.iloc[1]
    kinds = pd.read_csv(tmp_path / "kinds.csv")
    left = layers.pruned_seconds.sum() / layers.dense_seconds.sum()
    assert kinds.lost_share.sum() == pytest.approx(left - row.macs_left)
    assert kinds.dense_macs.sum() == training_macs(dense)
    overheads = pd.read_csv(tmp_path / "overheads.csv")
    assert list(overheads.part) == ["recorder", "penalty", "data"] * 2
    assert list(overheads.batch) == [1, 1, 1, 3, 3, 3]
    assert (overheads[overheads.part != "recorder"].added_seconds > 0).all()
    epochs = pd.read_csv(tmp_path / "epochs.csv").set_index("of")
    wall_s = [epoch.time.wall_s for epoch in trace.epochs]
    assert epochs.wall_seconds["all epochs"] == pytest.approx(sum(wall_s))
    assert epochs.wall_seconds["last epoch"] == pytest.approx(wall_s[-1])
    parts = epochs.filter(regex="_share$").drop(columns=["validation_share", "reconfigurations_share"])
    assert parts.sum(axis=1).tolist() == pytest.approx([1.0, 1.0, 1.0])
    changes_s = sum(event.duration_s for event in trace.reconfigurations)
    assert epochs.reconfigurations_share["all epochs"] == pytest.approx(changes_s / sum(wall_s))
    assert row.saved_time_per_saved_macs == pytest.approx((1 - row.time_left) / (1 - row.macs_left))
    assert "saved_time_per_saved_macs" in capsys.readouterr().out


def test_a_missing_trace_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import saving_by_layer

    assert saving_by_layer.main([str(tmp_path / "none.jsonl")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_profiles_of_a_recorded_run_give_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import saving_by_layer

    source = FOLDER.parent / "traces" / "cifar10-resnet32" / "prunetrain-r0.25.jsonl"
    assert saving_by_layer.main([str(source), "--recorded", "--out", str(tmp_path)]) == 0
    assert "overheads" not in capsys.readouterr().out
    records = [msgspec.json.decode(line) for line in source.read_bytes().splitlines()]
    profiles = [record for record in records if record["record"] == "profile"]
    layers, steps = pd.read_csv(tmp_path / "layers.csv"), pd.read_csv(tmp_path / "steps.csv")
    assert list(steps.step_seconds) == pytest.approx([profile["step_s"] for profile in profiles])
    assert steps.time_left.iloc[-1] == pytest.approx(profiles[-1]["step_s"] / profiles[0]["step_s"])
    measured = {
        layer["layer"]: layer["forward_s"] + (layer.get("backward_s") or 0.0) for layer in profiles[-1]["layers"]
    }
    assert dict(zip(layers.layer, layers.pruned_seconds, strict=True)) == pytest.approx(measured)
    kinds = pd.read_csv(tmp_path / "kinds.csv")
    left = layers.pruned_seconds.sum() / layers.dense_seconds.sum()
    assert kinds.lost_share.sum() == pytest.approx(left - steps.macs_left.iloc[-1])


def test_a_run_without_profiles_cannot_be_asked_for_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import saving_by_layer

    source = shrinking_trace(tmp_path / "t.jsonl", keep=0.5, epochs=4, blocks=(1, 1, 1), widths=(4, 8, 8))
    lines = source.read_bytes().splitlines(keepends=True)
    source.write_bytes(b"".join(line for line in lines if msgspec.json.decode(line)["record"] != "profile"))
    assert saving_by_layer.main([str(source), "--recorded"]) == 2
    assert "no profile of its network from epoch 0" in capsys.readouterr().err
