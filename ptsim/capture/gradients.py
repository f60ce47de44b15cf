"""What a model's code does to gradients, as nodes of its graph: functions with a backward of their own, and hooks.

torch.fx sees the forward pass alone. Here the code of a backward is traced like any other, from a gradient that is like
the function's output to one that has to be like its input; the rules of pruning then see which channels it mixes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ptsim.errors import UnsupportedModelError


def hooked_gradient(x: Tensor, path: str | None = None, given: Any = (), made: Any = ()) -> Tensor:
    """A hook is put on the gradient of x; by the module at `path` on those of what it is given and has made."""
    return x


def gradient_of(x: Tensor) -> Tensor:
    """Stands for the gradient of x."""
    return torch.empty_like(x)


def gradient_goes_to(x: Tensor, gradient: Tensor) -> Tensor:
    """What the code computes is the gradient of x."""
    return x


MARKS = (hooked_gradient, gradient_of, gradient_goes_to)


class _Context:
    """What the code of a function finds as `ctx`."""

    def __init__(self, given: Sequence[Any]) -> None:
        self.needs_input_grad = tuple(isinstance(value, fx.Proxy) for value in given)
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def nothing(self, *_: Any) -> None:
        """What is said about outputs and gradients changes no channel."""

    save_for_forward = mark_dirty = mark_non_differentiable = set_materialize_grads = nothing


@contextlib.contextmanager
def without_gradient_hooks(module: nn.Module) -> Iterator[None]:
    """Inside, a module calls no hooks of its own on gradients."""
    tables = [(table, dict(table)) for table in (module._backward_hooks, module._backward_pre_hooks)]
    for table, _ in tables:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in tables:
            table.update(hooks)


@contextlib.contextmanager
def _applied_by(instead: Callable[..., Any]) -> Iterator[None]:
    """Inside, calling an autograd function is `instead(original, function, given, named)`."""
    kept = vars(torch.autograd.Function)["apply"]

    def apply(cls: Any, *given: Any, **named: Any) -> Any:
        original = kept.__get__(None, cls)  # of C in some versions of torch, of Python in others
        return instead(original, cls, given, named)

    torch.autograd.Function.apply = classmethod(apply)
    try:
        yield
    finally:
        torch.autograd.Function.apply = kept


@contextlib.contextmanager
def traced_functions(*, backward: bool) -> Iterator[None]:
    """Inside, the code of an autograd function that is given stand-ins is traced; with `backward` both its ways."""

    def apply(original: Callable[..., Any], function: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if not any(isinstance(value, fx.Proxy) for value in given):
            return original(*given, **named)
        context = _Context(given)
        tracer: Any = next(value.tracer for value in given if isinstance(value, fx.Proxy))
        with tracer.gradients_as_now():  # what checkpoints its layers switches them off in a forward of its own
            if function.setup_context is torch.autograd.Function.setup_context:
                made = function.forward(context, *given, **named)
            else:
                made = function.forward(*given, **named)
                function.setup_context(context, given, made)
        if backward and not _is_torchs(function):
            _trace_backward(function, context, given, made)
        return made

    with _applied_by(apply):
        yield


def _is_torchs(function: Any) -> bool:
    return str(function.__module__).startswith("torch.")


def mark(target: Any, *values: Any) -> Any:
    """A node of the graph that calls one of the `MARKS` with stand-ins."""
    return values[0].tracer.create_proxy("call_function", target, values, {})


def _trace_backward(function: Any, context: _Context, given: Sequence[Any], made: Any) -> None:
    outputs = made if isinstance(made, tuple) else (made,)
    try:
        found = function.backward(
            context, *(mark(gradient_of, y) if isinstance(y, fx.Proxy) else None for y in outputs)
        )
        gradients = found if isinstance(found, tuple | list) else (found,)
        for x, gradient in zip(given, gradients, strict=True):
            if isinstance(x, fx.Proxy) and isinstance(gradient, fx.Proxy):
                mark(gradient_goes_to, x, gradient)
    except Exception:  # the model's own code, which looks at values, perhaps
        for x in given:
            if isinstance(x, fx.Proxy):
                mark(hooked_gradient, x)


class UnseenGradients(TorchFunctionMode):
    """Refuses a hook on the gradient of a tensor, where the graph would not show it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let everything else through."""
        if func is Tensor.register_hook:
            raise UnsupportedModelError(
                "the code puts a hook on the gradient of a tensor, which torch.export does not show",
                hint="put it on once the network has been handed over",
            )
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def refusing_unseen_gradients() -> Iterator[None]:
    """Inside, functions with a backward of their own, and hooks on gradients, are refused."""

    def apply(original: Callable[..., Any], function: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if any(isinstance(value, Tensor) for value in given) and not _is_torchs(function):
            raise UnsupportedModelError(
                f"{function.__name__} has a backward of its own, which torch.export does not show, "
                "and torch.fx cannot trace the network"
            )
        return original(*given, **named)

    with _applied_by(apply), UnseenGradients():
        yield
