"""Which mini-batch does PruneTrain propose once the network has shrunk, and how does the learning rate follow?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from ptsim.costs.memory import largest_batch
from ptsim.hardware.catalog import match_device
from ptsim.setting import StepSetting
from ptsim.training.facts import costed_momentum, costed_optimizer, reducer_settings, told_update
from ptsim.training.measured import LastEpoch, last_epoch
from ptsim.training.recorder import Recorder

if TYPE_CHECKING:
    from ptsim.trace.schema import Epoch
    from ptsim.training.prune_settings import PruneSettings
    from ptsim.training.pruner_state import StoredState


class Proposal:
    """The mini-batch per rank that a run's loop may take as the network shrinks.

    Attributes:
        learning_rate_scale: the factor on the planned rate that goes with the last proposal.
    """

    def __init__(self, recorder: Recorder, settings: PruneSettings) -> None:
        """Nothing is proposed before the first epoch has ended."""
        self.learning_rate_scale = 1.0
        self._recorder = recorder
        self._settings = settings
        self._first_batch: int | None = None
        self._proposed: int | None = None
        self._last: LastEpoch | None = None

    def epoch_ended(self, record: Epoch) -> None:
        """The epoch of this record is over; all ranks call it."""
        recorder = self._recorder
        self._first_batch = self._first_batch or recorder.watch.batch
        views = reducer_settings(recorder.watch.data_parallel).get("gradient_as_bucket_view", True)
        self._last = last_epoch(record, recorder.watch.batch, recorder.meter, recorder.team, bucket_views=views)

    def batch(self, average_bytes: int) -> int | None:
        """Propose anew; the loop's own mini-batch before the first epoch's end, None before the first step.

        `average_bytes` of the device hold an average of the weights.
        """
        present = self._proposed or self._recorder.watch.batch
        if present is None or self._first_batch is None or self._last is None:
            return present
        self._proposed = proposed_batch(self._recorder, self._settings, present, self._last, average_bytes)
        self.learning_rate_scale = learning_rate_scale(self._first_batch, self._proposed, self._settings.lr_rule)
        return self._proposed

    def state(self) -> dict[str, Any]:
        """Its part of `PruneTrain.state_dict`."""
        return {
            "first_batch": self._first_batch,
            "proposed_batch": self._proposed,
            "last_epoch": msgspec.to_builtins(self._last),
            "learning_rate_scale": self.learning_rate_scale,
        }

    def load_state(self, state: StoredState) -> None:
        """Go on from what `state` gave."""
        self._first_batch = state.first_batch
        self._proposed = state.proposed_batch
        self._last = state.last_epoch
        self.learning_rate_scale = state.learning_rate_scale


def proposed_batch(
    recorder: Recorder, settings: PruneSettings, batch_per_gpu: int, last: LastEpoch, average_bytes: int
) -> int:
    """The largest mini-batch per rank that should fit: the present one plus whole multiples of the granularity.

    Where the gradients of several passes accumulated in the `last` epoch, it is that of one pass, and where the network
    was called several times before one backward pass, that of one call. It is never larger than a rank's share of that
    epoch's images. An average of the weights takes `average_bytes` of the device's memory.
    """
    passes, info = last.passes, recorder.meter.info()
    network = recorder.architecture
    optimizer = costed_optimizer(recorder.optimizer)
    update = told_update(optimizer, recorder.optimizer)
    setting = StepSetting(
        batch=batch_per_gpu * passes,
        passes=passes,
        precision=recorder.precision,
        optimizer=optimizer,
        momentum=costed_momentum(recorder.optimizer),
        proximal=settings.regularizer == "proximal",
        memory_format=recorder.memory_format,
        regularizer=settings.criterion if recorder.regularizer is not None else None,
        num_gpus=recorder.team.world_size,
        bucket_views=last.bucket_views,
        told_update=None if update is None else update.told(optimizer),
    )
    fits = largest_batch(
        network,
        setting,
        capacity_bytes=settings.memory_budget_bytes or _room(recorder, last) - average_bytes,
        device=match_device(info.name) if info.kind == "cuda" else None,
    )
    limits = [last.forwards(fits // passes), last.forwards(last.images_per_rank)]
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
