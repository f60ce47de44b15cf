"""Laws of whole projections, on random clusters with random options."""

from __future__ import annotations

import functools
import math
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptsim.costs.collectives import all_reduce
from ptsim.hardware.catalog import load_device
from ptsim.hardware.spec import Cluster, Link, LinkKind
from ptsim.sim import ddp
from ptsim.sim.options import GRADIENT_BYTES, Options
from ptsim.sim.projection import RunProjection
from ptsim.sim.run import StepCache, change, project
from ptsim.trace.io import read_trace
from ptsim.trace.trace import Trace
from tests.traces import shrinking_trace

KINDS = (LinkKind.MEASURED, LinkKind.NVLINK, LinkKind.INFINIBAND, LinkKind.TCP)


@functools.cache
def recorded() -> tuple[Trace, StepCache]:
    """A short run; no fixture, because hypothesis would write it out whole with every failure."""
    with tempfile.TemporaryDirectory() as folder:
        return read_trace(shrinking_trace(Path(folder), num_train=20_000)), StepCache()


def links(kinds: tuple[LinkKind, ...]) -> st.SearchStrategy[Link]:
    return st.builds(
        Link,
        name=st.just("random"),
        bandwidth_bytes_per_s=st.floats(1e7, 1e12),
        latency_s=st.floats(0, 1e-4),
        kind=st.sampled_from(kinds),
    )


clusters = st.builds(
    Cluster,
    name=st.just("random"),
    device=st.sampled_from(["a100-sxm4-40gb", "v100-sxm2-16gb", "t4"]).map(load_device),
    gpus_per_node=st.sampled_from([1, 2, 4, 8]),
    intra=links(KINDS[:2]),
    inter=links((LinkKind.MEASURED, *KINDS[2:])),
    nics_per_node=st.sampled_from([1, 2, 8]),
    oversubscription=st.sampled_from([1.0, 1.0, 3.0]),
    nodes_per_leaf=st.sampled_from([1, 2, 16]),
    nvswitch=st.booleans(),
    cores_per_node=st.integers(1, 200),
)
# without anything random or shared: those change the step from run to run
options = st.fixed_dictionaries(
    {},
    optional={
        "scaling": st.sampled_from(["weak", "strong"]),
        "minibatch": st.sampled_from(["recorded", "planned", "fixed"]),
        "micro_batches": st.integers(1, 4),
        "bucket_bytes": st.integers(1, 1 << 22),
        "first_bucket_bytes": st.integers(1, 1 << 20),
        "gradient_format": st.sampled_from(["fp32", "fp16", "bf16"]),
        "compression": st.floats(0.01, 1),
        "broadcast_buffers": st.booleans(),
        "overlap": st.booleans(),
        "network": st.sampled_from(["formula", "links"]),
        "algorithm": st.sampled_from(["auto", "ring", "tree"]),
        "contention": st.floats(0, 1),
        "channel_multiple": st.sampled_from([1, 8]),
        "input": st.sampled_from(["torchvision", "dali", "ffcv"]),
        "mixed_devices": st.sampled_from([{}, {"t4": 1}]),
        "autotune_trials": st.integers(0, 10),
        "warmup_steps": st.integers(0, 5),
        "price_usd_per_gpu_hour": st.floats(0, 10),
    },
)
random_options = st.fixed_dictionaries(
    {},
    optional={
        "jitter": st.one_of(st.just("recorded"), st.floats(0, 0.5)),
        "straggler_fraction": st.floats(0, 1),
        "straggler_slowdown": st.floats(1, 3),
        "jobs": st.integers(1, 3),
        "sampled_steps": st.integers(1, 5),
        "seed": st.integers(0, 3),
    },
)
gpus = st.sampled_from([2, 3, 4, 8, 12, 16])
laws = settings(max_examples=40, deadline=None)


def run(cluster: Cluster, number: int, changes: dict[str, Any]) -> RunProjection:
    trace, cache = recorded()
    return project(trace, cluster, number, change(Options(), changes), cache=cache)


@pytest.mark.slow
@given(clusters, options, random_options)
@laws
def test_one_gpu_sends_nothing_whatever_the_cluster(
    cluster: Cluster, changes: dict[str, Any], more: dict[str, Any]
) -> None:
    p = run(cluster, 1, {**changes, **more})
    assert p.allreduce_bytes_per_gpu == 0
    assert p.network_tier is None
    assert all(epoch.communication_s == 0 for epoch in p.epochs)
    assert p.exposed_communication_s == pytest.approx(0, abs=1e-9 * p.total_s)


@pytest.mark.slow
@given(clusters, gpus, options, random_options)
@laws
def test_parts_add_up_and_lie_in_the_interval(
    cluster: Cluster, number: int, changes: dict[str, Any], more: dict[str, Any]
) -> None:
    p = run(cluster, number, {**changes, **more})
    for e in p.epochs:
        parts = e.compute_s + e.input_wait_s + e.straggler_wait_s + e.exposed_communication_s
        if "jobs" in more or "jitter" in more:  # means over steps that begin at different moments
            assert parts >= e.step_s * (1 - 1e-9)
        else:
            assert parts == pytest.approx(e.step_s, rel=1e-9)
        assert min(e.compute_s, e.input_wait_s, e.straggler_wait_s, e.exposed_communication_s) >= 0
        assert e.low_s <= e.total_s <= e.high_s
    assert p.low_s <= p.total_s <= p.high_s
    assert p.reconfiguration_low_s <= p.reconfiguration_s <= p.reconfiguration_high_s
    fixed = p.reconfiguration_s + p.startup_s + p.faults_s
    assert p.total_s == pytest.approx(sum(e.total_s for e in p.epochs) + fixed, rel=1e-12)


