"""No damaged input ends in a fault of ptsim, a hang, or a number that is not finite.

A few hundred mutants of every kind of file in the ordinary tests; PTSIM_FUZZ_SECONDS=3600 goes on for an hour with new
seeds (`make fuzz`). What is found joins `corpus/`, where every file keeps the suffix of its kind.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import tempfile
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tomli_w

from ptsim.cli.main import run
from ptsim.errors import PtsimError
from ptsim.training.config import make_config, read_config, to_toml
from tests.fuzz.mutate import NASTY, mutated, mutated_bytes
from tests.traces import shrinking_trace

CORPUS = Path(__file__).parent / "corpus"
LONGEST_S = 20
MUTANTS = {"study": 8}  # in the ordinary tests: a sweep that is right starts a process
EACH = 40  # of the other kinds
CATALOG = Path(__file__).parents[2] / "ptsim" / "hardware" / "catalog"


class Kind(msgspec.Struct, frozen=True):
    """A kind of input: its file name, a whole example, and the commands that read it as FILE beside the trace RUN."""

    file: str
    whole: Callable[[], bytes]
    commands: tuple[str, ...]


def study() -> bytes:
    """A study of everything that a study can have."""
    return b"""traces = ["run"]
clusters = ["dgx-a100"]
gpus = [1, 8]
what_ifs = ["as-recorded", "channels-rounded-to=8 + bf16-gradients", "memory=16GiB", "failures=1000", "wider"]

[options]
scaling = "strong"
price_usd_per_gpu_hour = 2.5

[grid]
contention = [0.1, 0.3]

[what_if.wider]
bucket_bytes = 52428800
"""


def catalog(name: str) -> Callable[[], bytes]:
    """A file of the catalog."""
    return (CATALOG / name).read_bytes


KINDS = {
    "trace": Kind(
        "trace.jsonl",
        (Path("run") / "trace.jsonl").read_bytes,
        ("cost FILE --json", "simulate FILE --cluster dgx-a100 --gpus 1,16 --json", "simulate FILE --cluster dgx-a100"),
    ),
    "cluster": Kind(
        "cluster.toml",
        catalog("clusters/dgx-a100.toml"),
        ("allreduce --cluster FILE --gpus 16 --bytes 25MiB --json", "simulate run --cluster FILE --gpus 1,16 --json"),
    ),
    "device": Kind(
        "device.toml", catalog("devices/l4.toml"), ("simulate run --cluster dgx-a100 --device FILE --json",)
    ),
    "nccl": Kind(
        "log.txt",
        (Path(__file__).parents[1] / "hardware" / "nccl" / "second_run_without_header.txt").read_bytes,
        ("calibrate network --nccl-log FILE --out made.toml",),
    ),
    "profile": Kind(
        "profile.toml",
        (CORPUS / "profile" / "whole.toml").read_bytes,
        ("predict run --batch 32 --profile FILE --json",),
    ),
    "study": Kind("study.toml", study, ("sweep FILE --workers 1 --json",)),
}
LINES = (
    "simulate run --cluster dgx-a100 --gpus 1,8 --json",
    "cost run --gpu a100 --json",
    "allreduce --cluster dgx-h100 --gpus 16 --bytes 25MiB --json",
    "calibrate network --nccl-log log.txt --out made.toml",
    "devices --json",
)


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run, in which the commands work and crash files are kept."""
    folder, before = tmp_path_factory.mktemp("fuzz"), Path.cwd()
    shrinking_trace(folder / "run" / "trace.jsonl")
    os.chdir(folder)
    kept, tempfile.tempdir = tempfile.tempdir, str(folder)
    yield folder
    tempfile.tempdir = kept
    os.chdir(before)


