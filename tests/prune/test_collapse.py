"""A network whose every weight is sparse keeps its form, and weights that are not trained are left alone."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ptsim
from ptsim import zoo
from ptsim.prune.criteria.group_lasso import GroupLasso
from ptsim.prune.groups import find_groups
from ptsim.prune.reconfigure import reconfigure
from ptsim.prune.removal import collapsed_layers, find_removals
from ptsim.prune.structure import apply_structure, structure_of
from ptsim.prune.trajectories.build import dense_network
from tests.prune.helpers import SMALL_IMAGE, enliven, same_function, small_resnet


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "resnet50", "vgg11"])
def test_a_network_without_a_weight_above_the_threshold_still_gives_one_output_per_image(name: str) -> None:
    torch.manual_seed(0)
    model = zoo.create(name, num_classes=10).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.zero_()
    zeroed = copy.deepcopy(model)
    surgery = reconfigure(model, find_groups(model, (3, 32, 32)))
    assert surgery.collapsed
    assert "the network has collapsed" in surgery.notes[0]
    assert "lower penalty ratio" in surgery.notes[0]
    same_function(model, zeroed, (3, 32, 32))
    again = reconfigure(model, surgery.groups)
    assert again.collapsed
    same_function(model, zeroed, (3, 32, 32))


def test_the_other_operand_of_a_sum_stays_when_the_first_has_gone_earlier() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3)
            self.branch = nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 1))
            self.short, self.head = nn.Conv2d(4, 6, 1), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head((self.branch(x) + self.short(x)).mean((2, 3)))

    model = Projected().double()
    nn.init.zeros_(model.branch[0].weight), nn.init.zeros_(model.branch[3].weight)
    surgery = reconfigure(model, find_groups(model, (3, 8, 8)))
    assert surgery.layers_removed == ("branch.0", "branch.3")
    assert not surgery.collapsed
    nn.init.zeros_(model.short.weight), nn.init.zeros_(model.stem.weight)
    zeroed = copy.deepcopy(model)
    surgery = reconfigure(model, surgery.groups)
    assert surgery.collapsed
    assert "stem" in surgery.notes[0]
    same_function(model, zeroed, (3, 8, 8))


def test_one_dead_branch_is_no_collapse() -> None:
    model = small_resnet()
    for name in ("blocks.0.a", "blocks.0.b", "blocks.1.b"):
        nn.init.zeros_(model.get_parameter(f"{name}.weight"))
    assert not reconfigure(model, find_groups(model, SMALL_IMAGE)).collapsed


def added(x: Tensor, y: Tensor) -> Tensor:
    y.add_(x)
    return torch.relu(y)


def assigned(x: Tensor, y: Tensor) -> Tensor:
    y[:, :, 1:] = x[:, :, 1:]
    return y


def added_to_a_view(x: Tensor, y: Tensor) -> Tensor:
    y.view(y.shape[0], -1).add_(x.flatten(1))
    return y


@pytest.mark.parametrize("join", [added, assigned, added_to_a_view])
def test_a_dead_branch_into_which_the_stream_is_written_is_no_collapse(
    join: Callable[[Tensor, Tensor], Tensor],
) -> None:
    class Written(Chain):
        def branch(self, x: Tensor) -> Tensor:
            return self.three(torch.relu(self.one(x)))

        def joined(self, x: Tensor, y: Tensor) -> Tensor:
            return join(x, y)

    model = lively(Written, "one", "three")
    zeroed = copy.deepcopy(model)
    assert not reconfigure(model, find_groups(model, (3, 4, 4))).collapsed
    same_function(model, zeroed, (3, 4, 4))


class Plain(nn.Module):
    """A fixed bank of filters in front of three convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.bank: Tensor
        self.register_buffer("bank", torch.randn(6, 3, 3, 3))
        self.a, self.b, self.c = nn.Conv2d(6, 5, 3), nn.Conv2d(5, 4, 3), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(nn.functional.conv2d(x, self.bank)))
        return self.head(torch.relu(self.c(torch.relu(self.b(x)))).mean((2, 3)))


