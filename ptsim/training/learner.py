"""What changes while a run trains: network, optimizer, weight average, scaler, and where the run stands.

Everything here is in the checkpoint, so that a resumed run goes on bit for bit. Penalty and reconfiguration are
`PruneTrain`'s, the same object that other people's loops use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptsim.capture.copies import copied
from ptsim.capture.rehearsal import rehearse
from ptsim.errors import FileFormatError, UsageError
from ptsim.measure.profile import layout
from ptsim.network import Precision
from ptsim.optimizers import OPTIMIZERS
from ptsim.prune.structure import apply_structure
from ptsim.trace.schema import Dataset
from ptsim.training import stored
from ptsim.training.config import Config, to_settings
from ptsim.training.distributed import Team
from ptsim.training.facts import RunFacts
from ptsim.training.growth import learning_rate_scale
from ptsim.training.pruning import PruneTrain
from ptsim.training.recipe import Recipe
from ptsim.training.recorder import Recorder
from ptsim.training.wrapping import wrap


class Learner:
    """The learner. `model` is the bare network, `module` what the loop calls: the network compiled, or inside DDP."""

    def __init__(
        self, config: Config, recipe: Recipe, model: nn.Module, *, dataset: Dataset, team: Team, record: Path | None
    ) -> None:
        """A learner around `model`, at the start of training; the trace will lie in the folder `record`."""
        self.config, self.recipe, self.team, self.device = config, recipe, team, team.device
        self.model = self._placed(model)
        self.average = copied(self.model).requires_grad_(False) if config.ema_decay else None
        self.optimizer = OPTIMIZERS.find(config.optimizer).make(self.model.parameters(), config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision is Precision.FP16)
        self.next_epoch = 0
        self.batch = config.batch
        self.learning_rate_scale = 1.0
        self.recorder = Recorder(
            self.model,
            self.optimizer,
            input_shape=recipe.input_shape,
            record=record,
            facts=RunFacts(
                model=config.model,
                dataset=dataset,
                hyperparameters=to_settings(config),
                seed=config.seed,
                precision=config.precision,
                memory_format=config.memory_format,
            ),
            profile=config.profile,
            channel_maxima=config.record_channel_maxima,
            threshold=config.threshold,
            team=team,
            loggers=config.loggers,
        )
        self.recorder.owns_folder = True  # the run folder was made for this run
        self.module: nn.Module = self.model
        self.pruner = PruneTrain(
            self.model,
            self.optimizer,
            input_shape=recipe.input_shape,
            penalty_ratio=config.penalty_ratio,
            interval=config.interval,
            record=self.recorder,
            ema=self.average,
            scaler=self.scaler,
            rewrap=self.wrapped,
            criterion=config.criterion,
            regularizer=config.regularizer,
            threshold=config.threshold,
            mode=config.mode,
            channel_multiple=config.channel_multiple,
        )
        self._refresh()

    @property
    def judged(self) -> nn.Module:
        """The network that validation runs: the weight average where there is one."""
        return self.model if self.average is None else self.average

    def set_learning_rate(self, planned: float) -> None:
        """The plan's rate, scaled as the mini-batch has grown."""
        for group in self.optimizer.param_groups:
            group["lr"] = planned * self.learning_rate_scale

    def set_batch(self, batch: int) -> None:
        """Train with `batch` images over all ranks from now on, with the learning rate that goes with it."""
        self.batch = batch
        self.learning_rate_scale = learning_rate_scale(self.config.batch, batch, self.config.lr_rule)

    @torch.no_grad()
    def update_average(self) -> None:
        """Average ← decay · average + (1 - decay) · weights, in two kernels; nothing without an average.

        A plain copy, not torch's `AveragedModel`: it has the network's own names, which pruning and checkpoints use.
        """
        if self.average is not None:
            torch._foreach_lerp_(self._averages, self._weights, 1 - self.config.ema_decay)

    @torch.no_grad()
    def copy_buffers_to_average(self) -> None:
        """Running statistics are averages already; the weight average takes them over."""
        if self.average is not None:
            for ours, theirs in zip(self.average.buffers(), self.model.buffers(), strict=True):
                ours.copy_(theirs)

    def wrap(self) -> None:
        """Make the module that the loop calls."""
        self.recorder.follow(self.wrapped(self.model))

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The network as the loop calls it; made anew after every reconfiguration."""
        self._placed(model)
        self._refresh()
        idle = rehearse(model, self.recipe.input_shape, 2).idle if self.team.world_size > 1 else ()
        self.module = wrap(model, self.config, self.team, idle)
        return self.module

    def unwrap(self) -> None:
        """Forget the DDP around the network: it holds the connections on which the other ranks wait for this one."""
        self.module = self.model
        self.recorder.forget_module()

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers of the network that is handed over (the average where there is one), by name."""
        return stored.full_state(self.judged)

    def more_tensors(self) -> dict[str, Tensor]:
        """The optimizer's tensors, and the network's own where `weights` gives the average, by name."""
        tensors = stored.optimizer_tensors(self.model, self.optimizer)
        if self.average is not None:
            tensors |= {f"trained/{name}": value for name, value in stored.full_state(self.model).items()}
        return tensors

    def load(
        self,
        weights: Mapping[str, Tensor],
        more: Mapping[str, Tensor],
        scalars: Mapping[str, Mapping[str, Any]],
        groups: Sequence[Mapping[str, Any]],
        scaler: Mapping[str, Any],
    ) -> None:
        """Take over what a checkpoint of a network of this very structure holds.

        Raises:
            UsageError: names, shapes or entries do not match.
        """
        stored.load_full_state(self.judged, weights)
        if self.average is not None:
            stored.load_full_state(self.model, stored.part(more, "trained/"))
        stored.load_groups(self.optimizer, groups)
        stored.load_optimizer(self.model, self.optimizer, more, scalars)  # its form is one of the settings
        if self.scaler.is_enabled():
            known = self.scaler.state_dict()
            if scaler.keys() != known.keys() or any(
                isinstance(v, bool) or not isinstance(v, int | float) or not v >= 0 for v in scaler.values()
            ):
                raise UsageError(f"the scaler's state is {dict(scaler)}; expected numbers {[*known]}")
            self.scaler.load_state_dict(dict(scaler))

    def _placed(self, model: nn.Module) -> nn.Module:
        return model.to(self.device, memory_format=layout(self.config.memory_format))  # type: ignore[call-overload,no-any-return] # torch's gap

    def _refresh(self) -> None:
        """Look up again what surgery may have replaced."""
        self._weights: list[Tensor] = list(self.model.parameters())
        self._averages: list[Tensor] = [] if self.average is None else list(self.average.parameters())


def pruned_network(recipe: Recipe, structure: Mapping[str, Any]) -> nn.Module:
    """The recipe's network in the shape that `structure` describes, its weights yet to be loaded.

    Raises:
        FileFormatError: the structure is broken, or of another network.
    """
    model = recipe.build()
    try:
        apply_structure(model, dict(structure))
    except UsageError as error:
        raise FileFormatError("checkpoint", error.message) from error
    return model
