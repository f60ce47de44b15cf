"""How long one training step of a network takes on one device, layer by layer, and where each number comes from."""

from __future__ import annotations

import msgspec

from ptsim.costs.datasheet import datasheet_step
from ptsim.costs.measured import step_of_profile
from ptsim.costs.profiled import profiled_step
from ptsim.costs.scaled import nearest_profile, scaled_step
from ptsim.costs.times import LayerTime, Measurements, StepTime, Tier
from ptsim.costs.traffic import OPTIMIZERS
from ptsim.errors import MissingMeasurementError, UsageError
from ptsim.hardware.catalog import is_called
from ptsim.hardware.spec import Device
from ptsim.network import Network
from ptsim.setting import StepSetting

__all__ = ["LayerTime", "Measurements", "StepTime", "Tier", "step_time"]


def step_time(
    network: Network,
    device: Device,
    setting: StepSetting,
    *,
    measurements: Measurements | None = None,
) -> StepTime:
    """The best available estimate of one training step; its tier says which that was.

    Measured where a profile is of this very architecture, mini-batch and device; else interpolated in a device profile
    of this device; else a profile of another mini-batch or catalog device, scaled; else the data sheet.

    Args:
        network: what is trained.
        device: where.
        setting: mini-batch, precision and the like.
        measurements: what may be used instead of the data sheet.

    Raises:
        UsageError: batch is not positive, the device does not support the precision, or an unknown optimizer.
        MissingMeasurementError: the device profile is of another device, or lacks the precision, format or an operator.
    """
    if setting.batch < 1:
        raise UsageError(f"mini-batch {setting.batch} is not positive")
    if setting.precision not in device.peak_flops_per_s:
        supported = ", ".join(sorted(device.peak_flops_per_s))
        raise UsageError(f"{device.name} does not support {setting.precision}; it supports {supported}")
    if setting.optimizer not in OPTIMIZERS:
        raise UsageError(f"optimizer is {setting.optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
    known = measurements or Measurements()
    source, calibrated = known.source_device, known.device_profile
    if calibrated is not None and not is_called(device, calibrated.device):
        raise MissingMeasurementError(
            f"the device profile was measured on {calibrated.device!r}, which is not the {device.name}",
            hint="leave the profile out to predict from the data sheet, or calibrate on that device; "
            "a device file of your own says with driver_names what the driver calls it",
        )
    nearest = nearest_profile(network, known.profiles, setting)
    complete = nearest is not None and (nearest.regularizer_s > 0 or not setting.regularizer)
    if nearest is not None and complete and source == device and nearest.batch == setting.batch:
        return step_of_profile(network, nearest, regularizer=setting.regularizer)
    if calibrated is not None:
        return profiled_step(network, calibrated, setting)
    there = datasheet_step(network, device, setting)
    if nearest is not None and source is not None and setting.precision in source.peak_flops_per_s:
        here = datasheet_step(network, source, msgspec.structs.replace(setting, batch=nearest.batch))
        return scaled_step(network, nearest, here=here, there=there, regularizer=setting.regularizer)
    return there
