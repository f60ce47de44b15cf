"""`ptsim simulate`: replay recorded runs on clusters of any size."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ptsim.cli.common import mfu_cell, print_json, say, stdout_console
from ptsim.cli.options import Cluster, Json, LengthOptions, Profile, Settings, Traces
from ptsim.cli.reading import check_output, parse_gpus, read_settings
from ptsim.errors import UsageError
from ptsim.hardware.catalog import load_cluster
from ptsim.hardware.profile_file import read_device_profile
from ptsim.setting import PrecisionName, Sharding
from ptsim.sim.budget import unlimited
from ptsim.sim.options import GradientFormat, MiniBatch, Options, Scaling
from ptsim.sim.projection import RunProjection, projection_row, told_notes
from ptsim.sim.run import StepCache, change, project
from ptsim.textfile import check_folder_writable
from ptsim.trace.trace import planned_mark
from ptsim.units import MIB, format_bytes, format_joules, format_seconds, interval, shown_number

_NAMED = ("mixed_devices", "link_bandwidth", "link_latency_s")  # options whose parts are names of devices or links
_AS_RECORDED = Options()

# Parts of the time that are shown where they are more than nothing. All must fit beside each other into 120 columns.
_WAITS: dict[str, Callable[[RunProjection], float]] = {
    "input wait": lambda p: p.input_wait_s,
    "slow, failed": lambda p: p.straggler_wait_s + p.faults_s,
}


def _default(name: str, unit: int | None = None) -> Parameter:
    """An option that keeps what `Options` says unless it is given; the help shows what that is, in units if need be."""
    value = getattr(_AS_RECORDED, name)
    shown = str(value if unit is None else value / unit)
    return Parameter(show_default=lambda _: shown)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """What differs from the recorded run; `ptsim.sim.options.Options` has more, for --set."""

    scaling: Annotated[Scaling | None, _default("scaling")] = None
    """weak keeps the recorded mini-batch of each GPU, strong the recorded mini-batch of all GPUs together."""
    minibatch: Annotated[MiniBatch | None, _default("minibatch")] = None
    """Mini-batch of each epoch: recorded, fixed (as in the first epoch), or planned (begins like fixed, and grows at
    every reconfiguration to what fits the projected GPU)."""
    device: str | None = None
    """GPU that replaces the cluster's own: catalog name or TOML file."""
    precision: PrecisionName | None = None
    """Number format of the matrix products, instead of the recorded one; amp is fp16 autocast."""
    gradients: Annotated[GradientFormat | None, _default("gradient_format")] = None
    """Number format in which gradients are sent."""
    sharding: Annotated[Sharding | None, _default("sharding")] = None
    """zero1: every GPU keeps and updates its share of the optimizer's state. zero2: of the gradients too."""
    micro_batches: int | None = None
    """Gradient accumulation: number of passes that each mini-batch is split into. Default: as many as recorded."""
    bucket_mib: Annotated[float | None, _default("bucket_bytes", MIB)] = None
    """Size limit of DDP's buckets. The first bucket has 1 MiB at the default, otherwise this limit too."""
    network: Annotated[Literal["formula", "links"] | None, _default("network")] = None
    """formula treats all links of a kind as equal. links simulates every NIC and leaf switch; --set gives it
    link_bandwidth, link_latency_s and placement."""
    contention: float | None = None
    """Fraction by which computation and communication each slow down while they overlap. Default: that of the
    kind of link."""
    channel_multiple: Annotated[int | None, _default("channel_multiple")] = None
    """Round the channel counts of pruned networks up to a multiple of this number."""
    jitter: str | None = None
    """Relative standard deviation of the step time of one GPU, or "recorded"."""
    input: Annotated[str | None, _default("input")] = None
    """What reads and decodes the images with the node's cores: torchvision, dali or ffcv. none: the GPU never waits."""
    input_images_per_s: str | None = None
    """Instead of --input: images per second that one GPU is given, or "recorded"."""
    mtbf_gpu_hours: float | None = None
    """Mean time between failures of one GPU in hours. Failures are simulated with checkpoints and restarts."""
    price: float | None = None
    """Price in USD per GPU and hour, instead of the cluster's."""

    def given(self) -> dict[str, Any]:
        """What the user has given, by the names that `Options` has for it.

        Raises:
            UsageError: a value that is no number, or a bucket without a size.
        """
        bucket_mib = self.bucket_mib
        if bucket_mib is not None and not (math.isfinite(bucket_mib) and bucket_mib > 0):
            raise UsageError(f"bucket-mib is {bucket_mib:g}, expected a positive number")
        values: dict[str, Any] = {
            "scaling": self.scaling,
            "minibatch": self.minibatch,
            "device": self.device,
            "precision": self.precision,
            "gradient_format": self.gradients,
            "sharding": self.sharding,
            "micro_batches": self.micro_batches,
            "bucket_bytes": None if bucket_mib is None else round(bucket_mib * MIB),
            "network": self.network,
            "contention": self.contention,
            "channel_multiple": self.channel_multiple,
            "jitter": _number_or_recorded("jitter", self.jitter),
            "input": self.input,
            "input_images_per_s": _number_or_recorded("input-images-per-s", self.input_images_per_s),
            "faults.mtbf_gpu_hours": self.mtbf_gpu_hours,
            "price_usd_per_gpu_hour": self.price,
        }
        return {name: value for name, value in values.items() if value is not None}


