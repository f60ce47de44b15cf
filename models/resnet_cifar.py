"""The ResNets of the PruneTrain paper for 32×32 images (docs/method.md §5).

ResNet-20/32/44/56/110 are He et al.'s CIFAR networks with 1×1 projection short-cuts; ResNet-50 is a bottleneck network
of three stages of eight blocks. Any image size that two halvings leave at least 1×1 works, and any channel count.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptsim import zoo

STAGE_WIDTHS = (16, 32, 64)


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


def initialise(model: nn.Module) -> None:
    """Convolutions from N(0, √(2/(k·k·out_channels))); BatchNorm starts as the identity (docs/method.md §4)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class Shortcut(nn.Sequential):
    """The projection that changes the shape of a residual stream: 1×1 convolution and BatchNorm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a short-cut."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        changes_shape = stride != 1 or in_channels != width
        self.downsample = Shortcut(in_channels, width, stride) if changes_shape else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) → (N, width, H/stride, W/stride)."""
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        out = self.relu(out)
        return out


class Bottleneck(nn.Module):
    """1×1 – 3×3 – 1×1 around a short-cut; the 3×3 carries the stride."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = _conv(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        changes_shape = stride != 1 or in_channels != out_channels
        self.downsample = Shortcut(in_channels, out_channels, stride) if changes_shape else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) → (N, 4·width, H/stride, W/stride)."""
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.downsample(x)
        out = self.relu(out)
        return out


class CifarResNet(nn.Module):
    """3×3 stem of 16, three stages, global average pool, one linear layer."""

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], blocks_per_stage: int, num_classes: int, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, STAGE_WIDTHS[0], 3)
        self.bn1 = nn.BatchNorm2d(STAGE_WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        channels = STAGE_WIDTHS[0]
        stages = []
        for stage, width in enumerate(STAGE_WIDTHS):
            blocks = []
            for index in range(blocks_per_stage):
                blocks.append(block(channels, width, stride=2 if stage > 0 and index == 0 else 1))
                channels = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def _register(name: str, block: type[BasicBlock] | type[Bottleneck], blocks_per_stage: int) -> None:
    @zoo.register(name, input_shape=(3, 32, 32), num_classes=10)
    def build(*, num_classes: int, in_channels: int = 3) -> CifarResNet:
        return CifarResNet(block, blocks_per_stage, num_classes, in_channels)


for _depth, _blocks in {20: 3, 32: 5, 44: 7, 56: 9, 110: 18}.items():
    _register(f"resnet{_depth}", BasicBlock, _blocks)
_register("resnet50", Bottleneck, 8)
