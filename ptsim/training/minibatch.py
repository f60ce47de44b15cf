"""How far may the mini-batch grow once the network has shrunk (METHOD.md §3)?"""

from __future__ import annotations

import math
from typing import Literal

from ptsim.costs.memory import iteration_memory, largest_batch
from ptsim.hardware.spec import Device
from ptsim.network import Network
from ptsim.training.config import Config


def grown_batch(
    network: Network,
    config: Config,
    *,
    batch_per_gpu: int,
    world_size: int,
    num_train: int,
    capacity_bytes: int,
    device: Device | None = None,
) -> int:
    """The largest mini-batch per rank that fits: the present one plus whole multiples of the granularity.

    It never shrinks, and never exceeds `max_batch` or the data set. `device` is the catalog's GPU that runs: with it
    the estimate has the libraries' workspaces and the allocator's margins.
    """
    fits = largest_batch(
        network,
        capacity_bytes=capacity_bytes,
        precision=config.precision,
        optimizer=config.optimizer,
        memory_format=config.memory_format,
        device=device,
        data_parallel=world_size > 1,
    )
    limit = min(fits, (config.max_batch or num_train) // world_size, num_train // world_size)
    steps = max(0, limit - batch_per_gpu) // config.batch_granularity
    grown = batch_per_gpu + steps * config.batch_granularity
    return grown


def predicted_bytes(
    network: Network,
    config: Config,
    batch_per_gpu: int,
    *,
    device: Device | None = None,
    data_parallel: bool = False,
) -> int:
    """Peak memory of one iteration as the cost model sees it."""
    need = iteration_memory(
        network,
        batch=batch_per_gpu,
        precision=config.precision,
        optimizer=config.optimizer,
        memory_format=config.memory_format,
        device=device,
        data_parallel=data_parallel,
    )
    return need.peak_bytes


def learning_rate_scale(first_batch: int, batch: int, rule: Literal["linear", "sqrt"]) -> float:
    """The factor on the planned learning rate for a mini-batch that has grown from `first_batch`.

    Source: Goyal et al., arXiv 1706.02677 (linear); Krizhevsky, arXiv 1404.5997 (square root).
    """
    ratio = batch / first_batch
    return ratio if rule == "linear" else math.sqrt(ratio)
