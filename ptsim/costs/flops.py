"""How much arithmetic is one image, forward and backward, in ptsim's and in the paper's way of counting?

One MAC is one multiply–accumulate, 2 FLOPs. Only products count: convolutions, linear layers, matrix products. What
the other layers cost is memory traffic (`costs.traffic`). The two conventions are those of docs/method.md §6:

* exact: backward repeats the forward MACs once for the weights' gradient and once for the input's (of a bilinear layer
  for that of either input), where one is needed;
* paper: the PruneTrain authors' script, which counts the input gradient at padded *input* resolution, for strided
  layers and for the first layer too.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import msgspec

from ptsim.errors import UsageError
from ptsim.network import PRODUCTS, Layer, LayerKind, Network
from ptsim.operators import BILINEAR, num_taps

Convention = Literal["exact", "paper"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)


class LayerMacs(msgspec.Struct, frozen=True, kw_only=True):
    """Multiply–accumulates of one layer for one image, or for one mini-batch where it runs `once`."""

    forward: int
    weight_gradient: int
    input_gradient: int

    @property
    def backward(self) -> int:
        """Both gradients."""
        return self.weight_gradient + self.input_gradient

    @property
    def training(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


def check_convention(name: str) -> None:
    """Refuse what is no way of counting.

    Raises:
        UsageError: `name` is neither "exact" nor "paper".
    """
    if name not in CONVENTIONS:
        raise UsageError(f"convention is {name!r}, expected {' or '.join(map(repr, CONVENTIONS))}")


def layer_macs(layer: Layer, convention: Convention = "exact") -> LayerMacs:
    """What `layer` computes for one image; all 0 for a layer without products.

    Raises:
        UsageError: the convention is neither "exact" nor "paper".
    """
    check_convention(convention)
    if layer.kind not in PRODUCTS:
        return LayerMacs(forward=0, weight_gradient=0, input_gradient=0)
    forward = layer.forward_macs
    if convention == "exact":
        num_inputs = 2 if layer.op == BILINEAR else 1  # that have a gradient of as many products
        return LayerMacs(
            forward=forward,
            weight_gradient=forward if layer.weight_needs_gradient else 0,
            input_gradient=num_inputs * forward if layer.input_needs_gradient else 0,
        )
    return LayerMacs(forward=forward, weight_gradient=forward, input_gradient=_paper_input_gradient(layer))


def inference_macs(
    network: Network, convention: Convention = "exact", *, images: int = 1, mini_batches: int = 1
) -> int:
    """Forward MACs in evaluation mode; the conventions agree here. Auxiliary heads do not run.

    Args:
        network: what is computed.
        convention: how MACs are counted.
        images: all together.
        mini_batches: in how many, which is how often layers that run `once` do.
    """
    return sum(
        layer_macs(layer, convention).forward * layer.repeats(images, mini_batches)
        for layer in network.layers
        if not layer.training_only
    )


def training_macs(network: Network, convention: Convention = "exact", *, images: int = 1, mini_batches: int = 1) -> int:
    """Forward and backward MACs in training, auxiliary heads included; arguments as for `inference_macs`."""
    return sum(layer_macs(layer, convention).training * layer.repeats(images, mini_batches) for layer in network.layers)


def flops_utilization(macs: float, gpu_seconds: float, peak_flops_per_s: float | None) -> float | None:
    """Model FLOPs utilisation (MFU): FLOPs of a training step, or of many, over what the GPUs could do in that time.

    Args:
        macs: of all GPUs together, forward and backward; 1 MAC is 2 FLOPs.
        gpu_seconds: time of the steps, times the number of GPUs.
        peak_flops_per_s: of one GPU, dense, for the precision of the products; None gives None.

    Source: Chowdhery et al., PaLM (2022), appendix B; without recomputation, which ptsim does not model.
    """
    return 2 * macs / (gpu_seconds * peak_flops_per_s) if peak_flops_per_s else None


def _paper_input_gradient(layer: Layer) -> int:
    """(H + pad)²·K·R·S·C for a convolution of square images; a linear layer's third K·C."""
    if layer.kind is not LayerKind.CONV or not layer.input_shapes:
        return layer.forward_macs
    kernel = layer.kernel_size
    if kernel == (1, 1):
        pad = 0
    elif kernel == (7, 7) and not layer.input_needs_gradient:  # the stem
        pad = 3
    else:
        pad = 2
    folded, image = layer.unfolded(layer.input_shapes[0])
    pixels = folded * math.prod(size + pad for size in image[1:])
    return pixels * layer.out_channels * num_taps(layer) * (layer.in_channels // layer.groups)
