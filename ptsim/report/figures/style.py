"""How the report's figures look: size, colours, dashes, legends, the foot that says what a figure is about.

Every figure says at its foot what hardware it is about, which mini-batch, how many observations and what the band
is. Colours are Okabe and Ito's, chosen for colour-blind readers and told apart by lightness in print; runs also differ
by dash. Nothing here touches matplotlib's global state. Text is drawn as it is: `$` and `_` in a name are no formulas.
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
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from ptsim.textfile import printable
from ptsim.units import SCALES, counted, format_count

WIDTH_IN = 4.7  # two columns at 1280 px, one at 400 px, and 9 pt text legible in both
COLOURS = ("#4d4d4d", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ((5, 2), "", (2, 1.5), (6, 2, 1.5, 2), (1, 1), (8, 3), (4, 1, 1, 1))
LONGEST_NAME = 44  # letters of a name in a legend or at an axis; longer ones are shortened in the middle

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
    "text.parse_math": False,
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
    epoch_axis(axes)


def band(axes: Axes, x: pd.Series, low: pd.Series, high: pd.Series, colour: str) -> None:
    """The range around a line; the foot says what it is (`finish`)."""
    axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)


def zero_line(axes: Axes) -> None:
    """Where nothing is gained and nothing lost."""
    axes.axhline(0, color="#666666", linewidth=0.7)


def percent_axis(axis: Axis) -> None:
    """Fractions are shown in percent, with as many digits as the range needs."""
    axis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=" %"))


def epoch_axis(axes: Axes) -> None:
    """No half epochs at the horizontal axis."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def bar_names(axes: Axes, positions: Sequence[float], names: Sequence[str]) -> None:
    """The names of horizontal bars, the first one on top."""
    axes.set_yticks(positions, names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def dash_style(dash: object) -> object:
    """The line style of one of `DASHES`."""
    return "-" if dash == "" else (0, dash)


def legend_above(axes: Axes) -> None:
    """What is labelled in `axes`, in a legend above the whole figure."""
    handles, labels = axes.get_legend_handles_labels()
    labels = [shown_name(label) for label in labels]
    if handles:
        column_in = 0.6 + 0.072 * max(map(len, labels))  # the line and its gaps, and letters of 8.5 points
        columns = max(1, min(len(labels), 3, int(WIDTH_IN / column_in)))
        rows = -(-len(labels) // columns)
        figure = axes.get_figure(root=True)
        assert figure is not None, "axes are drawn on a figure"
        figure.set_figheight(figure.get_figheight() + 0.19 * max(0, rows - 2))  # figures have room for two
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=2.6, borderaxespad=0.2)


def plain_log_axes(axes: Axes, sizes: Sequence[int]) -> None:
    """The sizes themselves at a logarithmic axis, at most eight of them."""
    shown = list(sizes) if len(sizes) <= 8 else list(sizes)[:: -(-len(sizes) // 8)]
    axes.set_xticks(shown, [format_count(size) if size >= 10_000 else f"{size:,}" for size in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    if axes.get_yscale() == "log":
        label_log_axis(axes.yaxis)


def label_log_axis(axis: Axis) -> None:
    """Numbers at a logarithmic axis, also where it spans less than a power of ten."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if high > 5 * low else MaxNLocator(4))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def scale_for(largest: float, quantity: str) -> tuple[float, str]:
    """Factor and name of the largest unit (`units.SCALES`) in which the largest value is at least 2."""
    scales = SCALES[quantity]
    scale = next((scale for scale in scales if largest >= 2 * scale.factor), scales[-1])
    return scale.factor, scale.unit


def shown_name(name: str) -> str:
    """A name as a figure shows it: no control characters, and not longer than `LONGEST_NAME`."""
    return printable(name, LONGEST_NAME)


def gpus(count: int) -> str:
    """1 → "1 GPU", 8 → "8 GPUs"."""
    return counted(count, "GPU")


def describe_setting(frame: pd.DataFrame) -> str:
    """Hardware, GPUs and mini-batch that a frame is about, for the foot of a figure and the head of a table."""
    parts = []
    if "device" in frame:
        parts.append(" / ".join(map(shown_name, dict.fromkeys(frame.device.dropna()))))
    if "cluster" in frame:
        parts.append(" / ".join(map(shown_name, dict.fromkeys(frame.cluster.dropna()))))
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
