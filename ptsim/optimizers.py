"""Which optimizers are there, what does each keep and move, and how is it made? One row each, read by all rooms.

Another package adds one by `OPTIMIZERS.add`, or through an entry point whose value is an `OptimizerKind`::

    [project.entry-points."ptsim.optimizers"]
    lion = "my_package.optimizers:LION"

Costs read the rows without torch: an optimizer's class is imported when a run makes it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from ptsim.errors import UsageError
from ptsim.registry import Registry
from ptsim.setting import StepSetting

if TYPE_CHECKING:
    import torch
    from torch import nn


class OptimizerSettings(Protocol):
    """Where an optimizer's settings come from, for example a run's configuration."""

    @property
    def lr(self) -> float:
        """Learning rate."""

    @property
    def weight_decay(self) -> float:
        """Of every parameter."""


class OptimizerKind(msgspec.Struct, frozen=True, kw_only=True):
    """One optimizer.

    Attributes:
        factory: called with the parameters and the keywords `lr`, `weight_decay` and those in `takes`; or
            "module:name" of it. The optimizer's state for a parameter is shaped like the parameter.
        takes: further settings that it takes, of "momentum" and "nesterov".
        momentum: used where the settings have none; None for an optimizer that does not take it.
        num_states: fp32 values that it keeps for every parameter without momentum.
        accesses: fp32 values that one update without momentum reads and writes for every parameter in torch's default
            form, weight decay included. On a GPU that is the "foreach" form: every arithmetic step is a kernel over all
            tensors.
        fused_accesses: the same where one kernel does it all.
        momentum_states, momentum_accesses, momentum_fused_accesses: what a momentum above 0 adds to the three.
    """

    factory: Callable[..., torch.optim.Optimizer] | str
    takes: tuple[str, ...] = ()
    momentum: float | None = None
    num_states: int
    accesses: int
    fused_accesses: int
    momentum_states: int = 0
    momentum_accesses: int = 0
    momentum_fused_accesses: int = 0

    def states(self, momentum: float | None = None) -> int:
        """fp32 values that it keeps for every parameter; `momentum` None: its own."""
        return self.num_states + self._uses(momentum) * self.momentum_states

    def moved(self, momentum: float | None = None, *, fused: bool = False) -> int:
        """fp32 values that one update reads and writes for every parameter; `momentum` None: its own."""
        if fused:
            return self.fused_accesses + self._uses(momentum) * self.momentum_fused_accesses
        return self.accesses + self._uses(momentum) * self.momentum_accesses

    def make(self, parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        """The optimizer of `parameters`; a setting that is None is left to the optimizer.

        Raises:
            UsageError: its factory cannot be imported.
        """
        keywords = {name: getattr(settings, name) for name in ("lr", "weight_decay", *self.takes)}
        made: torch.optim.Optimizer = self._factory()(
            parameters, **{name: value for name, value in keywords.items() if value is not None}
        )
        return made

    def _uses(self, momentum: float | None) -> bool:
        return bool(self.momentum if self.momentum is None or momentum is None else momentum)

    def _factory(self) -> Callable[..., Any]:
        if not isinstance(self.factory, str):
            return self.factory
        module, _, name = self.factory.partition(":")
        try:
            found: Callable[..., Any] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UsageError(f"the optimizer {self.factory} cannot be imported: {error}") from error
        return found


SGD = OptimizerKind(
    factory="torch.optim:SGD",
    takes=("momentum", "nesterov"),
    momentum=0.9,
    num_states=0,
    accesses=6,  # weight decay 3 (read w and g, write g), update 3
    fused_accesses=3,  # read w, g; write w
    momentum_states=1,
    momentum_accesses=5,  # scale m 2, add g 3
    momentum_fused_accesses=2,  # read and write m
)
ADAM = OptimizerKind(
    factory="torch.optim:Adam",
    num_states=2,
    accesses=21,
    fused_accesses=7,  # read w, g, m, v; write w, m, v
)
ADAMW = OptimizerKind(factory="torch.optim:AdamW", num_states=2, accesses=20, fused_accesses=7)
RMSPROP = OptimizerKind(
    factory="torch.optim:RMSprop",
    takes=("momentum",),
    momentum=0.0,
    num_states=1,
    accesses=16,
    fused_accesses=5,
    momentum_states=1,
    momentum_accesses=5,  # scale m 2; the step, 4, is added to m in place of w; update 3
    momentum_fused_accesses=2,
)

OPTIMIZERS: Registry[OptimizerKind] = Registry(
    "optimizer",
    entry_points="ptsim.optimizers",
    own={
        "sgd": "ptsim.optimizers:SGD",
        "adam": "ptsim.optimizers:ADAM",
        "adamw": "ptsim.optimizers:ADAMW",
        "rmsprop": "ptsim.optimizers:RMSPROP",
    },
)


def kind_of(setting: StepSetting) -> OptimizerKind:
    """The optimizer of a step: as a recorded run told of it, whose package need not be here, or the table's row.

    Raises:
        UnknownNameError: no such optimizer.
    """
    told = setting.told_update
    if told is None or told.optimizer != setting.optimizer:
        return OPTIMIZERS.find(setting.optimizer)
    return OptimizerKind(
        factory=told.optimizer,
        num_states=told.num_states,
        accesses=told.accesses,
        fused_accesses=told.fused_accesses,
    )
