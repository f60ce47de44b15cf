"""What many GPUs add to a step: constants from the fit, arithmetic by hand."""

from __future__ import annotations

import math

import msgspec
import pytest

from ptsim.costs import scaling
from ptsim.costs.datasheet import ManyGpus, load_intervals
from ptsim.costs.scaling import among, contention_of, hook_seconds, load_scaling, slowdown, slowed, widened
from ptsim.costs.tiers import Tier
from ptsim.costs.times import LayerTime, StepTime
from ptsim.hardware.catalog import load_cluster
from ptsim.hardware.spec import Cluster, Link, LinkKind
from ptsim.network import LayerKind


def test_one_gpu_and_cpus_have_no_hooks() -> None:
    cluster = load_cluster("dgx-a100")
    assert hook_seconds(cluster, 1) == 0
    assert hook_seconds(msgspec.structs.replace(cluster, library="gloo"), 2) == 0
    assert {hook_seconds(cluster, num_gpus) for num_gpus in (2, 8, 64)} == {load_scaling().tensor_s}
    assert load_scaling().tensor_s > 0


def test_the_network_decides_between_nodes_how_much_overlap_slows_down() -> None:
    assert contention_of(load_cluster("rtx-3090-x8"), 8) == load_scaling().contention["other"] == 0.2
    assert contention_of(load_cluster("rtx-3090-x8"), 16) == load_scaling().contention["tcp"]
    assert contention_of(load_cluster("dgx-a100"), 8) == load_scaling().contention["other"]
    assert contention_of(load_cluster("dgx-a100"), 16) == load_scaling().contention["other"]
    assert contention_of(load_cluster("aws-p4d-24xlarge"), 16) == load_scaling().contention["other"]


def test_the_interval_of_a_measured_step_gets_the_spread_of_many_gpus_by_squares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = load_cluster("dgx-a100")
    made = msgspec.structs.replace(load_scaling(), low=-0.3, high=0.4)
    monkeypatch.setattr(scaling, "load_scaling", lambda: made)
    low, high = widened(1.0, math.exp(-0.4), math.exp(0.3), Tier.PROFILED, cluster, 8)
    assert (math.log(low), math.log(high)) == pytest.approx((-0.5, 0.5))
    assert widened(1.0, 0.9, 1.1, Tier.PROFILED, cluster, 1) == (0.9, 1.1)
    assert widened(1.0, 0.9, 1.1, Tier.PROFILED, msgspec.structs.replace(cluster, library="gloo"), 8) == (0.9, 1.1)
    assert widened(1.0, 0.9, 1.1, Tier.DATASHEET, cluster, 8) == (0.9, 1.1)
    assert widened(0.0, 0.5, 1.1, Tier.PROFILED, cluster, 8) == (0.5, 1.1)
    assert widened(1.0, 0.0, 1.1, Tier.PROFILED, cluster, 8) == (0.0, 1.1)
    assert widened(1.0, math.exp(-0.4), math.exp(0.3), Tier.SCALED, cluster, 2) == (low, high)


def test_a_step_from_the_data_sheet_has_its_own_interval_among_many_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = load_cluster("dgx-a100")
    both = {
        "known_device_many_gpus": ManyGpus(low=-0.5, high=2.0),
        "new_device_many_gpus": ManyGpus(low=-0.9, high=1.0),
    }
    made = msgspec.structs.replace(load_intervals(), **both)
    monkeypatch.setattr(scaling, "load_intervals", lambda: made)
    step = StepTime(
        layers=(), optimizer_s=2.0, regularizer_s=0.0, overhead_s=0.0, low_s=0.5, high_s=2.2, tier=Tier.DATASHEET
    )
    among_many, slower = among(step, cluster, 8), 1 + load_scaling().slowdown
    # Half as far down on a logarithmic scale, sqrt(2 * 0.5), and twice as far up, 2.2**2 / 2.
    expected = (slower * 1.0, slower * 2.42, slower * 2.0)
    assert (among_many.low_s, among_many.high_s, among_many.compute_s) == pytest.approx(expected)
    assert among(step, cluster, 1) == step
    measured = msgspec.structs.replace(step, tier=Tier.MEASURED)
    assert among(measured, cluster, 8) == measured.scaled(slower)
    for nothing in ({"low_s": 0.0}, {"optimizer_s": 0.0}):  # no ratio to take the logarithm of
        empty = msgspec.structs.replace(step, **nothing)
        assert among(empty, cluster, 8) == empty.scaled(slower)
    assert among(step, cluster, 2) == among_many
    assert cluster.device is not None
    foreign = msgspec.structs.replace(cluster.device, name="new", num_sms=1)
    on_new = among(step, msgspec.structs.replace(cluster, device=foreign), 8)
    assert (on_new.low_s, on_new.high_s) == pytest.approx((slower * 2 * 0.25**0.9, slower * 2.2))


