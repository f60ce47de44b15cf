"""What the studies of this folder share: finding traces, the paper's numbers, writing a table and a figure.

Every study is a script `python analysis/NAME.py [TRACE…] [--out DIR] [--format svg|png|pdf]`. Without traces it
reads all traces under `traces/`. It prints its subject and its table; with `--out` it also writes the table and the
figure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

import ptsim
from ptsim.costs.flops import training_macs
from ptsim.errors import PtsimError, UsageError
from ptsim.textfile import write_whole, writing_whole
from ptsim.trace.pairs import data_name, run_labels, setting_labels
from ptsim.trace.schema import Epoch

ROOT = Path(__file__).resolve().parent.parent
PAPER = ROOT / "traces" / "public" / "prunetrain_paper.csv"

TableMaker = Callable[[Sequence[ptsim.Trace]], pd.DataFrame]
FigureMaker = Callable[[pd.DataFrame], Figure]


def main(
    file: str,
    document: str,
    table: TableMaker,
    figure: FigureMaker | None = None,
    *,
    needs: str,
    argv: list[str] | None = None,
) -> int:
    """Run one study: read traces, print its table, write it and its figure where asked. Returns the exit status.

    Args:
        file: the script's `__file__`.
        document: its docstring.
        table: the study itself.
        figure: from the table.
        needs: which traces the study needs, said when none of those given will do.
        argv: the command line without the program's name.
    """
    parser = argparse.ArgumentParser(description=document.splitlines()[0])
    parser.add_argument(
        "traces", nargs="*", type=Path, default=[ROOT / "traces"], help="trace files, run folders, or folders of them"
    )
    parser.add_argument("--out", type=Path, help="folder for the table (CSV) and the figure")
    parser.add_argument("--format", choices=("svg", "png", "pdf"), default="svg", help="file format of the figure")
    arguments = parser.parse_args(argv)
    name = Path(file).stem
    try:
        frame = table([ptsim.read_trace(path) for path in find_traces(arguments.traces)])
        if frame.empty:
            raise UsageError(f"no trace answers this: {needs}")
    except PtsimError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(document.strip(), end="\n\n")
    print(
        frame.to_string(
            index=False, max_colwidth=48, max_rows=40, float_format=lambda value: f"{value:.4g}", na_rep="–"
        )
    )
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.out / f"{name}.csv", frame.to_csv(index=False))
        if figure:
            with writing_whole(arguments.out / f"{name}.{arguments.format}") as file:
                figure(frame).savefig(file, format=arguments.format, dpi=150)
    return 0


def find_traces(paths: Sequence[Path]) -> list[Path]:
    """The traces that the paths mean: files, run folders, or all run folders and trace files somewhere below.

    Raises:
        UsageError: nothing there.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir() and not (path / "trace.jsonl").is_file():
            found += sorted(path.rglob("*.jsonl"))
        else:
            found.append(path)
    if not found:
        raise UsageError(f"no traces in {', '.join(map(str, paths))}")
    return found


def paper(where: str, **equal: object) -> pd.DataFrame:
    """The paper's rows of a table or figure ("Table 1", "Fig. 9"), narrowed to columns that equal the given values."""
    rows = pd.read_csv(PAPER)
    rows = rows[rows["where"].str.startswith(where)]
    for column, value in equal.items():
        rows = rows[rows[column] == value]
    return rows


def nearest_paper(where: str, dataset: str, model: str, **equal: object) -> tuple[pd.DataFrame, str | None]:
    """The paper's rows of the network nearest to `model`, and which that is ("CIFAR100 ResNet32"); None where none is.

    Only networks of the same family on data of the same size count: the same data first, then the nearest depth.
    """
    rows = paper(where, **equal).dropna(subset=["dataset", "model"])
    family, depth = _family(model)
    near = {
        (other != dataset, abs(_family(name)[1] - depth)): (other, name)
        for other, name in zip(rows.dataset, rows.model, strict=True)
        if other.rstrip("0123456789") == dataset.rstrip("0123456789") and _family(name)[0] == family
    }
    if not near:
        return rows[:0], None
    data, name = near[min(near)]
    return rows[(rows.dataset == data) & (rows.model == name)], f"{data} {name}"


def _family(model: str) -> tuple[str, int]:
    name = model.rstrip("0123456789")
    return name, int(model[len(name) :] or 0)


def paper_names(trace: ptsim.Trace) -> tuple[str, str]:
    """Data set and network as the paper calls them, so that its numbers can be laid beside the run's."""
    data, model = trace.run.dataset, trace.run.model.rpartition(":")[2].lower()
    dataset = data_name(trace)
    sizes = {(10, 32, "cifar"): "CIFAR10", (100, 32, "cifar"): "CIFAR100", (1000, 224, ""): "ImageNet"}
    for (classes, side, part), name in sizes.items():
        if (data.num_classes, data.input_shape[1]) == (classes, side) and part in dataset.lower():
            dataset = name
    for prefix, name in (("resnet", "ResNet"), ("vgg", "VGG")):
        if model.startswith(prefix):
            model = name + model.removeprefix(prefix).removesuffix("_bn")
    return dataset, model


def labelled(traces: Sequence[ptsim.Trace]) -> list[tuple[dict[str, Any], ptsim.Trace]]:
    """Every trace that has an epoch, with the columns that say which run a row is about."""
    return [
        (_columns(trace, label, setting), trace)
        for label, setting, trace in zip(run_labels(traces), setting_labels(traces), traces, strict=True)
        if trace.epochs
    ]


def _columns(trace: ptsim.Trace, label: str, setting: str) -> dict[str, Any]:
    dataset, model = paper_names(trace)
    return {
        "run": label,
        "setting": setting,
        "pruned": trace.is_pruned,
        "dataset": dataset,
        "model": model,
        "penalty_ratio": trace.penalty_ratio,
        "device": trace.run.device.name,
        "device_kind": trace.run.device.kind,
        "num_gpus": trace.epochs[0].world_size,
        "precision": str(trace.run.precision),
        "batch_per_gpu": trace.epochs[0].batch_per_gpu,
    }


def modes(traces: Sequence[ptsim.Trace]) -> list[tuple[dict[str, Any], ptsim.Trace]]:
    """The pruned runs of `labelled` whose settings, but for union or gating, were recorded in both modes.

    Their columns have `mode`, and `pair`: a name for the settings that the runs share.
    """
    found = []
    for names, trace in labelled(traces):
        settings = trace.run.hyperparameters
        pair = f"{names['model']}, r={names['penalty_ratio']:g}" if names["penalty_ratio"] else names["model"]
        key = names["dataset"], settings.get("interval"), settings.get("schedule", "continuous"), len(trace.epochs)
        if names["pruned"]:
            found.append((key, names | {"mode": settings.get("mode", "union"), "pair": pair}, trace))
    both = {
        (key, names["pair"])
        for key, names, _ in found
        if {other["mode"] for k, other, _ in found if (k, other["pair"]) == (key, names["pair"])} == {"union", "gating"}
    }
    return [(names, trace) for key, names, trace in found if (key, names["pair"]) in both]


def epoch_flops(trace: ptsim.Trace, epoch: Epoch) -> float:
    """Training FLOPs of one epoch as the paper counts them (METHOD: its script's convention), 2 a MAC."""
    mini_batches = epoch.num_iterations * epoch.world_size
    return 2.0 * training_macs(trace.network_of(epoch), "paper", images=epoch.num_images, mini_batches=mini_batches)


def first_flops(trace: ptsim.Trace) -> float:
    """The same for the dense network: the run's first epoch."""
    return epoch_flops(trace, trace.epochs[0])
