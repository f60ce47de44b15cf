"""Every command that README, the docs, the scripts' own docstrings and errors show is one that the program accepts."""

import argparse
import ast
import functools
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from ptsim.cli.main import COMMANDS, app

ROOT = Path(__file__).parents[2]
PAGES = [
    path
    for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/README.md"))]
    if path.is_file()
]
SCRIPTS = sorted([*(ROOT / "analysis").glob("*.py"), *(ROOT / "examples").glob("*.py")])
PREFIX = re.compile(r"^(\$ |sudo |time |[A-Z_]+=\S+ )+")
OURS = re.compile(r"(ptsim|make|python (-m ptsim|analysis/|examples/|docs/)|torchrun)\b")
QUOTED = re.compile(r"<!-- quote: .*?<!-- end -->", re.DOTALL)  # help texts and refusals; test_pages holds them


def shown(path: Path) -> list[str]:
    """The commands in a page's code blocks, or in a script's docstring."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        blocks = [ast.get_docstring(ast.parse(text)) or ""]
    else:
        blocks = re.findall(r"^```(?:sh|bash|)\n(.*?)^```", QUOTED.sub("", text), re.DOTALL | re.MULTILINE)
        blocks += [f"{span}\n" for span in re.findall(r"`(python (?:analysis|examples|docs)/[^`]*)`", text)]
    return [command for block in blocks for command in commands(block)]


def commands(block: str) -> Iterator[str]:
    """Our commands in a block: continued lines joined, prefixes and comments cut off."""
    for line in block.replace("\\\n", " ").splitlines():
        command = PREFIX.sub("", line.strip())
        if OURS.match(command):
            yield command.split(" && ")[0]


def words(command: str) -> list[str]:
    """The words of a command; what is optional in a synopsis is given, and of alternatives the first."""
    spoken = re.sub(r"\[([^][]*)\]", lambda m: m.group(1) if m.group(1).startswith("-") else m.group(), command)
    return shlex.split(spoken.replace("(", "").replace(")", ""), comments=True)


SHOWN = list(dict.fromkeys((path.relative_to(ROOT), command) for path in [*PAGES, *SCRIPTS] for command in shown(path)))
MENTIONED = sorted(
    {
        (path.relative_to(ROOT), span)
        for path in PAGES
        for span in re.findall(r"`(ptsim [^`]*--[^`]*)`", path.read_text(encoding="utf-8"))
    }
)


class Parsed(BaseException):
    """The command line was read; nothing needs to run."""


def parse_ptsim(arguments: list[str]) -> None:
    app.parse_args(arguments, exit_on_error=False, print_error=False, console=Console(file=io.StringIO()))


def parse_script(path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the script up to where its arguments are read."""

    def read(parser: argparse.ArgumentParser, args: list[str] | None = None) -> None:
        _, unknown = parser.parse_known_args(args)
        assert not unknown, f"unknown arguments {unknown}"
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", read)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    monkeypatch.syspath_prepend(str(path.parent))
    text = path.read_text(encoding="utf-8")
    if "ArgumentParser" not in text and "_common.main" not in text:
        assert not arguments or "sys.argv" in text, f"{path.name} takes no arguments"
        return
    with pytest.raises(Parsed):
        runpy.run_path(str(path), run_name="__main__")


