"""Does the simulator say beforehand what a real cluster does? Namespaces, rate-limited cables and gloo in one box.

    sudo python analysis/cluster_lab.py [--ranks 4] [--rates 50,100,200,500] [--out FOLDER] [--short]

Builds one network namespace per rank (2 to 8), joined by a bridge in a namespace of its own; every rank's cable is rate
limited with `tc tbf`. Then, over gloo:

1. calibration: all-reduces at a rate that is not tested give the latency of a ring step and the seconds per byte that
   CPUs add to the wire; training on as many processes at once, but without communication, gives the compute; data-
   parallel training at that rate gives what DDP's host work adds to every step of a network;
2. prediction: all-reduce times, step times and bytes at every rate, written to `predictions.json`;
3. measurement: the same, read off the processes and the interfaces, compared in `comparison.csv` and on stdout.

Bytes are compared after TCP/IP overhead: the 66 bytes of Ethernet, IP and TCP headers of each packet that the interface
counts are taken off. Nothing leaves the namespaces, and they are removed whatever happens. Needs root, iproute2 and
network namespaces; exits 3 and says why where it has not got them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from ptsim.costs.buckets import ddp_buckets
from ptsim.costs.collectives import all_reduce, ring_wire_bytes
from ptsim.costs.measured import step_of_profile
from ptsim.hardware.spec import Cluster, Link
from ptsim.network import LayerKind
from ptsim.sim.ddp import plan_step
from ptsim.sim.step import Job, simulate_steps
from ptsim.trace.io import read_trace

HEADERS = 14 + 20 + 32  # bytes of Ethernet, IPv4 and TCP with time stamps
FRAME = 1514 / (1514 - HEADERS)  # bytes on the wire per byte of payload in a full packet
GLOO_HEADER = 48  # bytes; counted on two ranks at 1 KiB: 576 more than the payload, 12 messages
GLOO_SEGMENT = 2**20
SIZES = (2**10, 2**16, 2**19, 2**22)
NETWORKS = ("dense", "pruned")


def missing() -> str | None:
    """Why the lab cannot be built here; None where it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    for tool in ("ip", "tc"):
        if subprocess.run(["which", tool], capture_output=True, check=False).returncode:
            return f"`{tool}` of iproute2 is not installed"
    name = f"ptsimprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespace can be made: {made.stderr.strip()}"
    try:
        shaped = subprocess.run(
            f"ip -n {name} link add probe type veth peer name other && "
            f"tc -n {name} qdisc add dev probe root tbf rate 1mbit burst 4kb limit 64kb",
            shell=True,
            capture_output=True,
            text=True,
            check=False,
        )
        return f"links cannot be rate limited: {shaped.stderr.strip()}" if shaped.returncode else None
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)


