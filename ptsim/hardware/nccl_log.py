"""What an nccl-tests log says: message sizes, times, how many GPUs on how many nodes; old and new text, and JSON.

A log may hold other collectives, launcher noise and rank prefixes ("[1,0]<stdout>:", "0: "); the all-reduces are taken.
What cannot be trusted is refused: output that stops in the middle, output of several ranks mixed, wrong results.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import msgspec

from ptsim.errors import FileFormatError

_PREFIX = re.compile(
    r"^(?:\x1b\[[0-9;]*m)*\s*(?:\[\d+,\d+\]<std(?:out|err)>:\s?|\[[\w.:-]+\]:?\s+(?=[#\d])|\d+:\s+(?=[#\d])"
    r"|[\w.-]*[A-Za-z][\w.-]*:\s+(?=[#\d]))"
)
_RANK = re.compile(r"#\s+Rank\s+(\d+)\s+(?:Group\s+\d+\s+)?Pid\s+\d+\s+on\s+(\S+)\s+device\s+\d+\s+\[[^\]]*\]\s+(.*\S)")
_HEADER = re.compile(r"#\s*nThread\s+(\d+)\s+nGpus\s+(\d+)\s+minBytes\s+(\d+)\s+maxBytes\s+(\d+)")
_TEST = re.compile(r"#\s*Collective test (starting|concluded):\s*(\S+)")
_TRAILER = re.compile(r"#\s*(?:Out of bounds values|Avg bus bandwidth)\s*:\s*(\S+)")
_ROW = re.compile(r"\s*(\d+)\s+(\d+)\s+([a-z][a-z0-9_]*)\s+(.*\S)")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_REDUCTIONS = ("sum", "prod", "max", "min", "avg", "mulsum", "all")


class NcclMeasurement(msgspec.Struct, frozen=True, kw_only=True):
    """One message size; a time that the log does not give is None."""

    size_bytes: int
    out_of_place_s: float | None
    in_place_s: float | None

    @property
    def seconds(self) -> float:
        """The geometric mean of what was measured: the two differ by noise alone."""
        times = [time for time in (self.out_of_place_s, self.in_place_s) if time is not None]
        return math.exp(sum(map(math.log, times)) / len(times))


class NcclLog(msgspec.Struct, frozen=True, kw_only=True):
    """The all-reduces of one nccl-tests run, by rising size."""

    path: str
    num_gpus: int
    num_nodes: int
    gpus: tuple[str, ...]
    version: str | None
    measurements: tuple[NcclMeasurement, ...]

    @property
    def relative_jitter(self) -> float:
        """Standard deviation of one time over its mean, from the pairs of out-of-place and in-place times.

        The median absolute log ratio of a pair of normal deviates is 0.954 σ; a run without pairs says nothing (0).
        """
        ratios = sorted(
            abs(math.log(m.out_of_place_s / m.in_place_s))
            for m in self.measurements
            if m.out_of_place_s is not None and m.in_place_s is not None
        )
        return ratios[len(ratios) // 2] / 0.954 if ratios else 0.0


def read_nccl_log(path: str | Path) -> NcclLog:
    """The all-reduces in the nccl-tests log at `path`.

    Raises:
        FileFormatError: not an nccl-tests log, another collective, truncated, mixed output of several ranks, wrong
            results, a single GPU, or no measurement; says file and line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileFormatError(path, "is not a file that can be read") from error
    if not text.strip():
        raise FileFormatError(path, "is empty, expected the output of nccl-tests' all_reduce_perf")
    if text.lstrip()[0] == "{":
        return _read_json(path, text)
    return _read_text(path, text)


class _Section:
    """One test of a text log, from its header to its trailer."""

    def __init__(self, line: int, name: str | None) -> None:
        self.line, self.name = line, name
        self.ranks: dict[int, tuple[str, str]] = {}
        self.rows: list[_Row] = []
        self.header: re.Match[str] | None = None
        self.ended = False
        self.last_line = line


class _Row(msgspec.Struct, frozen=True):
    line: int
    size: int
    redop: str
    root: int | None
    times: tuple[tuple[float, float, float], ...]  # (µs, algbw, busbw) out of place, in place
    wrong: int


