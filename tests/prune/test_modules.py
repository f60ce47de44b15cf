"""What pruning puts into a network: sizes, constants and statistics by hand, or as those of the zeroed layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ptsim.prune.modules import ChannelGather, ConstantChannels, Gathered, Placeholder, Scattered


@pytest.mark.parametrize(
    ("module", "given", "shape"),
    [
        # (15 + 2·1 - 2 - 1) // 2 + 1 = 8, (16 + 2·2 - 2·4 - 1) // 1 + 1 = 12
        (nn.Conv2d(3, 4, (3, 5), (2, 1), (1, 2), (1, 2)), (2, 3, 15, 16), (2, 0, 8, 12)),
        (nn.Conv2d(3, 4, (3, 5), padding="same"), (2, 3, 15, 16), (2, 0, 15, 16)),
        (nn.Conv2d(3, 4, (2, 4), padding="valid"), (2, 3, 15, 16), (2, 0, 14, 13)),
        (nn.Conv1d(3, 4, 3, dilation=2), (2, 3, 16), (2, 0, 12)),
        (nn.Linear(3, 4), (2, 7, 3), (2, 7, 0)),
        (nn.BatchNorm2d(3), (2, 3, 5, 6), (2, 0, 5, 6)),
        (nn.MaxPool1d(3, 2), (2, 3, 16), (2, 0, 7)),
        (nn.AvgPool3d(2), (2, 3, 4, 6, 9), (2, 0, 2, 3, 4)),
        (nn.MaxPool2d(3, 2, 1), (2, 3, 7, 8), (2, 0, 4, 4)),
        (nn.LPPool2d(1, 2), (2, 3, 5, 6), (2, 0, 2, 3)),
    ],
)
def test_a_placeholder_has_the_size_of_what_stood_there(
    module: nn.Module, given: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    left = [size for size, ours in zip(module(torch.rand(given)).shape, shape, strict=True) if ours]
    assert left == [size for size in shape if size]
    placeholder = Placeholder.of(module)
    for made in (placeholder, Placeholder(**placeholder.config())):
        assert made(torch.rand(given)).shape == shape


def norm_of_two(momentum: float | None) -> nn.BatchNorm2d:
    """γ = (2, 3), β = (1, -1), μ = (1, 0), σ = (2, 3), after three mini-batches."""
    norm = nn.BatchNorm2d(2, eps=0.0, momentum=momentum).double()
    with torch.no_grad():
        for tensor, values in (
            (norm.weight, [2.0, 3.0]), (norm.bias, [1.0, -1.0]), (norm.running_mean, [1.0, 0.0]),
            (norm.running_var, [4.0, 9.0]),
        ):  # fmt: skip
            assert tensor is not None
            tensor.copy_(torch.tensor(values))
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.fill_(3)
    return norm


@pytest.mark.parametrize(
    ("momentum", "mean", "variance"),
    [
        (0.1, [0.9 * 1 + 0.1 * 3, 0.1 * 6], [0.9 * 4, 0.9 * 9]),
        (None, [0.75 * 1 + 0.25 * 3, 0.25 * 6], [3.0, 6.75]),  # the fourth of four mini-batches
    ],
)
@pytest.mark.parametrize("full", [False, True])
def test_a_constant_is_what_the_norm_makes_of_the_bias_in_front_of_it(
    momentum: float | None, mean: list[float], variance: list[float], full: bool
) -> None:
    layer = nn.Conv2d(4, 2, 3).double()
    with torch.no_grad():
        assert layer.bias is not None
        layer.bias.copy_(torch.tensor([3.0, 6.0]))
    constant = ConstantChannels.of(norm_of_two(momentum), layer, full=full)
    nothing = torch.empty(5, 0, 3, 4, dtype=torch.float64)
    shape = (5, 2, 3, 4) if full else (1, 2, 1, 1)
    out = constant.train()(nothing)
    assert torch.equal(out, torch.tensor([1.0, -1.0]).double().view(1, 2, 1, 1).expand(shape))  # β
    assert constant.running_mean is not None
    assert constant.running_var is not None
    assert constant.running_mean.tolist() == pytest.approx(mean)
    assert constant.running_var.tolist() == pytest.approx(variance)
    assert constant.num_batches_tracked == 4
    out.sum().backward()
    assert constant.bias is not None
    assert constant.weight is not None
    assert constant.bias.grad is not None
    assert constant.bias.grad.tolist() == [out.numel() / 2] * 2
    assert constant.weight.grad is not None
    assert constant.weight.grad.tolist() == [0.0, 0.0]
    assert layer.bias.grad is not None
    assert layer.bias.grad.tolist() == [0.0, 0.0]
    # β + γ(c - μ)/σ of the statistics as they were: 1 + 2(3 - 1)/2 and -1 + 3(6 - 0)/3
    with torch.no_grad():
        constant.running_mean.copy_(torch.tensor([1.0, 0.0])), constant.running_var.copy_(torch.tensor([4.0, 9.0]))
    expected = torch.tensor([3.0, 5.0]).double().view(1, 2, 1, 1).expand(shape)
    torch.testing.assert_close(constant.eval()(nothing), expected)
    assert constant.num_batches_tracked == 4
    again = ConstantChannels(**constant.config())
    assert {name: p.shape for name, p in again.named_parameters()} == {
        name: p.shape for name, p in constant.named_parameters()
    }


def test_the_constant_of_a_layer_without_a_norm_is_its_bias_or_zero() -> None:
    layer = nn.Linear(4, 2)
    nothing = torch.empty(5, 7, 0)
    assert torch.equal(ConstantChannels.of(layer, None, full=False)(nothing), layer.bias.view(1, 1, 2))
    assert torch.equal(ConstantChannels.of(layer, None, full=True)(nothing), layer.bias.expand(5, 7, 2))
    assert not ConstantChannels.of(nn.Conv2d(4, 2, 1, bias=False), None, full=True)(torch.empty(5, 0, 3, 3)).any()
    plain = ConstantChannels.of(nn.BatchNorm2d(2, affine=False, track_running_stats=False), layer, full=False)
    assert not plain.eval()(torch.empty(5, 0, 3, 3)).any()  # by the mini-batch's own mean, in evaluation as well


MASK = [True, False, True, True, False]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(("affine", "tracked"), [(True, True), (False, True), (True, False)])
def test_a_gated_norm_is_the_whole_norm_of_channels_that_are_zero(
    momentum: float | None, affine: bool, tracked: bool
) -> None:
    whole = nn.BatchNorm2d(5, momentum=momentum, affine=affine, track_running_stats=tracked).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*whole.parameters(), *(b for b in whole.buffers() if b.is_floating_point())):
            tensor.copy_(torch.rand(5, generator=generator) + 0.5)
    gated = Scattered(copy.deepcopy(whole), MASK)
    for training in (True, True, False):
        images = torch.rand(3, 5, 2, 4, generator=generator, dtype=torch.float64)
        images[:, [1, 4]] = 0
        outputs = [whole.train(training)(images), gated.train(training)(images[:, [0, 2, 3]])]
        torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-14)
        for name, buffer in whole.named_buffers():
            torch.testing.assert_close(gated.norm.get_buffer(name), buffer, rtol=1e-12, atol=1e-14)
    assert (gated.norm.num_batches_tracked == 2) if tracked else gated.norm.running_mean is None


def test_a_gate_reads_its_channels_and_can_be_narrowed_again() -> None:
    images = torch.arange(5.0).view(1, 5, 1, 1)
    gate = ChannelGather(MASK)
    assert gate(images).flatten().tolist() == [0, 2, 3]
    gate.narrow(torch.tensor([0, 2]))
    assert gate.mask.tolist() == [True, False, False, True, False]
    assert gate(images).flatten().tolist() == [0, 3]
    layer = Gathered(nn.Conv2d(3, 2, 1), MASK)
    assert layer.config() == {"mask": [1, 0, 1, 1, 0]}
    expected: Tensor = layer.layer(images[:, [0, 2, 3]])
    assert torch.equal(layer(images), expected)


@pytest.mark.parametrize(
    ("norm", "bias", "tensors"),
    [
        (nn.BatchNorm2d(2), False, {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}),
        (nn.BatchNorm2d(2), True, {"weight", "bias", "offset", "running_mean", "running_var", "num_batches_tracked"}),
        (nn.BatchNorm2d(2, affine=False), True, {"offset", "running_mean", "running_var", "num_batches_tracked"}),
        (nn.BatchNorm2d(2, track_running_stats=False), False, {"weight", "bias"}),
        (None, True, {"bias"}),
        (None, False, set()),
    ],
)
def test_a_constant_has_the_tensors_of_what_it_stands_for(
    norm: nn.Module | None, bias: bool, tensors: set[str]
) -> None:
    layer = nn.Conv2d(4, 2, 1, bias=bias)
    constant = ConstantChannels.of(layer if norm is None else norm, None if norm is None else layer, full=False)
    for made in (constant, ConstantChannels(**constant.config())):
        assert set(made.state_dict()) == tensors


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_constants_have_the_layout_and_the_number_format_of_what_flows_in(layout: torch.memory_format) -> None:
    images = torch.rand(2, 3, 5, 6, dtype=torch.bfloat16).contiguous(memory_format=layout)
    nothing = Placeholder.of(nn.Conv2d(3, 4, 3, padding=1))(images)
    made = ConstantChannels.of(nn.BatchNorm2d(4), None, full=True)(nothing)
    assert made.dtype == torch.bfloat16
    assert made.is_contiguous(memory_format=layout)
    spread = Scattered(nn.BatchNorm2d(5), MASK)(images.float())
    assert spread.shape == (2, 5, 5, 6)
    assert spread.is_contiguous(memory_format=layout)
