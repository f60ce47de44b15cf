"""Fill in what the pages of this folder quote from the command line: `python docs/make_help.py` rewrites them.

A quotation is everything between `<!-- quote: ptsim … -->` and `<!-- end -->`. Commands run in an empty folder, so
only help texts and refusals can be quoted.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

from ptsim.cli import main as command_line
from ptsim.textfile import write_whole

FOLDER = Path(__file__).parent
QUOTE = re.compile(r"(<!-- quote: (ptsim [^\n]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
WIDTH = "100"
command_line._PATIENCE_S = 3600.0  # no notice of slow work between the lines


def quote(command: str) -> str:
    """What `command` prints, help without its frame."""
    output = io.StringIO()
    before, columns = Path.cwd(), os.environ.get("COLUMNS")
    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)
        os.environ["COLUMNS"] = WIDTH
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                command_line.run(shlex.split(command)[1:])
        finally:
            os.chdir(before)
            if columns is None:
                del os.environ["COLUMNS"]
            else:
                os.environ["COLUMNS"] = columns
    lines = (line.strip("│").rstrip() for line in output.getvalue().splitlines())
    return "\n".join(re.sub(r"^[╭╰]─* ?(.*?) ?─*[╮╯]$", r"\1", line) for line in lines).strip()


def filled(page: str) -> str:
    """The page with every quotation made anew."""

    def fill(match: re.Match[str]) -> str:
        command = match.group(2)
        shown = "" if command.endswith("--help") else f"$ {command}\n"
        return f"{match.group(1)}```text\n{shown}{quote(command)}\n```\n{match.group(3)}"

    return QUOTE.sub(fill, page)


def main() -> int:
    """Rewrite every page that has changed."""
    for path in sorted(FOLDER.glob("*.md")):
        page = path.read_text(encoding="utf-8")
        new = filled(page)
        if new != page:
            write_whole(path, new)
            print(path.name)  # noqa: T201 - which pages changed
    return 0


if __name__ == "__main__":
    sys.exit(main())
