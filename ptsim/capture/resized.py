"""What is this network after channels were taken out, given what it was before they were?

A capture rehearses training steps and takes seconds. Where only channel counts have changed, everything that a capture
would find follows from the shapes: layers, edges and parameters come out equal to those of a capture (a test compares
them); the memory footprints, which are no part of a network's identity, are scaled.
"""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

import msgspec
import torch
from torch import Tensor, fx, nn

from ptsim.capture.copies import dtype_of
from ptsim.capture.graph import (
    called_modules,
    evaluation_mode,
    reads_none,
    shape_written,
    sliced_by,
    traced_into,
    written_by,
)
from ptsim.capture.network import capture_network, layer_names
from ptsim.capture.tracers import kept_shape, plain_arguments
from ptsim.capture.ways import fullest_graph
from ptsim.capture.words import words_of
from ptsim.network import Footprint, Layer, LayerKind, Moment, Network, Parameter

Shape = tuple[int, ...]
_BATCH = 2


class _UnexplainedError(Exception):
    """A number of the earlier capture that does not follow from the shapes."""


class Recapture:
    """Networks of a model whose channels are taken out step by step; `model` has no storage (`prune.skeleton`).

    One capture is made for every structure: the modules, their parameters and what the code calls. `base` is the first.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        input_shape: tuple[int, int, int],
        num_classes: int,
        captured: Network | None = None,
    ) -> None:
        """Capture the model as it is, unless it is `captured` already.

        Raises:
            UnsupportedModelError: what `capture_network` raises.
        """
        self.name, self.input_shape, self.num_classes = name, input_shape, num_classes
        self.num_captures = 0
        self._known: dict[_Structure, tuple[Network, _Seen]] = {}
        seen = _Seen(model, input_shape)
        self.base = self._capture(model, seen) if captured is None else self._remember(captured, seen)

    def network(self, model: nn.Module) -> Network:
        """The network that the model is now: resized from a capture where only channel counts have changed."""
        seen = self._look(model)
        if seen.structure in self._known:
            with contextlib.suppress(_UnexplainedError):
                return _resized(*self._known[seen.structure], seen)
        return self._capture(model, seen)

    def _look(self, model: nn.Module) -> _Seen:
        """The graph and shapes of the model as it is now; traced where no graph that is known is its own."""
        for _, known in self._known.values():
            if (seen := known.again(model)) is not None:
                return seen
        return _Seen(model, self.input_shape)

    def _capture(self, model: nn.Module, seen: _Seen) -> Network:
        self.num_captures += 1
        return self._remember(
            capture_network(
                thin_copy(model), name=self.name, input_shape=self.input_shape, num_classes=self.num_classes
            ),
            seen,
        )

    def _remember(self, network: Network, seen: _Seen) -> Network:
        self._known[seen.structure] = network, seen
        return network


def thin_copy(model: nn.Module) -> nn.Module:
    """A copy of a model without storage that can compute.

    Every parameter is one zero, seen at its shape; buffers, which are small and into which code may write, are whole.
    """
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type != "meta":
            memo[id(tensor)] = tensor
        elif isinstance(tensor, nn.Parameter):
            zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
            memo[id(tensor)] = nn.Parameter(zeros, tensor.requires_grad)
        else:
            memo[id(tensor)] = torch.zeros(tensor.shape, dtype=tensor.dtype)
    return copy.deepcopy(model, memo)


_Structure = tuple[tuple[tuple[str, str], ...], tuple[str, ...]]  # calls and the types of their modules; parameters


class _Seen:
    """The graph of a model with the shapes of every call, on tensors without storage."""

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, int, int],
        traced: fx.GraphModule | None = None,
        code: dict[tuple[str, str], Any] | None = None,
    ) -> None:
        """Trace the model, unless it is `traced` and its `code` was read."""
        self._input_shape = input_shape
        with evaluation_mode(model), torch.no_grad():
            model.train()
            self.graph = traced if traced is not None else fullest_graph(model, (_BATCH, *input_shape))
            watcher = _Watcher(model if traced is not None else self.graph, self.graph)
            with torch.device("meta"):  # where the code makes tensors without saying where
                watcher.run(torch.empty((_BATCH, *input_shape), dtype=dtype_of(model)))
        names = layer_names(self.graph)
        self.inputs = {names[node]: shapes for node, shapes in watcher.inputs.items()}
        self.output = {names[node]: shape for node, shape in watcher.results.items()}
        self.modules = {
            name: watcher.module.get_submodule(str(node.target))
            for node, name in names.items()
            if node.op == "call_module"
        }
        self.parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.structure: _Structure = (
            tuple((name, type(self.modules.get(name)).__name__) for name in names.values()),
            tuple(self.parameters),
        )
        self._code = code if code is not None else _read_by_code(model, self.graph)

    def again(self, model: nn.Module) -> _Seen | None:
        """The same of the model with other channel counts; None where its code may take another way."""
        if self.graph.meta["traced_by"] != "torch.fx" or self.graph.meta["looked"]:
            return None
        code = _read_by_code(model, self.graph)
        same = code.keys() == self._code.keys() and all(_equal(code[key], self._code[key]) for key in code)
        return _Seen(model, self._input_shape, self.graph, code) if same else None


def _read_by_code(model: nn.Module, graph: fx.GraphModule) -> dict[tuple[str, str], Any]:
    """What a trace depends on: what the modules have whose code is traced, and what this code reads of the layers.

    Layers are what the trace calls; pruning changes their numbers of channels.
    """
    read = set[str]()
    found: dict[tuple[str, str], Any] = {}
    for path, module in traced_into(model, graph):
        found[path, "its type"] = f"{type(module).__module__}.{type(module).__qualname__}"
        found[path, "its modules"] = tuple(module._modules)
        found |= {(path, name): value for name, value in vars(module).items() if not name.startswith("_")}
        read |= words_of(module)
    calls = called_modules(graph)
    for path, module in model.named_modules():
        if path in calls:
            found |= {(path, name): vars(module)[name] for name in read & vars(module).keys()}
    return found


def _equal(a: Any, b: Any) -> bool:
    """True for equal numbers, words and tuples of them; for anything else only if it is one object."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a is b or (isinstance(a, (int, float, str)) and type(a) is type(b) and a == b)


