"""How long NCCL takes for one all-reduce on a topology nobody has measured.

Three protocols (LL, LL128, Simple) trade latency against bandwidth; rings and trees trade hops against volume. Each
combination is one line α + bytes / β, and NCCL picks the lowest. The hop latencies have the shape of NCCL's own tuning
table; their scale, and the share of the data sheet's bandwidth that each protocol reaches, are fitted on published
nccl-tests runs by `analysis/fit_allreduce.py` and kept in `nccl.toml`.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import msgspec

from ptsim.costs.algorithms import (
    AUTO,
    CollectiveAlgorithm,
    all_algorithms,
    find_algorithm,
    fullest_node,
    reachable_nics,
)
from ptsim.costs.shipped import shipped
from ptsim.errors import UsageError
from ptsim.hardware.spec import Cluster, Link, LinkKind

Protocol = Literal["LL", "LL128", "Simple"]
PROTOCOLS: tuple[Protocol, ...] = ("LL", "LL128", "Simple")

# Seconds, (tree, ring). NCCL 2.30.7, src/graph/tuning.cc: baseLat and hwLat. Sockets, EFA and TCPX have no row of their
# own there; they start from the network's row.
_BASE_S: dict[Protocol, tuple[float, float]] = {
    "LL": (6.8e-6, 6.6e-6),
    "LL128": (14e-6, 14e-6),
    "Simple": (8.4e-6, 8.4e-6),
}
_NETWORK_HOP_S: dict[Protocol, tuple[float, float]] = {
    "LL": (5e-6, 2.7e-6),
    "LL128": (8.5e-6, 4e-6),
    "Simple": (14e-6, 14e-6),
}
_HOP_S: dict[LinkKind, dict[Protocol, tuple[float, float]]] = {
    LinkKind.NVLINK: {"LL": (0.6e-6, 0.6e-6), "LL128": (1.25e-6, 1.9e-6), "Simple": (4e-6, 3.4e-6)},
    LinkKind.PCIE: {"LL": (1e-6, 1e-6), "LL128": (1.9e-6, 2.5e-6), "Simple": (4e-6, 5.7e-6)},
    LinkKind.INFINIBAND: _NETWORK_HOP_S,
    LinkKind.EFA: _NETWORK_HOP_S,
    LinkKind.TCPX: _NETWORK_HOP_S,
    LinkKind.TCP: _NETWORK_HOP_S,
}
_NVLS_S = 25e-6  # in-switch reduction: one latency for the node, however many GPUs; same source, hwLat of NVLS


class KindFit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the fit says about one kind of link.

    Attributes:
        latency_scale: measured hop latency over NCCL's table.
        efficiency: share of the data sheet's bandwidth that a large message reaches with the Simple protocol.
        share: of that, by protocol.
        cap_bytes_per_s: what one NIC carries at most, whatever its line rate (sockets are bound by CPU threads).
    """

    latency_scale: float
    efficiency: float
    share: dict[Protocol, float]
    cap_bytes_per_s: float = math.inf


class NcclFit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fitted constants.

    Attributes:
        base_scale: measured fixed cost of a call over NCCL's table, by protocol.
        join: how well the steps inside a node hide behind those between nodes: the time per byte of both together is
            the `join`-norm of the two (1: one after the other; infinite: the slower one alone).
        pcie_crowding: share of a pair's PCIe bandwidth that is left at most when more than two GPUs cross the host.
        nvls_share: all-reduced bytes per second of in-switch reduction over the link's bandwidth.
        residual: standard deviation of ln(measured / predicted) on systems left out of the fit, from 1 MiB up.
        small_residual: the same below 1 MiB, where host and software decide.
    """

    base_scale: dict[Protocol, float]
    join: float
    pcie_crowding: float
    nvls_share: float
    residual: float
    small_residual: float
    kinds: dict[LinkKind, KindFit]


@functools.cache
def default_fit() -> NcclFit:
    """The constants that `analysis/fit_allreduce.py` found."""
    return shipped("nccl.toml", NcclFit)


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One combination of algorithm and protocol: seconds = latency_s + message bytes · seconds_per_byte."""

    algorithm: str
    protocol: Protocol
    latency_s: float
    seconds_per_byte: float


