"""How does a described network or operator become something that runs? From the description alone, without its code.

So a trace can be calibrated on a machine that has neither the model's code nor its weights. The numbers inside are
random; the shapes, and therefore the work, are those of the description.
"""

from __future__ import annotations

import dataclasses
import math
import operator as python
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor, fx, nn

from ptsim.capture.network import layer_names, training_graph
from ptsim.errors import UnsupportedModelError
from ptsim.hardware.profile import Operator, OperatorSetting, operator_of
from ptsim.network import Layer, LayerKind, Network, Precision, Shape
from ptsim.operators import BRANCH_CONSTANT, PLACEHOLDER, constant_axis

_ACTIVATIONS: dict[str, Callable[[bool], nn.Module]] = {
    "relu": lambda inplace: nn.ReLU(inplace=inplace),
    "relu6": lambda inplace: nn.ReLU6(inplace=inplace),
    "leaky_relu": lambda inplace: nn.LeakyReLU(inplace=inplace),
    "elu": lambda inplace: nn.ELU(inplace=inplace),
    "silu": lambda inplace: nn.SiLU(inplace=inplace),
    "mish": lambda inplace: nn.Mish(inplace=inplace),
    "hardswish": lambda inplace: nn.Hardswish(inplace=inplace),
    "hardsigmoid": lambda inplace: nn.Hardsigmoid(inplace=inplace),
    "hardtanh": lambda inplace: nn.Hardtanh(inplace=inplace),
    "gelu": lambda _: nn.GELU(),
    "sigmoid": lambda _: nn.Sigmoid(),
    "tanh": lambda _: nn.Tanh(),
    "softmax": lambda _: nn.Softmax(dim=1),
    "log_softmax": lambda _: nn.LogSoftmax(dim=1),
}
_ARITHMETIC: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "add": (torch.add, python.iadd),
    "sub": (torch.sub, python.isub),
    "mul": (torch.mul, python.imul),
    "div": (torch.div, python.itruediv),
}
_RENAMINGS = ("flatten", "unflatten", "reshape", "view", "squeeze", "unsqueeze")  # no element changes its place


@dataclasses.dataclass(frozen=True)
class Call:
    """A function of tensors with its further arguments; `packed` where it takes the tensors as one tuple."""

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...] = ()
    packed: bool = False

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Run it."""
        return self.function(*self.positional(tensors))

    def positional(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """All arguments, for tensors or graph nodes."""
        return ((tuple(values),) if self.packed else tuple(values)) + self.arguments


class _NoChannels(nn.Module):
    """Stands where a layer was removed: an output of its size without a channel."""

    ptsim_leaf, ptsim_kind, ptsim_op = True, "reshape", PLACEHOLDER

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """(N, …) → (N, *shape), which has no element."""
        return x.new_empty((len(x), *self.shape))

    def ptsim_labels(self, state: Any, path: str, x: Tensor, value: Tensor) -> Tensor:
        """No channel comes out."""
        return torch.empty((1, 0) + (1,) * (value.ndim - 2), dtype=torch.int64)


class _BranchConstant(nn.Module):
    """Ends a residual branch that was removed: a constant per channel, made of the parameters that are left."""

    ptsim_leaf, ptsim_kind, ptsim_op = True, "reshape", BRANCH_CONSTANT

    def __init__(self, layer: Layer, num_parameters: int) -> None:
        super().__init__()
        self.shape, axis = layer.output_shape, constant_axis(layer)
        self.shared, width = axis == 1, self.shape[axis]
        self.constants = nn.ParameterList(nn.Parameter(torch.zeros(width)) for _ in range(num_parameters))
        self.register_buffer("template", torch.zeros(width), persistent=False)
        self.template: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(N, …) → (N, *shape), or the shape alone where all images share it."""
        constant = self.template.to(x.dtype)
        for parameter in self.constants:
            constant = constant + parameter
        if self.shared:
            return constant.view(self.shape)
        return constant.view(1, -1, *(1,) * (len(self.shape) - 1)).expand((len(x), *self.shape)).clone()

    def ptsim_labels(self, state: Any, path: str, x: Tensor, value: Tensor) -> Tensor:
        """Its own channels come out."""
        slots: Tensor = state.axis(f"{path}.template", 0, len(self.template))
        for parameter in self.constants:
            state.bind(parameter, slots)
        return slots.view(1, -1, *(1,) * (value.ndim - 2))


def build_operator(operator: Operator) -> nn.Module | Call:
    """What computes `operator`: a module where it has parameters or torch has one, a function otherwise.

    Raises:
        UnsupportedModelError: the description does not say enough to run this operator.
    """
    source, target = operator.inputs[0] if operator.inputs else (), operator.output
    match operator.kind:
        case LayerKind.CONV if operator.op == "conv2d" and len(source) == 3:
            return nn.Conv2d(
                source[0],
                target[0],
                operator.kernel,
                operator.stride,
                operator.padding,
                operator.dilation,
                operator.groups,
                operator.bias,
            )
        case LayerKind.LINEAR if operator.op == "linear" and source:
            return nn.Linear(source[-1], target[-1], operator.bias)
        case LayerKind.BATCH_NORM:
            return {3: nn.BatchNorm2d, 4: nn.BatchNorm3d}.get(len(target), nn.BatchNorm1d)(target[0])
        case LayerKind.NORM if operator.op == "layer_norm":
            return nn.LayerNorm(target[-1])
        case LayerKind.ACTIVATION if operator.op in _ACTIVATIONS:
            return _ACTIVATIONS[operator.op](operator.inplace)
        case LayerKind.POOL if len(source) == 3:
            return _pool(operator)
        case LayerKind.DROPOUT if operator.op == "dropout":
            return nn.Dropout(0.5, inplace=operator.inplace)
        case LayerKind.ELEMENTWISE if operator.op in _ARITHMETIC and len(operator.inputs) == 2:
            return Call(_ARITHMETIC[operator.op][operator.inplace])
        case LayerKind.CONCAT if operator.inputs:
            return Call(torch.cat, (1,), packed=True)
        case LayerKind.RESHAPE if operator.op in _RENAMINGS and math.prod(source) == math.prod(target):
            return Call(torch.flatten, (1,)) if len(target) == 1 else Call(torch.reshape, ((-1, *target),))
    raise UnsupportedModelError(f"operator {operator.op!r} ({operator.kind}) cannot be run from its description alone")


