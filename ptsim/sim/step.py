"""How long data-parallel training steps take when computation and communication overlap, GPU by GPU.

One SimPy process per GPU walks through the step (input, forward, backward, optimizer); one per job is its
communication stream: NCCL runs a job's collectives one after the other in the order of the buckets, and each starts
when the last GPU has its gradients ready. While both run, each slows the other down by `contention`, computation only
where its plan does not hold that already. Jobs on the same links slow each other down while both communicate. Equal
GPUs behave equally, so that a symmetric job is simulated with a single one.

Nothing here knows about networks or clusters: durations come in with the `StepPlan`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Sequence

import msgspec
import simpy

from ptsim.sim.budget import check_events
from ptsim.sim.clock import WorkClock
from ptsim.sim.work import Jitter, Piece, Span, SpanPhase, StepPlan, StepResult, Stream, TrainingJob

Process = Generator[simpy.Event, None, None]


def simulate_steps(
    jobs: Sequence[TrainingJob],
    *,
    contention: float = 0.0,
    sharing: Sequence[float] | None = None,
    jitter: Jitter | None = None,
    num_steps: int = 1,
    num_warmup: int = 0,
    seed: int = 0,
    record_gpus: int = 0,
) -> tuple[StepResult, ...]:
    """Simulate jobs side by side and average each one's steps.

    Args:
        jobs: those that share the links; usually one.
        contention: by which fraction computation and communication each take longer while both run.
        sharing: how many times as long a collective takes while 1, 2, … jobs communicate; by default 1, 2, …: equal
            parts of the links.
        jitter: random variation between GPUs and steps.
        num_steps: measured steps of every job; jobs go on until all have finished theirs.
        num_warmup: steps before them that are not measured.
        seed: of every random draw; equal seeds give equal results.
        record_gpus: of how many GPUs of every job to keep what their streams did, piece by piece.

    Raises:
        ValueError: no jobs, a job without GPUs, no steps, a contention outside [0, 1], or not a factor for every job.
        UsageError: more events than the budget allows.
    """
    factors = tuple(range(1, len(jobs) + 1)) if sharing is None else tuple(sharing)
    _check(jobs, factors, contention, num_steps)
    if not record_gpus:
        jobs = [msgspec.structs.replace(job, plan=job.plan.merged()) for job in jobs]
    what = "simulating the steps"
    check_events(_num_events(jobs, num_warmup + num_steps), what, "fewer passes, jobs or sampled steps need fewer")
    env = simpy.Environment()
    links = _Links(len(jobs), factors)
    running = [
        _RunningJob(
            env,
            index,
            job,
            links,
            contention=contention,
            jitter=jitter,
            last_measured=num_warmup + num_steps,
            seed=seed,
            record_gpus=record_gpus,
        )
        for index, job in enumerate(jobs)
    ]
    for job in running:  # in any order: all go on until the last has finished its steps
        env.run(job.measured)
    return tuple(job.result(num_warmup) for job in running)


def _check(jobs: Sequence[TrainingJob], factors: Sequence[float], contention: float, num_steps: int) -> None:
    """See `simulate_steps`."""
    if not jobs or any(not job.speeds for job in jobs):
        raise ValueError("a simulation needs at least one job with at least one GPU")
    if any(job.counts and (len(job.counts) != len(job.speeds) or min(job.counts) < 1) for job in jobs):
        raise ValueError("counts need a positive number for every one of the speeds")
    if len(jobs) > 1 and any(job.plan.compute_s + job.plan.communication_s == 0 for job in jobs):
        raise ValueError("a job whose steps take no time would run forever beside another")
    if num_steps < 1:
        raise ValueError(f"{num_steps} steps; at least 1 is needed")
    if not 0 <= contention <= 1:
        raise ValueError(f"contention {contention}; it must lie in [0, 1]")
    if len(factors) < len(jobs) or min(factors) < 1:
        raise ValueError(f"sharing {factors}; a factor of at least 1 is needed for every one of {len(jobs)} jobs")


def _num_events(jobs: Sequence[TrainingJob], num_steps: int) -> int:
    """About how many: every GPU's pieces of work in every pass, and every collective, which all jobs look at."""
    pieces = 0
    for plan, speeds in ((job.plan, job.speeds) for job in jobs):
        worked = plan.num_micro_batches * (len(plan.forward) + len(plan.backward)) + len(plan.tail)
        pieces += len(speeds) * worked + len(jobs) * (len(plan.head) + len(plan.buckets))
    return num_steps * pieces


