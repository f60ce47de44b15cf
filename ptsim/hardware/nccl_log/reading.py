"""Reads a log of nccl-tests: old and new text, JSON, and the JSON and CSV of rccl-tests."""

from __future__ import annotations

import warnings
from pathlib import Path

from ptsim.errors import FileFormatError
from ptsim.hardware.nccl_log.document import read_document
from ptsim.hardware.nccl_log.rccl_file import is_record_file, read_records
from ptsim.hardware.nccl_log.record import NcclLog
from ptsim.hardware.nccl_log.runs import collective, logs_of
from ptsim.hardware.nccl_log.section import Section
from ptsim.hardware.nccl_log.text import holds_rows, read_sections
from ptsim.loglines import unwrapped
from ptsim.textfile import decode_text, read_bytes, unpacked

_MOST_BYTES = 64 * 2**20


def read_nccl_logs(path: str | Path) -> tuple[NcclLog, ...]:
    """The all-reduce runs in the nccl-tests log at `path`, in its order, one for each cycle of `-N`; at least one.

    The number of nodes comes from the list of devices, else from the line that launched the run, and is None where
    neither is there (`with_nodes`). Rows without anything around them are taken with a `UserWarning`.

    Raises:
        FileFormatError: not an nccl-tests log, another collective, truncated, mixed output of several ranks, wrong
            results, a single GPU, or no measurement; says file and line.
    """
    path = Path(path)
    text = decode_text(unpacked(path, read_bytes(path, most=_MOST_BYTES), most=_MOST_BYTES))
    if not text.strip():
        raise FileFormatError(path, "is empty, expected the output of nccl-tests' all_reduce_perf")
    if is_record_file(text):
        return read_records(path, text)
    lines = unwrapped(text)
    if lines.lstrip()[:1] == "{" and not holds_rows(lines):  # programs print such things in front of a table, too
        return read_document(path, text)
    return _read_text(path, lines)


def read_nccl_log(path: str | Path) -> NcclLog:
    """The one all-reduce run in the nccl-tests log at `path`.

    Raises:
        FileFormatError: as `read_nccl_logs`, or several runs.
    """
    logs = read_nccl_logs(path)
    if len(logs) > 1:
        raise FileFormatError(Path(path), f"holds {len(logs)} all-reduce runs, expected one")
    return logs[0]


def _without_failed(path: Path, sections: list[Section]) -> list[Section]:
    """The sections without those of runs that failed, of which a `UserWarning` tells, where others were tried after."""
    kept = [section for section in sections if not section.failed]
    if len(kept) == len(sections) or not any(section.rows for section in kept):
        return sections
    failed = ", ".join(str(section.line) for section in sections if section.failed)
    warnings.warn(f"{path}: runs that failed are left out (they begin in line {failed})", stacklevel=4)
    return kept


def _read_text(path: Path, text: str) -> tuple[NcclLog, ...]:
    sections = _without_failed(path, read_sections(path, text))
    for section in sections:
        if section.problem and not section.rows and "all_reduce" in (section.name or "all_reduce"):
            raise section.problem
    if not any(section.rows for section in sections):
        expected = "rows of nccl-tests' all_reduce_perf ('size count type redop … time algbw busbw')"
        raise FileFormatError(path, f"no measurement found, expected {expected}")
    wanted: list[tuple[Section, str]] = []
    others: list[tuple[Section, str]] = []
    for section in sections:
        if section.rows:
            name = collective(section)
            (wanted if "all_reduce" in name else others).append((section, name))
    if not wanted:
        section, name = others[0]
        raise FileFormatError(path, f"holds {name}, expected all_reduce_perf", line=section.rows[0].line)
    return tuple(log for section, _ in wanted for log in logs_of(path, section))