@pytest.mark.parametrize("step", ["gradient", "proximal"])
def test_frozen_weights_are_not_penalised_and_their_channels_stay(step: str) -> None:
    model = Plain().double()
    model.b.requires_grad_(False)
    before = copy.deepcopy(model.b)
    groups = find_groups(model, (3, 8, 8))
    reasons = {edge.name: str(edge.reason) for edge in groups.edges()}
    assert reasons["a"] == reasons["b"] == "b is frozen: its weights are not trained"
    lasso = GroupLasso(model, groups)
    assert {layer.layer for layer, *_ in lasso.terms} == {"a", "c", "head"}
    lasso.add_gradient(1.0) if step == "gradient" else lasso.proximal_step(1e9)
    assert model.b.weight.grad is None
    nn.init.zeros_(model.b.weight)  # even then: what is not trained decides nothing
    reconfigure(model, groups)
    assert model.b.weight.shape == before.weight.shape


def test_a_branch_with_a_frozen_layer_is_not_removed() -> None:
    model = small_resnet()
    nn.init.zeros_(model.get_parameter("blocks.0.a.weight"))
    model.get_submodule("blocks.0.b").requires_grad_(False)
    frozen = model.get_parameter("blocks.0.b.weight").clone()
    zeroed = copy.deepcopy(model)
    assert reconfigure(model, find_groups(model, SMALL_IMAGE)).layers_removed == ()
    assert torch.equal(model.get_parameter("blocks.0.b.weight"), frozen)
    same_function(model, zeroed, SMALL_IMAGE)


@pytest.mark.slow
def test_a_fixed_filter_bank_loses_the_outputs_that_nothing_reads() -> None:
    model = Plain().double()
    groups = find_groups(model, (3, 8, 8))
    assert {layer.layer for layer, *_ in GroupLasso(model, groups).terms} == {"a", "b", "c", "head"}
    nn.init.zeros_(model.a.weight[:, 2:4])
    zeroed = copy.deepcopy(model)
    reconfigure(model, groups)
    assert model.bank.shape == (4, 3, 3, 3)
    same_function(model, zeroed, (3, 8, 8))
    assert ptsim.inspect(model, input_shape=(3, 8, 8)).exact


