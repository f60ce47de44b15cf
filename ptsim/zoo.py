"""Which networks there are by name, and how one is made: ptsim's own, torchvision's, or a function of a user's file.

This module holds names only; the networks register themselves from `ptsim.models`, which is imported (and torch with
it) when the first one is asked for.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptsim.errors import UnknownNameError, UsageError, on_one_line
from ptsim.setting import image_shape, positive_number
from ptsim.usercode import importing_beside

Builder = Callable[..., Any]  # called with num_classes=…, returns a torch.nn.Module


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """A network that can be made: its builder, the image it expects and its usual number of classes.

    `takes_classes`: the builder makes it for any number of classes; else it is the same for every number.
    """

    name: str
    build: Builder
    input_shape: tuple[int, int, int]
    num_classes: int
    takes_classes: bool = True

    def make(self, num_classes: int | None = None, *, usual: int | None = None) -> Any:
        """A network for so many classes; where nobody says how many, for `usual`, else the entry's usual number.

        Raises:
            UsageError: see `create`.
        """
        usual = self.num_classes if usual is None else usual
        model = self.build(num_classes=usual if num_classes is None else num_classes)
        if num_classes is None or self.takes_classes:
            return model
        shapes = [tensor.shape for tensor in model.parameters() if not hasattr(tensor, "materialize")]  # not lazy
        if not any(num_classes in shape[:1] for shape in shapes):
            raise UsageError(
                f"{self.name} has no argument num_classes, and its network no layer of {num_classes} outputs",
                hint="leave the number of classes out, or give the function the argument",
            )
        return model


_ENTRIES: dict[str, ModelEntry] = {}
_RESOLVERS: dict[str, Callable[[str], ModelEntry]] = {}


def register(name: str, *, input_shape: tuple[int, int, int], num_classes: int) -> Callable[[Builder], Builder]:
    """Decorator: makes `builder(num_classes=…)` available under `name`."""

    def add(builder: Builder) -> Builder:
        _ENTRIES[name] = ModelEntry(name, builder, input_shape, num_classes)
        return builder

    return add


def forget(name: str) -> None:
    """Take a registered network away again; nothing if there is none."""
    _ENTRIES.pop(name, None)


def register_family(prefix: str, resolve: Callable[[str], ModelEntry]) -> None:
    """Let `resolve(rest)` answer for every name of the form `prefix:rest`."""
    _RESOLVERS[prefix] = resolve


def names() -> list[str]:
    """Names of ptsim's own networks (imports torch)."""
    _load_models()
    return sorted(_ENTRIES)


def find(name: str) -> ModelEntry:
    """The entry called `name`: a zoo name, `torchvision:NAME` or `path/to/file.py:function` (imports torch).

    Raises:
        UnknownNameError: no such name; lists those that exist.
        UsageError: the user's file or function is missing or cannot be loaded.
    """
    check_file(name)
    _load_models()
    if name in _ENTRIES:
        return _ENTRIES[name]
    prefix, colon, rest = name.rpartition(":")
    if colon and prefix in _RESOLVERS:
        return _RESOLVERS[prefix](rest)
    if (path := file_of(name)) is not None:
        return _from_file(path, rest)
    raise UnknownNameError(
        "model", name, [*_ENTRIES, *(f"{prefix}:NAME" for prefix in _RESOLVERS), "path/to/file.py:function"]
    )


def file_of(name: str) -> Path | None:
    """The Python file that makes the network of this name; None where no user's file does."""
    path, colon, _ = name.rpartition(":")
    return Path(path) if colon and path.endswith(".py") else None


def check_file(name: str) -> None:
    """Find out, before torch is imported, that a name is of a user's file that does not exist, or lacks the function.

    Raises:
        UsageError: it is so.
    """
    if name.endswith(".py"):
        raise UsageError(f"{name} is a model's file without its function; expected {name}:function")
    path = file_of(name)
    if path is not None and not os.path.isfile(path):
        raise UsageError(f"no model file {path}; expected path/to/file.py:function")


def create(name: str, *, num_classes: int | None = None) -> Any:
    """A freshly initialised network (a `torch.nn.Module`) with `num_classes` outputs, the entry's usual number if None.

    Raises:
        UnknownNameError, UsageError: see `find`; also when a user's function fails, returns no module, or takes no
            number of classes and makes a network with another.
    """
    return find(name).make(num_classes)


def _load_models() -> None:
    importlib.import_module("ptsim.models")


def _from_file(path: Path, function_name: str) -> ModelEntry:
    """The function's own attributes `input_shape` and `num_classes`, where it has them, become the entry's.

    Without that attribute the usual number of classes is the default of its argument `num_classes`, or else 10.
    """
    module_name = f"_ptsim_user_{path.stem}_{abs(hash(path.resolve())):x}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None, "true for every path that ends in .py"
    assert spec.loader is not None, "the same"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        with importing_beside(path):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise UsageError(f"model file {path} cannot be loaded: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module_name]
        raise UnknownNameError(f"function in {path}", function_name, functions)
    if hasattr(function, "named_parameters") and not isinstance(function, type):
        raise UsageError(
            f"{path}:{function_name} is a network, expected a function that makes one",
            hint=f"def build(): return {type(function).__name__}(…), for instance",
        )

    parameters = inspect.signature(function).parameters
    takes_classes = any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters.values())
    default = parameters["num_classes"].default if "num_classes" in parameters else None
    usual = default if isinstance(default, int) else 10

    def build(*, num_classes: int) -> Any:
        try:
            with importing_beside(path):
                model = function(num_classes=num_classes) if takes_classes else function()
        except (Exception, SystemExit) as error:
            reason = on_one_line(error)  # torch's may have the lines of a backtrace
            raise UsageError(f"{path}:{function_name} failed: {type(error).__name__}: {reason}") from error
        if not hasattr(model, "named_parameters"):
            raise UsageError(f"{path}:{function_name} returned a {type(model).__name__}, expected a torch.nn.Module")
        return model

    name = f"{path}:{function_name}"
    try:
        shape = image_shape(getattr(function, "input_shape", (3, 32, 32)))
        num_classes = positive_number("num_classes", getattr(function, "num_classes", usual))
    except UsageError as error:
        raise UsageError(f"{name}: its {error.message}") from error
    return ModelEntry(name, build, shape, num_classes, takes_classes)
