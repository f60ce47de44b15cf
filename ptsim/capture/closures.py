"""Copies of functions that hold on to a network: hooks and other forwards, written as closures around its modules.

`copy.deepcopy` leaves a function as it is. A copied network would call the modules of the original and write into them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ptsim.capture.calls import CONTAINERS, HOLDERS, filled, parts_of


class FunctionTwins:
    """Twins of the functions that the modules of `model` keep; their closures hold copies of what the originals hold.

    Containers in a closure are copied, so that what a copied hook notes stays out of the user's list. Any other
    object is shared.

    Args:
        model: about to be copied.
        memo: of `copy.deepcopy`; the twins are entered here, and get their content by `fill` once the copy is made.
    """

    def __init__(self, model: nn.Module, memo: dict[int, Any]) -> None:
        self._memo = memo
        self._waiting: list[tuple[FunctionType, FunctionType]] = []
        self._seen = set[int]()
        for module in model.modules():
            for name, value in vars(module).items():
                if name not in ("_parameters", "_buffers", "_modules"):
                    self._enter(value)

    def _enter(self, value: Any) -> None:
        if isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self._enter(part)
        elif isinstance(value, HOLDERS) and id(value) not in self._seen:
            self._seen.add(id(value))
            for part in parts_of(value):
                if isinstance(part, (FunctionType, functools.partial, *HOLDERS)):
                    self._enter(part)
        elif isinstance(value, FunctionType) and id(value) not in self._memo and _holds_something(value):
            cells = tuple(CellType() for _ in value.__closure__ or ())
            twin = FunctionType(value.__code__, value.__globals__, value.__name__, None, cells or None)
            twin.__qualname__, twin.__module__, twin.__doc__ = value.__qualname__, value.__module__, value.__doc__
            self._memo[id(value)] = twin
            self._waiting.append((value, twin))
            for cell in value.__closure__ or ():
                with contextlib.suppress(ValueError):
                    self._enter(cell.cell_contents)
            for given in (value.__defaults__, value.__kwdefaults__):
                self._enter(given)

    def fill(self) -> None:
        """Give the twins what the originals hold, or its copy."""
        for function, twin in self._waiting:
            twin.__defaults__ = self._of(function.__defaults__)
            twin.__kwdefaults__ = self._of(function.__kwdefaults__)
            twin.__dict__.update(self._of(vars(function)))
            for old, new in zip(function.__closure__ or (), twin.__closure__ or (), strict=True):
                with contextlib.suppress(ValueError):  # not set yet
                    new.cell_contents = self._of(old.cell_contents)

    def _of(self, value: Any) -> Any:
        if id(value) in self._memo:
            return self._memo[id(value)]
        if isinstance(value, RemovableHandle):  # of a hook, which it takes off the copy
            return copy.deepcopy(value, self._memo)
        if isinstance(value, MethodType):
            return MethodType(value.__func__, self._of(value.__self__))
        if isinstance(value, functools.partial):
            return functools.partial(self._of(value.func), *self._of(value.args), **self._of(value.keywords))
        if isinstance(value, Tensor):
            self._memo[id(value)] = twin = value.detach().clone()
            return twin
        if type(value) is tuple:
            return tuple(self._of(part) for part in value)
        if not isinstance(value, CONTAINERS):
            return value
        container: Any = copy.copy(value)
        self._memo[id(value)] = container  # one that holds itself
        if isinstance(value, dict):
            return filled(container, {key: self._of(part) for key, part in value.items()})
        return filled(container, list(value) if isinstance(value, set) else [self._of(part) for part in value])


def _holds_something(function: FunctionType) -> bool:
    """True for a function of a user's that keeps more than the class that it was written in."""
    kept = set(function.__code__.co_freevars) - {"__class__"}
    given = function.__defaults__ or function.__kwdefaults__
    return bool(kept or given) and (function.__module__ or "").partition(".")[0] != "torch"
