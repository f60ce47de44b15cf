"""Who sends which chunk to whom, and after what, in a ring, a tree or a hierarchical all-reduce.

An all-reduce is a sequence of stages with a barrier between them; a stage is a set of connections that carry equally
many chunks of equal size, each chunk as soon as those that it depends on have arrived. Nothing here knows how fast
anything is: `topology` says how long a schedule takes.

NCCL runs one ring or pair of trees per NIC, each with its part of the message, so that one job uses every NIC that its
GPUs have (a rail is the NIC of the same number on every node). So does a schedule here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import msgspec

from ptsim.costs.algorithms import load_schedule
from ptsim.errors import UsageError


class Connection(msgspec.Struct, frozen=True):
    """From one GPU to another. Chunk j leaves when chunk j - lag (of the stage) arrived over each one in `after`."""

    source: int
    target: int
    after: tuple[int, ...]


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """Connections that work side by side; those without a lag depend only on earlier ones of the list."""

    connections: tuple[Connection, ...]
    num_chunks: int
    chunk_bytes: float
    lag: int


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Where the GPUs of one all-reduce are.

    Attributes:
        ranks: GPUs, in ring order; a node's GPUs stand together where there is more than one rail.
        node_of: a GPU's node.
        rail_of: the number of a GPU's NIC inside its node.
    """

    ranks: tuple[int, ...]
    node_of: Callable[[int], int]
    rail_of: Callable[[int], int]

    @property
    def nodes(self) -> list[list[int]]:
        """The GPUs of every node."""
        nodes: dict[int, list[int]] = {}
        for rank in self.ranks:
            nodes.setdefault(self.node_of(rank), []).append(rank)
        return list(nodes.values())

    @property
    def channels(self) -> list[list[int]]:
        """The order of the GPUs for every NIC: it enters a node at the GPU next to its rail, or at the next best."""
        members = self.nodes
        rails = sorted({self.rail_of(rank) for rank in self.ranks})
        if len(members) == 1 or len(rails) == 1:
            return [list(self.ranks)]
        return [
            list(itertools.chain.from_iterable(_rotated(node, rail, self.rail_of) for node in members))
            for rail in rails
        ]


def schedule(algorithm: str, placement: Placement, message_bytes: float, *, num_chunks: int) -> tuple[Stage, ...]:
    """The stages of one all-reduce; none for a single rank.

    Args:
        algorithm: the name of a row of `costs.algorithms` that has a schedule.
        placement: where its GPUs are.
        message_bytes: what every GPU holds.
        num_chunks: into how many pieces a tree cuts its half of the message; rings cut it by their size.

    Raises:
        UsageError: no such algorithm or schedule, or a hierarchical all-reduce with unequal numbers of GPUs on the
            nodes.
    """
    if len(placement.ranks) == 1:
        return ()
    stages: tuple[Stage, ...] = load_schedule(algorithm)(placement, message_bytes, num_chunks=num_chunks)
    return stages


def ring_schedule(placement: Placement, message_bytes: float, *, num_chunks: int) -> tuple[Stage, ...]:
    """A ring per NIC, each with its part of the message."""
    channels, size = placement.channels, len(placement.ranks)
    return (_rings(channels, message_bytes / len(channels) / size, 2 * (size - 1)),)


def tree_schedule(placement: Placement, message_bytes: float, *, num_chunks: int) -> tuple[Stage, ...]:
    """Two trees per NIC, each with half of its part of the message."""
    channels = placement.channels
    connections: list[Connection] = []
    for channel in channels:
        for parents in _trees(channel, placement.node_of):
            _add_tree(connections, channel, parents)
    chunk_bytes = message_bytes / len(channels) / 2 / num_chunks
    return (Stage(connections=tuple(connections), num_chunks=num_chunks, chunk_bytes=chunk_bytes, lag=0),)


def hierarchical_schedule(placement: Placement, message_bytes: float, *, num_chunks: int) -> tuple[Stage, ...]:
    """Reduce-scatter inside the nodes, rings of the shards between them, all-gather inside."""
    return _hierarchical(placement.nodes, message_bytes)


