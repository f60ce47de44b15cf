"""What did an MLPerf training run measure? Its `:::MLLOG` lines, as seconds of an epoch and images per second.

Source of the format: github.com/mlcommons/logging, mlperf_logging/mllog (version 1.0 and later).
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

import msgspec

from ptsim.errors import FileFormatError
from ptsim.textfile import decode_json, read_bytes

_MARK = ":::MLLOG"
_NODES = re.compile(r"\s*(\d+)\s*x", re.IGNORECASE)  # "4xNVIDIA DGX A100"


class MlperfRun(msgspec.Struct, frozen=True, kw_only=True):
    """One run as its log tells it.

    Attributes:
        benchmark: MLPerf's name of it, such as "resnet"; None where the log does not say.
        platform: as the submitter names it.
        num_nodes: where the platform's name begins with it.
        global_batch: images of one step on all accelerators together.
        train_samples: images of an epoch.
        optimizer: in lower case; None where the log does not say.
        epoch_seconds: median of an epoch's training, without evaluation; the first epoch is left out where there are
            others.
        num_epochs: that were timed.
    """

    benchmark: str | None
    platform: str | None
    num_nodes: int | None
    global_batch: int
    train_samples: int
    optimizer: str | None
    epoch_seconds: float
    num_epochs: int

    @property
    def images_per_second(self) -> float:
        """Of all accelerators together."""
        return self.train_samples / self.epoch_seconds

    @property
    def step_seconds(self) -> float:
        """Of one global mini-batch."""
        return self.global_batch / self.images_per_second


class _Line(msgspec.Struct):
    key: str
    time_ms: float
    value: Any = None
    metadata: dict[str, Any] = {}


_DECODER = msgspec.json.Decoder(_Line)


def read_mllog(path: str | Path) -> MlperfRun:
    """Read the `:::MLLOG` lines of a result file; other lines are skipped.

    Raises:
        FileFormatError: the file cannot be read, holds no such line or a broken one, or lacks the global mini-batch,
            the number of training samples or a whole epoch.
    """
    path = Path(path)
    text = read_bytes(path).decode("utf-8", errors="replace")
    lines = [_line(path, number, line) for number, line in enumerate(text.splitlines(), 1) if _MARK in line]
    if not lines:
        raise FileFormatError(path, f"holds no {_MARK} line; expected the result file of an MLPerf training run")
    values = {line.key: line.value for line in lines if line.value is not None}
    epochs = _epochs(lines)
    if not epochs:
        raise FileFormatError(
            path, "holds no whole epoch: expected epoch_start and epoch_stop, or block_start and block_stop"
        )
    timed = epochs[1:] or epochs
    platform = values.get("submission_platform")
    nodes = _NODES.match(str(platform)) if platform else None
    return MlperfRun(
        benchmark=_text(values.get("submission_benchmark")),
        platform=_text(platform),
        num_nodes=int(nodes[1]) if nodes else None,
        global_batch=_count(path, values, "global_batch_size"),
        train_samples=_count(path, values, "train_samples"),
        optimizer=_text(values.get("opt_name")),
        epoch_seconds=statistics.median(timed),
        num_epochs=len(timed),
    )


def _line(path: Path, number: int, line: str) -> _Line:
    content = line[line.index(_MARK) + len(_MARK) :].strip()
    return decode_json(path, content, _DECODER, line=number, what=f"a {_MARK} line")


def _epochs(lines: list[_Line]) -> list[float]:
    """Seconds of every epoch; a block's are shared out over its epochs where epochs are not marked."""
    found: dict[str, list[float]] = {"epoch": [], "block": []}
    began: dict[str, _Line] = {}
    for line in lines:
        kind, _, end = line.key.rpartition("_")
        if kind not in found:
            continue
        if end == "start":
            began[kind] = line
        elif end == "stop" and kind in began:
            start = began.pop(kind)
            seconds = (line.time_ms - start.time_ms) / 1e3
            count = start.metadata.get("epoch_count", 1) if kind == "block" else 1
            if seconds > 0 and isinstance(count, int | float) and count > 0:
                found[kind].append(seconds / count)
    return found["epoch"] or found["block"]


def _count(path: Path, values: dict[str, Any], key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 1:
        raise FileFormatError(path, f"{key} is {value!r}, expected a positive number")
    return int(value)


def _text(value: object) -> str | None:
    return value.lower() if isinstance(value, str) else None
