"""A trajectory that meets given fractions: training and inference FLOPs, optionally BatchNorm traffic and layers.

An edge's density after a share t of the run is exp(−h·g(t)). The hazard h of an edge is one strength for all edges,
times how memory-bound the edge is to some power (the tilt), times chance. The course g rises from 0 to 1 as
(1 − exp(−k·t)) / (1 − exp(−k)), fast at first for a positive k, late for a negative one. Three numbers answer three
targets: the strength inference FLOPs, k training FLOPs, the tilt BatchNorm traffic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from ptsim.errors import UsageError
from ptsim.prune.trajectories.polish import polished
from ptsim.prune.trajectories.problem import Problem, Trajectory, Widths, register
from ptsim.trace.schema import Assumption

COSTS = ("training", "inference", "bn")
NAMES = (*COSTS, "layers", "saturates")
TOLERANCE = 0.005
# Where nobody says how BatchNorm traffic falls: the median of the tilts that the traffic of the paper's three ResNet-50
# runs on ImageNet gives (0.57, 0.87, 1.72); and how far hazards of edges scatter in the recorded runs (median). Both
# from analysis/fit_trajectories.py.
DEFAULT_TILT = 0.87
SCATTER = 1.14
_TILTS = (-3.0, 4.0)
_COURSES = (-60.0, 60.0)
HALVINGS = 30  # of the range of a search: widths are whole numbers, and what is nearer is the same widths


class OutOfReachError(UsageError):
    """No pruning of the network has what is aimed at; `nearest` has what one may have, both as fractions by name."""

    def __init__(self, message: str, *, aimed: Mapping[str, float], nearest: Mapping[str, float]) -> None:
        super().__init__(message)
        self.aimed, self.nearest = dict(aimed), dict(nearest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets:
    """Fractions of dense; `layers` is the share of convolutions that are gone at the end."""

    training: float
    inference: float
    bn: float | None = None
    layers: float | None = None
    saturates: float = 1.0

    @property
    def aimed(self) -> dict[str, float]:
        """The fractions that costs are compared with."""
        return {name: value for name in COSTS if (value := getattr(self, name)) is not None}


def _is_targets(text: str) -> bool:
    """True for `word=…`, unless it is a file; paths may hold a = too."""
    return "=" in text and text.partition("=")[0].strip().isidentifier() and not text.endswith(".toml")


def parse_targets(text: str) -> Targets:
    """The targets of "training=0.60,inference=0.47,bn=0.63".

    Raises:
        UsageError: an unknown name, a number out of bounds, or training or inference missing.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in NAMES:
            raise UsageError(f"pruning target {part.strip()!r} is not one of {', '.join(f'{n}=…' for n in NAMES)}")
        if name in found:
            raise UsageError(f"pruning target {name} is given twice")
        try:
            number = float(value)
        except ValueError as error:
            raise UsageError(f"pruning target {name} is {value!r}, expected a number between 0 and 1") from error
        low_is_allowed = name == "layers"
        if not (0 < number <= 1 or (low_is_allowed and number == 0)):
            raise UsageError(f"pruning target {name} is {value}, expected a fraction above 0 and at most 1")
        found[name] = number
    for name in ("training", "inference"):
        if name not in found:
            raise UsageError(f"pruning targets need {name}=…, a fraction of the dense network's FLOPs")
    return Targets(**found)


def written(targets: Targets) -> str:
    """The targets as `parse_targets` reads them, to a tenth of a percentage point."""
    values = {name: getattr(targets, name) for name in NAMES}
    return ",".join(
        f"{name}={round(value, 3):g}"
        for name, value in values.items()
        if value is not None and (name, value) != ("saturates", 1.0)
    )


@register(lambda: ("training=…,inference=…[,bn=…,layers=…,saturates=…]",), _is_targets)
def from_targets(text: str, problem: Problem) -> Trajectory:
    """The trajectory of targets on the command line."""
    return meet(parse_targets(text), problem, source=f"--pruning {text}")


