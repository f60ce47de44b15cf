"""Which pruning criteria are there, and what does each one's penalty cost in a step?

A criterion is a class (`ptsim.prune.criteria.registry.Criterion`). Another package adds its own by `CRITERIA.add`, or
through an entry point whose value is the class::

    [project.entry-points."ptsim.criteria"]
    mine = "my_package.criterion:Mine"

ptsim's own criteria need torch; what they cost stands here, so that costs are counted without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from ptsim.network import LayerKind, Network, Parameter
from ptsim.registry import Registry
from ptsim.setting import StepSetting

if TYPE_CHECKING:
    from ptsim.prune.criteria.registry import Criterion

GROUP_LASSO = "group_lasso"


class PenaltyWork(msgspec.Struct, frozen=True, kw_only=True):
    """What adding the penalty's gradient to the weights' gradients takes, or its proximal step.

    Attributes:
        num_bytes: read and written.
        num_launches: kernels launched on a GPU.
        table_bytes: held all the time, beside the model.
        scratch_bytes: taken at most meanwhile, and given back.
    """

    num_bytes: int = 0
    num_launches: int = 0
    table_bytes: int = 0
    scratch_bytes: int = 0


# A GPU gathers weights into one vector. Of weights with more than so many elements it gathers the norms of the kernels:
# 2 more launches on the host (20 µs at 10 µs each) in place of up to 16 accesses to every element (as long at 2**20
# elements on 3 TB/s). Weights with more than so many kernels are not gathered: 10 launches in place of 11 accesses (as
# long at 2**22 kernels on 2 TB/s). Derived, not measured.
GATHERED_ELEMENTS = 2**20
GATHERED_KERNELS = 2**22


def group_lasso_work(network: Network, *, gpu: bool) -> PenaltyWork:
    """Of the group lasso (`prune.criteria.group_lasso`) on fp32 weights, counted by hand from its code.

    A weight by itself, with k² elements a kernel: 7 + 2/k² accesses an element, 10 launches, and its squares
    as scratch. Gathered on a GPU: 20 accesses an element (a lookup in the table of norms stays in the
    cache and counts its index alone), 4 + 18/k² if norms of kernels are gathered. 10 launches over all weights at once,
    a concatenation for every 128 (aten/src/ATen/native/cuda/Shape.cu), and an addition for every 48 weights
    (ForeachFunctors.cuh), or 2 launches a weight with norms of kernels. Three tables of 4 bytes an entry of the vector,
    and two vectors as scratch.
    """
    entries, by_element, by_kernel, launches, accesses, scratch = 0, 0, 0, 0, 0, 0
    for parameter in _penalised(network):
        elements = parameter.num_elements
        kernels = elements // math.prod(parameter.shape[2:])
        if not gpu or kernels > GATHERED_KERNELS:
            accesses, scratch, launches = accesses + 7 * elements + 2 * kernels, max(scratch, elements), launches + 10
        elif kernels == elements or elements <= GATHERED_ELEMENTS:
            accesses, entries, by_element = accesses + 20 * elements, entries + elements, by_element + 1
        else:
            accesses, entries, by_kernel = accesses + 4 * elements + 18 * kernels, entries + kernels, by_kernel + 1
    if entries:
        launches += 10 + -(-(by_element + by_kernel) // 128) + -(-by_element // 48) + 2 * by_kernel
    return PenaltyWork(
        num_bytes=4 * accesses,
        num_launches=launches,
        table_bytes=3 * 4 * entries,
        scratch_bytes=4 * max(scratch, 2 * entries),
    )


def group_lasso_proximal(network: Network) -> PenaltyWork:
    """Of the group lasso's proximal step, counted by hand from its code: each weight by itself, on every device.

    For its input and for its output groups: squares 2 accesses an element, their sum 1, the scaling 2. 19 launches, of
    which 13 are on numbers of groups. The squares of a weight as scratch.
    """
    sizes = [parameter.num_elements for parameter in _penalised(network)]
    return PenaltyWork(
        num_bytes=4 * 10 * sum(sizes), num_launches=19 * len(sizes), scratch_bytes=4 * max(sizes, default=0)
    )


def slimming_work(network: Network, *, gpu: bool) -> PenaltyWork:
    """Of network slimming: reads γ and its gradient, writes the gradient; two kernels (sign, add) per BatchNorm."""
    norms = _norms(network)
    return PenaltyWork(num_bytes=3 * 4 * sum(norms), num_launches=2 * len(norms))


def slimming_proximal(network: Network) -> PenaltyWork:
    """Of network slimming's proximal step: sign, |γ|, difference, maximum and copy 2 accesses each, the product 3."""
    norms = _norms(network)
    return PenaltyWork(num_bytes=13 * 4 * sum(norms), num_launches=6 * len(norms))


