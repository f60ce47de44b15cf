"""What a file of `torch.profiler` says: its events, which operator runs inside which, and which kernels it launched.

The format is Chrome's trace JSON as PyTorch's Kineto library writes it; a bare list of the events, as tools that take
some of them out leave it, names neither device nor ranks. Times in the file are microseconds, until 2024
those since 1970; here they are seconds since the first event, because a float counts seconds since 1970 in steps of
0.24 µs. Only complete events ("ph": "X") count; one of a negative duration was cut off by the profiler and takes no
time. Operators nest by time on their own thread. A kernel belongs to the operator in which its thread called CUDA to
launch it: kernel and call have the same "correlation". Where no such call is recorded, the kernel's "External id" is
that of the operator; some versions of PyTorch write the correlation there too.

Source: github.com/pytorch/kineto, libkineto/src/output_json.cpp; torch/csrc/autograd/profiler_kineto.cpp.
"""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ptsim.errors import FileFormatError
from ptsim.textfile import decode_json, decode_text, read_bytes, unpacked

_MOST_BYTES = 2**31  # of a file, and of what it unpacks to: minutes of a GPU
_LATEST_US, _LONGEST_US = 1e16, 1e12  # of an event's begin (later a float tells no microseconds) and of its duration
_MOST_LEVELS = 500  # of operators inside each other
_MOST_RANKS = 10**6
Span = tuple[float, float]  # seconds: begin, end
# what is no JSON in the files of some versions
_CONTROL = re.compile(r"[\x00-\x1f]")
_ESCAPE = re.compile(r"\\([\"\\/bfnrt]|u[0-9a-fA-F]{4})?")
_NAME = re.compile(r'("cat": "[^"]*", "name": ")(.*?)(", "pid": )')
_QUOTE = re.compile(r'(?<!\\)"')
_NO_NUMBER = re.compile(r"(:\s*)-?(?:nan|inf)\b(?=\s*[,}\]])", re.IGNORECASE)

# PyTorch before 1.12 wrote the names on the left of the first five; the others are other vendors' calls.
_CATEGORIES = {
    "operator": "cpu_op",
    "kernel": "kernel",
    "memcpy": "gpu_memcpy",
    "memset": "gpu_memset",
    "runtime": "cuda_runtime",
    "hip_runtime": "cuda_runtime",
    "xpu_runtime": "cuda_runtime",
    "xpu_driver": "cuda_driver",
    "privateuse1_runtime": "cuda_runtime",
    "privateuse1_driver": "cuda_driver",
    "mtia_runtime": "cuda_runtime",
}
# PyTorch's own annotations: the same versions called them operators, too
_ANNOTATION = re.compile(r"(?:ProfilerStep|Optimizer\.\w+|enumerate\(DataLoader\))#")
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_ON_HOST = ("cpu_op", "user_annotation")
_CALLS = ("cuda_runtime", "cuda_driver")


class Event(msgspec.Struct, kw_only=True, eq=False):
    """One complete event.

    Attributes:
        category: "cpu_op", "user_annotation", "kernel", …
        thread: process and thread, or device and stream.
        arguments: what the file says of it besides; keys in lower case.
        parent: the operator or annotation around it on the same thread.
        children: those directly inside it.
        kernels: on the device, launched by this very event and not by one inside it; a call has those of no operator.
    """

    name: str
    category: str
    thread: tuple[str, str]
    begin_s: float
    end_s: float
    arguments: dict[str, Any]
    parent: Event | None = None
    children: list[Event] = []
    kernels: list[Event] = []

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.begin_s

    def number(self, key: str) -> int | None:
        """The whole number that the file says of it under `key`; None where it says none."""
        return _whole(self.arguments.get(key))

    @property
    def span(self) -> Span:
        """Begin and end."""
        return self.begin_s, self.end_s

    def walk(self) -> Iterable[Event]:
        """This event and all inside it."""
        waiting = [self]
        while waiting:
            event = waiting.pop()
            yield event
            waiting += reversed(event.children)

    def all_kernels(self) -> list[Event]:
        """What it and everything inside it launched."""
        return [kernel for event in self.walk() for kernel in event.kernels]

    @property
    def is_collective(self) -> bool:
        """Whether it is communication while it runs: a kernel of NCCL or RCCL, or gloo's or MPI's own work."""
        if self.category == "kernel":
            return "nccl" in self.name.lower() or "rccl" in self.name.lower()
        return self.category in _ON_HOST and self.name.startswith(("gloo:", "mpi:"))


