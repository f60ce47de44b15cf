"""How long all-reduces take when their chunks travel over real links: ports, NICs, leaf switches, each with a queue.

A cluster becomes a `Fabric` of pipes, one per direction: every GPU's port into its node's switch (NVLink, NVSwitch or
PCIe), every node's NICs, and, where the fabric is oversubscribed, one uplink per leaf switch. A pipe is a SimPy
resource that serves one chunk after the other in order of arrival; a chunk's head moves on at once (cut-through), so a
path of free pipes takes the time of its slowest one plus the latency. Ring, tree and hierarchical all-reduces run over
it chunk by chunk, each rank on its own, and several jobs may share the fabric. All NICs of a node are one pipe.

On equal ranks and links the result is the closed form of `ptsim.costs.collectives`. A ring that shares no pipe with
anything is a recurrence over (rank, step), evaluated without events: the same result, 1,024 ranks in milliseconds.

`Deviation:` a message is not split further inside a chunk, so a chunk waits for the whole chunk before it; jobs that
share a pipe get it in turns of one chunk.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np
import simpy

from ptsim.costs.collectives import nodes_for
from ptsim.errors import UsageError
from ptsim.hardware.spec import Cluster

Algorithm = Literal["ring", "tree", "hierarchical"]
Process = Generator[simpy.Event, None, None]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One all-reduce.

    Attributes:
        ranks: the GPUs that take part, in ring order; GPU i sits on node i // gpus_per_node.
        message_bytes: what every GPU holds.
        num_chunks: into how many pieces a tree cuts each half of the message; rings cut it by their size.
        start_s: when it begins.
        repeat: how many all-reduces, one after the other.
    """

    ranks: tuple[int, ...]
    message_bytes: float
    algorithm: Algorithm = "ring"
    num_chunks: int = 64
    start_s: float = 0.0
    repeat: int = 1


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


class Pipe:
    """One direction of a link: serves one chunk at a time."""

    def __init__(self, env: simpy.Environment, name: str, bandwidth_bytes_per_s: float) -> None:
        self.name, self.bandwidth = name, bandwidth_bytes_per_s
        self.server = simpy.Resource(env)
        self.num_bytes = 0.0


