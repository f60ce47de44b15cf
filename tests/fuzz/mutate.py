"""Damaged inputs: one to three changes of a document or of its bytes, from a seed."""

from __future__ import annotations

import random
from typing import Any

NASTY: tuple[Any, ...] = (
    0, -1, 1, 2**31, 2**63, 10**30, 10**400, -0.0, 0.5, 1e-320, 1e308, -1e308, float("inf"), float("nan"),
    True, False, None,
    "", " ", "[/b]x", "[", "$x$", "<script>", "=1+1", "\x1b[31m", "a\u202eb", "x\x00y", "../../etc/passwd", "/dev/zero",
    "1e-320 B/s", "1e400 s", "-3 us", "nan GB/s", "9" * 5000, "a" * 300, [], {}, [[[[]]]], {"a": {"b": 1}},
    "sgdx", "conv",
)  # fmt: skip


def mutated(document: Any, draw: random.Random) -> Any:
    """A copy of the document of dictionaries, lists and values with one to three places changed."""
    copy = _copied(document)
    for _ in range(draw.randint(1, 3)):
        place, key = draw.choice(_places(copy))
        match draw.randrange(6):
            case 0 | 1 | 2:
                place[key] = draw.choice(NASTY)
            case 3:
                place.pop(key)
            case 4 if isinstance(place[key], int | float) and not isinstance(place[key], bool):
                place[key] = place[key] * draw.choice((-1, 0, 0.5, 2, 1000, 1e12))
            case _:
                place[key] = _nested(draw.choice((3, 40, 5000))) if draw.random() < 0.2 else [place[key], place[key]]
        if not _places(copy):
            break
    return copy


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    """The bytes with one to three pieces overwritten, cut out, doubled or replaced by what breaks parsers."""
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(content) + 1)
        length = draw.choice((1, 1, 4, 40, 400))
        piece = draw.choice(
            (b"", b"\x00", b"\xff\xfe", b"[" * 5000, b"{", b'"', b"1e400", b"9" * 5000, b"1e-320", b"-", b"\n", b"nan",
             content[at : at + length] * 2)
        )  # fmt: skip
        content = content[:at] + piece + content[at + draw.choice((0, length)) :]
    return content


def _nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return [_copied(part) for part in value] if isinstance(value, list | tuple) else value


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    open_values = [value]
    while open_values:
        part = open_values.pop()
        keys = list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ()
        found += [(part, key) for key in keys]
        open_values += [part[key] for key in keys]
    return found
