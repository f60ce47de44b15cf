"""Does ASTRA-sim, given the steps that ptsim exports, find the times that ptsim finds?

    python analysis/astra_sim.py AstraSim_Analytical_Congestion_Unaware planned.jsonl --gpus 8,16

ASTRA-sim (analytical network) runs the first and the last step of every trace with the durations that ptsim predicts
for the cluster's GPU, with recorded ones, with its own roofline of that GPU, and without computation. Columns `ptsim`
are of the same operators and collectives in ptsim's simulator over the same links: rings inside the nodes and rings of
their shards between them, on links as ptsim sees them for large messages. Column `simulate` is of `ptsim simulate`
(`ptsim allreduce` in the first table), with all that ASTRA-sim is not told: what a collective takes to start, NCCL's
choice of algorithm and protocol, the hooks of gradients, that a GPU among others computes more slowly, and that
computation and communication hold each other up.

docs/export.md says which revision of ASTRA-sim was run, and on which trace. The script writes all of its files, in a
temporary folder, and needs only its binary.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pandas as pd

import ptsim
from ptsim.costs import nccl
from ptsim.costs.collectives import (
    AllReduceTime,
    all_reduce,
    hierarchical_all_reduce_seconds,
    nodes_for,
    reduction,
)
from ptsim.costs.measured import find_profile, step_of_profile
from ptsim.costs.scaling import among, contention_of, hook_seconds
from ptsim.costs.step import step_time
from ptsim.costs.times import LayerTime, StepTime
from ptsim.export.chakra import Collective, Node, encode_trace, step_nodes
from ptsim.hardware.catalog import load_cluster
from ptsim.hardware.spec import Cluster
from ptsim.network import Network
from ptsim.sim import ddp
from ptsim.sim.bounded import data_parallel_step

SIZES = tuple(2**power for power in (16, 20, 24, 27))
AT_ONCE = 1e21  # bytes per second of a memory that costs no time
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
SYSTEM = """{"endpoint-delay": 1, "active-chunks-per-dimension": 1, "preferred-dataset-splits": 1, "trace-enabled": 1,
    "scheduling-policy": "FIFO", "collective-optimization": "localBWAware"}"""
FINISHED = re.compile(r"sys\[(\d+)\] finished, (\d+) cycles, exposed communication (\d+) cycles")
EXECUTED = re.compile(r"callback,sys->id=(\d+), tick=\d+, node->id=(\d+)")


class Result(NamedTuple):
    """What ASTRA-sim said: the slowest rank's step, and how many ranks finished and nodes were executed."""

    step_s: float
    exposed_s: float
    ranks: int
    nodes: int


def parse(output: str, log: str) -> Result:
    """ASTRA-sim's output, and its log with `trace-enabled`; a rank that did not finish is not in them."""
    ends = [(int(step), int(exposed)) for _, step, exposed in FINISHED.findall(output)]
    step, exposed = max(ends, default=(0, 0))
    return Result(step / 1e9, exposed / 1e9, len(ends), len(set(EXECUTED.findall(log))))


