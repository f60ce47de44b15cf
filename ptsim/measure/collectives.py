"""How long all-reduces take on this machine, live or from nccl-tests logs, as a cluster that `--cluster` accepts."""

from __future__ import annotations

import math
import os
import socket
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ptsim.costs.allreduce_table import fit_segments, table_seconds
from ptsim.costs.collectives import all_reduce, ring_wire_bytes
from ptsim.costs.nccl import default_fit
from ptsim.errors import UsageError
from ptsim.hardware.catalog import cluster_names, load_cluster, match_device, measured_device
from ptsim.hardware.nccl_log import NcclLog, of_one_kind, with_nodes
from ptsim.hardware.spec import AllReduceTable, Cluster, Device, Link, LinkKind
from ptsim.textfile import printable
from ptsim.units import counted

_PCIE_X16 = (15.75e9, 31.5e9)  # generations 3 and 4: PCI-SIG base specifications
DEFAULT_SIZES = tuple(2**k for k in range(10, 27))  # 1 KiB to 64 MiB
_CARRIED = {  # field of a cluster → its key in a file
    "price_usd_per_gpu_hour": "price_per_gpu",
    "cores_per_node": "cores_per_node",
    "storage_bandwidth_bytes_per_s": "storage_bandwidth",
}
_ONE_SETTING = 1.5  # by which runs with the same settings differ at most
_MOST_LETTERS = 150  # of the logs' names in a source, which has at most 300
FEWEST = 3  # iterations of a size, however slow the network is
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def tables_from_logs(logs: Sequence[NcclLog]) -> list[AllReduceTable]:
    """A table per GPU and node count, with its α–β lines and the jitter; several runs of one layout are averaged."""
    logs = [with_nodes(log) for log in logs]
    layouts = dict.fromkeys((log.num_gpus, log.num_nodes) for log in logs)
    return [_table([log for log in logs if (log.num_gpus, log.num_nodes) == layout]) for layout in layouts]


def _table(runs: Sequence[NcclLog]) -> AllReduceTable:
    """Geometric means of the runs' times; the jitter within runs, and between them if that is more."""
    runs = of_one_kind(runs, lambda run: run.kind, f"runs of {runs[0].num_gpus} GPUs")
    taken: dict[int, list[float]] = {}
    for run in runs:
        for measurement in run.measurements:
            taken.setdefault(measurement.size_bytes, []).append(measurement.seconds)
    sizes = tuple(sorted(taken))
    seconds = tuple(statistics.geometric_mean(taken[size]) for size in sizes)
    between = [statistics.stdev(map(math.log, times)) for times in taken.values() if len(times) > 1]
    apart = max((max(times) / min(times) for times in taken.values()), default=1.0)
    if apart > _ONE_SETTING:
        warnings.warn(
            f"runs of {runs[0].num_gpus} GPUs on as many nodes differ by up to {apart:.1f} times: their mean is "
            "neither of them; were they run with the same settings?",
            stacklevel=2,
        )
    jitter = max(statistics.median(run.relative_jitter for run in runs), statistics.median(between or [0.0]))
    versions = sorted({run.version for run in runs if run.version})
    names = printable(", ".join(dict.fromkeys(Path(run.path).name for run in runs)), _MOST_LETTERS)
    return AllReduceTable(
        num_gpus=runs[0].num_gpus,
        num_nodes=runs[0].num_nodes or 1,
        size_bytes=sizes,
        seconds=seconds,
        relative_jitter=jitter,
        source=f"nccl-tests log {names}" + (f", NCCL {', '.join(versions)}" if versions else ""),
        segments=fit_segments(sizes, seconds) if len(sizes) > 1 else (),
    )


