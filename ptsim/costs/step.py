"""How long one training step of a network takes on one device, layer by layer, and where each number comes from."""

from __future__ import annotations

import msgspec

from ptsim.costs.datasheet import datasheet_step
from ptsim.costs.measured import recorded_step
from ptsim.costs.profiled import profiled_step
from ptsim.costs.scaled import nearest_profile, scaled_step
from ptsim.costs.tiers import Tier, TierRow, ordered_tiers
from ptsim.costs.times import LayerTime, Measurements, StepTime
from ptsim.errors import MissingMeasurementError, UsageError
from ptsim.hardware.catalog import is_called
from ptsim.hardware.spec import Device
from ptsim.network import Network
from ptsim.optimizers import kind_of
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

    The tiers are asked in their order (`costs.tiers`): measured where a profile is of this very architecture,
    mini-batch, optimizer and device; else interpolated in a device profile of this device; else a profile of another
    mini-batch, optimizer or catalog device, scaled; else the data sheet.

    Args:
        network: what is trained.
        device: where.
        setting: mini-batch, precision and the like.
        measurements: what may be used instead of the data sheet.

    Raises:
        UsageError: batch is not positive, or the device does not support the precision.
        UnknownNameError: no such optimizer.
        MissingMeasurementError: the device profile is of another device, or lacks the precision, format or an operator.
    """
    if setting.batch < 1:
        raise UsageError(f"mini-batch {setting.batch} is not positive")
    if setting.passes > 1:
        return step_time(network, device, setting.one_pass, measurements=measurements).accumulated(setting.passes)
    device.check_precision(setting.precision)
    kind_of(setting)
    known = measurements or Measurements()
    calibrated = known.device_profile
    if calibrated is not None and not is_called(device, calibrated.device):
        raise MissingMeasurementError(
            f"the device profile was measured on {calibrated.device!r}, which is not the {device.name}",
            hint="leave the profile out to predict from the data sheet, or calibrate on that device; "
            "a device file of your own says with driver_names what the driver calls it",
        )
    for tier in ordered_tiers():
        step = tier.estimate(network, device, setting, known)
        if step is not None:
            return step
    raise MissingMeasurementError(f"no tier can say what a step of {network.name} takes on {device.name}")


def _measured(network: Network, device: Device, setting: StepSetting, known: Measurements) -> StepTime | None:
    profile = nearest_profile(network, known.profiles, setting)
    if profile is None or known.source_device != device or profile.batch != setting.batch:
        return None
    if known.ran(setting) != setting or (setting.regularizer and profile.regularizer_s <= 0):
        return None
    return recorded_step(network, profile, setting)


def _profiled(network: Network, device: Device, setting: StepSetting, known: Measurements) -> StepTime | None:
    return None if known.device_profile is None else profiled_step(network, known.device_profile, setting)


def _scaled(network: Network, device: Device, setting: StepSetting, known: Measurements) -> StepTime | None:
    source, nearest = known.source_device, nearest_profile(network, known.profiles, setting)
    if nearest is None or source is None or setting.precision not in source.peak_flops_per_s:
        return None
    ran = known.ran(setting).with_batch(nearest.batch)
    if nearest.regularizer_s <= 0:
        ran = msgspec.structs.replace(ran, regularizer=None)
    there, here = datasheet_step(network, device, setting), datasheet_step(network, source, ran)
    step = scaled_step(network, nearest, here=here, there=there, regularizer=setting.regularizer is not None)
    return step.summing(setting)


def _datasheet(network: Network, device: Device, setting: StepSetting, known: Measurements) -> StepTime | None:
    return datasheet_step(network, device, setting)


MEASURED = TierRow(
    name=Tier.MEASURED,
    order=10,
    label="measured here",
    explanation="every layer was measured on this very device, network and mini-batch",
    all_reduce_explanation="interpolated in all-reduce times that were measured on this cluster",
    estimate=_measured,
)
PROFILED = TierRow(
    name=Tier.PROFILED,
    order=20,
    label="interpolated",
    explanation="layer times are interpolated between measurements of this GPU (ptsim calibrate gpu)",
    estimate=_profiled,
)
SCALED = TierRow(
    name=Tier.SCALED,
    order=30,
    label="carried over",
    explanation="times were measured on another device and carried over by the ratio of what is predicted for both",
    all_reduce_explanation="all-reduce times that were measured with another number of GPUs, or of other sizes, "
    "carried over by the ratio of what is predicted for both",
    estimate=_scaled,
)
DATASHEET = TierRow(
    name=Tier.DATASHEET,
    order=40,
    label="data sheet",
    explanation="nothing was measured on this device: times come from its data sheet and from efficiencies fitted "
    "to published measurements",
    all_reduce_explanation="from the links' published bandwidths and fitted latencies; none was measured on this "
    "cluster",
    estimate=_datasheet,
)
