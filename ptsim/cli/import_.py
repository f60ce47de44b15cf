"""`ptsim import`: what other programs measured, in the form that ptsim's other commands take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ptsim import zoo
from ptsim.answers.subject import captured
from ptsim.cli.common import print_json, stdout_console, users_code
from ptsim.cli.options import Json, NetworkOptions, Out
from ptsim.cli.reading import check_output
from ptsim.errors import UsageError
from ptsim.hardware.profile_file import write_device_profile
from ptsim.measure.kineto import KinetoImport, import_kineto
from ptsim.network import MemoryFormat, Network
from ptsim.setting import PrecisionName, parse_precision, positive_number
from ptsim.textfile import check_writable
from ptsim.units import Bytes, counted, format_seconds

app = cyclopts.App(name="import", help="Turn what other programs measured into a device profile.")


@app.command
def kineto(
    files: Annotated[list[Path], Parameter(name="FILE", negative=())],
    /,
    *,
    out: Out,
    device: str | None = None,
    memory: str | None = None,
    model: str | None = None,
    network: NetworkOptions = NetworkOptions(),
    precision: PrecisionName | None = None,
    memory_format: MemoryFormat | None = None,
    json: Json = False,
) -> None:
    """Read training steps that torch.profiler recorded, and write the device profile that they make.

    Record with record_shapes=True and call profiler.step() after every training step. predict, simulate and validate
    take the result as --profile.

    Args:
        files: Chrome trace files of torch.profiler, gzip or not: one, or one of each rank of the same job.
        out: Device profile to write.
        device: Catalog name or TOML file of the GPU. Default: the one that the file names. A CPU may have any
            name.
        memory: Memory of the device, for example 80GiB. Default: the file's or the catalog's own.
        model: What was trained: zoo name, torchvision:NAME or path/to/file.py:function. Predictions of this network at
            this mini-batch are then the measured step itself.
        precision: Number format of the matrix products. Default: the file's own.
        memory_format: Layout of the activations in memory. Default: the file's own.
    """
    if model is None and network != NetworkOptions():
        raise UsageError("--input and --classes have no effect without --model, whose network they are of")
    if len({os.path.realpath(path) for path in files}) < len(files):
        raise UsageError("a file is named twice: the files are those of different ranks")
    also = [path for path in (zoo.file_of(model or ""), Path(device or "")) if path is not None]
    check_output(out, *files, *also)
    check_writable(out)
    trained = None if model is None else _network(model, network)
    found = import_kineto(
        files,
        device=device,
        memory_bytes=None if memory is None else _bytes(memory),
        precision=None if precision is None else parse_precision(precision),
        memory_format=memory_format,
        network=trained,
        name=model,
    )
    write_device_profile(out, found.profile)
    if json:
        print_json({key: getattr(found, key) for key in KinetoImport.__struct_fields__ if key != "profile"})
    else:
        _print(found, out)


def _bytes(text: str) -> int:
    try:
        return round(Bytes.parse(text))
    except ValueError as error:
        raise UsageError(f"memory: {error}") from error


def _network(model: str, options: NetworkOptions) -> Network:
    classes = None if options.classes is None else positive_number("classes", options.classes)
    with users_code():
        return captured(model, options.input_shape, classes)


def _print(found: KinetoImport, out: Path) -> None:
    console = stdout_console(highlight=False)
    steps = sum(rank.num_steps for rank in found.ranks)
    batch = "" if found.batch is None else f", mini-batch {found.batch}"
    console.print(
        f"{found.device}: {steps} steps of {counted(len(found.ranks), 'file')}{batch}, "
        f"{found.precision}, {found.memory_format}"
    )
    table = Table("part", "time", "share of the step", box=SIMPLE_HEAD)
    for name, seconds in (
        ("step", found.step_seconds),
        ("forward", found.forward_seconds),
        ("backward", found.backward_seconds),
        ("optimizer", found.optimizer_seconds),
        ("communication", found.communication_seconds),
        ("exposed communication", found.exposed_communication_seconds),
    ):
        if seconds:
            table.add_row(name, format_seconds(seconds), f"{seconds / found.step_seconds:.1%}")
    console.print(table)
    if found.overlap_fraction is not None:
        console.print(f"communication hidden behind computation: {found.overlap_fraction:.1%}")
    console.print(f"host idle: {found.host_idle_fraction:.1%} of the step")
    if found.device_idle_fraction is not None:
        console.print(f"GPU idle: {found.device_idle_fraction:.1%} of the step")
    for note in found.notes:
        console.print(f"note: {note}")
    console.print(f"{out}: {len(found.profile.operators)} operators")