def _read_text(path: Path, text: str) -> NcclLog:
    sections = _sections(path, text)
    if not any(section.rows for section in sections):
        expected = "rows of nccl-tests' all_reduce_perf ('size count type redop … time algbw busbw')"
        raise FileFormatError(path, f"no measurement found, expected {expected}")
    wanted: list[tuple[_Section, str]] = []
    others: list[tuple[_Section, str]] = []
    for section in sections:
        if section.rows:
            name = section.name or _collective(section)
            (wanted if "all_reduce" in name else others).append((section, name))
    if not wanted:
        section, name = others[0]
        raise FileFormatError(path, f"holds {name}, expected all_reduce_perf", line=section.rows[0].line)
    if len(wanted) > 1:
        raise FileFormatError(
            path,
            f"holds {len(wanted)} all-reduce runs, the second from here on; expected one",
            line=wanted[1][0].line,
            hint="split the file, one run each",
        )
    section = wanted[0][0]
    _check_section(path, section)
    rows = section.rows
    num_gpus, hosts = _ranks(path, section)
    version = re.search(r"nccl-library=(\d+)|NCCL version (\S+)", text)
    return NcclLog(
        path=str(path),
        num_gpus=num_gpus,
        num_nodes=hosts,
        gpus=tuple(sorted({gpu for _, gpu in section.ranks.values()})),
        version=next((found for found in version.groups() if found), None) if version else None,
        measurements=tuple(_measurement(row) for row in rows if row.size > 0),
    )


def _sections(path: Path, text: str) -> list[_Section]:
    sections = [_Section(1, None)]
    name: str | None = None
    for number, raw in enumerate(text.splitlines(), start=1):
        line = _PREFIX.sub("", raw, count=1)
        current = sections[-1]
        if test := _TEST.search(line):
            name = test[2] if test[1] == "starting" else None
            if name and (current.rows or current.ranks):
                sections.append(_Section(number, name))
            else:
                current.name = name or current.name
        elif header := _HEADER.search(line):
            if current.header is not None and not current.ended:
                raise FileFormatError(
                    path,
                    "a second test starts before the first has ended: the output of several ranks is mixed",
                    line=number,
                    hint="build nccl-tests with MPI=1, so that only rank 0 prints, or keep one rank's output",
                )
            if current.ended or current.rows:
                sections.append(_Section(number, name))
                current = sections[-1]
            current.header = header
        elif rank := _RANK.search(line):
            current.ranks[int(rank[1])] = (rank[2], rank[3])
        elif trailer := _TRAILER.search(line):
            current.ended = True
            if "bounds" in line and trailer[1] != "0":
                raise FileFormatError(path, f"{trailer[1]} results were out of bounds: the run is wrong", line=number)
        elif not line.lstrip().startswith("#") and (row := _row(path, number, line)):
            if current.ended and current.rows:
                sections.append(_Section(number, name))
                current = sections[-1]
            current.rows.append(row)
        if line.strip():
            current.last_line = number
    return sections


def _row(path: Path, number: int, line: str) -> _Row | None:
    match = _ROW.fullmatch(line)
    if match is None:
        return None
    words = match[4].split()
    redop = words.pop(0) if words and not _NUMBER.fullmatch(words[0]) else "none"
    values: list[float | None] = []
    for word in words:
        if word == "N/A":
            values.append(None)
        elif _NUMBER.fullmatch(word):
            values.append(float(word))
        else:
            break  # a time stamp ends the row
    root = None
    if values and (len(values) in (5, 9) or words[0] == "-1"):
        root = int(float(values.pop(0) or 0))
    if len(values) not in (3, 4, 8):
        raise FileFormatError(
            path,
            f"row of {match[1]} bytes is incomplete, expected time, algbw, busbw and errors once or twice: "
            "the log is truncated or several outputs are mixed",
            line=number,
        )
    times, wrong = [], 0
    for i in range(0, len(values), 4):
        group = values[i : i + 4]
        if any(value is None for value in group[:3]):
            raise FileFormatError(path, f"row of {match[1]} bytes has no time", line=number)
        times.append((group[0], group[1], group[2]))
        if len(group) == 4 and group[3] is not None and root is not None:
            wrong += int(group[3])  # the old format's last column is a rounding error, not a count
    return _Row(number, int(match[1]), redop, root, tuple(times), wrong)  # type: ignore[arg-type] # as many times as a row has


