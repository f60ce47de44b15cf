"""What a projected run is: seconds, bytes, joules and money, epoch by epoch, and as rows of a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ptsim.costs.energy import price_usd
from ptsim.sim.faults import FaultyRun
from ptsim.sim.options import HourPrice
from ptsim.units import listed

if TYPE_CHECKING:
    from pandas import DataFrame


class EpochProjection(msgspec.Struct, frozen=True, kw_only=True):
    """One epoch on the projected cluster.

    `total_s`, `low_s`, `high_s` and `energy_j` (of all GPUs) are of the whole epoch, all else is of one step.
    A step is the sum of forward, backward, regularizer, optimizer, overhead (loss and host gaps), input wait,
    straggler wait and exposed communication, of which the GPU stands still for `communication_wait_s` and computes more
    slowly beside collectives for the rest. `product_s` is what convolutions, linear layers and matrix products take of
    forward and backward, `hooks_s` what DDP's hooks of the gradients take of backward, 0 on one GPU; the rest of the
    two is bound by memory. `communication_s` is what all collectives of the step
    take by themselves. `peak_memory_bytes` is what the step takes at most, `needed_memory_bytes` what must be free on a
    GPU, an upper estimate.
    """

    epoch: int
    architecture: str
    batch_per_gpu: int
    num_iterations: int
    step_s: float
    forward_s: float
    backward_s: float
    product_s: float
    hooks_s: float
    optimizer_s: float
    regularizer_s: float
    overhead_s: float
    input_wait_s: float
    straggler_wait_s: float
    communication_s: float
    exposed_communication_s: float
    communication_wait_s: float
    wire_bytes_per_gpu: float
    total_s: float
    low_s: float
    high_s: float
    peak_memory_bytes: int
    needed_memory_bytes: int
    energy_j: float | None
    tier: str

    @property
    def compute_s(self) -> float:
        """Seconds of computation per step."""
        return self.forward_s + self.backward_s + self.optimizer_s + self.regularizer_s + self.overhead_s


class RunProjection(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run on a cluster.

    Attributes:
        origin: of the trace: "recorded", "planned" or "imported".
        reconfiguration_s: all reconfigurations with what follows from them (re-wrapping, first step, recompilation);
            its ends from the recorded ones' spread and the tiers of what follows.
        startup_s: the same for the first wrapping.
        faults_s: by which failures and checkpoints lengthen the run.
        total_s: training time without validation.
        low_s, high_s: 90 % interval of `total_s`.
        allreduce_bytes_per_gpu: what every GPU sends for gradients over the run.
        tier: the worst that a step time comes from.
        network_tier: the worst that an all-reduce time comes from; None on a single GPU.
        energy_j: of all GPUs (the boards, without host and cooling); None where the device's power is not known.
        mfu_fraction: FLOPs of the recorded images over what the GPUs' arithmetic could do in the time of the steps,
            each kind by its own peak; None where a peak for the precision is not known.
        price: of a GPU-hour; None where it is not known.
        input_images_per_s: that the pipeline, or the given rate, delivers to every GPU; None where input keeps up.
        input_limit_gpus: from how many GPUs of one node on the pipeline is what an epoch waits for; None where it never
            is, or where no pipeline was named.
        draw_spread: standard deviation, around this one's, of the logarithm of `total_s` among the planned trajectories
            that agree with what was given; it is in the intervals. 0 where the trace holds no draws.
        complete: False where the trace is of an interrupted or truncated run: then only what was recorded is projected.
    """

    trace: str
    model: str
    origin: str
    cluster: str
    device: str
    gpus: int
    scaling: str
    epochs: tuple[EpochProjection, ...]
    reconfiguration_s: float
    reconfiguration_low_s: float
    reconfiguration_high_s: float
    startup_s: float
    faults_s: float
    total_s: float
    compute_s: float
    exposed_communication_s: float
    communication_wait_s: float
    input_wait_s: float
    straggler_wait_s: float
    allreduce_bytes_per_gpu: float
    energy_j: float | None
    energy_low_j: float | None
    energy_high_j: float | None
    price: HourPrice | None
    low_s: float
    high_s: float
    tier: str
    network_tier: str | None
    mfu_fraction: float | None
    input_images_per_s: float | None
    input_limit_gpus: int | None
    draw_spread: float
    complete: bool
    notes: tuple[str, ...]
    faults: FaultyRun | None = None

    @property
    def gpu_hours(self) -> float:
        """Hours times GPUs."""
        return self.gpus * self.total_s / 3600

    @property
    def billed_gpus(self) -> int | None:
        """The GPUs that are paid for: all of every instance in use; None where no price is known."""
        return None if self.price is None else self.price.billed_gpus(self.gpus)

    @property
    def cost_usd(self) -> float | None:
        """Price of the whole run; None where no price is known."""
        if self.price is None:
            return None
        return price_usd(self.total_s, self.price.billed_gpus(self.gpus), self.price.usd)

    def epochs_frame(self) -> DataFrame:
        """A table with one row per projected epoch; columns that `Trace.epochs_frame` has too mean the same.

        Only `energy_joules` is of all GPUs here and of one GPU there. Seconds are of the whole epoch, but for
        `step_median_seconds`.
        """
        import pandas as pd

        return pd.DataFrame([_epoch_row(self, epoch) for epoch in self.epochs])


