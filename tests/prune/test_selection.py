"""Which channels stay after all: the last one of a layer, equal groups, multiples. All by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptsim.prune.labels import Weighted
from ptsim.prune.selection import balanced, keep_one, round_up


def layer(name: str, inputs: list[int], outputs: list[int], groups: int = 1) -> Weighted:
    """A layer that reads and writes these components."""
    return Weighted(name, f"{name}.weight", groups, False, False, torch.tensor(inputs), torch.tensor(outputs), ())


def network(*layers: Weighted) -> Any:
    """Channel groups of which only the layers matter."""
    return SimpleNamespace(layers=layers)


def mask(gone: set[int], size: int) -> Tensor:
    return torch.tensor([component in gone for component in range(size)])


def left(removed: Tensor) -> set[int]:
    """The components that go."""
    return set(torch.nonzero(removed).flatten().tolist())


@pytest.mark.parametrize(
    ("gone", "skip", "goes", "rescued"),
    [
        ({0, 1, 2, 3}, (), {0, 2, 3}, ("a",)),  # of a's outputs 1 is the most important
        ({3, 4}, (), {3}, ("b",)),
        ({0, 2, 3}, (), {0, 2, 3}, ()),
        ({5}, (), set(), ("a",)),  # its only input
        ({0, 1, 2, 3}, ("a",), {0, 2, 3}, ("b",)),  # a may end up empty, b's inputs may not
        ({0, 1, 2, 3}, ("a", "b"), {0, 1, 2, 3}, ()),
    ],
)
def test_the_most_important_channel_of_an_empty_axis_stays(
    gone: set[int], skip: tuple[str, ...], goes: set[int], rescued: tuple[str, ...]
) -> None:
    groups = network(layer("a", [5], [0, 1, 2]), layer("b", [0, 1, 2], [3, 4]))
    importance = torch.tensor([0.1, 0.3, 0.2, 0.0, 0.4, 0.0])
    removed, names = keep_one(groups, mask(gone, 6), importance, skip)
    assert (left(removed), names) == (goes, rescued)


@pytest.mark.parametrize(
    ("gone", "goes"),
    [
        ({0, 1, 4}, {1, 4}),  # one of each group: of the first group's 0 and 1 the less important
        ({0, 1, 4, 6}, {1, 4}),  # the second group loses no output, so the first one loses none
        ({0, 1, 2, 6, 7, 4}, {0, 1, 2, 6, 7, 4}),  # the first group goes as a whole, the second loses an input
        ({0, 1, 2, 3, 4, 5}, {0, 1, 3, 5}),  # 4 is the most important; two go of each
        ({0, 1, 2, 6, 8}, {6, 8}),  # no input of the second group goes, one output of each does
        ({6, 7}, set()),  # all outputs of the first group, none of its inputs
        ({0, 1, 2}, set()),  # all its inputs, none of its outputs
        ({0, 6, 7}, set()),  # all its outputs and one input
        ({0, 1, 2, 6}, set()),
    ],
)
def test_the_groups_of_a_grouped_convolution_stay_equal(gone: set[int], goes: set[int]) -> None:
    groups = network(layer("a", [0, 1, 2, 3, 4, 5], [6, 7, 8, 9], groups=2))
    importance = torch.tensor([0.2, 0.1, 0.3, 0.4, 0.6, 0.5, 0.7, 0.8, 0.9, 1.0])
    assert left(keep_one(groups, mask(gone, 10), importance)[0]) == goes
    depthwise = Weighted("a", "a.weight", 2, True, False, groups.layers[0].inputs, groups.layers[0].outputs, ())
    assert left(keep_one(network(depthwise), mask({0, 1, 4}, 10), importance)[0]) == {0, 1, 4}


def test_a_grouped_convolution_of_which_everything_goes_is_equal() -> None:
    groups = network(layer("a", [0, 1, 2, 3, 4, 5], [6, 7, 8, 9], groups=2))
    everything = mask(set(range(10)), 10)
    assert left(balanced(groups, everything, torch.ones(10))) == set(range(10))
    assert left(round_up(groups, everything, torch.ones(10), 4)) == set(range(10))


def test_of_every_group_that_does_not_go_as_a_whole_the_most_important_channel_stays() -> None:
    groups = network(layer("a", [0, 1, 2, 3], [4, 5], groups=2))
    importance = torch.tensor([0.2, 0.1, 0.3, 0.4, 1, 1])
    assert left(balanced(groups, mask({0, 1, 2, 3}, 6), importance)) == {1, 2}


@pytest.mark.parametrize(
    ("multiple", "goes"),
    [
        (1, {0, 2, 4, 6, 8}),
        (4, {4, 8}),  # 5 are left, 8 are wanted: 2, 6 and 0 are the most important
        (5, {0, 2, 4, 6, 8}),
        (6, {0, 4, 6, 8}),
        (16, set()),  # all that there are
    ],
)
def test_a_width_is_rounded_up_with_the_most_important_channels(multiple: int, goes: set[int]) -> None:
    groups = network(layer("a", [10], list(range(10))))
    importance = torch.tensor([0.5, 1, 0.9, 1, 0.1, 1, 0.7, 1, 0.3, 1, 1])
    removed = mask({0, 2, 4, 6, 8}, 11)
    assert left(round_up(groups, removed, importance, multiple)) == goes
    assert left(round_up(groups, removed, importance, multiple, skip={"a"})) == {0, 2, 4, 6, 8}
    assert left(removed) == {0, 2, 4, 6, 8}


def test_a_channel_that_is_read_at_several_places_counts_as_often() -> None:
    """Three channels of two places each, flattened: 2 of 6 inputs are left, the next multiple of 4 is 4."""
    groups = network(layer("a", [0, 0, 1, 1, 2, 2], [3]))
    assert left(round_up(groups, mask({0, 1}, 4), torch.tensor([0.2, 0.6, 0.9, 1.0]), 4)) == {0}


@pytest.mark.parametrize(("multiple", "goes"), [(4, {0, 1, 4, 5}), (3, {0, 4}), (8, set())])
def test_as_many_channels_are_taken_back_in_every_group(multiple: int, goes: set[int]) -> None:
    """One of four is left in each of two groups; the first group's channels are the more important ones."""
    groups = network(layer("a", [8, 9], list(range(8)), groups=2), layer("b", list(range(8)), [10]))
    importance = torch.tensor([0.5, 0.6, 0.7, 1, 0.1, 0.2, 0.3, 1, 1, 1, 1])
    assert left(round_up(groups, mask({0, 1, 2, 4, 5, 6}, 11), importance, multiple)) == goes


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 35)), st.permutations(range(36)), st.sampled_from([2, 3, 4, 6, 8, 16]))
def test_rounded_widths_are_multiples_in_equal_groups_and_nothing_more_goes(
    gone: set[int], order: list[int], multiple: int
) -> None:
    """Two grouped convolutions of 12 channels behind each other, with 2 and 3 groups, and layers around them."""
    first, second, third = ([*range(start, start + 12)] for start in (0, 12, 24))
    layers = [layer("a", first, second, groups=2), layer("b", second, third, groups=3), layer("c", third, first)]
    groups, importance = network(*layers), torch.tensor(order, dtype=torch.float32)
    kept, _ = keep_one(groups, mask(gone, 36), importance)
    found = round_up(groups, kept, importance, multiple)
    assert left(found) <= left(kept) <= gone
    for axis in (first, second, third):
        width = int((~found[axis]).sum())
        assert width == 12 or (width > 0 and width % multiple == 0)
    for one in layers[:2]:
        for axis in (one.inputs, one.outputs):
            rows = (~found[axis]).view(one.groups, -1).sum(1)
            assert len(set(rows.tolist()) - {0}) == 1
