"""What does the line that launched a test say of its processes and nodes?"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from ptsim.hardware.nccl_log.bandwidths import implied_ranks
from ptsim.hardware.nccl_log.section import PROGRAM, Section

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
FULL_NODE = 8  # GPUs of a node: hardly a machine has twice as many


def launched_nodes(section: Section, num_gpus: int) -> int | None:
    """Nodes of a run without a device list, from the line that launched it; None where nothing tells."""
    per_process = gpus_per_process(section)
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


def told_gpus(section: Section, num_hosts: int) -> Iterator[tuple[int, str]]:
    """Numbers of GPUs that NCCL or the line that launched the run names, and which of them does.

    So many hosts ran; processes on each of an unknown number, 0, name none.
    """
    yield from ((num, f"NCCL counts {num}") for num in sorted(section.counted))
    each = gpus_per_process(section)
    for line, _ in _commands(section) if section.launched is None else ():
        slurm = re.search(r"\bsrun\b(.*)", line)
        if started := _STARTED.search(line) or (_TASKS.search(slurm[1]) if slurm else None):
            yield int(started[1]) * each, f"the line that launched it starts {started[1]} processes"
        elif num_hosts:
            for text in (text for what, text in _given(line) if what == "ranks"):
                yield int(text) * num_hosts * each, f"the line that launched it starts {text} processes on each node"


def told_nodes(section: Section) -> Iterator[int]:
    """Numbers of nodes that the line that launched the run names, and not a job's, which may have more."""
    for line, _ in _commands(section) if section.launched is None else ():
        if not _JOB.match(line):
            yield from (int(text) for what, text in _given(line) if what == "nodes")


def gpus_per_process(section: Section) -> int:
    """GPUs of each process: nThread times nGpus of the header, else of the options -t and -g."""
    if section.header:
        return int(section.header[1]) * int(section.header[2]) or 1
    numbers = {math.prod(map(int, _PER_PROCESS.findall(options))) for _, options in _commands(section)}
    return (numbers.pop() if len(numbers) == 1 else 1) or 1


def _commands(section: Section) -> list[tuple[str, str]]:
    """The lines that launched the test by its name: what stands before the name, and its own options behind it."""
    split = (PROGRAM.split(line, maxsplit=1) for line in section.launch.splitlines())
    return [(parts[0], parts[2]) for parts in split if len(parts) > 1]


def _given(line: str) -> list[tuple[str, str]]:
    """What a launcher's options say: "nodes", "ranks" on each, or "hosts", and the text of each."""
    slurm = re.search(r"\b(?:srun|sbatch|salloc)\b|#SBATCH", line) is not None
    of_n = "nodes" if slurm else "ranks"
    return [(of_n if what == "N" else what, match[1]) for pattern, what in _NODES for match in pattern.finditer(line)]


def _fills_job(lines: Sequence[str], num_nodes: int, num_gpus: int, per_process: int) -> bool:
    """Whether a run is on all nodes of its Slurm job: mpirun may start fewer processes than these have room for.

    That is known where the job has as many tasks or GPUs as the run, where its nodes are full, of srun, and of mpirun
    without a number.
    """
    if num_gpus >= FULL_NODE * num_nodes or not any(_STARTED.search(line) for line in lines):
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
    return len(section.ranks) or implied_ranks(best.algbw, best.busbw)
