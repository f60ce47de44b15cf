"""What follows a model's code while torch.fx traces it, and what of the code is a node of the graph?"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ptsim.capture.copies import compiled_inside, device_of, dtype_of, hollow_copy
from ptsim.capture.gradients import hooked_gradient, mark, traced_functions, without_gradient_hooks
from ptsim.capture.looking import hooks_shown_values, random_values
from ptsim.capture.standins import ShapedStandIn, StandIn
from ptsim.capture.words import calls_of
from ptsim.errors import UnsupportedModelError

_FACTORIES = (  # functions of torch
    *("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn"),
    *("randperm", "scalar_tensor", "tensor", "zeros"),
)
# Functions that torch 2.8, unlike 2.14, lets no stand-in be given to where a number or a list of tensors is wanted.
_PARTLY_TRACED = (
    *("cat", "column_stack", "concat", "concatenate", "dstack", "hstack", "row_stack", "stack", "vstack"),
    *("broadcast_to", "channel_shuffle", "chunk", "narrow", "repeat_interleave", "reshape", "roll", "tile"),
)
_CONVOLUTIONS = tuple(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))  # the same in `F` and torch

_KIND_QUESTIONS = {"type", "issubclass"}  # which a stand-in cannot answer as a tensor would
_ONE_AT_A_TIME = threading.RLock()  # torch.fx, and what stands below, put other functions in torch's places


@contextlib.contextmanager
def _functions_traced() -> Iterator[None]:
    """Inside, what torch.fx does not see becomes a node: tensors made by the size of others, or put into buffers.

    And calls that give numbers or a tuple of tensors to functions that check what they are given.
    """

    def traced(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def factory(*args: Any, **kwargs: Any) -> Any:
            found: list[fx.Proxy] = []
            fx.node.map_aggregate((args, kwargs), lambda a: found.append(a) if isinstance(a, fx.Proxy) else None)
            if not found:
                return original(*args, **kwargs)
            return found[0].tracer.create_proxy("call_function", original, args, kwargs)

        return factory

    def assigned(module: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, fx.Proxy) and module._buffers.get(name) is not None:
            tracer: Any = value.tracer
            module._buffers[name] = tracer.into_buffer(module, name, value)
        elif isinstance(value, fx.Proxy) and module._parameters.get(name) is not None:
            raise UnsupportedModelError(
                f"the code of {type(module).__name__} puts another tensor in the place of its parameter {name} at "
                "every call, so that no optimizer trains it",
                hint="keep what is computed from the parameter in a variable, or under another name",
            )
        else:
            assign(module, name, value)

    def normal(*args: Any, **kwargs: Any) -> Any:
        """Of two numbers and a size, which `torch.device` does not put anywhere: by operators that it does."""
        given = dict(zip(("mean", "std", "size"), args, strict=False)) | kwargs
        size: Any = given.get("size")
        sized = isinstance(size, fx.Proxy) or any(isinstance(part, fx.Proxy) for part in size or ())
        if not sized or "out" in given:
            return originals[torch, "normal"](*args, **kwargs)
        how = {name: value for name, value in given.items() if name not in ("mean", "std", "size", "generator")}
        return torch.empty(size, **how).normal_(given["mean"], given["std"], generator=given.get("generator"))

    named = (*_FACTORIES, *_PARTLY_TRACED, *_CONVOLUTIONS)
    homes = [(torch, name) for name in named] + [(F, name) for name in (*_CONVOLUTIONS, "channel_shuffle")]
    originals = {(home, name): getattr(home, name) for home, name in (*homes, (torch, "normal"))}
    assign = nn.Module.__setattr__
    try:
        for (home, name), original in originals.items():
            setattr(home, name, normal if name == "normal" else traced(original))
        nn.Module.__setattr__ = assigned  # type: ignore[assignment, method-assign] # put back below
        yield
    finally:
        nn.Module.__setattr__ = assign  # type: ignore[method-assign] # as it was
        for (home, name), original in originals.items():
            setattr(home, name, original)


@contextlib.contextmanager
def _own_forward(model: Any) -> Iterator[None]:
    """Inside, the class of a model whose forward was replaced has that one, which is the one that torch.fx traces."""
    kind, forward = type(model), vars(model).get("forward")
    if forward is None or _is_around(forward, kind.forward):
        yield
        return

    def replaced(_: nn.Module, images: Any) -> Any:
        return forward(images)

    model.__class__ = type(kind.__name__, (kind,), {"forward": replaced, "__module__": kind.__module__})
    try:
        yield
    finally:
        model.__class__ = kind


def _is_around(function: Any, inner: Any) -> bool:
    """True for `inner` itself, and for what was put around it with `functools.wraps`, as Accelerate does."""
    unwrapped = inspect.unwrap(getattr(function, "__func__", function))
    return getattr(unwrapped, "__func__", unwrapped) is inner


class Tracer(fx.Tracer):
    """Keeps torch's own modules whole, and every module that says `ptsim_leaf = True` (what pruning puts in).

    With `buffers` these become nodes as parameters do, so that what is computed from them is seen. The functions and
    layers of einops, where the model's file has imported it, become nodes as torch's do, and so do tensors that the
    code makes by the size of others, as `torch.empty(x.shape[0], 1, 1, 1)`. With `backward` what functions of the
    model's own do to gradients is part of the graph as well.

    `node.meta["grad"]` says whether the code lets torch follow gradients at that place.
    """

    def __init__(self, *, buffers: bool = False, backward: bool = False) -> None:
        einops = sys.modules.get("einops")
        modules: Any = (math,) if einops is None else (math, einops)
        super().__init__(autowrap_modules=modules)
        self.proxy_buffer_attributes = buffers
        self._backward = backward
        self._grad: bool | None = None
        self.asked = False  # the code has asked what kind of thing a value is, and got the answer for a stand-in
        self._names: dict[int, tuple[str, Tensor]] = {}
        self._replaced: list[tuple[nn.Module, str, Any]] = []  # buffers, by the code

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of a module; of another forward than its class's, if somebody has put one in its place."""
        if isinstance(root, nn.Module):
            tensors = [*root.named_parameters(), *(root.named_buffers() if self.proxy_buffer_attributes else ())]
            self._names = {id(tensor): (name, tensor) for name, tensor in tensors}
        with _ONE_AT_A_TIME, _functions_traced(), traced_functions(backward=self._backward), _own_forward(root):
            try:
                graph = super().trace(root, concrete_args)
            finally:
                for module, name, buffer in reversed(self._replaced):
                    module._buffers[name] = buffer
        traced = (part for path, part in self.root.named_modules() if not self.is_leaf_module(part, path))
        self.asked |= any(not calls_of(part).isdisjoint(_KIND_QUESTIONS) for part in traced)
        return graph

    @contextlib.contextmanager
    def gradients_as_now(self) -> Iterator[None]:
        """Inside, nodes are noted to be followed, or not, as those before."""
        before = self._grad
        self._grad = torch.is_grad_enabled() if before is None else before
        try:
            yield
        finally:
            self._grad = before

    def create_node(self, *arguments: Any, **named: Any) -> fx.Node:
        """A node that knows whether torch follows gradients there."""
        node = super().create_node(*arguments, **named)
        node.meta["grad"] = torch.is_grad_enabled() if self._grad is None else self._grad
        return node

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

    def into_buffer(self, module: nn.Module, name: str, value: fx.Proxy) -> Any:
        """The code puts another tensor in a buffer's place: what it holds is copied into the buffer."""
        self._replaced.append((module, name, module._buffers[name]))
        path = self.path_of_module(module)
        buffer = self.create_proxy("get_attr", f"{path}.{name}" if path else name, (), {})
        return self.create_proxy("call_method", "copy_", (buffer, value), {})

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

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Trace into it or make it a node; its hooks on gradients are noted beside what they see.

        A DataParallel only calls the network inside: on several devices it is refused elsewhere. So does what
        `torch.compile` puts around a part.
        """
        inside = m.module if isinstance(m, nn.DataParallel) else compiled_inside(m)
        if inside is not None and not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks):
            return inside(*args, **kwargs)
        if self.is_leaf_module(m, self.path_of_module(m)):
            return super().call_module(m, forward, args, kwargs)
        hooked = m._backward_hooks or m._backward_pre_hooks
        with without_gradient_hooks(m), hooks_shown_values(m, self.values_for):
            made = super().call_module(m, forward, args, kwargs)
        if self._backward and hooked:
            given, outputs = (
                tuple(part for part in tree_leaves(parts) if isinstance(part, fx.Proxy)) for parts in (args, made)
            )
            for proxy in (*given, *outputs):
                mark(hooked_gradient, proxy, self.path_of_module(m), given, outputs)
        return made

    def values_for(self, given: Any) -> Any:
        """Values in the place of stand-ins, for a hook that asks for them."""
        raise fx.proxy.TraceError("a hook looks at the values of a tensor")

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

    def __init__(self, model: nn.Module, images_shape: tuple[int, ...], *, backward: bool = False) -> None:
        super().__init__(buffers=True, backward=backward)
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
                with torch.device("meta"):
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

    def values_for(self, given: Any) -> Any:
        """Random ones of the shapes that are known."""
        values = tree_map_only(fx.Proxy, lambda proxy: self._values[proxy.node], given)
        return tree_map_only(Tensor, random_values, values)

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


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh)


def has_kept_shape(module: nn.Module) -> bool:
    """True for the modules that `kept_shape` knows."""
    return type(module) in (*_NORMS, *_ACTIVATIONS)


def kept_shape(module: nn.Module, target: object, args: tuple[Any, ...]) -> Tensor | None:
    """What a BatchNorm or an activation gives for a tensor without storage: its shape; torch's own way there is slow.

    None for every other module or input, or where a hook looks on.
    """
    hooked = module._forward_hooks or module._forward_pre_hooks
    if not has_kept_shape(module) or hooked or len(args) != 1 or not args[0].is_meta:
        return None
    if isinstance(module, _NORMS) and args[0].shape[1] != module.num_features:
        raise RuntimeError(f"{target} expects {module.num_features} channels, got {args[0].shape[1]}")
    if getattr(module, "inplace", False):
        return args[0]  # type: ignore[no-any-return] # a tensor
    follows = torch.is_grad_enabled() and (args[0].requires_grad or any(p.requires_grad for p in module.parameters()))
    given = torch.empty_like(args[0], requires_grad=follows)
    return given.clone() if follows else given  # what comes next may write into it, which torch forbids for a leaf
