"""How many bytes does each layer move between memory and the chip, so that the memory-bound half of a step is a number?

Every operator reads its operands and writes its results once, from and to device memory; what caches keep between
operators is not credited. BatchNorm is counted as METHOD.md §6 does: 8 accesses per element, 3 forward (statistics,
normalise in, out) and 5 backward (x and dy for the reductions; x, dy in, dx out).
"""

from __future__ import annotations

import msgspec

from ptsim.errors import UnknownNameError
from ptsim.network import Layer, LayerKind, Network

BATCH_NORM_FORWARD, BATCH_NORM_BACKWARD = 3, 5  # accesses per element

# Accesses per parameter of one update. torch's default on a GPU is the "foreach" form, where every arithmetic step is
# a kernel over all tensors: for SGD weight decay 3 (read w and g, write g), momentum 2 + 3, update 3. Fused: one pass.
_UPDATE_ACCESSES = {
    "sgd": (11, 5),  # fused: read w, g, m; write w, m
    "adam": (21, 7),  # fused: read w, g, m, v; write w, m, v
    "adamw": (20, 7),
    "rmsprop": (16, 5),
}
OPTIMIZERS = tuple(_UPDATE_ACCESSES)


class LayerTraffic(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one layer for the whole mini-batch; backward is weight and input gradient together."""

    forward_bytes: int
    backward_bytes: int


def layer_traffic(layer: Layer, *, batch: int, element_bytes: int) -> LayerTraffic:
    """What `layer` moves for `batch` images of `element_bytes` per activation (and per weight as the kernel reads it).

    Gradients of element-wise sums pass through without a copy; what they cost is the sum where the two branches'
    gradients meet again, counted at the sum: two reads and a write.

    Raises:
        ValueError: batch or element_bytes is not positive.
    """
    if batch <= 0 or element_bytes <= 0:
        raise ValueError(f"batch and element_bytes are {batch} and {element_bytes}, expected positive numbers")
    times = layer.repeats(batch)
    inputs, output = sum(layer.input_sizes(batch)), times * layer.output_elements
    weights = layer.num_parameters
    kept = layer.saved_other_bytes * times  # indices and masks: written forward, read backward
    dx = inputs if layer.input_needs_gradient else 0
    forward, backward, fixed = inputs + output, output + dx, 0
    match layer.kind:
        case LayerKind.CONV | LayerKind.LINEAR | LayerKind.MATMUL:
            # weight gradient: x, dy → dW; input gradient: dy, W → dx
            backward = (inputs + output if layer.weight_needs_gradient else 0) + (output + dx if dx else 0)
            fixed = weights
        case LayerKind.BATCH_NORM | LayerKind.NORM:
            forward, backward = BATCH_NORM_FORWARD * output, BATCH_NORM_BACKWARD * output
        case LayerKind.ACTIVATION:
            backward = 2 * output + dx  # dy and what was kept
        case LayerKind.ELEMENTWISE if layer.op in ("add", "sub"):
            backward = 3 * output if len(layer.input_shapes) > 1 else output if weights else 0
            fixed = weights
        case LayerKind.ELEMENTWISE:
            backward = output + inputs + dx
            fixed = weights
        case LayerKind.DROPOUT if not kept:  # a mask of the activations' type
            forward, backward = forward + output, backward + output
        case _:
            pass
    if layer.view:
        forward = backward = 0
    if not layer.input_needs_gradient and not (weights and layer.weight_needs_gradient):
        backward = 0
    num_backward_weights = (layer.weight_needs_gradient + layer.input_needs_gradient) * fixed
    return LayerTraffic(
        forward_bytes=(forward + fixed) * element_bytes + kept,
        backward_bytes=(backward + num_backward_weights) * element_bytes + (kept if backward else 0),
    )


def batch_norm_bytes(network: Network, element_bytes: int = 4) -> int:
    """BatchNorm's traffic of one image in training: 8 accesses per element; of weights that it normalises, none."""
    accesses = BATCH_NORM_FORWARD + BATCH_NORM_BACKWARD
    norms = (layer for layer in network.layers if layer.kind is LayerKind.BATCH_NORM and not layer.once)
    return accesses * sum(layer.output_elements for layer in norms) * element_bytes


def update_traffic(network: Network, optimizer: str = "sgd", *, fused: bool = False) -> int:
    """Bytes of one optimizer update of every fp32 parameter, momentum and weight decay included.

    Raises:
        ValueError: an optimizer that is not counted here.
    """
    if optimizer not in _UPDATE_ACCESSES:
        raise UnknownNameError("optimizer", optimizer, _UPDATE_ACCESSES)
    return _UPDATE_ACCESSES[optimizer][fused] * 4 * network.num_parameters


def regularizer_traffic(network: Network) -> int:
    """Bytes of the group lasso's gradient on fp32 weights: read twice for the two norms, then w and g in, g out."""
    kinds = {layer.name: layer for layer in network.layers if layer.kind in (LayerKind.CONV, LayerKind.LINEAR)}
    weights = sum(
        parameter.num_elements
        for parameter in network.parameters
        if len(parameter.shape) > 1 and parameter.layer in kinds and not _is_depthwise(kinds[parameter.layer])
    )
    return 5 * 4 * weights


def traffic_bytes(network: Network, *, batch: int, element_bytes: int) -> int:
    """Bytes of all layers of one training step, forward and backward, without update and regulariser."""
    moved = (layer_traffic(layer, batch=batch, element_bytes=element_bytes) for layer in network.layers)
    return sum(layer.forward_bytes + layer.backward_bytes for layer in moved)


def _is_depthwise(layer: Layer) -> bool:
    return layer.kind is LayerKind.CONV and layer.groups > 1 and layer.groups == layer.in_channels