def simulate(
    traces: Traces,
    /,
    *,
    cluster: Cluster,
    gpus: str = "1",
    what_if: WhatIf = WhatIf(),
    profile: Profile = None,
    timeline: Path | None = None,
    length: LengthOptions = LengthOptions(),
    seed: Annotated[int | None, _default("seed")] = None,
    yes: bool = False,
    settings: Settings = [],
    json: Json = False,
) -> None:
    """Project recorded runs onto clusters of any size.

    Args:
        traces: One or more trace.jsonl files or run folders.
        gpus: GPU counts, for example 1,8,64.
        timeline: Write two simulated steps of every architecture of the first trace, at the largest GPU count, as a
            Chrome trace: a .json file for Perfetto, or a folder with a file per GPU for HolisticTraceAnalysis. Of more
            than eight GPUs the first eight are drawn.
        seed: Seed of every random draw.
        yes: Also run a simulation of so many events that it takes long.
        settings: Any other option of ptsim.sim.options.Options as name=value, for example faults.policy=elastic. Can be
            repeated.
    """
    counts = parse_gpus(gpus)
    given = what_if.given() | ({} if seed is None else {"seed": seed})
    options = change(Options(), read_settings(settings, given, named=_NAMED))
    if timeline is not None:
        _check_timeline(timeline, traces)
    where = load_cluster(cluster)
    measured = None if profile is None else read_device_profile(profile)
    projections: list[RunProjection] = []
    for number, path in enumerate(traces):
        trace, cache = length.read(path), StepCache()
        with unlimited() if yes else contextlib.nullcontext():
            projections += [project(trace, where, n, options, device_profile=measured, cache=cache) for n in counts]
            if timeline is not None and number == 0:
                from ptsim.export.timeline import write_timeline

                for file in write_timeline(timeline, trace, where, max(counts), options, device_profile=measured):
                    say(f"timeline: {file}")
    if json:
        print_json([_document(projection) for projection in projections])
    else:
        _print_tables(projections)


def _check_timeline(path: Path, traces: list[Path]) -> None:
    """Find out before the simulation that its time line could not be written; makes nothing."""
    if path == Path():
        raise UsageError("--timeline is the current folder, expected a .json file or a folder of its own")
    check_output(path, *traces)
    if path.suffix == ".json" and os.path.isdir(path):
        raise UsageError(f"{path} is a folder, expected a file to write")
    check_folder_writable(path.parent if path.suffix == ".json" else path)


def _number_or_recorded(name: str, text: str | None) -> float | str | None:
    if text is None or text == "recorded":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"{name} {text!r} is neither a number nor 'recorded'") from error


def _document(projection: RunProjection) -> dict[str, Any]:
    return {
        **projection_row(projection),
        "notes": projection.notes,
        "epochs": [msgspec.to_builtins(epoch) for epoch in projection.epochs],
    }


def _print_tables(projections: list[RunProjection]) -> None:
    console = stdout_console()
    for trace in dict.fromkeys(projection.trace for projection in projections):
        rows = [projection for projection in projections if projection.trace == trace]
        first = rows[0]
        priced = "" if first.price is None else f", {first.price}"
        name = f"{planned_mark(first.origin)}{first.model}"
        console.print(f"{name}, {len(first.epochs)} epochs: {trace}", highlight=False)
        console.print(f"on {first.cluster} ({first.device}), {first.scaling} scaling{priced}", highlight=False)
        waits = {heading: part for heading, part in _WAITS.items() if any(map(part, rows))}
        time = _table("GPUs", "time", "90 % interval", "compute", "exposed", *waits, "start, reconfig.", "speed-up")
        resources = _table("GPUs", "GPU-hours", "MFU", "energy", "USD", "all-reduced", "memory", "tier", "network")
        for p in rows:
            time.add_row(
                f"{p.gpus:,}",
                format_seconds(p.total_s),
                interval(format_seconds(p.low_s), format_seconds(p.high_s)),
                format_seconds(p.compute_s),
                format_seconds(p.exposed_communication_s),
                *(format_seconds(part(p)) for part in waits.values()),
                format_seconds(p.reconfiguration_s + p.startup_s),
                f"{first.total_s / p.total_s:.2f}×",
            )
            resources.add_row(
                f"{p.gpus:,}",
                shown_number(None, p.gpu_hours),
                mfu_cell(p.mfu_fraction),
                "–" if p.energy_j is None else format_joules(p.energy_j),
                "–" if p.cost_usd is None else shown_number("usd", p.cost_usd),
                format_bytes(p.allreduce_bytes_per_gpu),
                format_bytes(max(epoch.peak_memory_bytes for epoch in p.epochs)),
                str(p.tier),
                str(p.network_tier or "–"),
            )
        console.print(time, resources)
        for note in told_notes(rows):
            console.print(f"note: {note}", highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