def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize(("page", "command"), SHOWN, ids=[f"{page}:{command[:60]}" for page, command in SHOWN])
def test_a_command_that_is_shown_is_accepted(page: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = words(command)
    if program == "torchrun" or arguments[:2] == ["-m", "ptsim"]:
        arguments = arguments[arguments.index("ptsim") + 1 :]
        program = "ptsim"
    if "…" in arguments or "..." in arguments:  # a synopsis: its options may stand with any command line
        assert program != "ptsim" or app[arguments[0]]
    elif program == "ptsim":
        parse_ptsim(arguments)
    elif program == "make":
        assert arguments[0] in targets()
    else:
        path = ROOT / arguments[0]
        assert path.is_file(), f"there is no {arguments[0]}"
        if path.parent.name in ("analysis", "examples"):
            parse_script(path, arguments[1:], monkeypatch)


@pytest.mark.parametrize(("page", "mention"), MENTIONED, ids=[f"{page}:{span}" for page, span in MENTIONED])
def test_an_option_that_a_sentence_names_exists(page: Path, mention: str) -> None:
    command = app
    for word in mention.split()[1:]:
        if not word.startswith("-") and word in set(command):
            command = command[word]
    known = {name for name in command if name.startswith("-")} | {"--help"}  # commands such as --install-completion
    if command is not app:
        known |= {name for argument in command.assemble_argument_collection() for name in argument.names}
    assert {word.split("=")[0] for word in mention.split() if word.startswith("--")} <= known


# What other people's scripts call: the commands with all options that they may rely on.
RELIED_ON = (
    "demo --out d",
    "train c.toml --model m --dataset digits --data-dir d --epochs 1 --batch 2 --lr 0.1 --penalty-ratio 0.2 "
    "--interval 1 --seed 0 --train-limit 9 --out d --set k=v --json",
    "train --resume d --json",
    "inspect m --input 3,224,224 --classes 10 --json",
    "cost m --input 3,224,224 --classes 10 --batch 8 --gpu g --convention paper --json",
    "cost m --convention exact",
    "calibrate gpu --out f.toml",
    "calibrate network --nccl-log f --out f.toml",
    "plan m --images 9 --epochs 1 --batch 1 --gpus 1 --pruning none -o t.jsonl --json",
    "import kineto a b -o p.toml --json",
    "allreduce --cluster c --gpus 8 --bytes 1048576 --json",
    "predict m --gpu g --batch 8 --precision fp32 --memory-format channels_last --cluster c --gpus 8 --json",
    "predict m --gpu g --batch 8 --precision tf32",
    "predict m --gpu g --batch 8 --precision amp",
    "simulate t --cluster c --gpus 1,8,64 --scaling weak --timeline f.json --json",
    "simulate t --cluster c --gpus 1 --scaling strong",
    "validate a b --json",
    "sweep s.toml --json",
    "report a b -o d --json",
    "export t --format chrome -o f",
    "export t --format chakra -o f",
    "export t --format parquet -o f",
    "export t --format onnx -o f",
    "devices --json",
    "clusters --json",
)


@pytest.mark.parametrize("line", RELIED_ON)
def test_a_command_that_others_script_against_is_accepted(line: str) -> None:
    parse_ptsim(shlex.split(line))


SPOKEN = {"precision": "fp32", "memory_format": "contiguous"}  # what stands for a value of that name


def texts(node: ast.AST) -> Iterator[str]:
    """The texts of an expression, with a word in the place of every value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(
            part.value if isinstance(part, ast.Constant) else SPOKEN.get(getattr(part.value, "attr", ""), "x")
            for part in node.values
        )
    else:
        for inner in ast.iter_child_nodes(node):
            yield from texts(inner)


def spoken_by_errors() -> Iterator[tuple[str, str]]:
    """The messages and hints of all errors, each with the place where it stands."""
    for path in [*sorted((ROOT / "ptsim").rglob("*.py")), *sorted((ROOT / "models").glob("*.py"))]:
        content = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(content)) if "Error(" in content else ():
            parts: list[ast.AST] = []
            if isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error"):
                parts = [*node.args, *(keyword.value for keyword in node.keywords)]
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "hint":
                parts = [node.value]
            yield from ((f"{path.relative_to(ROOT)}:{node.lineno}", text) for part in parts for text in texts(part))


@functools.cache
def options() -> frozenset[str]:
    """All options of all commands."""
    groups = ("calibrate", "import")
    commands = [app[name] for name in COMMANDS if name not in groups]
    commands += [app[name][inner] for name in groups for inner in app[name] if not inner.startswith("-")]
    return frozenset(
        name for command in commands for argument in command.assemble_argument_collection() for name in argument.names
    )


@pytest.mark.slow
def test_an_option_that_an_error_advises_exists_and_so_does_a_command() -> None:
    of_torchrun = {"--nproc-per-node", "--max-restarts"}
    found = list(spoken_by_errors())
    strange = {
        (place, option)
        for place, text in found
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)
        if option not in options() | of_torchrun
    }
    assert strange == set()
    commands = [command for _, text in found for command in re.findall(r"`ptsim ([^`]*)`", text)]
    assert len(commands) >= 4
    for command in commands:
        parse_ptsim(shlex.split(command))


def test_commands_are_found_in_every_kind_of_place() -> None:
    pages = {str(page) for page, _ in SHOWN}
    assert {"README.md", "docs/train.md", "docs/accuracy.md", "analysis/bench_simulator.py"} <= pages


def test_a_command_that_lacks_an_argument_is_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        parse_script(ROOT / "analysis" / "bench_simulator.py", ["--epochs", "182"], monkeypatch)
    with pytest.raises(Exception, match="requires an argument"):
        parse_ptsim(["predict", "--batch", "1"])
