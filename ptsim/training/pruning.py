"""PruneTrain as an object for anybody's training loop: penalty, reconfiguration, record. `ptsim train` runs on it, too.

    pruner = ptsim.PruneTrain(model, optimizer, input_shape=(3, 224, 224), penalty_ratio=0.25, interval=5)
    for epoch in range(90):
        for images, labels in loader:
            loss = criterion(model(images), labels)
            optimizer.zero_grad(); loss.backward()
            pruner.step(loss)          # λ at the first call; the penalty's gradient at every call
            optimizer.step()
        pruner.end_epoch(validation_accuracy=accuracy)

The network and the optimizer are changed in place: parameters that shrink are replaced, the optimizer's groups and
state follow, and learning-rate schedulers keep working because they hold the optimizer.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec
import torch
from torch import Tensor, nn

from ptsim.criteria import CRITERIA
from ptsim.errors import UsageError
from ptsim.prune.criteria.coefficient import penalty_coefficient, proximal_shrinkages
from ptsim.prune.criteria.registry import Criterion
from ptsim.prune.density import dense_counts
from ptsim.prune.groups import ChannelGroups, find_groups
from ptsim.prune.reconfigure import Surgery, reconfigure
from ptsim.prune.structure import structure_of
from ptsim.setting import image_shape
from ptsim.trace.schema import Epoch, Reconfiguration
from ptsim.training import misuse, stored, wrapping
from ptsim.training.facts import RunFacts, checked_loss
from ptsim.training.hooks import hooks_on_update
from ptsim.training.loggers import Logger
from ptsim.training.measured import LastEpoch, Penalty, last_epoch
from ptsim.training.outcome import EpochOutcome, Growth, PruningSummary
from ptsim.training.prune_settings import checked_plan, make_settings, recorded
from ptsim.training.recorder import Recorder


class PruneTrain(misuse.OnlyOne):
    """Prunes a network while somebody's own loop trains it, and records the run.

    Attributes:
        network: the network itself, without what DDP or torch.compile have put around it.
        recorder: watches the loop and writes the trace.
        penalty_coefficient: λ; None before the first `step`.
        regularized: set it to False for epochs without the penalty, such as a last phase of fine-tuning.
        needs_rewrap: the network has changed since it was wrapped (DDP, torch.compile): wrap it again, and give the new
            module to `rewrapped`. Always False where `rewrap` does it, and where nothing is wrapped.
        module: what the loop calls: the model as it was given, or what `rewrap` or the loop has last put around it.
    """

    _in_place_of_a_copy = "state_dict() and load_state_dict() store it and go on with it"
    needs_rewrap = False
    grow: Callable[[], Growth] | None = None
    learning_rate_scale = 1.0
    _first_batch: int | None = None
    _proposed: int | None = None
    _last: LastEpoch | None = None
    _num_reconfigurations = 0
    _layers_removed: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        input_shape: tuple[int, int, int],
        penalty_ratio: float = 0.25,
        interval: int = 5,
        record: str | Path | Recorder | None = None,
        ema: nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
        rewrap: Callable[[nn.Module], nn.Module] | None = None,
        facts: RunFacts | None = None,
        loggers: Sequence[str | Logger] = (),
        **settings: Any,
    ) -> None:
        """Nothing of the network changes before the first `step`.

        Args:
            model: any network that torch.fx can trace, on its device; bare, or inside DDP or torch.compile.
            optimizer: any torch optimizer with per-element state; it holds all of the network's trainable weights.
            input_shape: (channels, height, width) of an image.
            penalty_ratio: the penalty's share in the first loss (docs/method.md Eq. 3); 0 prunes nothing.
            interval: epochs between reconfigurations.
            record: the folder for the trace, or a `Recorder`; None records nothing.
            ema: an average of the weights (torch's `AveragedModel`, timm's `ModelEmaV3`, a copy); it is pruned alike.
            scaler: the loop's GradScaler; with it a `step` before `scaler.unscale_` is noticed.
            rewrap: makes from the changed network what the loop calls, for instance DDP around it; `module` is that.
            facts: names and hyper-parameters for the trace.
            loggers: names such as "tensorboard", or `ptsim.training.loggers.Logger`s; they mirror the trace.
            settings: fields of `PruneSettings`.

        Raises:
            UnsupportedModelError: the network cannot be traced.
            UsageError: a value out of its bounds, an optimizer of another network or one whose state cannot be cut, an
                average of another network, a network that already has a pruner or lies in parts on several ranks, or
                nothing that can be pruned.
        """
        self.settings = make_settings(settings)
        self._make_criterion: type[Criterion] = CRITERIA.find(self.settings.criterion)
        self.penalty_ratio, self.interval = checked_plan(penalty_ratio, interval)
        wrapping.refuse_spread(model)
        self.network, self._wrapped = wrapping.bare(model), wrapping.is_wrapped(model)
        misuse.refuse_second(self.network)
        self.optimizer = wrapping.bare_optimizer(optimizer)
        misuse.check_optimizer_kind(self.optimizer, proximal=self.settings.regularizer == "proximal")
        self.ema, self.scaler, self.rewrap = ema, scaler, wrapping.checked_rewrap(rewrap)
        self.regularized = self.penalty_ratio > 0
        self.penalty_coefficient: float | None = None if self.regularized else 0.0
        input_shape = image_shape(input_shape)
        self._find_groups(find_groups(self.network, input_shape))
        self._order = misuse.Order(self.network, (optimizer, self.optimizer), scaler, self.criterion.weights)
        self._averages()
        self.recorder = self._recorder(model, input_shape, record, facts=facts, loggers=loggers)
        self._owns_recorder, self._first_network = self.recorder is not record, self.recorder.architecture
        self._hooks = hooks_on_update(self.optimizer, self._check_update, self.updated)
        misuse.claim(self.network, self)
        self._tell_recorder()

    # What the loop calls

    def step(self, loss: Tensor | float, num_images: int | None = None) -> None:
        """Add the penalty's gradient; once per `optimizer.step`, after backward, unscaling and all-reduce.

        The first call decides λ from its loss. Before clipping the penalty is clipped with the rest, after it not.

        Args:
            loss: the loss of this step without the penalty, unscaled: the mean over the mini-batch.
            num_images: of this step, for loops whose network calls cannot be seen.

        Raises:
            UsageError: before backward, twice before `optimizer.step`, before `scaler.unscale_`, with an optimizer
                that no longer holds the network's weights, or where nobody knows how many images there were.
        """
        self._check_wrapping(seen=num_images is not None)
        self._follow_freezing()
        self._order.before_penalty()
        if num_images is None:
            self.recorder.watch.check_seen()
        if self.penalty_coefficient is None:
            self.decide_coefficient(loss)
        self.recorder.step(loss, num_images)
        if self.regularized and self.penalty_coefficient:
            self._order.penalty_is_added(self.recorder.watch.num_backwards)
            if self.settings.regularizer == "gradient":
                with self.recorder.watch.phase("regularizer"):
                    self.criterion.add_gradient(self.penalty_coefficient)

    def watch_only(self, loss: Tensor | float) -> None:
        """As `step` without the penalty, for epochs that are not regularized; the run's first one decides λ.

        It may be called before unscaling.
        """
        if self.penalty_coefficient is None:
            self.decide_coefficient(loss)
        self._order.no_penalty()
        self.recorder.step(loss)

    def end_epoch(
        self,
        validation_accuracy: float | None = None,
        *,
        validation_loss: float | None = None,
        train_loss: float | None = None,
        train_accuracy: float | None = None,
        reconfigure: bool | None = None,
    ) -> EpochOutcome:
        """Record the epoch; prune the network if it is time. Once an epoch, after validation.

        Args:
            validation_accuracy: fraction 0..1 of the validation images that the network gets right.
            validation_loss: mean over the validation images.
            train_loss: mean over the training images; None is the mean of what `step` was given.
            train_accuracy: fraction 0..1 over the training images.
            reconfigure: whether to prune now; None is after every `interval` epochs while `regularized`.

        Raises:
            UsageError: no training step since the last call, `step` never called, or a number that is none.
            TrainingError: the trace cannot be written, or the ranks would prune differently.
        """
        self._follow_freezing()
        acted = self._order.check_epoch(regularized=self.regularized, num_steps=self.recorder.watch.num_steps)
        coefficient = (self.penalty_coefficient or 0.0) if acted else 0.0
        penalty = Penalty(coefficient=coefficient, value=coefficient * float(self.criterion.value()))
        record = self.recorder.record_epoch(
            validation_accuracy,
            validation_loss=validation_loss,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            penalty=penalty,
        )
        self._order.epoch_ended()
        self._first_batch = self._first_batch or self.recorder.watch.batch
        self._last = last_epoch(record, self.recorder.meter, self.recorder.team)
        due = self.regularized and self.recorder.epoch % self.interval == 0
        if not (due if reconfigure is None else reconfigure):
            return EpochOutcome(epoch=record, reconfiguration=None, pruned=False)
        event, changed = self._reconfigure(record)
        return EpochOutcome(epoch=record, reconfiguration=event, pruned=changed)

    @property
    def module(self) -> nn.Module:  # noqa: D102 # an attribute of the class
        return self.recorder.module

    @property
    def batch(self) -> int | None:
        """The largest mini-batch per rank that should fit now: a proposal, which the loop may take.

        It is the loop's own mini-batch plus multiples of `batch_granularity`, at most the epoch's images, and never
        shrinks. Before the first epoch's end it is the loop's own, None before the first step. The learning rate should
        follow by `learning_rate_scale`, which is that of the last proposal.
        """
        from ptsim.training.growth import learning_rate_scale, proposed_batch

        present, last = self._proposed or self.recorder.watch.batch, self._last
        if present is None or self._first_batch is None or last is None:
            return present
        self._proposed = proposed_batch(self.recorder, self.settings, present, last)
        self.learning_rate_scale = learning_rate_scale(self._first_batch, self._proposed, self.settings.lr_rule)
        return self._proposed

    def rewrapped(self, module: nn.Module) -> None:
        """Tell that `module` now wraps the changed network.

        Raises:
            UsageError: it holds another network.
        """
        wrapping.refuse_spread(module)
        self.recorder.follow(module)
        self.needs_rewrap, self._wrapped = False, wrapping.is_wrapped(module)

    def summary(self) -> PruningSummary:
        """Where the run stands: channels, parameters and operations at the start and now."""
        now = self.recorder.architecture
        first = self._first_network
        return PruningSummary(
            network=first.name,
            epochs=self.recorder.epoch,
            penalty_coefficient=self.penalty_coefficient,
            reconfigurations=self._num_reconfigurations,
            channels=(self.recorder.initial_counts[0], dense_counts(self.network, 0.0)[0]),
            parameters=(first.num_parameters, now.num_parameters),
            forward_macs=(first.forward_macs, now.forward_macs),
            layers_removed=self._layers_removed,
        )

    def close(self) -> None:
        """End the run: the trace gets its last record, and another pruner may take the network."""
        self._let_go()
        self.recorder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._let_go()
        self.recorder.__exit__(kind, error, trace)

    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._order.closed = True
        misuse.give_back(self.network, self)

    def state_dict(self, *, tensors: bool = True) -> dict[str, Any]:
        """Everything that a run needs to go on: tensors, and data that JSON holds; nothing has to be pickled.

        Args:
            tensors: also the weights, the optimizer's state and the average; False for loops that store those anyway.
        """
        recorder = self.recorder
        state: dict[str, Any] = {
            "version": 1,
            "structure": structure_of(self.network),
            "parameters": stored.parameter_names(self.network, self.optimizer),
            "penalty_coefficient": self.penalty_coefficient,
            "regularized": self.regularized,
            "epoch": recorder.epoch,
            "initial_counts": list(recorder.initial_counts),
            "first_network": msgspec.to_builtins(self._first_network),
            "first_batch": self._first_batch,
            "proposed_batch": self._proposed,
            "last_epoch": msgspec.to_builtins(self._last),
            "seen": msgspec.to_builtins(recorder.watch.seen),
            "learning_rate_scale": self.learning_rate_scale,
            "num_reconfigurations": self._num_reconfigurations,
            "layers_removed": list(self._layers_removed),
            "trace_bytes": recorder.num_bytes,
            "trace_sha256": recorder.sha256,
            "totals": msgspec.to_builtins(recorder.spend_time()),
            "unfinished": msgspec.to_builtins(recorder.unfinished()),
        }
        return state | (stored.with_tensors(self.network, self.optimizer, self.ema) if tensors else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`: the network, freshly built, gets the pruned shapes, and the optimizer follows.

        A network that has those shapes already, and the optimizer of it, stay as they are.
        Call it before the first step, and before `load_state_dict` of network and optimizer where those are used.
        What wraps the network has to be made again, as after a reconfiguration.

        Raises:
            UsageError: not a state of PruneTrain, of another network, or of epochs that this run's trace does not have.
        """
        kept, average = stored.checked(state, self.optimizer), next(iter(self._averages()), None)
        if self.recorder.records:
            stored.refuse_unrecorded(kept)
        stored.reshape(self.network, self.optimizer, average, kept.structure, kept.parameters)
        self.penalty_coefficient, self.regularized = kept.penalty_coefficient, kept.regularized
        if kept.tensors is not None:
            stored.load_tensors(self.network, self.optimizer, self.ema, kept)
        recorder = self.recorder
        self._first_network, self.learning_rate_scale = kept.first_network, kept.learning_rate_scale
        self._first_batch, self._proposed, self._last = kept.first_batch, kept.proposed_batch, kept.last_epoch
        self._num_reconfigurations, self._layers_removed = kept.num_reconfigurations, kept.layers_removed
        recorder.epoch, recorder.initial_counts, recorder.totals = kept.epoch, kept.initial_counts, kept.totals
        self._adopt(find_groups(self.network, recorder.input_shape))
        recorder.refresh()
        recorder.watch.forget(kept.seen)
        recorder.continue_trace(kept.trace_bytes, kept.trace_sha256)
        recorder.continue_epoch(kept.unfinished)

    # The parts

    def decide_coefficient(self, loss: Tensor | float) -> None:
        """λ by docs/method.md Eq. 3 from the run's first loss, the ranks' mean; `step` does it at its first call.

        A run that begins without the penalty calls it at its first mini-batch.

        Raises:
            UsageError: the loss is not a finite number above 0.
        """
        team = self.recorder.team
        mean = float(team.sum(checked_loss(loss).to(self.recorder.device).double())) / team.world_size
        self.penalty_coefficient = penalty_coefficient(mean, float(self.criterion.value()), self.penalty_ratio)

    def _check_update(self) -> None:
        in_gradient = self.settings.regularizer == "gradient"
        self._order.before_update(self.recorder.watch.num_backwards, in_gradient=in_gradient)

    def updated(self) -> None:
        """The optimizer has stepped (a hook calls this): the proximal step, matched to the gradient route, follows."""
        if self._order.updated() and self.settings.regularizer == "proximal":
            coefficient = self.penalty_coefficient or 0.0
            with self.recorder.watch.phase("regularizer"):
                self.criterion.proximal_step(proximal_shrinkages(self.optimizer, self.criterion.weights, coefficient))

    def prune(self) -> Surgery:
        """Take out what is sparse: from the network, the optimizer's state and the average."""
        return reconfigure(
            self.network,
            self.groups,
            threshold=self.settings.threshold,
            optimizer=self.optimizer,
            shadows=self._averages(),
            mode=self.settings.mode,
            channel_multiple=self.settings.channel_multiple,
            importance_of=self._make_criterion.importance,
        )

    def _reconfigure(self, epoch: Epoch) -> tuple[Reconfiguration, bool]:
        recorder, team = self.recorder, self.recorder.team
        batch_before, start = epoch.batch_per_gpu, time.perf_counter()
        with recorder.watch.paused():
            surgery = self.prune()
        team.agree("what to prune", msgspec.json.encode(structure_of(self.network)))
        if surgery.changed:
            self._adopt(surgery.groups)
        if recorder.device.type == "cuda":
            torch.cuda.synchronize(recorder.device)
        duration_s = time.perf_counter() - start
        before = recorder.refresh() if surgery.changed else recorder.architecture
        growth = self._grown(batch_before)
        if growth.batch_per_gpu != batch_before and not surgery.changed:
            self._wrap_again()  # what was compiled for the smaller mini-batch is of no use
        self._num_reconfigurations += 1
        self._layers_removed += tuple(surgery.layers_removed)
        if surgery.collapsed and self._owns_recorder:
            warnings.warn(surgery.notes[0], stacklevel=4)
        recorder.describe(profile=False)
        event = Reconfiguration(
            epoch=epoch.epoch,
            before=before.id,
            after=recorder.architecture.id,
            channels_removed=surgery.channels_removed,
            layers_removed=tuple(surgery.layers_removed),
            measured_duration_s=duration_s,
            batch_before=batch_before,
            batch_after=growth.batch_per_gpu,
            learning_rate_scale=growth.learning_rate_scale,
            predicted_memory_bytes=growth.predicted_memory_bytes,
            notes=tuple(surgery.notes),
        )
        recorder.write(event)
        if surgery.changed:
            recorder.profile()
        return event, surgery.changed

    def _averages(self) -> tuple[nn.Module, ...]:
        """What is cut along with the network; a UsageError if `ema` is no average of it."""
        return () if self.ema is None else (wrapping.averaged(self.ema, self.network, alike=True),)

    def _grown(self, batch_before: int) -> Growth:
        """What the loop's own policy makes of the mini-batch; without one it stays, and `batch` only proposes."""
        if self.grow is None:
            return Growth(batch_per_gpu=batch_before)
        with self.recorder.watch.paused():
            return self.grow()

    def _find_groups(self, groups: ChannelGroups) -> None:
        self.groups = groups
        self.criterion = self._make_criterion(self.network, groups)
        if self.penalty_ratio > 0 and not self.criterion.weights:
            why = groups.main_reason() or "it has no convolution or linear layer with channels of its own"
            later = "make PruneTrain once the layers are trained" if "is frozen" in why else None
            raise UsageError(f"nothing of this {type(self.network).__name__} can be pruned: {why}", hint=later)

    def _adopt(self, groups: ChannelGroups) -> None:
        """Look up again what surgery has replaced, and wrap the network again."""
        self._take(groups, pruned=True)
        self._wrap_again()

    def _take(self, groups: ChannelGroups, *, pruned: bool) -> None:
        self.groups = groups
        self.criterion = self._make_criterion(self.network, groups)
        self._order.renew(self.criterion.weights, pruned=pruned)
        self._tell_recorder()

    def _follow_freezing(self) -> None:
        """The penalty acts on the layers that are trained now, with the λ that it has."""
        if self._order.freezing_changed():
            with self.recorder.watch.paused():
                self._take(find_groups(self.network, self.recorder.input_shape), pruned=False)

    def _tell_recorder(self) -> None:
        """What a profile of the layers runs as the regulariser; λ does not change its time."""
        if self.settings.regularizer == "proximal":
            act = functools.partial(self.criterion.proximal_step, 0.0)
        else:
            act = functools.partial(self.criterion.add_gradient, self.penalty_coefficient or 0.0)
        self.recorder.regularizer = act if self.penalty_ratio > 0 else None

    def _wrap_again(self) -> None:
        caller = self.recorder.watch.data_parallel
        self.recorder.watch.outdate(self._again("DistributedDataParallel"))
        if self.rewrap is not None:
            self.recorder.follow(wrapping.wrapped_again(self.rewrap, self.network))
            self._wrapped = wrapping.is_wrapped(self.module)
        elif self._wrapped or caller is not None:
            self.needs_rewrap = True
            self.recorder.follow(self.network)  # an old DDP that somebody holds would reduce beside the new one

    def _check_wrapping(self, *, seen: bool) -> None:
        """The loop must not go on with what was compiled around the network before pruning; a new DDP is adopted."""
        caller = self.recorder.watch.data_parallel
        unseen = caller is None and not seen and not self.recorder.watch.num_backwards
        if unseen and self._wrapped and self._num_reconfigurations:
            raise UsageError(
                "the network was pruned, but the loop calls a compiled module that PruneTrain was not told of",
                hint=self._again("torch.compile"),
            )
        if self.needs_rewrap and caller is not None:
            self.rewrapped(caller)

    def _again(self, wrap: str) -> str:
        """What the loop has to do after pruning to call the changed network."""
        if self.rewrap is not None:
            return "model = pruner.module after end_epoch: it is what rewrap has made"
        return f"where pruner.needs_rewrap: model = {wrap}(pruner.network); pruner.rewrapped(model)"

    def _recorder(
        self, model: nn.Module, input_shape: tuple[int, int, int], record: str | Path | Recorder | None, **given: Any
    ) -> Recorder:
        told = recorded(self.settings, penalty_ratio=self.penalty_ratio, interval=self.interval)
        if isinstance(record, Recorder):
            alone = not any((*given.values(), self.settings.profile, self.settings.channel_maxima))
            misuse.check_recorder(record, self.network, self.optimizer, input_shape, alone=alone)
            record.settings |= told
            return record
        return Recorder(
            model,
            self.optimizer,
            input_shape=input_shape,
            record=record,
            settings=told,
            profile=self.settings.profile,
            channel_maxima=self.settings.channel_maxima,
            threshold=self.settings.threshold,
            **given,
        )
