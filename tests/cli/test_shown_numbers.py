"""Rates are printed as people write them: no power of ten at sizes that somebody may have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ptsim
from ptsim.cli.calibrate_network import _show
from ptsim.cli.main import run
from ptsim.hardware.spec import AllReduceTable, AlphaBeta, Cluster, Link
from tests.traces import dense_trace

POWER = re.compile(r"\de[-+]?\d")


def test_ten_thousands_of_images_a_second_have_all_their_digits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = dense_trace(tmp_path / "trace.jsonl")
    expected = ptsim.predict(trace, cluster="dgx-a100", gpus=64, batch=256)
    assert run(["predict", str(trace), "--cluster", "dgx-a100", "--gpus", "64", "--batch", "256"]) == 0
    found = re.search(r"^([\d,]+) images/s \(([\d,]+) to ([\d,]+), 90 %\)", capsys.readouterr().out, re.MULTILINE)
    assert found is not None
    rates = expected.images_per_second, expected.low_images_per_second, expected.high_images_per_second
    assert min(rates) > 10_000
    assert found.groups() == tuple(f"{rate:,.0f}" for rate in rates)


def test_the_bandwidth_of_a_single_byte_is_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["allreduce", "--cluster", "dgx-a100", "--gpus", "8", "--bytes", "1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r" 0\.0000\d+ GB/s bus bandwidth", out)
    assert not POWER.search(out)


def test_a_line_that_hardly_grows_has_a_rate_in_digits(capsys: pytest.CaptureFixture[str]) -> None:
    line = AlphaBeta(from_bytes=1024, latency_s=2e-5, seconds_per_byte=8e-14)
    table = AllReduceTable(
        num_gpus=2, num_nodes=1, size_bytes=(1024, 4096), seconds=(2e-5, 2e-5), relative_jitter=0.0, source="t",
        segments=(line,),
    )  # fmt: skip
    link = Link(name="l", bandwidth_bytes_per_s=1e11)
    _show(Cluster(name="t", device=None, gpus_per_node=2, intra=link, tables=(table,)))
    assert "from 1.00 KiB: 20.0 µs + bytes / 12,500 GB/s" in capsys.readouterr().err
