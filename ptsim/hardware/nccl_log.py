"""What an nccl-tests log says: message sizes, times, how many GPUs on how many nodes; old and new text, and JSON.

A log may hold several runs, other collectives, launcher noise, colours and prefixes ("[1,0]<stdout>:", "0: ", time
stamps), rows that NCCL's messages cut in two, and the marks that a web page adds or takes away; the all-reduces are
taken. Of several data types or reductions the float sum counts; run cycles (`-N`) are runs. What cannot be trusted is
refused: output that stops in the middle, output of several ranks mixed, wrong results.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ptsim.errors import FileFormatError
from ptsim.textfile import decode_json, read_bytes

_MOST_BYTES = 64 * 2**20
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# "[1,0]<stdout>:" of Open MPI, "[0]" of Hydra: once for each piece that the process wrote, also in the middle of a row
_LAUNCHER = re.compile(r"\[[^\[\]\s]{0,80}\d,\d{1,9}\]<std(?:out|err)>:?|\[\d{1,9}\]")
_RANK = re.compile(
    r"\bRank\s+(\d{1,6})\s+(?:Group\s+(\d+)\s+)?(?:Pid\s+\d+\s+)?on\s+(\S+)\s+device\s+\d+\s+\[[^\]]*\]\s+(.*\S)"
)
_HEADER = re.compile(
    r"\bnThread\s+(\d{1,6})\s+nGpus\s+(\d{1,6})\s+minBytes\s+(\d{1,18})\s+maxBytes\s+(\d{1,18})"
    r"(?:\s+step:\s*(\d{1,18})\((factor|bytes)\))?"
)
_PROGRAM = re.compile(r"\b([a-z_]+_perf)\b")  # "The test is sendrecv_perf", or the command that was typed
_DEVICES = re.compile(r"\bUsing devices\b")
_TEST = re.compile(r"\bCollective test (starting|concluded):\s*(\S+)")
_TRAILER = re.compile(r"\b(?:Out of bounds values|Avg bus bandwidth)\s*:\s*(\S+)")
_COLUMNS = re.compile(r"\b(size|bytes)\s+(?:count|N)\s+type\s.*busbw")
_ELEMENT_BYTES = (
    (8, "u?int64|float64|double"),
    (4, "u?int32|int|float32|float"),
    (2, "half|float16|bfloat16|bf16"),
    (1, "u?int8|char|fp8(?:_e4m3|_e5m2)?|f8e4m3|f8e5m2|float8_e4m3|float8_e5m2"),
)
_TYPES = "|".join(names for _, names in _ELEMENT_BYTES)
_ROW = re.compile(
    rf"(?:^|.*[\s>:\]])(\d{{1,18}})\s+(\d{{1,18}})\s+({_TYPES})\s+(.*\S)"
)  # whatever a launcher puts in front
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_LAUNCH = re.compile(r"\b(?:mpirun|mpiexec|orterun|prun|srun|sbatch|salloc)\b|#SBATCH|\b\d+ nodes?\b|\bppr:\d+:node")
_NODES = (  # what a launcher's option means; -N is the number of nodes for Slurm, and of ranks on a node for Open MPI
    (re.compile(r"(?:^|\s)-N\s*(\d{1,6})\b"), "N"),
    (re.compile(r"(?:^|\s)--nodes[= ](\d{1,6})\b"), "nodes"),
    (re.compile(r"\b(\d{1,6}) nodes?\b"), "nodes"),
    (
        re.compile(r"(?:^|\s)(?:--?npernode|-ppn|--n?tasks-per-node|--map-by ppr:)[= ]?(\d{1,6})"),
        "ranks",
    ),
    (re.compile(r"(?:^|\s)(?:-H|--?hosts?)[= ]([\w.:,-]+)"), "hosts"),
)
_LARGEST = 1e18
_LONGEST_LINE = 2000  # characters; no row has more, and patterns would search the rest for long
_SHORTEST_S, _LONGEST_S = 1e-9, 86400.0  # of one all-reduce
_MESSAGE = re.compile(r"[A-Za-z][^\s:]*:\d+:\d+ \[\d+\]|NCCL (?:INFO|WARN|TRACE|version)")
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
    num_nodes: int | None  # None where the log does not say it
    gpus: tuple[str, ...]  # driver names
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


def read_nccl_logs(path: str | Path) -> tuple[NcclLog, ...]:
    """The all-reduce runs in the nccl-tests log at `path`, in its order, one for each cycle of `-N`; at least one.

    The number of nodes comes from the list of devices, else from the line that launched the run, and is None where
    neither is there (`with_nodes`). Rows without anything around them are taken with a `UserWarning`.

    Raises:
        FileFormatError: not an nccl-tests log, another collective, truncated, mixed output of several ranks, wrong
            results, a single GPU, or no measurement; says file and line.
    """
    path = Path(path)
    text = read_bytes(path, most=_MOST_BYTES).decode("utf-8-sig", errors="replace")
    if not text.strip():
        raise FileFormatError(path, "is empty, expected the output of nccl-tests' all_reduce_perf")
    return _read_json(path, text) if text.lstrip()[0] == "{" else _read_text(path, _COLOUR.sub("", text))


def with_nodes(log: NcclLog, num_nodes: int | None = None, gpus_per_node: int | None = None) -> NcclLog:
    """The log with its number of nodes, which is the caller's where the log does not say it.

    Args:
        log: a run.
        num_nodes: on which it was.
        gpus_per_node: of the machine, where that is what the caller knows.

    Raises:
        FileFormatError: nothing tells the number, or there cannot be so many nodes.
    """
    if log.num_nodes is not None:
        return log
    if num_nodes is None and gpus_per_node is not None:
        num_nodes = -(-log.num_gpus // gpus_per_node)
    if num_nodes is None:
        raise FileFormatError(
            log.path,
            f"has neither a list of devices nor the line that launched it, so on how many nodes its {log.num_gpus} "
            "GPUs were is unknown",
            hint="--nodes N says it, or --base CLUSTER, whose nodes have a size",
        )
    if not 1 <= num_nodes <= log.num_gpus:
        raise FileFormatError(log.path, f"is a run of {log.num_gpus} GPUs, which cannot be on {num_nodes} nodes")
    return msgspec.structs.replace(log, num_nodes=num_nodes)


def read_nccl_log(path: str | Path) -> NcclLog:
    """The one all-reduce run in the nccl-tests log at `path`.

    Raises:
        FileFormatError: as `read_nccl_logs`, or several runs.
    """
    logs = read_nccl_logs(path)
    if len(logs) > 1:
        raise FileFormatError(Path(path), f"holds {len(logs)} all-reduce runs, expected one")
    return logs[0]


class _Section:
    """One test of a text log, from its header to its trailer."""

    def __init__(self, line: int, name: str | None) -> None:
        self.line, self.name = line, name
        self.ranks: dict[int, tuple[str, str]] = {}  # host and device
        self.groups: set[str] = set()
        self.unit_s = 1e-6
        self.rows: list[_Row] = []
        self.header: re.Match[str] | None = None
        self.launch = ""  # lines that started it: mpirun, srun, …
        self.ended = False
        self.last_line = line


class _Row(msgspec.Struct, frozen=True):
    line: int
    size: int
    count: int | None
    type: str
    redop: str
    root: int | None
    out_of_place: _Times | None
    in_place: _Times | None
    wrong: int
    num_groups: int  # of columns: out of place and in place, or one of them

    @property
    def times(self) -> _Times:
        """Of what was measured the first; one of both was."""
        found = self.out_of_place or self.in_place
        assert found is not None, "a row without times is refused where it is read"
        return found


class _Times(msgspec.Struct, frozen=True):
    time: float  # in the unit of its section
    algbw: float
    busbw: float


def _read_text(path: Path, text: str) -> tuple[NcclLog, ...]:
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
    found = re.search(r"nccl-library=(\d+)|NCCL version (\S+)|compiled with NCCL (\S+)", text)
    version = next((name for name in found.groups() if name), None) if found else None
    return tuple(log for section, _ in wanted for log in _logs(path, section, version))


def _logs(path: Path, section: _Section, version: str | None) -> list[NcclLog]:
    section.rows = _of_one_type(section.rows)
    cycles = _cycles(path, section.rows)
    _check_section(path, section)
    num_gpus, num_nodes = _ranks(path, section)
    return [
        NcclLog(
            path=str(path),
            num_gpus=num_gpus,
            num_nodes=num_nodes,
            gpus=tuple(sorted({gpu for _, gpu in section.ranks.values()})),
            version=version,
            measurements=tuple(_measurement(row, section.unit_s) for row in cycle),
        )
        for cycle in cycles
    ]


def _of_one_type(rows: list[_Row]) -> list[_Row]:
    """The rows of one data type and reduction: the float sum where there are several."""
    kinds = dict.fromkeys((row.type, row.redop) for row in rows)
    chosen = min(kinds, key=lambda kind: (kind[0] not in ("float", "float32"), kind[1] != "sum"))
    return [row for row in rows if (row.type, row.redop) == chosen]


def _cycles(path: Path, rows: list[_Row]) -> list[list[_Row]]:
    """The rows of each run cycle (`-N`), by rising size: the same sizes in the same order again and again."""
    rows = [row for row in rows if row.size > 0]
    seen: dict[int, int] = {}
    again = next((row for row in rows if seen.setdefault(row.size, row.line) != row.line), None)
    if again is None:
        return [sorted(rows, key=lambda row: row.size)]
    period = len(seen)
    repeated = all(row.size == rows[i % period].size for i, row in enumerate(rows))
    if not repeated or len(rows) % period or again.root is None:  # before it printed a root it had no cycles
        raise FileFormatError(
            path,
            f"{again.size} bytes are there twice: the output of several ranks or runs is mixed",
            line=again.line,
            hint="keep rank 0's output of one run",
        )
    return [sorted(rows[i : i + period], key=lambda row: row.size) for i in range(0, len(rows), period)]


def _whole_rows(text: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers; a row in whose middle NCCL wrote messages is one line again."""
    cut: tuple[int, str] | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        line = line[:_LONGEST_LINE]
        message = _MESSAGE.search(line)
        piece = _LAUNCHER.sub(" ", line[: message.start()] if message else line).rstrip()
        words = piece.split()
        if cut and words and all(word == "N/A" or _NUMBER.fullmatch(word) for word in words):
            cut = (cut[0], f"{cut[1]} {piece}")
            continue
        row = _ROW.match(piece)
        if cut and (row or words):
            yield cut
            cut = None
        if row and message:
            cut = (number, piece)
        else:
            yield number, line if _RANK.search(line) else piece or line
    if cut:
        yield cut