def meet(targets: Targets, problem: Problem, *, source: str) -> Trajectory:
    """A trajectory that meets the targets within half a percent of dense.

    Raises:
        OutOfReachError: no pruning of the network can.
    """
    solver = _Solver(targets, problem)
    tilt, how = DEFAULT_TILT, "the median of the published runs on ImageNet"
    if targets.bn is not None:
        tilt, how = solver.tilt_for(targets.bn), source
    aimed = targets.aimed
    widths = polished(solver.widths(tilt), aimed, problem, tolerance=TOLERANCE)
    if targets.bn is not None:
        solver.check_traffic(targets.bn, widths)
    named = ", ".join(f"{name} {value:g}" for name, value in aimed.items())
    assumed = (
        Assumption(what=f"fractions of dense: {named}", source=source),
        Assumption(
            what=f"layers bound by memory are pruned {'harder' if tilt > 0 else 'less hard'} (tilt {tilt:.2f})",
            source=how,
        ),
    )
    return Trajectory(widths=widths, assumed=assumed, targets=aimed)


def tilt_of(targets: Targets, problem: Problem) -> float:
    """The tilt at which the targets, BatchNorm traffic among them, are met.

    Raises:
        UsageError: no BatchNorm traffic is given.
        OutOfReachError: see `meet`.
    """
    if targets.bn is None:
        raise UsageError("the tilt follows from BatchNorm traffic, and none is given")
    return _Solver(targets, problem).tilt_for(targets.bn)


