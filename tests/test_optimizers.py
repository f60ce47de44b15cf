"""What an optimizer keeps and moves in one kernel, and what it is made with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ptsim.errors import UsageError
from ptsim.optimizers import OPTIMIZERS, OptimizerKind, kind_of
from ptsim.setting import StepSetting, ToldUpdate


@pytest.mark.parametrize(
    ("name", "momentum", "states", "fused"),
    [
        ("sgd", 0.0, 0, 3),  # reads weight and gradient, writes the weight
        ("sgd", None, 1, 5),  # its own momentum is 0.9: reads and writes it too
        ("adam", None, 2, 7),  # reads weight, gradient and two moments, writes all but the gradient
        ("adam", 0.9, 2, 7),  # it takes none
        ("adamw", None, 2, 7),
        ("rmsprop", None, 1, 5),  # its own momentum is 0: one mean of squares is read and written
        ("rmsprop", 0.9, 2, 7),
    ],
)
def test_one_kernel_moves_every_value_that_is_kept_in_and_out(
    name: str, momentum: float | None, states: int, fused: int
) -> None:
    kind = OPTIMIZERS.find(name)
    assert (kind.states(momentum), kind.moved(momentum, fused=True)) == (states, fused)


def test_what_a_run_told_of_an_optimizer_counts_for_that_optimizer_alone() -> None:
    told = ToldUpdate(optimizer="theirs", num_states=3, accesses=12, fused_accesses=7)
    kind = kind_of(StepSetting(batch=1, optimizer="theirs", momentum=0.9, told_update=told))
    assert (kind.states(0.9), kind.moved(0.9), kind.moved(0.9, fused=True)) == (3, 12, 7)
    assert kind_of(StepSetting(batch=1, optimizer="adam", told_update=told)) is OPTIMIZERS.find("adam")


@pytest.mark.parametrize(
    ("name", "momentum", "made"),
    [
        ("sgd", 0.5, {"lr": 0.3, "weight_decay": 0.0, "momentum": 0.5, "nesterov": True}),
        ("rmsprop", None, {"lr": 0.3, "weight_decay": 0.0, "momentum": 0}),
        ("adamw", 0.5, {"lr": 0.3, "weight_decay": 0.0, "betas": (0.9, 0.999)}),  # not torch's weight decay of 0.01
    ],
)
def test_settings_that_are_given_reach_the_optimizer_also_where_they_are_0(
    name: str, momentum: float | None, made: dict[str, object]
) -> None:
    settings = SimpleNamespace(lr=0.3, weight_decay=0.0, momentum=momentum, nesterov=True)
    optimizer = OPTIMIZERS.find(name).make([nn.Parameter(torch.zeros(1))], settings)
    assert {key: optimizer.param_groups[0][key] for key in made} == made


def test_an_optimizer_that_cannot_be_imported_is_one_sentence() -> None:
    kind = OptimizerKind(factory="torch.optim:NoSuch", num_states=0, accesses=0, fused_accesses=0)
    with pytest.raises(UsageError, match=r"the optimizer torch\.optim:NoSuch cannot be imported"):
        kind.make([], SimpleNamespace(lr=0.1, weight_decay=0.0))