def _sections(path: Path, text: str) -> list[_Section]:
    sections = [_Section(1, None)]
    name: str | None = None
    launch = ""  # of the run to come

    def begin(line: int) -> _Section:
        nonlocal launch
        sections.append(_Section(line, name))
        sections[-1].launch, launch = launch or sections[-2].launch, ""
        return sections[-1]

    for number, line in _whole_rows(text):
        current = sections[-1]
        if _LAUNCH.search(line) and not _RANK.search(line):
            if current.ended or current.rows:
                launch += f"{line}\n"
            else:
                current.launch += f"{line}\n"
        if test := _TEST.search(line):
            name = test[2] if test[1] == "starting" else None
            if name and (current.rows or current.ranks):
                begin(number)
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
                current = begin(number)
            current.header = header
        elif _DEVICES.search(line) and current.ended:
            begin(number)  # a second run whose first line was not copied
        elif rank := _RANK.search(line):
            if current.ended:
                current = begin(number)
            current.ranks[int(rank[1])] = (rank[3], rank[4])
            current.groups.add(rank[2] or "0")
        elif columns := _COLUMNS.search(line):
            if "cputime" in line:
                raise FileFormatError(path, "has CPU times, expected the times of the collective", line=number)
            current.unit_s = 1e-3 if columns[1] == "bytes" else 1e-6  # before version 2: milliseconds
        elif trailer := _TRAILER.search(line):
            current.ended = True
            if "bounds" in line and trailer[1] != "0":
                raise FileFormatError(path, f"{trailer[1]} results were out of bounds: the run is wrong", line=number)
        elif row := _row(path, number, line):
            if current.ended and current.rows:
                current = begin(number)
            current.rows.append(row)
        elif program := _PROGRAM.search(line):
            name = program[1]
            if not current.ended and not current.rows:
                current.name = current.name or name
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
            values.append(_finite(path, number, word))
        else:
            break  # a time stamp ends the row
    root = None
    if values and (len(values) % 4 == 1 or words[0] == "-1"):
        root = int(float(values.pop(0) or 0))
    if len(values) not in (3, 4, 8, 16):
        raise FileFormatError(
            path,
            f"row of {match[1]} bytes is incomplete, expected time, algbw, busbw and errors once or twice: "
            "the log is truncated or several outputs are mixed",
            line=number,
        )
    width = 8 if len(values) == 16 else 4  # with the times of single iterations behind each time
    times: list[_Times | None] = []
    wrong = 0
    for group in (values[i : i + width] for i in range(0, len(values), width)):
        taken, algbw, busbw = group[:3]
        measured = taken is not None and algbw is not None and busbw is not None
        times.append(_Times(taken, algbw, busbw) if measured else None)  # type: ignore[arg-type] # none is None
        if len(group) > 3 and group[3] is not None and root is not None:
            wrong += int(group[3])  # the old format's last column is a rounding error, not a count
    if not any(times):
        raise FileFormatError(path, f"row of {match[1]} bytes has no time", line=number)
    first, second = (*times, None)[:2]
    return _Row(number, int(match[1]), int(match[2]), match[3], redop, root, first, second, wrong, len(times))


