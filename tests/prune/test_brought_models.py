"""Networks that people brought: how much of each goes, by hand, and that it is exact."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import ptsim
from ptsim import zoo
from ptsim.prune.groups import find_groups
from ptsim.prune.labels import Label
from ptsim.prune.reconfigure import reconfigure
from ptsim.prune.rules import Call, rule
from ptsim.prune.structure import apply_structure, structure_of
from tests.prune.helpers import cut_twice, enliven, same_function

IMAGE = (3, 16, 16)


class FrozenNorm(nn.Module):
    """A BatchNorm made of buffers, as detection backbones have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "mean", "var"):
            self.register_buffer(name, torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        gain = self.weight * (self.var + 1e-5).rsqrt()
        shift = self.bias - self.mean * gain
        return x * gain.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class Acon(nn.Module):
    """An activation with three parameters per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.p1, self.p2 = nn.Parameter(torch.randn(1, width, 1, 1)), nn.Parameter(torch.randn(1, width, 1, 1))
        self.beta = nn.Parameter(torch.rand(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        d = (self.p1 - self.p2) * x
        return d * torch.sigmoid(self.beta * d) + self.p2 * x


class Blur(nn.Module):
    """A fixed low-pass filter for every channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.filt: Tensor
        kernel = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("filt", (kernel[:, None] * kernel / 16)[None, None].repeat(width, 1, 1, 1))
        self.pad = nn.ReflectionPad2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.pad(x), self.filt, stride=2, groups=x.shape[1])


class Noise(nn.Module):
    """One plane of noise (here of ones) for all channels, with a strength of each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        plane = x.new_ones(x.shape[0], 1, x.shape[2], x.shape[3])
        return x + self.strength.view(1, -1, 1, 1) * plane


class Clear(nn.Module):
    """Item assignment: the border is set to zero, one column comes from another tensor of the same channels."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, :, 0] = 0
        y[..., 0] = 1
        y[:, :, :, 1:2] = x[:, :, :, :1]
        return y


def plain(make: Callable[[int], nn.Module]) -> nn.Module:
    """16 and 32 channels with what is tried behind each of them."""
    head = [nn.Conv2d(32, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), make(16), nn.Conv2d(16, 32, 3, 1, 1), make(32), *head)


class Filled(nn.Module):
    """Channels are written into a tensor of fixed width: they cannot go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        full = y.new_zeros(x.shape[0], 6, x.shape[2], x.shape[3])
        full[:, :, 1:] = y[:, :, 1:]
        return self.head(self.b(full).mean((2, 3)))


class Segnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e1, self.e2 = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 8, 3, 1, 1)
        self.pool, self.unpool = nn.MaxPool2d(2, 2, return_indices=True), nn.MaxUnpool2d(2, 2)
        self.d2, self.d1, self.out = nn.Conv2d(8, 6, 3, 1, 1), nn.Conv2d(6, 5, 3, 1, 1), nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, first = self.pool(torch.relu(self.e1(x)))
        x, second = F.max_pool2d(torch.relu(self.e2(x)), 2, 2, return_indices=True)
        x = torch.relu(self.d2(F.max_unpool2d(x, second, 2)))
        return self.out(torch.relu(self.d1(self.unpool(x, first)))).mean((2, 3))


class Selective(nn.Module):
    """Two branches, weighted by a softmax over the branches for every channel."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.branches = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1 + i, 1 + i) for i in range(2))
        self.squeeze, self.excite = nn.Conv2d(width, 3, 1), nn.Conv2d(3, 2 * width, 1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = torch.stack([torch.relu(branch(x)) for branch in self.branches], dim=1)
        gate = self.excite(torch.relu(self.squeeze(y.sum(1).mean((2, 3), keepdim=True))))
        gate = torch.softmax(gate.view(gate.shape[0], 2, -1, 1, 1), dim=1)
        return self.head((y * gate).sum(1).mean((2, 3)))


class Shuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.shuffle, self.b = nn.Conv2d(3, 32, 1, 4), nn.PixelShuffle(2), nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.pixel_shuffle(self.b(self.shuffle(self.a(x))), 2).mean((2, 3)))


