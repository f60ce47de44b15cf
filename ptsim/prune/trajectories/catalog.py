"""Published trajectories by name: what a paper reports of a run's FLOPs, BatchNorm traffic and mini-batch.

One TOML file per publication beside this module; adding a run is adding a table. No measured time is in it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import msgspec

from ptsim.errors import FileFormatError
from ptsim.prune.trajectories.like import PREFIX, STRENGTH
from ptsim.prune.trajectories.problem import Problem, Trajectory, register
from ptsim.prune.trajectories.targets import Targets, meet, parse_targets, written
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

    @property
    def targets(self) -> Targets:
        """Its fractions of dense."""
        return Targets(training=self.training, inference=self.inference, bn=self.bn, layers=self.layers)


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
    return meet(run.targets, problem, source=run.source)


def with_targets(text: str, wanted: Mapping[str, float]) -> str:
    """What `--pruning` is to be in place of `text`, for these fractions.

    Raises:
        UsageError: such a pruning aims at no fractions.
    """
    if text.startswith(PREFIX) and STRENGTH in text:
        return f"{text.partition(STRENGTH)[0]}{STRENGTH}{round(wanted['inference'], 3):g}"
    run = published_runs().get(text)
    targets = parse_targets(text) if run is None else run.targets
    return written(dataclasses.replace(targets, **wanted))
