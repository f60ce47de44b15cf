"""Networks whose code takes another way once channels are gone: their channels stay, in a proof and in training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptsim.prune.groups import find_groups
from ptsim.prune.proof import inspect
from ptsim.prune.reconfigure import reconfigure

IMAGE = (3, 8, 8)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 12, 3)
        self.fc = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(F.relu(self.c(F.relu(self.way(F.relu(self.a(images)))))).mean((2, 3)))

    def way(self, x: Tensor) -> Tensor:
        return self.b(x)


class AsksForWidth(_Net):
    def way(self, x: Tensor) -> Tensor:
        y = self.b(x)
        return 2 * y if self.b.out_channels >= 16 else y


class AsksForParameters(_Net):
    def way(self, x: Tensor) -> Tensor:
        return self.b(x) * (2.0 if sum(p.numel() for p in self.b.parameters()) > 2000 else 1.0)


class AsksForFew(_Net):
    def way(self, x: Tensor) -> Tensor:
        return self.b(x) * (2.0 if self.b.out_channels > 3 else 1.0)


class AsksForNorm(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(16, 16)

    def way(self, x: Tensor) -> Tensor:
        y = self.norm(self.b(x))
        return 2 * y if self.norm.num_channels >= 16 else y


class AsksForDevice(_Net):
    def way(self, x: Tensor) -> Tensor:
        return self.b(x) if x.device.type == "cpu" else x


def silenced(network: nn.Module, layer: str, into: str, channels: int) -> None:
    with torch.no_grad():
        network.get_parameter(f"{layer}.weight")[:channels] = 0
        network.get_parameter(f"{layer}.bias")[:channels] = 0
        network.get_parameter(f"{into}.weight")[:, :channels] = 0


@pytest.mark.parametrize(
    ("kind", "channels"), [(AsksForWidth, 5), (AsksForParameters, 5), (AsksForFew, 13), (AsksForNorm, 5)]
)
def test_channels_stay_whose_removal_takes_the_code_another_way(kind: Any, channels: int) -> None:
    torch.manual_seed(0)
    network = kind()
    silenced(network, "b", "c", channels)
    before, images = copy.deepcopy(network), torch.rand(4, *IMAGE)
    reconfigure(network, find_groups(network, IMAGE), threshold=1e-6)
    assert network.b.out_channels == 16
    torch.testing.assert_close(network(images), before(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [AsksForWidth, AsksForParameters, AsksForFew, AsksForNorm])
def test_the_others_go_exactly(kind: Any) -> None:
    torch.manual_seed(0)
    assert inspect(kind(), input_shape=IMAGE).exact


class AsksForCuda(_Net):
    def way(self, x: Tensor) -> Tensor:
        return x if x.is_cuda else self.b(x)


class AsksForNumber(_Net):
    def way(self, x: Tensor) -> Tensor:
        return self.b(x) if x.get_device() < 0 else x  # -1 on a CPU


class CastsByDevice(_Net):
    def way(self, x: Tensor) -> Tensor:
        if x.device.type == "meta":
            return x
        with torch.autocast(device_type=x.device.type, enabled=False):
            return self.b(x) + torch.zeros(1, device=x.device)


@pytest.mark.parametrize("kind", [AsksForDevice, AsksForCuda, AsksForNumber, CastsByDevice])
def test_code_that_decides_by_the_device_goes_the_way_of_the_device_where_it_is(kind: Any) -> None:
    torch.manual_seed(0)
    assert any(layer.layer == "b" for layer in find_groups(kind(), IMAGE).layers)  # on a CPU
    assert inspect(kind(), input_shape=IMAGE).exact