def test_a_gpu_among_others_is_slower_in_all_that_it_computes_unless_it_was_recorded_so() -> None:
    layer = LayerTime(layer="conv", kind=LayerKind.CONV, forward_s=1.0, backward_s=2.0, tier=Tier.PROFILED)
    parts = {"optimizer_s": 0.5, "regularizer_s": 0.25, "overhead_s": 0.125, "whole_s": 0.2, "again_s": 0.1}
    step = StepTime(layers=(layer,), low_s=3.0, high_s=5.0, tier=Tier.PROFILED, **parts)
    share = load_scaling().slowdown
    assert share > 0
    for num_gpus in (2, 8, 64):
        slow = slowed(step, num_gpus, on_gpus=True)
        assert slow.compute_s == pytest.approx((1 + share) * step.compute_s)
        assert (slow.forward_s, slow.backward_s) == pytest.approx((1 + share, 2 * (1 + share)))
        assert {name: getattr(slow, name) / seconds for name, seconds in parts.items()} == pytest.approx(
            dict.fromkeys(parts, 1 + share)
        )
        assert (slow.low_s / 3, slow.high_s / 5) == pytest.approx((1 + share, 1 + share))
    cluster, more = load_cluster("dgx-a100"), load_scaling().straggle
    assert more > 0
    for num_gpus, doublings in ((2, 0), (8, 0), (16, 1), (24, math.log2(3)), (64, 3)):
        assert slowdown(cluster, num_gpus) == pytest.approx(share + doublings * more)
        assert among(step, cluster, num_gpus).compute_s == pytest.approx(
            (1 + share + doublings * more) * step.compute_s
        )
    recorded = msgspec.structs.replace(step, data_parallel=True)
    assert among(recorded, cluster, 8) == recorded
    farther = (1 + share + 3 * more) / (1 + share)
    assert among(recorded, cluster, 64).compute_s == pytest.approx(farther * step.compute_s)
    assert slowed(recorded, 8, on_gpus=True) == recorded
    assert slowed(step, 1, on_gpus=True) == slowed(step, 8, on_gpus=False) == step
    cpus = msgspec.structs.replace(load_cluster("dgx-a100"), library="gloo")
    assert among(step, cpus, 8) == step
    assert (slowdown(load_cluster("dgx-a100"), 8), slowdown(load_cluster("dgx-a100"), 1), slowdown(cpus, 8)) == (
        share,
        0,
        0,
    )


def test_a_link_of_no_fitted_kind_contends_as_the_others_do() -> None:
    measured = Link(name="l", bandwidth_bytes_per_s=1e9)
    sockets = msgspec.structs.replace(measured, kind=LinkKind.TCP)
    other, tcp = load_scaling().contention["other"], load_scaling().contention["tcp"]
    assert tcp != other
    for intra, inter, gpus, expected in (
        (measured, None, 2, other),
        (sockets, measured, 2, tcp),
        (sockets, measured, 5, other),
        (measured, sockets, 5, tcp),
    ):
        cluster = Cluster(name="c", device=None, gpus_per_node=4, intra=intra, inter=inter)
        assert contention_of(cluster, gpus) == expected


def test_constants_that_are_given_stand_in_for_those_that_ptsim_ships() -> None:
    given = msgspec.structs.replace(load_scaling(), slowdown=0.5, straggle=0.25, contention={"other": 0.75})
    cluster = load_cluster("dgx-a100")  # two nodes of 8
    assert (slowdown(cluster, 8, given), slowdown(cluster, 16, given)) == (0.5, 0.75)
    assert contention_of(cluster, 16, given) == 0.75
