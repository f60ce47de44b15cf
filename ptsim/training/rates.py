"""How does the learning rate go over the epochs? A schedule is one function; a package of somebody else adds its own.

[project.entry-points."ptsim.schedules"]
mine = "my_package.rates:mine"
"""

from __future__ import annotations

import math
from typing import Protocol

from ptsim.training.config import Config
from ptsim.training.registries import SCHEDULES


class Schedule(Protocol):
    """The factor on the configured rate in one epoch."""

    def __call__(self, epoch: int, num_epochs: int, config: Config) -> float:
        """`epoch` counts from 0 in a phase of `num_epochs`; both are after the warm-up."""


def step(epoch: int, num_epochs: int, config: Config) -> float:
    """`lr_gamma` to the power of the milestones that lie at or before `epoch`; fractions round down to epochs.

    A fraction is one epoch at least: the first one has the initial rate, also of a run of a single epoch.
    """
    # 0.29 · 100 is 28.999999999999996 in binary
    passed = sum(epoch >= (max(1, int(m * num_epochs + 1e-9)) if m < 1 else m) for m in config.lr_milestones)
    return float(config.lr_gamma**passed)


def cosine(epoch: int, num_epochs: int, config: Config) -> float:
    """Half a cosine from 1 to 0 over the phase. Source: Loshchilov & Hutter, ICLR 2017, without restarts."""
    return 0.5 * (1 + math.cos(math.pi * epoch / num_epochs))


def rate(epoch: int, num_epochs: int, config: Config) -> float:
    """The learning rate of `epoch`: a linear warm-up over `warmup_epochs`, then the schedule.

    Source of the warm-up: Goyal et al., arXiv 1706.02677; in steps of an epoch.
    """
    warm_up = min(config.warmup_epochs, num_epochs - 1)
    if epoch < warm_up:
        return config.lr * (epoch + 1) / (warm_up + 1)
    schedule = SCHEDULES.find(config.lr_schedule)
    if config.lr_schedule == "step":  # its milestones count from the run's first epoch
        return config.lr * schedule(epoch, num_epochs, config)
    return config.lr * schedule(epoch - warm_up, num_epochs - warm_up, config)
