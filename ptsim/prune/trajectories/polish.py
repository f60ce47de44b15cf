"""Whole widths that meet their targets: single channels moved until the rounding of widths no longer misses them.

A root of densities is exact, but widths are whole numbers: in a narrow network one channel is more than the tolerance.
Every move takes one channel of an edge earlier or later, or for good, and the one that helps most is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ptsim.prune.trajectories.problem import Problem, Widths

_MOVES = 60  # no plan needed more than 20 so far
_CLOSE = 0.2  # of the tolerance: nearer is not looked for, so that what the table does not know has room
_MOST_NUMBERS = 10**7  # rows of widths times layers that are looked at together: 80 MB a table
_FAR = 10.0  # tolerances: farther away it is no matter of rounding
_STEPS = (-1, 1)  # a channel less from a reconfiguration on, or one more up to it
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
    chosen = [index for index, name in enumerate(NAMES) if name in targets]
    wanted = np.array([targets[NAMES[index]] for index in chosen])
    shares = problem.lengths / problem.epochs
    last = np.eye(len(widths))[-1]
    weights = np.array([last if NAMES[index] == "inference" else shares[1:] for index in chosen])
    held = np.array([0.0 if NAMES[index] == "inference" else shares[0] for index in chosen])

    def misses(totals: np.ndarray) -> np.ndarray:
        """How far totals (their names along the last axis) are from being near enough, squared and added up."""
        return np.asarray((np.maximum(np.abs(totals - wanted) / tolerance - _CLOSE, 0.0) ** 2).sum(axis=-1))

    for _ in range(_MOVES):
        costs = np.array(problem.table.fractions(widths))[chosen]
        totals = held + (weights * costs).sum(axis=1)
        missed = float(misses(totals))
        if missed == 0 or np.abs(totals - wanted).max() > _FAR * tolerance:
            break
        after = misses(totals + np.moveaxis(_changes(widths, costs, weights, chosen, problem), 0, -1))
        after[~_exist(widths, problem)] = np.inf
        step, row, edge = (int(at) for at in np.unravel_index(after.argmin(), after.shape))
        if after[step, row, edge] >= missed:
            break
        widths = _moved(widths, _STEPS[step], row, edge)
    return widths


def _exist(widths: Widths, problem: Problem) -> np.ndarray:
    """Which moves there are, steps × reconfigurations × edges: a last channel stays, and what is gone stays gone."""
    return np.stack([widths > 1, (widths > 0) & (widths < problem.full)])


def _moved(widths: Widths, step: int, row: int, edge: int) -> Widths:
    """The widths after a move: wherever the edge is as wide as after this reconfiguration, from it on or up to it."""
    rows, moved = np.arange(len(widths)), widths.copy()
    reached = rows >= row if step < 0 else rows <= row
    moved[reached & (widths[:, edge] == widths[row, edge]), edge] += step
    return moved


def _changes(
    widths: Widths, costs: np.ndarray, weights: np.ndarray, chosen: Sequence[int], problem: Problem
) -> np.ndarray:
    """What every move adds to every total: totals × steps × reconfigurations × edges.

    A move changes one edge of networks that follow each other, so it adds the sum of what they add: the table is asked
    once for every network, edge and step, not for every network of every move.

    Args:
        widths: reconfigurations × edges.
        costs: totals × reconfigurations, of these widths.
        weights: of the same shape; a total is the weighted sum of its costs.
        chosen: which of the table's fractions they are.
        problem: whose table it is.
    """
    count, edges = widths.shape
    changes = np.empty((len(chosen), len(_STEPS), count, edges))
    pieces = np.array_split(np.arange(edges), -(-widths.size * len(problem.table.product) // _MOST_NUMBERS))
    for which, step in enumerate(_STEPS):
        for piece in pieces:
            others = np.repeat(widths[:, None], len(piece), axis=1)  # reconfigurations × edges that move × edges
            others[:, np.arange(len(piece)), piece] += step
            found = np.array(problem.table.fractions(others.reshape(-1, edges)))[chosen]
            changes[:, which][..., piece] = found.reshape(-1, count, len(piece)) - costs[..., None]
    changes *= weights[:, None, :, None]
    alike = widths[1:] == widths[:-1]
    for row in reversed(range(count - 1)):
        changes[:, 0, row] += alike[row] * changes[:, 0, row + 1]
    for row in range(1, count):
        changes[:, 1, row] += alike[row - 1] * changes[:, 1, row - 1]
    return changes