def _pool(operator: Operator) -> nn.Module | Call:
    window = operator.kernel, operator.stride, operator.padding
    match operator.op:
        case "max_pool2d":
            return nn.MaxPool2d(*window, operator.dilation, ceil_mode=_rounds_up(operator))
        case "avg_pool2d":
            return nn.AvgPool2d(*window, ceil_mode=_rounds_up(operator))
        case "adaptive_avg_pool2d":
            return nn.AdaptiveAvgPool2d(operator.output[1:])
        case "adaptive_max_pool2d":
            return nn.AdaptiveMaxPool2d(operator.output[1:])
        case "mean" if len(operator.output) == 1:
            return Call(torch.mean, ((2, 3),))
    raise UnsupportedModelError(f"pooling {operator.op!r} cannot be run from its description alone")


def _rounds_up(operator: Operator) -> bool:
    """Whether the window count is rounded up: the description has the output's size, not torch's flag for it."""
    sizes = zip(operator.inputs[0][1:], operator.output[1:], strict=True)
    windows = zip(operator.kernel, operator.stride, operator.padding, operator.dilation, strict=True)
    return any(
        after > (before + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for (before, after), (kernel, stride, padding, dilation) in zip(sizes, windows, strict=True)
    )


def rebuild(network: Network) -> tuple[fx.GraphModule, Network]:
    """A module with the described layers and connections, and `network` with the names that its layers bear there.

    The layers keep their order, so `zip` maps the renamed ones to the original ones.

    Raises:
        UnsupportedModelError: a layer that cannot be run from its description, or connections that are not described.
    """
    sources: dict[str, list[str]] = {layer.name: [] for layer in network.layers}
    for begin, end in network.edges:
        sources[end].append(begin)
    root, graph = nn.Module(), fx.Graph()
    image = graph.placeholder("image")
    nodes: dict[str, fx.Node] = {}
    setting = OperatorSetting(precision=Precision.FP32, memory_format="contiguous")
    for index, layer in enumerate(network.layers):
        inputs = [nodes[name] for name in sources[layer.name]]
        if len(inputs) < len(layer.input_shapes):  # the network's own input has no name among the edges
            inputs = [image, *inputs]
        if len(inputs) != len(layer.input_shapes):
            raise UnsupportedModelError(
                f"{network.name} cannot be rebuilt: layer {layer.name} has {len(layer.input_shapes)} inputs, "
                f"{len(inputs)} of them are connected"
            )
        if layer.kind is LayerKind.CONV and layer.unfolded(layer.output_shape)[1] != layer.output_shape:
            raise UnsupportedModelError(
                f"{network.name} cannot be rebuilt: layer {layer.name} gets more than images in its mini-batch"
            )
        operation = _left_by_pruning(network, layer) or build_operator(operator_of(layer, batch=1, setting=setting))
        if isinstance(operation, Call):
            nodes[layer.name] = graph.call_function(operation.function, operation.positional(inputs))
        else:
            root.add_module(f"layer{index}", operation)
            nodes[layer.name] = graph.call_module(f"layer{index}", tuple(inputs))
    used = {begin for begin, _ in network.edges}
    ends = [layer.name for layer in network.layers if layer.name not in used]
    if len(ends) != 1:
        raise UnsupportedModelError(f"{network.name} cannot be rebuilt: it has {len(ends)} outputs, expected one")
    graph.output(nodes[ends[0]])
    module = fx.GraphModule(root, graph)
    module.train()
    return module, _as_traced(network, module)


def _left_by_pruning(network: Network, layer: Layer) -> nn.Module | None:
    """What stands for a layer that pruning has removed; None for any other."""
    if layer.op == PLACEHOLDER:
        return _NoChannels(layer.output_shape)
    if layer.op == BRANCH_CONSTANT:
        return _BranchConstant(layer, sum(parameter.layer == layer.name for parameter in network.parameters))
    return None


def _as_traced(network: Network, module: fx.GraphModule) -> Network:
    names = dict(
        zip(
            (layer.name for layer in network.layers),
            layer_names(training_graph(module, network.input_shape)).values(),
            strict=True,
        )
    )
    replace = msgspec.structs.replace
    return replace(
        network,
        layers=tuple(replace(layer, name=names[layer.name]) for layer in network.layers),
        edges=tuple((names[begin], names[end]) for begin, end in network.edges),
        parameters=tuple(replace(p, layer=names[p.layer]) for p in network.parameters),
    )
