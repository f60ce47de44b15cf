from __future__ import annotations

import itertools
import random
import re

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptsim.errors import UsageError
from ptsim.sim.step import simulate_steps
from ptsim.sim.work import Jitter, StepPlan, StepResult, TrainingJob
from tests.sim.plans import plan, plans

some_plans = settings(max_examples=60, deadline=None)


def step(work: StepPlan, contention: float = 0.0) -> StepResult:
    return simulate_steps([TrainingJob(plan=work)], contention=contention)[0]


def without_contention(work: StepPlan) -> float:
    """The textbook recurrence: a bucket starts when it is ready and the one before is done."""
    now = sum(c.seconds for c in work.head)
    one_pass = sum(w.seconds for w in work.forward) + sum(w.seconds for w in work.backward)
    now += (work.num_micro_batches - 1) * one_pass + sum(w.seconds for w in work.forward)
    ready: dict[int, float] = {}
    for piece in work.backward:
        now += piece.seconds
        if piece.bucket is not None:
            ready[piece.bucket] = now
    stream = 0.0
    for i, collective in enumerate(work.buckets):
        stream = max(stream, ready[i] if work.overlap else now) + collective.seconds
    return max(now, stream) + sum(w.seconds for w in work.tail)


class TestByHand:
    def test_the_last_bucket_is_exposed_and_the_first_one_hidden(self) -> None:
        # forward to 2, bucket 0 ready at 4 and reduced until 5, bucket 1 ready at 6, reduced until 7, optimizer
        result = step(plan([2, 2], [1, 1]))
        assert result.step_s == 7.5
        assert result.compute_s == 6.5
        assert result.exposed_communication_s == 1.0
        assert result.communication_s == 2.0

    def test_overlap_slows_both_sides(self) -> None:
        # bucket 0 takes 1.2 s while backward gets 1 s of its 2 s done: backward ends at 6.2, bucket 1 at 7.2
        result = step(plan([2, 2], [1, 1]), contention=0.2)
        assert result.step_s == pytest.approx(7.7, rel=1e-12)
        # of the 1.2 s that communication adds, the GPU stands still from 6.2 to 7.2 and is slowed down for the rest
        assert result.exposed_communication_s == pytest.approx(1.2, rel=1e-12)
        assert result.communication_wait_s == pytest.approx(1.0, rel=1e-12)

    def test_a_collective_speeds_up_when_backward_is_over(self) -> None:
        # bucket 0 ready at 3; 1 s of backward takes 1.5 s with contention 0.5, of 4 s communication 1 s is done by 4.5
        assert step(plan([1, 1], [4, 0]), contention=0.5).step_s == pytest.approx(4.5 + 3 + 0.5, rel=1e-12)

    def test_a_computation_that_was_recorded_beside_collectives_is_not_slowed_again_but_they_are(self) -> None:
        # backward ends at 4; of the 4 s of bucket 0, ready at 3, that second has done 1 / 1.5
        work = msgspec.structs.replace(plan([1, 1], [4, 0]), slowed=True)
        result = step(work, contention=0.5)
        assert result.step_s == pytest.approx(4 + (4 - 1 / 1.5) + 0.5, rel=1e-12)
        assert result.communication_wait_s == pytest.approx(result.exposed_communication_s, rel=1e-12)

    def test_without_overlap_communication_follows_backward(self) -> None:
        assert step(plan([2, 2], [1, 1], overlap=False), contention=0.2).step_s == 8.5

    def test_collectives_run_one_after_the_other(self) -> None:
        # bucket 0 keeps the stream until 13 although bucket 1 is ready at 4
        assert step(plan([1, 1], [10, 1])).step_s == 14.5

    def test_accumulated_micro_batches_communicate_once(self) -> None:
        result = step(plan([2, 2], [1, 1], num_micro_batches=3))
        assert result.step_s == 2 * 6 + 7.5
        assert result.communication_s == 2.0

    def test_forward_waits_for_the_broadcast_of_buffers(self) -> None:
        assert step(plan([2, 2], [1, 1], head=[0.25])).step_s == 7.75

    def test_slow_input_decides_the_pace(self) -> None:
        job = TrainingJob(plan=plan([2, 2], [1, 1]), input_interval_s=10.0)
        result = simulate_steps([job], num_warmup=1, num_steps=5)[0]
        assert result.step_s == pytest.approx(10.0)
        assert result.input_wait_s == pytest.approx(2.5)

    def test_input_that_keeps_up_costs_nothing(self) -> None:
        job = TrainingJob(plan=plan([2, 2], [1, 1]), input_interval_s=7.4)
        result = simulate_steps([job], num_warmup=1, num_steps=5)[0]
        assert result.step_s == pytest.approx(7.5)
        assert result.input_wait_s == 0.0

    def test_the_slowest_gpu_decides(self) -> None:
        result = simulate_steps([TrainingJob(plan=plan([2, 2], [1, 1]), speeds=(1.0, 2.0))])[0]
        # the slow one: forward to 4, buckets ready at 8 and 12, reduced until 13, optimizer until 14
        assert result.step_s == 14.0
        assert result.compute_s == 6.5 * 1.5
        assert result.straggler_wait_s == 6.5 * 0.5
        assert result.exposed_communication_s == 1.0

    def test_a_gpu_twice_as_slow_is_like_a_plan_twice_as_long(self) -> None:
        slow = simulate_steps([TrainingJob(plan=plan([2, 2], [1, 1]), speeds=(2.0,))], contention=0.3)[0]
        assert slow.step_s == step(plan([4, 4], [1, 1], forward=4.0, tail=1.0), 0.3).step_s

    def test_two_jobs_share_the_links(self) -> None:
        # both reduce at the same time at half speed: 4→6, then 6→8
        first, second = simulate_steps([TrainingJob(plan=plan([2, 2], [1, 1]))] * 2)
        assert first.step_s == second.step_s == 8.5

    def test_jobs_share_as_they_are_told(self) -> None:
        # 1.5 times as long together: 4→5.5, then 6→7.5
        first, second = simulate_steps([TrainingJob(plan=plan([2, 2], [1, 1]))] * 2, sharing=(1.0, 1.5))
        assert first.step_s == second.step_s == 8.0
        alone, beside = simulate_steps([TrainingJob(plan=plan([2, 2], [1, 1]))] * 2, sharing=(1.0, 1.0))
        assert alone.step_s == beside.step_s == 7.5

    def test_one_entry_may_stand_for_several_gpus(self) -> None:
        many = TrainingJob(plan=plan([2, 2], [1, 1]), speeds=(1.0, 1.0, 1.0, 2.0))
        few = msgspec.structs.replace(many, speeds=(1.0, 2.0), counts=(3, 1))
        one, other = (simulate_steps([job])[0] for job in (many, few))
        assert (one.step_s, one.compute_s) == (other.step_s, other.compute_s) == (14.0, 6.5 * 1.25)

    def test_jobs_that_do_not_meet_do_not_slow_each_other(self) -> None:
        job = TrainingJob(plan=plan([1, 1], [0, 1], forward=10.0))
        apart = msgspec.structs.replace(job, start_s=5.0)
        first, second = simulate_steps([job, apart])
        assert first.step_s == second.step_s == 13.5

    @pytest.mark.parametrize(
        ("gpus", "fraction", "slow"),
        [(10, 0.25, 3), (100, 0.07, 7), (50, 0.14, 7), (10, 0.0, 0), (10, 1.0, 10), (8, 1e-9, 1)],
    )
    def test_stragglers_are_as_many_as_asked_for_rounded_up(self, gpus: int, fraction: float, slow: int) -> None:
        job = TrainingJob(plan=plan([2, 2], [1, 1]), speeds=(1.0,) * gpus)
        result = simulate_steps([job], jitter=Jitter(straggler_fraction=fraction, straggler_slowdown=2.0))[0]
        assert result.compute_s == pytest.approx(6.5 * (1 + slow / gpus))


