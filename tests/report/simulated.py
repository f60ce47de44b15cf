"""Projections and steps with round numbers, so that what a report makes of them can be reckoned by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ptsim.costs.times import LayerTime, StepTime
from ptsim.hardware.catalog import load_cluster
from ptsim.report.projected import Projector
from ptsim.sim.options import HourPrice, Options
from ptsim.sim.projection import EpochProjection, RunProjection
from ptsim.trace.schema import Epoch
from ptsim.trace.trace import Trace


def epoch_projection(**changes: Any) -> EpochProjection:
    """Ten steps of 11.625 s, and 3.75 s that no part of a step claims."""
    usual = EpochProjection(
        epoch=0,
        architecture="a",
        batch_per_gpu=64,
        num_iterations=10,
        step_s=11.625,
        forward_s=3.0,
        backward_s=6.0,
        product_s=5.0,
        hooks_s=1.5,
        optimizer_s=1.0,
        regularizer_s=0.5,
        overhead_s=0.25,
        input_wait_s=0.125,
        straggler_wait_s=0.0,
        communication_s=2.0,
        exposed_communication_s=0.75,
        communication_wait_s=0.5,
        wire_bytes_per_gpu=100.0,
        total_s=120.0,
        low_s=110.0,
        high_s=130.0,
        peak_memory_bytes=2**30,
        needed_memory_bytes=2**31,
        energy_j=1e6,
        tier="measured",
    )
    return msgspec.structs.replace(usual, **changes)


def run_projection(total_s: float = 100.0, **changes: Any) -> RunProjection:
    """A run on four GPUs of two dollars an hour, known to 2 % below and 4 % above."""
    usual = RunProjection(
        trace="t",
        model="m",
        origin="recorded",
        cluster="dgx-a100",
        device="a100-sxm4-40gb",
        gpus=4,
        scaling="weak",
        epochs=(epoch_projection(),),
        reconfiguration_s=3.0,
        reconfiguration_low_s=2.0,
        reconfiguration_high_s=4.0,
        startup_s=7.0,
        faults_s=0.0,
        total_s=total_s,
        compute_s=0.8 * total_s,
        exposed_communication_s=0.1 * total_s,
        communication_wait_s=0.0,
        input_wait_s=0.0,
        straggler_wait_s=0.0,
        allreduce_bytes_per_gpu=1e9,
        energy_j=3.6e6,
        energy_low_j=3.0e6,
        energy_high_j=4.0e6,
        price=HourPrice(usd=2.0, source="made up"),
        low_s=0.98 * total_s,
        high_s=1.04 * total_s,
        tier="datasheet",
        network_tier="datasheet",
        mfu_fraction=0.3,
        input_images_per_s=None,
        input_limit_gpus=None,
        draw_spread=0.0,
        complete=True,
        notes=(),
    )
    return msgspec.structs.replace(usual, **changes)


class FixedProjector(Projector):
    """Takes projections of dense and of pruned runs, and the times of layers, from what it was given."""

    def __init__(
        self,
        projections: Mapping[bool, RunProjection] | None = None,
        *,
        layer_s: tuple[float, float] = (1e-3, 2e-3),
        update_s: tuple[float, float] = (0.0, 0.0),
        **options: Any,
    ) -> None:
        """On a DGX A100.

        Args:
            projections: by whether the run is pruned.
            layer_s: forward and backward seconds of every layer.
            update_s: seconds of an update, fixed and for every image.
            **options: of `Projector`.
        """
        super().__init__(load_cluster("dgx-a100"), options.pop("options", Options()), **options)
        self._projections, self._layer_s, self._update_s = dict(projections or {}), layer_s, update_s

    def run(self, trace: Trace, gpus: int) -> RunProjection:
        return msgspec.structs.replace(self._projections[trace.is_pruned], gpus=gpus)

    def step(self, trace: Trace, epoch: Epoch) -> StepTime:
        forward_s, backward_s = self._layer_s
        layers = tuple(
            LayerTime(layer=layer.name, kind=layer.kind, forward_s=forward_s, backward_s=backward_s, tier="measured")
            for layer in trace.network_of(epoch).layers
        )
        optimizer_s = self._update_s[0] + epoch.batch_per_gpu * self._update_s[1]
        zero = dict.fromkeys(("regularizer_s", "overhead_s", "low_s", "high_s"), 0.0)
        return StepTime(layers=layers, optimizer_s=optimizer_s, tier="measured", **zero)
