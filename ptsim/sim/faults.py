"""How long a run takes on GPUs that fail: checkpoints, restarts, and going on with fewer GPUs.

Failures of one GPU are a Poisson process (exponential times between failures); a failure loses what was trained since
the last checkpoint. With the elastic policy the node leaves, training goes on at a speed in proportion to the GPUs
that are left, and the node comes back at the first checkpoint after its repair.

Source of the model: Young, Comm. ACM 17 (1974); Daly, Future Generation Computer Systems 22 (2006).
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Generator

import msgspec
import simpy

from ptsim.errors import UsageError
from ptsim.sim.budget import check_events
from ptsim.sim.options import Faults

Process = Generator[simpy.Event, None, None]


class FaultyRun(msgspec.Struct, frozen=True, kw_only=True):
    """Means over the simulated runs; between low and high are 90 % of the durations, and their mean.

    They are the 5th and the 95th percentile. The mean of rare failures that cost much lies above the latter: then it is
    the end.

    Attributes:
        goodput: useful training time / duration.
        checkpoint_s, lost_s, restart_s, slow_s: time for checkpoints, for work that was lost, for restarts, and by
            which fewer GPUs were slower.
    """

    total_s: float
    low_s: float
    high_s: float
    num_failures: float
    checkpoint_s: float
    lost_s: float
    restart_s: float
    slow_s: float
    goodput: float


def simulate_faults(work_s: float, num_gpus: int, gpus_per_node: int, faults: Faults, *, seed: int = 0) -> FaultyRun:
    """The duration of `work_s` seconds of fault-free training on `num_gpus` GPUs that fail.

    Raises:
        UsageError: failures come so fast that the run would hardly ever reach its next checkpoint, or so many
            checkpoints and failures would be simulated that it exceeds the budget of events.
    """
    rate = num_gpus / (faults.mtbf_gpu_hours * 3600)
    interval = work_s  # in one go: no checkpoint follows the last piece
    if work_s > faults.checkpoint_interval_s:
        interval = faults.checkpoint_interval_s + faults.checkpoint_s
    if rate * interval > 7:  # fewer than one attempt in e⁷ ≈ 1,100 would reach the checkpoint
        raise UsageError(
            f"{num_gpus} GPUs with {faults.mtbf_gpu_hours:g} h between failures fail every {1 / rate:.3g} s; "
            f"no run reaches a checkpoint every {interval:.3g} s",
            hint="checkpoint more often",
        )
    expected = faults.num_runs * (work_s / faults.checkpoint_interval_s + rate * work_s) * math.exp(rate * interval)
    check_events(expected, "simulating the failures", "a longer checkpoint interval or fewer repetitions need fewer")
    runs = [
        _Run(work_s, num_gpus, gpus_per_node, faults, random.Random(f"{seed}/faults/{i}")).simulate()
        for i in range(faults.num_runs)
    ]
    totals = sorted(run.total_s for run in runs)
    mean = statistics.fmean
    total = mean(totals)
    return FaultyRun(
        total_s=total,
        low_s=min(total, totals[math.floor(0.05 * (len(totals) - 1))]),
        high_s=max(total, totals[math.ceil(0.95 * (len(totals) - 1))]),
        num_failures=mean(run.num_failures for run in runs),
        checkpoint_s=mean(run.checkpoint_s for run in runs),
        lost_s=mean(run.lost_s for run in runs),
        restart_s=mean(run.restart_s for run in runs),
        slow_s=mean(run.slow_s for run in runs),
        goodput=work_s / total if total else 1.0,
    )


class _Run:
    """One simulated run."""

    def __init__(self, work_s: float, num_gpus: int, gpus_per_node: int, faults: Faults, random: random.Random) -> None:
        self.env = simpy.Environment()
        self.work_s, self.num_gpus, self.faults, self.random = work_s, num_gpus, faults, random
        self.gpus_per_node = min(gpus_per_node, num_gpus)
        self.rest = num_gpus % self.gpus_per_node  # GPUs of a last node that is not full; 0: all are
        self.rest_is_away = False
        self.num_away = 0  # GPUs out of service
        self.repaired = self.env.event()
        self.num_failures = 0
        self.total_s = self.checkpoint_s = self.lost_s = self.restart_s = self.slow_s = 0.0

    def simulate(self) -> _Run:
        self.env.run(self.env.process(self._train()))
        self.total_s = self.env.now
        return self

    def _train(self) -> Process:
        faults, env = self.faults, self.env
        left = self.work_s
        while left > 0:
            if self.num_away >= self.num_gpus:  # not one node is left
                waited_from = env.now
                yield self.repaired
                self.restart_s += env.now - waited_from
                continue
            working = self.num_gpus - self.num_away
            piece = min(left, faults.checkpoint_interval_s)  # of fault-free training on all GPUs
            duration = piece * self.num_gpus / working
            checkpoint = faults.checkpoint_s if piece < left else 0.0
            failure = self.random.expovariate(working / (faults.mtbf_gpu_hours * 3600))
            if failure >= duration + checkpoint:
                yield env.timeout(duration + checkpoint)
                left -= piece
                self.checkpoint_s += checkpoint
                self.slow_s += duration - piece
                continue
            yield env.timeout(failure)
            self.num_failures += 1
            self.lost_s += failure
            if faults.policy == "elastic":
                env.process(self._repair(self._leave(working)))
            yield env.timeout(faults.restart_s)
            self.restart_s += faults.restart_s

    def _leave(self, working: int) -> int:
        """Take away the node of one of the `working` GPUs, each as likely as the others; gives its number of GPUs."""
        size, rest = self.gpus_per_node, 0 if self.rest_is_away else self.rest
        if rest and (rest == working or self.random.random() * working < rest):
            size, self.rest_is_away = rest, True
        self.num_away += size
        return size

    def _repair(self, size: int) -> Process:
        """Bring a node of so many GPUs back when its time has come."""
        yield self.env.timeout(self.faults.repair_s)
        self.num_away -= size
        self.rest_is_away = self.rest_is_away and size != self.rest
        self.repaired.succeed()
        self.repaired = self.env.event()
