"""What is a run folder, and how is a network taken out of one? Configuration, trace and checkpoints of one run."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import importlib.metadata
import os
import shlex
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from ptsim import zoo
from ptsim.errors import FileFormatError, PtsimError, UsageError
from ptsim.textfile import printable, read_bytes, take_lock, umask, write_whole
from ptsim.trace.io import CONFIG, TRACE, read_records, run_folder
from ptsim.trace.schema import Dataset, DeviceInfo, Run
from ptsim.training import checkpoint as store
from ptsim.training import stored
from ptsim.training.config import SETTINGS, Config, from_recorded, make_config, read_config, to_settings, to_toml
from ptsim.training.joining import restarted
from ptsim.training.learner import pruned_network
from ptsim.training.live import name_of, offered
from ptsim.training.recipe import Recipe, check_fits
from ptsim.units import counted
from ptsim.usercode import digest, source_files

_STALE_S = 1.0  # by then a folder that is being made is locked
CHECKPOINTS = "checkpoints"
CODE = "code"  # the user's file that makes the network and what it imports from beside it, as the run began with them
_OLDER_CODE = "model.py"  # the file alone
_ANOTHER = "choose another folder"
# What a resumed run may change: how long it trains, where it runs, what it keeps. Everything else decides its numbers.
MAY_CHANGE = frozenset(
    {"epochs", "device", "num_threads", "num_workers", "keep_every", "profile", "data_dir", "loggers"}
    | {"data_memory_bytes"}  # what it decides of the images is compared with the checkpoint
)


def load_model(
    run: str | Path, epoch: int | None = None, *, trust: bool = False, model: str | nn.Module | None = None
) -> nn.Module:
    """The network that a run had after `epoch` (from 0; None: the last stored one), with its weights, ready to use.

    It is in evaluation mode on the CPU; images must be normalised as its `checkpoint.json` says. Of a run with a
    weight average it is the average, as validated. It is rebuilt from the model's name. Where that is a user's file
    that was edited since (which is warned of) or is not there, the run's own copy of it is taken.

    Args:
        run: the run folder.
        epoch: counting from 0.
        trust: run the Python file that the checkpoint names, for a model from a user's file.
        model: what makes the network in place of what the checkpoint names: "path/to/file.py:function", or a live
            network as it was given to `ptsim.train`, of which a copy is taken.

    Raises:
        UsageError: no such run, an epoch that is not stored (lists those that are), or a user's file without `trust`.
        FileFormatError: a damaged checkpoint, or a pickle in its place.
    """
    path = store.Folder(run_folder(run) / CHECKPOINTS).of_epoch(epoch)
    description = store.read_checkpoint(path)
    recipe = description.recipe
    if isinstance(model, nn.Module):
        recipe = msgspec.structs.replace(recipe, model=name_of(model))
    elif model is not None:
        recipe = msgspec.structs.replace(recipe, model=model)
    elif zoo.file_of(recipe.model) is not None and not trust:
        raise UsageError(
            f"the network of {run} is made by {recipe.model}, and loading it would run that file",
            hint="load_model(…, trust=True) and export --trust run it; load_model(…, model=…) names another",
        )
    else:
        recipe = msgspec.structs.replace(recipe, model=_made_by(run_folder(run), recipe))
    live = model if isinstance(model, nn.Module) else None
    with torch.random.fork_rng(devices=[]), offered(live, None):
        network = pruned_network(recipe, description.structure)
    with store.belonging_to(path):
        stored.load_full_state(network, store.read_weights(path))
        if description.sha256 is None:  # an older run's: nothing else says that its structure is whole
            check_fits(network, recipe)
    return network.eval()


def _made_by(folder: Path, recipe: Recipe) -> str:
    """The model's name, with the run's own copy of a user's file in place of one that is not what the run began with.

    Raises:
        UsageError: the copy is none, either.
    """
    file, known = zoo.file_of(recipe.model), recipe.source_sha256
    if file is None or known is None or digest(file) == known:
        return recipe.model
    if os.path.isfile(file):
        with contextlib.suppress(PtsimError):
            zoo.find(recipe.model)  # it may say itself where its imports are found: sys.path.append(…)
        if digest(file) == known:
            return recipe.model
    kept = folder / CODE / file.name
    if not os.path.isfile(kept):
        kept = folder / _OLDER_CODE
    if digest(kept) != known:
        raise UsageError(f"neither {file} nor {kept} is the file that made the network of {folder}")
    if os.path.isfile(file):
        warnings.warn(
            f"{file} or what it imports was edited since the run in {folder}, whose own copy makes its network",
            stacklevel=3,
        )
    return f"{kept}:{recipe.model.rpartition(':')[2]}"


def load_recipe(run: str | Path, epoch: int | None = None) -> Recipe:
    """How the network of a stored epoch was built: model, classes, image shape.

    Raises:
        UsageError, FileFormatError: see `load_model`.
    """
    return store.read_checkpoint(store.Folder(run_folder(run) / CHECKPOINTS).of_epoch(epoch)).recipe


def recorded_config(folder: Path) -> Config:
    """The configuration of the run in `folder`.

    Raises:
        UsageError: there is no run.
        FileFormatError: its configuration is damaged.
    """
    return from_recorded(read_config(run_folder(folder) / CONFIG))


def default_folder(config: Config) -> Path:
    """The folder of a run that was given none."""
    model = config.model.replace("/", "_").replace(":", "-")
    return Path("runs") / f"{model}-{config.dataset}-r{config.penalty_ratio:g}-s{config.seed}"


def make_run_folder(folder: Path, config: Config) -> None:
    """Make the run folder with its configuration, in one step.

    Raises:
        UsageError: there is something in it already, or it is a mount point.
        TrainingError: it cannot be written.
    """
    refuse_used_folder(folder)
    with store.writing(folder, begun=False):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.parent.glob(f".{glob.escape(folder.name)}.*.unfinished"):
            if _is_abandoned(unfinished):
                shutil.rmtree(unfinished, ignore_errors=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".unfinished", dir=folder.parent))
        handle = os.open(unfinished, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            unfinished.chmod(0o777 & ~umask())
            write_whole(unfinished / CONFIG, to_toml(config))
            source = zoo.file_of(config.model)
            for name, path in ({} if source is None else source_files(source)).items():
                (unfinished / CODE / name).parent.mkdir(parents=True, exist_ok=True)
                write_whole(unfinished / CODE / name, read_bytes(path))
            unfinished.replace(folder)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another run was faster
                refuse_used_folder(folder)
            if error.errno in (errno.EBUSY, errno.EXDEV):
                problem = f"the output folder {folder} is a mount point, which no folder can replace"
                raise UsageError(problem, hint=f"--out {folder / 'run'}") from error
            raise
        finally:
            os.close(handle)


def _is_abandoned(unfinished: Path) -> bool:
    """Whether the process that was making the folder has died: the system has taken its lock away."""
    try:
        handle = os.open(unfinished, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return take_lock(handle) and time.time() - os.fstat(handle).st_mtime > _STALE_S
    except OSError:
        return False
    finally:
        os.close(handle)


def changed_config(folder: Path, changes: Mapping[str, Any]) -> Config:
    """The configuration with which the run in `folder` goes on: its own with `changes`.

    Raises:
        UsageError: a change, here or in an edited config.toml, that would make it another run.
        FileFormatError: its configuration is damaged.
    """
    config = recorded_config(folder)
    changed = make_config(to_settings(config) | dict(changes), quiet=True) if changes else config
    trace = folder / TRACE
    begun = store.Folder(folder / CHECKPOINTS).newest() is not None  # before that the run begins anew
    began = _began_with(trace) if begun and trace.is_file() else config
    for name in SETTINGS:
        before, after = getattr(began, name), getattr(changed, name)
        if before != after and name not in MAY_CHANGE:
            edited = f"{folder / CONFIG} was edited, or {trace} is another run's"
            how = "--resume cannot change it" if name in changes else edited
            raise UsageError(
                f"the run began with {name} = {before!r}, not {after!r}: {how}",
                hint=f"a resumed run may change {', '.join(sorted(MAY_CHANGE))}; "
                f"a new run begins with --from {shlex.quote(str(folder))}",
            )
    return changed


def update_config(folder: Path, config: Config) -> None:
    """Let the run folder hold the configuration with which the run goes on.

    No other process may be doing so: what a killed one was writing is removed.

    Raises:
        TrainingError: it cannot be written.
    """
    for torn in folder.glob(f".{CONFIG}.*"):
        with contextlib.suppress(OSError):
            torn.unlink()
    if recorded_config(folder) != config:
        with store.writing(folder / CONFIG):
            write_whole(folder / CONFIG, to_toml(config))


def check_began_alike(folder: Path, dataset: Dataset, device: DeviceInfo, world_size: int) -> None:
    """Make sure that the data set is as large as the one that the run began with; nothing where there is no trace.

    A warning where it began on another `device`, with another torch or number of threads, which the trace then names
    for all epochs, or with another number of ranks, which it names for each.

    Raises:
        UsageError: the data set is not.
        FileFormatError: the trace is damaged.
    """
    if not (folder / TRACE).is_file():
        return
    began = _first_line(folder / TRACE)
    threads, here = (began.device.num_threads, device.num_threads), importlib.metadata.version("torch")
    alike = [
        (f"on {printable(began.device.name)}", f"on {printable(device.name)}"),
        (f"with torch {began.versions.get('torch', here)}", f"with torch {here}"),
        *([(f"with {threads[0]} threads", f"with {threads[1]} threads")] if None not in threads else []),
    ]
    ranks = f"with {counted(began.world_size, 'rank')}", f"with {counted(world_size, 'rank')}"
    for then, today in (ranks, *alike):
        if then != today:
            named = "" if (then, today) == ranks else ", which its trace names for every epoch,"
            mixes = "what is predicted from it mixes the times of both"
            warnings.warn(f"the run began {then}{named} and goes on {today}: {mixes}", stacklevel=2)
    for what, before, now in (
        ("training", began.dataset.num_train, dataset.num_train),
        ("validation", began.dataset.num_validation, dataset.num_validation),
    ):
        if before != now:
            raise UsageError(f"the run began with {before} {what} images, the data of today have {now}")


def _began_with(trace: Path) -> Config:
    """The configuration that the trace's first line holds."""
    return from_recorded(_first_line(trace).hyperparameters)


def _first_line(trace: Path) -> Run:
    _, first = next(read_records(trace))
    if not isinstance(first, Run):
        raise FileFormatError(trace, "the first record is no run record", line=1)
    return first


def refuse_used_folder(folder: Path) -> None:
    """Make sure that `folder` is empty or not there.

    Raises:
        UsageError: it holds another run or other files.
    """
    if folder.is_dir() and any(folder.iterdir()):
        own = (folder / CONFIG).exists()
        if own or (folder / TRACE).exists():
            hint = f"`ptsim train --resume {shlex.quote(str(folder))}` goes on with it" if own else _ANOTHER
            raise UsageError(f"the output folder {folder} holds another run", hint=hint)
        raise UsageError(f"the output folder {folder} is not empty", hint=f"{_ANOTHER}, or empty this one")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"the output folder {folder} is a file")


def goes_on(folder: Path, config: Config) -> bytes:
    """b"yes" if torchrun has restarted the very run in `folder`; otherwise the folder must be unused."""
    if restarted() and (folder / CONFIG).exists() and recorded_config(folder) == config:
        return b"yes"
    refuse_used_folder(folder)
    return b"no"
