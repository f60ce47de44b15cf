"""The rules of layers: convolutions, linear layers and normalisations, as modules and as functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ptsim.prune.cut import normed_weight
from ptsim.prune.labels import (
    BATCH_NORMS,
    CONVS,
    INSTANCE_NORMS,
    TRANSPOSED_CONVS,
    WIDTH,
    Facets,
    Label,
    State,
    Weighted,
    along,
)
from ptsim.prune.rules import Call, RefusedError, rule, tensor_labels

_RMS_NORM = (nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()


@rule(*CONVS, *TRANSPOSED_CONVS, sizes=True)
def conv_module(call: Call) -> Label:
    """A convolution with its own weight."""
    module: Any = call.module
    normed = normed_weight(module)
    if normed is not None:
        return _computed(call, call.path, *normed, module.bias, module.groups)
    return _conv(call, call.path, module.weight, module.bias, module.groups)


def _computed(call: Call, layer: str, weight: Tensor, gain: Tensor | None, bias: Tensor | None, groups: int) -> Label:
    """A layer whose filters are computed from `weight`, every one from its own part of it alone.

    Its outputs may go once nothing reads them. Its inputs stay: what the filters become without one is not what they
    were with zeros in its place, or the size of the weight does not say how large the filter is.
    """
    _check_bias(call, bias)
    state, value = call.state, call.value
    dim = value.ndim - weight.ndim + 1 if weight.ndim > 2 else value.ndim - 1
    name = state.names.get(id(weight))
    was_grouped = state.seed is not None and (name, 1) not in state.seed  # and one group is left
    depthwise = groups == value.shape[dim] == weight.shape[0] and weight.shape[1] == 1 and (groups > 1 or was_grouped)
    transposed = isinstance(call.module, TRANSPOSED_CONVS) or call.name.startswith("conv_transpose")
    if name is None or transposed or (groups > 1 and not depthwise):
        call.refuse(f"{call.op} computes its weight from all that it reads")
    outputs = state.axis(name, 0, weight.shape[0])
    if depthwise:
        inputs = call.vector(dim, len(outputs))
        if inputs is None:
            call.refuse(f"{call.op} computes its weight")
        state.unite(inputs, outputs)
    else:
        inputs = state.axis(name, 1, weight.shape[1])
        state.freeze(torch.cat([call.x.flatten(), inputs]), f"{layer} computes its weight from all that it reads")
    if name not in state.layers:
        state.layers[name] = Weighted(
            layer, name, groups, depthwise, False, inputs, outputs, (call.node.name,), trained=False
        )
    for tensor in (gain, bias):
        state.bind(tensor, outputs)
    return along(outputs, dim, value.ndim)


@rule("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d", shapes=True)
def conv_function(call: Call) -> Label:
    """A convolution with a weight from somewhere in the model.

    The number of its groups stands in the model's code, or in an attribute of a layer, which a cut keeps right.
    """
    weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
    groups = call.argument(6, "groups", 1)
    if id(weight) in call.state.names:
        label = _conv(call, call.layer, weight, bias, groups)
    else:
        weight = _origin(call, weight)
        label = _computed(call, call.layer, weight, None, bias, groups)
    number = call.source(6, "groups")
    if groups > 1 and isinstance(label, Tensor) and not getattr(number, "synced", False):
        inputs = call.state.layers[call.state.names[id(weight)]].inputs
        call.state.number(number, inputs.reshape(groups, -1))
        call.state.sensitive(call.x)
        call.state.sensitive(label)
    return label


def _check_bias(call: Call, bias: Tensor | None) -> None:
    """A bias that is no tensor of the model, such as one under a mask of `torch.nn.utils.prune`, cannot be cut."""
    if bias is not None and id(bias) not in call.state.names:
        call.refuse(f"{call.op} computes its bias")


def _origin(call: Call, weight: Tensor) -> Tensor:
    """The parameter of which a computed weight has one filter for each of its own."""
    state, source = call.state, call.source(1, "weight")
    label = call.label_of(source)
    rows = (
        [slots.flatten() for slots in label.labels if len(slots) == slots.numel()] if isinstance(label, Facets) else []
    )
    read = _read(state, source) if rows else set[str]()
    alike = [tensor for name, tensor in state.tensors.items() if name in read and tensor.shape == weight.shape]
    for slots in rows if alike else ():
        for reached in _reached(state, slots):
            for tensor in alike:
                known = state.axes.get((state.names[id(tensor)], 0))
                if known is not None and torch.equal(known, reached):
                    return tensor
    raise RefusedError(f"{call.op} computes its weight")


def _read(state: State, node: fx.Node) -> set[str]:
    """The names of the tensors that a value is computed from."""
    seen, waiting = set[fx.Node](), [node]
    while waiting:
        at = waiting.pop()
        waiting += [n for n in at.all_input_nodes if n not in seen]
        seen.add(at)
    return {state.names.get(id(at.meta["value"]), "") for at in seen if at.op == "get_attr"}


def _reached(state: State, slots: Tensor) -> Iterator[Tensor]:
    """The axes that are united with one as they stand, it itself first."""
    found = [slots]
    for known in found:
        yield known
        for pair in state.pairs:
            for one, other in ((pair[0], pair[1]), (pair[1], pair[0])):
                if torch.equal(one, known) and not any(torch.equal(other, each) for each in found):
                    found.append(other)


def _conv(call: Call, layer: str, weight: Tensor, bias: Tensor | None, groups: int) -> Label:
    _check_bias(call, bias)
    state, value = call.state, call.value
    transposed = isinstance(call.module, TRANSPOSED_CONVS) or call.name.startswith("conv_transpose")
    dim = value.ndim - weight.ndim + 1
    name = state.names.get(id(weight))
    if name is None or dim < 0:
        call.refuse(f"{call.op} computes its weight")
    if transposed and groups > 1:
        return _depthwise_transposed(call, layer, weight, bias, groups)
    if _one_by_one(call, dim, weight):
        return _positions(call, layer, weight, groups)
    out_channels = value.shape[dim]
    in_channels = weight.shape[0] if transposed else weight.shape[1] * groups
    vector = call.vector(dim, in_channels)
    outputs = state.axis(name, 1 if transposed else 0, out_channels)
    if groups == 1:
        was_grouped = state.seed is not None and (name, -1) in state.seed  # and one group is left
        inputs = state.axis(name, -1 if was_grouped else 0 if transposed else 1, in_channels)
    else:
        inputs = state.axis(name, -1, in_channels)
        if state.seed is None and (groups == in_channels or name not in state.regrouped):  # only whole groups can go
            state.unite(inputs.view(groups, -1)[:, :1], inputs.view(groups, -1))
            state.unite(inputs.view(groups, -1)[:, :1], outputs.view(groups, -1))
    if vector is None:
        state.freeze(inputs, f"{call.op} meets channels that lie along several axes")
    else:
        state.unite(inputs, vector)
    state.weighted(layer, weight, groups, inputs, outputs, call.node.name, transposed=transposed)
    state.bind(bias, outputs)
    return along(outputs, dim, value.ndim)


def _depthwise_transposed(call: Call, layer: str, weight: Tensor, bias: Tensor | None, groups: int) -> Label:
    """Every input channel has outputs of its own, which go with it. The weight has (inputs, outputs of a group, …)."""
    state, value = call.state, call.value
    dim = value.ndim - weight.ndim + 1
    vector = call.vector(dim, groups) if groups == weight.shape[0] else None
    if vector is None or not isinstance(call.module, TRANSPOSED_CONVS):
        call.refuse(f"{call.op} is a grouped transposed convolution")
    inputs = state.axis(state.names[id(weight)], 0, groups)
    state.unite(inputs, vector)
    outputs = inputs.repeat_interleave(weight.shape[1])
    state.weighted(layer, weight, groups, inputs, outputs, call.node.name, transposed=True)
    state.bind(bias, outputs)
    return along(outputs, dim, value.ndim)


def _one_by_one(call: Call, dim: int, weight: Tensor) -> bool:
    """True if the channels lie along other axes than the one that the layer reads, and it treats every one alike."""
    before, after = call.sources[0].meta["value"].shape, call.value.shape
    varying = [axis for axis, length in enumerate(call.x.shape) if length > 1]
    if not varying and call.state.seed is not None and len(after) == len(before):  # of several channels one is left
        read = call.state.seed.get((call.state.names[id(weight)], 1), call.x)
        return bool((call.x >= 0).all()) and bool((read < 0).all())
    if not varying or dim % len(before) in varying or len(after) != len(before):
        return False
    window = {axis: weight.shape[axis - len(after)] for axis in range(len(after) - weight.ndim + 2, len(after))}
    if weight.ndim > 2 and any(window.get(axis, 1) > 1 or before[axis] != after[axis] for axis in varying):
        call.refuse(f"{call.op} slides over these channels, so that removing one would change its neighbours")
    return True


def _positions(call: Call, layer: str, weight: Tensor, groups: int) -> Label:
    """A layer that mixes the positions of every channel: the channels pass, what it reads and writes stays."""
    state = call.state
    name, read, written = state.names[id(weight)], weight.shape[1] * groups, weight.shape[0]
    inputs, outputs = state.axis(name, 1 if groups == 1 else -1, read), state.axis(name, 0, written)
    state.freeze(torch.cat([inputs, outputs]), f"{layer} mixes positions, which are no channels")
    state.weighted(layer, weight, groups, inputs, outputs, call.node.name)
    return call.x


@rule(nn.Linear)
def linear_module(call: Call) -> Label:
    """A linear layer with its own weight."""
    module: Any = call.module
    normed = normed_weight(module)
    if normed is not None:
        return _computed(call, call.path, *normed, module.bias, 1)
    return _linear(call, call.path, module.weight, module.bias)


@rule("linear")
def linear_function(call: Call) -> Label:
    """A linear layer with a weight from somewhere in the model."""
    return _linear(call, call.layer, call.argument(1, "weight"), call.argument(2, "bias"))


def _linear(call: Call, layer: str, weight: Tensor, bias: Tensor | None) -> Label:
    _check_bias(call, bias)
    state = call.state
    name = state.names.get(id(weight))
    if name is None:
        call.refuse(f"{call.op} computes its weight")
    if weight.ndim != 2:
        call.refuse(f"{call.op} sums these channels up")
    if _one_by_one(call, -1, weight):
        return _positions(call, layer, weight, 1)
    vector = call.vector(-1, weight.shape[1])
    inputs, outputs = state.axis(name, 1, weight.shape[1]), state.axis(name, 0, weight.shape[0])
    if vector is None:
        state.freeze(inputs, f"{call.op} meets channels that lie along several axes")
    else:
        state.unite(inputs, vector)
    state.weighted(layer, weight, 1, inputs, outputs, call.node.name)
    state.bind(bias, outputs)
    return along(outputs, call.value.ndim - 1, call.value.ndim)


@rule("bilinear", nn.Bilinear)
def bilinear(call: Call) -> Label:
    """Products of what two inputs hold: both stay, since one matrix per output decides about a pair of them."""
    module: Any = call.module
    state = call.state
    weight = call.argument(2, "weight") if module is None else module.weight
    bias = call.argument(3, "bias") if module is None else module.bias
    _check_bias(call, bias)
    if id(weight) not in state.names:
        call.refuse(f"{call.op} computes its weight")
    for given in (call.source(0, "input1"), call.source(1, "input2")):  # which may be one tensor
        for part in tensor_labels(call.label_of(given)):
            state.freeze(part, f"{call.op} multiplies these channels with others")
    outputs = state.axis(state.names[id(weight)], 0, weight.shape[0])
    state.bind(bias, outputs)
    return along(outputs, call.value.ndim - 1, call.value.ndim)


# ---------------------------------------------------------------------- normalisations


@rule(*BATCH_NORMS, *INSTANCE_NORMS)
def norm_module(call: Call) -> Label:
    """Every channel by itself, with vectors that run along the channels."""
    size = call.value.shape[1]
    vector = call.vector(1, size)
    if vector is None:
        call.refuse(f"{call.op} meets channels that lie along several axes")
    _bind_vectors(call, vector, size)
    return call.x


def _bind_vectors(call: Call, vector: Tensor, size: int) -> None:
    assert call.module is not None, "of a module"
    if hasattr(call.module, "parametrizations"):
        call.refuse(f"{call.op} computes its weight")
    tensors = [*call.module.parameters(recurse=False), *call.module.buffers(recurse=False)]
    for tensor in tensors:
        if tensor.ndim == 1 and tensor.shape[0] == size:
            call.state.bind(tensor, vector)
    if not tensors:  # its width stands in an attribute alone
        call.state.unite(call.state.axis(f"{call.path}.{WIDTH}", 0, size), vector)


@rule(nn.PReLU)
def prelu_module(call: Call) -> Label:
    """One slope for all, or one per channel."""
    return norm_module(call) if getattr(call.module, "num_parameters", 1) != 1 else call.x


@rule("batch_norm instance_norm prelu")
def norm_function(call: Call) -> Label:
    """A normalisation or PReLU whose vectors are parameters or buffers of the model."""
    size = call.value.shape[1]
    if isinstance(call.labels[0], Facets):
        return _normed_parameter(call, call.labels[0])
    vector = call.vector(1, size)
    vectors = [n.meta["value"] for n in call.node.all_input_nodes[1:] if isinstance(n.meta["value"], Tensor)]
    vectors = [v for v in vectors if v.numel() > 1 or size == 1]
    if vector is None or any(id(v) not in call.state.names or v.shape != vector.shape for v in vectors):
        call.refuse(f"{call.op} meets channels in a way that has no rule")
    for tensor in vectors:
        call.state.bind(tensor, vector)
    return call.x


def _normed_parameter(call: Call, facets: Facets) -> Label:
    """A parameter whose axis 1 is normalised row by row, with vectors that are computed from parameters as well."""
    kept: list[Tensor] = []
    for label in facets.labels:
        if label.shape[1] == label.numel():
            kept.append(label)
        else:
            call.state.freeze(label, f"{call.op} normalises over them")
    for other in call.labels[1:]:
        for vector in other.labels if isinstance(other, Facets) else tensor_labels(other):
            for label in kept:
                call.state.unite(label.flatten(), vector.flatten().expand(label.numel()))
    return Facets(kept)


@rule(nn.GroupNorm)
def group_norm(call: Call) -> Label:
    """The channels of one group are normalised together and go together; the groups do not know each other."""
    module: Any = call.module
    groups, size = module.num_groups, module.num_channels
    if groups == 1:
        return _over_all(call)
    vector = call.vector(1, size)
    if vector is None:
        call.refuse(f"{call.op} meets channels that lie along several axes")
    together = vector.reshape(groups, -1)
    call.state.unite(together[:, :1], together)
    _bind_vectors(call, vector, size)
    return call.x


def _over_all(call: Call) -> Label:
    """A normalisation over all that an image has: whatever lies along any of its axes is mixed."""
    return call.along(range(1, call.x.ndim), verb="normalises over")


@rule("group_norm")
def group_norm_function(call: Call) -> Label:
    """In groups whose number stands in the model's code: they may be one."""
    return _over_all(call)


@rule("local_response_norm", nn.LocalResponseNorm)
def over_neighbours(call: Call) -> Label:
    """Over neighbouring channels, at every place by itself."""
    return call.along([1], verb="normalises over")


@rule("layer_norm rms_norm", nn.LayerNorm, *_RMS_NORM)
def layer_norm(call: Call) -> Label:
    """Over the last axes."""
    module: Any = call.module
    shape = module.normalized_shape if module is not None else call.argument(1, "normalized_shape")
    return call.along(range(-len(shape), 0), verb="normalises over")
