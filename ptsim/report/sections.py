"""Which parts the report has, and what each shows: figures and tables of the recorded and the projected runs."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ptsim.report import figures, frames, projected
from ptsim.report.answer import TIER_WORDS
from ptsim.report.page import Section, ShownFigure
from ptsim.report.pairs import is_pruned, run_labels
from ptsim.report.projected import LabelledRun, Projector
from ptsim.report.tables import make_table
from ptsim.trace.io import Trace
from ptsim.units import format_bytes, format_seconds
from ptsim.validation import Validation

NETWORK_TIER_WORDS = {
    "measured": "interpolated in all-reduce times that were measured on this cluster",
    "profiled": "interpolated in all-reduce times that were measured on this cluster",
    "datasheet": "from the links' published bandwidths and fitted latencies; none was measured on this cluster",
}


def time_section(runs: Sequence[LabelledRun], projector: Projector, gpus: Sequence[int], focus: int) -> Section:
    """Where the time goes: by kind of work, by cluster size and by epoch."""
    sizes = sorted({gpus[0], focus, gpus[-1]})
    breakdown = projected.breakdown_frame(runs, projector, gpus)
    shown = [
        ShownFigure(
            name="breakdown",
            title="By kind of work.",
            caption=f"Expected time of the whole run; 100 % is “{runs[0].label}” on as many GPUs.",
            figure=figures.breakdown_figure(breakdown[breakdown.gpus.isin(sizes)]),
        )
    ]
    shrinking = [run for run in runs if is_pruned(run.trace)] or runs
    for number, run in enumerate(shrinking[:2]):
        if len(run.trace.epochs) > 1:
            epochs = projected.epoch_breakdown_frame(run, projector, focus)
            shown.append(
                ShownFigure(
                    name=f"epochs-{number}",
                    title="Epoch by epoch.",
                    caption=f"The same for “{run.label}” on {_gpus(focus)}, without what reconfigurations cost.",
                    figure=figures.epoch_breakdown_figure(epochs),
                )
            )
    wide = breakdown.pivot_table(index=["run", "gpus"], columns="part", values="seconds", sort=False).reset_index()
    wide.columns = [name if name in ("run", "gpus") else f"{name}_seconds" for name in wide.columns]
    parts = figures.visible_parts(breakdown)
    table = make_table(
        "breakdown",
        wide,
        {"run": "run", "gpus": "GPUs", **{f"{part}_seconds": part for part in parts}},
        title="Time by kind of work.",
        caption="Expected time of the whole run; communication that computation hides is not counted.",
        together=[[f"{part}_seconds" for part in parts]],
        folded=True,
    )
    return Section(name="time", title="Where the time goes", figures=tuple(shown), tables=(table,))


def scaling_section(projections: pd.DataFrame, savings: pd.DataFrame) -> Section:
    """Whole runs over cluster sizes, and what pruning saves there."""
    shown = []
    if projections.gpus.nunique() > 1:
        shown.append(
            ShownFigure(
                name="scaling",
                title="Whole-run time.",
                caption="Expected time over cluster sizes, both axes logarithmic.",
                figure=figures.scaling_figure(projections),
            )
        )
        if not savings.empty:
            shown.append(
                ShownFigure(
                    name="saving",
                    title="What pruning saves.",
                    caption="Share of the dense run's time on as many GPUs.",
                    figure=figures.saving_figure(savings),
                )
            )
    tables = [
        make_table(
            "projections",
            projections,
            {
                "run": "run",
                "gpus": "GPUs",
                "total_seconds": "time",
                "low_seconds": "90 % from",
                "high_seconds": "to",
                "compute_seconds": "computing",
                "exposed_communication_seconds": "exposed communi\u00adcation",
                "gpu_seconds": "GPU time",
                "allreduce_bytes_per_gpu": "all-reduced per GPU",
                "energy_joules": "energy",
                "cost_usd": "cost",
                "tier": "tier",
            },
            title="Whole runs.",
            caption="Training without validation; energy and cost of all GPUs.",
            together=[["total_seconds", "low_seconds", "high_seconds", "compute_seconds"]],
        )
    ]
    if not savings.empty:
        tables.append(
            make_table(
                "savings",
                savings,
                {
                    "run": "run",
                    "baseline": "against",
                    "gpus": "GPUs",
                    "dense_seconds": "dense",
                    "pruned_seconds": "pruned",
                    "saved_seconds": "saved",
                    "saved_seconds_low": "90 % from",
                    "saved_seconds_high": "to",
                    "saved_fraction": "saved share",
                    "saved_compute_seconds": "of that, computing",
                    "saved_communication_seconds": "communi\u00adcating",
                    "saved_reconfiguration_seconds": "start and reconfi\u00adguring",
                    "saved_joules": "energy saved",
                    "saved_usd": "money saved",
                },
                title="What pruning saves.",
                caption="Differences of the projections; negative numbers are losses.",
                together=[
                    ["dense_seconds", "pruned_seconds", "saved_seconds", "saved_seconds_low", "saved_seconds_high"],
                    [f"saved_{part}_seconds" for part in ("compute", "communication", "reconfiguration")],
                ],
            )
        )
    return Section(name="scaling", title="Over cluster sizes", figures=tuple(shown), tables=tuple(tables))


def layers_section(run: LabelledRun, projector: Projector) -> Section:
    """Where the layers' time goes, in the first and the last architecture of one run."""
    layers = projected.layers_frame(run, projector.device)
    first, last = layers.epoch.min(), layers.epoch.max()
    shown = [
        ShownFigure(
            name="layers",
            title="The costliest layers.",
            caption=f"Forward and backward time per image, “{run.label}”, first and last epoch.",
            figure=figures.layers_figure(layers),
        )
    ]
    if first != last:
        shown.append(
            ShownFigure(
                name="blocks",
                title="Block by block, epoch by epoch.",
                caption="Time per image of every block of layers; white where it has been removed.",
                figure=figures.blocks_figure(layers),
            )
        )
    before = layers[layers.epoch == first].set_index("layer")
    after = layers[layers.epoch == last].set_index("layer")
    table = pd.DataFrame(
        {
            "layer": before.index,
            "kind": before.kind.str.replace("_", " "),
            "first_channels": before.in_channels.astype(str) + " → " + before.out_channels.astype(str),
            "last_channels": (after.in_channels.astype(str) + " → " + after.out_channels.astype(str))
            .reindex(before.index)
            .fillna("removed"),
            "first_macs_per_image": before.forward_macs_per_image,
            "last_macs_per_image": after.forward_macs_per_image.reindex(before.index),
            "first_seconds_per_image": before.seconds_per_image,
            "last_seconds_per_image": after.seconds_per_image.reindex(before.index),
            "last_fraction": (after.seconds_per_image.reindex(before.index).fillna(0.0) / before.seconds_per_image),
            "tier": before.tier,
        }
    ).reset_index(drop=True)
    shown_table = make_table(
        "layers",
        table,
        {
            "layer": "layer",
            "kind": "kind",
            "first_channels": "channels, first",
            "last_channels": "channels, last",
            "first_macs_per_image": "forward, first",
            "last_macs_per_image": "forward, last",
            "first_seconds_per_image": "time, first",
            "last_seconds_per_image": "time, last",
            "last_fraction": "last / first",
            "tier": "tier",
        },
        title="Every layer.",
        caption=f"{figures.describe_setting(layers)}; forward and backward together.",
        together=[
            ["first_macs_per_image", "last_macs_per_image"],
            ["first_seconds_per_image", "last_seconds_per_image"],
        ],
        folded=True,
    )
    return Section(name="layers", title="By layer and epoch", figures=tuple(shown), tables=(shown_table,))


