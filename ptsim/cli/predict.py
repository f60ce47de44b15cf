"""`ptsim predict`: the time and throughput of a training step on a device."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ptsim.answers.predict import Prediction, PredictOptions
from ptsim.answers.predict import predict as predict_step
from ptsim.answers.subject import is_run
from ptsim.cli.common import print_json, stdout_console, users_code
from ptsim.cli.options import Json, NetworkOptions, OptimizerOfTrace, Profile
from ptsim.network import MemoryFormat
from ptsim.setting import PrecisionName, Sharding
from ptsim.units import format_bytes, format_joules, format_seconds, format_shape, interval, shown_number


def predict(
    model: Annotated[str, Parameter(name="MODEL")],
    /,
    *,
    batch: int | None = None,
    gpu: str | None = None,
    precision: PrecisionName | None = None,
    memory_format: MemoryFormat | None = None,
    cluster: str | None = None,
    gpus: int | None = None,
    network: NetworkOptions = NetworkOptions(),
    optimizer: OptimizerOfTrace = None,
    sharding: Sharding = "none",
    torch_version: str | None = None,
    profile: Profile = None,
    json: Annotated[
        Json, Parameter(help="Print one JSON document; low and high are the 90 % interval of step_seconds.")
    ] = False,
) -> None:
    """The time and throughput of a training step on a device, alone or data-parallel.

    Args:
        model: Zoo name, torchvision:NAME, path/to/file.py:function, or a trace, whose final network is taken.
        batch: Images per GPU and step. Default: a trace's last mini-batch; needed for a model.
        gpu: Device: catalog name or TOML file. Default: the cluster's own, or the one that --profile was measured on.
        precision: Number format of the matrix products; amp is fp16 autocast. Default: the trace's own, else fp32.
            PyTorch computes convolutions in tf32 on Ampere and newer unless it is told otherwise.
        memory_format: Layout of the activations in memory. Default: the trace's own, else contiguous.
        cluster: Cluster for data-parallel training: catalog name or TOML file.
        gpus: Number of the cluster's GPUs. Default: those of one node.
        sharding: zero1: every GPU keeps and updates its share of the optimizer's state. zero2: of the gradients too.
        torch_version: The PyTorch that runs the step, such as 1.8, for a prediction from the data sheet. Before 1.10
            GPUs of the Ampere generation took longer, before 2.0 every update did. Default: today's.
    """
    options = PredictOptions(
        memory_format=memory_format,
        input_shape=network.input_shape,
        num_classes=network.classes,
        optimizer=optimizer,
        sharding=sharding,
        torch_version=torch_version,
    )
    with users_code():
        prediction = predict_step(
            model,
            gpu=gpu,
            batch=batch,
            precision=precision,
            cluster=cluster,
            gpus=gpus,
            profile=profile,
            options=options,
        )
    if json:
        print_json(prediction)
        return
    _print(prediction, of_run=is_run(model))


def _print(p: Prediction, *, of_run: bool) -> None:
    console = stdout_console(highlight=False)
    where = f"{p.gpus} × {p.device}" + (f" of {p.cluster}" if p.cluster else "")
    shape = format_shape(p.input_shape)
    what = f"{p.model}, the last network of the run," if of_run else p.model
    console.print(f"{what} at {shape} on {where}: mini-batch {p.batch} per GPU, {p.precision}, {p.memory_format}")
    rates = interval(shown_number(None, p.low_images_per_second), shown_number(None, p.high_images_per_second))
    times = interval(format_seconds(p.low), format_seconds(p.high))
    console.print(
        f"{shown_number(None, p.images_per_second)} images/s ({rates}, 90 %), "
        f"{format_seconds(p.step_seconds)} per step ({times}); tier: {p.tier}"
        + (f", network: {p.network_tier}" if p.network_tier else "")
        + ("" if p.mfu_fraction is None else f"; MFU {p.mfu_fraction:.1%}")
    )
    table = Table("part", "time", "share", box=SIMPLE_HEAD)
    parts = [
        *((f"{t.kind}", t.forward_seconds + t.backward_seconds) for t in p.by_kind),
        ("optimizer", p.optimizer_seconds),
        ("waiting for the host", p.overhead_seconds),
        ("gradient hooks", p.hook_seconds),
        ("exposed communication", p.exposed_communication_seconds),
    ]
    for name, seconds in parts:
        if seconds > 0:
            table.add_row(name, format_seconds(seconds), f"{seconds / p.step_seconds:.1%}")
    console.print(table)
    fits = "fits" if p.fits else "does not fit"
    console.print(f"peak memory {format_bytes(p.peak_memory_bytes)}: {fits} {format_bytes(p.memory_bytes)}")
    if p.energy_joules is not None and p.low_energy_joules is not None and p.high_energy_joules is not None:
        joules = interval(format_joules(p.low_energy_joules), format_joules(p.high_energy_joules))
        console.print(f"energy {format_joules(p.energy_joules)} per step ({joules}, 90 %)")
    for note in p.notes:
        console.print(f"note: {note}")
