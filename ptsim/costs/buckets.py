"""Which gradients does DistributedDataParallel reduce together, and when is each bucket ready?

torch fills buckets in gradient-ready order. The cap is soft: a bucket closes after the tensor that reaches it. The
first bucket is small so that communication starts early.

Parameters that get no gradient are left out, as `ptsim train` does it: DDP would wait for them. With
`find_unused_parameters` DDP reduces them too, and never rebuilds its first buckets: those are filled from the other
end, so that the small one comes last.

Source: torch/csrc/distributed/c10d/reducer.cpp, `compute_bucket_assignment_by_size` and `should_rebuild_buckets`;
torch/nn/parallel/distributed.py, `_ddp_init_helper`.
"""

from __future__ import annotations

import msgspec

from ptsim.network import Network, Parameter
from ptsim.units import MIB


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """Gradients that one all-reduce carries.

    Attributes:
        parameters: names, in the order in which their gradients come.
        num_bytes: of all gradients together.
        ready_layer: the layer whose backward pass completes the bucket.
    """

    parameters: tuple[str, ...]
    num_bytes: int
    ready_layer: str


def ddp_buckets(
    network: Network,
    *,
    first_bucket_bytes: int = MIB,
    bucket_bytes: int = 25 * MIB,
    element_bytes: int = 4,
    rebuilt: bool = True,
) -> tuple[Bucket, ...]:
    """The buckets of `network`, in the order in which they become ready.

    Args:
        network: its parameters are in gradient-ready order.
        first_bucket_bytes: cap of the first bucket (torch: 1 MiB).
        bucket_bytes: cap of all others (torch's `bucket_cap_mb`).
        element_bytes: of a gradient.
        rebuilt: after the first step; False gives the buckets that find_unused_parameters keeps, where parameters are
            defined in the reverse of gradient-ready order.

    Raises:
        ValueError: a cap or the element size is not positive.
    """
    for name, value in (
        ("first_bucket_bytes", first_bucket_bytes),
        ("bucket_bytes", bucket_bytes),
        ("element_bytes", element_bytes),
    ):
        if value <= 0:
            raise ValueError(f"{name} is {value}, expected a positive number")
    buckets: list[Bucket] = []
    filling: list[Parameter] = []
    size = 0
    cap = first_bucket_bytes
    for parameter in network.gradients if rebuilt else reversed(network.parameters):
        filling.append(parameter)
        size += parameter.num_elements * element_bytes
        if size >= cap:
            buckets.append(_bucket(filling, size, rebuilt))
            filling, size, cap = [], 0, bucket_bytes
    if filling:
        buckets.append(_bucket(filling, size, rebuilt))
    return tuple(buckets if rebuilt else reversed(buckets))


def _bucket(parameters: list[Parameter], num_bytes: int, in_ready_order: bool) -> Bucket:
    if not in_ready_order:
        parameters = parameters[::-1]
    used = [parameter.layer for parameter in parameters if parameter.layer]  # "" where no gradient ever comes
    return Bucket(
        parameters=tuple(parameter.name for parameter in parameters),
        num_bytes=num_bytes,
        ready_layer=used[-1] if used else "",
    )
