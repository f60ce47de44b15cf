"""How many bytes does each layer move between memory and the chip, so that the memory-bound half of a step is a number?

What an operator reads and writes stands in one place, `costs.kernels`; here its kernels' bytes are added up, layer by
layer. Conversions of the memory layout, which depend on the device, are left out.
"""

from __future__ import annotations

import msgspec
import numpy as np

from ptsim.costs.kernels import BATCH_NORM_BACKWARD, BATCH_NORM_FORWARD, Pass, network_kernels
from ptsim.costs.times import SUM_ACCESSES
from ptsim.network import LayerKind, Network
from ptsim.optimizers import OPTIMIZERS, OptimizerKind
from ptsim.setting import StepSetting


class LayerTraffic(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one layer for the whole mini-batch; backward is weight and input gradient together."""

    forward_bytes: int
    backward_bytes: int


def network_traffic(network: Network, setting: StepSetting) -> tuple[LayerTraffic, ...]:
    """What every layer moves in one step, in forward order.

    Where the outputs of a layer are read several times, the gradients that come back are added up: two reads and a
    write for every further reader, counted at that layer. Under autocast tensors are as wide as its rules leave them,
    and conversions count at the layer that needs them.

    Raises:
        ValueError: the mini-batch is not positive.
    """
    if setting.batch <= 0:
        raise ValueError(f"batch is {setting.batch}, expected a positive number of images")
    kernels = network_kernels(network, setting, tensor_cores=False)
    is_forward, count = kernels.step == Pass.FORWARD, len(network.layers)
    forward, backward = (
        np.bincount(kernels.layer[passes], kernels.moved_bytes[passes], count) for passes in (is_forward, ~is_forward)
    )
    return tuple(
        LayerTraffic(forward_bytes=round(there), backward_bytes=round(back))
        for there, back in zip(forward, backward, strict=True)
    )


def batch_norm_bytes(network: Network, element_bytes: int = 4) -> int:
    """BatchNorm's traffic of one image in training: 8 accesses per element; of weights that it normalises, none."""
    accesses = BATCH_NORM_FORWARD + BATCH_NORM_BACKWARD
    norms = (layer for layer in network.layers if layer.kind is LayerKind.BATCH_NORM and not layer.once)
    return accesses * sum(layer.output_elements for layer in norms) * element_bytes


def update_traffic(
    network: Network, optimizer: str | OptimizerKind = "sgd", *, momentum: float | None = None, fused: bool = False
) -> int:
    """Bytes of one optimizer update of every fp32 parameter that has a gradient, weight decay included.

    Args:
        network: whose parameters are updated.
        optimizer: its name, or its row.
        momentum: None for the optimizer's own; 0 spares what a momentum reads and writes.
        fused: one kernel does it all; else torch's default form.

    Raises:
        UnknownNameError: no such optimizer.
    """
    kind = OPTIMIZERS.find(optimizer) if isinstance(optimizer, str) else optimizer
    return kind.moved(momentum, fused=fused) * network.gradient_bytes


def cast_bytes(network: Network, setting: StepSetting) -> int:
    """What autocast's casts of the weights, and of the gradients back, move in a pass: 4 bytes and 2, either way."""
    return 12 * network.num_learnt if setting.half else 0


def sum_bytes(network: Network) -> int:
    """What adding the gradients of a further pass to those that are there moves: two are read, one is written.

    Source: torch/csrc/autograd/functions/accumulate_grad.h.
    """
    return SUM_ACCESSES * network.gradient_bytes
