"""What does data parallelism cost a step besides the all-reduces themselves, and how sure is a step of many GPUs?

What is fitted on published trainings with one GPU and with many in the same test (`analysis/fit_scaling.py`):

* A GPU among others computes a little more slowly than alone, however many they are in a node; and every doubling of
  the nodes makes a step a little longer, since it waits for the slowest of them.
* Every gradient tensor has a hook that copies it into its bucket, and its buffers are broadcast: work per tensor, for
  which the GPU waits or which it does itself. It does not depend on how many GPUs there are.

By how much an all-reduce and the computation beside it hold each other up is not fitted: published rows contradict each
other.

That the slowest of n GPUs of one node decides (their speeds would differ at random) was tried and found to explain
nothing: the fit gives it a spread of 0.05 % per GPU.
"""

from __future__ import annotations

import functools
import math

import msgspec

from ptsim.costs.collectives import nodes_for
from ptsim.costs.datasheet import device_factor, load_fit, load_intervals
from ptsim.costs.shipped import shipped
from ptsim.costs.tiers import Tier
from ptsim.costs.times import StepTime
from ptsim.hardware.spec import Cluster, LinkKind


class Scaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fitted constants.

    Attributes:
        tensor_s: seconds of every gradient tensor in a step on more than one GPU.
        slowdown: by which share the computation of a GPU among others takes longer than alone.
        straggle: by which share more for every doubling of the nodes.
        contention: by which fraction computation and communication each take longer while they overlap, by the link
            that carries the communication; `other` where nothing was fitted.
        low, high: ends of the 90 % interval of ln(measured / predicted) of a step on many GPUs whose step on one GPU is
            known, of GPUs and sources left out of the fit.
    """

    tensor_s: float
    slowdown: float
    straggle: float
    contention: dict[str, float]
    low: float
    high: float


@functools.cache
def load_scaling() -> Scaling:
    """The constants that ptsim ships."""
    return shipped("scaling.toml", Scaling)


def tensor_seconds(num_gpus: int, *, on_gpus: bool) -> float:
    """Seconds of every gradient tensor; 0 on one GPU, and on CPUs, whose hooks are part of what is calibrated."""
    return load_scaling().tensor_s if on_gpus and num_gpus > 1 else 0.0


def hook_seconds(cluster: Cluster, num_gpus: int) -> float:
    """`tensor_seconds` on a cluster."""
    return tensor_seconds(num_gpus, on_gpus=cluster.library == "nccl")


def contention_of(cluster: Cluster, num_gpus: int, scaling: Scaling | None = None) -> float:
    """By which fraction computation and communication each take longer while they overlap.

    The link between nodes decides where there is more than one node. `scaling` stands in for what ptsim ships.
    """
    link = cluster.inter if nodes_for(cluster, num_gpus) > 1 and cluster.inter is not None else cluster.intra
    known = (scaling or load_scaling()).contention
    return known.get(link.kind, known["other"]) if link.kind is not LinkKind.MEASURED else known["other"]


def slowdown(cluster: Cluster, num_gpus: int, scaling: Scaling | None = None) -> float:
    """By which share the computation of one of these GPUs takes longer than alone.

    `scaling` stands in for what ptsim ships.
    """
    if not _scales(cluster, num_gpus):
        return 0.0
    fitted = scaling or load_scaling()
    return fitted.slowdown + fitted.straggle * math.log2(nodes_for(cluster, num_gpus))


def slowed(step: StepTime, num_gpus: int, *, on_gpus: bool) -> StepTime:
    """The step of one GPU as one of several in a node computes it; on CPUs, and if recorded so, as it was measured."""
    if not on_gpus or num_gpus == 1 or step.data_parallel:
        return step
    return step.scaled(1 + load_scaling().slowdown)


def among(step: StepTime, cluster: Cluster, num_gpus: int) -> StepTime:
    """The step of one GPU as part of a step of `num_gpus`: longer by `slowdown`, and with the interval of such steps.

    On many GPUs a step from the data sheet has residuals of its own, which hold what the others add to it. Every other
    interval stays as wide relative to the step as it is: `widened` adds what many GPUs add.
    """
    if not _scales(cluster, num_gpus):
        return step
    slower = 1 + slowdown(cluster, num_gpus)
    # A step that was recorded among others is taken to be of one node, whose slowdown it holds.
    step = step.scaled(slower / (1 + load_scaling().slowdown) if step.data_parallel else slower)
    if step.tier != Tier.DATASHEET or min(step.low_s, step.compute_s) <= 0:
        return step
    known = cluster.device is not None and device_factor(cluster.device, load_fit()) is not None
    many, expected_s = load_intervals().of_many_gpus(known=known), step.compute_s
    return msgspec.structs.replace(
        step,
        low_s=expected_s * (step.low_s / expected_s) ** -many.low,
        high_s=expected_s * step.older * (step.high_s / step.older / expected_s) ** many.high,
    )


def widened(
    expected_s: float, low_s: float, high_s: float, tier: str, cluster: Cluster, num_gpus: int
) -> tuple[float, float]:
    """The interval of a step on many GPUs: that of its parts, and what many GPUs add, independent of each other.

    Args:
        expected_s: the step.
        low_s: lower end of the 90 % interval of its parts.
        high_s: the upper end.
        tier: of the step on one GPU. In a step from the data sheet the interval of the parts has it all (`among`).
        cluster: where; CPUs add nothing that is known.
        num_gpus: one GPU adds nothing.
    """
    if not _scales(cluster, num_gpus) or tier == Tier.DATASHEET or min(expected_s, low_s) <= 0:
        return low_s, high_s
    scaling = load_scaling()
    below, above = math.log(expected_s / low_s), math.log(high_s / expected_s)
    reach = math.hypot(below, scaling.low), math.hypot(above, scaling.high)
    return expected_s * math.exp(-reach[0]), expected_s * math.exp(reach[1])


def _scales(cluster: Cluster, num_gpus: int) -> bool:
    return num_gpus > 1 and cluster.library == "nccl"
