from pathlib import Path

import msgspec
import pytest

import ptsim
from ptsim.network import Precision
from ptsim.report.frames import measured_savings_frame
from ptsim.trace.pairs import (
    compare_runs,
    data_name,
    first_epochs,
    held_dense,
    is_same_task,
    pace,
    run_labels,
    setting_labels,
    task_of,
    time_differences,
)
from ptsim.trace.schema import Draw
from tests.traces import CPU, dense_trace, shrinking_trace


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def read(*paths: Path) -> list[ptsim.Trace]:
    return [ptsim.read_trace(path) for path in paths]


def test_runs_are_named_by_what_tells_them_apart_and_no_more(folder: Path) -> None:
    runs = read(
        dense_trace(folder / "a.jsonl"),
        shrinking_trace(folder / "b.jsonl", penalty_ratio=0.2),
        shrinking_trace(folder / "c.jsonl", penalty_ratio=0.3),
    )
    assert run_labels(runs) == ["dense", "PruneTrain r=0.2", "PruneTrain r=0.3"]


def test_repeats_are_told_apart_by_seed_and_copies_by_number(folder: Path) -> None:
    runs = read(*(shrinking_trace(folder / f"{i}" / "trace.jsonl", seed=i) for i in range(2)))
    assert run_labels(runs) == ["PruneTrain r=0.2, seed 0", "PruneTrain r=0.2, seed 1"]
    assert run_labels([runs[0], runs[0]]) == ["PruneTrain r=0.2 (1)", "PruneTrain r=0.2 (2)"]


def test_a_setting_that_all_pruned_runs_share_is_not_named(folder: Path) -> None:
    runs = read(
        dense_trace(folder / "a.jsonl"),
        shrinking_trace(folder / "b.jsonl", interval=1),
        shrinking_trace(folder / "c.jsonl", interval=2),
    )
    assert run_labels(runs) == ["dense", "PruneTrain r=0.2, interval 1", "PruneTrain r=0.2, interval 2"]


def test_a_run_that_another_library_has_pruned_is_not_called_prunetrain(folder: Path) -> None:
    (run,) = read(shrinking_trace(folder / "a.jsonl"))
    without = tuple(msgspec.structs.replace(epoch, penalty_coefficient=0.0) for epoch in run.epochs)
    settings = {name: value for name, value in run.run.hyperparameters.items() if name != "interval"}
    told = msgspec.structs.replace(run.run, hyperparameters=settings | {"penalty_ratio": 0.0})
    pruned = msgspec.structs.replace(run, run=told, epochs=without)
    assert pruned.is_pruned
    assert run_labels([pruned]) == ["pruned"]
    assert run_labels([*read(dense_trace(folder / "b.jsonl")), pruned]) == ["dense", "pruned"]


def test_a_network_with_dense_in_its_name_is_not_a_dense_run(folder: Path) -> None:
    (run,) = read(shrinking_trace(folder / "a.jsonl", model="densenet"))
    assert run.is_pruned


def test_a_pruned_run_is_compared_with_the_dense_run_of_its_network_and_data(folder: Path) -> None:
    runs = read(
        dense_trace(folder / "other.jsonl", model="vgg11"),
        dense_trace(folder / "cpu.jsonl", device=CPU),
        dense_trace(folder / "dense.jsonl"),
        shrinking_trace(folder / "pruned.jsonl"),
    )
    (comparison,) = compare_runs(runs)
    assert comparison.baseline.path.name == "dense.jsonl"  # the same device is preferred
    assert comparison.trained
    assert comparison.notes == ()


def test_runs_of_different_lengths_are_compared_over_what_both_have(folder: Path) -> None:
    runs = read(
        dense_trace(folder / "dense.jsonl"),
        shrinking_trace(folder / "pruned.jsonl", recorded_epochs=3, status="interrupted"),
    )
    (comparison,) = compare_runs(runs)
    assert (len(comparison.baseline.epochs), len(comparison.pruned.epochs)) == (3, 3)
    assert "6" in comparison.notes[0]
    assert "3 are compared" in comparison.notes[0]


def test_a_cut_run_keeps_only_the_reconfigurations_that_its_epochs_saw(folder: Path) -> None:
    (run,) = read(shrinking_trace(folder / "t.jsonl", epochs=6, interval=2))
    cut = first_epochs(run, 4)
    assert [record.epoch for record in cut.reconfigurations] == [1]
    assert not cut.complete
    assert first_epochs(run, 6) is run


