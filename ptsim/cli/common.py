"""How subcommands show what they have found: what goes to stdout and stderr, tables and JSON."""

from __future__ import annotations

import contextlib
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from ptsim.textfile import ACTING


def escaped(text: str) -> str:
    """The text; what would steer a terminal or turn the direction of writing is written as an escape."""
    if text.isprintable():  # false of line feeds, surrogates and formatting characters, too
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ACTING else c.encode("unicode_escape").decode() for c in text
    )


class PipedConsole(Console):
    """A console that says when its reader has left; rich itself would end the program with status 1."""

    def on_broken_pipe(self) -> None:
        """Let whoever has called decide."""
        raise BrokenPipeError


class PlainConsole(PipedConsole):
    """A console for text from files and users: nothing in it is markup, an emoji's name or a terminal sequence."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Every text that is printed comes through here, that of a table's cells too."""
        return super().render_str(escaped(text), **settings)


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
    """Print a line on stderr, if anybody can take it."""
    with contextlib.suppress(OSError):
        print(escaped(text), file=sys.stderr)


@contextlib.contextmanager
def users_code() -> Iterator[None]:
    """Inside, what the code of a user's network prints goes to stderr: stdout is for the command's data."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def mfu_cell(fraction: float | None) -> str:
    """Model FLOPs utilisation in a table: "43.2%", or a dash where it is not known."""
    return "–" if fraction is None else f"{fraction:.1%}"


def print_line(text: object) -> None:
    """Print a line of data on stdout."""
    print(escaped(str(text)))


def print_json(document: Any) -> None:
    """Print the document (builtins or msgspec structs) as one JSON document on stdout."""
    print(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())
