"""How long an all-reduce takes on a cluster: measured table, α–β fit or topology, whichever is there."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from ptsim.costs import nccl
from ptsim.costs.algorithms import AUTO, check_choice
from ptsim.costs.allreduce_table import table_seconds, table_sigma
from ptsim.costs.tiers import Tier
from ptsim.costs.times import Z90
from ptsim.errors import UsageError
from ptsim.hardware.catalog import load_cluster
from ptsim.hardware.spec import AllReduceTable, Cluster, Link, LinkKind
from ptsim.setting import real_number, whole_number

TABLE = "table"  # what a result calls its algorithm where a measured table says the time

_HALF_WEIGHT = 2.0  # halvings or doublings beyond a table after which its line has half of the say
_SMALL_BYTES = 2**20  # below it a topology says less


class AllReduceTime(msgspec.Struct, frozen=True, kw_only=True):
    """One all-reduce: its time, a 90 % interval, the algorithm, and what every GPU puts on the wire.

    Attributes:
        tier: measured (a table for this GPU count that reaches over this size), scaled (a table for another count of
            the same system, or for other sizes, times the ratio that the topology predicts) or datasheet (topology).
        wire_bytes_per_gpu: mean over the GPUs.
    """

    seconds: float
    low_s: float
    high_s: float
    algorithm: str
    wire_bytes_per_gpu: float
    tier: str


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
        ValueError: message_bytes is negative or not finite, or num_gpus is not positive.

    Source: Patarasuk & Yuan, J. Parallel Distrib. Comput. 69 (2009).
    """
    _check(message_bytes, num_gpus)
    steps = 2 * (num_gpus - 1)
    return steps * ((link.latency_s or 0.0) + message_bytes / num_gpus / link.bandwidth_bytes_per_s)


def tree_all_reduce_seconds(message_bytes: float, num_gpus: int, link: Link, *, num_chunks: int | None = None) -> float:
    """Time of one pipelined double-binary-tree all-reduce.

    Half of the message is reduced up and broadcast down each of two trees, in chunks. A rank that has two children in
    one tree is a leaf in the other: at most 4 connections each way (one to the parent, two to children, one to the
    other tree's parent; 2 of two ranks, 3 of three) have equal parts of its link. So a stage of the pipeline takes
    4 chunks' time, the first chunk comes through 2 ⌈log₂ p⌉ stages and hops, and the others follow at that pace.

    Args:
        message_bytes: gradient bytes that every GPU holds.
        num_gpus: number of ranks p; with p = 1 the result is 0.
        link: the link of every rank.
        num_chunks: into how many chunks each half is cut; None for the limit of many, where filling the pipeline costs
            latency only.

    Raises:
        ValueError: message_bytes is negative or not finite, or num_gpus or num_chunks is not positive.

    Source: Sanders, Speck, Träff, Parallel Computing 35 (2009).
    """
    _check(message_bytes, num_gpus)
    if num_chunks is not None and num_chunks < 1:
        raise UsageError(f"{num_chunks} chunks; at least 1 is needed")
    if num_gpus == 1:
        return 0.0
    hops = 2 * (num_gpus - 1).bit_length()  # ⌈log₂ p⌉ up and as many down
    whole = min(num_gpus, 4) * message_bytes / 2 / link.bandwidth_bytes_per_s
    filling = 0.0 if num_chunks is None else (hops - 1) * whole / num_chunks
    return hops * (link.latency_s or 0.0) + whole + filling


def hierarchical_all_reduce_seconds(
    message_bytes: float, gpus_per_node: int, num_nodes: int, intra: Link, inter: Link
) -> float:
    """Time of reduce-scatter inside the nodes, all-reduce of the shards between them, all-gather inside.

    The g shards' rings of one node run at the same time and share its NICs equally: a step carries g chunks, all of
    which arrive one latency after they have left.

    Args:
        message_bytes: gradient bytes that every GPU holds.
        gpus_per_node: g.
        num_nodes: N.
        intra: link of one GPU inside its node.
        inter: link of one node, all NICs together.

    Raises:
        ValueError: message_bytes is negative or not finite, or a count is not positive.
    """
    _check(message_bytes, gpus_per_node)
    inside = ring_all_reduce_seconds(message_bytes, gpus_per_node, intra)
    return inside + ring_all_reduce_seconds(message_bytes, num_nodes, inter)