# prunable channels: every width of the network, the largest where layers share it; images and classes stay
BROUGHT: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "a norm made of buffers": (lambda: plain(FrozenNorm), 16 + 32 + 8),
    "three parameters per channel": (lambda: plain(Acon), 16 + 32 + 8),
    "a fixed blur": (lambda: plain(Blur), 16 + 32 + 8),
    "noise with a strength per channel": (lambda: plain(Noise), 16 + 32 + 8),
    "item assignment": (lambda: plain(Clear), 16 + 32 + 8),
    "a GroupNorm": (lambda: plain(lambda n: nn.GroupNorm(n // 4, n)), 16 + 32 + 8),
    "a GroupNorm without parameters": (lambda: plain(lambda n: nn.GroupNorm(n // 2, n, affine=False)), 16 + 32 + 8),
    "item assignment to a tensor of fixed width": (Filled, 12),
    "unpooling": (Segnet, 6 + 8 + 5),
    "branches of a selective kernel": (Selective, 8 + 16 + 3),
    "pixel shuffles": (Shuffled, 32 + 12),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROUGHT)
def test_what_people_brought_is_pruned_exactly_as_far_as_it_goes(name: str) -> None:
    make, prunable = BROUGHT[name]
    torch.manual_seed(0)
    model = make()
    found = ptsim.inspect(model, input_shape=IMAGE)
    assert found.exact
    assert found.prunable_channels == prunable, [(g.name, g.width, g.reason) for g in found.groups]


@pytest.mark.slow
@pytest.mark.parametrize("name", BROUGHT)
def test_what_people_brought_is_pruned_twice_and_rebuilt(name: str) -> None:
    torch.manual_seed(0)
    model = BROUGHT[name][0]().double()
    enliven(model)
    for seed in (1, 2):
        groups = find_groups(model, IMAGE)
        zero_whole(model, groups, seed)
        zeroed = copy.deepcopy(model)
        surgery = reconfigure(model, groups)
        assert surgery.changed
        same_function(model, zeroed, IMAGE)
    fresh = BROUGHT[name][0]().double()
    apply_structure(fresh, structure_of(model))
    fresh.load_state_dict(model.state_dict())
    same_function(fresh, model, IMAGE)


def zero_whole(model: nn.Module, groups: Any, seed: int) -> None:
    """Zero random components by hand; one of every axis stays."""
    generator = torch.Generator().manual_seed(seed)
    chosen = groups.prunable & (torch.rand(groups.num_components, generator=generator) < 0.4)
    for layer in groups.layers:
        chosen[layer.outputs[-1]] = chosen[layer.inputs[-1]] = False
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for layer in groups.layers:
            if layer.decides:
                weight = parameters[layer.weight]
                W = weight.view(layer.groups, -1, *weight.shape[1:])
                W[chosen[layer.outputs].view(layer.groups, -1)] = 0
                for group, gone in enumerate(chosen[layer.inputs].view(layer.groups, -1)):
                    W[group][:, gone] = 0


def test_einops_is_followed() -> None:
    einops, layers = pytest.importorskip("einops"), pytest.importorskip("einops.layers.torch")

    class Patterns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(32, 6, 1), nn.Linear(6, 4)
            self.fold = layers.Rearrange("n c (h p) (w q) -> n (c p q) h w", p=2, q=2)

        def forward(self, x: Tensor) -> Tensor:
            x = einops.rearrange(torch.relu(self.a(x)), "n c h w -> n h w c")
            x = self.b(self.fold(einops.rearrange(x, "n h w c -> n c h w")))
            return self.head(einops.reduce(x, "n c h w -> n c", "mean"))

    found = ptsim.inspect(Patterns(), input_shape=IMAGE)
    assert found.exact
    assert found.prunable_channels == 8 + 6


# ---------------------------------------------------------------------- grouped convolutions


class Grouped(nn.Module):
    """1×1, 3×3 in four groups of three inputs and two outputs, 1×1."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.Conv2d(12, 8, 3, groups=4)
        self.c, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(torch.relu(self.b(torch.relu(self.norm(self.a(x)))))).mean((2, 3)))


class CalledByForward(Grouped):
    """As many ResNeXts of the web are written: the code of torch's own layers is traced, too."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.b.forward(F.relu(self.norm.forward(self.a.forward(x)), inplace=True))
        return self.head.forward(self.c.forward(F.relu(x, inplace=True)).mean((2, 3)))


def sparse_inputs(model: Grouped, channels: list[int]) -> None:
    with torch.no_grad():
        model.a.weight[channels] = 0
        for channel in channels:
            model.b.weight.view(4, 2, 3, 3, 3)[channel // 3, :, channel % 3] = 0


def sparse_outputs(model: Grouped, channels: list[int]) -> None:
    with torch.no_grad():
        model.b.weight[channels] = 0
        model.c.weight[:, channels] = 0


@pytest.mark.parametrize("kind", [Grouped, CalledByForward])
@pytest.mark.parametrize(
    ("inputs", "outputs", "shape", "groups"),
    [
        ([0, 4, 8, 9], [], (8, 2, 3, 3), 4),  # one of every group, at different places
        ([0, 1, 4, 8, 9], [], (8, 2, 3, 3), 4),  # two of the first group: only one of them goes
        ([0, 4, 8], [], (8, 3, 3, 3), 4),  # the last group keeps all: nothing goes
        ([], [0, 3, 4, 6], (4, 3, 3, 3), 4),
        ([0, 1, 2], [0, 1], (6, 3, 3, 3), 3),  # the first group goes as a whole
        ([0, 1, 2, 4, 8, 9], [0, 1, 3, 4, 6], (3, 2, 3, 3), 3),  # and one input and output of every other
        ([0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5], (2, 3, 3, 3), 1),
    ],
)
def test_equal_numbers_of_channels_go_from_every_group(
    kind: type[Grouped], inputs: list[int], outputs: list[int], shape: tuple[int, ...], groups: int
) -> None:
    torch.manual_seed(0)
    model = kind().double()
    enliven(model)
    sparse_inputs(model, inputs)
    sparse_outputs(model, outputs)
    zeroed = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.rand(2, *IMAGE, dtype=torch.float64)).sum().backward()
    optimizer.step()
    model.load_state_dict(zeroed.state_dict())
    before = optimizer.state[model.b.weight]["momentum_buffer"].clone()
    kept = model.b.weight != 0
    surgery = reconfigure(model, find_groups(model, IMAGE), optimizer=optimizer)
    assert model.b.weight.shape == shape
    assert (model.b.groups, model.b.in_channels, model.b.out_channels) == (groups, shape[1] * groups, shape[0])
    same_function(model, zeroed, IMAGE)
    if int(kept.sum()) == model.b.weight.numel():  # else some dead ones stay
        assert torch.equal(optimizer.state[model.b.weight]["momentum_buffer"].flatten(), before[kept].flatten())
    assert not reconfigure(model, surgery.groups).changed
    fresh = kind().double()
    apply_structure(fresh, structure_of(model))
    fresh.load_state_dict(model.state_dict())
    same_function(fresh, model, IMAGE)


def test_the_sparsest_channels_of_a_group_go() -> None:
    model = Grouped().double()
    sparse_inputs(model, [0, 1, 4, 8, 9])
    with torch.no_grad():
        model.a.weight[0] = 5e-5
    reconfigure(model, find_groups(model, IMAGE))
    assert bool((model.a.weight[0] == 5e-5).all())  # of channels 0 and 1 the second was the smaller


def test_sparse_channels_that_stay_so_that_groups_are_equal_are_told() -> None:
    torch.manual_seed(0)
    model = Grouped().double()
    sparse_inputs(model, [0, 1, 4, 8])  # none of the last group
    sparse_outputs(model, [0])  # nor one of the other groups
    surgery = reconfigure(model, find_groups(model, IMAGE))
    told = "5 sparse channels stay, because every group of a convolution has to lose as many as the others: b"
    assert (surgery.changed, surgery.notes) == (False, (told,))
    model = Grouped().double()
    sparse_inputs(model, [0, 4, 8, 9])  # one of every group
    assert reconfigure(model, find_groups(model, IMAGE)).notes == ()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "channels"), [("resnext50_32x4d", 19_008), ("regnet_x_400mf", 12_848)])
def test_as_many_channels_as_torch_pruning_finds(name: str, channels: int) -> None:
    """Counted by Torch-Pruning 1.6.1 on the same networks."""
    groups = find_groups(zoo.create(f"torchvision:{name}"), (3, 64, 64))
    assert groups.num_channels[0] == channels


# ---------------------------------------------------------------------- one weight in several places


class Tied(nn.Module):
    """A decoder with the encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 8, 3, 1, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.b(torch.relu(self.a(x))))
        return self.head(F.conv_transpose2d(y, self.b.weight, padding=1).mean((2, 3)))


class Twofold(Tied):
    """A weight used as it is, and once more with its values changed."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        y = self.b(x) + F.conv2d(x, self.b.weight * 2, padding=1)
        return self.head(F.conv_transpose2d(y, self.b.weight, padding=1).mean((2, 3)))


def test_a_weight_used_in_several_places_is_cut_for_all_of_them() -> None:
    torch.manual_seed(0)
    found = ptsim.inspect(Tied(), input_shape=IMAGE)
    assert found.exact
    assert found.prunable_channels == 6 + 8
    found = ptsim.inspect(Twofold(), input_shape=IMAGE)
    assert found.exact
    assert found.prunable_channels == 8  # each filter is computed from its own part, but what they read has to stay
    assert any("computes its weight" in str(group.reason) for group in found.groups)


class Listed(Tied):
    """Weights that the code takes from a list and from a dict of tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.more = [self.a.weight], {"more": (self.b.weight, None)}

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.first[0], padding=1))
        weight, bias = self.more["more"]
        return self.head(F.conv_transpose2d(F.conv2d(x, weight, bias, padding=1), weight, padding=1).mean((2, 3)))


def test_weights_in_lists_and_dicts_are_cut_there_too() -> None:
    torch.manual_seed(0)
    found = ptsim.inspect(Listed(), input_shape=IMAGE)
    assert (found.exact, found.prunable_channels) == (True, 6 + 8)
    model = Listed().double()
    cut_twice(model, IMAGE)
    assert model.first[0] is model.a.weight
    assert model.more["more"][0] is model.b.weight
    fresh = Listed().double()
    apply_structure(fresh, structure_of(model))
    fresh.load_state_dict(model.state_dict())
    same_function(fresh, model, IMAGE)


class Put(nn.Module):
    def __init__(self, store: dict[str, Any]) -> None:
        super().__init__()
        self.store = store

    def forward(self, x: Tensor) -> Tensor:
        self.store["seen"] = x
        return x


class Add(Put):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.conv2d(self.store["seen"], self.store["weight"])


class Stored(nn.Module):
    """Parts that keep one dict together: of a weight, and of what the first hands to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, 1, 1), nn.Linear(6, 4)
        self.weight = nn.Parameter(torch.randn(6, 8, 1, 1))
        store: dict[str, Any] = {"weight": self.weight, "seen": None}
        self.put, self.add = Put(store), Add(store)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.add(torch.relu(self.b(self.put(torch.relu(self.a(x)))))).mean((2, 3)))


def test_a_dict_that_parts_of_a_network_share_stays_one() -> None:
    torch.manual_seed(0)
    found = ptsim.inspect(Stored(), input_shape=IMAGE)
    assert (found.exact, found.prunable_channels) == (True, 8 + 6)
    model = Stored().double()
    cut_twice(model, IMAGE)
    assert model.put.store is model.add.store
    assert model.put.store["weight"] is model.weight


# ---------------------------------------------------------------------- rules of others


def halved(x: Tensor) -> Tensor:
    """The mean of neighbouring channels: not one of torch's functions."""
    return (x[:, ::2] + x[:, 1::2]) / 2


fx.wrap("halved")


class Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 6, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(halved(self.a(x))).mean((2, 3)))


def test_a_rule_from_outside_makes_an_operator_prunable(monkeypatch: pytest.MonkeyPatch) -> None:
    from ptsim.prune import rules

    reasons = {edge.name: str(edge.reason) for edge in find_groups(Halved(), IMAGE).edges()}
    assert "is not traced" in reasons["a"]
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))

    @rule(halved)
    def pairs(call: Call) -> Label:
        together = call.x.view(-1, 2)
        call.state.unite(together[:, :1], together)
        return together[:, 0].view(1, -1, 1, 1)

    found = ptsim.inspect(Halved(), input_shape=IMAGE)
    assert found.exact
    assert found.prunable_channels == 8 + 6
