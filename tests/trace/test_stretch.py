"""A run of another length: shares of the run are kept, and the result is marked as planned."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import pytest

import ptsim
from ptsim.errors import UsageError
from ptsim.trace.io import read_trace, write_trace
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
    for num_train, steps in ((images, 8), (images + each // 2, 7)):  # 7 and a half steps
        epochs = tuple(msgspec.structs.replace(epoch, num_images=images) for epoch in trace.epochs[:1])
        dataset = msgspec.structs.replace(trace.run.dataset, num_train=num_train)
        run = msgspec.structs.replace(trace.run, dataset=dataset)
        recorded = msgspec.structs.replace(trace, run=run, epochs=epochs)
        (epoch,) = stretch(recorded, images=7 * each + each // 2).epochs
        assert epoch.num_iterations == steps
        assert epoch.num_images == (7 * each + each // 2 if steps == 8 else 7 * each)


def test_more_epochs_than_anybody_trains_are_refused(trace: Trace) -> None:
    with pytest.raises(UsageError, match="epochs is 2147483648, expected at most 100000"):
        stretch(trace, epochs=2**31)