def test_without_a_dense_run_the_first_architecture_is_held(folder: Path) -> None:
    (run,) = read(shrinking_trace(folder / "t.jsonl"))
    (comparison,) = compare_runs([run])
    assert not comparison.trained
    held = held_dense(run)
    assert {epoch.architecture for epoch in held.epochs} == {run.epochs[0].architecture}
    assert {epoch.batch_per_gpu for epoch in held.epochs} == {run.epochs[0].batch_per_gpu}
    assert [epoch.epoch for epoch in held.epochs] == [epoch.epoch for epoch in run.epochs]
    assert not held.is_pruned
    first = run.epochs[0].time
    assert held.epochs[-1].time.wall_s == pytest.approx(first.wall_s - first.regularizer_s)
    assert held.final_accuracy is None  # nobody has trained it
    told = {(e.train_loss, e.train_accuracy, e.validation_loss, e.validation_accuracy) for e in held.epochs}
    assert told == {(None,) * 4}
    assert held.end is not None
    assert held.end.num_iterations == sum(epoch.num_iterations for epoch in held.epochs)


def test_dense_runs_alone_have_nothing_to_be_compared_with(folder: Path) -> None:
    assert compare_runs(read(dense_trace(folder / "a.jsonl"), dense_trace(folder / "b.jsonl", seed=1))) == []


def test_repeats_with_other_seeds_share_a_setting_and_other_settings_do_not(folder: Path) -> None:
    runs = read(
        dense_trace(folder / "d.jsonl"),
        *(shrinking_trace(folder / f"{seed}.jsonl", seed=seed) for seed in (1, 2)),
        shrinking_trace(folder / "other.jsonl", penalty_ratio=0.4),
    )
    assert setting_labels(runs) == ["dense", "PruneTrain r=0.2", "PruneTrain r=0.2", "PruneTrain r=0.4"]
    told = runs[2].run.hyperparameters | {"loggers": ["csv"]}
    logged = msgspec.structs.replace(runs[2], run=msgspec.structs.replace(runs[2].run, hyperparameters=told))
    assert len(set(setting_labels([runs[1], logged]))) == 1


def test_runs_of_an_edited_network_are_no_repeats_and_the_dense_run_of_the_same_one_is_preferred(folder: Path) -> None:
    runs = read(
        dense_trace(folder / "before.jsonl", widths=(16, 32, 72), model="./net.py:build"),
        dense_trace(folder / "d.jsonl", model="net.py:build", seed=1),
        shrinking_trace(folder / "p.jsonl", model="./net.py:build"),
    )
    assert len(set(setting_labels(runs))) == 3
    (comparison,) = compare_runs(runs)
    assert comparison.baseline.path.name == "d.jsonl"
    assert comparison.notes == ()
    (edited,) = compare_runs([runs[0], runs[2]])
    assert edited.notes[0].startswith("the runs differ in the network at the start: 175,258 parameters")


def test_what_shows_the_numbers_elsewhere_makes_no_other_setting(folder: Path) -> None:
    plain, other = read(*(shrinking_trace(folder / f"{seed}.jsonl", seed=seed) for seed in (1, 2)))
    told = other.run.hyperparameters | {"loggers": ["csv"]}
    logged = msgspec.structs.replace(other, run=msgspec.structs.replace(other.run, hyperparameters=told))
    assert len(set(setting_labels([plain, logged]))) == 1


def test_a_folder_of_images_is_called_by_its_name(folder: Path) -> None:
    (run,) = read(dense_trace(folder / "a.jsonl"))
    assert data_name(run) == run.run.dataset.name
    dataset = msgspec.structs.replace(run.run.dataset, name="imagefolder")
    changed = msgspec.structs.replace(run.run, dataset=dataset, hyperparameters={"data_dir": "somewhere/leaves"})
    assert data_name(msgspec.structs.replace(run, run=changed)) == "leaves"


