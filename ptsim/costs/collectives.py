"""How long an all-reduce takes on a cluster: measured table, α–β fit or topology, whichever is there."""

from __future__ import annotations

from typing import Literal

import msgspec

from ptsim.hardware.spec import Cluster

Algorithm = Literal["ring", "tree", "hierarchical", "table"]


class AllReduceTime(msgspec.Struct, frozen=True, kw_only=True):
    """One all-reduce: its time, a 90 % interval, the algorithm, and what every GPU puts on the wire."""

    seconds: float
    low_s: float
    high_s: float
    algorithm: Algorithm
    wire_bytes_per_gpu: float


def all_reduce(
    message_bytes: int,
    cluster: Cluster,
    num_gpus: int,
    *,
    algorithm: Literal["auto", "ring", "tree", "hierarchical"] = "auto",
) -> AllReduceTime:
    """The time of one all-reduce of `message_bytes` held by each of `num_gpus` GPUs.

    Raises:
        ValueError: a negative size, no GPUs, or more GPUs than the cluster has.
    """
    raise NotImplementedError