class Lab:
    """A switch and `num_ranks` hosts as network namespaces; a context manager that always cleans up."""

    def __init__(self, num_ranks: int) -> None:
        if not 2 <= num_ranks <= 8:
            raise ValueError(f"{num_ranks} ranks; the lab holds 2 to 8")
        self.num_ranks = num_ranks
        self.switch = f"ptsim{os.getpid()}sw"
        self.hosts = [f"ptsim{os.getpid()}h{rank}" for rank in range(num_ranks)]

    def __enter__(self) -> Lab:
        try:
            _run(f"ip netns add {self.switch}")
            _run(f"ip -n {self.switch} link add bridge0 type bridge")
            _run(f"ip -n {self.switch} link set bridge0 up")
            for rank, host in enumerate(self.hosts):
                _run(f"ip netns add {host}")
                _run(f"ip -n {self.switch} link add port{rank} type veth peer name eth0 netns {host}")
                _run(f"ip -n {self.switch} link set port{rank} master bridge0 up")
                _run(f"ip -n {host} addr add 10.77.0.{rank + 1}/24 dev eth0")
                _run(f"ip -n {host} link set eth0 up")
                _run(f"ip -n {host} link set lo up")
                _run(f"ip -n {host} route replace 10.77.0.0/24 dev eth0 src 10.77.0.{rank + 1} congctl cubic")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self.hosts, self.switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def limit(self, mbit: float) -> None:
        """Let every rank send at most `mbit` Mbit/s."""
        burst = max(3200, round(mbit * 1e6 / 8 * 250e-6))
        for host in self.hosts:
            _run(f"tc -n {host} qdisc replace dev eth0 root tbf rate {mbit}mbit burst {burst} limit 16mb")

    def sent(self) -> list[tuple[int, int]]:
        """(payload bytes, packets) that every rank has sent so far."""
        shown = subprocess.run(
            ["ip", "-n", self.switch, "-s", "-j", "link"], capture_output=True, text=True, check=True
        ).stdout
        ports = {link["ifname"]: link["stats64"]["rx"] for link in json.loads(shown)}
        counts = [ports[f"port{rank}"] for rank in range(self.num_ranks)]
        return [(count["bytes"] - HEADERS * count["packets"], count["packets"]) for count in counts]

    def start(self, command: list[str], *, team: bool, log: Path) -> list[subprocess.Popen[bytes]]:
        """The command in every namespace: as ranks of one team, or each on its own."""
        processes = []
        for rank, host in enumerate(self.hosts):
            variables = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "LAB_RANK": str(rank)}
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
                variables.pop(name, None)
            if team:
                variables |= {"RANK": str(rank), "WORLD_SIZE": str(self.num_ranks), "LOCAL_RANK": str(rank)}
                variables |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29511"}
            words = [word.replace("{rank}", str(rank)) for word in command]
            with open(f"{log}.{rank}", "wb") as errors:
                processes.append(
                    subprocess.Popen(["ip", "netns", "exec", host, *words], env=variables, stderr=errors, stdout=errors)
                )
        return processes


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{command}: {done.stderr.strip()}")


