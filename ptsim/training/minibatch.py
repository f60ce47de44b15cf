"""How far may the mini-batch grow once the network has shrunk (docs/method.md §3)?"""

from __future__ import annotations

import torch

from ptsim.costs.memory import iteration_memory, largest_batch
from ptsim.hardware.catalog import match_device
from ptsim.hardware.spec import Device
from ptsim.network import Network
from ptsim.setting import StepSetting
from ptsim.training.config import Config
from ptsim.training.learner import Learner
from ptsim.training.outcome import Growth
from ptsim.training.step import fits


def grown_batch(
    network: Network,
    config: Config,
    *,
    batch_per_gpu: int,
    world_size: int,
    num_train: int,
    capacity_bytes: int,
    device: Device | None = None,
) -> int:
    """The largest mini-batch per rank that fits: the present one plus whole multiples of the granularity.

    It never shrinks, and never exceeds `max_batch` or the data set. `device` is the catalog's GPU that runs: with it
    the estimate has the libraries' workspaces and the allocator's margins.
    """
    setting = step_setting(config, batch_per_gpu, world_size)
    fits = largest_batch(network, setting, capacity_bytes=capacity_bytes, device=device)
    limit = min(fits, (config.max_batch or num_train) // world_size, num_train // world_size)
    steps = max(0, limit - batch_per_gpu) // config.batch_granularity
    grown = batch_per_gpu + steps * config.batch_granularity
    return grown


def predicted_bytes(
    network: Network,
    config: Config,
    batch_per_gpu: int,
    *,
    device: Device | None = None,
    world_size: int = 1,
) -> int:
    """Peak memory of one iteration as the cost model sees it."""
    return iteration_memory(network, step_setting(config, batch_per_gpu, world_size), device=device).peak_bytes


def step_setting(config: Config, batch_per_gpu: int, world_size: int) -> StepSetting:
    """How the configured run's steps are run at a mini-batch."""
    return StepSetting(
        batch=batch_per_gpu,
        precision=config.precision,
        memory_format=config.memory_format,
        optimizer=config.optimizer,
        momentum=config.momentum,
        proximal=config.regularizer == "proximal",
        regularizer=config.criterion if config.regularized else None,
        num_gpus=world_size,
    )


class BatchPolicy:
    """How a run of `ptsim train` lets its mini-batch grow into the memory that pruning has freed."""

    def __init__(self, learner: Learner, num_train: int) -> None:
        """`num_train`: images in the training set, which no mini-batch exceeds."""
        self._learner, self._num_train = learner, num_train

    def grow(self) -> Growth:
        """Grow the learner's mini-batch as far as every rank has memory for, by the prediction and in a trial step."""
        learner, config = self._learner, self._learner.config
        world_size, info = learner.team.world_size, learner.recorder.meter.info()
        network = learner.recorder.architecture
        device = match_device(info.name) if info.kind == "cuda" else None
        present = learner.batch // world_size
        taken = learner.recorder.resident_bytes + learner.pruner.average_bytes
        batch = grown_batch(
            network,
            config,
            batch_per_gpu=present,
            world_size=world_size,
            num_train=self._num_train,
            capacity_bytes=config.memory_budget_bytes or info.must_exist()[1] - taken,
            device=device,
        )
        batch = int(learner.team.least(torch.tensor(batch, device=learner.device)))  # memories of nodes differ a little
        while batch > present and not self._fits(batch):  # the prediction was too low: step back
            batch -= config.batch_granularity
        learner.set_batch(batch * world_size)
        needed = predicted_bytes(network, config, batch, device=device, world_size=world_size)
        return Growth(
            batch_per_gpu=batch, learning_rate_scale=learner.learning_rate_scale, predicted_memory_bytes=needed
        )

    def _fits(self, batch_per_gpu: int) -> bool:
        """Whether a step with that mini-batch runs on every rank."""
        learner = self._learner
        misfits = torch.tensor(float(not fits(learner, batch_per_gpu)), device=learner.device)
        return float(learner.team.sum(misfits)) == 0
