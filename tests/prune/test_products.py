"""Products of activations: what is summed over stays, what lies along the other axes goes, and the function is kept."""

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
    """A stem of 8 channels, three projections of it, what is made of them, and a head."""

    def __init__(self, mix: Callable[..., Tensor], width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.q, self.k, self.v = (nn.Conv2d(8, width, 1) for _ in range(3))
        self.mix, self.width = mix, width
        self.out, self.head = nn.Conv2d(width, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.mix(self, self.q(x), self.k(x), self.v(x))
        return self.head(torch.relu(self.out(y.reshape(x.shape[0], -1, *x.shape[2:]))).mean((2, 3)))


def non_local(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q.flatten(2).transpose(1, 2) @ k.flatten(2)).softmax(-1)
    return torch.matmul(weights, v.flatten(2).transpose(1, 2)).transpose(1, 2)


def by_einsum(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("ncx,ncy->nxy", q.flatten(2), k.flatten(2)).softmax(-1)
    return torch.einsum("nxy, ncy -> ncx", weights, v.flatten(2))


def linear_attention(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    context = torch.bmm(k.flatten(2).softmax(-1), v.flatten(2).transpose(1, 2))
    return torch.bmm(q.flatten(2).transpose(1, 2), context).transpose(1, 2)


def two_heads(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (part.reshape(part.shape[0], 2, -1, 9).transpose(-1, -2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)


@pytest.mark.parametrize("mix", [non_local, by_einsum, linear_attention, two_heads])
def test_the_values_of_an_attention_go_and_its_queries_and_keys_stay(mix: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    found = ptsim.inspect(Net(mix), input_shape=IMAGE)
    groups = {group.name: group for group in found.groups}
    assert found.exact
    assert groups["v"].prunable
    for name in ("q", "k"):
        assert "these channels" in str(groups[name].reason)
    assert found.prunable_channels == 8 + 8 + 6  # stem, values, out


def test_heads_lose_the_same_values() -> None:
    """Channel i of one head goes with channel i of the other: two components of two channels each, and so on."""
    groups = find_groups(Net(two_heads), IMAGE)
    written = next(layer.outputs.tolist() for layer in groups.layers if layer.layer == "v")
    assert written[:4] == written[4:]
    assert len(set(written)) == 4


class Pooled(nn.Module):
    """The context of a global-context block: an image weighed by a map of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.map, self.back = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        n, c, h, w = x.shape
        weights = self.map(x).view(n, 1, h * w).softmax(2).unsqueeze(-1)
        context = torch.matmul(x.view(n, c, h * w).unsqueeze(1), weights).view(n, c, 1, 1)
        return self.head((x + self.back(context)).mean((2, 3)))


def test_channels_pass_a_sum_over_places() -> None:
    torch.manual_seed(0)
    found = ptsim.inspect(Pooled(), input_shape=IMAGE)
    assert found.exact
    assert found.prunable_channels == 8


def test_of_an_outer_product_one_side_stays() -> None:
    """Eight maps of weights by eight channels of values: the maps stay."""

    def outer(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("nmx,ncx->nmc", q.flatten(2).softmax(-1), v.flatten(2)).sum(1)[:, :, None, None] * k

    torch.manual_seed(0)
    found = ptsim.inspect(Net(outer), input_shape=IMAGE)
    groups = {member: group for group in found.groups for member in group.members}
    assert found.exact
    assert groups["v (out)"].prunable
    assert "multiplies every one of these channels" in str(groups["q (out)"].reason)


def test_a_matrix_that_no_layer_holds_is_refused() -> None:
    class Held(Net):
        def __init__(self) -> None:
            super().__init__(lambda net, q, k, v: (v.flatten(2).transpose(1, 2) @ net.matrix).transpose(1, 2))
            self.matrix = nn.Parameter(torch.randn(8, 8))

    group = next(g for g in ptsim.inspect(Held(), input_shape=IMAGE).groups if g.name == "v")
    assert "a parameter that no layer holds" in str(group.reason)


class Squared(nn.Module):
    """Products of every two features of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.weight = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(7, 8, 8))
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).mean((2, 3))
        return self.head(torch.relu(F.bilinear(y, y, self.weight)))


def test_of_a_bilinear_product_of_one_tensor_the_outputs_go() -> None:
    torch.manual_seed(0)
    found = ptsim.inspect(Squared(), input_shape=IMAGE)
    groups = {member: group for group in found.groups for member in group.members}
    assert found.exact
    assert (found.prunable_channels, groups["head (in)"].prunable) == (7, True)
    assert "multiplies these channels with others" in str(groups["stem (out)"].reason)
