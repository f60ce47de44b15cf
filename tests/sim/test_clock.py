from __future__ import annotations

import pytest
import simpy

from ptsim.sim.clock import WorkClock


def test_work_takes_its_seconds_at_full_speed() -> None:
    env = simpy.Environment()
    env.run(WorkClock(env).after(3.0))
    assert env.now == 3.0


def test_half_speed_from_the_middle_makes_it_half_as_long_again() -> None:
    env = simpy.Environment()
    clock = WorkClock(env)
    done = clock.after(2.0)
    env.run(1.0)
    clock.set_rate(0.5)
    env.run(done)
    assert env.now == 3.0


def test_work_that_started_later_is_done_later() -> None:
    env = simpy.Environment()
    clock = WorkClock(env)
    early = clock.after(5.0)
    env.run(1.0)
    late = clock.after(4.5)
    env.run(early)
    assert (env.now, late.triggered) == (5.0, False)
    env.run(late)
    assert env.now == 5.5


def test_shorter_work_overtakes() -> None:
    env = simpy.Environment()
    clock = WorkClock(env)
    long, short = clock.after(5.0), clock.after(1.0)
    env.run(short)
    assert (env.now, long.triggered) == (1.0, False)


def test_no_work_is_done_at_once() -> None:
    env = simpy.Environment()
    env.run(WorkClock(env).after(0.0))
    assert env.now == 0.0


def test_equal_work_is_done_in_the_order_in_which_it_came() -> None:
    env = simpy.Environment()
    clock = WorkClock(env)
    order: list[int] = []
    for i in range(5):
        event = clock.after(1.0)
        event.callbacks.append(lambda _, i=i: order.append(i))
    env.run()
    assert order == [0, 1, 2, 3, 4]


def test_changing_speed_many_times_loses_nothing() -> None:
    env = simpy.Environment()
    clock = WorkClock(env)
    done = clock.after(10.0)
    for i in range(1, 100):
        env.run(i * 0.1)
        clock.set_rate(0.5 if i % 2 else 1.0)
    env.run(done)
    assert env.now == pytest.approx(9.9 + (10 - 0.1 * (50 * 1.0 + 49 * 0.5)) / 0.5, rel=1e-12)


@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_a_clock_that_stands_still_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        WorkClock(simpy.Environment()).set_rate(rate)


def test_negative_work_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        WorkClock(simpy.Environment()).after(-1.0)
