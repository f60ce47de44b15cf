"""The paper's measured times, predicted from planned runs alone: nobody trains anything.

    python analysis/paper.py --out DIR [--draws 3] [--plans DIR]

Plans the eleven runs of Table 1 from their FLOPs, BatchNorm traffic and mini-batches, projects them and their dense
runs onto the paper's GPUs, and lays the time ratios beside what the paper measured: Table 1, Table 4 (dynamic
mini-batch), Table 2 (inference), Fig. 9 (growth of the mini-batch), Fig. 11 (communication) and the speed-up of
convolutions. No measured time of the paper enters a fit or a choice. As in the paper, reconfigurations take no time.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import _common
import pandas as pd
from matplotlib.figure import Figure

from ptsim.answers.plan import plan
from ptsim.costs.memory import iteration_memory, usable_bytes
from ptsim.costs.saving import saving_interval
from ptsim.costs.step import step_time
from ptsim.costs.tiers import Tier
from ptsim.hardware.catalog import load_cluster, load_device
from ptsim.network import LayerKind, Network, Precision
from ptsim.prune.trajectories.catalog import PublishedRun, published_runs
from ptsim.setting import StepSetting
from ptsim.sim.options import Options
from ptsim.sim.projection import RunProjection
from ptsim.sim.run import StepCache, project
from ptsim.textfile import write_whole, writing_whole
from ptsim.trace.io import read_trace, write_trace
from ptsim.trace.pairs import held_dense
from ptsim.trace.trace import Trace

CIFAR, PASCAL, VOLTA = "titan-xp-x4", "gtx-1080-ti-x4", "v100-pcie-x4"
HARDWARE = {CIFAR: "1x TITAN Xp", PASCAL: "4x GTX 1080 Ti", VOLTA: "4x V100"}
GRANULARITY = 32  # of the dynamic mini-batch (Section 5.3)
PRECISION = Precision.FP32


class Pair:
    """A published run's dense and planned traces, and projections of them."""

    def __init__(self, run: PublishedRun, dense: Trace, pruned: Sequence[Trace]) -> None:
        self.run, self.dense, self.pruned = run, dense, pruned
        self._caches: dict[tuple[str, str], StepCache] = {}

    @property
    def dataset(self) -> str:
        """As the paper's table names it."""
        return "ImageNet" if self.run.images > 1_000_000 else f"CIFAR{self.run.classes}"

    @property
    def model(self) -> str:
        """As the paper's table names it."""
        name = self.run.model.removeprefix("torchvision:")
        return name.replace("resnet", "ResNet").replace("vgg", "VGG")

    @property
    def gpus(self) -> int:
        """Of the run."""
        return self.run.gpus

    def projected(self, trace: Trace, cluster: str, options: Options | None = None) -> RunProjection:
        """`trace` on a cluster."""
        cache = self._caches.setdefault((str(trace.path), cluster), StepCache())  # the dense run has the first's path
        return project(trace, load_cluster(cluster), self.gpus, options or Options(), cache=cache)

    def ratios(self, cluster: str, options: Options | None = None) -> list[float]:
        """Time of every draw over the dense run's, reconfigurations and the start left out."""
        dense_s = training_s(self.projected(self.dense, cluster))
        return [training_s(self.projected(trace, cluster, options)) / dense_s for trace in self.pruned]


def training_s(projection: RunProjection) -> float:
    """Seconds of the epochs alone."""
    return math.fsum(epoch.total_s for epoch in projection.epochs)


def pairs(draws: int, folder: Path | None = None, only: Sequence[str] = ()) -> list[Pair]:
    """Every published run planned, dense and pruned; with `folder`, plans that are there already are read."""
    made = []
    for name, run in sorted(published_runs().items(), key=lambda item: -item[1].images):
        if only and name not in only:
            continue
        file = None if folder is None else folder / f"{name.replace('/', '-')}-{draws}.jsonl"
        if file is not None and file.is_file():
            planned = read_trace(file)
        else:
            print(f"planning {name}", file=sys.stderr, flush=True)
            planned = plan(run.model, draws=draws, pruning=name)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_trace(file, planned)
        made.append(Pair(run, held_dense(planned), planned.drawn()))
    return made


def growing(pair: Pair, cluster: str) -> Options:
    """The dynamic mini-batch: as much as fits 11 GB, on CIFAR as much memory as the dense network takes at 128."""
    memory = load_device("gtx-1080-ti").memory_bytes if pair.dataset == "ImageNet" else _least_memory(pair, cluster)
    return Options(minibatch="planned", batch_granularity=GRANULARITY, memory_bytes=memory)


