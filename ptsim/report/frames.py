"""Which numbers a report shows, as tidy tables: one observation a row, every column's unit in its name.

Seconds, bytes, joules and plain counts throughout; a quantity that was not measured is missing (NaN), never zero.
A row of a run names it by `run`, the label of `pairs.run_labels`, and by `setting`, which repeats with other seeds
share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from ptsim.answers.validate import Validation
from ptsim.costs.flops import layer_macs
from ptsim.costs.run import run_cost
from ptsim.trace.frames import epoch_rows, layer_rows, numeric
from ptsim.trace.pace import paid_s
from ptsim.trace.pairs import (
    Comparison,
    data_name,
    device_name,
    held_dense,
    model_name,
    pace,
    run_labels,
    setting_labels,
    time_differences,
)
from ptsim.trace.trace import Trace


def run_state(trace: Trace) -> str:
    """How the run ended: complete, interrupted, failed, or cut off without a last record."""
    if trace.complete:
        return "complete"
    return trace.end.status if trace.end else "cut off"


def runs_frame(traces: Sequence[Trace]) -> pd.DataFrame:
    """One row per run: what was trained, on what, how it ended and what it took, all as recorded.

    `measured_seconds` sums the training epochs without validation; reconfigurations are counted apart. `energy_joules`
    is of one GPU, the one whose process recorded. `last_*` are of the network that the run ended with, a
    reconfiguration after the last epoch included, and so is `final_accuracy` except where `judged` is False: the run
    stopped between that reconfiguration and its validation. `num_gpus` and `first_*` are those of the first epoch.
    """
    rows = []
    for label, setting, trace in _named(traces):
        run, epochs = trace.run, trace.epochs
        first = trace.networks[epochs[0].architecture] if epochs else next(iter(trace.networks.values()), None)
        last = trace.final_network if epochs else first
        energies = [e.device.energy_j if e.device else None for e in epochs]
        unmeasured = trace.is_planned or any(r.measured_duration_s is None for r in trace.reconfigurations)
        measured_s = sum(e.time.wall_s for e in epochs) if epochs and _is_timed(trace) else None
        rows.append(
            {
                "run": label,
                "setting": setting,
                "origin": run.origin,
                "stretched": trace.is_stretched,
                "model": model_name(trace),
                "dataset": data_name(trace),
                "penalty_ratio": trace.penalty_ratio,
                "pruned": trace.is_pruned,
                "device": device_name(trace),
                "num_gpus": trace.world_sizes[0],
                "precision": str(run.precision),
                "memory_format": run.memory_format,
                "seed": run.seed,
                "state": run_state(trace),
                "epochs": len(epochs),
                "final_accuracy": trace.final_accuracy,
                "judged": not epochs or trace.complete or last is trace.network_of(epochs[-1]),
                "first_batch_per_gpu": epochs[0].batch_per_gpu if epochs else None,
                "last_batch_per_gpu": epochs[-1].batch_per_gpu if epochs else None,
                "first_parameters": first.num_parameters if first else None,
                "last_parameters": last.num_parameters if last else None,
                "first_inference_macs_per_image": first.forward_macs if first else None,
                "last_inference_macs_per_image": last.forward_macs if last else None,
                "measured_seconds": measured_s,
                "energy_joules": sum(e for e in energies if e is not None) if epochs and None not in energies else None,
                "num_reconfigurations": len(trace.reconfigurations),
                "reconfiguration_seconds": None if unmeasured else paid_s(trace),
                "channels_removed": sum(r.channels_removed for r in trace.reconfigurations),
                "layers_removed": sum(len(r.layers_removed) for r in trace.reconfigurations),
                "trace": str(trace.path),
            }
        )
    return numeric(pd.DataFrame(rows))


def _is_timed(trace: Trace) -> bool:
    """Whether somebody measured the time of every epoch."""
    return not trace.is_planned and all(epoch.measured_time is not None for epoch in trace.epochs)


def epochs_of_runs_frame(traces: Sequence[Trace]) -> pd.DataFrame:
    """The rows of `Trace.epochs_frame` of several runs, with what tells the runs apart."""
    rows = []
    for label, setting, trace in _named(traces):
        labels = _labels(label, setting, trace)
        rows += [labels | row for row in epoch_rows(trace)]
    return numeric(pd.DataFrame(rows))


def costs_frame(traces: Sequence[Trace]) -> pd.DataFrame:
    """`epochs_of_runs_frame` with what the cost model counts for every epoch's architecture, in the exact convention.

    `allreduce_payload_bytes` is what each GPU's gradients add up to over the epoch, whether or not the run had several;
    `estimated_memory_bytes` is the estimated peak of an iteration.
    """
    rows = [
        {
            "training_macs_per_image": cost.training_macs_per_image,
            "training_macs": cost.training_macs,
            "bn_bytes_per_image": cost.bn_bytes_per_image,
            "estimated_memory_bytes": cost.peak_memory_bytes,
            "allreduce_payload_bytes": cost.gradient_bytes,
        }
        for trace in traces
        for cost in run_cost(trace)
    ]
    return pd.concat([epochs_of_runs_frame(traces), pd.DataFrame(rows)], axis=1)


def trained_architectures(epochs: pd.DataFrame) -> pd.DataFrame:
    """One row per run and work of `Facts.epochs` (see `pairs.work_of`): from which epoch to which, and the cost.

    Memory is that of the epoch that takes the most.
    """
    grouped = epochs.groupby(["run", "architecture", "batch_per_gpu", "passes", "num_gpus"], sort=False)
    return grouped.agg(
        first_epoch=("epoch", "min"),
        last_epoch=("epoch", "max"),
        parameters=("parameters", "first"),
        inference_macs_per_image=("inference_macs_per_image", "first"),
        training_macs_per_image=("training_macs_per_image", "first"),
        bn_bytes_per_image=("bn_bytes_per_image", "first"),
        peak_memory_bytes=("peak_memory_bytes", "max"),
        estimated_memory_bytes=("estimated_memory_bytes", "max"),
        projected_memory_bytes=("projected_memory_bytes", "max"),
        epoch_allreduce_bytes=("allreduce_payload_bytes", "first"),
        epoch_seconds=("wall_seconds", "median"),
    ).reset_index()


def measured_savings_frame(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """One row per pruned run whose dense partner differs by pruning alone: what it saved on its machine, measured.

    Runs with an epoch that nobody timed have none.
    `pace_fraction` is the time of the same, unpruned network in the pruned run over that in the dense run;
    `own_start_fraction` is the pruned run's time over what it would have taken had all its epochs been as long as its
    first, unpruned ones: a machine whose speed drifts between runs does not distort that. Times are without validation,
    with reconfigurations as far as they were measured.
    """
    rows = []
    for c in comparisons:
        if not c.trained or time_differences(c.pruned, c.baseline):
            continue
        if not (_is_timed(c.pruned) and _is_timed(c.baseline)):
            continue
        changing_s = paid_s(c.pruned)
        dense_s, pruned_s, held_s = (
            sum(epoch.time.wall_s for epoch in trace.epochs) for trace in (c.baseline, c.pruned, held_dense(c.pruned))
        )
        rows.append(
            {
                "run": c.label,
                "setting": c.setting,
                "pruned": True,
                "baseline": c.baseline_label,
                "device": device_name(c.pruned),
                "epochs": len(c.pruned.epochs),
                "dense_seconds": dense_s,
                "pruned_seconds": pruned_s + changing_s,
                "reconfiguration_seconds": changing_s,
                "time_fraction": (pruned_s + changing_s) / dense_s,
                "own_start_fraction": (pruned_s + changing_s) / held_s,
                "pace_fraction": pace(c),
                "training_macs_fraction": sum(e.training_macs for e in run_cost(c.pruned))
                / sum(e.training_macs for e in run_cost(c.baseline)),
                **accuracies(c),
            }
        )
    return numeric(pd.DataFrame(rows))


def accuracies(comparison: Comparison) -> dict[str, float | None]:
    """Validation accuracy of what both runs handed over, and the change; missing where it was not measured."""
    pruned = comparison.pruned.final_accuracy
    dense = comparison.baseline.final_accuracy if comparison.trained else None
    change = None if pruned is None or dense is None else pruned - dense
    return {"dense_accuracy": dense, "pruned_accuracy": pruned, "accuracy_change": change}


def averaged(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Repeats as one row per group of `by`: means, lowest lows, highest highs, the first text, and `num_runs`."""
    grouped = frame.groupby(list(by), sort=False, dropna=False)
    columns: dict[str, pd.Series] = {"num_runs": grouped.size()}
    for name in frame.columns.difference([*by, "num_runs"], sort=False):
        words = name.split("_")
        numeric = pd.api.types.is_numeric_dtype(frame[name]) and not pd.api.types.is_bool_dtype(frame[name])
        how = "min" if "low" in words else "max" if "high" in words else "mean"
        columns[name] = grouped[name].agg(how if numeric else "first")
    return pd.DataFrame(columns).reset_index()


