"""Operators without their arithmetic."""

from __future__ import annotations

import resource
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        assert torch.arange(3).tolist() == [0, 1, 2]


def test_numbers_that_the_code_draws_are_those_that_it_draws_without_this_mode() -> None:
    def drawn() -> list[float]:
        torch.manual_seed(3)
        return [torch.rand(1).item(), torch.empty(()).uniform_(2, 3).item(), *torch.randperm(3).tolist()]

    real = drawn()
    with NoArithmetic():
        assert drawn() == real


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


_KERNEL, _VECTOR = torch.ones(4, 4, 3, 3), torch.ones(4)
_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "convolution": lambda x: F.conv2d(_channels_last(x), _KERNEL),
    "kernel in channels-last": lambda x: F.conv2d(x, _channels_last(_KERNEL)),
    "depthwise": lambda x: F.conv2d(_channels_last(x), _KERNEL[:, :1], groups=4),
    "transposed": lambda x: F.conv_transpose2d(_channels_last(x), _KERNEL, stride=2),
    "row": lambda x: F.conv1d(x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2), _KERNEL[..., 0]),
    "half": lambda x: F.conv2d(_channels_last(x).bfloat16(), _KERNEL.bfloat16()),
    "batch norm": lambda x: F.batch_norm(x.transpose(2, 3), None, None, _VECTOR, _VECTOR, training=True),
    "batch norm of rows": lambda x: F.batch_norm(x.flatten(2).mT.contiguous().mT, None, None, training=True),
    "frozen batch norm": lambda x: F.batch_norm(_channels_last(x), _VECTOR, _VECTOR, _VECTOR),
    "group norm": lambda x: F.group_norm(_channels_last(x), 2, _VECTOR, _VECTOR),
    "group norm in half": lambda x: F.group_norm(x.bfloat16(), 2, _VECTOR, _VECTOR),
}


@pytest.mark.parametrize("name", _LAYOUTS)
def test_layouts_and_widths_are_those_of_the_cpus_kernels(name: str) -> None:
    def form_of_everything() -> list[object]:
        kept: list[object] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(_form(tensor))
            return tensor

        x = torch.ones(2, 4, 6, 5, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = _LAYOUTS[name](x)
        return [*kept, _form(y), *map(_form, torch.autograd.grad(y, x, torch.ones_like(y)))]

    real = form_of_everything()
    with NoArithmetic():
        assert form_of_everything() == real


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def test_what_is_remembered_of_an_operator_holds_for_the_default_width_that_it_was_asked_with() -> None:
    before = torch.get_default_dtype()
    try:
        for width in (torch.float32, torch.float64):
            torch.set_default_dtype(width)
            with NoArithmetic():
                assert (torch.ones(3).long() + torch.empty(3).long()).div(2).dtype is width
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: float(torch.rand(()) * x[0]),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
    ],
)
def test_looking_at_a_value_that_is_not_there_is_an_error(look: object) -> None:
    assert callable(look)
    with NoArithmetic(), pytest.raises(RuntimeError, match="values of a tensor"):
        look(torch.empty(3))


def test_matrices_of_the_wrong_size_are_an_error() -> None:
    with NoArithmetic(), pytest.raises(RuntimeError, match="reduction dim"):
        torch.empty(2, 3) @ torch.empty(4, 5)


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
