"""`ptsim train`: a run from a TOML file and the everyday overrides."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.table import Table

from ptsim.cli.common import print_json, stdout_console
from ptsim.errors import UsageError
from ptsim.training.config import Config, to_settings

if TYPE_CHECKING:
    from ptsim.training.loop import Result


def train(
    config: Path | None = None,
    /,
    *,
    model: str | None = None,
    dataset: str | None = None,
    data_dir: str | None = None,
    epochs: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    penalty_ratio: float | None = None,
    interval: int | None = None,
    seed: int | None = None,
    train_limit: int | None = None,
    download: bool | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    from_: Annotated[Path | None, Parameter(name="--from")] = None,
    set_: Annotated[list[str], Parameter(name="--set", negative=())] = [],  # noqa: B006 - cyclopts reads the default, nobody writes
    json: bool = False,
) -> None:
    """Train a network, dense or with PruneTrain, and record the run.

    Parameters
    ----------
    config:
        TOML file with settings; options here and --set override it.
    model:
        Zoo name, torchvision:NAME or path/to/file.py:function (default {model}).
    dataset:
        digits, cifar10, cifar100, imagefolder or synthetic (default {dataset}).
    data_dir:
        Folder that holds the data set.
    epochs:
        Number of epochs (default {epochs}).
    batch:
        Images per iteration, of all ranks together (default {batch}).
    lr:
        Initial learning rate (default {lr}).
    penalty_ratio:
        Share of the penalty in the first mini-batch's loss; 0 trains the dense baseline (default {penalty_ratio}).
    interval:
        Epochs between reconfigurations (default {interval}).
    seed:
        Seed of the weights, the order of the images and their augmentation (default {seed}).
    train_limit:
        Number of training images to use, instead of all.
    download:
        Let torchvision download CIFAR.
    out:
        Run folder to create.
    resume:
        Run folder to continue from its last checkpoint. --epochs, --set device=… and num_threads=… may change with it.
    from_:
        Run folder whose last network the training starts from.
    set_:
        Any other setting as key=value. Can be repeated.
    json:
        Print the result as JSON.
    """
    from ptsim.training.config import parse_override, read_config
    from ptsim.training.loop import train as run_training

    overrides: dict[str, Any] = dict(parse_override(text) for text in set_)
    options = {
        "model": model,
        "dataset": dataset,
        "data_dir": data_dir,
        "epochs": epochs,
        "batch": batch,
        "lr": lr,
        "penalty_ratio": penalty_ratio,
        "interval": interval,
        "seed": seed,
        "train_limit": train_limit,
        "download": download,
        "start_from": str(from_) if from_ is not None else None,
    }
    overrides |= {name: value for name, value in options.items() if value is not None}
    if resume is not None:
        if config is not None or out is not None:
            raise UsageError("--resume takes its configuration and its folder from the run; give only what changes")
        result = _run(lambda: run_training(overrides, resume=resume, progress=True))
    else:
        settings = read_config(config) if config is not None else {}
        result = _run(lambda: run_training(settings | overrides, out=out, progress=True))
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


# The defaults stand in the configuration; the help shows them.
train.__doc__ = (train.__doc__ or "").format_map(to_settings(Config()))


def _run(training: Callable[[], Result]) -> Result:
    """Train; a run that is interrupted ends the program with one line that says how to go on, and status 130."""
    from ptsim.training.loop import TrainingInterrupted

    try:
        return training()
    except TrainingInterrupted as stopped:
        text = f"interrupted ({stopped}); go on with: ptsim train --resume {shlex.quote(str(stopped.folder))}"
        print(text, file=sys.stderr)
        sys.exit(130)
