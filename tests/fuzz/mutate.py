"""Damaged inputs: one to three changes of a document, of its lines or of its bytes, from a seed."""

from __future__ import annotations

import json
import random
import re
import tomllib
from typing import Any

import tomli_w

NASTY: tuple[Any, ...] = (
    0, -1, 1, 2, 2**31, 2**53, 2**63, 10**30, 10**400, -0.0, 0.5, 1e-320, 1e-30, 1e18, 1e30, 1e308, -1e308,
    float("inf"), float("nan"), True, False, None,
    "", " ", "[/b]x", "[", "$x$", "$a_$b", "<script>", "=1+1", "\x1b[31m", "a\u202eb", "x\x00y", "\udcff", "a\nb",
    "../../etc/passwd", "/dev/zero", "0", "-1", "nan", "true", "[1, 2", "1e-320 B/s", "1e400 s", "-3 us", "nan GB/s",
    "5 parsec", "9" * 5000, "a" * 300, [], {}, [[[[]]]], {"a": {"b": 1}}, ["", ""], "sgdx", "conv",
)  # fmt: skip
PIECES = (b"", b"\x00", b"\xff\xfe", b"[" * 5000, b"{", b"}", b'"', b"1e400", b"9" * 5000, b"1e-320", b"-", b".", b"\n",
          b"nan", b"null", b"\xe2\x80\xae", b"e9", b" ")  # fmt: skip


def mutated(document: Any, draw: random.Random) -> Any:
    """A copy of the document of dictionaries, lists and values with one to three places changed.

    A third of the copies differ by their numbers alone: such files pass for whole ones for longest.
    """
    copy, numbers_alone = _copied(document), draw.random() < 0.33
    for _ in range(draw.randint(1, 3)):
        places = _places(copy)
        numbers = _numbers(places)
        if numbers_alone and numbers:
            of_one_name = numbers[draw.choice(sorted(numbers))]  # fields that are there once come as often as others
            place, key = draw.choice(of_one_name)
            place[key] = _another_number(place[key], draw)
        elif places:
            _change(*draw.choice(places), places, draw)
    return copy


def _numbers(places: list[tuple[Any, Any]]) -> dict[str, list[tuple[Any, Any]]]:
    """The places of numbers and of quantities by the name of their field."""
    found: dict[str, list[tuple[Any, Any]]] = {}
    for place, key in places:
        value = place[key]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number or (isinstance(value, str) and re.match(r"-?\d", value)):
            found.setdefault(key if isinstance(key, str) else "", []).append((place, key))
    return found


def _another_number(value: Any, draw: random.Random) -> Any:
    """A number of the same kind that the file should not have there, or might."""
    if isinstance(value, str):
        return _edited(value, draw)
    kind = type(value)
    if draw.random() < 0.3 and abs(value) < 1e300:
        other = value * draw.choice((-1, 0, 0.5, 2, 1000, 1e-6, 1e6, 1e12))
        return kind(other) if abs(other) < 1e300 else other
    return draw.choice([n for n in NASTY if isinstance(n, kind) and not isinstance(n, bool)])


def _change(place: Any, key: Any, places: list[tuple[Any, Any]], draw: random.Random) -> None:
    value = place[key]
    match draw.randrange(9):
        case 0 | 1 | 2:
            place[key] = draw.choice(NASTY)
        case 3:
            place.pop(key)
        case 4 if isinstance(value, int | float) and not isinstance(value, bool):
            place[key] = value * draw.choice((-1, 0, 0.5, 2, 1000, 1e12))
        case 4 if isinstance(value, str) and value:
            place[key] = _edited(value, draw)
        case 5:  # two fields that contradict each other: the value of one in the place of the other
            other, name = draw.choice(places)
            place[key], other[name] = _copied(other[name]), _copied(value)
        case 6 if isinstance(place, dict):
            place[draw.choice(("x", "", "$a", str(key) + "s", "[/b]", "a" * 300))] = place.pop(key)
        case 7 if isinstance(value, list) and value:
            place[key] = draw.choice((value[::-1], value[:-1], value * 2, draw.sample(value, len(value))))
        case _:
            place[key] = _nested(draw.choice((3, 40, 5000))) if draw.random() < 0.2 else [value, value]


