"""The three simulations of a step, and the interval that they make."""

from __future__ import annotations

import pytest

from ptsim.sim.bounded import SecondsRange, bounded_step, contention_at
from ptsim.sim.ddp import Bound
from ptsim.sim.work import StepResult


def result(step_s: float) -> StepResult:
    return StepResult(
        step_s=step_s,
        compute_s=0.0,
        input_wait_s=0.0,
        straggler_wait_s=0.0,
        exposed_communication_s=0.0,
        communication_wait_s=0.0,
        communication_s=0.0,
        wire_bytes_per_gpu=0.0,
    )


@pytest.mark.parametrize(
    ("bound", "contention", "at"),
    [("low", 0.2, 0.1), ("expected", 0.2, 0.2), ("high", 0.2, 0.3), ("high", 0.8, 1.0), ("low", 1.0, 0.5)],
)
def test_the_ends_have_half_the_contention_and_half_as_much_again(bound: Bound, contention: float, at: float) -> None:
    assert contention_at(bound, contention) == pytest.approx(at)


def test_every_bound_is_simulated_with_its_own_contention() -> None:
    steps = {("low", 0.1): 2.0, ("expected", 0.2): 3.0, ("high", 0.3): 5.0}
    found = bounded_step(lambda bound, contention: result(steps[bound, round(contention, 9)]), 0.2)
    assert found.interval() == SecondsRange(low_s=2.0, expected_s=3.0, high_s=5.0)


def test_ends_that_lie_on_the_wrong_side_move_to_the_middle() -> None:
    steps = {"low": result(4.0), "expected": result(3.0), "high": result(2.0)}
    found = bounded_step(lambda bound, _: steps[bound], 0.2)
    assert found.interval() == SecondsRange(low_s=3.0, expected_s=3.0, high_s=3.0)


def test_parts_err_in_the_same_direction() -> None:
    parts = [SecondsRange(low_s=1, expected_s=2, high_s=4), SecondsRange(low_s=8, expected_s=16, high_s=32)]
    assert SecondsRange.total(parts) == SecondsRange(low_s=9, expected_s=18, high_s=36)
