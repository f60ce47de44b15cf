"""How does a learner get into a checkpoint, and out of the newest one again?"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from ptsim.errors import FileFormatError
from ptsim.prune.structure import structure_of
from ptsim.training import checkpoint as store
from ptsim.training import stored
from ptsim.training.checkpoint import Checkpoint
from ptsim.training.data import Data
from ptsim.training.distributed import Team
from ptsim.training.learner import Learner, pruned_network
from ptsim.training.recipe import Recipe


class Storage:
    """Stores and restores the learner of one run."""

    def __init__(self, folder: Path, *, data: Data, recipe: Recipe, team: Team, num_epochs: int) -> None:
        """`folder` is the run's folder of checkpoints."""
        self._checkpoints = store.Folder(folder)
        self._data, self._recipe, self._team, self._num_epochs = data, recipe, team, num_epochs

    def save(self, learner: Learner, *, keep: bool) -> None:
        """Store the state, on rank 0; the loop's own random numbers need no place in it.

        Raises:
            TrainingError: the disk is full or not writable; older checkpoints are untouched.
        """
        recorder, pruner = learner.recorder, learner.pruner
        if not recorder.records:
            return
        description = Checkpoint(
            recipe=self._recipe,
            normalization=self._data.normalization,
            class_names=getattr(self._data, "class_names", ()),  # a data set of another package may have none
            next_epoch=learner.next_epoch,
            structure=structure_of(learner.model),
            architecture=recorder.architecture.id,
            penalty_coefficient=pruner.penalty_coefficient,
            batch=learner.batch,
            learning_rate_scale=learner.learning_rate_scale,
            validation_accuracy=recorder.final_accuracy,
            initial_channels=recorder.initial_counts[0],
            initial_weights=recorder.initial_counts[1],
            optimizer=stored.optimizer_scalars(learner.model, learner.optimizer),
            groups=_kept_in_groups(learner.optimizer),
            scaler=learner.scaler.state_dict(),
            trace_bytes=recorder.num_bytes,
            trace_sha256=recorder.sha256,
            totals=recorder.spend_time(),
        )
        self._checkpoints.save(description, learner.weights(), learner.more_tensors(), keep=keep)

    def restore(self, make: Callable[[nn.Module], Learner]) -> Learner | None:
        """The learner of the newest checkpoint, made by `make` around its network; None where there is none.

        Raises:
            FileFormatError: the checkpoint is damaged, or none of this run.
        """
        content = self._team.from_leader(self._newest_checkpoint)
        if not content:
            return None
        description_json, weights, more = msgspec.msgpack.decode(content, type=tuple[bytes, bytes, bytes])
        place = self._checkpoints.path
        found = store.parse_checkpoint(place, description_json)
        problem = self._unfit(found)
        if problem is not None:
            raise FileFormatError(place, f"the newest checkpoint {problem}")
        problem = self._of_other_data(found)
        if problem is not None:
            hint = "data_dir names the images, data_memory_bytes which image trees are kept in memory"
            raise FileFormatError(place, f"the newest checkpoint {problem}", hint=hint)
        learner = make(pruned_network(found.recipe, found.structure))
        recorder, pruner = learner.recorder, learner.pruner
        if recorder.architecture.id != found.architecture:
            raise FileFormatError(
                place, f"the restored network is {recorder.architecture.id}, the checkpoint is of {found.architecture}"
            )
        with store.belonging_to(place):
            learner.load(
                store.parse_tensors(place, weights, found.weights_sha256),
                store.parse_tensors(place, more, found.state_sha256),
                found.optimizer,
                found.groups,
                found.scaler,
            )
        learner.next_epoch = recorder.epoch = found.next_epoch
        pruner.penalty_coefficient = found.penalty_coefficient
        learner.batch, learner.learning_rate_scale = found.batch, found.learning_rate_scale
        recorder.final_accuracy = found.validation_accuracy
        recorder.initial_counts = found.initial_channels, found.initial_weights
        recorder.totals = found.totals
        recorder.continue_trace(found.trace_bytes, found.trace_sha256)
        return learner

    def _unfit(self, found: Checkpoint) -> str | None:
        """Why a whole checkpoint is none of this run."""
        problem = found.recipe.difference(self._recipe)
        if problem is not None:
            return problem
        if found.next_epoch > self._num_epochs:
            return f"has {found.next_epoch} epochs behind it, more than the {self._num_epochs} that the run is to have"
        if found.batch % self._team.world_size or found.batch > self._data.dataset.num_train:
            return f"has a mini-batch of {found.batch}, which {self._team.world_size} ranks cannot take"
        if found.penalty_coefficient is None and found.next_epoch > 0:
            return "has no penalty_coefficient, which the first mini-batch has decided"
        return None

    def _of_other_data(self, found: Checkpoint) -> str | None:
        """How the images of today differ from those that the run was trained on."""
        names = getattr(self._data, "class_names", ()) or found.class_names
        for before, now in zip(found.class_names, names, strict=False):
            if before != now:
                return f"has the class {before!r} where the data of today have {now!r}"
        seen, given = ((*n.mean, *n.std) for n in (found.normalization, self._data.normalization))
        if len(seen) != len(given) or not all(map(_alike, seen, given)):
            return f"is of images with the mean {_shown(found)}, those of today have {_shown(self._data)}"
        return None

    def _newest_checkpoint(self) -> bytes:
        newest = self._checkpoints.newest()
        return b"" if newest is None else msgspec.msgpack.encode(store.read_state_bytes(newest))


def _kept_in_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the optimizer's groups hold beside what it was made with and its rate, such as a count of updates.

    Numbers that are not finite are left out: no file holds them.
    """

    def is_kept(name: str, value: Any) -> bool:
        made_with = optimizer.defaults.get(name, ...)
        changed = bool(value != (list(made_with) if isinstance(made_with, tuple) else made_with))
        return name != "lr" and changed and not (isinstance(value, float) and not math.isfinite(value))

    return [
        {name: value for name, value in group.items() if is_kept(name, value)}
        for group in stored.group_settings(optimizer)
    ]


def _alike(one: float, other: float) -> bool:
    """Another machine may sum in another order."""
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)


def _shown(of: Checkpoint | Data) -> str:
    return ", ".join(f"{value:.4g}" for value in of.normalization.mean)
