"""`ptsim export`: a recorded run in a form that other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ptsim import __version__
from ptsim.cli.common import print_json, print_line, users_code
from ptsim.cli.options import Json, Out
from ptsim.cli.reading import check_output
from ptsim.errors import UsageError
from ptsim.setting import Sharding
from ptsim.textfile import check_writable
from ptsim.trace.io import read_trace, run_folder

Format = Literal["chrome", "chakra", "parquet", "onnx"]


def export(
    trace: Path,
    *,
    format: Annotated[Format, Parameter(name=["--format", "-f"])],
    out: Out,
    gpus: int | None = None,
    sharding: Sharding = "none",
    epoch: int | None = None,
    trust: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> None:
    """Write a recorded run in a form that other tools read.

    chrome: the per-layer profiles as one Chrome/Kineto trace file, for Perfetto or HolisticTraceAnalysis.
    chakra: one step of every architecture as Chakra execution traces, for ASTRA-sim, in a folder.
    parquet: every table of the trace, in a folder.
    onnx: the trained network of a run folder as one ONNX file, checked against torch's outputs.

    Args:
        trace: Trace file or run folder.
        format: What to write: chrome, the recorded profiles of layers as a time line; chakra, one step of every
            architecture for ASTRA-sim; parquet, all tables; onnx, the trained network.
        out: File (chrome, onnx) or folder (chakra, parquet).
        gpus: Number of ranks of the Chakra traces. Default: as many as were recorded, at least two.
        sharding: zero1, zero2: in the Chakra traces every GPU updates its share of the parameters.
        epoch: Epoch whose stored network the ONNX file holds. Default: the last.
        trust: Run the Python file that makes the network; onnx needs it for a model from a user's file.
    """
    if epoch is not None and format != "onnx":
        raise UsageError(f"--epoch has no effect on --format {format}; it is for onnx")
    if gpus is not None and format != "chakra":
        raise UsageError(f"--gpus has no effect on --format {format}; it is for chakra")
    if sharding != "none" and format != "chakra":
        raise UsageError(f"--sharding has no effect on --format {format}; it is for chakra")
    if trust and format != "onnx":
        raise UsageError(f"--trust has no effect on --format {format}; it is for onnx")
    if format in ("chakra", "parquet") and out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; --format {format} writes a folder")
    if format in ("chrome", "onnx") and out.is_dir():
        raise UsageError(f"{out} is a folder; --format {format} writes a file")
    check_output(out, trace)
    if format in ("chrome", "onnx"):
        check_writable(out)
    with users_code():
        written = _write(trace, format, out, gpus, sharding, epoch, trust)
    if json:
        print_json({"format": format, "files": [str(path) for path in written]})
        return
    for path in written if len(written) <= 12 else written[:12]:
        print_line(path)
    if len(written) > 12:
        print_line(f"… {len(written)} files in all")


def _write(
    trace: Path, format: Format, out: Path, gpus: int | None, sharding: Sharding, epoch: int | None, trust: bool
) -> list[Path]:
    if format == "onnx":
        if trace.is_file():
            read_trace(trace).require_measured("take weights from")
        folder = run_folder(trace if trace.is_dir() else trace.parent)  # before torch is imported
        from ptsim.export.onnx import export_onnx
        from ptsim.training.runfolder import load_model, load_recipe

        recipe = load_recipe(folder, epoch)
        metadata = {"model": recipe.model, "classes": str(recipe.num_classes), "producer": f"ptsim {__version__}"}
        export_onnx(load_model(folder, epoch, trust=trust), recipe.input_shape, out, metadata=metadata)
        return [out]
    if format == "chrome":
        from ptsim.export.chrome import profile_timeline

        return [profile_timeline(read_trace(trace)).write(out)]
    if format == "chakra":
        from ptsim.export.chakra import write_chakra

        return write_chakra(read_trace(trace), out, num_gpus=gpus, sharding=sharding)
    from ptsim.export.parquet import write_parquet

    return write_parquet(read_trace(trace), out)
