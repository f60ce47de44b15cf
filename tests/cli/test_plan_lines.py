"""What `ptsim plan` prints of the other trajectories of `--draws`."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptsim.cli.plan import _show
from ptsim.trace.io import read_trace
from tests.traces import dense_trace


@pytest.mark.parametrize(
    ("shares", "line"),
    [
        ((0.629,), "1 other trajectory: BatchNorm traffic 62.9%, all-reduced bytes 62.9%"),
        ((0.629, 0.61), "2 other trajectories: BatchNorm traffic 61.0% to 62.9%, all-reduced bytes 61.0% to 62.9%"),
    ],
)
def test_one_other_trajectory_has_no_range(
    shares: tuple[float, ...], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("training_flops_fraction", "inference_flops_fraction", "bn_bytes_fraction", "allreduce_bytes_fraction")
    document = {"trace": "p.jsonl", "input_shape": (3, 8, 8), "architectures": 1} | dict.fromkeys(names, 0.5)
    draws = [dict.fromkeys(names, share) for share in shares]
    _show(document, draws, read_trace(dense_trace(tmp_path / "trace.jsonl")))
    assert line in " ".join(capsys.readouterr().out.split())