def lines(cluster: Cluster, num_gpus: int, num_nodes: int, fit: NcclFit | None = None) -> tuple[Line, ...]:
    """Every combination of algorithm and protocol for `num_gpus` ranks that fill `num_nodes` nodes.

    `costs.algorithms` says what each algorithm sends, and which library has it.
    """
    if fit is not None:
        return _lines(cluster, num_gpus, num_nodes, fit, _of_library(cluster.library))
    links = (cluster.intra, cluster.inter, cluster.nvswitch, cluster.reduces_in_switch, cluster.library)
    node = (cluster.nics_per_node, cluster.oversubscription, cluster.gpus_per_node)
    return _default_lines(*links, *node, num_gpus, num_nodes, _of_library(cluster.library))


@functools.lru_cache(maxsize=4096)  # a sweep asks for the same few clusters again and again: 26 times faster
def _default_lines(
    intra: Link,
    inter: Link | None,
    nvswitch: bool,
    reduces_in_switch: bool,
    library: Literal["nccl", "gloo"],
    nics_per_node: int,
    oversubscription: float,
    gpus_per_node: int,
    num_gpus: int,
    num_nodes: int,
    algorithms: tuple[CollectiveAlgorithm, ...],
) -> tuple[Line, ...]:
    cluster = Cluster(
        name="",
        device=None,
        gpus_per_node=gpus_per_node,
        intra=intra,
        inter=inter,
        nvswitch=nvswitch,
        reduces_in_switch=reduces_in_switch,
        library=library,
        nics_per_node=nics_per_node,
        oversubscription=oversubscription,
    )
    return _lines(cluster, num_gpus, num_nodes, default_fit(), algorithms)


def _of_library(library: str) -> tuple[CollectiveAlgorithm, ...]:
    return tuple(row for row in all_algorithms() if library in row.libraries)


def _lines(
    cluster: Cluster, num_gpus: int, num_nodes: int, fit: NcclFit, algorithms: tuple[CollectiveAlgorithm, ...]
) -> tuple[Line, ...]:
    per_node = fullest_node(cluster, num_gpus, num_nodes)
    nics = reachable_nics(cluster, num_gpus, num_nodes)
    as_measured = _is_measured(cluster)
    found = []
    for protocol in PROTOCOLS:
        for algorithm in algorithms:
            ring = int(not algorithm.like_a_tree)
            intra = _effective(cluster.intra, protocol, ring, per_node, 1, cluster.nvswitch, fit)
            hops_intra, hops_inter, volume_intra, volume_inter = algorithm.work(cluster, num_gpus, num_nodes)
            latency = _call_s(cluster, protocol, ring, fit) + hops_intra * intra[0]
            intra_s = volume_intra / intra[1] if per_node > 1 else 0.0
            if cluster.reduces_in_switch and protocol == "Simple" and algorithm.uses_switch and per_node > 2:
                intra_s = min(intra_s, 1 / (fit.nvls_share * cluster.intra.bandwidth_bytes_per_s))
                if not as_measured:
                    scale = fit.kinds[cluster.intra.kind].latency_scale if cluster.intra.kind in fit.kinds else 1.0
                    latency += scale * _NVLS_S - hops_intra * intra[0]
            inter_s = 0.0
            if num_nodes > 1 and cluster.inter is not None:
                inter = _effective(cluster.inter, protocol, ring, num_nodes, cluster.nics_per_node, True, fit)
                latency += hops_inter * inter[0]
                inter_s = volume_inter * cluster.oversubscription / (nics * inter[1])
            total = intra_s + inter_s if algorithm.levels_in_turn else max(intra_s, inter_s)
            if not algorithm.levels_in_turn and total and not as_measured:
                total *= (1 + (min(intra_s, inter_s) / total) ** fit.join) ** (1 / fit.join)
            found.append(Line(algorithm=algorithm.name, protocol=protocol, latency_s=latency, seconds_per_byte=total))
    return tuple(found)


