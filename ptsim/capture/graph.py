"""How a live module becomes a torch.fx graph whose nodes know their shapes.

Capture and pruning both start here, so that they see the same layers under the same names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import inspect
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils._python_dispatch import _disable_current_modes

from ptsim.capture.chance import Generator, RandomState, random_state_kept
from ptsim.capture.copies import device_of, dtype_of, hollow_copy
from ptsim.capture.exported import exported_graph
from ptsim.capture.faithful import does_the_same
from ptsim.capture.standins import NOT_THE_CODE, ShapedStandIn, StandIn
from ptsim.errors import UnsupportedModelError, lacks_memory, on_one_line

_FACTORIES = (  # functions of torch
    *("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "randperm"),
    *("scalar_tensor", "tensor", "zeros"),
)


class Way(enum.Enum):
    """A way to trace a network, in the order in which they are tried."""

    PLAIN = "torch.fx, without shapes"
    SHAPED = "torch.fx, where the code may look at shapes"
    WITHOUT_BUFFERS = "torch.fx, where the code may look at buffers' values"
    EXPORT = "torch.export"


@contextlib.contextmanager
def _factories_traced() -> Iterator[None]:
    """Inside, tensors made by the size of others become nodes, too; torch.fx itself does not see these calls."""

    def traced(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def factory(*args: Any, **kwargs: Any) -> Any:
            found: list[fx.Proxy] = []
            fx.node.map_aggregate((args, kwargs), lambda a: found.append(a) if isinstance(a, fx.Proxy) else None)
            if not found:
                return original(*args, **kwargs)
            return found[0].tracer.create_proxy("call_function", original, args, kwargs)

        return factory

    originals = {name: getattr(torch, name) for name in _FACTORIES}
    try:
        for name, original in originals.items():
            setattr(torch, name, traced(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


def _is_around(function: Any, inner: Any) -> bool:
    """True for `inner` itself, and for what was put around it with `functools.wraps`, as Accelerate does."""
    unwrapped = inspect.unwrap(getattr(function, "__func__", function))
    return getattr(unwrapped, "__func__", unwrapped) is inner


class Tracer(fx.Tracer):
    """Keeps torch's own modules whole, and every module that says `ptsim_leaf = True` (what pruning puts in).

    With `buffers` these become nodes as parameters do, so that what is computed from them is seen. The functions and
    layers of einops, where the model's file has imported it, become nodes as torch's do, and so do tensors that the
    code makes by the size of others, as `torch.empty(x.shape[0], 1, 1, 1)`.
    """

    def __init__(self, *, buffers: bool = False) -> None:
        einops = sys.modules.get("einops")
        modules: Any = (math,) if einops is None else (math, einops)
        super().__init__(autowrap_modules=modules)
        self.proxy_buffer_attributes = buffers
        self.asked = False  # the code has asked what kind of thing a value is, and got the answer for a stand-in
        self._names: dict[int, tuple[str, Tensor]] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of a module.

        Raises:
            TraceError: another forward than that of its class, which torch.fx traces, was put in its place.
        """
        if isinstance(root, nn.Module):
            if "forward" in vars(root) and not _is_around(root.forward, type(root).forward):
                raise fx.proxy.TraceError("another forward was put in place of its class's")
            tensors = [*root.named_parameters(), *(root.named_buffers() if self.proxy_buffer_attributes else ())]
            self._names = {id(tensor): (name, tensor) for name, tensor in tensors}
        with _factories_traced():
            return super().trace(root, concrete_args)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """An attribute of a module, a parameter as a node of the graph.

        torch.fx walks through all parameters at each access; here their names are known.
        """
        name, tensor = self._names.get(id(attr_val), ("", None))
        if tensor is None or tensor is not attr_val:
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What the model's code sees in place of a value."""
        return StandIn(node, self)

    def kind_of(self, proxy: fx.Proxy) -> type:
        """What the model's code is told when it asks what kind of thing a value is."""
        self.asked = True
        return type(proxy)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """True for a module that becomes one node."""
        if "forward" in vars(module):  # somebody has put another one in place of its class's
            return False
        whole = getattr(module, "ptsim_leaf", False) or type(module).__module__ == "einops.layers.torch"
        return whole or super().is_leaf_module(module, qualified_name)

    def create_proxy(self, kind: str, target: Any, args: Any, *rest: Any, **more: Any) -> Any:
        """A node of the graph; a further argument of `forward` keeps its default: the model is called with images."""
        if kind == "placeholder" and args and any(node.op == "placeholder" for node in self.graph.nodes):
            return args[0]
        return super().create_proxy(kind, target, args, *rest, **more)


