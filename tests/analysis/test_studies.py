import importlib
import runpy
from pathlib import Path
from types import ModuleType

import msgspec
import pandas as pd
import pytest

import ptsim
from ptsim.trace.io import TraceWriter, read_records
from ptsim.trace.schema import Epoch, Run
from tests.traces import dense_trace, shrinking_trace

FOLDER = Path(__file__).parents[2] / "analysis"
STUDIES = ["table1", "table2", "table4", "fig2", "fig4", "fig6", "fig7", "fig8", "fig9", "fig10", "fig11", "fig12"]
TINY = {"epochs": 4, "blocks": (1, 1, 1), "widths": (4, 8, 8)}


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A dense run, a run with union, and one with gating that recorded its channels' largest weights."""
    folder = tmp_path_factory.mktemp("traces")
    gating = folder / "gating.jsonl"
    source = shrinking_trace(folder / "source" / "t.jsonl", keep=0.7, **TINY)
    with TraceWriter(gating) as writer:
        for _, record in read_records(source):
            if isinstance(record, Run):
                record.hyperparameters["mode"] = "gating"
            if isinstance(record, Epoch):
                record = type(record)(
                    **{name: getattr(record, name) for name in record.__struct_fields__}
                    | {"channel_maxima": {"conv1": (0.5, 1e-6), "fc": (0.2,)}}
                )
            writer.write(record)
    return [dense_trace(folder / "dense.jsonl", **TINY), shrinking_trace(folder / "union.jsonl", **TINY), gating]


def study(name: str) -> ModuleType:
    return importlib.import_module(name)


def frame(name: str, traces: list[Path]) -> pd.DataFrame:
    return study(name).table([ptsim.read_trace(path) for path in traces])


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs_as_a_script_and_writes_its_table_and_figure(
    name: str, traces: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, traces), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_status:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert exit_status.value.code == 0
    assert not pd.read_csv(tmp_path / f"{name}.csv").empty
    assert (tmp_path / f"{name}.svg").exists() == hasattr(study(name), "figure")
    out = capsys.readouterr().out
    assert out.startswith(("Table", "Fig."))
    assert "PruneTrain" in out


def test_the_communication_study_finds_the_faster_network_less_worth_saving(
    traces: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*map(str, traces[:2]), "--nodes", "2,8", "--out", str(tmp_path)]
    assert study("communication_study").main(arguments) == 0
    table = pd.read_csv(tmp_path / "communication_study.csv")
    for _, rows in table.groupby("gpus"):
        ordered = rows.sort_values("node_gigabytes_per_second").saved_communicating_seconds
        assert ordered.iloc[0] >= ordered.iloc[-1]
    assert (tmp_path / "communication_study.svg").exists()
    # computing does not know the network
    assert (table.groupby("gpus").saved_computing_seconds.nunique() == 1).all()


def test_table_1_counts_what_the_trace_says(traces: list[Path]) -> None:
    row = frame("table1", traces[:2]).iloc[0]
    dense, pruned = (ptsim.read_trace(path) for path in traces[:2])
    assert row.time_fraction == pytest.approx(
        sum(e.time.wall_s for e in pruned.epochs) / sum(e.time.wall_s for e in dense.epochs)
    )
    assert row.accuracy_change_points == 0  # the builder gives both the same accuracy
    assert row.inference_flops_fraction == (
        pruned.network_of(pruned.epochs[-1]).forward_macs / dense.network_of(dense.epochs[0]).forward_macs
    )


@pytest.mark.parametrize(
    ("name", "column", "expected"),
    [
        ("fig8", "validation_accuracy", 0.6),
        ("fig10", "validation_accuracy", 0.6),
        ("table1", "accuracy_change_points", -25),
    ],
)
def test_accuracy_is_that_of_the_network_whose_costs_stand_beside_it(
    name: str, column: str, expected: float, traces: list[Path]
) -> None:
    """What was handed over was pruned after the last epoch, and judged once more: 60 %, the dense one 85 %."""
    dense, pruned = (ptsim.read_trace(path) for path in traces[:2])
    dense, pruned = (
        msgspec.structs.replace(trace, end=msgspec.structs.replace(trace.end, final_accuracy=accuracy))
        for trace, accuracy in ((dense, 0.85), (pruned, 0.6))
    )
    rows = study(name).table([dense, pruned])
    assert rows[rows.penalty_ratio > 0][column].tolist() == [pytest.approx(expected)]


