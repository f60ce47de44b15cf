"""How a run goes from its configuration to its trace: start or resume, epochs, reconfigurations, checkpoints, end."""

from __future__ import annotations

import contextlib
import functools
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import nn

from ptsim import zoo
from ptsim.capture.network import capture_network
from ptsim.errors import FileFormatError, MissingMeasurementError, PtsimError, TrainingError, UsageError
from ptsim.hardware.catalog import match_device
from ptsim.measure.host_memory import keep_freed_memory
from ptsim.measure.nvml import open_meter
from ptsim.measure.profile import profile_network, tf32_allowed, tuned_convolutions
from ptsim.measure.timers import StepTimer
from ptsim.network import Network, Precision
from ptsim.prune.density import channel_maxima, dense_counts, layer_densities
from ptsim.trace.io import read_trace
from ptsim.trace.schema import End, Epoch, Reconfiguration
from ptsim.training import checkpoint as store
from ptsim.training.checkpoint import Checkpoint, Totals
from ptsim.training.config import Config, from_recorded, make_config, read_config, resolve, to_toml
from ptsim.training.data import load_data, mixed_seed
from ptsim.training.distributed import CommunicationMeter, Team, join_team, restarted
from ptsim.training.interruption import Interruption, interruptible
from ptsim.training.minibatch import grown_batch, learning_rate_scale, predicted_bytes
from ptsim.training.progress import Bars, Reporter, Silent
from ptsim.training.recipe import Recipe, check_fits, takes_in_channels
from ptsim.training.recorder import Recorder, run_record
from ptsim.training.schedule import EpochPlan, plan
from ptsim.training.state import State, load_weights, pruned_network
from ptsim.training.step import Sums, fits, train_epoch, validate
from ptsim.training.wrapping import wrap

_VALIDATION_BATCH = 128  # at least; evaluation keeps nothing for backward
_CONSULT_EVERY = 16  # iterations between exchanges of the ranks: one takes as long as a tiny all-reduce
_CONFIG, _TRACE, _CHECKPOINTS = "config.toml", "trace.jsonl", "checkpoints"


class RankOutOfMemoryError(torch.OutOfMemoryError):
    """A rank ran out of memory, and all of them know."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} has no memory left")
        self.rank = rank


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a finished run leaves behind.

    Attributes:
        folder: the run folder; `trace` and checkpoints lie in it.
        final_accuracy: on the whole validation set, of the network as it is handed over.
        penalty_coefficient: λ; 0 for a dense run.
    """

    folder: Path
    trace: Path
    epochs: int
    final_accuracy: float
    penalty_coefficient: float


def train(
    config: Config | Mapping[str, Any] | str | Path | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    progress: bool = False,
    on_epoch: Callable[[Epoch], object] | None = None,
) -> Result:
    """Train a network, dense or with PruneTrain, and record the run.

    Args:
        config: a configuration, its settings, or the path of a TOML file; None with `resume`.
        out: the run folder to make; None is `runs/MODEL-DATASET-rRATIO-sSEED`.
        resume: the run folder to go on with, from its last checkpoint.
        progress: show bars on stderr.
        on_epoch: called on every rank with each finished epoch, when it is recorded and stored; no epoch's time
            includes it.

    Raises:
        UsageError: a wrong setting, missing data, or an `out` that holds another run.
        UnsupportedModelError: the model cannot be traced or pruned.
        TrainingError: the loss became NaN, the disk is full, a rank is lost. The last checkpoint is whole.
        KeyboardInterrupt: after SIGINT or SIGTERM; the trace ends "interrupted" and the run can be resumed.
    """
    if resume is not None:
        if config is not None or out is not None:
            raise UsageError("a resumed run takes its configuration and its folder from the run; give nothing else")
        folder = Path(resume)
        config = recorded_config(folder)
    else:
        if not isinstance(config, Config):
            settings = read_config(config) if isinstance(config, str | Path) else config or {}
            config = make_config(settings)
        folder = Path(out) if out is not None else default_folder(config)
    with join_team(config.device) as team, interruptible() as interruption:
        config = resolve(config, device=str(team.device))
        going_on = resume is not None or team.from_leader(lambda: _goes_on(folder, config)) == b"yes"
        devices = [team.device] if team.device.type == "cuda" else []
        if team.device.type == "cpu":
            keep_freed_memory()
        reporter: Reporter = Bars() if progress and team.leads else Silent()
        with torch.random.fork_rng(devices=devices), _device_settings(config), reporter:
            trainer = Trainer(config, folder, team, interruption, reporter, on_epoch)
            return trainer.run(resume=going_on)


