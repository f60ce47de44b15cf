"""Single channels moved until targets are met: every move is worth what the table says of the widths it leaves."""

from __future__ import annotations

import numpy as np
import pytest

from ptsim.prune.trajectories import polish
from ptsim.prune.trajectories.polish import polished
from ptsim.prune.trajectories.problem import Edge, Problem
from ptsim.prune.trajectories.table import CostTable, Seen
from ptsim.prune.trajectories.targets import root

FULL = np.array([8, 5, 6])


def problem(*, seen: bool = True) -> Problem:
    """Five layers over three edges, made up; real networks had another inference cost than the products say."""
    random = np.random.default_rng(1)
    inputs, outputs = (np.eye(3)[random.integers(3, size=5)] for _ in range(2))
    table = CostTable(
        inputs=inputs,
        outputs=outputs,
        fixed_inputs=np.zeros(5),
        fixed_outputs=np.zeros(5),
        product=np.array([True, True, False, True, False]),
        dead_with=np.eye(5, 3),
        inference=random.random(5),
        training=random.random(5),
        bn=random.random(5),
        full=FULL.astype(float),
        seen=(Seen(said=(0.2, 0.5, 1.0), true=(0.3, 0.55, 1.0)) if seen else None, None, None),
    )
    edges = [
        Edge(name=str(i), width=int(width), role="plain", depth=i / 2, removable=True) for i, width in enumerate(FULL)
    ]
    return Problem(model="made up", edges=tuple(edges), epochs=9, events=(1, 3, 5, 8), table=table)


def totals(widths: np.ndarray, asked: Problem) -> list[float]:
    """Inference FLOPs at the end, training FLOPs and BatchNorm traffic over the run, epoch by epoch."""
    inference, training, bn = (np.array([1.0, *part]) for part in asked.table.fractions(widths))
    trained = [sum(event < epoch for event in asked.events) for epoch in range(asked.epochs)]
    return [inference[-1], training[trained].mean(), bn[trained].mean()]


def every_move(widths: np.ndarray) -> dict[tuple[int, int, int], np.ndarray]:
    """Step, reconfiguration and edge → widths: a channel less from there on, or one more up to there."""
    found = {}
    for edge, full in enumerate(FULL):
        for row, width in enumerate(widths[:, edge]):
            if width > 1:
                found[0, row, edge] = widths.copy()
                found[0, row, edge][row:, edge] = np.minimum(widths[row:, edge], width - 1)
            if 0 < width < full:
                found[1, row, edge] = widths.copy()
                found[1, row, edge][: row + 1, edge] = np.maximum(widths[: row + 1, edge], width + 1)
    return found


WIDTHS = np.array([[8, 5, 4], [6, 5, 4], [6, 1, 4], [6, 1, 0]])


def test_a_move_adds_what_the_table_says_of_the_widths_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polish, "_MOST_NUMBERS", 50)  # in several pieces
    asked = problem()
    shares = asked.lengths / asked.epochs
    weights = np.array([[0, 0, 0, 1], shares[1:], shares[1:]])
    costs = np.array(asked.table.fractions(WIDTHS))
    changes = polish._changes(WIDTHS, costs, weights, [0, 1, 2], asked)
    moves = every_move(WIDTHS)
    assert {tuple(int(i) for i in at) for at in np.argwhere(polish._exist(WIDTHS, asked))} == set(moves)
    for (step, row, edge), after in moves.items():
        assert np.array_equal(polish._moved(WIDTHS, polish._STEPS[step], row, edge), after)
        expected = np.subtract(totals(after, asked), totals(WIDTHS, asked))
        assert changes[:, step, row, edge] == pytest.approx(expected, abs=1e-12)


def test_what_is_polished_cannot_be_bettered_by_one_move() -> None:
    asked = problem(seen=False)
    now = totals(WIDTHS, asked)
    targets = {"inference": now[0] - 0.02, "training": now[1] + 0.03}
    wanted = np.array(list(targets.values()))

    def missed(widths: np.ndarray) -> float:
        off = np.abs(np.array(totals(widths, asked)[:2]) - wanted) / 0.005
        return float((np.maximum(off - 0.2, 0) ** 2).sum())

    found = polished(WIDTHS, targets, asked, tolerance=0.005)
    assert missed(found) < missed(WIDTHS)
    assert missed(found) <= min(missed(after) for after in every_move(found).values())
    assert (np.diff(found, axis=0) <= 0).all()


def test_widths_that_meet_their_targets_or_are_far_from_them_stay() -> None:
    asked = problem()
    now = totals(WIDTHS, asked)
    for off in (0.0009, 0.2):
        found = polished(WIDTHS, {"training": now[1] + off}, asked, tolerance=0.005)
        assert np.array_equal(found, WIDTHS)


def test_the_root_of_a_staircase_ends_on_the_step_that_is_closest() -> None:
    asked: list[float] = []

    def stairs(at: float) -> float:
        asked.append(at)
        return float(np.floor(8 * at))

    assert stairs(root(stairs, 0.0, 1.0, 2.4, steps=45)) == 2
    assert len(asked) < 50
    asked.clear()
    assert root(stairs, 0.0, 0.1, 2.4, steps=45) == 0.0
    assert len(asked) == 2  # both ends on one step: nothing lies between them
