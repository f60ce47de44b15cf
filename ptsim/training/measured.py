"""What is known of the epoch that has just been trained: its regulariser, and what clocks and meters say."""

from __future__ import annotations

import time

import msgspec
import torch

from ptsim.measure.nvml import Meter
from ptsim.trace.schema import DeviceUse, EpochTime, StepDistribution
from ptsim.training.distributed import CommunicationMeter
from ptsim.training.watch import Watch


class Penalty(msgspec.Struct, frozen=True, kw_only=True):
    """The regulariser in an epoch: λ (0 where it did not act) and λ times the penalty at the epoch's end."""

    coefficient: float = 0.0
    value: float = 0.0


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What clocks and meters say of an epoch; None where they say nothing."""

    time: EpochTime | None
    step: StepDistribution | None
    use: DeviceUse | None
    peak_bytes: int | None


def measure_epoch(
    watch: Watch, meter: Meter, communication: CommunicationMeter, device: torch.device, iterations: int
) -> Measured:
    """Stop the epoch's clocks and meters; what has passed since the last update counts as validation."""
    now, last_step_s = time.perf_counter(), watch.last_step_s
    times = watch.finish()
    validation_s = now - last_step_s if last_step_s is not None else 0.0
    return Measured(
        time=None if times is None else _without_communication(times[0], communication, iterations, validation_s),
        step=None if times is None else times[1],
        use=meter.stop(),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def _without_communication(
    seconds: EpochTime, communication: CommunicationMeter, iterations: int, validation_s: float
) -> EpochTime:
    """The watch's backward ends when the last all-reduce does: what was exposed of it is taken out."""
    exposed_s = min(communication.exposed_s(iterations), seconds.backward_s)
    return msgspec.structs.replace(
        seconds,
        backward_s=seconds.backward_s - exposed_s,
        exposed_communication_s=exposed_s,
        validation_s=validation_s,
    )