def _finite(path: Path, line: int, word: str) -> float:
    value = float(word)
    if not abs(value) <= _LARGEST:
        raise FileFormatError(path, f"found the number {word[:20]}, which no time, size or rate has", line=line)
    return value


def _collective(section: _Section) -> str:
    """The collective of a log that does not name it, by its reduction, root and busbw/algbw."""
    row = max(section.rows, key=lambda row: row.size)
    if row.redop not in _REDUCTIONS and not row.redop.startswith("mul"):
        return "a collective without reduction (broadcast, all_gather or all_to_all)"
    if row.root is not None and row.root >= 0:
        return "reduce_perf"
    algbw, busbw = row.times.algbw, row.times.busbw
    element = next(size for size, names in _ELEMENT_BYTES if re.fullmatch(names, row.type))
    shares = row.size // max((row.count or row.size) * element, 1)  # a reduce-scatter counts what one rank gets
    for num in (len(section.ranks), shares):
        if num > 1 and algbw > 1 and abs(busbw / algbw / ((num - 1) / num) - 1) < 0.02:
            return "reduce_scatter_perf"
    if len(section.ranks) > 2 and algbw > 1 and abs(busbw / algbw - 1) < 0.02:
        return "a test whose bus bandwidth is its algorithm bandwidth (sendrecv, broadcast or reduce)"
    return "all_reduce_perf"


