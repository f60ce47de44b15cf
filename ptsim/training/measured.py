"""What is known of the epoch that has just been trained: its regulariser, and what clocks and meters say."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec
import torch

from ptsim.measure.nvml import Meter
from ptsim.prune.density import channel_maxima, dense_counts, layer_densities
from ptsim.trace.checks import most_images
from ptsim.trace.schema import DeviceUse, Epoch, EpochTime, StepDistribution, gone_share
from ptsim.training.checkpoint import NotNegative, Whole
from ptsim.training.distributed import CommunicationMeter, Team
from ptsim.training.losses import LossSum
from ptsim.training.recipe import Count
from ptsim.training.watch import Watch, learning_rate

if TYPE_CHECKING:
    from ptsim.training.recorder import Recorder

_UNKNOWN = 2**53  # bytes: more than any device has


class Penalty(msgspec.Struct, frozen=True, kw_only=True):
    """The regulariser in an epoch: λ (0 where it did not act) and λ times the penalty at the epoch's end."""

    coefficient: float = 0.0
    value: float = 0.0


class LastEpoch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an epoch tells of how far the mini-batch may grow after it.

    Attributes:
        passes: of an update.
        images_per_rank: in the whole epoch.
        memory_bytes: of that rank's device that has the least; None where nobody knows it.
        images_per_forward, images_per_pass: of its largest forward pass, and of all those that one backward pass
            followed; states of older versions do not know them.
        bucket_views: gradients lie in DDP's buckets; without a DDP they are taken to, as in `ptsim train`.
    """

    passes: Count
    images_per_rank: Whole
    memory_bytes: Whole | None
    images_per_forward: Count = 1
    images_per_pass: Count = 1
    bucket_views: bool = True

    def forwards(self, images: int) -> int:
        """How many images each forward pass may have where those before one backward pass have so many together."""
        return images * self.images_per_forward // self.images_per_pass


def last_epoch(
    epoch: Epoch, images_per_forward: int | None, meter: Meter, team: Team, *, bucket_views: bool = True
) -> LastEpoch:
    """Of an epoch that is over; all ranks call it, and the least memory decides for all of them."""
    known = meter.info().memory_bytes
    if team.world_size > 1:
        least = int(team.least(torch.tensor(_UNKNOWN if known is None else known, device=team.device)))
        known = None if least == _UNKNOWN else least
    one_pass = -(-epoch.batch_per_gpu // epoch.passes)
    forward = images_per_forward or one_pass
    return LastEpoch(
        passes=epoch.passes,
        images_per_rank=epoch.num_images // epoch.world_size,
        memory_bytes=known,
        images_per_forward=forward,
        images_per_pass=max(one_pass, forward),  # the largest forward pass may be an odd one
        bucket_views=bucket_views,
    )


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What an epoch's updates were on this rank, and what clocks and meters say of it; None where they say nothing."""

    num_iterations: int
    num_images: int
    num_reductions: int
    time: EpochTime | None
    step: StepDistribution | None
    use: DeviceUse | None
    peak_bytes: int | None

    def peak_beside(self, resident_bytes: int) -> int | None:
        """The most memory, without so much that is there all the time and is no part of a step."""
        return None if self.peak_bytes is None else max(self.peak_bytes - resident_bytes, 0)


