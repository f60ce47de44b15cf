"""Which layers are gated, and to which of their own channels: by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ptsim.prune.gating import Gate, find_gates
from ptsim.prune.groups import find_groups
from ptsim.prune.reconfigure import reconfigure
from tests.prune.helpers import SMALL_IMAGE, same_function, small_resnet


def indices(gate: Gate) -> tuple[str, list[int] | None, list[int] | None, str | None]:
    inputs, outputs = (None if kept is None else kept.tolist() for kept in (gate.inputs, gate.outputs))
    return gate.layer, inputs, outputs, gate.norm


@pytest.mark.parametrize("bias", [False, True])
def test_a_block_reads_and_writes_only_the_channels_of_the_stream_that_its_weights_use(bias: bool) -> None:
    model = small_resnet(bias=bias)
    with torch.no_grad():
        reads = model.get_parameter("blocks.0.a.weight")
        reads[:, 2:8], reads[:, 7], reads[:, 8] = 0, 0.99e-4, -1e-4  # the threshold itself counts
        model.get_parameter("blocks.0.b.weight")[4:9] = 0
        model.get_parameter("blocks.1.a.weight")[3] = 0  # inside of a branch two layers share their channels
    found = [indices(gate) for gate in find_gates(model, find_groups(model, SMALL_IMAGE), 1e-4)]
    read, written = [0, 1, 8, 9, 10, 11], [0, 1, 2, 3, 9, 10, 11]
    if bias:  # a channel that nobody computes would still have its bias
        assert found == [("blocks.0.a", read, None, None)]
    else:
        assert found == [("blocks.0.a", read, None, "blocks.0.an"), ("blocks.0.b", None, written, "blocks.0.bn")]


def test_a_gated_block_is_gated_again_as_more_of_its_channels_vanish() -> None:
    """Of the stream's 12 channels one layer reads 6, then 4, and one writes 7, then 5."""
    model = small_resnet()
    with torch.no_grad():
        model.get_parameter("blocks.0.a.weight")[:, 2:8] = 0
        model.get_parameter("blocks.0.b.weight")[4:9] = 0
    first = reconfigure(model, find_groups(model, SMALL_IMAGE), mode="gating")
    gather, scatter = (model.get_buffer(f"blocks.0.{name}.mask") for name in ("a.gather", "bn.norm"))
    assert [torch.nonzero(mask).flatten().tolist() for mask in (gather, scatter)] == [
        [0, 1, 8, 9, 10, 11], [0, 1, 2, 3, 9, 10, 11],
    ]  # fmt: skip
    with torch.no_grad():
        model.get_parameter("blocks.0.a.layer.weight")[:, [1, 3]] = 0  # the stream's 1 and 9
        model.get_parameter("blocks.0.b.weight")[[2, 6]] = 0  # 2 and 11
    zeroed = copy.deepcopy(model)
    assert reconfigure(model, first.groups, mode="gating").changed
    gather, scatter = (model.get_buffer(f"blocks.0.{name}.mask") for name in ("a.gather", "bn.norm"))
    assert [torch.nonzero(mask).flatten().tolist() for mask in (gather, scatter)] == [
        [0, 8, 10, 11], [0, 1, 3, 9, 10],
    ]  # fmt: skip
    same_function(model, zeroed, SMALL_IMAGE)


def test_an_average_of_the_weights_is_gated_as_its_model_is() -> None:
    """It keeps weights of its own, and goes on averaging."""
    model = small_resnet()
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        for network in (model, average.module):
            network.get_parameter("blocks.0.a.weight")[:, 2:8] = 0
            network.get_parameter("blocks.0.b.weight")[4:9] = 0
        for parameter in average.module.parameters():
            parameter *= 1.5
    zeroed = copy.deepcopy(average.module)
    assert reconfigure(model, find_groups(model, SMALL_IMAGE), mode="gating", shadows=[average]).changed
    assert {name: value.shape for name, value in average.module.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    same_function(average.module, zeroed, SMALL_IMAGE)
    average.update_parameters(model)


class Meeting(nn.Module):
    """Two convolutions that meet at a sum, and the layer that reads it: a stream that three layers touch."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Conv2d(3, 4, 1, bias=False) for _ in range(2))
        self.left_norm, self.right_norm, self.head = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.left_norm(self.left(x)) + self.right_norm(self.right(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("largest", "multiple", "kept"),
    [
        ([1, 0, 1, 1], 1, [0, 2, 3]),
        ([0, 0, 5e-5, 1e-5], 1, [2]),  # one stays, the one with the largest weight
        ([0, 0, 5e-5, 1e-5], 3, [0, 2, 3]),  # and those that fill it up
        ([1e-5, 0, 1, 2e-5], 2, [2, 3]),
        ([1e-5, 0, 1, 2e-5], 3, [0, 2, 3]),
    ],
)
def test_three_layers_are_a_stream_and_a_layer_keeps_a_channel(
    largest: list[float], multiple: int, kept: list[int]
) -> None:
    model = Meeting()
    with torch.no_grad():
        nn.init.ones_(model.left.weight)
        model.right.weight.copy_(torch.tensor(largest).view(4, 1, 1, 1).expand(4, 3, 1, 1))
    gates = find_gates(model, find_groups(model, (3, 4, 4)), 1e-4, multiple)
    assert [indices(gate) for gate in gates] == [("right", None, kept, "right_norm")]


class Stream(nn.Module):
    """A residual branch of two convolutions on a stream, whose code looks at its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = (
            nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1), nn.Linear(6, 2)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.branch(x)).mean((2, 3)))

    def branch(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x.to(self.one.weight.dtype))))


class ByKind(Stream):
    """An activation behind every layer of a kind, which a gate around it is not."""

    def branch(self, x: Tensor) -> Tensor:
        for layer in (self.one, self.two):
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                x = torch.relu(x)
        return x


@pytest.mark.parametrize("kind", [Stream, ByKind])
def test_layers_that_the_code_looks_at_are_not_gated(kind: type[Stream]) -> None:
    torch.manual_seed(0)
    model = kind().double()
    nn.init.zeros_(model.one.weight[:, :2])
    before = copy.deepcopy(model)
    surgery = reconfigure(model, find_groups(model, (3, 4, 4)), mode="gating")
    assert not surgery.changed
    assert surgery.notes == ("channel gating is left out: the code of the network needs its layers as they are",)
    same_function(model, before, (3, 4, 4))