def projections_frame(projections: Iterable[RunProjection]) -> DataFrame:
    """One row per projection, unit-bearing columns."""
    import pandas as pd

    return pd.DataFrame([projection_row(projection) for projection in projections])


def projection_row(projection: RunProjection) -> dict[str, Any]:
    """The row of one projection: what `--json`, sweeps and reports show."""
    p = projection
    return {
        "trace": p.trace,
        "model": p.model,
        "origin": p.origin,
        "cluster": p.cluster,
        "device": p.device,
        "gpus": p.gpus,
        "scaling": p.scaling,
        "total_seconds": p.total_s,
        "low_seconds": p.low_s,
        "high_seconds": p.high_s,
        "compute_seconds": p.compute_s,
        "mfu_fraction": p.mfu_fraction,
        "exposed_communication_seconds": p.exposed_communication_s,
        "communication_wait_seconds": p.communication_wait_s,
        "input_wait_seconds": p.input_wait_s,
        "input_images_per_second_per_gpu": p.input_images_per_s,
        "input_limit_gpus_per_node": p.input_limit_gpus,
        "straggler_wait_seconds": p.straggler_wait_s,
        "reconfiguration_seconds": p.reconfiguration_s,
        "low_reconfiguration_seconds": p.reconfiguration_low_s,
        "high_reconfiguration_seconds": p.reconfiguration_high_s,
        "startup_seconds": p.startup_s,
        "fault_seconds": p.faults_s,
        "goodput": p.faults.goodput if p.faults else 1.0,
        "allreduce_bytes_per_gpu": p.allreduce_bytes_per_gpu,
        "peak_memory_bytes": max(epoch.peak_memory_bytes for epoch in p.epochs),
        "gpu_hours": p.gpu_hours,
        "energy_joules": p.energy_j,
        "low_energy_joules": p.energy_low_j,
        "high_energy_joules": p.energy_high_j,
        "draw_spread": p.draw_spread,
        "price_usd_per_gpu_hour": None if p.price is None else p.price.usd,
        "price_date": None if p.price is None or p.price.date is None else str(p.price.date),
        "price_source": None if p.price is None else p.price.source,
        "billed_gpus": p.billed_gpus,
        "cost_usd": p.cost_usd,
        "low_cost_usd": None if p.cost_usd is None else p.cost_usd * p.low_s / p.total_s,
        "high_cost_usd": None if p.cost_usd is None else p.cost_usd * p.high_s / p.total_s,
        "tier": str(p.tier),
        "network_tier": None if p.network_tier is None else str(p.network_tier),
        "num_epochs": len(p.epochs),
        "complete": p.complete,
        "notes": "; ".join(p.notes),
    }


def told_notes(projections: Sequence[RunProjection]) -> list[str]:
    """The notes of one run on several GPU counts, each once: "8 and 16 GPUs: …" where it is of only some of them.

    A note that is of all counts, or begins with its own ("12 GPUs do not …"), is left as it is.
    """
    counts: dict[str, set[int]] = {}
    for projection in projections:
        for note in projection.notes:
            counts.setdefault(note, set()).add(projection.gpus)
    every = {projection.gpus for projection in projections}
    return [note if own == every else _of_gpus(note, own) for note, own in counts.items()]


def _of_gpus(note: str, counts: set[int]) -> str:
    where = f"{listed([f'{count:,}' for count in sorted(counts)])} {'GPU' if counts == {1} else 'GPUs'}"
    return note if note.startswith(f"{where} ") else f"{where}: {note}"


def _epoch_row(run: RunProjection, epoch: EpochProjection) -> dict[str, Any]:
    n = epoch.num_iterations
    return {
        "trace": run.trace,
        "cluster": run.cluster,
        "device": run.device,
        "epoch": epoch.epoch,
        "architecture": epoch.architecture,
        "batch_per_gpu": epoch.batch_per_gpu,
        "num_gpus": run.gpus,
        "num_iterations": n,
        "wall_seconds": epoch.total_s,
        "low_wall_seconds": epoch.low_s,
        "high_wall_seconds": epoch.high_s,
        "data_wait_seconds": n * epoch.input_wait_s,
        "forward_seconds": n * epoch.forward_s,
        "backward_seconds": n * epoch.backward_s,
        "product_seconds": n * epoch.product_s,
        "hook_seconds": n * epoch.hooks_s,
        "regularizer_seconds": n * epoch.regularizer_s,
        "optimizer_seconds": n * epoch.optimizer_s,
        "overhead_seconds": n * epoch.overhead_s,
        "straggler_wait_seconds": n * epoch.straggler_wait_s,
        "communication_seconds": n * epoch.communication_s,
        "exposed_communication_seconds": n * epoch.exposed_communication_s,
        "communication_wait_seconds": n * epoch.communication_wait_s,
        "step_median_seconds": epoch.step_s,
        "wire_bytes_per_gpu": n * epoch.wire_bytes_per_gpu,
        "peak_memory_bytes": epoch.peak_memory_bytes,
        "energy_joules": epoch.energy_j,
        "tier": str(epoch.tier),
    }
