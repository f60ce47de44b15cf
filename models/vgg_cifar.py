"""The VGGs of the PruneTrain paper for 32×32 images: convolutions with BatchNorm, 2×2 max-pools, one linear layer.

Five pools halve the image five times, so images must be at least 32×32. `vgg6` is not the paper's: a small one for
16×16 images, with four pools, that two cores train in a minute.
"""

from __future__ import annotations

import torch
from ptsim.models.resnet_cifar import initialise
from torch import Tensor, nn

from ptsim import zoo

WIDTHS: dict[int, tuple[tuple[int, ...], ...]] = {
    6: ((64,), (128,), (128, 128), (256,)),
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}


class CifarVGG(nn.Module):
    """Stages of 3×3 convolutions, each closed by a max-pool, then one linear layer to the classes."""

    def __init__(self, stages: tuple[tuple[int, ...], ...], num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for widths in stages:
            for width in widths:
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, side, side) → (N, num_classes), where the pools halve `side` to 1."""
        logits: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return logits


def _register(depth: int, stages: tuple[tuple[int, ...], ...]) -> None:
    side = 2 ** len(stages)

    @zoo.register(f"vgg{depth}", input_shape=(3, side, side), num_classes=10)
    def build(*, num_classes: int, in_channels: int = 3) -> CifarVGG:
        return CifarVGG(stages, num_classes, in_channels)


for _depth, _stages in WIDTHS.items():
    _register(_depth, _stages)
