"""The lines that a program printed, out of what containers, terminals and web pages wrap around them.

Docker and the collectors of logs keep one JSON object a line, or a list of them, with the line in one of its fields;
Kubernetes' runtimes put time, stream and a flag in front, which says whether the line goes on in the next; terminals
and web pages add colours and tags. What launchers put in front is left in: readers find their rows behind it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any

import msgspec

# Docker and Fluent Bit: log; Logstash, CloudWatch and journald: message; Google: textPayload; Splunk: _raw; Loki: line
_FIELDS = ("log", "message", "msg", "textpayload", "_raw", "line", "body", "content", "text")
_TIMES = ("timestamp", "time", "@timestamp", "ts", "date", "__realtime_timestamp")
_CRI = re.compile(r"^\s*\d{4}-\d\d-\d\dT\S+ (stdout|stderr) ([FP])(?: (.*))?$")
_ESCAPE = r"(?:\x1b|\^\[|\\x1b|\\e|\\033|#033|\\u001b)"
_TERMINAL = re.compile(
    rf"{_ESCAPE}\][^\x07\x1b\n]{{0,500}}(?:\x07|\x1b\\)?"  # titles and links
    rf"|{_ESCAPE}\[[0-?]*[ -/]*[@-~]"  # colours and movements
    r"|\[(?:\d{1,3};)*\d{1,3}m|\x1b[@-_=>()][0-9A-B]?"  # colours that lost their first character; others
)
_TAG = re.compile(r"</?(?:br|code|div|font|p|pre|span|td|tr)\b[^<>]*>|</?stdout rank[^<>]*>|</stdout>", re.IGNORECASE)
_END = " \t\"',;|`"  # of a quoted cell of a table, or of code
_MOST_LEVELS = 4  # of objects inside each other


def unwrapped(text: str) -> str:
    """The text without what was wrapped around its lines.

    A line keeps its number, but in a document of many lines and where an entry holds several.
    """
    entries = _document(text)
    if entries is not None:
        return _without_marks("\n".join(_joined(entries)))
    lines = text.splitlines()
    found = [_entry(line) for line in lines]
    if any(entry is not None for entry in found):
        pieces = [line + "\n" if entry is None else entry for line, entry in zip(lines, found, strict=True)]
        lines = "\n".join(_joined(pieces)).split("\n")
    return _without_marks("\n".join(_whole(lines)))


def _document(text: str) -> list[str] | None:
    """The entries of a JSON document that is a list of them, or holds one; None where it is none."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None
    lists = [value] if isinstance(value, list) else list(value.values())
    for records in lists:
        if not isinstance(records, list):
            continue
        found = [(_line_of(record), _time_of(record)) for record in records]
        lines = [line for line, _ in found if line is not None]
        if lines:
            newest_first = found[0][1] > found[-1][1]  # as Google's command line gives them
            return lines[::-1] if newest_first else lines
    return None


def _entry(line: str) -> str | None:
    """The line in a JSON object that is a line by itself."""
    line = line.strip()
    if not (line.startswith("{") and line.endswith("}")):
        return None
    try:
        return _line_of(msgspec.json.decode(line))
    except (msgspec.DecodeError, RecursionError):
        return None


def _line_of(record: Any, levels: int = _MOST_LEVELS) -> str | None:
    if not isinstance(record, dict):
        return None
    named = {name.lower(): value for name, value in record.items()}
    for field in _FIELDS:
        if isinstance(value := named.get(field), str):
            return value
    inner = (_line_of(value, levels - 1) for value in record.values() if levels)
    return next((line for line in inner if line is not None), None)


def _time_of(record: Any) -> str:
    named = {name.lower(): value for name, value in record.items()} if isinstance(record, dict) else {}
    return next((str(named[name]) for name in _TIMES if name in named), "")


def _joined(entries: list[str]) -> Iterator[str]:
    """Entries as lines: where they keep their newlines, one without goes on in the next, and leaves an empty line."""
    keep = any(entry.endswith("\n") for entry in entries)
    begun = ""
    for entry in entries:
        if keep and not entry.endswith("\n"):
            begun += entry
            yield ""
        else:
            yield begun + entry.removesuffix("\n").removesuffix("\r")
            begun = ""
    if begun:
        yield begun


def _whole(lines: list[str]) -> Iterator[str]:
    """Lines without what Kubernetes' runtimes put in front; pieces of one are put together in the place of its last."""
    begun = {"stdout": "", "stderr": ""}
    for line in lines:
        match = _CRI.match(line)
        if match is None:
            yield line
        elif match[2] == "P":
            begun[match[1]] += match[3] or ""
            yield ""
        else:
            yield begun[match[1]] + (match[3] or "")
            begun[match[1]] = ""
    yield from filter(None, begun.values())


def _without_marks(text: str) -> str:
    text = _TERMINAL.sub("", text)
    if "<" in text or "&" in text:
        text = html.unescape(_TAG.sub("", text))
    return "\n".join(line.rstrip(_END).removesuffix("\\n").rstrip() for line in text.splitlines())