def _labels(label: str, setting: str, trace: Trace) -> dict[str, Any]:
    """The columns that tell a run's rows from those of other runs."""
    return {
        "run": label,
        "setting": setting,
        "pruned": trace.is_pruned,
        "device": "planned" if trace.run.device.kind == "none" else device_name(trace),
        "device_kind": trace.run.device.kind,
        "precision": str(trace.run.precision),
    }


def _named(traces: Sequence[Trace]) -> Iterator[tuple[str, str, Trace]]:
    """Every run with its label and its setting's."""
    return zip(run_labels(traces), setting_labels(traces), traces, strict=True)


def validation_frame(traces: Sequence[Trace], validation: Validation) -> pd.DataFrame:
    """One row per epoch that `ptsim.validate` predicted again: measured and predicted time with its 90 % interval."""
    rows = []
    for (label, setting, trace), check in zip(_named(traces), validation.runs, strict=True):
        rows += [
            _labels(label, setting, trace)
            | {
                "num_gpus": epoch.num_gpus,
                "batch_per_gpu": epoch.batch_per_gpu,
                "epoch": epoch.epoch,
                "measured_seconds": epoch.measured_seconds,
                "predicted_seconds": epoch.predicted_seconds,
                "low_seconds": epoch.low_seconds,
                "high_seconds": epoch.high_seconds,
                "epoch_error": epoch.error,
                "measured_memory_bytes": epoch.measured_memory_bytes,
                "predicted_memory_bytes": epoch.predicted_memory_bytes,
                "tier": str(epoch.tier),
            }
            for epoch in check.epochs
        ]
    return numeric(pd.DataFrame(rows))


