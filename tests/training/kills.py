"""Kill training runs from outside, between their start and their first checkpoint, and say what each kill left.

    python -m tests.training.kills FOLDER 12

starts 12 runs as `python -m ptsim train` in folders below FOLDER, each as the leader of its own process group, kills
the whole group with SIGKILL, starts each run again and lets it end. A line per kill says when it came, what was there
after it, and what was there in the end that should not be.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.training.runs import settings

TINY = settings(epochs=1, train_limit=16, profile=False, num_threads=1)
FIRST = Path("checkpoints", "start", "checkpoint.json")  # of the first checkpoint
_LONGEST_S = 120.0


def seen(folder: Path) -> frozenset[str]:
    """What a run has made so far, and what is half made beside its folder."""
    roots = (folder, *folder.parent.glob(f".{folder.name}.*"))
    found = {str(root.relative_to(folder.parent)) for root in roots if root.exists()}
    for root in roots:  # `os.walk` passes over what is renamed meanwhile
        for place, folders, files in os.walk(root):
            found |= {str(Path(place, name).relative_to(folder.parent)) for name in (*folders, *files)}
    return frozenset(found)


def half_made(folder: Path) -> list[str]:
    """Names that only an interruption leaves."""
    return sorted(name for name in seen(folder) if any(part.startswith(".") for part in Path(name).parts))


def killed_at(pid: int, ended: Callable[[], bool], folder: Path, change: int) -> frozenset[str] | None:
    """Kill the process group `pid` as soon as what is in the folder has changed so often.

    Returns:
        What was there then; None where the first checkpoint was whole before, or the process ended.
    """
    before, changes, deadline = seen(folder), 0, time.monotonic() + _LONGEST_S
    while time.monotonic() < deadline and not ended():
        if (folder / FIRST).exists():
            break
        now = seen(folder)
        changes, before = changes + (now != before), now
        if changes >= change:
            os.killpg(pid, signal.SIGKILL)
            return now
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.killpg(pid, signal.SIGKILL)
    return None


def _start(folder: Path) -> subprocess.Popen[bytes]:
    if (folder / "config.toml").exists():
        options = ["--resume", str(folder)]
    else:
        values = {name: value if isinstance(value, str) else json.dumps(value) for name, value in TINY.items()}
        options = ["--out", str(folder), *(f"--set={name}={value}" for name, value in values.items())]
    return subprocess.Popen(
        [sys.executable, "-m", "ptsim", "train", *options], start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def main(root: Path, number: int) -> int:
    """Kill so many runs; the exit status tells whether any left something behind in the end."""
    left = 0
    for change in range(1, number + 1):
        folder = root / f"{change:02d}" / "run"
        folder.parent.mkdir(parents=True)
        process = _start(folder)
        begin_s = time.monotonic()
        there = killed_at(process.pid, lambda process=process: process.poll() is not None, folder, change)  # type: ignore[misc] # bound at once
        status = process.wait()
        after_s, after = time.monotonic() - begin_s, half_made(folder)
        if not (folder / "config.toml").exists():
            time.sleep(1.5)  # a folder that is half made has to be older than a second
        again = _start(folder).wait()
        remains = half_made(folder)
        left += bool(remains) or again != 0
        say: dict[str, Any] = {"change": change, "status": status, "after_s": round(after_s, 2)}
        say |= {"in_time": there is not None, "half_made": after, "again": again, "remains": remains}
        sys.stdout.write(json.dumps(say) + "\n")
        sys.stdout.flush()
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