def test_table_1_lays_the_papers_numbers_beside_ours() -> None:
    row = study("table1").paper_row("CIFAR10", "ResNet32", 0.25)
    assert row == {
        "paper_accuracy_change_points": -1.8,
        "paper_training_flops_fraction": 0.47,
        "paper_time_fraction": 0.81,
        "paper_inference_flops_fraction": 0.34,
        "paper_of": "CIFAR10 ResNet32",
    }
    # the paper has no ResNet-20: the nearest of its networks, and it says so
    assert study("table1").paper_row("CIFAR10", "ResNet20", 0.25) == row
    imagenet = study("table1").paper_row("ImageNet", "ResNet50", 0.19)
    assert (imagenet["paper_training_flops_fraction"], imagenet["paper_time_fraction"]) == (0.70, 0.76)
    assert study("table1").paper_row("digits", "ResNet20", 0.4) == {}


def test_one_reconfiguration_by_hand() -> None:
    # dense for 2 epochs, then a half, then a quarter: after epoch 2 best, 2 + 2 · 1/2 = 3 or after 3: 3 + 1/4
    summary = study("fig2").one_time_summary([1.0, 1.0, 0.5, 0.25])
    assert summary["one_time_best_epoch"] == 2
    assert summary["one_time_fraction"] == pytest.approx(3 / 4)
    assert summary["continuous_fraction"] == pytest.approx(2.75 / 4)
    assert summary["one_time_extra_fraction"] == pytest.approx(3 / 2.75 - 1)


def test_fig_11_separates_the_model_from_the_updates(traces: list[Path]) -> None:
    rows = frame("fig11", traces[:2])
    trace = ptsim.read_trace(traces[1])
    first, last = trace.epochs[0], trace.epochs[-1]
    shrunk = trace.network_of(last).num_parameters / trace.network_of(first).num_parameters
    assert rows.fixed_batch_bytes_fraction.iloc[-1] == pytest.approx(shrunk)
    assert rows.bytes_fraction.iloc[-1] == pytest.approx(shrunk * last.num_iterations / first.num_iterations)


def test_a_row_of_an_epoch_has_that_epochs_ranks(traces: list[Path]) -> None:
    trace = ptsim.read_trace(traces[1])
    ranks = (1, 1, 2, 4)
    epochs = tuple(
        msgspec.structs.replace(epoch, world_size=number) for epoch, number in zip(trace.epochs, ranks, strict=True)
    )
    for name in ("fig2", "fig11"):
        rows = study(name).table([msgspec.structs.replace(trace, epochs=epochs)])
        assert tuple(rows.num_gpus) == ranks


def test_the_papers_mini_batches_of_fig_9_are_those_of_its_text() -> None:
    common = study("_common")
    published = common.paper("Fig. 9").assign(start=lambda rows: rows.epochs.str.extract(r"^(\d+)-").astype(float))
    batches = [study("fig9")._paper_batch(published, "ImageNet", "ResNet50", epoch) for epoch in (0, 9, 10, 30, 89)]
    assert batches == [64, 64, 96, 128, 128]


@pytest.mark.parametrize(("model", "expected"), [("resnet32", "ResNet32"), ("torchvision:vgg13_bn", "VGG13")])
def test_runs_are_called_what_the_paper_calls_them(model: str, expected: str, tmp_path: Path) -> None:
    trace = ptsim.read_trace(dense_trace(tmp_path / "t.jsonl", epochs=1, model=model))
    assert study("_common").paper_names(trace) == ("CIFAR10", expected)


def test_a_folder_means_every_trace_below_it(traces: list[Path]) -> None:
    found = study("_common").find_traces([traces[0].parent])
    assert len(found) == 4


@pytest.mark.parametrize("name", STUDIES)
def test_traces_that_cannot_answer_are_said_to_be_missing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = dense_trace(tmp_path / "t.jsonl", recorded_epochs=0)
    monkeypatch.setattr("sys.argv", [f"{name}.py", str(trace)])
    with pytest.raises(SystemExit) as exit_status:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert exit_status.value.code == 2
    assert "no trace answers this" in capsys.readouterr().err


def test_a_folder_without_traces_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study("communication_study").main([str(tmp_path)]) == 2
    assert "no traces in" in capsys.readouterr().err