def test_the_pace_is_how_fast_the_machine_ran_the_same_network(folder: Path) -> None:
    runs = read(dense_trace(folder / "dense.jsonl"), shrinking_trace(folder / "pruned.jsonl"))
    (comparison,) = compare_runs(runs)
    assert pace(comparison) == pytest.approx(1.0, rel=0.01)
    slow = [
        msgspec.structs.replace(
            e,
            measured_time=msgspec.structs.replace(
                e.time, wall_s=1.25 * (e.time.wall_s - e.time.regularizer_s), regularizer_s=0
            ),
        )
        for e in runs[1].epochs
    ]
    (slowed,) = compare_runs([runs[0], msgspec.structs.replace(runs[1], epochs=tuple(slow))])
    assert pace(slowed) == pytest.approx(1.25, rel=0.01)


def test_an_epoch_that_was_disturbed_does_not_change_the_pace(folder: Path) -> None:
    """One of three epochs of the unpruned network took ten times as long, in the pruned run or in the dense one."""
    dense, pruned = read(
        dense_trace(folder / "dense.jsonl", epochs=3), shrinking_trace(folder / "pruned.jsonl", epochs=3, interval=3)
    )

    def disturbed(run: ptsim.Trace) -> ptsim.Trace:
        first, *rest = run.epochs
        time = msgspec.structs.replace(first.time, wall_s=10 * first.time.wall_s)
        return msgspec.structs.replace(run, epochs=(msgspec.structs.replace(first, measured_time=time), *rest))

    for runs in ([dense, disturbed(pruned)], [disturbed(dense), pruned]):
        (comparison,) = compare_runs(runs)
        assert pace(comparison) == pytest.approx(1.0, rel=0.01)


def test_a_reconfiguration_after_the_last_epoch_counts_in_what_the_run_ends_with(folder: Path) -> None:
    (run,) = read(shrinking_trace(folder / "t.jsonl", epochs=6, interval=2))
    last = run.reconfigurations[-1]
    cut = msgspec.structs.replace(run, epochs=tuple(e for e in run.epochs if e.epoch <= last.epoch))
    assert cut.epochs[-1].architecture == last.before != last.after
    assert cut.final_network is run.networks[last.after]
    assert run.final_network is run.network_of(run.epochs[-1])


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"batch": 32}, "mini-batch at the start 64 with 32"),
        ({"device": "NVIDIA L4"}, "device NVIDIA A100-SXM4-40GB with NVIDIA L4"),
        ({"world_size": 2}, "ranks 1 with 2"),
        ({"precision": Precision.BF16}, "precision fp32 with bf16"),
        (
            {"widths": (16, 32, 72)},  # the file of the model was edited in between
            "network at the start 175,258 parameters (26,657,408 MACs) with 207,354 parameters (28,701,392 MACs)",
        ),
    ],
)
def test_runs_of_one_task_on_other_machines_are_projected_but_their_times_tell_no_saving(
    folder: Path, other: dict[str, object], says: str
) -> None:
    pruned, dense = read(shrinking_trace(folder / "p.jsonl"), dense_trace(folder / "d.jsonl", **other))
    assert is_same_task(pruned, dense)
    assert [str(difference) for difference in time_differences(pruned, dense)] == [says]
    (comparison,) = compare_runs([dense, pruned])
    assert comparison.trained
    assert pace(comparison) is None
    assert measured_savings_frame([comparison]).empty


@pytest.mark.parametrize(
    "other",
    [{"num_train": 4000}, {"model": "vgg11"}, {"dataset": "svhn"}, {"num_classes": 12}, {"input_shape": (3, 16, 16)}],
)
def test_runs_of_another_network_or_other_data_are_no_pair(folder: Path, other: dict[str, object]) -> None:
    pruned, dense = read(shrinking_trace(folder / "p.jsonl"), dense_trace(folder / "d.jsonl", **other))
    assert not is_same_task(pruned, dense)
    (comparison,) = compare_runs([dense, pruned])
    assert not comparison.trained


def test_a_planned_run_is_called_planned_and_what_was_asked_tells_plans_apart(tmp_path: Path) -> None:
    def planned(path: Path, pruning: str) -> ptsim.Trace:
        trace = ptsim.read_trace(path)
        asked = {**trace.run.hyperparameters, "pruning": pruning}
        run = msgspec.structs.replace(trace.run, origin="planned", hyperparameters=asked)
        return msgspec.structs.replace(trace, run=run)

    dense, pruned = dense_trace(tmp_path / "d.jsonl"), shrinking_trace(tmp_path / "p.jsonl")
    runs = [planned(dense, "none"), planned(pruned, "training=0.6,inference=0.5"), planned(pruned, "mine.toml")]
    assert run_labels(runs) == [
        "planned dense",
        "planned training=0.6, inference=0.5",
        "planned mine.toml",
    ]
    (held,) = compare_runs(runs[1:2])
    assert held.baseline_label == "planned dense, held"
    assert held.notes == ("no dense run was planned: the first architecture, held for every epoch, stands in for it",)