def costs_section(runs: Sequence[Trace]) -> Section:
    """What shrank: FLOPs, traffic, memory, all-reduced bytes, and the clock beside them."""
    epochs = frames.costs_frame(runs)
    measured = "measured on the recording machine and as " if epochs.peak_memory_bytes.notna().any() else ""
    shown = []
    for number, run in enumerate(epochs[epochs.pruned].run.unique()[:2]):
        shown.append(
            ShownFigure(
                name=f"shrinking-{number}",
                title="What shrank, and what the clock saw.",
                caption=f"Cost of an image in “{run}”, relative to its first epoch: the count and the measurement.",
                figure=figures.shrinking_figure(epochs[epochs.run == run]),
            )
        )
    shown += [
        ShownFigure(
            name="memory",
            title="Memory and mini-batch.",
            caption=f"Peak memory of an iteration as {measured}estimated, and the mini-batch that it belongs to.",
            figure=figures.memory_figure(epochs),
        ),
        ShownFigure(
            name="allreduce",
            title="Gradients to all-reduce.",
            caption="Bytes of gradients in an epoch: fewer parameters, and fewer updates as the mini-batch grows.",
            figure=figures.allreduce_figure(epochs),
        ),
    ]
    first_of = ["run", "architecture", "batch_per_gpu"]
    distinct = epochs.groupby(first_of, sort=False).agg(
        first_epoch=("epoch", "min"),
        last_epoch=("epoch", "max"),
        parameters=("parameters", "first"),
        inference_macs_per_image=("inference_macs_per_image", "first"),
        training_macs_per_image=("training_macs_per_image", "first"),
        bn_bytes_per_image=("bn_bytes_per_image", "first"),
        peak_memory_bytes=("peak_memory_bytes", "max"),
        estimated_memory_bytes=("estimated_memory_bytes", "first"),
        epoch_allreduce_bytes=("allreduce_payload_bytes", "first"),
        epoch_seconds=("wall_seconds", "median"),
    )
    table = make_table(
        "architectures",
        distinct.reset_index(),
        {
            "run": "run",
            "first_epoch": "from epoch",
            "last_epoch": "to epoch",
            "batch_per_gpu": "mini-batch per GPU",
            "parameters": "parameters",
            "inference_macs_per_image": "inference",
            "training_macs_per_image": "training",
            "bn_bytes_per_image": "BatchNorm traffic",
            "peak_memory_bytes": "peak memory, measured",
            "estimated_memory_bytes": "peak memory, estimated",
            "epoch_allreduce_bytes": "gradients per epoch",
            "epoch_seconds": "measured epoch (median)",
        },
        title="Every architecture that was trained.",
        caption=figures.describe_setting(epochs) + ".",
        together=[["peak_memory_bytes", "estimated_memory_bytes"]],
    )
    return Section(name="costs", title="What shrank", figures=tuple(shown), tables=(table,))


