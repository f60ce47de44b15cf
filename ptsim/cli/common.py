"""What several subcommands share: JSON output, the console for tables and the parsing of shapes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from ptsim.errors import UsageError


def print_json(document: Any) -> None:
    """Print the document (builtins or msgspec structs) as one JSON document on stdout."""
    print(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())


def stdout_console(*, highlight: bool = True) -> Console:
    """The console for tables that people read; a file or a pipe, which has no width of its own, gets 120 columns."""
    console = Console(highlight=highlight)
    if not sys.stdout.isatty():
        console.width = max(console.width, 120)
    return console


def is_count(text: str) -> bool:
    """Whether the text is a positive whole number."""
    return text.strip().isdecimal() and int(text) > 0


def refuse_input_as_output(out: Path, *inputs: Path) -> None:
    """Keep a command from writing over what it reads.

    Raises:
        UsageError: `out` is one of the inputs.
    """
    for path in inputs:
        if out.resolve() in (path.resolve(), (path / "trace.jsonl").resolve()) and out.is_file():
            raise UsageError(f"{out} is what is read; choose another file to write")


def parse_input_shape(text: str) -> tuple[int, int, int]:
    """The image shape of "3,224,224".

    Raises:
        UsageError: not three positive whole numbers.
    """
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(is_count(part) for part in parts):
        raise UsageError(f"input {text!r} is not CHANNELS,HEIGHT,WIDTH, for example 3,224,224")
    channels, height, width = (int(part) for part in parts)
    return channels, height, width
