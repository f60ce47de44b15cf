"""What one test of a log says once its lines are read: whether it can be trusted, on how many GPUs, how long.

The text and the JSON both come here as a `Section`. Of several data types or reductions the float sum counts; run
cycles (`-N`) are runs.
"""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from ptsim.errors import FileFormatError
from ptsim.hardware.nccl_log.record import NcclLog, NcclMeasurement, of_one_kind

ELEMENT_BYTES = (
    (8, "u?int64|float64|double"),
    (4, "u?int32|int|float32|float"),
    (2, "half|float16|bfloat16|bf16"),
    (1, "u?int8|char|fp8(?:_e4m3|_e5m2)?|f8e4m3|f8e5m2|float8_e4m3|float8_e5m2"),
)
_NODES = (  # what a launcher's option means; -N is the number of nodes for Slurm, and of ranks on a node for Open MPI
    (re.compile(r"(?:^|\s)-N\s*(\d{1,6})\b"), "N"),
    (re.compile(r"(?:^|\s)--nodes[= ](\d{1,6})\b"), "nodes"),
    (re.compile(r"\bnRanks \d+ nNodes (\d{1,6})\b(?!.*\bMNNVL 1\b)"), "nodes"),  # NCCL itself, of hosts
    (re.compile(r"(?:^|\s)(?:--?npernode|--?ppn|-perhost|--n?tasks-per-node)[= ]?(\d{1,6})"), "ranks"),
    (re.compile(r"\bppr:(\d{1,6}):node\b"), "ranks"),
    (re.compile(r"(?:^|\s)(?:-H|--?hosts?)[= ]([\w.:,-]+)(?!\S)"), "hosts"),
)
_BY_NODE = re.compile(r"-map-by[= ]node\b|-bynode\b")  # one process on each host in turn
_MPI = r"\b(?:mpirun|mpiexec|orterun|prun)\b"
_STARTED = re.compile(rf"{_MPI}.*?\s--?np?[= ]\s*(\d{{1,6}})\b")  # with a number of processes
_JOB = re.compile(rf"(?:(?!{_MPI}).)*(?:#SBATCH|\bsbatch\b|\bsalloc\b)(?:(?!{_MPI}).)*")  # what Slurm gave the job
_TASKS = re.compile(r"\s(?:--ntasks[= ]|-n\s*)(\d{1,6})\b")
_PER_PROCESS = re.compile(r"\s-(?:[tg]\s*|-n(?:threads|gpus)[= ])(\d{1,6})\b")  # the test's own options
_GPUS = re.compile(r"\s(?:--gpus[= ]|-G\s*)(?:[\w-]+:)?(\d{1,6})\b")
_ON_NODE = re.compile(r"\s--(?:gpus-per-node[= ]|gres[= ]gpu:)(?:[\w-]+:)?(\d{1,6})\b")
_MOST_TOLD = 4000  # GPUs that bandwidths of any digits are taken to tell
_FULL = 8  # GPUs of a node: hardly a machine has twice as many
PROGRAM = re.compile(
    r"\b((?:all_reduce|all_gather|reduce_scatter|alltoallv?|broadcast|reduce|sendrecv|gather|scatter|hypercube)"
    r"_perf(?:_mpi)?)\b"
)
FORCED = re.compile(r"\b(NCCL_ALGO|NCCL_PROTO)(?:=| set by environment to )['\"]?([\w,;:^]*\w)")
_KEEP = "keep the lines '# Rank …' that nccl-tests prints first"
_KEEP_ALL = "keep all lines '# Rank …' of the run"
_SHORTEST_S, _LONGEST_S = 1e-9, 86400.0  # of one all-reduce
_ROUNDED = 0.005  # GB/s, by which a printed bandwidth may be off
_RATE_OFF = 0.1  # by which size / time may differ from the bandwidth beside it, besides what that is rounded
_RATIO_OFF = 0.03  # by which busbw / algbw may differ from that of the ranks, whatever was rounded
_REDUCTIONS = ("sum", "prod", "max", "min", "avg", "mulsum", "all")