def _least_memory(pair: Pair, cluster: str) -> int:
    """Memory of a device on which the first step of the pruned run, still dense, just fits."""
    device, trace = load_cluster(cluster).device, pair.pruned[0]
    first = trace.epochs[0]
    need = iteration_memory(trace.network_of(first), trace.setting_of(first), device=device)
    return math.ceil(need.device_bytes * device.memory_bytes / usable_bytes(device))


def times_table(made: Sequence[Pair]) -> pd.DataFrame:
    """Training time of dense: Table 1, and Table 4's runs with a dynamic mini-batch."""
    rows = []
    for pair in made:
        for cluster in (PASCAL, VOLTA) if pair.dataset == "ImageNet" else (CIFAR,):
            rows.append(_row(pair, cluster, "Table 1", pair.ratios(cluster)))
            if pair.run.name in ("lym2019/resnet50-cifar100", "lym2019/resnet50-imagenet-r0.25"):
                rows.append(_row(pair, cluster, "Table 4", pair.ratios(cluster, growing(pair, cluster))))
    return pd.DataFrame(rows)


def _row(pair: Pair, cluster: str, where: str, ratios: list[float]) -> dict[str, object]:
    others = [math.log(ratio / ratios[0]) ** 2 for ratio in ratios[1:]]
    spread = math.sqrt(statistics.fmean(others)) if others else 0.0
    low, high = saving_interval(ratios[0], Tier.DATASHEET, draws=spread)
    measured = _measured(pair, cluster, where)
    return {
        "where": where,
        "run": pair.run.name.partition("/")[2],
        "hardware": HARDWARE[cluster],
        "measured": measured,
        "predicted": ratios[0],
        "low": low,
        "high": high,
        "error_points": 100 * (ratios[0] - measured),
        "inside": low <= measured <= high,
        "draws": len(ratios),
        "draw_spread": spread,
    }


def _measured(pair: Pair, cluster: str, where: str) -> float:
    paper = pd.read_csv(_common.PAPER)
    rows = paper[
        (paper["where"] == where) & paper.metric.str.startswith("training time") & (paper.dataset == pair.dataset)
    ]
    rows = rows[(rows.model == pair.model) & (rows.hardware == HARDWARE[cluster])]
    if where == "Table 4":
        rows = rows[rows.setting.str.startswith("Adjusted")]
    elif pair.dataset == "ImageNet":
        rows = rows[rows.setting.str.endswith(f"ratio {pair.run.name.rpartition('-r')[2]}")]
    (ratio,) = rows.ratio_vs_baseline
    return float(ratio)


def inference_table(made: Sequence[Pair]) -> pd.DataFrame:
    """Table 2: speed-up of inference on a TITAN Xp at mini-batches of 10 and 100, from forward times."""
    device, paper = load_device("titan-xp"), pd.read_csv(_common.PAPER)
    paper = paper[(paper["where"] == "Table 2") & paper.ratio_vs_baseline.notna()]
    rows = []
    for pair in made:
        if pair.dataset == "CIFAR10":
            continue
        for batch in (10, 100):
            found = paper[(paper.dataset == pair.dataset) & (paper.model == pair.model)]
            found = found[found.per_gpu_batch == batch]
            if pair.dataset == "ImageNet":
                found = found[found.setting.str.contains(f"strength {pair.run.name.rpartition('-r')[2]})", regex=False)]
            networks = pair.dense.final_network, pair.pruned[0].final_network
            dense_s, pruned_s = (_forward_s(network, batch, device.name) for network in networks)
            (measured,) = found.ratio_vs_baseline
            rows.append(
                {
                    "run": pair.run.name.partition("/")[2],
                    "batch": batch,
                    "measured": float(measured),
                    "predicted": dense_s / pruned_s,
                }
            )
    return pd.DataFrame(rows)


def _forward_s(network: Network, batch: int, device: str) -> float:
    return step_time(network, load_device(device), StepSetting(batch=batch, precision=PRECISION)).forward_s


