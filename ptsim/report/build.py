"""Which answer, figures and tables a set of recorded runs gets: the report from traces to the written page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd

from ptsim.answers.validate import Validation, validate
from ptsim.costs.memory import usable_bytes
from ptsim.errors import MissingMeasurementError, UsageError
from ptsim.hardware.catalog import check_names, cluster_names, load_cluster, match_device
from ptsim.hardware.profile import DeviceProfile
from ptsim.hardware.profile_file import read_device_profile
from ptsim.hardware.spec import Cluster
from ptsim.report import answer, frames, page
from ptsim.report.answer import Answer, answer_frame
from ptsim.report.facts import Facts
from ptsim.report.page import Section
from ptsim.report.projected import Projector
from ptsim.report.sections import make_sections
from ptsim.setting import whole_numbers
from ptsim.sim.options import Options
from ptsim.trace.io import read_trace
from ptsim.trace.pairs import (
    PACE_TOLERANCE,
    Comparison,
    compare_runs,
    data_name,
    device_name,
    model_name,
    pace,
    run_labels,
    task_of,
)
from ptsim.trace.trace import Trace
from ptsim.units import format_bytes, listed, percent

UNCHECKED = "The prediction could not be checked on the runs themselves; “Predicted against measured” says why."
FALLBACK_CLUSTER = "dgx-a100"  # where nothing is known about the recording device


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A report before it is written: the answer, its tables, and the parts of the page."""

    title: str
    byline: str
    answer: Answer
    planned: bool  # nobody has trained some run of it
    runs: pd.DataFrame
    projections: pd.DataFrame
    savings: pd.DataFrame
    scenarios: pd.DataFrame
    break_even: pd.DataFrame
    sections: tuple[Section, ...]


def write_report(
    traces: Sequence[str | Path | Trace],
    out: str | Path,
    *,
    cluster: str | Path | Cluster | Sequence[str | Path | Cluster] | None = None,
    gpus: Sequence[int] | None = None,
    price_usd_per_gpu_hour: float | None = None,
    grid_grams_per_kwh: float | None = None,
    input_pipeline: str = "none",
    profile: str | Path | DeviceProfile | None = None,
) -> Path:
    """Write the report of recorded runs into the folder `out` and return the page.

        ptsim.write_report(["runs/dense", "runs/pruned"], "report", cluster="dgx-a100", gpus=[1, 8, 64])

    Args:
        traces: recorded runs; dense and pruned ones of the same network and data are compared.
        out: the folder for `index.html`, `figures/` and `tables/`.
        cluster: what the runs are projected onto; None means a catalog cluster of the recording device. Of several, the
            page is about the first one and compares the others with it.
        gpus: cluster sizes; None means powers of two from one GPU to eight nodes.
        price_usd_per_gpu_hour: None means the cluster's; without one, no money is reported.
        grid_grams_per_kwh: CO₂ that a kWh causes; without it, no CO₂ is reported.
        input_pipeline: what reads and decodes the images (`costs.input.pipelines`); "none": input keeps up.
        profile: of `ptsim calibrate gpu`, or its file; for the clusters with the GPU that it was measured on.

    Raises:
        UsageError: no traces, different clusters of one name, a size that the cluster does not have, a profile of a GPU
            that no cluster has, or a folder that cannot be written.
        FileFormatError: a broken trace or cluster file.
        UnknownNameError: no such cluster.
    """
    report = make_report(
        traces,
        cluster=cluster,
        gpus=gpus,
        price_usd_per_gpu_hour=price_usd_per_gpu_hour,
        grid_grams_per_kwh=grid_grams_per_kwh,
        input_pipeline=input_pipeline,
        profile=profile,
    )
    return write(report, out)


def write(report: Report, out: str | Path) -> Path:
    """Write the page, its figures and its tables into the folder `out`; returns the page.

    Raises:
        UsageError: see `write_report`.
    """
    html = page.render(
        title=report.title,
        byline=report.byline,
        answer=report.answer,
        sections=report.sections,
        num_traces=len(report.runs),
        planned=report.planned,
    )
    return page.write(html, report.sections, Path(out), tables={"answer": answer_frame(report.answer)})


