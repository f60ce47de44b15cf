"""How does any training loop leave a trace? A recorder watches network and optimizer, and writes what happened.

It prunes nothing: dense runs use it alone, and runs that another library prunes. `PruneTrain` and `ptsim train` record
through it.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import msgspec
import torch
from torch import Tensor, nn

from ptsim.capture.network import capture_network, refuse_scripts
from ptsim.errors import UsageError, on_one_line
from ptsim.measure.nvml import open_meter
from ptsim.network import MemoryFormat, Network, Precision
from ptsim.prune.density import THRESHOLD, checked_threshold, dense_counts
from ptsim.setting import image_shape, positive_number, real_number
from ptsim.trace.schema import AnyRecord, End, Epoch, Run
from ptsim.training.checkpoint import Totals
from ptsim.training.distributed import CommunicationMeter, Team, current_team
from ptsim.training.facts import (
    RunFacts,
    change_record,
    check_device,
    check_finite,
    check_numbers,
    checked_facts,
    checked_fraction,
    checked_loss,
    checked_settings,
    note_image_shape,
    num_outputs,
    product_layer,
    reducer_settings,
    run_record,
    seen_settings,
    shapes_of,
)
from ptsim.training.loggers import Logger
from ptsim.training.losses import LossSum
from ptsim.training.measured import Penalty, Unfinished, epoch_record, measure_epoch, unfinished_epoch
from ptsim.training.misuse import OnlyOne
from ptsim.training.profiling import layer_profile
from ptsim.training.tracefile import RunTrace, checked_folder
from ptsim.training.watch import Watch
from ptsim.training.wrapping import bare, bare_optimizer, called, is_compiled, refuse_spread

_T = TypeVar("_T")


class Recorder(OnlyOne):
    """Records a training loop: a trace that `ptsim cost`, `simulate` and `report` read.

    Example::

        recorder = ptsim.Recorder(model, optimizer, input_shape=(3, 32, 32), record="runs/dense")
        for epoch in range(90):
            for images, labels in loader:
                loss = criterion(model(images), labels)
                optimizer.zero_grad(); loss.backward(); optimizer.step()
                recorder.step(loss)                    # optional: the mean loss goes into the trace
            recorder.end_epoch(validation_accuracy=accuracy)
        recorder.close()

    Where another library changes the network between two epochs, the new architecture and the change are recorded;
    after it has made a new optimizer or module, `follow` tells the recorder.

    Attributes:
        network: the network itself, without what DDP or torch.compile have put around it.
        epoch: the epoch that is being trained, counting from 0.
        resident_bytes: of the GPU's memory that no step needs (ptsim's own images): no part of what is recorded.
        settings: hyper-parameters for the trace beside those that are seen; a pruner adds its own.
    """

    epoch = 0
    resident_bytes = 0
    final_accuracy: float | None = None
    regularizer: Callable[[], object] | None = None  # what a profile of the layers runs as one
    owns_folder = False  # True: a trace that is there is the remains of this run, cut off at its start
    _ended = False
    _images_told = 0

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        input_shape: tuple[int, int, int],
        record: str | Path | None = None,
        facts: RunFacts | None = None,
        settings: Mapping[str, Any] | None = None,
        profile: bool = False,
        channel_maxima: bool = False,
        threshold: float = THRESHOLD,
        team: Team | None = None,
        loggers: Sequence[str | Logger] = (),
    ) -> None:
        """Nothing is written before the first epoch ends, or before `begin_run`.

        Args:
            model: in training, bare or inside DDP or torch.compile; hooks watch it.
            optimizer: its optimizer.
            input_shape: (channels, height, width) of an image.
            record: the folder for the trace; None records nothing, and `end_epoch` still says what happened.
            facts: what cannot be seen: names, hyper-parameters, seed.
            settings: hyper-parameters beside those that can be seen on the optimizer; they go before those of `facts`.
            profile: measure every architecture layer by layer; takes a second copy of the network for a moment.
            channel_maxima: also record the largest |w| of every output channel.
            threshold: a channel whose largest |w| is below counts as sparse.
            team: the ranks; None is torch.distributed's default group, if there is one.
            loggers: names such as "tensorboard", or `ptsim.training.loggers.Logger`s; they mirror the trace.

        Raises:
            UnsupportedModelError: the network cannot be traced.
            UsageError: an `input_shape` that is none; facts, settings, a logger or a network that cannot be used.
        """
        refuse_spread(model)
        self.input_shape = image_shape(input_shape)
        self.facts = checked_facts(facts)
        self.module = model
        self.network = bare(model)
        refuse_scripts(self.network)  # nor do they take hooks
        self.optimizer = bare_optimizer(optimizer)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.team = team or current_team(self.device)
        self.folder = checked_folder(record)
        self.meter = open_meter(self.device)
        self._communication = CommunicationMeter(model)
        begins = functools.partial(_epoch_begins, weakref.ref(self))
        self.watch = Watch(called(model), self.optimizer, self.device, begins)
        self._watch_again()
        self.totals = Totals()
        self.profiles = profile
        self.channel_maxima = channel_maxima
        self.threshold = checked_threshold(threshold)
        self.settings = checked_settings(settings)
        self._trace = RunTrace(self.folder, leads=self.team.leads, loggers=loggers)
        self.continue_epoch(None)
        self._num_classes = self.facts.dataset.num_classes if self.facts.dataset else None
        self._capture()
        self.initial_counts = dense_counts(self.network, 0.0)  # all of them
        self._session_start = time.perf_counter()

    @property
    def architecture(self) -> Network:
        """The network as it is now, as data."""
        return self._architecture

    @property
    def num_bytes(self) -> int:
        """Length of the trace so far; 0 where nothing is written."""
        return self._trace.num_bytes

    @property
    def sha256(self) -> str | None:
        """Digest of the trace so far; None where nothing is written."""
        return self._trace.sha256

    @property
    def records(self) -> bool:
        """This rank writes a trace."""
        return self._trace.writes

    # What the loop calls

    def follow(self, module: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Watch another module (the network wrapped again) or another optimizer from now on.

        Raises:
            UsageError: the module holds another network.
        """
        if module is not None:
            refuse_spread(module)
            if {id(p) for p in bare(module).parameters()} != {id(p) for p in self.network.parameters()}:
                raise UsageError("the module holds another network than the one that is recorded")
            self.module = module
            self._communication = CommunicationMeter(module)
        self.optimizer = self.optimizer if optimizer is None else bare_optimizer(optimizer)
        self._watch_again()

    def _watch_again(self) -> None:
        layer = product_layer(self.network) if self.facts.precision is None else None
        self.watch.follow(called(self.module), self.optimizer, layer=layer, compiled=is_compiled(self.module))

    def forget_module(self) -> None:
        """Hold nothing but the bare network: the run is over."""
        self.module = self.network
        self._communication = CommunicationMeter(self.network)

    def data(self, batches: Iterable[_T]) -> Iterator[_T]:
        """The batches of a loader, with the wait for each timed exactly (optional)."""
        return self.watch.data(batches)

    def step(self, loss: Tensor | float, num_images: int | None = None) -> None:
        """Tell the loss of a training step (optional): a mean over images; nothing waits for the device.

        Args:
            loss: a scalar.
            num_images: of this step; None is what the hooks saw since the last call.
        """
        loss = checked_loss(loss)
        told = None if num_images is None else positive_number("num_images", num_images)
        seen = self.watch.num_images - self._images_told
        if told is not None and seen == 0:
            self.watch.count(told)
        self._images_told = self.watch.num_images
        self._losses.add(loss, told or seen or 1)

    def end_epoch(
        self,
        validation_accuracy: float | None = None,
        *,
        validation_loss: float | None = None,
        train_accuracy: float | None = None,
    ) -> Epoch:
        """Record the epoch that has just been trained.

        Args:
            validation_accuracy: fraction 0..1 of the validation images that the network gets right.
            validation_loss: mean over the validation images.
            train_accuracy: fraction 0..1 over the epoch's training images.

        Raises:
            UsageError: no training step since the last call, or a number that is none.
            TrainingError: the trace cannot be written, or the loss is not a finite number.
        """
        return self.record_epoch(
            validation_accuracy, validation_loss=validation_loss, train_accuracy=train_accuracy, penalty=Penalty()
        )

    def close(self, status: Literal["clean", "interrupted", "failed"] = "clean", reason: str | None = None) -> None:
        """End the run: its last record, and no more watching. Calling it again does nothing.

        A recorder that is never closed ends its trace when it is forgotten or the program ends without an error.
        """
        self.watch.release()
        self._ended = True
        self._trace.end(self._end(status, reason))

    def abandon(self) -> None:
        """Stop watching and close the file without an end: another recorder goes on with the trace."""
        self.watch.release()
        self._ended = True
        self._trace.abandon()

    def _end(self, status: Literal["clean", "interrupted", "failed"], reason: str | None) -> End:
        return End(
            status=status,
            reason=reason,
            epochs=self.epoch,
            final_accuracy=self.final_accuracy,
            wall_s=self.totals.wall_s + time.perf_counter() - self._session_start,
            num_iterations=self.totals.num_iterations,
            energy_j=self.totals.energy_j,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None:
            self.close()
        elif isinstance(error, KeyboardInterrupt):
            self.close("interrupted", "SIGINT")
        else:
            self.close("failed", on_one_line(error) or type(error).__name__)

    # What PruneTrain and ptsim's own loop call

    def begin_run(self) -> None:
        """Write what is known before the first epoch: the run, its first architecture and that one's profile."""
        if self._trace.begun:
            return
        self._refuse_foreign_trace()
        self._trace.begin(self._run_record, resumable=self.owns_folder)
        self.describe()

    def _refuse_foreign_trace(self) -> None:
        if not self.owns_folder:
            self._trace.refuse_foreign()

    def continue_trace(self, num_bytes: int, sha256: str | None = None) -> None:
        """Go on with the trace from where it had this length and digest: what came later is recorded anew."""
        self._trace.go_on(num_bytes, sha256)

    def unfinished(self) -> Unfinished | None:
        """What has been trained of the present epoch; None at its start."""
        return unfinished_epoch(self.watch, self._communication, self._losses, self._earlier)

    def continue_epoch(self, earlier: Unfinished | None) -> None:
        """Go on within an epoch of which `earlier` was trained; None at an epoch's start."""
        self._earlier = earlier or Unfinished()
        self._earlier.tell(self.watch)
        self._images_told = 0
        self._losses: LossSum = LossSum(self.device, self._earlier.loss_sum, self._earlier.loss_images)

    def describe(self, *, profile: bool = True) -> None:
        """Write the present architecture, with its profile, unless the trace has it."""
        criterion = self.facts.settings({}, self.settings).get("criterion")
        if self._trace.describe(self._architecture, criterion) and profile:
            self.profile()

    def write(self, record: AnyRecord) -> None:
        """Append a record; nothing on ranks that do not record."""
        self._trace.write(record)

    def refresh(self, module: nn.Module | None = None) -> Network:
        """Look at the network again after it has changed; the architecture that it had before."""
        before = self._architecture
        self._capture()
        self.follow(module)
        return before

    def record_epoch(
        self,
        validation_accuracy: float | None,
        *,
        penalty: Penalty,
        validation_loss: float | None = None,
        train_loss: float | None = None,
        train_accuracy: float | None = None,
    ) -> Epoch:
        """As `end_epoch`, with the penalty and, where the loop knows it better, the mean loss."""
        told = {
            "validation_accuracy": checked_fraction("validation_accuracy", validation_accuracy),
            "train_accuracy": checked_fraction("train_accuracy", train_accuracy),
            "validation_loss": None if validation_loss is None else real_number("validation_loss", validation_loss),
        }
        if train_loss is not None:
            told["train_loss"] = real_number("train_loss", train_loss)
        if self._ended:
            raise UsageError("the recorder is closed: end_epoch belongs before close")
        measured = measure_epoch(self.watch, self.meter, self._communication, epoch=self.epoch, earlier=self._earlier)
        note_image_shape(self.watch.image_shape, self.input_shape)
        self.begin_run()
        record = msgspec.structs.replace(epoch_record(self, measured, self._losses, penalty), **told)
        check_finite(record)
        self.write(record)
        self.final_accuracy = record.validation_accuracy
        self.totals = self.totals.after(record)
        self.epoch += 1
        self.watch.reset()
        self.continue_epoch(None)
        self._look_for_changes()
        self._trace.plan_end(self._end("clean", None))
        return record

    def profile(self, batch: int | None = None) -> None:
        """Measure the present architecture layer by layer, on the rank that records; at `batch` images, if it fits."""
        if self.records and self.profiles and (found := layer_profile(self, batch)) is not None:
            self.write(found)

    def profile_missing(self, batch: int) -> None:
        """As `profile`, unless the trace has it: the run may not have been going to train this network any further."""
        if not self._trace.has_profile(self._architecture.id, batch):
            self.profile(batch)

    @property
    def batch_per_gpu(self) -> int:
        """Images of most updates of this epoch on this rank, or of the last epoch's before the first one."""
        return self.watch.usual_step or self.watch.batch or 1

    @property
    def precision(self) -> Precision:
        """Of the training passes."""
        return self.facts.precision or self.watch.precision

    @property
    def memory_format(self) -> MemoryFormat:
        """Of the images."""
        return self.facts.memory_format or self.watch.memory_format

    def epoch_begins(self) -> None:
        """The watch starts an epoch's clock now."""
        check_device(self.network, self.device)
        if self._trace.goes_on:
            self.begin_run()  # says at once if the trace that the run goes on with is not there
        elif not self._trace.begun:
            self._refuse_foreign_trace()
        with self.watch.paused():
            self._look_for_changes()
        self.meter.start()
        wrapped = isinstance(self.module, nn.parallel.DistributedDataParallel)
        around = None if wrapped else self.watch.data_parallel  # made after the recorder, by a trainer perhaps
        self._communication = CommunicationMeter(around or self.module)

    def spend_time(self) -> Totals:
        """The totals up to now."""
        now = time.perf_counter()
        self.totals = msgspec.structs.replace(self.totals, wall_s=self.totals.wall_s + now - self._session_start)
        self._session_start = now
        return self.totals

    def _capture(self) -> None:
        """Describe the network as it is now."""
        if self._num_classes is None:
            self._num_classes = num_outputs(self.network, self.input_shape)
        if self.folder is not None:
            check_numbers(self.network)
        self._shapes = shapes_of(self.network)
        self._architecture = capture_network(
            self.network,
            name=self.facts.model or type(self.network).__name__,
            input_shape=self.input_shape,
            num_classes=self._num_classes,
        )

    def _look_for_changes(self) -> None:
        """Record that somebody else has changed the network since the last epoch."""
        if shapes_of(self.network) == self._shapes:
            return
        before = self.refresh()
        if self.epoch == 0 and not self._trace.begun:
            self.initial_counts = dense_counts(self.network, 0.0)
            return
        self.describe()
        self.write(change_record(before, self._architecture, epoch=max(0, self.epoch - 1), batch=self.batch_per_gpu))

    def _run_record(self) -> Run:
        batch = self.batch_per_gpu * self.team.world_size
        seen = seen_settings(self.optimizer, self.module, batch=batch, rate=self.watch.learning_rate)
        seen |= reducer_settings(self.watch.data_parallel)
        return run_record(
            msgspec.structs.replace(
                self.facts,
                model=self.architecture.name,
                hyperparameters=self.facts.settings(seen, self.settings),
                precision=self.precision,
                memory_format=self.memory_format,
            ),
            network=self.architecture,
            optimizer=self.optimizer,
            num_train=max(1, (self.watch.num_images + self._earlier.num_images) * self.team.world_size),
            team=self.team,
            device=self.meter.info(),
        )


def _epoch_begins(recorder: weakref.ref[Recorder]) -> None:
    alive = recorder()
    if alive is not None:
        alive.epoch_begins()
