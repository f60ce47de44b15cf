"""One test of a log, as lines or a document say it: its rows, its ranks and what stood around them."""

from __future__ import annotations

import re

import msgspec

from ptsim.errors import FileFormatError

ELEMENT_BYTES = (
    (8, "u?int64|float64|double"),
    (4, "u?int32|int|float32|float"),
    (2, "half|float16|bfloat16|bf16"),
    (1, "u?int8|char|fp8(?:_e4m3|_e5m2)?|f8e4m3|f8e5m2|float8_e4m3|float8_e5m2"),
)
PROGRAM = re.compile(
    r"\b((?:all_reduce|all_gather|reduce_scatter|alltoallv?|broadcast|reduce|sendrecv|gather|scatter|hypercube)"
    r"_perf(?:_mpi)?)\b"
)
FORCED = re.compile(r"\b(NCCL_ALGO|NCCL_PROTO)(?:=| set by environment to )['\"]?([\w,;:^]*\w)")


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