def _rotated(node: Sequence[int], rail: int, rail_of: Callable[[int], int]) -> list[int]:
    first = next((i for i, rank in enumerate(node) if rail_of(rank) >= rail), 0)
    return [*node[first:], *node[:first]]


def _rings(rings: Sequence[Sequence[int]], chunk_bytes: float, num_chunks: int) -> Stage:
    """Every rank sends a chunk to the next one, `num_chunks` times, each after it got the chunk of the step before."""
    connections: list[Connection] = []
    for ring in rings:
        start = len(connections)
        connections += [
            Connection(rank, ring[(i + 1) % len(ring)], (start + (i - 1) % len(ring),)) for i, rank in enumerate(ring)
        ]
    return Stage(connections=tuple(connections), num_chunks=num_chunks, chunk_bytes=chunk_bytes, lag=1)


def _hierarchical(members: Sequence[Sequence[int]], message_bytes: float) -> tuple[Stage, ...]:
    """Reduce-scatter inside every node, all-reduce of the shards between nodes, all-gather inside."""
    width, size = len(members[0]), len(members)
    if any(len(node) != width for node in members):
        raise UsageError("a hierarchical all-reduce needs as many GPUs on every node")
    inside = (_rings(members, message_bytes / width, width - 1),) if width > 1 else ()
    if size == 1:
        return inside * 2
    shards = [[node[local] for node in members] for local in range(width)]
    return (*inside, _rings(shards, message_bytes / width / size, 2 * (size - 1)), *inside)


def double_binary_tree(size: int) -> tuple[list[int | None], list[int | None]]:
    """Parents in two trees over 0 … size-1; a rank that has two children in one is a leaf in the other.

    The first has the lowest set bit as level (odd ranks are leaves, rank 0 is the root with one child); the second is
    its mirror for an even size, and shifted by one for an odd one. Both are ⌈log₂ size⌉ deep.

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


def _trees(ranks: Sequence[int], node_of: Callable[[int], int]) -> tuple[list[int | None], list[int | None]]:
    """Parents of both trees; over several nodes they join nodes, and a node's GPUs form a chain, as in NCCL."""
    nodes: dict[int, list[int]] = {}
    for i, rank in enumerate(ranks):
        nodes.setdefault(node_of(rank), []).append(i)
    if len(nodes) == 1:
        return double_binary_tree(len(ranks))
    first, second = double_binary_tree(len(nodes))
    chains = list(nodes.values())
    return _chained(first, chains), _chained(second, [chain[::-1] for chain in chains])


def _chained(tree: Sequence[int | None], chains: Sequence[Sequence[int]]) -> list[int | None]:
    """Parents of all ranks: inside a node the one before it in the chain, for the head the parent node's head."""
    parents: list[int | None] = [None] * sum(map(len, chains))
    for node, chain in enumerate(chains):
        above = tree[node]
        parents[chain[0]] = None if above is None else chains[above][0]
        for before, rank in itertools.pairwise(chain):
            parents[rank] = before
    return parents


def _add_tree(connections: list[Connection], ranks: Sequence[int], parents: Sequence[int | None]) -> None:
    """Every rank sends its partial sum up when its children's have come, and the result down when it has it."""
    children: list[list[int]] = [[] for _ in ranks]
    for rank, parent in enumerate(parents):
        if parent is not None:
            children[parent].append(rank)
    root = parents.index(None)
    order = [root]  # parents before children
    for rank in order:
        order += children[rank]
    up: dict[int, int] = {}
    for rank in reversed(order):
        parent = parents[rank]
        if parent is not None:
            up[rank] = len(connections)
            after = tuple(up[child] for child in children[rank])
            connections.append(Connection(ranks[rank], ranks[parent], after))
    down: dict[int, tuple[int, ...]] = {root: tuple(up[child] for child in children[root])}
    for rank in order:
        for child in children[rank]:
            connections.append(Connection(ranks[rank], ranks[child], down[rank]))
            down[child] = (len(connections) - 1,)