class _Watcher(fx.Interpreter):
    def __init__(self, model: nn.Module, traced: fx.GraphModule) -> None:
        super().__init__(model, graph=traced.graph)
        self._traced = traced
        self.inputs: dict[fx.Node, tuple[Shape, ...]] = {}
        self.results: dict[fx.Node, Shape | None] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op.startswith("call_"):
            handed = [self.env[at] for at in n.all_input_nodes if at.op != "get_attr" and not reads_none(n)]
            self.inputs[n] = tuple(tuple(value.shape) for value in handed if isinstance(value, Tensor))
            if (split := sliced_by(n)) is not None:
                self.inputs[n] = self.inputs[split]
            self.results[n] = tuple(result.shape) if isinstance(result, Tensor) else None
            if (base := written_by(n)) in self.env:
                self.results[n] = whole = tuple(self.env[base].shape)
                self.inputs[n] = whole, shape_written(n, self.env)
        return result

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the node is called with; devices are the one without storage."""
        args: Any = fx.map_arg(plain_arguments(n.args, "meta"), self.env.__getitem__)
        kwargs: Any = fx.map_arg(plain_arguments(n.kwargs, "meta"), self.env.__getitem__)
        return args, kwargs

    def fetch_attr(self, target: str) -> Any:
        """Of the model; a tensor that its code has made while it was traced lies beside the graph alone."""
        made = "." not in target and not hasattr(self.module, target)
        value = getattr(self._traced, target) if made else super().fetch_attr(target)
        return value.to("meta") if isinstance(value, Tensor) else value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module; some only for their shape."""
        shaped = kept_shape(self.fetch_attr(target), target, args)
        return super().call_module(target, args, kwargs) if shaped is None else shaped


def _resized(base: Network, before: _Seen, after: _Seen) -> Network:
    parameters = tuple(Parameter(name=p.name, layer=p.layer, shape=after.parameters[p.name]) for p in base.parameters)
    counts = [dict.fromkeys((layer.name for layer in base.layers), 0) for _ in range(2)]
    for count, listed in zip(counts, (base.parameters, parameters), strict=True):
        for parameter in listed:
            if parameter.layer:
                count[parameter.layer] += parameter.num_elements
    layers = []
    for layer in base.layers:
        if counts[0][layer.name] != layer.num_parameters:
            raise _UnexplainedError(layer.name)
        layers.append(_resized_layer(layer, counts[1][layer.name], before, after))
    network = msgspec.structs.replace(base, layers=tuple(layers), parameters=parameters, footprints=())
    return msgspec.structs.replace(
        network, footprints=tuple(_resized_footprint(footprint, base, network) for footprint in base.footprints)
    )


def _resized_layer(layer: Layer, num_parameters: int, before: _Seen, after: _Seen) -> Layer:
    name = layer.name
    old, new = before.inputs[name], after.inputs[name]
    if (old, before.output[name]) == (new, after.output[name]) and num_parameters == layer.num_parameters:
        return layer
    out_old, out_new = before.output[name], after.output[name]
    if layer.view and old and layer.output_shape == layer.input_shapes[0] and out_old is out_new is None:
        out_old, out_new = old[0], new[0]  # chunk, split, unbind: the pieces together are the input
    if layer.once or len(old) != len(layer.input_shapes) or out_old is None or out_new is None:
        raise _UnexplainedError(name)
    inputs = tuple(_image_shape(shape, a, b) for shape, a, b in zip(layer.input_shapes, old, new, strict=True))
    output = _image_shape(layer.output_shape, out_old, out_new)
    module = after.modules.get(name)
    channels = _channels(layer, inputs, output, module)
    resized = msgspec.structs.replace(
        layer, input_shapes=inputs, output_shape=output, num_parameters=num_parameters, **channels
    )
    macs = _macs(layer, resized)
    quantity = _Quantity(layer, resized)
    return msgspec.structs.replace(
        resized,
        forward_macs=macs,
        saved_elements=quantity.scaled(layer.saved_elements),
        saved_other_bytes=quantity.scaled(layer.saved_other_bytes),
        saved_fixed_bytes=_fixed(layer, resized),
    )