class TestLaws:
    @given(plans())
    @some_plans
    def test_without_contention_it_is_the_textbook_recurrence(self, work: StepPlan) -> None:
        assert step(work).step_s == pytest.approx(without_contention(work), rel=1e-9, abs=1e-9)

    @given(plans(), st.floats(0, 1))
    @some_plans
    def test_no_step_is_shorter_than_its_critical_path(self, work: StepPlan, contention: float) -> None:
        assert step(work, contention).step_s >= without_contention(work) * (1 - 1e-9)

    @pytest.mark.slow
    @given(plans(), st.floats(0, 1))
    @some_plans
    def test_nor_longer_than_everything_in_a_row_with_contention(self, work: StepPlan, contention: float) -> None:
        longest = (1 + contention) * (work.compute_s + work.communication_s)
        assert step(work, contention).step_s <= longest * (1 + 1e-9) + 1e-9

    @given(plans(), st.floats(0, 1))
    @some_plans
    def test_free_communication_leaves_the_computation(self, work: StepPlan, contention: float) -> None:
        free = msgspec.structs.replace(
            work,
            buckets=tuple(msgspec.structs.replace(c, seconds=0.0) for c in work.buckets),
            head=tuple(msgspec.structs.replace(c, seconds=0.0) for c in work.head),
        )
        result = step(free, contention)
        assert result.step_s == pytest.approx(work.compute_s, rel=1e-9, abs=1e-12)
        assert result.exposed_communication_s == pytest.approx(0.0, abs=1e-9)

    @given(plans(), st.floats(0, 1), st.floats(0, 1))
    @some_plans
    def test_faster_links_never_cost_time(self, work: StepPlan, contention: float, ratio: float) -> None:
        faster = msgspec.structs.replace(
            work, buckets=tuple(msgspec.structs.replace(c, seconds=c.seconds * ratio) for c in work.buckets)
        )
        assert step(faster, contention).step_s <= step(work, contention).step_s * (1 + 1e-9) + 1e-9

    @given(plans(), st.floats(0, 1))
    @some_plans
    def test_equal_gpus_behave_like_one(self, work: StepPlan, contention: float) -> None:
        many = simulate_steps([TrainingJob(plan=work, speeds=(1.0,) * 5)], contention=contention)[0]
        assert many.step_s == pytest.approx(step(work, contention).step_s, rel=1e-9, abs=1e-12)

    @given(plans(), st.lists(st.floats(0.5, 2), min_size=2, max_size=6), st.randoms(use_true_random=False))
    @some_plans
    def test_the_order_of_the_gpus_does_not_matter(
        self, work: StepPlan, speeds: list[float], shuffle: random.Random
    ) -> None:
        shuffled = list(speeds)
        shuffle.shuffle(shuffled)
        one, other = (
            simulate_steps([TrainingJob(plan=work, speeds=tuple(s))], contention=0.2)[0] for s in (speeds, shuffled)
        )
        assert one.step_s == pytest.approx(other.step_s, rel=1e-9, abs=1e-12)

    @given(plans(), st.floats(0, 1))
    @some_plans
    def test_merging_work_changes_no_time(self, work: StepPlan, contention: float) -> None:
        merged = simulate_steps([TrainingJob(plan=work)], contention=contention)[0]
        single = simulate_steps([TrainingJob(plan=work)], contention=contention, record_gpus=16)[0]
        assert merged.step_s == pytest.approx(single.step_s, rel=1e-9, abs=1e-12)

    @given(plans(), st.floats(0, 1))
    @some_plans
    def test_the_parts_add_up_to_the_step(self, work: StepPlan, contention: float) -> None:
        result = step(work, contention)
        parts = result.compute_s + result.input_wait_s + result.straggler_wait_s + result.exposed_communication_s
        assert parts == pytest.approx(result.step_s, rel=1e-9, abs=1e-9)

    @pytest.mark.slow
    @given(
        st.lists(plans(), min_size=1, max_size=3),
        st.lists(st.floats(0.1, 10), min_size=1, max_size=5),
        st.floats(0, 5),
        st.floats(0, 3),
    )
    @settings(max_examples=60, deadline=None)
    def test_unequal_everything_never_deadlocks(
        self, works: list[StepPlan], speeds: list[float], interval: float, start: float
    ) -> None:
        jobs = [
            TrainingJob(plan=work, speeds=tuple(speeds), input_interval_s=round(interval, 3), start_s=i * start)
            for i, work in enumerate(works)
            if work.compute_s > 0.01
        ]
        if jobs:
            results = simulate_steps(jobs, contention=0.2, jitter=Jitter(sigma=0.3), num_steps=3, num_warmup=1, seed=1)
            assert all(result.step_s > 0 for result in results)

    def test_repeating_a_symmetric_step_repeats_its_time(self) -> None:
        work = plan([2, 2], [1, 1])
        many = simulate_steps([TrainingJob(plan=work)], contention=0.2, num_steps=7, num_warmup=2)[0]
        assert many.step_s == pytest.approx(step(work, 0.2).step_s, rel=1e-12)


