"""A pruned network trains on as the zeroed one would, with any optimizer."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ptsim.prune.groups import find_groups
from ptsim.prune.reconfigure import reconfigure
from tests.prune.helpers import (
    SMALL_IMAGE,
    apply_masks,
    nonzero_masks,
    same_function,
    small_resnet,
    train,
    zero_some,
)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=5e-4),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, weight_decay=5e-4),
}


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": [p for p in model.parameters() if p.ndim > 1]}, {"params": vectors, "weight_decay": 0.0}]


def zeroed_and_pruned(
    make: Callable[[Any], torch.optim.Optimizer], *, zero: Callable[[nn.Module], object], **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, torch.Tensor], nn.Module, torch.optim.Optimizer, Any]:
    """Both networks after three common steps, so that the optimizers hold some state."""
    model = small_resnet(bias=options.pop("bias", False))
    optimizer = make(two_groups(model))
    zero(model)
    masks = nonzero_masks(model)
    train(model, optimizer, SMALL_IMAGE, steps=3, masks=masks)
    pruned = copy.deepcopy(model)
    pruned_optimizer = make(two_groups(pruned))
    pruned_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    surgery = reconfigure(pruned, find_groups(pruned, SMALL_IMAGE), optimizer=pruned_optimizer, **options)
    return model, optimizer, masks, pruned, pruned_optimizer, surgery


def zero_components(model: nn.Module) -> None:
    zero_some(model, find_groups(model, SMALL_IMAGE))


def zero_a_branch(model: nn.Module) -> None:
    nn.init.zeros_(model.get_parameter("blocks.1.a.weight"))
    nn.init.zeros_(model.get_parameter("blocks.1.b.weight"))


def zero_one_side(model: nn.Module) -> None:
    """Channels of the stream that one layer does not use while others do: what gating is for."""
    with torch.no_grad():
        model.get_parameter("blocks.0.a.weight")[:, 2:7] = 0
        model.get_parameter("blocks.1.b.weight")[4:9] = 0
        model.get_parameter("blocks.2.a.weight")[:, ::2] = 0


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("what", ["channels", "a branch", "gates"])
def test_twenty_steps_of_the_zeroed_and_the_pruned_network_agree(name: str, what: str) -> None:
    zero = {"channels": zero_components, "a branch": zero_a_branch, "gates": zero_one_side}[what]
    model, optimizer, masks, pruned, pruned_optimizer, surgery = zeroed_and_pruned(
        OPTIMIZERS[name], zero=zero, mode="gating" if what == "gates" else "union"
    )
    assert surgery.changed
    expected = train(model, optimizer, SMALL_IMAGE, steps=20, masks=masks)
    found = train(pruned, pruned_optimizer, SMALL_IMAGE, steps=20)
    assert found == pytest.approx(expected, rel=1e-8)
    same_function(pruned, model, SMALL_IMAGE)


def test_a_removed_branch_with_biased_convolutions_keeps_its_constant() -> None:
    model, _, _, pruned, _, surgery = zeroed_and_pruned(OPTIMIZERS["sgd"], zero=zero_a_branch, bias=True)
    assert surgery.layers_removed == ("blocks.1.a", "blocks.1.b")
    same_function(pruned, model, SMALL_IMAGE)


def test_nothing_removed_stays_in_the_optimizer() -> None:
    *_, pruned, optimizer, _ = zeroed_and_pruned(OPTIMIZERS["adam"], zero=zero_a_branch)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in pruned.parameters()}
    assert {id(p) for p in optimizer.state} <= held


@pytest.mark.slow
def test_schedulers_and_averages_follow_a_reconfiguration() -> None:
    model = small_resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    zero_components(model)
    masks = nonzero_masks(model)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    whole, whole_average = copy.deepcopy(model), copy.deepcopy(average)
    whole_optimizer = torch.optim.SGD(whole.parameters(), lr=0.1, momentum=0.9)
    whole_scheduler = torch.optim.lr_scheduler.StepLR(whole_optimizer, step_size=2, gamma=0.1)
    reconfigure(model, find_groups(model, SMALL_IMAGE), optimizer=optimizer, shadows=[average])

    def follow(m: nn.Module, ema: Any, schedule: Any) -> Callable[[], None]:
        def step() -> None:
            ema.update_parameters(m)
            schedule.step()

        return step

    train(whole, whole_optimizer, SMALL_IMAGE, steps=5, masks=masks,
          after_step=follow(whole, whole_average, whole_scheduler))  # fmt: skip
    train(model, optimizer, SMALL_IMAGE, steps=5, after_step=follow(model, average, scheduler))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    apply_masks(whole_average.module, masks)
    same_function(average.module, whole_average.module, SMALL_IMAGE)


def test_a_grad_scaler_keeps_its_scale() -> None:
    model = small_resnet().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    zero_components(model)
    reconfigure(model, find_groups(model, SMALL_IMAGE), optimizer=optimizer)
    before = model.get_parameter("stem.weight").detach().clone()
    scaler.scale(model(torch.rand(4, *SMALL_IMAGE)).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0
    assert not torch.equal(model.get_parameter("stem.weight"), before)


class Factored(torch.optim.Optimizer):
    """Keeps a factor for every axis: in a list, as Shampoo and PSGD do, or each by itself, as timm's Adafactor does."""

    listed = True

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override] # nothing is given back
        for parameter in self.param_groups[0]["params"]:
            if not self.state[parameter]:
                factors = [torch.ones(length) for length in parameter.shape]
                self.state[parameter].update({"factors": factors} if self.listed else dict(enumerate(factors)))
            state = self.state[parameter]
            for axis, factor in enumerate(state["factors"] if self.listed else state.values()):
                shape = [-1 if dim == axis else 1 for dim in range(parameter.ndim)]
                parameter.grad.mul_(factor.view(shape))
            parameter.sub_(parameter.grad, alpha=0.01)


@pytest.mark.parametrize("listed", [True, False])
def test_factors_are_cut_where_their_axes_are_clear_and_start_anew_in_a_list(listed: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    optimizer = Factored(model.parameters(), {})
    optimizer.listed = listed

    def step() -> None:
        model(torch.rand(2, 3, 8, 8)).sum().backward()
        optimizer.step()

    step()
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[1].weight[:, :2] = 0
    head = list(optimizer.state[model[3].weight].values())
    message = "is not shaped like the weight that it is of; that weight's starts anew"
    with pytest.warns(UserWarning, match=message) if listed else contextlib.nullcontext():
        assert reconfigure(model, find_groups(model, (3, 8, 8)), optimizer=optimizer).changed
    step()
    state = optimizer.state[model[1].weight]
    assert [len(factor) for factor in (state["factors"] if listed else state.values())] == [4, 4, 3, 3]
    assert all(kept is old for kept, old in zip(optimizer.state[model[3].weight].values(), head, strict=True))
