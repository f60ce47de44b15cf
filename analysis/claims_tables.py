"""The tables of docs/evidence.md and traces/README.md about the recorded runs, made from their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from claims_layers import by_layer
from claims_recorded import epochs_s, last_accuracy, read_recorded, totals
from claims_words import percent
from saving_by_layer import recorded_tables

from ptsim.trace.pairs import held_dense


class Column(NamedTuple):
    """One run of a table.

    `beside` is the run recorded at the same time; without one, "of dense" means of the run's own first network, trained
    to the end. `marked`: recorded beside other work, so that its time compares with no other.
    """

    heading: str
    run: str
    beside: str = ""
    marked: bool = False


def runs_table(root: Path, *, folder: str, columns: Sequence[Column]) -> str:
    """Accuracy, work and time of recorded runs, one column each."""
    cells = [_column(root, folder, column) for column in columns]
    if {column["mini-batch"] for column in cells} == {cells[0]["mini-batch"]}:
        cells = [{name: text for name, text in column.items() if name != "mini-batch"} for column in cells]
    rows = [[name, *(column[name] for column in cells)] for name in cells[0]]
    lines = [f"| {' | '.join(row)} |" for row in [["", *(column.heading for column in columns)], *rows]]
    return "\n".join([lines[0], "|---" * (len(columns) + 1) + "|", *lines[1:]])


def _column(root: Path, folder: str, column: Column) -> dict[str, str]:
    """The cells of one run, by the name of their row."""
    trace = read_recorded(root, folder, column.run)
    dense = read_recorded(root, folder, column.beside) if column.beside else held_dense(trace)
    own, theirs = totals(trace), totals(dense)
    is_dense = column.beside == column.run
    mark = " *" if column.marked else ""
    of_dense = f", {percent(own['time'] / theirs['time'])} of dense"
    compares = column.beside and not is_dense and not column.marked
    seconds = epochs_s(trace)
    sizes = dict.fromkeys(str(epoch.batch_per_gpu) for epoch in trace.epochs)

    def left(key: str) -> str:
        return "" if is_dense else percent(own[key] / theirs[key])

    return {
        "mini-batch": ", ".join(sizes),
        "validation accuracy, last epoch": percent(last_accuracy(trace), 1),
        "training FLOPs, of dense": left("flops"),
        "BatchNorm traffic, of dense": left("bn"),
        "inference FLOPs of the last epoch, of dense": left("inference"),
        "training time with reconfigurations, without validation": f"{own['time']:,.0f} s"
        + (of_dense if compares else mark),
        "first → last epoch": f"{seconds[0]:.1f} → {seconds[-1]:.1f} s{mark}",
    }


Select = Callable[[pd.DataFrame], pd.Series]  # the layers of a row


def of_kind(kind: str, prefix: str = "") -> Select:
    """Layers of a kind, and of a part of the network."""
    return lambda layers: (layers.kind == kind) & layers.layer.str.startswith(prefix)


def layers_text(
    root: Path,
    *,
    title: str,
    folder: str,
    rows: Mapping[str, Select],
    run: str = "",
) -> str:
    """Milliseconds of a step by kind of layer, dense and pruned, forward and backward.

    They are those of the profiles of `run`, with a last row for the whole step, or, without a run, those that were
    measured on an idle machine.
    """
    tables = recorded_tables(read_recorded(root, folder, run)) if run else {"layers": by_layer(root, folder, "layers")}
    layers = tables["layers"]
    found = [(name, layers[select(layers)]) for name, select in rows.items()]
    lines = [
        _line(name, of.dense_seconds.sum(), of.pruned_seconds.sum(), of.dense_macs.sum(), of.pruned_macs.sum())
        for name, of in found
    ]
    if run:
        first, last = tables["steps"].iloc[0], tables["steps"].iloc[-1]
        macs = (first.training_macs, last.training_macs)
        lines.append(_line("whole step", first.step_seconds, last.step_seconds, *macs))
    return "\n".join(
        ["```text", f"{title:<38}{'dense':>8}{'pruned':>9}{'time left':>12}{'MACs left':>12}", *lines, "```"]
    )


def _line(name: str, dense_s: float, pruned_s: float, dense_macs: float, pruned_macs: float) -> str:
    left = (percent(pruned_s / dense_s), percent(pruned_macs / dense_macs) if dense_macs else "")
    return f"{name:<38}{1e3 * dense_s:>8.1f}{1e3 * pruned_s:>9.1f}{left[0]:>12}{left[1]:>12}".rstrip()


def _nth_convolution(number: int) -> Select:
    """The convolution with this number, counted from 1."""
    return lambda layers: (layers.kind == "conv") & ((layers.kind == "conv").cumsum() == number)


_OTHERS = {"BatchNorm": of_kind("batch_norm"), "ReLU": of_kind("activation")}
_RESNET32_ROWS = {
    "convolutions": of_kind("conv"),
    "  of layer1 (16 channels)": of_kind("conv", "layer1."),
    "  of layer2 (32 channels)": of_kind("conv", "layer2."),
    "  of layer3 (64 channels)": of_kind("conv", "layer3."),
    **_OTHERS,
    "additions": of_kind("elementwise"),
}
_VGG11_ROWS = {
    "convolution 1 (3 to 64 channels)": _nth_convolution(1),
    **{f"convolution {number}": _nth_convolution(number) for number in range(2, 9)},
    "pooling": of_kind("pool"),
    **_OTHERS,
}


def _pair(ratio: str) -> tuple[Column, Column]:
    """The dense run and the one with this penalty ratio."""
    return Column("dense", "dense", "dense"), Column(f"r = {ratio}", f"prunetrain-r{ratio}", "dense")


def _beside(dense: str, run: str) -> tuple[Column, Column]:
    """A dense run and the one that was recorded beside it, by their names."""
    return Column(f"`{dense}`", dense, dense), Column(f"`{run}`", run, dense)


TABLES: dict[str, Callable[[Path], str]] = {
    "resnet20": partial(
        runs_table,
        folder="cifar10-resnet20",
        columns=(
            Column("dense", "dense", "dense"),
            Column("r = 0.1", "prunetrain-r0.1", "dense", marked=True),
            Column("r = 0.2", "prunetrain-r0.2", "dense"),
            Column("r = 0.3", "prunetrain-r0.3", "dense", marked=True),
            Column("gating, r = 0.2", "gating-r0.2", "dense", marked=True),
            Column("SSL, r = 0.2", "ssl-r0.2", "dense", marked=True),
        ),
    ),
    "resnet32": partial(runs_table, folder="cifar10-resnet32", columns=_pair("0.25")),
    "modes": partial(
        runs_table,
        folder="cifar10-resnet32",
        columns=(
            Column("`batch-fixed`", "batch-fixed"),
            Column("`batch-dynamic`, grows into 104 MiB", "batch-dynamic"),
            Column("`mode-union`", "mode-union"),
            Column("`mode-gating`, channel gating", "mode-gating"),
        ),
    ),
    "seeds": partial(
        runs_table,
        folder="cifar10-resnet32",
        columns=tuple(
            Column(f"`seed{seed}-{run}`", f"seed{seed}-{run}", f"seed{seed}-dense")
            for seed in (2, 3)
            for run in ("dense", "prunetrain-r0.25")
        ),
    ),
    "resnet20-long": partial(
        runs_table,
        folder="cifar10-resnet20",
        columns=_beside("long-dense", "long-prunetrain-r0.2"),
    ),
    "resnet32-r02": partial(
        runs_table,
        folder="cifar10-resnet32",
        columns=_beside("dense-beside-r0.2", "prunetrain-r0.2"),
    ),
    "vgg11": partial(runs_table, folder="cifar10-vgg11", columns=_pair("0.25")),
    "vgg11-128": partial(
        runs_table, folder="cifar10-vgg11", columns=_beside("batch128-dense", "batch128-prunetrain-r0.25")
    ),
    "vgg11-long": partial(
        runs_table, folder="cifar10-vgg11", columns=_beside("batch128-long-dense", "batch128-long-prunetrain-r0.25")
    ),
    "vgg11-channels-last": partial(
        runs_table,
        folder="cifar10-vgg11",
        columns=_beside("batch128-channels-last-dense", "batch128-channels-last-prunetrain-r0.25"),
    ),
    "resnet18": partial(runs_table, folder="cifar10-resnet18-64", columns=_pair("0.2")),
    "resnet32-recorded-layers": partial(
        layers_text,
        title="ResNet-32, seed 1, profiles, ms a step",
        folder="cifar10-resnet32",
        rows=_RESNET32_ROWS,
        run="prunetrain-r0.25",
    ),
    "resnet32-layers": partial(
        layers_text, title="ResNet-32, seed 2, alone, ms a step", folder="cifar10-resnet32", rows=_RESNET32_ROWS
    ),
    "vgg11-layers": partial(layers_text, title="VGG-11, alone, ms a step", folder="cifar10-vgg11", rows=_VGG11_ROWS),
}
