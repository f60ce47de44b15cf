from __future__ import annotations

from pathlib import Path

import msgspec
import pandas as pd
import pytest

from ptsim.report import answer, build
from ptsim.report.build import make_report
from ptsim.report.frames import averaged
from ptsim.trace.io import read_trace
from ptsim.trace.pairs import compare_runs
from ptsim.trace.stretch import stretch
from ptsim.trace.trace import Trace
from tests.traces import CPU, dense_trace, shrinking_trace


def excess(**pruned_seconds: float) -> pd.DataFrame:
    """Parts of a dense run of 10 s each beside a pruned run's; half of the MACs are left."""
    names = {"host": "loss and host gaps", "products": "convolutions and linear layers", "moved": "memory-bound layers"}
    rows = [
        {"part": names[key], "dense_seconds": 10.0, "pruned_seconds": seconds, "excess_seconds": seconds - 5.0}
        for key, seconds in pruned_seconds.items()
    ]
    return pd.DataFrame(rows).assign(macs_fraction=0.5, floor_fraction=0.1)


def test_a_run_that_waits_for_its_host_is_called_host_bound() -> None:
    lead, *reasons = answer.why(excess(host=10.0, products=5.0, moved=6.0))
    assert "50.0 % of the training MACs and takes 70.0 % of the time" in lead
    assert len(reasons) == 2  # of 6 s in excess, 5 are the host's and 1 is the memory's
    assert reasons[0].startswith("Host-bound: for 47.6 % of the pruned run")
    assert reasons[1].startswith("Memory-bound layers")


def test_where_time_follows_macs_there_is_nothing_to_explain() -> None:
    (only,) = answer.why(excess(products=5.0, moved=5.1))
    assert "time follows the MACs" in only


def test_steps_that_one_image_would_take_as_well_are_called_launch_bound() -> None:
    *_, last = answer.why(excess(products=9.0).assign(floor_fraction=0.8))
    assert last.startswith("Launch-bound: a pruned step on a single image would take 80.0 %")


def test_memory_bound_layers_of_short_kernels_are_not_explained_by_their_bytes() -> None:
    _, moved, _ = answer.why(excess(moved=10.0).assign(floor_fraction=0.8))
    assert "take 100.0 % of their dense time: their kernels are so short" in moved
    assert "bytes" not in moved


def test_repeats_are_one_row_of_means_with_the_widest_interval() -> None:
    frame = pd.DataFrame(
        {
            "setting": ["a", "a", "b"],
            "run": ["a, seed 1", "a, seed 2", "b"],
            "saved_seconds": [1.0, 3.0, 5.0],
            "saved_seconds_low": [0.5, 2.0, 4.0],
            "saved_seconds_high": [1.5, 4.0, 6.0],
        }
    )
    rows = averaged(frame, ["setting"]).set_index("setting")
    assert list(rows.num_runs) == [2, 1]
    assert tuple(rows.loc["a", ["saved_seconds", "saved_seconds_low", "saved_seconds_high"]]) == (2.0, 0.5, 4.0)
    assert rows.loc["a", "run"] == "a, seed 1"


@pytest.mark.slow
def test_every_number_of_the_head_says_where_it_comes_from_and_how_sure_it_is(tmp_path: Path) -> None:
    traces = [dense_trace(tmp_path / "d.jsonl"), shrinking_trace(tmp_path / "p.jsonl")]
    head = make_report(traces, cluster="dgx-a100", gpus=[1, 8], price_usd_per_gpu_hour=2.0).answer
    assert all(tile.origin.startswith(("projected; times: ", "measured, ", "counted")) for tile in head.tiles)
    for tile in head.tiles:
        if tile.origin.startswith("projected"):
            assert "90 % interval" in tile.detail
    assert "measured, 1 pair of runs; no interval" in {tile.origin for tile in head.tiles}
    assert "validation accuracy" in head.headline
    assert head.why


@pytest.mark.slow
def test_seeds_are_one_line_and_one_answer(tmp_path: Path) -> None:
    traces = [dense_trace(tmp_path / "d.jsonl")]
    traces += [shrinking_trace(tmp_path / f"p{seed}.jsonl", seed=seed) for seed in (1, 2)]
    report = make_report(traces, cluster="dgx-a100", gpus=[1, 8])
    assert "Means of 2 runs of this setting" in report.answer.certainty
    figures = {shown.name: shown.figure for section in report.sections for shown in section.figures}
    labels = [text.get_text() for text in figures["scaling"].legends[0].get_texts()]
    assert labels == ["dense", "PruneTrain r=0.2"]
    assert "2 runs per line" in " ".join(figures["accuracy"].get_supxlabel().split())


@pytest.mark.slow
def test_runs_at_another_pace_are_named_as_such(tmp_path: Path) -> None:
    traces = [dense_trace(tmp_path / "d.jsonl"), shrinking_trace(tmp_path / "p.jsonl", device=CPU)]
    notices = make_report(traces, cluster="dgx-a100", gpus=[1]).answer.notices
    assert any(f"differ in the device: {CPU} and NVIDIA A100-SXM4-40GB (dense)" in notice for notice in notices)


