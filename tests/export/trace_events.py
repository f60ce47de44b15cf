"""A strict reader of Chrome/Kineto traces: what Perfetto drops or misdraws, and HolisticTraceAnalysis chokes on, fails.

Written from the Trace Event Format (Google, 2016), Perfetto's JSON importer (slices of one thread nest or follow each
other; a flow binds to the slice around it) and the columns that HolisticTraceAnalysis parses.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

Event = dict[str, Any]

KEYS = {
    "X": {"name", "cat", "ts", "dur", "pid", "tid", "args"},
    "M": {"name", "ts", "pid", "tid", "args"},
    "C": {"name", "ts", "pid", "args"},
    "s": {"name", "cat", "id", "pid", "tid", "ts"},
    "f": {"name", "cat", "id", "pid", "tid", "ts", "bp"},
}
METADATA = {"process_name": str, "thread_name": str, "process_sort_index": int, "thread_sort_index": int}


def check(document: dict[str, Any]) -> list[Event]:
    """The events, after every one of them has been looked at."""
    assert document["displayTimeUnit"] in ("ms", "ns")
    rank, size = document["distributedInfo"]["rank"], document["distributedInfo"]["world_size"]
    assert 0 <= rank < size
    events: list[Event] = document["traceEvents"]
    named: set[tuple[int, int]] = set()
    slices: defaultdict[tuple[int, int], list[tuple[int, int, str]]] = defaultdict(list)
    flows: defaultdict[int, dict[str, Event]] = defaultdict(dict)
    counters: dict[tuple[int, str], int] = {}
    for event in events:
        phase = event["ph"]
        assert event.keys() == KEYS[phase] | {"ph"}, event
        assert type(event["name"]) is str
        assert event["name"]
        assert all(type(event[key]) is int and event[key] >= 0 for key in ("pid", "tid", "id") if key in event), event
        assert all(_is_time(event[key]) for key in ("ts", "dur") if key in event), event
        thread = event["pid"], event.get("tid", 0)
        if phase == "M":
            (value,) = event["args"].values()
            assert type(value) is METADATA[event["name"]]
            if event["name"] == "thread_name":
                named.add(thread)
        elif phase == "X":
            begin = _ns(event["ts"])
            slices[thread].append((begin, begin + _ns(event["dur"]), event["name"]))
        elif phase == "C":
            assert event["args"]
            assert all(isinstance(value, int | float) and math.isfinite(value) for value in event["args"].values())
            key = event["pid"], event["name"]
            assert counters.get(key, 0) <= _ns(event["ts"]), f"{key} goes back in time"
            counters[key] = _ns(event["ts"])
        else:
            assert phase not in flows[event["id"]], "one start and one end"
            flows[event["id"]][phase] = event
    for thread, spans in slices.items():
        assert thread in named or thread[1] == 1, f"thread {thread} has no name"  # 1: the host's launches
        _check_nesting(spans)
    for ends in flows.values():
        start, end = ends["s"], ends["f"]
        assert end["bp"] == "e"
        assert (start["name"], start["cat"]) == (end["name"], end["cat"])
        assert start["ts"] <= end["ts"]
        for one in (start, end):
            at = _ns(one["ts"])
            assert any(begin <= at <= until for begin, until, _ in slices[one["pid"], one["tid"]]), "binds to no slice"
    _check_kernels([event for event in events if event["ph"] == "X"])
    return events


def _check_nesting(spans: list[tuple[int, int, str]]) -> None:
    open_until: list[tuple[int, str]] = []
    for begin, end, name in sorted(spans, key=lambda span: (span[0], -span[1])):
        while open_until and open_until[-1][0] <= begin:
            open_until.pop()
        assert not open_until or end <= open_until[-1][0], f"{name} and {open_until[-1][1]} overlap"
        open_until.append((end, name))


def _check_kernels(spans: list[Event]) -> None:
    launched: set[int] = set()
    for event in spans:
        if event["cat"] == "cuda_runtime":
            assert event["args"]["correlation"] not in launched
            launched.add(event["args"]["correlation"])
    for event in spans:
        if event["cat"] != "kernel":
            continue
        arguments = event["args"]
        assert (arguments["device"], arguments["stream"]) == (event["pid"], event["tid"])
        assert type(arguments["correlation"]) is int
        assert not launched or arguments["correlation"] in launched, f"{event['name']} was never launched"


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _ns(micros: float) -> int:
    return round(micros * 1e3)
