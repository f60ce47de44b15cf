"""The frame of the command line: help without torch, errors in one sentence."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ptsim.cli import main


def test_help_and_the_package_import_no_torch() -> None:
    program = (
        "import sys, ptsim, ptsim.cli.main as m\n"
        "assert m.run(['--help']) == 0\n"
        "assert 'torch' not in sys.modules and 'pandas' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in main.COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("target", [target for target, _ in main.COMMANDS.values()])
def test_every_listed_command_exists(target: str) -> None:
    module, name = target.split(":")
    assert callable(getattr(importlib.import_module(f"ptsim.cli.{module}"), name))


def test_an_unknown_command_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["simulat"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: unknown command 'simulat'; known: ")
    assert "did you mean simulate" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    "tokens", [["simulate"], ["allreduce", "--gpus", "many"], ["cost", "--no-such-option", "3"], ["devices", "extra"]]
)
def test_a_wrong_option_is_one_sentence(tokens: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(tokens) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("tokens", "hint"),
    [
        (["train", "--weight-decay=0.1"], "hint: --set weight_decay=… sets it"),
        (["train", "--device", "cuda"], "hint: --set device=… sets it"),
        (["simulate", "run", "--cluster", "dgx-a100", "--placement", "striped"], "hint: --set placement=… sets it"),
        (["train", "--nothing", "3"], "hint: ptsim --help lists the commands"),
        (["cost", "resnet20", "--weight-decay=0.1"], "hint: ptsim --help lists the commands"),
    ],
)
def test_a_setting_that_was_typed_as_an_option_is_told_how_to_be_set(
    tokens: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(tokens) == 2
    error, told = capsys.readouterr().err.splitlines()
    assert error.startswith("error: Unknown option: --")
    assert told.startswith(hint)


def test_every_public_name_is_there() -> None:
    import ptsim

    for name in ptsim.__all__:
        assert getattr(ptsim, name) is not None


def test_a_table_in_a_pipe_has_room_for_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["clusters"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 80 < max(map(len, lines)) <= 120
    assert any("NVLink 3 over NVSwitch" in line for line in lines)


@pytest.mark.slow
def test_completion_for_a_shell_knows_commands_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main.run(["--install-completion", "--shell", "bash"]) == 0
    (installed,) = tmp_path.rglob("ptsim")
    script = installed.read_text(encoding="utf-8")
    assert all(word in script for word in ("simulate", "--cluster", "--penalty-ratio"))
    assert subprocess.run(["bash", "-n", str(installed)], check=False).returncode == 0


TALKS = """
from torch import nn

print("read")

class Net(nn.Sequential):
    def forward(self, x):
        print("called with", tuple(x.shape))
        return super().forward(x)

def net(num_classes=2):
    print("made")
    return Net(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "tokens",
    [
        "inspect MODEL --json",
        "cost MODEL --batch 4 --json",
        "predict MODEL --gpu v100 --batch 4 --json",
        "plan MODEL --images 64 --epochs 2 --batch 4 --out OUT --json",
        "train --model MODEL --dataset digits --train-limit 32 --batch 16 --epochs 1 --out OUT --json",
    ],
)
def test_what_a_users_code_prints_is_no_data(tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "talks.py").write_text(TALKS)
    tokens = tokens.replace("MODEL", f"{tmp_path / 'talks.py'}:net").replace("OUT", str(tmp_path / "out"))
    assert main.run(tokens.split()) == 0
    captured = capsys.readouterr()
    json.loads(captured.out)
    assert {"read", "made"} <= {*captured.err.split()}
    assert "called with (" in captured.err


ODD = """
import torch
from torch import nn

def layers():
    return nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)

class Uneven(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(8, 4, 1, groups=2)

    def forward(self, x):
        y = self.a(x)
        return self.b(torch.cat([y, y, y, x], 1))  # of the first group's four inputs two are one channel

def meta():
    with torch.device("meta"):
        return nn.Sequential(*layers())

def empty(): return nn.Identity()
def frozen(): return nn.Sequential(*layers()).requires_grad_(False)
def half(): return nn.Sequential(*layers()).half()
def scripted(): return torch.jit.script(nn.Sequential(*layers()))
def uneven(): return Uneven()
"""
_TRAIN = "--dataset digits --train-limit 32 --batch 16 --epochs 1 --out OUT"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize(
    ("tokens", "status", "words"),
    [
        ("inspect MODEL:meta", 2, "has shapes but no weights"),
        ("cost MODEL:empty --batch 4", 2, "computes nothing with its images"),
        (f"train --model MODEL:frozen {_TRAIN}", 2, "is trained: no parameter requires a gradient"),
        (f"train --model MODEL:scripted {_TRAIN}", 2, "is a ScriptModule, whose operators ptsim cannot see"),
        ("plan MODEL:half --images 64 --epochs 2 --batch 4 --out OUT", 0, ""),
        ("inspect MODEL:uneven --input 2,8,8", 0, "Of those that were tried none can go without others"),
        ("inspect MODEL:empty", 0, "Nothing was pruned, so nothing is proved."),
    ],
)
def test_what_an_odd_network_lacks_is_one_sentence(
    tokens: str, status: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "odd.py").write_text(ODD)
    tokens = tokens.replace("MODEL", str(tmp_path / "odd.py")).replace("OUT", str(tmp_path / "out"))
    assert main.run(tokens.split()) == status
    captured = capsys.readouterr()
    assert words in " ".join((captured.out + captured.err).split())