class Recording(msgspec.Struct, kw_only=True, eq=False):
    """One file.

    Attributes:
        device: name of the GPU that its kernels ran on; None where the file does not say, or without kernels.
        memory_bytes: of that GPU.
        host_name: of the machine, where the file says.
        rank, world_size: None where the file does not say.
        host: events of operators and annotations in the order of their begin.
        device_events: kernels, copies and fills on the device, likewise.
        calls: of the CUDA runtime and driver, likewise.
        num_cut_off: events of a negative duration.
    """

    path: Path
    device: str | None
    memory_bytes: int | None
    host_name: str | None
    rank: int | None
    world_size: int | None
    host: list[Event]
    device_events: list[Event]
    calls: list[Event]
    num_cut_off: int

    @property
    def on_gpu(self) -> bool:
        """Whether kernels were recorded."""
        return bool(self.device_events)


class _Raw(msgspec.Struct):
    ph: str = ""
    name: str | int | float = ""
    cat: str | None = None
    ts: float | str = 0.0
    dur: float | str = 0.0
    pid: int | float | str = ""
    tid: int | float | str = ""
    args: Any = None


class _RawDevice(msgspec.Struct):
    id: int = 0
    name: str = ""
    totalGlobalMem: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0  # noqa: N815 - Kineto's own spelling


class _RawTeam(msgspec.Struct):
    rank: Annotated[int, msgspec.Meta(ge=0, lt=_MOST_RANKS)] | None = None
    world_size: Annotated[int, msgspec.Meta(ge=1, le=_MOST_RANKS)] | None = None


class _RawFile(msgspec.Struct):
    traceEvents: list[_Raw]  # noqa: N815 - Chrome's own spelling
    deviceProperties: list[_RawDevice] = []  # noqa: N815 - Kineto's own spelling
    distributedInfo: _RawTeam | None = None  # noqa: N815 - Kineto's own spelling
    host_name: str | None = None


_DECODER: msgspec.json.Decoder[_RawFile | list[_Raw]] = msgspec.json.Decoder(_RawFile | list[_Raw])


def read_recording(path: str | Path) -> Recording:
    """Read one file that `torch.profiler` wrote, gzip or not.

    Raises:
        FileFormatError: it cannot be read, is no Chrome trace JSON, holds no operator, or a number that none can be.
    """
    path = Path(path)
    raw = _decode(path)
    complete = [item for item in raw.traceEvents if item.ph == "X" and item.cat]
    times = [_times_us(path, item) for item in complete]
    origin_us = min((begin_us for begin_us, _ in times), default=0.0)
    pairs = zip(complete, times, strict=True)
    events = [_event(item, begin_us - origin_us, took_us) for item, (begin_us, took_us) in pairs]
    events.sort(key=lambda event: (event.begin_s, -event.end_s))
    host = [event for event in events if event.category in _ON_HOST]
    if not any(event.category == "cpu_op" for event in host):
        raise FileFormatError(
            path, "holds no operator; expected a file that torch.profiler wrote with ProfilerActivity.CPU"
        )
    device_events = [event for event in events if event.category in _ON_DEVICE]
    calls = [event for event in events if event.category in _CALLS]
    _nest(path, host)
    _launch(host, calls, device_events)
    gpu = _device_of(raw.deviceProperties, device_events)
    team = raw.distributedInfo or _RawTeam()
    if team.rank is not None and team.world_size is not None and team.rank >= team.world_size:
        raise FileFormatError(path, f"is of rank {team.rank} of {team.world_size} ranks, which count from 0")
    return Recording(
        path=path,
        device=gpu.name or None,
        memory_bytes=gpu.totalGlobalMem or None,
        host_name=raw.host_name,
        rank=team.rank,
        world_size=team.world_size,
        host=host,
        device_events=device_events,
        calls=calls,
        num_cut_off=sum(took_us < 0 for _, took_us in times),
    )


def within(events: Sequence[Event], window: Span) -> Sequence[Event]:
    """Those of the events, which are in the order of their begin, that begin in the window."""
    first = bisect.bisect_left(events, window[0], key=_begin)
    return events[first : bisect.bisect_left(events, window[1], lo=first, key=_begin)]


