"""Code that reads, takes or writes channels past the rules: they stay, or what is left computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ptsim
from ptsim.prune.groups import find_groups

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


CASES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "taken by an index in the code": (picked, 3),
    "selected by an index in the code": (selected, 3),
    "pooled over channels": (pooled_over_channels, 8),
    "channels reflected": (repeated, 10),
}


@pytest.mark.parametrize("name", CASES)
def test_channels_stay_that_code_treats_in_a_way_of_its_own(name: str) -> None:
    torch.manual_seed(0)
    model: Any = Net(*CASES[name])
    assert ptsim.inspect(model, input_shape=IMAGE).exact  # what `b` writes goes
    groups = find_groups(model, IMAGE)
    written = next(layer.outputs for layer in groups.layers if layer.layer == "a")
    assert not bool(groups.prunable[written].any())
