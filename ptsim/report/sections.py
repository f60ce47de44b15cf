"""Which parts the report has, and what each shows: figures and tables of the recorded and the projected runs."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ptsim.answers.validate import Validation
from ptsim.report import figures, frames, projected, specs
from ptsim.report.page import Section, ShownFigure
from ptsim.report.projected import LabelledRun, Projector
from ptsim.report.tables import TableSpec, make_table
from ptsim.trace.pairs import Comparison, run_labels
from ptsim.trace.trace import Trace


def time_section(
    runs: Sequence[LabelledRun], projector: Projector, gpus: Sequence[int], focus: int, run: LabelledRun
) -> Section:
    """Where the time goes: by kind of work and by cluster size of all runs, by epoch of one `run`."""
    few = len({run.setting for run in runs}) <= 3
    sizes = sorted({gpus[0], focus, gpus[-1]}) if few else [focus]
    breakdown = projected.breakdown_frame(runs, projector, gpus)
    shown = [
        ShownFigure(
            name="breakdown",
            title="By kind of work.",
            caption=f"Expected time of the whole run; 100 % is “{runs[0].setting}” on as many GPUs.",
            figure=figures.breakdown_figure(
                frames.averaged(breakdown[breakdown.gpus.isin(sizes)], ["setting", "gpus", "part"])
            ),
        )
    ]
    if len(run.trace.epochs) > 1:
        epochs = projected.epoch_breakdown_frame(run, projector, focus)
        shown.append(
            ShownFigure(
                name="epochs",
                title="Epoch by epoch.",
                caption=f"The same for “{run.label}” on {figures.gpus(focus)}, without what reconfigurations cost.",
                figure=figures.epoch_breakdown_figure(epochs),
            )
        )
    wide = breakdown.pivot_table(
        index=["run", "gpus", "tier"], columns="part", values="seconds", sort=False
    ).reset_index()
    wide.columns = [name if name in ("run", "gpus", "tier") else f"{name}_seconds" for name in wide.columns]
    parts = figures.visible_parts(breakdown)
    columns = {f"{part}_seconds": part for part in parts}
    spec = TableSpec(
        name="breakdown",
        title="Time by kind of work.",
        caption="Expected time of the whole run, without an interval; communication that computation hides is not "
        "counted.",
        headings={"run": "run", "gpus": "GPUs", **columns, "tier": "times from"},
        together=(tuple(columns),),
        folded=True,
    )
    return Section(name="time", title="Where the time goes", figures=tuple(shown), tables=(make_table(spec, wide),))


def scaling_section(projections: pd.DataFrame, savings: pd.DataFrame) -> Section:
    """Whole runs over cluster sizes, and what pruning saves there."""
    shown = []
    if projections.gpus.nunique() > 1:
        shown.append(
            ShownFigure(
                name="scaling",
                title="Whole-run time.",
                caption="Expected time over cluster sizes, both axes logarithmic.",
                figure=figures.scaling_figure(frames.averaged(projections, ["setting", "gpus"])),
            )
        )
        if not savings.empty:
            shown.append(
                ShownFigure(
                    name="saving",
                    title="What pruning saves.",
                    caption="Share of the dense run's time on as many GPUs.",
                    figure=figures.saving_figure(frames.averaged(savings, ["setting", "gpus"])),
                )
            )
    tables = [make_table(specs.PROJECTIONS, projections)]
    if not savings.empty:
        tables.append(make_table(specs.SAVINGS, savings))
    if projections[["energy_joules", "cost_usd"]].notna().any(axis=None):
        tables.append(make_table(specs.ENERGY, projections))
        if not savings.empty:
            tables.append(make_table(specs.SAVED_ENERGY, savings))
    return Section(name="scaling", title="Over cluster sizes", figures=tuple(shown), tables=tuple(tables))


def layers_section(run: LabelledRun, projector: Projector) -> Section:
    """Where the layers' time goes, in the first and the last architecture of one run."""
    layers = projected.layers_frame(run, projector.device)
    shown = [
        ShownFigure(
            name="layers",
            title="The costliest layers.",
            caption=f"Forward and backward time per image, “{run.label}”, first and last epoch.",
            figure=figures.layers_figure(layers),
        )
    ]
    if layers.epoch.nunique() > 1:
        shown.append(
            ShownFigure(
                name="blocks",
                title="Block by block, epoch by epoch.",
                caption="Time per image of every block of layers"
                + ("; white where it has been removed." if projected.has_removed_blocks(layers) else "."),
                figure=figures.blocks_figure(layers),
            )
        )
    caption = f"{figures.describe_setting(layers)}; forward and backward together, without an interval."
    table = make_table(specs.LAYERS, projected.first_and_last_layers(layers), caption=caption)
    return Section(name="layers", title="By layer and epoch", figures=tuple(shown), tables=(table,))


