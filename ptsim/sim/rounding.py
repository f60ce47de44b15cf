"""What a pruned network would be if its channel counts were rounded up: dead channels that keep tensor cores fed."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import msgspec

from ptsim.costs.walked import rescaled
from ptsim.network import Layer, LayerKind, Network, Parameter
from ptsim.operators import BRANCH_CONSTANT, constant_axis, is_transposed, num_taps

Shape = tuple[int, ...]


@functools.lru_cache(maxsize=256)
def rounded(network: Network, multiple: int) -> Network:
    """The network with every channel count rounded up to a multiple of `multiple`.

    The image's own channels and the classifier's outputs stay as they are. Counts (MACs, saved elements) grow in
    proportion to the channels that they cover, and the footprints of a watched iteration moment by moment. With
    `multiple` 1 the network is returned unchanged.

    Raises:
        ValueError: `multiple` is not positive.
    """
    if multiple < 1:
        raise ValueError(f"multiple {multiple}; it must be at least 1")
    if multiple == 1:
        return network
    products = [layer.name for layer in network.layers if layer.kind in (LayerKind.CONV, LayerKind.LINEAR)]
    producers: dict[str, list[str]] = {layer.name: [] for layer in network.layers}
    for source, target in network.edges:
        producers[target].append(source)
    new: dict[str, Layer] = {}
    for layer in network.layers:
        sources = producers[layer.name]
        shapes = [new[source].output_shape for source in sources]
        if len(sources) != len(layer.input_shapes):  # the network's own input, or one tensor used twice
            grown = {network.layer(source).output_shape: new[source].output_shape for source in sources}
            shapes = [grown.get(shape, shape) for shape in layer.input_shapes]
        is_classifier = layer.name in products[-1:] and layer.out_channels == network.num_classes
        if layer.op == BRANCH_CONSTANT:
            new[layer.name] = _round_constant(layer, shapes, multiple)
        else:
            new[layer.name] = _round_layer(layer, shapes, 1 if is_classifier else multiple)
    parameters = tuple(
        _round_parameter(p, network.layer(p.layer), new[p.layer]) if p.layer else p for p in network.parameters
    )
    result = msgspec.structs.replace(network, layers=tuple(new.values()), parameters=parameters, footprints=())
    footprints = tuple(rescaled(footprint, network, result) for footprint in network.footprints)
    return msgspec.structs.replace(result, footprints=footprints)


def _round_layer(layer: Layer, inputs: Sequence[Shape], multiple: int) -> Layer:
    in_ratio = sum(math.prod(shape) for shape in inputs) / max(1, layer.input_elements)
    first = inputs[0][:1] if inputs and layer.input_shapes[0][:1] == (layer.in_channels,) else ()
    in_channels = first[0] if first else layer.in_channels
    groups = layer.groups
    match layer.kind:
        case LayerKind.CONV if layer.groups == layer.in_channels > 1:  # depthwise: follows its input
            groups = in_channels
            out_channels = layer.out_channels // layer.in_channels * in_channels
        case LayerKind.CONV:
            out_channels = _up(layer.out_channels, math.lcm(multiple, layer.groups))
        case LayerKind.LINEAR:
            in_channels = inputs[0][-1]
            out_channels = _up(layer.out_channels, multiple)
        case LayerKind.CONCAT if layer.output_shape[:1] == (_channels(layer.input_shapes),):
            out_channels = _channels(inputs)
            in_channels = first[0] if first else out_channels
        case _:
            out_channels = round(layer.out_channels * in_ratio)
    if (tuple(inputs), out_channels) == (layer.input_shapes, layer.out_channels):
        return layer  # with all that its capture counted
    output = _output_shape(layer, out_channels, in_ratio)
    out_ratio = math.prod(output) / max(1, layer.output_elements)
    if layer.kind in (LayerKind.CONV, LayerKind.LINEAR):
        per_output = (in_channels / groups) / (layer.in_channels / layer.groups) if layer.in_channels else 0.0
        mac_ratio = per_output * out_ratio
    else:
        mac_ratio = in_ratio
    changed = msgspec.structs.replace(
        layer,
        in_channels=in_channels,
        out_channels=out_channels,
        groups=groups,
        input_shapes=tuple(inputs),
        output_shape=output,
        forward_macs=round(layer.forward_macs * mac_ratio),
        saved_elements=round(layer.saved_elements * in_ratio),
        saved_other_bytes=round(layer.saved_other_bytes * out_ratio),
        saved_fixed_bytes=round(layer.saved_fixed_bytes * in_ratio),
    )
    return msgspec.structs.replace(changed, num_parameters=_num_parameters(layer, changed))


def _round_constant(layer: Layer, inputs: Sequence[Shape], multiple: int) -> Layer:
    """The end of a removed branch: nothing flows in, and it is as wide as the stream that it is added to."""
    axis = constant_axis(layer)
    width = layer.output_shape[axis]
    grown = _up(width, multiple)
    output = (*layer.output_shape[:axis], grown, *layer.output_shape[axis + 1 :])
    return msgspec.structs.replace(
        layer,
        input_shapes=tuple(inputs),
        output_shape=output,
        out_channels=output[0],
        num_parameters=layer.num_parameters * grown // width,
    )


def _channels(shapes: Sequence[Shape]) -> int:
    return sum(shape[0] for shape in shapes if shape)


def _output_shape(layer: Layer, out_channels: int, in_ratio: float) -> Shape:
    shape = layer.output_shape
    if not shape:  # one number for every image
        return shape
    if layer.kind is LayerKind.LINEAR:
        return (*shape[:-1], out_channels)
    if layer.kind in (LayerKind.RESHAPE, LayerKind.OTHER, LayerKind.MATMUL):
        return (round(shape[0] * in_ratio), *shape[1:])
    image = layer.unfolded(shape)[1] if layer.kind is LayerKind.CONV else shape
    return (*shape[: -len(image)], out_channels, *image[1:])


def _round_parameter(parameter: Parameter, old: Layer, new: Layer) -> Parameter:
    return msgspec.structs.replace(parameter, shape=_parameter_shape(parameter.shape, old, new))


def _parameter_shape(shape: Shape, old: Layer, new: Layer) -> Shape:
    if not shape:  # one number, such as a gain
        return shape
    if old.op == BRANCH_CONSTANT:
        return (new.output_shape[constant_axis(new)],)
    if len(shape) == 1:
        return (new.out_channels,) if shape[0] == old.out_channels else shape
    axes = zip(shape, _first_axes(old), _first_axes(new), strict=False)
    return (*(now if size == was else size for size, was, now in axes), *shape[2:])


def _first_axes(layer: Layer) -> Shape:
    """How large the first two axes of the layer's weight are."""
    if is_transposed(layer.op):
        return layer.in_channels, layer.out_channels // layer.groups
    return layer.out_channels, layer.in_channels // layer.groups


def _num_parameters(old: Layer, new: Layer) -> int:
    if not old.num_parameters:
        return 0
    if old.kind in (LayerKind.CONV, LayerKind.LINEAR):
        kernel = num_taps(old) if old.kind is LayerKind.CONV else 1
        return new.out_channels * (new.in_channels // new.groups * kernel + int(old.bias))
    return round(old.num_parameters * new.out_channels / old.out_channels)


def _up(channels: int, multiple: int) -> int:
    return -(-channels // multiple) * multiple