def load_model(run: str | Path, epoch: int | None = None) -> nn.Module:
    """The network that a run had after `epoch` (from 0; None: the last stored one), with its weights, ready to use.

    It is in evaluation mode on the CPU; images must be normalised as its `checkpoint.json` says. Of a run with a
    weight average it is the average, as validated. Rebuilt from the model's name; only a model from a user's file needs
    that file.

    Raises:
        UsageError: no such run, or an epoch that is not stored; lists those that are.
        FileFormatError: a damaged checkpoint, or a pickle in its place.
    """
    path = store.Folder(_run_folder(run) / _CHECKPOINTS).of_epoch(epoch)
    description = store.read_checkpoint(path)
    with torch.random.fork_rng(devices=[]):
        model = pruned_network(description.recipe, description.structure)
    load_weights(model, store.read_weights(path))
    return model.eval()


def load_recipe(run: str | Path, epoch: int | None = None) -> Recipe:
    """How the network of a stored epoch was built: model, classes, image shape.

    Raises:
        UsageError, FileFormatError: see `load_model`.
    """
    return store.read_checkpoint(store.Folder(_run_folder(run) / _CHECKPOINTS).of_epoch(epoch)).recipe


def recorded_config(folder: Path) -> Config:
    """The configuration of the run in `folder`.

    Raises:
        UsageError: there is no run.
        FileFormatError: its configuration is damaged.
    """
    return from_recorded(read_config(_run_folder(folder) / _CONFIG))


def default_folder(config: Config) -> Path:
    """Where a run goes when nobody says."""
    model = config.model.replace("/", "_").replace(":", "-")
    return Path("runs") / f"{model}-{config.dataset}-r{config.penalty_ratio:g}-s{config.seed}"


