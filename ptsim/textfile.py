"""How text files are read and written: TOML, JSON Lines that may be torn, and files written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from ptsim.errors import FileFormatError


def read_toml(path: str | Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        FileFormatError: the file cannot be read, or is not TOML.
    """
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileFormatError(path, f"cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(path, f"is not TOML: {error}") from error


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all: readers see the old content or the new one, never a part.

    A link is followed, so that it still points to the file afterwards. Text is UTF-8.

    Raises:
        OSError: the folder cannot be written or the disk is full; the old file is untouched.
    """
    target = Path(os.path.realpath(path))
    data = content.encode() if isinstance(content, str) else content
    handle, beside = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), _permissions(target))
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def split_lines(content: bytes) -> tuple[list[bytes], bytes]:
    """The whole lines of a JSON Lines file, and the line that was being written when its writer died (often empty)."""
    *lines, torn = content.split(b"\n")
    return lines, torn


def drop_torn_line(path: Path) -> None:
    """Cut from the file what follows its last newline: a line that a crash left incomplete."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _permissions(target: Path) -> int:
    """Those of the file that is replaced, else those that a new file gets."""
    with contextlib.suppress(OSError):
        return target.stat().st_mode & 0o7777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