def test_a_saving_that_is_small_beside_the_run_has_one_unit_of_its_own() -> None:
    row = pd.Series({"dense_seconds": 36000.0, "saved_seconds": 300.0, "saved_seconds_low": 30.0})
    row["saved_seconds_high"] = 900.0
    assert answer._interval(row, "seconds") == "90 % interval 0.500 min to 15.0 min"


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (30.0, 90.0, "90 % interval 0.500 min to 1.50 min"),
        (-30.0, 90.0, "90 % interval from 0.500 min lost to 1.50 min saved"),
        (-90.0, -30.0, "90 % interval 0.500 min to 1.50 min"),  # of a loss
    ],
)
def test_an_interval_that_holds_zero_says_which_end_is_a_loss(low: float, high: float, says: str) -> None:
    row = pd.Series({"dense_seconds": 600.0, "saved_seconds": (low + high) / 2})
    row["saved_seconds_low"], row["saved_seconds_high"] = low, high
    assert answer._interval(row, "seconds") == says


@pytest.mark.slow
def test_a_planned_number_looks_planned(tmp_path: Path) -> None:
    traces = [dense_trace(tmp_path / "d.jsonl", epochs=3), shrinking_trace(tmp_path / "p.jsonl", epochs=3, interval=1)]
    planned = []
    for path in traces:
        trace = read_trace(path)
        epochs = tuple(
            msgspec.structs.replace(
                epoch,
                measured_time=None,
                measured_step=None,
                validation_accuracy=None,
                device=None,
                peak_memory_bytes=None,
            )
            for epoch in trace.epochs
        )
        run = msgspec.structs.replace(trace.run, origin="planned")
        end = msgspec.structs.replace(trace.end, final_accuracy=None)
        planned.append(msgspec.structs.replace(trace, run=run, epochs=epochs, profiles=(), end=end))
    report = make_report(planned, cluster="dgx-a100", gpus=[8])
    assert report.planned
    named = [table.frame.run for section in report.sections for table in section.tables if "run" in table.frame]
    assert all(name.startswith("planned ") for names in named for name in names)  # in every row, also of the CSV files
    drawn = [shown.frame for section in report.sections for shown in section.figures]
    assert all(name.startswith("planned ") for frame in drawn for name in frame.get("run", frame.get("setting")))
    assert report.answer.headline.startswith("Planned, not trained. Training resnet14 on cifar10 for 3 epochs with 8 ×")
    assert "validation accuracy" not in report.answer.headline
    assert all("from a planned run" in t.origin for t in report.answer.tiles)
    assert not any(t.origin.startswith("measured") for t in report.answer.tiles)
    assert "2 runs planned, which nobody has trained" in report.byline
    assert "Nobody has trained these runs" in report.answer.certainty
    assert "recorded run" not in report.answer.certainty  # there is no recorded accuracy whose mini-batch could differ
    (runs,) = [section for section in report.sections if section.name == "runs"]
    titles = [(table.title, table.caption) for table in runs.tables]
    assert ("The planned runs.", "Nobody has trained them: nothing here is measured.") in titles
    assert not any("measured" in caption for title, caption in titles if title == "Reconfigurations.")
    methods = dict(report.sections[-1].facts)
    assert any("; planned " in text for text in methods.values())
    assert not any("; started " in text for text in methods.values())


@pytest.mark.slow
def test_a_recorded_run_at_another_length_says_so(tmp_path: Path) -> None:
    trace = read_trace(shrinking_trace(tmp_path / "p.jsonl", epochs=3, interval=1))
    report = make_report([stretch(trace, epochs=30)], cluster="dgx-a100", gpus=[8])
    assert "stretched to another length" in report.byline
    assert any("here with 30 epochs instead of 3: every architecture" in notice for notice in report.answer.notices)
    assert "Nobody has trained these runs at this length, so" in report.answer.certainty
    assert "keeps its share of a run of this length is assumed" in report.answer.certainty


@pytest.mark.parametrize(
    ("pruned", "dense", "collapsed"), [(0.11, 0.80, True), (0.11, 0.12, False), (0.30, 0.80, False), (None, 0.8, False)]
)
def test_a_network_that_only_guesses_has_collapsed(
    tmp_path: Path, pruned: float | None, dense: float, collapsed: bool
) -> None:
    def with_accuracy(path: Path, accuracy: float | None) -> Trace:
        trace = read_trace(path)
        assert trace.end is not None
        epochs = tuple(msgspec.structs.replace(epoch, validation_accuracy=accuracy) for epoch in trace.epochs)
        return msgspec.structs.replace(
            trace, epochs=epochs, end=msgspec.structs.replace(trace.end, final_accuracy=accuracy)
        )

    runs = [with_accuracy(dense_trace(tmp_path / "d.jsonl", epochs=3), dense)]
    runs += [with_accuracy(shrinking_trace(tmp_path / "p.jsonl", epochs=3, interval=1), pruned)]
    notices = list(build._collapses(compare_runs(runs)[0]))
    assert [("hardly does better than guessing" in notice) for notice in notices] == [True] * collapsed


def test_a_network_of_which_hardly_anything_is_left_is_named(tmp_path: Path) -> None:
    (comparison,) = compare_runs([read_trace(shrinking_trace(tmp_path / "p.jsonl", epochs=3, interval=1))])
    last, first = comparison.pruned.final_network, comparison.pruned.network_of(comparison.pruned.epochs[0])
    tiny = tuple(msgspec.structs.replace(layer, forward_macs=layer.forward_macs // 200) for layer in first.layers)
    networks = {**comparison.pruned.networks, last.id: msgspec.structs.replace(last, layers=tiny)}
    collapsed = msgspec.structs.replace(comparison.pruned, networks=networks)
    (notice,) = build._collapses(msgspec.structs.replace(comparison, pruned=collapsed))
    assert notice.startswith("its last network has 0.5 % of the inference MACs of its first")
    assert not list(build._collapses(comparison))
