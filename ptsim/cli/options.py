"""Options that several subcommands take: name, help sentence and default of each stand here once.

A single option is an `Annotated` type. Options that go together are a frozen dataclass; cyclopts shows its fields as
options of the command, with the text below each field as their help. A command whose option means something special
says so: in its own docstring as `network.classes: …`, or as `Annotated[Json, Parameter(help=…)]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ptsim.cli.reading import is_count
from ptsim.errors import UsageError
from ptsim.optimizers import OPTIMIZERS
from ptsim.trace.io import read_trace
from ptsim.trace.stretch import stretch
from ptsim.trace.trace import Trace

Json = Annotated[bool, Parameter(name="--json", help="Print one JSON document.")]
Out = Annotated[Path, Parameter(name=["--out", "-o"])]
Traces = Annotated[list[Path], Parameter(name="TRACE", negative=())]
Settings = Annotated[list[str], Parameter(name="--set", negative=(), show_default=False)]
Cluster = Annotated[str, Parameter(name="--cluster", help="Cluster: catalog name or TOML file.")]
Profile = Annotated[
    Path | None,
    Parameter(name="--profile", help="Device profile of the projected GPU, from `ptsim calibrate gpu` or `import`."),
]
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
