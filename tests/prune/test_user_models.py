"""Networks as users write them: what is pruned stays exact, what cannot be is refused with the reason, nothing crashes.

Every model says which layers can be pruned in part (`prunable`) and which not at all, with words of the reason.
"""

import copy
import dataclasses
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import ptsim
from ptsim.errors import UnsupportedModelError
from ptsim.prune.groups import find_groups
from ptsim.prune.proof import WithoutRandomness
from ptsim.prune.reconfigure import reconfigure
from ptsim.prune.structure import apply_structure, structure_of
from tests.prune.helpers import cut_twice, enliven, same_function, zero_some

IMAGE = (3, 8, 8)


class User(nn.Module):
    """Three convolutions and a head; what happens between `a`, `b` and `c` is the model's own `mix`."""

    def __init__(
        self, mix: Callable[..., Tensor], *, width: int = 8, second: int | None = None, **extra: nn.Module | Tensor
    ) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(3, second or width, 3, padding=1)
        for name, part in extra.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.mix = mix
        with torch.no_grad():
            self.c = nn.Conv2d(mix(self, self.a(torch.zeros(2, *IMAGE)), self.b(torch.zeros(2, *IMAGE))).shape[1], 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(self, torch.relu(self.a(x)), self.b(x))
        return self.head(self.c(y).mean((2, 3)))


def shuffle(m: Any, x: Tensor, y: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return (x + y).view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, -1, h, w)


def unequal(m: Any, x: Tensor, y: Tensor) -> Tensor:
    first, second = torch.split(x + y, [3, 5], dim=1)
    return torch.cat([m.narrow(first), second], 1)


def squeeze(m: Any, x: Tensor, y: Tensor) -> Tensor:
    gate = torch.sigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1).flatten(1)))))
    return torch.mul(x, gate[:, :, None, None]) + y


def cbam(m: Any, x: Tensor, y: Tensor) -> Tensor:
    seen = torch.cat([x.mean(1, keepdim=True), torch.max(x, dim=1, keepdim=True)[0]], dim=1)
    return x * torch.sigmoid(m.look(seen)) + m.own(y)


def in_place(m: Any, x: Tensor, y: Tensor) -> Tensor:
    y = y * 2
    y += x
    y.mul_(m.gate.sigmoid().view(1, -1, 1, 1))
    return y.clamp_(min=-3)


def extremes(m: Any, x: Tensor, y: Tensor) -> Tensor:
    peak, _ = x.flatten(2).max(dim=-1)
    low = torch.min(y.flatten(2), 2).values
    top = y.flatten(2).topk(3, -1)[0].mean(-1)
    return (peak + low + top)[..., None, None]


def attention(m: Any, x: Tensor, y: Tensor) -> Tensor:
    weight = F.softmax(m.one(x).flatten(2), dim=-1)
    return m.own(y) * weight.view(weight.shape[0], 1, *x.shape[2:])


