"""Does the simulator say beforehand what a real cluster does? Namespaces, rate-limited cables and gloo in one box.

    sudo python analysis/cluster_lab.py [--ranks 4] [--rates 100,200,400] [--out FOLDER] [--short]

Builds one network namespace per rank (2 to 8), joined by a bridge in a namespace of its own; every rank's cable is rate
limited with `tc tbf`. Then, over gloo:

1. calibration, at two rates that are not tested: all-reduces give the latencies of a ring step and the bytes on the
   wire per byte sent; data-parallel training gives what DDP's host work adds to a step;
2. for every rate, first all-reduces of several sizes and then a training run: the prediction is written to
   `predictions.json` before the run starts. Before each training run its network is trained without communication by as
   many processes at once as there are ranks: ranks that share cores slow each other down, and the machine may have
   become faster or slower since the last time; a prediction takes the median of what it has so far;
3. comparison in `comparison.csv` and on stdout.

Bytes are compared after TCP/IP overhead: the 66 bytes of Ethernet, IP and TCP headers of each packet that the interface
counts are taken off. Nothing leaves the namespaces, and they are removed whatever happens; those of a lab that was
killed are removed by the next one. Needs root, iproute2, util-linux and network namespaces; exits 3 and says why where
it has not got them.

The box must not be what is measured. What was found to disturb, by tracing the scheduler, and what is done about it:

* gloo's IO thread spins while a worker thread holds a connection's lock (`Pair::handleEvents` tries the lock and asks
  epoll again). Where both share a core and the IO thread has pushed the worker off it, the lock is held until the
  scheduler's next tick: 0 to 4 ms per collective at 250 Hz, which a host with a core for each never pays. Threads that
  communicate run under SCHED_RR: they do not preempt each other, and nothing else delays them, neither the network's
  computation on the same core nor other programs. The computation itself stays an ordinary thread, at the highest
  priority of those (nice -20, of the process and of its session's group): beside other work steps took up to twice
  as long.
* Packets of 1500 bytes cost the shaper 7 to 14 ms of CPU per MiB and rank, taken from the computation; with 9000 bytes
  (jumbo frames) it is 2 to 3 ms. They leave TCP one by one (`gso_max_segs 1`): interfaces count what cables
  carry.
* A token bucket lets a burst through at once when the cable has been idle: a packet and 250 us (the timer may be that
  late without loss of rate). Predictions count it (`Cable`); measurements pause until the bucket is full again.
* TCP's congestion control is cubic, whatever the machine's default: BBR sends at its own estimate of the rate.
* Address resolution is static and IPv6 has no addresses: their packets are no collective's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
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
from scipy.optimize import least_squares

from ptsim.costs.buckets import ddp_buckets
from ptsim.costs.collectives import AllReduceTime, all_reduce, ring_wire_bytes
from ptsim.costs.measured import step_of_profile
from ptsim.hardware.spec import Cluster, Link
from ptsim.network import LayerKind, Network
from ptsim.sim.ddp import compute_plan, with_communication
from ptsim.sim.step import simulate_steps
from ptsim.sim.work import TrainingJob
from ptsim.textfile import write_whole
from ptsim.trace.io import read_trace

HEADERS = 14 + 20 + 32  # bytes of Ethernet, IPv4 and TCP with time stamps
MTU = 9000
PACKET = MTU + 14  # bytes on the wire of a full packet
FRAME = PACKET / (PACKET - HEADERS)  # bytes on the wire per byte of payload in it
GLOO_HEADER = 48  # bytes; counted on two ranks at 1 KiB: 576 more than the payload, 12 messages
GLOO_SEGMENT = 2**20
SIZES = (2**10, 2**14, 2**16, 2**19, 2**22, 2**24)
COMMUNICATING = ("gloo_tcp_loop", "pt_gloo_runloop")  # names of the threads
REAL_TIME = ["chrt", "--rr", "1"]
FIRST = ["nice", "-n", "-20"]
NETWORKS = ("dense", "pruned")


def missing() -> str | None:
    """Why the lab cannot be built here; None where it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    for tool, package in (
        ("ip", "iproute2"),
        ("tc", "iproute2"),
        *((name, "util-linux") for name in ("taskset", "chrt", "setpriv")),
    ):
        if subprocess.run(["which", tool], capture_output=True, check=False).returncode:
            return f"`{tool}` of {package} is not installed"
    refused = subprocess.run([*REAL_TIME, "true"], capture_output=True, text=True, check=False)
    if refused.returncode:
        return f"threads cannot be given SCHED_RR: {refused.stderr.strip()}"
    name = f"ptsim{os.getpid()}probe"
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
        self.switch = f"ptsim{os.getpid()}switch"
        self.hosts = [f"ptsim{os.getpid()}host{rank}" for rank in range(num_ranks)]

    def __enter__(self) -> Lab:
        remove_abandoned()
        try:
            _run(f"ip netns add {self.switch}")
            _run(f"ip -n {self.switch} link add bridge0 mtu {MTU} type bridge")
            _run(f"ip -n {self.switch} link set bridge0 up")
            for rank, host in enumerate(self.hosts):
                _run(f"ip netns add {host}")
                _run(f"ip -n {self.switch} link add port{rank} mtu {MTU} type veth peer name eth0 netns {host}")
                _run(f"ip -n {self.switch} link set port{rank} master bridge0 up")
                _run(f"ip -n {host} link set eth0 mtu {MTU} gso_max_segs 1 addrgenmode none address {_mac(rank)}")
                _run(f"ip -n {host} addr add 10.77.0.{rank + 1}/24 dev eth0")
                _run(f"ip -n {host} link set eth0 up")
                _run(f"ip -n {host} link set lo up")
                _run(f"ip -n {host} route replace 10.77.0.0/24 dev eth0 src 10.77.0.{rank + 1} congctl cubic")
                for other in range(self.num_ranks):
                    if other != rank:
                        _run(f"ip -n {host} neigh add 10.77.0.{other + 1} lladdr {_mac(other)} dev eth0")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self.hosts, self.switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def limit(self, mbit: float) -> None:
        """Let every rank send at most `mbit` Mbit/s."""
        for host in self.hosts:
            _run(f"tc -n {host} qdisc replace dev eth0 root tbf rate {mbit}mbit burst {burst_bytes(mbit)} limit 16mb")

    def start(
        self, command: list[str], *, team: bool, log: Path, real_time: bool = False
    ) -> list[subprocess.Popen[bytes]]:
        """The command in every namespace: as ranks of one team, or each on its own; they end when the lab does.

        A rank keeps to one core. Left to the kernel, two ranks at times shared one while another was idle, and their
        steps took twice as long.
        """
        processes, cores = [], sorted(os.sched_getaffinity(0))
        for rank, host in enumerate(self.hosts):
            variables = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "LAB_RANK": str(rank)}
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
                variables.pop(name, None)
            if team:
                variables |= {"RANK": str(rank), "WORLD_SIZE": str(self.num_ranks), "LOCAL_RANK": str(rank)}
                variables |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29511"}
            words = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", host]
            words += ["taskset", "-c", str(cores[rank % len(cores)]), *(REAL_TIME if real_time else FIRST)]
            words += [word.replace("{rank}", str(rank)) for word in command]
            with open(f"{log}.{rank}", "wb") as errors:
                started = subprocess.Popen(words, env=variables, stderr=errors, stdout=errors, start_new_session=True)
            processes.append(started)
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a kernel without session groups
                Path(f"/proc/{started.pid}/autogroup").write_text("-20")
        return processes


