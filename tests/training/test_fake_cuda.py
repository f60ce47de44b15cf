"""The CUDA path without a GPU: tensors that say they are on one have shapes and a device but no values.

An operator that mixes them with tensors on the CPU raises, as it would on a GPU, unless it takes lists. Backward needs
a real device, so the gradients are made by hand.
"""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ptsim.capture.copies import hollow_copy
from ptsim.prune.criteria.group_lasso import GroupLasso
from ptsim.prune.criteria.slimming import Slimming
from ptsim.prune.groups import ChannelGroups, find_groups
from ptsim.prune.reconfigure import CutPlan, operate
from ptsim.prune.removal import find_removals
from ptsim.prune.selection import keep_one
from ptsim.training import data as data_module
from ptsim.training.config import Config
from ptsim.training.data import Normalization, ResidentData, Share
from ptsim.training.learner import Learner
from tests.prune.helpers import SmallResNet

IMAGE = (3, 12, 12)


@pytest.fixture
def gpu() -> Iterator[FakeTensorMode]:
    """Inside, tensors made for "cuda" are fake, and real ones are taken for fakes on the CPU."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def network() -> tuple[nn.Module, ChannelGroups, Tensor]:
    """A network on the CPU, its groups and a mask of a third of what can go."""
    torch.manual_seed(0)
    model = SmallResNet()
    groups = find_groups(model, IMAGE)
    chance = torch.rand(groups.num_components)
    return model, groups, keep_one(groups, groups.prunable & (chance < 0.3), chance)[0]


def on_gpu(model: nn.Module) -> nn.Module:
    """The model with fake tensors on "cuda"; called inside the mode."""
    return hollow_copy(model, device="cuda")


def devices(tensors: Any) -> set[str]:
    return {tensor.device.type for tensor in tensors}


def hand_made_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


def test_the_stand_in_refuses_what_a_gpu_would_refuse(gpu: FakeTensorMode) -> None:
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device="cuda").add_(torch.zeros(3))


@pytest.mark.parametrize("form", ["gathered", "per_tensor"])
def test_the_regulariser_stays_on_the_device(form: Any) -> None:
    model, groups, _ = network()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        twin = on_gpu(model)
    assert GroupLasso(twin, groups).form == "gathered"  # the default on a GPU
    for criterion in (GroupLasso(twin, groups, form=form), Slimming(twin, groups)):
        with mode:
            criterion.add_gradient(0.1)
            criterion.add_gradient(0.1)
            criterion.proximal_step(0.1)
            assert criterion.value().device.type == "cuda"
            assert devices(weight.grad for weight in criterion.weights) == {"cuda"}


def test_the_forward_pass_stays_on_the_device() -> None:
    model, _, _ = network()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        twin = on_gpu(model).train()
        assert twin(torch.empty(4, *IMAGE, device="cuda")).device.type == "cuda"
        assert devices(twin.buffers()) == {"cuda"}


def averaging(model: nn.Module, average: nn.Module) -> Learner:
    """A learner that can do no more than average the weights of `model`."""
    learner = Learner.__new__(Learner)
    learner.model, learner.average = model, average
    learner.config = Config(model="resnet20", dataset="digits", ema_decay=0.9)
    learner._refresh()
    return learner


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("branch", [False, True], ids=["channels", "a branch"])
def test_a_reconfiguration_stays_on_the_device(
    optimizer: type[torch.optim.Optimizer], branch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, groups, mask = network()
    if branch:  # the inner edge of the first block
        inner = next(layer for layer in groups.layers if layer.layer == "blocks.0.a")
        mask[inner.outputs] = groups.prunable[inner.outputs]
    removals = tuple(dataclasses.replace(removal, full=True) for removal in find_removals(groups, mask))
    assert bool(removals) == branch
    plan = CutPlan(removed=mask, removals=removals)
    cut = groups.cut_for(mask)  # which channels go is decided by values, which fakes have not
    monkeypatch.setattr(ChannelGroups, "cut_for", lambda *_: cut)
    smaller = copy.deepcopy(model)
    operate(smaller, groups, plan)
    options: dict[str, Any] = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        twin = on_gpu(model)
        average = on_gpu(model)
        stepper = optimizer(twin.parameters(), lr=0.1, **options)  # type: ignore[call-arg] # each kind's own
        hand_made_gradients(twin)
        stepper.step()
        operate(twin, groups, plan, optimizer=stepper, shadows=(average,))
        for network_ in (twin, average):
            assert [p.shape for p in network_.parameters()] == [p.shape for p in smaller.parameters()]
            assert devices(network_.parameters()) == devices(network_.buffers()) == {"cuda"}
        hand_made_gradients(twin)
        stepper.step()
        state = [value for kept in stepper.state.values() for value in kept.values() if torch.is_tensor(value)]
        assert devices(value for value in state if value.numel() > 1) == {"cuda"}
        keeper = averaging(twin, average)
        assert devices([*keeper._averages, *keeper._weights]) == {"cuda"}  # of lists nobody else looks
        keeper.update_average()
        keeper.copy_buffers_to_average()
        assert devices(average.parameters()) == devices(average.buffers()) == {"cuda"}
        for mode in (True, False):
            assert twin.train(mode)(torch.empty(4, *IMAGE, device="cuda")).device.type == "cuda"
        assert devices(twin.buffers()) == {"cuda"}


def test_images_are_augmented_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = Normalization(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    monkeypatch.setattr(data_module, "normalization_of", lambda _: statistics)
    config = Config(model="resnet20", dataset="digits", image_size=16, augment="crop_flip")
    images, labels = torch.zeros(8, *IMAGE, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        device = torch.device("cuda")
        source = ResidentData(
            "fake", train=(images, labels), validation=(images, labels), num_classes=4, config=config, device=device
        )
        share = Share(rank=0, world_size=1)
        for batches in (source.training_batches(0, 4, share), source.validation_batches(4, share)):
            found = list(batches)
            assert [tuple(pictures.shape) for pictures, _ in found] == [(4, 3, 16, 16)] * 2
            assert devices(tensor for batch in found for tensor in batch) == {"cuda"}