def measure_table(
    *,
    sizes: Sequence[int] = DEFAULT_SIZES,
    warmup: int = 5,
    iterations: int = 20,
    seconds_per_size: float = 5.0,
    known: AllReduceTable | None = None,
    keep: Callable[[AllReduceTable], None] | None = None,
) -> AllReduceTable:
    """Time all-reduces of float32 in the process group that is initialised, whatever its backend.

    Every rank calls this and gets the same table. An iteration's time is that of its slowest rank, on the device's
    own clock (CUDA events or the host's); the table has the median. Slow networks do fewer iterations, at least 3.

    Args:
        sizes: message bytes, multiples of 4, rising.
        warmup: iterations that are not counted.
        iterations: iterations per size.
        seconds_per_size: roughly how long one size may take.
        known: what an interrupted measurement of this layout left, on rank 0; its sizes are not measured again.
        keep: called on rank 0 with the table so far after each size.

    Raises:
        UsageError: a size is not a positive multiple of 4, fewer than 3 iterations, only one rank takes part, or
            `known` is of another layout.
    """
    import torch
    import torch.distributed as dist

    if any(size < 4 or size % 4 for size in sizes) or list(sizes) != sorted(set(sizes)):
        raise UsageError(f"sizes {list(sizes)} are not rising multiples of 4 bytes")
    if iterations < FEWEST:
        raise UsageError(f"{iterations} iterations; at least {FEWEST} are needed")
    ranks = dist.get_world_size()
    if ranks < 2:
        raise UsageError("a single rank reduces nothing; start at least two, for example with torchrun")
    on_gpu = "nccl" in dist.get_backend()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    hosts: list[str | None] = [None] * ranks
    dist.all_gather_object(hosts, node_name())
    layout = (ranks, len(set(hosts)))
    found = _left_by(known, layout)
    source = f"measured with torch.distributed {dist.get_backend()}, torch {torch.__version__}"
    for size in sizes:
        if size in found:
            continue
        payload = torch.ones(size // 4, dtype=torch.float32, device=device)
        first = _timed(payload, max(1, warmup))
        enough = torch.tensor([seconds_per_size / max(statistics.median(first), 1e-9)], device=device)
        dist.all_reduce(enough, op=dist.ReduceOp.MIN)
        times = torch.tensor(_timed(payload, max(FEWEST, min(iterations, int(enough.item())))), device=device)
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        slowest = sorted(times.tolist())
        middle = slowest[: max(2, math.ceil(0.9 * len(slowest)))]  # what other programs on the machine do is not jitter
        found[size] = statistics.median(slowest), statistics.stdev(middle) / statistics.fmean(middle)
        if keep is not None and dist.get_rank() == 0:
            keep(_table_so_far(sizes, found, layout, source))
    return _table_so_far(sizes, found, layout, source)


def node_name(boot: Path = _BOOT) -> str:
    """What tells the node of this process from others: PTSIM_NODE_NAME, or the host's name and its last start.

    Nodes made from one image, or containers, may all have the same name. `boot` is where Linux says which start it was.

    Source: NCCL, src/misc/utils.cc, `getHostHash`.
    """
    given = os.environ.get("PTSIM_NODE_NAME")
    if given is not None:
        return given
    try:
        return f"{socket.gethostname()} {boot.read_text().strip()}"
    except OSError:
        return socket.gethostname()


def _table_so_far(
    sizes: Sequence[int], found: Mapping[int, tuple[float, float]], layout: tuple[int, int], source: str
) -> AllReduceTable:
    """The table of what is measured, seconds and jitter by size."""
    done = [size for size in sizes if size in found]
    seconds = tuple(found[size][0] for size in done)
    return AllReduceTable(
        num_gpus=layout[0],
        num_nodes=layout[1],
        size_bytes=tuple(done),
        seconds=seconds,
        relative_jitter=statistics.median(found[size][1] for size in done),
        source=source if len(done) == len(sizes) else f"{source}, {len(done)} of {len(sizes)} sizes so far",
        segments=fit_segments(done, seconds) if len(done) > 1 else (),
    )


def _left_by(known: AllReduceTable | None, layout: tuple[int, int]) -> dict[int, tuple[float, float]]:
    """Seconds and jitter by size of rank 0's earlier measurement, on every rank."""
    import torch.distributed as dist

    shared = [known]
    dist.broadcast_object_list(shared, src=0)
    known = shared[0]
    if known is None:
        return {}
    if (known.num_gpus, known.num_nodes) != layout:
        raise UsageError(
            f"the file to go on with is of {counted(known.num_gpus, 'rank')} on {counted(known.num_nodes, 'node')}, "
            f"these are {layout[0]} on {layout[1]}"
        )
    return {size: (time, known.relative_jitter) for size, time in zip(known.size_bytes, known.seconds, strict=True)}


def _timed(payload: object, iterations: int) -> list[float]:
    """Seconds of each of `iterations` all-reduces; ranks start together."""
    import torch
    import torch.distributed as dist

    if not isinstance(payload, torch.Tensor):
        raise TypeError("payload is a tensor")
    found = []
    for _ in range(iterations):
        dist.barrier()
        if payload.is_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call] # torch's gap
            start.record()
            dist.all_reduce(payload)
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) * 1e-3)
        else:
            begin = time.perf_counter()
            dist.all_reduce(payload)
            found.append(time.perf_counter() - begin)
        payload.fill_(1.0)
    return found