class TestRandomness:
    def test_the_same_seed_gives_identical_results(self) -> None:
        job = TrainingJob(plan=plan([2, 2], [1, 1]), speeds=(1.0,) * 16)
        jitter = Jitter(sigma=0.1, straggler_fraction=0.1, straggler_slowdown=1.5)
        one, same = (simulate_steps([job], jitter=jitter, num_steps=5, seed=3, record_gpus=16) for _ in range(2))
        assert msgspec.json.encode(one) == msgspec.json.encode(same)

    def test_another_seed_gives_another_result(self) -> None:
        job = TrainingJob(plan=plan([2, 2], [1, 1]), speeds=(1.0,) * 16)
        one, other = (simulate_steps([job], jitter=Jitter(sigma=0.1), seed=seed)[0] for seed in (0, 1))
        assert one.step_s != other.step_s

    @pytest.mark.slow
    def test_jitter_keeps_the_mean_duration(self) -> None:
        job = TrainingJob(plan=plan([2, 2], [1, 1]), speeds=(1.0,) * 2000)
        result = simulate_steps([job], jitter=Jitter(sigma=0.1), num_steps=3)[0]
        assert result.compute_s == pytest.approx(6.5, rel=0.005)  # three standard errors of 6,000 draws

    def test_more_gpus_wait_longer_for_the_slowest(self) -> None:
        waits = [
            simulate_steps(
                [TrainingJob(plan=plan([2, 2], [1, 1]), speeds=(1.0,) * n)], jitter=Jitter(sigma=0.05), num_steps=10
            )[0].straggler_wait_s
            for n in (2, 32, 512)
        ]
        assert waits == sorted(waits)


