"""What several subcommands share: what goes to stdout and stderr, JSON output and the parsing of options."""

from __future__ import annotations

import math
import sys
import unicodedata
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from ptsim.errors import UsageError
from ptsim.textfile import LARGEST, LARGEST_INTEGER, SMALLEST
from ptsim.units import parse_quantity

_NCCL_TESTS_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}  # what `all_reduce_perf -b 128M` means


def printable(text: str) -> str:
    """The text; what would steer a terminal or turn the direction of writing is written as an escape."""
    if text.isprintable():  # false of line feeds, surrogates and formatting characters, too
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else c.encode("unicode_escape").decode()
        for c in text
    )


class PlainConsole(Console):
    """A console for text from files and users: nothing in it is markup, an emoji's name or a terminal sequence."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Every text that is printed comes through here, that of a table's cells too."""
        return super().render_str(printable(text), **settings)


def stdout_console(*, highlight: bool = True) -> Console:
    """The console for tables that people read; a file or a pipe, which has no width of its own, gets 120 columns."""
    console = PlainConsole(highlight=highlight)
    if not sys.stdout.isatty():
        console.width = max(console.width, 120)
    return console


def progress_console() -> Console:
    """Where progress and messages go: stderr."""
    return PlainConsole(stderr=True, highlight=False)


def say(text: str) -> None:
    """Print a line on stderr."""
    print(printable(text), file=sys.stderr)


def print_line(text: object) -> None:
    """Print a line of data on stdout."""
    print(printable(str(text)))


def print_json(document: Any) -> None:
    """Print the document (builtins or msgspec structs) as one JSON document on stdout."""
    print(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())


def check_number(name: str, text: str, *, whole: bool) -> None:
    """Refuse a number that would be rounded, or that no quantity can have.

    Raises:
        UsageError: `text` is a number with a fraction where a whole one is meant, or one beyond all bounds.
    """
    try:
        value = float(text)
    except ValueError:
        return  # no number in decimal digits: whoever reads it says so
    if whole and (not math.isfinite(value) or not text.strip().lstrip("+-").isdecimal()):
        raise UsageError(f"{name} is {text}, expected a whole number")
    if whole and abs(value) > LARGEST_INTEGER:
        raise UsageError(f"{name} is {value:.3g}, expected at most {LARGEST_INTEGER}")
    if not whole and value and math.isfinite(value) and not SMALLEST <= abs(value) <= LARGEST:
        raise UsageError(f"{name} is {text}, expected 0 or a number between {SMALLEST:g} and {LARGEST:g}")


def is_count(text: str) -> bool:
    """Whether the text is a positive whole number of at most 18 digits."""
    return text.strip().isdecimal() and len(text.strip()) <= 18 and int(text) > 0


def parse_bytes(name: str, text: str) -> int:
    """The bytes of "134217728", "128MiB", or "128M" (as nccl-tests writes it: binary).

    Raises:
        UsageError: not a whole, non-negative number of bytes.
    """
    number, unit = text.strip()[:-1], text.strip()[-1:].upper()
    try:
        if unit in _NCCL_TESTS_UNITS:
            size = parse_quantity(f"{number} B", "bytes") * _NCCL_TESTS_UNITS[unit]
        else:
            size = parse_quantity(f"{text} B" if unit.isdecimal() or unit == "." else text, "bytes")
    except ValueError as error:
        raise UsageError(f"{name} {error}") from error
    if not 0 <= size <= LARGEST_INTEGER or size != int(size):
        raise UsageError(f"{name} {text}: a message is a whole, non-negative number of bytes")
    return int(size)


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
