"""Layers that compute their filters, each from its own part of a parameter: their outputs may go, their inputs stay."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ptsim
from ptsim.capture.graph import copied
from ptsim.prune.groups import find_groups
from ptsim.prune.reconfigure import reconfigure
from tests.prune.helpers import enliven

IMAGE = (3, 12, 12)


class ByBatchNorm(nn.Conv2d):
    """Standardised as timm does it, with a gain."""

    def __init__(self, *sizes: int, **options: int) -> None:
        super().__init__(*sizes, **options)  # type: ignore[arg-type] # numbers
        self.gain, self.scale = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1)), 0.5

    def forward(self, x: Tensor) -> Tensor:
        flat, gain = self.weight.reshape(1, self.out_channels, -1), (self.gain * self.scale).view(-1)
        weight = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=1e-5)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=self.padding, groups=self.groups)


class ByHand(nn.Conv2d):
    """Standardised as the first publication's code does it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        deviation = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        return F.conv2d(x, weight / deviation, self.bias, padding=self.padding)


def old(*sizes: int, **options: int) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Conv2d(*sizes, **options))  # type: ignore[arg-type] # numbers


def new(*sizes: int, **options: int) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(*sizes, **options))  # type: ignore[arg-type] # numbers


class Net(nn.Module):
    """6 channels, of which the layer under test makes 10, read by a plain convolution that makes 8."""

    def __init__(self, make: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.stem, self.tested = nn.Conv2d(3, 6, 3), make(6, 10, 3, padding=1)
        self.plain, self.head = nn.Conv2d(10, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.tested(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.plain(x)).mean((2, 3)))


@pytest.mark.parametrize("make", [ByBatchNorm, ByHand, old, new])
def test_the_outputs_go_and_the_inputs_stay(make: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    found = ptsim.inspect(Net(make), input_shape=IMAGE)
    assert found.exact
    assert found.prunable_channels == 10 + 8, [(g.name, g.width, g.reason) for g in found.groups]
    stem = next(group for group in found.groups if group.name == "stem")
    assert "computes its weight from all that it reads" in str(stem.reason)


@pytest.mark.parametrize("make", [ByBatchNorm, ByHand, old, new])
def test_unread_outputs_are_removed(make: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model = Net(make).double()
    enliven(model)
    with torch.no_grad():
        model.plain.weight[:, [1, 4, 9]] = 0
        model.head.weight[:, 5] = 0  # plain's own filter is not zero: it stays
    zeroed = copied(model)
    assert reconfigure(model, find_groups(model, IMAGE)).changed
    assert model.plain.weight.shape == (8, 7, 1, 1)
    images = torch.rand(2, *IMAGE, dtype=torch.float64)
    torch.testing.assert_close(model(images), zeroed(images), rtol=1e-12, atol=1e-14)
    assert not reconfigure(model, find_groups(model, IMAGE)).changed