def fastest_line(cluster: Cluster, num_gpus: int, num_nodes: int, message_bytes: float, algorithm: str) -> Line:
    """The combination that takes least; "auto" chooses among the automatic algorithms, as NCCL does of ring and tree.

    Raises:
        UnknownNameError: no such algorithm.
        UsageError: one that the cluster's library does not have.
    """
    if algorithm == AUTO:
        wanted = {row.name for row in all_algorithms() if row.automatic}
    else:
        row = find_algorithm(algorithm)
        if cluster.library not in row.libraries:
            raise UsageError(f"cluster {cluster.name} runs {cluster.library}, which has no {algorithm} all-reduce")
        wanted = {row.name}
    return min(
        (line for line in lines(cluster, num_gpus, num_nodes) if line.algorithm in wanted),
        key=lambda line: (line.latency_s + message_bytes * line.seconds_per_byte, line.algorithm),
    )


def effective_cluster(cluster: Cluster, num_gpus: int, num_nodes: int, line: Line) -> tuple[Cluster, float]:
    """The cluster with links as `line`'s protocol sees them, exact numbers of kind MEASURED, and a call's fixed cost.

    For a simulation that sends the same chunks link by link.
    """
    fit = default_fit()
    ring = int(not find_algorithm(line.algorithm).like_a_tree)
    per_node = fullest_node(cluster, num_gpus, num_nodes)

    def seen(link: Link, peers: int, nics: int, switched: bool) -> Link:
        latency, bandwidth = _effective(link, line.protocol, ring, peers, nics, switched, fit)
        return Link(name=link.name, bandwidth_bytes_per_s=bandwidth, latency_s=latency)

    inter = None if cluster.inter is None else seen(cluster.inter, num_nodes, cluster.nics_per_node, True)
    # a single GPU per node has no peer inside: its port is as fast as with one
    intra = seen(cluster.intra, max(2, per_node), 1, cluster.nvswitch)
    effective = msgspec.structs.replace(cluster, intra=intra, inter=inter, tables=())
    return effective, _call_s(cluster, line.protocol, ring, fit)


def _is_measured(cluster: Cluster) -> bool:
    """Whether its links hold fitted measurements, and no data sheet's numbers."""
    return {link.kind for link in (cluster.intra, cluster.inter) if link} == {LinkKind.MEASURED}


def _call_s(cluster: Cluster, protocol: Protocol, ring: int, fit: NcclFit) -> float:
    """Seconds that a call takes whatever its hops; measured latencies hold them already."""
    return 0.0 if _is_measured(cluster) else fit.base_scale[protocol] * _BASE_S[protocol][ring]


def _effective(
    link: Link, protocol: Protocol, ring: int, peers: int, nics: int, switched: bool, fit: NcclFit
) -> tuple[float, float]:
    """(hop seconds, bytes per second) that the protocol gets from the link."""
    if link.kind is LinkKind.MEASURED:
        return link.latency_s or 0.0, link.bandwidth_bytes_per_s * (link.efficiency or 1.0)
    kind, table = fit.kinds[link.kind], _HOP_S[link.kind]
    scale = kind.latency_scale if link.latency_s is None else link.latency_s / table["LL"][1]
    efficiency = kind.efficiency if link.efficiency is None else link.efficiency
    bandwidth = min(link.bandwidth_bytes_per_s * efficiency, kind.cap_bytes_per_s * nics)
    if link.kind is LinkKind.PCIE and peers > 2 and link.efficiency is None:
        bandwidth = min(bandwidth, link.bandwidth_bytes_per_s * kind.efficiency * fit.pcie_crowding)
    if link.kind is LinkKind.NVLINK and not switched:
        bandwidth *= min(1.0, (peers - 1) / 3)  # links lead to fixed peers: two GPUs of four share a third of them
    return table[protocol][ring] * scale, bandwidth * kind.share[protocol]