def make_report(
    traces: Sequence[str | Path | Trace],
    *,
    cluster: str | Path | Cluster | Sequence[str | Path | Cluster] | None = None,
    gpus: Sequence[int] | None = None,
    price_usd_per_gpu_hour: float | None = None,
    grid_grams_per_kwh: float | None = None,
    input_pipeline: str = "none",
    profile: str | Path | DeviceProfile | None = None,
) -> Report:
    """Everything that the page shows; see `write_report`."""
    if not traces:
        raise UsageError("a report needs at least one trace")
    options = Options(price_usd_per_gpu_hour=price_usd_per_gpu_hour, input=input_pipeline)
    check_assumptions(options, grid_grams_per_kwh)
    runs = [trace if isinstance(trace, Trace) else read_trace(trace) for trace in traces]
    if len({trace.path.resolve() for trace in runs}) < len(runs):
        raise UsageError("the same trace is given twice")
    comparisons = compare_runs(runs)
    notices = _notices(runs, comparisons)
    if not any(trace.epochs for trace in runs):
        facts = Facts(runs, comparisons)
        return _report(facts, answer.recorded_answer(facts.recorded, notices), "")
    given = [cluster] if isinstance(cluster, str | Path | Cluster) else list(cluster or [])
    clusters = [load_cluster(c) for c in given or [default_cluster(runs)]]
    check_names(clusters)
    sizes = _sizes(clusters[0], gpus)
    projectors = _projectors(clusters, options, grid_grams_per_kwh, profile)
    checked = [trace for trace in runs if trace.epochs and not trace.is_planned]
    validation, reason = _validation(checked, stretched=all(trace.is_stretched for trace in runs))
    facts = Facts(
        runs,
        comparisons,
        projectors=projectors,
        sizes=sizes,
        focus=min(sizes, key=lambda size: abs(math.log(size / clusters[0].gpus_per_node))),
        validation=validation,
        unchecked=reason,
    )
    head = _head(facts, notices + _does_not_fit(facts), UNCHECKED if checked else reason)
    names = listed([c.name for c in clusters])
    where = f" Projected onto {names}" + (", because no cluster was named." if not given else ".")
    where += money_sentences(facts.projectors)
    return _report(facts, head, where)


def _head(facts: Facts, notices: Sequence[str], unchecked: str) -> Answer:
    """The answer to what pruning saves, or to what training takes where nothing was pruned."""
    recorded, focus, validation = facts.recorded, facts.focus, facts.validation
    if facts.savings.empty:
        return answer.dense_answer(facts.projections, recorded, focus, validation, notices, unchecked=unchecked)
    return answer.projected_answer(
        facts.savings,
        recorded,
        focus,
        validation,
        notices,
        measured=facts.measured_savings,
        excess=facts.excess,
        unchecked=unchecked,
    )


def _report(facts: Facts, head: Answer, where: str) -> Report:
    projected_ = facts.is_projected
    return Report(
        title=_title(facts.traces),
        byline=_byline(facts.traces) + where,
        answer=head,
        planned=any(trace.is_planned for trace in facts.traces),
        runs=facts.recorded,
        projections=facts.projections if projected_ else pd.DataFrame(),
        savings=facts.savings if projected_ else pd.DataFrame(),
        scenarios=facts.scenarios if projected_ else pd.DataFrame(),
        break_even=facts.break_even if projected_ else pd.DataFrame(),
        sections=make_sections(facts),
    )


def default_cluster(runs: Sequence[Trace]) -> str:
    """A catalog cluster whose GPUs are those of a recorded run, NVIDIA's own first; a DGX A100 where there is none."""
    devices = {device.name for trace in runs if (device := match_device(trace.run.device.name)) is not None}
    names = sorted(cluster_names(), key=lambda name: (not name.startswith("dgx-"), name))
    return next((name for name in names if load_cluster(name).device_name in devices), FALLBACK_CLUSTER)


def _validation(runs: Sequence[Trace], *, stretched: bool) -> tuple[Validation | None, str]:
    """The runs predicted again from their own profiles, or why that cannot be."""
    if not runs:
        length = " at this length" if stretched else ""
        return None, f"Nobody has trained these runs{length}, so there is nothing measured to compare with."
    try:
        return validate(runs), ""
    except MissingMeasurementError as error:
        return None, f"Not possible here: {error.message}."


def _sizes(cluster: Cluster, gpus: Sequence[int] | None) -> list[int]:
    """The asked sizes, sorted; or powers of two up to eight nodes, as far as the cluster goes."""
    if gpus is not None:
        sizes = whole_numbers("gpus", gpus)
        if not sizes or min(sizes) < 1:
            raise UsageError(f"gpus is {','.join(map(str, sizes)) or 'empty'}, expected counts from 1 on")
        return sorted(set(sizes))
    most = cluster.gpus_per_node * min(8, cluster.max_nodes or 8, 8 if cluster.inter else 1)
    return [2**power for power in range(int(math.log2(most)) + 1)]