class ShapedTracer(Tracer):
    """Knows the shapes while it traces, so that Python may look at them: `assert x.shape[1] == 64`, `len`, `range`.

    What was looked at stands in `looked`: node name → whether as a truth value or as a number. The graph holds for
    networks and images where these are the same. Buffers become nodes as parameters do, so that methods of theirs can
    be given shapes. Code that asks for a tensor's device goes the way that it goes where the model is.
    """

    def __init__(self, model: nn.Module, images_shape: tuple[int, ...]) -> None:
        super().__init__(buffers=True)
        with torch.device("meta"):
            # Shapes are the same in both modes; in training a BatchNorm refuses a single value per channel.
            self._twin = hollow_copy(model).eval()
            dtype = dtype_of(model)
            self._images = torch.empty(images_shape, dtype=dtype)
        self._values: dict[fx.Node, Any] = {}
        self._evaluating = False
        self.device = device_of(model)
        self.looked: dict[str, str] = {}

    def create_proxy(self, kind: str, target: Any, args: Any, *rest: Any, **more: Any) -> Any:
        """A node, and its value on tensors without storage."""
        made = super().create_proxy(kind, target, args, *rest, **more)
        if isinstance(made, fx.Proxy):
            self._evaluating = True
            try:
                with torch.no_grad(), torch.device("meta"):
                    self._values[made.node] = self._value(made.node)
            finally:
                self._evaluating = False
        return made

    def _known(self, node: fx.Node) -> Any:
        if node not in self._values:  # torch.fx makes the nodes of constant tensors without asking
            self._values[node] = self._value(node)
        return self._values[node]

    def _value(self, node: fx.Node) -> Any:
        args: Any = fx.map_arg(plain_arguments(node.args, "meta"), self._known)
        kwargs: Any = fx.map_arg(plain_arguments(node.kwargs, "meta"), self._known)
        match node.op:
            case "placeholder":
                return self._images
            case "get_attr":
                parent, _, name = str(node.target).rpartition(".")
                home = self._twin.get_submodule(parent)
                if hasattr(home, name):
                    return getattr(home, name)
                return getattr(self.root, str(node.target)).to("meta")  # a tensor that the code has just made
            case "call_module":
                module = self._twin.get_submodule(str(node.target))
                shaped = kept_shape(module, node.target, args)
                return module(*args, **kwargs) if shaped is None else shaped
            case "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            case "call_function":
                return node.target(*args, **kwargs)  # type: ignore[operator] # of a call, a function
        return None

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Trace into it or make it a node; while values are computed it just runs."""
        return forward(*args, **kwargs) if self._evaluating else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """An attribute of a module, a parameter as a node of the graph."""
        return attr_val if self._evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What the model's code sees in place of a value."""
        return ShapedStandIn(node, self)

    def kind_of(self, proxy: fx.Proxy) -> type:
        """The truth, but for tensors."""
        value = self._values.get(proxy.node)
        return super().kind_of(proxy) if value is None or isinstance(value, Tensor) else type(value)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """A condition on shapes holds as it does for these images."""
        return bool(self.look(obj.node, "condition"))

    def look(self, node: fx.Node, purpose: str) -> Any:
        """The value, if it is known without arithmetic on tensors."""
        value = self._values[node]
        if isinstance(value, Tensor):
            raise fx.proxy.TraceError("the code looks at the values of a tensor")
        if self.looked.get(node.name) != "number":
            self.looked[node.name] = purpose
        return value


