"""What is a run folder, and how is a network taken out of one? Configuration, trace and checkpoints of one run."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import nn

from ptsim.errors import FileFormatError, UsageError
from ptsim.training import checkpoint as store
from ptsim.training import stored
from ptsim.training.config import Config, from_recorded, read_config, to_toml
from ptsim.training.distributed import restarted
from ptsim.training.learner import pruned_network
from ptsim.training.recipe import Recipe
from ptsim.training.recorder import TRACE

CONFIG, CHECKPOINTS = "config.toml", "checkpoints"


def load_model(run: str | Path, epoch: int | None = None) -> nn.Module:
    """The network that a run had after `epoch` (from 0; None: the last stored one), with its weights, ready to use.

    It is in evaluation mode on the CPU; images must be normalised as its `checkpoint.json` says. Of a run with a
    weight average it is the average, as validated. Rebuilt from the model's name; only a model from a user's file needs
    that file.

    Raises:
        UsageError: no such run, or an epoch that is not stored; lists those that are.
        FileFormatError: a damaged checkpoint, or a pickle in its place.
    """
    path = store.Folder(existing(run) / CHECKPOINTS).of_epoch(epoch)
    description = store.read_checkpoint(path)
    with torch.random.fork_rng(devices=[]):
        model = pruned_network(description.recipe, description.structure)
    with store.belonging_to(path):
        stored.load_full_state(model, store.read_weights(path))
    return model.eval()


def load_recipe(run: str | Path, epoch: int | None = None) -> Recipe:
    """How the network of a stored epoch was built: model, classes, image shape.

    Raises:
        UsageError, FileFormatError: see `load_model`.
    """
    return store.read_checkpoint(store.Folder(existing(run) / CHECKPOINTS).of_epoch(epoch)).recipe


def recorded_config(folder: Path) -> Config:
    """The configuration of the run in `folder`.

    Raises:
        UsageError: there is no run.
        FileFormatError: its configuration is damaged.
    """
    return from_recorded(read_config(existing(folder) / CONFIG))


def default_folder(config: Config) -> Path:
    """The folder of a run that was given none."""
    model = config.model.replace("/", "_").replace(":", "-")
    return Path("runs") / f"{model}-{config.dataset}-r{config.penalty_ratio:g}-s{config.seed}"


def make_run_folder(folder: Path, config: Config) -> None:
    """Make the run folder with its configuration, in one step.

    Raises:
        UsageError: there is something in it already.
        TrainingError: it cannot be written.
    """
    refuse_used_folder(folder)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    with store.writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        store.write_atomically(unfinished / CONFIG, to_toml(config).encode())
        unfinished.replace(folder)


def refuse_used_folder(folder: Path) -> None:
    """Make sure that `folder` is empty or not there.

    Raises:
        UsageError: it holds another run or other files.
    """
    if folder.is_dir() and any(folder.iterdir()):
        if (folder / CONFIG).exists() or (folder / TRACE).exists():
            raise UsageError(f"the output folder {folder} holds another run", hint=f"--resume {folder} goes on with it")
        raise UsageError(f"the output folder {folder} is not empty")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"the output folder {folder} is a file")


def goes_on(folder: Path, config: Config) -> bytes:
    """b"yes" if torchrun has restarted the very run in `folder`; otherwise the folder must be unused."""
    if restarted() and (folder / CONFIG).exists() and recorded_config(folder) == config:
        return b"yes"
    refuse_used_folder(folder)
    return b"no"


def existing(path: str | Path) -> Path:
    """The folder of a run that is there.

    Raises:
        UsageError: there is no run.
        FileFormatError: a file is in its place.
    """
    folder = Path(path)
    if folder.is_file():
        raise FileFormatError(folder, "found a file, expected a run folder")
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} holds no run (no {CONFIG})")
    return folder
