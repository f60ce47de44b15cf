"""How long one training step of a network takes on one device, layer by layer, and where each number comes from."""

from __future__ import annotations

from ptsim.costs.datasheet import datasheet_step
from ptsim.costs.times import LayerTime, Measurements, MemoryFormat, StepTime, Tier
from ptsim.errors import UsageError
from ptsim.hardware.spec import Device
from ptsim.network import Network, Precision

__all__ = ["LayerTime", "Measurements", "MemoryFormat", "StepTime", "Tier", "step_time"]


def step_time(
    network: Network,
    device: Device,
    *,
    batch: int,
    precision: Precision,
    memory_format: MemoryFormat = "contiguous",
    optimizer: str = "sgd",
    regularizer: bool = False,
    measurements: Measurements | None = None,
) -> StepTime:
    """The best available estimate of one training step of `batch` images.

    Args:
        network: what is trained.
        device: where.
        batch: images per device and step.
        precision: of the matrix products.
        memory_format: layout of the activations.
        optimizer: "sgd", "adam", "adamw" or "rmsprop"; decides the update's memory traffic.
        regularizer: whether the group lasso's gradient is computed.
        measurements: what may be used instead of the data sheet.

    Raises:
        ValueError: batch is not positive, or the device does not support the precision.
    """
    if batch < 1:
        raise UsageError(f"mini-batch {batch} is not positive")
    if precision not in device.peak_flops_per_s:
        supported = ", ".join(sorted(device.peak_flops_per_s))
        raise UsageError(f"{device.name} does not support {precision}; it supports {supported}")
    return datasheet_step(
        network,
        device,
        batch=batch,
        precision=precision,
        memory_format=memory_format,
        optimizer=optimizer,
        regularizer=regularizer,
    )
