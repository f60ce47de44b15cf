"""No damage to a run folder or to a stored state ends in a fault of ptsim, a hang, or a silently other network."""

from __future__ import annotations

import functools
import io
import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ptsim
from ptsim import zoo
from ptsim.errors import PtsimError
from tests.fuzz.judge import bounded, count, failure, outcome
from tests.fuzz.mutate import damaged, mutated
from tests.fuzz.seeds import LONG, seeds

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]
NEWEST = Path("checkpoints") / "epoch-0002"
FILES = ("config.toml", "trace.jsonl", NEWEST / "checkpoint.json", NEWEST / "checkpoint.json",
         NEWEST / "weights.safetensors", NEWEST / "state.safetensors")  # fmt: skip
SETTINGS: dict[str, Any] = {
    "model": "tiny.py:build", "dataset": "synthetic", "image_size": 8, "train_limit": 32, "validation_limit": 16,
    "batch": 16, "lr": 0.05, "penalty_ratio": 0.5, "interval": 1, "threshold": 0.2, "device": "cpu", "profile": False,
}  # fmt: skip
Content = dict[str, bytes]


def _content(folder: Path) -> Content:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _put(content: Content, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@functools.cache
def _runs() -> tuple[Content, ...]:
    """Three epochs of a run that prunes, by union and by gating; the configuration asks for a fourth."""
    runs = []
    for mode, optimizer in (("union", "sgd"), ("gating", "adam")):
        folder = Path(f"whole-{mode}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ptsim.train(SETTINGS | {"epochs": 3, "mode": mode, "optimizer": optimizer}, out=folder)
        content = _content(folder)
        content["config.toml"] = content["config.toml"].replace(b"epochs = 3", b"epochs = 4")
        runs.append(content)
    return tuple(runs)


def _damaged_run(draw: random.Random) -> tuple[int, Content]:
    """Which run, and its files, one of them damaged; half of the checkpoints lack digests, as older ones do."""
    which = draw.randrange(len(_runs()))
    content = dict(_runs()[which])
    description = str(NEWEST / "checkpoint.json")
    if draw.random() < 0.5:
        found = json.loads(content[description])
        found |= dict.fromkeys(name for name in found if "sha256" in name)
        content[description] = json.dumps(found).encode()
    name = str(draw.choice(FILES))
    if name.endswith(".safetensors"):
        content[name] = _damaged_tensors(content[name], draw)
    else:
        content[name] = damaged(name, content[name], draw)
    return which, content


def _damaged_tensors(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header is another, or whose bytes are."""
    size = int.from_bytes(content[:8], "little")
    if draw.random() < 0.5:
        return damaged("tensors.txt", content, draw)
    try:
        header = json.dumps(mutated(json.loads(content[8 : 8 + size]), draw)).encode()
    except (RecursionError, ValueError):
        header = b"[" * 5000
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def _answer_of(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network(torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8))


@functools.cache
def _whole_answer(which: int) -> Tensor:
    folder = Path(f"answer-{which}")
    _put(_runs()[which], folder)
    return _answer_of(ptsim.load_model(folder, trust=True))


def _without_digests(content: Content) -> bool:
    try:
        return json.loads(content[str(NEWEST / "checkpoint.json")])["weights_sha256"] is None
    except (ValueError, KeyError, TypeError, RecursionError):
        return True


def test_a_damaged_run_folder_is_a_sentence_or_the_same_network(capsys: pytest.CaptureFixture[str]) -> None:
    failures, folder = [], Path("damaged")
    for seed in seeds(12, 4):
        draw = random.Random(seed)
        which, content = _damaged_run(draw)
        _put(content, folder)
        count("run folder")
        way = draw.random()
        if way < 0.45:
            expected, unsure = _whole_answer(which), _without_digests(content)

            def load(expected: Tensor = expected, unsure: bool = unsure) -> str | None:
                answer = _answer_of(ptsim.load_model(folder, trust=True))
                return None if unsure or torch.equal(answer, expected) else "loads another network, silently"

            problem = bounded(load)
            problem = problem if isinstance(problem, str) else None
        elif way < 0.85 or not LONG:
            problem = outcome(["train", "--resume", str(folder), "--epochs", "4", "--json"], capsys)
            if (problem is None) and (content["trace.jsonl"][:20] != (folder / "trace.jsonl").read_bytes()[:20]):
                problem = "the beginning of the trace has gone"
        else:
            commands = ("export damaged -f onnx --trust -o made.onnx", "cost damaged --json", "validate damaged --json",
                        "predict damaged --gpu a100 --batch 8 --json")  # fmt: skip
            problem = outcome(draw.choice(commands).split(), capsys)
        if problem is not None:
            failures.append(failure("run folder", seed, f"{way:.2f}: {problem}", content))
    assert not failures, "\n".join(failures)


def _loop() -> tuple[nn.Module, ptsim.PruneTrain, Callable[[], object]]:
    torch.manual_seed(0)
    model = zoo.create("tiny.py:build").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = ptsim.PruneTrain(model, optimizer, input_shape=(3, 8, 8), penalty_ratio=0.5, interval=1, threshold=0.1)

    def step() -> None:
        loss = nn.functional.cross_entropy(model(torch.ones(4, 3, 8, 8)), torch.tensor([0, 1, 2, 3]))
        optimizer.zero_grad()
        loss.backward()
        pruner.step(loss)
        optimizer.step()

    return model, pruner, step


@functools.cache
def _state() -> bytes:
    _, pruner, step = _loop()
    for _ in range(3):
        step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner.end_epoch(validation_accuracy=0.5)
    file = io.BytesIO()
    torch.save(pruner.state_dict(), file)
    pruner.close()
    return file.getvalue()


def test_a_damaged_state_of_an_own_loop_is_a_sentence_or_a_run_that_goes_on() -> None:
    failures = []
    for seed in seeds(12):
        state = mutated(torch.load(io.BytesIO(_state()), weights_only=True), random.Random(seed))
        _, pruner, step = _loop()
        count("own loop's state")

        def go_on(pruner: ptsim.PruneTrain = pruner, step: Callable[[], object] = step, state: Any = state) -> None:
            pruner.load_state_dict(state)
            step()
            pruner.end_epoch(validation_accuracy=0.5)

        problem = bounded(go_on)
        if isinstance(problem, str):
            failures.append(failure("own loop's state", seed, problem, {"state.txt": repr(state).encode()}))
        pruner.close()
    assert not failures, "\n".join(failures)


def test_a_configuration_that_is_taken_is_trained_or_refused_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    failures = []
    whole = _runs()[0]["config.toml"]
    fixed = ["--epochs", "1", "--train-limit", "16", "--batch", "8"]
    for seed in seeds(6):
        mutant = damaged("config.toml", whole, random.Random(seed))
        Path("config.toml").write_bytes(mutant)
        shutil.rmtree("made", ignore_errors=True)
        count("configuration that is trained")
        small = ("validation_limit=8", "image_size=8", "num_workers=0", "keep_every=1")
        more = [token for setting in small for token in ("--set", setting)]
        problem = outcome(["train", "config.toml", "--out", "made", "--json", *fixed, *more], capsys)
        if problem is not None:
            failures.append(failure("configuration that is trained", seed, problem, {"config.toml": mutant}))
    assert not failures, "\n".join(failures)


def test_an_error_is_an_error() -> None:
    """The judge itself: a fault, a hang of the processor and a sentence are told apart."""

    def refuse() -> None:
        raise PtsimError("no")

    assert bounded(refuse) is PtsimError
    assert "ZeroDivisionError" in bounded(lambda: 1 // 0)
