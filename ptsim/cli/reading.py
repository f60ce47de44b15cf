"""What the text of an option means: numbers, counts of GPUs, sizes of messages, files and folders."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ptsim.errors import FileFormatError, UsageError
from ptsim.textfile import LARGEST, LARGEST_INTEGER, SMALLEST, parse_toml
from ptsim.units import parse_quantity

_NCCL_TESTS_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}  # what `all_reduce_perf -b 128M` means


def parse_gpus(text: str) -> list[int]:
    """The GPU counts of "1,8,64", each once.

    Raises:
        UsageError: not positive whole numbers between commas.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(is_count(part) for part in parts):
        raise UsageError(f"gpus {text!r} is not a list of positive whole numbers, for example 1,8,64")
    return list(dict.fromkeys(int(part) for part in parts))


def check_number(name: str, text: str, *, whole: bool) -> None:
    """Refuse a number that would be rounded, or that no quantity can have.

    Raises:
        UsageError: `text` is a number with a fraction where a whole one is meant, or one beyond all bounds.
    """
    try:
        value = float(text)
    except ValueError:
        if whole and re.match(r"\s*[-+]?0[xXoObB]", text):
            raise UsageError(f"{name} is {text}, expected a whole number in decimal digits") from None
        return  # no number: whoever reads it says so
    if whole and (not math.isfinite(value) or not text.strip().lstrip("+-").isdecimal()):
        raise UsageError(f"{name} is {text}, expected a whole number")
    digits = text.strip().lstrip("+-").lstrip("0")
    if whole and (len(digits) > len(str(LARGEST_INTEGER)) or int(digits or "0") > LARGEST_INTEGER):
        bound = f"at most {LARGEST_INTEGER}" if value > 0 else f"at least {-LARGEST_INTEGER}"
        shown = f"{value:.3g}" if abs(value) >= 1e20 else text.strip()
        raise UsageError(f"{name} is {shown}, expected {bound}")
    vanished = not value and re.match(r"[^eE]*[1-9]", text)  # 1e-400 is no zero
    if not whole and (value or vanished) and math.isfinite(value) and not SMALLEST <= abs(value) <= LARGEST:
        raise UsageError(f"{name} is {text}, expected 0 or a number between {SMALLEST:g} and {LARGEST:g}")


def read_settings(texts: Sequence[str], given: Mapping[str, Any], *, named: Collection[str] = ()) -> dict[str, Any]:
    """What --set and the options of their own say together; every setting can be given once.

    A value is read as TOML or JSON, and as plain text where it is neither. NAME.PART=value sets a part of a setting.
    Hyphens in names are underscores, as in the names of options.

    Args:
        texts: name=value, of every --set.
        given: setting → value that an option of its own gave; also NAME.PART.
        named: settings whose parts are names of things, which keep their hyphens.

    Raises:
        UsageError: a text that is not name=value, or a setting that is given twice.
    """
    settings: dict[str, Any] = {}
    seen: list[str] = []
    for name, value in (*given.items(), *(_setting(text, named) for text in texts)):
        whole, _, part = name.partition(".")
        if any(name == other or other in (whole, name) or other.startswith(f"{name}.") for other in seen):
            by = ", by --set and by an option of its own" if name in given or whole in given else ""
            raise UsageError(f"setting {name!r} is given twice{by}")
        seen.append(name)
        if part:
            settings.setdefault(whole, {})[part] = value
        else:
            settings[whole] = value
    return settings


def _setting(text: str, named: Collection[str]) -> tuple[str, Any]:
    """`name=value` as (name, value)."""
    name, equals, value = (piece.strip() for piece in text.partition("="))
    whole, dot, part = (piece.strip() for piece in name.partition("."))
    if not equals or not whole or bool(dot) != bool(part):
        raise UsageError(f"--set {text!r} is not name=value")
    whole = whole.replace("-", "_")
    name = f"{whole}{dot}{part if whole in named else part.replace('-', '_')}"
    try:
        document = parse_toml("--set", f"value = {value}".encode())
        if len(document) == 1:  # a line feed could begin another setting
            return name, document["value"]
    except (FileFormatError, UnicodeError):
        pass
    try:
        return name, msgspec.json.decode(value)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return name, value


def is_count(text: str) -> bool:
    """Whether the text is a positive whole number of at most 18 digits."""
    return text.strip().isdecimal() and len(text.strip()) <= 18 and int(text) > 0


def parse_bytes(name: str, text: str) -> int:
    """The bytes of "134217728", "128MiB", or "128M" (as nccl-tests writes it: binary).

    Raises:
        UsageError: not a whole, non-negative number of bytes.
    """
    number, last = text.strip()[:-1], text.strip()[-1:]
    if last.upper() in _NCCL_TESTS_UNITS:
        given = number + last.upper()
    else:
        given = f"{text} B" if last.isdecimal() or last == "." else text
    try:
        size = parse_quantity(given, "bytes", also=_NCCL_TESTS_UNITS)
    except ValueError as error:
        if given != text:  # whose unit nobody typed
            raise UsageError(f"{name} is {text!r}, expected bytes such as 1000000, 1_000_000 or 25MiB") from error
        raise UsageError(f"{name} {error}") from error
    if not 0 <= size < LARGEST_INTEGER or size != int(size):
        raise UsageError(f"{name} {text}: a message is a whole, non-negative number of bytes, below {2**63:,}")
    return int(size)


def check_output(out: Path, *inputs: Path) -> None:
    """Keep a command from writing over what it reads, and over a run that somebody has trained.

    Raises:
        UsageError: `out` is one of the inputs, or the trace of a run that is more than planned.
    """
    if not os.path.isfile(out):
        return
    from ptsim.trace.io import TRACE, read_records  # not for `ptsim --help`
    from ptsim.trace.schema import Run

    written = os.path.realpath(out)
    for path in inputs:
        if written in (os.path.realpath(path), os.path.realpath(path / TRACE)):
            raise UsageError(f"{out} is also an input; choose another file to write")
    with contextlib.suppress(FileFormatError):
        _, record = next(read_records(out))
        if isinstance(record, Run) and record.origin != "planned":
            raise UsageError(f"{out} is the trace of a run that was {record.origin}; choose another file to write")
