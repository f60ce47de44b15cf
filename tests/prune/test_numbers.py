"""Numbers of channels that a model's own code keeps in attributes follow the cut."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ptsim
from ptsim.errors import UsageError
from ptsim.prune.groups import find_groups
from ptsim.prune.numbers import (
    Attribute,
    Number,
    changed_numbers,
    named_numbers,
    restore_numbers,
    set_numbers,
    solved,
)
from ptsim.prune.reconfigure import reconfigure
from ptsim.prune.structure import apply_structure, structure_of
from tests.prune.helpers import cut_twice, enliven, same_function

IMAGE = (3, 12, 12)


class Net(nn.Module):
    """3 → 16 channels, the block under test, 16 → 8 channels, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 1), nn.Linear(8, 4)

    def block(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.block(torch.relu(self.stem(x)))).mean((2, 3)))


class Unequal(Net):
    """Convolutions with other kernels for 6 and 10 of the channels, as MixNet has them."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = (6, 10)
        self.small, self.large = nn.Conv2d(6, 6, 3, 1, 1, groups=6), nn.Conv2d(10, 10, 5, 1, 2, groups=10)

    def block(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, self.parts, 1)
        return torch.cat([self.small(a), self.large(b)], 1)


class Partial(Net):
    """A convolution for the first 5 channels, the others pass, as FasterNet and GhostNet have it."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.used = 16, 5
        self.conv = nn.Conv2d(5, 5, 3, 1, 1)

    def block(self, x: Tensor) -> Tensor:
        a, b = x.split([self.used, self.width - self.used], dim=1)
        return torch.cat([self.conv(a), b], 1)


class Sliced(Partial):
    def block(self, x: Tensor) -> Tensor:
        rest = self.width - self.used
        return torch.cat([self.conv(x[:, : self.used]), x[:, -rest:]], 1)


class Halves(Net):
    """Two equal halves that are added: channel i of one goes with channel i of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 16
        self.conv = nn.Conv2d(8, 16, 1)

    def block(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, self.width // 2, 1)
        return self.conv(a + b)


class Viewed(Net):
    """The size of a view is an attribute; the number of groups of a fixed filter is another."""

    def __init__(self) -> None:
        super().__init__()
        self.width = self.planes = 16
        self.filter: Tensor
        self.register_buffer("filter", torch.ones(16, 1, 3, 3) / 9)

    def block(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.width
        gate = torch.sigmoid(x.mean((2, 3))).view(-1, self.width, 1, 1)
        return F.conv2d(x * gate, self.filter, groups=self.planes)


# prunable channels by hand: the widths 16 and 8, and what the block adds
NETWORKS: dict[str, tuple[Callable[[], Net], int, str]] = {
    "a split into unequal parts": (Unequal, 16 + 8, "parts"),
    "a split whose sizes are computed": (Partial, 16 + 5 + 8, "used"),
    "slices from both ends": (Sliced, 16 + 5 + 8, "used"),
    "halves": (Halves, 16 + 16 + 8, "width"),
    "a view, an assertion and groups": (Viewed, 16 + 8, "width"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_attribute_follows_the_channels_that_are_left(name: str) -> None:
    make, prunable, _ = NETWORKS[name]
    torch.manual_seed(0)
    found = ptsim.inspect(make(), input_shape=IMAGE)
    assert found.exact
    assert found.prunable_channels == prunable, [(g.name, g.width, g.reason) for g in found.groups]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_cut_twice_and_rebuilt(name: str) -> None:
    torch.manual_seed(0)
    make, _, attribute = NETWORKS[name]
    model = make().double()
    cut_twice(model, IMAGE)
    assert getattr(model, attribute) != getattr(make(), attribute)
    fresh = make().double()
    structure = structure_of(model)
    apply_structure(fresh, structure)
    fresh.load_state_dict(model.state_dict())
    same_function(fresh, model, IMAGE)
    assert structure_of(fresh) == structure


@pytest.mark.slow
def test_a_split_keeps_the_sizes_by_hand() -> None:
    model = Unequal()
    with torch.no_grad():
        for channel in (0, 7, 8, 15):
            model.stem.weight[channel] = 0
            model.last.weight[:, channel] = 0
    reconfigure(model, find_groups(model, IMAGE))
    assert model.parts == (5, 7)
    assert [model.small.groups, model.large.groups] == [5, 7]


class Compared(Partial):
    """The attribute also decides what the code does, so it must not change."""

    def block(self, x: Tensor) -> Tensor:
        return super().block(x) if self.used == 5 else x


class Scaled(Partial):
    """The attribute also enters the arithmetic."""

    def block(self, x: Tensor) -> Tensor:
        return super().block(x) / self.used**0.5


class Multiplied(Partial):
    def block(self, x: Tensor) -> Tensor:
        return super().block(x) * self.used


class Divided(Partial):
    def block(self, x: Tensor) -> Tensor:
        return super().block(x) * (1.0 / self.used)  # Python does not tell the number that it is used


class Uneven(Net):
    """Parts of 6, 6 and 4 channels: the size of the parts is not how many channels the last one has."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 6
        self.conv = nn.Conv2d(6, 6, 1)

    def block(self, x: Tensor) -> Tensor:
        a, b, c = x.split(self.size, 1)
        return torch.cat([self.conv(a), b, c], 1)