def link_of(table: AllReduceTable, name: str) -> Link:
    """The link of a ring that would show the table's smallest and largest messages."""
    hops = 2 * (table.num_gpus - 1)
    per_byte = table.segments[-1].seconds_per_byte if table.segments else 0.0
    if per_byte <= 0:
        per_byte = table.seconds[-1] / table.size_bytes[-1]
    return Link(
        name=name,
        bandwidth_bytes_per_s=ring_wire_bytes(1.0, table.num_gpus) / per_byte,
        latency_s=min(table.seconds) / hops,
    )


def calibrated_cluster(
    tables: Sequence[AllReduceTable],
    *,
    name: str,
    base: Cluster | None = None,
    gpus: Sequence[str] = (),
    library: str = "nccl",
) -> Cluster:
    """A cluster with measured tables.

    What the tables do not say comes from `base`, or from the catalog's machine with the same GPU and node size; where
    neither is known, the links are those that the tables imply, and a node is taken to hold 8 GPUs.

    Args:
        tables: one per GPU count and layout.
        name: of the cluster.
        base: what the machine is, where the user says so.
        gpus: driver names of the GPUs.
        library: "nccl" or "gloo".

    Raises:
        UsageError: no tables, two for the same layout, a layout that `base` cannot have, or GPUs of different kinds.
    """
    per_node = measured_per_node = _gpus_per_node(tables)
    if base is not None:
        _check_room(base, tables, per_node)
        _warn_of_other_gpus(base, gpus)
    device = base.device if base else _device_of(gpus)
    like = base or _catalog_machine(device, per_node, tables)
    between = max((t for t in tables if t.num_nodes > 1), key=lambda t: t.num_gpus, default=None)
    intra = _intra(like, tables, library)
    if base is None and like is not None and between is None:
        like = msgspec.structs.replace(like, inter=None)  # nobody said that there is a second node
    if base is None and all(table.num_nodes == 1 for table in tables):
        per_node = max(per_node, like.gpus_per_node if like else 8)  # a run on part of a node says nothing of the rest
    if like is not None and (base is not None or like.inter is not None):
        inter, nics, thinner = like.inter, like.nics_per_node, like.oversubscription
    else:
        inter, nics, thinner = (link_of(between, "between nodes, as measured") if between else None), 1, 1.0
    assumed = f"; a node is taken to hold {per_node} GPUs" if per_node > measured_per_node else ""
    sources = {"intra": (f"catalog: {like.name}" if like else tables[0].source) + assumed}
    if like is not None and not like.links_inside:
        sources = {}
    if inter is not None:
        sources["inter"] = f"catalog: {like.name}" if like and like.inter else between.source if between else ""
    carried: dict[str, Any] = {} if base is None else _carried(base, sources)
    return Cluster(
        name=name,
        device=device,
        device_file=base.device_file if base else "",
        gpus_per_node=base.gpus_per_node if base else per_node,
        intra=intra,
        inter=inter,
        nics_per_node=nics,
        max_nodes=1 if inter is None else base.max_nodes if base else None,
        oversubscription=thinner,
        nvswitch=like.nvswitch if like else False,
        reduces_in_switch=like.reduces_in_switch if like else False,
        library="gloo" if library == "gloo" else "nccl",
        tables=tuple(sorted(tables, key=lambda t: (t.num_nodes, t.num_gpus))),
        sources=sources,
        **carried,
    )


def _check_room(base: Cluster, tables: Sequence[AllReduceTable], per_node: int) -> None:
    """Refuse a log of more than the user's machine has."""
    if base.gpus_per_node < per_node:
        raise UsageError(f"cluster {base.name} has {base.gpus_per_node} GPUs a node, the log has {per_node}")
    most, nodes = 1 if base.inter is None else base.max_nodes, max(table.num_nodes for table in tables)
    if most is not None and most < nodes:
        raise UsageError(f"cluster {base.name} has {counted(most, 'node')}, the log has {nodes}")


def _warn_of_other_gpus(base: Cluster, gpus: Sequence[str]) -> None:
    """Say that the user's machine has other GPUs than those that the catalog knows of the log's."""
    if base.device is None:
        return
    known = (measured_device(gpu, base.device) for gpu in gpus)
    others = sorted({device.name for device in known if device is not None} - {base.device.name})
    if others:
        ran = f"the all-reduces ran on {' and '.join(others)}, cluster {base.name} has {base.device.name}"
        warnings.warn(f"{ran}: steps are projected on {base.device.name}", stacklevel=3)


