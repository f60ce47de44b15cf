"""`ptsim validate`: predicted against measured, for recorded runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ptsim.answers.repredict import EpochCheck, RunCheck
from ptsim.answers.validate import Validation
from ptsim.answers.validate import validate as compare
from ptsim.answers.validate_mllog import MllogCheck, validate_mllog
from ptsim.cli.common import mfu_cell, print_json, stdout_console
from ptsim.cli.options import Json, Profile
from ptsim.errors import UsageError
from ptsim.network import MemoryFormat
from ptsim.setting import PrecisionName
from ptsim.units import format_bytes, format_joules, format_seconds, interval


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class MlPerfOptions:
    """A training run of MLPerf, in place of traces."""

    mllog: Path | None = None
    """Result file of an MLPerf training run, instead of traces: its step is compared with a prediction. Needs
    --cluster."""
    model: str | None = None
    """What the MLPerf run trained, where its benchmark does not say."""
    gpus: int | None = None
    """GPUs of the MLPerf run, where its log does not say."""
    precision: PrecisionName = "amp"
    """Number format of the MLPerf run's products."""
    memory_format: MemoryFormat = "channels_last"
    """Layout of the MLPerf run's activations."""
    torch_version: str | None = None
    """The PyTorch that is predicted, such as 1.8. Default: today's."""


def validate(
    traces: Annotated[list[Path] | None, Parameter(name="TRACE", negative=())] = None,
    /,
    *,
    profile: Annotated[
        Profile, Parameter(help="Predict from this device profile alone (`ptsim calibrate gpu` or `import`).")
    ] = None,
    holdout: bool = False,
    cluster: str | None = None,
    mlperf: MlPerfOptions = MlPerfOptions(),
    json: Json = False,
) -> None:
    """Predicted against measured, for recorded runs: time, saving, memory and energy.

    Errors are fractions of what was measured (0.05 is 5 %), saving errors are percentage points. By default a run is
    predicted from its own profiles of each architecture, and its first epoch's input.

    Args:
        traces: One or more trace.jsonl files or run folders. A dense and a pruned run together give the saving. Without
            --profile and --holdout each is predicted from its own profiles.
        holdout: Use nothing that the run itself measured: predict from a profile that was not calibrated on it, or,
            without a profile, from the other runs.
        cluster: Cluster that data-parallel runs ran on: catalog name or TOML file, such as that of calibrate network.
            With it, their exposed communication is predicted; without it, it is taken as measured.
    """
    if mlperf.mllog is not None:
        if traces:
            raise UsageError("--mllog stands instead of traces; leave one of them out")
        if profile is not None or holdout:
            raise UsageError("--profile and --holdout have no effect on --mllog; they are for traces")
        _validate_mllog(mlperf.mllog, mlperf, cluster, json=json)
        return
    if mlperf != MlPerfOptions():
        raise UsageError(
            "--model, --gpus, --precision, --memory-format and --torch-version have no effect without --mllog"
        )
    if not traces:
        raise UsageError("no trace was named", hint="give trace.jsonl files or run folders, or --mllog FILE")
    result = compare(traces, profile, holdout=holdout, cluster=cluster)
    if json:
        print_json(result)
        return
    console = stdout_console()
    for run in result.runs:
        console.print(_run_table(run))
        for note in run.notes:
            console.print(f"note: {note}")
    console.print(_summary(result))


def _validate_mllog(log: Path, options: MlPerfOptions, cluster: str | None, *, json: bool) -> None:
    if cluster is None:
        raise UsageError("--mllog needs the cluster that the run was on", hint="name it with --cluster")
    check = validate_mllog(
        log,
        cluster=cluster,
        model=options.model,
        gpus=options.gpus,
        precision=options.precision,
        memory_format=options.memory_format,
        torch_version=options.torch_version,
    )
    if json:
        print_json(check)
        return
    console = stdout_console(highlight=False)
    console.print(f"{check.model} on {check.gpus} GPUs of {check.cluster}, mini-batch {check.batch} per GPU ({log})")
    table = Table("", "measured", "predicted", "90 % interval", "error", box=SIMPLE_HEAD)
    table.add_row(
        "step",
        format_seconds(check.measured_step_seconds),
        format_seconds(check.predicted_step_seconds),
        _ends(check),
        f"{check.error:+.1%}",
    )
    table.add_row(
        "images/s", f"{check.measured_images_per_second:,.0f}", f"{check.predicted_images_per_second:,.0f}", "", ""
    )
    table.add_row("MFU", mfu_cell(check.measured_mfu_fraction), mfu_cell(check.predicted_mfu_fraction), "", "")
    console.print(table)
    for note in check.notes:
        console.print(f"note: {note}")


