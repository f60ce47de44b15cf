"""A trajectory from a TOML file: densities of edges or roles at given epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from ptsim.errors import FileFormatError, UnknownNameError
from ptsim.prune.trajectories.problem import Problem, Trajectory, register
from ptsim.prune.trajectories.roles import ROLES
from ptsim.textfile import convert_toml, read_toml
from ptsim.trace.schema import Assumption

Density = Annotated[float, msgspec.Meta(ge=0, le=1)]
Epoch = Annotated[int, msgspec.Meta(ge=1)]


class Course(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Densities of one edge, or of all edges of a role: 1 before training, straight lines between the given epochs."""

    epochs: tuple[Epoch, ...]
    densities: tuple[Density, ...]
    edge: str | None = None
    role: str | None = None


class TrajectoryFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file: `[[prune]]` tables; a later one overrides an earlier one for the same edge."""

    prune: tuple[Course, ...]
    source: str = ""


@register(lambda: ("FILE.toml",), lambda text: text.endswith(".toml") and not text.startswith("like:"))
def from_file(text: str, problem: Problem) -> Trajectory:
    """The trajectory of a TOML file.

    Raises:
        FileFormatError: the file is not as `TrajectoryFile` says, or an epoch is beyond the run.
        UnknownNameError: an edge that the network does not have, or a role that does not exist.
    """
    path = Path(text)
    given = convert_toml(path, read_toml(path), TrajectoryFile)
    densities = np.ones((len(problem.events), len(problem.edges)))
    for course in given.prune:
        _check(path, course, problem)
        epochs = np.array([0, *course.epochs], dtype=float)
        values = np.interp(np.array(problem.events) + 1.0, epochs, [1.0, *course.densities])
        for index, edge in enumerate(problem.edges):
            if course.edge == edge.name or course.role == edge.role:
                densities[:, index] = values
    held = sorted({edge.role for edge in problem.edges})
    unused = sorted({course.role for course in given.prune if course.role is not None} - {*held})
    if not any(course.edge is not None or course.role in held for course in given.prune):
        raise FileFormatError(path, f"names no edge of {problem.model}; its edges are of the roles {', '.join(held)}")
    what = "densities by edge and epoch" + (f"; no edge is {' or '.join(unused)}" if unused else "")
    source = f"{text}: {given.source}" if given.source else text
    return Trajectory(widths=problem.rounded(densities), assumed=(Assumption(what=what, source=source),))


def _check(path: Path, course: Course, problem: Problem) -> None:
    if (course.edge is None) == (course.role is None):
        raise FileFormatError(path, "a [[prune]] table needs either an edge or a role")
    if len(course.epochs) != len(course.densities) or not course.epochs:
        raise FileFormatError(
            path, f"{len(course.epochs)} epochs and {len(course.densities)} densities, expected as many of both"
        )
    if list(course.epochs) != sorted(set(course.epochs)) or course.epochs[-1] > problem.epochs:
        raise FileFormatError(path, f"epochs are {list(course.epochs)}, expected ascending ones up to {problem.epochs}")
    if list(course.densities) != sorted(course.densities, reverse=True):
        raise FileFormatError(
            path, f"densities are {list(course.densities)}: a channel that is gone does not come back"
        )
    if course.edge is not None and course.edge not in {edge.name for edge in problem.edges}:
        raise UnknownNameError(f"edge of {problem.model}", course.edge, [edge.name for edge in problem.edges])
    if course.role is not None and course.role not in ROLES:
        raise UnknownNameError("role", course.role, ROLES)
