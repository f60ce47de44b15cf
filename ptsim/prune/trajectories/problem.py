"""What is planned: the edges of a network, what their channels cost, and after which epochs it is reconfigured."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from ptsim.errors import UnknownNameError
from ptsim.prune.trajectories.table import CostTable
from ptsim.trace.schema import Assumption

Widths = np.ndarray  # reconfigurations × edges, whole numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edge:
    """Channels that can only go together, between the layers that write and those that read them.

    Attributes:
        name: the first layer that writes it.
        width: channels of the dense network.
        role: "stem", "stream" (layers meet at a sum), "branch" (inside a residual branch) or "plain".
        depth: where its first layer stands among the network's weighted layers, 0 to 1.
        removable: a whole residual branch goes once the edge is empty; other edges keep a channel.
    """

    name: str
    width: int
    role: str
    depth: float
    removable: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What a kind of trajectory is asked.

    Attributes:
        model: its name.
        edges: those that can be pruned.
        epochs: of the run.
        events: epochs after which the network is reconfigured, ascending.
        table: what the network costs at any widths.
        seed: which of the trajectories that agree with what was given; 0 is the typical one.
    """

    model: str
    edges: tuple[Edge, ...]
    epochs: int
    events: tuple[int, ...]
    table: CostTable
    seed: int = 0

    @functools.cached_property
    def progress(self) -> np.ndarray:
        """Share of the run that is over at each reconfiguration."""
        return (np.array(self.events, dtype=float) + 1) / self.epochs

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Epochs that the dense network is trained for, then each reconfiguration's; the last may be 0."""
        ends = np.array([0, *(event + 1 for event in self.events), self.epochs])
        return np.diff(ends)

    @functools.cached_property
    def full(self) -> np.ndarray:
        """The dense widths."""
        return np.array([edge.width for edge in self.edges])

    @functools.cached_property
    def removable(self) -> np.ndarray:
        """A mask of the edges that may become empty."""
        return np.array([edge.removable for edge in self.edges])

    def noise(self) -> np.ndarray:
        """A standard normal number per edge, from the seed; 0 for the typical trajectory (seed 0)."""
        if self.seed == 0:
            return np.zeros(len(self.edges))
        return np.random.default_rng(self.seed).standard_normal(len(self.edges))

    def rounded(
        self, densities: np.ndarray, *, may_vanish: np.ndarray | None = None, offset: np.ndarray | float = 0.5
    ) -> Widths:
        """Whole widths for densities (reconfigurations × edges), never growing again: the floor of width plus `offset`.

        Edges of the mask `may_vanish` (by default the removable ones) may become empty; the others keep a channel.
        """
        removable = self.removable if may_vanish is None else may_vanish
        widths = np.floor(self.full * np.clip(densities, 0.0, 1.0) + offset).astype(int)
        widths = np.maximum(widths, np.where(removable, 0, 1))
        return np.asarray(np.minimum.accumulate(np.minimum(widths, self.full), axis=0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The width of every edge after every reconfiguration, what was assumed, and what was aimed at.

    Attributes:
        targets: fractions of dense that the widths were to meet, by name ("training", "inference", "bn").
        pruned: the group lasso is on; False for a dense run.
    """

    widths: Widths
    assumed: tuple[Assumption, ...]
    targets: dict[str, float] = dataclasses.field(default_factory=dict)
    pruned: bool = True


class Kind(Protocol):
    """Makes a trajectory from the text of `--pruning`."""

    def __call__(self, text: str, problem: Problem) -> Trajectory:
        """The trajectory.

        Raises:
            UsageError: the text asks for something that does not exist or cannot be.
        """
        ...


@dataclasses.dataclass(frozen=True)
class _Registered:
    forms: Callable[[], Iterable[str]]
    matches: Callable[[str], bool]
    make: Kind


_KINDS: list[_Registered] = []


def register(forms: Callable[[], Iterable[str]], matches: Callable[[str], bool]) -> Callable[[Kind], Kind]:
    """Decorator: `make(text, problem)` answers for every text that `matches`.

    Args:
        forms: what such texts look like, for error messages.
        matches: whether a text is of this kind.
    """

    def add(make: Kind) -> Kind:
        _KINDS.append(_Registered(forms, matches, make))
        return make

    return add


def find_kind(text: str) -> Kind:
    """The kind of trajectory that `text` asks for.

    Raises:
        UnknownNameError: no kind takes such a text.
    """
    package = importlib.import_module(__package__ or "ptsim.prune.trajectories")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name != "build":  # it needs torch, which takes seconds, and holds no kind
            importlib.import_module(f"{package.__name__}.{module.name}")
    for kind in _KINDS:
        if kind.matches(text):
            return kind.make
    raise UnknownNameError("pruning", text, (form for kind in _KINDS for form in kind.forms()))


@register(lambda: ("none",), lambda text: text == "none")
def dense(text: str, problem: Problem) -> Trajectory:
    """Nothing is pruned."""
    widths = np.repeat(problem.full[None], len(problem.events), axis=0)
    return Trajectory(widths=widths, assumed=(), pruned=False)
