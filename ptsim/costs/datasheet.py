"""How long a training step takes by the data sheet alone: a roofline per layer and pass."""

from __future__ import annotations

from ptsim.costs.times import LayerTime, MemoryFormat, StepTime, Tier
from ptsim.hardware.spec import Device
from ptsim.network import Layer, LayerKind, Network, Precision

_PRODUCTS = (LayerKind.CONV, LayerKind.LINEAR, LayerKind.MATMUL)
_STATE_ACCESSES = {"sgd": 5, "rmsprop": 5, "adam": 7, "adamw": 7}  # reads and writes of 4 bytes per parameter


def datasheet_step(
    network: Network,
    device: Device,
    *,
    batch: int,
    precision: Precision,
    memory_format: MemoryFormat = "contiguous",
    optimizer: str = "sgd",
    regularizer: bool = False,
) -> StepTime:
    """Plain roofline: every pass takes the longer of its products at peak and its tensors at full bandwidth."""
    layers = tuple(_layer_time(layer, device, batch, precision) for layer in network.layers)
    parameter_bytes = 4 * network.num_parameters
    bandwidth = device.memory_bandwidth_bytes_per_s
    optimizer_s = _STATE_ACCESSES[optimizer] * parameter_bytes / bandwidth
    regularizer_s = 5 * parameter_bytes / bandwidth if regularizer else 0.0
    total = sum(layer.forward_s + layer.backward_s for layer in layers) + optimizer_s + regularizer_s
    return StepTime(
        layers=layers,
        optimizer_s=optimizer_s,
        regularizer_s=regularizer_s,
        overhead_s=0.0,
        low_s=total,
        high_s=3 * total,
        tier=Tier.DATASHEET,
    )


def _layer_time(layer: Layer, device: Device, batch: int, precision: Precision) -> LayerTime:
    elements = 0 if layer.kind is LayerKind.RESHAPE else layer.input_elements + layer.output_elements
    moved_s = elements * batch * precision.activation_bytes / device.memory_bandwidth_bytes_per_s
    products = layer.forward_macs if layer.kind in _PRODUCTS else 0
    product_s = 2 * products * batch / device.peak_flops_per_s[precision]
    passes = 2 if layer.input_needs_gradient or not products else 1
    forward_s = max(moved_s, product_s)
    return LayerTime(
        layer=layer.name, kind=layer.kind, forward_s=forward_s, backward_s=passes * forward_s, tier=Tier.DATASHEET
    )
