"""How long all-reduces take when their chunks travel over real links: ports, NICs, leaf switches, each with a queue.

A cluster becomes a `Fabric` of pipes, one per direction: every GPU's port into its node's switch (NVLink, NVSwitch or
PCIe), every NIC of a node (its GPUs are spread over them evenly), and, where the fabric is oversubscribed, one uplink
per leaf switch. A chunk's head moves on at once (cut-through), so a path of free pipes takes the time of its slowest
one plus the latency. `schedules` says which chunks there are.

The connections of a stage that use the same pipe have equal parts of it, as the packets of several flows take turns; a
chunk holds its part for as long as it takes at that rate. So the connections of one all-reduce never wait for each
other, and its time is a recurrence over (connection, chunk), evaluated without events: 1,024 ranks in milliseconds.
Jobs that share a fabric do wait for each other: then every connection is a SimPy process, every pipe a
`simpy.Container` whose content is the part that is free. On equal links both are the closed forms of
`ptsim.costs.collectives`.

`Deviation:` a chunk is not split further: beside another job it waits until its whole part of a pipe is free.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence

import msgspec
import numpy as np
import simpy

from ptsim.costs.collectives import nodes_for
from ptsim.errors import UsageError
from ptsim.hardware.spec import Cluster
from ptsim.sim.budget import check_events
from ptsim.sim.schedules import Connection, Placement, Stage, schedule

Process = Generator[simpy.Event, None, None]

_EVENTS_OF_A_CHUNK = 4  # a pipe taken and freed, the next chunk, the arrival


class PlacedJob(msgspec.Struct, frozen=True, kw_only=True):
    """One all-reduce.

    Attributes:
        ranks: the GPUs that take part, in ring order; GPU i sits on node i // gpus_per_node.
        message_bytes: what every GPU holds.
        num_chunks: into how many pieces a tree cuts each half of the message; rings cut it by their size.
        start_s: when it begins.
        repeat: how many all-reduces, one after the other.
        max_chunks: chunks of a connection after which a stage is broken off; None for none. Enough of them show the
            pace of a long ring.
    """

    ranks: tuple[int, ...]
    message_bytes: float
    algorithm: str = "ring"
    num_chunks: int = 64
    start_s: float = 0.0
    repeat: int = 1
    max_chunks: int | None = None


class FabricResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the all-reduces took and moved.

    Attributes:
        seconds: of each job, from its start to the last rank's end.
        sent_bytes: by GPU, over all jobs.
        pipe_bytes: by pipe.
    """

    seconds: tuple[float, ...]
    sent_bytes: dict[int, float]
    pipe_bytes: dict[str, float]


