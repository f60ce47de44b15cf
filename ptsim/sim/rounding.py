"""What a pruned network would be if its channel counts were rounded up: dead channels that keep tensor cores fed."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from ptsim.costs.walked import rescaled
from ptsim.network import Layer, LayerKind, Network, Parameter
from ptsim.operators import BRANCH_CONSTANT, constant_axis, is_gate, is_transposed, second_features, ungated

Shape = tuple[int, ...]
# What they give has other channels than what they are given, or the same ones elsewhere.
_OTHER_CHANNELS = (LayerKind.CONCAT, LayerKind.RESHAPE, LayerKind.MATMUL, LayerKind.OTHER)


class _Growth(NamedTuple):
    """The axis of a tensor that has become longer, its length before, and now."""

    axis: int
    was: int
    now: int


class _Target(NamedTuple):
    """What a layer's channels are rounded to: a multiple, and at most as many as there were before pruning.

    They share out over `groups`, those of convolutions that read or write them. `follows`: the layer was depthwise
    before pruning, which left it one channel.
    """

    multiple: int
    groups: int
    most: int | None
    follows: bool = False

    def of(self, channels: int, groups: int = 1) -> int:
        """The channels instead of so many, of which every one of the layer's own groups has equally many, too."""
        groups = math.lcm(groups, self.groups)
        step = math.lcm(self.multiple, groups)
        up = -(-channels // step) * step
        return up if self.most is None else max(channels, min(up, self.most // groups * groups))


@functools.lru_cache(maxsize=256)
def rounded(network: Network, multiple: int, dense: Network | None = None) -> Network:
    """The network with every channel count rounded up to a multiple of `multiple`.

    The image's own channels and the classifier's outputs stay as they are. Counts (MACs, saved elements) grow in
    proportion to the channels that they cover, and the footprints of a watched iteration moment by moment. With
    `multiple` 1 the network is returned unchanged.

    Args:
        network: after pruning.
        multiple: of channels.
        dense: the network before pruning: no layer becomes wider than it was there; None: that is not known.

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
    parameters: dict[str, list[Parameter]] = {}
    for parameter in network.parameters:
        parameters.setdefault(parameter.layer, []).append(parameter)
    before = {} if dense is None else {layer.name: layer for layer in dense.layers}
    shares = _shares(network, producers)
    new: dict[str, Layer] = {}
    grown = {parameter.name: parameter for parameter in network.parameters}
    for layer in network.layers:
        outputs = [(network.layer(source).output_shape, new[source].output_shape) for source in producers[layer.name]]
        inputs = _inputs(layer, outputs, network.input_shape)
        is_classifier = layer.name in products[-1:] and layer.out_channels == network.num_classes
        goal = _Target(
            1 if is_classifier else multiple, shares[layer.name], _most(layer, before), _was_depthwise(layer, before)
        )
        found = (_round_constant if layer.op == BRANCH_CONSTANT else _round_layer)(layer, inputs, goal)
        own = [_round_parameter(parameter, layer, found) for parameter in parameters.get(layer.name, ())]
        grown |= {parameter.name: parameter for parameter in own}
        if found is not layer:
            found = msgspec.structs.replace(found, num_parameters=sum(parameter.num_elements for parameter in own))
        new[layer.name] = found
    result = msgspec.structs.replace(
        network, layers=tuple(new.values()), parameters=tuple(grown.values()), footprints=()
    )
    footprints = tuple(rescaled(footprint, network, result) for footprint in network.footprints)
    return msgspec.structs.replace(result, footprints=footprints)


def _shares(network: Network, producers: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Over how many groups the channels of every layer have to share out.

    Those that a grouped convolution reads or writes do, over its groups, and with them whatever they are added to or
    multiplied by.
    """
    layers = {layer.name: layer for layer in network.layers}
    consumers: dict[str, list[str]] = {name: [] for name in layers}
    for target, sources in producers.items():
        for source in sources:
            consumers[source].append(target)
    found = dict.fromkeys(layers, 1)
    grouped = [x for x in network.layers if x.kind is LayerKind.CONV and x.groups > 1 and not x.is_depthwise]
    for reader, starts in ((layer, start) for layer in grouped for start in (producers[layer.name], [layer.name])):
        waiting, seen = list(starts), set[str]()
        while waiting:
            layer = layers[waiting.pop()]
            if layer.name in seen or (layer.kind in _OTHER_CHANNELS and not _makes_channels(layer)):
                continue
            seen.add(layer.name)
            found[layer.name] = math.lcm(found[layer.name], reader.groups)
            waiting += (name for name in consumers[layer.name] if not _makes_channels(layers[name]))
            waiting += () if _makes_channels(layer) else producers[layer.name]
    return found


def _makes_channels(layer: Layer) -> bool:
    """Whether a layer decides how many channels it gives."""
    product = layer.kind in (LayerKind.CONV, LayerKind.LINEAR) and not layer.is_depthwise
    return product or layer.op == BRANCH_CONSTANT or is_gate(layer.name)


def _was_depthwise(layer: Layer, before: Mapping[str, Layer]) -> bool:
    """Whether a convolution of one channel is all that pruning left of a depthwise one."""
    owner = before.get(ungated(layer.name, before))
    return layer.kind is LayerKind.CONV and layer.in_channels == 1 and owner is not None and owner.is_depthwise


# ---------------------------------------------------------------------- what flows in


def _inputs(layer: Layer, outputs: Sequence[tuple[Shape, Shape]], image: Shape) -> tuple[Shape, ...]:
    """The shapes that flow in, from layers whose `outputs` were of the one shape and are of the other."""
    found = []
    for index, shape in enumerate(layer.input_shapes):
        if len(outputs) == len(layer.input_shapes):
            source: tuple[Shape, Shape] | None = outputs[index]
        else:  # the network's own input, one tensor used twice, or pieces of one
            source = next((pair for pair in outputs if pair[0] == shape), None)
            pieces = (pair for pair in outputs if shape != image and _is_piece(shape, *pair))
            source = source or next(pieces, None)
        if source is not None:
            shape = _follows(shape, source[0], _growths(*source), axis=_reads_along(layer, shape))
        found.append(shape)
    return tuple(found)


def _reads_along(layer: Layer, shape: Shape) -> int | None:
    """The axis along which a convolution or linear layer has its channels; None of other layers."""
    if layer.kind is LayerKind.CONV:
        return len(shape) - len(layer.unfolded(shape)[1])
    return len(shape) - 1 if layer.kind is LayerKind.LINEAR else None


def _growths(was: Shape, now: Shape) -> list[_Growth]:
    return [_Growth(axis, a, b) for axis, (a, b) in enumerate(zip(was, now, strict=True)) if a != b]


def _is_piece(shape: Shape, was: Shape, now: Shape) -> bool:
    """True for a part of a tensor along an axis that has grown."""
    axes = [growth.axis for growth in _growths(was, now)]
    return len(shape) == len(was) and any(_others(shape, axis) == _others(was, axis) for axis in axes)


def _others(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], *shape[axis + 1 :])


def _follows(shape: Shape, was: Shape, growths: Sequence[_Growth], *, axis: int | None = None) -> Shape:
    """A shape that was made of `was`, once that has grown. `axis`: where channels are read, if that is known."""
    found = shape
    for growth in growths if shape else ():
        at = _place(shape, was, growth, axis)
        found = _with(found, at, round(found[at] * growth.now / growth.was))
    return found


def _with(shape: Shape, axis: int, size: int) -> Shape:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _place(shape: Shape, was: Shape, growth: _Growth, axis: int | None) -> int:
    """Along which axis channels lie that were moved: where they are read, or as many as they were, or a multiple."""
    as_many = [at for at, size in enumerate(shape) if size == growth.was]
    if axis is not None and axis in as_many:
        return axis
    if len(shape) == len(was) and (growth.axis in as_many or _others(shape, growth.axis) == _others(was, growth.axis)):
        return growth.axis
    whole = [at for at, size in enumerate(shape) if size > 1 and size * growth.now % growth.was == 0]
    return (as_many if len(as_many) == 1 else whole or as_many or [0])[0]


# ---------------------------------------------------------------------- what a layer becomes


def _most(layer: Layer, before: Mapping[str, Layer]) -> int | None:
    """The channels that a layer of so many groups wrote before pruning, or could gather; None if that is not known."""
    owner = before.get(ungated(layer.name, before))
    if owner is None:
        return None
    if layer.op == "gather":
        return owner.in_channels
    return owner.out_channels // max(owner.groups, 1) * max(layer.groups, 1)


def _round_layer(layer: Layer, inputs: tuple[Shape, ...], target: _Target) -> Layer:
    in_channels, out_channels, groups = layer.in_channels, layer.out_channels, layer.groups
    match layer.kind:
        case LayerKind.CONV if inputs:
            in_channels = layer.unfolded(inputs[0])[1][0]
            if target.follows or layer.is_depthwise:
                groups, out_channels = in_channels, out_channels // layer.in_channels * in_channels
            else:
                out_channels = target.of(out_channels, groups)
            output = _convolved(layer, inputs[0], out_channels)
        case LayerKind.LINEAR if inputs:
            in_channels, out_channels = inputs[0][-1], target.of(out_channels)
            same = layer.output_shape[:-1] == layer.input_shapes[0][:-1]
            output = (*(inputs[0] if same else layer.output_shape)[:-1], out_channels)
        case LayerKind.BATCH_NORM if inputs and out_channels not in layer.output_shape:  # of a gated stream
            in_channels = out_channels = target.of(out_channels)
            output = inputs[0]
        case _ if is_gate(layer.name) and inputs:
            in_channels, out_channels = inputs[0][0], target.of(out_channels)
            if layer.op == "gather":
                out_channels = min(out_channels, in_channels)
            output = _with(layer.output_shape, 0, out_channels)
        case _:
            output = _output(layer, inputs)
            out_channels = _renamed(out_channels, layer.output_shape, output)
            if inputs:
                in_channels = _renamed(in_channels, layer.input_shapes[0], inputs[0])
    if (inputs, output, out_channels) == (layer.input_shapes, layer.output_shape, layer.out_channels):
        return layer  # with all that its capture counted
    in_ratio = sum(math.prod(shape) for shape in inputs) / max(1, layer.input_elements)
    out_ratio = math.prod(output) / max(1, layer.output_elements)
    mac_ratio = in_ratio
    if layer.kind is LayerKind.ELEMENTWISE:  # one for every element that comes out
        mac_ratio = out_ratio
    if layer.kind is LayerKind.MATMUL:  # of whatever has the channels
        mac_ratio = max(in_ratio, out_ratio)
    if layer.kind in (LayerKind.CONV, LayerKind.LINEAR):
        seconds = [second_features(layer.op, shapes) for shapes in (layer.input_shapes, inputs)]
        per_output = (in_channels / groups) / (layer.in_channels / layer.groups) if layer.in_channels else 0.0
        mac_ratio = per_output * out_ratio * seconds[1] / max(1, seconds[0])
    return msgspec.structs.replace(
        layer,
        in_channels=in_channels,
        out_channels=out_channels,
        groups=groups,
        input_shapes=inputs,
        output_shape=output,
        forward_macs=round(layer.forward_macs * mac_ratio),
        saved_elements=round(layer.saved_elements * in_ratio),
        saved_other_bytes=round(layer.saved_other_bytes * out_ratio),
        saved_fixed_bytes=round(layer.saved_fixed_bytes * in_ratio),
    )


def _round_constant(layer: Layer, inputs: tuple[Shape, ...], target: _Target) -> Layer:
    """The end of a removed branch: nothing flows in, and it is as wide as the stream that it is added to."""
    axis = constant_axis(layer)
    output = _with(layer.output_shape, axis, target.of(layer.output_shape[axis]))
    return msgspec.structs.replace(layer, input_shapes=inputs, output_shape=output, out_channels=output[0])


def _convolved(layer: Layer, given: Shape, out_channels: int) -> Shape:
    """Of as many images as flow in, where the code folds channels into the mini-batch."""
    image, read = layer.unfolded(layer.output_shape)[1], layer.unfolded(layer.input_shapes[0])[1]
    folded, was = layer.output_shape[: -len(image)], layer.input_shapes[0][: -len(read)]
    return (*(given[: -len(read)] if folded == was else folded), out_channels, *image[1:])


def _output(layer: Layer, inputs: tuple[Shape, ...]) -> Shape:
    """What a layer gives that has no channels of its own."""
    output, pairs = layer.output_shape, list(zip(layer.input_shapes, inputs, strict=True))
    if layer.kind is LayerKind.CONCAT:
        axis = next((axis for axis in range(len(output)) if _is_joined(layer, axis)), None)
        if axis is not None:
            widest = max(inputs, key=lambda shape: math.prod(_others(shape, axis)))
            return _with(widest, axis, sum(shape[axis] for shape in inputs))
    alike = [now for was, now in pairs if was == output]
    if alike:
        return max(alike, key=math.prod)
    changed = [(was, now) for was, now in pairs if was != now]
    if not changed:
        return output
    was, now = changed[0]
    growths = _growths(was, now)
    if layer.kind in (LayerKind.MATMUL, LayerKind.POOL):  # some channels are summed up
        free = len(output) < len(was) or layer.kind is LayerKind.MATMUL  # to lie elsewhere
        growths = [g for g in growths if (g.was in output if free else output[g.axis] == g.was)]
    return _follows(output, was, growths)


def _is_joined(layer: Layer, axis: int) -> bool:
    """True if the inputs lie one behind the other along this axis of the output."""
    shapes, output = layer.input_shapes, layer.output_shape
    alike = all(len(s) == len(output) and _others(s, axis) == _others(output, axis) for s in shapes)
    return alike and sum(shape[axis] for shape in shapes) == output[axis]


def _renamed(channels: int, was: Shape, now: Shape) -> int:
    """How many channels there are where they were `channels`."""
    first = (0, -1) if len(was) in (1, 3) else (-1, 0)
    places: list[int] = [*first, *range(len(was))]
    for axis in places if was else ():
        if was[axis] == channels:
            return now[axis]
    elements = math.prod(was)
    grown: int = round(channels * math.prod(now) / elements) if elements else channels
    return grown


def _round_parameter(parameter: Parameter, old: Layer, new: Layer) -> Parameter:
    return msgspec.structs.replace(parameter, shape=_parameter_shape(parameter.shape, old, new))


def _parameter_shape(shape: Shape, old: Layer, new: Layer) -> Shape:
    if old.op == BRANCH_CONSTANT:
        return tuple(new.output_shape[constant_axis(new)] for _ in shape)
    if old.kind in (LayerKind.CONV, LayerKind.LINEAR, LayerKind.BATCH_NORM):
        if len(shape) == 1:
            return (new.out_channels,) if shape[0] == old.out_channels else shape
        before, after = _axes(old), _axes(new)
        axes = zip(shape, before, after, strict=False)
        return (*(now if size == was else size for size, was, now in axes), *shape[len(before) :])
    for was, now in ((old.output_shape, new.output_shape), *zip(old.input_shapes, new.input_shapes, strict=True)):
        for growth in _growths(was, now):
            if growth.was in shape:
                return _with(shape, shape.index(growth.was), growth.now)
    return shape


def _axes(layer: Layer) -> Shape:
    """How large the axes of the layer's weight are, but for a filter's own."""
    if is_transposed(layer.op):
        return layer.in_channels, layer.out_channels // layer.groups
    second = second_features(layer.op, layer.input_shapes)
    return (layer.out_channels, layer.in_channels // layer.groups, *((second,) if second > 1 else ()))
