"""How long one training step of a network takes on one device, layer by layer, and where each number comes from."""

from __future__ import annotations

import functools

from ptsim.costs.datasheet import datasheet_step
from ptsim.costs.measured import step_of_profile
from ptsim.costs.profiled import profiled_step
from ptsim.costs.scaled import nearest_profile, scaled_step
from ptsim.costs.times import LayerTime, Measurements, MemoryFormat, StepTime, Tier
from ptsim.costs.traffic import OPTIMIZERS
from ptsim.errors import MissingMeasurementError, UsageError
from ptsim.hardware.catalog import is_called
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
    """The best available estimate of one training step of `batch` images; its tier says which that was.

    Measured where a profile is of this very architecture, mini-batch and device; else interpolated in a device profile
    of this device; else a profile of another mini-batch or catalog device, scaled; else the data sheet.

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
        UsageError: batch is not positive, the device does not support the precision, or an unknown optimizer.
        MissingMeasurementError: the device profile is of another device, or lacks the precision, format or an operator.
    """
    if batch < 1:
        raise UsageError(f"mini-batch {batch} is not positive")
    if precision not in device.peak_flops_per_s:
        supported = ", ".join(sorted(device.peak_flops_per_s))
        raise UsageError(f"{device.name} does not support {precision}; it supports {supported}")
    if optimizer not in OPTIMIZERS:
        raise UsageError(f"optimizer is {optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
    predict = functools.partial(
        datasheet_step,
        network,
        precision=precision,
        memory_format=memory_format,
        optimizer=optimizer,
        regularizer=regularizer,
    )
    known = measurements or Measurements()
    source, calibrated = known.source_device, known.device_profile
    if calibrated is not None and not is_called(device, calibrated.device):
        raise MissingMeasurementError(
            f"the device profile was measured on {calibrated.device!r}, which is not the {device.name}",
            hint="leave the profile out to predict from the data sheet, or calibrate on that device; "
            "a device file of your own says with driver_names what the driver calls it",
        )
    nearest = nearest_profile(network, known.profiles, batch=batch, precision=precision, memory_format=memory_format)
    complete = nearest is not None and (nearest.regularizer_s > 0 or not regularizer)
    if nearest is not None and complete and source == device and nearest.batch == batch:
        return step_of_profile(network, nearest, regularizer=regularizer)
    if calibrated is not None:
        return profiled_step(
            network,
            calibrated,
            batch=batch,
            precision=precision,
            memory_format=memory_format,
            optimizer=optimizer,
            regularizer=regularizer,
        )
    if nearest is not None and source is not None and precision in source.peak_flops_per_s:
        return scaled_step(
            network,
            nearest,
            predict_here=lambda size: predict(source, batch=size),
            predict_there=lambda size: predict(device, batch=size),
            batch=batch,
            regularizer=regularizer,
        )
    return predict(device, batch=batch)