def all_reduce(message_bytes: float, cluster: Cluster, num_gpus: int, *, algorithm: str = AUTO) -> AllReduceTime:
    """The time of one all-reduce of `message_bytes` held by each of `num_gpus` GPUs.

    GPUs fill nodes one after the other. With "auto" a measured table for this GPU count is used where the cluster has
    one, else a table for another count, scaled, else the faster of ring and tree, as NCCL chooses.

    Raises:
        ValueError: a size that is negative or not finite, no GPUs, or more GPUs than the cluster has.
    """
    _check(message_bytes, num_gpus)
    check_choice(algorithm)
    num_nodes = nodes_for(cluster, num_gpus)
    if num_gpus == 1:
        return AllReduceTime(
            seconds=0.0, low_s=0.0, high_s=0.0, algorithm="ring", wire_bytes_per_gpu=0.0, tier=Tier.DATASHEET
        )
    table = _nearest_table(cluster, num_gpus, num_nodes) if algorithm == AUTO else None
    if table is not None and (table.num_gpus, table.num_nodes) == (num_gpus, num_nodes):
        seconds, sigma = _of_table(table, cluster, message_bytes), table_sigma(table, message_bytes)
        chosen = TABLE
        inside = table.size_bytes[0] <= message_bytes <= table.size_bytes[-1]
        tier = Tier.MEASURED if inside else Tier.SCALED
    else:
        seconds, chosen = _topology(message_bytes, cluster, num_gpus, num_nodes, algorithm)
        fit = nccl.default_fit()
        sigma, tier = fit.small_residual if message_bytes < _SMALL_BYTES else fit.residual, Tier.DATASHEET
        if table is not None:
            there = _of_links(table, cluster, message_bytes, algorithm)
            measured = _of_table(table, cluster, message_bytes)
            seconds = seconds * (measured / there) if there else measured  # no bytes, and links without latency
            sigma = math.hypot(sigma, table_sigma(table, message_bytes))
            tier = Tier.SCALED
    spread = math.exp(Z90 * sigma)
    return AllReduceTime(
        seconds=seconds,
        low_s=seconds / spread,
        high_s=seconds * spread,
        algorithm=chosen,
        wire_bytes_per_gpu=ring_wire_bytes(message_bytes, num_gpus),
        tier=tier,
    )


def made_of_halves(
    time: AllReduceTime, message_bytes: float, cluster: Cluster, num_gpus: int, *, algorithm: str = AUTO
) -> AllReduceTime:
    """What a reduce-scatter and an all-gather of the message take together, as where an update is sharded.

    Between nodes of several GPUs either is a ring: NCCL has trees for whole all-reduces, and for single GPUs on their
    nodes. A time from a table is longer by the ratio that the topology predicts.

    Args:
        time: of the all-reduce, as `all_reduce` says.
        message_bytes: gradient bytes that every GPU holds.
        cluster: where.
        num_gpus: that fill its nodes one after the other.
        algorithm: as it was asked for.

    Source: NCCL 2.27, src/graph/tuning.cc, `ncclTopoTuneModel` and `ncclPatEnable`.
    """
    num_nodes = nodes_for(cluster, num_gpus)
    if algorithm != AUTO or num_nodes == 1 or cluster.gpus_per_node == 1:
        return time
    own_s, ring_s = (_topology(message_bytes, cluster, num_gpus, num_nodes, name)[0] for name in (AUTO, "ring"))
    longer = ring_s / own_s if own_s else 1.0
    return msgspec.structs.replace(
        time, seconds=longer * time.seconds, low_s=longer * time.low_s, high_s=longer * time.high_s, algorithm="ring"
    )


def reduction(message_bytes: float, cluster: Cluster, num_gpus: int, *, sharded: bool) -> AllReduceTime:
    """`all_reduce`, or `made_of_halves` where the update is sharded."""
    time = all_reduce(message_bytes, cluster, num_gpus)
    return made_of_halves(time, message_bytes, cluster, num_gpus) if sharded else time


