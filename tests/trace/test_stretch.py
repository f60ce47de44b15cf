"""A run of another length: shares of the run are kept, and the result is marked as planned."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import pytest

import ptsim
from ptsim.errors import UsageError
from ptsim.trace.io import read_trace, write_trace
from ptsim.trace.schema import Draw, Reconfiguration
from ptsim.trace.stretch import stretch
from ptsim.trace.trace import Trace
from tests.traces import shrinking_trace


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    return read_trace(shrinking_trace(tmp_path / "trace.jsonl", epochs=6, interval=2))


def test_every_architecture_keeps_its_share(trace: Trace) -> None:
    long = stretch(trace, epochs=60)
    before, after = (Counter(epoch.architecture for epoch in run.epochs) for run in (trace, long))
    assert after == {architecture: 10 * count for architecture, count in before.items()}
    assert [event.epoch for event in long.reconfigurations] == [19, 39]  # the recorded ones are after epochs 1 and 3
    assert long.planned_epochs == 60
    assert long.complete


def test_more_images_are_more_iterations(trace: Trace) -> None:
    many = stretch(trace, images=10 * trace.epochs[0].num_images)
    assert [e.num_iterations for e in many.epochs] == [
        10 * trace.epochs[0].num_images // (e.batch_per_gpu * e.world_size) for e in trace.epochs
    ]
    once, often = (ptsim.simulate(run, "dgx-a100", gpus=[1]) for run in (trace, many))
    assert often.compute_seconds[0] == pytest.approx(10 * once.compute_seconds[0], rel=0.02)


def test_a_shorter_run_joins_what_happens_between_two_of_its_epochs(trace: Trace) -> None:
    short = stretch(trace, epochs=2)
    (event, *_) = short.reconfigurations
    assert event.before == short.epochs[0].architecture
    assert event.after == short.epochs[1].architecture


def test_it_says_that_nobody_trained_it_and_can_be_written(trace: Trace, tmp_path: Path) -> None:
    long = stretch(trace, epochs=12, images=5000)
    assert long.is_planned
    again = read_trace(write_trace(tmp_path / "long.jsonl", long))
    assert again.epochs == long.epochs
    (assumption,) = again.run.assumed
    assert "12 epochs instead of 6 and 5,000 images an epoch instead of" in assumption.what
    assert "12 epochs instead of 6" in ptsim.simulate(long, "dgx-a100", gpus=[1]).notes[0]


def test_without_a_wish_the_trace_is_returned_as_it_is(trace: Trace) -> None:
    assert stretch(trace) is trace


def test_wrong_numbers_are_refused(trace: Trace) -> None:
    with pytest.raises(UsageError, match="epochs is 0"):
        stretch(trace, epochs=0)
    with pytest.raises(UsageError, match="images is -1"):
        stretch(trace, images=-1)


def test_the_last_smaller_step_is_left_out_only_where_the_run_left_it_out(trace: Trace) -> None:
    first = trace.epochs[0]
    each, images = first.batch_per_gpu * first.world_size, first.num_iterations * first.batch_per_gpu * first.world_size
    # 7 and a half steps; a GradScaler may have left an update out, whose images are counted
    for num_train, steps, left_out in ((images, 8, 0), (images + each // 2, 7, 0), (images + each // 2, 7, 1)):
        seen = {"num_images": images, "num_iterations": first.num_iterations - left_out}
        epochs = (msgspec.structs.replace(first, **seen),)
        dataset = msgspec.structs.replace(trace.run.dataset, num_train=num_train)
        run = msgspec.structs.replace(trace.run, dataset=dataset)
        recorded = msgspec.structs.replace(trace, run=run, epochs=epochs)
        (epoch,) = stretch(recorded, images=7 * each + each // 2).epochs
        assert epoch.num_iterations == steps
        assert epoch.num_images == (7 * each + each // 2 if steps == 8 else 7 * each)


def test_more_epochs_than_anybody_trains_are_refused(trace: Trace) -> None:
    with pytest.raises(UsageError, match="epochs is 2147483648, expected at most 100000"):
        stretch(trace, epochs=2**31)


def test_epochs_come_from_the_middle_of_their_share_of_the_run(trace: Trace) -> None:
    """Of 6 epochs 4 are at 0.75, 2.25, 3.75 and 5.25; the network changed after epochs 1 and 3."""
    short = stretch(trace, epochs=4)
    assert [e.architecture for e in short.epochs] == [trace.epochs[i].architecture for i in (0, 2, 3, 5)]
    assert [event.epoch for event in short.reconfigurations] == [0, 2]
    (only,) = stretch(trace, epochs=1).epochs
    assert (only.epoch, only.architecture) == (0, trace.epochs[3].architecture)


@pytest.mark.parametrize(
    ("images", "steps", "seen"),
    [
        (1000, [7, 7, 5, 5, 3, 3], [896, 896, 960, 960, 768, 768]),  # steps of 128, 192 and 256 images on 2 GPUs
        (128, [1, 1, 1, 1, 1, 1], [128, 128, 128, 128, 128, 128]),
        (1, [1] * 6, [1] * 6),
    ],
)
def test_images_are_those_of_all_gpus_and_what_was_measured_is_gone(
    tmp_path: Path, images: int, steps: list[int], seen: list[int]
) -> None:
    recorded = read_trace(shrinking_trace(tmp_path / "two.jsonl", world_size=2))
    made = stretch(recorded, images=images)
    assert [epoch.num_iterations for epoch in made.epochs] == steps
    assert [epoch.num_images for epoch in made.epochs] == seen
    for epoch in made.epochs:
        assert epoch.allreduce_bytes == 4 * recorded.network_of(epoch).num_parameters * epoch.num_iterations
        assert (epoch.measured_time, epoch.device, epoch.learning_rate, epoch.train_loss) == (None,) * 4
        assert (epoch.train_accuracy, epoch.validation_loss, epoch.validation_accuracy, epoch.penalty) == (None,) * 4
        assert epoch.measured_step is not None
    assert (made.run.dataset.num_train, made.run.hyperparameters["epochs"]) == (images, 6)
    assert made.end is not None
    assert (made.end.epochs, made.end.num_iterations) == (6, sum(steps))
    assert (made.end.wall_s, made.end.final_accuracy, made.end.energy_j) == (None, None, None)


@pytest.mark.parametrize(
    ("epochs", "at", "took", "removed"),
    [
        (3, [0, 1, 2], [2.0, 0.5, 1e-3], [(0, 1), (2, 3), (4,)]),  # epochs 1, 3 and 5
        (2, [0, 1], [0.5, 1e-3], [(0, 1, 2), (3, 4)]),  # epochs 1 and 4
    ],
)
def test_changes_that_become_one_take_what_the_last_real_one_took(
    trace: Trace, epochs: int, at: list[int], took: list[float], removed: list[tuple[int, ...]]
) -> None:
    """Surgery after epochs 1 and 3 took 2 and 0.5 s; after 2, 4 and 5 nothing was found to prune, in a millisecond."""
    first, second = trace.reconfigurations
    surgeries = {1: (first, 2.0), 3: (second, 0.5)}
    events: list[Reconfiguration] = []
    last = first.before
    for number, epoch in enumerate((1, 2, 3, 4, 5)):
        event, seconds = surgeries.get(epoch, (first, 1e-3))
        after = event.after if epoch in surgeries else last
        events.append(
            msgspec.structs.replace(
                event,
                epoch=epoch,
                before=last,
                after=after,
                measured_duration_s=seconds,
                channels_removed=10**number,
                layers_removed=(str(number),),
                learning_rate_scale=1.5 + number,
            )
        )
        last = after
    made = stretch(msgspec.structs.replace(trace, reconfigurations=tuple(events)), epochs=epochs).reconfigurations
    assert [event.epoch for event in made] == at
    assert [event.measured_duration_s for event in made] == took
    for event, numbers in zip(made, removed, strict=True):
        assert (event.before, event.after) == (events[numbers[0]].before, events[numbers[-1]].after)
        assert event.batch_before == events[numbers[0]].batch_before
        assert event.channels_removed == sum(10**number for number in numbers)
        assert event.layers_removed == tuple(str(number) for number in numbers)
        assert event.learning_rate_scale == 1.5 + numbers[-1]  # on the planned rate, not on the one before


@pytest.mark.parametrize(
    ("epochs", "starts"),
    [
        (12, ((0, "a"), (4, "b"), (8, "c"), (12, "d"))),  # every epoch twice
        (3, ((0, "a"), (1, "b"), (2, "c"), (3, "d"))),  # epochs 1, 3 and 5
        (1, ((0, "b"), (1, "d"))),  # epoch 3
    ],
)
def test_a_draw_changes_where_its_epochs_come_from(
    trace: Trace, epochs: int, starts: tuple[tuple[int, str], ...]
) -> None:
    draw = Draw(seed=1, architectures=((0, "a"), (2, "b"), (4, "c"), (6, "d")))  # d is what the run ends with
    (made,) = stretch(msgspec.structs.replace(trace, draws=(draw,)), epochs=epochs).draws
    assert made.architectures == starts


def test_as_many_epochs_as_anybody_trains_are_taken(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptsim.trace.stretch.MOST_EPOCHS", 12)
    assert len(stretch(trace, epochs=12).epochs) == 12
    with pytest.raises(UsageError, match="epochs is 13, expected at most 12"):
        stretch(trace, epochs=13)


def test_a_trace_without_epochs_cannot_be_stretched(trace: Trace) -> None:
    with pytest.raises(UsageError, match="has no finished epoch"):
        stretch(msgspec.structs.replace(trace, epochs=()), epochs=3)


def test_what_was_not_asked_for_is_not_told(trace: Trace) -> None:
    (images,), (epochs,) = (stretch(trace, **wish).run.assumed for wish in ({"images": 5000}, {"epochs": 12}))
    recorded = trace.epochs[0].num_images
    share = "every architecture keeps its share of the run"
    assert images.what == f"5,000 images an epoch instead of {recorded:,}: {share}"
    assert epochs.what == f"12 epochs instead of 6: {share}"


def test_settings_say_how_many_epochs_there_are(trace: Trace) -> None:
    settings = trace.run.hyperparameters
    assert stretch(trace, epochs=12).run.hyperparameters == settings | {"epochs": 12}


@pytest.mark.parametrize(
    ("seconds", "expected"), [((2.0, 3.0), 3.0), ((2.0, None), 2.0), ((None, 3.0), 3.0), ((None, None), None)]
)
def test_joined_reconfigurations_take_what_the_last_measured_one_took(
    trace: Trace, seconds: tuple[float | None, ...], expected: float | None
) -> None:
    """Of six epochs: what happened after the second and the fourth becomes one, after the first of two."""
    first, second, *_ = (event for event in trace.reconfigurations if event.before != event.after)
    events = tuple(
        msgspec.structs.replace(event, measured_duration_s=took)
        for event, took in zip((first, second), seconds, strict=True)
    )
    (joined,) = stretch(msgspec.structs.replace(trace, reconfigurations=events), epochs=2).reconfigurations
    assert joined.measured_duration_s == expected
    assert (joined.before, joined.after) == (first.before, second.after)
    assert joined.channels_removed == first.channels_removed + second.channels_removed
