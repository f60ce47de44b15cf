"""How a run goes from its configuration to its end: start or resume, epochs, stepping back, the last record."""

from __future__ import annotations

import contextlib
import random
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn

from ptsim import zoo
from ptsim.errors import PtsimError, TrainingError, UsageError, lacks_gpu_memory, lacks_memory
from ptsim.measure.host_memory import keep_freed_memory
from ptsim.measure.profile import tuned_convolutions
from ptsim.measure.tf32 import tf32_allowed
from ptsim.network import Precision
from ptsim.trace.io import TRACE, read_trace, run_folder
from ptsim.trace.schema import DeviceInfo, Epoch, Reconfiguration
from ptsim.training.config import Config, make_config, read_config, resolve, to_settings
from ptsim.training.data import mixed_seed
from ptsim.training.datasets import load_data
from ptsim.training.distributed import Team, join_team
from ptsim.training.interruption import Interruption, interruptible
from ptsim.training.learner import Learner
from ptsim.training.live import DATASET, Collate, Datasets, name_of, offered
from ptsim.training.minibatch import BatchPolicy
from ptsim.training.progress import Bars, Reporter, Silent
from ptsim.training.recipe import Recipe, check_fits, takes_in_channels
from ptsim.training.runfolder import (
    CHECKPOINTS,
    changed_config,
    check_began_alike,
    default_folder,
    goes_on,
    load_model,
    load_recipe,
    make_run_folder,
    update_config,
)
from ptsim.training.schedule import EpochPlan, epoch_plans
from ptsim.training.step import Sums, train_epoch, validate
from ptsim.training.storing import Storage
from ptsim.training.weights import load_weights
from ptsim.usercode import digest

_VALIDATION_BATCH = 128  # at least; evaluation keeps nothing for backward
_CONSULT_EVERY = 16  # iterations between exchanges of the ranks: one takes as long as a tiny all-reduce


class TrainingInterrupted(KeyboardInterrupt):
    """The user or the scheduler has stopped the run in `folder`, which can be resumed."""

    def __init__(self, reason: str, folder: Path) -> None:
        super().__init__(reason)
        self.folder = folder


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
    model: nn.Module | None = None,
    data: Datasets | None = None,
    collate: Collate | None = None,
) -> Result:
    """Train a network, dense or with PruneTrain, and record the run.

    Args:
        config: a configuration, its settings, or the path of a TOML file; with `resume` the settings to change.
        out: the run folder to make; None is `runs/MODEL-DATASET-rRATIO-sSEED`.
        resume: the run folder to go on with, from its last checkpoint.
        progress: show bars on stderr.
        on_epoch: called on every rank with each finished epoch, when it is recorded and stored; no epoch's time
            includes it.
        model: a live network in place of a name; a copy of it is trained. `load_model(run, model=…)` gives the result.
        data: (training, validation) data sets of torch in place of a name; items are (tensor (C, H, W), class).
        collate: makes a mini-batch of the training set's items, as a DataLoader's `collate_fn` does: (images, classes),
            or with CutMix and MixUp (images, (N, classes) shares).

    Raises:
        UsageError: a wrong setting, missing data, or an `out` that holds another run.
        UnsupportedModelError: the model cannot be traced or pruned.
        TrainingError: the loss became NaN, the disk is full, a rank is lost. The last checkpoint is whole.
        TrainingInterrupted: after SIGINT or SIGTERM (a KeyboardInterrupt); the trace ends "interrupted".
    """
    with offered(model, data, collate):
        if resume is not None:
            if out is not None or isinstance(config, Config | str | Path):
                raise UsageError("a resumed run takes its configuration and its folder from the run; give changes only")
            folder = run_folder(resume)
            config = changed_config(folder, config or {})
        else:
            config = _new_config(config, model, data)
            folder = Path(out) if out is not None else default_folder(config)
        return _train(config, folder, resume=resume is not None, progress=progress, on_epoch=on_epoch)


