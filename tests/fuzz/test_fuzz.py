"""No damaged input ends in a fault of ptsim, a hang, or a number that nothing can be.

A few hundred mutants of every kind of file in the ordinary tests; PTSIM_FUZZ_SECONDS=3600 goes on for an hour with new
seeds (`make fuzz`). What is found joins `corpus/`, where every file keeps the suffix of its kind.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import warnings
from pathlib import Path

import pytest

from ptsim.errors import PtsimError
from ptsim.training.config import make_config, read_config, to_toml
from tests.fuzz.judge import count, failure, outcome
from tests.fuzz.kinds import CORPUS, KINDS, Kind
from tests.fuzz.mutate import NASTY
from tests.fuzz.seeds import LONG, seeds

LINES = (
    "simulate run --cluster dgx-a100 --gpus 1,8 --json",
    "simulate run --cluster dgx-a100 --gpus 8 --set faults.policy=elastic --mtbf-gpu-hours 100 --price 2",
    "simulate run --cluster dgx-a100 --gpus 8 --network links --set placement=[0,1,2,3,4,5,6,7] --jitter 0.1",
    "cost run --gpu a100 --json",
    "cost tiny.py:build --input 3,16,16 --classes 10 --batch 8 --json",
    "predict run --gpu a100 --batch 8 --precision amp --json",
    "predict tiny.py:build --cluster dgx-a100 --gpus 4 --batch 8 --optimizer adam --json",
    "allreduce --cluster dgx-h100 --gpus 16 --bytes 25MiB --json",
    "calibrate network --nccl-log log.txt --nodes 2 --name x --out made.toml",
    "validate run --cluster dgx-a100 --json",
    "plan tiny.py:build --images 100 --epochs 4 --batch 10 --gpus 2 --pruning training=0.6,inference=0.5 -o made.jsonl",
    "export run --format chakra --gpus 2 -o made",
    "import kineto log.txt --device a100 --memory 80GiB -o made.toml",
    "devices --json",
)
WORDS = ("--json", "--no-json", "--help", "-o", "--out", "--gpus", "--batch=1", "--epochs", "-1", "--", "run", "@run")


def tidy() -> None:
    """Remove what the commands before have written."""
    for left in (*Path().glob("*.results.jsonl"), *Path().glob("made*")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_a_sentence_or_an_answer(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind, failures = KINDS[name], []
    for seed in seeds(kind.few, kind.share):
        draw = random.Random(seed)
        mutant = kind.mutant(draw)
        Path(kind.file).write_bytes(mutant)
        command = kind.command(draw, long=LONG > 0)
        tidy()
        count(name)
        problem = outcome(command.split(), capsys)
        if problem is None and kind.written is not None and Path(kind.written[0]).exists():
            try:
                kind.written[1](kind.written[0])
            except PtsimError as error:
                problem = f"what is written cannot be read: {error.message}"
        if problem is not None:
            failures.append(failure(name, seed, f"{command}: {problem}", {kind.file: mutant}))
    assert not failures, "\n".join(failures)


@pytest.mark.slow
def test_a_damaged_configuration_is_a_sentence_or_a_configuration() -> None:
    whole = to_toml(make_config({"model": "resnet20", "dataset": "digits", "epochs": 3})).encode()
    kind = Kind("config.toml", lambda: [whole], ())
    for seed in seeds(200):
        Path(kind.file).write_bytes(kind.mutant(random.Random(seed)))
        count("configuration")
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
    for line in lines:
        tidy()
        assert outcome(line, capsys) is None, line
        written = KINDS[path.parent.name].written if path.parent.name in KINDS else None
        if written is not None and Path(written[0]).exists():
            written[1](written[0])


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_strange_command_line_is_a_sentence_or_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    failures = []
    shutil.copy(CORPUS.parent.parent / "hardware" / "nccl" / "second_run_without_header.txt", "log.txt")
    for seed in seeds(40):
        draw = random.Random(seed)
        tokens = draw.choice(LINES).split()
        for _ in range(draw.choice((1, 1, 2))):
            at = draw.randrange(1, len(tokens))
            match draw.randrange(4):
                case 0:
                    tokens.insert(at, draw.choice(WORDS))
                case 1 if len(tokens) > 2:
                    del tokens[at]
                case _:
                    tokens[at] = str(draw.choice([value for value in NASTY if value != "/dev/zero"]))
        tidy()
        count("command line")
        if (problem := outcome(tokens, capsys)) is not None:
            line = {"args.json": json.dumps(tokens).encode()}
            failures.append(failure("command line", seed, f"{' '.join(tokens)[:200]!r}: {problem}", line))
    assert not failures, "\n".join(failures)