class Trainer:
    """One run on one rank."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        team: Team,
        interruption: Interruption,
        reporter: Reporter,
        on_epoch: Callable[[Epoch], object] | None = None,
    ) -> None:
        """Loads the data and builds the model; nothing is written yet.

        Raises:
            UsageError, UnsupportedModelError: see `train`.
        """
        self.config, self.folder, self.team = config, folder, team
        self.interruption, self.reporter, self.on_epoch = interruption, reporter, on_epoch
        self.checkpoints = store.Folder(folder / _CHECKPOINTS)
        self.meter = open_meter(team.device)
        self.plans = plan(config)
        _check_team(config, team)
        entry = zoo.find(config.model)
        any_channels = takes_in_channels(entry)
        self.data = load_data(config, input_shape=entry.input_shape, any_channels=any_channels, device=team.device)
        dataset = self.data.dataset
        self.recipe = Recipe(
            model=config.model,
            num_classes=dataset.num_classes,
            in_channels=dataset.input_shape[0] if any_channels else None,
            input_shape=dataset.input_shape,
        )
        self.totals = Totals()
        self.recorder: Recorder | None = None
        self._trace_bytes: int | None = None  # where a resumed trace goes on
        self.state: State
        self.network: Network

    def run(self, *, resume: bool) -> Result:
        """Train from where the run stands to its last epoch."""
        with contextlib.ExitStack() as stack:
            if not (resume and self._resume()):
                self._begin()
            elif self.state.next_epoch == len(self.plans) and self._ended_clean():
                return self._result()
            if self.team.leads:
                if not resume:
                    make_run_folder(self.folder, self.config)
                self.recorder = stack.enter_context(self._open_recorder())
            self._session_start = time.perf_counter()
            try:
                with self.team.working_together():
                    self._train()
            except KeyboardInterrupt as stopped:
                self._end("interrupted", str(stopped) or "SIGINT")
                raise
            except PtsimError as error:
                self._end("failed", error.message)
                raise
            except torch.OutOfMemoryError as error:
                where = f"rank {error.rank}" if isinstance(error, RankOutOfMemoryError) else str(self.team.device)
                problem = f"a mini-batch of {self.state.batch} needs more memory than {where} has left"
                self._end("failed", problem)
                raise TrainingError(problem, hint="a smaller batch, or with dynamic_batch a max_batch") from error
        return self._result()

    def _ended_clean(self) -> bool:
        """Whether the trace of a run that has stored its last epoch has its end: a kill may have come in between."""
        return self.team.from_leader(lambda: b"yes" if read_trace(self.folder / _TRACE).complete else b"") == b"yes"

    def _train(self) -> None:
        if self.state.next_epoch == 0:
            self._describe_architecture()
            self._save(keep=False)
        self._wrap()
        self.reporter.begin(self.folder.name, len(self.plans), self.state.next_epoch)
        while self.state.next_epoch < len(self.plans):
            try:
                self._epoch(self.plans[self.state.next_epoch])
                continue
            except torch.OutOfMemoryError as error:
                known = self.team.world_size == 1 or isinstance(error, RankOutOfMemoryError)
                if not (known and self._has_grown()):
                    raise
            self._step_back()  # out of the handler: its traceback would hold what the failed pass has allocated
        self._end("clean", None)

    def _epoch(self, epoch_plan: EpochPlan) -> None:
        """Train and validate one epoch, prune if it is time, and store the state."""
        state, team = self.state, self.team
        epoch = epoch_plan.epoch
        # Random numbers of an epoch depend on (seed, epoch, rank) alone, so a checkpoint needs no generator's state.
        torch.manual_seed(mixed_seed(self.config.seed, epoch, team.rank))
        state.set_learning_rate(epoch_plan.learning_rate)
        if team.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(team.device)
        communication = CommunicationMeter(self.module)
        self.meter.start()
        timer = StepTimer(team.device)
        num_iterations = self.data.dataset.num_train // state.batch
        batches = self.data.training_batches(epoch, state.batch, team.share)
        trained = train_epoch(
            state,
            self.module,
            self.reporter.track(batches, num_iterations),
            epoch_plan,
            team=team,
            timer=timer,
            consult=self._consult,
        )
        seconds, steps = timer.finish()
        use = self.meter.stop()
        peak_bytes = torch.cuda.max_memory_allocated(team.device) if team.device.type == "cuda" else None
        team.average_buffers(state.model)
        state.copy_buffers_to_average()
        validated, validation_s = self._validated()
        state.validation_accuracy = validated.accuracy
        channels, weights = dense_counts(state.model, self.config.threshold)
        gradient_bytes = self.network.num_parameters * 4 if team.world_size > 1 else 0
        coefficient = (state.penalty_coefficient or 0.0) if epoch_plan.regularized else 0.0
        # The timer's backward ends when the last all-reduce does: what was exposed of it is taken out.
        exposed_s = min(communication.exposed_s(trained.num_iterations), seconds.backward_s)
        record = Epoch(
            epoch=epoch,
            architecture=self.network.id,
            batch_per_gpu=state.batch // team.world_size,
            world_size=team.world_size,
            learning_rate=state.optimizer.param_groups[0]["lr"],
            num_iterations=trained.num_iterations,
            num_images=trained.num_images,
            penalty_coefficient=coefficient,
            train_loss=trained.loss,
            penalty=coefficient * float(state.lasso.value()),
            train_accuracy=trained.accuracy,
            validation_loss=validated.loss,
            validation_accuracy=validated.accuracy,
            channel_sparsity=1 - channels / self.initial[0],
            weight_sparsity=1 - weights / self.initial[1],
            measured_time=msgspec.structs.replace(
                seconds,
                backward_s=seconds.backward_s - exposed_s,
                validation_s=validation_s,
                exposed_communication_s=exposed_s,
            ),
            measured_step=steps,
            allreduce_bytes=gradient_bytes * trained.num_iterations,
            peak_memory_bytes=peak_bytes,
            device=use,
            densities=layer_densities(state.model, self.config.threshold),
            channel_maxima=channel_maxima(state.model) if self.config.record_channel_maxima else None,
        )
        self._record(record)
        self.reporter.epoch(record)
        energy_j = None if use is None or use.energy_j is None else (self.totals.energy_j or 0.0) + use.energy_j
        self.totals = Totals(
            wall_s=self.totals.wall_s,
            num_iterations=self.totals.num_iterations + trained.num_iterations,
            energy_j=energy_j,
        )
        self._consult(None, False)
        if epoch_plan.reconfigures:
            self._reconfigure(epoch_plan)
        state.next_epoch = epoch + 1
        last = state.next_epoch == len(self.plans)
        self._save(keep=last or epoch_plan.reconfigures or state.next_epoch % self.config.keep_every == 0)
        if self.on_epoch is not None:
            self.on_epoch(record)

    def _consult(self, iteration: int | None, out_of_memory: bool) -> None:
        """Stop, all ranks together, if one was interrupted or has no memory left.

        Ranks exchange this where the mini-batch may have outgrown one of them in every iteration, else now and then.

        Raises:
            KeyboardInterrupt: with the signal's name, and the rank's if it was another one.
            RankOutOfMemoryError: names the rank.
        """
        often = self.team.world_size == 1 or self.config.dynamic_batch
        if not (often or iteration is None or iteration % _CONSULT_EVERY == _CONSULT_EVERY - 1):
            return
        number, rank, without = self.team.consult(self.interruption.asked or 0, out_of_memory)
        if without >= 0:
            raise RankOutOfMemoryError(without)
        if number:
            name = signal.Signals(number).name
            raise KeyboardInterrupt(name if rank == self.team.rank else f"{name} on rank {rank}")

    def _reconfigure(self, epoch_plan: EpochPlan) -> None:
        """Prune the network; let the mini-batch grow into the freed memory; describe what came out."""
        state, team = self.state, self.team
        before, batch_before = self.network, state.batch // team.world_size
        start = time.perf_counter()
        surgery = state.prune()
        team.agree("what to prune", msgspec.json.encode(state.structure()))
        if surgery.changed:
            self._wrap()
        if team.device.type == "cuda":
            torch.cuda.synchronize(team.device)
        duration_s = time.perf_counter() - start
        if surgery.changed:
            self.network = self._captured()
        predicted_bytes = self._grow_batch() if self.config.dynamic_batch else None
        if not surgery.changed and state.batch // team.world_size != batch_before:
            self._wrap()  # what was compiled for the smaller mini-batch is of no use
        last = epoch_plan.epoch + 1 == len(self.plans)
        if last and surgery.changed:  # no epoch will judge what is handed over
            validated, _ = self._validated()
            state.validation_accuracy = validated.accuracy
        if self.recorder is not None:
            self.recorder.architecture(self.network)
        record = Reconfiguration(
            epoch=epoch_plan.epoch,
            before=before.id,
            after=self.network.id,
            channels_removed=surgery.channels_removed,
            layers_removed=tuple(surgery.layers_removed),
            measured_duration_s=duration_s,
            batch_before=batch_before,
            batch_after=state.batch // team.world_size,
            learning_rate_scale=state.learning_rate_scale,
            predicted_memory_bytes=predicted_bytes,
            notes=tuple(surgery.notes),
        )
        self._record(record)
        self.reporter.reconfigured(record)
        if surgery.changed and not last:
            self._profile()

    def _grow_batch(self) -> int:
        """Let the mini-batch fill the memory that pruning has freed; the bytes that one iteration then should need."""
        state, world_size, info = self.state, self.team.world_size, self.meter.info()
        device = match_device(info.name) if info.kind == "cuda" else None
        present = state.batch // world_size
        batch = grown_batch(
            self.network,
            self.config,
            batch_per_gpu=present,
            world_size=world_size,
            num_train=self.data.dataset.num_train,
            capacity_bytes=self._capacity_bytes(),
            device=device,
        )
        self.team.agree("the mini-batch", str(batch).encode())
        while batch > present and not self._fits(batch):  # the prediction was too low: step back
            batch -= self.config.batch_granularity
        self._set_batch(batch * world_size)
        return predicted_bytes(self.network, self.config, batch, device=device, data_parallel=world_size > 1)

    def _fits(self, batch_per_gpu: int) -> bool:
        """Whether a step with that mini-batch runs on every rank."""
        misfits = torch.tensor(float(not fits(self.state, batch_per_gpu)), device=self.team.device)
        return float(self.team.sum(misfits)) == 0

    def _has_grown(self) -> bool:
        """Whether the mini-batch is larger than the run's first, so that a smaller one can be tried."""
        return self.state.batch > self.config.batch

    def _step_back(self) -> None:
        """After an epoch that ran out of memory: the state before it, with a smaller mini-batch, on all ranks."""
        world_size = self.team.world_size
        failed = self.state.batch // world_size
        if not self._resume():
            raise TrainingError(f"no checkpoint in {self.checkpoints.path} to go back to")
        if self.recorder is not None and self._trace_bytes is not None:
            self.recorder.rewind(self._trace_bytes)  # the epoch may be in it, if pruning ran out of memory
        smaller = max(self.config.batch // world_size, failed - self.config.batch_granularity)
        self._set_batch(smaller * world_size)
        self._record(
            Reconfiguration(
                epoch=max(0, self.state.next_epoch - 1),
                before=self.network.id,
                after=self.network.id,
                channels_removed=0,
                layers_removed=(),
                measured_duration_s=0.0,
                batch_before=failed,
                batch_after=smaller,
                learning_rate_scale=self.state.learning_rate_scale,
                notes=(f"out of memory with {failed} images: the epoch begins again with {smaller}",),
            )
        )
        self._wrap()
        self._save(keep=True)

    def _validated(self) -> tuple[Sums, float]:
        start = time.perf_counter()
        batch = max(_VALIDATION_BATCH, self.state.batch // self.team.world_size)
        sums = validate(self.state, self.data.validation_batches(batch, self.team.share), team=self.team)
        return sums, time.perf_counter() - start

    def _describe_architecture(self) -> None:
        """The first architecture and its profile."""
        if self.recorder is not None and self.recorder.architecture(self.network):
            self._profile()

    def _profile(self) -> None:
        """Measure the present architecture layer by layer, on rank 0."""
        if self.recorder is None or not self.config.profile:
            return
        state = self.state
        coefficient = state.penalty_coefficient or 0.0
        add_gradient = functools.partial(state.lasso.add_gradient, coefficient)
        try:
            profile = profile_network(
                state.model,
                self.network,
                batch=state.batch // self.team.world_size,
                precision=self.config.precision,
                memory_format=self.config.memory_format,
                optimizer=state.optimizer,
                regularizer=add_gradient if self.config.regularized else None,
                device=self.team.device,
            )
        except MissingMeasurementError as error:  # the copy does not fit beside what trains; the run itself does
            warnings.warn(f"no profile of the architecture {self.network.id}: {error.message}", stacklevel=2)
            return
        self._record(profile)

    def _captured(self) -> Network:
        return capture_network(
            self.state.model,
            name=self.config.model,
            input_shape=self.recipe.input_shape,
            num_classes=self.recipe.num_classes,
        )

    def _wrap(self) -> None:
        self.module = wrap(self.state.model, self.config, self.team)

    def _set_batch(self, batch: int) -> None:
        self.state.batch = batch
        self.state.learning_rate_scale = learning_rate_scale(self.config.batch, batch, self.config.lr_rule)

    def _capacity_bytes(self) -> int:
        return self.config.memory_budget_bytes or self.meter.info().must_exist()[1]

    def _record(self, record: Any) -> None:
        if self.recorder is not None:
            self.recorder.write(record)

    def _save(self, *, keep: bool) -> None:
        """Store the state; the loop's own random numbers need no place in it."""
        if self.recorder is None:
            return
        state = self.state
        now = time.perf_counter()
        self.totals = msgspec.structs.replace(self.totals, wall_s=self.totals.wall_s + now - self._session_start)
        self._session_start = now
        description = Checkpoint(
            recipe=self.recipe,
            normalization=self.data.normalization,
            next_epoch=state.next_epoch,
            structure=state.structure(),
            architecture=self.network.id,
            penalty_coefficient=state.penalty_coefficient,
            batch=state.batch,
            learning_rate_scale=state.learning_rate_scale,
            validation_accuracy=state.validation_accuracy,
            initial_channels=self.initial[0],
            initial_weights=self.initial[1],
            optimizer=state.optimizer_scalars(),
            scaler=state.scaler.state_dict(),
            trace_bytes=self.recorder.num_bytes,
            totals=self.totals,
        )
        self.checkpoints.save(description, state.weights(), state.more_tensors(), keep=keep)

    def _begin(self) -> None:
        """Make the learner of a new run."""
        torch.manual_seed(self.config.seed)
        model = self.recipe.build()
        check_fits(model, self.recipe)
        self._take(model)
        self.initial = dense_counts(self.state.model, 0.0)  # all of them

    def _resume(self) -> bool:
        """Take over the newest checkpoint; False if there is none, so that the run begins anew in its folder.

        Raises:
            FileFormatError: the checkpoint is damaged.
        """
        content = self.team.from_leader(self._newest_checkpoint)
        if not content:
            return False
        description_json, weights, more = msgspec.msgpack.decode(content, type=tuple[bytes, bytes, bytes])
        place = self.checkpoints.path
        stored = store.parse_checkpoint(place, description_json)
        problem = self._unfit(stored)
        if problem is not None:
            raise FileFormatError(place, f"the newest checkpoint {problem}")
        self._take(pruned_network(stored.recipe, stored.structure))
        if self.network.id != stored.architecture:
            raise FileFormatError(
                place, f"the restored network is {self.network.id}, the checkpoint is of {stored.architecture}"
            )
        state = self.state
        state.load(
            store.parse_tensors(place, weights), store.parse_tensors(place, more), stored.optimizer, stored.scaler
        )
        state.next_epoch = stored.next_epoch
        state.penalty_coefficient = stored.penalty_coefficient
        state.batch, state.learning_rate_scale = stored.batch, stored.learning_rate_scale
        state.validation_accuracy = stored.validation_accuracy
        self.initial = stored.initial_channels, stored.initial_weights
        self.totals = stored.totals
        self._trace_bytes = stored.trace_bytes
        return True

    def _unfit(self, stored: Checkpoint) -> str | None:
        """Why a whole checkpoint is none of this run."""
        if stored.recipe != self.recipe:
            return f"is of {stored.recipe}, this run trains {self.recipe}"
        if stored.next_epoch > len(self.plans):
            return f"is from before epoch {stored.next_epoch}, the run has {len(self.plans)}"
        if stored.batch % self.team.world_size or stored.batch > self.data.dataset.num_train:
            return f"has a mini-batch of {stored.batch}, which {self.team.world_size} ranks cannot take"
        if stored.penalty_coefficient is None and stored.next_epoch > 0:
            return "has no penalty_coefficient, which the first mini-batch has decided"
        return None

    def _take(self, model: nn.Module) -> None:
        self.state = State(self.config, self.recipe, model, self.team.device)
        self.network = self._captured()

    def _newest_checkpoint(self) -> bytes:
        newest = self.checkpoints.newest()
        return b"" if newest is None else msgspec.msgpack.encode(store.read_state_bytes(newest))

    def _open_recorder(self) -> Recorder:
        path = self.folder / _TRACE
        if self._trace_bytes is not None:
            if not path.is_file() or path.stat().st_size < self._trace_bytes:
                raise FileFormatError(path, f"shorter than the {self._trace_bytes} bytes that the checkpoint tells of")
            return Recorder(path, keep_bytes=self._trace_bytes)
        recorder = Recorder(path)
        recorder.write(
            run_record(
                self.config,
                dataset=self.data.dataset,
                device=self.meter.info(),
                world_size=self.team.world_size,
                backend=self.team.backend,
            )
        )
        return recorder

    def _end(self, status: Literal["clean", "interrupted", "failed"], reason: str | None) -> None:
        if self.recorder is None:
            return
        record = End(
            status=status,
            reason=reason,
            epochs=self.state.next_epoch,
            final_accuracy=self.state.validation_accuracy,
            wall_s=self.totals.wall_s + time.perf_counter() - self._session_start,
            num_iterations=self.totals.num_iterations,
            energy_j=self.totals.energy_j,
        )
        if status == "clean":
            self.recorder.write(record)
        else:
            self.recorder.fail(record)

    def _result(self) -> Result:
        assert self.state.validation_accuracy is not None, "a run has at least one epoch"
        return Result(
            folder=self.folder,
            trace=self.folder / _TRACE,
            epochs=self.state.next_epoch,
            final_accuracy=self.state.validation_accuracy,
            penalty_coefficient=self.state.penalty_coefficient or 0.0,
        )


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
        store.write_atomically(unfinished / _CONFIG, to_toml(config).encode())
        unfinished.replace(folder)


def refuse_used_folder(folder: Path) -> None:
    """Make sure that `folder` is empty or not there.

    Raises:
        UsageError: it holds another run or other files.
    """
    if folder.is_dir() and any(folder.iterdir()):
        if (folder / _CONFIG).exists() or (folder / _TRACE).exists():
            raise UsageError(f"the output folder {folder} holds another run", hint=f"--resume {folder} goes on with it")
        raise UsageError(f"the output folder {folder} is not empty")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"the output folder {folder} is a file")


def _goes_on(folder: Path, config: Config) -> bytes:
    """Whether torchrun has restarted the very run in `folder`; otherwise the folder must be unused."""
    if restarted() and (folder / _CONFIG).exists() and recorded_config(folder) == config:
        return b"yes"
    refuse_used_folder(folder)
    return b"no"


def _run_folder(path: str | Path) -> Path:
    folder = Path(path)
    if folder.is_file():
        raise FileFormatError(folder, "found a file, expected a run folder")
    if not (folder / _CONFIG).is_file():
        raise UsageError(f"{folder} holds no run (no {_CONFIG})")
    return folder


def _check_team(config: Config, team: Team) -> None:
    """Rules that the number and kind of devices decide.

    Raises:
        UsageError: the mini-batch cannot be shared equally, or BatchNorm cannot be synchronised here.
    """
    if config.batch % team.world_size:
        raise UsageError(f"the mini-batch of {config.batch} cannot be shared equally by {team.world_size} ranks")
    if config.sync_batch_norm and team.device.type != "cuda":
        raise UsageError("setting 'sync_batch_norm' needs CUDA GPUs: torch has no synchronised BatchNorm for CPUs")
    if config.precision is Precision.TF32 and team.device.type != "cuda":
        warnings.warn("setting 'precision' has no effect: a CPU has no tf32, fp32 is used", stacklevel=2)
    if config.sync_batch_norm and team.world_size == 1:
        warnings.warn("setting 'sync_batch_norm' has no effect: there is one rank", stacklevel=2)


@contextlib.contextmanager
def _device_settings(config: Config) -> Iterator[None]:
    """The run's number of threads and TF32 switches (backward included).

    cuDNN may try its algorithms, since shapes change only at reconfigurations.
    """
    num_threads = torch.get_num_threads()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    try:
        with tf32_allowed(config.precision), tuned_convolutions():
            yield
    finally:
        torch.set_num_threads(num_threads)
