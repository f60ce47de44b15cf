"""`ptsim devices` and `ptsim clusters`: what the catalog holds, and where its numbers come from."""

from __future__ import annotations

from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich import box
from rich.table import Table

from ptsim.cli.common import print_json, stdout_console
from ptsim.cli.options import Json
from ptsim.hardware.catalog import cluster_names, device_aliases, device_names, load_cluster, load_device
from ptsim.network import Precision
from ptsim.units import GBIT, GIB, shown_number

JsonWithSources = Annotated[Json, Parameter(help="One JSON document with every number's source.")]


def devices(*, json: JsonWithSources = False) -> None:
    """List the catalog's GPUs: memory, bandwidth and dense peaks."""
    entries = [load_device(name) for name in device_names()]
    if json:
        print_json(
            [msgspec.to_builtins(entry) | {"aliases": device_aliases(entry.name)} for entry in entries],
        )
        return
    table = _table("device", "GiB", "GB/s", "SMs", "fp32", "tf32", "fp16", "bf16", "W", "also")
    for entry in entries:
        peaks = [
            entry.peak_flops_per_s.get(p) for p in (Precision.FP32, Precision.TF32, Precision.FP16, Precision.BF16)
        ]
        table.add_row(
            entry.name,
            f"{entry.memory_bytes / GIB:.0f}",
            f"{entry.memory_bandwidth_bytes_per_s / 1e9:.0f}",
            str(entry.num_sms),
            *(f"{peak / 1e12:.4g}" if peak else "–" for peak in peaks),
            f"{entry.power_w:.0f}",
            ", ".join(device_aliases(entry.name)),
        )
    table.caption = "peaks in TFLOP/s, dense; --json adds the sources"
    stdout_console().print(table)


def clusters(*, json: JsonWithSources = False) -> None:
    """List the catalog's clusters: device, node size, links and list price."""
    entries = [load_cluster(name) for name in cluster_names()]
    if json:
        print_json([{**msgspec.to_builtins(entry), "device": entry.device_name} for entry in entries])
        return
    table = _table("cluster", "device", "GPUs", "inside a node", "GB/s", "between nodes", "Gbit/s", "USD/h")
    for entry in entries:
        inter, price = entry.inter, entry.price_usd_per_gpu_hour
        table.add_row(
            entry.name,
            entry.device_name,
            str(entry.gpus_per_node),
            entry.intra.name,
            f"{entry.intra.bandwidth_bytes_per_s / 1e9:.4g}",
            inter.name if inter else "–",
            f"{inter.bandwidth_bytes_per_s / GBIT:.4g}" if inter else "–",
            "–" if price is None else shown_number("usd", price),
        )
    table.caption = "GPUs and Gbit/s per node; one direction; USD/h: list price of a GPU; --json adds days and sources"
    stdout_console().print(table)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index == 0, overflow="fold")
    return table
