"""A network so small that every mutant can be counted, planned or trained."""

from torch import nn


def build(num_classes=10, in_channels=3):
    """Two convolutions and a linear layer."""
    net = nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, num_classes),
    )  # fmt: skip
    return net


build.input_shape = (3, 16, 16)
