"""Hand-made plans and clusters for the simulator's tests."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from ptsim.hardware.catalog import load_device
from ptsim.hardware.spec import Cluster, Link
from ptsim.sim.work import Collective, Piece, StepPlan


def plan(
    backward: Sequence[float],
    collectives: Sequence[float],
    *,
    ready: Sequence[int] | None = None,
    forward: float = 2.0,
    tail: float = 0.5,
    head: Sequence[float] = (),
    num_micro_batches: int = 1,
    overlap: bool = True,
) -> StepPlan:
    """Bucket i is ready after backward piece `ready[i]` (by default after piece i)."""
    after = list(range(len(collectives))) if ready is None else list(ready)
    pieces: list[Piece] = []
    for i, seconds in enumerate(backward):
        buckets = [b for b, piece in enumerate(after) if piece == i]
        pieces.append(Piece(name=f"layer{i}", seconds=seconds, bucket=buckets[0] if buckets else None))
        pieces += [Piece(name=f"layer{i}", seconds=0.0, bucket=b) for b in buckets[1:]]
    return StepPlan(
        forward=(Piece(name="forward", seconds=forward),),
        backward=tuple(pieces),
        tail=(Piece(name="optimizer", seconds=tail),),
        buckets=tuple(
            Collective(name=f"bucket {i}", seconds=seconds, num_bytes=100, wire_bytes_per_gpu=175.0)
            for i, seconds in enumerate(collectives)
        ),
        head=tuple(
            Collective(name="broadcast", seconds=seconds, num_bytes=8, wire_bytes_per_gpu=7.0) for seconds in head
        ),
        num_micro_batches=num_micro_batches,
        overlap=overlap,
    )


def cluster(
    *,
    bandwidth: float = 300e9,
    latency: float = 2e-6,
    inter_bandwidth: float = 25e9,
    inter_latency: float = 5e-6,
    gpus_per_node: int = 8,
    device: str = "a100-sxm4-40gb",
    price: float | None = None,
) -> Cluster:
    """A cluster whose links are exactly what they say."""
    return Cluster(
        name="made up",
        device=load_device(device),
        gpus_per_node=gpus_per_node,
        intra=Link(name="inside", bandwidth_bytes_per_s=bandwidth, latency_s=latency),
        inter=Link(name="between", bandwidth_bytes_per_s=inter_bandwidth, latency_s=inter_latency),
        price_usd_per_gpu_hour=price,
    )


_seconds = st.floats(min_value=0, max_value=10, allow_subnormal=False).map(lambda x: round(x, 6))


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    """Plans with up to six backward pieces and buckets that become ready in order."""
    backward = draw(st.lists(_seconds, min_size=1, max_size=6))
    num_buckets = draw(st.integers(0, 4))
    ready = sorted(draw(st.lists(st.integers(0, len(backward) - 1), min_size=num_buckets, max_size=num_buckets)))
    return plan(
        backward,
        draw(st.lists(_seconds, min_size=num_buckets, max_size=num_buckets)),
        ready=ready,
        forward=draw(_seconds),
        tail=draw(_seconds),
        head=draw(st.lists(_seconds, max_size=1)),
        num_micro_batches=draw(st.integers(1, 3)),
        overlap=draw(st.booleans()),
    )