class _Work(Protocol):
    def __call__(self, network: Network, *, gpu: bool) -> PenaltyWork: ...


class _Own(NamedTuple):
    place: str
    gradient: _Work
    proximal: Callable[[Network], PenaltyWork]


_OWN: dict[str, _Own] = {
    GROUP_LASSO: _Own("ptsim.prune.criteria.group_lasso:GroupLasso", group_lasso_work, group_lasso_proximal),
    "slimming": _Own("ptsim.prune.criteria.slimming:Slimming", slimming_work, slimming_proximal),
}
CRITERIA: Registry[type[Criterion]] = Registry(
    "criterion", entry_points="ptsim.criteria", own={name: own.place for name, own in _OWN.items()}
)


def penalty_work(criterion: str, network: Network, *, gpu: bool, proximal: bool = False) -> PenaltyWork:
    """What a criterion's penalty takes in a step; imports the class of another package's criterion.

    Args:
        criterion: its name.
        network: whose weights are penalised.
        gpu: on a GPU, where launches count, or on a CPU.
        proximal: as a proximal step. Another package's criterion tells what its gradient takes, which stands for both.

    Raises:
        UnknownNameError: no such criterion.
    """
    if criterion in _OWN:
        own = _OWN[criterion]
        return own.proximal(network) if proximal else own.gradient(network, gpu=gpu)
    found = CRITERIA.find(criterion)
    return PenaltyWork(num_bytes=found.traffic(network), num_launches=found.launches(network))


def step_penalty(network: Network, setting: StepSetting, *, gpu: bool) -> PenaltyWork:
    """What the penalty takes in a step that is run so: nothing where it has none.

    Of another package's criterion it is what the recorded run told; of a network that the run did not have, such as one
    with rounded channels, as much per parameter where the package is not here.

    Raises:
        UnknownNameError: no such criterion.
    """
    criterion = setting.regularizer
    if criterion is None:
        return PenaltyWork()
    told = [penalty for penalty in setting.told_penalties if penalty.criterion == criterion]
    exact = next((penalty for penalty in told if penalty.architecture == network.id), None)
    if exact is not None:
        return PenaltyWork(num_bytes=exact.num_bytes, num_launches=exact.num_launches)
    if not told or criterion in CRITERIA:
        return penalty_work(criterion, network, gpu=gpu, proximal=setting.proximal)
    near = min(told, key=lambda penalty: abs(penalty.num_parameters - network.num_parameters))
    share = network.num_parameters / max(1, near.num_parameters)
    return PenaltyWork(num_bytes=round(near.num_bytes * share), num_launches=near.num_launches)


def told_penalty(criterion: object, network: Network) -> PenaltyWork | None:
    """What a trace has to say of a criterion, so that it can be read without its package; None of ptsim's own."""
    if not isinstance(criterion, str) or criterion in _OWN or criterion not in CRITERIA:
        return None
    return penalty_work(criterion, network, gpu=True)


def _penalised(network: Network) -> Iterator[Parameter]:
    """The weights of which the group lasso has groups."""
    layers = {layer.name: layer for layer in network.layers if layer.kind in (LayerKind.CONV, LayerKind.LINEAR)}
    for parameter in network.parameters:
        layer = layers.get(parameter.layer)
        if layer is not None and len(parameter.shape) > 1 and not layer.is_depthwise:  # a bias has one axis
            yield parameter


def _norms(network: Network) -> list[int]:
    return [layer.out_channels or 0 for layer in network.layers if layer.kind is LayerKind.BATCH_NORM]
