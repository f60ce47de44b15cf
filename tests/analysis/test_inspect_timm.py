"""The survey of timm's networks runs, where timm is installed."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("timm")
sys.path.insert(0, str(Path(__file__).parents[2] / "analysis"))
import inspect_timm


def test_a_row_says_what_can_be_pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "timm.csv"
    assert inspect_timm.main(["--models", "test_resnet", "--out", str(out)]) == 0
    assert "1 of 1 networks are pruned exactly" in capsys.readouterr().err
    assert out.read_text().splitlines()[1].startswith("resnet/test,test_resnet,3x64x64,True,1.0,672,0,")