def _edited(text: str, draw: random.Random) -> str:
    """A text with another unit, another number, or a letter more."""
    at = draw.randrange(len(text) + 1)
    number, blank, unit = text.partition(" ")
    return draw.choice(
        (f"{number} {draw.choice(('B', 'GB/s', 'Tbit/s', 'us', 's', 'GiB', 'W', '%', 'USD'))}",
         f"{draw.choice(('0', '-1', '1e30', '1e-30', 'nan', '1e3', '٣'))}{blank}{unit}",
         text[:at] + draw.choice(("[", "$", "\n", "\x00", "\u202e", "9", " ")) + text[at:],
         text[:at], text * 2, text.upper())
    )  # fmt: skip


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    """The bytes with one to three pieces overwritten, cut out, doubled, flipped or replaced by what breaks parsers."""
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(content) + 1)
        length = draw.choice((1, 1, 4, 40, 400))
        if draw.random() < 0.3 and at < len(content):
            content = content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]
            continue
        piece = draw.choice((*PIECES, content[at : at + length] * 2))
        content = content[:at] + piece + content[at + draw.choice((0, length)) :]
    return content


def mutated_lines(content: bytes, draw: random.Random) -> bytes:
    """The lines with one or two of them swapped, doubled, left out, or cut."""
    lines = content.splitlines(keepends=True)
    for _ in range(draw.randint(1, 2)):
        if not lines:
            break
        at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
        match draw.randrange(5):
            case 0:
                lines[at], lines[other] = lines[other], lines[at]
            case 1:
                lines.insert(other, lines[at])
            case 2:
                del lines[at]
            case 3:
                lines[at] = lines[at][: draw.randrange(len(lines[at]) + 1)]
            case _:
                lines = lines[: at + 1]
    return b"".join(lines)


def damaged(file: str, whole: bytes, draw: random.Random) -> bytes:
    """The content of a file of that name, damaged: half of the time as a document, else its lines or its bytes."""
    way = draw.random()
    if way < 0.15:
        return mutated_lines(whole, draw)
    if way < 0.4 or file.endswith(".txt"):
        return mutated_bytes(whole, draw)
    try:
        if file.endswith(".jsonl"):
            return _mutated_trace(whole, draw)
        if file.endswith(".json"):
            return json.dumps(mutated(json.loads(whole), draw)).encode()
        return tomli_w.dumps(mutated(tomllib.loads(whole.decode()), draw)).encode()
    except (TypeError, RecursionError, ValueError, OverflowError):  # what no writer can: null in TOML, a great depth
        return mutated_bytes(whole, draw)


def _mutated_trace(whole: bytes, draw: random.Random) -> bytes:
    """One record changed; ids of changed networks and totals of changed epochs follow, so that more is looked at."""
    import msgspec

    from ptsim.network import Network

    lines = whole.splitlines()
    at = draw.randrange(len(lines))
    record = json.loads(lines[at])
    changed = mutated(record, draw)
    lines[at] = json.dumps(changed).encode()
    if record["record"] == "epoch":
        _count_anew(lines)
    content = b"\n".join(lines) + b"\n"
    if isinstance(changed, dict) and record["record"] == "architecture" and "network" in changed:
        try:
            network = msgspec.convert(changed["network"], Network)
        except (msgspec.ValidationError, RecursionError):
            return content
        return content.replace(record["id"].encode(), network.id.encode())
    return content


def _count_anew(lines: list[bytes]) -> None:
    """The end record, if there is one, with the iterations that the epochs have."""
    records = [json.loads(line) for line in lines]
    counts = [r.get("num_iterations") for r in records if isinstance(r, dict) and r.get("record") == "epoch"]
    if isinstance(records[-1], dict) and records[-1].get("record") == "end" and all(type(c) is int for c in counts):
        lines[-1] = json.dumps(records[-1] | {"num_iterations": sum(counts)}).encode()


def _nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def _copied(value: Any) -> Any:
    """Its dicts and lists anew, however deep an earlier change has nested them."""
    whole = [value]
    waiting: list[tuple[Any, Any]] = [(whole, 0)]
    while waiting:
        holder, key = waiting.pop()
        part = holder[key]
        if isinstance(part, dict | list | tuple):
            holder[key] = copied = dict(part) if isinstance(part, dict) else list(part)
            waiting += [(copied, place) for place in (copied if isinstance(copied, dict) else range(len(copied)))]
    return whole[0]


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    open_values = [value]
    while open_values:
        part = open_values.pop()
        keys = list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ()
        found += [(part, key) for key in keys]
        open_values += [part[key] for key in keys]
    return found
