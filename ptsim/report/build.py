"""Which answer, figures and tables a set of recorded runs gets: the report from traces to the written page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ptsim.errors import UsageError
from ptsim.report import figures, frames, page
from ptsim.report.answer import Answer, recorded_answer
from ptsim.report.page import Section, ShownFigure
from ptsim.report.pairs import compare_runs, run_labels
from ptsim.report.tables import make_table
from ptsim.trace.io import Trace, read_trace


def write_report(traces: Sequence[str | Path | Trace], out: str | Path) -> Path:
    """Write the report of recorded runs into the folder `out` and return the page.

    Args:
        traces: recorded runs; dense and pruned ones of the same network and data are compared.
        out: the folder for `index.html`, `figures/` and `tables/`.

    Raises:
        UsageError: no traces, or a folder that cannot be written.
        FileFormatError: a broken trace.
    """
    if not traces:
        raise UsageError("a report needs at least one trace")
    runs = [trace if isinstance(trace, Trace) else read_trace(trace) for trace in traces]
    notices = _notices(runs)
    sections = _recorded_sections(runs)
    html = page.render(
        title=_title(runs),
        byline=_byline(runs),
        answer=_answer(runs, notices),
        sections=sections,
        num_traces=len(runs),
    )
    return page.write(html, sections, Path(out))


def _answer(runs: Sequence[Trace], notices: Sequence[str]) -> Answer:
    return recorded_answer(frames.runs_frame(runs), notices)


def _title(runs: Sequence[Trace]) -> str:
    tasks = list(dict.fromkeys(f"{trace.run.model} on {trace.run.dataset.name}" for trace in runs))
    return f"What it costs to train {tasks[0] if len(tasks) == 1 else f'{len(tasks)} networks'}"


def _byline(runs: Sequence[Trace]) -> str:
    devices = " and ".join(dict.fromkeys(trace.run.device.name for trace in runs))
    dates = sorted(trace.run.created[:10] for trace in runs)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    count = "one run" if len(runs) == 1 else f"{len(runs)} runs"
    return f"From {count} recorded on {devices}, {when}."


def _notices(runs: Sequence[Trace]) -> list[str]:
    notices = []
    for label, trace in zip(run_labels(runs), runs, strict=True):
        planned = trace.run.hyperparameters.get("epochs")
        if not trace.complete:
            of = f" of {planned} planned" if planned else ""
            state = frames.run_state(trace)
            notices.append(f"{label}: {state} after {len(trace.epochs)}{of} epochs; everything here covers those only.")
        elif len(trace.epochs) == 1:
            notices.append(f"{label}: a single epoch, so nothing can be said about how costs change.")
    for comparison in compare_runs(runs):
        notices += [f"{comparison.label}: {note}." for note in comparison.notes]
    return notices


def _recorded_sections(runs: Sequence[Trace]) -> list[Section]:
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
    recorded = make_table(
        "runs",
        frames.runs_frame(runs),
        {
            "run": "run",
            "model": "network",
            "dataset": "data",
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
    )
    tables = [table for table in (recorded, reconfigurations) if table.rows]
    return [Section(name="runs", title="The recorded runs", figures=tuple(shown), tables=tuple(tables))]
