"""What GPUs, links and clusters are, as data in SI units; where the numbers come from is part of the data."""

from __future__ import annotations

import datetime
from enum import StrEnum
from typing import Literal, TypeAlias, get_args

import msgspec

from ptsim.errors import UsageError
from ptsim.network import Precision

UNSPECIFIED = "unspecified"  # the device of a cluster of which only the network was measured

Generation: TypeAlias = Literal[
    "kepler", "maxwell", "pascal", "volta", "turing", "ampere", "ada", "hopper", "blackwell"
]  # fmt: skip
GENERATIONS: tuple[str, ...] = get_args(Generation)  # NVIDIA's, oldest first


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One accelerator (or CPU) as its data sheet describes it.

    Attributes:
        architecture: NVIDIA generation in lower case ("kepler" … "blackwell"), or "cpu".
        peak_flops_per_s: dense peak by precision (FLOP = 2 per MAC); a precision that is missing is not supported.
        num_sms: streaming multiprocessors (cores for a CPU).
        stacked_memory: HBM, whose error correction takes nothing of the stated capacity; False where that is not known.
        boosts_beyond: the board clocks above `boost_clock_hz` while power and temperature allow (GeForce, TITAN).
        power_w, idle_power_w: board power limit and idle power.
        driver_names: what NVML and the CUDA driver call it; tells measurements of this device from others.
        sources: field name → where the number is published.
    """

    name: str
    architecture: str
    memory_bytes: int
    memory_bandwidth_bytes_per_s: float
    peak_flops_per_s: dict[Precision, float]
    num_sms: int
    boost_clock_hz: float
    l2_bytes: int
    power_w: float
    idle_power_w: float
    sources: dict[str, str]
    boosts_beyond: bool = False
    stacked_memory: bool = False
    driver_names: tuple[str, ...] = ()

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU, and not a CPU."""
        return self.architecture != "cpu"

    @property
    def chip(self) -> str:
        """What boards with the same silicon share: "volta 80 SMs" of V100s and TITAN V."""
        return f"{self.architecture} {self.num_sms} SMs"

    def check_precision(self, precision: Precision) -> None:
        """Refuse a precision that its data sheet gives no peak for.

        Raises:
            UsageError: says which it supports.
        """
        if precision not in self.peak_flops_per_s:
            supported = ", ".join(sorted(self.peak_flops_per_s))
            raise UsageError(f"{self.name} does not support {precision}; it supports {supported}")


class LinkKind(StrEnum):
    """What carries the bytes; decides which fitted latencies and efficiencies of the collective library apply."""

    NVLINK = "nvlink"
    PCIE = "pcie"
    INFINIBAND = "infiniband"  # RDMA with GPUDirect: InfiniBand, RoCE, Slingshot through libfabric
    EFA = "efa"  # AWS Elastic Fabric Adapter; P instances from P4d on have GPUDirect
    TCPX = "tcpx"  # Google's GPUDirect-TCPX and TCPXO
    TCP = "tcp"  # sockets over Ethernet
    MEASURED = "measured"  # bandwidth and latency are fitted on measurements: taken as they are


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A full-duplex connection: bandwidth of one direction as one GPU (intra-node) or one node (inter-node) sees it.

    Attributes:
        latency_s: of one hop of a small message; None means the collective library's own constant for the kind.
        efficiency: share of the bandwidth that a large all-reduce reaches; None means the fitted one for the kind.
    """

    name: str
    bandwidth_bytes_per_s: float
    latency_s: float | None = None
    kind: LinkKind = LinkKind.MEASURED
    efficiency: float | None = None


class AlphaBeta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One segment of time over message size: latency_s + bytes · seconds_per_byte, from `from_bytes` on."""

    from_bytes: int
    latency_s: float
    seconds_per_byte: float


class AllReduceTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A measured all-reduce table of this system: times over message sizes for one GPU count and layout.

    Attributes:
        relative_jitter: standard deviation of repeated measurements over their mean; 0 where nothing was repeated.
        segments: the α–β lines that the times follow, one per protocol; empty where nobody fitted them.
    """

    num_gpus: int
    num_nodes: int
    size_bytes: tuple[int, ...]
    seconds: tuple[float, ...]
    relative_jitter: float
    source: str
    segments: tuple[AlphaBeta, ...] = ()


class Cluster(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Equal nodes of equal GPUs.

    Attributes:
        device: of every GPU; None where only the network is known.
        device_file: the user's file that describes the device; empty for a device of the catalog.
        intra: GPU to GPU inside a node (all of one GPU's NVLinks together, one direction); see `links_inside`.
        inter: node to node, all NICs of a node together, one direction; None for a single machine.
        max_nodes: how many nodes there are; None means as many as asked for.
        nvswitch: every GPU of a node reaches every other at full bandwidth.
        reduces_in_switch: the node's switch adds up by itself (NVLink SHARP, Hopper and newer behind NVSwitch).
        library: the collective library; gloo runs on CPUs.
        oversubscription: ratio by which the fabric above the nodes is thinner than their NICs (1 = full bisection).
        nodes_per_leaf: nodes under one leaf switch; counts where an oversubscribed fabric is simulated link by link.
        tables: measured all-reduce times, preferred over any formula.
        price_usd_per_gpu_hour: None means that money is not reported.
        price_date: the day on which that was the list price; None where it is what the user pays.
        cores_per_node: physical CPU cores of a node, which input pipelines share; None where not known.
        storage_bandwidth_bytes_per_s: at which a node reads training images; None where not known, or where they lie in
            its memory.
    """

    name: str
    device: Device | None
    gpus_per_node: int
    intra: Link
    inter: Link | None = None
    nics_per_node: int = 1
    max_nodes: int | None = None
    oversubscription: float = 1.0
    nodes_per_leaf: int = 16
    nvswitch: bool = False
    reduces_in_switch: bool = False
    library: Literal["nccl", "gloo"] = "nccl"
    tables: tuple[AllReduceTable, ...] = ()
    price_usd_per_gpu_hour: float | None = None
    price_date: datetime.date | None = None
    cores_per_node: int | None = None
    storage_bandwidth_bytes_per_s: float | None = None
    device_file: str = ""
    sources: dict[str, str] = {}

    @property
    def device_name(self) -> str:
        """What the device is called; "unspecified" where only the network is known."""
        return UNSPECIFIED if self.device is None else self.device.name

    @property
    def links_inside(self) -> bool:
        """Whether `intra` is a fact; where a node has one GPU it may be there for formulas alone, without a source."""
        return self.gpus_per_node > 1 or "intra" in self.sources

    @property
    def num_rails(self) -> int:
        """NICs of a node that its GPUs use."""
        return min(self.nics_per_node, self.gpus_per_node)

    def rail_of(self, gpu: int) -> int:
        """Which of its node's NICs is a GPU's; GPUs count over the whole cluster, node by node."""
        return gpu % self.gpus_per_node * self.num_rails // self.gpus_per_node

    @property
    def gpu(self) -> Device:
        """The device, for a question that needs one.

        Raises:
            UsageError: only the network is known.
        """
        if self.device is None:
            raise UsageError(
                "the cluster does not say which device its nodes have",
                hint='write device = "NAME" into its file; ptsim devices lists the catalog',
            )
        return self.device
