"""Is PruneTrain called in the right order, with the right optimizer? Each mistake is one sentence, when it is made."""

from __future__ import annotations

import contextlib
import inspect
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Never

import torch
from torch import Tensor, nn

from ptsim.capture.graph import called_modules
from ptsim.errors import UsageError
from ptsim.prune.labels import CONVS, TRANSPOSED_CONVS
from ptsim.training.watch import learning_rate
from ptsim.training.wrapping import is_sharded
from ptsim.units import some_of

if TYPE_CHECKING:
    from ptsim.prune.groups import ChannelGroups
    from ptsim.training.recorder import Recorder


_OWNERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[object]] = weakref.WeakKeyDictionary()


def refuse_second(network: nn.Module) -> None:
    """Make sure that nobody prunes the network.

    Raises:
        UsageError: another one prunes it, or a part of it.
    """
    own = set(network.parameters())
    if any(other() is not None and own & set(claimed.parameters()) for claimed, other in _OWNERS.items()):
        hint = "close the first one: pruner.close()"
        raise UsageError(f"this {type(network).__name__} already has a PruneTrain", hint=hint)


def claim(network: nn.Module, owner: object) -> None:
    """From now on `owner` alone prunes the network, until it is forgotten or gives it back."""
    _OWNERS[network] = weakref.ref(owner)


def give_back(network: nn.Module, owner: object) -> None:
    """Another one may prune the network."""
    if _OWNERS.get(network, lambda: None)() is owner:
        del _OWNERS[network]


class Replaced(nn.Parameter):
    """A parameter in whose place there is another one since the network has shrunk: no gradient comes to it any more.

    A loop that has kept a list of parameters would clip or zero the gradients of these, and not those of the new ones.
    """

    def _refused(self, *_: object) -> Never:
        raise UsageError(
            "a parameter that pruning has replaced is asked for its gradient, or given one",
            hint="take the parameters from the network at every step: model.parameters(), no list that was made before",
        )

    grad = property(_refused, _refused)


@contextlib.contextmanager
def replaced_ones_marked(network: nn.Module) -> Iterator[None]:
    """Parameters that are replaced inside, and that somebody still holds afterwards, are `Replaced` ones."""
    before = [weakref.ref(parameter) for parameter in network.parameters()]
    yield
    now = {id(parameter) for parameter in network.parameters()}
    for parameter in (reference() for reference in before):
        if parameter is not None and id(parameter) not in now and type(parameter) is nn.Parameter:
            parameter.grad = None
            parameter.__class__ = Replaced


def warn_of_unseen(network: nn.Module, groups: ChannelGroups) -> None:
    """Warn of layers that the loop trains although the network's `forward` does not call them.

    What they read is pruned as if they did not. Where random numbers decide what is called, nobody is told.
    """
    graphs = groups.graphs.values()
    if any(graph.meta["draws"] for graph in graphs):
        return
    named = dict(network.named_parameters(remove_duplicate=False))
    nodes = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "get_attr"]
    seen = {id(named[name]) for name in nodes if name in named}
    for path in {path for graph in graphs for path in called_modules(graph)}:
        seen |= {id(parameter) for parameter in network.get_submodule(path).parameters()}
    unseen = [
        path
        for path, module in network.named_modules()
        if isinstance(module, (*CONVS, *TRANSPOSED_CONVS, nn.Linear))
        for weight in module.parameters(recurse=False)
        if weight.ndim > 1 and weight.grad is not None and id(weight) not in seen
    ]
    if unseen:
        warnings.warn(
            f"the loop trains {some_of(unseen)}, which the forward of {type(network).__name__} does not call: "
            "channels that they read may be pruned; let forward return what they give, too",
            stacklevel=3,
        )