def _check_section(path: Path, section: _Section) -> None:
    rows = section.rows
    columns = max(row.num_groups for row in rows)
    for row in rows:
        if row.num_groups < columns:
            raise FileFormatError(
                path, f"row of {row.size} bytes is incomplete: it has no in-place time", line=row.line
            )
        if row.wrong:
            raise FileFormatError(path, f"{row.wrong} wrong results at {row.size} bytes", line=row.line)
        for times in (row.out_of_place, row.in_place):
            if times is not None and not _SHORTEST_S <= times.time * section.unit_s <= _LONGEST_S:
                problem = f"time of {row.size} bytes is {times.time:g}, expected a positive one of at most a day"
                raise FileFormatError(path, problem, line=row.line)
    last = max(rows, key=lambda row: row.line).size
    if not section.ended and section.header is None and not section.ranks:
        warnings.warn(
            f"{path}: has rows only, without the lines around them: whether the run was complete is unknown",
            stacklevel=2,
        )
    elif not section.ended and not _is_last(section.header, last):
        most = f" of {section.header[4]}" if section.header else ""
        raise FileFormatError(
            path,
            f"the log ends after {last}{most} bytes without '# Out of bounds values': it is truncated",
            line=section.last_line,
        )


def _is_last(header: re.Match[str] | None, size: int) -> bool:
    """Whether the run that the header describes ends with this size; without its step nothing tells."""
    if header is None or header[5] is None:
        return False
    most, step = int(header[4]), int(header[5])
    return size == most or (size * step if header[6] == "factor" else size + step) > most


