from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import pytest

from ptsim.answers.validate import Validation
from ptsim.report import answer, build
from ptsim.report.build import make_report
from ptsim.report.frames import averaged
from ptsim.trace.io import read_trace
from ptsim.trace.pairs import compare_runs
from ptsim.trace.stretch import stretch
from ptsim.trace.trace import Trace
from tests.traces import CPU, dense_trace, shrinking_trace


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
    assert "assumed that every network keeps its share of the run at this length" in report.answer.certainty


def with_accuracy(path: Path, accuracy: float | None) -> Trace:
    """The trace with this accuracy after every epoch and at its end."""
    trace = read_trace(path)
    assert trace.end is not None
    epochs = tuple(msgspec.structs.replace(epoch, validation_accuracy=accuracy) for epoch in trace.epochs)
    end = msgspec.structs.replace(trace.end, final_accuracy=accuracy)
    return msgspec.structs.replace(trace, epochs=epochs, end=end)


@pytest.mark.parametrize(
    ("pruned", "dense", "says"),  # of ten classes: below 0.1 + 0.05 · 0.9 = 0.145 a network guesses
    [
        (0.11, 0.80, "11.0 % its network hardly does better than guessing, so what it saves is of no use"),
        (
            0.11,
            0.12,
            "11.0 % its network hardly does better than guessing, so what it saves is of no use. The dense run, with "
            "12.0 %, guesses too: pruning is not to blame",
        ),
        (0.11, None, "11.0 % its network hardly does better than guessing, so what it saves is of no use"),
        (0.14, 0.15, "14.0 % its network hardly does better than guessing, so what it saves is of no use"),
        (0.15, 0.14, None),
        (0.30, 0.80, None),
        (None, 0.80, None),
        (None, 0.10, None),
    ],
)
def test_a_pruned_network_that_only_guesses_is_named_and_a_dense_one_that_does_too(
    tmp_path: Path, pruned: float | None, dense: float | None, says: str | None
) -> None:
    runs = [with_accuracy(dense_trace(tmp_path / "d.jsonl", epochs=3), dense)]
    runs += [with_accuracy(shrinking_trace(tmp_path / "p.jsonl", epochs=3, interval=1), pruned)]
    (comparison,) = compare_runs(runs)
    assert list(build._collapses(comparison)) == ([] if says is None else [f"with an accuracy of {says}"])


def test_a_pruned_network_that_only_guesses_is_named_without_a_dense_run_and_of_one_output_nothing_is_said(
    tmp_path: Path,
) -> None:
    (alone,) = compare_runs([with_accuracy(shrinking_trace(tmp_path / "p.jsonl", epochs=3, interval=1), 0.11)])
    (notice,) = build._collapses(alone)
    assert notice.endswith("hardly does better than guessing, so what it saves is of no use")
    one_output = shrinking_trace(tmp_path / "one.jsonl", epochs=3, interval=1, num_classes=1)
    (untold,) = compare_runs([with_accuracy(one_output, 0.11)])
    assert not list(build._collapses(untold))