class Fabric:
    """The pipes of `num_gpus` GPUs of a cluster: their bandwidths, and which of them a path takes.

    A pipe is called "gpu 3 out", "node 1 in" (where the node has one NIC), "node 1 in nic 2", "leaf 0 up".
    """

    def __init__(
        self,
        cluster: Cluster,
        num_gpus: int,
        *,
        bandwidth_factor: Mapping[str, float] | None = None,
        extra_latency_s: Mapping[str, float] | None = None,
    ) -> None:
        """Build the pipes.

        Args:
            cluster: link bandwidths are taken as they are, latencies of None as 0.
            num_gpus: GPUs fill nodes one after the other.
            bandwidth_factor: pipe → factor, for pipes that differ. The first words of a name stand for all pipes that
                begin so: "node 1", "node 1 out".
            extra_latency_s: pipe → what it adds.

        Raises:
            UsageError: more GPUs than the cluster has, an unknown pipe, a factor that is not positive, or a negative
                latency.
        """
        self.cluster, self.num_gpus = cluster, num_gpus
        num_nodes = nodes_for(cluster, num_gpus)
        self.rates: dict[str, float] = {}
        for gpu in range(num_gpus):
            for way in ("out", "in"):
                self.rates[f"gpu {gpu} {way}"] = cluster.intra.bandwidth_bytes_per_s
        if cluster.inter is not None and num_nodes > 1:
            per_rail = cluster.inter.bandwidth_bytes_per_s / cluster.num_rails
            for node in range(num_nodes):
                for way in ("out", "in"):
                    for rail in range(cluster.num_rails):
                        self.rates[self._nic(node, way, rail)] = per_rail
            if cluster.oversubscription > 1:
                uplink = cluster.nodes_per_leaf * cluster.inter.bandwidth_bytes_per_s / cluster.oversubscription
                for leaf in range(-(-num_nodes // cluster.nodes_per_leaf)):
                    for way in ("up", "down"):
                        self.rates[f"leaf {leaf} {way}"] = uplink
        self.latencies_s: defaultdict[str, float] = defaultdict(float)
        for name, factor in (bandwidth_factor or {}).items():
            if not 0 < factor < math.inf:
                raise UsageError(f"bandwidth factor {factor} of pipe {name!r}; it must be positive")
            for pipe in self._named(name):
                self.rates[pipe] *= factor
        for name, seconds in (extra_latency_s or {}).items():
            if not 0 <= seconds < math.inf:
                raise UsageError(f"extra latency {seconds} s of pipe {name!r}; it must not be negative")
            for pipe in self._named(name):
                self.latencies_s[pipe] += seconds
        self._paths: dict[tuple[int, int], tuple[tuple[str, ...], float]] = {}

    def node_of(self, gpu: int) -> int:
        """The node of a GPU."""
        return gpu // self.cluster.gpus_per_node

    def path(self, source: int, target: int) -> tuple[tuple[str, ...], float]:
        """(pipes, latency) from one GPU to another."""
        key = (source, target)
        if key not in self._paths:
            self._paths[key] = self._find_path(source, target)
        return self._paths[key]

    def _find_path(self, source: int, target: int) -> tuple[tuple[str, ...], float]:
        cluster = self.cluster
        here, there = self.node_of(source), self.node_of(target)
        names = [f"gpu {source} out", f"gpu {target} in"]
        latency = cluster.intra.latency_s or 0.0
        if here != there and cluster.inter is not None:
            across = []
            leaf_here, leaf_there = here // cluster.nodes_per_leaf, there // cluster.nodes_per_leaf
            if cluster.oversubscription > 1 and leaf_here != leaf_there:
                across = [f"leaf {leaf_here} up", f"leaf {leaf_there} down"]
            names[1:1] = [
                self._nic(here, "out", self.cluster.rail_of(source)),
                *across,
                self._nic(there, "in", self.cluster.rail_of(target)),
            ]
            latency = cluster.inter.latency_s or 0.0
        return tuple(names), latency + sum(self.latencies_s[name] for name in names)

    def _nic(self, node: int, way: str, rail: int) -> str:
        return f"node {node} {way}" if self.cluster.num_rails == 1 else f"node {node} {way} nic {rail}"

    def named(self, name: str) -> list[str]:
        """The pipes that a name, or its first words, stands for."""
        return [pipe for pipe in self.rates if pipe == name or pipe.startswith(f"{name} ")]

    def _named(self, name: str) -> list[str]:
        found = self.named(name)
        if not found:
            kinds: dict[str, str] = {}
            for pipe in self.rates:
                kinds.setdefault("".join(sign for sign in pipe if not sign.isdigit()), repr(pipe))
            raise UsageError(
                f"no pipe {name!r} among {self.num_gpus} GPUs of {self.cluster.name}; "
                f"there are {', '.join(kinds.values())} and so on"
            )
        return found

    def stages(self, job: PlacedJob) -> tuple[RoutedStage, ...]:
        """The job's schedule on this fabric."""
        placement = Placement(ranks=tuple(job.ranks), node_of=self.node_of, rail_of=self.cluster.rail_of)
        plan = schedule(job.algorithm, placement, job.message_bytes, num_chunks=job.num_chunks)
        return tuple(self._route(stage, job.max_chunks) for stage in plan)

    def _route(self, stage: Stage, max_chunks: int | None) -> RoutedStage:
        paths = [self.path(connection.source, connection.target) for connection in stage.connections]
        users = Counter(pipe for pipes, _ in paths for pipe in pipes)
        # Every port of a kind serves its connections alike, so that no stage of a pipeline is faster than the others;
        # an uplink divides what it has among those that are there.
        most: dict[str, int] = {}
        for pipe, number in users.items():
            kind = pipe.split(" ", 1)[0]
            most[kind] = max(most.get(kind, 0), number)
        shares = {p: n if p.startswith("leaf") else most[p.split(" ", 1)[0]] for p, n in users.items()}
        return RoutedStage(
            connections=stage.connections,
            pipes=tuple(pipes for pipes, _ in paths),
            latencies_s=np.array([latency for _, latency in paths]),
            durations_s=np.array(
                [max(stage.chunk_bytes * shares[p] / self.rates[p] for p in pipes) for pipes, _ in paths]
            ),
            shares=shares,
            levels=() if stage.lag else _levels(stage.connections),
            num_chunks=stage.num_chunks if max_chunks is None else min(max_chunks, stage.num_chunks),
            chunk_bytes=stage.chunk_bytes,
            lag=stage.lag,
        )


def _levels(connections: Sequence[Connection]) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """By depth: indices of connections, and of what each waits for, filled up with the index beyond the last."""
    depths: list[int] = []
    for connection in connections:
        depths.append(1 + max((depths[i] for i in connection.after), default=-1))
    widest = max(1, *(len(connection.after) for connection in connections))
    nothing = len(connections)
    members: list[list[int]] = [[] for _ in range(1 + max(depths))]
    for i, depth in enumerate(depths):
        members[depth].append(i)
    return tuple(
        (
            np.array(level),
            np.array([[*connections[i].after, *[nothing] * (widest - len(connections[i].after))] for i in level]),
        )
        for level in members
    )


class RoutedStage(msgspec.Struct, frozen=True, kw_only=True):
    """A stage on its way: the pipes of every connection, and what a chunk takes over them.

    Attributes:
        durations_s: for which a connection is busy with one chunk.
        shares: into how many parts a pipe is divided.
        levels: connections that wait for none of the same level, and those that each of them waits for.
    """

    connections: tuple[Connection, ...]
    pipes: tuple[tuple[str, ...], ...]
    latencies_s: np.ndarray
    durations_s: np.ndarray
    shares: dict[str, int]
    levels: tuple[tuple[np.ndarray, np.ndarray], ...]
    num_chunks: int
    chunk_bytes: float
    lag: int

    def seconds(self, times: float = 1.0) -> float:
        """From the start of the stage to the arrival of its last chunk, with nobody else on the fabric.

        Args:
            times: how much larger the message is than the one that the stage was made for.
        """
        durations_s = self.durations_s * times
        return self._lagging_seconds(durations_s) if self.lag else self._flowing_seconds(durations_s)

    def _lagging_seconds(self, durations_s: np.ndarray) -> float:
        """Rings: every connection waits for the one before, a chunk earlier; all connections at a time."""
        after = np.array([connection.after[0] for connection in self.connections])
        left = arrived = np.zeros(len(after))
        for chunk in range(self.num_chunks):
            left = (np.maximum(left, arrived[after]) if chunk else left) + durations_s
            arrived = left + self.latencies_s
        return float(arrived.max())

    def _flowing_seconds(self, durations_s: np.ndarray) -> float:
        """Trees: a connection waits for those of the level below, the same chunk; a level and all chunks at a time."""
        number = np.arange(self.num_chunks)
        arrived = np.zeros((len(self.connections) + 1, self.num_chunks))  # the last row is what is there at once
        for level, after in self.levels:
            ready = arrived[after].max(axis=1)
            duration, latency = durations_s[level, None], self.latencies_s[level, None]
            # chunk j has left at the latest of ready[i] + (j - i + 1) durations over i ≤ j
            left = np.maximum.accumulate(ready - number * duration, axis=1) + (number + 1) * duration
            arrived[level] = left + latency
        return float(arrived[:, -1].max())


def simulate_all_reduces(
    cluster: Cluster,
    jobs: Sequence[PlacedJob],
    *,
    num_gpus: int | None = None,
    bandwidth_factor: Mapping[str, float] | None = None,
    extra_latency_s: Mapping[str, float] | None = None,
    events: bool = False,
) -> FabricResult:
    """Run all-reduces over the cluster's links and say how long each took.

    Args:
        cluster: where; its tables and efficiencies are not used.
        jobs: which all-reduces; GPUs may differ or overlap.
        num_gpus: GPUs of the fabric; by default as many as the jobs name.
        bandwidth_factor: see `Fabric`.
        extra_latency_s: see `Fabric`.
        events: True simulates a single job by events too.

    Raises:
        UsageError: a job without ranks, with a rank twice, a negative message, more GPUs than the cluster has, or more
            chunks than the budget of events allows.
    """
    for job in jobs:
        if not job.ranks or len(set(job.ranks)) < len(job.ranks) or min(job.ranks) < 0:
            raise UsageError(f"ranks {job.ranks[:8]} of a job; GPUs are needed, each once, counted from 0")
        if not 0 <= job.message_bytes < math.inf or job.num_chunks < 1 or job.repeat < 1:
            raise UsageError("a job needs a message of 0 bytes or more, at least one chunk and one repetition")
    fabric = Fabric(
        cluster,
        num_gpus or 1 + max(max(job.ranks) for job in jobs),
        bandwidth_factor=bandwidth_factor,
        extra_latency_s=extra_latency_s,
    )
    routed = [fabric.stages(job) for job in jobs]
    if len(jobs) == 1 and not events:
        seconds: tuple[float, ...] = (jobs[0].repeat * sum(stage.seconds() for stage in routed[0]),)
    else:
        chunks = sum(
            job.repeat * sum(len(stage.connections) * stage.num_chunks for stage in stages)
            for job, stages in zip(jobs, routed, strict=True)
        )
        check_events(_EVENTS_OF_A_CHUNK * chunks, "sending every chunk over its links", "--network formula needs none")
        seconds = _Traffic(fabric, routed).run(jobs)
    sent: defaultdict[int, float] = defaultdict(float)
    carried = dict.fromkeys(fabric.rates, 0.0)
    for job, stages in zip(jobs, routed, strict=True):
        for stage in stages:
            num_bytes = job.repeat * stage.num_chunks * stage.chunk_bytes
            for connection, pipes in zip(stage.connections, stage.pipes, strict=True):
                sent[connection.source] += num_bytes
                for pipe in pipes:
                    carried[pipe] += num_bytes
    return FabricResult(seconds=seconds, sent_bytes=dict(sent), pipe_bytes=carried)


class _Traffic:
    """Jobs side by side on a fabric, chunk by chunk."""

    def __init__(self, fabric: Fabric, routed: Sequence[Sequence[RoutedStage]]) -> None:
        self.env, self.fabric, self.routed = simpy.Environment(), fabric, routed
        parts: dict[str, int] = {}  # of which a pipe is made, so that every job's share is a whole number of them
        for stage in (stage for stages in routed for stage in stages):
            for pipe, share in stage.shares.items():
                parts[pipe] = math.lcm(parts.get(pipe, 1), share)
        self.parts = parts
        self.servers = {pipe: simpy.Container(self.env, number, number) for pipe, number in parts.items()}

    def run(self, jobs: Sequence[PlacedJob]) -> tuple[float, ...]:
        """Seconds of every job from its start."""
        found = [0.0] * len(jobs)
        self.env.run(self.env.all_of([self.env.process(self._job(job, found, i)) for i, job in enumerate(jobs)]))
        return tuple(found)

    def _job(self, job: PlacedJob, found: list[float], index: int) -> Process:
        yield self.env.timeout(job.start_s)
        for _ in range(job.repeat):
            for stage in self.routed[index]:
                events = [[self.env.event() for _ in range(stage.num_chunks)] for _ in stage.connections]
                for number in range(len(stage.connections)):
                    self.env.process(self._connection(stage, number, events))
                yield self.env.all_of([arrived[-1] for arrived in events])
        found[index] = self.env.now - job.start_s

    def _connection(self, stage: RoutedStage, number: int, arrived: list[list[simpy.Event]]) -> Process:
        for chunk in range(stage.num_chunks):
            for before in stage.connections[number].after:
                if chunk >= stage.lag:
                    yield arrived[before][chunk - stage.lag]
            yield from self._send(stage, number, arrived[number][chunk])

    def _send(self, stage: RoutedStage, number: int, arrived: simpy.Event) -> Process:
        """Carry one chunk; ends when the next one may be sent, `arrived` follows after the latency."""
        env, end = self.env, 0.0
        for pipe in stage.pipes[number]:
            server, share = self.servers[pipe], stage.shares[pipe]
            amount = self.parts[pipe] // share
            yield server.get(amount)
            duration = stage.chunk_bytes * share / self.fabric.rates[pipe]
            end = max(end, env.now + duration)
            _after(env, duration, functools.partial(server.put, amount))
        if end > env.now:
            yield env.timeout(end - env.now)
        _after(env, float(stage.latencies_s[number]), arrived.succeed)


def _after(env: simpy.Environment, seconds: float, action: Callable[[], object]) -> None:
    """Do something later, without a process of its own."""

    def act(_: simpy.Event) -> None:
        action()

    env.timeout(seconds).callbacks.append(act)