class Section:
    """One test of a log: of a text from its header to its trailer, of JSON and CSV the whole file."""

    def __init__(self, line: int, name: str | None) -> None:
        self.line, self.name = line, name
        self.ranks: dict[int, tuple[str, str]] = {}  # host and device
        self.groups: set[str] = set()
        self.shortened = False  # the list of ranks is, by nccl-tests itself: 2,048 characters of each process are kept
        self.processes = 0  # that wrote into the log, as far as a launcher numbers them
        self.counted: set[int] = set()  # ranks, by NCCL itself
        self.places: dict[int, tuple[str, str, str]] = {}  # host, number and bus of the device, where the log says them
        self.num_gpus: int | None = None  # where the file says it and lists none
        self.num_nodes: int | None = None  # likewise
        self.columns: list[str] = []  # their names
        self.unit_s = 1e-6
        self.rows: list[Row] = []
        self.header: re.Match[str] | None = None
        self.launch = ""  # lines that started it: mpirun, srun, …
        self.launched: Section | None = None  # an earlier run in the file whose lines those are
        self.version: str | None = None  # of NCCL
        self.aggregated = 1  # all-reduces in one group
        self.blocking = False  # the host waits for each of them
        self.graph = 0  # launches of a CUDA graph that holds them
        self.cold = False  # without a warm-up
        self.forced: dict[str, str] = {}  # NCCL_ALGO and NCCL_PROTO, where they were set
        self.problem: FileFormatError | None = None  # why its times count for nothing
        self.ended = False
        self.failed = False  # as the test itself says
        self.last_line = line


class Row(msgspec.Struct, frozen=True):
    """One message size as the log has it."""

    line: int
    size: int
    count: int | None
    type: str
    redop: str
    root: int | None
    out_of_place: Times | None
    in_place: Times | None
    wrong: int
    num_groups: int  # of columns: out of place and in place, or one of them
    half_checked: bool  # results were, out of place only: in place there are none to check

    @property
    def times(self) -> Times:
        """Of what was measured the first; one of both was."""
        found = self.out_of_place or self.in_place
        assert found is not None, "a row without times is refused where it is read"
        return found


class Times(msgspec.Struct, frozen=True):
    """What was measured out of place or in place."""

    time: float  # in the unit of its section
    algbw: float
    busbw: float


def logs_of(path: Path, section: Section) -> list[NcclLog]:
    """The all-reduce runs of a section, one for each cycle.

    Raises:
        FileFormatError: what cannot be trusted: rows of several ranks, wrong results, a run that stops in the middle.
    """
    if section.problem is not None:
        raise section.problem
    section.rows = of_one_kind(section.rows, lambda row: (row.type, row.redop), f"{path}: rows")
    if not any(row.size > 0 for row in section.rows):
        raise FileFormatError(path, "has empty messages only, expected all-reduces of some bytes", line=section.line)
    _warn_of_settings(path, section)
    cycles = _cycles(path, section.rows)
    _check_section(path, section)
    num_gpus, num_nodes = _ranks(path, section)
    for cycle in cycles[1:]:
        best = max(cycle, key=lambda row: row.times.algbw)
        if best.times.algbw >= 1 and not _agrees(num_gpus, best.times.algbw, best.times.busbw):
            problem = f"its rows begin again, of another number of GPUs than {num_gpus}"
            hint = "keep the lines with the names of the columns above each run's rows"
            raise FileFormatError(path, problem, line=cycle[0].line, hint=hint)
    may_share = _may_share(section, num_gpus, num_nodes)
    return [
        NcclLog(
            path=str(path),
            num_gpus=num_gpus,
            num_nodes=num_nodes,
            gpus=tuple(sorted({gpu for _, gpu in section.ranks.values() if gpu})),
            version=section.version,
            measurements=tuple(_measurement(row, section.unit_s) for row in cycle),
            kind=(section.rows[0].type, section.rows[0].redop),
            may_share=may_share,
        )
        for cycle in cycles
    ]


