"""Prune in the Trainer of Hugging Face's transformers.

    from ptsim.integrations.huggingface import PruneTrainCallback

    callback = PruneTrainCallback(input_shape=(3, 224, 224), accuracy="eval_accuracy", interval=5, record="runs/mine")
    trainer = Trainer(model, args, …, callbacks=[callback])
    trainer.train()

    callback.restore(trainer, "out/checkpoint-500")       # its freshly built model gets the pruned shapes
    trainer.train(resume_from_checkpoint="out/checkpoint-500")

The Trainer clips before it calls its callbacks, so the penalty's gradient is added to gradients that are clipped
already. In a loop of one's own with Accelerate, `ptsim.PruneTrain` takes the prepared model and optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from ptsim.errors import UsageError
from ptsim.integrations.common import Pruning, metric
from ptsim.textfile import read_bytes, write_whole
from ptsim.training.checkpoint import writing
from ptsim.training.pruning import PruneTrain

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.training_args import ParallelMode
except ImportError as error:
    raise UsageError(
        "ptsim.integrations.huggingface needs the package transformers", hint="pip install 'ptsim[huggingface]'"
    ) from error

_FILE = "prunetrain.json"  # in a checkpoint's folder
_MOST_BYTES = 2**30


class PruneTrainCallback(TrainerCallback):  # type: ignore[misc] # transformers is not followed by mypy
    """PruneTrain as a callback: it prunes the Trainer's model, records the run, and adds a file to its checkpoints."""

    def __init__(
        self,
        *,
        input_shape: tuple[int, int, int],
        network: str | None = None,
        accuracy: str | None = None,
        loss: str | None = None,
        **settings: Any,
    ) -> None:
        """Nothing happens before `train`.

        Args:
            input_shape: (channels, height, width) of an image.
            network: the attribute of the model that holds the CNN; None is the model itself.
            accuracy: the name of the validation accuracy, a fraction, among the metrics ("eval_accuracy"); None
                records none.
            loss: the name of the validation loss ("eval_loss").
            settings: other keywords of `ptsim.PruneTrain`: penalty_ratio, interval, record, facts, loggers, ….
        """
        self._accuracy, self._loss = accuracy, loss
        self._pruning = Pruning(network=network, input_shape=input_shape, settings=settings)
        self._told = self._summed = self._validation_follows = self._restored = False
        self._metrics: dict[str, Any] = {}  # of this epoch's validation, on one data set after the other
        self._hook: Any = None

    @property
    def pruner(self) -> PruneTrain:
        """The PruneTrain of the run.

        Raises:
            UsageError: training has not begun.
        """
        return self._pruning.pruner

    def tell(self, loss: Tensor) -> None:
        """The mean loss of a training pass, for a `compute_loss` of one's own; otherwise the model's output has it."""
        if not self._told:
            self._told, self._summed = True, False
            self._pruning.losses.clear()  # what the output of this very pass held
        self._pruning.losses.append(loss.detach())

    def restore(self, trainer: Trainer, checkpoint: str | Path) -> None:
        """Give the Trainer's freshly built model the pruned shapes of a checkpoint's folder, before `train` resumes it.

        Raises:
            UsageError: the folder holds no file of this callback, or one of another network.
        """
        path = Path(checkpoint) / _FILE
        if not path.is_file():
            raise UsageError(f"{checkpoint} holds no {_FILE}: it was written without PruneTrainCallback")
        try:
            state = msgspec.json.decode(read_bytes(path, most=_MOST_BYTES))
        except msgspec.DecodeError as error:
            raise UsageError(f"{path} is damaged: {error}") from error
        if trainer.optimizer is not None:
            raise UsageError(
                "the Trainer has an optimizer already, which holds the unpruned weights",
                hint="a new Trainer; an optimizer of one's own is made by its create_optimizer",
            )
        self._pruning.restore(trainer.model, state)
        self._restored = True
        make = trainer.create_optimizer

        def create_optimizer(*arguments: Any, **named: Any) -> torch.optim.Optimizer:
            optimizer: torch.optim.Optimizer = make(*arguments, **named)
            self._pruning.regroup(trainer.model, optimizer)
            return optimizer

        trainer.create_optimizer = create_optimizer  # its state is loaded before any callback is called

    # The Trainer's events, in the order in which they come

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Model and optimizer are there, weights are loaded."""
        if args.load_best_model_at_end:
            raise UsageError(
                "load_best_model_at_end loads a checkpoint that may have more channels than the pruned network",
                hint="restore(trainer, checkpoint) gives a freshly built model the shapes of any checkpoint",
            )
        if args.parallel_mode == ParallelMode.DISTRIBUTED:
            raise UsageError(
                "the Trainer keeps its DistributedDataParallel to the end, so PruneTrain cannot change the network",
                hint="one process; or a loop of your own with Accelerate, where the network can be wrapped again",
            )
        if state.global_step and not self._restored:
            raise UsageError(
                "the Trainer goes on from a checkpoint, but PruneTrainCallback does not know its pruned shapes",
                hint="callback.restore(trainer, checkpoint) before trainer.train(resume_from_checkpoint=checkpoint)",
            )
        optimizer = parts["optimizer"]
        if self._hook is not None:  # of a run that was left by an error, of which the Trainer tells nobody
            self._hook.remove()
        self._pruning.begin(parts["model"], [optimizer], getattr(optimizer, "scaler", None))
        self._hook = parts["model"].register_forward_hook(self._passed, with_kwargs=True)
        self._validation_follows = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """After backward, all-reduce, unscaling and clipping."""
        if not self._pruning.losses:
            raise UsageError(
                f"the output of this {type(parts['model']).__name__} holds no loss",
                hint="give the labels to the model, or call callback.tell(loss) in compute_loss",
            )
        self._pruning.before_update(summed=self._summed)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """An epoch ends here, or with the validation that follows."""
        self._validation_follows, self._metrics = control.should_evaluate, {}
        if not control.should_evaluate:
            self._pruning.end_epoch(None, None)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """The metrics of the epoch's validation, or of one data set of several."""
        self._metrics |= parts["metrics"]
        if {self._accuracy, self._loss} - {None} <= self._metrics.keys():
            self._end_validated()

    def _end_validated(self) -> None:
        """The epoch ends with the metrics of its validation, if that has just been; a missing one is an error."""
        if self._validation_follows:
            self._validation_follows = False
            self._pruning.end_epoch(metric(self._metrics, self._accuracy), metric(self._metrics, self._loss))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """The validation of the epoch before is over."""
        self._end_validated()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """The checkpoint gets what the pruning needs to go on; plain data."""
        self._end_validated()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            with writing(folder / _FILE, begun=False):
                write_whole(folder / _FILE, msgspec.json.encode(self._pruning.state()))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """The trace gets its last record."""
        self._end_validated()
        self._pruning.end_epoch(None, None)  # of a run that ended within an epoch
        self._pruning.close()
        self._hook.remove()

    def _passed(self, model: nn.Module, _: Any, given: Mapping[str, Any], output: Any) -> None:
        """A training pass of the model: its loss is in its output, by Hugging Face's convention.

        A model that takes loss keywords is told the images of all passes of the update, and divides by these: then the
        passes' losses are parts of the update's.
        """
        if self._told or not (model.training and torch.is_grad_enabled()):
            return
        self._summed = given.get("num_items_in_batch") is not None
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None and isinstance(output, tuple):
            loss = output[0]
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._pruning.losses.append(loss.detach())
