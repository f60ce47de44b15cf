"""Which optimizers are there, and how does another package add one? One row each.

[project.entry-points."ptsim.optimizers"]
lion = "my_package.optimizers:lion"          # an OptimizerKind
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ptsim.training.config import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerKind:
    """One optimizer.

    Attributes:
        make: from parameters and configuration; its state per parameter is shaped like the parameter.
        momentum: used where the configuration has none; None for an optimizer that does not take the setting.
        counted_as: the optimizer of the cost model that moves as much memory in an update.
    """

    make: Callable[[Iterable[nn.Parameter], Config], torch.optim.Optimizer]
    momentum: float | None = None
    counted_as: str


def _common(config: Config) -> dict[str, Any]:
    return {"lr": config.lr, "weight_decay": config.weight_decay}


sgd = OptimizerKind(
    make=lambda parameters, config: torch.optim.SGD(
        parameters, momentum=config.momentum or 0.0, nesterov=config.nesterov, **_common(config)
    ),
    momentum=0.9,
    counted_as="sgd",
)
adam = OptimizerKind(make=lambda parameters, config: torch.optim.Adam(parameters, **_common(config)), counted_as="adam")
adamw = OptimizerKind(
    make=lambda parameters, config: torch.optim.AdamW(parameters, **_common(config)), counted_as="adamw"
)
rmsprop = OptimizerKind(
    make=lambda parameters, config: torch.optim.RMSprop(parameters, momentum=config.momentum or 0.0, **_common(config)),
    momentum=0.0,
    counted_as="rmsprop",
)
