"""Model FLOPs utilisation of recorded epochs, in the time that they took or that is predicted for them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ptsim.costs.flops import flops_utilization
from ptsim.costs.run import epoch_training_macs
from ptsim.hardware.spec import Device
from ptsim.trace.schema import Epoch
from ptsim.trace.trace import Trace


def epochs_utilization(trace: Trace, device: Device | None, took: Iterable[tuple[Epoch, float]]) -> float | None:
    """FLOPs of the epochs' images over what the GPUs' arithmetic could do in the time of these epochs.

    Args:
        trace: the run that the epochs are of.
        device: of the run; None where the catalog does not know it.
        took: epochs, each with its seconds.

    Returns:
        None where the peak of the run's precision is not known.
    """
    timed = list(took)
    macs = sum(epoch_training_macs(trace, epoch) for epoch, _ in timed)
    gpu_seconds = math.fsum(epoch.world_size * seconds for epoch, seconds in timed)
    peak = None if device is None else device.peak_flops_per_s.get(trace.run.precision)
    return flops_utilization(macs, gpu_seconds, peak)