@pytest.mark.parametrize(
    ("device", "run", "says"),
    [
        ({"num_threads": 4}, {}, "threads None with 4"),
        ({}, {"memory_format": "channels_last"}, "memory format contiguous with channels_last"),
        ({}, {"hyperparameters": {"optimizer": "adam"}}, "optimizer sgd with adam"),
        ({}, {"hyperparameters": {"optimizer": "sgd", "optimizer_class": "Lion"}}, "optimizer sgd with lion"),
        ({}, {"hyperparameters": {"momentum": 0.0}}, "optimizer sgd with sgd without momentum"),
        (
            {},
            {"hyperparameters": {"optimizer": "rmsprop", "momentum": 0.5}},
            "optimizer sgd with rmsprop with momentum",
        ),
        (
            {},
            {"hyperparameters": {"optimizer": "theirs", "momentum": 0.0}},
            "optimizer sgd with theirs without momentum",
        ),
        ({}, {"hyperparameters": {"nesterov": True}}, "Nesterov's momentum off with on"),
        ({}, {"hyperparameters": {"compile": True}}, "compiler none with inductor"),
        ({}, {"hyperparameters": {"compile": True, "compile_backend": "eager"}}, "compiler none with eager"),
        ({}, {"hyperparameters": {"clip_norm": 1.0}}, "clipping of gradients off with on"),
        ({}, {"hyperparameters": {"ema_decay": 0.999}}, "average of the weights off with on"),
        ({}, {"hyperparameters": {"sync_batch_norm": True}}, "synchronised BatchNorm off with on"),
        ({}, {"versions": {"torch": "2.8.0"}}, "torch 2.15.0 with 2.8.0"),
    ],
)
def test_what_else_takes_time_is_named(
    folder: Path, device: dict[str, object], run: dict[str, object], says: str
) -> None:
    pruned, dense = read(shrinking_trace(folder / "p.jsonl"), dense_trace(folder / "d.jsonl"))
    told = msgspec.structs.replace(dense.run, device=msgspec.structs.replace(dense.run.device, **device), **run)
    other = msgspec.structs.replace(dense, run=told)
    assert [str(difference) for difference in time_differences(pruned, other)] == [says]
    assert time_differences(pruned, dense) == []
    assert len(set(setting_labels([dense, other]))) == 2  # no repeats


@pytest.mark.parametrize(
    "same",
    [
        {"momentum": 0.8},
        {"optimizer_class": "SGD"},
        {"compile": False, "compile_backend": "inductor"},
        {"clip_norm": None, "ema_decay": 0.0, "nesterov": False, "sync_batch_norm": False},
    ],
)
def test_what_takes_no_time_makes_no_difference(folder: Path, same: dict[str, object]) -> None:
    pruned, dense = read(shrinking_trace(folder / "p.jsonl"), dense_trace(folder / "d.jsonl"))
    told = msgspec.structs.replace(dense.run, hyperparameters={**dense.run.hyperparameters, **same})
    assert time_differences(pruned, msgspec.structs.replace(dense, run=told)) == []


def in_passes(trace: ptsim.Trace, passes: int, *, first: int = 0, slower: float = 1.0) -> ptsim.Trace:
    """The run with so many passes from epoch `first` on, whose epochs then take `slower` times as long."""
    return msgspec.structs.replace(
        trace,
        epochs=tuple(
            epoch
            if epoch.epoch < first
            else msgspec.structs.replace(
                epoch,
                passes=passes,
                measured_time=msgspec.structs.replace(epoch.time, wall_s=slower * epoch.time.wall_s),
            )
            for epoch in trace.epochs
        ),
    )


