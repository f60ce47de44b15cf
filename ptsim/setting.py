"""How a training step is run, whatever the network and the device: mini-batch, precision, layout, optimizer, GPUs."""

from __future__ import annotations

import msgspec

from ptsim.errors import UsageError
from ptsim.network import MemoryFormat, Precision

PRECISION_NAMES = (*(precision.value for precision in Precision), "amp")


class StepSetting(msgspec.Struct, frozen=True, kw_only=True):
    """How a training step is run.

    Attributes:
        batch: images per device and step.
        precision: of the matrix products.
        memory_format: layout of the activations.
        optimizer: "sgd", "adam", "adamw" or "rmsprop"; decides the update's memory traffic.
        regularizer: whether the group lasso's gradient is computed.
        num_gpus: data-parallel size; from 2 on every GPU also holds the buckets of its all-reduces.
    """

    batch: int
    precision: Precision
    memory_format: MemoryFormat = "contiguous"
    optimizer: str = "sgd"
    regularizer: bool = False
    num_gpus: int = 1

    @property
    def data_parallel(self) -> bool:
        """Whether gradients are all-reduced."""
        return self.num_gpus > 1


def parse_precision(text: Precision | str) -> Precision:
    """The precision called `text`; "amp" is fp16 autocast.

    Raises:
        UsageError: no such precision.
    """
    if text == "amp":
        return Precision.FP16
    try:
        return Precision(text)
    except ValueError as error:
        raise UsageError(f"precision is {text!r}, expected one of {', '.join(PRECISION_NAMES)}") from error
