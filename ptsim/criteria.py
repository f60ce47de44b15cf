"""Which pruning criteria are there, and what does the gradient of each one's penalty cost in a step?

A criterion is a class (`ptsim.prune.criteria.registry.Criterion`). Another package adds its own by `CRITERIA.add`, or
through an entry point whose value is the class::

    [project.entry-points."ptsim.criteria"]
    mine = "my_package.criterion:Mine"

ptsim's own criteria need torch; what they cost stands here, so that costs are counted without it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import msgspec

from ptsim.network import Layer, LayerKind, Network
from ptsim.registry import Registry

if TYPE_CHECKING:
    from ptsim.prune.criteria.registry import Criterion

GROUP_LASSO = "group_lasso"


class PenaltyWork(msgspec.Struct, frozen=True, kw_only=True):
    """What adding the penalty's gradient to the weights' gradients takes.

    Attributes:
        num_bytes: read and written.
        num_launches: kernels launched on a GPU.
        table_bytes: held all the time, beside the model.
        scratch_bytes: taken at most while the gradient is added, and given back.
    """

    num_bytes: int = 0
    num_launches: int = 0
    table_bytes: int = 0
    scratch_bytes: int = 0


# A GPU gathers weight tensors of at most so many elements into one vector. That saves the launches of about 10 kernels
# a tensor (about 5 µs each), and costs 11 to 15 more accesses to every element: the same at about 2**20 elements on
# 1.3 TB/s, and 12 bytes of tables an element. Derived, not measured.
GATHERED_ELEMENTS = 2**19


def group_lasso_work(network: Network, *, gpu: bool) -> PenaltyWork:
    """Of the group lasso (`prune.criteria.group_lasso`) on fp32 weights, counted by hand from its code.

    A tensor by itself, with k² elements a kernel: 4 + 7/k² accesses an element (9 for k = 1), 10 kernels, and two
    numbers a kernel as scratch. Gathered tensors of a GPU: 20 accesses (a lookup in the table of norms stays in the
    cache and counts its index alone), 10 kernels over all at once, a concatenation for every 128 tensors and an
    addition for every 48 (aten/src/ATen/native/cuda/Shape.cu, ForeachFunctors.cuh), three tables of 4 bytes, and two
    vectors as scratch.
    """
    layers = {layer.name: layer for layer in network.layers if layer.kind in (LayerKind.CONV, LayerKind.LINEAR)}
    gathered, tensors, launches, accesses, scratch = 0, 0, 0, 0.0, 0.0
    for parameter in network.parameters:
        layer = layers.get(parameter.layer)
        if layer is None or len(parameter.shape) < 2 or _is_depthwise(layer):  # a bias has one axis
            continue
        elements, kernel = parameter.num_elements, math.prod(parameter.shape[2:])
        if gpu and elements <= GATHERED_ELEMENTS:
            gathered, tensors = gathered + elements, tensors + 1
            continue
        accesses += elements * (4 + 7 / kernel if kernel > 1 else 9)
        scratch, launches = max(scratch, 2 * elements / kernel), launches + 10
    if gathered:
        accesses, scratch = accesses + 20 * gathered, max(scratch, 2 * gathered)
        launches += 10 + -(-tensors // 128) + -(-tensors // 48)
    return PenaltyWork(
        num_bytes=round(4 * accesses),
        num_launches=launches,
        table_bytes=3 * 4 * gathered,
        scratch_bytes=round(4 * scratch),
    )


def slimming_work(network: Network, *, gpu: bool) -> PenaltyWork:
    """Of network slimming: reads γ and its gradient, writes the gradient; two kernels (sign, add) per BatchNorm."""
    norms = [layer.out_channels or 0 for layer in network.layers if layer.kind is LayerKind.BATCH_NORM]
    return PenaltyWork(num_bytes=3 * 4 * sum(norms), num_launches=2 * len(norms))


class _Work(Protocol):
    def __call__(self, network: Network, *, gpu: bool) -> PenaltyWork: ...


_OWN: dict[str, tuple[str, _Work]] = {
    GROUP_LASSO: ("ptsim.prune.criteria.group_lasso:GroupLasso", group_lasso_work),
    "slimming": ("ptsim.prune.criteria.slimming:Slimming", slimming_work),
}
CRITERIA: Registry[type[Criterion]] = Registry(
    "criterion", entry_points="ptsim.criteria", own={name: place for name, (place, _) in _OWN.items()}
)


def penalty_work(criterion: str, network: Network, *, gpu: bool) -> PenaltyWork:
    """What adding the gradient of the criterion's penalty takes; imports the class of another package's criterion.

    Args:
        criterion: its name.
        network: whose weights are penalised.
        gpu: on a GPU, where launches count, or on a CPU.

    Raises:
        UnknownNameError: no such criterion.
    """
    if criterion in _OWN:
        return _OWN[criterion][1](network, gpu=gpu)
    found = CRITERIA.find(criterion)
    return PenaltyWork(num_bytes=found.traffic(network), num_launches=found.launches(network))


def _is_depthwise(layer: Layer) -> bool:
    return layer.kind is LayerKind.CONV and layer.groups > 1 and layer.groups == layer.in_channels
