"""How the report's tables look as figures: each function takes one tidy frame of `frames` and returns a Figure.

Every figure says at its foot what hardware it is about, which mini-batch, how many observations and what the band
is. Colours are Okabe and Ito's, chosen for colour-blind readers and told apart by lightness in print; runs also differ
by dash. Nothing here touches matplotlib's global state.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Sequence
from typing import ParamSpec

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from ptsim.report.projected import block_of
from ptsim.units import format_count

WIDTH_IN = 4.7  # two columns at 1280 px, one at 400 px, and 9 pt text legible in both
COLOURS = ("#4d4d4d", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ((5, 2), "", (2, 1.5), (6, 2, 1.5, 2), (1, 1), (8, 3), (4, 1, 1, 1))

# In the order in which they are stacked; neighbours differ in lightness.
PART_COLOURS = {
    "convolutions and linear layers": "#0072B2",
    "memory-bound layers": "#8CC8EC",
    "optimizer and regulariser": "#009E73",
    "exposed communication": "#D55E00",
    "input wait": "#F0E442",
    "start and reconfiguration": "#222222",
    "loss and host gaps": "#BBBBBB",
    "other": "#E6E6E6",
}

_STYLE = {
    **sns.axes_style("ticks"),
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib, so a report looks the same everywhere
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.linewidth": 0.7,
    "axes.edgecolor": "#666666",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.7,
    "svg.fonttype": "path",
    "hatch.linewidth": 0.6,
}

P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorator: `draw` runs under the report's style and leaves matplotlib's settings as they were."""

    @functools.wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return wrapped


def run_style(frame: pd.DataFrame) -> dict[str, tuple[str, object]]:
    """A colour and a dash for every setting of a frame with `setting` and `pruned`; dense ones are grey and dashed."""
    settings = frame.drop_duplicates("setting")
    dense, pruned = settings[~settings.pruned].setting, settings[settings.pruned].setting
    style: dict[str, tuple[str, object]] = {}
    for i, name in enumerate(dense):
        style[name] = ("#4d4d4d", "#8c8c8c", "#b3b3b3")[i % 3], DASHES[0]
    for i, name in enumerate(pruned):
        style[name] = COLOURS[1 + i % (len(COLOURS) - 1)], DASHES[1 + i % (len(DASHES) - 1)]
    return style


def repeats(frame: pd.DataFrame) -> str:
    """How many runs are behind a line of a frame with `run` and `setting`, or with `num_runs`."""
    runs = frame.num_runs if "num_runs" in frame else frame.groupby("setting").run.nunique()
    low, high = int(runs.min()), int(runs.max())
    if high == 1:
        return "1 run per line"
    return f"{low} runs per line, mean" if low == high else f"{low} to {high} runs per line, mean"


def spread(frame: pd.DataFrame, *, otherwise: str = "no band: single runs") -> str:
    """What the band of `lines` is: the repeats' range where there are any."""
    return "lowest to highest of the repeats" if frame.groupby("setting").run.nunique().max() > 1 else otherwise


@styled
def accuracy_figure(epochs: pd.DataFrame) -> Figure:
    """Validation accuracy and channel sparsity over epochs, a line per run. Takes `frames.epochs_frame`."""
    figure, (top, bottom) = panels(2, height_in=4.0)
    for axes, column, label in (
        (top, "validation_accuracy", "validation accuracy"),
        (bottom, "channel_sparsity", "channel sparsity"),
    ):
        lines(axes, epochs, "epoch", column)
        axes.set(ylabel=label, xlabel="")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("epoch")
    legend_above(top)
    return finish(figure, epochs, n=repeats(epochs), band=spread(epochs))


@styled
def shrinking_figure(epochs: pd.DataFrame) -> Figure:
    """What shrank and what the clock saw: per-image costs of one run relative to its first epoch.

    Takes `frames.costs_frame` rows of a single run.
    """
    figure, (axes,) = panels(1, height_in=3.4)
    first = epochs.iloc[0]
    measured = epochs.step_median_seconds / epochs.batch_per_gpu
    base = first.step_median_seconds / first.batch_per_gpu
    series = {
        "training MACs": (epochs.training_macs_per_image / first.training_macs_per_image, COLOURS[1], "-"),
        "BatchNorm traffic": (epochs.bn_bytes_per_image / first.bn_bytes_per_image, COLOURS[3], (0, (6, 2, 1.5, 2))),
        "measured step time": (measured / base, COLOURS[2], (0, (3, 1.5))),
    }
    for name, (values, colour, dash) in series.items():
        if values.notna().any():
            axes.plot(epochs.epoch, values, label=name, color=colour, linestyle=dash)
    low = epochs.step_p10_seconds / epochs.batch_per_gpu / base
    high = epochs.step_p90_seconds / epochs.batch_per_gpu / base
    axes.fill_between(epochs.epoch, low, high, color=COLOURS[2], alpha=0.18, linewidth=0)
    axes.set(xlabel="epoch", ylabel="per image, first epoch = 100 %", ylim=(0, None))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(axes)
    low_n, high_n = int(epochs.num_iterations.min()), int(epochs.num_iterations.max())
    n = f"{low_n} iterations" if low_n == high_n else f"{low_n} to {high_n} iterations"
    return finish(figure, epochs, n=f"{n} an epoch", band="10th to 90th percentile of an epoch's iterations")


