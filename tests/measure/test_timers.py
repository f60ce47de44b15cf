import time
from types import SimpleNamespace

import pytest
import torch

from ptsim.measure import timers
from ptsim.measure.timers import StepTimer, step_distribution


def test_phases_hold_their_own_time_and_fit_into_the_wall_time():
    timer = StepTimer("cpu")
    for _ in timer.data(range(3)):
        with timer.phase("forward"):
            time.sleep(0.01)
        with timer.phase("backward"):
            time.sleep(0.02)
        timer.end_step()
    epoch, steps = timer.finish()
    assert epoch.forward_s >= 3 * 0.01
    assert epoch.backward_s >= 3 * 0.02
    assert epoch.optimizer_s == epoch.regularizer_s == epoch.exposed_communication_s == epoch.validation_s == 0
    parts = epoch.data_wait_s + epoch.forward_s + epoch.backward_s
    assert parts <= epoch.wall_s
    assert steps.p10_s >= 0.03
    assert timer.num_steps == 3


def test_the_wait_for_the_loader_is_data_time():
    def slow_loader():
        for _ in range(2):
            time.sleep(0.01)
            yield None

    timer = StepTimer("cpu")
    for _ in timer.data(slow_loader()):
        timer.end_step()
    assert timer.finish()[0].data_wait_s >= 2 * 0.01


def test_the_spread_of_steps_is_that_of_their_quantiles():
    spread = step_distribution([4.0, 1.0, 3.0, 2.0, 5.0])
    assert spread.median_s == 3.0
    assert spread.p10_s == pytest.approx(1.4)  # numpy.percentile([1, 2, 3, 4, 5], 10)
    assert spread.p90_s == pytest.approx(4.6)
    assert spread.std_s == pytest.approx(2**0.5)


def test_an_epoch_without_a_step_is_refused():
    with pytest.raises(ValueError, match="without a single step"):
        StepTimer("cpu").finish()


@pytest.mark.parametrize(
    ("judged", "wall_s", "to_last_s", "steps"),
    [
        ((20, 25), 15, 12, (10, 2)),  # between the steps: off the second one, which it lies in
        ((18, 20), 18, 15, (8, 7)),  # up to the first one's end
        ((27, 29), 18, 17, (10, 7)),  # behind the last one, where the epoch may have ended
    ],
)
@pytest.mark.parametrize("at_last_step", [False, True])
def test_an_epochs_parts_are_what_the_clock_read(monkeypatch, judged, wall_s, to_last_s, steps, at_last_step):
    """From 10 to 30 s; the steps end at 20 and 27, behind which nothing is training."""
    now = SimpleNamespace(seconds=10.0)
    monkeypatch.setattr(timers, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    timer = StepTimer("cpu")

    def mark(seconds):
        now.seconds = float(seconds)
        return timer.mark()

    for name, begin, end in (
        ("data", 10, 11), ("forward", 11, 13), ("backward", 13, 16), ("regularizer", 16, 16.5),
        ("optimizer", 16.5, 17.75), ("communication", 17.75, 18), ("validation", *judged), ("forward", 25, 26),
    ):  # fmt: skip
        timer.add(name, mark(begin), mark(end))
    for end in (20, 27):
        now.seconds = float(end)
        timer.end_step()
    now.seconds = 30.0
    parts, spread = timer.finish(validation_s=0.25, at_last_step=at_last_step)
    judged_s = judged[1] - judged[0]
    assert parts.wall_s == (to_last_s if at_last_step else wall_s)
    assert (timer.last_step_s, timer.judged) == (27, (judged,))
    assert (parts.data_wait_s, parts.forward_s, parts.backward_s) == (1, 2 + 1, 3)
    assert (parts.regularizer_s, parts.optimizer_s, parts.exposed_communication_s) == (0.5, 1.25, 0.25)
    assert parts.validation_s == judged_s + 0.25
    assert spread == step_distribution([float(seconds) for seconds in steps])


def test_on_a_gpu_the_last_step_ends_when_the_gpu_has_done_it(monkeypatch):
    """The host has launched it a second after the clock began, at 100 s; the GPU takes 7 s."""
    now = SimpleNamespace(host=100.0, gpu=5.0)

    class Event:
        def record(self, _stream):
            self.at = now.gpu

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

        def synchronize(self):
            pass

    monkeypatch.setattr(timers, "time", SimpleNamespace(perf_counter=lambda: now.host))
    monkeypatch.setattr(timers, "cuda_event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    timer = StepTimer("cuda")
    assert timer.last_step_s is None
    now.host, now.gpu = 101.0, 12.0
    timer.end_step()
    now.host, now.gpu = 130.0, 20.0
    parts, _ = timer.finish(at_last_step=True)
    assert (parts.wall_s, timer.last_step_s) == (7.0, 107.0)


def test_what_comes_after_the_last_step_is_no_part_of_an_epoch_that_ends_with_it(monkeypatch):
    """From 10 to 30 s; the step ends at 20, and a pass follows whose gradients wait for the next epoch."""
    now = SimpleNamespace(seconds=10.0)
    monkeypatch.setattr(timers, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    timer = StepTimer("cpu")

    def add(name, begin, end):
        now.seconds = float(begin)
        start = timer.mark()
        now.seconds = float(end)
        timer.add(name, start, timer.mark())

    add("forward", 10, 12)
    add("backward", 12, 20)
    timer.end_step()
    add("validation", 20, 21)
    add("forward", 21, 24)
    now.seconds = 30.0
    parts, _ = timer.finish(at_last_step=True)
    assert (parts.wall_s, parts.forward_s, parts.backward_s, parts.validation_s) == (10, 2, 8, 0)
    whole, _ = timer.finish()
    assert (whole.wall_s, whole.forward_s, whole.backward_s, whole.validation_s) == (19, 5, 8, 1)


def test_one_step_is_every_quantile():
    spread = step_distribution([3.0])
    assert (spread.p10_s, spread.median_s, spread.p90_s, spread.std_s) == (3.0, 3.0, 3.0, 0.0)
    with pytest.raises(ValueError, match="no durations"):
        step_distribution([])
