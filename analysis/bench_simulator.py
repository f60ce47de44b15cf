"""How fast is the simulator? Prints ratios and absolute figures for one trace on this machine.

    python analysis/bench_simulator.py TRACE [--cluster dgx-a100] [--epochs 182] [--configurations 10000] [--workers 4]
        [--csv FILE.csv]

With --epochs the recorded run is first made that long: every 10 epochs the next of its architectures follows, with a
mini-batch that is larger by 8, so that each group of 10 epochs has a step of its own to simulate.

Measured are: a whole run projected onto clusters of equal GPUs of growing size; one step of unequal GPUs, simulated
GPU by GPU; time and peak memory for 16,384 unequal GPUs, in a separate process; a sweep, in one process and in
several.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import msgspec
from benchmarks import Figure, add_option, tell

from ptsim.answers.study import read_study
from ptsim.answers.sweep import run_study
from ptsim.hardware.catalog import load_cluster
from ptsim.sim.options import Options
from ptsim.sim.run import change, project
from ptsim.trace.io import TraceWriter, read_trace
from ptsim.trace.schema import Architecture, Epoch


def main() -> None:
    """Run all benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--cluster", default="dgx-a100")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 64, 1024, 16384], help="of symmetric clusters")
    parser.add_argument("--unequal", type=int, nargs="+", default=[256, 1024, 4096], help="GPUs simulated one by one")
    parser.add_argument("--most", type=int, default=16384, help="GPUs of the memory benchmark")
    parser.add_argument("--configurations", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--epochs", type=int, help="length of the run; by default as recorded")
    add_option(parser)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}")
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.trace
        if arguments.epochs is not None:
            path = lengthened(path, arguments.epochs, Path(folder) / "trace.jsonl")
        figures = [
            *whole_runs(path, arguments.cluster, arguments.gpus),
            *link_by_link(path, arguments.cluster, arguments.gpus[:3]),
            *unequal_steps(path, arguments.cluster, arguments.unequal),
            *memory(path, arguments.cluster, arguments.most),
            *sweep(path, arguments.cluster, arguments.configurations, arguments.workers),
        ]
    tell("simulator", figures, arguments.csv)


def lengthened(path: Path, num_epochs: int, out: Path) -> Path:
    """The recorded run with `num_epochs` epochs, a new setting every 10 of them."""
    trace = read_trace(path)
    first: dict[str, Epoch] = {}
    for epoch in trace.epochs:
        first.setdefault(epoch.architecture, epoch)
    architectures = list(first.values())
    with TraceWriter(out) as writer:
        writer.write(trace.run)
        for name, network in trace.networks.items():
            writer.write(Architecture(id=name, network=network))
        for number in range(num_epochs):
            stretch = number // 10
            source = architectures[min(stretch, len(architectures) - 1)]
            batch = trace.epochs[0].batch_per_gpu + 8 * stretch
            steps = source.num_images // (batch * source.world_size)
            changed = {"epoch": number, "batch_per_gpu": batch, "num_iterations": steps}
            images = steps * batch * source.world_size
            writer.write(msgspec.structs.replace(source, **changed, num_images=images))
        for profile in trace.profiles:
            writer.write(profile)
    return out


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def whole_runs(path: Path, cluster: str, counts: list[int]) -> list[Figure]:
    """Project the whole trace, nothing cached, by number of GPUs."""
    trace, where = read_trace(path), load_cluster(cluster)
    project(trace, where, 1)  # imports and catalog
    run = f"whole run of {len(trace.epochs)} epochs, {len(trace.networks)} architectures"
    return [Figure(f"{run}, GPUs: {n}", seconds(partial(project, trace, where, n)), "s") for n in counts]


def link_by_link(path: Path, cluster: str, counts: list[int]) -> list[Figure]:
    """The same, with every all-reduce also sent over the cluster's links, of which one NIC is slow."""
    trace, where = read_trace(path), load_cluster(cluster)
    options = change(Options(), {"network": "links", "link_bandwidth": {"node 0 out": 0.5}})
    return [
        Figure(f"the same link by link, GPUs: {n}", seconds(partial(project, trace, where, n, options)), "s")
        for n in counts
    ]


def unequal_steps(path: Path, cluster: str, counts: list[int]) -> list[Figure]:
    """Project one epoch, whose one step is simulated GPU by GPU (three times: expected, low, high)."""
    return [
        Figure(f"one step, simulated GPU by GPU, GPUs: {n}", seconds(partial(_unequal, path, cluster, n)) / 3, "s")
        for n in counts
    ]


def _unequal(path: Path, cluster: str, count: int) -> float:
    trace = read_trace(path)
    one_epoch = msgspec.structs.replace(trace, epochs=trace.epochs[:1], reconfigurations=())
    options = change(Options(), {"jitter": 0.05, "sampled_steps": 1})
    project(one_epoch, load_cluster(cluster), count, options)
    status = Path("/proc/self/status").read_text(encoding="ascii")  # `ru_maxrss` begins with the parent's
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20  # kilobytes


def memory(path: Path, cluster: str, count: int) -> list[Figure]:
    """Peak memory of a fresh process that simulates this many unequal GPUs."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        start = time.perf_counter()
        peak_gib = pool.submit(_unequal, path, cluster, count).result()
        duration_s = time.perf_counter() - start
    return [
        Figure(f"peak memory of a fresh process for GPUs: {count}", peak_gib, "GiB"),
        Figure(f"its time for three steps, GPUs: {count}", duration_s, "s"),
    ]


def sweep(path: Path, cluster: str, configurations: int, workers: int) -> list[Figure]:
    """The same study on one process and on several; both pools are started and warm before the clock runs.

    A configuration is the whole run on one cluster size.
    """
    single_s, single_count = _sweep(path, cluster, max(1, configurations // workers), 1)
    several_s, several_count = _sweep(path, cluster, configurations, workers)
    rate, all_rate = single_count / single_s, several_count / several_s
    study = f"a sweep of {several_count:,} configurations, processes: {workers}"
    return [
        Figure("a configuration of a sweep, in one process", 1e3 / rate, "ms"),
        Figure(study, several_s, "s"),
        Figure(f"{study}, configurations a second", all_rate, "1/s"),
        Figure(f"{study}, of {workers} times one process", 100 * all_rate / rate / workers, "%"),
    ]


def _sweep(path: Path, cluster: str, configurations: int, workers: int) -> tuple[float, int]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "study.toml"
        counts = ", ".join(str(count) for count in range(2, 2 + configurations))
        text = f'traces = ["{path.resolve()}"]\nclusters = ["{cluster}"]\n'
        warm_up = Path(folder) / "warm.toml"
        # distinct contentions, so that no configuration is known from the warm-up
        warm_up.write_text(f"{text}gpus = [{counts[:200].rpartition(',')[0] or 2}]\n[options]\ncontention = 0.1\n")
        file.write_text(f"{text}gpus = [{counts}]\n")
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for number in range(workers):
                run_study(read_study(warm_up), pool, Path(folder) / f"warm{number}.jsonl")
            study = read_study(file)
            duration = seconds(lambda: run_study(study, pool, Path(folder) / "results.jsonl"))
    return duration, configurations


if __name__ == "__main__":
    main()