@styled
def memory_figure(epochs: pd.DataFrame) -> Figure:
    """Peak memory of an iteration, measured and estimated, and the per-GPU mini-batch. Takes `frames.costs_frame`."""
    figure, (top, bottom) = panels(2, height_in=4.2)
    columns = ["peak_memory_bytes", "estimated_memory_bytes"]
    factor, unit = _scale(float(epochs[columns].max().max()), BYTE_SCALES)
    for setting, (colour, dash) in run_style(epochs).items():
        rows = epochs[epochs.setting == setting].groupby("epoch", as_index=False).mean(numeric_only=True)
        line = _dash(dash)
        measured = rows.peak_memory_bytes.notna().any()
        if measured:
            label = f"{setting}, measured"
            top.plot(rows.epoch, rows.peak_memory_bytes / factor, color=colour, linestyle=line, label=label)
        top.plot(
            rows.epoch,
            rows.estimated_memory_bytes / factor,
            color=colour,
            linewidth=1.0 if measured else 1.7,
            linestyle=":" if measured else line,
            label=f"{setting}, estimated",
        )
        bottom.step(rows.epoch, rows.batch_per_gpu, where="post", color=colour, linestyle=line, label=setting)
    top.set(ylabel=f"peak memory ({unit})", ylim=(0, None))
    bottom.set(ylabel="mini-batch (images)", xlabel="epoch", ylim=(0, None))
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(top)
    return finish(figure, epochs, n=repeats(epochs), band="no band: the peak of each epoch")


@styled
def allreduce_figure(epochs: pd.DataFrame) -> Figure:
    """Gradient bytes that every GPU all-reduces in an epoch. Takes `frames.costs_frame`."""
    figure, (axes,) = panels(1, height_in=3.0)
    factor, unit = _scale(float(epochs.allreduce_payload_bytes.max()), BYTE_SCALES)
    scaled = epochs.assign(allreduce_payload_bytes=epochs.allreduce_payload_bytes / factor)
    lines(axes, scaled, "epoch", "allreduce_payload_bytes", drawstyle="steps-post")
    axes.set(xlabel="epoch", ylabel=f"gradients per epoch ({unit})", ylim=(0, None))
    legend_above(axes)
    band = spread(epochs, otherwise="no band: a count, parameters × 4 B × updates")
    return finish(figure, epochs, n=repeats(epochs), band=band)


