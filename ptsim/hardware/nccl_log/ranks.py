"""On how many GPUs of how many nodes was a test, and can its list of ranks be trusted?"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from pathlib import Path

from ptsim.errors import FileFormatError
from ptsim.hardware.nccl_log.bandwidths import agrees, fits, implied_ranks
from ptsim.hardware.nccl_log.launcher import FULL_NODE, gpus_per_process, launched_nodes, told_gpus, told_nodes
from ptsim.hardware.nccl_log.section import Row, Section

_MOST_TOLD = 4000  # GPUs that bandwidths of any digits are taken to tell
_KEEP = "keep the lines '# Rank …' that nccl-tests prints first"
_KEEP_ALL = "keep all lines '# Rank …' of the run"


def gpus_and_nodes(path: Path, section: Section, rows: list[Row]) -> tuple[int, int | None]:
    """(GPUs, nodes) of the run, `rows` of which are those of one cycle; the nodes are None where nothing tells.

    Without a device list the GPUs follow from busbw / algbw = 2(n-1)/n, or of slow links from what NCCL or the line
    that launched the run names.

    Raises:
        FileFormatError: a single GPU, GPUs in groups, a list that something else in the log contradicts, or a number of
            GPUs that nothing tells.
    """
    row = max(rows, key=lambda row: row.times.algbw)
    algbw, busbw = row.times.algbw, row.times.busbw
    implied = implied_ranks(algbw, busbw)
    listed = section.num_gpus or len(section.ranks)
    if len(section.groups) > 1:
        raise FileFormatError(
            path,
            f"holds all-reduces in {len(section.groups)} groups of GPUs at the same time, expected one over all",
            line=section.line,
        )
    if (listed == 1 and algbw < 1 and fits(rows, 1)) or (listed < 2 and implied == 1):
        raise FileFormatError(
            path,
            "is the run of a single GPU, in which nothing is reduced",
            line=section.line,
            hint="with one process per GPU, nccl-tests must be built with MPI=1",
        )
    whole = not section.ranks or max(section.ranks) + 1 == listed
    if section.shortened:
        each = gpus_per_process(section)
        listed, whole = -(-(max(section.ranks, default=-1) + 1) // each) * each, False
    elif not whole:  # people cut long lists short; the bus bandwidth knows, or does not contradict
        last = max(section.ranks)
        if implied != last + 1 and (implied is not None or not agrees(last + 1, algbw, busbw)):
            problem = (
                f"lists {listed} ranks but numbers them up to {last}, and its bandwidths do not say that "
                f"{last + 1} GPUs ran"
            )
            raise FileFormatError(path, problem, line=section.line)
        listed = last + 1
    if listed and algbw >= 1 and not agrees(listed, algbw, busbw):
        told = f"{implied} ranks" if implied else "another number of them"
        raise FileFormatError(
            path,
            f"lists {listed} of its ranks, but its bus bandwidth is {busbw / algbw:.4g} times the algorithm bandwidth, "
            f"which {told} would give",
            line=row.line,
            hint=f"{_KEEP_ALL}, or none of them",
        )
    if section.ranks:
        _check_list(path, section, rows, listed, whole)
    named = {num for num, _ in told_gpus(section, 0)}
    if not listed and algbw >= 1 and 2 - busbw / algbw > 2 / _MOST_TOLD:
        implied = _fitting(path, rows, row, named)
    elif not listed and len(named) == 1 and fits(rows, min(named)):
        implied = min(named)
    num = listed or implied
    if num is None:
        problem = "has no device list ('# Rank 0 …'), so the number of GPUs is unknown"
        raise FileFormatError(path, problem, line=row.line, hint=_KEEP)
    hosts = len({host for host, _ in section.ranks.values()}) if _names_tell(section) else 0
    if whole and hosts:
        return num, hosts
    nodes = section.num_nodes or launched_nodes(section, num)
    return num, nodes if nodes is None or nodes >= hosts else None  # a line that launched something else


def _check_list(path: Path, section: Section, rows: list[Row], listed: int, whole: bool) -> None:
    """Refuse a list of ranks whose end is missing, as far as anything else in the log tells.

    A bandwidth of less than 1 GB/s, of which two digits are printed, fits several numbers. Where nothing tells and
    some hosts have fewer ranks than others, a `UserWarning` says so.

    Raises:
        FileFormatError: says what tells of more ranks.
    """
    each = gpus_per_process(section)
    hosts = Counter(host for _, (host, _) in sorted(section.ranks.items()))
    most = max(hosts.values())
    told = dict(told_gpus(section, len(hosts)))
    nodes = max(told_nodes(section), default=0) if _names_tell(section) else 0
    more = {
        -(-listed // each) * each: f"its processes have {each} GPUs each",
        section.processes * each: f"{section.processes} processes wrote into it",
    } | ({} if listed in told else told)
    why = next((why for num, why in more.items() if num > listed and fits(rows, num)), None)
    if not fits(rows, listed, by_hand=True):
        why = f"its bandwidths are not those of {listed} GPUs"
    elif nodes > len(hosts) and any(
        fits(rows, num) for num in range(listed + 1, min(nodes * max(most, FULL_NODE), _MOST_TOLD) + 1)
    ):
        why = why or f"the line that launched it names {nodes} nodes"
    if why is not None:
        raise FileFormatError(path, f"lists {listed} of its ranks, but {why}", line=section.line, hint=_KEEP_ALL)
    *others, last = hosts.values()
    if whole and (min(others, default=most) < most or (last < most and listed not in told)):
        warnings.warn(
            f"{path}: its hosts have {min(hosts.values())} to {most} ranks each: if lines of the list are missing, "
            "there were more GPUs, and if a name is damaged, fewer nodes",
            stacklevel=4,
        )


def _fitting(path: Path, rows: list[Row], best: Row, named: set[int]) -> int:
    """The number of GPUs that all bandwidths allow, or of several the one that the log names.

    Raises:
        FileFormatError: they allow several, or none.
    """
    ratio = best.times.busbw / best.times.algbw
    near = round(2 / (2 - ratio))
    possible = range(max(2, near // 2), 2 * near + 1)
    found = [num for num in possible if fits(rows, num)]
    found = found or [num for num in possible if fits(rows, num, by_hand=True)]
    if not found and any(agrees(num, best.times.algbw, best.times.busbw) for num in possible):
        problem = "has rows whose bandwidths are of different numbers of GPUs, or a damaged one"
        raise FileFormatError(path, problem, line=best.line, hint="keep the rows of one run")
    if not found:
        problem = f"has a bus bandwidth of {ratio:.4g} times the algorithm bandwidth, which no all-reduce has"
        raise FileFormatError(path, problem, line=best.line)
    told = named.intersection(found)
    if len(found) > 1 and len(told) != 1:
        problem = f"has no device list ('# Rank 0 …'), and its bandwidths fit {found[0]} to {found[-1]} GPUs"
        raise FileFormatError(path, problem, line=best.line, hint=_KEEP)
    return min(told or found)


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


def hosts_may_share(section: Section, num_gpus: int, num_nodes: int | None) -> bool:
    """Whether some of the hosts that count as nodes may be containers of one machine, and no launcher says otherwise.

    Equal machines number their buses alike, so hosts without a bus number in common may have parts of one.
    """
    buses: dict[str, set[str]] = {}
    for host, _, bus in section.places.values():
        buses.setdefault(host, set()).add(bus)
    if len(buses) != num_nodes or launched_nodes(section, num_gpus) == num_nodes:
        return False
    kinds = set(map(frozenset, buses.values()))
    return any(one.isdisjoint(other) for one, other in itertools.combinations(kinds, 2))
