"""The JSON or CSV that rccl-tests writes with `-Z json` or `-Z csv` (2024 and newer), as a section.

A record is one size, out of place or in place; the first versions wrote JSON as an object a line, later ones as a list.
The file names no devices, and its number of nodes is that of the processes over those that reduce together: 1 on
however many nodes.

Source: github.com/ROCm/rccl-tests, src/common.cu, class Reporter.
"""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import Any

import msgspec

from ptsim.errors import FileFormatError
from ptsim.hardware.nccl_log.bandwidths import bus_factor
from ptsim.hardware.nccl_log.record import NcclLog
from ptsim.hardware.nccl_log.runs import check_all_reduce, logs_of
from ptsim.hardware.nccl_log.section import Row, Section, Times
from ptsim.textfile import decode_json

_FIELDS = [re.compile(rf'\b{name}"?\s*[:,]') for name in ("inplace", "algbw")]  # of every record, in any order
_RATIO_OFF = 0.003  # by which busbw / algbw may differ from that of the ranks
_ROUNDED = 1e-6  # GB/s, by which a written bandwidth may be off
_RENAMED = {"name": "collective", "#wrong": "wrong"}  # in JSON, and in CSV
_JSON_DECODER = msgspec.json.Decoder(list[dict[str, Any]])


class _Record(msgspec.Struct):
    collective: str
    size: int
    inplace: int
    time: float
    algbw: float
    busbw: float
    numcycle: int = 0
    type: str = "float"
    redop: str = "sum"
    nodes: int = 1
    ranks: int = 1  # processes
    gpusperrank: int = 1
    gpus: int = 1  # of the one process, where it was built without MPI
    wrong: int | str = "N/A"  # where nothing was checked

    @property
    def num_gpus(self) -> int:
        return self.ranks * self.gpusperrank * self.gpus


def is_record_file(text: str) -> bool:
    """Whether the text begins as these files do."""
    begin = text[:1000].lower()
    return all(field.search(begin) for field in _FIELDS)


def read_records(path: Path, text: str) -> tuple[NcclLog, ...]:
    """The all-reduce runs in the file, one for each cycle of `-N`.

    Raises:
        FileFormatError: a broken record, another collective, or groups of GPUs that reduced at the same time.
    """
    records = [_record(path, i, fields) for i, fields in enumerate(_fields(path, text), start=1)]
    if not records:
        raise FileFormatError(path, "holds no record of rccl-tests' all_reduce_perf")
    first = records[0]
    for what in ("collective", "num_gpus", "nodes"):
        values = dict.fromkeys(getattr(record, what) for record in records)
        if len(values) > 1:
            raise FileFormatError(path, f"is of several runs: {what} is {' and '.join(map(str, values))}")
    if "allreduce" not in first.collective.lower():
        raise FileFormatError(path, f"holds {first.collective}, expected all_reduce_perf")
    _check_one_group(path, records)
    section = Section(1, "all_reduce_perf")
    section.ended = True
    section.num_gpus = first.num_gpus
    section.num_nodes = 1 if first.ranks == 1 else first.nodes if first.nodes > 1 else None
    section.rows = _rows(path, records)
    check_all_reduce(path, section)
    return tuple(logs_of(path, section))


def _fields(path: Path, text: str) -> list[dict[str, Any]]:
    """The fields of every record, under their names in lower case."""
    lines = [line for line in text.splitlines() if line.strip()]
    if text.lstrip().startswith("["):
        found = decode_json(path, text, _JSON_DECODER, what="the JSON output of rccl-tests")
    elif text.lstrip().startswith("{"):
        found = decode_json(path, f"[{','.join(lines)}]", _JSON_DECODER, what="the JSON output of rccl-tests")
    else:
        try:
            names, *rows = csv.reader(lines, skipinitialspace=True)
        except csv.Error as error:
            raise FileFormatError(path, f"not the CSV output of rccl-tests: {error}") from error
        found = [dict(zip(names, row, strict=False)) for row in rows]  # what is missing is said below
    return [{_RENAMED.get(key := name.strip().lower(), key): value for name, value in one.items()} for one in found]


def _record(path: Path, number: int, fields: dict[str, Any]) -> _Record:
    try:
        record = msgspec.convert(fields, _Record, strict=False)
    except msgspec.ValidationError as error:
        raise FileFormatError(path, f"record {number}: {error}") from error
    if not all(map(math.isfinite, (record.time, record.algbw, record.busbw))) or record.num_gpus < 1:
        raise FileFormatError(path, f"record {number} has a time, a rate or a number of GPUs that none can be")
    return record


def _check_one_group(path: Path, records: list[_Record]) -> None:
    """Refuse all-reduces in groups: the file counts the GPUs of all groups, its bandwidths those of one."""
    best = max(records, key=lambda record: record.algbw)
    factor = bus_factor(best.num_gpus)
    if abs(best.busbw - factor * best.algbw) > _RATIO_OFF * best.algbw + 3 * _ROUNDED:
        raise FileFormatError(
            path,
            f"names {best.num_gpus} GPUs, whose bus bandwidth is {factor:.4g} times the algorithm bandwidth, but has "
            f"{best.busbw:g} beside {best.algbw:g} GB/s: groups of them reduced at the same time",
        )


def _rows(path: Path, records: list[_Record]) -> list[Row]:
    """A row for each cycle, type, reduction and size, in the file's order."""
    halves: dict[tuple[int, str, str, int], dict[bool, tuple[int, _Record]]] = {}
    for number, record in enumerate(records, start=1):
        key = (record.numcycle, record.type, record.redop, record.size)
        row = halves.setdefault(key, {})
        if bool(record.inplace) in row:
            raise FileFormatError(path, f"record {number}: {record.size} bytes are there twice: files of several runs")
        row[bool(record.inplace)] = (number, record)
    found: list[Row] = []
    for (_, kind, redop, size), row in halves.items():
        line = next(iter(row.values()))[0]
        times = {place: Times(record.time, record.algbw, record.busbw) for place, (_, record) in row.items()}
        wrong = sum(_num_wrong(path, *half) for half in row.values())
        numbers = (size, None, kind, redop, -1)
        found.append(Row(line, *numbers, times.get(False), times.get(True), wrong, len(row), half_checked=False))
    return found


def _num_wrong(path: Path, number: int, record: _Record) -> int:
    if record.wrong == "N/A":
        return 0
    try:
        return int(record.wrong)
    except ValueError as error:
        raise FileFormatError(path, f"record {number} has {record.wrong!r} wrong results, expected a number") from error
