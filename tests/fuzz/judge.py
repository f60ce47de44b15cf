"""What is wrong with how a command line ended: a fault of ptsim, a hang, or an answer that nothing can be."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ptsim.cli.main import run
from ptsim.errors import PtsimError
from tests.fuzz.seeds import LONG

LONGEST_S = 20
LARGEST = 1e24  # of any number in an answer; the largest are operations of a whole run
MAY_BE_NEGATIVE = re.compile(r"error|excess|saving|saved|difference|bias|points|loss|note|latency|intercept|offset")
UNITS = r"%|×|[nµm]?s\b|min\b|h\b|d\b|[kMGTP]?i?B\b|images|J\b|W\b|k?MAC"
NO_NUMBER = re.compile(rf"(?<![\w.-])[-+]?(nan|inf) ?({UNITS})(?!/s)")
TRIED: Counter[str] = Counter()  # mutants by kind, for the summary
FOUND = Path(os.environ.get("PTSIM_FUZZ_FOUND", "build/fuzz")).absolute()  # where a long campaign keeps what it finds


def count(kind: str) -> None:
    """One more mutant of that kind; a long campaign writes down now and then how many there were."""
    TRIED[kind] += 1
    if LONG and TRIED.total() % 100 == 0:
        FOUND.mkdir(parents=True, exist_ok=True)
        (FOUND / "tried.json").write_text(json.dumps(TRIED))


def failure(kind: str, seed: int, problem: str, files: Mapping[str, bytes]) -> str:
    """The line for the test's report; a long campaign keeps the mutant at once, so that no crash or kill loses it."""
    line = f"seed {seed}: {problem}"
    if LONG:
        for name, content in {**files, "problem.txt": f"{line}\n".encode(errors="backslashreplace")}.items():
            kept = FOUND / f"{kind.replace(' ', '-')}-{seed}" / name
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(content)
    return line


def outcome(tokens: list[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    """What is wrong with what the command line did; None where it ended as promised."""
    began = time.monotonic()
    status = bounded(lambda: run(tokens))
    shown = capsys.readouterr()
    if isinstance(status, str):
        return status
    if status == 130:  # the signal of `bounded` came as an interruption
        return f"more than {LONGEST_S} s ({time.monotonic() - began:.0f} s by the clock)"
    if status not in (0, 1, 2):
        faults = [path.read_text().splitlines()[-1] for path in Path().glob("ptsim-crash-*")]
        return f"exit {status}: {shown.err[-300:]} {faults[-1:]}"
    if status == 2 and not re.search(r"^(error: |ptsim )", shown.err, re.MULTILINE):
        return f"exit 2 without a sentence: {shown.err[:200]!r}"
    if "\x1b" in shown.out + shown.err or "Traceback" in shown.err:
        return f"an escape or a traceback: {shown.err[-300:]!r}"
    if status == 0 and "--json" in tokens and shown.out.startswith(("{", "[")):
        return next(absurdities(json.loads(shown.out)), None)
    if status == 0 and (found := NO_NUMBER.search(shown.out)) is not None:
        return f"the answer says {shown.out[max(0, found.start() - 60) : found.end()]!r}"
    return None


def refused(act: Callable[[], object]) -> bool | str:
    """Whether the call ended in a sentence; what is wrong with it where it ended in another error or not at all."""
    result = bounded(act)
    if isinstance(result, str):
        return result
    return result is PtsimError


def bounded(act: Callable[[], Any]) -> Any:
    """What the call gave; `PtsimError` where it ended in one; a text where it took too long or failed."""

    def late(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, LONGEST_S)  # of processor time: other programs may be busy
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return act()
    except SystemExit as error:
        return error.code
    except PtsimError as error:
        return PtsimError if error.message and "\n" not in error.message else f"an odd sentence: {error.message!r}"
    except TimeoutError:
        return f"more than {LONGEST_S} s of processor time"
    except Exception as error:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        at = "" if place is None else f" at {place.tb_frame.f_code.co_filename}:{place.tb_lineno}"
        return f"{type(error).__name__}: {str(error)[:200]}{at}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def absurdities(value: Any, key: str = "") -> Iterator[str]:
    """Numbers of a document that are not finite, beyond what anything takes, or negative where nothing can be."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from absurdities(part, str(name))
    elif isinstance(value, list):
        for part in value:
            yield from absurdities(part, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        negative = value < 0 and not MAY_BE_NEGATIVE.search(key)
        if not math.isfinite(value) or abs(value) > LARGEST or negative:
            yield f"the answer holds {key} = {value!r}"