def _warn_of_settings(path: Path, section: Section) -> None:
    """Say what the times hold, or lack, beside those of an all-reduce by itself."""
    found: list[str] = []
    if section.aggregated > 1:
        found.append(
            f"{section.aggregated} all-reduces ran in one group (-m): each time is a share of the group's, which is "
            "less than one by itself takes"
        )
    if section.blocking:
        found.append(
            "the host waited for each all-reduce before it began the next (-z): each time holds the launch and the "
            "wait, too, which small messages feel"
        )
    if section.graph:
        found.append(
            "the all-reduces were replayed from a CUDA graph (-G): the times lack the host's launches, which small "
            "messages feel"
        )
    if section.cold:
        found.append("there was no warm-up (-w 0): the first times hold what NCCL sets up, too")
    if section.forced:
        what = " and ".join(f"{name}={value}" for name, value in sorted(section.forced.items()))
        found.append(f"{what} was set: the times are not those that NCCL's own choice gives")
    for text in found:
        warnings.warn(f"{path}: {text}", stacklevel=3)


def _cycles(path: Path, rows: list[Row]) -> list[list[Row]]:
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


def collective(section: Section) -> str:
    """What a section is called, unless its rows are of no all-reduce; without a name what its rows tell.

    They tell by their reduction, root, counts, by what was checked of them, and by busbw/algbw.
    """
    if section.name is not None and "all_reduce" not in section.name:
        return section.name
    row = max(section.rows, key=lambda row: row.size)
    if row.redop not in _REDUCTIONS and not row.redop.startswith("mul"):
        return "a collective without reduction (broadcast, all_gather or all_to_all)"
    if row.root is not None and row.root >= 0:
        return "reduce_perf"
    if (own := _own_bytes(row)) is not None and row.size > own:  # of what one rank gets
        return "reduce_scatter_perf"
    if section.name is not None:
        return section.name
    if all(row.half_checked for row in section.rows):
        return "a test that checks no results in place (sendrecv or alltoall)"
    algbw, busbw = row.times.algbw, row.times.busbw
    ranks = len(section.ranks) // max(len(section.groups), 1)  # that reduce together
    if ranks > 1 and algbw > 1 and abs(busbw / algbw / ((ranks - 1) / ranks) - 1) < 0.02:
        return "reduce_scatter_perf"
    if ranks > 2 and algbw > 1 and abs(busbw / algbw - 1) < 0.02:
        return "a test whose bus bandwidth is its algorithm bandwidth (sendrecv, broadcast or reduce)"
    return "all_reduce_perf"


def _own_bytes(row: Row) -> int | None:
    """Bytes of as many elements as the row counts; None where it counts none, or they are of a type of the future."""
    element = next((size for size, names in ELEMENT_BYTES if re.fullmatch(names, row.type)), None)
    return row.count * element if row.count and element else None


def check_all_reduce(path: Path, section: Section) -> None:
    """Refuse another collective.

    Raises:
        FileFormatError: says which it is.
    """
    if "all_reduce" not in (name := collective(section)):
        raise FileFormatError(path, f"holds {name}, expected all_reduce_perf")


def _check_section(path: Path, section: Section) -> None:
    rows = section.rows
    columns = max(row.num_groups for row in rows)
    rounded = _ROUNDED * (10 if _rounded_by_hand(rows) else 1)
    for row in rows:
        if row.num_groups < columns:
            raise FileFormatError(
                path, f"row of {row.size} bytes is incomplete: it has no in-place time", line=row.line
            )
        if _own_bytes(row) not in (None, row.size):
            problem = f"{row.size} bytes are not those of {row.count} elements of {row.type}: the row is damaged"
            raise FileFormatError(path, problem, line=row.line)
        if row.wrong:
            raise FileFormatError(path, f"{row.wrong} wrong results at {row.size} bytes", line=row.line)
        for times in filter(None, (row.out_of_place, row.in_place)):
            _check_times(path, section, row, times, rounded)
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


