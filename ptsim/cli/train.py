"""`ptsim train`: a run from a TOML file and the everyday overrides."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.table import Table

from ptsim import zoo
from ptsim.cli.common import print_json, say, stdout_console, users_code
from ptsim.cli.options import Json, Settings
from ptsim.cli.reading import read_settings
from ptsim.errors import UsageError
from ptsim.textfile import check_folder_writable, read_toml
from ptsim.trace.io import run_folder
from ptsim.training.config import Config, to_settings
from ptsim.training.sources import DATASETS, data_source

if TYPE_CHECKING:
    from ptsim.training.loop import Result

_DEFAULTS = to_settings(Config())
*_FIRST, _LAST = (name for name in DATASETS.own if data_source(name).by_name)
_DATASETS = f"{', '.join(_FIRST)} or {_LAST}"


def _setting(help: str, name: str) -> Parameter:
    """An option for the setting `name`, whose default stands in the configuration; the help shows it."""
    return Parameter(help=f"{help} (default {_DEFAULTS[name]}).")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Overrides:
    """The settings that one changes every day; None leaves what the configuration says."""

    model: Annotated[str | None, _setting("Zoo name, torchvision:NAME or path/to/file.py:function", "model")] = None
    dataset: Annotated[str | None, _setting(_DATASETS, "dataset")] = None
    data_dir: str | None = None
    """Folder that holds the data set."""
    epochs: Annotated[int | None, _setting("Number of epochs", "epochs")] = None
    batch: Annotated[int | None, _setting("Images per iteration, of all ranks together", "batch")] = None
    lr: Annotated[float | None, _setting("Initial learning rate", "lr")] = None
    penalty_ratio: Annotated[
        float | None,
        _setting("Share of the penalty in the first mini-batch's loss; 0 trains the dense baseline", "penalty_ratio"),
    ] = None
    interval: Annotated[int | None, _setting("Epochs between reconfigurations", "interval")] = None
    seed: Annotated[
        int | None, _setting("Seed of the weights, the order of the images and their augmentation", "seed")
    ] = None
    train_limit: int | None = None
    """Number of training images to use, instead of all."""
    download: bool | None = None
    """Let torchvision download CIFAR."""

    def given(self) -> dict[str, Any]:
        """The settings that the user has given, by the configuration's names."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def train(
    config: Path | None = None,
    /,
    *,
    overrides: Overrides = Overrides(),
    out: Path | None = None,
    resume: Path | None = None,
    start_from: Annotated[Path | None, Parameter(name="--from")] = None,
    log: str | None = None,
    settings: Settings = [],
    json: Annotated[Json, Parameter(help="Print the result as JSON.")] = False,
) -> None:
    """Train a network, dense or with PruneTrain, and record the run.

    Args:
        config: TOML file with settings; options here and --set override it.
        out: Run folder to create. Default: runs/MODEL-DATASET-rRATIO-sSEED.
        resume: Run folder to continue from its last checkpoint. Only these may change with it: --epochs, --data-dir,
            --log, and with --set device, num_threads, num_workers, keep_every, profile,
            data_memory_bytes.
        start_from: Run folder whose last network the training starts from.
        log: Where else the numbers of every epoch go, separated by commas: csv, tensorboard, wandb, mlflow.
        settings: Any other setting as name=value. Can be repeated.
    """
    _check_paths(config, overrides, out, (resume, start_from))
    given = overrides.given()
    if start_from is not None:
        given["start_from"] = str(start_from)
    if log is not None:
        given["loggers"] = [name.strip() for name in log.split(",")]
    changed = read_settings(settings, given)
    from ptsim.training.config import read_config
    from ptsim.training.joining import place
    from ptsim.training.loop import train as run_training

    if resume is not None:
        if config is not None or out is not None:
            raise UsageError("--resume takes its configuration and its folder from the run; give only what changes")
        result = _run(lambda: run_training(changed, resume=resume, progress=True))
    else:
        base = read_config(config) if config is not None else {}
        result = _run(lambda: run_training(base | changed, out=out, progress=True))
    if place().rank:  # the first rank prints for all
        return
    if json:
        print_json(
            {
                "run": str(result.folder),
                "trace": str(result.trace),
                "epochs": result.epochs,
                "final_accuracy": result.final_accuracy,
                "penalty_coefficient": result.penalty_coefficient,
            }
        )
        return
    table = Table(show_header=False, box=None)
    table.add_row("run", str(result.folder))
    table.add_row("trace", str(result.trace))
    table.add_row("accuracy", f"{result.final_accuracy:.2%}")
    table.add_row("λ", f"{result.penalty_coefficient:.3g}")
    stdout_console().print(table)


def _check_paths(config: Path | None, overrides: Overrides, out: Path | None, runs: Iterable[Path | None]) -> None:
    """Find a wrong path before torch is imported."""
    for folder in runs:
        if folder is not None:
            run_folder(folder)
    if overrides.dataset in DATASETS.own and overrides.data_dir is not None and not os.path.isdir(overrides.data_dir):
        uses = data_source(overrides.dataset).uses
        if "data_dir" in uses and "download" not in uses:
            raise UsageError(f"no data folder {overrides.data_dir}")
    if out is not None:
        check_folder_writable(out)
    if config is not None:
        read_toml(config)
    if overrides.model is not None:
        zoo.check_file(overrides.model)


def _run(training: Callable[[], Result]) -> Result:
    """Train; a run that is interrupted ends the program with one line that says how to go on, and status 130."""
    from ptsim.training.loop import TrainingInterrupted

    try:
        with users_code():
            return training()
    except TrainingInterrupted as stopped:
        text = f"interrupted ({stopped}); go on with: ptsim train --resume {shlex.quote(str(stopped.folder))}"
        say(text)
        sys.exit(130)