def attended(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Every place of the image looks at every other one."""
    places = x.flatten(2).transpose(1, 2)
    return m.attend(places, places, places)[0].transpose(1, 2).reshape(x.shape) + m.own(y)


def shortcut(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Option A of the CIFAR ResNets: zeros for the new channels."""
    return y + F.pad(x, (0, 0, 0, 0, 2, 2))


def new_zeros(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return y + torch.cat((x, x.new_zeros(x.shape[0], 4, x.shape[2], x.shape[3])), dim=1)


def means(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return x + y - y.mean([2, 3], keepdim=True) + y.std(dim=(-2, -1), keepdim=True)


def functional(m: Any, x: Tensor, y: Tensor) -> Tensor:
    x = F.batch_norm(x, m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias, m.training)
    x = F.leaky_relu(F.conv2d(x, m.conv.weight, m.conv.bias, padding=1), 0.1)
    return F.max_pool2d(F.prelu(x, m.slope) + y, 2)


def looks_at_shapes(m: Any, x: Tensor, y: Tensor) -> Tensor:
    assert x.dim() == 4
    assert x.shape == y.shape, f"{x.shape} is not {y.shape}"
    if x.shape[-1] > 4:
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    _, _, height, width = x.size()
    assert height == width
    return torch.stack([*(x + y).split(4, dim=0)]).sum(0) if len(x.shape) == 5 else x + y


def asserts_width(m: Any, x: Tensor, y: Tensor) -> Tensor:
    assert x.shape[1] == 8
    return m.own(x) + y


def divides_by_width(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return x / x.shape[1] + m.own(y)


def bakes_width(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return x * float(x.shape[1]) ** -0.5 + m.own(y)


def masks(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return m.own(y) * (x > 0).float() + (m.own(y) * (x > 0.1))


def drop_path(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """As timm writes it."""
    if not m.training:
        return x + y
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    return x / 0.9 * x.new_empty(shape).bernoulli_(0.9) + y


def transposed_attribute(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return m.linear((x + y).flatten(2).mT).mT.unsqueeze(-1)


def blur(m: Any, x: Tensor, y: Tensor) -> Tensor:
    kernel = m.kernel.expand(x.shape[1], 1, 3, 3)
    return F.conv2d(x, kernel, padding=1, groups=x.shape[1]) + m.own(y)


def hyper(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """The weight of a convolution is another layer's output."""
    weight = m.make(y.mean((0, 2, 3))).view(8, 8, 1, 1)
    return F.conv2d(x, weight) + m.own(y)


def grouped_by_code(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.conv2d(x, m.grouped, padding=1, groups=4) + y


def norms(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.normalize(x, 2, 1) + F.normalize(m.own(y), 2, 2) + x.norm(2, 1, keepdim=True)


def stacked(m: Any, x: Tensor, y: Tensor) -> Tensor:
    both = torch.stack([x, y, x * y], dim=1)
    weight = torch.softmax(m.mixing, 0)
    return both.mean(1) + weight[0] * x + weight[1] * y


def interleaved(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.stack((x, y), dim=2).flatten(1, 2)


def unfolds(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.unfold(x, 3, padding=1).view(x.shape[0], -1, *x.shape[2:])


def parameter_view(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return x * m.scale.view(1, 8, 1, 1) + m.own(y)


def sliced(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x[:, :3] + y, x[:, 3:]], 1)


def halves(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.glu(x, dim=1) + m.gated(y)


def upsampled(m: Any, x: Tensor, y: Tensor) -> Tensor:
    small = m.up(F.adaptive_max_pool2d(x, 4))
    return F.interpolate(small, size=y.shape[2:], mode="bilinear") + y


@torch.fx.wrap
def mean(x: Tensor) -> Tensor:
    """A user's function that fx does not look into, called like one of torch's."""
    return x - x.amax(1, keepdim=True)


def wrapped(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return mean(x) + m.own(y)


class SamePadding(nn.Conv2d):
    """A convolution of the user's own, which fx looks into."""

    def forward(self, x: Tensor) -> Tensor:
        height, _ = x.size()[-2:]
        pad = self.kernel_size[0] // 2
        x = F.pad(x, [pad, pad, pad, pad]) if height > pad else x
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Places(nn.Module):
    """Coordinates as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.grid: Tensor
        self.register_buffer("grid", torch.stack(torch.meshgrid(torch.rand(8), torch.rand(8), indexing="ij"))[None])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.grid.expand(x.shape[0], -1, -1, -1)], dim=1)


def coordinates(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return m.places(x * y)


def unlike_halves(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """No weight tells one half from the other."""
    first, second = (x + y).chunk(2, 1)
    return torch.cat([first.relu(), second.tanh()], 1)


def shifted(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """The first quarter is moved by a pixel."""
    quarter = x.shape[1] // 4
    return torch.cat([x[:, :quarter].roll(1, 2), x[:, quarter:]], 1)


def windows(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Weights of one's own for every place, as in an involution."""
    n, c, h, w = x.shape
    copies = F.unfold(x, 3, padding=1).view(n, c, 9, h, w)
    return (m.kernel(y).view(n, 1, 9, h, w) * copies).sum(2) + F.fold(F.unfold(y, 2, stride=2), (h, w), 2, stride=2)


def assigned_parts(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """A temporal shift as its authors' code does it."""
    part, out = x.shape[1] // 4, torch.zeros_like(x)
    out[:, :part, :, 1:] = x[:, :part, :, :-1]
    out[:, part:] = x[:, part:]
    return out


def neighbours(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Efficient channel attention: a filter that slides over the channels."""
    weights = m.slide(x.mean((2, 3), keepdim=True).squeeze(-1).transpose(1, 2)).transpose(1, 2).unsqueeze(-1)
    return x * weights.sigmoid() + m.own(y)


def tokens(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """A mixer: linear layers over the places of every channel."""
    return x + m.last(F.gelu(m.first(x.flatten(2)))).view(x.shape)


def to_a_size(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """The shape of `y` is given, of which the channels do not count."""
    return m.up(F.max_pool2d(x, 2), output_size=y.size()) + m.own(y)


def unpooled(m: Any, x: Tensor, y: Tensor) -> Tensor:
    small, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(small, places, 2, output_size=y.size()) + m.own(y)


def scaled_twice(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """One scale for channels that could go and for others that stay."""
    return torch.cat([m.own(x * m.scale), y.softmax(1) * m.scale], 1)


def row(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """The image as rows of values: with channels of their own for every channel, and back to its size."""
    deep = m.deep(m.norm(m.conv((x + y).flatten(2))))
    return m.up(F.max_pool1d(deep, 2)).unflatten(2, (8, 8))


def volume(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Two images one behind the other; the windows of the pool end beyond the border."""
    pooled = F.max_pool3d(m.norm(m.conv(torch.stack((x, y), 2))), (1, 3, 3), (1, 2, 2), ceil_mode=True)
    return m.act(pooled).squeeze(2)


def last(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Features of places that lie last, normalised as if the rows of the image were its channels."""
    return m.norm(m.wide(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class Positive(nn.Module):
    """Any number becomes one above 0."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x)


def positive(module: nn.Module) -> nn.Module:
    """The module with a weight that is computed and above 0."""
    register_parametrization(module, "weight", Positive())
    return module


def own() -> nn.Module:
    """A convolution between `y` and the sum, so that `b` is not bound to `a`."""
    return nn.Conv2d(8, 8, 1)


@dataclasses.dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Module]
    prunable: str = ""
    refused: str = ""
    because: str = ""


CASES = {
    "sum and shuffle": Case(lambda: User(shuffle), "a b c"),
    "nn.ChannelShuffle": Case(lambda: User(lambda m, x, y: m.mixed(x + y), mixed=nn.ChannelShuffle(2)), "a b c"),
    "split in unequal parts": Case(
        lambda: User(unequal, narrow=nn.Conv2d(3, 2, 1)), "narrow c", "a b", "would mix up the channels"
    ),
    "slices of fixed length": Case(lambda: User(sliced, second=3), "c", "a", "would mix up the channels"),
    "slice to half": Case(
        lambda: User(lambda m, x, y: torch.cat([x[:, : x.shape[1] // 2], y], 1)), "a b c"
    ),
    "chunks swapped": Case(lambda: User(lambda m, x, y: torch.cat((x + y).chunk(2, 1)[::-1], 1)), "a b c"),
    "halves with activations of their own": Case(lambda: User(unlike_halves), "a b c"),
    "a part by a fixed number, shifted": Case(
        lambda: User(lambda m, x, y: torch.cat([x[:, :4].roll(1, 2), x[:, 4:]], 1)), "c", "a", "would mix up"
    ),
    "pieces of two in reverse": Case(lambda: User(lambda m, x, y: torch.cat(x.split(2, 1)[::-1], 1)), "a c"),
    "the first piece of two with an activation": Case(
        lambda: User(lambda m, x, y: torch.cat([x.split(2, 1)[0].tanh(), *x.split(2, 1)[1:4]], 1)), "c", "a"
    ),
    "every second channel": Case(
        lambda: User(lambda m, x, y: torch.cat([x[:, ::2].relu(), x[:, 1::2].tanh()], 1)), "a c"
    ),
    "a part of the channels shifted": Case(lambda: User(shifted), "a c"),
    "windows copied and summed": Case(lambda: User(windows, kernel=nn.Conv2d(8, 9, 1)), "a b c"),
    "parts assigned": Case(lambda: User(assigned_parts), "a c"),
    "a filter over the channels": Case(
        lambda: User(neighbours, slide=nn.Conv1d(1, 1, 3, padding=1), own=own()), "b c", "a", "change its neighbours"
    ),
    "layers over places": Case(
        lambda: User(tokens, first=nn.Linear(64, 10), last=nn.Linear(10, 64)), "a c", "first", "mixes positions"
    ),
    "transposed, depthwise": Case(
        lambda: User(lambda m, x, y: m.up(x), up=nn.ConvTranspose2d(8, 16, 4, 2, 1, groups=8)), "a c"
    ),
    "nn.Bilinear": Case(
        lambda: User(lambda m, x, y: m.both(x.mean((2, 3)), y.mean((2, 3)))[:, :, None, None],
                     both=nn.Bilinear(8, 8, 7)), "c", "a b", "multiplies these channels"
    ),
    "cat of sums": Case(lambda: User(lambda m, x, y: torch.cat((x + y, torch.add(x, y, alpha=2), x), dim=1)), "a b c"),
    "squeeze and excite": Case(lambda: User(squeeze, down=nn.Linear(8, 4), up=nn.Linear(4, 8)), "a b c down"),
    "spatial attention": Case(
        lambda: User(cbam, look=nn.Conv2d(2, 1, 3, padding=1), own=own()), "b c", "a", "combines these channels"
    ),
    "in place": Case(lambda: User(in_place, gate=torch.randn(8)), "a b c"),
    "extremes over space": Case(lambda: User(extremes), "a b c"),
    "attention over space": Case(lambda: User(attention, one=nn.Conv2d(8, 1, 1), own=own()), "a b c own"),
    "nn.MultiheadAttention": Case(
        lambda: User(attended, attend=nn.MultiheadAttention(8, 2, batch_first=True), own=own()),
        "b c", "a", "attend (MultiheadAttention) has no rule",
    ),
    "padded short-cut": Case(lambda: User(shortcut, second=12), "c"),
    "zeros joined": Case(lambda: User(new_zeros, second=12), "a b c"),
    "means over space": Case(lambda: User(means), "a b c"),
    "functional forms": Case(
        lambda: User(functional, norm=nn.BatchNorm2d(8), conv=nn.Conv2d(8, 8, 3), slope=torch.rand(8)), "a b c"
    ),
    "looks at shapes": Case(lambda: User(looks_at_shapes), "a b c"),
    "asserts a width": Case(lambda: User(asserts_width, own=own()), "b c own", "a", "would mix up"),
    "divides by the width": Case(lambda: User(divides_by_width, own=own()), "b c", "a", "the number of these channels"),
    "computes with the width": Case(lambda: User(bakes_width, own=own()), "b c", "a", "the number of these channels"),
    "masks": Case(lambda: User(masks, own=own()), "a b c own"),
    "stochastic depth by hand": Case(lambda: User(drop_path), "a b c"),
    "transposed to a size": Case(
        lambda: User(to_a_size, up=nn.ConvTranspose2d(8, 8, 3, 2, 1), own=own()), "a b c up own"
    ),
    "unpooled to a size": Case(lambda: User(unpooled, own=own()), "a b c"),
    "a scale of two maps": Case(
        lambda: User(scaled_twice, scale=torch.rand(8, 1, 1), own=own()), "c own", "a b", "combines these channels"
    ),
    "x.mT": Case(lambda: User(transposed_attribute, linear=nn.Linear(8, 5)), "a b c linear"),
    "blur": Case(lambda: User(blur, kernel=torch.ones(1, 1, 3, 3) / 9, own=own()), "b c", "a", "computes its weight"),
    "a weight that is computed": Case(
        lambda: User(hyper, make=nn.Linear(8, 64), own=own()), "b c", "a make", "computes its weight"
    ),
    "groups in the code": Case(
        lambda: User(grouped_by_code, grouped=torch.randn(8, 2, 3, 3)), "c", "a", "would mix up the channels"
    ),
    "groups of a convolution that is traced": Case(
        lambda: User(lambda m, x, y: m.same(x) + y, same=SamePadding(8, 8, 3, groups=4)), "a b c"
    ),
    "coordinates joined": Case(lambda: User(coordinates, places=Places()), "a b c"),
    "normalised": Case(lambda: User(norms, own=own()), "b c", "a", "combines these channels"),
    "stacked": Case(lambda: User(stacked, mixing=torch.zeros(2)), "a b c"),
    "stacked and interleaved": Case(lambda: User(interleaved), "a b c"),
    "F.unfold": Case(lambda: User(unfolds), "a c"),
    "a fixed view of a parameter": Case(
        lambda: User(parameter_view, scale=torch.rand(8), own=own()), "b c", "a", "would mix up"
    ),
    "gated linear units": Case(lambda: User(halves, gated=nn.GLU(1)), "a b c"),
    "upsampled": Case(lambda: User(upsampled, up=nn.Upsample(scale_factor=2)), "a b c"),
    "nn.PixelUnshuffle": Case(lambda: User(lambda m, x, y: m.down(x), down=nn.PixelUnshuffle(2)), "a c"),
    "F.pixel_shuffle": Case(
        lambda: User(lambda m, x, y: F.pixel_shuffle(x, 2)), "a c"
    ),
    "a function that is not traced": Case(lambda: User(wrapped, own=own()), "b c", "a", "is not traced"),
    "random noise": Case(lambda: User(lambda m, x, y: x + torch.randn_like(x)), "c", "a", "randn_like"),
    "ConvTranspose2d": Case(
        lambda: User(lambda m, x, y: m.up(x) + F.conv_transpose2d(y, m.w, stride=2), up=nn.ConvTranspose2d(8, 8, 2, 2),
                     w=torch.randn(8, 8, 2, 2)), "a b c up"
    ),
    "a channel's scale, NHWC": Case(
        lambda: User(lambda m, x, y: ((x + y).permute(0, 2, 3, 1) * m.scale).permute(0, 3, 1, 2), scale=torch.rand(8)),
        "a b c",
    ),
    "a matrix of the model's own": Case(
        lambda: User(lambda m, x, y: (x.flatten(2).transpose(1, 2) @ m.w).transpose(1, 2).unsqueeze(-1),
                     w=torch.randn(8, 5)), "c", "a", "matmul"
    ),
    **{
        f"{type(norm).__name__} with a computed weight": Case(
            lambda norm=norm: User(lambda m, x, y: m.norm(x) + m.own(y), norm=positive(copy.deepcopy(norm)), own=own()),
            "b c", "a", "computes its weight",
        )
        for norm in (nn.BatchNorm2d(8), nn.GroupNorm(4, 8), nn.PReLU(8))
    },
    "GroupNorm": Case(
        lambda: User(lambda m, x, y: m.group(x) + m.each(y), group=nn.GroupNorm(2, 8), each=nn.GroupNorm(8, 8)),
        "a b c",
    ),
    "normalisations without parameters": Case(
        lambda: User(lambda m, x, y: m.n3(m.n2(m.n1(x))) + m.n4(y), n1=nn.GroupNorm(8, 8, affine=False),
                     n2=nn.InstanceNorm2d(8), n3=nn.BatchNorm2d(8, affine=False, track_running_stats=False),
                     n4=nn.BatchNorm2d(8, affine=False)), "a b c"
    ),
    "PReLU with a slope per channel": Case(lambda: User(lambda m, x, y: m.act(x + y), act=nn.PReLU(8)), "a b c"),
    "LayerNorm over space": Case(lambda: User(lambda m, x, y: m.norm(x), norm=nn.LayerNorm((8, 8))), "a c"),
    "LayerNorm over everything": Case(
        lambda: User(lambda m, x, y: m.norm(x), norm=nn.LayerNorm((8, 8, 8))), "c", "a", "norm (LayerNorm)"
    ),
    "softmax over channels": Case(lambda: User(lambda m, x, y: x.softmax(1)), "c", "a", "combines these channels"),
    "shared modules": Case(
        lambda: User(lambda m, x, y: m.again(m.norm(m.again(m.norm(x)))), again=own(), norm=nn.BatchNorm2d(8)), "a c"
    ),
    "a row of values": Case(
        lambda: User(row, conv=nn.Conv1d(8, 10, 3, padding=1), norm=nn.BatchNorm1d(10),
                     deep=nn.Conv1d(10, 20, 3, padding=1, groups=10), up=nn.ConvTranspose1d(20, 20, 2, 2, groups=20)),
        "a b c conv",
    ),
    "a volume": Case(
        lambda: User(volume, conv=nn.Conv3d(8, 9, (2, 3, 3), padding=(0, 1, 1)), norm=nn.BatchNorm3d(9),
                     act=nn.PReLU(9)), "a b c conv"
    ),
    "GroupNorm of one group beside the features": Case(
        lambda: User(last, wide=nn.Linear(8, 6), norm=nn.GroupNorm(1, 8)), "a c", "wide", "norm (GroupNorm) normalises"
    ),
    "F.group_norm beside the features": Case(
        lambda: User(lambda m, x, y: F.group_norm(m.wide(x.permute(0, 2, 3, 1)), 2).permute(0, 3, 1, 2),
                     wide=nn.Linear(8, 6)), "a c", "wide", "group_norm"
    ),
    "neighbours beside the features": Case(
        lambda: User(last, wide=nn.Linear(8, 6), norm=nn.LocalResponseNorm(3)), "a c wide"
    ),
    "GroupNorm of two groups, viewed": Case(
        lambda: User(lambda m, x, y: m.norm(x + y).view(x.shape[0], -1, 8, 8), norm=nn.GroupNorm(2, 8)), "a b c"
    ),
    "a row of weights": Case(
        lambda: User(lambda m, x, y: F.linear(x.permute(0, 2, 3, 1), m.row)[:, None] + m.own(y), row=torch.rand(8),
                     own=own()), "b c", "a", "sums these channels up"
    ),
    "one channel for all": Case(
        lambda: User(lambda m, x, y: x + m.one(y), one=nn.Conv2d(8, 1, 1)), "a b c", "one", "spreads one channel"
    ),
    "the largest channel by number": Case(
        lambda: User(lambda m, x, y: m.own(y) * x.argmax(1, keepdim=True), own=own()), "b c", "a", "combines these"
    ),
    "inside a DataParallel": Case(
        lambda: User(
            lambda m, x, y: m.inner(x) + y,
            inner=nn.DataParallel(nn.Sequential(nn.Conv2d(8, 9, 1), nn.Conv2d(9, 8, 1))),
        ),
        "a b c inner.module.0",
    ),
    "joined with itself": Case(lambda: User(lambda m, x, y: torch.hstack((x, y, x))), "a b c"),
    "whole channels dropped": Case(
        lambda: User(lambda m, x, y: F.dropout2d(x, 0.0) + m.drop(y), drop=nn.Dropout2d(0.0)), "a b c"
    ),
    "means spread over the image": Case(
        lambda: User(lambda m, x, y: F.logsigmoid(x) + y.mean((2, 3), keepdim=True).broadcast_to(y.shape)), "a b c"
    ),
    "InstanceNorm with statistics": Case(
        lambda: User(lambda m, x, y: m.norm(x) + y, norm=nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
        "a b c",
    ),
    "lengths over space and over channels": Case(
        lambda: User(lambda m, x, y: x * torch.linalg.vector_norm(x, 2, (2, 3), keepdim=True)
                     + m.own(y) * torch.linalg.norm(y, dim=1, keepdim=True), own=own()),
        "a c own", "b", "combines these channels",
    ),
    "grouped and depthwise": Case(
        lambda: User(lambda m, x, y: m.depth(m.grouped(x)), grouped=nn.Conv2d(8, 12, 3, groups=4),
                     depth=nn.Conv2d(12, 24, 3, groups=12)), "a c grouped"
    ),
}  # fmt: skip


def edges_of(groups: Any) -> dict[str, list[tuple[bool, str]]]:
    """Layer → (prunable, reason) of every edge that it writes."""
    found: dict[str, list[tuple[bool, str]]] = {}
    for edge in groups.edges():
        for member in edge.members:
            if member.endswith(" (out)"):
                found.setdefault(member.removesuffix(" (out)"), []).append((edge.prunable, str(edge.reason)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_users_network_is_pruned_exactly_or_refused_with_the_reason(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.model()
    found = ptsim.inspect(model, input_shape=IMAGE)
    assert found.exact, (found.max_rel_error_eval, found.max_rel_error_train)
    edges = edges_of(find_groups(model, IMAGE))
    for layer in case.prunable.split():
        assert any(prunable for prunable, _ in edges[layer]), (layer, edges[layer])
    for layer in case.refused.split():
        assert not any(prunable for prunable, _ in edges[layer]), layer
        assert any(case.because in reason for _, reason in edges[layer]), (layer, edges[layer])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_users_network_is_reconfigured_again_and_again_and_rebuilt(name: str) -> None:
    torch.manual_seed(0)
    model = CASES[name].model().double()
    enliven(model)
    for seed in range(2):
        groups = find_groups(model, IMAGE)
        zero_some(model, groups, 0.4, seed)
        surgery = reconfigure(model, groups)
        assert not reconfigure(model, surgery.groups).changed
    fresh = CASES[name].model().double()
    apply_structure(fresh, structure_of(model))
    fresh.load_state_dict(model.state_dict())
    if name not in ("random noise", "stochastic depth by hand"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a normalisation would warn of a width that it does not have
            same_function(fresh, model, IMAGE)


def test_in_the_proof_nothing_is_dropped_at_random() -> None:
    """Of what mostly survives (stochastic depth) all is kept, of what is rare (DropBlock) nothing comes."""
    with WithoutRandomness():
        assert torch.empty(3).bernoulli_(0.9).tolist() == [1, 1, 1]
        assert torch.empty(3).bernoulli_(0.1).tolist() == torch.empty(3).bernoulli_(p=0.1).tolist() == [0, 0, 0]
        for slope in (nn.RReLU(0.2, 0.4), nn.RReLU(0.2, 0.4, inplace=True)):
            torch.testing.assert_close(slope(torch.tensor([-1.0, 2.0])), torch.tensor([-0.3, 2.0]))
        assert F.rrelu(input=torch.tensor([-1.0]), lower=0.5, upper=0.5, training=True).tolist() == [-0.5]


def test_the_channels_of_a_shuffle_are_tied_in_pairs() -> None:
    """Eight channels in two groups of four: channel i of the one becomes the neighbour of channel i of the other."""
    groups = find_groups(User(shuffle), IMAGE)
    written = next(layer.outputs.tolist() for layer in groups.layers if layer.layer == "a")
    assert written[:4] == written[4:]
    assert len(set(written)) == 4
    read = next(layer.inputs.tolist() for layer in groups.layers if layer.layer == "c")
    assert read == [written[i] for i in (0, 0, 1, 1, 2, 2, 3, 3)]


class Flagged(nn.Module):
    """Arguments with defaults; several outputs, as a dict of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, features: bool = True) -> dict[str, Any]:
        x = F.relu(self.a(x))
        if mask is not None:
            x = x * mask
        y = self.b(x)
        return {"logits": self.head(torch.flatten(y, 1)), "features": [y] if features else []}


def test_arguments_keep_their_defaults_and_every_output_stays_whole() -> None:
    found = ptsim.inspect(Flagged(), input_shape=IMAGE)
    assert found.exact
    edges = edges_of(find_groups(Flagged(), IMAGE))
    assert edges["a"] == [(True, "None")]
    assert edges["b"] == [(False, "it is the network's output")]


class Survival(nn.Module):
    """Stochastic depth whose factor is made by the size of the mini-batch, without a device."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 4)
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        y = self.b(x)
        if self.training:
            y = y / 0.7 * self.make(x)
        return self.head(self.c(x + y).mean((2, 3)))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.empty(x.shape[0], 1, 1, 1).bernoulli_(0.7),
        lambda x: torch.bernoulli(torch.full((x.size(0), 1, 1, 1), 0.7)),
        lambda x: (0.7 + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1))).floor_(),
    ],
)
def test_tensors_made_by_the_size_of_others_are_traced(make: Callable[[Tensor], Tensor]) -> None:
    found = ptsim.inspect(Survival(make), input_shape=IMAGE)
    assert (found.exact, found.traced_by, found.prunable_channels) == (True, "torch.fx", 8 + 6)


@dataclasses.dataclass
class Output:
    logits: Tensor
    pair: tuple[Tensor, ...]


class Structured(Flagged):
    def forward(self, x: Tensor) -> Output:  # type: ignore[override] # another network
        x = F.relu(self.a(x))
        return Output(self.head(self.b(x).flatten(1)), (x.mean(),))


def test_a_module_registered_twice_and_removed_is_gone_everywhere() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.branch = nn.Sequential(self.one, self.two)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head((x + self.branch(x)).mean((2, 3)))

    model = Twice().double()
    with torch.no_grad():
        for parameter in (model.one.weight, model.two.weight):
            parameter.zero_()
    before = model(torch.ones(1, *IMAGE, dtype=torch.float64))
    surgery = reconfigure(model, find_groups(model, IMAGE))
    assert surgery.layers_removed == ("one", "two")
    torch.testing.assert_close(model(torch.ones(1, *IMAGE, dtype=torch.float64)), before)


class Paired(nn.Module):
    """Wants two images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head((self.a(x) + self.a(y)).mean((2, 3)))


class Branchy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for value in itertools.repeat(x.sum(), 1):
            if value > 0:
                return x
        return -x


class Renewing(Paired):
    """Makes a new parameter at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.shares = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override] # another network
        self.shares = nn.Parameter(torch.sigmoid(self.shares))
        return self.head((self.a(x) * self.shares).mean((2, 3)))


class Unregistered(Branchy):
    """Keeps a layer in a plain list, and looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Conv2d(3, 3, 1)]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.layers[0](x))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten()), "lazy modules"),
        (Branchy, r"torch\.fx cannot trace Branchy"),
        (Paired, "the forward of Paired cannot be called with the images alone: missing a required argument: 'y'"),
        (Renewing, "the code of Renewing puts another tensor in the place of its parameter shares at every call"),
        (Unregistered, r"Unregistered calls a layer that is no part of it, so that no optimizer trains it \(test_user"),
    ],
)
def test_what_cannot_be_inspected_is_one_sentence(model: Callable[[], nn.Module], words: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that lazy modules are new
        made = model()
    with pytest.raises(UnsupportedModelError, match=words):
        ptsim.inspect(made, input_shape=IMAGE)


class SkipsAlone(nn.Module):
    """A WaveNet whose last sum of the residual stream nobody reads: its layers still have to fit together."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv2d(3, 8, 1)
        self.gates = nn.ModuleList(nn.Conv2d(8, 12, 3, padding=1) for _ in range(2))
        self.residuals = nn.ModuleList(nn.Conv2d(12, 8, 1) for _ in range(2))
        self.skips = nn.ModuleList(nn.Conv2d(12, 10, 1) for _ in range(2))
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, skip = self.start(x), torch.zeros(())
        for gate, residual, skipped in zip(self.gates, self.residuals, self.skips, strict=True):
            z = torch.tanh(gate(x))
            x = x + residual(z)
            skip = skip + skipped(z)
        (x - x.mean(1, keepdim=True)).abs().sum()  # nobody reads it: no reason to stay
        return self.head(skip.mean((2, 3)))


def test_what_is_added_up_and_never_read_has_to_fit_too() -> None:
    model = SkipsAlone().double()
    groups = find_groups(model, IMAGE)
    stream = next(edge for edge in groups.edges() if edge.name == "start")
    assert {"start (out)", "residuals.0 (out)", "residuals.1 (out)"} <= {*stream.members}
    assert groups.num_channels == (8 + 2 * 12 + 10, 3 + 5)
    cut_twice(model, IMAGE)


class Divided(nn.Conv2d):
    """Computes with a number of its channels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.out_channels


class Asking(nn.Module):
    """Reshapes by what its layers say of themselves, and computes with it where `divided` says so."""

    def __init__(self, kind: type[nn.Conv2d] = nn.Conv2d, *, divided: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), kind(8, 12, 3), nn.Linear(12, 5)
        self.divided = divided

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.b(self.a(x)), 1).view(-1, self.head.in_features)
        x = x.reshape(x.shape[0], self.b.out_channels)
        return self.head(x / self.b.out_channels if self.divided else x)


@pytest.mark.parametrize(
    ("model", "channels"),
    [(Asking(), 8 + 12), (Asking(divided=True), 8), (Asking(Divided), 8)],
    ids=["asks", "divides", "own"],
)
def test_code_may_reshape_by_the_widths_of_its_layers_and_what_it_computes_with_stays(
    model: nn.Module, channels: int
) -> None:
    model = copy.deepcopy(model).double()
    assert find_groups(model, IMAGE).num_channels[0] == channels
    cut_twice(model, IMAGE)
