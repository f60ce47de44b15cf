"""Does a traced graph do what the code does? Both run on tensors without storage, and their operators are compared."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ptsim.capture.chance import RandomState
from ptsim.capture.copies import dtype_of, hollow_copy
from ptsim.capture.tracers import has_kept_shape, kept_shape

_Step: TypeAlias = tuple[str, tuple[int, ...]]  # an operator or a module, and the shape of what it gives

_COPIES = ("aten.detach", "aten.clone", "aten.empty_like")  # which a checkpoint, without gradients, does not make


def does_the_same(
    model: nn.Module,
    graph: fx.Graph,
    images_shape: Sequence[int],
    start: RandomState,
    holder: nn.Module | None = None,
) -> bool:
    """True if the graph, traced in the model's mode, does with images what the model's `forward` does.

    Both meet the random numbers that follow `start`. `holder` has what the graph names, if the model has not. False
    also where one of the two does not run without storage.
    """
    now, steps = start.again(), list[list[_Step]]()
    with _disable_current_modes(), torch.set_grad_enabled(model.training), torch.device("meta"):
        twin = hollow_copy(model, "meta")
        dtype = dtype_of(twin)
        called = list[_Step]()
        if holder is None:  # else functions stand in the graph in the place of some modules
            _shorten(twin, called)
        try:
            for run in (
                twin.forward,
                _OnMeta(twin if holder is None else hollow_copy(holder, "meta"), graph=graph).run,
            ):
                start.restore()
                images = torch.empty(tuple(images_shape), dtype=dtype)
                with _Log(images) as log:
                    run(images)
                steps.append([*log.steps, *called])
                called.clear()
        except Exception:  # the model's own code runs here
            return False
        finally:
            now.restore()
    return steps[0] == steps[1]


def _shorten(twin: nn.Module, called: list[_Step]) -> None:
    """Let BatchNorms and activations, in place, only give their shapes and note that they are called.

    torch's own way through a BatchNorm without storage takes more than half of a large network's time.
    """

    def short(path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        made = None if kwargs else kept_shape(module, path, args)
        if made is None:
            return type(module).forward(module, *args, **kwargs)
        called.append((path, tuple(made.shape)))
        return made

    for path, module in twin.named_modules():
        if has_kept_shape(module) and "forward" not in vars(module):
            vars(module)["forward"] = functools.partial(short, path, module)


class _OnMeta(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        """Run it, following gradients where the code does."""
        with torch.set_grad_enabled(n.meta.get("grad", torch.is_grad_enabled())):
            return super().run_node(n)

    def fetch_attr(self, target: str) -> Any:
        """A constant that the code has made while it was traced has a storage."""
        value = super().fetch_attr(target)
        return value.to("meta") if isinstance(value, Tensor) else value


class _Log(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's gap
    """Notes the operators that are given the images, or what was computed from them, and the shapes of what they give.

    What is computed of parameters alone, and once while tracing, is left out.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's gap
        self.steps: list[_Step] = []
        self._made = {id(images): images}  # held, so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Run the operator and note it."""
        given = pytree.tree_leaves((args, kwargs))
        result = func(*args, **(kwargs or {}))
        if any(id(value) in self._made for value in given):
            made = [value for value in pytree.tree_leaves(result) if isinstance(value, Tensor)]
            # torch.fx records `x += y` as an addition that makes a new tensor. Code that walks through a tensor takes
            # it apart at once, its graph piece by piece.
            name = str(func.overloadpacket).removesuffix("_")
            if name not in _COPIES:
                self.steps += [("aten.select" if name == "aten.unbind" else name, tuple(value.shape)) for value in made]
            self._made |= {id(value): value for value in made}
        return result
