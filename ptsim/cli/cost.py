"""`ptsim cost`: FLOPs, memory traffic, memory and all-reduce bytes of a trace or a network."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ptsim.answers.cost import CostReport
from ptsim.answers.cost import cost as costs_of
from ptsim.cli.common import print_json, stdout_console, users_code
from ptsim.cli.options import Json, NetworkOptions, OptimizerOfTrace
from ptsim.costs.flops import Convention
from ptsim.costs.memory import MOST_IMAGES
from ptsim.costs.run import EpochCost
from ptsim.network import MemoryFormat
from ptsim.setting import PrecisionName
from ptsim.trace.trace import planned_mark
from ptsim.units import counted, format_bytes, format_count, format_seconds, format_shape


def cost(
    trace_or_model: str,
    /,
    *,
    network: NetworkOptions = NetworkOptions(),
    batch: int | None = None,
    gpu: str | None = None,
    gpus: int | None = None,
    precision: PrecisionName | None = None,
    optimizer: OptimizerOfTrace = None,
    memory_format: MemoryFormat | None = None,
    convention: Convention = "exact",
    layers: bool = False,
    json: Json = False,
) -> None:
    """FLOPs, memory traffic, memory and all-reduce bytes of a trace or a network.

    Args:
        trace_or_model: trace.jsonl, run folder, zoo name, torchvision:NAME or path/to/file.py:function.
        batch: Images per GPU and step. Default: a trace's last mini-batch, else 32.
        gpu: Also say whether the mini-batch fits this device, and which is the largest that does. Catalog name or TOML
            file.
        gpus: Number of GPUs that train together. With 2 or more, each also holds the buckets of its all-reduces.
            Default: the trace's own, else 1.
        precision: Number format of the matrix products; amp is fp16 autocast. Default: the trace's own, else fp32.
        memory_format: Layout of the activations in memory. Default: the trace's own, else contiguous.
        convention: How MACs are counted: exact, or paper as the PruneTrain authors count them.
        layers: Add one row for every layer.
    """
    with users_code():
        report = costs_of(
            trace_or_model,
            input_shape=network.input_shape,
            num_classes=network.classes,
            batch=batch,
            gpu=gpu,
            gpus=gpus,
            precision=precision,
            optimizer=optimizer,
            memory_format=memory_format,
            convention=convention,
        )
    if json:
        print_json(document(report, layers=layers))
    else:
        _print(report, layers=layers)


def document(report: CostReport, *, layers: bool) -> dict[str, Any]:
    """The JSON document: every figure of the report; rows for layers only where asked for."""
    content: dict[str, Any] = msgspec.to_builtins(report)
    if not layers:
        del content["layers"]
    content["kinds"] = report.kinds_frame().to_dict(orient="records")
    return content


def _print(report: CostReport, *, layers: bool) -> None:
    console = stdout_console()
    console.print(_summary(report))
    console.print(_kinds(report))
    if layers:
        console.print(_layers(report))
    if report.epochs:
        console.print(_epochs(report))


def _summary(report: CostReport) -> Table:
    name = planned_mark(report.origin or "") + report.name
    table = Table(
        title=f"{name} at {format_shape(report.input_shape)}: cost of training"
        + (", with the last network of the run" if report.epochs else ""),
        box=SIMPLE_HEAD,
        show_header=False,
        title_justify="left",
    )
    table.add_column(style="bold")
    table.add_column()
    need = report.memory
    rows = [
        ("parameters", format_count(report.parameters)),
        ("inference", f"{format_count(report.inference_macs_per_image, 'MAC')} per image"),
        (
            "training",
            f"{format_count(report.training_macs_per_image, 'MAC')} per image, {report.convention} convention",
        ),
        ("BatchNorm traffic", f"{format_bytes(report.bn_bytes_per_image)} per image"),
        (
            "peak memory",
            f"{format_bytes(report.peak_memory_bytes)} at mini-batch {report.batch}"
            + (f" in {report.passes} passes" if report.passes > 1 else "")
            + f", {report.precision.value}, {report.optimizer}"
            + (f", each of {report.gpus} GPUs" if report.gpus > 1 else ""),
        ),
        (
            "  of which",
            f"kept activations {format_bytes(need.activation_bytes)}, weights {format_bytes(need.parameter_bytes)}, "
            f"gradients {format_bytes(need.gradient_bytes)}, optimizer {format_bytes(need.optimizer_bytes)}, "
            f"workspace {format_bytes(need.workspace_bytes)} (not all of it at the same time)",
        ),
        ("all-reduce", f"{format_bytes(report.allreduce_bytes)} per update in {counted(report.num_buckets, 'bucket')}"),
        (
            "update traffic",
            f"{format_bytes(report.update_bytes)}; {report.criterion.replace('_', ' ')} "
            f"{format_bytes(report.regularizer_bytes)}",
        ),
        (
            "memory-bound part",
            f"{format_bytes(report.streamed_bytes)} a step (layers without matrix products, and the update)"
            + (
                ""
                if report.streamed_seconds is None
                else f": {format_seconds(report.streamed_seconds)} at the memory bandwidth of {report.gpu}"
            ),
        ),
        (
            "  other part",
            f"{format_bytes(report.product_bytes)} a step (convolutions, linear layers, matrix products)",
        ),
    ]
    if report.gpu is not None:
        verdict = "fits" if report.fits else "does not fit"
        most = f"{report.largest_batch:,}" + (" or more" if report.largest_batch == MOST_IMAGES else "")
        rows.append((report.gpu, f"mini-batch {report.batch:,} {verdict}; the largest that fits is {most}"))
    for row in rows:
        table.add_row(*row)
    return table


def _kinds(report: CostReport) -> Table:
    table = Table(title="by kind of layer", box=SIMPLE_HEAD, title_justify="left")
    for name in ("kind", "layers", "weights", "MACs", "training", "forward", "backward", "kept"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for row in report.kinds_frame().to_dict(orient="records"):
        table.add_row(
            row["kind"],
            str(row["layers"]),
            format_count(row["parameters"]),
            format_count(row["forward_macs"]),
            format_count(row["training_macs"]),
            format_bytes(row["forward_bytes"]),
            format_bytes(row["backward_bytes"]),
            format_bytes(row["saved_bytes"]),
        )
    moved = f"MACs per image, inference and training; bytes moved and kept by a mini-batch of {report.batch}"
    table.caption = moved + (f" in {report.passes} passes (kept by one of them)" if report.passes > 1 else "")
    return table


def _layers(report: CostReport) -> Table:
    table = Table(title="by layer", box=SIMPLE_HEAD, title_justify="left")
    for name in ("layer", "op", "output", "weights", "MACs", "backward", "forward", "backward"):
        table.add_column(name, justify="left" if name in ("layer", "op") else "right")
    for row in report.layers:
        table.add_row(
            row.layer,
            row.op,
            format_shape(row.output_shape),
            format_count(row.parameters),
            format_count(row.forward_macs),
            format_count(row.weight_gradient_macs + row.input_gradient_macs),
            format_bytes(row.forward_bytes),
            format_bytes(row.backward_bytes),
        )
    return table


def _epochs(report: CostReport) -> Table:
    """Consecutive epochs of one architecture share a row where what it shows is the same."""
    table = Table(title="by epoch", box=SIMPLE_HEAD, title_justify="left")
    names = ("epochs", "mini-batch", "parameters", "inference MACs", "training MACs/epoch", "BN bytes/epoch", "memory")
    for name in (*names, "gradients/epoch"):
        table.add_column(name, justify="right")
    shown = ((epoch.epoch, (epoch.architecture, *_cells(epoch))) for epoch in report.epochs)
    for (_, *cells), same in itertools.groupby(shown, key=lambda pair: pair[1]):
        numbers = [number for number, _ in same]
        table.add_row("–".join(str(number) for number in dict.fromkeys((numbers[0], numbers[-1]))), *cells)
    first, total = report.epochs[0], sum(epoch.training_macs for epoch in report.epochs)
    dense = first.training_macs_per_image * sum(epoch.num_images for epoch in report.epochs)
    table.caption = f"all epochs: {format_count(total, 'MAC')}, {total / dense:.1%} of the first architecture's"
    return table


def _cells(epoch: EpochCost) -> tuple[str, ...]:
    return (
        str(epoch.batch_per_gpu),
        format_count(epoch.parameters),
        format_count(epoch.inference_macs_per_image),
        format_count(epoch.training_macs),
        format_bytes(epoch.bn_bytes),
        format_bytes(epoch.peak_memory_bytes),
        format_bytes(epoch.gradient_bytes),
    )