class OnlyOne:
    """Something that hooks into one training and has files open: copying or pickling it is one sentence."""

    _in_place_of_a_copy: ClassVar[str | None] = None  # what one may want it for, and what does it

    def __reduce_ex__(self, protocol: object) -> Never:
        """What copy, deepcopy and pickle ask for.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"a {type(self).__name__} belongs to one training and cannot be copied or pickled",
            hint=self._in_place_of_a_copy,
        )


def check_recorder(
    recorder: Recorder,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    input_shape: tuple[int, int, int],
    *,
    alone: bool,
) -> None:
    """Make sure that a recorder that PruneTrain is given watches the same training; `alone`: nothing is given for it.

    Raises:
        UsageError: it watches another one, or was told already what is given.
    """
    if not alone:
        what = "facts, loggers, profile and channel_maxima"
        raise UsageError(f"{what} belong to the Recorder that is given as record=; give them there")
    mine = recorder.network is network, recorder.optimizer is optimizer, recorder.input_shape == input_shape
    if not all(mine):
        what = next(word for word, same in zip(("network", "optimizer", "input_shape"), mine, strict=True) if not same)
        raise UsageError(
            f"the Recorder that is given as record= has another {what} than PruneTrain",
            hint="make both of the same model, optimizer and input_shape",
        )


def check_optimizer_kind(optimizer: torch.optim.Optimizer, *, proximal: bool) -> None:
    """Make sure that the optimizer's state can be cut with the weights, and that a proximal step knows its rate.

    Raises:
        UsageError: it keeps one state for all weights together, or a part on every rank, or has no learning rate to be
            seen.
    """
    if is_sharded(optimizer):
        raise UsageError(
            f"{type(optimizer).__name__} spreads its state over the ranks, where it cannot be cut with the weights",
            hint="PruneTrain needs an optimizer that is whole on every rank, such as SGD or AdamW",
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UsageError(
            f"{type(optimizer).__name__} keeps one state for all weights together, which cannot be cut with them",
            hint="PruneTrain needs an optimizer with a state per weight, such as SGD or AdamW; "
            "ptsim.Recorder records this one",
        )
    if proximal and learning_rate(optimizer) is None:
        raise UsageError(
            f"the proximal step needs a learning rate, which {type(optimizer).__name__} decides by itself",
            hint='regularizer="gradient"',
        )


class Order:
    """Watches the order of backward, penalty and update, and that the optimizer holds the network's weights."""

    _survives = False  # a penalty was seen to reach its update, so this loop does not zero it

    def __init__(
        self,
        network: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler | None,
        weights: Sequence[nn.Parameter],
    ) -> None:
        """`weights` are the penalised ones; the last of the `optimizers` updates them, the others are around it.

        Raises:
            UsageError: the optimizer does not hold them, or not all that is trained, or the scaler is none.
        """
        if scaler is not None and not hasattr(scaler, "is_enabled"):
            raise UsageError(f"scaler is a {type(scaler).__name__}, expected the loop's torch.amp.GradScaler")
        self.closed = False
        self._network, self._optimizers, self._scaler = network, tuple(optimizers), scaler
        self._pruned = self._asked = self._penalised = False
        self._told = False  # of the update to come: `step` was called for it
        self._forgotten = 0  # updates of the epoch that came without
        self._held: tuple[int, ...] = ()
        # A gradient that has the penalty, the weight's version, and what the scaler knows of this iteration.
        self._added: tuple[Tensor, int, object] | None = None
        self._backwards = 0  # passes of the epoch before it was added
        self._spent: tuple[Tensor, int] | None = None  # a gradient that the last update has used, and its version
        self.renew(weights, pruned=False)

    def renew(self, weights: Sequence[nn.Parameter], *, pruned: bool = True) -> None:
        """The penalised weights after a change of the network."""
        self._weights = [weight for weight in weights if weight.requires_grad]
        self._parameters = list(self._network.parameters())
        self._trained = [parameter.requires_grad for parameter in self._parameters]
        self._added, self._spent, self._held = None, None, ()
        self._pruned, self._penalised = self._pruned or pruned, self._penalised and not pruned
        self._forgotten = 0 if pruned else self._forgotten
        self.check_optimizer()

    def freezing_changed(self) -> bool:
        """Whether a layer was frozen, or freed, since the penalised weights were last looked up."""
        return [parameter.requires_grad for parameter in self._parameters] != self._trained

    def check_epoch(self, *, regularized: bool, num_steps: int) -> bool:
        """An epoch of so many updates ends: make sure that `step` was called in it, if it was to be `regularized`.

        Whether the penalty was added in it: the loop may have said already what is to be of the next one. Warns of
        updates for which `step` was forgotten.

        Raises:
            UsageError: it was not, a layer was exchanged, or the optimizer no longer holds every trained weight.
        """
        if not set(self._parameters) <= set(self._network.parameters()):
            raise UsageError(
                f"a layer of this {type(self._network).__name__} was replaced after PruneTrain was made",
                hint="close the pruner before the change, and make another one of the changed network",
            )
        self.check_optimizer()
        if regularized and num_steps and not self._asked:
            raise UsageError(
                "the optimizer has stepped, but pruner.step was not called in this epoch, so nothing was penalised",
                hint="loss.backward(); pruner.step(loss); optimizer.step(), or pruner.regularized = False for an epoch "
                "without the penalty",
            )
        if self._asked and self._forgotten:
            warnings.warn(
                f"{self._forgotten} of this epoch's {num_steps} updates came without pruner.step, so without the "
                "penalty; if that is meant, say so for them: pruner.regularized = False",
                stacklevel=3,
            )
        return self._penalised if num_steps else regularized

    def epoch_ended(self) -> None:
        """The epoch is recorded; the next one begins."""
        self._asked = self._penalised = False
        self._forgotten = 0

    def check_optimizer(self) -> None:
        """Make sure that the optimizer still holds every weight that is trained: another one would keep the old ones.

        Raises:
            UsageError: it does not.
        """
        held = tuple(id(p) for group in self._optimizers[-1].param_groups for p in group["params"])
        if held == self._held:
            return
        trained = [*self._weights, *(p for p in self._parameters if p.requires_grad)]
        missing = {id(parameter) for parameter in trained} - set(held)
        if missing:
            name = next((n for n, p in self._network.named_parameters() if id(p) in missing), "a weight")
            network = type(self._network).__name__
            if not any(id(p) in set(held) for p in self._network.parameters()):
                raise UsageError(
                    f"the optimizer holds none of the parameters of this {network}",
                    hint="give PruneTrain the optimizer that trains the network, and keep using that one",
                )
            raise UsageError(
                f"the optimizer does not hold {name} of this {network}, which requires a gradient",
                hint="one optimizer, in parameter groups perhaps, has to hold all weights that are trained; "
                "freeze the others with requires_grad_(False)",
            )
        self._held = held

    def before_penalty(self) -> None:
        """Called by every `step`.

        Raises:
            UsageError: the pruner is closed, backward or unscaling has not happened, the penalty is there already, or
                another optimizer updates the network.
        """
        if self.closed:
            raise UsageError("the pruner is closed: step belongs before close")
        self._asked = self._told = True
        self.check_optimizer()
        if not self._weights:
            return
        if all(weight.grad is None for weight in self._weights):
            raise UsageError(
                "step was called before backward: no weight has a gradient",
                hint="loss.backward(), then pruner.step(loss)",
            )
        gradient = self._weights[0].grad
        if gradient is not None and self._is_spent(gradient):
            raise UsageError(
                "step was called after optimizer.step: the penalty's gradient would be lost",
                hint="loss.backward(), then pruner.step(loss), then optimizer.step()",
            )
        self._check_unscaled()
        if self._added is None:
            return
        gradient, version, scaled = self._added
        weight = self._weights[0]
        if weight._version != version:
            what = "since the reconfiguration" if self._pruned else "after pruner.step"
            raise UsageError(
                f"another optimizer than PruneTrain's has updated the network {what}",
                hint="keep using the optimizer that PruneTrain was given; it is changed in place",
            )
        if weight.grad is gradient and scaled is self._scaled():  # an update that overflowed was left out
            raise UsageError(
                "the penalty's gradient would be added twice before optimizer.step",
                hint="call pruner.step once per optimizer.step, also when gradients are accumulated",
            )
        self._added = None

    def _is_spent(self, gradient: Tensor) -> bool:
        return self._spent is not None and self._spent[0] is gradient and self._spent[1] == gradient._version

    def _check_unscaled(self) -> None:
        scaler = self._scaler
        if scaler is None or not scaler.is_enabled():
            return
        state = self._scaled()
        if state is None or not state["found_inf_per_device"]:
            raise UsageError(
                "step was called before scaler.unscale_(optimizer): the penalty would be divided by the loss's scale",
                hint="scaler.scale(loss).backward(); scaler.unscale_(optimizer); pruner.step(loss)",
            )

    def _scaled(self) -> dict[str, Any] | None:
        """What the scaler keeps of this optimizer, or of what is around it, until its `update`."""
        scaler = self._scaler
        if scaler is None or not scaler.is_enabled():
            return None
        known = scaler._per_optimizer_states
        return next((known[id(optimizer)] for optimizer in self._optimizers if id(optimizer) in known), None)

    def penalty_is_added(self, num_backwards: int) -> None:
        """The gradients have the penalty now, after so many backward passes of the epoch."""
        self._backwards, self._penalised = num_backwards, True
        if self._weights:
            weight = self._weights[0]
            gradient = weight.grad
            if gradient is None:
                gradient = weight.grad = torch.zeros_like(weight)
            self._added = gradient, weight._version, self._scaled()

    def no_penalty(self) -> None:
        """This iteration's update is to be without the penalty."""
        self._added, self._told = None, True

    def before_update(self, num_backwards: int, *, in_gradient: bool) -> None:
        """The optimizer is about to step: make sure that the gradients still have the penalty.

        Zeros that are written over a gradient are looked for before the first update only: a GPU is waited for.

        Raises:
            UsageError: they were zeroed since.
        """
        if self._added is None or not self._weights or self._added[2] is not self._scaled():
            return
        added, gradient = self._added[0], self._weights[0].grad
        replaced = gradient is not added and num_backwards > self._backwards
        zeroed = gradient is added and in_gradient and not self._survives and not gradient.any()
        if gradient is None or replaced or (zeroed and bool(self._weights[0].any())):
            self._added = None
            raise UsageError(
                "the gradients were zeroed between pruner.step and optimizer.step, so the penalty was lost",
                hint="optimizer.zero_grad(); loss.backward(); pruner.step(loss); optimizer.step()",
            )
        self._survives = True

    def updated(self, *, regularized: bool) -> bool:
        """The optimizer has stepped, which was to be `regularized`; whether the penalty was in the step.

        Raises:
            UsageError: a GradScaler that nobody told PruneTrain of has called the optimizer.
        """
        first = self._added is not None and self._spent is None
        if first and self._scaler is None and _stepped_by_scaler():
            raise UsageError(
                "PruneTrain was not told of the GradScaler that calls the optimizer, which may divide the penalty",
                hint="PruneTrain(…, scaler=scaler), and scaler.unscale_(optimizer) before pruner.step(loss)",
            )
        added, self._added = self._added is not None, None
        gradient = self._weights[0].grad if self._weights else None
        if regularized and not self._told and gradient is not None and not self._is_spent(gradient):
            self._forgotten += 1  # torch may call this twice for an update, and a loop update without a gradient
        self._told = False
        self._spent = None if gradient is None else (gradient, gradient._version)
        return added


def _stepped_by_scaler() -> bool:
    """Whether an enabled GradScaler is among the callers; looked at once, since it takes microseconds.

    Of other callers the local variables are not asked for: Python would keep what they held, an old DDP perhaps.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") != torch.amp.grad_scaler.__name__:
        frame = frame.f_back
    caller = None if frame is None else frame.f_locals.get("self")
    return isinstance(caller, torch.amp.GradScaler) and caller.is_enabled()
