import importlib
from pathlib import Path

import pandas as pd
import pytest

import ptsim
from tests.traces import dense_trace, shrinking_trace


def test_the_picture_has_a_line_per_gpu_below_the_saved_flops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "analysis"))
    script = importlib.import_module("readme_picture")
    monkeypatch.setattr(script, "GPUS", (1, 8))
    tiny = {"epochs": 4, "blocks": (1, 1, 1), "widths": (4, 8, 8)}
    runs = [
        ptsim.read_trace(make(tmp_path / f"{make.__name__}.jsonl", **tiny)) for make in (dense_trace, shrinking_trace)
    ]
    rows = script.table(*runs)
    assert list(rows.groupby("gpu", sort=False).size()) == [2, 2, 2]
    macs = [sum(run.network_of(e).forward_macs * e.num_images for e in run.epochs) for run in reversed(runs)]
    assert rows.saved_flops_fraction.iloc[0] == pytest.approx(
        1 - macs[0] / macs[1], abs=0.1
    )  # backward has a first layer
    axes = script.figure(rows).axes[0]
    assert len(axes.lines) == 1 + len(script.CLUSTERS)


def test_the_table_beside_the_picture_is_what_the_model_says_today(monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's first figures; made again whenever they move by more than a fifth of a point."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "analysis"))
    script = importlib.import_module("readme_picture")
    monkeypatch.setattr(script, "GPUS", (8,))
    rows = script.table(*script.runs())
    kept = pd.read_csv(script.ROOT / "docs" / "images" / "saving.csv")
    kept = kept[kept.gpus == 8]
    assert list(rows.gpu) == list(kept.gpu)
    for column in ("saved_fraction", "saved_fraction_low", "saved_fraction_high", "saved_flops_fraction"):
        assert list(rows[column]) == pytest.approx(list(kept[column]), abs=2e-3)
