"""`ptsim calibrate gpu`: measure this machine's GPU or CPU."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import cyclopts
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ptsim.cli.common import print_line, progress_console, say
from ptsim.errors import UsageError
from ptsim.hardware.profile import OperatorSetting
from ptsim.network import MemoryFormat
from ptsim.setting import PrecisionName, parse_precision
from ptsim.textfile import check_writable
from ptsim.trace.io import read_trace

if TYPE_CHECKING:
    import torch

DeviceName = Literal["auto", "cpu", "cuda"]


def gpu(
    *,
    out: Path,
    trace: Annotated[list[Path] | None, cyclopts.Parameter(consume_multiple=True, negative="")] = None,
    device: DeviceName = "auto",
    minutes: float = 10.0,
    precision: PrecisionName | None = None,
    memory_format: MemoryFormat | None = None,
    grid: bool = True,
    rounds: int = 3,
    resume: bool = False,
) -> None:
    """Measure operator and step times of this GPU or CPU into a device profile.

    Args:
        out: The TOML file to write. It is complete at any moment, also after an interruption.
        trace: Recorded runs; their architectures are measured first, at their mini-batches.
        device: Device to measure. auto takes the GPU if there is one.
        minutes: How long to measure, in minutes. With --no-grid it may finish sooner.
        precision: Number format to measure in addition to those of the traces; amp is fp16 autocast. Default: fp32 with
            --memory-format; otherwise none with --trace, fp32 on a CPU, every supported one on a GPU.
        memory_format: Memory layout to measure in addition to those of the traces. Default: contiguous with
            --precision; otherwise none with --trace, contiguous on a CPU, both on a GPU.
        grid: Afterwards measure single operators with many channel counts until the time is over. --no-grid leaves them
            out.
        rounds: How many times whole steps of each network are measured, in turn, because a machine's speed drifts.
        resume: Continue with an existing file.
    """
    check_writable(out)
    runs = [read_trace(path) for path in trace or ()]
    from ptsim.measure.calibrate import calibrate_gpu

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=progress_console(), transient=True) as bar:
        task = bar.add_task("calibrating", total=1.0)
        try:
            profile = calibrate_gpu(
                out,
                device=_device(device),
                minutes=minutes,
                traces=runs,
                settings=_settings(precision, memory_format),
                make_regularizer=group_lasso_of,
                resume=resume,
                grid=grid,
                rounds=rounds,
                progress=lambda what, fraction: bar.update(task, description=what, completed=fraction),
            )
        except KeyboardInterrupt:
            bar.stop()
            if out.exists():
                say(f"{out} holds what was measured so far; --resume goes on")
            raise
    if profile.disturbance is not None:
        warnings.warn(f"{profile.disturbance}; measure again when it is quiet", stacklevel=1)
    state = "complete" if profile.complete else "cut off by the time limit; --resume goes on"
    progress_console().print(
        f"{profile.device}: {len(profile.steps)} networks, {len(profile.operators)} operators; {state}"
    )
    print_line(out)


def _settings(precision: PrecisionName | None, memory_format: MemoryFormat | None) -> tuple[OperatorSetting, ...]:
    """What is measured besides the traces' own settings, if anything was named."""
    if precision is None and memory_format is None:
        return ()
    numbers = parse_precision(precision or "fp32")
    return (OperatorSetting(precision=numbers, memory_format=memory_format or "contiguous"),)


def _device(name: DeviceName) -> torch.device:
    """What is measured.

    Raises:
        UsageError: a GPU is asked for where torch sees none.
    """
    import torch

    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UsageError("there is no CUDA device here", hint="--device cpu measures the CPU")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def group_lasso_of(model: Any, input_shape: tuple[int, int, int]) -> Callable[[], object]:
    """What adds the group lasso's gradient of `model`; the coefficient does not change the time."""
    from ptsim.prune.criteria.group_lasso import GroupLasso
    from ptsim.prune.groups import find_groups

    return functools.partial(GroupLasso(model, find_groups(model, input_shape)).add_gradient, 1e-4)