def _ranks(path: Path, section: _Section) -> tuple[int, int | None]:
    """(GPUs, nodes) of the run; without a device list the count follows from busbw / algbw = 2(n-1)/n.

    The nodes are None where nothing tells.
    """
    row = max(section.rows, key=lambda row: row.times.algbw)
    algbw, busbw = row.times.algbw, row.times.busbw
    implied = _implied_ranks(algbw, busbw)
    listed = len(section.ranks)
    if len(section.groups) > 1:
        raise FileFormatError(
            path,
            f"holds all-reduces in {len(section.groups)} groups of GPUs at the same time, expected one over all",
            line=section.line,
        )
    if listed == 1 or (implied == 1 and not listed):
        raise FileFormatError(
            path,
            "is the run of a single GPU, in which nothing is reduced",
            line=section.line,
            hint="with one process per GPU, nccl-tests must be built with MPI=1",
        )
    if listed and max(section.ranks) + 1 != listed:
        if implied != max(section.ranks) + 1:
            problem = f"lists {listed} ranks but numbers them up to {max(section.ranks)}"
            raise FileFormatError(path, problem, line=section.line)
        listed = implied  # nccl-tests cuts long lists short, people too; the bus bandwidth knows
    if listed and implied and abs(2 * (listed - 1) / listed - busbw / algbw) > 0.03:
        raise FileFormatError(
            path,
            f"lists {listed} ranks, but its bus bandwidth is {busbw / algbw:.3g} times the algorithm bandwidth, "
            f"which {implied} ranks would give",
            line=row.line,
        )
    if not listed and implied and abs(2 * (implied - 1) / implied - busbw / algbw) > 0.03:
        problem = f"has a bus bandwidth of {busbw / algbw:.3g} times the algorithm bandwidth, which no all-reduce has"
        raise FileFormatError(path, problem, line=row.line)
    num = listed or implied
    if num is None:
        raise FileFormatError(path, "has no device list ('# Rank 0 …'), so the number of GPUs is unknown", line=1)
    return num, len({host for host, _ in section.ranks.values()}) or _launched_nodes(section, num)