def _title(runs: Sequence[Trace]) -> str:
    tasks = _tasks(runs)
    networks = len({model_name(trace) for trace in runs})
    several = f"{networks} networks" if networks > 1 else f"{model_name(runs[0])} on {len(tasks)} data sets"
    return f"What it costs to train {tasks[0] if len(tasks) == 1 else several}"


def _tasks(runs: Sequence[Trace]) -> list[str]:
    """Every task by its network and data, in the order of the runs; names may repeat, as with fewer of the images."""
    return list({task_of(trace): f"{model_name(trace)} on {data_name(trace)}" for trace in runs}.values())


def _byline(runs: Sequence[Trace]) -> str:
    trained = [trace for trace in runs if not trace.is_planned]
    stretched = [trace for trace in runs if trace.is_stretched]
    planned = len(runs) - len(trained) - len(stretched)
    dates = sorted(trace.run.created[:10] for trace in runs)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    parts = [f"{_runs(len(trained))} recorded on {_devices(trained)}"] if trained else []
    if stretched:
        parts.append(f"{_runs(len(stretched))} recorded on {_devices(stretched)} and stretched to another length")
    if planned:
        parts.append(f"{_runs(planned)} planned, which nobody has trained")
    return f"From {' and '.join(parts)}, {when}."


def _devices(runs: Sequence[Trace]) -> str:
    return listed(list(dict.fromkeys(device_name(trace) for trace in runs)))


def _runs(count: int) -> str:
    return "one run" if count == 1 else f"{count} runs"


def _notices(runs: Sequence[Trace], comparisons: Sequence[Comparison]) -> list[str]:
    notices = []
    planned_labels = [label for label, trace in zip(run_labels(runs), runs, strict=True) if trace.is_planned]
    if planned_labels:
        which = "all runs" if len(planned_labels) == len(runs) else "; ".join(planned_labels)
        pruned = any(trace.is_planned and trace.is_pruned for trace in runs)
        notices.append(
            f"Planned, not trained: {which}. Accuracy is not known"
            + (", and how the pruned ones shrink is assumed." if pruned else ".")
        )
    tasks = _tasks(runs)
    if len(tasks) > 1:
        notices.append(
            f"This page holds runs of {len(tasks)} tasks; its head is about one of them, the tables show all."
        )
    notices += [
        f"{label}: recorded on {device_name(trace)}, here with {trace.run.assumed[-1].what}."
        for label, trace in zip(run_labels(runs), runs, strict=True)
        if trace.is_stretched
    ]
    for label, trace in zip(run_labels(runs), runs, strict=True):
        planned = trace.planned_epochs
        if not trace.complete:
            of = f" of {planned} planned" if planned else ""
            state = frames.run_state(trace)
            notices.append(f"{label}: {state} after {len(trace.epochs)}{of} epochs; everything here covers those only.")
        elif len(trace.epochs) == 1:
            notices.append(f"{label}: a single epoch, so nothing can be said about how costs change.")
    for comparison in comparisons:
        if not comparison.shrank:
            notices.append(
                f"{comparison.label}: every epoch trained the same network, so pruning could save no training time."
            )
        notices += [f"{comparison.label}: {text}." for text in _collapses(comparison)]
        notices += [f"{comparison.label}: {note}." for note in comparison.notes]
        speed = pace(comparison)
        if speed is not None and abs(speed - 1) > PACE_TOLERANCE:
            notices.append(
                f"{comparison.label}: the same unpruned network took {percent(abs(speed - 1))} "
                f"{'less' if speed < 1 else 'more'} time in this run than in {comparison.baseline_label}, so the "
                "machine ran at another speed: their measured times cannot be compared."
            )
    return notices


_HARDLY = 0.05  # of what lies between guessing and knowing, in accuracy


def check_assumptions(options: Options, grid_grams_per_kwh: float | None) -> None:
    """Refuse what no projection can be made with, before anything is read or trained.

    Raises:
        UsageError: an option out of its bounds, or CO₂ of a kWh that is negative or not finite.
    """
    options.check()
    if grid_grams_per_kwh is not None and not 0 <= grid_grams_per_kwh < math.inf:
        raise UsageError(f"grid intensity is {grid_grams_per_kwh:g} g per kWh, expected a number from 0 on")