def _check_times(path: Path, section: Section, row: Row, times: Times, rounded: float) -> None:
    """Refuse a time that no all-reduce has, or that is not the one of the bandwidth beside it, to `rounded` GB/s."""
    seconds = times.time * section.unit_s
    if not _SHORTEST_S <= seconds <= _LONGEST_S:
        problem = f"time of {row.size} bytes is {times.time:g}, expected a positive one of at most a day"
        raise FileFormatError(path, problem, line=row.line)
    rate = row.size / seconds / 1e9
    if not abs(rate - times.algbw) <= _RATE_OFF * times.algbw + rounded:
        raise FileFormatError(
            path,
            f"{row.size} bytes in {seconds * 1e6:g} us are {rate:.4g} GB/s, but the row says {times.algbw:g} GB/s: "
            "it is damaged, or its times are in another unit",
            line=row.line,
            hint="keep the lines with the names of the columns, which nccl-tests prints first",
        )


def _is_last(header: re.Match[str] | None, size: int) -> bool:
    """Whether the run that the header describes ends with this size; without its step nothing tells."""
    if header is None or header[5] is None:
        return False
    most, step = int(header[4]), int(header[5])
    return size == most or (size * step if header[6] == "factor" else size + step) > most


def _ranks(path: Path, section: Section) -> tuple[int, int | None]:
    """(GPUs, nodes) of the run; without a device list the count follows from busbw / algbw = 2(n-1)/n.

    The nodes are None where nothing tells.
    """
    row = max(section.rows, key=lambda row: row.times.algbw)
    algbw, busbw = row.times.algbw, row.times.busbw
    implied = _implied_ranks(algbw, busbw)
    listed = section.num_gpus or len(section.ranks)
    if len(section.groups) > 1:
        raise FileFormatError(
            path,
            f"holds all-reduces in {len(section.groups)} groups of GPUs at the same time, expected one over all",
            line=section.line,
        )
    if (listed == 1 and algbw < 1 and _fits(section.rows, 1)) or (listed < 2 and implied == 1):
        raise FileFormatError(
            path,
            "is the run of a single GPU, in which nothing is reduced",
            line=section.line,
            hint="with one process per GPU, nccl-tests must be built with MPI=1",
        )
    whole = not section.ranks or max(section.ranks) + 1 == listed
    if section.shortened:
        each = _gpus_per_process(section)
        listed, whole = -(-(max(section.ranks, default=-1) + 1) // each) * each, False
    elif not whole:  # nccl-tests cuts long lists short, people too; the bus bandwidth knows, or does not contradict
        last = max(section.ranks)
        if implied != last + 1 and (implied is not None or not _agrees(last + 1, algbw, busbw)):
            problem = (
                f"lists {listed} ranks but numbers them up to {last}, and its bandwidths do not say that "
                f"{last + 1} GPUs ran"
            )
            raise FileFormatError(path, problem, line=section.line)
        listed = last + 1
    if listed and algbw >= 1 and not _agrees(listed, algbw, busbw):
        told = f"{implied} ranks" if implied else "another number of them"
        raise FileFormatError(
            path,
            f"lists {listed} of its ranks, but its bus bandwidth is {busbw / algbw:.4g} times the algorithm bandwidth, "
            f"which {told} would give",
            line=row.line,
            hint=f"{_KEEP_ALL}, or none of them",
        )
    if section.ranks:
        _check_list(path, section, listed, whole, row.line)
    named = {num for num, _ in _told_gpus(section, 0)}
    if not listed and algbw >= 1 and 2 - busbw / algbw > 2 / _MOST_TOLD:
        implied = _fitting(path, section.rows, row, named)
    elif not listed and len(named) == 1 and _fits(section.rows, min(named)):
        implied = min(named)
    num = listed or implied
    if num is None:
        problem = "has no device list ('# Rank 0 …'), so the number of GPUs is unknown"
        raise FileFormatError(path, problem, line=row.line, hint=_KEEP)
    hosts = len({host for host, _ in section.ranks.values()}) if _names_tell(section) else 0
    if whole and hosts:
        return num, hosts
    nodes = section.num_nodes or _launched_nodes(section, num)
    return num, nodes if nodes is None or nodes >= hosts else None  # a line that launched something else


def _check_list(path: Path, section: Section, listed: int, whole: bool, line: int) -> None:
    """Refuse a list of ranks whose end is missing, as far as anything else in the log tells.

    A bandwidth of less than 1 GB/s, of which two digits are printed, fits several numbers. Where nothing tells and
    some hosts have fewer ranks than others, a `UserWarning` says so.

    Raises:
        FileFormatError: says what tells of more ranks.
    """
    rows, each = section.rows, _gpus_per_process(section)
    hosts = Counter(host for _, (host, _) in sorted(section.ranks.items()))
    most = max(hosts.values())
    told = dict(_told_gpus(section, len(hosts)))
    nodes = max(_told_nodes(section), default=0) if _names_tell(section) else 0
    more = {
        -(-listed // each) * each: f"its processes have {each} GPUs each",
        section.processes * each: f"{section.processes} processes wrote into it",
    } | ({} if listed in told else told)
    why = next((why for num, why in more.items() if num > listed and _fits(rows, num)), None)
    if not _fits(rows, listed, by_hand=True):
        why = f"its bandwidths are not those of {listed} GPUs"
    elif nodes > len(hosts) and any(
        _fits(rows, num) for num in range(listed + 1, min(nodes * max(most, _FULL), _MOST_TOLD) + 1)
    ):
        why = why or f"the line that launched it names {nodes} nodes"
    if why is not None:
        raise FileFormatError(path, f"lists {listed} of its ranks, but {why}", line=line, hint=_KEEP_ALL)
    *others, last = hosts.values()
    if whole and (min(others, default=most) < most or (last < most and listed not in told)):
        warnings.warn(
            f"{path}: its hosts have {min(hosts.values())} to {most} ranks each: if lines of the list are missing, "
            "there were more GPUs, and if a name is damaged, fewer nodes",
            stacklevel=4,
        )


def _told_gpus(section: Section, num_hosts: int) -> Iterator[tuple[int, str]]:
    """Numbers of GPUs that NCCL or the line that launched the run names, and which of them does; so many hosts ran."""
    yield from ((num, f"NCCL counts {num}") for num in sorted(section.counted))
    each = _gpus_per_process(section)
    for line, _ in _commands(section) if section.launched is None else ():
        slurm = re.search(r"\bsrun\b(.*)", line)
        if started := _STARTED.search(line) or (_TASKS.search(slurm[1]) if slurm else None):
            yield int(started[1]) * each, f"the line that launched it starts {started[1]} processes"
        else:
            for text in (text for what, text in _given(line) if what == "ranks"):
                yield int(text) * num_hosts * each, f"the line that launched it starts {text} processes on each node"


def _told_nodes(section: Section) -> Iterator[int]:
    """Numbers of nodes that the line that launched the run names, and not a job's, which may have more."""
    for line, _ in _commands(section) if section.launched is None else ():
        if not _JOB.match(line):
            yield from (int(text) for what, text in _given(line) if what == "nodes")


def _commands(section: Section) -> list[tuple[str, str]]:
    """The lines that launched the test by its name: what stands before the name, and its own options behind it."""
    split = (PROGRAM.split(line, maxsplit=1) for line in section.launch.splitlines())
    return [(parts[0], parts[2]) for parts in split if len(parts) > 1]


def _gpus_per_process(section: Section) -> int:
    """GPUs of each process: nThread times nGpus of the header, else of the options -t and -g."""
    if section.header:
        return int(section.header[1]) * int(section.header[2]) or 1
    numbers = {math.prod(map(int, _PER_PROCESS.findall(options))) for _, options in _commands(section)}
    return (numbers.pop() if len(numbers) == 1 else 1) or 1


def _given(line: str) -> list[tuple[str, str]]:
    """What a launcher's options say: "nodes", "ranks" on each, or "hosts", and the text of each."""
    slurm = re.search(r"\b(?:srun|sbatch|salloc)\b|#SBATCH", line) is not None
    of_n = "nodes" if slurm else "ranks"
    return [(of_n if what == "N" else what, match[1]) for pattern, what in _NODES for match in pattern.finditer(line)]


def _names_tell(section: Section) -> bool:
    """Whether each host name is that of one node: no GPU of it is listed twice, and no NCCL_HOSTID was set instead.

    Processes that see a GPU of their own each call it device 0, and a bus number without its domain may be that of
    several GPUs; together with another device number or a domain they tell. Where neither is there, several names are
    taken for those of as many nodes, and one name says nothing: all nodes may bear it.
    """
    if "NCCL_HOSTID" in section.launch:
        return False
    places = section.places.values()
    if len(set(places)) == len(places):
        return True
    told = any(number != "0" or ":" in bus for _, number, bus in places)
    return not told and len({host for host, _, _ in places}) > 1


def _may_share(section: Section, num_gpus: int, num_nodes: int | None) -> bool:
    """Whether some of the hosts that count as nodes may be containers of one machine, and no launcher says otherwise.

    Equal machines number their buses alike, so hosts without a bus number in common may have parts of one.
    """
    buses: dict[str, set[str]] = {}
    for host, _, bus in section.places.values():
        buses.setdefault(host, set()).add(bus)
    if len(buses) != num_nodes or _launched_nodes(section, num_gpus) == num_nodes:
        return False
    kinds = set(map(frozenset, buses.values()))
    return any(one.isdisjoint(other) for one, other in itertools.combinations(kinds, 2))


def _launched_nodes(section: Section, num_gpus: int) -> int | None:
    """Nodes of a run without a device list, from the line that launched it; None where nothing tells."""
    per_process = _gpus_per_process(section)
    if per_process == num_gpus:
        return 1
    found: set[int] = set()
    earlier = section.launched  # of other GPUs it tells how many are on a node, and not on how many nodes they are
    alike = earlier is None or not earlier.rows or _num_gpus(earlier) == num_gpus
    lines = [PROGRAM.split(line, 1)[0] for line in section.launch.splitlines()]  # behind it are the test's own options
    for line in lines:
        given = _given(line)
        ranks = [(what, text) for what, text in given if what == "ranks"]
        on_node = [int(text) for _, text in ranks]
        for what, text in given if alike else ranks:
            if what == "hosts":
                most = 1 if _BY_NODE.search(line) else min(on_node, default=num_gpus)
                found.add(_hosts_used(text, num_gpus // per_process, most))
            elif what == "nodes":
                if not _JOB.match(line) or _fills_job(lines, int(text), num_gpus, per_process):
                    found.add(int(text))
            elif (per_node := int(text) * per_process) and num_gpus % per_node == 0:
                found.add(num_gpus // per_node)
    possible = {nodes for nodes in found if 1 <= nodes <= num_gpus and num_gpus % nodes == 0}
    return possible.pop() if len(possible) == 1 else None


def _fills_job(lines: Sequence[str], num_nodes: int, num_gpus: int, per_process: int) -> bool:
    """Whether a run is on all nodes of its Slurm job: mpirun may start fewer processes than these have room for.

    That is known where the job has as many tasks or GPUs as the run, where its nodes are full, of srun, and of mpirun
    without a number.
    """
    if num_gpus >= _FULL * num_nodes or not any(_STARTED.search(line) for line in lines):
        return True
    in_job = [found[0] for line in lines if (found := _JOB.match(line))]
    tasks, gpus, on_node = (
        {int(found[1]) for text in in_job for found in pattern.finditer(text)} for pattern in (_TASKS, _GPUS, _ON_NODE)
    )
    in_turn = any(_BY_NODE.search(line) for line in lines)
    return in_turn or num_gpus // per_process in tasks or num_gpus in gpus | {num_nodes * each for each in on_node}


def _hosts_used(listed: str, processes: int, most: int) -> int:
    """How many of the hosts the processes are on, which fill the slots of one ("a:8,b:8") before those of the next.

    Hosts without slots count, all of them.

    Args:
        listed: as the launcher was given them.
        processes: in the run.
        most: processes that a host may have, whatever its slots.
    """
    slots: dict[str, int] = {}
    for host in listed.split(","):
        name, _, number = host.partition(":")
        slots[name] = slots.get(name, 0) + (int(number) if number.isdigit() else 1)
    used = 0
    for room in slots.values() if ":" in listed else ():
        used += processes > 0
        processes -= min(room, most)
    return used or len(slots)


def _num_gpus(section: Section) -> int | None:
    """How many GPUs a section with rows is of, as far as its list of devices or its bandwidths tell."""
    best = max(section.rows, key=lambda row: row.times.algbw).times
    return len(section.ranks) or _implied_ranks(best.algbw, best.busbw)


def _implied_ranks(algbw: float, busbw: float) -> int | None:
    """The n of busbw / algbw = 2(n-1)/n; None where two printed digits do not decide."""
    if algbw < 1:
        return None
    ratio = busbw / algbw
    return round(2 / (2 - ratio)) if ratio < 1.97 else None


def _agrees(num: int, algbw: float, busbw: float) -> bool:
    """Whether the bandwidths are those of so many ranks, as far as their digits tell.

    Two are printed, one from 1000 GB/s on; people round to one, too.
    """
    two = max(algbw, busbw) < 1000 and any(round(10 * rate, 6) % 1 for rate in (algbw, busbw))
    rounded = _ROUNDED * (1 if two else 10)
    return algbw >= 1 and abs(bus_factor(num) - busbw / algbw) <= min(
        _RATIO_OFF, (1 + bus_factor(num)) * rounded / algbw + 1e-6
    )


def bus_factor(num_gpus: int) -> float:
    """The ratio busbw / algbw of an all-reduce over so many GPUs. Source: nccl-tests, doc/PERFORMANCE.md."""
    return 2 * (num_gpus - 1) / num_gpus


def _fits(rows: list[Row], num: int, *, by_hand: bool = False) -> bool:
    """Whether all bandwidths are those of so many GPUs, as far as two printed digits tell, one from 1000 GB/s on.

    `by_hand`: people may have rounded to one.
    """
    if num < 1:  # as a launcher may say
        return False
    one = by_hand and _rounded_by_hand(rows)
    factor = bus_factor(num)
    for times in _measured(rows):
        rounded = _ROUNDED * (10 if one or max(times.algbw, times.busbw) >= 1000 else 1)
        if abs(times.busbw - factor * times.algbw) > rounded * (1 + factor) + 1e-9:
            return False
    return True


def _rounded_by_hand(rows: list[Row]) -> bool:
    """Whether no bandwidth has a second digit, which nccl-tests prints."""
    return not any(round(10 * rate, 6) % 1 for times in _measured(rows) for rate in (times.algbw, times.busbw))


def _measured(rows: list[Row]) -> Iterator[Times]:
    """Out of place and in place, in turn."""
    return (times for row in rows for times in (row.out_of_place, row.in_place) if times is not None)


def _fitting(path: Path, rows: list[Row], best: Row, named: set[int]) -> int:
    """The number of GPUs that all bandwidths allow, or of several the one that the log names.

    Where they allow none, as people have rounded them, or a row is not of the run, the best row's tell.

    Raises:
        FileFormatError: they allow several, or none.
    """
    ratio = best.times.busbw / best.times.algbw
    near = round(2 / (2 - ratio))
    possible = range(max(2, near // 2), 2 * near + 1)
    found = [num for num in possible if _fits(rows, num)]
    found = found or [num for num in possible if _agrees(num, best.times.algbw, best.times.busbw)]
    if not found:
        problem = f"has a bus bandwidth of {ratio:.4g} times the algorithm bandwidth, which no all-reduce has"
        raise FileFormatError(path, problem, line=best.line)
    told = named.intersection(found)
    if len(found) > 1 and len(told) != 1:
        problem = f"has no device list ('# Rank 0 …'), and its bandwidths fit {found[0]} to {found[-1]} GPUs"
        raise FileFormatError(path, problem, line=best.line, hint=_KEEP)
    return min(told or found)


def _measurement(row: Row, unit_s: float) -> NcclMeasurement:
    out_of_place, in_place = row.out_of_place, row.in_place
    return NcclMeasurement(
        size_bytes=row.size,
        out_of_place_s=None if out_of_place is None else out_of_place.time * unit_s,
        in_place_s=None if in_place is None else in_place.time * unit_s,
    )