def remove_abandoned() -> None:
    """Remove the namespaces of labs whose process is gone; what runs in them died with it."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for name, pid in re.findall(r"^(ptsim(\d+)(?:switch|host\d|probe))\b", listed, re.MULTILINE):
        if not Path(f"/proc/{pid}").exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def give_priority(process: int) -> None:
    """Let the threads of a rank that communicate run when they can, and never push each other off the core.

    Round robin, not FIFO: an IO thread that spins for a lock when it is given priority must let the holder run at last.
    """
    for thread in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # a thread that has ended needs none
            if (thread / "comm").read_text().strip() in COMMUNICATING:
                os.sched_setscheduler(int(thread.name), os.SCHED_RR, os.sched_param(1))


def burst_bytes(mbit: float) -> int:
    """What a cable that has been idle lets through at once: a packet, and 250 us of its rate."""
    return PACKET + round(mbit * 1e6 / 8 * 250e-6)


def _mac(rank: int) -> str:
    return f"02:00:00:00:00:{rank + 1:02x}"


def sent_bytes(process: str | int = "self") -> tuple[int, int]:
    """(bytes on the wire, payload bytes) that the host of a process has sent so far, as its interface counts."""
    for line in Path(f"/proc/{process}/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "eth0":
            wire, packets = (int(number) for number in counts.split()[8:10])
            return wire, wire - HEADERS * packets
    raise OSError(f"process {process} has no eth0")


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


def worker(counts: dict[int, int], out: Path) -> None:
    """One rank's part of the raw all-reduces: seconds of each, and bytes sent while they ran back to back.

    Args:
        counts: how many all-reduces of each size; sizes take turns in a random order that all ranks share.
        out: the JSON file to write.
    """
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    payloads = {size: torch.ones(size // 4) for size in counts}
    for payload in payloads.values():
        dist.all_reduce(payload)
    order = [size for size, count in counts.items() for _ in range(count)]
    random.Random(0).shuffle(order)
    seconds: dict[int, list[float]] = {size: [] for size in counts}
    for size in order:
        payloads[size].fill_(1.0)
        time.sleep(0.005)  # until the cable's bucket is full
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(payloads[size])
        seconds[size].append(time.perf_counter() - begin)
    found = []
    for size, count in counts.items():
        dist.barrier()
        time.sleep(0.05)  # what the barrier sends last is not an all-reduce's
        before = sent_bytes()
        for _ in range(count):
            dist.all_reduce(payloads[size])
            payloads[size].fill_(1.0)
        time.sleep(0.05)
        wire, sent = (now - then for now, then in zip(sent_bytes(), before, strict=True))
        found.append({"bytes": size, "seconds": seconds[size], "wire": wire / count, "payload": sent / count})
    dist.barrier()
    write_whole(out, json.dumps(found))
    dist.destroy_process_group()


def raw_all_reduces(lab: Lab, folder: Path, sizes: tuple[int, ...], mbit: float, *, short: bool) -> pd.DataFrame:
    """One row per size: median seconds of the slowest rank, mean bytes that a rank put on the wire and payload in them.

    Two sessions of about a second a size, each a new set of processes and connections; one, shorter, for `short`.
    """
    lab.limit(mbit)
    rate = mbit * 1e6 / 8
    counts = {size: max(3, min(8 if short else 40, int(rate / ring_wire_bytes(size, lab.num_ranks)))) for size in sizes}
    command = [sys.executable, __file__, "--worker", json.dumps(counts), "--out", str(folder / "raw{rank}.json")]
    found = []
    for _ in range(1 if short else 2):
        log = folder / "raw"
        _wait(lab.start(command, team=True, log=log, real_time=True), log)
        found.append([json.loads((folder / f"raw{rank}.json").read_text()) for rank in range(lab.num_ranks)])
    rows = []
    for i, size in enumerate(sizes):
        slowest = [max(ts) for ranks in found for ts in zip(*(rank[i]["seconds"] for rank in ranks), strict=True)]
        sent = {
            what: statistics.fmean(rank[i][what] for ranks in found for rank in ranks) for what in ("wire", "payload")
        }
        rows.append({"bytes": size, "mbit": mbit, "seconds": statistics.median(slowest), **sent})
    return pd.DataFrame(rows)


class Cable(msgspec.Struct, frozen=True, kw_only=True):
    """What holds at every rate.

    Attributes:
        step_s: latency of a ring step.
        timer_s: by how much the shaper's timer is late, once in a ring step that has to wait for the cable.
        frame: bytes on the wire per payload byte of a large message: headers, and acknowledgements of what comes in.
    """

    step_s: float
    timer_s: float
    frame: float

    def cluster(self, mbit: float, num_ranks: int) -> Cluster:
        """The lab as a ptsim cluster: one rank a node, and the cable's payload rate."""
        inside = Link(name="none", bandwidth_bytes_per_s=1e12, latency_s=0.0)
        cable = Link(
            name=f"{mbit} Mbit/s veth",
            bandwidth_bytes_per_s=mbit * 1e6 / 8 / self.frame,
            latency_s=self.step_s,
        )
        return Cluster(
            name=f"lab at {mbit} Mbit/s",
            device=None,
            gpus_per_node=1,
            intra=inside,
            inter=cable,
            max_nodes=num_ranks,
            library="gloo",
            sources={"inter": "calibrated at other rates"},
        )

    def all_reduce(self, message_bytes: int, mbit: float, num_ranks: int) -> AllReduceTime:
        """An all-reduce as ptsim predicts it on this cable, and what the lab's shaper and gloo's headers change."""
        time = all_reduce(message_bytes, self.cluster(mbit, num_ranks), num_ranks)
        num_steps, rate = 2 * (num_ranks - 1), mbit * 1e6 / 8
        plain_s = message_bytes * num_steps / num_ranks * self.frame / rate
        messages = 3 * gloo_segments(message_bytes, num_ranks)
        step = (message_bytes / num_ranks + messages * GLOO_HEADER) * self.frame + messages * HEADERS
        more_s = self._waiting_s(step, num_steps, mbit) - plain_s
        return msgspec.structs.replace(
            time, seconds=time.seconds + more_s, low_s=time.low_s + more_s, high_s=time.high_s + more_s
        )

    def _waiting_s(self, step_bytes: float, num_steps: int, mbit: float) -> float:
        """Seconds that ring steps wait for the token bucket: full at first, it fills while a step has its latency."""
        rate, most = mbit * 1e6 / 8, float(burst_bytes(mbit))
        waiting_s, tokens = 0.0, most
        for _ in range(num_steps):
            lacking = step_bytes - tokens
            if lacking > 0:
                waiting_s += lacking / rate + self.timer_s
            tokens = min(most, max(0.0, -lacking) + self.step_s * rate)
        return waiting_s


