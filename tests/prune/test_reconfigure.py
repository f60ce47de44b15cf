"""Pruned equals zeroed: the function, the optimizer's state and BatchNorm survive a reconfiguration."""

import copy

import pytest
import torch
from torch import nn

from ptsim import zoo
from ptsim.errors import UsageError
from ptsim.prune.groups import ChannelGroups, find_groups
from ptsim.prune.reconfigure import reconfigure
from ptsim.prune.structure import apply_structure, structure_of


def zero_some(model: nn.Module, groups: ChannelGroups, fraction: float = 0.4, seed: int = 0) -> torch.Tensor:
    """Zero random components in every producer and consumer; the test's own arithmetic, not the library's."""
    generator = torch.Generator().manual_seed(seed)
    chosen = groups.prunable & (torch.rand(groups.num_components, generator=generator) < fraction)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for layer in groups.layers:
            if layer.depthwise:
                continue
            weight = parameters[layer.weight]
            for index, component in enumerate(layer.outputs.tolist()):
                if chosen[component]:
                    weight[index] = 0
            if layer.groups == 1:
                for index, component in enumerate(layer.inputs.tolist()):
                    if chosen[component]:
                        weight[:, index] = 0
    return chosen


@pytest.mark.parametrize("name", ["resnet20", "vgg11"])
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


def test_a_second_reconfiguration_changes_nothing() -> None:
    model = zoo.create("resnet20")
    groups = find_groups(model, (3, 32, 32))
    zero_some(model, groups)
    surgery = reconfigure(model, groups)
    assert not reconfigure(model, surgery.groups).changed


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


def test_a_structure_of_another_network_is_refused() -> None:
    with pytest.raises(UsageError, match="only in one of them"):
        apply_structure(zoo.create("vgg11"), structure_of(zoo.create("resnet20")))
