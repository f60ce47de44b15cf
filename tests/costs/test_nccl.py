"""Lines of NCCL's protocols by hand, with round numbers in the place of the fitted ones."""

from __future__ import annotations

import math

import msgspec
import pytest

from ptsim.costs.nccl import KindFit, Line, NcclFit, Protocol, default_fit, effective_cluster, lines
from ptsim.hardware.spec import Cluster, Link, LinkKind

SHARE: dict[Protocol, float] = {"LL": 0.25, "LL128": 0.5, "Simple": 1.0}
FIT = NcclFit(
    base_scale={"LL": 2.0, "LL128": 3.0, "Simple": 4.0},
    join=2.0,
    pcie_crowding=0.5,
    nvls_share=0.6,
    residual=0.1,
    small_residual=0.4,
    kinds={
        LinkKind.NVLINK: KindFit(latency_scale=2.0, efficiency=0.8, share=SHARE),
        LinkKind.PCIE: KindFit(latency_scale=1.5, efficiency=0.4, share=SHARE),
        LinkKind.INFINIBAND: KindFit(latency_scale=3.0, efficiency=0.5, share=SHARE),
        LinkKind.TCP: KindFit(latency_scale=10.0, efficiency=0.5, share=SHARE, cap_bytes_per_s=1e9),
    },
)


def link(kind: LinkKind, gigabytes: float = 100.0, **changes: float) -> Link:
    made = Link(name=str(kind), bandwidth_bytes_per_s=gigabytes * 1e9, kind=kind)
    return msgspec.structs.replace(made, **changes)


def node(kind: LinkKind = LinkKind.NVLINK, inter: Link | None = None, **changes: object) -> Cluster:
    whole = Cluster(name="c", device=None, gpus_per_node=8, intra=link(kind), inter=inter, nvswitch=True)
    return msgspec.structs.replace(whole, **changes)


