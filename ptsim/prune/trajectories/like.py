"""A trajectory that prunes as a recorded run did: by progress, relative depth and role of the layers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from ptsim.errors import UsageError
from ptsim.network import LayerKind, Network
from ptsim.operators import BRANCH_CONSTANT, ungated
from ptsim.prune.trajectories.polish import polished
from ptsim.prune.trajectories.problem import Edge, Problem, Trajectory, Widths, register
from ptsim.prune.trajectories.roles import roles
from ptsim.prune.trajectories.targets import HALVINGS, SCATTER, TOLERANCE, root
from ptsim.trace.io import read_trace
from ptsim.trace.pace import changes
from ptsim.trace.schema import Assumption
from ptsim.trace.trace import Trace

PREFIX = "like:"
STRENGTH = ",inference="  # what may follow the trace
_STRENGTHS = -12.0, 8.0  # logarithms of the power of densities


@register(lambda: ("like:TRACE[,inference=…]",), lambda text: text.startswith(PREFIX))
def from_trace(text: str, problem: Problem) -> Trajectory:
    """The trajectory of "like:TRACE" or "like:TRACE,inference=0.47".

    Raises:
        UsageError: what `imitate` raises, no trace is named, or the fraction is no number above 0 and at most 1.
    """
    name, given, value = text.removeprefix(PREFIX).partition(STRENGTH)
    if not name:
        raise UsageError(f"pruning {text!r} names no trace, expected like:TRACE")
    if not given:
        return imitate(read_trace(name), problem)
    try:
        inference = float(value)
    except ValueError as error:
        raise UsageError(f"pruning target inference is {value!r}, expected a number between 0 and 1") from error
    if not 0 < inference <= 1:
        raise UsageError(f"pruning target inference is {value}, expected a fraction above 0 and at most 1")
    return imitate(read_trace(name), problem, inference=inference)


def imitate(trace: Trace, problem: Problem, *, inference: float | None = None) -> Trajectory:
    """How `trace` pruned, carried over to another network, data set or length.

    Args:
        trace: of a run that was trained.
        problem: what is planned.
        inference: FLOPs of the last network, of dense: every edge's density is raised to one power that meets them.
            None keeps the densities of the recorded run.

    Raises:
        UsageError: the trace is planned, or no reconfiguration of it changed the network.
    """
    trace.require_measured("imitate")
    if not changes(trace):
        raise UsageError(f"{trace.path} has no reconfiguration that removed a channel, so there is nothing to imitate")
    times, densities, place = recorded_densities(trace)
    wanted = np.ones((len(problem.events), len(problem.edges)))
    for index, edge in enumerate(problem.edges):
        wanted[:, index] = np.interp(problem.progress, times, _course(edge, densities, place))
    scatter = np.exp(SCATTER * problem.noise())
    source = f"{trace.path} ({trace.run.model} on {trace.run.dataset.name})"
    what = "channels go as in the recorded run, by progress, relative depth and role"
    if inference is None:
        return Trajectory(
            widths=problem.rounded(wanted**scatter),
            assumed=(Assumption(what=what, source=source), _same_strength(trace, source)),
        )
    aimed = {"inference": inference}
    # A branch that is gone has a little less than half a channel, so that a softer run may keep some of it.
    wanted = np.maximum(wanted, 0.4 / problem.full)

    def of_strength(logarithm: float) -> Widths:
        return problem.rounded(wanted ** (scatter * np.exp(logarithm)))

    def final(logarithm: float) -> float:
        return float(problem.table.fractions(of_strength(logarithm)[-1:])[0][0])

    widths = polished(
        of_strength(root(final, *_STRENGTHS, inference, steps=HALVINGS)), aimed, problem, tolerance=TOLERANCE
    )
    given = Assumption(what=f"inference FLOPs {inference:g} of dense", source="--pruning")
    return Trajectory(widths=widths, assumed=(Assumption(what=what, source=source), given), targets=aimed)


def _course(edge: Edge, densities: np.ndarray, place: Sequence[tuple[str, float]]) -> np.ndarray:
    """The density of an edge at every recorded time: between the layers of its role that are next to it in depth.

    Without any of its role: between all that are still there, since a branch that is gone says nothing of other layers.
    """
    alike, depths = np.array([role == edge.role for role, _ in place]), np.array([depth for _, depth in place])
    there = densities > 0
    there |= ~there.any(axis=1, keepdims=True)
    rows = zip(densities, np.broadcast_to(alike, densities.shape) if alike.any() else there, strict=True)
    return np.array([np.interp(edge.depth, depths[which], row[which]) for row, which in rows])


def _same_strength(trace: Trace, source: str) -> Assumption:
    """What is not carried over: how hard a run prunes."""
    ratio, gates = trace.penalty_ratio, trace.run.hyperparameters.get("mode") == "gating"
    of = "" if ratio is None else f" at penalty ratio {ratio:g}"
    gated = ", which gated its channels and keeps fewer than a union would" if gates else ""
    return Assumption(
        what=f"the run prunes as hard as the recorded one{of}{gated}; another ratio, data set or length may prune far "
        f"more or less; {STRENGTH.strip(',')}… sets how hard this run prunes",
        source=source,
    )


def recorded_densities(trace: Trace) -> tuple[np.ndarray, np.ndarray, list[tuple[str, float]]]:
    """Share of the run that is over, density of every layer's output then, and the layers' role and depth.

    A layer that was removed has density 0, but for the last one of a branch: what it wrote is still on the stream. Rows
    begin with the dense network: at 0, and again where the first reconfiguration comes later after the start than
    reconfigurations come after each other.
    """
    first = trace.networks[trace.epochs[0].architecture]
    found = roles(first)
    dense = {layer.name: layer.out_channels for layer in first.layers if layer.name in found}
    names = sorted(found, key=lambda name: found[name][1])[:-1]  # the last layer's outputs are the classes
    length = trace.planned_epochs or len(trace.epochs)
    ends = [event.epoch + 1 for event in trace.reconfigurations]
    apart = max((later - earlier for earlier, later in itertools.pairwise(ends)), default=0)
    times = [0, *(end - apart for end in ends[:1] if end > apart), *ends]
    rows = [[1.0] * len(names)] * (len(times) - len(ends))
    for event in trace.reconfigurations:
        now = _widths(trace.networks[event.after], first, dense)
        rows.append([now.get(name, 0) / dense[name] for name in names])
    return np.array(times) / length, np.array(rows), [found[name] for name in names]


def _widths(network: Network, first: Network, dense: Mapping[str, int]) -> dict[str, int]:
    """The channels that layers write, by their names in the dense network `first`.

    What stays of a removed branch is a constant, of its last layer or the BatchNorm behind that one.
    """
    now: dict[str, int] = {}
    for layer in network.layers:
        if layer.kind in (LayerKind.CONV, LayerKind.LINEAR):
            now[ungated(layer.name, dense)] = layer.out_channels
        elif layer.op == BRANCH_CONSTANT:
            before = [source for source, target in first.edges if target == layer.name]
            now |= dict.fromkeys([layer.name] if layer.name in dense else before, layer.out_channels)
    return now
