from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from ptsim.cli.main import run
from ptsim.trace.schema import Epoch
from tests.traces import shrinking_records, shrinking_trace, write_trace


@pytest.mark.slow
def test_json_has_the_keys_that_scripts_rely_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cost", "vgg11", "--batch", "4", "--gpu", "t4", "--precision", "amp", "--json", "--layers"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["inference_macs_per_image"] == 152_769_536  # by hand: 3·64·9·32² + 64·128·9·16² + … + 512·10
    assert document["parameters"] == 9_228_362
    assert document["peak_memory_bytes"] > 0
    assert document["bn_bytes_per_image"] > 0
    assert document["fits"] is True
    assert document["largest_batch"] >= 4
    assert document["precision"] == "fp16"
    assert len(document["layers"]) == 31
    assert document["epochs"] == []


@pytest.mark.slow
def test_people_get_tables(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = shrinking_trace(tmp_path / "trace.jsonl")
    assert run(["cost", str(trace), "--layers", "--gpu", "a100"]) == 0
    out = capsys.readouterr().out
    assert "by kind of layer" in out
    assert "by epoch" in out
    assert "with the last network of the run" in " ".join(out.split())
    assert "the largest that fits is" in " ".join(out.split())
    assert "at the memory bandwidth of a100-sxm4-40gb" in " ".join(
        out.split()
    )  # no "at least": a cache may make it less


def test_epochs_share_a_row_as_far_as_it_says_the_same_of_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of one architecture and mini-batch, one epoch is trained in passes, which need less memory."""
    records = [
        msgspec.structs.replace(record, passes=4) if isinstance(record, Epoch) and record.epoch == 2 else record
        for record in shrinking_records(epochs=6, interval=6)
    ]
    assert run(["cost", str(write_trace(tmp_path / "t.jsonl", records))]) == 0
    table = capsys.readouterr().out.partition("by epoch")[2]
    assert re.findall(r"^ +(\d(?:–\d)?) +64 ", table, re.MULTILINE) == ["0–1", "2", "3–5"]


@pytest.mark.slow
def test_a_trace_needs_no_torch(tmp_path: Path) -> None:
    trace = shrinking_trace(tmp_path / "trace.jsonl")
    code = (
        "import sys; from ptsim.cli.main import run; "
        f"status = run(['cost', {str(trace)!r}, '--json']); "
        "sys.exit(status or ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["epochs"]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "unknown model"),
        (["resnet20", "--gpu", "abacus"], "unknown device"),
        (["resnet20", "--input", "3,32"], "CHANNELS,HEIGHT,WIDTH"),
        (["resnet20", "--batch", "0"], "batch is 0"),
        (["missing.jsonl"], "no trace here"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["cost", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_wrong_image_is_one_sentence_without_torchs_log(tmp_path: Path) -> None:
    model = tmp_path / "m.py"
    model.write_text("from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, 2))\n")
    command = [sys.executable, "-m", "ptsim", "cost", f"{model}:net", "--input", "3,8,8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if not line.startswith("ptsim cost: ")]  # the notice of slow work
    assert len(said) == 1
    assert said[0].startswith("error: Sequential fails on an image of 3×8×8")


def test_a_search_that_ends_at_its_limit_says_or_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "m.py"
    model.write_text("from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, 2))\n")
    assert run(["cost", f"{model}:net", "--input", "3,2,2", "--gpu", "a100"]) == 0
    assert "1,048,576 or more" in " ".join(capsys.readouterr().out.split())