def _collective(section: _Section) -> str:
    """The collective of a log that does not name it, by its reduction, root and busbw/algbw."""
    row = max(section.rows, key=lambda row: row.size)
    if row.redop not in _REDUCTIONS and not row.redop.startswith("mul"):
        return "a collective without reduction (broadcast, all_gather or all_to_all)"
    if row.root is not None and row.root >= 0:
        return "reduce_perf"
    _, algbw, busbw = row.times[0]
    num = len(section.ranks)
    if num > 2 and algbw > 1 and abs(busbw / algbw / ((num - 1) / num) - 1) < 0.02:
        return "reduce_scatter_perf"
    return "all_reduce_perf"


def _check_section(path: Path, section: _Section) -> None:
    rows = section.rows
    for before, row in itertools.pairwise(rows):
        if row.size <= before.size:
            raise FileFormatError(
                path,
                f"{row.size} bytes follow {before.size} bytes: the output of several ranks or runs is mixed",
                line=row.line,
                hint="keep rank 0's output of one run",
            )
    for row in rows:
        if row.wrong:
            raise FileFormatError(path, f"{row.wrong} wrong results at {row.size} bytes", line=row.line)
        if any(time <= 0 for time, _, _ in row.times):
            raise FileFormatError(path, f"time of {row.size} bytes is not positive", line=row.line)
    if not section.ended:
        most = f" of {section.header[4]}" if section.header else ""
        raise FileFormatError(
            path,
            f"the log ends after {rows[-1].size}{most} bytes without '# Out of bounds values': it is truncated",
            line=section.last_line,
        )


def _ranks(path: Path, section: _Section) -> tuple[int, int]:
    """(GPUs, nodes) of the run; without a device list the count follows from busbw / algbw = 2(n-1)/n."""
    row = max(section.rows, key=lambda row: row.times[0][1])
    _, algbw, busbw = row.times[0]
    implied = _implied_ranks(algbw, busbw)
    listed = len(section.ranks)
    if listed == 1 or (implied == 1 and not listed):
        raise FileFormatError(
            path,
            "is the run of a single GPU, in which nothing is reduced",
            line=section.line,
            hint="with one process per GPU, nccl-tests must be built with MPI=1",
        )
    if listed and max(section.ranks) + 1 != listed:
        raise FileFormatError(
            path, f"lists {listed} ranks but numbers them up to {max(section.ranks)}", line=section.line
        )
    if listed and implied and abs(2 * (listed - 1) / listed - busbw / algbw) > 0.03:
        raise FileFormatError(
            path,
            f"lists {listed} ranks, but its bus bandwidth is {busbw / algbw:.3g} times the algorithm bandwidth, "
            f"which {implied} ranks would give",
            line=row.line,
        )
    num = listed or implied
    if num is None:
        raise FileFormatError(path, "has no device list ('# Rank 0 …'), so the number of GPUs is unknown", line=1)
    return num, len({host for host, _ in section.ranks.values()}) or 1


def _implied_ranks(algbw: float, busbw: float) -> int | None:
    """The n of busbw / algbw = 2(n-1)/n; None where two printed digits do not decide."""
    if algbw < 1:
        return None
    ratio = busbw / algbw
    return round(2 / (2 - ratio)) if ratio < 1.97 else None


def _measurement(row: _Row) -> NcclMeasurement:
    seconds = [time * 1e-6 for time, _, _ in row.times]
    return NcclMeasurement(
        size_bytes=row.size, out_of_place_s=seconds[0], in_place_s=seconds[1] if len(seconds) > 1 else None
    )


class _JsonTimes(msgspec.Struct):
    time: float | None = None
    cpu_time: float | None = None
    alg_bw: float = 0.0
    bus_bw: float = 0.0
    nwrong: float | str | None = None  # null or "N/A" where nothing was checked


