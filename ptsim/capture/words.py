"""Which names does the code of a network's modules mention, and what stands behind them?"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterable, Iterator
from types import CodeType, ModuleType
from typing import Any

from torch import nn

_MOST_FUNCTIONS = 4096  # remembered; one may hold a copy of a network


def words_of(module: nn.Module) -> frozenset[str]:
    """Every name and word in the code of the module's `forward` and of the functions that it may call."""
    return frozenset[str]().union(*(_words(kind, function) for kind, function in _starts(module)))  # type: ignore[arg-type] # classes can be hashed


def calls_of(module: nn.Module) -> frozenset[str]:
    """The names of the file, or of Python itself, in the same code."""
    return frozenset[str]().union(
        *(_globals(found.__code__) for start in _starts(module) for found in _functions(*start))  # type: ignore[arg-type] # as above
    )


def named_values(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """What the names in the code of modules stand for, where they are variables of the file or function around it.

    Of a module of Python that is mentioned, what is mentioned of it.
    """
    for start in dict.fromkeys(start for module in modules for start in _starts(module)):
        for function in _functions(*start):  # type: ignore[arg-type] # as above
            words = _own_words(function.__code__)
            for value in (*_around(function), *(function.__globals__.get(word) for word in words)):
                yield value
                if isinstance(value, ModuleType):
                    yield from (vars(value)[word] for word in words & vars(value).keys())


def _starts(module: nn.Module) -> list[tuple[type[nn.Module], Any]]:
    """The module's `forward`, and the functions among its attributes that the code names."""
    kind = type(module)
    forward = getattr(module.forward, "__func__", module.forward)
    words = _words(kind, forward)  # type: ignore[arg-type] # classes can be hashed
    own = [value for name, value in vars(module).items() if name in words and inspect.isfunction(value)]
    return [(kind, function) for function in (forward, *own)]


@functools.lru_cache(_MOST_FUNCTIONS)
def _words(kind: type[nn.Module], function: Any) -> frozenset[str]:
    """Every name and word in the code of `function`, a method of `kind`, and of the functions that it may call."""
    return frozenset[str]().union(*(_own_words(found.__code__) for found in _functions(kind, function)))  # type: ignore[arg-type] # as above


@functools.cache
def _own_words(code: CodeType) -> frozenset[str]:
    """Every name and word in the code itself and in the functions that are made in it."""
    words = {*code.co_names, *code.co_freevars, *(word for word in code.co_consts if isinstance(word, str))}
    return frozenset(words.union(*(_own_words(part) for part in code.co_consts if inspect.iscode(part))))


@functools.cache
def _globals(code: CodeType) -> frozenset[str]:
    """Names that the code itself, and the functions that are made in it, look up in the file and in Python."""
    words = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return frozenset(words.union(*(_globals(part) for part in code.co_consts if inspect.iscode(part))))


@functools.lru_cache(_MOST_FUNCTIONS)
def _functions(kind: type[nn.Module], function: Any) -> tuple[Any, ...]:
    """`function`, a method of `kind`, and the functions outside torch that it may call."""
    found, seen, waiting = list[Any](), set[Any](), [function]
    while waiting:
        function = inspect.unwrap(waiting.pop())
        code = getattr(function, "__code__", None)
        if (
            not inspect.iscode(code)
            or code in seen
            or str(getattr(function, "__module__", "")).partition(".")[0] == "torch"
        ):
            continue
        seen.add(code)
        found.append(function)
        waiting += [value for value in _around(function) if inspect.isfunction(value)]
        for name in _own_words(code):
            method = inspect.getattr_static(kind, name, None)
            waiting += [getattr(method, "fget", getattr(method, "__func__", method)), function.__globals__.get(name)]
    return tuple(found)


def _around(function: Any) -> list[Any]:
    """What the variables of the enclosing functions hold, and the values that its own arguments have by default."""
    values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # not set yet
            continue
    return values