def _image_shape(per_image: Shape, old: Shape, new: Shape) -> Shape:
    """The shape of one image in `new`, where that in `old` is `per_image`: `old` without its mini-batch axis."""
    if per_image == old:
        return new
    for axis, size in enumerate(old):
        rest = size // _BATCH
        if size % _BATCH:
            continue
        if per_image == (*old[:axis], *((rest,) if rest > 1 else ()), *old[axis + 1 :]):
            grown = new[axis] // _BATCH
            return (*new[:axis], *((grown,) if grown > 1 else ()), *new[axis + 1 :])
    raise _UnexplainedError(str(old))


def _channels(layer: Layer, inputs: tuple[Shape, ...], output: Shape, module: nn.Module | None) -> dict[str, int]:
    if layer.kind in (LayerKind.CONV, LayerKind.LINEAR):
        if isinstance(module, nn.Linear):
            return {"in_channels": module.in_features, "out_channels": module.out_features}
        if isinstance(module, nn.modules.conv._ConvNd):
            return {"in_channels": module.in_channels, "out_channels": module.out_channels, "groups": module.groups}
        raise _UnexplainedError(layer.name)
    found = {}
    for field, value, old, new in (
        ("in_channels", layer.in_channels, layer.input_shapes[0] if layer.input_shapes else (), inputs[:1]),
        ("out_channels", layer.out_channels, layer.output_shape, (output,)),
    ):
        axis = next((i for i in ((0, -1) if len(old) in (1, 3) else (-1, 0)) if old and old[i] == value), None)
        if axis is None or not new:
            raise _UnexplainedError(layer.name)
        found[field] = new[0][axis]
    return found


def _macs(old: Layer, new: Layer) -> int:
    if old.kind in (LayerKind.CONV, LayerKind.LINEAR):
        kernel = math.prod(old.kernel_size) if old.kind is LayerKind.CONV else 1
        formula = [layer.output_elements * (layer.in_channels // layer.groups) * kernel for layer in (old, new)]
        if formula[0] != old.forward_macs:
            raise _UnexplainedError(old.name)
        return formula[1]
    if old.kind is LayerKind.MATMUL:  # grows with what it sums over, too, which no single tensor tells
        raise _UnexplainedError(old.name)
    return _Quantity(old, new).scaled(old.forward_macs)


class _Quantity:
    """How a count grows with the elements of a layer's tensors."""

    def __init__(self, old: Layer, new: Layer) -> None:
        self.name = old.name
        sizes = [(math.prod(a), math.prod(b)) for a, b in zip(old.input_shapes, new.input_shapes, strict=True)]
        if old.kind not in (LayerKind.CONV, LayerKind.LINEAR):  # those keep their inputs only
            sizes += [(old.output_elements, new.output_elements), (old.input_elements, new.input_elements)]
        self._sizes = set(sizes)

    def scaled(self, count: int) -> int:
        """The count at the new shapes: the one whole multiple of a tensor's elements that it can be."""
        if count == 0:
            return 0
        found = {count // old * new for old, new in self._sizes if old and count % old == 0 and count // old <= 16}
        if len(found) != 1:
            raise _UnexplainedError(self.name)
        return found.pop()


def _fixed(old: Layer, new: Layer) -> int:
    """Bytes that do not grow with the mini-batch: statistics per channel."""
    if old.saved_fixed_bytes == 0:
        return 0
    if not old.out_channels or old.saved_fixed_bytes % old.out_channels:
        raise _UnexplainedError(old.name)
    return old.saved_fixed_bytes // old.out_channels * new.out_channels


def _resized_footprint(footprint: Footprint, base: Network, network: Network) -> Footprint:
    """The footprint in proportion: what grows with images as kept activations do, the rest as parameters do."""
    element = 2 if footprint.half else 4
    kept = [sum(layer.saved_bytes(1, element) for layer in net.layers) for net in (base, network)]
    images = kept[1] / kept[0] if kept[0] else 1.0
    weights = network.num_parameters / base.num_parameters if base.num_parameters else 1.0

    def moments(listed: tuple[Moment, ...]) -> tuple[Moment, ...]:
        return tuple(
            Moment(
                fixed_bytes=round(moment.fixed_bytes * weights),
                image_bytes=round(moment.image_bytes * images),
                gradient_bytes=round(moment.gradient_bytes * weights),
            )
            for moment in listed
        )

    return msgspec.structs.replace(
        footprint,
        kept_fixed_bytes=round(footprint.kept_fixed_bytes * weights),
        kept_image_bytes=round(footprint.kept_image_bytes * images),
        weight_copy_bytes=round(footprint.weight_copy_bytes * weights),
        buffer_bytes=round(footprint.buffer_bytes * weights),
        contiguous=moments(footprint.contiguous),
        channels_last=moments(footprint.channels_last),
    )