def _launched_nodes(section: _Section, num_gpus: int) -> int | None:
    """Nodes of a run without a device list, from the line that launched it; None where nothing tells."""
    per_process = int(section.header[1]) * int(section.header[2]) if section.header else 1
    if per_process == num_gpus:
        return 1
    found: set[int] = set()
    for line in section.launch.splitlines():
        slurm = re.search(r"\b(?:srun|sbatch|salloc)\b|#SBATCH", line) is not None
        for pattern, what in _NODES:
            for match in pattern.finditer(line):
                if what == "hosts":
                    found.add(len({host.partition(":")[0] for host in match[1].split(",")}))
                elif what == "nodes" or (what == "N" and slurm):
                    found.add(int(match[1]))
                elif (per_node := int(match[1]) * per_process) and num_gpus % per_node == 0:
                    found.add(num_gpus // per_node)
    possible = {nodes for nodes in found if 1 <= nodes <= num_gpus and num_gpus % nodes == 0}
    return possible.pop() if len(possible) == 1 else None


def _implied_ranks(algbw: float, busbw: float) -> int | None:
    """The n of busbw / algbw = 2(n-1)/n; None where two printed digits do not decide."""
    if algbw < 1:
        return None
    ratio = busbw / algbw
    return round(2 / (2 - ratio)) if ratio < 1.97 else None


def _measurement(row: _Row, unit_s: float) -> NcclMeasurement:
    out_of_place, in_place = row.out_of_place, row.in_place
    return NcclMeasurement(
        size_bytes=row.size,
        out_of_place_s=None if out_of_place is None else out_of_place.time * unit_s,
        in_place_s=None if in_place is None else in_place.time * unit_s,
    )


class _JsonTimes(msgspec.Struct):
    time: float | None = None
    cpu_time: float | str | None = None
    alg_bw: float = 0.0
    bus_bw: float = 0.0
    nwrong: float | str | None = None  # null or "N/A" where nothing was checked


class _JsonResult(msgspec.Struct):
    size: int
    count: int | None = None
    type: str = "float"
    redop: str = "sum"
    root: int | str = -1
    out_of_place: _JsonTimes | None = None
    in_place: _JsonTimes | None = None


class _JsonDevice(msgspec.Struct):
    rank: int | None = None
    group: int = 0
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


_JSON_DECODER = msgspec.json.Decoder(_JsonRun)


def _read_json(path: Path, text: str) -> tuple[NcclLog, ...]:
    """The JSON that `all_reduce_perf -J FILE` writes (nccl-tests 2.17 and newer)."""
    run = decode_json(path, text, _JSON_DECODER, what="the JSON output of nccl-tests")
    if not run.results:
        raise FileFormatError(path, "has no 'results', expected the JSON output of nccl-tests' all_reduce_perf")
    program = Path(run.args[0]).name if run.args else ""
    if "_perf" in program and "all_reduce" not in program:
        raise FileFormatError(path, f"holds {program}, expected all_reduce_perf")
    if run.out_of_bounds is None:
        raise FileFormatError(path, "has no 'out_of_bounds': the run did not end")
    if run.out_of_bounds.count or str(run.out_of_bounds.okay).lower() == "false":  # nccl-tests quotes it
        raise FileFormatError(path, f"{run.out_of_bounds.count} results were out of bounds")
    config = run.config or _JsonConfig()
    section = _Section(1, "all_reduce_perf" if program else None)
    section.ended = True
    for i, device in enumerate(config.devices or run.devices):
        section.ranks[i if device.rank is None else device.rank] = (device.hostname, device.device_info)
        section.groups.add(str(device.group))
    threads = config.nthreads * config.ngpus
    if threads > 1 and sorted(section.ranks) == [threads * i for i in range(len(section.ranks))]:
        # the JSON names only the first device of each process
        section.ranks = {first + i: device for first, device in section.ranks.items() for i in range(threads)}
    section.rows = [_json_row(path, i, result) for i, result in enumerate(run.results)]
    if section.name is None and "all_reduce" not in (name := _collective(section)):
        raise FileFormatError(path, f"holds {name}, expected all_reduce_perf")
    return tuple(_logs(path, section, None if run.nccl_version is None else str(run.nccl_version)))


def _json_row(path: Path, index: int, result: _JsonResult) -> _Row:
    where = f"results[{index}]"
    times: dict[str, _Times] = {}
    wrong = 0
    for key, body in (("out_of_place", result.out_of_place), ("in_place", result.in_place)):
        if body is None:
            continue
        if body.time is None:
            found = "no 'time'" if body.cpu_time is None else "CPU time"
            raise FileFormatError(path, f"{where}.{key} has {found}, expected the time of the collective")
        times[key] = _Times(body.time, body.alg_bw, body.bus_bw)
        wrong += int(body.nwrong or 0) if not isinstance(body.nwrong, str) else 0
    if not times:
        raise FileFormatError(path, f"{where} has neither an out-of-place nor an in-place time")
    try:
        root = int(result.root)
    except ValueError as error:
        raise FileFormatError(path, f"{where}.root is {result.root!r}, expected a rank") from error
    out_of_place, in_place = times.get("out_of_place"), times.get("in_place")
    numbers = (result.size, result.count, result.type, result.redop, root)
    return _Row(index + 1, *numbers, out_of_place, in_place, wrong, len(times))
