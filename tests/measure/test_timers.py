import time

import pytest

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
