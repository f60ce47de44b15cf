"""How much memory one training iteration needs, and which mini-batch fits."""

from __future__ import annotations

import msgspec

from ptsim.costs.times import MemoryFormat
from ptsim.hardware.spec import Device
from ptsim.network import Network, Precision


class MemoryNeed(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one training iteration by purpose."""

    activation_bytes: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    workspace_bytes: int
    peak_bytes: int


def iteration_memory(
    network: Network,
    *,
    batch: int,
    precision: Precision,
    optimizer: str = "sgd",
    memory_format: MemoryFormat = "contiguous",
    device: Device | None = None,
) -> MemoryNeed:
    """The memory of one training iteration of `batch` images."""
    element = precision.activation_bytes
    saved = sum(layer.saved_elements * element + layer.saved_other_bytes for layer in network.layers) * batch
    parameters = 4 * network.num_parameters
    states = (2 if optimizer.startswith("adam") else 1) * parameters
    return MemoryNeed(
        activation_bytes=saved,
        parameter_bytes=parameters,
        gradient_bytes=parameters,
        optimizer_bytes=states,
        workspace_bytes=0,
        peak_bytes=saved + 2 * parameters + states,
    )


def largest_batch(
    network: Network,
    *,
    capacity_bytes: int,
    granularity: int = 1,
    precision: Precision,
    optimizer: str = "sgd",
    memory_format: MemoryFormat = "contiguous",
    device: Device | None = None,
) -> int:
    """The largest mini-batch, a multiple of `granularity`, whose iteration fits; 0 if none does."""
    one = iteration_memory(network, batch=1, precision=precision, optimizer=optimizer)
    fixed = one.peak_bytes - one.activation_bytes
    return max(0, int((capacity_bytes - fixed) // one.activation_bytes) // granularity * granularity)