def _begin(event: Event) -> float:
    return event.begin_s


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time, as spans that do not touch each other, in order."""
    joined: list[Span] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def length(spans: Iterable[Span]) -> float:
    """Seconds that at least one of the spans covers."""
    return sum(end - begin for begin, end in union(spans))


def clip(spans: Iterable[Span], window: Span) -> list[Span]:
    """The parts of the spans that lie in the window."""
    cut = ((max(begin, window[0]), min(end, window[1])) for begin, end in spans)
    return [(begin, end) for begin, end in cut if begin < end]


def outside(spans: Sequence[Span], others: Sequence[Span]) -> float:
    """Seconds that some of `spans` and none of `others` cover."""
    return length([*spans, *others]) - length(others)


def _decode(path: Path) -> _RawFile:
    content = unpacked(path, read_bytes(path, most=_MOST_BYTES), most=_MOST_BYTES)
    if not content.strip():
        raise FileFormatError(path, "is empty, expected a file that torch.profiler wrote")
    try:
        found = _decoded(path, content)
    except FileFormatError as error:
        if b'"ph"' not in content or "truncated" in str(error.__cause__):  # the most frequent fault of large files
            raise
        try:
            found = _decoded(path, _mended(content))
        except FileFormatError:
            raise error from None
    return _RawFile(traceEvents=found) if isinstance(found, list) else found


def _decoded(path: Path, content: bytes | str) -> _RawFile | list[_Raw]:
    return decode_json(path, content, _DECODER, what="a profile of torch.profiler")


def _mended(content: bytes) -> str:
    """The document as JSON: Kineto copies names and numbers into it as they are.

    So there are paths of Windows with single backslashes, names with quotes, line ends or bytes of no character, and
    bandwidths of `inf`. Source: github.com/pytorch/kineto, issues 80, 105 and 336 and pull request 1459;
    github.com/pytorch/pytorch, issue 130622.
    """
    text = _CONTROL.sub(" ", decode_text(content))
    text = _ESCAPE.sub(lambda found: found[0] if found[1] else r"\\", text)
    text = _NAME.sub(lambda found: found[1] + _QUOTE.sub(r"\"", found[2]) + found[3], text)
    return _NO_NUMBER.sub(r"\1null", text)


def _times_us(path: Path, raw: _Raw) -> tuple[float, float]:
    """Begin and duration in microseconds, as the file has them."""
    try:
        begin_us, took_us = float(raw.ts), float(raw.dur)
        if not (abs(begin_us) <= _LATEST_US and took_us <= _LONGEST_US):
            raise ValueError
    except ValueError as error:
        raise FileFormatError(path, f"event {raw.name!r} has ts {raw.ts!r} and dur {raw.dur!r}, not times") from error
    return begin_us, took_us


def _event(raw: _Raw, begin_us: float, took_us: float) -> Event:
    category = str(raw.cat).lower()
    if category == "operator" and _ANNOTATION.match(str(raw.name)):
        category = "user_annotation"
    arguments = raw.args if isinstance(raw.args, dict) else {}
    begin_ns = round(begin_us * 1e3)  # whole, so that what begins where another one ends is not inside it
    return Event(
        name=str(raw.name),
        category=_CATEGORIES.get(category, category),
        thread=(str(raw.pid), str(raw.tid)),
        begin_s=begin_ns * 1e-9,
        end_s=(begin_ns + round(max(took_us, 0.0) * 1e3)) * 1e-9,
        arguments={str(key).lower(): value for key, value in arguments.items()},
        children=[],
        kernels=[],
    )


def _nest(path: Path, host: Iterable[Event]) -> None:
    """Put every event into the innermost one of its thread that is still running when it begins.

    Raises:
        FileFormatError: more of them run inside each other than in any program.
    """
    running: dict[tuple[str, str], list[Event]] = {}
    for event in host:
        stack = running.setdefault(event.thread, [])
        while stack and stack[-1].end_s <= event.begin_s:
            stack.pop()
        if stack:
            event.parent = stack[-1]
            stack[-1].children.append(event)
        if len(stack) == _MOST_LEVELS:
            raise FileFormatError(path, f"has more than {_MOST_LEVELS} operators that run inside each other")
        stack.append(event)


def _launch(host: Sequence[Event], calls: Sequence[Event], device_events: Iterable[Event]) -> None:
    """Give every device event to the operator that launched it, or to the call itself where none is around it."""
    launchers = _launchers(host, calls)
    operators: dict[int | None, Event] = {event.number("external id"): event for event in host}
    alone: dict[int | None, Event] = {call.number("correlation"): call for call in calls}
    for ids in launchers, operators, alone:
        ids.pop(None, None)
    for event in device_events:
        number = event.number("correlation")
        owner = launchers.get(number) or operators.get(event.number("external id")) or alone.get(number)
        if owner is not None:
            owner.kernels.append(event)


def _launchers(host: Iterable[Event], calls: Iterable[Event]) -> dict[int | None, Event]:
    """The innermost operator or annotation around each call of CUDA on its thread, by the call's correlation."""
    found: dict[int | None, Event] = {}
    running: dict[tuple[str, str], Event | None] = {}
    for event in sorted([*host, *calls], key=lambda event: (event.begin_s, event.category in _CALLS)):
        if event.category not in _CALLS:
            running[event.thread] = event
            continue
        around = running.get(event.thread)
        while around is not None and around.end_s <= event.begin_s:
            around = around.parent
        running[event.thread] = around
        if around is not None:
            found[event.number("correlation")] = around
    return found


def _device_of(devices: Sequence[_RawDevice], device_events: Sequence[Event]) -> _RawDevice:
    """The GPU that ran the most of the events."""
    if not device_events:
        return _RawDevice()
    ((most, _),) = Counter(event.number("device") for event in device_events).most_common(1)
    return next((device for device in devices if device.id == most), _RawDevice())


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
