"""Published trajectories by name: what a paper reports of a run's FLOPs, BatchNorm traffic and mini-batch.

One TOML file per publication beside this module; adding a run is adding a table. No measured time is in it.
"""

from __future__ import annotations

import functools
from pathlib import Path

import msgspec

from ptsim.errors import FileFormatError
from ptsim.prune.trajectories.problem import Problem, Trajectory, register
from ptsim.prune.trajectories.targets import Targets, meet
from ptsim.textfile import read_toml


class PublishedRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run of a publication: what was trained, and its costs as fractions of dense.

    Attributes:
        name: unique; `publication/run`.
        model, images, classes, epochs, batch, gpus, interval: what `ptsim plan` uses where it is not told otherwise.
        training, inference, bn, layers: as in `Targets`.
        source: table or section.
    """

    name: str
    model: str
    images: int
    classes: int
    epochs: int
    batch: int
    gpus: int
    interval: int
    training: float
    inference: float
    source: str
    bn: float | None = None
    layers: float | None = None


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    run: tuple[PublishedRun, ...]


@functools.cache
def published_runs() -> dict[str, PublishedRun]:
    """Every published run, by name."""
    found: dict[str, PublishedRun] = {}
    for path in sorted(Path(__file__).parent.glob("*.toml")):
        try:
            file = msgspec.convert(read_toml(path), _File)
        except msgspec.ValidationError as error:
            raise FileFormatError(path, str(error)) from error
        found |= {run.name: run for run in file.run}
    return found


@register(published_runs, lambda text: text in published_runs())
def from_catalog(text: str, problem: Problem) -> Trajectory:
    """The trajectory of a published run."""
    run = published_runs()[text]
    targets = Targets(training=run.training, inference=run.inference, bn=run.bn, layers=run.layers)
    return meet(targets, problem, source=run.source)
