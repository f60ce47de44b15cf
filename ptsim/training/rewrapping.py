"""Does the loop call the network as it is now? What was put around it before pruning has to be made again."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ptsim.errors import UsageError
from ptsim.training.recorder import Recorder
from ptsim.training.wrapping import is_wrapped, refuse_spread, wrapped_again


class Wrapping:
    """What stands between a network that shrinks and its loop: DistributedDataParallel, torch.compile, or nothing.

    Attributes:
        outdated: the network has changed since, and it is the loop that has to wrap it again.
    """

    def __init__(self, module: nn.Module, recorder: Recorder, rewrap: Callable[[nn.Module], nn.Module] | None) -> None:
        """`module` is what the loop calls, `recorder` watches it; where `rewrap` is None, the loop wraps again."""
        self.outdated = False
        self._recorder = recorder
        self._rewrap = rewrap
        self._is_wrapped = is_wrapped(module)

    def network_changed(self) -> None:
        """Wrap the network again, or ask the loop to; the old module may not train any more."""
        recorder = self._recorder
        caller = recorder.watch.data_parallel
        recorder.watch.outdate(self._advice("DistributedDataParallel"))
        if self._rewrap is not None:
            recorder.follow(wrapped_again(self._rewrap, recorder.network))
            self._is_wrapped = is_wrapped(recorder.module)
        elif self._is_wrapped or caller is not None:
            self.outdated = True
            recorder.follow(recorder.network)  # an old DDP that somebody holds would reduce beside the new one

    def renewed(self, module: nn.Module) -> None:
        """The loop has wrapped the network again: it calls `module` now.

        Raises:
            UsageError: it holds another network.
        """
        refuse_spread(module)
        self._recorder.follow(module)
        self.outdated = False
        self._is_wrapped = is_wrapped(module)

    def check(self, *, told: bool, pruned: bool) -> None:
        """The loop must not go on with what was compiled around the network before pruning; a new DDP is adopted.

        Args:
            told: the loop tells the images of its steps, so that a pass that nobody sees is no sign.
            pruned: there was a reconfiguration.

        Raises:
            UsageError: it does.
        """
        watch = self._recorder.watch
        caller = watch.data_parallel
        unseen = caller is None and not told and not watch.num_backwards
        if unseen and self._is_wrapped and pruned:
            raise UsageError(
                "the network was pruned, but the loop calls a compiled module that PruneTrain was not told of",
                hint=self._advice("torch.compile"),
            )
        if self.outdated and caller is not None:
            self.renewed(caller)

    def _advice(self, wrap: str) -> str:
        """What the loop has to do after pruning to call the changed network."""
        if self._rewrap is not None:
            return "model = pruner.module after end_epoch: it is what rewrap has made"
        return f"where pruner.needs_rewrap: model = {wrap}(pruner.network); pruner.rewrapped(model)"
