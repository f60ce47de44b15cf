"""One epoch of training and one pass of validation: the loops that must be fast and read as the algorithm."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptsim.errors import TrainingError, lacks_gpu_memory, lacks_memory
from ptsim.measure.profile import number_format
from ptsim.training.data import Batch
from ptsim.training.distributed import Reduction, Team
from ptsim.training.learner import Learner
from ptsim.training.schedule import EpochPlan

_CHECK_EVERY = 64  # iterations between looks at the device's not-finite flag; each look waits for the device


class Sums(msgspec.Struct, frozen=True, kw_only=True):
    """Over all ranks: losses and hits as means over `num_images`."""

    loss: float
    accuracy: float
    num_images: int
    num_iterations: int


class _Tally:
    """Loss, hits and the first iteration whose loss is not finite, kept on the device until somebody asks."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss and hits over images
        self._never = torch.iinfo(torch.int64).max
        self._first_bad = torch.full((), self._never, dtype=torch.int64, device=device)
        self._num_images = 0

    def add(self, iteration: int, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        classes = labels if labels.ndim == 1 else labels.argmax(1)  # of shares the class with the largest
        hits = (logits.argmax(1) == classes).sum()
        self._sums += torch.stack((loss.double() * len(labels), hits.double()))
        self._first_bad = torch.where(loss.isfinite(), self._first_bad, self._first_bad.clamp(max=iteration))
        self._num_images += len(labels)

    def stop_if_bad(self, epoch: int, team: Team) -> None:
        """Wait for the device and raise, on all ranks alike, if a loss was not finite on one of them."""
        first = int(team.least(self._first_bad))
        if first != self._never:
            raise TrainingError(
                f"the loss is not a finite number since iteration {first} of epoch {epoch} (both count from 0)",
                hint="a smaller lr or penalty_ratio; the last checkpoint is from before this epoch",
            )

    def total(self, team: Team, num_iterations: int) -> Sums:
        counts = torch.tensor([float(self._num_images)], dtype=torch.float64, device=self._sums.device)
        loss, hits, images = team.sum(torch.cat((self._sums, counts))).tolist()
        return Sums(loss=loss / images, accuracy=hits / images, num_images=int(images), num_iterations=num_iterations)


def train_epoch(
    learner: Learner, batches: Iterable[Batch], plan: EpochPlan, *, consult: Callable[[int | None, bool], None]
) -> Sums:
    """Train one epoch.

    Args:
        learner: what is trained: its module gives logits, backward leaves reduced gradients.
        batches: this rank's part of every mini-batch.
        plan: of this epoch; its learning rate is already set.
        consult: called after every iteration with its number and whether it ran out of memory here; raises on all
            ranks alike if the user wants the run to end or a rank is out of memory.

    Raises:
        TrainingError: a loss was not finite; says in which iteration.
        RuntimeError: a rank has no memory left (`lacks_gpu_memory`).
    """
    config, optimizer, scaler, pruner = learner.config, learner.optimizer, learner.scaler, learner.pruner
    module = learner.module.train()
    tally = _Tally(learner.device)
    iteration = -1
    reduction, out_of_memory = Reduction(module), False
    for iteration, (images, labels) in enumerate(learner.recorder.data(batches)):
        reduction.begin()
        try:
            optimizer.zero_grad(set_to_none=True)
            with number_format(config.precision, learner.device):
                images, mixed = mix(images, labels, config.mixup)
                logits = module(images)
                loss = mixed_loss(logits, mixed, config.label_smoothing)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call] # torch's gap
            if plan.regularized:  # after the all-reduce and after unscaling: docs/method.md §1
                scaler.unscale_(optimizer)
                pruner.step(loss)
            else:
                pruner.watch_only(loss)
            if config.clip_norm is not None:
                if not plan.regularized:
                    scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(learner.model.parameters(), config.clip_norm)
            scaler.step(optimizer)  # in fp16 it waits for the device: has a gradient overflowed?
            scaler.update()
            learner.update_average()
            classes, _ = max(mixed, key=lambda part: part[1])  # of two mixed images those of the larger share
            tally.add(iteration, loss.detach(), logits.detach(), classes)
        except RuntimeError as error:
            finishes = reduction.can_be_finished and pruner.penalty_coefficient is not None
            if not (finishes and lacks_gpu_memory(error)):
                raise
            out_of_memory = True
        if out_of_memory:  # out of the handler: it would hold what the failed pass has allocated
            logits = loss = None  # type: ignore[assignment] # the same
            reduction.finish()  # the other ranks wait for it
        consult(iteration, out_of_memory)
        if iteration % _CHECK_EVERY == _CHECK_EVERY - 1:
            tally.stop_if_bad(plan.epoch, learner.team)
    tally.stop_if_bad(plan.epoch, learner.team)
    return tally.total(learner.team, iteration + 1)


Mixed = tuple[tuple[Tensor, float], ...]  # classes and their weight in the loss


def mix(images: Tensor, labels: Tensor, alpha: float) -> tuple[Tensor, Mixed]:
    """The images, each mixed with another of the mini-batch, and the classes of both; as they are for α = 0.

    Source: Zhang et al., "mixup", ICLR 2018; one share per mini-batch, drawn from Beta(α, α).
    """
    if not alpha:
        return images, ((labels, 1.0),)
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    order = torch.randperm(len(images), device=images.device)  # one made on the host would wait for a GPU
    return images.lerp(images[order], 1 - share), ((labels, share), (labels[order], 1 - share))


def mixed_loss(logits: Tensor, mixed: Mixed, label_smoothing: float) -> Tensor:
    """Cross-entropy against every part of the mixed classes, weighted."""
    parts = [(F.cross_entropy(logits, labels, label_smoothing=label_smoothing), weight) for labels, weight in mixed]
    first, weight = parts[0]
    return first if len(parts) == 1 else sum((loss * share for loss, share in parts[1:]), first * weight)


@torch.no_grad()
def validate(learner: Learner, batches: Iterable[Batch]) -> Sums:
    """Loss and accuracy over the whole validation set, in evaluation mode."""
    model = learner.judged
    tally = _Tally(learner.device)
    training = model.training
    model.eval()
    iteration = -1
    for iteration, (images, labels) in enumerate(batches):
        with number_format(learner.config.precision, learner.device):
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
        tally.add(iteration, loss, logits, labels)
    model.train(training)
    return tally.total(learner.team, iteration + 1)


def fits(learner: Learner, batch: int) -> bool:
    """Whether one step with `batch` images fits into the device's memory: tried out, without a trace in the learner."""
    model, device = learner.model, learner.device
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        try:
            images = torch.zeros((batch, *learner.recipe.input_shape), device=device)
            labels = torch.zeros(batch, dtype=torch.int64, device=device)
            with number_format(learner.config.precision, device):
                loss = F.cross_entropy(model.train()(images), labels)
            loss.backward()  # type: ignore[no-untyped-call] # torch's gap
            learner.pruner.criterion.add_gradient(0.0)
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            return False
        finally:
            model.zero_grad(set_to_none=True)
            for buffer, before in buffers:
                buffer.detach().copy_(before)
            if on_gpu:
                torch.cuda.empty_cache()
    return True