def _projectors(
    clusters: Sequence[Cluster],
    options: Options,
    grid_grams_per_kwh: float | None,
    profile: str | Path | DeviceProfile | None,
) -> list[Projector]:
    measured = read_device_profile(profile) if isinstance(profile, str | Path) else profile
    made = [Projector(c, options, grid_grams_per_kwh=grid_grams_per_kwh, device_profile=measured) for c in clusters]
    if measured is not None and not any(projector.device_profile for projector in made):
        names = listed(list(dict.fromkeys(projector.device.name for projector in made)))
        raise UsageError(f"the device profile was measured on {measured.device!r}, and the clusters have {names}")
    return made


def _collapses(comparison: Comparison) -> Iterator[str]:
    """How little is left of a pruned run's network, or how little it knows, where it is too little to be of use."""
    pruned, dense = comparison.pruned, comparison.baseline
    left = pruned.final_network.forward_macs / max(1, pruned.network_of(pruned.epochs[0]).forward_macs)
    if left < 0.01:
        yield f"its last network has {percent(left)} of the inference MACs of its first; hardly anything is left of it"
    if pruned.final_accuracy is not None and _guesses(pruned):
        said = (
            f"with an accuracy of {percent(pruned.final_accuracy)} its network hardly does better than guessing, so "
            "what it saves is of no use"
        )
        if dense.final_accuracy is not None and _guesses(dense):
            said += f". The dense run, with {percent(dense.final_accuracy)}, guesses too: pruning is not to blame"
        yield said


def _guesses(trace: Trace) -> bool:
    """Whether the trained network hardly does better than guessing; False where that cannot be told."""
    accuracy, classes = trace.final_accuracy, trace.run.dataset.num_classes
    if accuracy is None or classes < 2:
        return False
    chance = 1 / classes
    return accuracy < chance + _HARDLY * (1 - chance)


def money_sentences(projectors: Sequence[Projector]) -> str:
    """Whose prices the money of the page is at, and where there is none, cluster by cluster."""
    if projectors[0].options.price_usd_per_gpu_hour is not None:
        return " Money is at the price that was given."
    at_list: list[str] = []
    own: list[str] = []
    unknown: list[str] = []
    for projector in projectors:
        price = projector.price
        (unknown if price is None else own if price.date is None else at_list).append(projector.cluster.name)
    if len(unknown) == len(projectors):
        return " What a GPU-hour costs there is not known, so no money is shown; a price can be given."
    said = ""
    if at_list:
        said += f" Money{_on(at_list, projectors)} is at a list price, whose day stands beside it"
        said += "; a price of your own can be given."
    if own:
        said += f" Money{_on(own, projectors)} is at the price that the cluster's file gives."
    if unknown:
        said += f" No price of a GPU-hour is known for {listed(unknown)}."
    return said


def _on(names: Sequence[str], projectors: Sequence[Projector]) -> str:
    """On which clusters, where it does not hold of all."""
    return "" if len(names) == len(projectors) else f" on {listed(names)}"


def _does_not_fit(facts: Facts) -> list[str]:
    """Which runs need more memory than a GPU of the page's cluster has."""
    projector, notices = facts.projector, []
    usable = usable_bytes(projector.device)
    for run in facts.labelled:
        needed = max(epoch.needed_memory_bytes for epoch in projector.run(run.trace, facts.focus).epochs)
        if needed > usable:
            notices.append(
                f"{run.label}: a step needs up to {format_bytes(needed)}, and a process on the {projector.device.name} "
                f"can have {format_bytes(usable)}: it would not fit."
            )
    return notices


def summary(report: Report) -> dict[str, Any]:
    """The answer and its tables as plain values, for `--json`; what is unknown is None."""

    def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
        return [
            {str(name): None if pd.isna(value) else value for name, value in row.items()}
            for row in frame.astype(object).to_dict(orient="records")
        ]

    return {
        "headline": report.answer.headline,
        "certainty": report.answer.certainty,
        "why": list(report.answer.why),
        "notices": list(report.answer.notices),
        "answer": records(answer_frame(report.answer)),
        "runs": records(report.runs),
        "projections": records(report.projections),
        "savings": records(report.savings),
        "scenarios": records(report.scenarios),
        "break_even": records(report.break_even),
        "tables": {table.name: records(table.frame) for section in report.sections for table in section.tables},
    }