def claims_table(made: Sequence[Pair]) -> pd.DataFrame:
    """Fig. 9, Fig. 11 and the speed-up of convolutions."""
    by_name = {pair.run.name.partition("/")[2]: pair for pair in made}
    rows: list[dict[str, object]] = []

    def add(what: str, paper: str, ours: str) -> None:
        rows.append({"what": what, "paper": paper, "predicted": ours})

    imagenet, cifar = by_name.get("resnet50-imagenet-r0.25"), by_name.get("resnet50-cifar100")
    if imagenet is not None:
        options = growing(imagenet, PASCAL)
        grown = imagenet.projected(imagenet.pruned[0], PASCAL, options)
        add("mini-batch per GPU on 11 GB, ImageNet, r = 0.25", "64, 96 from epoch 10, 128 from 30", _growth(grown))
        for ratio in ("0.25", "0.2"):
            pair = by_name.get(f"resnet50-imagenet-r{ratio}")
            if pair is not None:
                sent = [
                    pair.projected(trace, PASCAL, wish).allreduce_bytes_per_gpu
                    for trace, wish in ((pair.dense, None), (pair.pruned[0], growing(pair, PASCAL)))
                ]
                add(f"communication saved with dynamic mini-batch, r = {ratio}", "55 %", f"{1 - sent[1] / sent[0]:.0%}")
        convolutions = [
            _convolutions_s(trace.final_network, imagenet.run.batch, "v100-pcie-16gb")
            for trace in (imagenet.dense, imagenet.pruned[0])
        ]
        add("convolutions on a V100, last network", "1.9 ×", f"{convolutions[0] / convolutions[1]:.2f} ×")
    if cifar is not None:
        grown = cifar.projected(cifar.pruned[0], CIFAR, growing(cifar, CIFAR))
        add("mini-batch, ResNet-50 on CIFAR-100", "128 up to 320", _growth(grown))
    return pd.DataFrame(rows)


def _growth(projection: RunProjection) -> str:
    told, last = [], 0
    for epoch in projection.epochs:
        if epoch.batch_per_gpu != last:
            told.append(f"{epoch.batch_per_gpu} from epoch {epoch.epoch}" if last else str(epoch.batch_per_gpu))
            last = epoch.batch_per_gpu
    return ", ".join(told)


def _convolutions_s(network: Network, batch: int, device: str) -> float:
    step = step_time(network, load_device(device), StepSetting(batch=batch, precision=PRECISION))
    return math.fsum(layer.forward_s + layer.backward_s for layer in step.layers if layer.kind is LayerKind.CONV)


def figure(times: pd.DataFrame) -> Figure:
    """Predicted against measured time of dense, with 90 % intervals."""
    made = Figure(figsize=(6.5, 6), layout="constrained")
    axes = made.subplots()
    axes.plot([0.4, 1.05], [0.4, 1.05], color="0.6", lw=1)
    for number, (hardware, rows) in enumerate(times.groupby("hardware")):
        for where, marker in (("Table 1", "o"), ("Table 4", "s")):
            part = rows[rows["where"] == where]
            if part.empty:
                continue
            below, above = part.predicted - part.low, part.high - part.predicted
            label = f"{hardware}, {'dynamic' if where == 'Table 4' else 'fixed'} mini-batch"
            axes.errorbar(
                part.measured, part.predicted, [below, above], fmt=marker, ms=5, lw=1, color=f"C{number}", label=label
            )
    axes.set(xlabel="measured time, of dense (Lym et al. 2019)", ylabel="predicted time, of dense (planned runs)")
    axes.set_title("Nobody trained anything: the paper's time ratios, predicted", fontsize=10)
    axes.legend(fontsize=8, loc="upper left")
    n = len(times)
    axes.text(0.98, 0.02, f"n = {n}; bars: 90 % intervals", transform=axes.transAxes, ha="right", fontsize=8)
    return made


def summary(times: pd.DataFrame) -> str:
    """One sentence on how far off the ratios are."""
    return (
        f"{len(times)} ratios: mean error {times.error_points.abs().mean():.1f} points, "
        f"bias {times.error_points.mean():+.1f}, {times.inside.mean():.0%} inside their 90 % intervals"
    )


def main(argv: list[str] | None = None) -> int:
    """Plan, project, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the tables (CSV) and the figure (SVG)")
    parser.add_argument("--draws", type=int, default=3, help="trajectories per run; their spread is in the intervals")
    parser.add_argument("--plans", type=Path, help="folder where plans are kept between calls")
    parser.add_argument("--only", nargs="*", default=(), help="names of published runs")
    arguments = parser.parse_args(argv)
    made = pairs(arguments.draws, arguments.plans, arguments.only)
    tables = {
        "times": times_table(made),
        "inference": inference_table(made),
        "claims": claims_table(made),
    }
    for table in tables.values():
        print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    print(summary(tables["times"]))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            write_whole(arguments.out / f"paper_{name}.csv", table.to_csv(index=False))
        with writing_whole(arguments.out / "paper.svg") as file:
            figure(tables["times"]).savefig(file, format="svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
