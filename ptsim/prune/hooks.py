"""Does a hook change what a layer takes or gives? Its own hooks, those of its parts, and those of every module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.utils._python_dispatch import TorchDispatchMode

from ptsim.capture.graph import output_tensors

_Table: TypeAlias = "dict[int, Any]"


def hooks_of(module: nn.Module) -> list[_Table]:
    """The tables, not empty, of hooks that run when the module is called."""
    shared = (torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks)
    own = (table for part in module.modules() for table in (part._forward_hooks, part._forward_pre_hooks))
    return [table for table in (*shared, *own) if table]


def changes_gradient(module: nn.Module, given: Sequence[Any], made: Any) -> bool:
    """True if a hook on the gradients of a module that is called with `given` and gives `made` changes them."""
    if not module._backward_hooks and not module._backward_pre_hooks:
        return False
    inputs = tuple(torch.empty_like(part) if isinstance(part, Tensor) else None for part in given)
    outputs = tuple(torch.empty_like(part) for part in output_tensors(made))
    changed = [hook(module, inputs, outputs) for hook in module._backward_hooks.values()]
    changed += [hook(module, outputs) for hook in module._backward_pre_hooks.values()]
    return any(part is not None for part in changed)


@contextlib.contextmanager
def hooks_watched(tables: Sequence[_Table], module: nn.Module) -> Iterator[list[str]]:
    """Inside, the list gets an entry for every hook in `tables` that changes an argument or the result of a call.

    Also one that writes into the module's own parameters.
    """
    changes: list[str] = []
    own = list(module.parameters())

    def watched(hook: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _Writes([*output_tensors((args, kwargs)), *own]) as writes:
                given = hook(*args, **kwargs)
            if given is not None or writes.happened():
                changes.append(str(hook))
            return given

        return call

    before = [(table, dict(table)) for table in tables]
    for table, hooks in before:
        table.update({key: watched(hook) for key, hook in hooks.items()})
    try:
        yield changes
    finally:
        for table, hooks in before:
            table.update(hooks)


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's gap
    """Sees whether something is written into tensors, or into what shares their memory, as `tensor.data` does."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's gap
        self._tensors = [(tensor, tensor.untyped_storage()) for tensor in tensors]
        self._storages = {storage._cdata for _, storage in self._tensors}
        # Memory that NumPy shares is written past torch.
        self._values = [(tensor, tensor.detach().clone()) for tensor in tensors if not tensor.is_meta]
        self._written = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Look at the arguments that the operator writes into."""
        places = func._schema.arguments
        given: Mapping[str, Any] = {place.name: value for place, value in zip(places, args, strict=False)}
        given = {**given, **(kwargs or {})}
        written = [given.get(place.name) for place in places if place.alias_info and place.alias_info.is_write]
        self._written |= any(t.untyped_storage()._cdata in self._storages for t in output_tensors(written))
        return func(*args, **(kwargs or {}))

    def happened(self) -> bool:
        """True if it has happened since."""
        return (
            self._written
            or any(tensor.untyped_storage()._cdata != storage._cdata for tensor, storage in self._tensors)
            or any(not torch.equal(tensor.nan_to_num(), value.nan_to_num()) for tensor, value in self._values)
        )