def line(cluster: Cluster, gpus: int, algorithm: str, protocol: str = "Simple", **fit: float) -> tuple[float, float]:
    """Microseconds of a message without bytes, and nanoseconds of a kilobyte more."""
    nodes = -(-gpus // cluster.gpus_per_node)
    made = lines(cluster, gpus, nodes, msgspec.structs.replace(FIT, **fit))
    (found,) = (one for one in made if (one.algorithm, one.protocol) == (algorithm, protocol))
    return 1e6 * found.latency_s, 1e12 * found.seconds_per_byte


@pytest.mark.parametrize(
    ("algorithm", "protocol", "latency", "per_kilobyte"),
    [
        # The call, 14 hops of twice NCCL's table; 14/8 of a message, or 2 up and down a chain, at 0.8 of 100 GB/s.
        ("ring", "LL", 2 * 6.6 + 14 * 2 * 0.6, 14 / 8 / 0.08 / 0.25),
        ("ring", "LL128", 3 * 14 + 14 * 2 * 1.9, 14 / 8 / 0.08 / 0.5),
        ("ring", "Simple", 4 * 8.4 + 14 * 2 * 3.4, 14 / 8 / 0.08),
        ("tree", "LL", 2 * 6.8 + 14 * 2 * 0.6, 2 / 0.08 / 0.25),
        ("tree", "LL128", 3 * 14 + 14 * 2 * 1.25, 2 / 0.08 / 0.5),
        ("tree", "Simple", 4 * 8.4 + 14 * 2 * 4, 2 / 0.08),
        ("hierarchical", "Simple", 4 * 8.4 + 14 * 2 * 3.4, 14 / 8 / 0.08),
    ],
)
def test_eight_gpus_on_a_switch(algorithm: str, protocol: str, latency: float, per_kilobyte: float) -> None:
    assert line(node(), 8, algorithm, protocol) == pytest.approx((latency, per_kilobyte))


@pytest.mark.parametrize(("gpus", "share"), [(2, 1 / 3), (3, 2 / 3), (4, 1.0), (8, 1.0)])
def test_without_a_switch_links_lead_to_fixed_peers(gpus: int, share: float) -> None:
    _, found = line(node(nvswitch=False), gpus, "ring")
    assert found == pytest.approx(2 * (gpus - 1) / gpus / 0.08 / share)
    assert line(node(), gpus, "ring")[1] == pytest.approx(share * found)


@pytest.mark.parametrize(
    ("gpus", "efficiency", "gigabytes"), [(2, None, 40.0), (3, None, 20.0), (8, None, 20.0), (8, 0.9, 90.0)]
)
def test_more_than_two_gpus_crowd_the_host_unless_the_user_says_what_they_get(
    gpus: int, efficiency: float | None, gigabytes: float
) -> None:
    box = node(LinkKind.PCIE, intra=msgspec.structs.replace(link(LinkKind.PCIE), efficiency=efficiency))
    latency, found = line(box, gpus, "ring")
    assert found == pytest.approx(2 * (gpus - 1) / gpus / gigabytes * 1e3)
    assert latency == pytest.approx(4 * 8.4 + 2 * (gpus - 1) * 1.5 * 5.7)


def test_a_latency_that_the_user_states_is_that_of_the_fastest_protocols_hop() -> None:
    """3 µs are 5 times the 0.6 of LL, and so are the hops of the others."""
    slow = node(intra=link(LinkKind.NVLINK, latency_s=3e-6))
    for protocol, call, hop in (("LL", 2 * 6.6, 0.6), ("LL128", 3 * 14, 1.9), ("Simple", 4 * 8.4, 3.4)):
        assert line(slow, 8, "ring", protocol)[0] == pytest.approx(call + 14 * 5 * hop)


@pytest.mark.parametrize(
    ("algorithm", "protocol", "call", "hop"),
    [
        # a ring's hop by LL takes 2.7 µs in NCCL's table, so a link of 5.4 µs takes twice what the table says
        ("ring", "LL", 2 * 6.6, 5.4),
        ("ring", "Simple", 4 * 8.4, 2 * 14),
        ("tree", "LL", 2 * 6.8, 2 * 5),
        ("tree", "LL128", 3 * 14, 2 * 8.5),
    ],
)
def test_the_latency_of_a_network_is_that_of_a_rings_hop_by_the_fastest_protocol(
    algorithm: str, protocol: str, call: float, hop: float
) -> None:
    """Two nodes of one GPU: the message, or its halves, go there and back."""
    pair = node(gpus_per_node=1, inter=link(LinkKind.INFINIBAND, latency_s=5.4e-6))
    assert line(pair, 2, algorithm, protocol)[0] == pytest.approx(call + 2 * hop)


@pytest.mark.parametrize(
    ("algorithm", "nics", "thin", "latency", "inside", "between"),
    [
        # 28 hops inside and 2 between; 30/16 over either link, 0.8 of 100 and half of 25 GB/s.
        ("ring", 1, 1.0, 28 * 2 * 3.4 + 2 * 3 * 14, 30 / 16 / 80, 30 / 16 / 12.5),
        ("ring", 1, 3.0, 28 * 2 * 3.4 + 2 * 3 * 14, 30 / 16 / 80, 3 * 30 / 16 / 12.5),
        # Up and down the chains and between two nodes, which exchange one message where every GPU has a NIC.
        ("tree", 1, 1.0, 14 * 2 * 4 + 2 * 3 * 14, 2 / 80, 2 / 12.5),
        ("tree", 8, 1.0, 14 * 2 * 4 + 2 * 3 * 14, 2 / 80, 1 / 12.5),
    ],
)
def test_two_nodes_hide_the_faster_level_behind_the_slower_one(
    algorithm: str, nics: int, thin: float, latency: float, inside: float, between: float
) -> None:
    two = node(inter=link(LinkKind.INFINIBAND, 25.0), nics_per_node=nics, oversubscription=thin)
    found = line(two, 16, algorithm)
    assert found == pytest.approx((4 * 8.4 + latency, 1e3 * math.hypot(inside, between)))
    assert line(two, 16, algorithm, join=1.0)[1] == pytest.approx(1e3 * (inside + between))


def test_links_inside_a_node_that_is_full_are_all_in_use_though_the_next_one_has_a_single_gpu() -> None:
    """Four and one: the first node's GPUs reach three peers each. 6 hops inside, 2 between, 8/5 of a message."""
    mesh = node(gpus_per_node=4, nvswitch=False, inter=link(LinkKind.INFINIBAND, 25.0))
    expected = 4 * 8.4 + 6 * 2 * 3.4 + 2 * 3 * 14, 1e3 * math.hypot(8 / 5 / 80, 8 / 5 / 12.5)
    assert line(mesh, 5, "ring") == pytest.approx(expected)
    assert lines(mesh, 5, 2) == lines(mesh, 5, 2, default_fit())
    assert lines(msgspec.structs.replace(mesh, gpus_per_node=3), 5, 2) != lines(mesh, 5, 2)
    ring = Line(algorithm="ring", protocol="Simple", latency_s=0.0, seconds_per_byte=0.0)
    seen, _ = effective_cluster(mesh, 5, 2, ring)
    assert seen.intra.bandwidth_bytes_per_s == pytest.approx(100e9 * default_fit().kinds[LinkKind.NVLINK].efficiency)


@pytest.mark.parametrize(
    ("gpus", "nics", "part"),
    [
        (9, 8, 1 / 8),  # the second node's only GPU has one of its eight NICs
        (12, 8, 1 / 2),
        (16, 8, 1.0),
        (10, 4, 1 / 4),  # two GPUs share each of four
        (11, 4, 1 / 2),
        (9, 1, 1.0),
        (9, 16, 1 / 8),  # two for every GPU
    ],
)
@pytest.mark.parametrize("algorithm", ["ring", "tree", "hierarchical"])
def test_a_node_that_is_not_full_has_only_the_nics_of_its_gpus(
    algorithm: str, gpus: int, nics: int, part: float
) -> None:
    """Their part of 12.5 GB/s; beside a link without bytes inside the node."""
    fast = link(LinkKind.NVLINK, 1e9)
    two = node(intra=fast, inter=link(LinkKind.INFINIBAND, 25.0), nics_per_node=nics)
    volume = {"ring": 2 * (gpus - 1) / gpus, "tree": 1.0 if nics >= 8 else 2.0, "hierarchical": 1.0}[algorithm]
    assert line(two, gpus, algorithm)[1] == pytest.approx(1e3 * volume / 12.5 / part, rel=1e-6)


def test_a_hierarchy_does_one_level_after_the_other() -> None:
    two = node(inter=link(LinkKind.INFINIBAND, 25.0))
    latency, found = line(two, 16, "hierarchical")
    assert found == pytest.approx(1e3 * (14 / 8 / 80 + 1 / 12.5))
    assert latency == pytest.approx(4 * 8.4 + 14 * 2 * 3.4 + 2 * 3 * 14)


@pytest.mark.parametrize(("nics", "gigabytes", "reached"), [(1, 25.0, 1.0), (8, 25.0, 8.0), (8, 10.0, 5.0)])
def test_sockets_carry_no_more_than_their_threads_can(nics: int, gigabytes: float, reached: float) -> None:
    two = node(gpus_per_node=1, inter=link(LinkKind.TCP, gigabytes), nics_per_node=nics)
    assert line(two, 4, "ring")[1] == pytest.approx(1e3 * 6 / 4 / reached)


@pytest.mark.parametrize(
    ("algorithm", "protocol", "gpus", "latency", "per_kilobyte"),
    [
        # One latency of 25 µs, twice, in place of the hops; a message at 0.6 of 100 GB/s is less than 2 at 80.
        ("tree", "Simple", 8, 4 * 8.4 + 2 * 25, 1 / 0.06),
        ("hierarchical", "Simple", 8, 4 * 8.4 + 2 * 25, 1 / 0.06),
        ("tree", "Simple", 3, 4 * 8.4 + 2 * 25, 1 / 0.06),
        ("tree", "Simple", 2, 4 * 8.4 + 2 * 2 * 4, 1 / 0.08),
        ("tree", "LL", 8, 2 * 6.8 + 14 * 2 * 0.6, 2 / 0.08 / 0.25),
        ("ring", "Simple", 8, 4 * 8.4 + 14 * 2 * 3.4, 14 / 8 / 0.08),
    ],
)
def test_a_switch_that_adds_up_by_itself(
    algorithm: str, protocol: str, gpus: int, latency: float, per_kilobyte: float
) -> None:
    found = line(node(reduces_in_switch=True), gpus, algorithm, protocol)
    assert found == pytest.approx((latency, per_kilobyte))


def test_measured_links_hold_all_that_there_is() -> None:
    """No call, no join: 28 hops of 1 µs and 2 of 5, and the slower level alone."""
    inside = Link(name="i", bandwidth_bytes_per_s=80e9, latency_s=1e-6)
    two = node(intra=inside, inter=Link(name="o", bandwidth_bytes_per_s=10e9, latency_s=5e-6, efficiency=0.5))
    assert line(two, 16, "ring") == pytest.approx((28 + 2 * 5, 1e3 * 30 / 16 / 5))
    half = node(intra=inside, inter=link(LinkKind.INFINIBAND, 10.0))  # one of the two is not
    assert line(half, 16, "ring") == pytest.approx(
        (4 * 8.4 + 28 + 2 * 3 * 14, 1e3 * math.hypot(30 / 16 / 80, 30 / 16 / 5))
    )


def test_the_links_that_a_protocol_sees_by_hand() -> None:
    """For a simulation: exact numbers in place of the data sheet's, and what a call costs beside them."""
    fit = default_fit()
    nvlink, sockets = fit.kinds[LinkKind.NVLINK], fit.kinds[LinkKind.TCP]
    two = node(inter=link(LinkKind.TCP, 3.0), nics_per_node=2)
    ring = Line(algorithm="ring", protocol="LL128", latency_s=0.0, seconds_per_byte=0.0)
    seen, base_s = effective_cluster(two, 16, 2, ring)
    assert base_s == pytest.approx(14e-6 * fit.base_scale["LL128"])
    assert seen.intra.latency_s == pytest.approx(1.9e-6 * nvlink.latency_scale)
    assert seen.intra.bandwidth_bytes_per_s == pytest.approx(100e9 * nvlink.efficiency * nvlink.share["LL128"])
    assert seen.inter is not None
    assert seen.inter.latency_s == pytest.approx(4e-6 * sockets.latency_scale)
    assert seen.inter.bandwidth_bytes_per_s == pytest.approx(3e9 * sockets.efficiency * sockets.share["LL128"])
    assert {seen.intra.kind, seen.inter.kind} == {LinkKind.MEASURED}
    tree = msgspec.structs.replace(ring, algorithm="tree", protocol="LL")
    apart = node(gpus_per_node=1, inter=link(LinkKind.TCP, 3.0), nvswitch=False)
    alone, base_s = effective_cluster(apart, 2, 2, tree)
    assert base_s == pytest.approx(6.8e-6 * fit.base_scale["LL"])
    assert alone.intra.bandwidth_bytes_per_s == pytest.approx(100e9 * nvlink.efficiency * nvlink.share["LL"] / 3)