class Unfinished(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was trained of an epoch before a state was stored in the middle of it.

    Attributes:
        num_iterations, num_images: of this rank.
        num_reductions: how often the gradients were reduced; states of older versions do not know it.
        batch, largest_backward: images of its largest forward and backward pass; 0 where none was seen.
        usual_step: images of most of its updates, all passes of one together; 0 where none was seen.
        loss_sum, loss_images: Σ loss · images, and the images of those losses.
        learning_rate: at its first update; None where the optimizer decides it.
        time: None where nobody timed it.
        peak_bytes: of a GPU's memory in its training passes; None where nobody knows it.
    """

    num_iterations: Whole = 0
    num_images: Whole = 0
    num_reductions: Whole = 0
    batch: Whole = 0
    largest_backward: Whole = 0
    usual_step: Whole = 0
    loss_sum: float = 0.0
    loss_images: NotNegative = 0.0
    learning_rate: float | None = None
    time: EpochTime | None = None
    peak_bytes: Whole | None = None

    def tell(self, watch: Watch) -> None:
        """Let the watch know what was seen of the epoch; states of older versions know less."""
        watch.go_on(
            batch=self.batch,
            largest_backward=self.largest_backward or self.batch,
            usual_step=self.usual_step,
            num_steps=self.num_iterations,
            learning_rate=self.learning_rate,
        )

    def sum(self, later: EpochTime | None) -> EpochTime | None:
        """The times of both parts of the epoch; None where one is not known."""
        if not self.num_iterations:
            return later
        if self.time is None or later is None:
            return None
        names = EpochTime.__struct_fields__
        return EpochTime(**{name: getattr(self.time, name) + getattr(later, name) for name in names})

    def reduced(self, later: int) -> int:
        """All-reduces of the whole epoch, with so many `later` ones."""
        return max(self.num_reductions, self.num_iterations) + later

    def joined(self, later: Measured) -> Measured:
        """What is known of the whole epoch.

        Nobody has metered the first part's energy, so nothing is said of the device's use.
        """
        if not self.num_iterations:
            return later
        return msgspec.structs.replace(
            later,
            num_iterations=self.num_iterations + later.num_iterations,
            num_images=self.num_images + later.num_images,
            num_reductions=self.reduced(later.num_reductions),
            peak_bytes=_most(self.peak_bytes, later.peak_bytes),
            time=self.sum(later.time) if later.num_iterations else self.time,
            use=None,
        )


def measure_epoch(
    watch: Watch,
    meter: Meter,
    communication: CommunicationMeter,
    *,
    epoch: int,
    earlier: Unfinished,
) -> Measured:
    """Stop the epoch's clocks and meters; what has passed since the last update counts as validation.

    Neither energy nor memory is that of validation, between two updates or behind the last one.

    Raises:
        UsageError: no training step, or no image, was seen, nor had it an `earlier` part.
    """
    ended = earlier.num_iterations and not watch.num_iterations  # before the state was stored
    iterations, images = (0, 0) if ended else watch.counted(epoch)
    times = watch.finish()
    last_step_s = watch.last_step_s
    validation_s = time.perf_counter() - last_step_s if last_step_s is not None else 0.0
    reductions = num_reductions(watch)
    measured = Measured(
        num_iterations=iterations,
        num_images=images,
        num_reductions=reductions,
        time=None if times is None else epoch_time(times[0], communication, reductions, validation_s),
        step=None if times is None else times[1],
        use=meter.stop(until_s=last_step_s, without=watch.judged),
        peak_bytes=watch.memory.total(),
    )
    return earlier.joined(measured)


def epoch_record(recorder: Recorder, measured: Measured, losses: LossSum, penalty: Penalty) -> Epoch:
    """What a trace says of the epoch that a recorder has watched, all but what the loop alone knows.

    All ranks call it: losses and images are summed over them.
    """
    watch = recorder.watch
    team = recorder.team
    network = recorder.network
    architecture = recorder.architecture
    threshold = recorder.threshold
    total, told, all_images = team.sum(losses.total(measured.num_images)).tolist()
    batch = _epoch_batch(recorder, measured, images_per_rank=-(-int(all_images) // team.world_size))
    known = {layer.name for layer in architecture.layers}  # a module that forward never calls is no layer
    channels, weights = dense_counts(network, threshold)
    maxima = channel_maxima(network) if recorder.channel_maxima else None
    return Epoch(
        epoch=recorder.epoch,
        architecture=architecture.id,
        # With gradient accumulation an iteration is an update, over the images of all its passes.
        batch_per_gpu=batch,
        passes=-(-batch // (watch.largest_backward or batch)),
        world_size=team.world_size,
        learning_rate=learning_rate(recorder.optimizer) if watch.learning_rate is None else watch.learning_rate,
        num_iterations=measured.num_iterations,
        num_images=int(all_images),
        penalty_coefficient=penalty.coefficient,
        train_loss=total / told if told else None,
        penalty=penalty.value,
        train_accuracy=None,
        validation_loss=None,
        validation_accuracy=None,
        channel_sparsity=gone_share(channels, recorder.initial_counts[0]),
        weight_sparsity=gone_share(weights, recorder.initial_counts[1]),
        measured_time=measured.time,
        measured_step=measured.step,
        allreduce_bytes=architecture.gradient_bytes * measured.num_reductions if team.world_size > 1 else 0,
        peak_memory_bytes=measured.peak_beside(recorder.resident_bytes),
        device=measured.use,
        densities=tuple(d for d in layer_densities(network, threshold) if d.layer in known),
        channel_maxima=None if maxima is None else {name: maxima[name] for name in maxima if name in known},
    )


def _epoch_batch(recorder: Recorder, measured: Measured, *, images_per_rank: int) -> int:
    usual = recorder.batch_per_gpu
    if not recorder.watch.usual_step:  # no update was seen with images
        usual = max(recorder.watch.batch or 1, -(-measured.num_images // measured.num_iterations))
    return mini_batch(usual, measured.num_iterations, images_per_rank)


def mini_batch(usual: int, num_iterations: int, images_per_rank: int) -> int:
    """Images of an update: the `usual` ones, or the mean where a trace cannot say that updates had the usual ones.

    So it is of an epoch in which most updates were left out: the others count as passes of those that were made.
    """
    if images_per_rank <= most_images(num_iterations, usual):
        return usual
    return -(-images_per_rank // num_iterations)


def num_reductions(watch: Watch) -> int:
    """How often the gradients were reduced: in every accumulated pass where the loop did not say `no_sync`."""
    return max(watch.num_iterations, watch.num_reductions)


def epoch_time(
    seconds: EpochTime, communication: CommunicationMeter, reductions: int, validation_s: float = 0.0
) -> EpochTime:
    """The watch's backward ends when the last all-reduce does: what was exposed of it is taken out.

    `validation_s` comes to the validation between two steps.
    """
    exposed_s = min(communication.exposed_s(reductions), seconds.backward_s)
    return msgspec.structs.replace(
        seconds,
        backward_s=seconds.backward_s - exposed_s,
        exposed_communication_s=exposed_s,
        validation_s=seconds.validation_s + validation_s,
    )


def unfinished_epoch(
    watch: Watch, communication: CommunicationMeter, losses: LossSum, earlier: Unfinished
) -> Unfinished | None:
    """What has been trained of the present epoch, with the `earlier` part of it; None at its start."""
    iterations, times = watch.num_iterations, watch.so_far()
    if not iterations and not earlier.num_iterations:
        return None
    total, told, images = losses.total(watch.num_images + earlier.num_images).tolist()
    reductions = num_reductions(watch)
    seconds = None if times is None else epoch_time(times[0], communication, reductions)
    return Unfinished(
        num_iterations=earlier.num_iterations + iterations,
        num_images=int(images),
        num_reductions=earlier.reduced(reductions),
        batch=watch.batch or 0,
        largest_backward=watch.largest_backward,
        usual_step=watch.usual_step,
        loss_sum=total,
        loss_images=told,
        learning_rate=watch.learning_rate if earlier.learning_rate is None else earlier.learning_rate,
        time=earlier.sum(seconds) if iterations else earlier.time,
        peak_bytes=_most(earlier.peak_bytes, watch.memory.so_far()),
    )


def _most(*told: int | None) -> int | None:
    """The largest of what is known; None where nothing is."""
    return max((each for each in told if each is not None), default=None)
