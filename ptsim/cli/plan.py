"""`ptsim plan`: a trace of a run that nobody has trained."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from cyclopts import Parameter

from ptsim import zoo
from ptsim.answers.plan import fractions
from ptsim.answers.plan import plan as plan_run
from ptsim.answers.plan_options import PlanOptions
from ptsim.cli.common import print_json, stdout_console, users_code
from ptsim.cli.options import Json, NetworkOptions, Optimizer, Out
from ptsim.cli.reading import check_output
from ptsim.errors import FileFormatError
from ptsim.network import MemoryFormat
from ptsim.setting import PrecisionName
from ptsim.textfile import check_writable, read_toml
from ptsim.trace.io import trace_path, write_trace
from ptsim.trace.pace import changes
from ptsim.trace.trace import Trace
from ptsim.units import counted, format_shape

_UNSAID = PlanOptions()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """The run to plan; a published run supplies what is None here."""

    images: int | None = None
    """Number of training images. Needed, unless a published run supplies it."""
    dataset: str | None = None
    """What the data are called. Default: the published data set of this size, else its size."""
    epochs: int | None = None
    """Number of epochs. Needed, unless a published run supplies it."""
    batch: int | None = None
    """Images per GPU and step. Needed, unless a published run supplies it."""
    gpus: int | None = None
    """Number of GPUs that train together. Default: the published run's, else 1."""
    interval: int | None = None
    """Epochs between reconfigurations. Default: the published run's, else 5."""
    pruning: str = _UNSAID.pruning
    """How the run prunes. One of: none; targets, for example training=0.60,inference=0.47, to which bn=, layers= and
    saturates= may be added; like:TRACE, as another run did, or like:TRACE,inference=0.47, down to these inference
    FLOPs; a published run, for example lym2019/resnet50-imagenet-r0.25, which also supplies what is not given here; a
    TOML file."""
    network: NetworkOptions = NetworkOptions()
    precision: PrecisionName = "fp32"
    """Number format of the matrix products; amp is fp16 autocast."""
    memory_format: MemoryFormat = _UNSAID.memory_format
    """Layout of the activations in memory."""
    optimizer: Optimizer = _UNSAID.optimizer
    draws: int = _UNSAID.draws
    """Number of trajectories (which channel goes when) that agree with the pruning. The spread of their times goes into
    every interval."""
    seed: int = _UNSAID.seed
    """Which of the trajectories that agree with the pruning is planned; 0 is the typical one."""

    def options(self) -> PlanOptions:
        """The same for `ptsim.plan`.

        Raises:
            UsageError: the image shape is not three positive whole numbers.
        """
        same = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "network"}
        return PlanOptions(**same, num_classes=self.network.classes, input_shape=self.network.input_shape)


def plan(
    model: str,
    *,
    run: PlannedRun = PlannedRun(),
    out: Out,
    json: Json = False,
) -> None:
    """Plan a run that nobody has trained, dense or pruned, as a trace to project.

    Args:
        model: Zoo name, torchvision:NAME or path/to/file.py:function.
        out: Trace to write.
    """
    if not os.path.isdir(os.path.dirname(os.path.realpath(out))):
        raise FileFormatError(out, "its folder does not exist")
    check_writable(out)
    _check_files(model, run.pruning, out)
    with users_code():
        trace = plan_run(model, run.options())
    documents = [msgspec.to_builtins(fractions(drawn)) for drawn in trace.drawn()]
    place = {"trace": str(write_trace(out, trace)), "input_shape": trace.final_network.input_shape}
    document = place | documents[0]
    if json:
        print_json(document | {"draws": documents[1:]})
    else:
        _show(document, documents[1:], trace)


def _check_files(model: str, pruning: str, out: Path) -> None:
    """Find wrong files before torch is imported, and keep `out` from being one of those that are read."""
    read = [path for path in (zoo.file_of(model),) if path is not None]
    zoo.check_file(model)
    if pruning.startswith("like:"):
        if name := pruning.removeprefix("like:").partition(",inference=")[0]:
            read.append(Path(name))
            trace_path(name)
    elif pruning.endswith(".toml"):
        read.append(Path(pruning))
        read_toml(read[-1])
    check_output(out, *read)


def _show(document: dict[str, Any], draws: list[dict[str, Any]], trace: Trace) -> None:
    console = stdout_console()
    changed = len(changes(trace))
    epochs, kinds = counted(len(trace.epochs), "epoch"), counted(document["architectures"], "architecture")
    removing = counted(changed, "reconfiguration that removes", "reconfigurations that remove")
    shape = format_shape(document["input_shape"])
    console.print(
        f"{document['trace']}: planned at {shape}, {epochs}, {kinds}, {removing} channels",
        highlight=False,
    )
    console.print(
        f"of dense: training FLOPs {document['training_flops_fraction']:.1%}, inference FLOPs "
        f"{document['inference_flops_fraction']:.1%}, BatchNorm traffic {document['bn_bytes_fraction']:.1%}, "
        f"all-reduced bytes {document['allreduce_bytes_fraction']:.1%}",
        highlight=False,
    )
    if draws:
        bn, reduced = (
            " to ".join(dict.fromkeys(f"{end(draw[name] for draw in draws):.1%}" for end in (min, max)))
            for name in ("bn_bytes_fraction", "allreduce_bytes_fraction")
        )
        other = counted(len(draws), "other trajectory", "other trajectories")
        console.print(f"{other}: BatchNorm traffic {bn}, all-reduced bytes {reduced}", highlight=False)
    for assumption in trace.run.assumed:
        console.print(f"assumed: {assumption.what} ({assumption.source})", highlight=False)
