"""Operators without their arithmetic."""

from __future__ import annotations

import resource

import pytest
import torch
from torch import nn

from ptsim.capture.footprint import footprints
from ptsim.capture.hollow import NoArithmetic
from ptsim.capture.network import capture_network
from ptsim.errors import UnsupportedModelError


def test_results_have_the_strides_of_real_ones_and_values_are_not_computed() -> None:
    x = torch.ones(2, 3, 8, 8).to(memory_format=torch.channels_last)
    with NoArithmetic():
        y = (x + 1).relu()
        z = y.transpose(1, 2)
    assert y.stride() == x.stride()
    assert z.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    assert y.shape == x.shape


def test_what_is_changed_in_place_keeps_its_storage_and_its_values() -> None:
    x = torch.ones(4)
    with NoArithmetic():
        y = x.mul_(3)
    assert y is x
    assert x.tolist() == [1, 1, 1, 1]
    assert x._version == 1


def test_numbers_that_the_code_writes_down_are_computed() -> None:
    with NoArithmetic():
        assert (torch.tensor(3) * torch.arange(3).sum()).item() == 9


@pytest.mark.parametrize(
    "look", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: float(torch.rand(()))]
)
def test_looking_at_a_value_that_is_not_there_is_an_error(look: object) -> None:
    assert callable(look)
    with NoArithmetic(), pytest.raises(RuntimeError, match="values of a tensor"):
        look(torch.empty(3))


def test_matrices_of_the_wrong_size_are_an_error() -> None:
    with NoArithmetic(), pytest.raises(RuntimeError, match="reduction dim"):
        torch.rand(2, 3) @ torch.rand(4, 5)


class _Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x.flatten(1))
        return y * _doubled(y)


def _doubled(y: torch.Tensor) -> float:
    return 2.0 * float(y.detach().sum())


torch.fx.wrap("_doubled")


def test_a_network_that_looks_at_its_values_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="looks at the values of a tensor"):
        capture_network(_Looking(), name="looking", input_shape=(3, 2, 2), num_classes=2)


def test_a_large_network_takes_no_memory() -> None:
    """Its weights, gradients and half-precision copies are 10 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layers = nn.Sequential(nn.Flatten(), *(nn.Linear(2**14, 2**14, bias=False, device="meta") for _ in range(4)))
    found = footprints(layers, (1, 2**7, 2**7))
    assert len(found) == 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    assert found[0].kept_image_bytes == 4 * 4 * 2**14
