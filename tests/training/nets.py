"""Tiny networks of "a user's file": a training run of them takes well under a second."""

import torch
from torch import nn


class Small(nn.Module):
    def __init__(self, num_classes, in_channels, norm):
        super().__init__()
        bn = nn.BatchNorm2d if norm else nn.Identity
        self.stem = nn.Sequential(nn.Conv2d(in_channels, 8, 3, padding=1, bias=not norm), bn(8), nn.ReLU())
        self.inner = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, bias=not norm), bn(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), bn(8)
        )
        self.down = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=not norm), bn(12), nn.ReLU())
        self.fc = nn.Linear(12, num_classes)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.inner(x))
        return self.fc(self.down(x).mean((2, 3)))


def small(num_classes, in_channels=3):
    return Small(num_classes, in_channels, norm=True)


def plain(num_classes, in_channels=3):
    """Without BatchNorm, so that splitting a mini-batch changes nothing but rounding."""
    return Small(num_classes, in_channels, norm=False)


class LeftOver(Small):
    """With a layer that forward never calls."""

    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels, norm=False)
        self.left_over = nn.Conv2d(7, 9, 3)


def left_over(num_classes, in_channels=3):
    return LeftOver(num_classes, in_channels)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 3)

    def forward(self, x):
        if x.sum() > 0:
            x = -x
        return self.conv(x).mean((2, 3))


def untraceable(num_classes):
    return Branching()


class Exploding(nn.Module):
    """Logits become NaN in the training iteration `NAN_AT`."""

    NAN_AT = 5

    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, num_classes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        y = self.fc(self.conv(x).mean((2, 3)))
        if self.training:
            self.calls += 1
            y = y + torch.where(self.calls > self.NAN_AT, torch.nan, 0.0)
        return y


def exploding(num_classes):
    return Exploding(num_classes)


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 3)

    def forward(self, x):
        raise TypeError("a tensor is no list")


def failing(num_classes):
    return Failing()


def _refuse_many(module, images):
    if module.training and len(images[0]) > 24:
        raise torch.OutOfMemoryError("no room")


def hungry(num_classes, in_channels=3):
    """Bears at most 24 images in training."""
    model = small(num_classes, in_channels)
    model.fc.register_forward_pre_hook(_refuse_many)
    return model
