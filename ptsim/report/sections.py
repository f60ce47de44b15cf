"""Which parts the page has, and what each shows: the figures that are registered for it, and its tables."""

from __future__ import annotations

import msgspec
import pandas as pd

from ptsim.costs.kernels import LOADED_HALVES
from ptsim.report import frames, projected, scenarios, specs
from ptsim.report.facts import Facts
from ptsim.report.figures.registry import figures_of
from ptsim.report.figures.style import describe_setting
from ptsim.report.figures.style import gpus as describe_gpus
from ptsim.report.figures.time import visible_parts
from ptsim.report.methods import assumptions_table, methods_facts
from ptsim.report.page import Section, ShownFigure
from ptsim.report.tables import Table, TableSpec, make_table
from ptsim.trace.pairs import run_labels


def make_sections(facts: Facts) -> tuple[Section, ...]:
    """All parts of the page, in their order; of a report that projects nothing only what was recorded."""
    if not facts.is_projected:
        return runs_section(facts), methods_section(facts)
    return (
        time_section(facts),
        scenarios_section(facts),
        scaling_section(facts),
        layers_section(facts),
        costs_section(facts),
        runs_section(facts),
        validation_section(facts),
        Section(name="assumptions", title="What the numbers rest on", tables=(assumptions_table(facts),)),
        methods_section(facts),
    )


def shown_figures(section: str, facts: Facts) -> tuple[ShownFigure, ...]:
    """The registered figures of a section that have something to show."""
    return tuple(
        ShownFigure(
            name=name, title=figure.title, caption=figure.caption(facts), figure=figure.draw(frame), frame=frame
        )
        for name, figure, frame in figures_of(section, facts)
    )


def time_section(facts: Facts) -> Section:
    """Where the time goes: by kind of work and by cluster size of all runs, by epoch of the shown one."""
    breakdown = facts.breakdown
    wide = breakdown.pivot_table(
        index=["run", "gpus", "tier"], columns="part", values="seconds", sort=False
    ).reset_index()
    wide.columns = [name if name in ("run", "gpus", "tier") else f"{name}_seconds" for name in wide.columns]
    columns = {f"{part}_seconds": part for part in visible_parts(breakdown)}
    spec = TableSpec(
        name="breakdown",
        title="Time by kind of work.",
        caption="Expected time of the whole run, without an interval; communication that computation hides is not "
        "counted.",
        headings={"run": "run", "gpus": "GPUs", **columns, "tier": "times from"},
        together=(tuple(columns),),
        folded=True,
    )
    tables = [make_table(spec, wide)]
    if not facts.excess.empty:
        tables.append(make_table(specs.EXCESS, facts.excess))
    return Section(name="time", title="Where the time goes", figures=shown_figures("time", facts), tables=tuple(tables))


def scenarios_section(facts: Facts) -> Section:
    """Every run on every cluster side by side, and from where on pruning pays."""
    caption = specs.SCENARIOS.caption
    priced = facts.scenarios[facts.scenarios.price != ""].drop_duplicates("cluster")
    if len(facts.projectors) > 1 and not priced.empty:
        if facts.projector.options.price_usd_per_gpu_hour is not None:
            caption += f" The given price of {facts.projector.price} holds on every cluster."
        else:
            caption += f" Prices: {'; '.join(f'{row.cluster} {row.price}' for row in priced.itertuples())}."
    if facts.scenarios.run.str.endswith(scenarios.DYNAMIC).any():
        caption += (
            " A dynamic mini-batch fills the GPU's memory from the first reconfiguration on. A dense run could have a "
            "larger mini-batch too: not all that it saves is due to pruning."
        )
    if facts.scenarios.run.str.endswith(scenarios.ROUNDED).any():
        caption += (
            " In half precision, convolutions copy tensors whose channels are no multiple of "
            f"{LOADED_HALVES}, to pad them; the setting channel_multiple keeps as many channels as fill multiples."
        )
    spec = _without(specs.SCENARIOS, "epochs") if facts.scenarios.epochs.nunique() == 1 else specs.SCENARIOS
    tables = [make_table(spec, facts.scenarios, caption=caption)]
    sentences: tuple[str, ...] = ()
    if not facts.break_even.empty:
        sentences = tuple(scenarios.break_even_sentences(facts.break_even))
        tables.append(make_table(specs.BREAK_EVEN, facts.break_even))
    return Section(
        name="scenarios",
        title="What else one could do",
        paragraphs=sentences,
        figures=shown_figures("scenarios", facts),
        tables=tuple(tables),
    )


