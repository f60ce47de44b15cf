"""What `ptsim devices` and `ptsim clusters` print of a GPU and a cluster, compared with their files by hand."""

from __future__ import annotations

import json

import pytest

from ptsim.cli.main import run


def row(text: str, first: str) -> str:
    """The words of the row of a table that begins so."""
    (words,) = (line.split() for line in text.splitlines() if line.split()[:1] == [first])
    return " ".join(words)


def test_a_gpu_has_its_memory_rates_and_names_in_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["devices"]) == 0
    out = capsys.readouterr().out
    assert row(out, "t4") == "t4 16 320 40 8.1 – 65 – 70 tesla-t4"
    assert row(out, "b300-sxm-270gb").startswith("b300-sxm-270gb 269 8000 148 76.98 1125 2250 2250 1100 ")
    assert run(["devices", "--json"]) == 0
    (t4,) = (device for device in json.loads(capsys.readouterr().out) if device["name"] == "t4")
    assert (t4["aliases"], t4["memory_bytes"], t4["idle_power_w"]) == (["tesla-t4"], 16 * 2**30, 10)
    assert t4["peak_flops_per_s"] == {"fp32": 8.1e12, "fp16": 65e12}


def test_a_cluster_has_its_node_links_and_price_in_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["clusters"]) == 0
    out = capsys.readouterr().out
    assert row(out, "rtx-3090-x4") == "rtx-3090-x4 rtx-3090 4 PCIe 4.0 x16 31.5 10 Gbit/s Ethernet 10 –"
    expected = "aws-g4dn-12xlarge t4 4 PCIe 3.0 x16 15.75 50 Gbit/s Ethernet 50 0.98"
    assert row(out, "aws-g4dn-12xlarge") == expected
    assert run(["clusters", "--json"]) == 0
    (found,) = (cluster for cluster in json.loads(capsys.readouterr().out) if cluster["name"] == "aws-g4dn-12xlarge")
    assert (found["device"], found["price_usd_per_gpu_hour"], found["price_date"]) == ("t4", 0.978, "2026-09-24")
