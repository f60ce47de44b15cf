"""Criteria beside the group lasso: network slimming, and one that somebody else's package brings."""

import copy
import functools
import importlib.metadata

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ptsim
from ptsim.costs.datasheet import datasheet_step
from ptsim.criteria import CRITERIA, PenaltyWork, penalty_work
from ptsim.errors import UnknownNameError, UsageError
from ptsim.hardware.catalog import load_device
from ptsim.network import LayerKind
from ptsim.prune.criteria.slimming import Slimming
from ptsim.prune.groups import find_groups
from ptsim.prune.reconfigure import reconfigure
from ptsim.setting import StepSetting
from tests.prune.helpers import SMALL_IMAGE, enliven, small_resnet


def silenced(model, groups, fraction=0.4):
    """A model some of whose channels have γ = β = 0 in every BatchNorm of their component: by hand."""
    generator = torch.Generator().manual_seed(3)
    chosen = groups.prunable & (torch.rand(groups.num_components, generator=generator) < fraction)
    with torch.no_grad():
        for path, module in model.named_modules():
            components = groups.axes.get((f"{path}.weight", 0))
            if isinstance(module, nn.BatchNorm2d) and components is not None:
                module.weight[chosen[components]] = 0
                module.bias[chosen[components]] = 0
    return chosen


@pytest.mark.parametrize("training", [True, False])
def test_what_slimming_takes_out_changes_nothing_of_the_function(training):
    torch.manual_seed(0)
    model = small_resnet().double()
    enliven(model)
    groups = find_groups(model, SMALL_IMAGE)
    silenced(model, groups)
    dense = copy.deepcopy(model)
    surgery = reconfigure(model, groups, importance_of=Slimming.importance)
    assert surgery.channels_removed > 0
    images = torch.rand(4, *SMALL_IMAGE, dtype=torch.float64)
    ours, theirs = model.train(training)(images), dense.train(training)(images)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_channel_that_is_not_silent_at_zero_stays():
    """sigmoid(0) is a half: the consumer hears it, so γ = β = 0 does not make the channel superfluous."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip
    with torch.no_grad():
        for norm in (model[1], model[4]):
            norm.weight[:2] = norm.bias[:2] = 0
    groups = find_groups(model, SMALL_IMAGE)
    reconfigure(model, groups, importance_of=Slimming.importance)
    assert (model[0].out_channels, model[3].out_channels) == (4, 3)


def test_the_gradient_is_the_sign_and_the_proximal_step_a_soft_threshold():
    model = small_resnet()
    enliven(model)
    criterion = Slimming(model, find_groups(model, SMALL_IMAGE))
    (0.3 * criterion.penalty()).backward()
    expected = [weight.grad.clone() for weight in criterion.weights]
    model.zero_grad()
    criterion.add_gradient(0.3)
    for weight, gradient in zip(criterion.weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)
    weight = criterion.weights[0]
    with torch.no_grad():
        weight[:3] = torch.tensor([0.5, -0.05, -0.4], dtype=torch.float64)
    criterion.proximal_step(0.1)
    torch.testing.assert_close(weight[:3].detach(), torch.tensor([0.4, 0.0, -0.3], dtype=torch.float64))


@pytest.mark.slow
def test_traffic_is_three_accesses_to_every_scale():
    network = ptsim.capture.network.capture_network(small_resnet(), name="n", input_shape=SMALL_IMAGE, num_classes=5)
    channels = sum(layer.out_channels for layer in network.layers if layer.kind is LayerKind.BATCH_NORM)
    assert Slimming.traffic(network) == 3 * 4 * channels


class OnlyTheFirst(Slimming):
    """Somebody else's criterion: penalises one BatchNorm alone."""

    label = "the first scale"

    def __init__(self, model, groups):
        super().__init__(model, groups)
        self.weights = self.weights[:1]

    @classmethod
    def traffic(cls, network):
        return 10**12

    @classmethod
    def launches(cls, network):
        return 2


class _EntryPoint:
    name, value = "first_alone", "tests.prune.test_criteria:OnlyTheFirst"

    def load(self):
        return OnlyTheFirst


def trained(criterion, **more):
    torch.manual_seed(0)
    model = small_resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = ptsim.PruneTrain(
        model, optimizer, input_shape=SMALL_IMAGE, penalty_ratio=0.65, criterion=criterion, **more
    )
    random = torch.Generator().manual_seed(0)
    for _ in range(28):
        images, labels = torch.rand(8, *SMALL_IMAGE, dtype=torch.float64, generator=random), torch.arange(8) % 5
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        pruner.step(loss)
        optimizer.step()
    return pruner, pruner.end_epoch(reconfigure=True)


@pytest.mark.slow
def test_prunetrain_trains_with_slimming_and_prunes():
    pruner, outcome = trained("slimming", regularizer="proximal", threshold=1e-12)
    assert isinstance(pruner.criterion, Slimming)
    timed = pruner.recorder.regularizer
    assert isinstance(timed, functools.partial)
    assert timed.func.__name__ == "proximal_step"  # what a profile runs
    assert outcome.reconfiguration.channels_removed > 0


@pytest.mark.slow
def test_a_criterion_from_outside_the_package_is_added_by_one_line_or_by_an_entry_point(monkeypatch):
    with pytest.raises(UnknownNameError, match="unknown criterion 'first_alone'; known: group_lasso, slimming"):
        trained("first_alone")
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [_EntryPoint()] if group == "ptsim.criteria" else []
    )
    assert "first_alone" in CRITERIA.names()
    pruner, _ = trained("first_alone")
    assert len(pruner.criterion.weights) == 1
    CRITERIA.remove("first_alone")
    CRITERIA.add("by_hand", OnlyTheFirst)
    try:
        pruner, _ = trained("by_hand")
        assert len(pruner.criterion.weights) == 1
        network = pruner.recorder.architecture
        assert penalty_work("by_hand", network, gpu=True) == PenaltyWork(num_bytes=10**12, num_launches=2)
        setting = StepSetting(batch=8, regularizer="by_hand")
        a100 = load_device("a100")
        fastest_s = 1e12 / a100.memory_bandwidth_bytes_per_s
        assert fastest_s < datasheet_step(network, a100, setting).regularizer_s < 2 * fastest_s
        with pytest.raises(UsageError, match="criterion 'group_lasso' exists already"):
            CRITERIA.add("group_lasso", OnlyTheFirst)
    finally:
        CRITERIA.remove("by_hand")
