from __future__ import annotations

import msgspec
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from ptsim.costs.buckets import ddp_buckets
from ptsim.network import Network, Parameter


def network(sizes: list[int]) -> Network:
    parameters = tuple(Parameter(name=f"p{i}", layer=f"l{i}", shape=(n,)) for i, n in enumerate(sizes))
    return Network(name="n", input_shape=(3, 8, 8), num_classes=2, layers=(), edges=(), parameters=parameters)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40), st.integers(1, 4000), st.integers(1, 12000))
def test_buckets_are_those_of_torch(sizes: list[int], first: int, other: int) -> None:
    tensors = [torch.empty(n) for n in sizes]
    expected, _ = dist._compute_bucket_assignment_by_size(tensors, [first, other])
    found = ddp_buckets(network(sizes), first_bucket_bytes=first, bucket_bytes=other)
    assert [[int(name[1:]) for name in bucket.parameters] for bucket in found] == expected


def test_a_bucket_closes_after_the_tensor_that_reaches_the_cap() -> None:
    found = ddp_buckets(network([100, 300_000, 10, 7_000_000, 5]))
    assert [bucket.parameters for bucket in found] == [("p0", "p1"), ("p2", "p3"), ("p4",)]
    assert [bucket.ready_layer for bucket in found] == ["l1", "l3", "l4"]
    assert found[0].num_bytes == 4 * 300_100


def test_a_parameter_without_gradient_is_in_no_bucket_unless_ddp_looks_for_unused_ones() -> None:
    used, idle = network([100, 200]).parameters
    both = msgspec.structs.replace(network([1]), parameters=(used, msgspec.structs.replace(idle, layer="")))
    assert both.gradient_bytes == 400
    assert [(b.parameters, b.num_bytes) for b in ddp_buckets(both)] == [(("p0",), 400)]
    assert [(b.parameters, b.num_bytes) for b in ddp_buckets(both, rebuilt=False)] == [(("p0", "p1"), 1200)]


def test_torchs_caps_are_one_and_25_mebibytes() -> None:
    """262,144 fp32 elements reach 1 MiB, 6,553,600 reach 25 MiB."""
    found = ddp_buckets(network([262_143, 1, 6_553_599, 1, 6_553_600, 1]))
    assert [bucket.parameters for bucket in found] == [("p0", "p1"), ("p2", "p3"), ("p4",), ("p5",)]


def test_buckets_that_are_never_rebuilt_are_filled_from_the_other_end() -> None:
    """The small bucket is the last parameters', whose gradients come last."""
    sizes = network([10, 300_000, 20, 400_000])
    found = ddp_buckets(sizes, rebuilt=False)
    assert [(b.parameters, b.num_bytes, b.ready_layer) for b in found] == [
        (("p0", "p1", "p2"), 1_200_120, "l2"),
        (("p3",), 1_600_000, "l3"),
    ]
    halves = ddp_buckets(sizes, rebuilt=False, element_bytes=2)  # 800,000 bytes of the last are less than 1 MiB
    assert [(b.parameters, b.num_bytes) for b in halves] == [(("p0",), 20), (("p1", "p2", "p3"), 1_400_040)]


def test_a_bucket_is_ready_with_the_last_gradient_that_comes() -> None:
    first, second, third = network([1, 2, 3]).parameters
    idle = tuple(msgspec.structs.replace(p, layer="") for p in (second, third))
    some = msgspec.structs.replace(network([1]), parameters=(first, *idle))
    assert [b.ready_layer for b in ddp_buckets(some, rebuilt=False)] == ["l0"]
    none = msgspec.structs.replace(some, parameters=idle)
    assert [b.ready_layer for b in ddp_buckets(none, rebuilt=False)] == [""]
    assert ddp_buckets(none) == ()


@pytest.mark.parametrize("name", ["first_bucket_bytes", "bucket_bytes", "element_bytes"])
def test_caps_and_elements_are_one_byte_at_least(name: str) -> None:
    assert len(ddp_buckets(network([1, 1]), **{name: 1})) >= 1
    with pytest.raises(ValueError, match=f"{name} is 0"):
        ddp_buckets(network([1]), **{name: 0})