def plain_arguments(arguments: Any, device: torch.device | str) -> Any:
    """Arguments with plain `int`s in place of subclasses, which note what is done with them, and with one device."""

    def plain(argument: Any) -> Any:
        if isinstance(argument, torch.device):
            return torch.device(device)
        return int(argument) if isinstance(argument, int) and type(argument) not in (int, bool) else argument

    return fx.node.map_aggregate(arguments, plain)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def symbolic_graph(
    model: nn.Module,
    images_shape: tuple[int, ...] | None = None,
    *,
    buffers: bool = False,
    ways: Sequence[Way] = tuple(Way),
    generators: Sequence[Generator] = (),
) -> fx.GraphModule:
    """The model's graph in the mode that it is in; it shares its modules and parameters with the model.

    With `buffers` what is computed from buffers is part of the graph, unless the code looks at their values.

    With `images_shape` (N, C, H, W) the model's code may also look at shapes; `meta["looked"]` then says at which. What
    torch.fx cannot trace is then left to `torch.export`; `meta["traced_by"]` says which of the two it was, and
    `meta["draws"]` whether the code has drawn random numbers, which may decide on the way that it goes (see `ways`).

    `ways` are those that may be tried, in order; `meta["way"]` says which it was. Who traces a network again
    that has only shrunk knows which one works. Each of them meets the same random numbers, also those that the code
    draws from `generators` of its own.

    Raises:
        UnsupportedModelError: neither can trace the model.
    """
    name = type(model).__name__
    makers: dict[Way, Callable[[], Tracer]] = {Way.PLAIN: functools.partial(Tracer, buffers=buffers)}
    if images_shape is not None:
        makers[Way.SHAPED] = functools.partial(ShapedTracer, model, images_shape)
    if buffers:
        makers[Way.WITHOUT_BUFFERS] = Tracer
    errors: dict[Way, Exception] = {}
    start = RandomState.now(generators)
    for way in ways:
        if way not in makers:
            continue
        try:
            with attributes_restored(model):
                tracer = makers[way]()
                graph = tracer.trace(model)
                unsure = tracer.asked and len(ways) > 1
                if unsure and images_shape is not None and not does_the_same(model, graph, images_shape, start):
                    raise fx.proxy.TraceError("the code asks what kind of thing a value is")
                # Tensors that the code made are attributes of the model until here.
                module = fx.GraphModule(tracer.root, graph, name)
            break
        except UnsupportedModelError:  # found here: no other tracer does better
            raise
        except Exception as error:  # torch.fx lets any error of the traced code through
            if lacks_memory(error):
                raise
            errors[way] = error
            start.restore()  # the next one meets the same numbers
    else:
        last = errors.get(Way.SHAPED) or next(iter(errors.values()), None)
        try:
            assert images_shape is not None, "else there is nothing to export for"
            assert Way.EXPORT in ways, "else it is left out"
            exported = _exported(model, images_shape)
            exported.meta["draws"] = not start.is_now()
            return exported
        except Exception as error:  # it, too, lets any error of the model's code through
            last = last or error
            raise UnsupportedModelError(
                f"torch.fx cannot trace {name}: {_one_line(last)}{_place(last)}; nor can torch.export",
                hint="tracing needs a forward without branches on tensor values",
            ) from last
    module.meta["looked"] = tracer.looked if isinstance(tracer, ShapedTracer) else {}
    module.meta["traced_by"], module.meta["way"] = "torch.fx", way
    module.meta["draws"] = not start.is_now()
    return module


def _exported(model: nn.Module, images_shape: tuple[int, ...]) -> fx.GraphModule:
    with _disable_current_modes(), attributes_restored(model):
        module = exported_graph(model, hollow_copy(model, str(device_of(model))), images_shape)
    module.meta["traced_by"], module.meta["way"] = "torch.export", Way.EXPORT
    return module


def by_export(graph: fx.GraphModule) -> bool:
    """True if `torch.export` traced it: all shapes, and what the code computes with them, are constants in it."""
    return bool(graph.meta["traced_by"] == "torch.export")