def runs_section(runs: Sequence[Trace]) -> Section:
    """What was recorded: accuracy, sizes, reconfigurations."""
    epochs = frames.epochs_frame(runs)
    shown = []
    if not epochs.empty:
        shown.append(
            ShownFigure(
                name="accuracy",
                title="Accuracy and sparsity.",
                caption="Validation accuracy after every epoch, and the share of the first architecture's channels "
                "that are removed or sparse.",
                figure=figures.accuracy_figure(epochs),
            )
        )
    table = frames.runs_frame(runs)
    several = {"model": "network", "dataset": "data"} if len(table[["model", "dataset"]].drop_duplicates()) > 1 else {}
    recorded = make_table(
        "runs",
        table,
        {
            "run": "run",
            **several,
            "state": "state",
            "epochs": "epochs",
            "final_accuracy": "validation accuracy",
            "measured_seconds": "measured training time",
            "energy_joules": "measured energy",
            "first_parameters": "parameters, first",
            "last_parameters": "parameters, last",
            "first_inference_macs_per_image": "inference, first",
            "last_inference_macs_per_image": "inference, last",
            "num_reconfigurations": "reconfigu\u00adrations",
            "reconfiguration_seconds": "time in them",
        },
        title="The recorded runs.",
        caption="Measured on the recording machine; training time is without validation and reconfiguration.",
        together=[
            ["first_parameters", "last_parameters"],
            ["first_inference_macs_per_image", "last_inference_macs_per_image"],
        ],
    )
    reconfigurations = make_table(
        "reconfigurations",
        frames.reconfigurations_frame(runs),
        {
            "run": "run",
            "after_epoch": "after epoch",
            "channels_removed": "channels removed",
            "layers_removed": "layers removed",
            "parameters_before": "parameters before",
            "parameters_after": "parameters after",
            "inference_macs_per_image_after": "inference after",
            "batch_before": "mini-batch before",
            "batch_after": "mini-batch after",
            "duration_seconds": "duration",
            "notes": "notes",
        },
        title="Reconfigurations.",
        caption="What every shrinking removed, and what it cost.",
        together=[["parameters_before", "parameters_after"]],
        folded=len(runs) > 1,
    )
    tables = tuple(table for table in (recorded, reconfigurations) if table.rows)
    return Section(name="runs", title="The recorded runs", figures=tuple(shown), tables=tables)


