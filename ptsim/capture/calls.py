"""What does a model's code keep from one call to the next, in plain attributes of its modules?"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from ptsim.capture.words import named_values

Changes: TypeAlias = Mapping[tuple[str, str], tuple[Any, Any]]  # module's path, attribute → before and after
_LATER = (1, 2, 3, 7, 10, 99, 100, 1000, 12_345, 10**6)  # calls
_SHAPES = ("size", "dim", "numel", "len", "getattr")  # tell nothing of values
_WITHOUT_GRADIENT = (
    *("detach", "item", "tolist", "numpy", "argmax", "argmin", "argsort", "bool", "int", "long", "count_nonzero"),
    *("eq", "ne", "lt", "gt", "le", "ge", "isnan", "isinf", "isfinite"),
)
_FUNCTIONS = (FunctionType, MethodType, ModuleType)
CONTAINERS = (dict, list, deque, set)  # that code may change in place
HOLDERS = (*CONTAINERS, tuple)  # of other values
DEEPEST = 3  # of containers in each other that are looked through
_OWN = frozenset(vars(nn.Module()))


class Left:
    """Stands in an attribute for a tensor that the call before has left there; nothing can be computed with it."""


@contextlib.contextmanager
def attributes_restored(model: nn.Module) -> Iterator[Callable[[], Changes]]:
    """Afterwards every module has the attributes that it had, and its buffers their values.

    Tracing leaves stand-ins where the code stores values, and runs what the code does with buffers alone. What it
    gives tells, inside, which attributes have changed so far. Objects of the user's own that modules keep get back what
    they had, too, and so do containers of classes and files in which the code remembers tensors.
    """
    shared = _nested(_tables_of_code(model))
    own = [
        {name: value for name, value in vars(part).items() if name not in _OWN or type(value) is dict}
        for part in model.modules()
    ]
    nested = _nested([*objects_of(model), *own])
    contents = {id(container): content for container, content in nested}
    buffers = [
        (buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_inference()
    ]
    before = [(path, vars(module), dict(vars(module))) for path, module in model.named_modules()]

    def held(value: Any) -> Any:
        """What a container in an attribute held."""
        return contents[id(value)] if isinstance(value, CONTAINERS) else None

    def changes() -> Changes:
        return {
            (path, name): (attributes.get(name) if content is None else content, _copied(value))
            for path, table, attributes in before
            for name, value in table.items()
            if name not in _OWN
            for content in [held(attributes.get(name))]
            if _differs(attributes.get(name), content, value)
        }

    try:
        yield changes
    finally:
        for buffer, version, values in buffers:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(values)
        for _, table, attributes in before:
            _restore(table, attributes)
        remembered = (kept for kept in shared if any(isinstance(part, Tensor | fx.Proxy) for part in parts_of(kept[0])))
        for container, content in (*nested, *remembered):
            _restore(container, content)


def _tables_of_code(model: nn.Module) -> list[dict[str, Any]]:
    """The attributes of the classes of the model's own modules, and what their code names of its files."""
    kinds = {kind for part in model.modules() for kind in type(part).__mro__}
    own = [kind for kind in kinds if kind.__module__.partition(".")[0] not in ("torch", "builtins")]
    named = {str(place): value for place, value in enumerate(named_values(model.modules()))}
    return [named, *(dict(vars(kind)) for kind in own)]


