"""What must a pruning criterion be able to do? It is one class in one file; `ptsim.criteria` has the table of them.

A criterion pushes channels towards zero while the network trains, and says how far each channel is from zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from ptsim.criteria import CRITERIA

__all__ = ["CRITERIA", "Criterion"]

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ptsim.network import Network
    from ptsim.prune.groups import ChannelGroups


class Criterion(Protocol):
    """The penalty of one network, made anew after every reconfiguration.

    Attributes:
        label: what people call it.
        weights: the parameters that it penalises.
    """

    label: ClassVar[str]
    weights: Sequence[nn.Parameter]

    def __init__(self, model: nn.Module, groups: ChannelGroups) -> None:
        """Of `model`, whose channel components are `groups`; it may hold references to parameters."""

    def penalty(self) -> Tensor:
        """The penalty without λ, differentiable."""

    def value(self) -> Tensor:
        """The same without an autograd graph."""

    def add_gradient(self, coefficient: float) -> None:
        """Add λ times the penalty's gradient to the gradients of `weights`."""

    def proximal_step(self, shrinkage: float | Sequence[float]) -> None:
        """Shrink the weights by what the penalty takes in one step of size `shrinkage`, or of one for each weight."""

    @classmethod
    def importance(cls, model: nn.Module, groups: ChannelGroups) -> Tensor:
        """Per component how far it is from zero; below the threshold its removal must not change the function."""

    @classmethod
    def traffic(cls, network: Network) -> int:
        """Bytes that one `add_gradient` reads and writes."""

    @classmethod
    def launches(cls, network: Network) -> int:
        """Kernels that one `add_gradient` launches on a GPU."""
