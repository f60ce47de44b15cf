"""Steps of many GPUs that are left out: what counts as one group, and what is said of later rows, by hand."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

ANALYSIS = Path(__file__).parents[2] / "analysis"


@pytest.fixture
def many_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ANALYSIS))
    yield importlib.import_module("many_gpus")
    for name in ("many_gpus", "fit_efficiency", "fit_scaling", "public_rows", "residuals"):
        sys.modules.pop(name, None)


def rows(**columns: Any) -> pd.DataFrame:
    """Of one V100's tests, whose interval on one GPU is a factor of e either way."""
    usual = {"way": "GPU", "source": "a/b", "device": "v100-sxm2-16gb", "below": 1.0, "above": 1.0}
    made = pd.DataFrame(usual | columns)
    return made.assign(device_known=made.way == "source")


def test_boards_of_one_chip_from_one_source_are_a_group(many_gpus: ModuleType) -> None:
    """Residuals 0, 1 of one source and 4, 5 of another, on V100s of either size of memory; twice, by way left out.

    Squares: within 4 pairs 0.5 each, of 4 degrees; between them 8 · 2² of 3.
    """
    found = rows(
        source=["a/b", "a/b", "c/d", "c/d"] * 2,
        way=["GPU"] * 4 + ["source"] * 4,
        device=["v100-sxm2-16gb", "v100-sxm2-32gb"] * 4,
        log_ratio=[0.0, 1.0, 4.0, 5.0] * 2,
    )
    between, within = 8 * 2**2 / 3, 4 * 0.5 / 4
    assert many_gpus.alike(found) == pytest.approx((between - within) / (between + within))
    assert many_gpus.interval(found).high > 5


def test_residuals_count_in_units_of_the_side_of_the_interval_that_they_are_on(many_gpus: ModuleType) -> None:
    """Half and double widths below and above: -0.5 and 2 are both one unit away."""
    ratio = np.array([-0.5, 2.0, -0.5, 2.0])
    made = many_gpus.interval(rows(log_ratio=ratio, source=list("aabb"), below=0.5, above=2.0))
    same = many_gpus.interval(rows(log_ratio=ratio / [0.5, 2, 0.5, 2], source=list("aabb")))
    assert made == same


def test_what_is_said_of_later_rows_by_hand(many_gpus: ModuleType) -> None:
    """Steps that took 1.25, 1 and 0.8 times as long as predicted: rates of 0.8, 1 and 1.25 of the prediction."""
    later = rows(
        log_ratio=[math.log(1.25), 0.0, math.log(0.8)],
        model=["net", "net", "other"],
        precision=["fp16", "fp16", "fp32"],
        inside=[True, True, False],
    )
    assert many_gpus.overall(later) == "20.0 %, with a bias of 0.0 % and 66.7 % inside"
    assert many_gpus.by_network(later).to_numpy().tolist() == [
        ["b", "net", "fp16", 2, 12.5],
        ["b", "other", "fp32", 1, -20.0],
    ]


def test_a_board_that_only_other_rows_know_has_no_factor_of_its_own(
    many_gpus: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in what ptsim ships: rows of TensorFlow and deduced ones serve the fit, but name no board."""
    told: list[list[str]] = []

    class AskedError(Exception):
        pass

    class Problem:
        weights = solve = jacobian = lambda *_: None

        def __init__(self, *_: object) -> None:
            pass

        def fitted(self, *_: object) -> SimpleNamespace:
            def shipped(known: list[str]) -> None:
                told.append(known)
                raise AskedError

            return SimpleNamespace(shipped=shipped, nuisance={"young_software": 0.0})

    training = [
        SimpleNamespace(device=device, tells=tells, row=SimpleNamespace(source="other"))
        for device, tells in (("p100-sxm2-16gb", False), ("t4", True), ("rtx-3090", False), ("rtx-3090", True))
    ]
    monkeypatch.setattr(many_gpus, "Problem", Problem)
    monkeypatch.setattr(many_gpus, "fit_scaling", lambda *_: None)
    table = rows(device=["v100-sxm2-16gb"])
    monkeypatch.setattr(many_gpus, "many_table", lambda: table)
    monkeypatch.setattr(many_gpus, "cases", lambda *_, **__: [object()])
    with pytest.raises(AskedError):
        many_gpus.leave_out(training, [])
    assert told == [["rtx-3090", "t4"]]