def validation_section(runs: Sequence[Trace], validation: Validation | None, reason: str) -> Section:
    """Predicted against measured, for the recorded runs themselves; `reason` says why there is no validation."""
    if validation is None:
        return Section(name="validation", title="Predicted against measured", paragraphs=(reason,))
    frame = frames.validation_frame(runs, validation)
    table = make_table(
        "validation",
        pd.DataFrame(
            {
                "run": run_labels(runs),
                "measured_seconds": [check.measured_seconds for check in validation.runs],
                "predicted_seconds": [check.predicted_seconds for check in validation.runs],
                "low_seconds": [check.low_seconds for check in validation.runs],
                "high_seconds": [check.high_seconds for check in validation.runs],
                "error": [check.error for check in validation.runs],
                "epoch_error": [
                    sum(abs(epoch.error) for epoch in check.epochs) / len(check.epochs) for check in validation.runs
                ],
                "notes": ["; ".join(check.notes) for check in validation.runs],
            }
        ),
        {
            "run": "run",
            "measured_seconds": "measured",
            "predicted_seconds": "predicted",
            "low_seconds": "90 % from",
            "high_seconds": "to",
            "error": "error of the run",
            "epoch_error": "mean error of an epoch",
            "notes": "notes",
        },
        title="Whole runs on the recording machine.",
        caption="Training epochs and reconfigurations.",
        together=[["measured_seconds", "predicted_seconds", "low_seconds", "high_seconds"]],
    )
    shown = ShownFigure(
        name="validation",
        title="Epoch times, predicted and measured.",
        caption=f"Predicted from: {validation.source}; input and loop as in the first epoch. "
        f"{100 * validation.interval_coverage:.0f} % of the epochs lie in their 90 % interval.",
        figure=figures.validation_figure(frame),
    )
    return Section(
        name="validation",
        title="Predicted against measured",
        paragraphs=(
            "This checks the prediction on the machine that recorded the runs. It says nothing about how well times "
            "carry over to another GPU, or about the network.",
        ),
        figures=(shown,),
        tables=(table,),
    )


def assumptions_section(runs: Sequence[LabelledRun], projector: Projector, gpus: int) -> Section:
    """What every projected number rests on: the tier of each time, and the source of each constant."""
    rows = []
    for run in runs:
        projection = projector.run(run.trace, gpus)
        tiers: dict[str, list[int]] = {}
        for epoch in projection.epochs:
            tiers.setdefault(str(epoch.tier), []).append(epoch.epoch)
        for tier, epochs in tiers.items():
            rows.append(
                {
                    "what": f"step time, {run.label}, epochs {epochs[0]} to {epochs[-1]}"
                    if len(epochs) > 1
                    else f"step time, {run.label}, epoch {epochs[0]}",
                    "value": tier,
                    "source": TIER_WORDS.get(tier, tier),
                }
            )
        if projection.network_tier is not None:
            rows.append(
                {
                    "what": f"all-reduce times, {run.label}, {_gpus(gpus)}",
                    "value": str(projection.network_tier),
                    "source": NETWORK_TIER_WORDS.get(str(projection.network_tier), str(projection.network_tier)),
                }
            )
        rows += [{"what": f"{run.label}", "value": "note", "source": note} for note in projection.notes]
    cluster, device = projector.cluster, projector.device
    for field, link in (("intra", cluster.intra), ("inter", cluster.inter)):
        if link is not None:
            rows.append(
                {
                    "what": "GPU to GPU, one direction" if field == "intra" else "node to node, one direction",
                    "value": f"{link.name}, {link.bandwidth_bytes_per_s / 1e9:.4g} GB/s"
                    + (f", {format_seconds(link.latency_s)}" if link.latency_s is not None else ""),
                    "source": _source(cluster.sources, field),
                }
            )
    rows += [
        {
            "what": f"all-reduce on {_gpus(measured.num_gpus)}",
            "value": f"measured table, {len(measured.size_bytes)} sizes, jitter {100 * measured.relative_jitter:.0f} %",
            "source": measured.source,
        }
        for measured in cluster.tables
    ]
    rows += [
        {
            "what": f"{device.name}: memory",
            "value": format_bytes(device.memory_bytes),
            "source": _source(device.sources, "memory"),
        },
        {
            "what": f"{device.name}: memory bandwidth",
            "value": f"{device.memory_bandwidth_bytes_per_s / 1e9:,.0f} GB/s",
            "source": _source(device.sources, "memory_bandwidth"),
        },
    ]
    rows += [
        {
            "what": f"{device.name}: {precision} peak",
            "value": f"{peak / 1e12:.4g} TFLOP/s",
            "source": _source(device.sources, "peak"),
        }
        for precision, peak in device.peak_flops_per_s.items()
        if precision in {run.trace.run.precision for run in runs}
    ]
    options = projector.options
    price = options.price_usd_per_gpu_hour
    rows += [
        {
            "what": "price of a GPU-hour",
            "value": f"{price if price is not None else cluster.price_usd_per_gpu_hour:.2f} USD"
            if price is not None or cluster.price_usd_per_gpu_hour is not None
            else "none",
            "source": "given by the user"
            if price is not None
            else _source(cluster.sources, "price_per_gpu")
            if cluster.price_usd_per_gpu_hour is not None
            else "no price, so no money is reported",
        },
        {
            "what": "overlap",
            "value": f"{100 * options.contention:.0f} % slower",
            "source": "computation and communication slow each other while both run; the interval covers half to one "
            "and a half times that",
        },
        {
            "what": "input pipeline",
            "value": "keeps up" if options.input_images_per_s is None else f"{options.input_images_per_s} images/s",
            "source": "an assumption: the cluster's storage and decoding are not modelled",
        },
        {
            "what": "mini-batch",
            "value": f"{options.scaling} scaling",
            "source": "every GPU keeps the recorded mini-batch"
            if options.scaling == "weak"
            else "the recorded global mini-batch is split over the GPUs",
        },
    ]
    table = make_table(
        "assumptions",
        pd.DataFrame(rows),
        {"what": "what", "value": "value", "source": "where it comes from"},
        title="Assumptions and tiers.",
    )
    return Section(name="assumptions", title="What the numbers rest on", tables=(table,))


