"""What happens to an error that nobody expected: it is kept in a file, and the user learns where that is."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import ptsim

EXIT_STATUS = 70  # EX_SOFTWARE of sysexits.h: a fault of the program, not of its input


def keep(error: BaseException, tokens: Sequence[str]) -> Path | None:
    """Write what a developer needs into a new file; None where no file can be written, or memory is short.

    The file holds versions, the command line and the traceback, and nothing of the files that were read.
    """
    torch = sys.modules.get("torch")
    try:
        lines = [
            f"ptsim {ptsim.__version__}, Python {platform.python_version()}, {platform.platform()}",
            f"torch {getattr(torch, '__version__', 'not imported')}",
            f"command: ptsim {shlex.join(tokens)}",
            "",
            *traceback.format_exception(error, limit=-60),
        ]
        handle, name = tempfile.mkstemp(prefix="ptsim-crash-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(lines))
    except (OSError, MemoryError):
        return None
    return Path(name)