def _wait(processes: list[subprocess.Popen[bytes]], log: Path, timeout_s: float = 280) -> None:
    end = time.monotonic() + timeout_s
    try:
        for rank, process in enumerate(processes):
            if process.wait(max(1.0, end - time.monotonic())):
                raise RuntimeError(f"rank {rank} failed: {Path(f'{log}.{rank}').read_text()[-600:]}")
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def worker(sizes: list[int], iterations: int, out: Path) -> None:
    """One rank's part of the raw all-reduces: seconds of each, and payload bytes sent while they ran back to back."""
    import torch
    import torch.distributed as dist

    def sent() -> int:
        folder = Path("/sys/class/net/eth0/statistics")
        return int((folder / "tx_bytes").read_text()) - HEADERS * int((folder / "tx_packets").read_text())

    dist.init_process_group("gloo")
    found = []
    for size in sizes:
        payload = torch.ones(size // 4)
        dist.all_reduce(payload)
        seconds = []
        for _ in range(iterations):
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce(payload)
            seconds.append(time.perf_counter() - begin)
            payload.fill_(1.0)
        dist.barrier()
        time.sleep(0.05)  # what the barrier sends last is not an all-reduce's
        before = sent()
        for _ in range(iterations):
            dist.all_reduce(payload)
            payload.fill_(1.0)
        time.sleep(0.05)
        found.append({"bytes": size, "seconds": seconds, "payload": (sent() - before) / iterations})
        dist.barrier()
    out.write_text(json.dumps(found))
    dist.destroy_process_group()


def raw_all_reduces(lab: Lab, folder: Path, sizes: tuple[int, ...], iterations: int) -> pd.DataFrame:
    """One row per size: seconds of the slowest rank, mean payload bytes a rank sent.

    The lower quartile of the iterations: slower ones are what other programs on this machine do.
    """
    command = [sys.executable, __file__, "--worker", ",".join(map(str, sizes)), "--iterations", str(iterations)]
    log = folder / "raw"
    _wait(lab.start([*command, "--out", str(folder / "raw{rank}.json")], team=True, log=log), log)
    ranks = [json.loads((folder / f"raw{rank}.json").read_text()) for rank in range(lab.num_ranks)]
    rows = []
    for i, size in enumerate(sizes):
        slowest = [max(times) for times in zip(*(rank[i]["seconds"] for rank in ranks), strict=True)]
        payload = statistics.fmean(rank[i]["payload"] for rank in ranks)
        rows.append({"bytes": size, "seconds": float(np.percentile(slowest, 25)), "payload": payload})
    return pd.DataFrame(rows)


def cluster_at(mbit: float, num_ranks: int, step_s: float, cpu_s_per_byte: float) -> Cluster:
    """The lab as a ptsim cluster: one rank a node, the cable's payload rate and what CPUs add to every byte sent."""
    per_byte = FRAME / (mbit * 1e6 / 8) + cpu_s_per_byte
    inside = Link(name="none", bandwidth_bytes_per_s=1e12, latency_s=0.0)
    cable = Link(name=f"{mbit} Mbit/s veth", bandwidth_bytes_per_s=1 / per_byte, latency_s=step_s)
    return Cluster(
        name=f"lab at {mbit} Mbit/s",
        device="unspecified",
        gpus_per_node=1,
        intra=inside,
        inter=cable,
        max_nodes=num_ranks,
        library="gloo",
        sources={"inter": "calibrated at another rate"},
    )


def calibrate(raw: pd.DataFrame, mbit: float, num_ranks: int) -> tuple[float, float]:
    """(seconds per ring step, CPU seconds per byte sent) that explain the all-reduces at the calibration rate."""
    wire = np.array([ring_wire_bytes(size, num_ranks) for size in raw.bytes])
    rest = raw.seconds.to_numpy() - wire * FRAME / (mbit * 1e6 / 8)
    system = np.stack([np.full(len(raw), 2.0 * (num_ranks - 1)), wire], axis=1) / raw.seconds.to_numpy()[:, None]
    (step_s, per_byte), *_ = np.linalg.lstsq(system, rest / raw.seconds.to_numpy(), rcond=None)
    if step_s < 0:
        step_s, per_byte = 0.0, float(np.mean(rest / wire))
    return float(step_s), max(0.0, float(per_byte))


def gloo_bytes(message_bytes: int, num_ranks: int) -> float:
    """Payload of one gloo all-reduce as a rank sends it: the ring's, and its messages' headers.

    A ring step moves a rank's share in at least two segments of at most 1 MiB, and each segment is announced, granted
    and sent: three messages.
    """
    segments = max(2, -(-message_bytes // num_ranks // GLOO_SEGMENT))
    return ring_wire_bytes(message_bytes, num_ranks) + 3 * segments * 2 * (num_ranks - 1) * GLOO_HEADER


def pruned_resnet20(num_classes: int = 10) -> Any:
    """ResNet-20 with a random 60 % of its prunable channels removed, the same on every rank."""
    import torch

    from ptsim import zoo
    from ptsim.prune.groups import find_groups, keep_one
    from ptsim.prune.proof import zero_components
    from ptsim.prune.reconfigure import reconfigure

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = zoo.find("resnet20").build(num_classes=num_classes)
        groups = find_groups(model, (3, 32, 32))
        mask = groups.prunable & (torch.rand(len(groups.prunable)) < 0.6)
        mask, _ = keep_one(groups, mask, torch.rand(len(mask)))
        zero_components(model, groups, mask)
        reconfigure(model, groups)
    return model


def train_command(network: str, images: int, batch: int, epochs: int, run: str) -> list[str]:
    """The ptsim command line that trains on the embedded digits."""
    model = "resnet20" if network == "dense" else f"{Path(__file__).resolve()}:pruned_resnet20"
    command = [sys.executable, "-m", "ptsim", "train", "--model", model, "--dataset", "digits", "--epochs", str(epochs)]
    command += ["--batch", str(batch), "--train-limit", str(images), "--penalty-ratio", "0", "--out", run]
    return [*command, "--set", "device=cpu", "--set", "validation_limit=32"]


def median_step_s(run: Path) -> float:
    """Median step of the epochs after the first, which pays for DDP's un-overlapped first iteration."""
    return statistics.median(epoch.step.median_s for epoch in read_trace(run / "trace.jsonl").epochs[1:])


def predicted_step(run: Path, compute_s: float, cluster: Cluster, num_ranks: int) -> tuple[float, float]:
    """(step seconds, payload bytes a rank sends per step) of data-parallel training, simulated."""
    trace = read_trace(run / "trace.jsonl")
    network = trace.network_of(trace.epochs[-1])
    profile = next(p for p in trace.profiles if p.architecture == network.id)
    step = step_of_profile(network, profile, regularizer=False)
    scale = compute_s / step.compute_s  # the profile's shares, the pace of the contended processes
    step = msgspec.structs.replace(
        step,
        layers=tuple(
            msgspec.structs.replace(layer, forward_s=layer.forward_s * scale, backward_s=layer.backward_s * scale)
            for layer in step.layers
        ),
        optimizer_s=step.optimizer_s * scale,
        regularizer_s=step.regularizer_s * scale,
        overhead_s=step.overhead_s * scale,
    )
    buckets = ddp_buckets(network)
    plan = plan_step(step, buckets, lambda size: all_reduce(size, cluster, num_ranks))
    norms = [layer.out_channels for layer in network.layers if layer.kind is LayerKind.BATCH_NORM]
    epoch_end = sum(2 * gloo_bytes(4 * channels, num_ranks) for channels in norms)  # mean and variance, averaged
    payload = sum(gloo_bytes(bucket.num_bytes, num_ranks) for bucket in buckets)
    return simulate_steps([Job(plan=plan)])[0].step_s, payload + epoch_end / trace.epochs[-1].num_iterations


def train_and_count(lab: Lab, command: list[str], run: Path, log: Path, epochs: int) -> tuple[float, float]:
    """(median step seconds, payload bytes a rank sent per step) of a run; bytes between first and last epoch's end."""
    processes = lab.start(command, team=True, log=log)
    counts: dict[int, float] = {}
    trace = run / "trace.jsonl"
    while any(process.poll() is None for process in processes) and len(counts) < epochs:
        written = trace.read_text().count('"record":"epoch"') if trace.exists() else 0
        if written and written not in counts:
            counts[written] = statistics.fmean(payload for payload, _ in lab.sent())
        time.sleep(0.01)
    _wait(processes, log)
    iterations = sum(epoch.num_iterations for epoch in read_trace(trace).epochs[1:])
    return median_step_s(run), (counts[epochs] - counts[1]) / iterations


def experiment(options: argparse.Namespace, folder: Path) -> pd.DataFrame:
    """Calibrate, predict, then measure; one row per quantity."""
    ranks, per_rank, iterations, epochs = options.ranks, 32, 10, 3 if options.short else 4
    sizes = SIZES[:3] if options.short else SIZES
    networks = [] if options.no_train else (NETWORKS[:1] if options.short else NETWORKS)
    images = per_rank * iterations
    predictions: dict[str, Any] = {}
    with Lab(ranks) as lab:
        lab.limit(options.calibration_rate)
        raw = raw_all_reduces(lab, folder, sizes, options.iterations)
        step_s, per_byte = calibrate(raw, options.calibration_rate, ranks)
        print(f"calibrated at {options.calibration_rate} Mbit/s: {step_s * 1e6:.0f} us a ring step, "
              f"{per_byte * 1e9:.3f} ns of CPU per byte sent")  # fmt: skip
        compute: dict[str, tuple[Path, float]] = {}
        for network in networks:
            command = train_command(network, images, per_rank, epochs, str(folder / f"alone-{network}-{{rank}}"))
            log = folder / f"alone-{network}.log"
            _wait(lab.start(command, team=False, log=log), log)
            runs = [folder / f"alone-{network}-{rank}" for rank in range(ranks)]
            compute[network] = runs[0], statistics.median(median_step_s(run) for run in runs)
            print(f"{network}: {compute[network][1] * 1e3:.1f} ms of compute a step, {ranks} processes at once")
        host: dict[str, float] = {}
        for network, (run, seconds) in compute.items():
            said, _ = predicted_step(run, seconds, cluster_at(options.calibration_rate, ranks, step_s, per_byte), ranks)
            run = folder / f"team-{network}-calibration"
            command = train_command(network, images * ranks, per_rank * ranks, epochs, str(run))
            log = folder / f"team-{network}-calibration.log"
            host[network] = train_and_count(lab, command, run, log, epochs)[0] - said
            print(f"{network} over DDP: {host[network] * 1e3:.1f} ms a step beyond the simulation")
        for rate in options.rates:
            cluster = cluster_at(rate, ranks, step_s, per_byte)
            for size in sizes:
                time_s = all_reduce(size, cluster, ranks).seconds
                predictions[f"all-reduce {size}/{rate}"] = (time_s, gloo_bytes(size, ranks))
            for network, (run, seconds) in compute.items():
                time_s, payload = predicted_step(run, seconds, cluster, ranks)
                predictions[f"step {network}/{rate}"] = (time_s + host[network], payload)
        (folder / "predictions.json").write_text(json.dumps(predictions, indent=1))
        rows = []
        for rate in options.rates:
            lab.limit(rate)
            measured = raw_all_reduces(lab, folder, sizes, options.iterations)
            rows += [(f"all-reduce {row.bytes}", rate, row.seconds, row.payload) for row in measured.itertuples()]
            for network in networks:
                run = folder / f"team-{network}-{rate}"
                command = train_command(network, images * ranks, per_rank * ranks, epochs, str(run))
                found = train_and_count(lab, command, run, folder / f"team-{network}-{rate}.log", epochs)
                rows.append((f"step {network}", rate, *found))
    frame = pd.DataFrame(rows, columns=["what", "mbit_per_s", "measured_s", "measured_bytes"])
    said = [predictions[f"{row.what}/{row.mbit_per_s}"] for row in frame.itertuples()]
    frame["predicted_s"], frame["predicted_bytes"] = zip(*said, strict=True)
    frame["time_error"] = frame.predicted_s / frame.measured_s - 1
    frame["bytes_error"] = frame.predicted_bytes / frame.measured_bytes - 1
    frame.to_csv(folder / "comparison.csv", index=False)
    return frame


def main() -> int:
    """Run the lab, or one rank of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument(
        "--rates", type=lambda text: [float(rate) for rate in text.split(",")], default=[50, 100, 200, 500]
    )
    parser.add_argument("--calibration-rate", type=float, default=300)
    parser.add_argument("--iterations", type=int, default=7)
    parser.add_argument("--short", action="store_true", help="fewer sizes, only the dense network")
    parser.add_argument("--no-train", action="store_true", help="raw all-reduces only")
    parser.add_argument("--out", type=Path, help="where results go; a temporary folder otherwise")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker([int(size) for size in options.worker.split(",")], options.iterations, options.out)
        return 0
    if reason := missing():
        print(f"the cluster lab cannot run here: {reason}", file=sys.stderr)
        return 3
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the lab is taken down
    with contextlib.ExitStack() as stack:
        folder = options.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        frame = experiment(options, folder)
    pd.options.display.width = 160
    print(frame.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    for kind in ("all-reduce", "step"):
        part = frame[frame.what.str.startswith(kind)]
        if len(part):
            times, counts = part.time_error.abs(), part.bytes_error.abs()
            print(f"{kind}: median time error {times.median():.1%}, worst {times.max():.1%}")
            print(f"{kind}: worst error of bytes {counts.max():.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
