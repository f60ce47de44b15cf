"""The generators of random numbers that a model's code may draw from.

Torch's, Python's and NumPy's own ones, and those that are objects: kept by a module, or named in the code.
"""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy
import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from ptsim.capture.words import named_values, words_of

Generator: TypeAlias = "random.Random | numpy.random.Generator | numpy.random.RandomState | torch.Generator"
_KINDS = (random.Random, numpy.random.Generator, numpy.random.RandomState, torch.Generator)
_OWN = frozenset(vars(nn.Module()))
_MAKERS = frozenset({"default_rng", "Random", "SystemRandom", "RandomState", "urandom", "secrets"})


class RandomState(NamedTuple):
    """Of the three generators on the CPU that everybody shares, and of others."""

    of_torch: torch.Tensor
    of_python: Any
    of_numpy: Any
    others: tuple[tuple[Generator, Any], ...] = ()

    @classmethod
    def now(cls, others: Sequence[Generator] = ()) -> RandomState:
        """As it is."""
        states = tuple((generator, _state(generator)) for generator in others)
        return cls(torch.get_rng_state(), random.getstate(), numpy.random.get_state(), states)

    def again(self) -> RandomState:
        """Of the same generators as they are now."""
        return RandomState.now([generator for generator, _ in self.others])

    def is_now(self) -> bool:
        """True if nothing has been drawn since."""
        with _disable_current_modes():  # one without arithmetic could not compare
            return all(_equal(before, after) for before, after in zip(self, self.again(), strict=True))

    def restore(self) -> None:
        """Let all of them go on from it."""
        torch.set_rng_state(self.of_torch)
        random.setstate(self.of_python)
        numpy.random.set_state(self.of_numpy)
        for generator, state in self.others:
            _set_state(generator, state)


def _equal(a: Any, b: Any) -> bool:
    """True for equal states: tuples and dicts of numbers, words, arrays and tensors."""
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return numpy.array_equal(a, b) if isinstance(a, numpy.ndarray) else bool(a == b)


def _state(generator: Generator) -> Any:
    if isinstance(generator, numpy.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.get_state()


def _set_state(generator: Generator, state: Any) -> None:
    if isinstance(generator, numpy.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def seed_all(seed: int, others: Sequence[Generator] = ()) -> None:
    """Let the three generators of the CPU that everybody shares, and `others`, start from `seed`."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
    for generator in others:
        if isinstance(generator, numpy.random.Generator):
            kind: Any = type(generator.bit_generator)
            generator.bit_generator.state = kind(seed).state
        elif isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        else:
            generator.seed(seed)


@contextlib.contextmanager
def random_state_kept(model: nn.Module | None, devices: Sequence[torch.device] | None = None) -> Iterator[None]:
    """Afterwards all generators go on as if nothing had been drawn inside, those of the model's own as well.

    Torch's also on `devices` (None: every GPU).
    """
    before = RandomState.now(() if model is None else chance_of(model).generators)
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            before.restore()


class Chance(NamedTuple):
    """What a model's code may draw from beside the generators that everybody shares.

    `generators` are objects that its modules keep or that its code names. `untold`: it may draw from something of which
    no state tells: from what it makes anew at every call, or from the operating system.
    """

    generators: tuple[Generator, ...]
    untold: bool


def chance_of(model: nn.Module) -> Chance:
    """The generators of a model's own."""
    found: dict[int, Generator] = {}
    foreign = [module for module in model.modules() if not type(module).__module__.startswith("torch.")]
    kept = [value for module in foreign for name, value in vars(module).items() if name not in _OWN]
    for value in _flat([*kept, *named_values(foreign)]):
        held = getattr(value, "__self__", None) if inspect.isroutine(value) else value  # or a method of one
        if isinstance(held, _KINDS):
            found.setdefault(id(held), held)
    generators = tuple(each for each in found.values() if not isinstance(each, random.SystemRandom))
    untold = len(generators) < len(found) or any(_MAKERS & words_of(module) for module in foreign)
    return Chance(generators, untold)


def _flat(value: Any, depth: int = 4) -> Iterator[Any]:
    """The value, or those in a list, tuple or dict, some levels deep."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple) and depth:
        for part in value:
            yield from _flat(part, depth - 1)
    else:
        yield value