def test_a_network_of_which_hardly_anything_is_left_is_named(tmp_path: Path) -> None:
    (comparison,) = compare_runs([read_trace(shrinking_trace(tmp_path / "p.jsonl", epochs=3, interval=1))])
    last, first = comparison.pruned.final_network, comparison.pruned.network_of(comparison.pruned.epochs[0])
    tiny = tuple(msgspec.structs.replace(layer, forward_macs=layer.forward_macs // 200) for layer in first.layers)
    networks = {**comparison.pruned.networks, last.id: msgspec.structs.replace(last, layers=tiny)}
    collapsed = msgspec.structs.replace(comparison.pruned, networks=networks)
    (notice,) = build._collapses(msgspec.structs.replace(comparison, pruned=collapsed))
    assert notice.startswith("its last network has 0.5 % of the inference MACs of its first")
    assert not list(build._collapses(comparison))


def run_row(**changes: object) -> pd.DataFrame:
    """A pruned run on one GPU."""
    row = {
        "run": "p",
        "setting": "r=0.2",
        "origin": "recorded",
        "stretched": False,
        "model": "resnet14",
        "dataset": "cifar10",
        "num_gpus": 1,
        "first_batch_per_gpu": 64,
        "final_accuracy": 0.9,
        "judged": True,
        "measured_seconds": 5400.0,
    }
    return pd.DataFrame([row | changes])


def saving_row(share: float, low: float, high: float, **changes: object) -> pd.DataFrame:
    """These shares saved of ten hours, 160 USD, 36 kWh and 14.4 kg on eight GPUs; half as large in the end."""
    row: dict[str, object] = {
        "run": "p",
        "setting": "r=0.2",
        "model": "resnet14",
        "dataset": "cifar10",
        "task": "resnet14 on cifar10",
        "cluster": "dgx-a100",
        "device": "a100",
        "gpus": 8,
        "epochs": 90,
        "first_batch_per_gpu": 8,
        "saved_fraction": share,
        "saved_fraction_low": low,
        "saved_fraction_high": high,
        "saved_reconfiguration_seconds": 0.0,
        "price": "2.00 USD per GPU-hour",
        "grid_grams_per_kwh": 400.0,
        "dense_accuracy": 0.91,
        "pruned_accuracy": 0.9,
        "accuracy_change": -0.01,
        "dense_allreduce_bytes_per_gpu": 4.0 * 2**30,
        "pruned_allreduce_bytes_per_gpu": 1.0 * 2**30,
        "first_inference_macs_per_image": 40e6,
        "last_inference_macs_per_image": 20e6,
        "shrank": True,
        "tier": "measured",
    }
    for unit, whole in (("seconds", 36000.0), ("usd", 160.0), ("joules", 36 * 3.6e6), ("co2_grams", 14400.0)):
        row |= {f"dense_{unit}": whole, f"pruned_{unit}": whole * (1 - share), f"saved_{unit}": whole * share}
        row |= {f"saved_{unit}_low": whole * low, f"saved_{unit}_high": whole * high}
    return pd.DataFrame([row | changes])


def head_of(savings: pd.DataFrame, runs: pd.DataFrame | None = None, **changes: object) -> answer.Answer:
    given: dict[str, Any] = {"gpus": 8, "validation": None, "notices": ()}
    given |= {"measured": pd.DataFrame(), "excess": pd.DataFrame()}
    return answer.projected_answer(savings, run_row() if runs is None else runs, **given | changes)


@pytest.mark.parametrize(
    ("shares", "verdict", "sure"),
    [
        (
            (0.2, 0.1, 0.3),
            "saves 2.00 h of 10.0 h (20.0 %; 90 % interval 1.00 h to 3.00 h) and saves 32.00 USD of 160 USD "
            "(90 % interval 16.00 USD to 48.00 USD)",
            "the saving lies between 10.0 % and 30.0 % of the dense time",
        ),
        (
            (-0.2, -0.3, -0.1),
            "takes 2.00 h longer than the 10.0 h of dense training (20.0 %; 90 % interval 1.00 h to 3.00 h) and costs "
            "32.00 USD on top of 160 USD (90 % interval 16.00 USD to 48.00 USD)",
            "the loss lies between 10.0 % and 30.0 % of the dense time",
        ),
        (
            (0.1, -0.1, 0.3),
            "saves 1.00 h of 10.0 h (10.0 %; 90 % interval from 1.00 h lost to 3.00 h saved) and saves 16.00 USD of "
            "160 USD (90 % interval from 16.00 USD lost to 48.00 USD saved)",
            "between a loss of 10.0 % and a saving of 30.0 % of the dense time: whether pruning saves time here is",
        ),
        (
            (0.0004, -0.1, 0.1),
            "takes as long as dense training, 10.0 h (90 % interval from 1.00 h lost to 1.00 h saved)",
            "whether pruning saves time here is open",
        ),
        (
            (0.0006, -0.1, 0.1),
            "saves 0.0060 h of 10.0 h (0.1 %; 90 % interval from 1.00 h lost to 1.00 h saved)",
            "whether pruning saves time here is open",
        ),
    ],
)
def test_the_headline_says_what_is_saved_or_lost_and_how_sure_that_is(
    shares: tuple[float, float, float], verdict: str, sure: str
) -> None:
    head = head_of(saving_row(*shares))
    task = "Training resnet14 on cifar10 for 90 epochs with 8 × a100 (dgx-a100): pruning while training "
    assert head.headline.startswith(task + verdict)
    assert head.headline.endswith("; validation accuracy 90.0 % instead of 91.0 %.")
    assert sure in head.certainty
    assert "trained once: how much another seed would differ" in head.certainty


def test_the_tiles_by_hand() -> None:
    head = head_of(saving_row(0.2, 0.1, 0.3, saved_reconfiguration_seconds=-1800.0))
    tiles = {tile.name: tile for tile in head.tiles}
    details = {
        "Time saved": (
            "2.00 h",
            "8.00 h instead of 10.0 h; 90 % interval 1.00 h to 3.00 h; starting and reconfiguring take 30.0 min longer",
        ),
        "Money saved": (
            "32.00 USD",
            "128 USD instead of 160 USD at 2.00 USD per GPU-hour; 90 % interval 16.00 USD to 48.00 USD",
        ),
        "Energy saved": (
            "7.20 kWh",
            "28.8 kWh instead of 36.0 kWh, GPU boards; 90 % interval 3.60 kWh to 10.8 kWh",
        ),
        "CO₂ saved": (
            "2.88 kg",
            "11.5 kg instead of 14.4 kg at 400 g per kWh; 90 % interval 1.44 kg to 4.32 kg",
        ),
        "Validation accuracy": ("90.0 %", "1.0 points below dense"),
        "Inference cost of the result": ("50.0 %", "of dense: 20.0 MMAC instead of 40.0 MMAC per image"),
        "All-reduced bytes per GPU": ("25.0 %", "of dense: 1.00 GiB instead of 4.00 GiB over the run"),
    }
    assert {name: (tile.value, tile.detail) for name, tile in tiles.items()} == details
    assert tiles["Time saved"].origin == "projected; times: measured here"
    assert tiles["Inference cost of the result"].origin == "counted"
    frame = answer.answer_frame(head)
    assert list(frame.name) == ["headline", *tiles, "how sure"]
    assert list(frame.value[1:-1]) == [value for value, _ in details.values()]
    assert (frame.value.iloc[0], frame.value.iloc[-1]) == (head.headline, head.certainty)


def test_tiles_of_a_loss_of_what_is_not_known_and_of_one_gpu() -> None:
    lost = saving_row(-0.2, -0.3, -0.1, gpus=1, accuracy_change=0.02, saved_reconfiguration_seconds=700.0)
    unknown = lost.assign(saved_usd=None, saved_joules=None, saved_co2_grams=None)
    head = head_of(unknown, run_row(judged=False), gpus=1)
    tiles = {tile.name: tile for tile in head.tiles}
    assert list(tiles) == ["Time lost", "Validation accuracy", "Inference cost of the result"]
    # 700 s of starting and reconfiguring are not a tenth of what is lost
    assert tiles["Time lost"].detail == "12.0 h instead of 10.0 h; 90 % interval 1.00 h to 3.00 h"
    assert tiles["Validation accuracy"].detail == "2.0 points above dense"
    assert tiles["Inference cost of the result"].detail.endswith("that of the network before its last pruning")
    assert "USD" not in head.headline


@pytest.mark.parametrize(("own", "said"), [(0.83, True), (0.82, False)])
def test_a_machine_that_drifted_between_two_runs_is_said_beside_their_times(own: float, said: bool) -> None:
    """The pruned run took 80 of 100 minutes; against its own first epochs more than 2.5 points less or more."""
    row = {"setting": "r=0.2", "device": "A100", "time_fraction": 0.8}
    row |= {"dense_seconds": 6000.0, "pruned_seconds": 4800.0}
    measured = pd.DataFrame([row | {"setting": "another", "time_fraction": 0.1}, row | {"own_start_fraction": own}])
    (tile,) = [t for t in head_of(saving_row(0.2, 0.1, 0.3), measured=measured).tiles if "recorded" in t.name]
    assert (tile.value, tile.origin) == ("80.0 %", "measured, 1 pair of runs; no interval")
    detail = "of the dense time on A100: 1.33 h instead of 1.67 h, reconfigurations included"
    drift = f"; {own:.1%} of what it would have taken if every epoch had been as long as its first, unpruned ones"
    drift = drift.replace("%", " %", 1)
    assert tile.detail == detail + drift * said


def test_the_fastest_setting_that_shrank_is_shown_and_repeats_are_its_mean() -> None:
    quick = saving_row(0.3, 0.2, 0.4, run="q", setting="late", shrank=False)  # pruned at its end: no saving in training
    first = saving_row(0.2, 0.1, 0.3, run="a")
    again = saving_row(0.1, 0.05, 0.2, run="b")
    slow = saving_row(0.1, 0.0, 0.2, run="s", setting="gentle")
    other = saving_row(0.9, 0.8, 0.95, run="o", task="resnet14 on less of cifar10")  # further down the page
    stopped = {"epochs": 9, "dense_seconds": 3600.0, "pruned_seconds": 3420.0}  # early; an epoch takes longer
    short = saving_row(0.05, 0.0, 0.1, run="t", setting="stopped", **stopped)
    elsewhere = saving_row(0.9, 0.8, 0.95, run="a", gpus=1)
    runs = pd.concat([run_row(run=name) for name in "abqsot"])
    head = head_of(pd.concat([slow, first, again, quick, short, elsewhere, other], ignore_index=True), runs)
    assert "“r=0.2” saves 1.50 h of 10.0 h (15.0 %; 90 % interval 0.500 h to 3.00 h)" in head.headline
    assert "Of 3 settings that shrink in training, the fastest on this cluster is shown: r=0.2." in head.certainty
    assert "Means of 2 runs of this setting; the interval is the widest of them." in head.certainty
    later = quick.assign(setting="later", pruned_seconds=1.0)
    late = head_of(pd.concat([quick, later], ignore_index=True), run_row(run="q"))
    assert "“later” saves" in late.headline  # none of them shrank


@pytest.mark.parametrize(("batch", "here"), [(4, 32), (8, None), (64, 512)])
def test_updates_of_another_size_than_the_recorded_ones_are_said(batch: int, here: int | None) -> None:
    certainty = head_of(saving_row(0.2, 0.1, 0.3, first_batch_per_gpu=batch)).certainty
    assert ("updates took" in certainty) == (here is not None)
    assert here is None or f"updates took 64 images at first; here they take {here}" in certainty


def projection_row(**changes: object) -> pd.DataFrame:
    """Ten hours on eight GPUs, known to an hour below and two above."""
    row: dict[str, object] = {
        "run": "p",
        "setting": "dense",
        "gpus": 8,
        "model": "resnet14",
        "dataset": "cifar10",
        "task": "resnet14 on cifar10",
        "device": "a100",
        "cluster": "dgx-a100",
        "epochs": 90,
        "first_batch_per_gpu": 8,
        "accuracy": 0.91,
        "tier": "datasheet",
        "price": "2.00 USD per GPU-hour",
    }
    for column, whole in (("seconds", 36000.0), ("usd", 160.0), ("joules", 36 * 3.6e6), ("co2_grams", 14400.0)):
        name = {"seconds": "total_seconds", "usd": "cost_usd", "joules": "energy_joules"}.get(column, column)
        bounds = {"seconds": "seconds"}.get(column, name)
        row |= {name: whole, f"low_{bounds}": 0.9 * whole, f"high_{bounds}": 1.2 * whole}
    return pd.DataFrame([row | changes])


def test_a_dense_answer_by_hand() -> None:
    slower = projection_row(run="s", setting="slow", total_seconds=40000.0)
    short = projection_row(run="t", setting="stopped", epochs=9, total_seconds=4000.0)  # early; an epoch takes longer
    less = projection_row(run="o", task="resnet14 on less of cifar10", total_seconds=1.0)
    rows = pd.concat([slower, short, projection_row(), less], ignore_index=True)
    head = answer.dense_answer(rows, run_row(), 8, None, ())
    assert head.headline == (
        "Training resnet14 on cifar10 for 90 epochs with 8 × a100 (dgx-a100) takes 10.0 h (90 % interval 9.00 h to "
        "12.0 h). No pruned run was given, so there is no saving to report."
    )
    assert [(tile.name, tile.value, tile.detail) for tile in head.tiles] == [
        ("GPU time", "80.0 GPU-h", "8 GPUs for 10.0 h"),
        ("Money", "160 USD", "for the whole run at 2.00 USD per GPU-hour; 90 % interval 144 USD to 192 USD"),
        ("Energy", "36.0 kWh", "all GPU boards, whole run; 90 % interval 32.4 kWh to 43.2 kWh"),
        ("CO₂", "14.4 kg", "all GPU boards, whole run; 90 % interval 13.0 kg to 17.3 kg"),
        ("Validation accuracy", "91.0 %", "of the recorded run"),
    ]
    bare = projection_row(gpus=1, cost_usd=None, energy_joules=None, co2_grams=None, accuracy=None)
    (only,) = answer.dense_answer(bare, run_row(), 1, None, ()).tiles
    assert (only.value, only.detail) == ("10.0 GPU-h", "one GPU")


@pytest.mark.parametrize(("seconds", "says"), [(5400.0, "1.50 h"), (None, "less than an epoch")])
def test_a_recorded_answer_is_what_it_took(seconds: float | None, says: str) -> None:
    head = answer.recorded_answer(run_row(device="A100", measured_seconds=seconds), ())
    assert head.headline == f"resnet14 on cifar10 was trained on A100 for {says}."


def test_what_checking_the_runs_adds_to_certainty() -> None:
    errors = {"whole_run_error": 0.02, "epoch_mape": 0.034, "memory_mape": None, "energy_error": None}
    known = Validation(
        **errors,
        saving_error_points=1.5,
        communication_error=None,
        interval_coverage=1.0,
        source="own profiles",
        tiers=("measured",),
        reasons={},
        runs=(),
        savings=(),
    )
    assert answer.checked(known, "").endswith(" by 3.4 % per epoch on average, and by 1.5 points for the saving.")
    alone = msgspec.structs.replace(known, saving_error_points=None)
    assert answer.checked(alone, "").endswith("is wrong by 3.4 % per epoch on average.")
    assert answer.checked(None, "Nobody looked.") == " Nobody looked."
    assert answer.checked(None, "") == ""


@pytest.mark.parametrize(("images", "tasks"), [((4000, 4000), 1), ((4000, 5000), 2)])
def test_fewer_images_of_the_same_data_are_another_task(tmp_path: Path, images: tuple[int, int], tasks: int) -> None:
    unfinished = {"recorded_epochs": 0, "status": "interrupted"}
    runs = [
        dense_trace(tmp_path / f"{seed}.jsonl", seed=seed, num_train=n, **unfinished) for seed, n in enumerate(images)
    ]
    report = make_report(runs)
    name = f"{read_trace(runs[0]).run.model} on "
    assert report.title.endswith(name + ("cifar10" if tasks == 1 else "2 data sets"))
    assert [notice for notice in report.answer.notices if "tasks" in notice] == [
        "This page holds runs of 2 tasks; its head is about one of them, the tables show all."
    ] * (tasks - 1)
