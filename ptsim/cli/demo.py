"""`ptsim demo`: what pruning is worth, in minutes: measured here, projected where it pays and where it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pandas as pd
from cyclopts import Parameter
from rich.markup import escape
from rich.table import Table

from ptsim.cli.common import print_json, stdout_console
from ptsim.cli.options import Json
from ptsim.costs.flops import inference_macs, training_macs
from ptsim.costs.memory import iteration_memory
from ptsim.costs.traffic import batch_norm_bytes
from ptsim.errors import UsageError
from ptsim.network import LayerKind, Network
from ptsim.textfile import check_folder_writable
from ptsim.trace.io import read_trace
from ptsim.trace.schema import Epoch
from ptsim.trace.stretch import stretch
from ptsim.trace.trace import Trace
from ptsim.units import format_bytes, format_count, format_seconds, interval

if TYPE_CHECKING:
    from ptsim.report.build import Report

# A slow network, where fewer gradients are time saved, and a fast one, where a small network waits for its host.
CLUSTERS, GPUS = ("ethernet-10g", "dgx-a100"), (1, 8)
IMAGES = 100_000  # an epoch of the projected runs: with the 1437 digits, reconfigurations would be all that one sees

# 1437 handwritten digits of 8×8 pixels, doubled: convolutions wide enough that a narrower one takes less time.
SETTINGS: dict[str, Any] = {
    "model": "vgg6",
    "dataset": "digits",
    "image_size": 16,
    "epochs": 20,
    "batch": 32,
    "lr": 0.2,
    "lr_milestones": (0.4, 0.8),
    "num_threads": 1,  # so that two runs side by side on two cores do not disturb each other
}
# The proximal step reaches zeros exactly, so that channels go in a quarter of the run. How chosen: docs/demo.md.
PRUNING: dict[str, Any] = {"penalty_ratio": 0.8, "interval": 2, "regularizer": "proximal"}

# The paper's ResNet-50 on ImageNet as one would train it on one box of A100s today; nobody has trained it here.
PLANNED: dict[str, Any] = {
    "model": "torchvision:resnet50",
    "batch": 128,
    "gpus": 8,
    "precision": "amp",
    "memory_format": "channels_last",
}
PLANNED_PRUNING, PLANNED_CLUSTER = "lym2019/resnet50-imagenet-r0.25", "dgx-a100"


def demo(
    *,
    out: Path = Path("demo"),
    epochs: int = SETTINGS["epochs"],
    seed: int = 0,
    price: float = 2.0,
    grid_intensity: float | None = None,
    json: Annotated[Json, Parameter(help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Train dense and PruneTrain on real digits, project both, and plan the paper's ResNet-50 on 8 A100s.

    Args:
        out: Folder for the two runs that are trained, the two that are planned, and both reports.
        epochs: Epochs of each run; fewer than the default show less pruning.
        seed: Seed of the weights and of the order of the images.
        price: USD per GPU-hour of the planned run; an assumption, since prices differ.
        grid_intensity: Grams of CO₂ that a kWh causes; without it, no CO₂.
    """
    check_folder_writable(out)  # before torch is imported
    from ptsim.report.build import check_assumptions, write, write_report
    from ptsim.report.build import summary as report_summary
    from ptsim.sim.options import Options
    from ptsim.training.loop import train
    from ptsim.training.runfolder import refuse_used_folder

    if epochs < 1:
        raise UsageError(f"epochs is {epochs}, expected at least 1")
    check_assumptions(Options(price_usd_per_gpu_hour=price), grid_intensity)  # before minutes of training
    refuse_used_folder(out)
    common = SETTINGS | {"epochs": epochs, "seed": seed}
    dense = read_trace(train(common | {"penalty_ratio": 0.0}, out=out / "dense", progress=True).trace)
    pruned = read_trace(train(common | PRUNING, out=out / "prunetrain", progress=True).trace)
    savings = projected_savings(stretch(dense, images=IMAGES), stretch(pruned, images=IMAGES))
    trained = write_report([dense, pruned], out / "digits", cluster=CLUSTERS, gpus=GPUS)
    planned = planned_report(out / "planned", price, grid_intensity)
    page = write(planned, out / "report")
    if json:
        print_json(
            {
                "runs": {"dense": summary(dense), "prunetrain": summary(pruned)},
                "clusters": list(CLUSTERS),
                "savings": savings.astype(object).where(savings.notna(), None).to_dict("records"),
                "planned": report_summary(planned),
                "traces": [str(dense.path), str(pruned.path)],
                "report": str(page),
                "digits_report": str(trained),
            }
        )
        return
    console = stdout_console()
    console.print(_course(pruned), _comparison(dense, pruned), _projection(savings))
    paths = f"Runs     {dense.path}\n         {pruned.path}\nReports  {trained}\n         {page}"
    console.print(f"{planned.answer.headline}\n\n{paths}", soft_wrap=True, highlight=False, markup=False)


def planned_report(folder: Path, price: float, grid_intensity: float | None) -> Report:
    """The report of `planned_runs` on `PLANNED_CLUSTER`, not yet written."""
    from ptsim.report.build import make_report

    return make_report(
        planned_runs(folder),
        cluster=PLANNED_CLUSTER,
        gpus=(1, 8, 64),
        price_usd_per_gpu_hour=price,
        grid_grams_per_kwh=grid_intensity,
    )


def planned_runs(folder: Path) -> list[Trace]:
    """The paper's ResNet-50 on ImageNet, dense and pruned, planned and written into the folder."""
    from ptsim.answers.plan import plan
    from ptsim.trace.io import write_trace

    folder.mkdir(parents=True, exist_ok=True)
    pruned = plan(**PLANNED, pruning=PLANNED_PRUNING)
    dense = plan(**PLANNED, images=pruned.run.dataset.num_train, epochs=len(pruned.epochs))
    runs = {"dense": dense, "prunetrain": pruned}
    return [read_trace(write_trace(folder / f"{name}.jsonl", run)) for name, run in runs.items()]


