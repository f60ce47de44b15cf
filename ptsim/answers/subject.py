"""What does a MODEL or TRACE argument mean: which network, which recorded run, which setting of its training step?

Every answer (cost, predict, plan, validate, sweep, simulate) and the command line ask here, so that a text means the
same everywhere:

* `path/to/file.py:function` is a model of the user's; `torchvision:NAME` and a name of the zoo are models;
* a file, a folder that holds `trace.jsonl`, and anything that looks like a path or ends in .jsonl is a trace;
* a `Path` is a trace; a `Trace`, a `Network` and a live `nn.Module` are what they are.

torch is imported only where a live network has to be described.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from ptsim.errors import UnknownNameError, UsageError
from ptsim.network import MemoryFormat, Network, Precision
from ptsim.setting import (
    StepSetting,
    image_shape,
    parse_memory_format,
    parse_precision,
    positive_number,
    whole_number,
)
from ptsim.trace.io import TRACE, read_trace, trace_path
from ptsim.trace.trace import Trace

if TYPE_CHECKING:
    from torch import nn

    SubjectLike: TypeAlias = str | Path | Trace | Network | nn.Module

BATCH_HINT = "batch is the number of images per GPU and step"


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked about.

    Attributes:
        network: the one that is meant; of a trace the network that the run ended with.
        trace: the recorded run; None for a model.
    """

    network: Network
    trace: Trace | None = None

    @property
    def broadcasts_buffers(self) -> bool:
        """Whether BatchNorm's statistics are broadcast before every forward pass, as by DDP's default or in the run."""
        return self.trace is None or self.trace.broadcasts_buffers

    def setting(
        self,
        *,
        batch: int | None = None,
        precision: Precision | str | None = None,
        memory_format: MemoryFormat | None = None,
        optimizer: str | None = None,
        num_gpus: int | None = None,
        default_batch: int | None = None,
    ) -> StepSetting:
        """How its training step is run: what is asked for, else as the run's last epoch was, else the defaults.

        The group lasso is left out: it is asked for where it counts. A mini-batch that is asked for takes one pass.

        Raises:
            UsageError: a count that is no whole number, no GPU, an unknown precision or memory format, or no
                mini-batch where neither trace nor `default_batch` has one. Whether a mini-batch is positive is left to
                the cost model.
        """
        trace = self.trace
        if trace is None:
            recorded = StepSetting(batch=0, bucket_views=False)  # DDP's default
        else:
            recorded = trace.setting_of(trace.epochs[-1]) if trace.epochs else trace.usual_setting
        passes = recorded.passes if batch is None else 1
        if batch is None:
            batch = recorded.batch or default_batch
        if batch is None:
            raise UsageError("no mini-batch was given", hint=BATCH_HINT)
        return StepSetting(
            batch=whole_number("batch", batch),
            precision=recorded.precision if precision is None else parse_precision(precision),
            memory_format=recorded.memory_format if memory_format is None else parse_memory_format(memory_format),
            optimizer=optimizer or recorded.optimizer,
            momentum=recorded.momentum if optimizer in (None, recorded.optimizer) else None,
            proximal=recorded.proximal,
            num_gpus=recorded.num_gpus if num_gpus is None else _num_gpus(num_gpus),
            bucket_views=recorded.bucket_views,
            passes=passes,
            told_update=recorded.told_update,
            told_penalties=recorded.told_penalties,
            torch_version=recorded.torch_version,
        )


def find_subject(
    subject: SubjectLike,
    *,
    input_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
) -> Subject:
    """The network, and perhaps the run, that `subject` means.

    Args:
        subject: see the top of this module.
        input_shape: (channels, height, width); needed for a live module, else the model's usual one.
        num_classes: outputs; the model's usual number.

    Raises:
        UsageError: an option that is wrong, missing, or that a trace already decides.
        UnknownNameError: no model of that name.
        UnsupportedModelError: the network cannot be traced.
        FileFormatError: the trace is broken.
    """
    trace = _as_trace(subject)
    if trace is not None:
        if input_shape is not None or num_classes is not None:
            raise UsageError("a trace holds the input shape and the classes of its network; leave both out")
        return Subject(network=trace.final_network, trace=trace)
    if isinstance(subject, Network):
        return Subject(network=subject)
    shape = None if input_shape is None else image_shape(input_shape)
    classes = None if num_classes is None else positive_number("classes", num_classes)
    return Subject(network=captured(subject, shape, classes))


def find_trace(subject: Trace | str | Path) -> Trace:
    """The recorded run that `subject` is or names: a trace, its file, or its run folder.

    Raises:
        FileFormatError: there is none, or it is broken.
    """
    return subject if isinstance(subject, Trace) else read_trace(subject)


def _as_trace(subject: Any) -> Trace | None:
    """The trace that `subject` is or names; None for a network."""
    if isinstance(subject, Trace):
        return subject
    return read_trace(Path(subject)) if is_run(subject) else None


def is_run(subject: Any) -> bool:
    """Whether `subject` is a trace or names one, which need not be there."""
    if isinstance(subject, Trace):
        return True
    if not isinstance(subject, str | Path) or ".py:" in str(subject) or str(subject).endswith(".py"):
        return False
    path = Path(subject)
    there = isinstance(subject, Path) or path.is_file() or (path / TRACE).is_file()
    return there or len(path.parts) > 1 or path.suffix in (".jsonl", ".json")


def captured(subject: Any, input_shape: tuple[int, int, int] | None, num_classes: int | None) -> Network:
    """The network of a model by its name, or of a live module; imports torch.

    Args:
        subject: a zoo name, torchvision:NAME, path/to/file.py:function or a module.
        input_shape: (channels, height, width); None for the model's usual one.
        num_classes: outputs; None for the model's usual number.

    Raises:
        UsageError: a live module without an input shape.
        UnknownNameError: no model of that name.
        UnsupportedModelError: the network cannot be traced.
    """
    from ptsim import zoo

    if isinstance(subject, str | Path):
        zoo.check_file(str(subject))  # before torch is imported
    from ptsim.capture.network import capture_network

    if isinstance(subject, str | Path):
        name = str(subject)
        try:
            entry = zoo.find(name)
        except UnknownNameError:
            if name and Path(name).is_dir():  # meant as a run folder
                trace_path(Path(name))
            raise
        classes = entry.num_classes if num_classes is None else num_classes
        shape = input_shape or entry.input_shape
        return capture_network(entry.make(num_classes), name=name, input_shape=shape, num_classes=classes)
    if input_shape is None:
        raise UsageError("a live module does not say what it is fed; give input_shape=(channels, height, width)")
    return capture_network(subject, name=type(subject).__name__, input_shape=input_shape, num_classes=num_classes or 0)


def _num_gpus(given: int) -> int:
    number = whole_number("gpus", given)
    if number < 1:
        raise UsageError(f"{number} GPUs; at least 1 is needed")
    return number