def _nested(tables: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    """Containers in tables of attributes, and in each other, with what they hold; so do the tables themselves."""
    found: dict[int, tuple[Any, Any]] = {}
    waiting: list[tuple[Any, int]] = [(table, DEEPEST) for table in tables]
    while waiting:
        container, depth = waiting.pop()
        if id(container) in found or not isinstance(container, CONTAINERS):
            continue
        found[id(container)] = container, _content(container)
        parts = parts_of(container) if depth else []
        waiting += [(part, depth - 1) for part in parts if isinstance(part, CONTAINERS)]
    return list(found.values())


def _content(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else list(container)


def filled(container: Any, content: Any) -> Any:
    """The container, with that content in place of its own."""
    container.clear()
    if isinstance(container, dict):
        for key, value in content.items():  # `update` of a Counter adds
            container[key] = value
    else:
        container.update(content) if isinstance(container, set) else container.extend(content)
    return container


def _restore(container: Any, content: Any) -> None:
    """Give a container its content back, if it has another one."""
    same = len(container) == len(content) and all(map(operator.is_, container, content))  # keys, of a dict
    if same and isinstance(content, dict):
        same = all(map(operator.is_, container.values(), content.values()))
    if not same:
        filled(container, content)


def objects_of(model: nn.Module) -> list[dict[str, Any]]:
    """The attributes of plain objects of the user's own classes, such as one that collects what hooks are given."""
    found = {
        id(value): vars(value)
        for module in model.modules()
        for value in vars(module).values()
        if hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module, Tensor, *_FUNCTIONS))
        if type(value).__module__.partition(".")[0] not in ("torch", "builtins", "collections", "functools")
    }
    return list(found.values())


def _copied(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, CONTAINERS) else value


def _differs(before: Any, content: Any, after: Any) -> bool:
    if before is not after:
        return not (_is_plain(before) and _is_plain(after) and type(before) is type(after) and before == after)
    if content is None:
        return False
    return len(content) != len(after) or any(
        a is not b for a, b in zip(parts_of(content), parts_of(after), strict=True)
    )


def parts_of(container: Any) -> list[Any]:
    """What a container holds; of a dict the values."""
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


def left_behind(changes: Changes) -> set[fx.Node]:
    """The nodes of what the code has left in attributes, in containers too, if a gradient goes back from it."""
    found = set[fx.Node]()
    waiting = [after for _, after in changes.values()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, HOLDERS):
            waiting += parts_of(value)
        elif isinstance(value, fx.Proxy) and not isinstance(value, fx.proxy.Attribute) and _teaches(value.node):
            found.add(value.node)
    return found


def _teaches(node: fx.Node) -> bool:
    """True if a gradient goes from a value back to a layer or parameter."""
    waiting, seen = [node], set[fx.Node]()
    while waiting:
        at = waiting.pop()
        name = at.target if isinstance(at.target, str) else getattr(at.target, "__name__", "")
        if at in seen or at.meta.get("grad") is False or name in (*_SHAPES, *_WITHOUT_GRADIENT):
            continue
        if at.op in ("call_module", "get_attr"):
            return True
        seen.add(at)
        waiting += at.all_input_nodes
    return False


def _after(before: Any, after: Any, calls: int) -> Any:
    if isinstance(after, dict):
        earlier = before if isinstance(before, dict) else {}
        return filled(copy.copy(after), {key: _after(earlier.get(key), value, calls) for key, value in after.items()})
    if isinstance(after, HOLDERS):
        known = list(before) if isinstance(before, list | tuple | deque) else []
        known += [None] * (len(after) - len(known))
        parts = [_after(a, b, calls) for a, b in zip(known, after, strict=False)]
        if isinstance(after, tuple):
            return after._make(parts) if hasattr(after, "_make") else type(after)(parts)
        return filled(copy.copy(after), parts)
    if _number(before) and _number(after):
        return after + (after - before) * (calls - 1)
    return Left() if isinstance(after, fx.Proxy) else after


def _pairs(before: Any, after: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(after, dict) and isinstance(before, dict):
        for key, value in after.items():
            yield from _pairs(before.get(key), value)
    elif isinstance(after, list | tuple | deque) and isinstance(before, list | tuple | deque):
        for a, b in zip(before, after, strict=False):
            yield from _pairs(a, b)
    else:
        yield before, after


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _has(value: Any, test: Callable[[Any], bool]) -> bool:
    parts = parts_of(value) if isinstance(value, HOLDERS) else None
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