def projected_savings(dense: Trace, pruned: Trace) -> pd.DataFrame:
    """`projected.savings_frame` of the two runs, longer than recorded, on every one of `CLUSTERS`."""
    from ptsim.hardware.catalog import load_cluster
    from ptsim.report.projected import Projector, savings_frame
    from ptsim.sim.options import Options
    from ptsim.trace.pairs import compare_runs

    comparisons = compare_runs([dense, pruned])
    if not comparisons:  # too few epochs for a penalty
        return pd.DataFrame()
    frames = [savings_frame(comparisons, Projector(load_cluster(name), Options()), GPUS) for name in CLUSTERS]
    return pd.concat(frames, ignore_index=True)


def summary(run: Trace) -> dict[str, Any]:
    """What a run cost and gave, measured (accuracy, seconds) and counted from its trace (the rest)."""
    network = run.final_network
    assert run.end is not None, "the run has just ended"
    return {
        "accuracy": run.end.final_accuracy,
        "output_channels": output_channels(network),
        "layers_removed": sum(len(r.layers_removed) for r in run.reconfigurations),
        "parameters": network.num_parameters,
        "inference_macs_per_image": inference_macs(network, "exact"),
        "training_macs": sum(training_macs(run.network_of(e), images=e.num_images) for e in run.epochs),
        "bn_bytes": sum(batch_norm_bytes(run.network_of(e)) * e.num_images for e in run.epochs),
        "peak_memory_bytes": memory_bytes(run, run.epochs[-1]),
        "first_epoch_seconds": typical_seconds(run.epochs[:5]),
        "last_epoch_seconds": typical_seconds(run.epochs[-5:]),
        "training_seconds": sum(e.time.wall_s for e in run.epochs) + sum(r.duration_s for r in run.reconfigurations),
    }


def output_channels(network: Network) -> int:
    """Output channels of all convolutions."""
    return sum(layer.out_channels for layer in network.layers if layer.kind is LayerKind.CONV)


def memory_bytes(run: Trace, epoch: Epoch) -> int:
    """What one iteration of that epoch needs, as the cost model counts it."""
    network = run.network_of(epoch)
    return iteration_memory(network, run.setting_of(epoch)).peak_bytes


def typical_seconds(epochs: tuple[Epoch, ...]) -> float:
    """The middle one of the epochs' measured training times."""
    return sorted(epoch.time.wall_s for epoch in epochs)[len(epochs) // 2]


def _course(run: Trace) -> Table:
    """PruneTrain at work: one row per architecture that was trained."""
    table = Table(title="PruneTrain, epoch by epoch (accuracy and seconds measured, the rest counted)")
    for heading in ("from epoch", "accuracy", "channels", "layers", "MACs/epoch", "BatchNorm/epoch", "memory", "epoch"):
        table.add_column(heading, justify="right")
    seen: dict[str, list[Epoch]] = {}
    for epoch in run.epochs:
        seen.setdefault(epoch.architecture, []).append(epoch)
    for epochs in seen.values():
        first, network = epochs[0], run.network_of(epochs[0])
        table.add_row(
            str(first.epoch),
            f"{epochs[-1].validation_accuracy:.1%}",
            str(output_channels(network)),
            str(sum(layer.kind is LayerKind.CONV for layer in network.layers)),
            format_count(training_macs(network, images=first.num_images), "MAC"),
            format_bytes(batch_norm_bytes(network) * first.num_images),
            format_bytes(memory_bytes(run, first)),
            format_seconds(typical_seconds(tuple(epochs))),
        )
    return table


def _comparison(dense: Trace, pruned: Trace) -> Table:
    table = Table(title="Dense against PruneTrain")
    for heading in ("", "dense", "PruneTrain", "of dense"):
        table.add_column(heading, justify="right" if heading else "left")
    ours, theirs = summary(pruned), summary(dense)
    rows: dict[str, tuple[str, Callable[[Any], str]]] = {
        "accuracy": ("accuracy", lambda value: f"{value:.1%}"),
        "output channels left": ("output_channels", str),
        "layers removed": ("layers_removed", str),
        "parameters": ("parameters", format_count),
        "inference MACs per image": ("inference_macs_per_image", format_count),
        "training MACs": ("training_macs", format_count),
        "BatchNorm bytes": ("bn_bytes", format_bytes),
        "memory of the last epochs": ("peak_memory_bytes", format_bytes),
        "last epochs, each": ("last_epoch_seconds", format_seconds),
        "training time": ("training_seconds", format_seconds),
    }
    for label, (key, form) in rows.items():
        share = f"{ours[key] / theirs[key]:.0%}" if theirs[key] and key != "accuracy" else ""
        table.add_row(label, form(theirs[key]), form(ours[key]), share)
    return table


def _projection(savings: pd.DataFrame) -> Table:
    table = Table(title=f"Where it pays: the same two runs with {IMAGES:,} images an epoch, projected")
    for heading in ("cluster", "GPUs", "dense", "PruneTrain", "saved", "90 % interval"):
        table.add_column(heading, justify="left" if heading == "cluster" else "right")
    for row in savings.to_dict("records"):
        table.add_row(
            escape(row["cluster"]),
            str(row["gpus"]),
            format_seconds(row["dense_seconds"]),
            format_seconds(row["pruned_seconds"]),
            f"{row['saved_fraction']:.0%}",
            interval(f"{row['saved_fraction_low']:.0%}", f"{row['saved_fraction_high']:.0%}"),
        )
    return table
