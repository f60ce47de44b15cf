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
from ptsim.training import misuse, pruner_state, stored, wrapping
from ptsim.training.facts import RunFacts, checked_loss
from ptsim.training.growth import Proposal
from ptsim.training.hooks import hooks_on_update
from ptsim.training.loggers import Logger
from ptsim.training.measured import Penalty
from ptsim.training.outcome import EpochOutcome, Growth, PruningSummary, reconfiguration_record
from ptsim.training.prune_settings import checked_plan, make_settings, recorded
from ptsim.training.recorder import Recorder
from ptsim.training.rewrapping import Wrapping


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
    grow: Callable[[], Growth] | None = None
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
            rewrap: makes from the changed network what the loop calls, for instance DDP around it; `module` is that. A
                bare network is wrapped at once, unless `record` is a `Recorder`.
            facts: names and hyper-parameters for the trace.
            loggers: names such as "tensorboard", or `ptsim.training.loggers.Logger`s; they mirror the trace.
            settings: fields of `PruneSettings`.

        Raises:
            UnsupportedModelError: the network cannot be traced.
            UsageError: a value out of its bounds, an optimizer or average of another network, an optimizer whose state
                cannot be cut, or a network that has a pruner, lies in parts on several ranks or cannot be pruned.
        """
        self.settings = make_settings(settings)
        self._make_criterion: type[Criterion] = CRITERIA.find(self.settings.criterion)
        self.penalty_ratio, self.interval = checked_plan(penalty_ratio, interval)
        wrapping.refuse_spread(model)
        self.network = wrapping.bare(model)
        misuse.refuse_second(self.network)
        self.optimizer = wrapping.bare_optimizer(optimizer)
        self._outermost = optimizer
        misuse.check_optimizer_kind(self.optimizer, proximal=self.settings.regularizer == "proximal")
        self.ema = ema
        self.scaler = scaler
        rewrap = wrapping.checked_rewrap(rewrap)
        self.regularized = self.penalty_ratio > 0
        self.penalty_coefficient: float | None = None if self.regularized else 0.0
        input_shape = image_shape(input_shape)
        self._find_groups(find_groups(self.network, input_shape))
        self._order = misuse.Order(self.network, (optimizer, self.optimizer), scaler, self.criterion.weights)
        self._averages()
        self.recorder = self._recorder(model, input_shape, record, facts=facts, loggers=loggers)
        self._owns_recorder = self.recorder is not record
        self._first_network = self.recorder.architecture
        if rewrap is not None and self._owns_recorder and not wrapping.is_wrapped(model):
            model = wrapping.wrapped_again(rewrap, self.network)  # else ranks would train apart until the first pruning
            self.recorder.follow(model)
        self._wrapping = Wrapping(model, self.recorder, rewrap)
        self._proposal = Proposal(self.recorder, self.settings)
        self._take_hold()

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
        self._wrapping.check(told=num_images is not None, pruned=self._num_reconfigurations > 0)
        self._follow_freezing()
        self._order.before_penalty()
        if num_images is None:
            self.recorder.watch.check_seen()
        if self.penalty_coefficient is None:
            misuse.warn_of_unseen(self.network, self.groups)
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
        self._proposal.epoch_ended(record)
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
        return self._proposal.batch(self.average_bytes)

    @property
    def average_bytes(self) -> int:
        """What `ema` takes of the memory of the network's device, beside every step."""
        tensors = (t for average in self._averages() for t in (*average.parameters(), *average.buffers()))
        return sum(tensor.nbytes for tensor in tensors if tensor.device == self.recorder.device)

    @property
    def learning_rate_scale(self) -> float:
        """The factor on the planned learning rate that goes with the last `batch`."""
        return self._proposal.learning_rate_scale

    @property
    def needs_rewrap(self) -> bool:  # noqa: D102 # an attribute of the class
        return self._wrapping.outdated

    def rewrapped(self, module: nn.Module) -> None:
        """Tell that `module` now wraps the changed network.

        Raises:
            UsageError: it holds another network.
        """
        self._wrapping.renewed(module)

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

    def _take_hold(self) -> None:
        self._hooks = hooks_on_update(self.optimizer, self._check_update, self.updated)
        if self._owns_recorder:  # which has seen nothing yet
            self.recorder.follow()  # its clock stops after what the pruner does in an update
        misuse.claim(self.network, self)
        self._tell_recorder()

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
        state: dict[str, Any] = {
            "version": pruner_state.VERSION,
            "structure": structure_of(self.network),
            "parameters": stored.parameter_names(self.network, self.optimizer),
            "penalty_coefficient": self.penalty_coefficient,
            "regularized": self.regularized,
            "first_network": msgspec.to_builtins(self._first_network),
            "num_reconfigurations": self._num_reconfigurations,
            "layers_removed": list(self._layers_removed),
        }
        state |= self._proposal.state() | pruner_state.recorded_entries(self.recorder)
        return state | (stored.with_tensors(self.network, self.optimizer, self.ema) if tensors else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`: the network, freshly built, gets the pruned shapes, and the optimizer follows.

        A network that has those shapes already, and the optimizer of it, stay as they are.
        Call it before the first step, and before `load_state_dict` of network and optimizer where those are used.
        What wraps the network has to be made again, as after a reconfiguration.

        Raises:
            UsageError: not a state of PruneTrain, of another network, or of epochs that this run's trace does not have.
        """
        kept = pruner_state.checked(state, self.optimizer)
        average = next(iter(self._averages()), None)
        if self.recorder.records:
            pruner_state.refuse_unrecorded(kept)
        with misuse.replaced_ones_marked(self.network):
            stored.reshape(self.network, self.optimizer, average, kept.structure, kept.parameters)
        self.penalty_coefficient = kept.penalty_coefficient
        self.regularized = kept.regularized
        if kept.tensors is not None:
            stored.load_tensors(self.network, self.optimizer, self.ema, kept)
        self._first_network = kept.first_network
        self._num_reconfigurations = kept.num_reconfigurations
        self._layers_removed = kept.layers_removed
        self._proposal.load_state(kept)
        self._adopt(find_groups(self.network, self.recorder.input_shape))
        pruner_state.continue_recording(self.recorder, kept)

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
        regularized = self.regularized and self.penalty_coefficient != 0
        if self._order.updated(regularized=regularized) and self.settings.regularizer == "proximal":
            coefficient = self.penalty_coefficient or 0.0
            with self.recorder.watch.phase("regularizer"):
                self.criterion.proximal_step(proximal_shrinkages(self.optimizer, self.criterion.weights, coefficient))

    def prune(self) -> Surgery:
        """Take out what is sparse: from the network, the optimizer's state and the average."""
        return reconfigure(
            self.network,
            self.groups,
            threshold=self.settings.threshold,
            optimizer=self._outermost,
            shadows=self._averages(),
            mode=self.settings.mode,
            channel_multiple=self.settings.channel_multiple,
            importance_of=self._make_criterion.importance,
        )

    def _reconfigure(self, epoch: Epoch) -> tuple[Reconfiguration, bool]:
        recorder = self.recorder
        start = time.perf_counter()
        with recorder.watch.paused(), misuse.replaced_ones_marked(self.network):
            surgery = self.prune()
        recorder.team.agree("what to prune", msgspec.json.encode(structure_of(self.network)))
        if surgery.changed:
            self._adopt(surgery.groups)
        if recorder.device.type == "cuda":
            torch.cuda.synchronize(recorder.device)
        duration_s = time.perf_counter() - start
        before = recorder.refresh() if surgery.changed else recorder.architecture
        growth = self._grown(epoch.batch_per_gpu)
        grown = growth.batch_per_gpu != epoch.batch_per_gpu
        if grown and not surgery.changed:
            self._wrapping.network_changed()  # what was compiled for the smaller mini-batch is of no use
        self._num_reconfigurations += 1
        self._layers_removed += surgery.layers_removed
        if surgery.collapsed and self._owns_recorder:
            warnings.warn(surgery.notes[0], stacklevel=3)
        after = recorder.architecture
        recorder.describe(profile=False)
        event = reconfiguration_record(epoch, surgery, before, after, duration_s=duration_s, growth=growth)
        recorder.write(event)
        if grown:
            recorder.profile(growth.batch_per_gpu)
        elif surgery.changed:
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
        self._wrapping.network_changed()

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
