"""How much of a network is left, and how much of that is sparse?"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ptsim.capture.graph import evaluation_mode
from ptsim.errors import UsageError
from ptsim.prune.groups import weight_GOIK
from ptsim.prune.labels import CONVS, TRANSPOSED_CONVS, Weighted
from ptsim.setting import real_number
from ptsim.trace.schema import LayerDensity

THRESHOLD = 1e-4  # largest |w| of a group that counts as zero (docs/method.md §2)


def checked_threshold(value: object) -> float:
    """A threshold that somebody has given.

    Raises:
        UsageError: not a finite number above 0.
    """
    threshold = real_number("threshold", value)
    if not 0 < threshold < math.inf:
        raise UsageError(f"setting 'threshold' is {threshold:g}, expected a finite number above 0")
    return threshold


def _layers(model: nn.Module) -> list[tuple[str, Tensor, Weighted]]:
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, (*CONVS, *TRANSPOSED_CONVS, nn.Linear)):
            groups = getattr(module, "groups", 1)
            transposed = isinstance(module, TRANSPOSED_CONVS)
            none = torch.empty(0, dtype=torch.int64)
            layer = Weighted(name, name + ".weight", groups, False, transposed, none, none, ())
            with evaluation_mode(module):  # in training mode spectral_norm goes on when its weight is read
                weight = module.weight.detach()
            layers.append((name, weight, layer))
    return layers


@torch.no_grad()
def layer_densities(model: nn.Module, threshold: float = THRESHOLD) -> tuple[LayerDensity, ...]:
    """Fractions of input channels, output channels and single weights that reach the threshold, per layer (Fig. 12)."""
    densities = []
    for name, weight, layer in _layers(model):
        W = weight_GOIK(weight.abs(), layer)
        fractions = torch.stack(
            [(part >= threshold).double().mean() for part in (W.amax((1, 3)), W.amax((2, 3)), W)]
        ).tolist()
        densities.append(
            LayerDensity(layer=name, input_channels=fractions[0], output_channels=fractions[1], weights=fractions[2])
        )
    return tuple(densities)


@torch.no_grad()
def channel_maxima(model: nn.Module) -> dict[str, tuple[float, ...]]:
    """Largest |w| per output channel of every convolution and linear layer (Fig. 4)."""
    return {
        name: tuple(weight_GOIK(weight.abs(), layer).amax((2, 3)).flatten().tolist())
        for name, weight, layer in _layers(model)
    }


def dense_counts(model: nn.Module, threshold: float = THRESHOLD) -> tuple[int, int]:
    """(output channels, weights) of convolutions and linear layers that reach the threshold.

    Divided by the same counts of a run's first architecture they give its density, with what was removed as sparse.
    """
    channels = weights = 0
    for _, weight, layer in _layers(model):
        W = weight_GOIK(weight.detach().abs(), layer)
        channels += int((W.amax((2, 3)) >= threshold).sum())
        weights += int((threshold <= W).sum())
    return channels, weights
