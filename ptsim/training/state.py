"""What changes while a run trains: network, optimizer, weight average, scaler, and where the run stands.

Everything here is in the checkpoint, so that a resumed run goes on bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ptsim.errors import FileFormatError, UsageError
from ptsim.network import Precision
from ptsim.prune.groups import find_groups
from ptsim.prune.lasso import GroupLasso
from ptsim.prune.reconfigure import Surgery, reconfigure
from ptsim.prune.structure import apply_structure, structure_of
from ptsim.training.config import Config
from ptsim.training.recipe import Recipe


class State:
    """The learner. `model` is the bare network; what torchrun or the compiler wrap around it is not state."""

    def __init__(self, config: Config, recipe: Recipe, model: nn.Module, device: torch.device) -> None:
        """A learner around `model`, at the start of training."""
        self.config, self.recipe, self.device = config, recipe, device
        self.model = self._placed(model)
        self.average = copy.deepcopy(self.model).requires_grad_(False) if config.ema_decay else None
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision is Precision.FP16)
        self.groups = find_groups(self.model, recipe.input_shape)
        self.lasso = GroupLasso(self.model, self.groups)
        self.next_epoch = 0
        self.penalty_coefficient: float | None = None if config.regularized else 0.0
        self.batch = config.batch
        self.learning_rate_scale = 1.0
        self.validation_accuracy: float | None = None
        self._refresh()

    @property
    def judged(self) -> nn.Module:
        """The network that validation runs: the weight average where there is one."""
        return self.model if self.average is None else self.average

    def set_learning_rate(self, planned: float) -> None:
        """The plan's rate, scaled as the mini-batch has grown."""
        for group in self.optimizer.param_groups:
            group["lr"] = planned * self.learning_rate_scale

    @torch.no_grad()
    def update_average(self) -> None:
        """Average ← decay · average + (1 - decay) · weights, in two kernels; nothing without an average."""
        if self.average is not None:
            torch._foreach_lerp_(self._averages, self._weights, 1 - self.config.ema_decay)

    @torch.no_grad()
    def copy_buffers_to_average(self) -> None:
        """Running statistics are averages already; the weight average takes them over."""
        if self.average is not None:
            for ours, theirs in zip(self.average.buffers(), self.model.buffers(), strict=True):
                ours.copy_(theirs)

    def prune(self) -> Surgery:
        """Reconfigure the network, and with it the optimizer's state and the weight average."""
        surgery = reconfigure(
            self.model,
            self.groups,
            threshold=self.config.threshold,
            optimizer=self.optimizer,
            shadows=() if self.average is None else (self.average,),
            mode=self.config.mode,
            channel_multiple=self.config.channel_multiple,
        )
        if surgery.changed:
            self._placed(self.model)
            self.groups = surgery.groups
            self.lasso = GroupLasso(self.model, self.groups)
            self._refresh()
        return surgery

    def structure(self) -> dict[str, Any]:
        """What pruning has made of the recipe's network."""
        return structure_of(self.model)

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers of the network that is handed over (the average where there is one), by name."""
        return dict(self.judged.state_dict())

    def more_tensors(self) -> dict[str, Tensor]:
        """The optimizer's tensors, and the network's own where `weights` gives the average, by name."""
        tensors = {
            f"optimizer/{name}/{key}": value
            for name, key, value in self._optimizer_entries()
            if isinstance(value, Tensor)
        }
        if self.average is not None:
            tensors |= {f"trained/{name}": value for name, value in self.model.state_dict().items()}
        return tensors

    def optimizer_scalars(self) -> dict[str, dict[str, Any]]:
        """The optimizer's entries that are no tensors, by parameter and key."""
        scalars: dict[str, dict[str, Any]] = {}
        for name, key, value in self._optimizer_entries():
            if not isinstance(value, Tensor):
                scalars.setdefault(name, {})[key] = value
        return scalars

    def load(
        self,
        weights: Mapping[str, Tensor],
        more: Mapping[str, Tensor],
        scalars: Mapping[str, Mapping[str, Any]],
        scaler: Mapping[str, Any],
    ) -> None:
        """Take over what a checkpoint of a network of this very structure holds.

        Raises:
            FileFormatError: names, shapes or entries do not match.
        """
        _load_weights(self.judged, weights)
        if self.average is not None:
            prefix = "trained/"
            _load_weights(self.model, {n[len(prefix) :]: t for n, t in more.items() if n.startswith(prefix)})
        parameters = dict(self.model.named_parameters())
        for name, tensor in more.items():
            if name.startswith("optimizer/"):
                path, _, key = name.removeprefix("optimizer/").rpartition("/")
                parameter = parameters.get(path)
                if parameter is None or (tensor.numel() > 1 and tensor.shape != parameter.shape):
                    raise FileFormatError("checkpoint", f"the optimizer's state {name!r} does not fit the network")
                # An optimizer keeps scalars such as Adam's step on the CPU; what is shaped like a weight lies like it.
                like = parameter if tensor.shape == parameter.shape and tensor.dim() else tensor
                self.optimizer.state[parameter][key] = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
        for path, entries in scalars.items():
            if path not in parameters:
                raise FileFormatError("checkpoint", f"the optimizer has no parameter {path!r}")
            self.optimizer.state[parameters[path]].update(entries)
        if self.scaler.is_enabled():
            known = self.scaler.state_dict()
            if scaler.keys() != known.keys() or any(
                isinstance(v, bool) or not isinstance(v, int | float) or not v >= 0 for v in scaler.values()
            ):
                raise FileFormatError(
                    "checkpoint", f"the scaler's state is {dict(scaler)}; expected numbers {[*known]}"
                )
            self.scaler.load_state_dict(dict(scaler))

    def _optimizer_entries(self) -> Iterator[tuple[str, str, Any]]:
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield name, key, value

    def _placed(self, model: nn.Module) -> nn.Module:
        layout = torch.channels_last if self.config.memory_format == "channels_last" else torch.contiguous_format
        return model.to(self.device, memory_format=layout)  # type: ignore[call-overload,no-any-return]

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


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The configured optimizer over all parameters."""
    parameters = list(model.parameters())
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    match config.optimizer:
        case "sgd":
            return torch.optim.SGD(parameters, momentum=config.momentum or 0.0, nesterov=config.nesterov, **common)
        case "adam":
            return torch.optim.Adam(parameters, **common)
        case "adamw":
            return torch.optim.AdamW(parameters, **common)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, momentum=config.momentum or 0.0, **common)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put stored parameters and buffers into a network of the same structure.

    Raises:
        FileFormatError: names or shapes do not match.
    """
    _load_weights(model, weights)


def _load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise FileFormatError(
            "checkpoint", f"the stored weights do not fit the network: {' '.join(str(error).split())[:300]}"
        ) from error
