"""A network whose every weight is sparse keeps its form, and weights that are not trained are left alone."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import ptsim
from ptsim import zoo
from ptsim.prune.criteria.group_lasso import GroupLasso
from ptsim.prune.groups import find_groups
from ptsim.prune.reconfigure import reconfigure
from ptsim.prune.removal import collapsed_layers, find_removals
from tests.prune.helpers import SMALL_IMAGE, same_function, small_resnet


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