def test_runs_that_accumulate_differently_tell_no_saving_and_are_no_repeats(folder: Path) -> None:
    pruned, dense = read(shrinking_trace(folder / "p.jsonl"), dense_trace(folder / "d.jsonl"))
    other = in_passes(dense, 4)
    assert [str(difference) for difference in time_differences(pruned, other)] == ["passes at the start 1 with 4"]
    (comparison,) = compare_runs([other, pruned])
    assert comparison.trained
    assert measured_savings_frame([comparison]).empty
    assert setting_labels([dense, other]) == ["dense, mini-batch 64", "dense, mini-batch 64 in 4 passes"]


def test_epochs_of_more_passes_tell_nothing_of_those_at_the_start(folder: Path) -> None:
    """The unpruned network trains four epochs, three of them in four passes that take ten times as long."""
    pruned, dense = read(shrinking_trace(folder / "p.jsonl", interval=4), dense_trace(folder / "d.jsonl"))
    changing = in_passes(pruned, 4, first=1, slower=10.0)
    (comparison,) = compare_runs([dense, changing])
    assert pace(comparison) == pytest.approx(1.0, rel=0.01)
    first, held = changing.epochs[0], held_dense(changing)
    assert {epoch.passes for epoch in held.epochs} == {1}
    assert {epoch.time.wall_s for epoch in held.epochs} == {first.time.wall_s - first.time.regularizer_s}


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        ({"device": "NVIDIA L4"}, {"batch": 32}),  # the device before the mini-batch
        ({"batch": 32}, {"precision": Precision.BF16}),  # that before what else takes time
        ({"precision": Precision.BF16}, {"seed": 7}),  # that before the seed
        ({"seed": 7}, {"recorded_epochs": 2, "status": "interrupted"}),  # that before the length
        ({"recorded_epochs": 2, "status": "interrupted"}, {}),
    ],
)
def test_of_several_dense_runs_the_nearest_is_the_baseline(
    folder: Path, worse: dict[str, object], better: dict[str, object]
) -> None:
    pruned = shrinking_trace(folder / "pruned.jsonl")
    (comparison,) = compare_runs(
        read(dense_trace(folder / "worse.jsonl", **worse), dense_trace(folder / "better.jsonl", **better), pruned)
    )
    assert comparison.baseline.path.name == "better.jsonl"


def test_a_held_run_takes_the_median_epoch_of_its_first_architecture_less_the_penalty(folder: Path) -> None:
    (run,) = read(shrinking_trace(folder / "t.jsonl", epochs=6, interval=4))  # the network changes after epoch 3
    epochs = tuple(
        msgspec.structs.replace(
            epoch, measured_time=msgspec.structs.replace(epoch.time, wall_s=wall_s, regularizer_s=1.0)
        )
        for epoch, wall_s in zip(run.epochs, (10.0, 40.0, 20.0, 30.0, 90.0, 90.0), strict=True)
    )
    held = held_dense(msgspec.structs.replace(run, epochs=epochs))
    assert [epoch.time.wall_s for epoch in held.epochs] == [29.0] * 6
    power_w = epochs[3].mean_power_w
    assert power_w is not None
    assert [epoch.mean_power_w for epoch in held.epochs] == pytest.approx([power_w] * 6)
    assert {epoch.time.regularizer_s for epoch in held.epochs} == {0.0}


def test_a_held_run_has_the_ranks_that_the_run_began_with(folder: Path) -> None:
    """Three epochs on one rank, of 10, 40 and 20 s, and one of 30 s on four: the middle one of the three counts."""
    (run,) = read(shrinking_trace(folder / "t.jsonl", epochs=4, interval=4))
    epochs = tuple(
        msgspec.structs.replace(
            epoch,
            world_size=size,
            measured_time=msgspec.structs.replace(epoch.time, wall_s=wall_s, regularizer_s=1.0),
        )
        for epoch, size, wall_s in zip(run.epochs, (1, 1, 1, 4), (10.0, 40.0, 20.0, 30.0), strict=True)
    )
    held = held_dense(msgspec.structs.replace(run, epochs=epochs))
    assert [(epoch.world_size, epoch.time.wall_s) for epoch in held.epochs] == [(1, 19.0)] * 4


def with_settings(trace: ptsim.Trace, **settings: object) -> ptsim.Trace:
    run = msgspec.structs.replace(trace.run, hyperparameters=trace.run.hyperparameters | settings)
    return msgspec.structs.replace(trace, run=run)


