"""Options that several subcommands take: name, help sentence, default and reader of each stand here once.

A single option is an `Annotated` type. Options that go together are a frozen dataclass; cyclopts shows its fields as
options of the command, with the text below each field as their help. A command whose option means something special
says so in its own docstring, as `Args: network.classes: …`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ptsim.errors import FileFormatError, UsageError
from ptsim.optimizers import OPTIMIZERS
from ptsim.textfile import LARGEST, LARGEST_INTEGER, SMALLEST
from ptsim.trace.io import read_trace
from ptsim.trace.stretch import stretch
from ptsim.trace.trace import Trace
from ptsim.units import parse_quantity

_NCCL_TESTS_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}  # what `all_reduce_perf -b 128M` means

Json = Annotated[bool, Parameter(name="--json", help="Print one JSON document.")]
Out = Annotated[Path, Parameter(name=["--out", "-o"])]
Traces = Annotated[list[Path], Parameter(name="TRACE", negative=())]
Settings = Annotated[list[str], Parameter(name="--set", negative=(), show_default=False)]
Cluster = Annotated[str, Parameter(name="--cluster", help="Cluster: catalog name or TOML file.")]
_COUNTED = f"Optimizer whose state and update are counted: {', '.join(OPTIMIZERS.names())}."
Optimizer = Annotated[str, Parameter(name="--optimizer", help=_COUNTED)]
OptimizerOfTrace = Annotated[
    str | None, Parameter(name="--optimizer", help=f"{_COUNTED} Default: the trace's own, else sgd.")
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """What the network of a MODEL is built for."""

    input: str | None = None
    """Image shape as CHANNELS,HEIGHT,WIDTH, for example 3,224,224."""
    classes: int | None = None
    """Number of classes that the network tells apart."""

    @property
    def input_shape(self) -> tuple[int, int, int] | None:
        """Channels, height and width; None if the model's usual ones are meant.

        Raises:
            UsageError: not three positive whole numbers.
        """
        if self.input is None:
            return None
        parts = self.input.replace("x", ",").split(",")
        if len(parts) != 3 or not all(is_count(part) for part in parts):
            raise UsageError(f"input {self.input!r} is not CHANNELS,HEIGHT,WIDTH, for example 3,224,224")
        channels, height, width = (int(part) for part in parts)
        return channels, height, width


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class LengthOptions:
    """Another length of the runs than the recorded one."""

    epochs: int | None = None
    """Number of epochs, for a run of another length. Every architecture keeps its share of the run."""
    images: int | None = None
    """Number of images of an epoch, instead of the recorded one."""

    def read(self, path: Path) -> Trace:
        """The run that `path` holds, with this length.

        Raises:
            FileFormatError: the trace is broken.
            UsageError: a length that no run can have.
        """
        return stretch(read_trace(path), epochs=self.epochs, images=self.images)


def parse_gpus(text: str) -> list[int]:
    """The GPU counts of "1,8,64", each once.

    Raises:
        UsageError: not positive whole numbers between commas.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(is_count(part) for part in parts):
        raise UsageError(f"gpus {text!r} is not a list of positive whole numbers, for example 1,8,64")
    return list(dict.fromkeys(int(part) for part in parts))


def check_number(name: str, text: str, *, whole: bool) -> None:
    """Refuse a number that would be rounded, or that no quantity can have.

    Raises:
        UsageError: `text` is a number with a fraction where a whole one is meant, or one beyond all bounds.
    """
    try:
        value = float(text)
    except ValueError:
        return  # no number in decimal digits: whoever reads it says so
    if whole and (not math.isfinite(value) or not text.strip().lstrip("+-").isdecimal()):
        raise UsageError(f"{name} is {text}, expected a whole number")
    if whole and abs(value) > LARGEST_INTEGER:
        raise UsageError(f"{name} is {value:.3g}, expected at most {LARGEST_INTEGER}")
    if not whole and value and math.isfinite(value) and not SMALLEST <= abs(value) <= LARGEST:
        raise UsageError(f"{name} is {text}, expected 0 or a number between {SMALLEST:g} and {LARGEST:g}")


def is_count(text: str) -> bool:
    """Whether the text is a positive whole number of at most 18 digits."""
    return text.strip().isdecimal() and len(text.strip()) <= 18 and int(text) > 0


def parse_bytes(name: str, text: str) -> int:
    """The bytes of "134217728", "128MiB", or "128M" (as nccl-tests writes it: binary).

    Raises:
        UsageError: not a whole, non-negative number of bytes.
    """
    number, unit = text.strip()[:-1], text.strip()[-1:].upper()
    try:
        if unit in _NCCL_TESTS_UNITS:
            size = parse_quantity(f"{number} B", "bytes") * _NCCL_TESTS_UNITS[unit]
        else:
            size = parse_quantity(f"{text} B" if unit.isdecimal() or unit == "." else text, "bytes")
    except ValueError as error:
        raise UsageError(f"{name} {error}") from error
    if not 0 <= size <= LARGEST_INTEGER or size != int(size):
        raise UsageError(f"{name} {text}: a message is a whole, non-negative number of bytes")
    return int(size)


def check_run_folder(folder: Path) -> None:
    """Find out, before torch is imported, that no run is there.

    Raises:
        UsageError: the folder holds no configuration of a run.
        FileFormatError: it is a file.
    """
    if os.path.isfile(folder):
        raise FileFormatError(folder, "found a file, expected a run folder")
    if not os.path.isfile(folder / "config.toml"):
        raise UsageError(f"{folder} holds no run (no config.toml)")


def refuse_input_as_output(out: Path, *inputs: Path) -> None:
    """Keep a command from writing over what it reads.

    Raises:
        UsageError: `out` is one of the inputs.
    """
    written = os.path.realpath(out)
    for path in inputs:
        if written in (os.path.realpath(path), os.path.realpath(path / "trace.jsonl")) and os.path.isfile(out):
            raise UsageError(f"{out} is what is read; choose another file to write")
