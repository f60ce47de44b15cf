"""Bytes of backward, against what torch's own operators read and write when their gradients are made for real."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from analysis.check_counts import kept_bytes
from ptsim.capture.network import capture_network
from ptsim.costs.kernels import Pass, Work, network_kernels
from ptsim.costs.memory import iteration_memory
from ptsim.network import LayerKind, Network
from ptsim.setting import StepSetting
from tests.costs.test_kernels import chain, on_16_channels

BATCH, SIDE, WIDTH = 3, 6, 4
FULL, GATE, PLANE = (WIDTH, SIDE, SIDE), (WIDTH, 1, 1), (1, SIDE, SIDE)
# Not of the function that is looked at: what makes its operands, and what makes a loss of its result.
OUTSIDE = ("makers", "gates", "flatten", "loss_", "head")


class Net(nn.Module):
    """Convolutions make the operands, some of one pixel; parameters are operands, too."""

    def __init__(
        self, function: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...], own: tuple[Any, ...]
    ) -> None:
        super().__init__()
        self.function, self.shapes = function, shapes
        self.makers = nn.ModuleList(nn.Conv2d(3, shape[0], 3, padding=1) for shape in shapes)
        self.gates = nn.ModuleList(nn.AdaptiveAvgPool2d(1) if shape[1] == 1 else nn.Identity() for shape in shapes)
        self.own = nn.ParameterList(torch.rand(shape) + 0.5 for shape in own)
        self.flatten, self.loss_, self.head = nn.Flatten(), nn.AdaptiveAvgPool1d(1), nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        made = [gate(make(x)) for make, gate in zip(self.makers, self.gates, strict=True)]
        return self.head(self.loss_(self.flatten(self.function(*made, *self.own)).unsqueeze(1)).flatten(1))


class Moved(TorchDispatchMode):
    """Adds up what kernels read and write; numbers in tensors, and views, are nothing."""

    _NOT_READ = ("empty", "new_", "zeros", "ones", "full", "exponential_", "fill_", "zero_")
    _COPIES = ("slice_backward", "select_backward", "diagonal_backward")  # zeros, into which the gradient is copied
    _PLACES = ("scatter", "scatter_")  # write into zeros that are there, and, but for this class, in their own memory
    _ADDING = ("index_add", "index_add_", "_index_put_impl_", "scatter_add", "scatter_add_")  # read what is there, too
    _GATHERS = ("index", "index_select", "gather")  # read the elements that they write
    _SPREADS = ("reflection_pad2d_backward", "replication_pad2d_backward")  # add to zeros that they write first
    _SHAPES = ("max_pool2d_with_indices_backward", "avg_pool2d_backward")  # take the input for its shape alone

    def __init__(self, left_out: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.num_bytes = self.kernels = 0
        self.left_out = left_out  # how the names of operators begin that do not count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim]
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.ndim]
        memory = {t.untyped_storage()._cdata for t in given}
        view = not func._schema.is_mutable and any(t.untyped_storage()._cdata in memory for t in made)
        if view or not made or name.startswith(("empty", "new_empty", *self.left_out)):
            return out
        read = [] if name.startswith(self._NOT_READ) else given[name == "copy_" :]
        if name in self._SHAPES:
            read = [given[0], *given[2:]]
        if name in self._PLACES:
            read, made = given[1:], given[2:]
        extra = 0  # kernels
        match name:
            case "constant_pad_nd" if max(args[1]) > 0:  # all of it is filled, and what is given copied into it
                read, made, extra = given, [*made, *given], 1
            case "constant_pad_nd":  # what is left over is copied
                read = made
            case "index_put" if args[3:] == (True,):  # but for this class, in the memory of zeros that are there
                read, made = [*given[1:], _like(given[-1])], given[-1:]
            case "index_put":  # out of place: a copy, into which the values are written
                read, made, extra = given, [*made, given[-1]], 1
            case "index_put_":
                read, made = given[1:], given[-1:]
            case _ if name in self._ADDING:
                read, made = [*given[1:], _like(given[-1])], given[-1:]
            case _ if name in self._GATHERS:
                read = [*made, *given[1:]]
            case _ if name in self._SPREADS:
                read, made, extra = [given[0], _like(given[0])], [*made, given[0]], 1
        self.kernels += extra
        self.num_bytes += sum({id(t): _bytes(t) for t in read}.values())
        self.num_bytes += sum(_bytes(t) for t in made)
        self.kernels += 1
        if name in self._COPIES:
            self.num_bytes += _bytes(given[0])
            self.kernels += 1
        return out


def _like(tensor: Tensor) -> Tensor:
    """What is there already at the places to which a tensor is added."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _bytes(tensor: Tensor) -> int:
    """Of the elements that there are: an axis along which it is expanded has one."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()


@dataclasses.dataclass(frozen=True)
class Case:
    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...] = (FULL,)
    own: tuple[Any, ...] = ()
    more: int = 0  # bytes that ptsim counts more, with the reason beside it
    positions: tuple[int, int] = (0, 0)  # bytes of indices, forward and backward, that ptsim does not count


def _gated(first: Tensor, second: Tensor) -> Tensor:
    return first * second.sigmoid()


CASES: dict[str, Case] = {
    "sum": Case(torch.add, (FULL, FULL)),
    "sum with one row for all": Case(torch.add, (FULL, GATE)),
    "sum with one plane for all, first": Case(torch.add, (PLANE, FULL)),
    "sum with a number": Case(lambda x: x + 2),
    "sum with a bias": Case(lambda x, b: x + b[None, :, None, None], own=((WIDTH,),)),
    "sum with a parameter": Case(torch.add, own=((WIDTH, 1, 1),)),
    "sum with positions": Case(torch.add, own=((1, WIDTH, SIDE, SIDE),)),
    "difference": Case(torch.sub, (FULL, FULL)),
    "difference to the mean": Case(torch.sub, (FULL, GATE)),
    "difference from a gate": Case(torch.sub, (GATE, FULL)),
    "less a number": Case(lambda x: x - 1),
    "from a number": Case(lambda x: 1 - x),
    "from a number by method": Case(lambda x: torch.rsub(x, 1)),
    "from a parameter": Case(lambda x, p: p - x, own=((WIDTH, 1, 1),)),
    "less a parameter": Case(lambda x, p: x - p, own=((WIDTH, 1, 1),)),
    "product": Case(torch.mul, (FULL, FULL)),
    # Torch makes two products and adds them up, of a square one.
    "product with itself": Case(lambda x: x * x, more=-2 * 4 * BATCH * WIDTH * SIDE * SIDE),
    "product with a gate": Case(torch.mul, (GATE, FULL)),
    "product with a plane": Case(torch.mul, (FULL, PLANE)),
    "product with a scale": Case(torch.mul, own=((WIDTH, 1, 1),)),
    "product with a number": Case(lambda x: x * 3),
    "quotient": Case(torch.div, (FULL, FULL)),
    "quotient by a length": Case(torch.div, (FULL, PLANE)),
    "quotient by a number": Case(lambda x: x / 3),
    "quotient by a scale": Case(torch.div, own=((WIDTH, 1, 1),)),
    "a number over it": Case(lambda x: 1 / x),
    "a parameter over it": Case(lambda x, p: p / x, own=((WIDTH, 1, 1),)),
    "chosen": Case(lambda x, y: torch.where(x > 0, x, y), (FULL, FULL)),
    "chosen or a gate": Case(lambda x, y: torch.where(x > 0, x, y), (FULL, GATE)),
    "chosen or a number": Case(lambda x: torch.where(x > 0, x, 0.0)),
    "masked": Case(lambda x: x.masked_fill(x < 0, 0.0)),
    "masked by one row for all": Case(lambda x, y: x.masked_fill(y < 0, 0.0), (FULL, GATE)),
    "chosen by one plane for all": Case(lambda x, y: torch.where(y > 0, x, 0.0), (FULL, PLANE)),
    "kept by a mask": Case(lambda x: x * (x > 0).float()),
    "less what has no gradient": Case(lambda x, y: x - y.detach(), (FULL, FULL)),
    "what has no gradient less it": Case(lambda x, y: y.detach() - x, (FULL, GATE)),
    "a gate without gradient": Case(lambda x, y: x * y.detach(), (FULL, GATE)),
    "larger": Case(torch.maximum, (FULL, FULL)),
    "larger by torch.max": Case(torch.max, (FULL, FULL)),
    "smaller": Case(torch.minimum, (FULL, FULL)),
    "between": Case(lambda x, y: torch.lerp(x, y, 0.3), (FULL, FULL)),
    "negative": Case(torch.neg),
    "power": Case(lambda x: x**2),
    "square": Case(torch.square),
    "root": Case(lambda x: (x * 0).sqrt()),
    "one over the root": Case(torch.rsqrt),
    "exponential": Case(torch.exp),
    "logarithm": Case(torch.log),
    "logarithm of one more": Case(torch.log1p),
    "magnitude": Case(torch.abs),
    "reciprocal": Case(torch.reciprocal),
    "sine": Case(torch.sin),
    "cosine": Case(torch.cos),
    "relu": Case(torch.relu),
    "gelu": Case(F.gelu),
    "silu": Case(F.silu),
    "hardswish": Case(F.hardswish),
    "softplus": Case(F.softplus),
    "softmax": Case(lambda x: x.softmax(1)),
    "leaky": Case(lambda x: F.leaky_relu(x, 0.1)),
    "glu": Case(lambda x: F.glu(x, 1)),
    "prelu": Case(F.prelu, own=((WIDTH,),)),
    "clamped": Case(lambda x: x.clamp(-1, 1)),
    "clipped": Case(lambda x: x.clip(-1, 1)),
    "erf": Case(torch.erf),
    "softmin": Case(lambda x: F.softmin(x, 1)),
    "tanhshrink": Case(F.tanhshrink),
    "softsign": Case(F.softsign),
    "mean over places": Case(lambda x: x.mean((2, 3), keepdim=True)),
    "sum over channels": Case(lambda x: x.sum(1, keepdim=True)),
    "largest of all channels": Case(lambda x: x.amax(1, keepdim=True)),
    "variance over places": Case(lambda x: x.var((2, 3), keepdim=True)),
    "deviation over places": Case(lambda x: x.std((2, 3), keepdim=True)),
    "average pool": Case(lambda x: F.avg_pool2d(x, 2)),
    "max pool": Case(lambda x: F.max_pool2d(x, 2)),
    "resized": Case(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "sampled": Case(
        lambda x, y: F.grid_sample(x, y.permute(0, 2, 3, 1), align_corners=False), (FULL, (2, SIDE, SIDE))
    ),
    "spread": Case(lambda x: x.expand(-1, -1, SIDE, SIDE).exp(), (GATE,)),
    "spread to what it is": Case(lambda x: x.expand(-1, WIDTH, SIDE, SIDE).exp()),
    "spread as another": Case(lambda x, y: x.expand_as(y).exp(), (GATE, FULL)),
    "one largest of all channels": Case(lambda x: x.max(1, keepdim=True)[0]),
    "one least of all channels": Case(lambda x: x.min(1, keepdim=True)[0]),
    # For each image it reads one of its own.
    "a token for all": Case(
        lambda x, p: x * p.expand(x.shape[0], -1, -1, -1), own=((WIDTH, 1, 1),), more=4 * WIDTH * (BATCH - 1)
    ),
    "halves changed": Case(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)),
    "unequal parts": Case(lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1)),
    "parts of given sizes": Case(lambda x: torch.cat(x.split_with_sizes([1, 3], 1)[::-1], 1)),
    "unbound": Case(lambda x: torch.stack(x.unbind(1)[::-1], 1)),
    "part": Case(lambda x: x[:, 1:].exp()),
    "place": Case(lambda x: x[:, 1].exp()),
    "parts without a size": Case(lambda x: _gated(*x.exp().tensor_split(2, 1))),
    "parts up to places": Case(lambda x: _gated(*torch.tensor_split(x.exp(), (2,), dim=1))),
    "parts of a loop": Case(lambda x: torch.cat([y.exp() for y in x.exp().tensor_split(3, 1)], 1)),
    "parts joined as they are": Case(lambda x: torch.cat(x.exp().tensor_split(2, 1), 1)),
    "parts up to places stacked as they are": Case(lambda x: torch.stack(x.exp().tensor_split((2,), dim=1), 1)),
    "one half": Case(lambda x: x.exp().chunk(2, 1)[0].exp()),
    "the larger part": Case(lambda x: x.split([1, 3], 1)[1].exp()),
    "a gate beside what nobody reads": Case(lambda x: (lambda p: _gated(p[0], p[2]))(x.exp().split([1, 2, 1], 1))),
    # Zeros are one number, which is expanded.
    "three of four channels": Case(lambda x: (lambda p: p[0] * p[1] * p[3])(x.exp().unbind(1)), more=-8),
    "halves of the rows": Case(lambda x: _gated(*torch.hsplit(x.exp(), 2))),
    "halves of the columns": Case(lambda x: _gated(*x.exp().dsplit(2))),
    "one part of three": Case(lambda x: x.tensor_split(3, 1)[1].exp()),
    "halves without a check": Case(lambda x: torch.cat(x.unsafe_chunk(2, 1)[::-1], 1)),
    "parts without a check": Case(lambda x: torch.cat(x.unsafe_split(3, 1)[::-1], 1)),
    "two parts": Case(lambda x: (lambda y: _gated(y[:, :2], y[:, 2:]))(x.exp())),
    "a window": Case(lambda x: x[:, :, 1:-1, 2:-1].exp()),
    "a window of some channels": Case(lambda x: x[:, 1:, 1:, 1:-1].exp()),
    "every second pixel": Case(lambda x: x[..., ::2, ::2].exp()),
    "all pixels by fours": Case(
        lambda x: (lambda y: torch.cat([y[..., i::2, j::2] for i in range(2) for j in range(2)], 1))(x.exp())
    ),
    "one row of a channel": Case(lambda x: x[:, 1, 2].exp()),
    "a column": Case(lambda x: x[:, :, :, 3].exp()),
    "a channel and an axis": Case(lambda x: x[:, None, 1].exp()),
    "the diagonal": Case(lambda x: x.diagonal(0, 2, 3).exp()),
    "part by narrow": Case(lambda x: x.narrow(1, 0, 2).exp()),
    "another shape": Case(lambda x: x[:, :, None].flatten(1, 2).transpose(1, 2).exp()),
}  # fmt: skip
INDEX = torch.tensor([2, 0, 1])
PAIR = (2, SIDE, SIDE)


def _with_pair(x: Tensor, pair: Tensor | float, base: Callable[[Tensor], Tensor] = lambda x: x * 3) -> Tensor:
    out = base(x)
    out[:, :2] = pair
    return out


def _with_pair_copied(x: Tensor, pair: Tensor) -> Tensor:
    out = x * 3
    out[:, :2].copy_(pair)
    return out


def _with_pair_zeroed(x: Tensor) -> Tensor:
    out = x * 3
    out[:, :2].zero_()
    return out


def _with_a_sum(x: Tensor, pair: Tensor) -> Tensor:
    out = x * 3
    out[:, :2] += pair
    return out


def _with_a_sum_made_before(x: Tensor, pair: Tensor) -> Tensor:
    out = x * 3
    pair = pair * 2
    pair += 1
    out[:, :2] = pair
    return out


def _with_places(x: Tensor, pair: Tensor) -> Tensor:
    out = x * 3
    out[:, INDEX[:2]] = pair
    return out


def _with_a_channel(x: Tensor, pair: Tensor) -> Tensor:
    out = x * 3
    out[:, 1] = pair[:, 0]
    return out


def _with_all(x: Tensor, y: Tensor) -> Tensor:
    out = x * 3
    out[:] = y
    return out


def _shifted(x: Tensor) -> Tensor:
    """Temporal Shift, of rows instead of frames."""
    x = x.exp()
    out = torch.zeros_like(x)
    out[:, :1, :-1] = x[:, :1, 1:]
    out[:, 1:2, 1:] = x[:, 1:2, :-1]
    out[:, 2:] = x[:, 2:]
    return out


# What moves elements, of which forward is looked at, too.
MOVING: dict[str, Case] = {
    "part written": Case(_with_pair, (FULL, PAIR)),
    "part written into zeros": Case(lambda x, y: _with_pair(x, y, torch.zeros_like), (FULL, PAIR)),
    "part written with a number": Case(lambda x: _with_pair(x, 0.0)),
    "part copied": Case(_with_pair_copied, (FULL, PAIR)),
    "part zeroed": Case(_with_pair_zeroed),
    "part added to": Case(_with_a_sum, (FULL, PAIR)),
    "a sum written": Case(_with_a_sum_made_before, (FULL, PAIR)),
    "places written": Case(_with_places, (FULL, PAIR), positions=(16, 32)),
    "channel written": Case(_with_a_channel, (FULL, PAIR)),
    "all written": Case(_with_all, (FULL, FULL)),
    "temporal shift": Case(_shifted),
    "clone": Case(torch.clone),
    "clone changed": Case(lambda x: x.clone().exp()),
    "index_select": Case(lambda x: x.index_select(1, INDEX), positions=(24, 24)),
    "places": Case(lambda x: x[:, INDEX], positions=(24, 24)),
    "places of a list": Case(lambda x: x[:, [3, 1, 2, 0]], positions=(32, 32)),
    "zeros around": Case(lambda x: F.pad(x, (1, 1, 2, 0))),
    "less around": Case(lambda x: F.pad(x, (-1, -1, -1, 0))),
    "mirrored around": Case(lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect")),
    "repeated around": Case(lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate")),
    "repeated": Case(lambda x: x.repeat(1, 2, 1, 1)),
    "tiled": Case(lambda x: x.tile(1, 2, 1, 1)),
    "each repeated": Case(lambda x: x.repeat_interleave(2, 1)),
    "joined with itself": Case(lambda x: torch.cat([x, x], 1)),
    "stacked with itself": Case(lambda x: torch.stack((x, x), 1)),
    "zeros like it": Case(lambda x: torch.zeros_like(x) + x),
    "new zeros": Case(lambda x: x.new_zeros(x.shape) + x),
    "rolled": Case(lambda x: x.roll(1, 2)),
    "flipped": Case(lambda x: x.flip(2)),
    "channels shuffled": Case(
        lambda x: x.view(x.shape[0], 2, 2, SIDE, SIDE).transpose(1, 2).contiguous().view(x.shape[0], *FULL)
    ),
    "where larger": Case(lambda x: x * (x > 0)),
    "where between": Case(lambda x: x * ((x > 0) & (x < 1))),
    "where larger, as numbers": Case(lambda x: x * (x > 0).float()),
    "where not larger, of a gate": Case(lambda x, y: torch.where(~(y > 0), x, 0.0), (FULL, GATE)),
    "twice": Case(lambda x: x + x),
    "sum with a multiple": Case(lambda x, y: torch.add(x, y, alpha=2), (FULL, FULL)),
    "sum with a multiple of a gate": Case(lambda x, y: x.add(y, alpha=0.5), (FULL, GATE)),
    "difference to a multiple": Case(lambda x, y: torch.sub(x, y, alpha=2), (FULL, FULL)),
    "sum with a product": Case(torch.addcmul, (FULL, FULL, FULL)),
    "sum with a product with a gate": Case(torch.addcmul, (FULL, FULL, GATE)),
    "sum with a quotient": Case(torch.addcdiv, (FULL, FULL, FULL)),
}
# In place, of what a convolution made: torch copies the operand first where its gradient needs what was there.
IN_PLACE: dict[str, Case] = {
    "relu": Case(F.relu_),
    "relu6": Case(lambda x: F.relu6(x, inplace=True)),
    "leaky": Case(lambda x: F.leaky_relu(x, 0.1, inplace=True)),
    "elu": Case(lambda x: F.elu(x, inplace=True)),
    "celu": Case(lambda x: F.celu(x, inplace=True)),
    "selu": Case(lambda x: F.selu(x, inplace=True)),
    "silu": Case(lambda x: F.silu(x, inplace=True)),
    "mish": Case(lambda x: F.mish(x, inplace=True)),
    "hardtanh": Case(lambda x: F.hardtanh(x, inplace=True)),
    "hardswish": Case(lambda x: F.hardswish(x, inplace=True)),
    "hardsigmoid": Case(lambda x: F.hardsigmoid(x, inplace=True)),
    "threshold": Case(lambda x: F.threshold(x, 0.1, 0.0, inplace=True)),
    "clamp": Case(lambda x: x.clamp_(0, 1)),
    "erf": Case(lambda x: x.erf_()),
    "sigmoid": Case(lambda x: x.sigmoid_()),
    "tanh": Case(lambda x: x.tanh_()),
    "exponential": Case(lambda x: x.exp_()),
    "logarithm": Case(lambda x: x.log_()),
    "logarithm of one more": Case(lambda x: x.log1p_()),
    "magnitude": Case(lambda x: x.abs_()),
    "sine": Case(lambda x: x.sin_()),
    "cosine": Case(lambda x: x.cos_()),
    "root": Case(lambda x: x.sqrt_()),
    "one over the root": Case(lambda x: x.rsqrt_()),
    "reciprocal": Case(lambda x: x.reciprocal_()),
    "negative": Case(lambda x: x.neg_()),
    "square": Case(lambda x: x.square_()),
    "power": Case(lambda x: x.pow_(2)),
    "sum": Case(lambda x, y: x.add_(y), (FULL, FULL)),
    "difference": Case(lambda x, y: x.sub_(y), (FULL, FULL)),
    "product": Case(lambda x, y: x.mul_(y), (FULL, FULL)),
    "product with a gate": Case(lambda x, y: x.mul_(y), (FULL, GATE)),
    "product with a scale": Case(lambda x, y: x.mul_(y), own=((WIDTH, 1, 1),)),
    "product with a number": Case(lambda x: x.mul_(3)),
    "product with what has no gradient": Case(lambda x, y: x.mul_(y.detach()), (FULL, FULL)),
    "quotient": Case(lambda x, y: x.div_(y), (FULL, FULL)),
    "quotient by a number": Case(lambda x: x.div_(3)),
    "sum by a sign": Case(operator.iadd, (FULL, FULL)),
    "product by a sign": Case(operator.imul, (FULL, FULL)),
    "product with a gate by a sign": Case(operator.imul, (FULL, GATE)),
    "product with a scale by a sign": Case(operator.imul, own=((WIDTH, 1, 1),)),
    "product with a number by a sign": Case(lambda x: operator.imul(x, 3)),
    "product with what has no gradient by a sign": Case(lambda x, y: operator.imul(x, y.detach()), (FULL, FULL)),
    "quotient by a sign": Case(operator.itruediv, (FULL, FULL)),
    "quotient by a number by a sign": Case(lambda x: operator.itruediv(x, 3)),
    "power by a sign": Case(lambda x: operator.ipow(x, 2)),
}  # fmt: skip


def described(case: Case) -> tuple[Net, Network]:
    torch.manual_seed(0)
    model = Net(case.function, case.shapes, case.own)
    return model, capture_network(model, name="n", input_shape=(3, SIDE, SIDE), num_classes=2)


def moved_by_torch(model: Net, case: Case) -> tuple[int, int]:
    """Bytes and kernels of the gradients of every operand and parameter."""
    operands = [torch.rand(BATCH, *shape, requires_grad=True) for shape in case.shapes]
    result = case.function(*operands, *model.own)
    gradient = torch.rand(result.shape)
    with Moved() as moved:
        torch.autograd.grad(result, [*operands, *model.own], gradient, allow_unused=True)
    return moved.num_bytes, moved.kernels


def moved_by_ptsim(network: Network, *, forward: bool) -> tuple[float, float]:
    """Bytes and kernels of the function, forward or of its gradients."""
    kernels = network_kernels(network, StepSetting(batch=BATCH), tensor_cores=False)
    inside = [i for i, layer in enumerate(network.layers) if not layer.name.startswith(OUTSIDE)]
    ours = np.isin(kernels.layer, inside) & ((kernels.step == Pass.FORWARD) == forward)
    return float(kernels.moved_bytes[ours].sum()), float(kernels.launches[ours].sum())


@pytest.mark.parametrize("name", CASES)
def test_gradients_read_and_write_what_torchs_operators_do(name: str) -> None:
    case = CASES[name]
    model, network = described(case)
    num_bytes, launches = moved_by_torch(model, case)
    assert moved_by_ptsim(network, forward=False) == (num_bytes + case.more, launches)


@pytest.mark.parametrize("name", MOVING)
def test_what_moves_elements_reads_and_writes_what_torchs_operators_do(name: str) -> None:
    case = MOVING[name]
    model, network = described(case)
    operands = [torch.rand(BATCH, *shape) for shape in case.shapes]
    with Moved() as moved:
        case.function(*operands)
    ours = moved_by_ptsim(network, forward=True)
    assert ours == (moved.num_bytes - case.positions[0], moved.kernels)
    num_bytes, launches = moved_by_torch(model, case)
    assert moved_by_ptsim(network, forward=False) == (num_bytes - case.positions[1], launches)


SEVERAL: dict[str, Case] = {
    "gumbel_softmax": Case(lambda x: F.gumbel_softmax(x, dim=1)),
    **{name: CASES[name] for name in ("clamped", "erf", "softmin", "tanhshrink", "softsign")},
}


@pytest.mark.parametrize("name", SEVERAL)
def test_activations_of_several_kernels_read_and_write_what_torchs_operators_do_forward(name: str) -> None:
    case = SEVERAL[name]
    _, network = described(case)
    operands = [torch.rand(BATCH, *shape) for shape in case.shapes]
    with Moved() as moved:
        case.function(*operands)
    assert moved_by_ptsim(network, forward=True) == (moved.num_bytes, moved.kernels)


@pytest.mark.parametrize("name", IN_PLACE)
def test_operators_in_place_copy_what_their_gradient_needs(name: str) -> None:
    case = IN_PLACE[name]
    model, network = described(case)
    operands = [torch.rand(BATCH, *shape, requires_grad=True) * 1 for shape in case.shapes]
    with Moved() as moved:
        case.function(*operands, *model.own)
    assert moved_by_ptsim(network, forward=True) == (moved.num_bytes, moved.kernels)


@pytest.mark.parametrize("name", [name for name in IN_PLACE if name.endswith("by a sign")])
def test_what_operators_in_place_keep_is_what_autograd_saves(name: str) -> None:
    model, network = described(IN_PLACE[name])
    kept = iteration_memory(network, StepSetting(batch=BATCH)).activation_bytes
    by_layer = sum(layer.saved_bytes(BATCH, 4) for layer in network.layers)
    assert kept == by_layer == kept_bytes(model, torch.rand(BATCH, 3, SIDE, SIDE))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf"]
)
def test_whole_networks_move_what_torchs_operators_do_beside_products_and_norms(name: str) -> None:
    """Convolutions, linear layers and BatchNorm are counted by kernels, not by torch's operators; biases are small."""
    module = torchvision.models.get_model(name, num_classes=1000)
    for parent in module.modules():
        for key, child in parent.named_children():
            if isinstance(child, torchvision.ops.StochasticDepth | nn.Dropout):
                setattr(parent, key, nn.Identity())
    network = capture_network(module, name=name, input_shape=(3, 224, 224), num_classes=1000)
    kernels = network_kernels(network, StepSetting(batch=BATCH), tensor_cores=False)
    streams = kernels.work == Work.STREAM
    module.train().to("meta")
    forward, backward = (Moved(("convolution", "native_batch_norm", "addmm", "mm", "add_.")) for _ in range(2))
    with forward:
        result = module(torch.empty(BATCH, 3, 224, 224, device="meta"))
    with backward:
        result.backward(torch.empty_like(result))
    for moved, ours in ((forward, kernels.step == Pass.FORWARD), (backward, kernels.step != Pass.FORWARD)):
        assert kernels.moved_bytes[streams & ours].sum() == pytest.approx(moved.num_bytes, rel=0.005)


