"""Which pruning criteria are there, and what does the gradient of each one's penalty cost in a step?

A criterion is a class (`ptsim.prune.criteria.registry.Criterion`). Another package adds its own by `CRITERIA.add`, or
through an entry point whose value is the class::

    [project.entry-points."ptsim.criteria"]
    mine = "my_package.criterion:Mine"

ptsim's own criteria need torch; what they cost stands here, so that costs are counted without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from ptsim.network import Layer, LayerKind, Network
from ptsim.registry import Registry

if TYPE_CHECKING:
    from ptsim.prune.criteria.registry import Criterion

GROUP_LASSO = "group_lasso"


class PenaltyWork(msgspec.Struct, frozen=True, kw_only=True):
    """What adding the penalty's gradient takes on a GPU: bytes read and written, and kernels launched."""

    num_bytes: int = 0
    num_launches: int = 0


def group_lasso_work(network: Network) -> PenaltyWork:
    """Of the group lasso on fp32 weights.

    Bytes: read twice for the two norms, then w and g in, g out. Launches: those of the flat form
    (`prune.criteria.group_lasso`), 11 over all weights at once, a concatenation for every 128 tensors and an addition
    for every 64 (aten/src/ATen/native/cuda/Shape.cu, MultiTensorApply.cuh).
    """
    kinds = {layer.name: layer for layer in network.layers if layer.kind in (LayerKind.CONV, LayerKind.LINEAR)}
    weights = [
        parameter.num_elements
        for parameter in network.parameters
        if len(parameter.shape) > 1 and parameter.layer in kinds and not _is_depthwise(kinds[parameter.layer])
    ]
    launches = 11 + -(-len(weights) // 128) + -(-len(weights) // 64) if weights else 0
    return PenaltyWork(num_bytes=5 * 4 * sum(weights), num_launches=launches)


def slimming_work(network: Network) -> PenaltyWork:
    """Of network slimming: reads γ and its gradient, writes the gradient; two kernels (sign, add) per BatchNorm."""
    norms = [layer.out_channels or 0 for layer in network.layers if layer.kind is LayerKind.BATCH_NORM]
    return PenaltyWork(num_bytes=3 * 4 * sum(norms), num_launches=2 * len(norms))


_OWN: dict[str, tuple[str, Callable[[Network], PenaltyWork]]] = {
    GROUP_LASSO: ("ptsim.prune.criteria.group_lasso:GroupLasso", group_lasso_work),
    "slimming": ("ptsim.prune.criteria.slimming:Slimming", slimming_work),
}
CRITERIA: Registry[type[Criterion]] = Registry(
    "criterion", entry_points="ptsim.criteria", own={name: place for name, (place, _) in _OWN.items()}
)


def penalty_work(criterion: str, network: Network) -> PenaltyWork:
    """What adding the gradient of the criterion's penalty takes; imports the class of another package's criterion.

    Raises:
        UnknownNameError: no such criterion.
    """
    if criterion in _OWN:
        return _OWN[criterion][1](network)
    found = CRITERIA.find(criterion)
    return PenaltyWork(num_bytes=found.traffic(network), num_launches=found.launches(network))


def _is_depthwise(layer: Layer) -> bool:
    return layer.kind is LayerKind.CONV and layer.groups > 1 and layer.groups == layer.in_channels
