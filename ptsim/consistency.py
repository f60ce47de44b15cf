"""Whether what a network or an operator says of itself can be true: fields against each other, names against names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from ptsim.network import Layer, LayerKind, Network

MOST_MOMENTUM = 1_000_000  # of an optimizer
MOST_COUNTED = 2**40  # of anything that a profile counts
MOST_ELEMENTS = 2**48  # of one tensor: 1 PiB in fp32
Shape = Sequence[int]


def operator_problem(kind: LayerKind, inputs: Sequence[Shape], output: Shape, groups: int) -> str | None:
    """Why no operator of this kind has these shapes, as a sentence without its subject; None where one can have them.

    Args:
        kind: what the operator does.
        inputs: shapes without the mini-batch axis; channels first, but last of a linear layer.
        output: the same.
        groups: of a convolution.
    """
    if (problem := _size_problem((*inputs, output))) is not None:
        return problem
    if kind is LayerKind.CONV:
        if not inputs or not inputs[0] or not output:
            return f"is a convolution of the input shapes {_shown(inputs)}, expected (channels, height, width)"
        for channels in (inputs[0][0], output[0]):
            if groups < 1 or channels % groups:
                return f"has {channels} channels in {groups} groups, expected a multiple of the groups"
    if kind is LayerKind.LINEAR and (not inputs or not inputs[0] or not output):
        return f"is a linear layer of the input shapes {_shown(inputs)}, expected (…, features)"
    if kind is LayerKind.BATCH_NORM and (not inputs or tuple(inputs[0]) != tuple(output)):
        return f"is a batch norm from {_shown(inputs)} to {tuple(output)}, expected equal shapes"
    return None


def _size_problem(shapes: Sequence[Shape]) -> str | None:
    too_large = any(math.prod(shape) > MOST_ELEMENTS for shape in shapes)
    return f"has a tensor of more than {MOST_ELEMENTS:,} elements" if too_large else None


def network_problem(network: Network) -> str | None:
    """Why the network cannot be one, as a sentence without its end; None where nothing contradicts itself."""
    if not network.layers:
        return "has no layer"
    position = {layer.name: index for index, layer in enumerate(network.layers)}
    if len(position) < len(network.layers):
        name = next(name for name, times in Counter(layer.name for layer in network.layers).items() if times > 1)
        return f"has two layers called {name!r}"
    for layer in network.layers:
        if problem := layer_problem(layer):
            return f"layer {layer.name!r} {problem}"
    for source, target in network.edges:
        for name in (source, target):
            if name not in position:
                return f"has an edge {source!r} → {target!r}, but no layer {name!r}"
        if position[source] >= position[target]:
            return f"has an edge {source!r} → {target!r} against the order of execution"
    owned: Counter[str] = Counter()
    for parameter in network.parameters:
        if parameter.layer and parameter.layer not in position:  # one that forward never uses is of no layer
            return f"parameter {parameter.name!r} is of the layer {parameter.layer!r}, which does not exist"
        if parameter.num_elements > MOST_ELEMENTS:
            return f"parameter {parameter.name!r} has more than {MOST_ELEMENTS:,} elements"
        owned[parameter.layer] += parameter.num_elements
    for layer in network.layers:
        if layer.num_parameters != owned[layer.name]:
            return (
                f"layer {layer.name!r} has {layer.num_parameters} parameters, "
                f"but the list of parameters has {owned[layer.name]} of it"
            )
    return None


def layer_problem(layer: Layer) -> str | None:
    """Why the layer cannot be one, as a sentence without its subject; None where nothing contradicts itself."""
    for name in ("shared_inputs", "fixed_inputs"):
        if any(index >= len(layer.input_shapes) for index in getattr(layer, name)):
            return f"has {len(layer.input_shapes)} inputs, but {name} {list(getattr(layer, name))}"
    if layer.once:  # its shapes are whole: a weight that is standardised, a table that is looked up
        return None
    inputs, output = layer.input_shapes, layer.output_shape
    if layer.kind is LayerKind.CONV:
        inputs, output = tuple(layer.unfolded(shape)[1] for shape in inputs), layer.unfolded(output)[1]
    problem = _size_problem((*layer.input_shapes, layer.output_shape))
    problem = problem or operator_problem(layer.kind, inputs, output, layer.groups)
    if problem or layer.kind not in (LayerKind.CONV, LayerKind.LINEAR):
        return problem
    axis = 0 if layer.kind is LayerKind.CONV else -1
    for what, said, shape in (
        ("in_channels", layer.in_channels, inputs[0]),
        ("out_channels", layer.out_channels, output),
    ):
        if said != shape[axis]:
            return f"has {what} {said}, but the shape {_shown([shape])}"
    return None


def _shown(shapes: Sequence[Shape]) -> str:
    return " and ".join(str(tuple(shape)) for shape in shapes) or "of no input"