class Fabric:
    """The pipes of `num_gpus` GPUs of a cluster."""

    def __init__(
        self,
        env: simpy.Environment,
        cluster: Cluster,
        num_gpus: int,
        *,
        nodes_per_leaf: int = 16,
        bandwidth_factor: Mapping[str, float] | None = None,
        extra_latency_s: Mapping[str, float] | None = None,
    ) -> None:
        """Build the pipes.

        Args:
            env: where the simulation runs.
            cluster: link bandwidths are taken as they are, latencies of None as 0.
            num_gpus: GPUs fill nodes one after the other.
            nodes_per_leaf: nodes under one leaf switch; counts only where the cluster is oversubscribed.
            bandwidth_factor: pipe name ("gpu 3 out", "node 1 in", "leaf 0 up") → factor, for pipes that differ.
            extra_latency_s: pipe name → what it adds.

        Raises:
            ValueError: more GPUs than the cluster has, an unknown pipe, or a factor that is not positive.
        """
        self.env, self.cluster, self.num_gpus = env, cluster, num_gpus
        self.nodes_per_leaf = nodes_per_leaf
        num_nodes = nodes_for(cluster, num_gpus)
        rates: dict[str, float] = {}
        for gpu in range(num_gpus):
            for way in ("out", "in"):
                rates[f"gpu {gpu} {way}"] = cluster.intra.bandwidth_bytes_per_s
        if cluster.inter is not None and num_nodes > 1:
            for node in range(num_nodes):
                for way in ("out", "in"):
                    rates[f"node {node} {way}"] = cluster.inter.bandwidth_bytes_per_s
            if cluster.oversubscription > 1:
                uplink = nodes_per_leaf * cluster.inter.bandwidth_bytes_per_s / cluster.oversubscription
                for leaf in range(-(-num_nodes // nodes_per_leaf)):
                    for way in ("up", "down"):
                        rates[f"leaf {leaf} {way}"] = uplink
        self.extra_latency_s = dict(extra_latency_s or {})
        for name in (*(bandwidth_factor or {}), *self.extra_latency_s):
            if name not in rates:
                raise UsageError(f"no pipe {name!r}; there are {', '.join(list(rates)[:6])} …")
        for name, factor in (bandwidth_factor or {}).items():
            if factor <= 0:
                raise UsageError(f"bandwidth factor {factor} of pipe {name!r}; it must be positive")
            rates[name] *= factor
        self.pipes = {name: Pipe(env, name, rate) for name, rate in rates.items()}
        self.sent_bytes: defaultdict[int, float] = defaultdict(float)
        self._paths: dict[tuple[int, int], tuple[tuple[Pipe, ...], float]] = {}

    def path(self, source: int, target: int) -> tuple[tuple[Pipe, ...], float]:
        """(pipes, latency) from one GPU to another."""
        key = (source, target)
        if key not in self._paths:
            self._paths[key] = self._find_path(source, target)
        return self._paths[key]

    def _find_path(self, source: int, target: int) -> tuple[tuple[Pipe, ...], float]:
        here, there = source // self.cluster.gpus_per_node, target // self.cluster.gpus_per_node
        if here == there or self.cluster.inter is None:
            names = [f"gpu {source} out", f"gpu {target} in"]
            latency = self.cluster.intra.latency_s or 0.0
        else:
            names = [f"gpu {source} out", f"node {here} out"]
            leaf_here, leaf_there = here // self.nodes_per_leaf, there // self.nodes_per_leaf
            if self.cluster.oversubscription > 1 and leaf_here != leaf_there:
                names += [f"leaf {leaf_here} up", f"leaf {leaf_there} down"]
            names += [f"node {there} in", f"gpu {target} in"]
            latency = self.cluster.inter.latency_s or 0.0
        latency += sum(self.extra_latency_s.get(name, 0.0) for name in names)
        return tuple(self.pipes[name] for name in names), latency

    def send(self, source: int, target: int, num_bytes: float, arrived: simpy.Event) -> Process:
        """Carry one chunk; ends when the sender may send the next one, `arrived` follows after the latency."""
        pipes, latency = self.path(source, target)
        self.sent_bytes[source] += num_bytes
        end = 0.0
        for pipe in pipes:
            request = pipe.server.request()
            yield request
            pipe.num_bytes += num_bytes
            duration = num_bytes / pipe.bandwidth
            end = max(end, self.env.now + duration)
            _after(self.env, duration, functools.partial(pipe.server.release, request))
        if end > self.env.now:
            yield self.env.timeout(end - self.env.now)
        _after(self.env, latency, arrived.succeed)


def _after(env: simpy.Environment, seconds: float, action: Callable[[], object]) -> None:
    """Do something later, without a process of its own."""

    def act(_: simpy.Event) -> None:
        action()

    env.timeout(seconds).callbacks.append(act)


def simulate_all_reduces(
    cluster: Cluster,
    jobs: Sequence[Job],
    *,
    num_gpus: int | None = None,
    nodes_per_leaf: int = 16,
    bandwidth_factor: Mapping[str, float] | None = None,
    extra_latency_s: Mapping[str, float] | None = None,
    events: bool = False,
) -> FabricResult:
    """Run all-reduces over the cluster's links and say how long each took.

    Args:
        cluster: where; its tables and efficiencies are not used.
        jobs: which all-reduces; GPUs may differ or overlap.
        num_gpus: GPUs of the fabric; by default as many as the jobs name.
        nodes_per_leaf: see `Fabric`.
        bandwidth_factor: see `Fabric`.
        extra_latency_s: see `Fabric`.
        events: True simulates by events even where the recurrence would do.

    Raises:
        ValueError: a job without ranks, with a rank twice, a negative message, or more GPUs than the cluster has.
    """
    for job in jobs:
        if not job.ranks or len(set(job.ranks)) < len(job.ranks) or min(job.ranks) < 0:
            raise UsageError(f"ranks {job.ranks[:8]} of a job; GPUs are needed, each once, counted from 0")
        if job.message_bytes < 0 or job.num_chunks < 1 or job.repeat < 1:
            raise UsageError("a job needs a message of 0 bytes or more, at least one chunk and one repetition")
    env = simpy.Environment()
    fabric = Fabric(
        env,
        cluster,
        num_gpus or 1 + max(max(job.ranks) for job in jobs),
        nodes_per_leaf=nodes_per_leaf,
        bandwidth_factor=bandwidth_factor,
        extra_latency_s=extra_latency_s,
    )
    if not events and len(jobs) == 1 and jobs[0].algorithm == "ring" and _shares_nothing(fabric, jobs[0]):
        seconds: tuple[float, ...] = (_ring_recurrence(fabric, jobs[0]),)
    else:
        found = [0.0] * len(jobs)
        env.run(env.all_of([env.process(_run(fabric, job, found, i)) for i, job in enumerate(jobs)]))
        seconds = tuple(found)
    return FabricResult(
        seconds=seconds,
        sent_bytes=dict(fabric.sent_bytes),
        pipe_bytes={name: pipe.num_bytes for name, pipe in fabric.pipes.items()},
    )


def _run(fabric: Fabric, job: Job, found: list[float], index: int) -> Process:
    env = fabric.env
    yield env.timeout(job.start_s)
    for _ in range(job.repeat):
        if len(job.ranks) > 1 and job.algorithm == "tree":
            yield env.all_of(_tree(fabric, job.ranks, job.message_bytes, job.num_chunks))
        elif len(job.ranks) > 1 and job.algorithm == "hierarchical":
            yield env.process(_hierarchical(fabric, job.ranks, job.message_bytes))
        elif len(job.ranks) > 1:
            yield env.all_of(_ring(fabric, job.ranks, job.message_bytes / len(job.ranks), 2 * (len(job.ranks) - 1)))
    found[index] = env.now - job.start_s


def _ring(fabric: Fabric, ranks: Sequence[int], chunk_bytes: float, num_steps: int) -> list[simpy.Process]:
    """Every rank sends a chunk to the next one, `num_steps` times, each after it got the chunk of the step before."""
    env, size = fabric.env, len(ranks)
    arrived = [[env.event() for _ in range(num_steps)] for _ in range(size)]

    def member(i: int) -> Process:
        following = (i + 1) % size
        for step in range(num_steps):
            if step:
                yield arrived[i][step - 1]
            yield from fabric.send(ranks[i], ranks[following], chunk_bytes, arrived[following][step])
        yield arrived[i][num_steps - 1]

    return [env.process(member(i)) for i in range(size)]


def _hierarchical(fabric: Fabric, ranks: Sequence[int], message_bytes: float) -> Process:
    """Reduce-scatter inside every node, all-reduce of the shards between nodes, all-gather inside."""
    env = fabric.env
    nodes: dict[int, list[int]] = {}
    for rank in ranks:
        nodes.setdefault(rank // fabric.cluster.gpus_per_node, []).append(rank)
    members = list(nodes.values())
    width = len(members[0])
    if any(len(node) != width for node in members):
        raise UsageError("a hierarchical all-reduce needs as many GPUs on every node")

    def inside() -> Iterable[simpy.Process]:
        for node in members:
            yield from _ring(fabric, node, message_bytes / width, width - 1)

    if width > 1:
        yield env.all_of(list(inside()))
    if len(members) > 1:
        shard = message_bytes / width / len(members)
        between = [
            process
            for local in range(width)
            for process in _ring(fabric, [node[local] for node in members], shard, 2 * (len(members) - 1))
        ]
        yield env.all_of(between)
    if width > 1:
        yield env.all_of(list(inside()))


def double_binary_tree(size: int) -> tuple[list[int | None], list[int | None]]:
    """Parents in two trees over 0 … size-1; a rank that is inner in one is a leaf in the other.

    The first has the lowest set bit as level (odd ranks are leaves, rank 0 is the root with one child); the second is
    its mirror for an even size, and shifted by one for an odd one.

    Source: Sanders, Speck, Träff, Parallel Computing 35 (2009).
    """
    first = [_parent(rank, size) for rank in range(size)]
    if size % 2 == 0:
        second = [None if (p := first[size - 1 - rank]) is None else size - 1 - p for rank in range(size)]
    else:
        second = [None if (p := first[(rank - 1) % size]) is None else (p + 1) % size for rank in range(size)]
    return first, second


def _parent(rank: int, size: int) -> int | None:
    if rank == 0:
        return None
    bit = rank & -rank
    parent = (rank ^ bit) | (bit << 1)
    return parent if parent < size else rank ^ bit


def _tree(fabric: Fabric, ranks: Sequence[int], message_bytes: float, num_chunks: int) -> list[simpy.Process]:
    """Each half of the message goes up one tree, chunk by chunk, and comes down again.

    Over several nodes the trees join nodes, and a node's GPUs form a chain, as NCCL builds them.
    """
    nodes: dict[int, list[int]] = {}
    for i, rank in enumerate(ranks):
        nodes.setdefault(rank // fabric.cluster.gpus_per_node, []).append(i)
    trees = double_binary_tree(len(ranks))
    if len(nodes) > 1:
        first, second = double_binary_tree(len(nodes))
        chains = list(nodes.values())
        trees = _chained(first, chains), _chained(second, [chain[::-1] for chain in chains])
    processes: list[simpy.Process] = []
    for parents in trees:
        processes += _one_tree(fabric, ranks, parents, message_bytes / 2 / num_chunks, num_chunks)
    return processes


def _chained(tree: Sequence[int | None], chains: Sequence[Sequence[int]]) -> list[int | None]:
    """Parents of all ranks: inside a node the one before it in the chain, for the head the parent node's head."""
    parents: list[int | None] = [None] * sum(map(len, chains))
    for node, chain in enumerate(chains):
        above = tree[node]
        parents[chain[0]] = None if above is None else chains[above][0]
        for before, rank in itertools.pairwise(chain):
            parents[rank] = before
    return parents


def _one_tree(
    fabric: Fabric, ranks: Sequence[int], parents: Sequence[int | None], chunk_bytes: float, num_chunks: int
) -> list[simpy.Process]:
    env = fabric.env
    children: list[list[int]] = [[] for _ in ranks]
    for rank, parent in enumerate(parents):
        if parent is not None:
            children[parent].append(rank)
    up = [[env.event() for _ in range(num_chunks)] for _ in ranks]  # the rank's partial sum reached its parent
    down = [[env.event() for _ in range(num_chunks)] for _ in ranks]  # the result reached the rank

    def climb(rank: int) -> Process:
        parent = parents[rank]
        for chunk in range(num_chunks):
            for child in children[rank]:
                yield up[child][chunk]
            if parent is None:
                down[rank][chunk].succeed()
            else:
                yield from fabric.send(ranks[rank], ranks[parent], chunk_bytes, up[rank][chunk])

    def descend(rank: int, child: int) -> Process:
        for chunk in range(num_chunks):
            yield down[rank][chunk]
            yield from fabric.send(ranks[rank], ranks[child], chunk_bytes, down[child][chunk])
        yield down[child][num_chunks - 1]

    climbers = [env.process(climb(rank)) for rank in range(len(ranks))]
    return climbers + [env.process(descend(rank, child)) for rank in range(len(ranks)) for child in children[rank]]


def _shares_nothing(fabric: Fabric, job: Job) -> bool:
    hops = zip(job.ranks, (*job.ranks[1:], job.ranks[0]), strict=True)
    used = Counter(pipe.name for source, target in hops for pipe in fabric.path(source, target)[0])
    return max(used.values()) == 1


def _ring_recurrence(fabric: Fabric, job: Job) -> float:
    """The ring without events: a chunk leaves when the one before it has left and arrived, all ranks at a time."""
    size = len(job.ranks)
    if size == 1:
        return 0.0
    chunk, num_steps = job.message_bytes / size, 2 * (size - 1)
    durations, latencies = np.empty(size), np.empty(size)
    for i, source in enumerate(job.ranks):
        pipes, latencies[i] = fabric.path(source, job.ranks[(i + 1) % size])
        durations[i] = max(chunk / pipe.bandwidth for pipe in pipes)
        for pipe in pipes:
            pipe.num_bytes += chunk * num_steps * job.repeat
        fabric.sent_bytes[source] += chunk * num_steps * job.repeat
    total = 0.0
    for _ in range(job.repeat):
        left, arrived = np.zeros(size), np.zeros(size)
        for step in range(num_steps):
            left = (np.maximum(left, arrived) if step else left) + durations
            arrived = np.roll(left + latencies, 1)
        total += float(max(arrived.max(), left.max()))
    return total
