"""What `ptsim train` prints when it has ended."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from ptsim.cli.main import run
from ptsim.training.joining import Place


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("as_json", [True, False])
def test_the_first_rank_prints_for_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int, as_json: bool
) -> None:
    ended = {"folder": Path("f"), "trace": Path("t"), "epochs": 1, "final_accuracy": 0.5, "penalty_coefficient": 0.1}
    monkeypatch.setattr("ptsim.training.loop.train", lambda *_, **__: SimpleNamespace(**ended))
    monkeypatch.setattr("ptsim.training.joining.place", lambda: Place(rank=rank, world_size=2))
    assert run(["train", "--model", "resnet20", *(["--json"] if as_json else [])]) == 0
    printed = capsys.readouterr().out
    assert bool(printed) == (rank == 0)
    if printed and as_json:
        assert json.loads(printed)["final_accuracy"] == 0.5
