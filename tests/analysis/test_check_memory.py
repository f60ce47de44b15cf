from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def check_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "analysis"))
    import check_memory

    yield check_memory
    sys.modules.pop("check_memory", None)


def test_the_rung_above_a_published_mini_batch_of_timm_ran_out_of_memory(check_memory: ModuleType) -> None:
    rows = check_memory.published()
    of = rows[rows.model.eq("vgg16_bn") & rows.device.eq("rtx-3090") & rows.memory_format.eq("channels_last")]
    assert sorted(zip(of.batch, of.ran, strict=True)) == [(256, True), (384, False)]  # timm's own file: 256
    assert not rows[rows.ran.eq(False) & rows.batch.gt(512)].size  # the ladder starts at 512


def test_a_small_network_fits_wherever_it_ran(check_memory: ModuleType) -> None:
    (frame,) = check_memory.check(["mobilenet_v3_small"])
    assert frame.ran.all()
    assert frame.fits.all()


def test_nothing_that_ran_out_of_memory_is_said_to_fit(check_memory: ModuleType) -> None:
    frame = pd.read_csv(ROOT / "traces" / "public" / "fits.csv")
    assert not frame[~frame.ran].fits.any()
    assert len(frame) == len(check_memory.published().drop_duplicates(check_memory.KEY))  # none is left out


@pytest.mark.parametrize("model", ["resnet50", "convnext_tiny"])
def test_the_verdicts_of_the_table_are_those_of_today(check_memory: ModuleType, model: str) -> None:
    """Else the claim would compare the table with itself."""
    (now,) = check_memory.check([model])
    kept = pd.read_csv(ROOT / "traces" / "public" / "fits.csv")
    both = kept[kept.model == model].merge(now, on=check_memory.KEY, how="left", suffixes=("", "_now"))
    assert len(both) == len(now) > 0
    assert list(both.fits) == list(both.fits_now)
    assert list(both.device_bytes) == pytest.approx(list(both.device_bytes_now), rel=0.005)
