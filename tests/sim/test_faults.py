from __future__ import annotations

import itertools
import math
from typing import Literal

import msgspec
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


class Script:
    """Stands for the random numbers: failures after these seconds. `rates` are those that were asked for.

    `node` is drawn where a failure may be on a full node or on the last one.
    """

    def __init__(self, *after_s: float, node: float = 1.0) -> None:
        self.after_s, self.rates, self.node = list(after_s), list[float](), node

    def random(self) -> float:
        return self.node

    def expovariate(self, rate: float) -> float:
        self.rates.append(rate)
        return self.after_s.pop(0)


@pytest.mark.parametrize(
    ("policy", "num_gpus", "node", "piece_s", "working"),
    [
        # 10 s are lost, 5 s go by, then 40 s of work and a checkpoint of 2 s, again, and 20 s
        ("restart", 16, 0.0, 40.0, (16, 16, 16, 16)),
        ("elastic", 16, 0.0, 80.0, (16, 8, 16, 16)),  # 8 GPUs are away, and back at the checkpoint after their 30 s
        ("restart", 12, 0.0, 40.0, (12, 12, 12, 12)),
        ("elastic", 12, 0.34, 120.0, (12, 4, 12, 12)),
        ("elastic", 12, 0.33, 60.0, (12, 8, 12, 12)),  # every third GPU is on the node of four
    ],
)
def test_a_failure_costs_what_its_work_restart_and_absence_take(
    policy: Literal["restart", "elastic"],
    num_gpus: int,
    node: float,
    piece_s: float,
    working: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = Script(10.0, piece_s + 2.0, math.inf, math.inf, node=node)  # the second fails when it is safe
    monkeypatch.setattr("ptsim.sim.faults.random.Random", lambda seed: script)
    faults = Faults(
        mtbf_gpu_hours=1.0, checkpoint_interval_s=40.0, checkpoint_s=2.0, restart_s=5.0, policy=policy, repair_s=30.0,
        num_runs=1,
    )  # fmt: skip
    run = simulate_faults(100.0, num_gpus, 8, faults)
    assert run.total_s == pytest.approx(10 + 5 + piece_s + 2 + 42 + 20)
    assert (run.num_failures, run.lost_s, run.restart_s) == (1, 10.0, 5.0)
    assert (run.checkpoint_s, run.slow_s) == (4.0, piece_s - 40)
    assert run.goodput == pytest.approx(100 / run.total_s)
    assert script.rates == pytest.approx([gpus / HOUR for gpus in working])


def test_a_node_that_is_not_full_takes_its_own_gpus_away_and_brings_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """9 GPUs: after 10 s the eight leave; 20 s after a restart of 5 s the single one does. The eight come back first.

    They come 100 s after their failure, at 110 s, and train the 40 s of 9 GPUs in 45 s.
    """
    script = Script(10.0, 20.0, math.inf)
    monkeypatch.setattr("ptsim.sim.faults.random.Random", lambda seed: script)
    faults = Faults(
        mtbf_gpu_hours=1.0, checkpoint_interval_s=40.0, restart_s=5.0, policy="elastic", repair_s=100.0, num_runs=1
    )
    run = simulate_faults(40.0, 9, 8, faults)
    assert script.rates == pytest.approx([gpus / HOUR for gpus in (9, 1, 8)])
    assert (run.total_s, run.lost_s, run.restart_s, run.slow_s) == pytest.approx((155.0, 30.0, 80.0, 5.0))


def test_gpus_that_are_away_fail_no_more_and_come_back_each_with_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of 4, 4 and 1 of 9 GPUs, of which the last is hit where 0.12 of those at work are less than one.

    After 10 s a node of four leaves, for 100 s; after 20 s with 5 GPUs the single one does, from 35 to 135 s. The four
    train 40 s of nine in 90 s, up to 130 s, and are eight again. 2 s later four leave: the single one is still away.
    After the restart five train the other 40 s in 72 s.
    """
    script = Script(10.0, 20.0, math.inf, 2.0, math.inf, node=0.12)
    monkeypatch.setattr("ptsim.sim.faults.random.Random", lambda seed: script)
    faults = Faults(
        mtbf_gpu_hours=1.0, checkpoint_interval_s=40.0, checkpoint_s=0.0, restart_s=5.0, policy="elastic",
        repair_s=100.0, num_runs=1,
    )  # fmt: skip
    run = simulate_faults(80.0, 9, 4, faults)
    assert script.rates == pytest.approx([gpus / HOUR for gpus in (9, 5, 4, 8, 5)])
    assert (run.total_s, run.lost_s, run.slow_s) == pytest.approx((132 + 5 + 72, 32.0, 50 + 32))


def test_the_interval_is_from_the_5th_to_the_95th_percentile_of_the_runs() -> None:
    """The mean of n runs and that of n - 1 tell how long the n-th took."""
    few = Faults(mtbf_gpu_hours=5.0)
    runs = [simulate_faults(5 * HOUR, 8, 8, msgspec.structs.replace(few, num_runs=n)) for n in range(1, 22)]
    sums = [0.0, *(n * run.total_s for n, run in enumerate(runs, start=1))]
    totals = sorted(after - before for before, after in itertools.pairwise(sums))
    assert (runs[-1].low_s, runs[-1].high_s) == pytest.approx((totals[1], totals[19]))  # 5 % and 95 % of 20 steps
    assert totals[0] < totals[1] < totals[19] < totals[20]


@pytest.mark.parametrize(
    ("failing", "low_s", "total_s", "high_s"),
    [
        (1, 100.0, (39 * 100 + 5110) / 40, (39 * 100 + 5110) / 40),
        (20, 100.0, (100 + 5110) / 2, 5110.0),
        (39, (100 + 39 * 5110) / 40, (100 + 39 * 5110) / 40, 5110.0),
    ],
)
def test_the_mean_of_rare_failures_that_cost_much_is_inside_the_interval(
    failing: int, low_s: float, total_s: float, high_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 runs of 100 s; some fail once, lose 10 s and wait for 5,000: of a single one no percentile shows anything."""
    script = Script(*(10.0, math.inf) * failing, *(math.inf,) * (40 - failing))
    monkeypatch.setattr("ptsim.sim.faults.random.Random", lambda seed: script)
    run = simulate_faults(100.0, 8, 8, Faults(mtbf_gpu_hours=1.0, restart_s=5000.0, num_runs=40))
    assert (run.low_s, run.total_s, run.high_s) == pytest.approx((low_s, total_s, high_s))


def test_a_run_that_ends_before_its_first_checkpoint_need_not_reach_one() -> None:
    """One failure in 45 s: 60 s can be trained in one go, half an hour cannot."""
    often = Faults(mtbf_gpu_hours=0.1, num_runs=3)
    assert simulate_faults(60.0, 8, 8, often).checkpoint_s == 0
    long = msgspec.structs.replace(often, checkpoint_s=3600.0)  # which is never written
    assert simulate_faults(60.0, 8, 8, long).checkpoint_s == 0
    with pytest.raises(UsageError, match="no run reaches a checkpoint"):
        simulate_faults(1800.0, 8, 8, often)


def test_seven_failures_between_two_checkpoints_are_too_many() -> None:
    """10 GPUs that fail every 100 s: one failure in 10 s."""
    often = Faults(mtbf_gpu_hours=100 / HOUR, checkpoint_interval_s=50.0, checkpoint_s=19.0, restart_s=0.0, num_runs=1)
    assert simulate_faults(60.0, 10, 8, often).num_failures > 0
    rarely = msgspec.structs.replace(often, checkpoint_s=21.0)
    with pytest.raises(UsageError, match=r"fail every 10 s; no run reaches a checkpoint every 71 s"):
        simulate_faults(60.0, 10, 8, rarely)


def test_a_run_without_work_takes_no_time_and_wastes_none() -> None:
    run = simulate_faults(0.0, 8, 8, Faults(mtbf_gpu_hours=10.0))
    assert (run.total_s, run.low_s, run.high_s, run.num_failures, run.goodput) == (0.0, 0.0, 0.0, 0, 1.0)
