"""Prune in a Lightning Trainer.

    from ptsim.integrations.lightning import PruneTrainCallback

    callback = PruneTrainCallback(input_shape=(3, 32, 32), accuracy="val_acc", interval=5, record="runs/mine")
    trainer = Trainer(max_epochs=90, callbacks=[callback])
    trainer.fit(module, train, val)                       # ckpt_path=… goes on with a pruned network

The penalty's gradient is added after backward, all-reduce and unscaling, and before clipping. Lightning's checkpoints
hold the pruned shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ptsim.errors import UsageError
from ptsim.integrations.common import Pruning, metric
from ptsim.training.pruning import PruneTrain

try:
    from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
except ImportError as error:
    raise UsageError(
        "ptsim.integrations.lightning needs the package lightning", hint="pip install 'ptsim[lightning]'"
    ) from error


# They keep a copy of the network, which stays as wide as it was. Older versions of Lightning have fewer of them.
_AVERAGES = tuple(
    getattr(callbacks, name) for name in ("StochasticWeightAveraging", "WeightAveraging") if hasattr(callbacks, name)
)


class PruneTrainCallback(Callback):  # type: ignore[misc] # lightning is not followed by mypy
    """PruneTrain as a callback: it prunes a part of the LightningModule, records the run, and is in its checkpoints."""

    def __init__(
        self,
        *,
        input_shape: tuple[int, int, int],
        network: str = "model",
        accuracy: str | None = None,
        loss: str | None = None,
        **settings: Any,
    ) -> None:
        """Nothing happens before `fit`.

        Args:
            input_shape: (channels, height, width) of an image.
            network: the attribute of the LightningModule that holds the CNN.
            accuracy: the name under which the module logs its validation accuracy, a fraction; None records none.
            loss: the name of its validation loss.
            settings: other keywords of `ptsim.PruneTrain`: penalty_ratio, interval, record, facts, loggers, ….
        """
        super().__init__()
        self._accuracy, self._loss = accuracy, loss
        self._ours: Any = None  # the hook that stands in for the module's own, which `_their_own` is if it is no method
        self._their_own: Any = None
        self._pruning = Pruning(network=network, input_shape=input_shape, settings=settings)

    @property
    def pruner(self) -> PruneTrain:
        """The PruneTrain of the run.

        Raises:
            UsageError: training has not begun.
        """
        return self._pruning.pruner

    def restore(self, module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Give a freshly built module the pruned shapes of a loaded Lightning checkpoint; `fit` does it by itself.

        For loading outside a Trainer: afterwards `module.load_state_dict(checkpoint["state_dict"])` fits.

        Raises:
            UsageError: the checkpoint was written without this callback.
        """
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if not state:
            raise UsageError(
                "the checkpoint was written without PruneTrainCallback, so its pruned shapes are not known"
            )
        self._pruning.restore(module, state)

    # Lightning's hooks, in the order in which they are called

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning loads weights before callbacks: the module's own hook, which comes first, makes the shapes."""
        if stage == "fit" and not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise UsageError(
                f"PruneTrain cannot change a network inside {type(trainer.strategy).__name__}",
                hint="one device, or strategy='ddp'",
            )
        average = next((c for c in trainer.callbacks if isinstance(c, _AVERAGES)), None)
        if stage == "fit" and average is not None:
            raise UsageError(
                f"{type(average).__name__} keeps a copy of the network that is not pruned with it",
                hint="PruneTrainCallback(…, ema=average) prunes an average that your module updates",
            )
        self._give_back(pl_module)
        theirs = pl_module.on_load_checkpoint
        self._their_own = vars(pl_module).get("on_load_checkpoint")

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            if stage == "fit":
                self.restore(pl_module, checkpoint)
            elif state := checkpoint.get("callbacks", {}).get(self.state_key):  # a pruned network is only tried out
                self._pruning.reshape(pl_module, state)
            theirs(checkpoint)

        pl_module.on_load_checkpoint = self._ours = on_load_checkpoint

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The module's own hook is its own again."""
        self._give_back(pl_module)

    def _give_back(self, pl_module: LightningModule) -> None:
        if self._ours is None or vars(pl_module).get("on_load_checkpoint") is not self._ours:
            return
        self._ours = None
        del pl_module.on_load_checkpoint
        if self._their_own is not None:
            pl_module.on_load_checkpoint = self._their_own

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the pruning; plain data."""
        return self._pruning.state() or {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizers are there."""
        self._pruning.begin(pl_module, trainer.optimizers, getattr(trainer.precision_plugin, "scaler", None))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The loss as backward takes it: scaled by the GradScaler, and divided where gradients accumulate."""
        scaler = self.pruner.scaler
        scale = scaler.scale(torch.ones_like(loss)) if scaler is not None and scaler.is_enabled() else 1
        self._pruning.losses.append(loss.detach() / scale * trainer.accumulate_grad_batches)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """After backward and unscaling, before clipping."""
        if optimizer is self.pruner.optimizer:
            self._pruning.before_update(summed=not pl_module.automatic_optimization)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch ends with its last validation, before the checkpoints that follow it are written."""
        if not trainer.sanity_checking and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            logged = trainer.callback_metrics
            self._end_epoch(trainer, pl_module, metric(logged, self._accuracy), metric(logged, self._loss))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch without validation ends here."""
        self._end_epoch(trainer, pl_module, None, None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The trace says how the run ended; Lightning calls no `teardown` then."""
        self._pruning.close(exception)
        self._give_back(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The trace gets its last record."""
        self._pruning.close()

    def _end_epoch(self, trainer: Trainer, module: LightningModule, accuracy: float | None, loss: float | None) -> None:
        outcome = self._pruning.end_epoch(accuracy, loss)
        if outcome is None or not outcome.pruned or not isinstance(trainer.strategy, DDPStrategy):
            return
        with torch.inference_mode(False), torch.enable_grad():
            trainer.strategy.model = module  # the old DistributedDataParallel is let go
            trainer.strategy.configure_ddp()
        self.pruner.rewrapped(self.pruner.network)