def _ends(found: MllogCheck | EpochCheck | RunCheck) -> str:
    """Both ends of the predicted time's interval."""
    return interval(format_seconds(found.low_seconds), format_seconds(found.high_seconds))


def _utilizations(found: EpochCheck | RunCheck) -> tuple[str, ...]:
    """MFU as measured and as predicted; nothing where the device's peak is not known."""
    if found.predicted_mfu_fraction is None:
        return ()
    return mfu_cell(found.measured_mfu_fraction), mfu_cell(found.predicted_mfu_fraction)


def _run_table(run: RunCheck) -> Table:
    table = Table(
        title=f"{run.model} on {run.dataset}, {'dense' if run.dense else 'pruned'} ({run.trace})",
        box=SIMPLE_HEAD,
        title_justify="left",
    )
    used = ("MFU", "predicted") if run.predicted_mfu_fraction is not None else ()
    for name in (
        "epoch",
        "architecture",
        "measured",
        "predicted",
        "90 % interval",
        "error",
        *used,
        "memory",
        "predicted",
    ):
        table.add_column(name, justify="left" if name == "architecture" else "right")
    for epoch in run.epochs:
        memory = epoch.measured_memory_bytes
        table.add_row(
            str(epoch.epoch),
            epoch.architecture[:8],
            format_seconds(epoch.measured_seconds),
            format_seconds(epoch.predicted_seconds),
            _ends(epoch),
            f"{epoch.error:+.1%}",
            *_utilizations(epoch),
            "–" if memory is None else format_bytes(memory),
            format_bytes(epoch.predicted_memory_bytes),
        )
    table.add_section()
    table.add_row(
        "all",
        "",
        format_seconds(run.measured_seconds),
        format_seconds(run.predicted_seconds),
        _ends(run),
        f"{run.error:+.1%}",
        *_utilizations(run),
    )
    return table


def _summary(result: Validation) -> Table:
    table = Table(title=f"predicted from: {result.source}", box=SIMPLE_HEAD, title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("remark")
    rows: list[tuple[str, str, float | None, str]] = [
        ("largest error of a whole run", "whole_run_error", result.whole_run_error, "{:.2%}"),
        ("mean error of an epoch", "epoch_mape", result.epoch_mape, "{:.2%}"),
        ("mean error of the peak memory", "memory_mape", result.memory_mape, "{:.2%}"),
        ("largest error of a saving", "saving_error_points", result.saving_error_points, "{:.2f} points"),
        ("largest error of a run's energy", "energy_error", result.energy_error, "{:.2%}"),
        (
            "largest error of exposed communication",
            "communication_error",
            result.communication_error,
            "{:.2%} of the run",
        ),
        ("epochs inside their 90 % interval", "interval_coverage", result.interval_coverage, "{:.0%}"),
    ]
    for label, key, value, form in rows:
        table.add_row(label, "–" if value is None else form.format(value), result.reasons.get(key, ""))
    for saving in result.savings:
        table.add_row(
            "saving of pruning per epoch",
            f"{saving.measured_saving:.1%}",
            f"predicted {saving.predicted_saving:.1%} ({saving.error_points:+.2f} points): "
            f"{saving.pruned} beside {saving.dense}",
        )
    for run in result.runs:
        if run.measured_energy_joules is not None and run.predicted_energy_joules is not None:
            predicted = format_joules(run.predicted_energy_joules)
            table.add_row("energy", format_joules(run.measured_energy_joules), f"predicted {predicted}: {run.trace}")
    table.add_row("tiers", ", ".join(result.tiers), "")
    return table