def test_only_gradients_that_come_back_are_added_up() -> None:
    """A ReLU that is read by a ReLU, by a comparison, and as a mask by a product."""
    relu = on_16_channels(LayerKind.ACTIVATION, "relu", (16, 8, 8))
    reader = msgspec.structs.replace(relu, name="reader")
    compared = on_16_channels(LayerKind.OTHER, "gt", (16, 8, 8), input_needs_gradient=False)
    masked = on_16_channels(LayerKind.ELEMENTWISE, "mul", (16, 8, 8), (16, 8, 8), fixed_inputs=(1,))
    edges = tuple((source, "mul") for source in ("reader", "relu"))
    network = msgspec.structs.replace(
        chain(relu),
        layers=(relu, reader, compared, masked),
        edges=(("relu", "reader"), ("relu", "gt"), *edges),
    )
    kernels = network_kernels(network, StepSetting(batch=2), tensor_cores=False)
    size = 2 * 1024 * 4
    assert kernels.moved_bytes[kernels.layer == 0].tolist() == [2 * size, 3 * size]
    assert kernels.moved_bytes[kernels.layer == 3].tolist() == [3 * size, 3 * size]  # dy and the mask in, dx out


def test_the_gradients_of_two_readers_of_a_view_are_added_up() -> None:
    """Two ReLUs read what is flattened: each gradient is read, their sum is written, and the view hands it on."""
    flat = on_16_channels(LayerKind.RESHAPE, "flatten", (16, 8, 8), view=True)
    readers = [on_16_channels(LayerKind.ACTIVATION, "relu", (16, 8, 8), name=name) for name in "ab"]
    network = msgspec.structs.replace(chain(flat), layers=(flat, *readers), edges=(("flatten", "a"), ("flatten", "b")))
    kernels = network_kernels(network, StepSetting(batch=2), tensor_cores=False)
    assert kernels.moved_bytes[kernels.layer == 0].tolist() == [3 * 2 * 1024 * 4]


def test_the_gradients_of_parts_are_joined_and_not_added() -> None:
    parts = on_16_channels(LayerKind.RESHAPE, "chunk", (16, 8, 8), view=True)
    readers = [on_16_channels(LayerKind.ACTIVATION, "relu", (8, 8, 8), name=name) for name in "ab"]
    network = msgspec.structs.replace(chain(parts), layers=(parts, *readers), edges=(("chunk", "a"), ("chunk", "b")))
    kernels = network_kernels(network, StepSetting(batch=2), tensor_cores=False)
    assert kernels.moved_bytes[kernels.layer == 0].tolist() == [2 * 2 * 1024 * 4]
