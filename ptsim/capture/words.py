"""Which names does the code of a network's modules mention?"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn


def words_of(module: nn.Module) -> frozenset[str]:
    """Every name and word in the code of the module's `forward` and of the functions that it may call."""
    kind = type(module)
    words = _words(kind, getattr(module.forward, "__func__", module.forward))  # type: ignore[arg-type] # classes can be hashed
    own = [value for name, value in vars(module).items() if name in words and inspect.isfunction(value)]
    return words.union(*(_words(kind, function) for function in own))  # type: ignore[arg-type] # as above


@functools.cache
def _words(kind: type[nn.Module], function: Any) -> frozenset[str]:
    """Every name and word in the code of `function`, a method of `kind`, and of the functions that it may call."""
    words, seen, waiting = set[str](), set[Any](), [function]
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
        waiting += [cell.cell_contents for cell in function.__closure__ or () if inspect.isfunction(_content(cell))]
        codes = [code]
        while codes:
            code = codes.pop()
            names = {*code.co_names, *(word for word in code.co_consts if isinstance(word, str))}
            codes += [part for part in code.co_consts if inspect.iscode(part)]
            words |= names
            for name in names:
                method = inspect.getattr_static(kind, name, None)
                waiting += [
                    getattr(method, "fget", getattr(method, "__func__", method)),
                    function.__globals__.get(name),
                ]
    return frozenset(words)


def _content(cell: Any) -> Any:
    """What a variable of an enclosing function holds; None before it is set."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