class _Links:
    """The links that jobs share: the more of them communicate, the longer each one's collective takes."""

    def __init__(self, num_jobs: int, factors: Sequence[float]) -> None:
        self.num_unfinished = num_jobs  # jobs whose measured steps are not over: all go on until none is left
        self._factors = factors
        self._active: set[int] = set()
        self._changed: list[Callable[[], None]] = []

    @property
    def slowdown(self) -> float:
        return self._factors[max(1, len(self._active)) - 1]

    def watch(self, changed: Callable[[], None]) -> None:
        self._changed.append(changed)

    def set_active(self, job: int, active: bool) -> None:
        if active:
            self._active.add(job)
        else:
            self._active.discard(job)
        for changed in self._changed:
            changed()


class _Step:
    """What the GPUs of a job wait for and leave behind in one step."""

    def __init__(self, env: simpy.Environment, num_gpus: int, plan: StepPlan) -> None:
        self.missing = [num_gpus] * (len(plan.head) + len(plan.buckets))
        self.ready = [env.event() for _ in self.missing]
        self.head_done = env.event()
        self.reduced = env.event()
        self.in_backward = 0
        self.still_running = num_gpus
        self.ended_s = 0.0
        self.compute_s = self.slowest_s = self.input_wait_s = self.communication_wait_s = 0.0

    def arrive(self, collective: int) -> None:
        self.missing[collective] -= 1
        if not self.missing[collective]:
            self.ready[collective].succeed()