def costs_section(runs: Sequence[Trace], run: LabelledRun) -> Section:
    """What shrank: memory and all-reduced bytes of all runs; MACs, traffic and the clock beside them of one `run`."""
    epochs = frames.costs_frame(runs)
    measured = "measured on the recording machine and as " if epochs.peak_memory_bytes.notna().any() else ""
    shown = []
    if run.trace.is_pruned:
        shown.append(
            ShownFigure(
                name="shrinking",
                title="What shrank, and what the clock saw.",
                caption=f"Cost of an image in “{run.label}”, relative to its first epoch: the count and the "
                "measurement.",
                figure=figures.shrinking_figure(epochs[epochs.run == run.label]),
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
    caption = f"{figures.describe_setting(epochs)}. Counted from the architecture where it does not say measured."
    table = make_table(specs.ARCHITECTURES, frames.trained_architectures(epochs), caption=caption)
    return Section(name="costs", title="What shrank", figures=tuple(shown), tables=(table,))


def runs_section(runs: Sequence[Trace], comparisons: Sequence[Comparison] = ()) -> Section:
    """What was recorded: accuracy, sizes, reconfigurations, and what pruning saved on the spot."""
    epochs = frames.epochs_frame(runs)
    savings = frames.measured_savings_frame(comparisons)
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
    if not savings.empty:
        shown.append(
            ShownFigure(
                name="tradeoff",
                title="Accuracy against time.",
                caption="Measured where the runs were recorded: what every pruned setting costs in accuracy and how "
                "much of the training time and of the training MACs it leaves.",
                figure=figures.tradeoff_figure(savings),
            )
        )
    table = frames.runs_frame(runs)
    same = [name for name in ("model", "dataset", "seed") if table[name].nunique() == 1]
    tables = [
        make_table(specs.MEASURED_SAVINGS, savings),
        make_table(specs.RUNS, table.drop(columns=same)),
        make_table(specs.RECONFIGURATIONS, frames.reconfigurations_frame(runs), folded=len(runs) > 1),
    ]
    return Section(
        name="runs",
        title="The recorded runs",
        figures=tuple(shown),
        tables=tuple(table for table in tables if table.rows),
    )


def validation_section(runs: Sequence[Trace], validation: Validation | None, reason: str) -> Section:
    """Predicted against measured, for the recorded runs themselves; `reason` says why there is no validation."""
    if validation is None:
        return Section(name="validation", title="Predicted against measured", paragraphs=(reason,))
    rows = [
        {
            "run": label,
            "measured_seconds": check.measured_seconds,
            "predicted_seconds": check.predicted_seconds,
            "low_seconds": check.low_seconds,
            "high_seconds": check.high_seconds,
            "error": check.error,
            "epoch_error": sum(abs(epoch.error) for epoch in check.epochs) / len(check.epochs),
            "notes": "; ".join(check.notes),
        }
        for label, check in zip(run_labels(runs), validation.runs, strict=True)
    ]
    shown = ShownFigure(
        name="validation",
        title="Epoch times, predicted and measured.",
        caption=f"Predicted from: {validation.source}; input and loop as in the first epoch. "
        f"{100 * validation.interval_coverage:.0f} % of the epochs lie in their 90 % interval.",
        figure=figures.validation_figure(frames.validation_frame(runs, validation)),
    )
    return Section(
        name="validation",
        title="Predicted against measured",
        paragraphs=(
            "This checks the prediction on the machine that recorded the runs. It says nothing about how well times "
            "carry over to another GPU, or about the network.",
        ),
        figures=(shown,),
        tables=(make_table(specs.VALIDATION, pd.DataFrame(rows)),),
    )