def reconfigurations_frame(traces: Sequence[Trace]) -> pd.DataFrame:
    """One row per reconfiguration: when, what it removed, what it took and what it did to the mini-batch."""
    rows = []
    for label, trace in zip(run_labels(traces), traces, strict=True):
        for record in trace.reconfigurations:
            before, after = trace.networks[record.before], trace.networks[record.after]
            rows.append(
                {
                    "run": label,
                    "after_epoch": record.epoch,
                    "channels_removed": record.channels_removed,
                    "layers_removed": len(record.layers_removed),
                    "parameters_before": before.num_parameters,
                    "parameters_after": after.num_parameters,
                    "inference_macs_per_image_before": before.forward_macs,
                    "inference_macs_per_image_after": after.forward_macs,
                    "batch_before": record.batch_before,
                    "batch_after": record.batch_after,
                    "duration_seconds": record.measured_duration_s,
                    "notes": "; ".join(record.notes),
                }
            )
    columns = ["run", "after_epoch", "channels_removed", "layers_removed", "parameters_before", "parameters_after"]
    columns += ["inference_macs_per_image_before", "inference_macs_per_image_after", "batch_before", "batch_after"]
    return pd.DataFrame(rows, columns=[*columns, "duration_seconds", "notes"])


def profiles_frame(traces: Sequence[Trace]) -> pd.DataFrame:
    """One row per layer of every recorded profile: measured forward and backward seconds of one step's mini-batch.

    A layer without a backward node has a missing `backward_seconds`. `epoch` is the first that trained with this
    architecture and mini-batch, or passes as large, missing where none did.
    """
    rows = []
    for label, trace in zip(run_labels(traces), traces, strict=True):
        first_epoch = {(e.architecture, trace.setting_of(e).pass_batch): e.epoch for e in reversed(trace.epochs)}
        for profile in trace.profiles:
            network = trace.networks[profile.architecture]
            for measured in profile.layers:
                layer = network.layer(measured.layer)
                rows.append(
                    {
                        "run": label,
                        "epoch": first_epoch.get((profile.architecture, profile.batch)),
                        "architecture": profile.architecture,
                        "batch_per_gpu": profile.batch,
                        "precision": str(profile.precision),
                        "device": profile.device,
                        "num_samples": profile.num_samples,
                        "layer": layer.name,
                        "kind": str(layer.kind),
                        "op": layer.op,
                        "in_channels": layer.in_channels,
                        "out_channels": layer.out_channels,
                        "forward_macs_per_image": layer.forward_macs,
                        "forward_seconds": measured.forward_s,
                        "backward_seconds": measured.backward_s,
                    }
                )
    columns = ["run", "epoch", "architecture", "batch_per_gpu", "precision", "device", "num_samples", "layer", "kind"]
    columns += ["op", "in_channels", "out_channels", "forward_macs_per_image", "forward_seconds", "backward_seconds"]
    return pd.DataFrame(rows, columns=columns)


def architectures_frame(traces: Sequence[Trace]) -> pd.DataFrame:
    """The rows of `Trace.architectures_frame` of several runs, with the backward pass as the cost model counts it."""
    rows = []
    for label, trace in zip(run_labels(traces), traces, strict=True):
        layers = [layer for network in trace.networks.values() for layer in network.layers]
        for layer, row in zip(layers, layer_rows(trace), strict=True):
            backward = {"backward_macs_per_image": layer_macs(layer, "exact").backward}
            rows.append({"run": label} | row | backward)
    return numeric(pd.DataFrame(rows))


def densities_frame(traces: Sequence[Trace]) -> pd.DataFrame:
    """One row per epoch and layer: the fractions of channels and weights that are not sparse (paper, Fig. 12).

    `channels` is the paper's channel density, input density times output density.
    """
    rows = [
        {
            "run": label,
            "epoch": epoch.epoch,
            "layer": density.layer,
            "input_channels": density.input_channels,
            "output_channels": density.output_channels,
            "channels": density.input_channels * density.output_channels,
            "weights": density.weights,
        }
        for label, trace in zip(run_labels(traces), traces, strict=True)
        for epoch in trace.epochs
        for density in epoch.densities
    ]
    columns = ["run", "epoch", "layer", "input_channels", "output_channels", "channels", "weights"]
    return pd.DataFrame(rows, columns=columns)
