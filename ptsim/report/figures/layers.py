"""Where the layers' time goes: the costliest ones, block by block, and against the device's roofs."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from ptsim.report.facts import Facts
from ptsim.report.figures import style
from ptsim.report.figures.registry import ReportFigure
from ptsim.report.projected import roofline_frame
from ptsim.units import counted, format_bandwidth, format_peak


@style.styled
def layers_figure(layers: pd.DataFrame, *, count: int = 16) -> Figure:
    """The `count` most expensive layers: time of one image in the first and in the last architecture.

    Takes `projected.layers_frame` of one run. A layer that has gone has no second bar.
    """
    first, last = layers.epoch.min(), layers.epoch.max()
    costly = set(layers.groupby("layer").seconds_per_image.max().nlargest(count).index)
    names = [name for name in dict.fromkeys(layers.layer) if name in costly]  # in forward order
    figure, (axes,) = style.panels(1, height_in=1.5 + 0.3 * len(names))
    scale, unit = style.scale_for(float(layers.seconds_per_image.max()), "seconds")
    width = 0.8 if first == last else 0.4
    for offset, (epoch, colour, hatch) in enumerate(((first, "#9a9a9a", ""), (last, style.COLOURS[1], "///"))):
        if offset == 1 and first == last:
            break
        rows = layers[layers.epoch == epoch].set_index("layer").seconds_per_image
        values = [float(rows.get(name, 0.0)) / scale for name in names]
        positions = [i + (offset - 0.5) * width if first != last else i for i in range(len(names))]
        axes.barh(
            positions, values, height=width, color=colour, hatch=hatch, edgecolor="white", label=f"epoch {int(epoch)}"
        )
    style.bar_names(axes, range(len(names)), [style.shown_name(name) for name in names])
    axes.set(xlabel=f"forward and backward per image ({unit})")
    style.legend_above(axes)
    return style.finish(
        figure,
        layers,
        n=f"the costliest {len(names)} of {layers.layer.nunique()} layers",
        band="no band: expected values",
    )


@style.styled
def blocks_figure(layers: pd.DataFrame, *, most: int = 40) -> Figure:
    """Time per image of every block of layers over epochs, as a map. Takes `projected.layers_frame` of one run.

    The `most` costliest blocks (`block_of`) are shown; one that has been removed is left white.
    """
    blocks = layers.assign(block=layers.layer.map(block_of))
    table = blocks.pivot_table(index="block", columns="epoch", values="seconds_per_image", aggfunc="sum", sort=False)
    kept = set(table.max(axis=1).nlargest(most).index)
    table = table.loc[[block for block in table.index if block in kept]]
    figure, (axes,) = style.panels(1, height_in=1.2 + 0.19 * len(table))
    scale, unit = style.scale_for(float(table.max().max()), "seconds")
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
    axes.set_yticks(
        [i + 0.5 for i in range(len(table))],
        [style.shown_name(block) for block in table.index],
        fontsize=7.5,
        rotation=0,
    )
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.set(xlabel="epoch", ylabel="")
    return style.finish(figure, layers, n=f"{len(table)} blocks of one run", band="no band: expected values")


@style.styled
def roofline_figure(layers: pd.DataFrame) -> Figure:
    """Speed of every convolution and linear layer over its arithmetic intensity, below the device's roofs.

    Takes `projected.roofline_frame` of one run; the first and the last epoch are drawn.
    """
    figure, (axes,) = style.panels(1, height_in=3.4)
    peak, bandwidth = layers.peak_flops_per_second.iloc[0], layers.bandwidth_bytes_per_second.iloc[0]
    low, high = layers.flops_per_byte.min() / 2, max(layers.flops_per_byte.max() * 2, 2 * peak / bandwidth)
    axes.plot(
        [low, peak / bandwidth, high],
        [low * bandwidth / 1e12, peak / 1e12, peak / 1e12],
        color="#4d4d4d",
        lw=1.2,
        label=f"roofs: {format_peak(peak)}, {format_bandwidth(bandwidth)}",
    )
    first, last = layers.epoch.min(), layers.epoch.max()
    for epoch, colour, fill in ((first, "#9a9a9a", "#9a9a9a"), (last, style.COLOURS[1], "white")):
        if epoch == last == first and fill == "white":
            break
        rows = layers[layers.epoch == epoch]
        axes.plot(
            rows.flops_per_byte,
            rows.flops_per_second / 1e12,
            "o",
            ms=4.5,
            color=colour,
            mfc=fill,
            label=f"epoch {int(epoch)}, {len(rows)} layers",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        style.label_log_axis(axis)
    axes.set(xlabel="FLOPs per byte moved (1 MAC is 2 FLOPs)", ylabel="TFLOP/s")
    style.legend_above(axes)
    return style.finish(
        figure, layers, n=f"{layers.layer.nunique()} layers of one run", band="no band: expected values"
    )


def block_of(layer: str) -> str:
    """What shares a module path: the layers of one residual block, or a single layer at the top."""
    return layer.rpartition(".")[0] or layer


def has_removed_blocks(layers: pd.DataFrame) -> bool:
    """Whether a block of `projected.layers_frame` has no layer left in some epoch."""
    blocks = layers.layer.map(block_of)
    return bool(blocks.nunique() * layers.epoch.nunique() > len(set(zip(blocks, layers.epoch, strict=True))))


def _roofline_caption(facts: Facts) -> str:
    layers = roofline_frame(facts.shown, facts.projector)
    above = layers[layers.flops_per_second > layers.peak_flops_per_second].layer.nunique() if len(layers) else 0
    fewer = (
        f" {counted(above, 'layer lies', 'layers lie')} above the roof: FLOPs are counted as in a direct "
        "convolution, and fp32 kernels for 3 × 3 filters multiply less (Winograd's algorithm)."
    )
    return (
        f"Every convolution and linear layer of “{facts.shown.label}” with forward and backward pass together, and "
        "what the device's arithmetic and memory allow. Pruning moves layers to the left, where memory decides, and "
        f"down, where a kernel is too small to fill the GPU.{fewer if above else ''}"
    )


LAYERS = ReportFigure(
    section="layers",
    title="The costliest layers.",
    frame=lambda facts: facts.layers[facts.layers.epoch.isin([facts.layers.epoch.min(), facts.layers.epoch.max()])],
    draw=layers_figure,
    caption=lambda facts: f"Forward and backward time per image, “{facts.shown.label}”, first and last epoch.",
)
ROOFLINE = ReportFigure(
    section="layers",
    title="How fast the layers could be.",
    frame=lambda facts: roofline_frame(facts.shown, facts.projector),
    draw=roofline_figure,
    caption=_roofline_caption,
)
BLOCKS = ReportFigure(
    section="layers",
    title="Block by block, epoch by epoch.",
    frame=lambda facts: facts.layers if facts.layers.epoch.nunique() > 1 else pd.DataFrame(),
    draw=blocks_figure,
    caption=lambda facts: (
        "Time per image of every block of layers"
        + ("; white where it has been removed." if has_removed_blocks(facts.layers) else ".")
    ),
)