def outcome(tokens: list[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    """What is wrong with what the command line did; None where it ended as promised."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {LONGEST_S} s of processor time")

    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, LONGEST_S)  # of processor time: other programs may be busy
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            status = run(tokens)
    except SystemExit as error:
        status = error.code
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    shown = capsys.readouterr()
    if status not in (0, 1, 2):
        faults = [path.read_text().splitlines()[-1] for path in Path().glob("ptsim-crash-*")]
        return f"exit {status}: {shown.err[-300:]} {faults[-1:]}"
    if status == 2 and not shown.err.startswith(("error: ", "warning: ", "ptsim ")):
        return f"exit 2 without a sentence: {shown.err[:200]!r}"
    if status == 0 and "--json" in tokens and (strange := not_finite(json.loads(shown.out))) is not None:
        return f"the answer holds {strange}"
    return None


def not_finite(value: Any) -> float | None:
    """A number of the document that is not finite, or beyond what anything takes."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return next((found for part in parts if (found := not_finite(part)) is not None), None)
    is_number = isinstance(value, float) and not (math.isfinite(value) and abs(value) < 1e300)
    return value if is_number else None


def mutants(kind: Kind, seed: int) -> bytes:
    """One damaged file."""
    draw, whole = random.Random(seed), kind.whole()
    if kind.file.endswith(".txt") or draw.random() < 0.3:
        return mutated_bytes(whole, draw)
    try:
        if kind.file.endswith(".jsonl"):
            lines = whole.splitlines()
            at = draw.randrange(len(lines))
            lines[at] = json.dumps(mutated(json.loads(lines[at]), draw)).encode()
            return b"\n".join(lines) + b"\n"
        return tomli_w.dumps(mutated(tomllib.loads(whole.decode()), draw)).encode()
    except (TypeError, RecursionError, ValueError):  # what no writer can: null in TOML, a great depth
        return mutated_bytes(whole, draw)


def seeds(number: int = EACH) -> Iterator[int]:
    """Those of the ordinary tests, or new ones until the time is over."""
    until = time.monotonic() + float(os.environ.get("PTSIM_FUZZ_SECONDS", "0")) / (len(KINDS) + 1)
    yield from range(number)
    while time.monotonic() < until:
        yield random.randrange(10**6, 10**12)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_a_sentence_or_an_answer(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind, failures = KINDS[name], []
    for number, seed in enumerate(seeds(MUTANTS.get(name, EACH))):
        Path(kind.file).write_bytes(mutants(kind, seed))
        command = kind.commands[number % len(kind.commands)].replace("FILE", kind.file)
        for left in (*Path().glob("*.results.jsonl"), Path("made.toml")):
            left.unlink(missing_ok=True)
        if (problem := outcome(command.split(), capsys)) is not None:
            failures.append(f"seed {seed}: {command}: {problem}")
    assert not failures, "\n".join(failures)


def test_a_damaged_configuration_is_a_sentence_or_a_configuration() -> None:
    whole = to_toml(make_config({"model": "resnet20", "dataset": "digits", "epochs": 3})).encode()
    kind = Kind("config.toml", lambda: whole, ())
    for seed in seeds(5 * EACH):
        Path(kind.file).write_bytes(mutants(kind, seed))
        with contextlib.suppress(PtsimError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make_config(read_config(kind.file))


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_was_found_once_stays_mended(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if path.parent.name == "cli":
        lines = [[token.replace("RUN/trace.jsonl", "run/trace.jsonl") for token in json.loads(path.read_text())]]
    else:
        kind = KINDS[path.parent.name]
        Path(kind.file).write_bytes(path.read_bytes())
        lines = [command.replace("FILE", kind.file).split() for command in kind.commands]
        lines += [[token for token in line if token != "--json"] for line in lines if "sweep" not in line]
    for line in lines:
        assert outcome(line, capsys) is None, line


@pytest.mark.timeout(0)
def test_a_strange_command_line_is_a_sentence_or_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    failures = []
    Path("log.txt").write_bytes(KINDS["nccl"].whole())
    for seed in seeds():
        draw = random.Random(seed)
        tokens = draw.choice(LINES).split()
        at = draw.randrange(1, len(tokens))
        tokens[at] = str(draw.choice([value for value in NASTY if value != "/dev/zero"]))
        if (problem := outcome(tokens, capsys)) is not None:
            failures.append(f"seed {seed}: {' '.join(tokens)[:200]!r}: {problem}")
    assert not failures, "\n".join(failures)
