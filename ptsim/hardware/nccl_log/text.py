"""The lines of a text log as sections: one a test, from its header to its trailer.

Between them stand launcher noise, prefixes ("[1,0]<stdout>:", "0: ", time stamps), rows that NCCL's messages cut in
two, and the marks that a web page adds or takes away.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ptsim.errors import FileFormatError
from ptsim.hardware.nccl_log.section import ELEMENT_BYTES, Row, Section, Times

# "[1,0]<stdout>:" of Open MPI, "[0]" of Hydra: once for each piece that the process wrote, also in the middle of a row
_LAUNCHER = re.compile(r"\[[^\[\]\s]{0,80}\d,\d{1,9}\]<std(?:out|err)>:?|\[\d{1,9}\]")
_RANK = re.compile(
    r"\bRank\s+(\d{1,6})\s+(?:Group\s+(\d+)\s+)?(?:Pid\s+\d+\s+)?on\s+(\S+)\s+device\s+(\d+)\s+\[([^\]]*)\]\s+(.*\S)"
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
_TYPES = "|".join(names for _, names in ELEMENT_BYTES)
_ROW = re.compile(
    rf"(?:^|.*[\s>:\]])(\d{{1,18}})\s+(\d{{1,18}})\s+({_TYPES})\s+(.*\S)"
)  # whatever a launcher puts in front
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_LAUNCH = re.compile(r"\b(?:mpirun|mpiexec|orterun|prun|srun|sbatch|salloc)\b|#SBATCH|\b\d+ nodes?\b|\bppr:\d+:node")
_LARGEST = 1e18
_LONGEST_LINE = 2000  # characters; no row has more, and patterns would search the rest for long
_MESSAGE = re.compile(r"[A-Za-z][^\s:]*:\d+:\d+ \[\d+\]|NCCL (?:INFO|WARN|TRACE|version)")


def read_sections(path: Path, text: str) -> list[Section]:
    """The sections of a text log, in its order; the first may be empty.

    Raises:
        FileFormatError: a row is cut off, results were wrong, or the output of several ranks is mixed.
    """
    reader = _Reader(path)
    for number, line in _whole_rows(text):
        reader.read(number, line)
        if line.strip():
            reader.current.last_line = number
    return reader.sections


class _Reader:
    """Sorts lines into sections."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sections = [Section(1, None)]
        self.name: str | None = None  # of the program that runs
        self.launch = ""  # of the run to come

    @property
    def current(self) -> Section:
        return self.sections[-1]

    def begin(self, line: int) -> None:
        launch, self.launch = self.launch or self.current.launch, ""
        self.sections.append(Section(line, self.name))
        self.current.launch = launch

    def read(self, number: int, line: str) -> None:
        current = self.current
        if _LAUNCH.search(line) and not _RANK.search(line):
            if current.ended or current.rows:
                self.launch += f"{line}\n"
            else:
                current.launch += f"{line}\n"
        if test := _TEST.search(line):
            self.name = test[2] if test[1] == "starting" else None
            if self.name and (current.rows or current.ranks):
                self.begin(number)
            else:
                current.name = self.name or current.name
        elif header := _HEADER.search(line):
            self.read_header(number, header)
        elif _DEVICES.search(line) and current.ended:
            self.begin(number)  # a second run whose first line was not copied
        elif rank := _RANK.search(line):
            if current.ended:
                self.begin(number)
            self.current.ranks[int(rank[1])] = (rank[3], rank[6])
            self.current.places[int(rank[1])] = (rank[3], rank[4], rank[5])
            self.current.groups.add(rank[2] or "0")
        elif columns := _COLUMNS.search(line):
            if "cputime" in line:
                raise FileFormatError(self.path, "has CPU times, expected the times of the collective", line=number)
            current.unit_s = 1e-3 if columns[1] == "bytes" else 1e-6  # before version 2: milliseconds
        elif trailer := _TRAILER.search(line):
            current.ended = True
            if "bounds" in line and trailer[1] != "0":
                problem = f"{trailer[1]} results were out of bounds: the run is wrong"
                raise FileFormatError(self.path, problem, line=number)
        elif row := _row(self.path, number, line):
            if current.ended and current.rows:
                self.begin(number)
            self.current.rows.append(row)
        elif program := _PROGRAM.search(line):
            self.name = program[1]
            if not current.ended and not current.rows:
                current.name = current.name or self.name

    def read_header(self, number: int, header: re.Match[str]) -> None:
        if self.current.header is not None and not self.current.ended:
            raise FileFormatError(
                self.path,
                "a second test starts before the first has ended: the output of several ranks is mixed",
                line=number,
                hint="build nccl-tests with MPI=1, so that only rank 0 prints, or keep one rank's output",
            )
        if self.current.ended or self.current.rows:
            self.begin(number)
        self.current.header = header


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


def _row(path: Path, number: int, line: str) -> Row | None:
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
    times: list[Times | None] = []
    wrong = 0
    for group in (values[i : i + width] for i in range(0, len(values), width)):
        taken, algbw, busbw = group[:3]
        measured = taken is not None and algbw is not None and busbw is not None
        times.append(Times(taken, algbw, busbw) if measured else None)  # type: ignore[arg-type] # none is None
        if len(group) > 3 and group[3] is not None and root is not None:
            wrong += int(group[3])  # the old format's last column is a rounding error, not a count
    if not any(times):
        raise FileFormatError(path, f"row of {match[1]} bytes has no time", line=number)
    first, second = (*times, None)[:2]
    return Row(number, int(match[1]), int(match[2]), match[3], redop, root, first, second, wrong, len(times))


def _finite(path: Path, line: int, word: str) -> float:
    value = float(word)
    if not abs(value) <= _LARGEST:
        raise FileFormatError(path, f"found the number {word[:20]}, which no time, size or rate has", line=line)
    return value