def test_what_a_fixed_filter_reads_stays() -> None:
    """A channel that is zero but for its bias reaches the filter as a constant."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Conv2d(3, 4, 1), nn.Linear(5, 2)
            self.bank: Tensor
            self.register_buffer("bank", torch.randn(5, 4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(nn.functional.conv2d(self.a(x), self.bank).mean((2, 3)))

    edges = {edge.name: edge for edge in find_groups(Fixed(), (3, 4, 4)).edges()}
    assert "fixed filter" in str(edges["a"].reason)
    assert any(edge.prunable for edge in edges.values())


class Branch(nn.Module):
    """A residual branch of two convolutions, which may end in a BatchNorm and a hyperbolic tangent."""

    def __init__(self, norm: bool, tanh: bool) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)
        self.norm, self.head = nn.BatchNorm2d(6) if norm else None, nn.Linear(6, 2)
        self.tanh = tanh

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.outer(torch.relu(self.inner(x)))
        y = y if self.norm is None else self.norm(y)
        y = torch.tanh(y) if self.tanh else y
        return self.head((x + y).mean((2, 3)))


@pytest.mark.parametrize(
    ("norm", "tanh", "expected"),
    [
        (True, False, ({"inner", "outer"}, "norm", "outer", False)),
        (True, True, ({"inner", "outer"}, "norm", "outer", True)),  # the tangent needs the constant at full size
        (False, False, ({"inner"}, "outer", None, False)),
    ],
)
def test_a_branch_goes_from_its_empty_edge_to_the_layer_that_gives_its_constant(
    norm: bool, tanh: bool, expected: tuple[set[str], str, str | None, bool]
) -> None:
    groups = find_groups(Branch(norm, tanh), (3, 4, 4))
    sparse = torch.zeros(groups.num_components, dtype=torch.bool)
    inside = groups.axes["inner.weight", 0]
    sparse[inside[:-1]] = True
    assert find_removals(groups, sparse) == ()  # one channel is left
    sparse[inside] = True
    (found,) = find_removals(groups, sparse)
    assert (set(found.dead), found.constant, found.before, found.full) == expected


@pytest.mark.parametrize(
    ("largest", "dead"), [(0.99e-4, ("0",)), (-0.99e-4, ("0",)), (1e-4, ()), (-1e-4, ()), (math.nan, ())]
)
def test_a_layer_that_cuts_the_image_off_has_no_weight_that_reaches_the_threshold(
    largest: float, dead: tuple[str, ...]
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(80, 2)).double()
    nn.init.zeros_(model[0].weight)
    with torch.no_grad():
        model[0].weight[1, 2] = largest
    assert collapsed_layers(model, find_groups(model, (3, 4, 4)), 1e-4) == dead


class Chain(nn.Module):
    """A stem, a residual branch of three convolutions that a test may change, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 1), nn.Linear(6, 2)
        self.one, self.two, self.three = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 6, 1)
        self.norm, self.after = nn.BatchNorm2d(4), nn.BatchNorm2d(6)

    def branch(self, x: Tensor) -> Tensor:
        return self.after(self.three(torch.relu(self.norm(self.two(torch.relu(self.one(x)))))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.joined(x, self.branch(x)).mean((2, 3)))

    def joined(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def lively(kind: type[nn.Module], *dead: str) -> nn.Module:
    """In float64, with all weights of the layers `dead` at zero, and constants that are not."""
    torch.manual_seed(0)
    model = kind().double()
    enliven(model)
    for name in dead:
        nn.init.zeros_(model.get_parameter(f"{name}.weight"))
    return model


def test_a_branch_stays_while_a_layer_behind_its_empty_edge_passes_something_on() -> None:
    """`three` still reads what `norm` makes of nothing, its shift: what it gives is not its bias."""
    model = lively(Chain, "one", "two")
    zeroed = copy.deepcopy(model)
    surgery = reconfigure(model, find_groups(model, (3, 4, 4)))
    assert surgery.layers_removed == ()
    assert model.get_parameter("one.weight").shape[0] == 1
    assert model.get_parameter("three.weight").shape[1] == 4
    same_function(model, zeroed, (3, 4, 4))
    for network in (model, zeroed):
        nn.init.zeros_(network.get_parameter("three.weight"))
    assert reconfigure(model, surgery.groups).layers_removed == ("one", "two", "three")
    same_function(model, zeroed, (3, 4, 4))


def test_a_plan_keeps_a_branch_as_long_as_a_run_does() -> None:
    """Four channels in front of `two`, of which the last one stays, and four behind it, with which the branch goes."""
    dense = dense_network(Chain, name="n", input_shape=(3, 4, 4), num_classes=2)
    assert [(edge.name, edge.width, edge.removable) for edge in dense.edges] == [
        ("stem", 6, False), ("one", 4, False), ("two", 4, True)
    ]  # fmt: skip
    steps = list(dense.reconfigured(np.array([[6, 0, 4], [6, 0, 0]])))
    assert [(step.channels_removed, step.layers_removed) for step in steps] == [(3, ()), (5, ("one", "two", "three"))]
    assert steps[0].notes == ("one: every channel is sparse; one is kept",)


class Projected(Chain):
    """The stem is read by the branch and by a short-cut, which would be constant without it."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(6, 6, 1)

    def joined(self, x: Tensor, y: Tensor) -> Tensor:
        return self.project(x) + y


def test_an_edge_between_layers_that_stay_keeps_a_channel() -> None:
    dense = dense_network(Projected, name="n", input_shape=(3, 4, 4), num_classes=2)
    assert [edge.name for edge in dense.edges if edge.removable] == ["two"]


class NormLast(Chain):
    """Convolution, activation, BatchNorm: what the norm takes is not the bias."""

    def branch(self, x: Tensor) -> Tensor:
        return self.after(torch.relu(self.three(torch.relu(self.one(x)))))


class NormUpsampled(Chain):
    """A transposed convolution in front of the last BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.three = nn.ConvTranspose2d(4, 6, 1)

    def branch(self, x: Tensor) -> Tensor:
        return self.after(self.three(torch.relu(self.one(x))))


class NormOfPlaces(Chain):
    """Linear layers on 16 places of 16 features, and a BatchNorm of the places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.three = nn.Conv2d(3, 16, 1), nn.Linear(16, 4), nn.Linear(4, 16)
        self.after, self.head = nn.BatchNorm1d(16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head((x + self.after(self.three(torch.relu(self.one(x))))).mean(1))


class WithContext(Chain):
    """The other operand of the sum is of one pixel, and the border of what reads the sum counts."""

    def __init__(self) -> None:
        super().__init__()
        self.context, self.last = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3, padding=1)

    def branch(self, x: Tensor) -> Tensor:
        return self.three(torch.relu(self.one(x)))

    def joined(self, x: Tensor, y: Tensor) -> Tensor:
        return self.last(y + self.context(x.mean((2, 3), keepdim=True)))


class Short(Chain):
    """A branch of two convolutions and a BatchNorm, which can go."""

    def branch(self, x: Tensor) -> Tensor:
        return self.after(self.three(torch.relu(self.one(x))))


def the_branch_goes(kind: type[Chain]) -> None:
    """Its layers are removed, and the network computes what it did."""
    model = lively(kind, "one", "three")
    zeroed = copy.deepcopy(model)
    assert reconfigure(model, find_groups(model, (3, 4, 4))).layers_removed == ("one", "three")
    same_function(model, zeroed, (3, 4, 4))


@pytest.mark.parametrize(
    "join",
    [torch.add, lambda x, y: x.add(y, alpha=2), lambda x, y: x.add_(y), lambda x, y: y.__add__(x)],
)
def test_a_sum_is_one_however_it_is_written(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Written(Short):
        def joined(self, x: Tensor, y: Tensor) -> Tensor:
            return join(x, y)

    the_branch_goes(Written)


class PooledRow(Chain):
    """A branch of rows of values, every second window of three."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three, self.after = nn.Conv1d(6, 4, 1), nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6)
        self.pool = nn.MaxPool1d(3, 2)

    def branch(self, x: Tensor) -> Tensor:
        return torch.tanh(self.after(self.three(self.pool(torch.relu(self.one(x))))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2)
        return self.head((nn.functional.max_pool1d(x, 3, 2) + self.branch(x)).mean(2))


class PooledVolume(PooledRow):
    """A branch of volumes of two images, which a pool of one number halves in every axis."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three, self.after = nn.Conv3d(6, 4, 1), nn.Conv3d(4, 6, 1), nn.BatchNorm3d(6)
        self.pool = nn.AvgPool3d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([self.stem(x)] * 2, 2)
        return self.head((nn.functional.avg_pool3d(x, 2) + self.branch(x)).mean((2, 3, 4)))


class PooledByNorm(Short):
    """Windows that lie side by side, without a stride of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.LPPool2d(1, 2)

    def branch(self, x: Tensor) -> Tensor:
        return torch.tanh(self.after(self.three(self.pool(torch.relu(self.one(x))))))

    def joined(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 2) + y


@pytest.mark.parametrize("kind", [PooledRow, PooledVolume, PooledByNorm])
def test_a_branch_with_a_pool_goes_and_its_constant_has_the_pools_size(kind: type[Chain]) -> None:
    the_branch_goes(kind)


class Sloped(Short):
    """Slopes of the inner channels, which no activation without them needs."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.PReLU(4)

    def branch(self, x: Tensor) -> Tensor:
        return self.after(self.three(self.act(self.one(x))))


def test_the_slopes_of_a_removed_branch_go_and_training_goes_on() -> None:
    model = lively(Sloped, "one", "three")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    zeroed = copy.deepcopy(model)
    surgery = reconfigure(model, find_groups(model, (3, 4, 4)), optimizer=optimizer)
    assert surgery.layers_removed == ("one", "three")
    assert model.get_parameter("act.weight").numel() == 0
    same_function(model, zeroed, (3, 4, 4))
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.rand(2, 3, 4, 4, dtype=torch.float64)).sum().backward()
        optimizer.step()
    assert not reconfigure(model, find_groups(model, (3, 4, 4)), optimizer=optimizer).changed
    fresh = lively(Sloped)
    apply_structure(fresh, structure_of(model))
    fresh.load_state_dict(model.state_dict())
    same_function(fresh, model, (3, 4, 4))


class ReadInEvaluation(Chain):
    """Evaluation reads what the branch gives once more, with a layer for which the border counts."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(6, 2, 3, padding=1)

    def branch(self, x: Tensor) -> Tensor:
        return self.three(torch.relu(self.one(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.branch(x)
        out = self.head((x + y).mean((2, 3)))
        return out if self.training else out + self.last(y).mean((2, 3))


class FrozenNorm(Short):
    """Keeps its BatchNorms in evaluation mode, as people do who fine-tune with few images."""

    def train(self, mode: bool = True) -> "FrozenNorm":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class ByKind(Chain):
    """An activation behind every layer of a kind, which what pruning puts in is not."""

    def branch(self, x: Tensor) -> Tensor:
        for layer in (self.one, self.three):
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                x = torch.relu(x)
        return x


class ByDtype(Chain):
    """Code that asks a layer for its weight."""

    def branch(self, x: Tensor) -> Tensor:
        return self.three(torch.relu(self.one(x.to(self.one.weight.dtype))))


@pytest.mark.parametrize(
    ("kind", "note"),
    [
        (NormLast, "one: every channel is sparse; one is kept"),
        (NormUpsampled, "one: every channel is sparse; one is kept"),
        (NormOfPlaces, "one: every channel is sparse; one is kept"),
        (WithContext, "one: every channel is sparse; one is kept"),
        (ReadInEvaluation, "one: every channel is sparse; one is kept"),
        (FrozenNorm, "after: the branch keeps a channel, its BatchNorm stays in evaluation mode"),
        (ByKind, "three: the branch keeps a channel, without it the code would fail or do another thing"),
        (ByDtype, "three: the branch keeps a channel, without it the code would fail or do another thing"),
    ],
)
def test_a_branch_that_a_constant_cannot_stand_for_keeps_a_channel(kind: type[Chain], note: str) -> None:
    model = lively(kind, "one", "three")
    zeroed = copy.deepcopy(model)
    surgery = reconfigure(model, find_groups(model, (3, 4, 4)))
    assert surgery.layers_removed == ()
    assert note in surgery.notes
    assert model.get_parameter("one.weight").shape[0] == 1
    same_function(model, zeroed, (3, 4, 4))


@pytest.mark.parametrize(("frozen", "gone"), [(False, ("one", "three")), (True, ())])
def test_a_norm_that_the_loop_keeps_in_evaluation_mode_keeps_its_branch(frozen: bool, gone: tuple[str, ...]) -> None:
    model = lively(Short, "one", "three").train()
    model.get_submodule("after").train(not frozen)
    assert reconfigure(model, find_groups(model, (3, 4, 4))).layers_removed == gone
    asleep = lively(Short, "one", "three").eval()  # as a whole: that says nothing of the norm
    assert reconfigure(asleep, find_groups(asleep, (3, 4, 4))).layers_removed == ("one", "three")


class Tied(Chain):
    """A second branch, whose first convolution has the weights of the first one's."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.fourth, self.fifth = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 1)
        self.again.weight = self.one.weight

    def joined(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + y
        return x + self.fifth(torch.relu(self.fourth(torch.relu(self.again(x)))))


def test_a_weight_that_another_layer_shares_stays_in_the_optimizer() -> None:
    model = lively(Tied, "two", "three")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    zeroed = copy.deepcopy(model)
    assert reconfigure(model, find_groups(model, (3, 4, 4)), optimizer=optimizer).layers_removed == (
        "one", "two", "three",
    )  # fmt: skip
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    same_function(model, zeroed, (3, 4, 4))
