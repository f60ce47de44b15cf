"""How do numbers of channels follow that a model's own code keeps in attributes, such as `self.splits = [16, 24]`?

While a model is traced, the integers in the attributes of its own modules are replaced by `Number`s, which pass for
integers and know where they came from, through sums, differences, products and quotients. Where an operator is given
one as a number of channels, its rule notes which channels are meant. After a cut the attribute is set so that the
operator is given the number of those that are left. An attribute that the code uses in any other way (in a comparison,
in arithmetic with floats, as an argument that no rule reads) is never changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import nn

from ptsim.errors import UsageError

CHANGED = "_ptsim_numbers"  # an attribute of modules: the names of the attributes that a cut has set
_OWN = frozenset(vars(nn.Module()))
_WIDTHS = frozenset(("groups", "in_channels", "out_channels", "in_features", "out_features", "num_features"))
_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclasses.dataclass(frozen=True)
class Attribute:
    """An integer that a module keeps: the module's path, the attribute's name, and the place in a list or tuple."""

    path: str
    name: str
    index: int | None = None


Values: TypeAlias = Mapping[Attribute, int]
_Operation: TypeAlias = Callable[[int, int], int]
_STEPS: dict[str, tuple[_Operation, _Operation]] = {  # what was done, and what undoes it
    "add": (operator.add, operator.sub),
    "sub": (operator.sub, operator.add),
    "subtracted from": (lambda a, b: b - a, lambda t, b: b - t),
    "mul": (operator.mul, lambda t, b: t // b if b and t % b == 0 else -1),
    "floordiv": (operator.floordiv, operator.mul),
}


class Number(int):
    """An integer that came from the attribute `source`, whose value is `start`, by `steps`.

    `fixed` collects the attributes that are used in a way that forbids to change them. `synced`: it stands in a kind of
    torch's layers and is set by what cuts the layer.
    """

    source: Attribute
    start: int
    steps: tuple[tuple[str, int], ...]
    fixed: set[Attribute]
    synced = False

    @classmethod
    def of(cls, value: int, source: Attribute, fixed: set[Attribute]) -> Number:
        """The number that stands in an attribute."""
        made = cls(value)
        made.source, made.start, made.steps, made.fixed = source, value, (), fixed
        return made

    def given(self, values: Values) -> int:
        """What it is once attributes have these values."""
        result = values.get(self.source, self.start)
        for name, other in self.steps:
            result = _STEPS[name][0](result, _given(other, values))
        return result

    def solved(self, target: int, values: Values) -> int:
        """What its attribute has to be so that it becomes `target`; not positive if there is no such number."""
        for name, other in reversed(self.steps):
            target = _STEPS[name][1](target, _given(other, values))
        return target

    def sources(self) -> set[Attribute]:
        """Every attribute that it was computed from."""
        return {
            self.source,
            *(found for _, other in self.steps if isinstance(other, Number) for found in other.sources()),
        }

    def fix(self) -> None:
        """Its attributes must not change."""
        self.fixed |= self.sources()

    def _then(self, name: str, other: Any) -> Any:
        if type(other) not in (int, Number):
            if isinstance(other, float):
                self.fix()
            return NotImplemented
        made = Number(_STEPS[name][0](int(self), int(other)))
        made.source, made.start, made.fixed = self.source, self.start, self.fixed
        made.steps, made.synced = (*self.steps, (name, other)), self.synced
        return made

    def __add__(self, other: Any) -> Any:
        return self._then("add", other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._then("sub", other)

    def __rsub__(self, other: Any) -> Any:
        return self._then("subtracted from", other)

    def __mul__(self, other: Any) -> Any:
        return self._then("mul", other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        return self._then("floordiv", other)

    def __neg__(self) -> Any:
        return self._then("mul", -1)

    def __deepcopy__(self, memo: dict[int, Any]) -> Number:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)


def _given(number: int, values: Values) -> int:
    return number.given(values) if isinstance(number, Number) else number


def _fixing(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def method(self: Number, *others: Any) -> Any:
        result = plain(self, *others)
        if result is not NotImplemented or any(isinstance(other, float) for other in others):
            # Otherwise it is up to the other one, which may stand for a value of the graph.
            for number in (self, *others):
                if isinstance(number, Number):
                    number.fix()
        return result

    return method


_OTHERS = """
    eq ne lt le gt ge float truediv rtruediv rfloordiv pow rpow mod rmod divmod rdivmod and rand or ror xor rxor
    lshift rlshift rshift rrshift abs invert round ceil floor trunc
    """
for _name in _OTHERS.split():
    setattr(Number, f"__{_name}__", _fixing(f"__{_name}__"))
Number.__hash__ = int.__hash__  # type: ignore[method-assign] # a class with an __eq__ of its own has none


def _is_layer(module: nn.Module) -> bool:
    """True for a kind of torch's layers, whose numbers a cut keeps right by itself (`cut.sync_attributes`)."""
    return any(kind.__module__.startswith("torch.") and kind not in _CONTAINERS for kind in type(module).__mro__)


