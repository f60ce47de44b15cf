"""How does the GPU campaign run the tests marked gpu: with the installed package, and never beyond its time?

`gpu_campaign.py` calls it; it is no script of its own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import cuda_lines
import msgspec
from processes import stopped_after

ROOT = Path(__file__).resolve().parent.parent
ENDED = "pytest ended with status"
_AFTERWARDS_S = 15.0  # to count the lines that they have run
_RAN = re.compile(r"\btest_\S+ (?:PASSED|FAILED|SKIPPED|ERROR)\b")


def run(report: Path, work: Path, seconds: float) -> None:
    """Write what they say to `report`, and which lines that ask for CUDA none of them has run; data go to `work`.

    When so many seconds are over they are interrupted: what the tests until then have said is a result.

    Raises:
        RuntimeError: not one of them has run, as where they cannot be imported or pytest lacks a plug-in.
    """
    measured = importlib.util.find_spec("coverage") is not None
    with open(report, "w", encoding="utf-8") as file:  # a test that hangs leaves what came before it
        status = stopped_after(
            command(measured=measured),
            max(seconds - _AFTERWARDS_S, _AFTERWARDS_S),
            cwd=ROOT,
            env=environment(os.environ) | {"COVERAGE_FILE": str(work / "coverage")},
            stdout=file,
        )
        file.write(f"\n{ENDED} {status}\n\n")
        file.write("lines that ask for CUDA and that no test has run:\n")
        file.write(_unreached(work) if measured else "not known: there is no coverage.py here\n")
    if not _RAN.search(report.read_text(encoding="utf-8", errors="replace")):
        raise RuntimeError(f"no test marked gpu has run: {ENDED} {status}, and {report.name} says why")


def command(*, measured: bool) -> list[str]:
    """The tests marked gpu, under coverage.py where it is there. One folder: others may need what is not installed.

    One that hangs says where, and takes no other's turn.
    """
    counted = ["-m", "coverage", "run", "--rcfile", str(ROOT / "pyproject.toml")] if measured else []
    options = ["-v", "-m", "gpu", "-p", "no:cacheprovider", "--import-mode", "append", "--durations", "12"]
    options += ["-o", "timeout=90", "-o", "faulthandler_timeout=60"]
    return [sys.executable, "-P", *counted, "-m", "pytest", *options, str(ROOT / "tests" / "gpu")]


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """The installed package before the checkout, which has the tests, before whatever else is called `tests`."""
    before = [os.path.abspath(place) for place in given.get("PYTHONPATH", "").split(os.pathsep) if place]
    path = os.pathsep.join([*before, str(ROOT)])
    return dict(given) | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


def _unreached(work: Path) -> str:
    """The list, from what coverage.py has written."""
    answer = work / "coverage.json"
    python = [sys.executable, "-P", "-m", "coverage"]
    given = os.environ | {"COVERAGE_FILE": str(work / "coverage")}
    for arguments in (["combine"], ["json", "-o", str(answer)]):
        ran = subprocess.run([*python, *arguments], cwd=ROOT, env=given, capture_output=True, check=False)
        if ran.returncode:
            return f"not known: coverage {arguments[0]} said {(ran.stderr or ran.stdout).decode()[-300:]}\n"
    return "".join(f"{line}\n" for line in cuda_lines.unreached(msgspec.json.decode(answer.read_bytes())))