def _carried(base: Cluster, sources: dict[str, str]) -> dict[str, Any]:
    """What no table tells of a machine, as the user's cluster says it; adds where each number is from to `sources`."""
    found = {name: getattr(base, name) for name in _CARRIED if getattr(base, name) is not None}
    sources |= {_CARRIED[name]: base.sources.get(_CARRIED[name], f"cluster {base.name}") for name in found}
    return found | {"price_date": base.price_date, "nodes_per_leaf": base.nodes_per_leaf}


def _gpus_per_node(tables: Sequence[AllReduceTable]) -> int:
    """The largest node that a table was measured on."""
    layouts = [(table.num_gpus, table.num_nodes) for table in tables]
    if not layouts:
        raise UsageError("no all-reduce table to make a cluster of")
    if len(set(layouts)) < len(layouts):
        raise UsageError(f"two tables for the same GPU and node count among {layouts}", hint="give one log per layout")
    return max(-(-num_gpus // num_nodes) for num_gpus, num_nodes in layouts)


def _device_of(gpus: Sequence[str]) -> Device | None:
    """What the catalog knows of these GPUs; a `UserWarning` where it knows some of them only.

    Raises:
        UsageError: they are of different kinds.
    """
    found = {device.name: device for gpu in gpus if (device := match_device(gpu))}
    if len(found) > 1:
        raise UsageError(
            f"the all-reduces ran on different GPUs: {' and '.join(found)}",
            hint="give the logs of one machine, or --base CLUSTER, which says what it has",
        )
    unknown = [gpu for gpu in gpus if match_device(gpu) is None]
    if found and unknown:
        warnings.warn(
            f"the all-reduces ran on {', '.join(found)} and on GPUs that the catalog does not have: "
            f"{printable(', '.join(unknown), _MOST_LETTERS)}; the cluster is taken to have the former",
            stacklevel=3,
        )
    return next(iter(found.values()), None)


def _catalog_machine(device: Device | None, gpus_per_node: int, tables: Sequence[AllReduceTable]) -> Cluster | None:
    """The catalog's machine with this GPU and at least this node size whose topology comes closest to the tables.

    Its network is kept only where it explains the tables between nodes within 35 %.
    """
    if device is None:
        return None
    best: tuple[bool, float, Cluster] | None = None
    for candidate in map(load_cluster, cluster_names()):
        if candidate.device != device or candidate.gpus_per_node < gpus_per_node:
            continue
        across = any(table.num_nodes > 1 for table in tables)
        machine = msgspec.structs.replace(
            candidate, gpus_per_node=gpus_per_node if across else candidate.gpus_per_node, max_nodes=None
        )
        misses = {table.num_nodes > 1: _miss(machine, table) for table in tables}
        if misses.get(True, 0.0) > math.log(1.35):
            machine = msgspec.structs.replace(machine, inter=None)
        rank = (candidate.gpus_per_node != gpus_per_node, sum(misses.values()), machine)
        if best is None or rank[:2] < best[:2]:
            best = rank
    return best[2] if best else None


def _miss(cluster: Cluster, table: AllReduceTable) -> float:
    """Median |ln(topology / table)| from 1 MiB up, or of the largest size."""
    if table.num_nodes > 1 and cluster.inter is None:
        return math.inf
    sizes = [size for size in table.size_bytes if size >= 2**20] or [table.size_bytes[-1]]
    return statistics.median(
        abs(math.log(all_reduce(size, cluster, table.num_gpus).seconds / table_seconds(table, size))) for size in sizes
    )


def _intra(like: Cluster | None, tables: Sequence[AllReduceTable], library: str) -> Link:
    """The link inside a node: the catalog's, or what the tables imply."""
    inside = max((t for t in tables if t.num_nodes == 1), key=lambda t: t.num_gpus, default=None)
    if inside is None:
        return like.intra if like else link_of(tables[0], "inside a node: not measured, taken from between nodes")
    measured = link_of(inside, "inside a node, as measured")
    bandwidth = measured.bandwidth_bytes_per_s
    if like is None:
        if library == "gloo":  # its ranks share a host's memory
            return measured
        lanes = next((rate for rate in _PCIE_X16 if bandwidth < rate), None)
        if lanes is None:
            return measured
        intra = Link(name="PCIe x16, assumed from its rate", bandwidth_bytes_per_s=lanes, kind=LinkKind.PCIE)
    else:
        intra = like.intra
    fit = default_fit()
    if intra.kind is LinkKind.PCIE:
        crowded = intra.bandwidth_bytes_per_s * fit.kinds[LinkKind.PCIE].efficiency * fit.pcie_crowding
        if bandwidth < 0.85 * crowded:  # slower than crowding explains, so a pair is no faster
            return msgspec.structs.replace(intra, efficiency=bandwidth / intra.bandwidth_bytes_per_s)
    return intra