def test_the_size_of_the_parts_of_an_uneven_split_stays_where_other_channels_go() -> None:
    model = Uneven().double()
    enliven(model)
    with torch.no_grad():
        for weight in (model.last.weight, model.head.weight.T):
            weight[:2] = 0
    zeroed = copy.deepcopy(model)
    assert reconfigure(model, find_groups(model, IMAGE)).changed
    assert model.size == 6
    assert model.last.weight.shape[0] == 6
    same_function(model, zeroed, IMAGE)


@pytest.mark.parametrize("make", [Compared, Scaled, Multiplied, Divided])
def test_an_attribute_in_other_use_stays(make: type[Partial]) -> None:
    torch.manual_seed(0)
    model = make()
    found = ptsim.inspect(model, input_shape=IMAGE)
    assert found.exact
    assert found.prunable_channels == 5 + 8  # what `conv` reads and the channels beside it must stay
    assert model.used == 5


class Fused(nn.Module):
    """A 3×3 branch and the input itself, each with a norm; `deploy` makes one convolution of them, as RepVGG does."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.in_channels, self.groups, self.depth = width, groups, width
        self.conv = nn.Conv2d(width, width, 3, 1, 1, groups=groups, bias=False)
        self.norm, self.same, self.one = nn.BatchNorm2d(width), nn.BatchNorm2d(width), None

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)) + self.same(x) if self.one is None else self.one(x))

    def deploy(self) -> None:
        inside = self.in_channels // self.groups
        places = torch.arange(self.in_channels)
        same = torch.zeros(self.in_channels, inside, 3, 3, dtype=torch.float64)
        same[places, places % inside, 1, 1] = 1
        one = nn.Conv2d(self.in_channels, self.in_channels, 3, 1, 1, groups=self.groups, dtype=torch.float64)
        with torch.no_grad():
            scales = [norm.weight / (norm.running_var + norm.eps).sqrt() for norm in (self.norm, self.same)]
            shifts = [
                norm.bias - norm.running_mean * scale
                for norm, scale in zip((self.norm, self.same), scales, strict=True)
            ]
            one.weight.copy_(self.conv.weight * scales[0].view(-1, 1, 1, 1) + same * scales[1].view(-1, 1, 1, 1))
            one.bias.copy_(shifts[0] + shifts[1])
        self.one = one


class Deployed(Net):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.first, self.second = Fused(16, 1), Fused(16, groups)

    def block(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 4, 16])
def test_numbers_that_only_another_method_reads_follow_the_layers(groups: int) -> None:
    torch.manual_seed(0)
    model = Deployed(groups).double()
    enliven(model)
    gone = [1, 6, 8, 13] if groups == 4 else [1, 2, 8]  # of four groups one channel each
    with torch.no_grad():
        for part in (model.first, model.second):
            part.conv.weight[gone] = 0
            if part.groups == 1:
                part.conv.weight[:, gone] = 0
            elif part.groups == 4:
                for channel in gone:
                    part.conv.weight[channel // 4 * 4 : channel // 4 * 4 + 4, channel % 4] = 0
        model.stem.weight[gone], model.last.weight[:, gone] = 0, 0
    zeroed = copy.deepcopy(model)
    assert reconfigure(model, find_groups(model, IMAGE)).changed
    left = 16 - len(gone)
    assert (model.first.in_channels, model.second.in_channels) == (left, left)
    assert (model.first.groups, model.second.groups) == (1, left if groups == 16 else groups)
    assert model.first.depth == 16  # under no layer's name: as it was made
    fresh = Deployed(groups).double()
    apply_structure(fresh, structure_of(model))
    fresh.load_state_dict(model.state_dict())
    images = torch.rand(2, *IMAGE, dtype=torch.float64)
    expected = zeroed.eval()(images)
    for network in (model.eval(), fresh.eval()):
        network.first.deploy()
        network.second.deploy()
        torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-12)


class Asked(Deployed):
    """Its code names the attribute, and computes with it."""

    def block(self, x: Tensor) -> Tensor:
        return super().block(x) * (1.0 / self.first.in_channels)


def test_a_number_that_the_code_names_is_not_set_by_its_name() -> None:
    torch.manual_seed(0)
    model = Asked(1).double()
    enliven(model)
    with torch.no_grad():
        for part in (model.first, model.second):
            part.conv.weight[[1, 2]], part.conv.weight[:, [1, 2]] = 0, 0
        model.stem.weight[[1, 2]], model.last.weight[:, [1, 2]] = 0, 0
    zeroed = copy.deepcopy(model)
    assert reconfigure(model, find_groups(model, IMAGE)).changed
    assert (model.first.in_channels, model.first.conv.in_channels) == (16, 14)
    same_function(model, zeroed, IMAGE)


def test_a_structure_with_an_unknown_attribute_is_refused() -> None:
    structure = structure_of(Unequal()) | {"numbers": {"sizes": [5, 7]}}
    with pytest.raises(UsageError, match="no sizes"):
        apply_structure(Unequal(), structure)
    with pytest.raises(UsageError, match="parts"):
        apply_structure(Unequal(), structure | {"numbers": {"parts": 7}})


USED, WIDTH = Attribute("", "used"), Attribute("", "width")


@pytest.mark.parametrize(
    ("compute", "at_6"),
    [
        (lambda n: n + 3, 9),
        (lambda n: 3 + n, 9),
        (lambda n: n - 3, 3),
        (lambda n: 16 - n, 10),
        (lambda n: n * 2, 12),
        (lambda n: 2 * n, 12),
        (lambda n: n // 2, 3),
        (lambda n: -n, -6),
        (lambda n: (n + 1) * 2, 14),
        (lambda n: 20 - (n - 3) // 3, 19),
    ],
)
def test_what_code_computes_from_an_attribute_is_followed_there_and_back(
    compute: Callable[[int], int], at_6: int
) -> None:
    number = compute(Number.of(8, USED, set()))
    assert isinstance(number, Number)
    assert int(number) == compute(8)
    assert number.given({}) == compute(8)
    assert number.given({USED: 6}) == at_6
    assert number.solved(at_6, {}) == 6


def test_attributes_are_set_as_far_as_there_are_numbers_that_fit() -> None:
    fixed: set[Attribute] = set()
    used, width = Number.of(5, USED, fixed), Number.of(16, WIDTH, fixed)
    assert (width - used).sources() == {USED, WIDTH}
    assert solved([(width - used, 9), (used, 4)]) == {USED: 4, WIDTH: 13}  # the one that hangs on nothing else first
    assert solved([(used, 5)]) == {}  # as it is
    assert solved([(used * 2, 7)]) == {}  # twice no number
    assert solved([(used - 8, -9)]) == {}  # not less than nothing
    assert solved([(used, 4), (used * 2, 6)]) == {USED: 4}  # the first one that says it
    width.fix()
    assert solved([(width - used, 9), (used, 4)]) == {USED: 4}


def test_numbers_in_lists_and_in_parts_of_a_network_are_written_and_read_back() -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(Unequal(), Partial())

    model, fresh = build(), build()
    set_numbers(model, {Attribute("0", "parts", 1): 7, Attribute("1", "used"): 3})
    assert changed_numbers(model) == {"0.parts": [6, 7], "1.used": 3}
    restore_numbers(fresh, changed_numbers(model))
    for network in (model, fresh):
        assert (network[0].parts, network[1].used, network[1].width) == ((6, 7), 3, 16)
    assert changed_numbers(fresh) == changed_numbers(model)


def test_numbers_stand_in_for_attributes_meanwhile_and_a_comparison_fixes_all_it_hangs_on() -> None:
    model = Partial()
    with named_numbers(model) as fixed:
        assert isinstance(model.used, Number)
        layers = {
            Attribute(name, number)
            for name, layer in model.named_children()
            for number in ("groups", "in_channels", "out_channels", "in_features", "out_features")
            if hasattr(layer, number)
        }
        rest = model.width - model.used
        assert fixed == layers  # which what cuts a layer sets
        assert rest > 3
        assert fixed == layers | {Attribute("", "used"), Attribute("", "width")}
    assert (type(model.used), type(model.width)) == (int, int)