class Machine:
    """GPUs of a cluster that fill their nodes, with links as ptsim sees them for large messages."""

    def __init__(self, cluster: Cluster, gpus: int) -> None:
        self.cluster, self.gpus, self.nodes = cluster, gpus, nodes_for(cluster, gpus)
        self.inside = gpus // self.nodes
        line = nccl.fastest_line(cluster, gpus, self.nodes, max(SIZES), "ring")
        seen, _ = nccl.effective_cluster(cluster, gpus, self.nodes, line)
        self.intra, self.inter = seen.intra, seen.inter or seen.intra

    def all_reduce(self, num_bytes: int, memory_bytes_per_s: float) -> AllReduceTime:
        """What ptsim says over these links; ASTRA-sim's reductions read twice and write once besides."""
        seconds = hierarchical_all_reduce_seconds(num_bytes, self.inside, self.nodes, self.intra, self.inter)
        seconds += 3 * num_bytes * (1 - 1 / self.gpus) / memory_bytes_per_s
        return AllReduceTime(
            seconds=seconds, low_s=seconds, high_s=seconds, algorithm="ring", wire_bytes_per_gpu=0.0, tier="datasheet"
        )

    def files(self, peak_flops_per_s: float, memory_bytes_per_s: float) -> dict[str, str]:
        """ASTRA-sim's inputs; a peak of 0 is no roofline. Its links' GB are 2³⁰ bytes, and a switch is two hops."""
        every = ((self.inside, self.intra, 1), (self.nodes, self.inter, self.inside))  # GPUs of a node share its NICs
        levels = [level for level in every if level[0] > 1]
        network = {
            "topology": ["Switch"] * len(levels),
            "npus_count": [count for count, _, _ in levels],
            "bandwidth": [link.bandwidth_bytes_per_s / shared / 2**30 for _, link, shared in levels],
            "latency": [(link.latency_s or 0.0) * 1e9 / 2 for _, link, _ in levels],
        }
        system = json.loads(SYSTEM) | {
            "local-mem-bw": memory_bytes_per_s / 1e9,
            "peak-perf": peak_flops_per_s / 1e12,
            "roofline-enabled": int(peak_flops_per_s > 0),
            **{f"{kind}-implementation": ["ring"] * len(levels) for kind in KINDS},
        }
        return {
            "network": "".join(f"{name}: {json.dumps(values)}\n" for name, values in network.items()),
            "system": json.dumps(system),
            "remote-memory": json.dumps({"memory-type": "NO_MEMORY_EXPANSION"}),
        }


def run(binary: Path, folder: Path, machine: Machine, nodes: Sequence[Node], files: dict[str, str]) -> Result:
    """ASTRA-sim with the same nodes for every rank; every rank has to finish, with every node executed."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    for rank in range(machine.gpus):
        (folder / f"step.{rank}.et").write_bytes(encode_trace(tuple(nodes), {}))
    command = [str(binary.resolve()), "--workload-configuration=step"]
    command += [f"--{name}-configuration={name}" for name in files]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)
    result = parse(done.stdout, "".join(file.read_text() for file in folder.glob("log/log*")))
    if done.returncode or result[2:] != (machine.gpus, machine.gpus * len(nodes)):
        raise SystemExit(f"{folder}: {result}, exit status {done.returncode}\n{(done.stdout + done.stderr)[-2000:]}")
    return result


def as_step(network: Network, seconds: dict[str, float], share: float) -> StepTime:
    """The nodes' times as ptsim's simulator takes them: the update of all parameters, of which a GPU has `share`."""
    layers = tuple(
        LayerTime(
            layer=layer.name,
            kind=layer.kind,
            forward_s=seconds.get(f"{layer.name}.forward", 0.0),
            backward_s=seconds.get(f"{layer.name}.backward", 0.0),
            tier="measured",
        )
        for layer in network.layers
    )
    parts = {"optimizer_s": seconds["optimizer"] / share, "regularizer_s": 0.0, "overhead_s": seconds["loss"]}
    return StepTime(layers=layers, low_s=1.0, high_s=1.0, tier="measured", **parts)


def step_row(
    binary: Path, folder: Path, machine: Machine, trace: ptsim.Trace, number: int, way: str, sharding: str
) -> dict[str, Any]:
    """Epoch `number`'s step in one of the ways; empty where nothing of it was recorded."""
    cluster, gpus, epoch, overlap = machine.cluster, machine.gpus, trace.epochs[number], not trace.compiled
    network = trace.network_of(epoch)
    setting = msgspec.structs.replace(trace.setting_of(epoch), num_gpus=gpus, sharding=sharding, passes=1)
    step, profile = None, find_profile(network, trace.profiles, setting)
    if way == "predicted":
        step = step_time(network, cluster.gpu, setting)
    elif way == "recorded" and profile is None:
        return {}
    elif way == "recorded":
        step = step_of_profile(network, profile, regularizer=epoch.regularized)
    nodes = step_nodes(network, setting, step=step, overlap=overlap)
    peak, memory = cluster.gpu.peak_flops_per_s[setting.precision], cluster.gpu.memory_bandwidth_bytes_per_s
    seconds = {node.name: max(node.duration_micros * 1e-6, 1e-9) for node in nodes}  # ASTRA-sim's least
    if way == "roofline":
        seconds = {node.name: max(node.num_ops / peak, node.tensor_bytes / memory) for node in nodes}
    told = (peak, memory) if way == "roofline" else (0.0, AT_ONCE)
    result = run(binary, folder / f"{epoch.epoch}-{gpus}-{way}", machine, nodes, machine.files(*told))
    shards, own = ddp.shards_of(network, setting), as_step(network, seconds, setting.update_share)
    same = {"shards": shards, "overlap": overlap, "buffers": False}
    ours = data_parallel_step(
        network, own, lambda size: machine.all_reduce(size, told[1]), contention=0.0, **same
    ).expected
    row = {"epoch": epoch.epoch, "gpus": gpus, "way": way, "nodes": len(nodes), "astra_ms": 1e3 * result.step_s}
    row |= {"ptsim_ms": 1e3 * ours.step_s, "off_%": 100 * (result.step_s / ours.step_s - 1)}
    row |= {"astra_exposed_ms": 1e3 * result.exposed_s, "ptsim_exposed_ms": 1e3 * ours.exposed_communication_s}
    if way == "predicted":
        costs = {"contention": contention_of(cluster, gpus), "tensor_s": hook_seconds(cluster, gpus)}

        def chosen(size: int) -> AllReduceTime:  # without being told the algorithm
            return reduction(size, cluster, gpus, sharded=shards is not None)

        said = data_parallel_step(network, among(step, cluster, gpus), chosen, **costs, **same).expected
        row |= {"simulate_ms": 1e3 * said.step_s, "simulate_wait_ms": 1e3 * said.communication_wait_s}
    return row


