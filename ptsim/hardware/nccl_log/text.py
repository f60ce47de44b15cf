"""The lines of a text log as sections: one a test, from its header to its trailer.

Between them stand launcher noise, prefixes ("[1,0]<stdout>:", "0: ", time stamps), rows that NCCL's messages cut in
two, and the marks that a web page adds or takes away.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from ptsim.errors import FileFormatError
from ptsim.hardware.nccl_log.section import ELEMENT_BYTES, FORCED, PROGRAM, Row, Section, Times

# "[1,0]<stdout>:" of Open MPI, "[1,mpirank:0,algo-1]<stdout>:" of SageMaker, "[0]" of Hydra: once for each piece that
# the process wrote, also in the middle of a row
_LAUNCHER = re.compile(r"\[[^\[\]\s]{1,100}\]<std(?:out|err)>:?|\[\d{1,9}\]")
_PROCESS = re.compile(r"[\[@]\d{1,6},(\d{1,6})\]<std")  # its number, as Open MPI tags its lines
_COUNTED = re.compile(r"\bnRanks (\d{1,6}) nNodes\b|\bnranks (\d{1,6})\b.*\bInit COMPLETE\b")  # by NCCL
_RANK = re.compile(
    r"\bRank\s+(\d{1,6})\s+(?:Group\s+(\d+)\s+)?(?:Pid\s+\d+\s+)?on\s+(\S+)\s+device\s+(\d+)\s+\[([^\]]*)\]\s*(.*)"
)
_SHORTENED = re.compile(r"\bRank\s+\d+ .*\.\.\.$")  # where nccl-tests has cut the list of a process short
_HEADER = re.compile(  # with colons and ranks of a GPU in rccl-tests until 2023
    r"\bnThreads?:?\s+(\d{1,6})\s+nGpus:?\s+(\d{1,6})\s+(?:nRanks:?\s+\d{1,6}\s+)?"
    r"minBytes:?\s+(\d{1,18})\s+maxBytes:?\s+(\d{1,18})(?:\s+step:\s*(\d{1,18})\((factor|bytes)\))?"
)
_AGGREGATED = re.compile(r"\bagg iters:\s*(\d{1,6})")
_GRAPH = re.compile(r"\bgraph:\s*(\d{1,6})")
_COLD = re.compile(r"\bwarmup ?[iI]ters:\s*0\b")
_VERSION = re.compile(r"nccl-library=(\d+)|[NR]CCL version(?: :)? (\S+)|compiled with NCCL (\S+)")
_BLOCKING = "Blocking Enabled:"
_FAILED = re.compile(r"\bTest (?:NCCL |CUDA )?failure\b")  # "node: Test NCCL failure common.cu:958 'unhandled …'"
_DEVICES = re.compile(r"\bUsing devices\b")
_TEST = re.compile(r"\bCollective test (starting|concluded):\s*(\S+)")
_TRAILER = re.compile(r"\b(?:Out of bounds values|Avg bus bandwidth)\s*:\s*(\S+)")
_COLUMNS = re.compile(r"\b(size|bytes)\s+(?:count|N)\s+type\s.*busbw")
_TYPES = "|".join(names for _, names in ELEMENT_BYTES)
_ROW = re.compile(
    rf"(?:^|.*[\s>:\]`])(\d{{1,18}})\s+(\d{{1,18}})\s+({_TYPES})\s+(.*\S)"
)  # whatever a launcher puts in front
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_LAUNCH = re.compile(
    r"\b(?:mpirun|mpiexec|orterun|prun|srun|sbatch|salloc)\b|#SBATCH|\bppr:\d+:node|\bnNodes \d|\bNCCL_HOSTID\b"
)
_BOTH = (8, 16)  # numbers of a row that has times out of place and in place, without and with those of iterations
_LARGEST = 1e18
_LONGEST_LINE = 2000  # characters; no row has more, and patterns would search the rest for long
# "host:pid:thread [gpu] file:line NCCL WARN", with the day in front or without; a host that starts with a digit starts
# a line, since a number may stand right in front of one that starts with a letter
_HOST = r"(?:(?:^\s*|(?<=[:>\]]))\d(?=[^\s:]*[A-Za-z.])|[A-Za-z])[^\s:]*"
_MESSAGE = re.compile(
    rf"(?:\[\d{{4}}-[^\[\]]{{5,40}}\] ?)?{_HOST}:\d+:\d+ \[\d+\][^\[\]]{{0,200}}?\bNCCL\b"
    r"|[NR]CCL (?:INFO|WARN|TRACE|version)"
)
# a reduction with a message right behind it: before version 2.13 no column stood between
_GLUED = re.compile(rf"(\s(?:{_TYPES})\s+(?:sum|prod|min|max|avg))(?=[^\s:]+:\d+:\d+ \[)")


def read_sections(path: Path, text: str) -> list[Section]:
    """The sections of a text log, in its order; the first may be empty.

    Raises:
        FileFormatError: a row is cut off, or the output of several ranks is mixed.
    """
    reader = _Reader(path)
    for number, line in _whole_rows(text):
        reader.read(number, line)
        if line.strip():
            reader.current.last_line = number
    for before, section in itertools.pairwise(reader.sections):
        section.version = section.version or before.version
    return reader.sections


def holds_rows(text: str) -> bool:
    """Whether a line of the text is a row of a table."""
    return any(_ROW.fullmatch(line[:_LONGEST_LINE]) for line in text.splitlines())


class _Reader:
    """Sorts lines into sections."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sections = [Section(1, None)]
        self.name: str | None = None  # of the run to come, as what follows
        self.launch = ""
        self.goes_on = False  # the line that launches it, in the next one
        self.forced: dict[str, str] = {}
        self.version: str | None = None
        self.again: int | None = None  # line of the same names of columns between rows, until the next row

    @property
    def current(self) -> Section:
        return self.sections[-1]

    def begin(self, line: int) -> None:
        before = self.current
        self.sections.append(Section(line, self.name))
        self.current.launch = self.launch or before.launch
        self.current.launched = None if self.launch else before.launched or before
        self.current.version = self.version
        self.current.forced = self.forced if self.launch or self.forced else dict(before.forced)
        self.name, self.launch, self.version, self.forced, self.again = None, "", None, {}, None

    def read(self, number: int, line: str) -> None:
        current = self.current
        self.read_surroundings(line)
        if test := _TEST.search(line):
            known = test[1] == "starting" and "_perf" in test[2]  # a renamed program is judged by its rows
            self.name = test[2] if known else None
            if self.name and (current.rows or current.ranks):
                self.begin(number)
            elif self.name:
                current.name, self.name = self.name, None
        elif header := _HEADER.search(line):
            self.read_header(number, header)
        elif _BLOCKING in line:
            current.blocking = True
        elif _DEVICES.search(line) and current.ended:
            self.begin(number)  # a second run whose first line was not copied
        elif _SHORTENED.search(line):
            current.shortened = not current.ended
        elif rank := _RANK.search(line):
            if current.ended:
                self.begin(number)
            place = (rank[3], rank[4], rank[5])
            if self.current.places.setdefault(int(rank[1]), place) != place:
                self.refuse(number, f"rank {rank[1]} is listed twice: the output of several runs is mixed")
            self.current.ranks[int(rank[1])] = (rank[3], rank[6].strip())
            self.current.groups.add(rank[2] or "0")
        elif columns := _COLUMNS.search(line):
            names = line[columns.start() :].split()
            if names == current.columns and current.rows and not (current.ended or self.launch or self.name):
                self.again = number  # of the next page, unless the sizes start again
                return
            if current.ended or current.rows:
                self.begin(number)
            self.current.columns = names
            self.current.unit_s = 1e-3 if columns[1] == "bytes" else 1e-6  # before version 2: milliseconds
            if "cputime" in line:
                self.refuse(number, "has CPU times, expected the times of the collective")
        elif trailer := _TRAILER.search(line):
            current.ended = True
            if "bounds" in line and trailer[1] != "0":
                self.refuse(number, f"{trailer[1]} results were out of bounds: the run is wrong")
        elif match := _ROW.fullmatch(line):
            again, self.again = self.again, None
            if current.rows and (current.ended or (again and int(match[1]) <= current.rows[-1].size)):
                self.begin(again or number)
                if again:
                    self.current.columns, self.current.unit_s = current.columns, current.unit_s
            try:
                self.current.rows.append(_row(self.path, number, match))
            except FileFormatError as error:
                self.current.problem = self.current.problem or error
        elif _FAILED.search(line):
            current.failed = not current.ended
        elif program := PROGRAM.search(line):
            if current.ended or current.rows:
                self.name = program[1]
            elif current.header is None:
                current.name = program[1]

    def read_surroundings(self, line: str) -> None:
        """What a line says of the run that it stands before: how it was launched, and NCCL's version."""
        current = self.current
        to_come = current.ended or bool(current.rows)
        if not to_come and (process := _PROCESS.search(line)):
            current.processes = max(current.processes, int(process[1]) + 1)
        if not to_come and (counted := _COUNTED.search(line)):
            current.counted.add(int(counted[1] or counted[2]))
        if (self.goes_on or _LAUNCH.search(line)) and not _RANK.search(line):
            self.goes_on = line.rstrip().endswith("\\")
            part = f"{line.rstrip()[:-1]} " if self.goes_on else f"{line}\n"
            if to_come:
                self.launch += part
            else:
                current.launch += part
        for setting in FORCED.finditer(line):
            (self.forced if to_come else current.forced)[setting[1]] = setting[2]
        if found := _VERSION.search(line):
            version = next(name for name in found.groups() if name)
            if to_come:
                self.version = self.version or version
            else:
                current.version = current.version or version

    def refuse(self, line: int, problem: str) -> None:
        """Note what is wrong with this test; of another collective than an all-reduce it is no matter."""
        error = FileFormatError(self.path, problem, line=line)
        self.current.problem = self.current.problem or error

    def read_header(self, number: int, header: re.Match[str]) -> None:
        stopped = self.current.failed or (
            self.name is not None and "all_reduce" not in (self.current.name or "all_reduce")
        )
        if self.current.header is not None and not self.current.ended and not stopped:
            raise FileFormatError(
                self.path,
                "a second test starts before the first has ended: the output of several ranks is mixed",
                line=number,
                hint="build nccl-tests with MPI=1, so that only rank 0 prints, or keep one rank's output",
            )
        if self.current.ended or self.current.rows or stopped:
            self.begin(number)  # "stopped": it failed, or another collective broke off and the next program was started
        self.current.header = header
        if found := _AGGREGATED.search(header.string):
            self.current.aggregated = int(found[1])
        if found := _GRAPH.search(header.string):
            self.current.graph = int(found[1])
        self.current.cold = _COLD.search(header.string) is not None