def scaling_section(facts: Facts) -> Section:
    """Whole runs over cluster sizes, and what pruning saves there."""
    alike = facts.projections.epochs.nunique() == 1
    spec = _without(specs.PROJECTIONS, "epochs") if alike else specs.PROJECTIONS
    tables = [make_table(spec, facts.projections)]
    if not facts.savings.empty:
        tables.append(make_table(specs.SAVINGS, facts.savings))
    if facts.projections[["energy_joules", "cost_usd"]].notna().any(axis=None):
        money, price = "", facts.projector.price
        if price is not None:
            billings = filter(None, (price.billing(size) for size in facts.sizes))
            money = f" Money is at {': '.join(filter(None, (str(price), ', '.join(billings))))}."
        tables.append(make_table(specs.ENERGY, facts.projections, caption=specs.ENERGY.caption + money))
        if not facts.savings.empty:
            caption = specs.SAVED_ENERGY.caption + money
            tables.append(make_table(specs.SAVED_ENERGY, facts.savings, caption=caption))
    return Section(
        name="scaling",
        title="Over cluster sizes",
        figures=shown_figures("scaling", facts),
        tables=tuple(tables),
    )


def _without(spec: TableSpec, name: str) -> TableSpec:
    """The same table without a column that says nothing here; its file has it all the same."""
    return msgspec.structs.replace(spec, headings={key: text for key, text in spec.headings.items() if key != name})


def layers_section(facts: Facts) -> Section:
    """Where the layers' time goes, in the first and the last architecture of the shown run."""
    caption = f"{describe_setting(facts.layers)}; forward and backward together, without an interval."
    table = make_table(specs.LAYERS, projected.first_and_last_layers(facts.layers), caption=caption)
    return Section(name="layers", title="By layer and epoch", figures=shown_figures("layers", facts), tables=(table,))


def costs_section(facts: Facts) -> Section:
    """What shrank: memory and all-reduced bytes of all runs; MACs, traffic and the clock of the shown one."""
    caption = (
        f"{describe_setting(facts.epochs)}. Counted from the architecture where it does not say measured. Projected "
        f"memory is that of a GPU of {facts.projector.cluster.name} when {describe_gpus(facts.focus)} train."
    )
    trained = frames.trained_architectures(facts.epochs)
    spec = specs.ARCHITECTURES if (trained.passes > 1).any() else _without(specs.ARCHITECTURES, "passes")
    if trained.num_gpus.nunique() == 1:
        spec = _without(spec, "num_gpus")
    table = make_table(spec, trained, caption=caption)
    return Section(name="costs", title="What shrank", figures=shown_figures("costs", facts), tables=(table,))


def runs_section(facts: Facts) -> Section:
    """What was recorded: accuracy, sizes, reconfigurations, and what pruning saved on the spot."""
    planned = [trace.is_planned for trace in facts.traces]
    which = "planned" if all(planned) else "recorded and the planned" if any(planned) else "recorded"
    title = f"The {which} runs"
    unmeasured = "Nobody has trained them: nothing here is measured." if all(planned) else None
    table = facts.recorded
    same = [name for name in ("model", "dataset", "seed") if table[name].nunique() == 1]
    tables: tuple[Table, ...] = (
        make_table(specs.MEASURED_SAVINGS, facts.measured_savings),
        make_table(
            msgspec.structs.replace(specs.RUNS, title=f"{title}."), table.drop(columns=same), caption=unmeasured
        ),
        make_table(
            specs.RECONFIGURATIONS,
            frames.reconfigurations_frame(facts.traces),
            caption="What every shrinking would remove." if all(planned) else None,
            folded=len(facts.traces) > 1,
        ),
    )
    return Section(
        name="runs",
        title=title,
        figures=shown_figures("runs", facts),
        tables=tuple(table for table in tables if table.rows),
    )


def validation_section(facts: Facts) -> Section:
    """Predicted against measured, for the recorded runs themselves, or why that cannot be."""
    name, title = "validation", "Predicted against measured"
    if facts.validation is None:
        return Section(name=name, title=title, paragraphs=(facts.unchecked,))
    rows = [
        {
            "run": label,
            "measured_seconds": check.measured_seconds,
            "predicted_seconds": check.predicted_seconds,
            "low_seconds": check.low_seconds,
            "high_seconds": check.high_seconds,
            "error": check.error,
            "epoch_error": sum(abs(epoch.error) for epoch in check.epochs) / len(check.epochs),
            "inside_fraction": sum(epoch.inside for epoch in check.epochs) / len(check.epochs),
            "notes": "; ".join(check.notes),
        }
        for label, check in zip(run_labels(facts.trained), facts.validation.runs, strict=True)
    ]
    tables = [make_table(specs.VALIDATION, pd.DataFrame(rows))]
    label = {check.trace: run for check, run in zip(facts.validation.runs, run_labels(facts.trained), strict=True)}
    if facts.validation.savings:
        frame = pd.DataFrame([msgspec.structs.asdict(saving) for saving in facts.validation.savings])
        frame = frame.assign(dense=frame.dense.map(label), pruned=frame.pruned.map(label))
        tables.append(make_table(specs.SAVINGS_CHECKED, frame))
    return Section(
        name=name,
        title=title,
        paragraphs=(
            "This checks the prediction on the machine that recorded the runs. It says nothing about how well times "
            "carry over to another GPU, or about the network.",
        ),
        figures=shown_figures("validation", facts),
        tables=tuple(tables),
    )


def methods_section(facts: Facts) -> Section:
    """How the runs were made, from their own first records."""
    return Section(name="methods", title="Methods", facts=methods_facts(facts.traces))