class _Solver:
    def __init__(self, targets: Targets, problem: Problem) -> None:
        self.targets, self.problem, self.table = targets, problem, problem.table
        self.may_vanish = problem.removable
        self.noise = np.exp(SCATTER * problem.noise())
        # Equal edges are rounded at different points: a little more strength takes one channel, not one of each.
        points = np.arange(len(problem.edges)) * 0.6180339887
        self.offset = 0.05 + 0.9 * (points % 1.0)
        self.vanishing = np.zeros(len(problem.edges), dtype=bool)
        if targets.layers is not None:
            self.vanishing = self._vanishing(targets.layers)
            self.may_vanish = self.vanishing
        phases = [0.05 + 0.9 * ((points + phase / 16) % 1.0) for phase in range(16)]
        self.offset = min(phases, key=self._missed_by)  # in a narrow network it matters where rounding happens
        self._check()

    def tilt_for(self, bn: float) -> float:
        """The tilt at which BatchNorm traffic over the run comes nearest to `bn` of dense."""

        def traffic(tilt: float) -> float:
            return self._over_run(self.table.fractions(self.widths(tilt))[2])

        return root(traffic, *_TILTS, bn, steps=HALVINGS // 2)

    def check_traffic(self, bn: float, widths: Widths) -> None:
        """Refuse a BatchNorm traffic from which the nearest widths that were found are still far."""
        nearest = self._over_run(self.table.fractions(widths)[2])
        if abs(nearest - bn) > 2 * TOLERANCE:  # the table may be a little wrong; the networks themselves are checked
            self._fail(f"bn={bn:g}", bn=nearest)

    def widths(self, tilt: float) -> Widths:
        """Whole widths after every reconfiguration that meet inference and training FLOPs."""
        hazard = self._hazard(tilt)

        def over_run(course: float) -> float:
            return self._over_run(self.table.fractions(self._at(course, hazard))[1])

        return self._at(root(over_run, *_COURSES, self.targets.training, steps=HALVINGS), hazard)

    def _hazard(self, tilt: float) -> np.ndarray:
        """The hazard of every edge at which the last network has the inference FLOPs that are asked for."""
        relative = self.table.intensity**tilt * self.noise
        relative = np.where(self.vanishing, np.inf, relative / np.mean(relative))

        def final(strength: float) -> float:
            return float(self.table.fractions(self._rounded(np.ones(1), strength * relative))[0][-1])

        return root(final, 1e-9, 60.0, self.targets.inference, steps=HALVINGS) * relative

    def _missed_by(self, offset: np.ndarray) -> float:
        """How far the last network stays from its inference FLOPs with these rounding points."""
        self.offset = offset
        last = self._rounded(np.ones(1), self._hazard(DEFAULT_TILT))
        return abs(float(self.table.fractions(last)[0][-1]) - self.targets.inference)

    def _at(self, course: float, hazard: np.ndarray) -> Widths:
        t = np.minimum(self.problem.progress / self.targets.saturates, 1.0)
        if abs(course) < 1e-6:
            g = t
        elif course > 0:
            g = -np.expm1(-course * t) / -np.expm1(-course)
        else:  # the same, without overflow
            g = np.exp(course * (1 - t)) * -np.expm1(course * t) / -np.expm1(course)
        return self._rounded(g, hazard)

    def _rounded(self, g: np.ndarray, hazard: np.ndarray) -> Widths:
        with np.errstate(invalid="ignore"):
            exponent = np.where(g[:, None] > 0, g[:, None] * np.where(np.isinf(hazard), 1e9, hazard), 0.0)
        exponent = np.where(np.isinf(hazard) & (g[:, None] < 0.5), 0.0, exponent)  # a branch goes half way through
        return self.problem.rounded(
            np.exp(-np.minimum(exponent, 700.0)), may_vanish=self.may_vanish, offset=self.offset
        )

    def _over_run(self, fractions: np.ndarray) -> float:
        lengths = self.problem.lengths
        return float((lengths[0] + lengths[1:] @ fractions) / self.problem.epochs)

    def _vanishing(self, layers: float) -> np.ndarray:
        """The inner edges of the branches that go, the most memory-bound first, with chance."""
        order = np.argsort(-self.table.intensity * self.noise, kind="stable")
        gone, chosen = 0.0, np.zeros(len(order), dtype=bool)
        convolutions = self.table.inference > 0
        goal = layers * convolutions.sum()
        dead = np.zeros(len(convolutions), dtype=bool)
        for edge in order:
            if not self.problem.edges[edge].removable or gone >= goal - 0.5:
                continue
            after = dead | (self.table.dead_with[:, edge] > 0)
            if (after & convolutions).sum() > goal + 1.5:
                continue
            dead, chosen[edge] = after, True
            gone = float((dead & convolutions).sum())
        if gone < goal - max(1.5, TOLERANCE * len(convolutions)):
            self._fail(f"layers={layers:g}", layers=gone / float(convolutions.sum()))
        return chosen

    def _check(self) -> None:
        """Refuse FLOPs that no strength and no course can give."""
        targets, table = self.targets, self.table
        hazard = np.where(self.vanishing, np.inf, np.ones(len(self.problem.edges)))
        smallest = float(table.fractions(self._rounded(np.ones(1), 60.0 * hazard))[0][-1])
        if targets.inference < smallest - TOLERANCE:
            self._fail(f"inference={targets.inference:g}", inference=smallest)
        likely = self._hazard(DEFAULT_TILT)
        ends = [self._over_run(table.fractions(self._at(course, likely))[1]) for course in _COURSES]
        if not min(ends) - TOLERANCE <= targets.training <= max(ends) + TOLERANCE:
            nearest = min(ends, key=lambda end: abs(end - targets.training))
            self._fail(f"training={targets.training:g} with inference={targets.inference:g}", training=nearest)

    def _fail(self, wanted: str, **nearest: float) -> None:
        problem = self.problem
        name, value = next(iter(nearest.items()))
        raise OutOfReachError(
            f"no pruning of {problem.model} with {len(problem.events)} reconfigurations in {problem.epochs} epochs "
            f"has {wanted}; the nearest is {name}={value:.2f}",
            aimed=self.targets.aimed,
            nearest=self.targets.aimed | nearest,
        )


def root(function: Callable[[float], float], low: float, high: float, wanted: float, *, steps: int) -> float:
    """Where a monotone function, which may have steps, comes closest to `wanted`: halved so often, or on one step."""
    ends = {low: function(low), high: function(high)}
    rising = ends[high] > ends[low]
    for _ in range(steps):
        if ends[low] == ends[high]:  # both on one step, as widths are whole numbers: between them nothing changes
            break
        middle = (low + high) / 2
        value = ends[middle] = function(middle)
        if (value < wanted) == rising:
            low = middle
        else:
            high = middle
    return min(ends, key=lambda at: abs(ends[at] - wanted))
