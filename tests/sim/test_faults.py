from __future__ import annotations

import math

import pytest

from ptsim.errors import UsageError
from ptsim.sim.faults import simulate_faults
from ptsim.sim.options import Faults

HOUR = 3600.0


def test_gpus_that_hardly_fail_cost_only_checkpoints() -> None:
    faults = Faults(mtbf_gpu_hours=1e15, checkpoint_interval_s=HOUR, checkpoint_s=36.0)
    run = simulate_faults(10 * HOUR, 8, 8, faults)
    assert run.total_s == pytest.approx(10 * HOUR + 9 * 36)  # none after the last piece
    assert run.num_failures == 0
    assert run.goodput == pytest.approx(10 * HOUR / (10 * HOUR + 9 * 36))


def test_the_mean_duration_is_the_renewal_formulas() -> None:
    # A piece of τ with exponential failures of rate λ and restart R takes (e^{λτ} − 1)(1/λ + R) on average (Daly 2006).
    faults = Faults(mtbf_gpu_hours=100.0, checkpoint_interval_s=HOUR, checkpoint_s=60.0, restart_s=600.0, num_runs=400)
    rate = 100 / (100 * HOUR)
    run = simulate_faults(20 * HOUR, 100, 8, faults)
    piece, last = HOUR + 60.0, HOUR
    expected = sum((math.exp(rate * tau) - 1) * (1 / rate + 600) for tau in [piece] * 19 + [last])
    assert run.total_s == pytest.approx(expected, rel=0.03)


def test_the_time_is_accounted_for() -> None:
    faults = Faults(mtbf_gpu_hours=200.0, checkpoint_interval_s=HOUR, checkpoint_s=30.0)
    run = simulate_faults(30 * HOUR, 64, 8, faults)
    parts = 30 * HOUR + run.checkpoint_s + run.lost_s + run.restart_s + run.slow_s
    assert run.total_s == pytest.approx(parts)
    assert run.low_s <= run.total_s <= run.high_s


def test_elastic_continuation_is_slower_while_the_node_is_away_and_beats_a_long_wait() -> None:
    common = {"mtbf_gpu_hours": 500.0, "checkpoint_interval_s": 600.0, "checkpoint_s": 5.0, "num_runs": 100}
    waiting = simulate_faults(24 * HOUR, 64, 8, Faults(**common, restart_s=2 * HOUR))  # type: ignore[arg-type] # a dict of its fields
    elastic = simulate_faults(
        24 * HOUR,
        64,
        8,
        Faults(**common, policy="elastic", restart_s=60.0, repair_s=2 * HOUR),  # type: ignore[arg-type] # a dict of its fields
    )
    assert elastic.slow_s > 0
    assert elastic.total_s < waiting.total_s


def test_a_job_of_one_node_waits_for_its_repair() -> None:
    faults = Faults(
        mtbf_gpu_hours=8.0, policy="elastic", repair_s=HOUR, restart_s=0.0, checkpoint_interval_s=600.0, num_runs=50
    )
    run = simulate_faults(10 * HOUR, 8, 8, faults)
    assert run.restart_s == pytest.approx(run.num_failures * HOUR, rel=1e-6)
    assert run.slow_s == 0


def test_the_same_seed_gives_the_same_runs() -> None:
    faults = Faults(mtbf_gpu_hours=100.0)
    assert simulate_faults(1e5, 64, 8, faults, seed=1) == simulate_faults(1e5, 64, 8, faults, seed=1)
    assert simulate_faults(1e5, 64, 8, faults, seed=1) != simulate_faults(1e5, 64, 8, faults, seed=2)


def test_a_run_that_could_not_finish_is_refused() -> None:
    with pytest.raises(UsageError, match="no run reaches a checkpoint") as caught:
        simulate_faults(1e6, 16384, 8, Faults(mtbf_gpu_hours=100.0))
    assert caught.value.hint == "checkpoint more often"