def with_data(trace: ptsim.Trace, **changes: object) -> ptsim.Trace:
    dataset = msgspec.structs.replace(trace.run.dataset, **changes)
    return msgspec.structs.replace(trace, run=msgspec.structs.replace(trace.run, dataset=dataset))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "other"}, "data set {name} with other"),
        ({"num_classes": 7}, "classes {num_classes} with 7"),
        ({"num_train": 5}, "training images {num_train} with 5"),
        ({"input_shape": (3, 8, 8)}, "image shape {input_shape} with (3, 8, 8)"),
    ],
)
def test_what_makes_another_task_is_named(folder: Path, changes: dict[str, object], says: str) -> None:
    (run,) = read(shrinking_trace(folder / "a.jsonl"))
    data = run.run.dataset
    fields = {name: getattr(data, name) for name in ("name", "num_classes", "num_train", "input_shape")}
    assert [str(difference) for difference in time_differences(run, with_data(run, **changes))] == [
        says.format(**fields)
    ]


def test_a_task_in_words(folder: Path) -> None:
    (run,) = read(shrinking_trace(folder / "a.jsonl", model="resnet20"))
    run = with_data(run, name="digits", num_classes=10, num_train=1437, input_shape=(1, 8, 8))
    words = "network resnet20, data set digits, classes 10, training images 1437, image shape (1, 8, 8)"
    assert task_of(run) == words
    long = msgspec.structs.replace(run, run=msgspec.structs.replace(run.run, model="m" * 300))
    assert len(task_of(long)) == len(words) - len("resnet20") + 200


def test_data_that_is_no_folder_of_images_keeps_its_name_wherever_it_lies(folder: Path) -> None:
    (run,) = read(shrinking_trace(folder / "a.jsonl"))
    assert data_name(with_settings(with_data(run, name="cifar10"), data_dir="/data/copies")) == "cifar10"


@pytest.mark.parametrize(
    "name",
    [
        "seed", "data_dir", "download", "num_workers", "num_threads", "device", "profile", "keep_every",
        "record_channel_maxima", "loggers",
    ],
)  # fmt: skip
def test_settings_that_do_not_change_what_is_trained_make_no_other_setting(folder: Path, name: str) -> None:
    (run,) = read(shrinking_trace(folder / "a.jsonl"))
    one, other = (with_settings(run, **{name: value}) for value in ("a", "b"))
    assert len(set(setting_labels([one, other]))) == 1
    assert len(set(setting_labels([with_settings(run, weight_decay=value) for value in (0.1, 0.2)]))) == 2


def test_the_order_of_settings_makes_no_other_setting(folder: Path) -> None:
    (run,) = read(shrinking_trace(folder / "a.jsonl"))
    turned = dict(reversed(run.run.hyperparameters.items()))
    other = msgspec.structs.replace(run, run=msgspec.structs.replace(run.run, hyperparameters=turned))
    assert len(set(setting_labels([run, other]))) == 1


def test_schedules_and_mini_batches_that_differ_are_named(folder: Path) -> None:
    (run,) = read(shrinking_trace(folder / "a.jsonl"))
    batches = [with_settings(run, dynamic_batch=dynamic) for dynamic in (True, False)]
    assert run_labels(batches) == ["PruneTrain r=0.2, dynamic mini-batch", "PruneTrain r=0.2, fixed mini-batch"]
    schedules = [with_settings(run, schedule=schedule) for schedule in ("continuous", "one_time", "ssl")]
    assert run_labels(schedules) == ["PruneTrain r=0.2", "one-time pruning r=0.2", "SSL r=0.2"]
    assert run_labels([with_settings(run, penalty_ratio=None)]) == ["PruneTrain"]


def test_a_run_without_a_dense_one_has_a_baseline_and_no_pace(folder: Path) -> None:
    """The run's own epochs, held, would have its own pace."""
    (run,) = read(shrinking_trace(folder / "a.jsonl"))
    planned = msgspec.structs.replace(run, run=msgspec.structs.replace(run.run, origin="planned"))
    for trace, made in ((run, "recorded"), (planned, "planned")):
        (comparison,) = compare_runs([trace])
        assert comparison.notes == (
            f"no dense run was {made}: the first architecture, held for every epoch, stands in for it",
        )
        assert (comparison.trained, pace(comparison)) == (False, None)


