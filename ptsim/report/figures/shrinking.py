"""What shrank: counts beside the clock, memory and mini-batch, gradients to all-reduce."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from ptsim.report.facts import Facts
from ptsim.report.figures import style
from ptsim.report.figures.registry import ReportFigure


@style.styled
def shrinking_figure(epochs: pd.DataFrame) -> Figure:
    """What shrank and what the clock saw: per-image costs of one run relative to its first epoch.

    Takes `frames.costs_frame` rows of a single run.
    """
    figure, (axes,) = style.panels(1, height_in=3.4)
    first = epochs.iloc[0]
    measured = epochs.step_median_seconds / epochs.batch_per_gpu
    base = first.step_median_seconds / first.batch_per_gpu
    series = {
        "training MACs": (epochs.training_macs_per_image / first.training_macs_per_image, style.COLOURS[1], "-"),
        "BatchNorm traffic": (
            epochs.bn_bytes_per_image / first.bn_bytes_per_image,
            style.COLOURS[3],
            (0, (6, 2, 1.5, 2)),
        ),
        "measured step time": (measured / base, style.COLOURS[2], (0, (3, 1.5))),
    }
    for name, (values, colour, dash) in series.items():
        if values.notna().any():
            axes.plot(epochs.epoch, values, label=name, color=colour, linestyle=dash)
    low = epochs.step_p10_seconds / epochs.batch_per_gpu / base
    high = epochs.step_p90_seconds / epochs.batch_per_gpu / base
    style.band(axes, epochs.epoch, low, high, style.COLOURS[2])
    axes.set(xlabel="epoch", ylabel="per image, first epoch = 100 %", ylim=(0, None))
    style.percent_axis(axes.yaxis)
    style.epoch_axis(axes)
    style.legend_above(axes)
    low_n, high_n = int(epochs.num_iterations.min()), int(epochs.num_iterations.max())
    n = f"{low_n} iterations" if low_n == high_n else f"{low_n} to {high_n} iterations"
    band = "the middle 80 % of an epoch's iterations" if low.notna().any() else "no band: counts"
    return style.finish(figure, epochs, n=f"{n} an epoch", band=band)


@style.styled
def memory_figure(epochs: pd.DataFrame) -> Figure:
    """Peak memory of an iteration, and the per-GPU mini-batch. Takes `frames.costs_frame` or `Facts.epochs`.

    Measured and estimated where the runs were recorded; of planned runs, as projected.
    """
    figure, (top, bottom) = style.panels(2, height_in=4.2)
    columns = ["peak_memory_bytes", "estimated_memory_bytes", "projected_memory_bytes"]
    sizes = epochs.reindex(columns=columns)
    epochs = epochs.assign(**{name: sizes[name] for name in columns})
    factor, unit = style.scale_for(float(sizes.max().max()), "bytes")
    for setting, (colour, dash) in style.run_style(epochs).items():
        rows = epochs[epochs.setting == setting].groupby("epoch", as_index=False).mean(numeric_only=True)
        line = style.dash_style(dash)
        measured = rows.peak_memory_bytes.notna().any()
        if measured:
            label = f"{setting}, measured"
            top.plot(rows.epoch, rows.peak_memory_bytes / factor, color=colour, linestyle=line, label=label)
        made = "estimated" if rows.estimated_memory_bytes.notna().any() else "projected"
        top.plot(
            rows.epoch,
            rows[f"{made}_memory_bytes"] / factor,
            color=colour,
            linewidth=1.0 if measured else 1.7,
            linestyle=":" if measured else line,
            label=f"{setting}, {made}",
        )
        bottom.step(rows.epoch, rows.batch_per_gpu, where="post", color=colour, linestyle=line, label=setting)
    top.set(ylabel=f"peak memory ({unit})", ylim=(0, None))
    bottom.set(ylabel="mini-batch (images)", xlabel="epoch", ylim=(0, None))
    style.epoch_axis(bottom)
    style.legend_above(top)
    return style.finish(figure, epochs, n=style.repeats(epochs), band="no band: the peak of each epoch")


@style.styled
def allreduce_figure(epochs: pd.DataFrame) -> Figure:
    """Gradient bytes that every GPU all-reduces in an epoch. Takes `frames.costs_frame`."""
    figure, (axes,) = style.panels(1, height_in=3.0)
    factor, unit = style.scale_for(float(epochs.allreduce_payload_bytes.max()), "bytes")
    scaled = epochs.assign(allreduce_payload_bytes=epochs.allreduce_payload_bytes / factor)
    style.lines(axes, scaled, "epoch", "allreduce_payload_bytes", drawstyle="steps-post")
    axes.set(xlabel="epoch", ylabel=f"gradients per epoch ({unit})", ylim=(0, None))
    style.legend_above(axes)
    band = style.spread(epochs, otherwise="no band: a count, parameters × 4 B × updates")
    return style.finish(figure, epochs, n=style.repeats(epochs), band=band)


def _course(facts: Facts) -> pd.DataFrame:
    """All epochs; nothing of runs of a single one, which have no course."""
    return facts.epochs if not facts.epochs.empty and facts.epochs.epoch.nunique() > 1 else pd.DataFrame()


def _memory_caption(facts: Facts) -> str:
    epochs = facts.epochs
    kinds = []
    if epochs.peak_memory_bytes.notna().any():
        kinds.append("measured on the recording machine")
    if epochs.estimated_memory_bytes.notna().any():
        kinds.append("estimated for it" if kinds else "estimated for the recording machine")
    if epochs[epochs.estimated_memory_bytes.isna()].projected_memory_bytes.notna().any():
        projector = facts.projector
        kinds.append(f"projected onto {style.gpus(facts.focus)} of {projector.cluster.name} where nothing was recorded")
    return f"Peak memory of an iteration, {' and '.join(kinds)}, and the mini-batch that it belongs to."


SHRINKING = ReportFigure(
    section="costs",
    title="What an image costs.",
    frame=lambda facts: (
        facts.epochs[facts.epochs.run == facts.shown.label]
        if facts.shown.trace.is_pruned and len(facts.shown.trace.epochs) > 1
        else pd.DataFrame()
    ),
    draw=shrinking_figure,
    caption=lambda facts: (
        f"Cost of an image in “{facts.shown.label}”, relative to its first epoch: the count"
        + ("." if facts.shown.trace.is_planned else " and the measurement.")
    ),
)
MEMORY = ReportFigure(
    section="costs",
    title="Memory and mini-batch.",
    frame=_course,
    draw=memory_figure,
    caption=_memory_caption,
)
ALLREDUCE = ReportFigure(
    section="costs",
    title="Gradients to all-reduce.",
    frame=_course,
    draw=allreduce_figure,
    caption=lambda _: "Bytes of gradients in an epoch: fewer parameters, and fewer updates as the mini-batch grows.",
)
