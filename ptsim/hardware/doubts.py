"""Which numbers of a device or cluster file are probably not those that it asks for?

NVIDIA's data sheets give the peaks of tensor cores with sparsity, which is twice what dense products reach, and the
bandwidth of NVLink and PCIe for both directions together. Clouds name the price of a node, logs have microseconds,
and people know the bandwidth of one NIC.
"""

from __future__ import annotations

from collections.abc import Iterator

from ptsim.hardware.spec import Cluster, Device, LinkKind
from ptsim.network import Precision
from ptsim.units import format_bandwidth, format_bytes, format_peak, format_seconds

# FLOP of an SM in a clock without sparsity, at most: fp32, tf32, fp16 and bf16. NVIDIA's white papers.
_PER_CLOCK = {
    "kepler": (384, 384, 384),
    "maxwell": (256, 256, 256),
    "pascal": (256, 256, 256),
    "volta": (128, 128, 1024),
    "turing": (128, 128, 1024),
    "ampere": (256, 1024, 2048),
    "ada": (256, 512, 1024),
    "hopper": (256, 2048, 4096),
    "blackwell": (256, 4096, 8192),
}
# Bytes per second that a GPU sends, at most: over all its NVLinks, and over 16 lanes of PCIe
_NVLINK = {"pascal": 80e9, "volta": 150e9, "turing": 50e9, "ampere": 300e9, "hopper": 450e9, "blackwell": 900e9}
_PCIE = {"ampere": 31.5e9, "ada": 31.5e9, "hopper": 63e9, "blackwell": 126e9}
_RDMA = (LinkKind.INFINIBAND, LinkKind.EFA, LinkKind.TCPX)
_PCIE_3 = 15.75e9  # of the generations before
_MUCH = 1.25  # more than this times the largest is no rounding, and no board that clocks a little higher
_DEAR = 25.0  # USD an hour: no cloud asks as much for one GPU
_SLOW_NIC = 10e9  # bytes per second: those of which a node has several have been faster since 2014
_FAR, _SLOW_S = 1000.0, 0.1  # times and seconds beyond what the link takes, whatever keeps an all-reduce from using it


def device_doubts(device: Device) -> Iterator[str]:
    """What is said of memory in units of ten, and of peaks that the device's multiprocessors cannot reach."""
    if device.architecture not in _PER_CLOCK:
        return
    if device.memory_bytes % 10**9 == 0:
        size = f"{device.memory_bytes // 10**9} GB, which are {format_bytes(device.memory_bytes)}"
        yield f"memory is {size}; where data sheets of GPUs write GB they mean GiB"
    fp32, tf32, half = _PER_CLOCK[device.architecture]
    for precision, peak in device.peak_flops_per_s.items():
        each = {Precision.FP32: fp32, Precision.TF32: tf32}.get(precision, half)
        most = each * device.num_sms * device.boost_clock_hz
        if peak > _MUCH * most:
            asked = "are these all?" if precision is Precision.FP32 else "is it a peak with sparsity?"
            yield (
                f"peak.{precision} is {format_peak(peak)}, but {device.num_sms} multiprocessors of "
                f"{device.architecture} have at most {format_peak(most)} at boost_clock; {asked}"
            )


def cluster_doubts(cluster: Cluster) -> Iterator[str]:
    """What is said of bandwidths that its GPUs or NICs do not have, and of a price and times out of all measure."""
    yield from _link_doubts(cluster)
    inter, nics = cluster.inter, cluster.nics_per_node
    if nics > 1 and inter is not None and inter.kind in _RDMA and inter.bandwidth_bytes_per_s < _SLOW_NIC * nics:
        total = format_bandwidth(inter.bandwidth_bytes_per_s)
        yield f"inter.bandwidth is {total}, of {nics} NICs together; is it that of a single one?"
    price = cluster.price_usd_per_gpu_hour
    if price is not None and price > _DEAR and cluster.gpus_per_node > 1:
        node = f"a node with its {cluster.gpus_per_node} GPUs"
        yield f"price_per_gpu is {price:g} USD an hour; is it the price of {node}?"
    for number, table in enumerate(cluster.tables):
        link = cluster.inter if table.num_nodes > 1 else cluster.intra
        size, seconds = table.size_bytes[-1], table.seconds[-1]
        if link is not None and seconds > _FAR * size / link.bandwidth_bytes_per_s + _SLOW_S:
            said = f"{format_bytes(size)} take {format_seconds(seconds)}"
            yield f"table[{number}] says that {said}; are its times seconds?"


def _link_doubts(cluster: Cluster) -> Iterator[str]:
    device, link = cluster.device, cluster.intra
    if device is None or device.architecture not in _PER_CLOCK:
        return
    most: float | None = None
    if link.kind is LinkKind.NVLINK:
        most = _NVLINK.get(device.architecture)
    elif link.kind is LinkKind.PCIE:
        most = _PCIE.get(device.architecture, _PCIE_3)
    if most is not None and link.bandwidth_bytes_per_s > _MUCH * most:
        yield (
            f"intra.bandwidth is {format_bandwidth(link.bandwidth_bytes_per_s)}, but {link.kind} of {device.name} has "
            f"at most {format_bandwidth(most)} in one direction; is it that of both directions?"
        )