def calibrate(raw: pd.DataFrame, num_ranks: int) -> Cable:
    """The latencies that explain all-reduces at the calibration rates; outliers count for little."""
    largest = raw[raw.bytes == raw.bytes.max()]
    frame = float((largest.wire / largest.payload).mean())

    def misses(found: np.ndarray) -> np.ndarray:
        cable = Cable(step_s=found[0] * 1e-3, timer_s=found[1] * 1e-3, frame=frame)
        said = [cable.all_reduce(row.bytes, row.mbit, num_ranks).seconds for row in raw.itertuples()]
        return np.log(np.maximum(said, 1e-9) / raw.seconds.to_numpy())

    fit = least_squares(misses, x0=[0.2, 0.1], bounds=(0, np.inf), loss="soft_l1", f_scale=0.02)
    return Cable(step_s=float(fit.x[0]) * 1e-3, timer_s=float(fit.x[1]) * 1e-3, frame=frame)


def gloo_segments(message_bytes: int, num_ranks: int) -> int:
    """Into how many segments gloo cuts a rank's share: at least two, of at most 1 MiB."""
    return max(2, -(-message_bytes // num_ranks // GLOO_SEGMENT))


def gloo_bytes(message_bytes: int, num_ranks: int) -> float:
    """Payload of one gloo all-reduce as a rank sends it: the ring's, and its messages' headers.

    A ring step moves a rank's share in segments, and each segment is announced, granted and sent: three messages.
    """
    messages = 3 * gloo_segments(message_bytes, num_ranks) * 2 * (num_ranks - 1)
    return ring_wire_bytes(message_bytes, num_ranks) + messages * GLOO_HEADER


def pruned_resnet20(num_classes: int = 10) -> Any:
    """ResNet-20 with a random 60 % of its prunable channels removed, the same on every rank."""
    import torch

    from ptsim import zoo
    from ptsim.prune.groups import find_groups
    from ptsim.prune.proof import zero_components
    from ptsim.prune.reconfigure import reconfigure
    from ptsim.prune.selection import keep_one

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = zoo.find("resnet20").build(num_classes=num_classes)
        groups = find_groups(model, (3, 32, 32))
        mask = groups.prunable & (torch.rand(len(groups.prunable)) < 0.6)
        mask, _ = keep_one(groups, mask, torch.rand(len(mask)))
        zero_components(model, groups, mask)
        reconfigure(model, groups)
    return model


def train_command(network: str, data: str, images: int, batch: int, epochs: int, run: str) -> list[str]:
    """The ptsim command line that trains on data which needs no file."""
    model = "resnet20" if network == "dense" else f"{Path(__file__).resolve()}:pruned_resnet20"
    command = [sys.executable, "-m", "ptsim", "train", "--model", model, "--dataset", data, "--epochs", str(epochs)]
    command += ["--batch", str(batch), "--train-limit", str(images), "--penalty-ratio", "0", "--out", run]
    return [*command, "--set", "device=cpu", "--set", "validation_limit=32"]


def median_step_s(run: Path) -> float:
    """Median step of the epochs after the first, which pays for DDP's un-overlapped first iteration."""
    return statistics.median(epoch.step.median_s for epoch in read_trace(run / "trace.jsonl").epochs[1:])


def predicted_step(run: Path, compute_s: float, mbit: float, num_ranks: int, cable: Cable) -> tuple[float, float]:
    """(step seconds, payload bytes a rank sends per step) of data-parallel training, simulated.

    Args:
        run: of the same network without communication; its profile says how a step's time is shared out.
        compute_s: a step's computation.
        mbit: of the cables.
        num_ranks: that train.
        cable: of the lab.
    """
    trace = read_trace(run / "trace.jsonl")
    network = trace.network_of(trace.epochs[-1])
    profile = next(p for p in trace.profiles if p.architecture == network.id)
    step = step_of_profile(network, profile, regularizer=False)
    buckets = ddp_buckets(network)
    computation = compute_plan(step, buckets)
    plan = with_communication(
        computation,
        buckets,
        lambda size: cable.all_reduce(size, mbit, num_ranks),
        scale=compute_s / computation.compute_s,
    )
    payload = sum(gloo_bytes(bucket.num_bytes, num_ranks) for bucket in buckets)
    return simulate_steps([TrainingJob(plan=plan)])[0].step_s, payload + epoch_end_bytes(network, num_ranks) / (
        trace.epochs[-1].num_iterations
    )


def epoch_end_bytes(network: Network, num_ranks: int) -> float:
    """Payload that a rank sends on average when an epoch ends: BatchNorm's buffers, and the sums of the validation.

    Means and variances are averaged by all-reduces; the step counts (8 bytes) are broadcast: one message, announced and
    granted, to every other rank.
    """
    norms = [layer.out_channels for layer in network.layers if layer.kind is LayerKind.BATCH_NORM]
    averages = sum(2 * gloo_bytes(4 * channels, num_ranks) for channels in norms)
    broadcasts = len(norms) * (num_ranks - 1) / num_ranks * (8 + 3 * GLOO_HEADER)
    return averages + broadcasts + gloo_bytes(3 * 8, num_ranks)


def train_and_count(lab: Lab, command: list[str], run: Path, log: Path, epochs: int) -> tuple[float, float]:
    """(median step seconds, payload bytes a rank sent per step) of a run; bytes between first and last epoch's end."""
    processes = lab.start(command, team=True, log=log)
    counts: dict[int, float] = {}
    trace, size = run / "trace.jsonl", 0
    try:
        while len(counts) < epochs and all(process.poll() is None for process in processes):
            time.sleep(0.001)  # the next epoch's first all-reduce is a forward and a backward pass away
            if trace.exists() and trace.stat().st_size > size:
                size = trace.stat().st_size
                written = trace.read_text().count('"record":"epoch"')
                if written == 1 and written not in counts:
                    for process in processes:
                        give_priority(process.pid)
                if written and written not in counts:
                    counts[written] = statistics.fmean(sent_bytes(process.pid)[1] for process in processes)
    finally:
        _wait(processes, log)
    iterations = sum(epoch.num_iterations for epoch in read_trace(trace).epochs[1:])
    return median_step_s(run), (counts[epochs] - counts[1]) / iterations


class Experiment:
    """Calibrate; then predict and measure, rate by rate."""

    def __init__(self, options: argparse.Namespace, folder: Path, lab: Lab) -> None:
        self.options, self.folder, self.lab = options, folder, lab
        self.ranks, self.epochs = options.ranks, 3
        self.data, self.per_rank, self.iterations = ("digits", 16, 5) if options.short else ("synthetic", 16, 12)
        self.sizes = SIZES[:4] if options.short else SIZES
        self.networks: tuple[str, ...] = NETWORKS[:1] if options.short else options.networks
        self.compute: dict[str, list[float]] = {network: [] for network in self.networks}
        self.host = dict.fromkeys(self.networks, 0.0)
        self.predictions: dict[str, tuple[float, float]] = {}

    def calibrate(self) -> None:
        """At the calibration rates: cables and CPUs, then DDP's host work."""
        rates = self.options.calibration_rates[: 1 if self.options.short else None]
        sizes = self.sizes[: len(self.sizes) - 1] if len(self.sizes) > 4 else self.sizes
        raw = [raw_all_reduces(self.lab, self.folder, sizes, rate, short=self.options.short) for rate in rates]
        self.cable = calibrate(pd.concat(raw), self.ranks)
        print(f"calibrated at {rates} Mbit/s: {self.cable.step_s * 1e6:.0f} us a ring step, "
              f"{self.cable.timer_s * 1e6:.0f} us more where it waits for the cable, "
              f"{self.cable.frame:.4f} bytes on the wire per byte sent", flush=True)  # fmt: skip
        for network in self.networks if not self.options.short else ():
            beyond: list[float] = []
            for rate in rates:
                said, _ = self.simulated(network, rate)
                beyond.append(self.team(network, rate, f"calibration-{rate}")[0] - said)
            self.host[network] = statistics.fmean(beyond)
            print(f"{network}: {self.compute[network][-1] * 1e3:.1f} ms of compute a step, {self.ranks} processes at "
                  f"once; DDP takes {', '.join(f'{s * 1e3:.1f}' for s in beyond)} ms more than simulated",
                  flush=True)  # fmt: skip

    def simulated(self, network: str, mbit: float) -> tuple[float, float]:
        """(seconds, payload) of a step, after one more look at how fast this machine computes."""
        images = self.per_rank * self.iterations
        name = f"alone-{network}-{len(self.compute[network])}"
        command = train_command(
            network, self.data, images, self.per_rank, self.epochs, str(self.folder / f"{name}-{{rank}}")
        )
        log = self.folder / f"{name}.log"
        _wait(self.lab.start(command, team=False, log=log), log)
        runs = [self.folder / f"{name}-{rank}" for rank in range(self.ranks)]
        self.compute[network].append(statistics.median(median_step_s(run) for run in runs))
        return predicted_step(runs[0], statistics.median(self.compute[network]), mbit, self.ranks, self.cable)

    def team(self, network: str, mbit: float, name: str) -> tuple[float, float]:
        """(seconds, payload) of a step of data-parallel training, measured."""
        self.lab.limit(mbit)
        run = self.folder / f"team-{network}-{name}"
        batch = self.per_rank * self.ranks
        command = train_command(network, self.data, batch * self.iterations, batch, self.epochs, str(run))
        return train_and_count(self.lab, command, run, Path(f"{run}.log"), self.epochs)

    def predict(self, what: str, mbit: float, seconds: float, payload: float) -> None:
        """Write down a prediction."""
        self.predictions[f"{what}/{mbit}"] = seconds, payload
        write_whole(self.folder / "predictions.json", json.dumps(self.predictions, indent=1))

    def run(self) -> pd.DataFrame:
        """One row per quantity and rate."""
        self.calibrate()
        rows: list[tuple[str, float, float, float]] = []
        for rate in self.options.rates:
            for size in self.sizes:
                seconds = self.cable.all_reduce(size, rate, self.ranks).seconds
                self.predict(f"all-reduce {size}", rate, seconds, gloo_bytes(size, self.ranks))
            raw = raw_all_reduces(self.lab, self.folder, self.sizes, rate, short=self.options.short)
            rows += [(f"all-reduce {row.bytes}", rate, row.seconds, row.payload) for row in raw.itertuples()]
            for network in self.networks:
                seconds, payload = self.simulated(network, rate)
                self.predict(f"step {network}", rate, seconds + self.host[network], payload)
                rows.append((f"step {network}", rate, *self.team(network, rate, str(rate))))
        frame = pd.DataFrame(rows, columns=["what", "mbit_per_s", "measured_s", "measured_bytes"])
        said = [self.predictions[f"{row.what}/{row.mbit_per_s}"] for row in frame.itertuples()]
        frame["predicted_s"], frame["predicted_bytes"] = zip(*said, strict=True)
        frame["time_error"] = frame.predicted_s / frame.measured_s - 1
        frame["bytes_error"] = frame.predicted_bytes / frame.measured_bytes - 1
        frame.insert(0, "ranks", self.ranks)
        write_whole(self.folder / "comparison.csv", frame.to_csv(index=False))
        return frame


def _rates(text: str) -> list[float]:
    return [float(rate) for rate in text.split(",")]


def main() -> int:
    """Run the lab, or one rank of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rates", type=_rates, default=[100, 200, 400], help="Mbit/s that are tested")
    parser.add_argument("--calibration-rates", type=_rates, default=[150, 300])
    parser.add_argument("--networks", type=lambda text: tuple(filter(None, text.split(","))), default=NETWORKS)
    parser.add_argument("--short", action="store_true", help="fewer sizes, only the dense network, steps uncalibrated")
    parser.add_argument("--out", type=Path, help="where results go; a temporary folder otherwise")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker({int(size): count for size, count in json.loads(options.worker).items()}, options.out)
        return 0
    if reason := missing():
        print(f"the cluster lab cannot run here: {reason}", file=sys.stderr)
        return 3
    if options.out and options.out.exists() and any(options.out.iterdir()):
        parser.error(f"{options.out} holds an earlier run: name a new folder")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the lab is taken down
    with contextlib.ExitStack() as stack:
        folder = options.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        frame = Experiment(options, folder, stack.enter_context(Lab(options.ranks))).run()
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
