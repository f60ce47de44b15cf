"""The frame of the command line: help without torch, errors in one sentence."""

from __future__ import annotations

import importlib
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
