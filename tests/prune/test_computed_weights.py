"""Layers that compute their filters, each from its own part of a parameter: their outputs may go, their inputs stay."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import random_unstructured

import ptsim
from ptsim.capture.copies import copied
from ptsim.capture.network import capture_network
from ptsim.prune.groups import find_groups
from ptsim.prune.reconfigure import reconfigure
from ptsim.prune.structure import apply_structure, structure_of
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


class ByGain(ByHand):
    """A mask and a gain in front of the weight that they are multiplied with."""

    def __init__(self, *sizes: int, **options: int) -> None:
        super().__init__(*sizes, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))
        self.mask: Tensor
        self.register_buffer("mask", torch.ones_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.mask * (self.gain * self.weight), self.bias, padding=self.padding)


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


@pytest.mark.parametrize("make", [ByBatchNorm, ByHand, ByGain, old, new])
def test_the_outputs_go_and_the_inputs_stay(make: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    found = ptsim.inspect(Net(make), input_shape=IMAGE)
    assert found.exact
    assert found.prunable_channels == 10 + 8, [(g.name, g.width, g.reason) for g in found.groups]
    stem = next(group for group in found.groups if group.name == "stem")
    assert "computes its weight from all that it reads" in str(stem.reason)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_a_mask_of_torch_computes_stays_and_the_rest_is_pruned(name: str) -> None:
    def masked(*sizes: int, **options: int) -> nn.Module:
        layer = nn.Conv2d(*sizes, **options)  # type: ignore[arg-type] # numbers
        return random_unstructured(layer, name, 0.5)

    torch.manual_seed(0)
    found = ptsim.inspect(Net(masked), input_shape=IMAGE)
    assert found.exact
    assert found.prunable_channels == 8  # those that the plain convolution makes
    assert any(f"tested (Conv2d) computes its {name}" in str(group.reason) for group in found.groups)


class Depthwise(nn.Module):
    """Filters of one channel each, standardised; the number of groups stands in the code, or in an attribute."""

    def __init__(self, groups: int | None) -> None:
        super().__init__()
        self.filters, self.groups = nn.Parameter(torch.randn(24, 1, 3, 3)), groups

    def forward(self, x: Tensor) -> Tensor:
        filters = self.filters - self.filters.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, filters, padding=1, groups=24 if self.groups is None else self.groups)


def written(*sizes: int, **options: int) -> nn.Module:
    return Depthwise(None)


def kept(*sizes: int, **options: int) -> nn.Module:
    return Depthwise(24)


def old_without_bias(*sizes: int, **options: int) -> nn.Module:
    return old(*sizes, **options, bias=False)


def new_without_bias(*sizes: int, **options: int) -> nn.Module:
    return new(*sizes, **options, bias=False)


class Between(nn.Module):
    """24 channels, which pass the depthwise layer under test."""

    def __init__(self, make: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.stem, self.tested = nn.Conv2d(3, 24, 3), make(24, 24, 3, padding=1, groups=24)
        self.plain, self.head = nn.Conv2d(24, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.plain(self.tested(torch.relu(self.stem(x))))).mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "prunable"),
    [(written, 8), (kept, 24 + 8), *[(make, 24 + 8) for make in (old, new, old_without_bias, new_without_bias)]],
)
def test_depthwise_filters_go_with_their_channels(make: Callable[..., nn.Module], prunable: int) -> None:
    torch.manual_seed(0)
    found = ptsim.inspect(Between(make), input_shape=IMAGE)
    assert found.exact
    assert found.prunable_channels == prunable, [(g.name, g.width, g.reason) for g in found.groups]


@pytest.mark.slow
@pytest.mark.parametrize("make", [old, new, old_without_bias, new_without_bias])
def test_the_layer_and_its_record_know_how_many_channels_are_left(make: Callable[..., nn.Module]) -> None:
    model, fresh = Net(make), Net(make)
    with torch.no_grad():
        model.plain.weight[:, [1, 4, 9]] = 0
    reconfigure(model, find_groups(model, IMAGE))
    apply_structure(fresh, structure_of(model))
    for network in (model, fresh):
        assert network.tested.out_channels == 7
        captured = capture_network(network, name="net", input_shape=IMAGE, num_classes=4)
        (layer,) = [layer for layer in captured.layers if layer.name == "tested"]
        assert (layer.in_channels, layer.out_channels) == (6, 7)


@pytest.mark.parametrize("make", [old, new])
def test_gating_leaves_a_computed_weight_as_it_is(make: Callable[..., nn.Module]) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.wide, self.norm = nn.Conv2d(6, 4, 1), make(4, 6, 1, bias=False), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.norm(self.wide(torch.relu(self.narrow(x))))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Block(), Block(), nn.Flatten(), nn.Linear(600, 4)).double()
    enliven(model)
    with torch.no_grad():
        for name, gain in model[1].wide.named_parameters():
            if name.endswith(("original0", "weight_g")):
                gain[:2] = 0
    zeroed = copied(model)
    images = torch.rand(2, *IMAGE, dtype=torch.float64)
    zeroed(images)  # an old form computes its weight before every call
    model(images)
    reconfigure(model, find_groups(model, IMAGE), mode="gating")
    torch.testing.assert_close(model.eval()(images), zeroed.eval()(images), rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("make", [ByBatchNorm, ByHand, ByGain, old, new])
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
