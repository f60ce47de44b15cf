"""What do the iterations of a training loop do, seen from outside? Hooks on the network and on its optimizer.

Nobody has to change the loop. The forward phase runs from the call of the network to the start of backward (the loss is
in it), backward to its end, all-reduce included; the optimizer phase is its `step` and what comes between backward and
`step` (unscaling, clipping); what lies between two iterations is the wait for data. A hook costs microseconds, and on a
GPU one event.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ptsim.capture.graph import output_tensors
from ptsim.errors import UsageError
from ptsim.measure.timers import Phase, StepTimer
from ptsim.network import MemoryFormat, Precision
from ptsim.trace.schema import EpochTime, StepDistribution
from ptsim.training.formats import Seen, autocast_format, kept_format, layout_of, pass_format
from ptsim.training.hooks import CompiledInPlace, Hook, has_closure
from ptsim.training.peak import PeakMemory

_T = TypeVar("_T")
ON_SEVERAL_GPUS = "DataParallel runs a network on several GPUs from one process, which no trace can describe"
WHOLE_ON_EVERY_RANK = "DistributedDataParallel under torchrun, a process for every GPU"


def learning_rate(optimizer: torch.optim.Optimizer) -> float | None:
    """Of the first parameter group; None where the optimizer decides it by itself (Adafactor by its default)."""
    rate = optimizer.param_groups[0].get("lr")
    return None if rate is None else float(rate)


class Watch:
    """The iterations of one epoch after the other, as hooks see them.

    Attributes:
        num_steps: updates by the optimizer in this epoch.
        num_images: images that the network was trained on in this epoch, on this rank.
        batch: images of this epoch's largest forward pass; of the last epoch's before the first one.
        largest_backward: images of this epoch's largest backward pass, which may belong to several forward passes.
        learning_rate: of the first parameter group at this epoch's first update; None where the optimizer decides it.
        num_backwards: backward passes in this epoch.
        num_reductions: those of them whose gradients a DistributedDataParallel reduced.
        last_step_s: when this epoch's last update ended, by `time.perf_counter`; None before the first. On a GPU it is
            when the host had launched it, until `finish` knows when the GPU had done it.
        judged: from when to when validation ran between two of its updates, by the same clock; known from `finish` on.
        memory: the most that this epoch's training passes took.
        precision, memory_format: of the last training pass.
        image_shape: of the last training pass; None before it, or where the network is given no images.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        on_begin: Callable[[], object] = lambda: None,
    ) -> None:
        """Nothing is timed before `begin`, or before the first training pass; `on_begin` is called before that."""
        self._device = device
        self._on_begin = on_begin
        self.memory = PeakMemory(device)
        self._timer: StepTimer | None = None
        self._phase: Phase | None = None
        self._since = 0
        self._paused = False
        self._told_data = False
        self._in_backward = False
        self._in_update = False
        self._trains_in_evaluation = False
        self._images = 0
        self._hooks: list[Any] = []
        self.batch: int | None = None
        self._images_of_steps: Counter[int] = Counter()
        self._usual_before = 0
        self._compiled = False
        self._inside: Precision | None = None  # of autocast within a compiled network's call
        self._judged_until: int | None = None  # where the last pass of validation since the last update has ended
        self._caller: weakref.ref[nn.Module] | None = None
        self._outdated: tuple[weakref.ref[nn.Module], str] | None = None
        self.precision = Precision.FP32
        self.memory_format: MemoryFormat = "contiguous"
        self.image_shape: tuple[int, ...] | None = None
        self.last_step_s: float | None = None
        self.judged: tuple[tuple[float, float], ...] = ()
        self.reset()
        self.follow(module, optimizer)

    def follow(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        layer: nn.Module | None = None,
        compiled: bool = False,
    ) -> None:
        """Watch this network and this optimizer from now on, and no other.

        Autocast that begins within the network's call, as Accelerate's does, is seen at `layer`, one of the network's
        own that computes products; of a `compiled` network, in what its graph keeps for backward.
        """
        self.release()
        self._compiled = compiled
        self._inside = None
        self._hooks = [
            optimizer.register_step_pre_hook(Hook(self, "_update_begins")),
            optimizer.register_step_post_hook(Hook(self, "_update_ends")),
        ]
        if module._compiled_call_impl is not None:  # module.compile(): hooks would be part of the graph
            self._hooks.append(CompiledInPlace(self, module))
            return
        self._hooks += [
            module.register_forward_pre_hook(Hook(self, "_forward_begins"), with_kwargs=True),
            module.register_forward_hook(Hook(self, "_forward_ends")),
        ]
        if layer is not None and not compiled:  # a hook there would be part of the graph
            self._hooks.append(layer.register_forward_pre_hook(Hook(self, "_note_autocast")))

    def release(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside is not part of the training."""
        before = self._paused
        self._paused = True
        try:
            yield
        finally:
            self._paused = before

    @property
    def data_parallel(self) -> nn.Module | None:
        """The DistributedDataParallel that called the network last; None where none did, or it is gone."""
        return None if self._caller is None else self._caller()

    def outdate(self, hint: str) -> None:
        """The network has changed: another training pass through the DistributedDataParallel of before is an error."""
        self._outdated = None if self._caller is None else (self._caller, hint)

    @property
    def num_iterations(self) -> int:
        """Updates of this epoch; backward passes where the optimizer that updates is not watched."""
        return self.num_steps or self.num_backwards

    @property
    def usual_step(self) -> int:
        """Images of most of this epoch's updates, all passes of one together; 0 where none was seen.

        Before the first update it is the last epoch's. Of two numbers that are as frequent it is the larger one: an
        epoch's last update may have fewer passes. The largest one may be two: a GradScaler leaves out an update whose
        gradients are not finite.
        """
        seen = [(times, images) for images, times in self._images_of_steps.items() if images]
        return max(seen, default=(0, self._usual_before))[1]

    def begin(self) -> None:
        """The epoch's clock starts now."""
        self._on_begin()
        self.memory.begin()
        self._timer = StepTimer(self._device)
        self._phase = "data"
        self._since = self._timer.mark()

    def data(self, batches: Iterable[_T]) -> Iterator[_T]:
        """The batches, with the wait for each timed exactly; without it the time between iterations counts as wait."""
        self._told_data = True
        if self._timer is None:
            self.begin()
        iterator = iter(batches)
        while True:
            self._enter("data")
            batch = next(iterator, _END)
            if batch is _END:  # the epoch's time ends with its last update
                self._phase = None
                self.memory.rest()
                return
            self._enter(None)
            yield batch

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """What runs inside belongs to the phase `name`, wherever in the iteration it is."""
        before = self._phase
        self._enter(name, gap="optimizer")
        try:
            yield
        finally:
            self._enter(before)

    def so_far(self) -> tuple[EpochTime, StepDistribution] | None:
        """The epoch's times up to its last update, while its clock runs on; None where nothing was timed."""
        if (timer := self._timer) is None or not timer.num_steps:
            return None
        times = timer.finish(at_last_step=True)
        self.last_step_s, self.judged = timer.last_step_s, timer.judged
        return times

    def finish(self) -> tuple[EpochTime, StepDistribution] | None:
        """Stop the clock: the epoch's times up to its last update; None where nothing was timed."""
        times = self.so_far()
        self._timer = None
        self._phase = None
        self._judged_until = None
        return times

    def counted(self, epoch: int) -> tuple[int, int]:
        """Iterations and images of this rank since the last `reset`.

        Args:
            epoch: that is being trained, for the messages.

        Raises:
            UsageError: no training step, or no image, was seen.
        """
        iterations = self.num_iterations
        if not iterations:
            raise UsageError(
                f"end_epoch for epoch {epoch} without a training step since the last one",
                hint="call it once an epoch, after the loop over the mini-batches",
            )
        self.check_seen()
        if not self.num_steps:
            warnings.warn(
                "the recorder's optimizer has not stepped in this epoch: a GradScaler has left out every update, or it "
                "is another one, of which follow() tells the recorder",
                stacklevel=3,
            )
        return iterations, self.num_images

    def check_seen(self) -> None:
        """Make sure that a training pass of this epoch was seen, or its images told.

        Raises:
            UsageError: none was.
        """
        if not self.num_images:
            raise UsageError(
                "no training pass of the network was seen, so the number of images is unknown",
                hint="compile the network before ptsim gets it, and give ptsim the compiled one; "
                "or give the number of images to step()",
            )

    def reset(self) -> None:
        """Count anew."""
        self.num_steps = 0
        self.num_images = 0
        self.num_backwards = 0
        self.num_reductions = 0
        self.largest_backward = 0
        self.learning_rate: float | None = None
        self._largest = 0
        self._in_this_backward = 0
        self._images_before = 0  # as of the last update
        self._usual_before = self.usual_step
        self._images_of_steps.clear()
        self.last_step_s = None
        self.judged = ()

    @property
    def seen(self) -> Seen:
        """What the passes so far were like."""
        return Seen(batch=self.batch, precision=self.precision, memory_format=self.memory_format)

    def forget(self, seen: Seen | None = None) -> None:
        """What was seen of this epoch is void: a state goes on from here that had `seen` such passes."""
        self.finish()
        self.reset()
        if seen is not None:
            self.batch = seen.batch
            self.precision = seen.precision
            self.memory_format = seen.memory_format

    def go_on(
        self, *, batch: int, largest_backward: int, usual_step: int, num_steps: int, learning_rate: float | None
    ) -> None:
        """The epoch goes on after a part of so many updates, of which this was seen; 0 where nothing was."""
        self._largest = batch
        self.largest_backward = largest_backward
        self.learning_rate = learning_rate
        self.batch = batch or self.batch
        self._images_of_steps[usual_step] += num_steps

    def count(self, num_images: int) -> None:
        """So many images were in a training pass; whoever knows of one that no hook has seen calls it."""
        self.num_images += num_images
        self._largest = max(self._largest, num_images)
        self.batch = self._largest or self.batch

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], call: Callable[..., _T]) -> _T:
        """The output of `call`, which is the module's own, watched as its hooks would."""
        self._forward_begins(module, args, kwargs)
        output = call(*args, **kwargs)
        self._forward_ends(module, args, output)
        return output

    def _enter(self, phase: Phase | None, gap: Phase | None = None) -> None:
        """From now on time belongs to `phase`; what has had no name since the last call is `gap`."""
        if self._timer is None:
            return
        now = self._timer.mark()
        if self._judged_until is not None:
            self._timer.add("validation", self._since, self._judged_until)
            self._since = self._judged_until
            self._judged_until = None
        name = self._phase or gap
        if name is not None:
            self._timer.add(name, self._since, now)
        self._phase = phase
        self._since = now

    def _ignored(self, module: nn.Module) -> bool:
        """A pass that cannot be training; one in evaluation mode may be, where normalisation is frozen."""
        return self._paused or not torch.is_grad_enabled() or not (module.training or self._trains_in_evaluation)

    def _forward_begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._paused or not torch.is_grad_enabled():
            if self._is_validation(module):
                self.memory.rest()
            return
        if getattr(module, "_is_replica", False):
            raise UsageError(ON_SEVERAL_GPUS, hint=WHOLE_ON_EVERY_RANK)
        given = [tensor for tensor in output_tensors((args, kwargs)) if tensor.ndim]
        images = next((tensor for tensor in given if tensor.ndim == 4), given[0] if given else None)
        self._images = 0 if images is None else len(images)
        if self._ignored(module):
            return
        caller = _reducer(module)
        self._caller = None if caller is None else weakref.ref(caller)
        if caller is not None and self._outdated is not None and caller is self._outdated[0]():
            raise UsageError(
                "the network was pruned, but the loop still calls the DistributedDataParallel that was made before",
                hint=self._outdated[1],
            )
        if self._timer is None:
            self.begin()
        self._in_backward = False
        self.memory.go_on()
        self._enter("forward", gap=None if self._told_data else "data")
        if images is not None:
            self.precision = pass_format(images, self._device, self._inside)
            self.memory_format = layout_of(images)
            self.image_shape = tuple(images.shape[1:]) if images.ndim == 4 else None

    def _note_autocast(self, *_: Any) -> None:
        seen = autocast_format(self._device)
        if seen is not None and not self._paused and torch.is_grad_enabled():
            self.precision = seen

    def _forward_ends(self, module: nn.Module, _: Any, output: Any) -> None:
        if self._paused:
            return
        if not torch.is_grad_enabled():
            self._judged(module)
            return
        if self._compiled and not self.num_backwards and (kept := kept_format(output)) is not None:
            self.precision = kept
            self._inside = kept
        reduces = getattr(self.data_parallel, "require_backward_grad_sync", False)
        begins = functools.partial(self._backward_begins, _Pass(self._images, module.training, reduces))
        for leaf in output_tensors(output):
            if leaf.requires_grad:
                leaf.register_hook(begins)  # type: ignore[no-untyped-call] # torch's gap

    def _is_validation(self, module: nn.Module) -> bool:
        """Whether a pass without gradients is one: between two steps, or before the first, in evaluation mode."""
        between = self._phase is None and self.num_images == self._images_before
        return between and not (self._paused or module.training)

    def _judged(self, module: nn.Module) -> None:
        """A pass without gradients is over."""
        if self._timer is not None and self._is_validation(module):
            self._judged_until = self._timer.mark()

    def _backward_begins(self, forward: _Pass, _: Tensor) -> None:
        if self._paused:
            return
        if not self._in_backward:
            self._in_this_backward = 0
        if not forward.counted:
            forward.counted = True
            self.count(forward.num_images)
            self._in_this_backward += forward.num_images
            self.largest_backward = max(self.largest_backward, self._in_this_backward)
            self._trains_in_evaluation = self._trains_in_evaluation or not forward.training
        if self._in_backward:
            return
        self._in_backward = True
        self._enter("backward")
        self.num_backwards += 1
        self.num_reductions += forward.reduces
        engine = torch.autograd.Variable._execution_engine
        # Called at the end of backward; once more from there, because DDP waits for its all-reduces in such a call.
        engine.queue_callback(lambda: engine.queue_callback(self._backward_ends))

    def _backward_ends(self) -> None:
        self._in_backward = False
        self._enter(None)

    def _update_begins(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._in_update = not self._paused
        if self._paused or has_closure(args, kwargs):
            return  # it runs forward and backward first, and is watched itself
        self._in_backward = False
        if self.learning_rate is None:
            self.learning_rate = learning_rate(optimizer)
        self._enter("optimizer", gap="optimizer")

    def _update_ends(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._paused or not self._in_update:  # torch calls the hooks of a `step` and of the `super().step` in it
            return
        self._in_update = False
        if self.learning_rate is None:
            self.learning_rate = learning_rate(optimizer)
        self._enter(None, gap="optimizer")
        self.num_steps += 1
        self._images_of_steps[self.num_images - self._images_before] += 1
        self._images_before = self.num_images
        self.last_step_s = time.perf_counter()
        if self._timer is not None:
            self._timer.end_step()


_END: Any = object()


def _reducer(module: nn.Module) -> nn.Module | None:
    """The DistributedDataParallel that this pass of `module` goes through; None where there is none.

    torch names the one that is calling. One that was compiled itself is called from what torch.compile has made of it.
    """
    compiled = getattr(module, "_orig_mod", None)
    if isinstance(compiled, nn.parallel.DistributedDataParallel):
        return compiled
    return getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)


@dataclasses.dataclass
class _Pass:
    """A forward pass that becomes training once a gradient reaches its output."""

    num_images: int
    training: bool
    reduces: bool
    counted: bool = False