class _JsonResult(msgspec.Struct):
    size: int
    redop: str = "sum"
    root: int | str = -1
    out_of_place: _JsonTimes | None = None
    in_place: _JsonTimes | None = None


class _JsonDevice(msgspec.Struct):
    rank: int | None = None
    hostname: str = "?"
    device_info: str = "?"


class _JsonConfig(msgspec.Struct):
    nthreads: int = 1
    ngpus: int = 1
    devices: list[_JsonDevice] = []


class _JsonBounds(msgspec.Struct):
    count: int | None = None
    okay: bool | str = True  # "unchecked"


class _JsonRun(msgspec.Struct):
    """What `all_reduce_perf -J FILE` writes, as far as it is read here."""

    args: list[str] = []
    nccl_version: int | str | None = None
    config: _JsonConfig | None = None
    devices: list[_JsonDevice] = []
    results: list[_JsonResult] = []
    out_of_bounds: _JsonBounds | None = None


def _read_json(path: Path, text: str) -> NcclLog:
    """The JSON that `all_reduce_perf -J FILE` writes (nccl-tests 2.17 and newer)."""
    try:
        run = msgspec.convert(json.loads(text), _JsonRun)
    except json.JSONDecodeError as error:
        raise FileFormatError(path, f"is JSON that stops or breaks: {error.msg}", line=error.lineno) from error
    except msgspec.ValidationError as error:
        raise FileFormatError(path, f"is not the JSON output of nccl-tests: {error}") from error
    if not run.results:
        raise FileFormatError(path, "has no 'results', expected the JSON output of nccl-tests' all_reduce_perf")
    program = Path(run.args[0]).name if run.args else ""
    if "_perf" in program and "all_reduce" not in program:
        raise FileFormatError(path, f"holds {program}, expected all_reduce_perf")
    if run.out_of_bounds is None:
        raise FileFormatError(path, "has no 'out_of_bounds': the run did not end")
    if not run.out_of_bounds.okay or run.out_of_bounds.count:
        raise FileFormatError(path, f"{run.out_of_bounds.count} results were out of bounds")
    config = run.config or _JsonConfig()
    section = _Section(1, "all_reduce_perf" if program else None)
    section.ended = True
    for i, device in enumerate(config.devices or run.devices):
        section.ranks[i if device.rank is None else device.rank] = (device.hostname, device.device_info)
    section.rows = [_json_row(path, i, result) for i, result in enumerate(run.results)]
    if section.name is None and "all_reduce" not in (name := _collective(section)):
        raise FileFormatError(path, f"holds {name}, expected all_reduce_perf")
    _check_section(path, section)
    threads = config.nthreads * config.ngpus
    if len(section.ranks) == 1 and threads > 1:  # without MPI the JSON names only the first device
        (only,) = section.ranks.values()
        section.ranks = dict.fromkeys(range(threads), only)
    num_gpus, nodes = _ranks(path, section)
    return NcclLog(
        path=str(path),
        num_gpus=num_gpus,
        num_nodes=nodes,
        gpus=tuple(sorted({gpu for _, gpu in section.ranks.values()})),
        version=None if run.nccl_version is None else str(run.nccl_version),
        measurements=tuple(_measurement(row) for row in section.rows if row.size > 0),
    )


def _json_row(path: Path, index: int, result: _JsonResult) -> _Row:
    where = f"results[{index}]"
    times, wrong = [], 0
    for key, body in (("out_of_place", result.out_of_place), ("in_place", result.in_place)):
        if body is None:
            continue
        if body.time is None:
            found = "no 'time'" if body.cpu_time is None else "CPU time"
            raise FileFormatError(path, f"{where}.{key} has {found}, expected the time of the collective")
        times.append((body.time, body.alg_bw, body.bus_bw))
        wrong += int(body.nwrong or 0) if not isinstance(body.nwrong, str) else 0
    if not times:
        raise FileFormatError(path, f"{where} has neither an out-of-place nor an in-place time")
    try:
        root = int(result.root)
    except ValueError as error:
        raise FileFormatError(path, f"{where}.root is {result.root!r}, expected a rank") from error
    return _Row(index + 1, result.size, result.redop, root, tuple(times), wrong)