def _new_config(
    config: Config | Mapping[str, Any] | str | Path | None, model: nn.Module | None, data: Datasets | None
) -> Config:
    """The configuration of a new run, with the names of what was given live."""
    live = {} if model is None else {"model": name_of(model)}
    if data is not None:
        live["dataset"] = DATASET
    if isinstance(config, Config):  # perhaps nobody has checked it
        return make_config(msgspec.structs.asdict(config) | live, quiet=True)
    settings = dict(read_config(config) if isinstance(config, str | Path) else config or {}) | live
    if isinstance(start := settings.get("start_from"), str | Path) and "model" not in settings:
        settings["model"] = load_recipe(start).model
    return make_config(settings)


def _train(
    config: Config, folder: Path, *, resume: bool, progress: bool, on_epoch: Callable[[Epoch], object] | None
) -> Result:
    with join_team(config.device, folder) as team, interruptible() as interruption:
        config = resolve(config, device=str(team.device))
        _check_started_alike(team, {"resume": resume})
        going_on = resume or team.from_leader(lambda: goes_on(folder, config)) == b"yes"
        devices = [team.device] if team.device.type == "cuda" else []
        if team.device.type == "cpu":
            keep_freed_memory()
        reporter: Reporter = Bars() if progress and team.leads else Silent()
        with _own_random_numbers(devices), _device_settings(config), reporter:
            trainer = Trainer(config, folder, team, interruption, reporter, on_epoch)
            return trainer.run(resume=going_on)


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
        """Loads the data; nothing is written yet.

        Raises:
            UsageError, UnsupportedModelError: see `train`.
        """
        self.config, self.folder, self.team = config, folder, team
        self.interruption, self.reporter, self.on_epoch = interruption, reporter, on_epoch
        self.plans = epoch_plans(config)
        _check_team(config, team)
        entry = zoo.find(config.model)
        any_channels = takes_in_channels(entry)
        self.data = load_data(config, input_shape=entry.input_shape, any_channels=any_channels, device=team.device)
        dataset = self.data.dataset
        team.agree("the data set", msgspec.json.encode((dataset, self.data.normalization)))
        self.recipe = Recipe(
            model=config.model,
            num_classes=dataset.num_classes,
            in_channels=dataset.input_shape[0] if any_channels else None,
            input_shape=dataset.input_shape,
            source_sha256=digest(zoo.file_of(config.model)),
        )
        self.storage = Storage(
            folder / CHECKPOINTS, data=self.data, recipe=self.recipe, team=team, num_epochs=len(self.plans)
        )
        self.learner: Learner

    def run(self, *, resume: bool) -> Result:
        """Train from where the run stands to its last epoch."""
        learner = self.storage.restore(self._learner) if resume else None
        if learner is not None:
            device = learner.recorder.meter.info()
            self.team.from_leader(lambda: self._check_beginning(device))
        self.learner = learner or self._begin()
        if learner is not None and learner.next_epoch == len(self.plans) and self._ended_clean():
            return self._result()
        if self.team.leads and not resume:
            make_run_folder(self.folder, self.config)
        try:
            with self.team.working_together():
                self._train()
        except KeyboardInterrupt as stopped:
            self.learner.recorder.close("interrupted", str(stopped) or "SIGINT")
            raise TrainingInterrupted(str(stopped) or "SIGINT", self.folder) from stopped
        except PtsimError as error:
            self.learner.recorder.close("failed", error.message)
            raise
        except (RuntimeError, MemoryError) as error:
            asked = self.interruption.asked
            if asked is not None and "DataLoader worker" in str(error):  # the signal has ended them, too
                self.learner.recorder.close("interrupted", asked.name)
                raise TrainingInterrupted(asked.name, self.folder) from error
            if not lacks_memory(error):
                raise
            raise self._stopped_without_memory(error) from error
        finally:
            self.learner.recorder.abandon()
            self.learner.unwrap()
        return self._result()

    def _stopped_without_memory(self, error: BaseException) -> TrainingError:
        """What to say of it; the trace ends with the same words."""
        where, hint = "this machine", "a smaller batch"
        if lacks_gpu_memory(error):
            where = f"rank {error.rank}" if isinstance(error, RankOutOfMemoryError) else str(self.team.device)
            hint += ", or with dynamic_batch a max_batch"
        problem = f"a mini-batch of {self.learner.batch} needs more memory than {where} has left"
        self.learner.recorder.close("failed", problem)
        return TrainingError(problem, hint=hint)

    def _check_beginning(self, device: DeviceInfo) -> bytes:
        check_began_alike(self.folder, self.data.dataset, device, self.team.world_size)
        return b""

    def _ended_clean(self) -> bool:
        """Whether the trace of a run that has stored its last epoch has its end: a kill may have come in between."""
        return self.team.from_leader(lambda: b"yes" if read_trace(self.folder / TRACE).complete else b"") == b"yes"

    def _begin(self) -> Learner:
        """The learner of a new run."""
        _seed(self.config.seed)
        model = self.recipe.build() if self.config.start_from is None else self._stored_network(self.config.start_from)
        if self.config.weights is not None:
            load_weights(model, self.config.weights, skip=self.config.weights_skip)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UsageError(f"nothing of model {self.recipe.model!r} is trained: no parameter requires a gradient")
        ranks = 1 if self.config.sync_batch_norm else self.team.world_size
        check_fits(model, self.recipe, self.config.batch // ranks)
        return self._learner(model)

    def _stored_network(self, run: str) -> nn.Module:
        """The last network of another run, if it is of the kind that this run trains."""
        recipe = load_recipe(run)
        problem = recipe.difference(self.recipe)
        if problem is not None:
            raise UsageError(f"the network in {run} {problem}")
        return load_model(run, trust=True).train()  # the user has named that very model for this run

    def _learner(self, model: nn.Module) -> Learner:
        learner = Learner(
            self.config, self.recipe, model, dataset=self.data.dataset, team=self.team, record=self.folder
        )
        learner.recorder.resident_bytes = getattr(self.data, "resident_bytes", 0)  # another package may have none
        if self.config.dynamic_batch:
            learner.pruner.grow = BatchPolicy(learner, self.data.dataset.num_train).grow
        return learner

    def _open_trace(self) -> bytes:
        learner = self.learner
        learner.recorder.begin_run()
        if 0 < learner.next_epoch < len(self.plans):
            learner.recorder.profile_missing(learner.batch // self.team.world_size)
        update_config(self.folder, self.config)
        return b""

    def _train(self) -> None:
        self.team.from_leader(self._open_trace)
        if self.learner.next_epoch == 0:
            self.storage.save(self.learner, keep=False)
        self.learner.wrap()
        self.reporter.begin(self.folder.name, len(self.plans), self.learner.next_epoch, self.data.dataset)
        while self.learner.next_epoch < len(self.plans):
            try:
                self._epoch(self.plans[self.learner.next_epoch])
                continue
            except RuntimeError as error:
                known = self.team.world_size == 1 or isinstance(error, RankOutOfMemoryError)
                if not (known and lacks_gpu_memory(error) and self._has_grown()):
                    raise
            self._step_back()  # out of the handler: its traceback would hold what the failed pass has allocated
        self.learner.recorder.close()

    def _epoch(self, plan: EpochPlan) -> None:
        """Train and validate one epoch, prune if it is time, and store the state."""
        learner, team = self.learner, self.team
        # Random numbers of an epoch depend on (seed, epoch, rank) alone, so a checkpoint needs no generator's state.
        _seed(mixed_seed(self.config.seed, plan.epoch, team.rank))
        learner.set_learning_rate(plan.learning_rate)
        learner.pruner.regularized = plan.regularized
        num_iterations = self.data.dataset.num_train // learner.batch
        batches = self.data.training_batches(plan.epoch, learner.batch, team.share)
        trained = train_epoch(learner, self.reporter.track(batches, num_iterations), plan, consult=self._consult)
        team.average_buffers(learner.model)
        learner.copy_buffers_to_average()
        validated = self._validated()
        last = plan.epoch + 1 == len(self.plans)
        learner.recorder.profiles = self.config.profile and not last
        outcome = learner.pruner.end_epoch(
            validated.accuracy,
            validation_loss=validated.loss,
            train_accuracy=trained.accuracy,
            reconfigure=plan.reconfigures,
        )
        self.reporter.epoch(outcome.epoch)
        if outcome.reconfiguration is not None:
            self.reporter.reconfigured(outcome.reconfiguration)
        if last and outcome.pruned:  # no epoch will judge what is handed over
            learner.recorder.final_accuracy = self._validated().accuracy
        learner.next_epoch = plan.epoch + 1
        keep = last or plan.reconfigures or learner.next_epoch % self.config.keep_every == 0
        self.storage.save(learner, keep=keep)
        if self.on_epoch is not None:
            self.on_epoch(outcome.epoch)
        if not last:  # a signal during validation costs no epoch
            self._consult(None, False)

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

    def _has_grown(self) -> bool:
        """Whether the mini-batch is larger than the run's first, so that a smaller one can be tried."""
        return self.learner.batch > self.config.batch

    def _step_back(self) -> None:
        """After an epoch that ran out of memory: the state before it, with a smaller mini-batch, on all ranks."""
        world_size = self.team.world_size
        failed = self.learner.batch // world_size
        self.learner.recorder.abandon()
        restored = self.storage.restore(self._learner)
        if restored is None:
            raise TrainingError(f"no checkpoint in {self.folder / CHECKPOINTS} to go back to")
        self.learner = restored
        restored.recorder.begin_run()  # the epoch may be in the trace, if pruning ran out of memory
        smaller = max(self.config.batch // world_size, failed - self.config.batch_granularity)
        restored.set_batch(smaller * world_size)
        restored.recorder.write(
            Reconfiguration(
                epoch=max(0, restored.next_epoch - 1),
                before=restored.recorder.architecture.id,
                after=restored.recorder.architecture.id,
                channels_removed=0,
                layers_removed=(),
                measured_duration_s=0.0,
                batch_before=failed,
                batch_after=smaller,
                learning_rate_scale=restored.learning_rate_scale,
                notes=(f"out of memory with {failed} images: the epoch begins again with {smaller}",),
            )
        )
        restored.recorder.profile(smaller)
        restored.wrap()
        self.storage.save(restored, keep=True)

    def _validated(self) -> Sums:
        batch = max(_VALIDATION_BATCH, self.learner.batch // self.team.world_size)
        return validate(self.learner, self.data.validation_batches(batch, self.team.share))

    def _result(self) -> Result:
        accuracy = self.learner.recorder.final_accuracy
        assert accuracy is not None, "a run has at least one epoch"
        return Result(
            folder=self.folder,
            trace=self.folder / TRACE,
            epochs=self.learner.next_epoch,
            final_accuracy=accuracy,
            penalty_coefficient=self.learner.pruner.penalty_coefficient or 0.0,
        )


def _check_started_alike(team: Team, ours: dict[str, Any]) -> None:
    """Make sure that all ranks have the same settings.

    Raises:
        UsageError: they do not; names the first rank and setting that differ from rank 0's.
    """
    theirs = msgspec.json.decode(team.from_leader(lambda: msgspec.json.encode(ours)))
    different = next((n for n, v in theirs.items() if msgspec.json.encode(ours[n]) != msgspec.json.encode(v)), None)
    problem = ""
    if different is not None:
        problem = f"rank {team.rank} was started with {different} = {ours[different]!r}, "
        problem += f"rank 0 with {theirs[different]!r}"
    problems = [text for text in team.gather(problem) if text]
    if problems:
        raise UsageError(problems[0], hint="start all ranks with the same command")


def _check_team(config: Config, team: Team) -> None:
    """Rules that the ranks decide: that all train the same, and what their number and kind allow.

    Raises:
        UsageError: ranks were started differently, the mini-batch cannot be shared equally, or BatchNorm cannot be
            synchronised here.
    """
    _check_started_alike(team, to_settings(config) | {"device": team.device.type})
    if config.batch % team.world_size:
        raise UsageError(f"the mini-batch of {config.batch} cannot be shared equally by {team.world_size} ranks")
    if config.sync_batch_norm and team.device.type != "cuda":
        raise UsageError("setting 'sync_batch_norm' needs CUDA GPUs: torch has no synchronised BatchNorm for CPUs")
    if config.precision is Precision.TF32 and team.device.type != "cuda":
        warnings.warn("setting 'precision' has no effect: a CPU has no tf32, fp32 is used", stacklevel=2)
    if config.sync_batch_norm and team.world_size == 1:
        warnings.warn("setting 'sync_batch_norm' has no effect: there is one rank", stacklevel=2)


def _seed(number: int) -> None:
    """Seed every generator from which a network or a data set may draw."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


@contextlib.contextmanager
def _own_random_numbers(devices: list[torch.device]) -> Iterator[None]:
    """Afterwards the generators of torch, Python and NumPy are where they were."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


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
