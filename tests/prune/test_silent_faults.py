"""Code that reads, takes or writes channels past the rules: they stay, or what is left computes the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ptsim
from ptsim.prune.groups import find_groups
from ptsim.prune.reconfigure import reconfigure

pytestmark = pytest.mark.filterwarnings("ignore:.*traced by torch.export")

IMAGE = (3, 8, 8)


class Net(nn.Module):
    """Two convolutions, and between them the model's own `mix`."""

    def __init__(self, mix: Callable[[Tensor], Tensor], read: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(read, 6, 1), nn.Linear(6, 4)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.mix(torch.relu(self.a(x)))).mean((2, 3)))


def picked(x: Tensor) -> Tensor:
    return x[:, torch.tensor([0, 2, 4])]


def selected(x: Tensor) -> Tensor:
    return torch.index_select(x, 1, torch.tensor([5, 1, 3]))


def pooled_over_channels(x: Tensor) -> Tensor:
    return F.max_pool2d(x.flatten(2), (3, 1), stride=1, padding=(1, 0)).view(x.shape[0], -1, 8, 8)


def repeated(x: Tensor) -> Tensor:
    """A reflected border of two channels."""
    return F.pad(x.unsqueeze(1), (0, 0, 0, 0, 1, 1), mode="reflect").squeeze(1)


def mixed_by_chance(x: Tensor) -> Tensor:
    """Python's random numbers decide; both ways are taken in training."""
    return x.cumsum(1) if random.random() < 0.5 else x


def mixed_seldom(x: Tensor) -> Tensor:
    return x + x.sum(1, keepdim=True) if torch.rand(1).item() < 0.1 else x


def mixed_by_numpy(x: Tensor) -> Tensor:
    return x if np.random.rand() < 0.9 else x.softmax(1)


def turned_in_place(x: Tensor) -> Tensor:
    """What is summed up afterwards are the channels."""
    x = x.clone()
    x.transpose_(1, 3)
    return x.cumsum(3).transpose(1, 3)


def divided_by_a_tensor(x: Tensor) -> Tensor:
    return x * torch.tensor(1 / x.shape[1])


def not_for_proxies(compute: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What torch.fx cannot trace, and torch.export can: there every shape is a constant."""

    def code(x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)
        return compute(x)

    return code


CASES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "taken by an index in the code": (picked, 3),
    "selected by an index in the code": (selected, 3),
    "pooled over channels": (pooled_over_channels, 8),
    "channels reflected": (repeated, 10),
    "mixed where Python's random number says so": (mixed_by_chance, 8),
    "mixed where torch's random number says so": (mixed_seldom, 8),
    "mixed where NumPy's random number says so": (mixed_by_numpy, 8),
    "turned in place": (turned_in_place, 8),
    "divided by their number as a tensor": (divided_by_a_tensor, 8),
    "exported: divided by their number": (not_for_proxies(lambda x: x / x.shape[1]), 8),
    "exported: times a tensor of their number": (not_for_proxies(lambda x: x * torch.full((1,), 1 / x.shape[1])), 8),
    "exported: times a constant of their number": (not_for_proxies(divided_by_a_tensor), 8),
    "exported: bounded by their number": (not_for_proxies(lambda x: x.clamp(max=x.shape[1] / 16)), 8),
}


@pytest.mark.parametrize("name", CASES)
def test_channels_stay_that_code_treats_in_a_way_of_its_own(name: str) -> None:
    torch.manual_seed(0)
    model: Any = Net(*CASES[name])
    assert ptsim.inspect(model, input_shape=IMAGE).exact  # what `b` writes goes
    groups = find_groups(model, IMAGE)
    written = next(layer.outputs for layer in groups.layers if layer.layer == "a")
    assert not bool(groups.prunable[written].any())


def prunable(model: nn.Module) -> dict[str, int]:
    """Per convolution how many of the channels that it writes can go."""
    groups = find_groups(model, IMAGE)
    return {layer.layer: int(groups.prunable[layer.outputs].sum()) for layer in groups.layers}


def flipped(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.flip(1)


def all_added(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0] + inputs[0].sum(1, keepdim=True),)


def scaled_in_place(module: nn.Module, inputs: Any, output: Tensor) -> None:
    with torch.no_grad():
        output.mul_(output.shape[1])


def test_channels_stay_where_a_hook_changes_what_a_layer_takes_or_gives() -> None:
    for register, hook in (
        ("register_forward_hook", flipped),
        ("register_forward_hook", scaled_in_place),
        ("register_forward_pre_hook", all_added),
    ):
        model: Any = Net(lambda x: x)
        getattr(model.b, register)(hook)
        found = prunable(model)
        assert found.get("a", 0) == found.get("b", 0) == 0, hook


def test_hooks_that_only_look_change_nothing() -> None:
    shapes: list[torch.Size] = []
    model: Any = Net(lambda x: x)
    model.b.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    model.b.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    assert prunable(model) == {"a": 8, "b": 6, "head": 0}
    assert shapes
    assert ptsim.inspect(model, input_shape=IMAGE).exact


def test_a_random_choice_between_ways_that_are_both_followed_costs_no_channel() -> None:
    model: Any = Net(lambda x: x * 2 if random.random() < 0.5 else torch.sigmoid(x))
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    assert prunable(model) == {"a": 8, "b": 6, "head": 0}
    assert torch.equal(torch.get_rng_state(), state[0])  # nothing of it can be noticed afterwards
    assert random.getstate() == state[1]
    assert (np.random.get_state()[1] == state[2]).all()


class ScaledInEvaluation(nn.Module):
    """torch.export traces it, and only evaluation divides by the number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)
        x = torch.relu(self.a(x))
        return self.head((x if self.training else x / x.shape[1]).mean((2, 3)))


def test_numbers_of_evaluation_alone_count_too() -> None:
    assert prunable(ScaledInEvaluation()).get("a", 0) == 0


class Branch(nn.Module):
    """A residual branch beside code that torch.export alone traces and that divides by the number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.scaled, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.branch = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)
        x = torch.relu(self.scaled(self.stem(x)))
        return self.head(((x + self.branch(x)) / x.shape[1]).mean((2, 3)))


def test_numbers_are_compared_also_where_a_branch_is_removed() -> None:
    torch.manual_seed(0)
    model = Branch().eval()
    with torch.no_grad():
        for layer in (model.branch[0], model.branch[2]):
            layer.weight.zero_()
            layer.bias.zero_()
        model.scaled.weight[:3].zero_()
    images = torch.rand(2, *IMAGE)
    expected = model(images)
    surgery = reconfigure(model, find_groups(model, IMAGE))
    assert surgery.layers_removed
    assert torch.allclose(model(images), expected, atol=1e-6)


def test_what_the_code_makes_in_float32_does_not_end_the_proof() -> None:
    model: Any = Net(lambda x: torch.einsum("cd,ndhw->nchw", torch.eye(8), x).float())
    assert ptsim.inspect(model, input_shape=IMAGE).exact
