"""Channels taken out of tensors, of what is noted on them and of what modules remember: by hand."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ptsim.prune.cut import (
    Cut,
    Replacement,
    cut_model,
    cut_optimizer,
    norms_without_tensors,
    sync_attributes,
    take,
    unwrap,
)
from ptsim.prune.numbers import Attribute


def numbered(*shape: int) -> Tensor:
    """0, 1, 2, …"""
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def kept(**axes: list[int]) -> dict[tuple[str, int], Tensor]:
    """`a_weight_0=[1, 3]`: of axis 0 of a.weight the positions 1 and 3."""
    found = {}
    for name, indices in axes.items():
        tensor, _, dim = name.rpartition("_")
        found[tensor.replace("_", ".", 1), int(dim)] = torch.tensor(indices)
    return found


def test_a_parameter_takes_along_what_is_noted_on_it() -> None:
    model: Any = nn.ModuleDict({"a": nn.Conv2d(2, 4, 1, bias=False), "b": nn.Conv2d(4, 1, 1)})
    old = model.a.weight = nn.Parameter(numbered(4, 2, 1, 1))
    model.again, old.grad = old, 10 * numbered(4, 2, 1, 1)
    old.moment, old.scale, old.word = 100 * numbered(4, 2, 1, 1), torch.ones(3), "kept"
    seen: list[list[float]] = []
    handle = old.register_hook(lambda gradient: seen.append(gradient.flatten().tolist()))
    model.b.weight.requires_grad_(False)
    replacements = cut_model(model, Cut(kept(again_0=[1, 3], again_1=[1], b_weight_1=[1, 3])))
    new = model.a.weight
    assert model.again is new
    assert [(r.old is old, r.new is new) for r in replacements] == [(True, True), (False, False)]
    assert new.flatten().tolist() == [3, 7]
    assert new.grad is not None
    assert new.grad.flatten().tolist() == [30, 70]
    assert new.moment.flatten().tolist() == [300, 700]
    assert (new.scale.tolist(), new.word) == ([1, 1, 1], "kept")
    assert [new.requires_grad, model.b.weight.requires_grad, model.b.bias.requires_grad] == [True, False, True]
    new.sum().backward()
    handle.remove()
    new.sum().backward()
    assert seen == [[1, 1]]
    assert (model.a.in_channels, model.a.out_channels, model.b.in_channels, model.b.out_channels) == (1, 2, 2, 1)


def layers() -> Any:
    """Layers whose numbers of channels hang together with nothing."""
    return nn.ModuleDict(
        {
            "grouped": nn.Conv2d(4, 6, 1, groups=2),
            "up": nn.ConvTranspose2d(4, 8, 1, groups=4),
            "wide": nn.ConvTranspose2d(4, 6, 1),
            "linear": nn.Linear(5, 3),
            "norm": nn.BatchNorm2d(4, affine=False),
            "group": nn.GroupNorm(2, 4),
            "each": nn.InstanceNorm2d(4, affine=True),
            "act": nn.PReLU(4),
            "both": nn.Bilinear(2, 3, 4),
            "bare": nn.BatchNorm2d(4, affine=False, track_running_stats=False),
            "pairs": nn.GroupNorm(2, 4, affine=False),
            "all": nn.GroupNorm(1, 4, affine=False),
        }
    )


def numbers(module: nn.Module) -> list[int]:
    """What a layer remembers of its channels."""
    names = """
        in_channels out_channels groups in_features out_features num_features num_groups num_channels num_parameters
        in1_features
        """
    return [getattr(module, name) for name in names.split() if hasattr(module, name)]


@pytest.mark.parametrize(
    ("layer", "axes", "left"),
    [
        # of the two groups, of three outputs each, the second; of both two outputs; of both groups the second input
        ("grouped", kept(grouped_weight_0=[3, 4, 5], grouped_bias_0=[3, 4, 5]), [2, 3, 1]),
        ("grouped", kept(grouped_weight_0=[0, 1, 4, 5], grouped_bias_0=[0, 1, 4, 5]), [4, 4, 2]),
        ("grouped", {("grouped.weight", -1): torch.tensor([[1]] * 6)}, [2, 6, 2]),
        ("up", kept(up_weight_0=[0, 3], up_bias_0=[0, 1, 6, 7]), [2, 4, 2]),
        ("wide", kept(wide_weight_0=[0, 3, 1], wide_weight_1=[5]), [3, 1, 1]),
        ("linear", kept(linear_weight_0=[2], linear_weight_1=[0, 4]), [2, 1]),
        ("norm", kept(norm_running_mean_0=[0, 2, 3], norm_running_var_0=[0, 2, 3]), [3]),
        ("group", kept(group_weight_0=[2, 3], group_bias_0=[2, 3]), [1, 2]),
        ("each", kept(each_weight_0=[1], each_bias_0=[1]), [1]),
        ("act", kept(act_weight_0=[1, 3]), [2]),
        ("both", kept(both_weight_0=[1, 3], both_bias_0=[1, 3]), [2, 2]),
        ("bare", kept(bare_width_0=[0, 3]), [2]),
        ("pairs", kept(pairs_width_0=[0, 1]), [1, 2]),
    ],
)
def test_a_layer_remembers_how_many_channels_it_has_left(
    layer: str, axes: dict[tuple[str, int], Tensor], left: list[int]
) -> None:
    model = layers()
    before = {name: numbers(module) for name, module in model.items()}
    cut_model(model, Cut(axes))
    assert {name: numbers(module) for name, module in model.items()} == before | {layer: left}


def test_whole_groups_are_gone_where_nobody_says_how_many_there_are() -> None:
    """Of two groups of three outputs the second is left."""
    layer = nn.Conv2d(4, 6, 1, groups=2)
    layer.weight = nn.Parameter(numbered(6, 2, 1, 1)[3:])
    sync_attributes(layer)
    assert numbers(layer) == [2, 3, 1]


def test_normalisations_whose_width_is_a_number_alone_are_those_per_channel() -> None:
    assert [path for path, _ in norms_without_tensors(layers())] == ["bare", "pairs"]


def test_numbers_in_attributes_are_set_with_the_cut() -> None:
    model = layers()
    model.widths = (4, 8)
    cut_model(model, Cut({}, {Attribute("", "widths", 1): 5}))
    assert model.widths == (4, 5)


def test_what_is_kept_of_every_axis() -> None:
    """Outputs 0 and 1 keep their second input, 2 and 3 their first; then output 0 goes."""
    inside = torch.tensor([[1], [1], [0], [0]])
    values = numbered(4, 2, 1, 1)
    assert take(values, {-1: inside}).flatten().tolist() == [1, 3, 4, 6]
    assert take(values, {-1: inside, 0: torch.tensor([1, 2, 3])}).flatten().tolist() == [3, 4, 6]
    assert take(values, {1: torch.tensor([1]), 0: torch.tensor([0, 3])}).flatten().tolist() == [1, 7]
    whole = take(values, {})
    assert torch.equal(whole, values)
    assert whole is not values


class Pair(NamedTuple):
    weight: Tensor
    place: Tensor


def test_what_modules_keep_together_in_lists_and_dicts_stays_together() -> None:
    model: Any = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 1)})
    model.a.register_buffer("place", numbered(3))
    shared = OrderedDict(weight=model.a.weight, last=None)
    model.a.table = model.b.table = shared
    model.b.pairs = [Pair(model.a.weight, model.a.place)]
    model.b.names = names = ["unchanged"]
    cut_model(model, Cut(kept(a_weight_0=[0, 2], a_bias_0=[0, 2], a_place_0=[0, 2], b_weight_1=[0, 2])))
    assert model.a.table is model.b.table
    assert (type(model.a.table), [*model.a.table]) == (OrderedDict, ["weight", "last"])
    assert model.a.table["weight"] is model.a.weight
    assert isinstance(model.b.pairs[0], Pair)
    assert (model.b.pairs[0].weight is model.a.weight, model.b.pairs[0].place is model.a.place) == (True, True)
    assert model.a.place.tolist() == [0, 2]
    assert model.b.names is names
    assert shared["weight"].shape == (3, 2)  # who holds the old list keeps the old weight


def test_an_optimizer_keeps_the_names_and_the_order_of_what_is_left() -> None:
    model: Any = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 1)})
    optimizer = torch.optim.SGD(
        [
            {"params": [("a.weight", model.a.weight), ("b.weight", model.b.weight)], "lr": 0.5},
            {"params": [("a.bias", model.a.bias), ("b.bias", model.b.bias)]},
        ],
        lr=0.1,
        momentum=0.9,
    )
    model.b(model.a(torch.ones(1, 2))).sum().backward()
    optimizer.step()
    momentum = optimizer.state[model.a.weight]["momentum_buffer"].clone()
    cut_optimizer(optimizer, cut_model(model, Cut(kept(a_weight_0=[0, 2], a_bias_0=[0, 2], b_weight_1=[0, 2]))))
    weights, biases = optimizer.param_groups
    assert [id(p) for p in weights["params"]] == [id(model.a.weight), id(model.b.weight)]
    assert [id(p) for p in biases["params"]] == [id(model.a.bias), id(model.b.bias)]
    assert (weights["param_names"], biases["param_names"]) == (["a.weight", "b.weight"], ["a.bias", "b.bias"])
    assert torch.equal(optimizer.state[model.a.weight]["momentum_buffer"], momentum[[0, 2]])
    assert len(optimizer.state) == 4
    cut_optimizer(optimizer, [Replacement(model.a.weight, None, {})])
    assert (weights["param_names"], [id(p) for p in weights["params"]]) == (["b.weight"], [id(model.b.weight)])
    assert len(optimizer.state) == 3


def test_the_network_is_found_inside_of_what_is_around_it() -> None:
    network = nn.Linear(2, 3)
    average = torch.optim.swa_utils.AveragedModel(network)
    assert unwrap(nn.DataParallel(average)) is average.module
    assert unwrap(network) is network
