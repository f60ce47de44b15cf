"""How long one data-parallel step takes, with the ends of its 90 % interval: the step simulated three times over.

At the low and the high end every duration is at that end of its own interval: the tiers' errors are systematic, so they
are taken as fully correlated over layers and collectives. How far computation and communication slow each other down is
not known well either: the low end has half the contention, the high end half as much again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import msgspec

from ptsim.costs.buckets import ddp_buckets
from ptsim.costs.scaling import widened
from ptsim.costs.times import StepTime
from ptsim.hardware.spec import Cluster
from ptsim.network import Network
from ptsim.sim import ddp
from ptsim.sim.step import simulate_steps
from ptsim.sim.work import StepPlan, StepResult, TrainingJob

BOUNDS: tuple[ddp.Bound, ...] = ("low", "expected", "high")


class SecondsRange(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds with the ends of their 90 % interval."""

    low_s: float
    expected_s: float
    high_s: float

    @classmethod
    def total(cls, parts: Iterable[SecondsRange]) -> SecondsRange:
        """The sum; the parts err in the same direction."""
        parts = tuple(parts)
        return cls(
            low_s=math.fsum(part.low_s for part in parts),
            expected_s=math.fsum(part.expected_s for part in parts),
            high_s=math.fsum(part.high_s for part in parts),
        )

    @classmethod
    def around(cls, low_s: float, expected_s: float, high_s: float) -> SecondsRange:
        """The interval of three simulations, whose ends need not lie in order."""
        return cls(low_s=min(low_s, expected_s), expected_s=expected_s, high_s=max(high_s, expected_s))

    def among(self, cluster: Cluster, num_gpus: int, tier: str) -> SecondsRange:
        """The interval of a step of this tier with what many GPUs add to it (`costs.scaling.widened`)."""
        low_s, high_s = widened(self.expected_s, self.low_s, self.high_s, tier, cluster, num_gpus)
        return SecondsRange(low_s=low_s, expected_s=self.expected_s, high_s=high_s)


class BoundedStep(msgspec.Struct, frozen=True, kw_only=True):
    """One step simulated at the ends and the middle of its interval."""

    low: StepResult
    expected: StepResult
    high: StepResult

    def interval(self) -> SecondsRange:
        """The interval of the step."""
        return SecondsRange.around(self.low.step_s, self.expected.step_s, self.high.step_s)


def contention_at(bound: ddp.Bound, contention: float) -> float:
    """The contention at one end: 0.1–0.3 around 0.2."""
    return min(1.0, contention * {"low": 0.5, "expected": 1.0, "high": 1.5}[bound])


def bounded_step(simulate: Callable[[ddp.Bound, float], StepResult], contention: float) -> BoundedStep:
    """One step at all three bounds.

    Args:
        simulate: gives the step with every duration at a bound, under a contention.
        contention: the expected one.
    """
    low, expected, high = (simulate(bound, contention_at(bound, contention)) for bound in BOUNDS)
    return BoundedStep(low=low, expected=expected, high=high)


def data_parallel_step(
    network: Network,
    step: StepTime,
    all_reduce: ddp.AllReduce,
    *,
    contention: float,
    tensor_s: float = 0.0,
    shards: ddp.Shards | None = None,
    buffers: bool = True,
    overlap: bool = True,
) -> BoundedStep:
    """One step of equal GPUs under DistributedDataParallel's defaults.

    Args:
        network: what is trained.
        step: its computation on one GPU; gradients are all-reduced in the last of its passes.
        all_reduce: the time of an all-reduce of so many bytes.
        contention: by which fraction computation and communication each take longer while they overlap.
        tensor_s: seconds of every gradient tensor's hook (`costs.scaling.hook_seconds`).
        shards: of ZeRO; None for none.
        buffers: BatchNorm's statistics are broadcast before every forward pass, as DDP does by default.
        overlap: all-reduces start during the backward pass; False where the step is compiled.
    """
    buckets = ddp_buckets(network)
    buffer_bytes = ddp.buffer_bytes(network) if buffers else 0

    one_pass = step.accumulated(1)

    def simulate(bound: ddp.Bound, contention: float) -> StepResult:
        plan = ddp.plan_step(
            one_pass,
            buckets,
            all_reduce,
            buffer_bytes=buffer_bytes,
            num_micro_batches=step.passes,
            tensor_s=tensor_s,
            shards=shards,
            bound=bound,
        )
        return simulate_steps([TrainingJob(plan=_overlapping(plan, overlap))], contention=contention)[0]

    return bounded_step(simulate, contention)


def _overlapping(plan: StepPlan, overlap: bool) -> StepPlan:
    return plan if overlap else msgspec.structs.replace(plan, overlap=False)