def reduce_row(binary: Path, folder: Path, machine: Machine, size: int) -> dict[str, Any]:
    """An all-reduce by itself."""
    node = Node(id=0, name="all_reduce", data_deps=(), collective=Collective.ALL_REDUCE, comm_bytes=size)
    result = run(binary, folder / f"{machine.gpus}-{size}", machine, [node], machine.files(0.0, AT_ONCE))
    ours_s, said = machine.all_reduce(size, AT_ONCE).seconds, all_reduce(size, machine.cluster, machine.gpus)
    row = {"gpus": machine.gpus, "KiB": size // 1024, "astra_us": 1e6 * result.step_s, "ptsim_us": 1e6 * ours_s}
    row |= {"off_%": 100 * (result.step_s / ours_s - 1)}
    return row | {"allreduce_us": 1e6 * said.seconds, "algorithm": said.algorithm}


def main(arguments: list[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=Path, help="AstraSim_Analytical_Congestion_Unaware")
    parser.add_argument("traces", nargs="+", type=Path, help="traces, recorded or planned")
    parser.add_argument("--cluster", default="dgx-h100", help="catalog name or TOML file")
    parser.add_argument("--gpus", default="8,16", help="GPU counts, nodes filled")
    parser.add_argument("--sharding", default="none", choices=("none", "zero1", "zero2"), help="of the update")
    options = parser.parse_args(arguments)
    pd.options.display.float_format = "{:.3f}".format
    machines = [Machine(load_cluster(options.cluster), int(count)) for count in options.gpus.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        reduces = [reduce_row(options.binary, folder, machine, size) for machine in machines for size in SIZES]
        print(pd.DataFrame(reduces).to_string(index=False))
        for index, path in enumerate(options.traces):
            trace = ptsim.read_trace(path)
            steps = [
                step_row(options.binary, folder / str(index), machine, trace, number, way, options.sharding)
                for machine in machines
                for number in sorted({0, len(trace.epochs) - 1})
                for way in ("predicted", "recorded", "roofline", "links")
            ]
            print(f"\n{path}: {trace.run.model}, sharding {options.sharding}")
            print(pd.DataFrame(filter(None, steps)).to_string(index=False, na_rep="–"))


if __name__ == "__main__":
    main()