@contextlib.contextmanager
def named_numbers(model: nn.Module) -> Iterator[set[Attribute]]:
    """Inside, the integers in attributes of the model's own modules are `Number`s; gives the set of those fixed.

    So are the numbers of channels and groups of torch's layers: the model's code may call their `forward` itself, or
    reshape by them.
    """
    fixed: set[Attribute] = set()
    before: list[tuple[nn.Module, str, Any]] = []
    for path, module in model.named_modules():
        torchs = type(module).__module__.startswith("torch.")
        if getattr(module, "ptsim_leaf", False):
            continue
        layer = _is_layer(module)
        for name, value in list(vars(module).items()):
            if name in _OWN or name == CHANGED or (torchs and name not in _WIDTHS):
                continue
            if type(value) is int:
                named: Any = Number.of(value, Attribute(path, name), fixed)
            elif type(value) in (list, tuple) and any(type(part) is int for part in value):
                parts = enumerate(value)
                named = type(value)(
                    Number.of(part, Attribute(path, name, at), fixed) if type(part) is int else part
                    for at, part in parts
                )
            else:
                continue
            if layer:
                for part in named if isinstance(named, list | tuple) else [named]:
                    if isinstance(part, Number):
                        part.fix()
                        part.synced = True
            before.append((module, name, value))
            vars(module)[name] = named
    try:
        yield fixed
    finally:
        for module, name, value in before:
            vars(module)[name] = value


def solved(uses: Iterable[tuple[Number, int]]) -> dict[Attribute, int]:
    """The values of attributes with which numbers become what they have to be, as far as there are such values."""
    values: dict[Attribute, int] = {}
    for number, target in sorted(uses, key=lambda use: len(use[0].sources())):
        if number.source not in values and number.given(values) != target and not number.sources() & number.fixed:
            value = number.solved(target, values)
            if value >= 0:
                values[number.source] = value
    return values


def set_numbers(model: nn.Module, values: Values) -> None:
    """Write them into the attributes of `model`, in place."""
    for attribute, value in values.items():
        module = model.get_submodule(attribute.path)
        held: Any = value
        if attribute.index is not None:
            parts = list(getattr(module, attribute.name))
            parts[attribute.index] = value
            held = type(getattr(module, attribute.name))(parts)
        setattr(module, attribute.name, held)
        vars(module)[CHANGED] = sorted({*vars(module).get(CHANGED, ()), attribute.name})


def changed_numbers(model: nn.Module) -> dict[str, int | list[int]]:
    """What cuts have made of attributes, by path and name."""
    return {
        f"{path}.{name}".lstrip("."): value if isinstance(value := getattr(module, name), int) else list(value)
        for path, module in model.named_modules()
        for name in vars(module).get(CHANGED, ())
    }


def restore_numbers(model: nn.Module, stored: Mapping[str, int | list[int]]) -> None:
    """Write into the attributes of a model what `changed_numbers` gave.

    Raises:
        UsageError: the model has no such attribute.
    """
    for key, value in stored.items():
        path, _, name = key.rpartition(".")
        try:
            module = model.get_submodule(path)
            held = getattr(module, name)
        except AttributeError as error:
            raise UsageError(f"the stored structure is not that of a {type(model).__name__}: no {key}") from error
        if isinstance(held, list | tuple) != isinstance(value, list) or not isinstance(held, int | list | tuple):
            raise UsageError(f"the stored structure has {value} for {key}, which is {held!r}")
        kind: Any = type(held)
        setattr(module, name, kind(value))
        vars(module)[CHANGED] = sorted({*vars(module).get(CHANGED, ()), name})
