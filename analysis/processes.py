"""How do the campaigns run `ptsim` and their own pieces: as processes that are interrupted when time is over?"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ptsim import read_trace
from ptsim.errors import FileFormatError
from ptsim.trace.schema import Epoch

# -P: a checkout in the current folder must not take the installed package's place: it has no `ptsim.models`.
PTSIM = (sys.executable, "-P", "-m", "ptsim")
GRACE_S = 25.0  # after its time a piece may write down what it has
_PATIENCE_S = 8.0  # for what was interrupted
_STAT, _STARTTIME = Path("/proc/self/stat"), 19  # proc(5): field 22, of which the first two go before
_LONGEST_START_S = 600.0  # of a call


def run_together(
    commands: Mapping[str, Sequence[str]],
    remaining_s: Callable[[], float],
    meanwhile: Callable[[], None],
    *,
    cores: Sequence[int] | None = None,
    program: Sequence[str] | None = None,
    neighbours: Mapping[int, Sequence[str]] | None = None,
) -> None:
    """Run `ptsim` commands at the same time; when no time remains they are interrupted as by Ctrl-C.

    Args:
        commands: arguments of `ptsim`, by the name that a failure is reported under.
        remaining_s: seconds until they have to end.
        meanwhile: called every few seconds and at the end.
        cores: one CPU core for each command, with one thread; None pins nothing.
        program: what runs them in place of `ptsim`.
        neighbours: by core, the command that keeps it busy as soon as no other one runs on it; they end with the last
            of the commands, and nobody minds if one fails.

    Raises:
        RuntimeError: one of the commands failed by itself.
    """

    def started(command: Sequence[str], core: int | None) -> subprocess.Popen[bytes]:
        threads = {} if core is None else {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([*(program or PTSIM), *command], env=os.environ | threads)
        if core is not None:
            os.sched_setaffinity(process.pid, {core})  # its threads begin later and inherit it
        return process

    core_of = dict(zip(commands, cores or [None] * len(commands), strict=True))
    processes = {name: started(command, core_of[name]) for name, command in commands.items()}
    waiting = dict(neighbours or {})
    beside: list[subprocess.Popen[bytes]] = []
    stopped = False
    try:
        while any(process.poll() is None for process in processes.values()):
            busy = {core_of[name] for name, process in processes.items() if process.poll() is None}
            beside += [started(waiting.pop(core), core) for core in waiting.keys() - busy]
            time.sleep(min(5.0, max(remaining_s(), 0.5)))
            meanwhile()  # also if this process should not get to its end
            if remaining_s() <= 0 and not stopped:
                for process in processes.values():
                    process.send_signal(signal.SIGINT)
                stopped = True
    except BaseException:
        for process in processes.values():  # would take time from what is measured next
            process.kill()
            process.wait()
        raise
    finally:
        for process in beside:
            process.kill()
            process.wait()
    meanwhile()
    failed = [f"{name}: status {process.returncode}" for name, process in processes.items() if process.returncode]
    if failed and not stopped:
        raise RuntimeError(f"ptsim train ended badly: {', '.join(failed)}")


def epochs_of(trace: Path) -> Sequence[Epoch] | None:
    """Epochs of a trace that may be being written; None where there is none yet, or none that can be read."""
    with contextlib.suppress(FileFormatError, OSError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its last line is not whole yet
        return read_trace(trace).epochs
    return None


def num_epochs(trace: Path) -> int:
    """How many they are; -1 for None."""
    found = epochs_of(trace)
    return -1 if found is None else len(found)


def stopped_after(command: Sequence[str], seconds: float, **how: Any) -> int:
    """The status of a command that is interrupted as by Ctrl-C after so many seconds, and killed where it goes on.

    `how` is what `subprocess.Popen` is given; what it says of errors goes where the rest goes.
    """
    process = subprocess.Popen(command, stderr=subprocess.STDOUT, **how)
    try:
        for patience_s, then in ((seconds, signal.SIGINT), (_PATIENCE_S, signal.SIGKILL)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=patience_s)
            process.send_signal(then)
        return process.wait()
    except BaseException:
        process.kill()
        raise


def running_s() -> float:
    """Seconds since this process began; 0 where Linux does not tell, or a sandbox tells something else."""
    try:
        ticks = int(_STAT.read_text(encoding="ascii").rpartition(")")[2].split()[_STARTTIME])
        seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
    return seconds if 0 < seconds < _LONGEST_START_S else 0.0


def in_own_process(script: Path, arguments: Sequence[str], name: str, minutes: float, log: Path) -> str | None:
    """Run one piece of `script` with the command line `arguments` as a process; what failed, None if nothing did."""
    command = [sys.executable, str(script.resolve()), *arguments, "--piece", name, "--minutes", str(minutes)]
    with open(log, "w", encoding="utf-8") as errors:
        process = subprocess.Popen(command, process_group=0, stderr=errors)
        try:
            status = process.wait(timeout=60 * minutes + GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped {GRACE_S:.0f} s after its time"
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    if status == 0:
        return None
    said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"status {status}: {' '.join(said[-1:])[:300]}"
