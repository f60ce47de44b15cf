"""Whole widths that meet their targets: single channels moved until the rounding of widths no longer misses them.

A root of densities is exact, but widths are whole numbers: in a narrow network one channel is more than the tolerance.
Every move takes one channel of an edge earlier or later, or for good, and the one that helps most is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from ptsim.prune.trajectories.problem import Problem, Widths

_MOVES = 60  # no plan needed more than 20 so far
_CLOSE = 0.2  # of the tolerance: nearer is not looked for, so that what the table does not know has room
_MOST_NUMBERS = 10**7  # rows of widths times layers that are looked at together: 80 MB a table
_FAR = 10.0  # tolerances: farther away it is no matter of rounding
NAMES = ("inference", "training", "bn")  # in the order of `CostTable.fractions`


def polished(widths: Widths, targets: Mapping[str, float], problem: Problem, *, tolerance: float) -> Widths:
    """The widths, moved channel by channel towards the targets; as they were where they are near enough.

    Args:
        widths: reconfigurations × edges, never growing.
        targets: fractions of dense by name: inference FLOPs of the last network, training FLOPs and BatchNorm traffic
            over the run.
        problem: whose table says what widths cost.
        tolerance: how far a fraction may be from its target.
    """
    names = [name for name in NAMES if name in targets]
    wanted = np.array([targets[name] for name in names])
    shares = problem.lengths / problem.epochs

    def misses(fractions: tuple[np.ndarray, ...]) -> np.ndarray:
        over_run = {name: shares[0] + part @ shares[1:] for name, part in zip(NAMES, fractions, strict=True)}
        over_run["inference"] = fractions[0][..., -1]
        found = np.stack([over_run[name] for name in names], axis=-1)
        return np.asarray(np.maximum(np.abs(found - wanted) / tolerance - _CLOSE, 0.0))

    if misses(problem.table.fractions(widths)).max() > _FAR:
        return widths
    missed = float((misses(problem.table.fractions(widths)) ** 2).sum())
    for _ in range(_MOVES):
        if missed == 0:
            break
        moves = np.array(list(_moves(widths, problem)))
        if not len(moves):
            break
        pieces = np.array_split(moves, -(-moves[..., 0].size * len(problem.table.product) // _MOST_NUMBERS))
        costs = np.concatenate([(misses(_fractions(piece, problem)) ** 2).sum(axis=-1) for piece in pieces])
        best = int(costs.argmin())
        if costs[best] >= missed:
            break
        widths, missed = moves[best], float(costs[best])
    return widths


def _fractions(trajectories: np.ndarray, problem: Problem) -> tuple[np.ndarray, ...]:
    """The table's fractions, each trajectories × reconfigurations."""
    rows = problem.table.fractions(trajectories.reshape(-1, trajectories.shape[-1]))
    return tuple(part.reshape(trajectories.shape[:2]) for part in rows)


def _moves(widths: Widths, problem: Problem) -> Iterator[Widths]:
    """Every way to take one channel from a reconfiguration on, or give one up to it; what is gone stays gone."""
    for edge, full in enumerate(problem.full):
        column = widths[:, edge]
        for k in range(len(widths)):
            if column[k] > 1:
                taken = widths.copy()
                taken[k:, edge] = np.where(column[k:] > 1, np.minimum(column[k:], column[k] - 1), column[k:])
                yield taken
            if 0 < column[k] < full:
                given = widths.copy()
                given[: k + 1, edge] = np.maximum(column[: k + 1], column[k] + 1)
                yield given
