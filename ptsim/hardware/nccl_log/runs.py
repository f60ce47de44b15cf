"""What one test of a log says once its lines are read: whether it can be trusted, and how long its all-reduces took.

The text and the JSON both come here as a `Section`. Of several data types or reductions the float sum counts; run
cycles (`-N`) are runs.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from ptsim.errors import FileFormatError
from ptsim.hardware.nccl_log.bandwidths import ROUNDED, fits, rounded_by_hand
from ptsim.hardware.nccl_log.ranks import gpus_and_nodes, hosts_may_share
from ptsim.hardware.nccl_log.record import NcclLog, NcclMeasurement, of_one_kind
from ptsim.hardware.nccl_log.section import ELEMENT_BYTES, Row, Section, Times

_SHORTEST_S, _LONGEST_S = 1e-9, 86400.0  # of one all-reduce
_RATE_OFF = 0.1  # by which size / time may differ from the bandwidth beside it, besides what that is rounded
_REDUCTIONS = ("sum", "prod", "max", "min", "avg", "mulsum", "all")


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
    num_gpus, num_nodes = gpus_and_nodes(path, section, cycles[0])
    for cycle in cycles[1:]:
        if not fits(cycle, num_gpus, by_hand=True):
            problem = f"its rows begin again, of another number of GPUs than {num_gpus}"
            hint = "keep the lines with the names of the columns above each run's rows"
            raise FileFormatError(path, problem, line=cycle[0].line, hint=hint)
    may_share = hosts_may_share(section, num_gpus, num_nodes)
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
    rounded = ROUNDED * (10 if rounded_by_hand(rows) else 1)
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


def _measurement(row: Row, unit_s: float) -> NcclMeasurement:
    out_of_place, in_place = row.out_of_place, row.in_place
    return NcclMeasurement(
        size_bytes=row.size,
        out_of_place_s=None if out_of_place is None else out_of_place.time * unit_s,
        in_place_s=None if in_place is None else in_place.time * unit_s,
    )
