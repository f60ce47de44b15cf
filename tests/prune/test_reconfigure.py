"""Pruned equals zeroed: the function, the optimizer's state and BatchNorm survive a reconfiguration."""

import copy

import pytest
import torch
from torch import nn

from ptsim import zoo
from ptsim.errors import UsageError
from ptsim.prune.cut import take
from ptsim.prune.groups import find_groups
from ptsim.prune.reconfigure import reconfigure
from ptsim.prune.structure import apply_structure, structure_of
from tests.prune.helpers import SMALL_IMAGE, small_resnet, zero_some


@pytest.mark.parametrize("name", ["resnet20", pytest.param("vgg11", marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [False, True])
def test_the_pruned_network_equals_the_zeroed_one_in_both_modes(name: str, training: bool) -> None:
    torch.manual_seed(0)
    entry = zoo.find(name)
    model = entry.build(num_classes=10).double()
    groups = find_groups(model, entry.input_shape)
    zero_some(model, groups)
    zeroed = copy.deepcopy(model)
    surgery = reconfigure(model, groups)
    assert surgery.changed
    assert surgery.channels_removed > 0
    images = torch.rand(4, *entry.input_shape, dtype=torch.float64)
    model.train(training), zeroed.train(training)
    torch.testing.assert_close(model(images), zeroed(images), rtol=1e-9, atol=1e-12)


def test_every_output_channel_that_goes_counts_whatever_goes_with_it() -> None:
    """One channel of the residual stream is written by the stem and three blocks; another is inside a block."""
    model = small_resnet()
    with torch.no_grad():
        for writer in (model.stem, *(block.b for block in model.blocks)):
            writer.weight[4] = 0
        for reader in (model.head, *(block.a for block in model.blocks)):
            reader.weight[:, 4] = 0
        model.blocks[1].a.weight[2], model.blocks[1].b.weight[:, 2] = 0, 0
    surgery = reconfigure(model, find_groups(model, SMALL_IMAGE))
    assert (surgery.channels_removed, surgery.layers_removed) == (4 + 1, ())
    assert (model.stem.out_channels, model.blocks[1].a.out_channels, model.head.in_features) == (11, 7, 11)


@pytest.mark.slow
def test_a_second_reconfiguration_changes_nothing() -> None:
    model = zoo.create("resnet20")
    groups = find_groups(model, (3, 32, 32))
    zero_some(model, groups)
    surgery = reconfigure(model, groups)
    assert not reconfigure(model, surgery.groups).changed


@pytest.mark.slow
def test_a_pruned_network_is_rebuilt_from_its_structure() -> None:
    model = zoo.create("resnet20")
    groups = find_groups(model, (3, 32, 32))
    zero_some(model, groups)
    reconfigure(model, groups)
    fresh = zoo.create("resnet20")
    apply_structure(fresh, structure_of(model))
    fresh.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(fresh.eval()(images), model.eval()(images))


class Shared(nn.Module):
    """Two depthwise layers with one weight, two normalisations with one pair of statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(6, 4)
        self.one, self.two = (nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False) for _ in range(2))
        self.first, self.second = (nn.BatchNorm2d(8, affine=False) for _ in range(2))
        self.two.weight = self.one.weight
        self.second.running_mean, self.second.running_var = self.first.running_mean, self.first.running_var

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.one(self.stem(x)))
        return self.head(self.last(torch.relu(self.second(self.two(x)))).mean((2, 3)))


def test_layers_that_share_their_tensors_are_rebuilt_alike() -> None:
    torch.manual_seed(0)
    model, fresh = Shared().double(), Shared().double()
    groups = find_groups(model, (3, 8, 8))
    zero_some(model, groups, 0.4, seed=0)
    left = 8 - int(reconfigure(model, groups).removed[groups.axes["stem.weight", 0]].sum())
    assert left < 8
    apply_structure(fresh, structure_of(model))
    fresh.load_state_dict(model.state_dict())
    for layer in (fresh.one, fresh.two):
        assert (layer.groups, layer.in_channels, layer.out_channels) == (left, left, left)
    assert (fresh.first.num_features, fresh.second.num_features) == (left, left)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(model(images), fresh(images))


def test_a_structure_of_another_network_is_refused() -> None:
    with pytest.raises(UsageError, match="only in one of them"):
        apply_structure(zoo.create("vgg11"), structure_of(zoo.create("resnet20")))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_tensor_without_storage_is_cut_to_the_shape_and_layout_of_one_with(layout: torch.memory_format) -> None:
    weight = torch.rand(8, 4, 3, 3).contiguous(memory_format=layout)
    rows, inside = torch.tensor([0, 2, 5]), torch.tensor([[0, 3]] * 4 + [[1, 2]] * 4)
    for kept in ({0: rows}, {1: torch.tensor([1, 2])}, {0: rows, 1: torch.tensor([3])}, {-1: inside, 0: rows}, {}):
        real, shapes = take(weight, kept), take(weight.to("meta"), kept)
        assert (real.shape, real.stride(), real.dtype) == (shapes.shape, shapes.stride(), shapes.dtype)
