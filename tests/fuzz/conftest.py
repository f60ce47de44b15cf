"""Where the mutants are tried: a folder with a run and what the commands need; and how many there were."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.judge import TRIED
from tests.fuzz.kinds import KINDS, WHOLE
from tests.traces import shrinking_trace


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run, in which the commands work and crash files are kept."""
    folder, before = tmp_path_factory.mktemp("fuzz"), Path.cwd()
    shrinking_trace(folder / "run" / "trace.jsonl")
    shutil.copy(WHOLE / "tiny.py", folder)
    (folder / "log.txt").write_bytes(KINDS["nccl"].whole()[0])
    os.chdir(folder)
    kept, tempfile.tempdir = tempfile.tempdir, str(folder)
    yield folder
    tempfile.tempdir = kept
    os.chdir(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many mutants of which kind this process has tried."""
    if TRIED:
        told = ", ".join(f"{number:,} of {kind}" for kind, number in TRIED.most_common())
        terminalreporter.write_line(f"damaged inputs tried: {TRIED.total():,} ({told})")
