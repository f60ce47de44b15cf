"""What a job's all-reduces take: by formula on equal links, or chunk by chunk on the links that the cluster has.

The formulas of `ptsim.costs.collectives` know measured tables and NCCL's protocols, but take all links of a kind for
equal, an oversubscribed fabric for thin everywhere, and every job for a user of all links. With the options' `network`
"links" an all-reduce also runs over the cluster's `Fabric`: NICs one by one, leaf switches, links that are slower or
farther than the others, GPUs of other jobs in between. Its time is the formula's times the ratio between this fabric
and one of equal links that the job has to itself; where they are the same, so are the times.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import msgspec

from ptsim.costs import nccl
from ptsim.costs.collectives import AllReduceTime, all_reduce, made_of_halves, nodes_for
from ptsim.costs.tiers import worst_tier
from ptsim.errors import UsageError
from ptsim.hardware.spec import Cluster
from ptsim.sim.options import Options
from ptsim.sim.topology import Fabric, PlacedJob, RoutedStage, simulate_all_reduces

_TREE_CHUNKS = 16  # of each half of a message; the ratio hardly depends on it
_SHARED_CHUNKS = 16  # of a connection, after which a ring beside other jobs has found its pace
_GRID = 4.0  # ratios are computed at powers of this message size and interpolated between them
_ROUNDED = 1e-9  # by which a factor on a time may be off


class Network:
    """The all-reduces of one job on `num_gpus` GPUs of a cluster; remembers what it has computed."""

    def __init__(self, cluster: Cluster, num_gpus: int, options: Options) -> None:
        """Place the job, and those beside it.

        Raises:
            UsageError: more GPUs than the cluster has, or jobs that cannot share its nodes.
        """
        self.cluster, self.num_gpus, self.options = cluster, num_gpus, options
        self.by_links = options.network == "links" and num_gpus > 1
        self.stride = options.jobs if self.by_links and options.placement == "striped" else 1
        if cluster.gpus_per_node % self.stride:
            raise UsageError(
                f"{self.stride} jobs cannot be striped over nodes of {cluster.gpus_per_node} GPUs",
                hint="placement = packed gives every job GPUs of its own, one after the other",
            )
        # As the formula sees it: a node has this job's GPUs, and leaf switches are left to the links.
        self._equal = cluster
        if self.by_links:
            per_node = cluster.gpus_per_node // self.stride
            self._equal = msgspec.structs.replace(cluster, gpus_per_node=per_node, oversubscription=1.0)
        self.num_nodes = nodes_for(self._equal, num_gpus)
        self._times: dict[int, AllReduceTime] = {}
        self._ratios: dict[int, float] = {}
        self._ways: dict[tuple[Hashable, ...], tuple[RoutedStage, ...]] = {}
        self.notes: list[str] = []
        self._bandwidth: dict[str, float] = {}
        self._latency: dict[str, float] = {}
        if self.by_links:
            self._name_links()
        self._differs = self.by_links and bool(
            self._bandwidth or self._latency or cluster.oversubscription > 1 or self.stride > 1
        )

    def _name_links(self) -> None:
        """Keep what the options say about links that these GPUs have; a larger job may have the others."""
        self._num_placed = 1 + max(self._ranks(self.options.jobs - 1))
        fabric = Fabric(self.cluster, self._num_placed)
        for given, kept in (
            (self.options.link_bandwidth, self._bandwidth),
            (self.options.link_latency_s, self._latency),
        ):
            for name, value in given.items():
                if fabric.named(name):
                    kept[name] = value
                else:
                    self.notes.append(f"{self.num_gpus:,} GPUs of {self.cluster.name} have no link {name!r}")

    @property
    def tier(self) -> str | None:
        """The worst that any of the all-reduces came from; None before the first."""
        return worst_tier(time.tier for time in self._times.values())

    def all_reduce(self, num_bytes: int) -> AllReduceTime:
        """The time of one all-reduce while no other job communicates."""
        if num_bytes not in self._times:
            time = all_reduce(num_bytes, self._equal, self.num_gpus, algorithm=self.options.algorithm)
            if self._differs:
                ratio = self._ratio(num_bytes)
                time = msgspec.structs.replace(
                    time, seconds=time.seconds * ratio, low_s=time.low_s * ratio, high_s=time.high_s * ratio
                )
            self._times[num_bytes] = time
        return self._times[num_bytes]

    def halves(self, num_bytes: int) -> AllReduceTime:
        """The same of a reduce-scatter and an all-gather together, into which a sharded update divides it."""
        algorithm = self.options.algorithm
        return made_of_halves(self.all_reduce(num_bytes), num_bytes, self._equal, self.num_gpus, algorithm=algorithm)

    def sharing(self, num_bytes: int) -> tuple[float, ...]:
        """How many times as long an all-reduce takes while 1, 2, … of the options' jobs communicate.

        By formula, jobs that leave their nodes share everything equally, and others nothing. By links, the jobs'
        all-reduces of `num_bytes` start together on the fabric; a ring is broken off when it has found its pace, at
        which the rest of it then goes on.
        """
        jobs = self.options.jobs
        if not self.by_links:
            return tuple(float(number if self.num_nodes > 1 else 1) for number in range(1, jobs + 1))
        if jobs == 1:
            return (1.0,)
        cluster, base_s, job = self._as_simulated(num_bytes)
        whole_s = self._alone_s(cluster, job, num_bytes, named=True)
        if not whole_s:
            return (1.0,) * jobs

        def begun_s(number: int, max_chunks: int) -> float:
            ranks = map(self._ranks, range(number))
            placed = [msgspec.structs.replace(job, ranks=own, max_chunks=max_chunks) for own in ranks]
            return self._seconds(cluster, placed)

        many, few = _SHARED_CHUNKS, _SHARED_CHUNKS // 2
        begin_s = begun_s(1, many)
        left = 0.0  # of a ring that was broken off, in times of as many chunks
        if whole_s > (1 + _ROUNDED) * begin_s:
            left = (whole_s - begin_s) / (begin_s - begun_s(1, few))
        factors = [1.0]
        for number in range(2, jobs + 1):
            shared_s = begun_s(number, many)
            if left:
                shared_s += left * (shared_s - begun_s(number, few))
            factor = (base_s + shared_s) / (base_s + whole_s)
            factors.append(max(factors[-1], factor if factor > 1 + _ROUNDED else 1.0))
        return tuple(factors)

    def _ratio(self, num_bytes: int) -> float:
        position = math.log(max(1, num_bytes), _GRID)
        below = math.floor(position)
        low, high = (self._ratio_at(round(_GRID**power)) for power in (below, below + 1))
        return low + (high - low) * (position - below)

    def _ratio_at(self, num_bytes: int) -> float:
        """Time on the links as they are over the time on equal ones."""
        if num_bytes not in self._ratios:
            cluster, base_s, job = self._as_simulated(num_bytes)
            equal = msgspec.structs.replace(
                cluster, gpus_per_node=self._equal.gpus_per_node, oversubscription=self._equal.oversubscription
            )
            alone = msgspec.structs.replace(job, ranks=tuple(range(self.num_gpus)))
            equal_s = base_s + self._alone_s(equal, alone, num_bytes, named=False)
            own_s = base_s + self._alone_s(cluster, job, num_bytes, named=True)
            self._ratios[num_bytes] = own_s / equal_s if equal_s else 1.0  # links that take no time
        return self._ratios[num_bytes]

    def _alone_s(self, cluster: Cluster, job: PlacedJob, num_bytes: int, *, named: bool) -> float:
        """One all-reduce with nobody else, on links as the options name them or on equal ones.

        The way of a single byte is found once, and serves messages of every size.
        """
        key = (named, job.algorithm, cluster.intra, cluster.inter)
        if key not in self._ways:
            factors = (self._bandwidth, self._latency) if named else (None, None)
            fabric = Fabric(
                cluster,
                self._num_placed if named else self.num_gpus,
                bandwidth_factor=factors[0],
                extra_latency_s=factors[1],
            )
            self._ways[key] = fabric.stages(msgspec.structs.replace(job, message_bytes=1.0))
        return math.fsum(stage.seconds(num_bytes) for stage in self._ways[key])

    def _as_simulated(self, num_bytes: int) -> tuple[Cluster, float, PlacedJob]:
        """The cluster with links as the protocol sees them, a call's fixed cost, and the first job's all-reduce."""
        line = nccl.fastest_line(self._equal, self.num_gpus, self.num_nodes, num_bytes, self.options.algorithm)
        cluster, base_s = nccl.effective_cluster(self._equal, self.num_gpus, self.num_nodes, line)
        seen = msgspec.structs.replace(
            cluster, gpus_per_node=self.cluster.gpus_per_node, oversubscription=self.cluster.oversubscription
        )
        job = PlacedJob(
            ranks=self._ranks(0), message_bytes=float(num_bytes), algorithm=line.algorithm, num_chunks=_TREE_CHUNKS
        )
        return seen, base_s, job

    def _ranks(self, job: int) -> tuple[int, ...]:
        start = job if self.stride > 1 else job * self.num_gpus
        return tuple(range(start, start + self.num_gpus * self.stride, self.stride))

    def _seconds(self, cluster: Cluster, jobs: list[PlacedJob]) -> float:
        """Mean over the jobs, which start together."""
        seconds = simulate_all_reduces(
            cluster,
            jobs,
            num_gpus=self._num_placed,
            bandwidth_factor=self._bandwidth,
            extra_latency_s=self._latency,
        ).seconds
        return math.fsum(seconds) / len(seconds)