def note_tracer(name: str, graph: fx.GraphModule) -> None:
    """A warning where not torch.fx but `torch.export` has traced the network."""
    if by_export(graph):
        warnings.warn(f"{name} is traced by torch.export, because torch.fx cannot trace its code", stacklevel=3)


@contextlib.contextmanager
def attributes_restored(model: nn.Module) -> Iterator[None]:
    """Afterwards every module has the attributes that it had: tracing leaves stand-ins where the code stores values."""
    before = [
        (table, dict(table), [(value, value.copy()) for value in table.values() if type(value) in (dict, list)])
        for module in model.modules()
        for table in [vars(module)]
    ]
    try:
        yield
    finally:
        for table, attributes, containers in before:
            table.clear()
            table.update(attributes)
            for container, content in containers:
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)


def trace_graph(model: nn.Module, input_shape: tuple[int, int, int], *, batch: int = 2) -> fx.GraphModule:
    """The model's graph as evaluation mode runs it; `node.meta["tensor_meta"].shape` holds shapes for `batch` images.

    The model is left as it was: no mode, buffer or random state changes.

    Raises:
        UnsupportedModelError: torch.fx cannot trace the model, or its forward fails on such an image.
    """
    with evaluation_mode(model), torch.no_grad(), random_state_kept():
        module = symbolic_graph(model, (batch, *input_shape))
        with naming_the_image(model, input_shape):
            ShapeProp(module).propagate(example_input(model, input_shape, batch=batch))
    return module


def traced_into(model: nn.Module, graph: fx.GraphModule) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose own code was traced: neither called as a whole nor part of one that is."""
    calls = called_modules(graph)
    inside = tuple(f"{call}." for call in calls)
    return ((p, module) for p, module in model.named_modules() if p not in calls and not p.startswith(inside))


def called_modules(graph: fx.GraphModule) -> set[str]:
    """Names of the modules that a graph calls as a whole."""
    return {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}


@contextlib.contextmanager
def naming_the_image(model: nn.Module, input_shape: tuple[int, int, int]) -> Iterator[None]:
    """What fails inside becomes an `UnsupportedModelError` that names the model and the image it was given.

    Not a lack of memory, which is not the model's fault.
    """
    try:
        yield
    except Exception as error:  # the model's own code runs here
        if lacks_memory(error):
            raise
        shape = "×".join(str(n) for n in input_shape)
        raise UnsupportedModelError(
            f"{type(model).__name__} fails on an image of {shape}: {_one_line(error)}"
        ) from error


def example_input(model: nn.Module, input_shape: tuple[int, int, int], *, batch: int = 2) -> Tensor:
    """Random images of the model's device and floating-point type, shape (batch, C, H, W), from a seed of their own."""
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((batch, *input_shape), generator=generator)
    return images.to(device=reference.device, dtype=reference.dtype)


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh)


def kept_shape(module: nn.Module, target: object, args: tuple[Any, ...]) -> Tensor | None:
    """What a BatchNorm or an activation gives for a tensor without storage: its shape; torch's own way there is slow.

    None for every other module or input, or where a hook looks on.
    """
    hooked = module._forward_hooks or module._forward_pre_hooks
    if type(module) not in (*_NORMS, *_ACTIVATIONS) or hooked or len(args) != 1 or not args[0].is_meta:
        return None
    if isinstance(module, _NORMS) and args[0].shape[1] != module.num_features:
        raise RuntimeError(f"{target} expects {module.num_features} channels, got {args[0].shape[1]}")
    given: Tensor = args[0] if getattr(module, "inplace", False) else torch.empty_like(args[0])
    return given


def output_tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in what a model returns: a tensor, or dicts, sequences and dataclasses of tensors."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for part in output.values():
            yield from output_tensors(part)
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from output_tensors(part)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from output_tensors(getattr(output, field.name))


def _place(error: Exception) -> str:
    """The last line of the model's own code in an error's traceback, in brackets."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((*NOT_THE_CODE, "<"))
    ]
    if not frames:
        return ""
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line})"


def _one_line(error: Exception) -> str:
    return on_one_line(str(error).partition("While executing")[0]) or type(error).__name__
