"""Which regularisers are there, and how does one of a user's own package join them?

A criterion pushes channels towards zero while the network trains, and says how far each channel is from zero. It is one
class in one file. A package of somebody else registers its class through an entry point::

    [project.entry-points."ptsim.criteria"]
    mine = "my_package.criterion:Mine"
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from ptsim.registry import Registry

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

    def proximal_step(self, shrinkage: float) -> None:
        """Shrink the weights by what the penalty takes in one step of size `shrinkage`."""

    @classmethod
    def importance(cls, model: nn.Module, groups: ChannelGroups) -> Tensor:
        """Per component how far it is from zero; below the threshold its removal must not change the function."""

    @classmethod
    def traffic(cls, network: Network) -> int:
        """Bytes that one `add_gradient` reads and writes."""


CRITERIA: Registry[type[Criterion]] = Registry(
    "criterion",
    entry_points="ptsim.criteria",
    own={
        "group_lasso": "ptsim.prune.criteria.group_lasso:GroupLasso",
        "slimming": "ptsim.prune.criteria.slimming:Slimming",
    },
)
