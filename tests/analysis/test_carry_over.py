"""How far one recorded run says how another prunes, on runs whose answer is known by hand."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from ptsim.trace.io import read_trace
from tests.traces import shrinking_trace

FOLDER = Path(__file__).parents[2] / "analysis"


def test_a_run_left_out_that_prunes_less_is_overestimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("carry_over")
    files = [
        shrinking_trace(tmp_path / name, keep=keep, model="resnet20", remove_layers=False, batch_step=0)
        for name, keep in (("hard.jsonl", 0.6), ("soft.jsonl", 0.9))
    ]
    rows = script.table([read_trace(file) for file in files]).set_index(["imitated", "left_out"])
    assert len(rows) == 4
    for name in ("inference", "training", "epoch"):
        itself, other = (rows[f"{name}_points"][("hard", run)] for run in ("hard", "soft"))
        assert abs(itself) < 5 < abs(other)  # its 14 layers lie elsewhere than those of the 20 that are planned
    assert rows.inference_points[("hard", "soft")] < 0 < rows.inference_points[("soft", "hard")]
