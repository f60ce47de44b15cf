from pathlib import Path

import pandas as pd
import pytest

from analysis import check_counts

NET = """
from torch import nn


def net(num_classes=4):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, num_classes)
    )


net.input_shape = (3, 8, 8)
"""


def test_rows_are_kept_as_they_come_and_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.py").write_text(NET)
    name, file = f"{tmp_path / 'm.py'}:net", tmp_path / "counts.csv"
    dense = check_counts.record([name], file, forms=["dense"])
    assert len(pd.read_csv(file)) == len(dense) == 2  # fp32 and bf16
    both = check_counts.record([name], file)
    assert list(both.form) == ["dense", "dense", "pruned", "pruned"]
    monkeypatch.setattr(check_counts, "subject", lambda *_: pytest.fail("everything is there already"))
    again = check_counts.record([name], file)
    assert len(again) == 4
    errors = check_counts.with_errors(again)
    assert (errors.inference_macs_error.dropna() == 0).all()
    assert errors.kept_bytes_error.abs().max() <= 0.02
    pruned = again[(again.form == "pruned") & (again.precision == "fp32")].iloc[0]
    assert pruned.parameters < again.parameters.max()
    table = check_counts.summary(again)
    assert list(table.networks) == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["resnet20", "torchvision:mobilenet_v3_small"])
def test_the_counts_of_the_table_are_those_of_today(tmp_path: Path, name: str) -> None:
    """Else the claims about them would compare what ptsim said once with what torch said."""
    table = Path(__file__).parents[2] / "traces" / "public" / "counts.csv"
    kept = pd.read_csv(table)
    kept = kept[kept.model == name].reset_index(drop=True)
    kept.to_csv(tmp_path / "counts.csv", index=False)
    now = check_counts.recount(tmp_path / "counts.csv")
    assert set(now.form) == {"dense", "pruned"}
    for count in check_counts.COUNTS:
        assert list(now[count].dropna()) == list(kept[count].dropna())
