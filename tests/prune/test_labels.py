"""Labels of channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from ptsim.prune.labels import connected


@pytest.mark.parametrize("pairs", [0, 30, 100, 1000])
def test_connected_parts_are_those_that_scipy_finds(pairs: int) -> None:
    first, second = np.random.default_rng(pairs).integers(0, 200, (2, pairs))
    expected = connected_components(coo_matrix((np.ones(pairs), (first, second)), shape=(200, 200)), directed=False)[1]
    halves = [torch.from_numpy(np.stack([first[i::2], second[i::2]])) for i in range(2)]
    assert connected(halves, 200).tolist() == expected.tolist()


def test_a_long_chain_in_any_order_is_one_part() -> None:
    nodes = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    assert connected([torch.stack([nodes[1:], nodes[:-1]])], 5000).tolist() == [0] * 5000
