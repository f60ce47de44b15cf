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


def test_a_cap_must_be_positive() -> None:
    with pytest.raises(ValueError, match="bucket_bytes is 0"):
        ddp_buckets(network([1]), bucket_bytes=0)


def test_a_parameter_without_gradient_is_in_no_bucket_unless_ddp_looks_for_unused_ones() -> None:
    used, idle = network([100, 200]).parameters
    both = msgspec.structs.replace(network([1]), parameters=(used, msgspec.structs.replace(idle, layer="")))
    assert both.gradient_bytes == 400
    assert [(b.parameters, b.num_bytes) for b in ddp_buckets(both)] == [(("p0",), 400)]
    assert [(b.parameters, b.num_bytes) for b in ddp_buckets(both, rebuilt=False)] == [(("p0", "p1"), 1200)]