@styled
def scaling_figure(projections: pd.DataFrame) -> Figure:
    """Whole-run time over cluster sizes, a line and a band per setting.

    Takes `projected.projections_frame`, averaged over repeats.
    """
    figure, (axes,) = panels(1, height_in=3.5)
    sizes = sorted(projections.gpus.unique())
    factor, unit = _scale(float(projections.total_seconds.median()), TIME_SCALES)
    for setting, (colour, dash) in run_style(projections).items():
        rows = projections[projections.setting == setting].sort_values("gpus")
        axes.fill_between(
            rows.gpus, rows.low_seconds / factor, rows.high_seconds / factor, color=colour, alpha=0.16, lw=0
        )
        axes.plot(
            rows.gpus, rows.total_seconds / factor, color=colour, linestyle=_dash(dash), marker="o", ms=4, label=setting
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _plain_log_axes(axes, sizes)
    axes.set(xlabel="GPUs", ylabel=f"whole run ({unit})")
    legend_above(axes)
    return finish(figure, projections, n=repeats(projections), band="90 % interval of the projection")


@styled
def saving_figure(savings: pd.DataFrame) -> Figure:
    """Share of the dense time that pruning saves, over cluster sizes.

    Takes `projected.savings_frame`, averaged over repeats.
    """
    figure, (axes,) = panels(1, height_in=3.2)
    for setting, (colour, dash) in run_style(savings).items():
        rows = savings[savings.setting == setting].sort_values("gpus")
        axes.fill_between(rows.gpus, rows.saved_fraction_low, rows.saved_fraction_high, color=colour, alpha=0.16, lw=0)
        axes.plot(rows.gpus, rows.saved_fraction, color=colour, linestyle=_dash(dash), marker="o", ms=4, label=setting)
    axes.axhline(0, color="#666666", linewidth=0.7)
    axes.set_xscale("log", base=2)
    _plain_log_axes(axes, sorted(savings.gpus.unique()))
    axes.set(xlabel="GPUs", ylabel="time saved against dense")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    legend_above(axes)
    return finish(
        figure,
        savings,
        n=repeats(savings).replace("run", "pair"),
        band="90 % interval of the saving",
    )


@styled
def breakdown_figure(breakdown: pd.DataFrame) -> Figure:
    """Where the time goes, per setting and cluster size, in shares of the first setting's time at that size.

    Takes `projected.breakdown_frame`, averaged over repeats. The first setting of the frame is the reference (100 %).
    """
    settings = list(dict.fromkeys(breakdown.setting))
    sizes = sorted(breakdown.gpus.unique())
    figure, (axes,) = panels(1, height_in=1.5 + 0.34 * len(settings) * len(sizes))
    totals = breakdown.groupby(["gpus", "setting"]).seconds.sum()
    labels, position = [], 0.0
    for size in sizes:
        reference = totals[(size, settings[0])]
        for setting in settings:
            left = 0.0
            rows = breakdown[(breakdown.setting == setting) & (breakdown.gpus == size)].set_index("part").seconds
            for part, colour in PART_COLOURS.items():
                share = float(rows.get(part, 0.0)) / reference
                axes.barh(position, share, left=left, height=0.8, color=colour, edgecolor="white", linewidth=0.5)
                left += share
            axes.text(left + 0.01, position, f"{100 * left:.0f} %", va="center", fontsize=8, color="#333333")
            labels.append((position, f"{setting}, {gpus(size)}"))
            position += 1
        position += 0.5
    axes.set_yticks([p for p, _ in labels], [textwrap.fill(text, 26) for _, text in labels])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel=f"share of the time of “{settings[0]}” on as many GPUs")
    axes.set_xlim(0, axes.get_xlim()[1] * 1.08)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    _part_legend(figure, visible_parts(breakdown))
    n = repeats(breakdown).replace("line", "bar")
    return finish(figure, breakdown, n=n, band="no band: expected values")


