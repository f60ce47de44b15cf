"""A network whose unsaved buffers pruning has cut can still be captured, copied for a profile, and built again."""

import torch
from torch import nn

from ptsim.capture.copies import copied
from ptsim.capture.network import capture_network
from ptsim.prune.groups import find_groups
from ptsim.prune.reconfigure import reconfigure
from ptsim.prune.structure import apply_structure, structure_of


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
        self.register_buffer("scale", torch.arange(1.0, 7.0).view(1, 6, 1, 1), persistent=False)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)) * self.scale).mean((2, 3))


def test_a_network_with_a_cut_unsaved_buffer_is_captured():
    model = Scaled()
    with torch.no_grad():
        model.first.weight[[1, 4]] = 0
        model.last.weight[:, [1, 4]] = 0
        model.first.bias[[1, 4]] = 0
    reconfigure(model, find_groups(model, (3, 8, 8)))
    assert model.scale.flatten().tolist() == [1, 3, 4, 6]
    network = capture_network(model, name="scaled", input_shape=(3, 8, 8), num_classes=4)
    assert network.layer("first").out_channels == 4
    assert torch.equal(copied(model).scale, model.scale)


class Twice(Scaled):
    """The same buffer under two names."""

    def __init__(self):
        super().__init__()
        self.register_buffer("again", self.scale, persistent=False)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)) * self.scale + self.again).mean((2, 3))


def test_a_buffer_with_two_names_is_cut_once_and_stays_one():
    model, rebuilt = Twice(), Twice()
    with torch.no_grad():
        model.first.weight[[1, 4]] = 0
        model.last.weight[:, [1, 4]] = 0
    groups = find_groups(model, (3, 8, 8))
    assert int(groups.prunable.sum()) == 6
    reconfigure(model, groups)
    apply_structure(rebuilt, structure_of(model))
    for network in (model, rebuilt):
        assert network.again is network.scale
        assert network.again.flatten().tolist() == [1, 3, 4, 6]
