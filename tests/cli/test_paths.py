"""Paths that nothing can be read from or written to: one sentence, before torch is imported, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ptsim.cli.main import run
from tests.traces import shrinking_trace

NO_INPUT = (
    "missing.toml", "folder", "fifo", "loop", "empty", "file/x", "[/b]", "$x$", "a\nb", "a" * 300, "", "b\udcff",
    "x\0y",
)  # fmt: skip
NO_OUTPUT = ("file/x", "/proc/x/y", "loop", "fifo", "device", "a" * 300, "x\0y")
READ = (
    "allreduce --cluster @ --gpus 8 --bytes 1M", "simulate run --cluster @",
    "simulate run --cluster dgx-a100 --device @",
    "simulate run --cluster dgx-a100 --profile @", "predict run --gpu @", "validate @", "validate run --profile @",
    "validate --mllog @ --cluster dgx-a100", "sweep @", "import kineto @ -o made.toml",
    "export @ -f chrome -o made.json",
    "export @ -f onnx -o made.onnx", "calibrate network --out made.toml --nccl-log @",
    "calibrate gpu --out made.toml --trace @", "report @ -o made", "train --resume @", "train --from @ --out made",
    "train @ --out made --model missing.py:net",
)  # fmt: skip
WRITE = (
    "export run -f chrome -o @", "export run -f parquet -o @", "export run -f chakra -o @", "report run -o @",
    "calibrate gpu --out @", "plan resnet20 --images 9 --epochs 4 --batch 5 --pruning missing.toml -o @",
    "train --dataset digits --model missing.py:net --out @",
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one of everything that is no file."""
    shrinking_trace(tmp_path / "run" / "trace.jsonl")
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    os.mkfifo("fifo")
    Path("loop").symlink_to("loop")
    Path("device").symlink_to("/dev/null")
    Path("empty").touch()
    Path("file").write_text("kept\n")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(("lines", "paths"), [(READ, NO_INPUT), (WRITE, NO_OUTPUT)], ids=["read", "written"])
def test_a_path_that_does_not_serve_is_one_sentence_and_nothing_is_lost(
    place: Path, capsys: pytest.CaptureFixture[str], lines: tuple[str, ...], paths: tuple[str, ...]
) -> None:
    wrong = []
    for line in lines:
        for path in paths:
            status = run([token.replace("@", path) for token in line.split()])
            told = capsys.readouterr().err.splitlines()
            sentences = [text for text in told if text.startswith("error: ")]
            if status != 2 or len(sentences) != 1:
                wrong.append((line, path, status, told))
    assert not wrong
    assert not Path("made").exists()
    assert Path("file").read_text() == "kept\n"
    assert Path("fifo").is_fifo()
    assert Path("/dev/null").is_char_device()
    assert Path("loop").is_symlink()


@pytest.mark.slow
def test_a_wrong_path_is_found_before_torch_is_imported(place: Path) -> None:
    script = """
import sys
from ptsim.cli.main import run
for line in sys.argv[1:]:
    assert run(line.split()) == 2, line
    assert "torch" not in sys.modules, line
"""
    lines = (
        "train missing.toml", "train --model missing.py:net --out made", "train --resume missing",
        "train --from missing --out made", "train --dataset imagefolder --data-dir missing --out made",
        "train --out file/x", "demo --out file/x", "inspect missing.py:net", "cost missing.py:net",
        "predict missing.py:net --gpu a100 --batch 8", "export missing -f onnx -o made.onnx",
        "plan resnet20 --images 9 --epochs 4 --batch 5 --pruning like:missing -o made.jsonl",
        "plan resnet20 --images 9 --epochs 4 --batch 5 --pruning missing.toml -o made.jsonl",
        "calibrate gpu --out made.toml --trace missing", "report run -o file/x",
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script, *lines], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(lines)
