"""Which gradients does DistributedDataParallel reduce together, and when is each bucket ready?

torch fills buckets in gradient-ready order. The cap is soft: a bucket closes after the tensor that reaches it. The
first bucket is small so that communication starts early.

Source: torch/csrc/distributed/c10d/reducer.cpp, `compute_bucket_assignment_by_size`.
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
    network: Network, *, first_bucket_bytes: int = MIB, bucket_bytes: int = 25 * MIB, element_bytes: int = 4
) -> tuple[Bucket, ...]:
    """The buckets of `network` after DDP has rebuilt them, in the order in which they become ready.

    Args:
        network: its parameters are in gradient-ready order.
        first_bucket_bytes: cap of the first bucket (torch: 1 MiB).
        bucket_bytes: cap of all others (torch's `bucket_cap_mb`).
        element_bytes: of a gradient.

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
    for parameter in network.parameters:
        filling.append(parameter)
        size += parameter.num_elements * element_bytes
        if size >= cap:
            buckets.append(_bucket(filling, size))
            filling, size, cap = [], 0, bucket_bytes
    if filling:
        buckets.append(_bucket(filling, size))
    return tuple(buckets)


def _bucket(parameters: list[Parameter], num_bytes: int) -> Bucket:
    used = [parameter.layer for parameter in parameters if parameter.layer]  # "" where no gradient ever comes
    return Bucket(
        parameters=tuple(parameter.name for parameter in parameters),
        num_bytes=num_bytes,
        ready_layer=used[-1] if used else "",
    )
