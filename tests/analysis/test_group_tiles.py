"""Whether groups of a convolution share tiles: the published times of inference and training speak against it."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from ptsim.costs.kernels import Kernel, Kernels, Pass, Work

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def group_tiles(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "analysis"))
    return importlib.import_module("group_tiles")


def test_in_inference_a_normalisation_reads_and_writes_once(group_tiles: ModuleType) -> None:
    made = {"layer": 0, "moved_bytes": 12.0, "footprint_bytes": 8.0}
    kernels = Kernels.of(
        [
            Kernel(work=Work.NORM, step=Pass.FORWARD, blocks=64.0, **made),
            Kernel(work=Work.STREAM, step=Pass.FORWARD, **made),
        ]
    )
    seen = group_tiles.of_inference(kernels)
    assert seen.work.tolist() == [Work.STREAM, Work.STREAM]
    assert seen.moved_bytes.tolist() == [8.0, 12.0]
    assert np.isinf(seen.blocks).all()


@pytest.mark.parametrize("kind", ["inference", "training"])
def test_narrow_groups_take_as_long_as_if_each_had_tiles_of_its_own(group_tiles: ModuleType, kind: str) -> None:
    table = getattr(group_tiles, kind)()
    narrow = table[table[group_tiles.CHANNELS].between(8, 24)]
    assert len(narrow) == 11
    off = {way: np.log(narrow[way]).abs() for way in ("shared", "own")}
    assert off["own"].median() < 0.5 * off["shared"].median()
    wide = table[table[group_tiles.CHANNELS] >= 112]
    pd.testing.assert_series_equal(wide.shared, wide.own, check_names=False, rtol=1e-3)
