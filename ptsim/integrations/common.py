"""What do all trainers' callbacks share? A PruneTrain that is made late, restored early, and ends an epoch once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptsim.errors import UsageError
from ptsim.prune.structure import apply_structure
from ptsim.setting import image_shape
from ptsim.training.outcome import EpochOutcome
from ptsim.training.pruner_state import checked
from ptsim.training.pruning import PruneTrain
from ptsim.training.stored import has_structure, reshape
from ptsim.training.wrapping import bare_optimizer


class Pruning:
    """A PruneTrain on a part of the trainer's module; `losses` are those of the backward passes since the last update.

    A trainer makes its optimizer after the callback, loads weights before the optimizer, and may validate after an
    epoch or not; this class keeps the order that PruneTrain needs.
    """

    def __init__(self, *, network: str | None, input_shape: tuple[int, int, int], settings: Mapping[str, Any]) -> None:
        """Nothing happens before `begin`.

        Args:
            network: the attribute of the trainer's module that holds the network; None is the module itself.
            input_shape: (channels, height, width) of an image.
            settings: the other keywords of PruneTrain.
        """
        self._path, self._input_shape, self._settings = network, image_shape(input_shape), dict(settings)
        self._pruner: PruneTrain | None = None
        self._stored: Mapping[str, Any] | None = None
        self.losses: list[Tensor] = []
        self._trained = False

    @property
    def pruner(self) -> PruneTrain:
        """The PruneTrain of the run.

        Raises:
            UsageError: training has not begun.
        """
        if self._pruner is None:
            raise UsageError("training has not begun, so there is no PruneTrain yet")
        return self._pruner

    def restore(self, module: nn.Module, state: Mapping[str, Any]) -> None:
        """Give a freshly built module the pruned shapes of a `state`, so that its stored weights can be loaded.

        Raises:
            UsageError: not a state of PruneTrain, or of another network.
        """
        self.reshape(module, state)
        self._stored = state

    def reshape(self, module: nn.Module, state: Mapping[str, Any]) -> None:
        """The same without going on with the run; a module that has those shapes stays as it is.

        Raises:
            UsageError: not a state of PruneTrain, or of another network; or this one is pruned further.
        """
        network, structure = self._network(module), checked(state).structure
        if not has_structure(network, structure):
            apply_structure(network, structure)

    def regroup(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimizer of a restored module the groups that it had, before its own state is loaded.

        Raises:
            UsageError: it has another number of groups or other parameters.
        """
        if self._stored is not None:
            network, state = self._network(module), checked(self._stored)
            reshape(network, bare_optimizer(optimizer), None, state.structure, state.parameters)

    def begin(
        self,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """The trainer has its optimizers: the run begins, or goes on where `restore` found it.

        Raises:
            UsageError, UnsupportedModelError: as PruneTrain.
        """
        self.close(RuntimeError("the trainer was left before its end"))  # an earlier run, if nobody has closed it
        network = self._network(module)
        weights = {id(parameter) for parameter in network.parameters()}
        bare = [bare_optimizer(optimizer) for optimizer in optimizers]
        own = [o for o in bare if any(id(p) in weights for group in o.param_groups for p in group["params"])]
        if len(own) != 1:
            raise UsageError(
                f"{len(own)} of the trainer's optimizers train this {type(network).__name__}, expected one"
            )
        self._pruner = PruneTrain(network, own[0], input_shape=self._input_shape, scaler=scaler, **self._settings)
        self.losses, self._trained = [], False
        if self._stored is not None:
            self._pruner.load_state_dict(self._stored)
            self._trained = self._pruner.recorder.unfinished() is not None
            self._stored = None

    def before_update(self, *, summed: bool = False) -> None:
        """Gradients are there, unscaled and reduced: the penalty's is added, and the loss is told.

        Args:
            summed: the passes' losses are parts of one loss; otherwise the loss is their mean.
        """
        losses, self.losses = [loss.detach() for loss in self.losses], []
        if losses:
            total = torch.stack(losses).sum()
            self.pruner.step(total if summed else total / len(losses))
            self._trained = True

    def end_epoch(self, accuracy: float | None, loss: float | None) -> EpochOutcome | None:
        """Record the epoch, and prune if it is time; nothing where no update came since the last call."""
        if not self._trained:
            return None
        self._trained = False
        with torch.inference_mode(False), torch.enable_grad():  # trainers validate without gradients
            return self.pruner.end_epoch(accuracy, validation_loss=loss)

    def state(self) -> dict[str, Any] | None:
        """What `restore` takes, as plain data; the trainer itself stores weights and optimizer."""
        if self._pruner is None:
            return None if self._stored is None else dict(self._stored)
        return self._pruner.state_dict(tensors=False)

    def close(self, error: BaseException | None = None) -> None:
        """The run is over, by an error perhaps."""
        if self._pruner is not None:
            self._pruner.__exit__(type(error) if error is not None else None, error, None)

    def _network(self, module: nn.Module) -> nn.Module:
        if self._path is None:
            return module
        try:
            return module.get_submodule(self._path)
        except AttributeError as error:
            parts = ", ".join(name for name, _ in module.named_children()) or "none"
            raise UsageError(
                f"this {type(module).__name__} has no part {self._path!r} that is a network; its parts: {parts}",
                hint="network= names the attribute that holds the CNN",
            ) from error


def metric(metrics: Mapping[str, Any], name: str | None) -> float | None:
    """The number that the trainer has logged under `name`; None for None.

    Raises:
        UsageError: nothing was logged under that name.
    """
    if name is None:
        return None
    if name not in metrics:
        raise UsageError(
            f"nothing was logged as {name!r} in this epoch; logged: {', '.join(sorted(metrics)) or 'nothing'}"
        )
    return float(metrics[name])
