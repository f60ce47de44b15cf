"""Events are counted before they are simulated."""

from __future__ import annotations

import pytest

from ptsim.errors import UsageError
from ptsim.hardware.catalog import load_cluster
from ptsim.sim.budget import check_events, unlimited
from ptsim.sim.faults import simulate_faults
from ptsim.sim.options import Faults, Options
from ptsim.sim.topology import PlacedJob, simulate_all_reduces


def test_failures_of_a_run_of_centuries_are_refused_and_not_waited_for():
    often = Faults(mtbf_gpu_hours=1e9, checkpoint_interval_s=1e-3)
    with pytest.raises(UsageError, match=r"simulating the failures would take about 2e\+10 events") as caught:
        simulate_faults(1e6, 8, 8, often)
    assert caught.value.hint is not None
    assert "--yes" in caught.value.hint


def test_chunks_that_nobody_would_wait_for_point_to_the_formula():
    jobs = [PlacedJob(ranks=tuple(range(i, 4096, 2)), message_bytes=1e8) for i in (0, 1)]
    with pytest.raises(UsageError, match="sending every chunk over its links would take") as caught:
        simulate_all_reduces(load_cluster("dgx-a100"), jobs)
    assert caught.value.hint is not None
    assert "--network formula" in caught.value.hint


def test_who_says_yes_gets_the_simulation():
    few = Faults(mtbf_gpu_hours=1e9, checkpoint_interval_s=100.0, num_runs=1)
    with unlimited():
        assert simulate_faults(1e4, 8, 8, few).total_s >= 1e4


@pytest.mark.parametrize("hours", [1e306, 1e13, 0.0, float("nan"), float("inf")])
def test_a_time_between_failures_that_no_clock_resolves_is_refused(hours):
    with pytest.raises(UsageError, match="mtbf_gpu_hours is"):
        Options(faults=Faults(mtbf_gpu_hours=hours)).check()


@pytest.mark.parametrize("events", [1.01e7, float("nan"), float("inf")])
def test_the_budget_ends_at_ten_million_events(events):
    check_events(1e7, "this", "less")
    with pytest.raises(UsageError, match="this would take about"):
        check_events(events, "this", "less")
    with unlimited():
        check_events(1e12, "this", "less")
    with pytest.raises(UsageError, match=r"would take about 1e\+12 events, more than the limit of 1e\+07"):
        check_events(1e12, "this", "less")