def allreduce(cluster: str | Path | Cluster, gpus: int, message_bytes: float, algorithm: str = AUTO) -> AllReduceTime:
    """The time of one all-reduce on a cluster of the catalog or of a TOML file.

    >>> import ptsim
    >>> ptsim.allreduce("dgx-a100", gpus=8, message_bytes=100_000_000).algorithm
    'ring'

    Args:
        cluster: catalog name, TOML file or the cluster itself.
        gpus: how many GPUs take part; they fill nodes one after the other.
        message_bytes: gradient bytes that every GPU holds.
        algorithm: "auto", or the name of one (`costs.algorithms`).

    Raises:
        UsageError: unknown cluster, a size that is negative or not finite, no GPUs, or more GPUs than the cluster has.
    """
    found = load_cluster(cluster)
    num_bytes, num_gpus = real_number("message_bytes", message_bytes), whole_number("gpus", gpus)
    return all_reduce(num_bytes, found, num_gpus, algorithm=algorithm)


def _nearest_table(cluster: Cluster, num_gpus: int, num_nodes: int) -> AllReduceTable | None:
    """The table closest in GPU count among those that stay inside a node, or that leave it, as this one does."""
    tables = [table for table in cluster.tables if (table.num_nodes > 1) == (num_nodes > 1)]
    wanted = (num_gpus, num_nodes)
    return min(
        tables,
        key=lambda t: ((t.num_gpus, t.num_nodes) != wanted, abs(math.log(t.num_gpus / num_gpus))),
        default=None,
    )


def _of_table(table: AllReduceTable, cluster: Cluster, message_bytes: float) -> float:
    """The table's time; beyond its sizes more and more the topology's, fixed to the table's nearest size.

    Where the links themselves are known only from the table, its last line is all there is. On the runs of
    traces/public the median miss ten halvings below the table is 0.4 in ln(time), by the line alone 0.9.
    """
    seconds = table_seconds(table, message_bytes)
    nearest = min(max(message_bytes, table.size_bytes[0]), table.size_bytes[-1])
    link = cluster.inter if table.num_nodes > 1 else cluster.intra
    if nearest == message_bytes or link is None or link.kind is LinkKind.MEASURED:
        return seconds
    here, there = (_of_links(table, cluster, size, AUTO) for size in (message_bytes, nearest))
    away = abs(math.log2(max(message_bytes, 1.0) / nearest))
    share = 2.0 ** (-away / _HALF_WEIGHT)
    return float(seconds**share * (table_seconds(table, nearest) * here / there) ** (1 - share))


def _of_links(table: AllReduceTable, cluster: Cluster, message_bytes: float, algorithm: str) -> float:
    """What the links tell of the table's layout, in which every node has as many of its GPUs."""
    even = _using(cluster, -(-table.num_gpus // table.num_nodes))
    return _topology(message_bytes, even, table.num_gpus, table.num_nodes, algorithm)[0]


def _using(cluster: Cluster, per_node: int) -> Cluster:
    """The cluster with so many of every node's GPUs, and the NICs that are theirs."""
    even = msgspec.structs.replace(cluster, gpus_per_node=per_node)
    if cluster.inter is None or per_node >= cluster.gpus_per_node:
        return even
    share = (cluster.rail_of(per_node - 1) + 1) / cluster.num_rails
    bandwidth = share * cluster.inter.bandwidth_bytes_per_s
    inter = msgspec.structs.replace(cluster.inter, bandwidth_bytes_per_s=bandwidth)
    return msgspec.structs.replace(even, inter=inter, nics_per_node=max(1, round(share * cluster.nics_per_node)))


def _topology(
    message_bytes: float, cluster: Cluster, num_gpus: int, num_nodes: int, algorithm: str
) -> tuple[float, str]:
    line = nccl.fastest_line(cluster, num_gpus, num_nodes, message_bytes, algorithm)
    return line.latency_s + message_bytes * line.seconds_per_byte, line.algorithm


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
    if not 0 <= message_bytes < math.inf:
        raise UsageError(f"message of {message_bytes} bytes; it must be a finite number and not negative")
    if num_gpus < 1:
        raise UsageError(f"{num_gpus} GPUs; at least 1 is needed")