@styled
def epoch_breakdown_figure(breakdown: pd.DataFrame) -> Figure:
    """Where one run's time goes, epoch by epoch. Takes `frames.epoch_breakdown_frame` of one run and cluster size."""
    figure, (axes,) = panels(1, height_in=3.6)
    wide = breakdown.pivot_table(index="epoch", columns="part", values="seconds", aggfunc="sum").fillna(0.0)
    parts = visible_parts(breakdown)
    scale, unit = _scale(float(wide.sum(axis=1).max()), TIME_SCALES)
    axes.stackplot(
        wide.index,
        *(wide[part] / scale for part in parts),
        colors=[PART_COLOURS[part] for part in parts],
        step="mid",
        edgecolor="white",
        linewidth=0.3,
    )
    axes.set(xlabel="epoch", ylabel=f"time per epoch ({unit})", ylim=(0, None), xlim=(wide.index[0], wide.index[-1]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _part_legend(figure, parts)
    return finish(figure, breakdown, n="1 recorded run", band="no band: expected values")


@styled
def layers_figure(layers: pd.DataFrame, *, count: int = 16) -> Figure:
    """The `count` most expensive layers: time of one image in the first and in the last architecture.

    Takes `frames.layers_frame` of one run. A layer that has gone has no second bar.
    """
    first, last = layers.epoch.min(), layers.epoch.max()
    costly = set(layers.groupby("layer").seconds_per_image.max().nlargest(count).index)
    names = [name for name in dict.fromkeys(layers.layer) if name in costly]  # in forward order
    figure, (axes,) = panels(1, height_in=1.5 + 0.3 * len(names))
    scale, unit = _scale(float(layers.seconds_per_image.max()), TIME_SCALES)
    width = 0.8 if first == last else 0.4
    for offset, (epoch, colour, hatch) in enumerate(((first, "#9a9a9a", ""), (last, COLOURS[1], "///"))):
        if offset == 1 and first == last:
            break
        rows = layers[layers.epoch == epoch].set_index("layer").seconds_per_image
        values = [float(rows.get(name, 0.0)) / scale for name in names]
        positions = [i + (offset - 0.5) * width if first != last else i for i in range(len(names))]
        axes.barh(
            positions, values, height=width, color=colour, hatch=hatch, edgecolor="white", label=f"epoch {int(epoch)}"
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel=f"forward and backward per image ({unit})")
    legend_above(axes)
    share = layers[layers.layer.isin(names)].seconds_per_image.sum() / layers.seconds_per_image.sum()
    return finish(
        figure,
        layers,
        n=f"{len(names)} of {layers.layer.nunique()} layers, {100 * share:.0f} % of the layers' time",
        band="no band: expected values",
    )


@styled
def blocks_figure(layers: pd.DataFrame, *, most: int = 40) -> Figure:
    """Time per image of every block of layers over epochs, as a map. Takes `frames.layers_frame` of one run.

    The `most` costliest blocks (`projected.block_of`) are shown; one that has been removed is left white.
    """
    blocks = layers.assign(block=layers.layer.map(block_of))
    table = blocks.pivot_table(index="block", columns="epoch", values="seconds_per_image", aggfunc="sum", sort=False)
    kept = set(table.max(axis=1).nlargest(most).index)
    table = table.loc[[block for block in table.index if block in kept]]
    figure, (axes,) = panels(1, height_in=1.2 + 0.19 * len(table))
    scale, unit = _scale(float(table.max().max()), TIME_SCALES)
    sns.heatmap(
        table / scale,
        ax=axes,
        cmap="cividis_r",
        vmin=0,
        cbar_kws={"label": f"forward and backward per image ({unit})", "shrink": 0.8, "pad": 0.02},
        linewidths=0.3 if table.shape[1] <= 40 else 0,
        rasterized=table.size > 2000,
    )
    every = -(-table.shape[1] // 8)
    numbers = [str(epoch) for epoch in table.columns]
    axes.set_xticks([i + 0.5 for i in range(0, len(numbers), every)], numbers[::every], rotation=0)
    axes.set_yticks([i + 0.5 for i in range(len(table))], list(table.index), fontsize=7.5, rotation=0)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.set(xlabel="epoch", ylabel="")
    return finish(figure, layers, n=f"{len(table)} blocks of one run", band="no band: expected values")


@styled
def validation_figure(epochs: pd.DataFrame) -> Figure:
    """Predicted against measured epoch time. Takes a frame with run, epoch, predicted_ and measured_seconds."""
    figure, (axes,) = panels(1, height_in=3.2)
    scale, unit = _scale(float(epochs.measured_seconds.max()), TIME_SCALES)
    for setting, (colour, _) in run_style(epochs).items():
        group = epochs[epochs.setting == setting]
        label = f"{setting}, measured"
        axes.plot(group.epoch, group.measured_seconds / scale, color=colour, label=label, lw=0, marker="o", ms=3)
        for number, (_, rows) in enumerate(group.groupby("run", sort=False)):
            label = "" if number else f"{setting}, predicted"
            axes.plot(rows.epoch, rows.predicted_seconds / scale, color=colour, label=label)
            low, high = rows.low_seconds / scale, rows.high_seconds / scale
            axes.fill_between(rows.epoch, low, high, color=colour, alpha=0.16, lw=0)
    axes.set(xlabel="epoch", ylabel=f"time per epoch ({unit})", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(axes)
    return finish(figure, epochs, n=f"{len(epochs)} epochs", band="90 % interval of the prediction")


@styled
def tradeoff_figure(savings: pd.DataFrame) -> Figure:
    """What pruning costs in accuracy and leaves of time and MACs. Takes `frames.measured_savings_frame`.

    A point per run; the time is against the run's own first epochs, so that a machine that changed its speed between
    the dense and the pruned run does not shift it.
    """
    figure, (axes,) = panels(1, height_in=3.4)
    for setting, (colour, _) in run_style(savings).items():
        rows = savings[savings.setting == setting]
        change = 100 * rows.accuracy_change
        axes.plot(100 * rows.own_start_fraction, change, "o", ms=6, color=colour, label=f"{setting}, time")
        axes.plot(
            100 * rows.training_macs_fraction, change, "o", ms=6, mfc="white", color=colour, label=f"{setting}, MACs"
        )
    axes.axhline(0, color="#666666", linewidth=0.7)
    axes.axvline(100, color="#666666", linewidth=0.7)
    axes.set(xlabel="left of dense (%)", ylabel="accuracy change (points)")
    legend_above(axes)
    return finish(figure, savings, n="1 run per point", band="no band: single runs")


def visible_parts(breakdown: pd.DataFrame) -> list[str]:
    """The parts of the time that make up at least a thousandth anywhere, in stacking order."""
    groups = [name for name in ("run", "gpus", "epoch") if name in breakdown]
    share = breakdown.seconds / breakdown.groupby(groups).seconds.transform("sum")
    seen = set(breakdown[share >= 1e-3].part)
    return [part for part in PART_COLOURS if part in seen]


def panels(count: int, *, height_in: float) -> tuple[Figure, list[Axes]]:
    """A figure of the report's width with panels above each other that share their horizontal axis."""
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    return figure, list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])


def lines(axes: Axes, frame: pd.DataFrame, x: str, y: str, **options: object) -> None:
    """A line per setting: the mean of its runs, and their range where there are several.

    The legend is left to `legend_above`.
    """
    style = run_style(frame)
    several = frame.groupby("setting").run.nunique().max() > 1
    sns.lineplot(
        frame,
        x=x,
        y=y,
        hue="setting",
        style="setting",
        palette={name: colour for name, (colour, _) in style.items()},
        dashes={name: dash for name, (_, dash) in style.items()},
        hue_order=list(style),
        style_order=list(style),
        errorbar=("pi", 100) if several else None,
        ax=axes,
        **options,
    )
    axes.legend_ = None
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _dash(dash: object) -> object:
    return "-" if dash == "" else (0, dash)


def legend_above(axes: Axes) -> None:
    """What is labelled in `axes`, in a legend above the whole figure."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        column_in = 0.6 + 0.072 * max(map(len, labels))  # the line and its gaps, and letters of 8.5 points
        columns = max(1, min(len(labels), 3, int(WIDTH_IN / column_in)))
        rows = -(-len(labels) // columns)
        figure = axes.get_figure(root=True)
        assert figure is not None, "axes are drawn on a figure"
        figure.set_figheight(figure.get_figheight() + 0.19 * max(0, rows - 2))  # figures have room for two
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=2.6, borderaxespad=0.2)


def _part_legend(figure: Figure, parts: Sequence[str]) -> None:
    handles = [
        mpl.patches.Patch(facecolor=PART_COLOURS[part], edgecolor="#888888", lw=0.4, label=part) for part in parts
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, handlelength=1.2, borderaxespad=0.2)


def _plain_log_axes(axes: Axes, sizes: Sequence[int]) -> None:
    shown = list(sizes) if len(sizes) <= 8 else list(sizes)[:: -(-len(sizes) // 8)]
    axes.set_xticks(shown, [format_count(size) if size >= 10_000 else f"{size:,}" for size in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


BYTE_SCALES = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
TIME_SCALES = ((3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def _scale(largest: float, scales: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest unit in which the largest value is at least 2."""
    return next((scale for scale in scales if largest >= 2 * scale[0]), scales[-1])


def gpus(count: int) -> str:
    """1 → "1 GPU", 8 → "8 GPUs"."""
    return f"{count:,} GPU" if count == 1 else f"{count:,} GPUs"


def describe_setting(frame: pd.DataFrame) -> str:
    """Hardware, GPUs and mini-batch that a frame is about, for the foot of a figure and the head of a table."""
    parts = []
    if "device" in frame:
        parts.append(" / ".join(dict.fromkeys(frame.device.dropna())))
    if "cluster" in frame:
        parts.append(" / ".join(dict.fromkeys(frame.cluster.dropna())))
    worker = "process" if "device_kind" in frame and set(frame.device_kind) == {"cpu"} else "GPU"
    for column in ("num_gpus", "gpus"):
        if column in frame and worker == "GPU":
            low, high = int(frame[column].min()), int(frame[column].max())
            parts.append(gpus(low) if low == high else f"{low:,} to {high:,} GPUs")
    batches = [name for name in ("batch_per_gpu", "first_batch_per_gpu", "last_batch_per_gpu") if name in frame]
    if batches:
        low, high = int(frame[batches].min().min()), int(frame[batches].max().max())
        parts.append(f"mini-batch {low} per {worker}" if low == high else f"mini-batch {low} to {high} per {worker}")
    if "precision" in frame:
        parts.append(" / ".join(dict.fromkeys(frame.precision)))
    return ", ".join(part for part in parts if part)


def finish(figure: Figure, frame: pd.DataFrame, *, n: str, band: str) -> Figure:
    """Put the foot under a figure: the frame's setting, how many observations, and what the band is."""
    band = "N" + band[1:] if band.startswith("no band") else f"Band: {band}"
    text = textwrap.fill(f"{describe_setting(frame)}; n = {n}. {band}.", 82)
    figure.supxlabel(text, x=0.01, ha="left", fontsize=7.5, color="#555555")
    return figure