def methods_section(runs: Sequence[Trace]) -> Section:
    """How the runs were made, from their own first records."""
    facts: list[tuple[str, str]] = []
    for label, trace in zip(run_labels(runs), runs, strict=True):
        run = trace.run
        data, device = run.dataset, run.device
        shape = " × ".join(map(str, data.input_shape))
        settings = {
            name: value
            for name, value in run.hyperparameters.items()
            if value is not None and value != "" and name != "data_dir"  # a place on somebody's disk
        }
        facts += [
            (
                label,
                f"{run.model} on {data.name}: {data.num_train:,} training and {data.num_validation:,} validation "
                f"images "
                f"of {shape}, {data.num_classes} classes; {run.precision}, {run.memory_format.replace('_', ' ')}, "
                f"seed {run.seed}; {_gpus(run.world_size) if device.kind == 'cuda' else device.kind.upper()} "
                f"{device.name}"
                + (f", driver {device.driver}" if device.driver else "")
                + f"; started {run.created}"
                + (f"; revision {run.git_revision[:12]}" if run.git_revision else "")
                + ".",
            ),
            (
                "configuration",
                ", ".join(f"{name} {_plain(value)}" for name, value in settings.items()) or "not recorded",
            ),
            ("software", ", ".join(f"{name} {version}" for name, version in run.versions.items()) or "not recorded"),
        ]
    facts += [
        (
            "FLOPs",
            "Multiply–accumulates are fvcore's count of the live network's forward pass; 1 MAC is 2 FLOPs. Training "
            "adds the weight gradient and, where one flows, the input gradient.",
        ),
        (
            "all-reduce bytes",
            "Of the gradients, 4 bytes a parameter, once per update; what a GPU sends on the wire is 2(p−1)/p of that "
            "for p GPUs.",
        ),
        (
            "projection",
            "Each distinct architecture and mini-batch is simulated once as a step of PyTorch's "
            "DistributedDataParallel (buckets, overlap with the backward pass) and multiplied by its iterations; "
            "reconfigurations are added with their recorded surgery and the cost of wrapping anew.",
        ),
        (
            "intervals",
            "90 %, from the residuals of the tier that made the times, taken as common to all layers and epochs of a "
            "run; for differences between runs, as independent.",
        ),
    ]
    return Section(name="methods", title="Methods", facts=tuple(facts))


def _source(sources: dict[str, str], field: str) -> str:
    return sources.get(field) or sources.get("default") or "not stated"


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value}"


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count:,} GPUs"
