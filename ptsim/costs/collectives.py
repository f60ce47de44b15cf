"""How long an all-reduce takes on a cluster: measured table, α–β fit or topology, whichever is there."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from ptsim.errors import UsageError
from ptsim.hardware.spec import AllReduceTable, Cluster, Link, LinkKind

Algorithm = Literal["ring", "tree", "hierarchical", "table"]
Choice = Literal["auto", "ring", "tree", "hierarchical"]


class AllReduceTime(msgspec.Struct, frozen=True, kw_only=True):
    """One all-reduce: its time, a 90 % interval, the algorithm, and what every GPU puts on the wire."""

    seconds: float
    low_s: float
    high_s: float
    algorithm: Algorithm
    wire_bytes_per_gpu: float


def ring_wire_bytes(message_bytes: float, num_gpus: int) -> float:
    """Bytes that every GPU sends in one all-reduce: 2(p-1)/p of the message.

    It holds for the ring, for the hierarchical form (2(g-1)/g inside the node and 2(N-1)/N of 1/g between nodes add up
    to the same) and, as a mean over ranks, for the tree, whose p-1 edges carry the message once up and once down.

    Source: Patarasuk & Yuan, J. Parallel Distrib. Comput. 69 (2009).
    """
    return 2.0 * (num_gpus - 1) / num_gpus * message_bytes


def ring_all_reduce_seconds(message_bytes: float, num_gpus: int, link: Link) -> float:
    """Time of one bandwidth-optimal ring all-reduce.

    Every GPU sends 2(p-1)/p of the message in 2(p-1) steps; links are full duplex and not shared.

    Args:
        message_bytes: gradient bytes that every GPU holds.
        num_gpus: ring size p; with p = 1 the result is 0.
        link: the slowest link on the ring.

    Raises:
        ValueError: message_bytes is negative or num_gpus is not positive.

    Source: Patarasuk & Yuan, J. Parallel Distrib. Comput. 69 (2009).
    """
    _check(message_bytes, num_gpus)
    steps = 2 * (num_gpus - 1)
    return steps * ((link.latency_s or 0.0) + message_bytes / num_gpus / link.bandwidth_bytes_per_s)


def tree_all_reduce_seconds(message_bytes: float, num_gpus: int, link: Link) -> float:
    """Time of one pipelined double-binary-tree all-reduce.

    Half of the message is reduced up and broadcast down each of two trees. A rank that is inner in one tree is a leaf
    in the other, so the busiest rank sends 2 messages; the depth is log₂ p hops each way.

    Args:
        message_bytes: gradient bytes that every GPU holds.
        num_gpus: number of ranks p; with p = 1 the result is 0.
        link: the link of every rank.

    Raises:
        ValueError: message_bytes is negative or num_gpus is not positive.

    Source: Sanders, Speck, Träff, Parallel Computing 35 (2009).
    """
    _check(message_bytes, num_gpus)
    if num_gpus == 1:
        return 0.0
    volume = min(2.0, 2.0 * math.log2(num_gpus)) if num_gpus > 2 else 1.0  # two ranks exchange halves both ways
    return 2 * math.log2(num_gpus) * (link.latency_s or 0.0) + volume * message_bytes / link.bandwidth_bytes_per_s


def hierarchical_all_reduce_seconds(
    message_bytes: float, gpus_per_node: int, num_nodes: int, intra: Link, inter: Link
) -> float:
    """Time of reduce-scatter inside the nodes, all-reduce of the shards between them, all-gather inside.

    The shards' all-reduces of one node run at the same time and share its NICs.

    Args:
        message_bytes: gradient bytes that every GPU holds.
        gpus_per_node: g.
        num_nodes: N.
        intra: link of one GPU inside its node.
        inter: link of one node, all NICs together.

    Raises:
        ValueError: message_bytes is negative, or a count is not positive.
    """
    _check(message_bytes, gpus_per_node)
    inside = ring_all_reduce_seconds(message_bytes, gpus_per_node, intra)
    return inside + ring_all_reduce_seconds(message_bytes, num_nodes, inter)


def all_reduce(message_bytes: int, cluster: Cluster, num_gpus: int, *, algorithm: Choice = "auto") -> AllReduceTime:
    """The time of one all-reduce of `message_bytes` held by each of `num_gpus` GPUs.

    GPUs fill nodes one after the other. With "auto" a measured table for this GPU count is used where the cluster has
    one, and otherwise the faster of ring and tree, as NCCL chooses.

    Raises:
        ValueError: a negative size, no GPUs, or more GPUs than the cluster has.
    """
    _check(message_bytes, num_gpus)
    num_nodes = nodes_for(cluster, num_gpus)
    wire = ring_wire_bytes(message_bytes, num_gpus)
    if num_gpus == 1:
        return AllReduceTime(seconds=0.0, low_s=0.0, high_s=0.0, algorithm="ring", wire_bytes_per_gpu=0.0)
    if algorithm == "auto":
        for table in cluster.tables:
            if (table.num_gpus, table.num_nodes) == (num_gpus, num_nodes):
                seconds = _interpolate(table, message_bytes)
                spread = math.exp(1.645 * math.hypot(table.relative_jitter, 0.05))
                return AllReduceTime(
                    seconds=seconds,
                    low_s=seconds / spread,
                    high_s=seconds * spread,
                    algorithm="table",
                    wire_bytes_per_gpu=wire,
                )
    candidates: tuple[Algorithm, ...] = ("ring", "tree") if algorithm == "auto" else (algorithm,)
    seconds, chosen = min((_topology_seconds(message_bytes, cluster, num_gpus, num_nodes, c), c) for c in candidates)
    return AllReduceTime(
        seconds=seconds, low_s=seconds / 1.5, high_s=seconds * 1.5, algorithm=chosen, wire_bytes_per_gpu=wire
    )


def nodes_for(cluster: Cluster, num_gpus: int) -> int:
    """How many nodes `num_gpus` GPUs occupy when nodes are filled one after the other.

    Raises:
        ValueError: more GPUs than the cluster has.
    """
    num_nodes = -(-num_gpus // cluster.gpus_per_node)
    most = 1 if cluster.inter is None else cluster.max_nodes
    if most is not None and num_nodes > most:
        raise UsageError(f"cluster {cluster.name} has {most * cluster.gpus_per_node} GPUs, {num_gpus} were asked for")
    return num_nodes


def _check(message_bytes: float, num_gpus: int) -> None:
    if message_bytes < 0:
        raise UsageError(f"message of {message_bytes} bytes; it must not be negative")
    if num_gpus < 1:
        raise UsageError(f"{num_gpus} GPUs; at least 1 is needed")


def _interpolate(table: AllReduceTable, message_bytes: float) -> float:
    sizes, seconds = table.size_bytes, table.seconds
    if message_bytes <= sizes[0]:
        return seconds[0]
    if message_bytes >= sizes[-1]:
        return seconds[-1] * message_bytes / sizes[-1]
    i = max(k for k in range(len(sizes) - 1) if sizes[k] <= message_bytes)
    weight = math.log(message_bytes / sizes[i]) / math.log(sizes[i + 1] / sizes[i])
    return math.exp((1 - weight) * math.log(seconds[i]) + weight * math.log(seconds[i + 1]))


# Protocol → (base µs of tree, base µs of ring): NCCL 2.30.7 src/graph/tuning.cc.
_BASE_S = {"LL": (6.8e-6, 6.6e-6), "LL128": (14e-6, 14e-6), "Simple": (8.4e-6, 8.4e-6)}
# Kind of link → protocol → hop latency (tree, ring), same source; sockets: fitted on Polaris and p3dn TCP runs.
_HOP_S = {
    LinkKind.NVLINK: {"LL": (0.6e-6, 0.6e-6), "LL128": (1.25e-6, 1.9e-6), "Simple": (4e-6, 3.4e-6)},
    LinkKind.PCIE: {"LL": (1e-6, 1e-6), "LL128": (1.9e-6, 2.5e-6), "Simple": (4e-6, 5.7e-6)},
    LinkKind.INFINIBAND: {"LL": (5e-6, 2.7e-6), "LL128": (8.5e-6, 4e-6), "Simple": (14e-6, 14e-6)},
    LinkKind.EFA: {"LL": (15e-6, 15e-6), "LL128": (20e-6, 20e-6), "Simple": (30e-6, 30e-6)},
    LinkKind.TCP: {"LL": (20e-6, 20e-6), "LL128": (25e-6, 25e-6), "Simple": (50e-6, 50e-6)},
}
_EFFICIENCY = {
    LinkKind.NVLINK: 0.79,
    LinkKind.PCIE: 0.6,
    LinkKind.INFINIBAND: 0.85,
    LinkKind.EFA: 0.75,
    LinkKind.TCP: 0.5,
    LinkKind.MEASURED: 1.0,
}
_SHARE = {"LL": 0.3, "LL128": 0.8, "Simple": 1.0}


def _topology_seconds(message_bytes: float, cluster: Cluster, num_gpus: int, num_nodes: int, algorithm: str) -> float:
    return min(_protocol_seconds(message_bytes, cluster, num_gpus, num_nodes, algorithm, p) for p in _BASE_S)


def _protocol_seconds(
    message_bytes: float, cluster: Cluster, num_gpus: int, num_nodes: int, algorithm: str, protocol: str
) -> float:
    ring = int(algorithm != "tree")
    plain = {link.kind for link in (cluster.intra, cluster.inter) if link is not None} == {LinkKind.MEASURED}
    base = 0.0 if plain else _BASE_S[protocol][ring]
    per_node = -(-num_gpus // num_nodes)
    intra = _effective(cluster.intra, protocol, ring)
    if num_nodes == 1:
        formula = ring_all_reduce_seconds if ring else tree_all_reduce_seconds
        return base + formula(message_bytes, num_gpus, intra)
    if cluster.inter is None:
        raise AssertionError("nodes_for lets no second node pass without a link to it")
    inter = _effective(cluster.inter, protocol, ring)
    if algorithm == "hierarchical":
        return base + hierarchical_all_reduce_seconds(message_bytes, per_node, num_nodes, intra, inter)
    slowest = inter.bandwidth_bytes_per_s / cluster.oversubscription
    if per_node > 1:
        slowest = min(slowest, intra.bandwidth_bytes_per_s)
    intra_s, inter_s = intra.latency_s or 0.0, inter.latency_s or 0.0
    if ring:
        latency = 2 * (num_gpus - num_nodes) * intra_s + 2 * (num_nodes - 1) * inter_s
        return base + latency + ring_wire_bytes(message_bytes, num_gpus) / slowest
    latency = 2 * ((per_node - 1) * intra_s + math.log2(num_nodes) * inter_s)
    volume = 1.0 if num_nodes == 2 else 2.0
    return base + latency + volume * message_bytes / slowest


def _effective(link: Link, protocol: str, ring: int) -> Link:
    if link.kind is LinkKind.MEASURED:
        return link
    table = _HOP_S[link.kind]
    scale = 1.0 if link.latency_s is None else link.latency_s / table["LL"][ring]
    efficiency = _EFFICIENCY[link.kind] if link.efficiency is None else link.efficiency
    return Link(
        name=link.name,
        bandwidth_bytes_per_s=link.bandwidth_bytes_per_s * efficiency * _SHARE[protocol],
        latency_s=table[protocol][ring] * scale,
    )
