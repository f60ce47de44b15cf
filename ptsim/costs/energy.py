"""How many joules a training step takes: power by what the GPU is doing, times how long it does it.

A GPU draws its idle power always, and on top a share of what is left to its board limit: much while it multiplies,
less while it streams memory, little while it waits for data, host or network. The limits are published; the shares are
assumptions until a trace's NVML samples replace them (`fit_power`).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from scipy.optimize import lsq_linear

from ptsim.costs.times import Z90, StepTime
from ptsim.errors import MissingMeasurementError
from ptsim.hardware.spec import Device

# Deviation: no measurement of ours. Shares of (board limit - idle) while multiplying, streaming and waiting, so that a
# CNN's training step comes to 70–85 % of the limit, which is where data-centre boards are usually seen; the relative
# error covers the limit itself on one side. NVML samples replace all three.
_ASSUMED_SHARES = (0.85, 0.65, 0.25)
_ASSUMED_ERROR = 0.25
# A mean power outside is no measurement of this board: below its idle power's half nothing that trains can be, and no
# board's mean over an epoch is half as much again as its limit.
_LEAST_OF_IDLE, _MOST_OF_LIMIT = 0.5, 1.5
_PRIOR_WEIGHT = 0.1  # of the assumed shares in a fit, in samples: enough to settle what the samples leave open


class PowerModel(msgspec.Struct, frozen=True, kw_only=True):
    """Watts of one GPU while it multiplies, streams memory, and waits.

    Attributes:
        relative_error: half-width of the 90 % interval.
        source: "assumed" or "NVML samples".
    """

    product_w: float
    stream_w: float
    waiting_w: float
    relative_error: float
    source: str


class PowerSample(msgspec.Struct, frozen=True, kw_only=True):
    """Mean power over steps whose composition is known; `waiting_s` is per step, beyond the step's own overhead."""

    step: StepTime
    waiting_s: float
    power_w: float


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """Joules of one step on one GPU with their 90 % interval, and the mean power."""

    joules: float
    low_j: float
    high_j: float
    mean_power_w: float
    source: str


def published_power(device: Device) -> PowerModel:
    """The model from the board limit and assumed shares."""
    span = device.power_w - device.idle_power_w
    product, stream, waiting = (device.idle_power_w + share * span for share in _ASSUMED_SHARES)
    return PowerModel(
        product_w=product, stream_w=stream, waiting_w=waiting, relative_error=_ASSUMED_ERROR, source="assumed"
    )


def is_plausible(device: Device, power_w: float) -> bool:
    """Whether `device` can have drawn `power_w` in the mean while it trained; counters jump and sensors err."""
    return _LEAST_OF_IDLE * device.idle_power_w <= power_w <= _MOST_OF_LIMIT * device.power_w


def fit_power(device: Device, samples: Sequence[PowerSample]) -> PowerModel:
    """The shares that explain NVML's mean powers best: bounded least squares, between idle power and board limit.

    What the samples leave open (they all have the same composition, say) stays near the assumption. The interval is
    1.645 standard deviations of the relative residuals, and not less than NVML's own ±5 %, nor than the assumption's
    error shared out over the samples: one explains itself without error and says little of another step. Powers that
    the board cannot have are left out (`is_plausible`).

    Raises:
        MissingMeasurementError: there is no sample with a plausible power.
    """
    samples = [sample for sample in samples if is_plausible(device, sample.power_w)]
    if not samples:
        raise MissingMeasurementError(f"no power was sampled on {device.name}: a power model cannot be fitted")
    span = device.power_w - device.idle_power_w
    shares = np.array([_time_shares(sample.step, sample.waiting_s) for sample in samples])
    power = np.array([(sample.power_w - device.idle_power_w) / span for sample in samples])
    rows = np.vstack([shares, np.sqrt(_PRIOR_WEIGHT) * np.eye(3)])
    wanted = np.concatenate([power, np.sqrt(_PRIOR_WEIGHT) * np.array(_ASSUMED_SHARES)])
    fitted = lsq_linear(rows, wanted, bounds=(0.0, 1.1)).x
    predicted = device.idle_power_w + span * (shares @ fitted)
    residuals = np.array([sample.power_w for sample in samples]) / predicted - 1
    spread = Z90 * float(np.sqrt(np.mean(residuals**2)))
    product, stream, waiting = (device.idle_power_w + span * float(share) for share in fitted)
    return PowerModel(
        product_w=product,
        stream_w=stream,
        waiting_w=waiting,
        relative_error=max(0.05, spread, _ASSUMED_ERROR / (1 + len(samples))),
        source="NVML samples",
    )


def step_energy(
    step: StepTime,
    device: Device,
    *,
    waiting_s: float = 0.0,
    model: PowerModel | None = None,
    within: tuple[float, float] | None = None,
) -> Energy:
    """Energy of one step on one GPU.

    Args:
        step: its parts.
        device: the GPU.
        waiting_s: seconds beyond the step in which the GPU waits (exposed communication, input, stragglers).
        model: its power; from the board limit if None.
        within: the 90 % interval of all that time, as multiples of the expected one; the step's own if None.

    Raises:
        ValueError: a negative waiting time.
    """
    if waiting_s < 0:
        raise ValueError(f"waiting time {waiting_s} s is negative")
    model = model or published_power(device)
    product_s, stream_s, idle_s = _seconds(step, waiting_s)
    joules = product_s * model.product_w + stream_s * model.stream_w + idle_s * model.waiting_w
    total_s = step.compute_s + waiting_s
    own = (step.low_s / step.compute_s, step.high_s / step.compute_s) if step.compute_s else (1.0, 1.0)
    time_low, time_high = within or own
    # Errors of time and power are independent.
    low = 1 - min(1.0, float(np.hypot(1 - time_low, model.relative_error)))
    high = 1 + float(np.hypot(time_high - 1, model.relative_error))
    return Energy(
        joules=joules,
        low_j=joules * low,
        high_j=joules * high,
        mean_power_w=joules / total_s if total_s else model.waiting_w,
        source=model.source,
    )


def price_usd(total_s: float, num_gpus: int, usd_per_gpu_hour: float) -> float:
    """Money for holding `num_gpus` GPUs for `total_s` seconds.

    Raises:
        ValueError: a negative time, count or price.
    """
    if total_s < 0 or num_gpus < 0 or usd_per_gpu_hour < 0:
        raise ValueError(f"negative time {total_s}, GPUs {num_gpus} or price {usd_per_gpu_hour}")
    return total_s / 3600 * num_gpus * usd_per_gpu_hour


def _seconds(step: StepTime, waiting_s: float) -> tuple[float, float, float]:
    """Seconds of multiplying, streaming and waiting."""
    product_s = step.product_s
    stream_s = step.forward_s + step.backward_s - product_s + step.optimizer_s + step.regularizer_s
    return product_s, stream_s, step.overhead_s + waiting_s


def _time_shares(step: StepTime, waiting_s: float) -> tuple[float, float, float]:
    parts = _seconds(step, waiting_s)
    total = sum(parts)
    return parts[0] / total, parts[1] / total, parts[2] / total