class _RunningJob:
    """A job in the simulation: its GPUs' processes and its communication stream."""

    def __init__(
        self,
        env: simpy.Environment,
        index: int,
        job: TrainingJob,
        links: _Links,
        *,
        contention: float,
        jitter: Jitter | None,
        last_measured: int,
        seed: int,
        record_gpus: int,
    ) -> None:
        self.env, self.index, self.job, self.plan = env, index, job, job.plan
        self.links, self.contention, self.jitter = links, contention, jitter
        self.random = random.Random(f"{seed}/{index}") if jitter is not None else None
        self.last_measured = last_measured
        self.measured = env.event()
        self.compute = WorkClock(env)
        self.transfer = WorkClock(env)
        self.communicating = False
        self.num_computing = 0  # GPUs in a backward pass that overlaps communication
        self.spans: list[Span] = []
        self.record_gpus = min(record_gpus, len(job.speeds))
        self.steps: list[_Step] = []
        self.speeds = self._with_stragglers(job.speeds)
        counts = job.counts or (1,) * len(job.speeds)
        self.weights = [count / sum(counts) for count in counts]
        links.watch(self._set_transfer_rate)
        env.process(self._stream())
        for gpu, speed in enumerate(self.speeds):
            env.process(self._gpu(gpu, speed))

    def _with_stragglers(self, speeds: tuple[float, ...]) -> tuple[float, ...]:
        if self.jitter is None or self.random is None:
            return speeds
        slowdown = self.jitter.straggler_slowdown
        share = self.jitter.straggler_fraction * (1 - 1e-12)  # 0.07 of 100 is a crumb more than 7
        number = math.ceil(share * len(speeds))
        slow = set(self.random.sample(range(len(speeds)), min(number, len(speeds))))
        return tuple(s * (slowdown if i in slow else 1.0) for i, s in enumerate(speeds))

    def _step(self, number: int) -> _Step:
        while len(self.steps) <= number:
            self.steps.append(_Step(self.env, len(self.speeds), self.plan))
        return self.steps[number]

    def _draw(self) -> float:
        if self.jitter is None or self.random is None or not self.jitter.sigma:
            return 1.0
        sigma = self.jitter.sigma
        return self.random.lognormvariate(-0.5 * sigma * sigma, sigma)

    def _gpu(self, gpu: int, speed: float) -> Process:
        plan, env = self.plan, self.env
        if self.job.start_s:
            yield env.timeout(self.job.start_s)
        batches = self._start_input() if self.job.input_interval_s else None
        number = 0
        while self.links.num_unfinished:
            step = self._step(number)
            factor, waited_from = speed * self._draw(), env.now
            if batches is not None:
                yield batches.get()
            waited_s, stood_s = env.now - waited_from, 0.0
            if plan.head:
                step.arrive(0)
                since = env.now
                yield step.head_done
                stood_s += env.now - since
            for micro_batch in range(plan.num_micro_batches):
                last = micro_batch == plan.num_micro_batches - 1
                yield from self._work(gpu, number, "forward", plan.forward, factor)
                if not last:
                    yield from self._work(gpu, number, "backward", plan.backward, factor)
                    continue
                self._enter_backward()
                for work in plan.backward:
                    yield from self._work(gpu, number, "backward", (work,), factor)
                    if work.bucket is not None and plan.overlap:
                        step.arrive(len(plan.head) + work.bucket)
                self._leave_backward()
                if not plan.overlap:
                    for bucket in range(len(plan.buckets)):
                        step.arrive(len(plan.head) + bucket)
            if plan.buckets:
                since = env.now
                yield step.reduced
                stood_s += env.now - since
            yield from self._work(gpu, number, "update", plan.tail, factor)
            self._finish(number, gpu, plan.compute_s * factor, waited_s, stood_s)
            number += 1

    def _start_input(self) -> simpy.Store:
        batches = simpy.Store(self.env, capacity=self.job.prefetch)

        def load() -> Process:
            while self.links.num_unfinished:
                yield self.env.timeout(self.job.input_interval_s)
                yield batches.put(None)

        self.env.process(load())
        return batches

    def _work(self, gpu: int, step: int, phase: SpanPhase, pieces: Sequence[Piece], factor: float) -> Process:
        for work in pieces:
            start = self.env.now
            yield self.compute.after(work.seconds * factor)
            if gpu < self.record_gpus and work.seconds:
                self._record(gpu, "compute", phase, work.name, step, start)

    def _finish(self, number: int, gpu: int, compute_s: float, waited_s: float, stood_s: float) -> None:
        step = self.steps[number]
        step.compute_s += compute_s * self.weights[gpu]
        if compute_s >= step.slowest_s:  # a faster one waits longer for its input, in time that is no step's
            step.slowest_s, step.input_wait_s, step.communication_wait_s = compute_s, waited_s, stood_s
        step.still_running -= 1
        if not step.still_running:
            step.ended_s = self.env.now
            if number == self.last_measured - 1:
                self.measured.succeed()
                self.links.num_unfinished -= 1

    def _stream(self) -> Process:
        number = 0
        while self.links.num_unfinished:
            step, num_head = self._step(number), len(self.plan.head)
            collectives = (*self.plan.head, *self.plan.buckets)
            if not collectives:
                return
            for i, collective in enumerate(collectives):
                if i == 0 or i >= num_head:
                    if not step.ready[i].triggered:
                        self._set_communicating(False)
                    yield step.ready[i]
                self._set_communicating(True)
                start = self.env.now
                yield self.transfer.after(collective.seconds)
                for gpu in range(self.record_gpus):
                    self._record(
                        gpu, "communication", "collective", collective.name, number, start, collective.num_bytes
                    )
                if i == num_head - 1:
                    self._set_communicating(False)
                    step.head_done.succeed()
            self._set_communicating(False)
            step.reduced.succeed()
            number += 1

    def _set_communicating(self, communicating: bool) -> None:
        if communicating == self.communicating:
            return
        self.communicating = communicating
        slowed = communicating and not self.plan.slowed
        self.compute.set_rate(1 / (1 + self.contention) if slowed else 1.0)
        self.links.set_active(self.index, communicating)

    def _set_transfer_rate(self) -> None:
        slowdown = 1 + self.contention if self.num_computing else 1.0
        self.transfer.set_rate(1 / (slowdown * self.links.slowdown))

    def _enter_backward(self) -> None:
        self.num_computing += 1
        if self.num_computing == 1:
            self._set_transfer_rate()

    def _leave_backward(self) -> None:
        self.num_computing -= 1
        if not self.num_computing:
            self._set_transfer_rate()

    def _record(
        self, gpu: int, stream: Stream, phase: SpanPhase, name: str, step: int, start: float, num_bytes: int = 0
    ) -> None:
        self.spans.append(
            Span(
                job=self.index,
                gpu=gpu,
                stream=stream,
                phase=phase,
                name=name,
                step=step,
                start_s=start,
                end_s=self.env.now,
                num_bytes=num_bytes,
            )
        )

    def result(self, num_warmup: int) -> StepResult:
        """Means over the steps after the warm-up."""
        measured = self.steps[num_warmup : self.last_measured]
        begin = self.steps[num_warmup - 1].ended_s if num_warmup else self.job.start_s
        n = len(measured)
        step_s = (measured[-1].ended_s - begin) / n
        compute_s = sum(step.compute_s for step in measured) / n
        slowest_s = sum(step.slowest_s for step in measured) / n
        input_wait_s = sum(step.input_wait_s for step in measured) / n
        exposed_s = max(0.0, step_s - slowest_s - input_wait_s)
        return StepResult(
            step_s=step_s,
            compute_s=compute_s,
            input_wait_s=input_wait_s,
            straggler_wait_s=max(0.0, slowest_s - compute_s),
            exposed_communication_s=exposed_s,
            communication_wait_s=min(exposed_s, sum(step.communication_wait_s for step in measured) / n),
            communication_s=self.plan.communication_s,
            wire_bytes_per_gpu=self.plan.wire_bytes_per_gpu,
            spans=tuple(span for span in self.spans if span.step < self.last_measured),  # fast GPUs have gone on
        )
