"""A trace as tidy tables: one observation a row, the unit of every column in its name.

Seconds, bytes, joules and plain counts; a quantity that was not measured is missing (NaN), never zero.
"""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

import pandas as pd

from ptsim.network import PRODUCTS

if TYPE_CHECKING:
    from ptsim.trace.trace import Trace


def epoch_rows(trace: Trace) -> list[dict[str, Any]]:
    """One row per recorded epoch; see `Trace.epochs_frame`."""
    paid: dict[int, float | None] = {}
    for record in trace.reconfigurations:  # two may follow an epoch
        before, seconds = paid.get(record.epoch), record.measured_duration_s
        paid[record.epoch] = before if seconds is None else seconds + (before or 0.0)
    rows = []
    for epoch in trace.epochs:
        network, time, step = trace.network_of(epoch), epoch.measured_time, epoch.measured_step
        rows.append(
            {
                "epoch": epoch.epoch,
                "architecture": epoch.architecture,
                "batch_per_gpu": epoch.batch_per_gpu,
                "passes": epoch.passes,
                "num_gpus": epoch.world_size,
                "num_iterations": epoch.num_iterations,
                "learning_rate": epoch.learning_rate,
                "train_loss": epoch.train_loss,
                "penalty": epoch.penalty,
                "validation_accuracy": epoch.validation_accuracy,
                "channel_sparsity": epoch.channel_sparsity,
                "weight_sparsity": epoch.weight_sparsity,
                "parameters": network.num_parameters,
                "inference_macs_per_image": network.forward_macs,
                "wall_seconds": time and time.wall_s,
                "data_wait_seconds": time and time.data_wait_s,
                "forward_seconds": time and time.forward_s,
                "backward_seconds": time and time.backward_s,
                "regularizer_seconds": time and time.regularizer_s,
                "optimizer_seconds": time and time.optimizer_s,
                "exposed_communication_seconds": time and time.exposed_communication_s,
                "reconfiguration_seconds": paid.get(epoch.epoch, None if trace.is_planned else 0.0),
                "step_median_seconds": step and step.median_s,
                "step_p10_seconds": step and step.p10_s,
                "step_p90_seconds": step and step.p90_s,
                "allreduce_bytes": epoch.allreduce_bytes,
                "peak_memory_bytes": epoch.peak_memory_bytes,
                "energy_joules": epoch.device.energy_j if epoch.device else None,
                "power_watts": epoch.device.power_w if epoch.device else None,
            }
        )
    return rows


def layer_rows(trace: Trace) -> list[dict[str, Any]]:
    """One row per layer of every architecture; see `Trace.architectures_frame`."""
    return [
        {
            "architecture": architecture,
            "position": position,
            "layer": layer.name,
            "kind": str(layer.kind),
            "op": layer.op,
            "in_channels": layer.in_channels,
            "out_channels": layer.out_channels,
            "kernel_height": layer.kernel_size[0],
            "kernel_width": layer.kernel_size[1],
            "groups": layer.groups,
            "once": layer.once,
            "input_elements": layer.input_elements,
            "output_elements": layer.output_elements,
            "parameters": layer.num_parameters,
            "forward_macs_per_image": layer.forward_macs if layer.kind in PRODUCTS else 0,
        }
        for architecture, network in trace.networks.items()
        for position, layer in enumerate(network.layers)
    ]


def numeric(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with columns of optional numbers, which None would make objects, as floats; missing ones are NaN."""
    for name in (name for name in frame if pd.api.types.is_object_dtype(frame[name])):
        values = frame[name].dropna()
        if all(isinstance(value, numbers.Number) and not isinstance(value, bool) for value in values):
            frame[name] = frame[name].astype(float)
    return frame