def test_a_held_run_has_no_penalty_no_sparsity_and_what_was_recorded_of_its_gpu(folder: Path) -> None:
    (run,) = read(shrinking_trace(folder / "a.jsonl"))
    sparse = tuple(msgspec.structs.replace(epoch, channel_sparsity=0.25, weight_sparsity=0.5) for epoch in run.epochs)
    for epoch in held_dense(msgspec.structs.replace(run, epochs=sparse)).epochs:
        assert (epoch.penalty, epoch.penalty_coefficient) == (0.0, 0.0)
        assert (epoch.channel_sparsity, epoch.weight_sparsity) == (0.0, 0.0)
    unwatched = tuple(msgspec.structs.replace(epoch, device=None) for epoch in run.epochs)
    held = held_dense(msgspec.structs.replace(run, epochs=unwatched))
    assert [epoch.device for epoch in held.epochs] == [None] * len(run.epochs)


def test_the_nearest_dense_run_begins_with_the_mini_batch_that_the_pruned_run_begins_with(folder: Path) -> None:
    pruned, dense = read(shrinking_trace(folder / "a.jsonl"), dense_trace(folder / "b.jsonl"))
    first, *rest = pruned.epochs
    grown = [msgspec.structs.replace(epoch, batch_per_gpu=2 * first.batch_per_gpu) for epoch in rest]
    pruned = msgspec.structs.replace(pruned, epochs=(first, *grown))
    twice = tuple(msgspec.structs.replace(epoch, batch_per_gpu=2 * epoch.batch_per_gpu) for epoch in dense.epochs)
    others = [msgspec.structs.replace(dense, epochs=twice), dense]
    for order in (others, others[::-1]):
        (comparison,) = compare_runs([pruned, *order])
        assert comparison.baseline.epochs[0].batch_per_gpu == first.batch_per_gpu


def test_runs_of_other_networks_are_named_by_them_and_by_the_mini_batch_that_they_begin_with(folder: Path) -> None:
    runs = read(*(dense_trace(folder / f"{model}.jsonl", model=model) for model in ("vgg11", "resnet20")))
    assert run_labels(runs) == ["vgg11, dense", "resnet20, dense"]
    assert [d.what for d in time_differences(*runs)] == ["network"]
    first, *rest = runs[0].epochs
    doubled = msgspec.structs.replace(first, batch_per_gpu=2 * first.batch_per_gpu, passes=4)
    others = [msgspec.structs.replace(runs[0], epochs=(one, *rest)) for one in (first, doubled)]
    assert run_labels(others) == ["dense, mini-batch 64", "dense, mini-batch 128 in 4 passes"]


def test_a_run_that_was_pruned_at_its_end_shrank_in_no_epoch(folder: Path) -> None:
    (run,) = read(shrinking_trace(folder / "a.jsonl"))
    second = next(i for i, epoch in enumerate(run.epochs) if epoch.architecture != run.epochs[0].architecture)
    (comparison,) = compare_runs([msgspec.structs.replace(run, epochs=run.epochs[: second + 1])])  # two networks
    assert comparison.shrank
    (at_the_end,) = compare_runs([msgspec.structs.replace(run, epochs=run.epochs[:1])])
    assert not at_the_end.shrank


def test_a_pruned_run_that_nobody_timed_has_no_pace(folder: Path) -> None:
    pruned, dense = read(shrinking_trace(folder / "a.jsonl"), dense_trace(folder / "b.jsonl"))
    untimed = tuple(msgspec.structs.replace(epoch, measured_time=None) for epoch in pruned.epochs)
    (comparison,) = compare_runs([msgspec.structs.replace(pruned, epochs=untimed), dense])
    assert comparison.trained
    assert pace(comparison) is None


def test_a_held_run_has_the_first_network_alone_and_nothing_that_belongs_to_others(folder: Path) -> None:
    (run,) = read(shrinking_trace(folder / "a.jsonl"))
    first = run.epochs[0].architecture
    seen = tuple(msgspec.structs.replace(epoch, channel_maxima={"conv": (0.5,)}) for epoch in run.epochs)
    drawn = msgspec.structs.replace(run, epochs=seen, draws=(Draw(seed=1, architectures=((0, first),)),))
    held = held_dense(drawn)
    assert (tuple(held.networks), held.draws, held.reconfigurations) == ((first,), (), ())
    assert len(run.networks) > 1
    assert all(epoch.channel_maxima is None for epoch in held.epochs)
