"""What is known of an epoch that was trained in two parts, and of its losses: by hand."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from ptsim.trace.schema import DeviceUse, EpochTime, StepDistribution
from ptsim.training.distributed import Team
from ptsim.training.losses import LossSum
from ptsim.training.measured import (
    LastEpoch,
    Measured,
    Unfinished,
    epoch_time,
    last_epoch,
    measure_epoch,
    mini_batch,
    unfinished_epoch,
)

CPU = torch.device("cpu")
STEP = StepDistribution(median_s=1.0, p10_s=1.0, p90_s=1.0, std_s=0.0)


def seconds(factor: float) -> EpochTime:
    """Every part another number, so that no two are mixed up."""
    parts = (17, 2, 3, 5, 7, 11, 0.5, 13)
    return EpochTime(**{n: factor * part for n, part in zip(EpochTime.__struct_fields__, parts, strict=True)})


def exposing(s_per_iteration: float) -> Any:
    """All-reduces of which so much of every iteration is exposed."""
    return SimpleNamespace(exposed_s=lambda iterations: s_per_iteration * iterations)


EARLIER = Unfinished(
    num_iterations=3, num_images=48, num_reductions=6, batch=16, loss_sum=5.0, loss_images=40, learning_rate=0.1,
    time=seconds(1), peak_bytes=6,
)  # fmt: skip
LATER = Measured(
    num_iterations=2, num_images=20, num_reductions=5, time=seconds(2), step=STEP, use=DeviceUse(), peak_bytes=7
)


def test_an_epoch_in_two_parts_is_their_sum_and_nobody_knows_its_energy() -> None:
    joined = Measured(
        num_iterations=5, num_images=68, num_reductions=11, time=seconds(3), step=STEP, use=None, peak_bytes=7
    )
    assert EARLIER.joined(LATER) == joined
    assert Unfinished().joined(LATER) == LATER
    untimed = msgspec.structs.replace(EARLIER, time=None)
    assert untimed.joined(LATER) == msgspec.structs.replace(joined, time=None)
    none_later = msgspec.structs.replace(
        LATER, num_iterations=0, num_images=0, num_reductions=0, time=None, peak_bytes=None
    )
    ended = EARLIER.joined(none_later)  # it had ended before
    assert (ended.time, ended.num_reductions, ended.peak_bytes) == (seconds(1), 6, 6)
    older = msgspec.structs.replace(EARLIER, num_reductions=0, peak_bytes=None)  # of a version that did not know them
    assert (older.joined(LATER).num_reductions, older.joined(LATER).peak_bytes) == (3 + 5, 7)
    larger = msgspec.structs.replace(EARLIER, peak_bytes=8)
    assert larger.joined(LATER).peak_bytes == 8
    assert EARLIER.sum(None) is None


@pytest.mark.parametrize(
    ("s_per_iteration", "backward_s", "exposed_s"),
    [(0.25, 4.0, 1.0), (0.0, 5.0, 0.0), (2.0, 0.0, 5.0)],  # 4 iterations in 5 s of backward, no more than all of it
)
def test_what_is_exposed_of_the_all_reduce_is_no_part_of_backward(
    s_per_iteration: float, backward_s: float, exposed_s: float
) -> None:
    expected = msgspec.structs.replace(
        seconds(1), backward_s=backward_s, exposed_communication_s=exposed_s, validation_s=13 + 2
    )
    assert epoch_time(seconds(1), exposing(s_per_iteration), 4, validation_s=2.0) == expected


def watch(**changes: Any) -> Any:
    """What hooks have seen of the second part."""
    seen = {
        "num_iterations": 2,
        "num_reductions": 0,
        "num_images": 20,
        "batch": 10,
        "largest_backward": 20,
        "usual_step": 40,
        "learning_rate": 0.4,
        "last_step_s": time.perf_counter() - 100,
        "judged": ((5.0, 8.0),),
        "counted": lambda epoch: (2, 20),
        "so_far": lambda: (seconds(2), STEP),
        "finish": lambda: (seconds(2), STEP),
        "memory": SimpleNamespace(total=lambda: 7, so_far=lambda: 5),
    }
    return SimpleNamespace(**(seen | changes))


def losses() -> LossSum:
    """5.0 over 40 images before, a mean of 3.0 over 20 and one of 1.5 over 8 since."""
    told = LossSum(CPU, 5.0, 40)
    told.add(torch.tensor(3.0), 20)
    told.add(torch.tensor(1.5), 8)
    return told


def test_losses_weigh_as_many_images_as_they_are_of_however_many_there_are() -> None:
    assert losses().total(70).tolist() == [5 + 3 * 20 + 1.5 * 8, 40 + 20 + 8, 70]
    many = LossSum(CPU)
    for index in range(600):
        many.add(torch.tensor(float(index)), 2)
    assert many.total(1200).tolist() == [600 * 599, 1200, 1200]  # Σ 2·index


def test_a_loss_that_the_loop_changes_afterwards_counts_as_it_was_told() -> None:
    told, loss = LossSum(CPU), torch.tensor(3.0)
    told.add(loss, 2)
    loss.mul_(10)  # as an all-reduce for a progress bar does
    told.add(loss, 1)
    assert told.total(3).tolist() == [3 * 2 + 30, 3, 3]


@pytest.mark.parametrize(("images", "batch"), [(40, 10), (1080, 10), (1081, 271), (1084, 271)])
def test_a_mini_batch_is_the_usual_one_as_far_as_a_trace_can_say_what_was_left_out(images: int, batch: int) -> None:
    """Four updates of 10 images; twice as many and 100 more may have been left out, else it is the mean."""
    assert mini_batch(10, 4, images) == batch


@pytest.mark.parametrize(("known", "told"), [(20, 20), (0, 7)])
def test_a_state_that_does_not_know_its_largest_backward_pass_had_one_of_each_mini_batch(known: int, told: int) -> None:
    seen: dict[str, object] = {}
    begun = Unfinished(num_iterations=3, batch=7, largest_backward=known, usual_step=14, learning_rate=0.5)
    begun.tell(SimpleNamespace(go_on=lambda **given: seen.update(given)))  # type: ignore[arg-type]
    assert seen == {"batch": 7, "largest_backward": told, "usual_step": 14, "num_steps": 3, "learning_rate": 0.5}


def test_a_state_in_the_middle_of_an_epoch_holds_both_parts() -> None:
    found = unfinished_epoch(watch(num_reductions=4), exposing(0.5), losses(), EARLIER)
    both = msgspec.structs.replace(seconds(3), backward_s=3 * 5 - 2, exposed_communication_s=0.5 + 2)
    assert found == Unfinished(
        num_iterations=5,
        num_images=68,
        num_reductions=6 + 4,
        batch=10,
        largest_backward=20,
        usual_step=40,
        loss_sum=77,
        loss_images=68,
        learning_rate=0.1,
        time=both,
        peak_bytes=6,
    )
    first = unfinished_epoch(watch(), exposing(0.0), LossSum(CPU), Unfinished())
    assert first is not None
    assert (first.num_iterations, first.num_images, first.learning_rate) == (2, 20, 0.4)
    assert (first.num_reductions, first.peak_bytes) == (2, 5)
    resting = watch(num_iterations=0, num_images=0, so_far=lambda: None)
    assert unfinished_epoch(resting, exposing(0.0), LossSum(CPU), Unfinished()) is None
    again = unfinished_epoch(resting, exposing(0.0), LossSum(CPU, 5.0, 40), EARLIER)
    assert again is not None
    assert (again.num_iterations, again.num_reductions, again.time) == (3, 6, seconds(1))


# None was seen; one by update; one by pass.
@pytest.mark.parametrize(("reductions", "exposed_s"), [(0, 2.0), (2, 2.0), (5, 5.0)])
def test_every_all_reduce_is_exposed_also_those_of_accumulated_passes(reductions: int, exposed_s: float) -> None:
    meter: Any = SimpleNamespace(stop=lambda until_s, without: None)
    seen = watch(num_reductions=reductions)
    found = measure_epoch(seen, meter, exposing(1.0), epoch=0, earlier=Unfinished())
    begun = unfinished_epoch(seen, exposing(1.0), LossSum(CPU), Unfinished())
    assert begun is not None
    for times in (found.time, begun.time):
        assert times is not None
        assert (times.exposed_communication_s, times.backward_s) == (exposed_s, 2 * 5 - exposed_s)
    assert (found.num_reductions, begun.num_reductions) == (max(reductions, 2),) * 2


def test_what_passes_after_the_last_update_is_validation() -> None:
    asked: list[tuple[float | None, object]] = []

    def stop(until_s: float | None, without: object) -> DeviceUse:
        asked.append((until_s, without))
        return DeviceUse(power_w=1.0)

    meter: Any = SimpleNamespace(stop=stop)
    trained = watch()
    found = measure_epoch(trained, meter, exposing(0.0), epoch=4, earlier=Unfinished())
    assert asked == [(trained.last_step_s, ((5.0, 8.0),))]  # nor is its energy the epoch's
    assert found.time is not None
    assert 13 * 2 + 100 <= found.time.validation_s < 13 * 2 + 110
    told = (found.num_iterations, found.num_images, found.step, found.use, found.peak_bytes)
    assert told == (2, 20, STEP, DeviceUse(power_w=1.0), 7)
    resting = watch(num_iterations=0, last_step_s=None, finish=lambda: None)
    ended = measure_epoch(resting, meter, exposing(0.0), epoch=4, earlier=EARLIER)
    assert (ended.num_iterations, ended.num_images, ended.time) == (3, 48, seconds(1))


def test_what_validation_takes_begins_when_the_gpu_has_done_the_last_update() -> None:
    """The hook saw it launched 100 s ago; `finish` knows that it was done 40 s ago."""
    trained = watch()

    def finish() -> tuple[EpochTime, StepDistribution]:
        trained.last_step_s += 60
        return seconds(0), STEP

    trained.finish = finish
    meter: Any = SimpleNamespace(stop=lambda until_s, without: None)
    found = measure_epoch(trained, meter, exposing(0.0), epoch=4, earlier=Unfinished())
    assert found.time is not None
    assert 40 <= found.time.validation_s < 50


@pytest.mark.parametrize(
    ("peak", "resident", "recorded"), [(100, 30, 70), (100, 0, 100), (20, 30, 0), (None, 30, None)]
)
def test_what_lies_on_the_device_all_the_time_is_no_part_of_the_peak(
    peak: int | None, resident: int, recorded: int | None
) -> None:
    assert msgspec.structs.replace(LATER, peak_bytes=peak).peak_beside(resident) == recorded


@pytest.mark.parametrize(
    ("ranks", "own", "least", "known"), [(1, 9, 5, 9), (2, 9, 5, 5), (2, None, 5, 5), (1, None, 5, None)]
)
def test_the_rank_with_the_least_memory_decides_how_far_a_mini_batch_may_grow(
    ranks: int, own: int | None, least: int, known: int | None
) -> None:
    team: Any = SimpleNamespace(world_size=ranks, device=CPU, least=lambda mine: mine.clamp(max=least))
    meter: Any = SimpleNamespace(info=lambda: SimpleNamespace(memory_bytes=own))
    epoch: Any = SimpleNamespace(passes=3, num_images=130, world_size=ranks, batch_per_gpu=48)
    expected = LastEpoch(
        passes=3, images_per_rank=130 // ranks, memory_bytes=known, images_per_forward=16, images_per_pass=16
    )
    assert last_epoch(epoch, 16, meter, team) == expected
    team.least = lambda mine: mine
    nobody: Any = SimpleNamespace(info=lambda: SimpleNamespace(memory_bytes=None))
    assert last_epoch(epoch, 16, nobody, team).memory_bytes is None


@pytest.mark.parametrize(
    ("forward", "seen", "of_100"),
    [
        (16, (16, 16), 100),
        (8, (8, 16), 50),  # two calls of the network before every backward pass
        (12, (12, 16), 75),  # one of 12 images and one of 4
        (20, (20, 20), 100),  # a larger mini-batch among the usual ones
        (None, (16, 16), 100),
    ],
)
def test_calls_of_the_network_before_one_backward_pass_share_the_memory(
    forward: int | None, seen: tuple[int, int], of_100: int
) -> None:
    """48 images of an update in three passes: 16 a backward pass."""
    meter: Any = SimpleNamespace(info=lambda: SimpleNamespace(memory_bytes=1))
    epoch: Any = SimpleNamespace(passes=3, num_images=96, world_size=1, batch_per_gpu=48)
    found = last_epoch(epoch, forward, meter, Team(device=CPU))
    assert (found.images_per_forward, found.images_per_pass) == seen
    assert found.forwards(100) == of_100
