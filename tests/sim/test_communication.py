"""The link-level network against the formula, and where the two must differ."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptsim.costs.collectives import all_reduce
from ptsim.errors import UsageError
from ptsim.hardware.catalog import cluster_names, load_cluster
from ptsim.hardware.spec import Cluster, Link, LinkKind
from ptsim.sim.communication import Network
from ptsim.sim.options import Options
from ptsim.sim.run import change
from tests.sim.plans import cluster as made_up

SIZES = (1_000, 300_000, 25 * 2**20)


def network(cluster: Cluster, gpus: int, **options: Any) -> Network:
    return Network(cluster, gpus, change(Options(), {"network": "links", **options}))


@pytest.mark.parametrize("name", cluster_names())
def test_on_equal_links_every_catalog_cluster_takes_what_the_formula_says(name: str) -> None:
    cluster = load_cluster(name)
    for nodes in (1, 2, 3):
        gpus = nodes * cluster.gpus_per_node
        if cluster.oversubscription > 1 or (nodes > 1 and cluster.inter is None):
            continue
        if cluster.max_nodes is not None and nodes > cluster.max_nodes:
            continue
        links = network(cluster, gpus)
        # a factor of 1 makes the links differ by name only: the simulated ratio must come out as 1
        named = network(cluster, gpus, link_bandwidth={"gpu": 1.0})
        for size in SIZES:
            expected = all_reduce(size, cluster, gpus)
            assert links.all_reduce(size) == expected
            assert named.all_reduce(size).seconds == pytest.approx(expected.seconds, rel=1e-9)


def test_one_slow_nic_of_eight_slows_the_ring_over_it_and_so_all_of_them() -> None:
    rails = msgspec.structs.replace(made_up(), nics_per_node=8)
    whole = network(rails, 64).all_reduce(10**9).seconds
    slow = network(rails, 64, link_bandwidth={"node 3 out nic 5": 0.25}).all_reduce(10**9).seconds
    assert slow == pytest.approx(4 * whole, rel=0.02)  # bandwidth-bound: latencies hardly count
    shared = network(made_up(), 64, link_bandwidth={"node 3 out": 1 - 0.75 / 8}).all_reduce(10**9).seconds
    assert shared < 1.15 * whole  # one pipe of all NICs would hide it


def test_a_distant_node_costs_every_round_that_passes_it() -> None:
    near, far = (
        network(made_up(), 32, algorithm="ring", **extra).all_reduce(1_000).seconds
        for extra in ({}, {"link_latency_s": {"node 2 in": 1e-3}})
    )
    # a chunk goes round twice less two hops: it enters node 2 at most twice (the formula counts a hop or two less than
    # the simulated ring's longest path, so the ratio carries a few percent)
    assert far - near == pytest.approx(2e-3, rel=0.06)


def test_an_oversubscribed_fabric_is_thin_only_where_traffic_crosses_leaves() -> None:
    thin = msgspec.structs.replace(made_up(), oversubscription=4.0, nodes_per_leaf=4)
    full = made_up()
    inside = network(thin, 4 * 8).all_reduce(10**9).seconds  # one leaf
    assert inside == pytest.approx(all_reduce(10**9, full, 32).seconds, rel=1e-9)
    assert all_reduce(10**9, thin, 32).seconds > 2 * inside  # the formula takes it for thin everywhere
    across = network(thin, 8 * 8).all_reduce(10**9).seconds
    # a leaf's uplink has the bandwidth of one of its nodes, and one ring of each direction crosses it
    assert across == pytest.approx(all_reduce(10**9, full, 64).seconds, rel=1e-6)
    thinner = msgspec.structs.replace(thin, oversubscription=16.0)
    assert network(thinner, 64).all_reduce(10**9).seconds == pytest.approx(4 * across, rel=0.02)


def test_jobs_packed_on_their_own_nodes_do_not_slow_each_other() -> None:
    assert network(made_up(), 16, jobs=3).sharing(10**8) == pytest.approx((1.0, 1.0, 1.0))
    assert Network(made_up(), 16, Options(jobs=3)).sharing(10**8) == (1.0, 2.0, 3.0)  # the formula's assumption
    assert Network(made_up(), 8, Options(jobs=3)).sharing(10**8) == (1.0, 1.0, 1.0)


def test_jobs_striped_over_the_same_nodes_share_a_nic_but_not_rails() -> None:
    one_nic = network(made_up(), 16, jobs=2, placement="striped")
    assert one_nic.sharing(10**8) == pytest.approx((1.0, 2.0), rel=0.05)
    rails = network(msgspec.structs.replace(made_up(), nics_per_node=8), 16, jobs=2, placement="striped")
    assert rails.sharing(10**8) == pytest.approx((1.0, 1.0))
    # but each of them has only the four NICs of its GPUs
    assert rails.all_reduce(10**9).seconds == pytest.approx(2 * one_nic.all_reduce(10**9).seconds, rel=0.02)


def side_by_side(nodes: int, per_node: int, *, inside: float, algorithm: str, **inter: Any) -> Network:
    """Two jobs with every other GPU of the nodes, whose NIC carries 10 GB/s; latencies are 0."""
    links = {
        "intra": Link(name="inside", bandwidth_bytes_per_s=inside, latency_s=0.0),
        "inter": Link(name="between", bandwidth_bytes_per_s=1e10, latency_s=0.0, **inter),
    }
    where = msgspec.structs.replace(made_up(gpus_per_node=per_node), **links)
    return network(where, nodes * per_node // 2, jobs=2, placement="striped", algorithm=algorithm)


@pytest.mark.parametrize(("nodes", "num_bytes", "factor"), [(2, 143_052, 1.375), (64, 72_661, 1.498)])
def test_the_fixed_cost_of_a_call_is_not_shared(nodes: int, num_bytes: int, factor: float) -> None:
    """Either ring sends as long as a call itself costs, 1.703 · 8.4 µs: 2 (p - 1) chunks of 1/p of the message.

    Two jobs take turns, so the first is done after 2n - 1 times of a chunk and the second after 2n, with n = 2 or 126.
    """
    jobs = side_by_side(nodes, 2, inside=1e14, algorithm="ring", kind=LinkKind.INFINIBAND, efficiency=1.0)
    assert jobs.sharing(num_bytes) == pytest.approx((1.0, factor), rel=2e-3)


def test_of_a_hierarchical_all_reduce_only_what_leaves_the_node_is_shared() -> None:
    """Of 32 nodes a job has two GPUs each: half the message each way inside, and 62 · 2 · 1/64 of it between."""
    jobs = side_by_side(32, 4, inside=1e10, algorithm="hierarchical")
    assert jobs.sharing(10**9)[1] == pytest.approx((1 + 2 * 124 / 64) / (1 + 124 / 64), rel=0.01)


def test_jobs_on_an_oversubscribed_fabric_meet_at_the_leaf_switches() -> None:
    # leaves of 3 nodes, jobs of 2: the second job straddles two leaves, the third begins beside it
    thin = msgspec.structs.replace(made_up(), oversubscription=12.0, nodes_per_leaf=3)
    factors = network(thin, 16, jobs=3).sharing(10**8)
    assert factors[0] == 1.0
    assert factors[1] > 1.5


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([2, 8, 16, 24]),
    st.sampled_from([1, 4, 8]),
    st.sampled_from(["auto", "ring", "tree", "hierarchical"]),
    st.dictionaries(
        st.sampled_from(["gpu 0 out", "gpu", "node 1", "node 0 in", "node 1 out nic 1"]), st.floats(0.01, 1), max_size=3
    ),
    st.dictionaries(st.sampled_from(["gpu 1 in", "node 1"]), st.floats(0, 1e-3), max_size=2),
    st.integers(1, 10**9),
)
def test_slower_links_never_save_time(
    gpus: int, nics: int, algorithm: str, factors: dict[str, float], latencies: dict[str, float], size: int
) -> None:
    cluster = msgspec.structs.replace(made_up(), nics_per_node=nics)
    time = network(cluster, gpus, algorithm=algorithm, link_bandwidth=factors, link_latency_s=latencies).all_reduce(
        size
    )
    assert time.seconds >= network(cluster, gpus, algorithm=algorithm).all_reduce(size).seconds * (1 - 1e-9)
    assert time.low_s <= time.seconds <= time.high_s


def test_a_link_that_a_small_job_does_not_have_is_noted() -> None:
    links = network(made_up(), 8, link_bandwidth={"node 3": 0.5})
    assert links.notes == ["8 GPUs of made up have no link 'node 3'"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"link_bandwidth": {"switch 3": 0.5}}, "'switch 3', which is no link"),
        ({"link_bandwidth": {"gpu 3": 0.0}}, "'gpu 3' is 0, expected a positive factor"),
        ({"link_bandwidth": {"gpu 3": float("nan")}}, "'gpu 3' is nan"),
        ({"link_latency_s": {"gpu 3": -1.0}}, "'gpu 3' is -1, expected seconds of at least 0"),
        ({"network": "formula", "link_latency_s": {"gpu 3": 1.0}}, 'link_latency_s needs network = "links"'),
        ({"network": "formula", "placement": "striped"}, 'placement needs network = "links"'),
        ({"placement": "striped", "jobs": 3}, "3 jobs cannot be striped over nodes of 8 GPUs"),
    ],
)
def test_wrong_links_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        network(made_up(), 16, **options)


def test_jobs_need_gpus_of_their_own() -> None:
    small = msgspec.structs.replace(made_up(), max_nodes=4)
    with pytest.raises(UsageError, match="has 32 GPUs, 48 were asked for"):
        network(small, 16, jobs=3)


def test_between_powers_of_four_what_the_links_add_is_interpolated() -> None:
    """Twice 4 MiB lies in the middle between 4 and 16 MiB."""
    links = network(made_up(), 16, link_latency_s={"node 1 in": 1e-4})
    found = [(links.all_reduce(size), all_reduce(size, made_up(), 16)) for size in (4**11, 2 * 4**11, 4**12)]
    small, middle, large = (time.seconds / formula.seconds for time, formula in found)
    assert small > 1.05 * large
    assert middle == pytest.approx((small + large) / 2, rel=1e-6)
    for time, formula in found:  # as unsure as the formula
        assert time.low_s / time.seconds == pytest.approx(formula.low_s / formula.seconds)
        assert time.high_s / time.seconds == pytest.approx(formula.high_s / formula.seconds)


def test_a_message_takes_as_long_whatever_was_asked_before() -> None:
    """A small one goes by another protocol than a large one, for which the links have other latencies and speeds."""
    sizes, slow = (1_000, 10**6, 10**9), {"link_bandwidth": {"node 1 in": 0.5}}
    dgx = load_cluster("dgx-a100")
    for order in (sizes, sizes[::-1]):
        asked = network(dgx, 16, **slow)
        found = {size: asked.all_reduce(size) for size in order}
        assert found == {size: network(dgx, 16, **slow).all_reduce(size) for size in sizes}
