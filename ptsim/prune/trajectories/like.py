"""A trajectory that prunes as a recorded run did: by progress, relative depth and role of the layers."""

from __future__ import annotations

import numpy as np

from ptsim.errors import UsageError
from ptsim.network import LayerKind
from ptsim.prune.trajectories.problem import Problem, Trajectory, register
from ptsim.prune.trajectories.roles import roles
from ptsim.prune.trajectories.targets import SCATTER
from ptsim.trace.io import read_trace
from ptsim.trace.pace import changes
from ptsim.trace.schema import Assumption
from ptsim.trace.trace import Trace

_PREFIX = "like:"


@register(lambda: ("like:TRACE",), lambda text: text.startswith(_PREFIX))
def from_trace(text: str, problem: Problem) -> Trajectory:
    """The trajectory of "like:TRACE"."""
    return imitate(read_trace(text.removeprefix(_PREFIX)), problem)


def imitate(trace: Trace, problem: Problem) -> Trajectory:
    """How `trace` pruned, carried over to another network, data set or length.

    Raises:
        UsageError: the trace is planned, or no reconfiguration of it changed the network.
    """
    trace.require_measured("imitate")
    if not changes(trace):
        raise UsageError(f"{trace.path} has no reconfiguration that removed a channel, so there is nothing to imitate")
    times, densities, place = recorded_densities(trace)
    wanted = np.ones((len(problem.events), len(problem.edges)))
    for index, edge in enumerate(problem.edges):
        same = [i for i, (role, _) in enumerate(place) if role == edge.role] or list(range(len(place)))
        depths = [place[i][1] for i in same]
        course = np.array([np.interp(edge.depth, depths, row) for row in densities[:, same]])
        wanted[:, index] = np.interp(problem.progress, times, course)
    scatter = np.exp(SCATTER * problem.noise())
    widths = problem.rounded(wanted**scatter)
    return Trajectory(
        widths=widths,
        assumed=(
            Assumption(
                what="channels go as in the recorded run, by progress, relative depth and role",
                source=f"{trace.path} ({trace.run.model} on {trace.run.dataset.name})",
            ),
        ),
    )


def recorded_densities(trace: Trace) -> tuple[np.ndarray, np.ndarray, list[tuple[str, float]]]:
    """Share of the run that is over, density of every layer's output then, and the layers' role and depth.

    A layer that was removed has density 0. Rows begin with the dense network at 0.
    """
    first = trace.networks[trace.epochs[0].architecture]
    found = roles(first)
    dense = {layer.name: layer.out_channels for layer in first.layers if layer.name in found}
    names = sorted(found, key=lambda name: found[name][1])[:-1]  # the last layer's outputs are the classes
    length = trace.planned_epochs or len(trace.epochs)
    times, rows = [0.0], [[1.0] * len(names)]
    for event in trace.reconfigurations:
        network = trace.networks[event.after]
        now = {
            layer.name: layer.out_channels
            for layer in network.layers
            if layer.kind in (LayerKind.CONV, LayerKind.LINEAR)
        }
        times.append((event.epoch + 1) / length)
        rows.append([now.get(name, 0) / dense[name] for name in names])
    return np.array(times), np.array(rows), [found[name] for name in names]
