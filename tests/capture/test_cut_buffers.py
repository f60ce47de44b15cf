"""A network whose unsaved buffers pruning has cut can still be captured, and copied for a profile."""

import torch
from torch import nn

from ptsim.capture.graph import copied
from ptsim.capture.network import capture_network
from ptsim.prune.groups import find_groups
from ptsim.prune.reconfigure import reconfigure


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
