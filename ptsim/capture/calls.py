"""What does a model's code keep from one call to the next, in plain attributes of its modules?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

Changes: TypeAlias = Mapping[tuple[str, str], tuple[Any, Any]]  # module's path, attribute → before and after
_LATER = (1, 2, 3, 7, 10, 99, 100, 1000, 12_345, 10**6)  # calls
_SHAPES = ("size", "dim", "numel", "len", "getattr")  # tell nothing of values
_OWN = frozenset(vars(nn.Module()))


class Left:
    """Stands in an attribute for a tensor that the call before has left there; nothing can be computed with it."""


@contextlib.contextmanager
def attributes_restored(model: nn.Module) -> Iterator[Callable[[], Changes]]:
    """Afterwards every module has the attributes that it had, and its buffers their values.

    Tracing leaves stand-ins where the code stores values, and runs what the code does with buffers alone. What it
    gives tells, inside, which attributes have changed so far.
    """
    buffers = [
        (buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_inference()
    ]
    before = [
        (path, table, dict(table), {name: value.copy() for name, value in table.items() if type(value) in (dict, list)})
        for path, module in model.named_modules()
        for table in [vars(module)]
    ]

    def changes() -> Changes:
        return {
            (path, name): (containers.get(name, attributes.get(name)), _copied(value))
            for path, table, attributes, containers in before
            for name, value in table.items()
            if name not in _OWN and _differs(attributes.get(name), containers.get(name), value)
        }

    try:
        yield changes
    finally:
        for buffer, version, values in buffers:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(values)
        for _, table, attributes, containers in before:
            table.clear()
            table.update(attributes)
            for name, content in containers.items():
                container = attributes[name]
                container.clear()
                container.extend(content) if isinstance(content, list) else container.update(content)


def _copied(value: Any) -> Any:
    return value.copy() if type(value) in (dict, list) else value


def _differs(before: Any, content: Any, after: Any) -> bool:
    if before is not after:
        return not (_is_plain(before) and _is_plain(after) and type(before) is type(after) and before == after)
    if content is None:
        return False
    return len(content) != len(after) or any(a is not b for a, b in zip(_parts(content), _parts(after), strict=True))


def _parts(container: Any) -> list[Any]:
    return list(container.values()) if isinstance(container, dict) else list(container)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def later_calls(changes: Changes) -> Iterator[dict[tuple[str, str], Any]]:
    """Attributes as further calls may find them: numbers go on as they went, flags stay as they were left.

    In the place of what was computed from images stands a `Left`. Tensors that are the same at every call are left out.
    """
    found = {
        place: (before, after)
        for place, (before, after) in changes.items()
        if not _has(after, _is_constant) or _has(after, _is_of_images)
    }
    counts = any(_number(a) and _number(b) for before, after in found.values() for a, b in _pairs(before, after))
    for calls in _LATER if counts else _LATER[:1] if found else ():
        yield {place: _after(before, after, calls) for place, (before, after) in found.items()}


def _after(before: Any, after: Any, calls: int) -> Any:
    if isinstance(after, dict):
        earlier = before if isinstance(before, dict) else {}
        return {key: _after(earlier.get(key), value, calls) for key, value in after.items()}
    if isinstance(after, list | tuple):
        known = list(before) if isinstance(before, list | tuple) else []
        known += [None] * (len(after) - len(known))
        return type(after)(_after(a, b, calls) for a, b in zip(known, after, strict=False))
    if _number(before) and _number(after):
        return after + (after - before) * (calls - 1)
    return Left() if isinstance(after, fx.Proxy) else after


def _pairs(before: Any, after: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(after, dict) and isinstance(before, dict):
        for key, value in after.items():
            yield from _pairs(before.get(key), value)
    elif isinstance(after, list | tuple) and isinstance(before, list | tuple):
        for a, b in zip(before, after, strict=False):
            yield from _pairs(a, b)
    else:
        yield before, after


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _has(value: Any, test: Callable[[Any], bool]) -> bool:
    parts = _parts(value) if isinstance(value, dict | list | tuple) else None
    return test(value) if parts is None else any(_has(part, test) for part in parts)


def _is_constant(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, fx.Proxy) and not _is_of_images(value))


def _is_of_images(value: Any) -> bool:
    """True for a stand-in for what was computed from the values of the images, not from their shape alone."""
    if not isinstance(value, fx.Proxy):
        return False
    waiting, seen = [value.node], set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            return True
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node not in seen and name not in _SHAPES:
            seen.add(node)
            waiting += node.all_input_nodes
    return False