@pytest.mark.slow
@given(clusters, gpus, options)
@laws
def test_a_step_takes_at_least_its_computation_and_its_critical_path(
    cluster: Cluster, number: int, changes: dict[str, Any]
) -> None:
    for e in run(cluster, number, changes).epochs:
        assert e.step_s >= e.compute_s * (1 - 1e-9)
        # nothing is reduced before the forward passes and the first piece of backward
        passes = changes.get("micro_batches", 1)
        before = e.forward_s + e.backward_s * (passes - 1) / passes
        assert e.step_s >= (before + e.communication_s + e.optimizer_s + e.regularizer_s) * (1 - 1e-9) or (
            changes.get("broadcast_buffers") and e.step_s >= before
        )
        if changes.get("overlap") is False and "input" not in changes:
            assert e.exposed_communication_s == pytest.approx(e.communication_s, rel=1e-6, abs=1e-12)


@pytest.mark.slow
@given(clusters, gpus, options)
@laws
def test_infinite_bandwidth_leaves_computation_and_input(
    cluster: Cluster, number: int, changes: dict[str, Any]
) -> None:
    free = Link(name="ideal", bandwidth_bytes_per_s=math.inf, latency_s=0.0)
    ideal = msgspec.structs.replace(cluster, intra=free, inter=free)
    plain = {key: value for key, value in changes.items() if key not in ("gradient_format", "compression")}
    p = run(ideal, number, plain)  # converting gradients takes time on any network
    assert p.exposed_communication_s == pytest.approx(0, abs=1e-9 * p.total_s)


@pytest.mark.slow
@given(clusters, gpus, options, st.floats(1, 100), st.floats(1, 100))
@laws
def test_more_bandwidth_never_costs_time(
    cluster: Cluster, number: int, changes: dict[str, Any], inside: float, out: float
) -> None:
    assert cluster.inter is not None
    faster = msgspec.structs.replace(
        cluster,
        intra=msgspec.structs.replace(
            cluster.intra, bandwidth_bytes_per_s=cluster.intra.bandwidth_bytes_per_s * inside
        ),
        inter=msgspec.structs.replace(cluster.inter, bandwidth_bytes_per_s=cluster.inter.bandwidth_bytes_per_s * out),
    )
    before, after = (run(c, number, changes) for c in (cluster, faster))
    # link by link the law holds for the simulated ratio's two halves, and for their quotient but for a little
    slack = 0.02 if changes.get("network") == "links" and cluster.oversubscription > 1 else 1e-9
    for slow, fast in zip(before.epochs, after.epochs, strict=True):
        assert fast.step_s <= slow.step_s * (1 + slack)
    assert after.total_s <= before.total_s * (1 + slack)


@pytest.mark.slow
@given(clusters, gpus, options, random_options)
@laws
def test_bytes_on_the_wire_are_the_formula(
    cluster: Cluster, number: int, changes: dict[str, Any], more: dict[str, Any]
) -> None:
    p = run(cluster, number, {**changes, **more, "channel_multiple": 1})
    ratio = GRADIENT_BYTES[changes.get("gradient_format", "fp32")] / 4 * changes.get("compression", 1.0)
    for e in p.epochs:
        gradient = 4 * recorded()[0].networks[e.architecture].num_parameters * ratio
        # every bucket is a whole number of bytes
        assert e.wire_bytes_per_gpu == pytest.approx(2 * (number - 1) / number * gradient, rel=1e-3, abs=200)


@pytest.mark.slow
@given(clusters, gpus, options)
@laws
def test_memory_and_energy_are_those_of_one_gpu_times_their_number(
    cluster: Cluster, number: int, changes: dict[str, Any]
) -> None:
    p = run(cluster, number, changes)
    assert p.energy_j is not None
    assert p.energy_low_j is not None
    assert p.energy_high_j is not None
    assert p.energy_low_j <= p.energy_j <= p.energy_high_j
    assert p.energy_low_j >= (1 - 1e-9) * number * p.low_s * load_device(p.device).idle_power_w
    assert 50 * number * p.total_s * 0.1 < p.energy_j < 1000 * number * p.total_s


@pytest.mark.slow
@given(clusters, gpus, random_options)
@laws
def test_equal_seeds_give_equal_bytes(cluster: Cluster, number: int, more: dict[str, Any]) -> None:
    one, other = (msgspec.json.encode(run(cluster, number, more)) for _ in range(2))
    assert one == other


@given(clusters, gpus, st.integers(1, 10**8))
@laws
def test_the_first_step_after_wrapping_is_one_bucket_after_backward(cluster: Cluster, number: int, size: int) -> None:
    trace, _ = recorded()
    network = trace.network_of(trace.epochs[0])
    time = all_reduce(4 * network.num_parameters, cluster, number).seconds
    assert ddp.first_step_s(network, lambda n: all_reduce(n, cluster, number)) == time
