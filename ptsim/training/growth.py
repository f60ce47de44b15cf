"""Which mini-batch does PruneTrain propose once the network has shrunk, and how does the learning rate follow?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from ptsim.costs.memory import largest_batch
from ptsim.hardware.catalog import match_device
from ptsim.setting import StepSetting
from ptsim.training.facts import costed_momentum, costed_optimizer
from ptsim.training.recorder import Recorder

if TYPE_CHECKING:
    from ptsim.training.measured import LastEpoch
    from ptsim.training.prune_settings import PruneSettings


def proposed_batch(recorder: Recorder, settings: PruneSettings, batch_per_gpu: int, last: LastEpoch) -> int:
    """The largest mini-batch per rank that should fit: the present one plus whole multiples of the granularity.

    Where the gradients of several passes accumulated in the `last` epoch, it is that of one pass. It is never larger
    than a rank's share of that epoch's images.
    """
    passes, info = last.passes, recorder.meter.info()
    network = recorder.architecture
    setting = StepSetting(
        batch=batch_per_gpu * passes,
        passes=passes,
        precision=recorder.precision,
        optimizer=costed_optimizer(recorder.optimizer),
        momentum=costed_momentum(recorder.optimizer),
        proximal=settings.regularizer == "proximal",
        memory_format=recorder.memory_format,
        regularizer=settings.criterion if recorder.regularizer is not None else None,
        num_gpus=recorder.team.world_size,
    )
    fits = largest_batch(
        network,
        setting,
        capacity_bytes=settings.memory_budget_bytes or _room(recorder, last),
        device=match_device(info.name) if info.kind == "cuda" else None,
    )
    limits = [fits // passes, last.images_per_rank]
    if settings.max_batch is not None:
        limits.append(settings.max_batch // recorder.team.world_size)
    steps = max(0, min(limits) - batch_per_gpu) // settings.batch_granularity
    return batch_per_gpu + steps * settings.batch_granularity


def _room(recorder: Recorder, last: LastEpoch) -> int:
    """Bytes of the device, or of the least of all ranks: with other mini-batches they would have other rates."""
    own = recorder.meter.info().must_exist()[1]
    return own if recorder.team.world_size == 1 else min(own, last.memory_bytes or own)


def learning_rate_scale(first_batch: int, batch: int, rule: Literal["linear", "sqrt"]) -> float:
    """The factor on the planned learning rate for a mini-batch that has grown from `first_batch`.

    Source: Goyal et al., arXiv 1706.02677 (linear); Krizhevsky, arXiv 1404.5997 (square root).
    """
    ratio = batch / first_batch
    return ratio if rule == "linear" else math.sqrt(ratio)
