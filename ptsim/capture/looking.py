"""Hooks in a copy that is only looked at: one that looks on itself finds values there, and none sees a gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from ptsim.errors import lacks_memory


def let_hooks_look(twin: nn.Module) -> None:
    """Let the hooks of a copy without values run, in place.

    A forward hook is first shown random values. One that then gives nothing has only looked on: what it computes is
    not the network's. Hooks on gradients do nothing that is described, and are left out.
    """
    for module in twin.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
        for table in (module._forward_hooks, module._forward_pre_hooks):
            table.update({key: _looking(hook) for key, hook in table.items()})


def _looking(hook: Any) -> Any:
    def call(module: nn.Module, *given: Any) -> Any:
        try:
            with (
                _disable_current_modes(),
                torch._C.DisableTorchFunction(),
            ):  # else a graph would show how they are drawn
                values = pytree.tree_map_only(Tensor, random_values, given)
            changed = _on_values(hook, module, values)
        except Exception as error:  # the hook's own code runs here
            if lacks_memory(error):
                raise
            return hook(module, *given)
        if changed is not None:
            return hook(module, *given)
        with contextlib.suppress(Exception), torch.no_grad():  # what it keeps may be used later
            hook(module, *given)
        return None

    return call


def _on_values(hook: Any, module: nn.Module, values: Any) -> Any:
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        return hook(module, *values)


@contextlib.contextmanager
def hooks_shown_values(module: nn.Module, values: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, a forward hook of the module's own that fails is called again with `values` of what it was given.

    It has then to give nothing.
    """
    tables = [(table, dict(table)) for table in (module._forward_hooks, module._forward_pre_hooks) if table]
    for table, hooks in tables:
        table.update({key: _shown_values(hook, values) for key, hook in hooks.items()})
    try:
        yield
    finally:
        for table, hooks in tables:
            table.update({key: hook for key, hook in hooks.items() if key in table})


def _shown_values(hook: Any, values: Callable[[Any], Any]) -> Any:
    def call(module: nn.Module, *given: Any) -> Any:
        try:
            return hook(module, *given)
        except Exception as error:  # the hook's own code runs here
            if lacks_memory(error) or _on_values(hook, module, values(given)) is not None:
                raise
            return None

    return call


def random_values(tensor: Tensor) -> Tensor:
    """Numbers in [0, 1) in a tensor's place, always the same; at least in float32, which NumPy knows."""
    generator = torch.Generator().manual_seed(0)  # torch's own stays as the model's code expects it
    values = torch.rand(tensor.shape, generator=generator, device="cpu")
    return values if tensor.dtype in (torch.float16, torch.bfloat16) else values.to(tensor.dtype)