class TestRecord:
    def test_every_stream_is_busy_with_one_thing_at_a_time(self) -> None:
        spans = simulate_steps(
            [TrainingJob(plan=plan([1, 2, 1], [2, 1], ready=[1, 2]), speeds=(1.0, 1.1))], contention=0.2, record_gpus=16
        )[0].spans
        for gpu in (0, 1):
            for stream in ("compute", "communication"):
                mine = sorted((s.start_s, s.end_s) for s in spans if (s.gpu, s.stream) == (gpu, stream))
                assert mine
                assert all(a[1] <= b[0] + 1e-12 for a, b in itertools.pairwise(mine))

    def test_a_collective_ends_at_the_same_time_everywhere(self) -> None:
        spans = simulate_steps([TrainingJob(plan=plan([1, 2], [2, 1]), speeds=(1.0, 1.5, 0.5))], record_gpus=16)[
            0
        ].spans
        ends = {s.end_s for s in spans if s.name == "bucket 0"}
        assert len(ends) == 1

    def test_nothing_is_recorded_unless_asked(self) -> None:
        assert step(plan([1, 2], [2, 1])).spans == ()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"jobs": []}, "at least one job"),
        ({"jobs": [TrainingJob(plan=plan([1], [1]), speeds=())]}, "at least one GPU"),
        ({"jobs": [TrainingJob(plan=plan([1], [1]))], "num_steps": 0}, "0 steps"),
        (
            {"jobs": [TrainingJob(plan=plan([1], [1])), TrainingJob(plan=plan([0], [0], forward=0, tail=0))]},
            "run forever",
        ),
        ({"jobs": [TrainingJob(plan=plan([1], [1]))], "contention": 1.5}, "contention 1.5"),
        (
            {"jobs": [TrainingJob(plan=plan([1], [1]))] * 2, "sharing": (1.0,)},
            "a factor of at least 1 is needed for every one",
        ),
        ({"jobs": [TrainingJob(plan=plan([1], [1]))], "sharing": (0.5,)}, "a factor of at least 1"),
        ({"jobs": [TrainingJob(plan=plan([1], [1]), counts=(1, 2))]}, "counts need a positive number"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        simulate_steps(**arguments)  # type: ignore[arg-type] # a dict of its fields


PASSES = TrainingJob(plan=plan([2, 2], [1, 1], head=[1], num_micro_batches=3), speeds=(1.0, 2.0))


@pytest.mark.parametrize(
    ("jobs", "steps", "events"),
    [
        # forward, two pieces of backward and the update on one GPU, and two all-reduces: 6 a step
        ([TrainingJob(plan=plan([2, 2], [1, 1]))], 2_000_000, "1.2e+07"),
        # two jobs of two GPUs, 3 passes of 3 pieces and an update each; both look at 3 collectives of either: 52
        ([PASSES] * 2, 250_000, "1.3e+07"),
    ],
)
def test_events_are_counted_before_they_are_simulated(jobs: list[TrainingJob], steps: int, events: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"simulating the steps would take about {events} events")):
        simulate_steps(jobs, num_steps=steps - 1, num_warmup=1)
