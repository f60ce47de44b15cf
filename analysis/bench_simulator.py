"""How fast is the simulator? Prints ratios and absolute figures for one trace on this machine.

    python analysis/bench_simulator.py TRACE [--cluster dgx-a100] [--epochs 182] [--configurations 10000] [--workers 4]

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
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import msgspec

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
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}")
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.trace
        if arguments.epochs is not None:
            path = lengthened(path, arguments.epochs, Path(folder) / "trace.jsonl")
        whole_runs(path, arguments.cluster, arguments.gpus)
        link_by_link(path, arguments.cluster, arguments.gpus[:3])
        unequal_steps(path, arguments.cluster, arguments.unequal)
        memory(path, arguments.cluster, arguments.most)
        sweep(path, arguments.cluster, arguments.configurations, arguments.workers)


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


def whole_runs(path: Path, cluster: str, counts: list[int]) -> None:
    """Project the whole trace, nothing cached, by number of GPUs."""
    trace, where = read_trace(path), load_cluster(cluster)
    project(trace, where, 1)  # imports and catalog
    print(f"\nwhole run of {len(trace.epochs)} epochs and {len(trace.networks)} architectures, symmetric cluster")
    times = {count: seconds(lambda count=count: project(trace, where, count)) for count in counts}  # type: ignore[misc] # mypy types no default of a lambda
    for count, duration in times.items():
        print(f"  {count:>6} GPUs {duration:8.3f} s  {duration / times[counts[0]]:5.2f} × {counts[0]} GPUs")


def link_by_link(path: Path, cluster: str, counts: list[int]) -> None:
    """The same, with every all-reduce also sent over the cluster's links, of which one NIC is slow."""
    trace, where = read_trace(path), load_cluster(cluster)
    options = change(Options(), {"network": "links", "link_bandwidth": {"node 0 out": 0.5}})
    print("\nthe same link by link")
    for count in counts:
        duration = seconds(lambda count=count: project(trace, where, count, options))  # type: ignore[misc] # mypy types no default of a lambda
        print(f"  {count:>6} GPUs {duration:8.3f} s")


def unequal_steps(path: Path, cluster: str, counts: list[int]) -> None:
    """Project one epoch, whose one step is simulated GPU by GPU (three times: expected, low, high)."""
    print("\none step of unequal GPUs, simulated GPU by GPU")
    base = None
    for count in counts:
        duration = seconds(lambda count=count: _unequal(path, cluster, count)) / 3  # type: ignore[misc] # mypy types no default of a lambda
        base = base or duration / count
        print(f"  {count:>6} GPUs {duration:8.3f} s  {duration / count / base:5.2f} × the first per GPU")


def _unequal(path: Path, cluster: str, count: int) -> float:
    trace = read_trace(path)
    one_epoch = msgspec.structs.replace(trace, epochs=trace.epochs[:1], reconfigurations=())
    options = change(Options(), {"jitter": 0.05, "sampled_steps": 1})
    project(one_epoch, load_cluster(cluster), count, options)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes on Linux


def memory(path: Path, cluster: str, count: int) -> None:
    """Peak memory of a fresh process that simulates this many unequal GPUs."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        start = time.perf_counter()
        peak_gib = pool.submit(_unequal, path, cluster, count).result()
        duration = time.perf_counter() - start
    print(
        f"\n{count} unequal GPUs in a fresh process: peak memory {peak_gib:.2f} GiB, {duration:.1f} s for three steps"
    )


def sweep(path: Path, cluster: str, configurations: int, workers: int) -> None:
    """The same study on one process and on several; both pools are started and warm before the clock runs."""
    single, single_count = _sweep(path, cluster, max(1, configurations // workers), 1)
    several, several_count = _sweep(path, cluster, configurations, workers)
    rate, all_rate = single_count / single, several_count / several
    print("\nsweep (per configuration: the whole run on one cluster size)")
    print(
        f"  1 process    {single_count:>6} configurations {single:8.2f} s  {1e3 * single / single_count:7.2f} ms each"
    )
    print(f"  {workers} processes  {several_count:>6} configurations {several:8.2f} s  {all_rate:7.0f} a second")
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    worker_cpu = children.ru_utime + children.ru_stime
    print(
        f"  processor time: workers {worker_cpu:.1f} s (all of this script's), this process {time.process_time():.1f} s"
    )
    print(f"  speed-up {all_rate / rate:.2f} of {workers}: {all_rate / rate / workers:.1%} of perfect scaling")


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