def _whole_rows(text: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers; a row that NCCL's messages or the width of a page cut in two is one line again."""
    cut: tuple[int, str] | None = None
    by_message, prefix = False, ""  # of the row, which a launcher puts in front of its second half, too
    for number, line in enumerate(text.splitlines(), start=1):
        line = _GLUED.sub(r"\1 ", line[:_LONGEST_LINE])
        message = _MESSAGE.search(line)
        piece = _LAUNCHER.sub(" ", line[: message.start()] if message else line).rstrip()
        words = piece.split()
        of_prefix = len(prefix.split())
        rest = words[of_prefix:] if _without_digits(" ".join(words[:of_prefix])) == prefix else words
        if cut and rest and all(map(_is_number, rest)):
            joined = f"{cut[1]} {' '.join(rest)}"
            if by_message or _num_values(joined) in _BOTH:
                cut = (cut[0], joined)
                continue
        row = _ROW.match(piece)
        if cut and (row or words):
            yield cut
            cut = None
        if row and (message or _num_values(piece) < min(_BOTH)):
            cut, by_message = (number, piece), message is not None
            prefix = _without_digits(" ".join(piece[: row.start(1)].split()))
        else:
            yield number, piece if row else line
    if cut:
        yield cut


def _without_digits(text: str) -> str:
    """The form of a prefix, whose time differs from line to line."""
    return re.sub(r"\d", "0", text)


def _is_number(word: str) -> bool:
    return word == "N/A" or _NUMBER.fullmatch(word) is not None


def _num_values(row: str) -> int:
    """How many numbers a row has behind its type, reduction and root, if nothing else follows them."""
    match = _ROW.match(row)
    words = match[4].split() if match else []
    words = words[1:] if words and not _is_number(words[0]) else words
    return len(words) - (words[:1] == ["-1"]) if all(map(_is_number, words)) else max(_BOTH)


def _row(path: Path, number: int, match: re.Match[str]) -> Row:
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
    rounding = any("e" in word for word in words[: len(values)])  # the old format's errors: "0e+00", no counts
    root = None
    if values and (len(values) % 4 == 1 or words[0] == "-1"):
        root = int(float(values.pop(0) or 0))
    if len(values) == 11 and values[8:] == [None] * 3:
        del values[8:]  # rccl-tests -A 1: algorithm, protocol and channels of what has none
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
        if len(group) > 3 and group[3] is not None and (root is not None or not rounding):
            wrong += int(group[3])
    if not any(times):
        raise FileFormatError(path, f"row of {match[1]} bytes has no time", line=number)
    first, second = (*times, None)[:2]
    half_checked = len(times) == 2 and values[3] is not None and values[width + 3] is None
    counts = (int(match[1]), int(match[2]), match[3], redop, root)
    return Row(number, *counts, first, second, wrong, len(times), half_checked)


def _finite(path: Path, line: int, word: str) -> float:
    value = float(word)
    if not abs(value) <= _LARGEST:
        raise FileFormatError(path, f"found the number {word[:20]}, which no time, size or rate has", line=line)
    return value
