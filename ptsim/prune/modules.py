"""What does pruning put into a network in place of what it took out?

* `Placeholder` stands where a removed layer stood: its output has no channels, so nothing is computed.
* `ConstantChannels` ends a removed residual branch: the constant per channel that the zeroed branch would still add.
* `ChannelGather`, `PartialBatchNorm` and `ChannelScatter` are channel gating: a layer reads and writes only its own
  dense channels of a wider residual stream.

All are leaves of the traced graph (`ptsim_leaf`), say how channels pass them (`ptsim_labels`), and can be described as
JSON-able data and rebuilt from it (`config`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptsim.operators import BRANCH_CONSTANT, PLACEHOLDER
from ptsim.prune.labels import State


class Placeholder(nn.Module):
    """Stands for a removed layer: an output of the layer's spatial size without a single channel."""

    ptsim_leaf = True
    ptsim_kind = "reshape"
    ptsim_op = PLACEHOLDER

    def __init__(self, *, channel_dim: int, window: Sequence[Sequence[int]] = ()) -> None:
        """`window` has (kernel, stride, padding, dilation) per spatial axis; none if the layer keeps the size."""
        super().__init__()
        self.channel_dim = channel_dim
        self.window = tuple(tuple(int(n) for n in axis) for axis in window)

    @classmethod
    def of(cls, module: nn.Module) -> Placeholder:
        """The placeholder for a convolution, pooling, linear or size-preserving layer."""
        if isinstance(module, nn.Linear):
            return cls(channel_dim=-1)
        if not hasattr(module, "kernel_size"):
            return cls(channel_dim=1)
        names = (re.search(r"([123])d$", kind.__name__) for kind in type(module).__mro__)
        axes = next((int(found[1]) for found in names if found), 2)
        columns = []
        for name, default in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            value = getattr(module, name, default)
            if value is None:  # the stride of windows that lie side by side
                value = module.kernel_size
            if value == "same":
                return cls(channel_dim=1)
            value = 0 if value == "valid" else value
            columns.append(value if isinstance(value, tuple) else (value,) * axes)
        return cls(channel_dim=1, window=tuple(zip(*columns, strict=True)))

    def config(self) -> dict[str, Any]:
        """JSON-able arguments of the constructor."""
        return {"channel_dim": self.channel_dim, "window": [list(axis) for axis in self.window]}

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, 0, H', W')."""
        shape = list(x.shape)
        shape[self.channel_dim] = 0
        for index, (kernel, stride, padding, dilation) in enumerate(self.window):
            axis = x.ndim - len(self.window) + index
            shape[axis] = (shape[axis] + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        last = x.ndim == 4 and x.stride(1) == 1 and x.stride(3) != 1
        return x.new_empty(shape).to(memory_format=torch.channels_last) if last else x.new_empty(shape)

    def ptsim_labels(self, state: State, path: str, x: Tensor, value: Tensor) -> Tensor:
        """No channel comes out."""
        shape = [1] * value.ndim
        shape[self.channel_dim] = 0
        return torch.empty(shape, dtype=torch.int64)


class ConstantChannels(nn.Module):
    """The end of a removed residual branch: what its last layer gives when everything before it is zero.

    After a BatchNorm that is β in training mode and β + γ(c − μ)/√(σ² + ε) in evaluation mode, where c is the bias of
    the convolution in front of it (0 without one); μ and σ² move towards c and 0 as they would in the zeroed network,
    and γ, β, c keep their (zero or real) gradients, so that momentum and weight decay go on. Without a BatchNorm it
    is c.

    With `full` the constant is written out at the input's size (where an in-place sum or stochastic depth needs it),
    otherwise it has one element per channel and broadcasts.
    """

    ptsim_leaf = True
    ptsim_kind = "reshape"
    ptsim_op = BRANCH_CONSTANT

    def __init__(
        self,
        *,
        width: int,
        full: bool,
        norm: bool,
        affine: bool,
        tracked: bool,
        offset: bool,
        channel_dim: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        self.full, self.norm, self.affine, self.tracked = full, norm, affine, tracked
        self.channel_dim, self.eps, self.momentum = channel_dim, eps, momentum
        self.template: Tensor
        self.register_buffer("template", torch.zeros(width), persistent=False)
        self.weight = nn.Parameter(torch.ones(width)) if norm and affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if (norm and affine) or (not norm and offset) else None
        self.offset = nn.Parameter(torch.zeros(width)) if norm and offset else None
        self.running_mean: Tensor | None
        self.running_var: Tensor | None
        self.num_batches_tracked: Tensor | None
        self.register_buffer("running_mean", torch.zeros(width) if tracked else None)
        self.register_buffer("running_var", torch.ones(width) if tracked else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0) if tracked else None)

    @classmethod
    def of(cls, module: nn.Module, before: nn.Module | None, *, full: bool) -> ConstantChannels:
        """The constant of `module` (BatchNorm, convolution or linear layer), sharing its parameters and buffers.

        `before` is the layer in front of a BatchNorm, whose bias is the constant that comes in.
        """
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            offset = getattr(before, "bias", None)
            constant = cls(
                width=module.num_features,
                full=full,
                norm=True,
                affine=module.affine,
                tracked=module.running_mean is not None,
                offset=offset is not None,
                eps=module.eps,
                momentum=module.momentum,
            )
            constant.weight, constant.bias = module.weight, module.bias
            if isinstance(offset, nn.Parameter):
                constant.offset = offset
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                constant._buffers[name] = module._buffers.get(name)
            reference = module.running_mean if module.running_mean is not None else module.weight
        else:
            weight, bias = module.weight, module.bias
            assert isinstance(weight, Tensor), "a convolution or linear layer"
            linear = isinstance(module, nn.Linear)
            constant = cls(
                width=weight.shape[0],
                full=full,
                norm=False,
                affine=False,
                tracked=False,
                offset=bias is not None,
                channel_dim=-1 if linear else 1,
            )
            if isinstance(bias, nn.Parameter):
                constant.bias = bias
            reference = weight
        if reference is not None:
            constant.template = torch.zeros_like(constant.template, dtype=reference.dtype, device=reference.device)
        return constant.train(module.training)

    def config(self) -> dict[str, Any]:
        """JSON-able arguments of the constructor."""
        return {
            "width": len(self.template),
            "full": self.full,
            "norm": self.norm,
            "affine": self.affine,
            "tracked": self.tracked,
            "offset": self.offset is not None or (not self.norm and self.bias is not None),
            "channel_dim": self.channel_dim,
            "eps": self.eps,
            "momentum": self.momentum,
        }

    def forward(self, x: Tensor) -> Tensor:
        """(N, anything, H, W) → the constant, (N, C, H, W) with `full`, else (1, C, 1, 1)."""
        constant = self._constant()
        if constant.dtype != x.dtype and x.is_floating_point():
            constant = constant.to(x.dtype)
        shape = [1] * x.ndim
        shape[self.channel_dim] = len(constant)
        constant = constant.view(shape)
        if not self.full:
            return constant
        full = list(x.shape)
        full[self.channel_dim] = constant.numel()
        last = x.ndim == 4 and x.stride(1) == 1 and x.stride(3) != 1
        return constant.expand(full).clone(memory_format=torch.channels_last if last else torch.contiguous_format)

    def _constant(self) -> Tensor:
        if not self.norm:
            return self.template if self.bias is None else self.bias
        offset = self.template if self.offset is None else self.offset
        by_batch = self.training or self.running_mean is None or self.running_var is None
        if self.training and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None, "kept together with the statistics"
                self.num_batches_tracked.add_(1)
                rate = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(offset.to(self.running_mean.dtype), rate)
                self.running_var.mul_(1 - rate)
        return constant_of_norm(self, offset, by_batch)

    def ptsim_labels(self, state: State, path: str, x: Tensor, value: Tensor) -> Tensor:
        """Its own channels come out; what flows in was removed with the branch."""
        slots = state.axis(f"{path}.template", 0, len(self.template))
        for tensor in (self.weight, self.bias, self.offset, self.running_mean, self.running_var):
            state.bind(tensor, slots)
        shape = [1] * value.ndim
        shape[self.channel_dim] = len(slots)
        return slots.view(shape)


def constant_of_norm(norm: Any, incoming: Tensor, by_batch: bool) -> Tensor:
    """What a BatchNorm makes of channels that are `incoming` everywhere; (C,).

    With batch statistics mean = incoming and variance = 0, hence β; γ and the constant get the gradient 0.
    """
    if by_batch:
        constant: Tensor = torch.zeros_like(incoming) if norm.bias is None else norm.bias
        for tensor in (norm.weight, incoming):
            if tensor is not None and tensor.requires_grad:
                constant = constant + tensor * 0.0
        return constant
    scaled: Tensor = (incoming - norm.running_mean) * (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scaled = scaled * norm.weight
    if norm.bias is not None:
        scaled = scaled + norm.bias
    return scaled


class _Masked(nn.Module):
    """Holds which channels of a stream are used: `mask` (C,) and their indices."""

    mask: Tensor
    index: Tensor

    def _set_mask(self, mask: Sequence[bool] | Tensor) -> None:
        self.register_buffer("mask", torch.as_tensor(mask, dtype=torch.bool), persistent=False)
        self.register_buffer("index", torch.nonzero(self.mask).flatten(), persistent=False)

    def ptsim_sync(self) -> None:
        """Bring the indices in line with the mask."""
        self.index = torch.nonzero(self.mask).flatten()

    def _index(self, x: Tensor) -> Tensor:
        return self.index.to("meta") if x.is_meta else self.index

    def narrow(self, keep: Tensor) -> None:
        """Use only the used channels numbered `keep`."""
        mask = torch.zeros_like(self.mask)
        mask[self.index[keep.to(self.index.device)]] = True
        self.mask = mask
        self.ptsim_sync()


class ChannelGather(_Masked):
    """Channel gating's read: the channels of a stream that the next layer uses."""

    ptsim_leaf = True
    ptsim_kind = "reshape"
    ptsim_op = "gather"

    def __init__(self, mask: Sequence[bool] | Tensor) -> None:
        super().__init__()
        self._set_mask(mask)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, number of used channels, H, W)."""
        return x.index_select(1, self._index(x))

    def ptsim_labels(self, state: State, path: str, x: Tensor, value: Tensor) -> Tensor:
        """The used channels come out."""
        slots = state.axis(f"{path}.mask", 0, len(self.mask))
        state.unite(slots, x.flatten().expand(len(slots)))
        return slots[self.mask.cpu()].view(1, -1, *[1] * (value.ndim - 2))


class PartialBatchNorm(nn.BatchNorm2d, _Masked):
    """A BatchNorm over all channels of a stream of which only the used ones come in; the others are 0 everywhere.

    It normalises the used ones and lets the statistics of the others move as those of zeros would.
    """

    ptsim_leaf = True
    ptsim_kind = "batch_norm"
    ptsim_op = "batch_norm"

    def __init__(self, norm: nn.BatchNorm2d, mask: Sequence[bool] | Tensor) -> None:
        """Takes over the parameters and buffers of `norm`."""
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self._buffers[name] = norm._buffers.get(name)
        self._set_mask(mask)
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """(N, used, H, W) → (N, used, H, W)."""
        index = self._index(x)
        weight, bias, mean, variance = (
            None if vector is None else vector[index]
            for vector in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        rate = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                rate = 1.0 / float(self.num_batches_tracked)
        by_batch = self.training or mean is None
        out = nn.functional.batch_norm(x, mean, variance, weight, bias, by_batch, rate, self.eps)
        if self.training and self.running_mean is not None and self.running_var is not None:
            assert mean is not None, "kept together"
            assert variance is not None, "kept together"
            with torch.no_grad():
                self.running_mean.mul_(1 - rate).index_copy_(0, index, mean)
                self.running_var.mul_(1 - rate).index_copy_(0, index, variance)
        return out

    def ptsim_labels(self, state: State, path: str, x: Tensor, value: Tensor) -> Tensor:
        """Its vectors run along the stream, its input along the used part."""
        slots = state.axis(f"{path}.mask", 0, len(self.mask))
        state.unite(slots[self.mask.cpu()], x.flatten().expand(value.shape[1]))
        for tensor in (self.weight, self.bias, self.running_mean, self.running_var):
            state.bind(tensor, slots)
        return x


class ChannelScatter(nn.Module):
    """Channel gating's write: the used channels go to their places, the others get their BatchNorm's constant."""

    ptsim_leaf = True
    ptsim_kind = "reshape"
    ptsim_op = "scatter"

    def __init__(self, norm: PartialBatchNorm) -> None:
        super().__init__()
        self._norm = (norm,)  # in a tuple: a reference, not a submodule
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """(N, used, H, W) → (N, C, H, W)."""
        norm = self._norm[0]
        incoming = torch.zeros(len(norm.mask), dtype=x.dtype, device=x.device)
        constant = constant_of_norm(norm, incoming, norm.training or norm.running_mean is None).to(x.dtype)
        last = x.ndim == 4 and x.stride(1) == 1 and x.stride(3) != 1
        memory_format = torch.channels_last if last else torch.contiguous_format
        out = constant.view(1, -1, 1, 1).expand(x.shape[0], -1, *x.shape[2:]).clone(memory_format=memory_format)
        return out.index_copy_(1, norm._index(x), x)

    def ptsim_labels(self, state: State, path: str, x: Tensor, value: Tensor) -> Tensor:
        """All channels of the stream come out."""
        norm_path = path.removesuffix("scatter") + "norm"
        return state.axis(f"{norm_path}.mask", 0, value.shape[1]).view(1, -1, 1, 1)


class Gathered(nn.Sequential):
    """A layer that reads only its own channels of a stream."""

    gather: ChannelGather
    layer: nn.Module

    def __init__(self, layer: nn.Module, mask: Sequence[bool] | Tensor) -> None:
        super().__init__()
        self.gather = ChannelGather(mask)
        self.layer = layer
        self.train(layer.training)

    def config(self) -> dict[str, Any]:
        """JSON-able arguments of the constructor, but for the layer."""
        return {"mask": [int(used) for used in self.gather.mask]}


class Scattered(nn.Sequential):
    """A BatchNorm whose output is spread over a wider stream."""

    norm: PartialBatchNorm
    scatter: ChannelScatter

    def __init__(self, norm: nn.BatchNorm2d, mask: Sequence[bool] | Tensor) -> None:
        super().__init__()
        self.norm = PartialBatchNorm(norm, mask)
        self.scatter = ChannelScatter(self.norm)
        self.train(norm.training)

    def config(self) -> dict[str, Any]:
        """JSON-able arguments of the constructor, but for the BatchNorm."""
        return {"mask": [int(used) for used in self.norm.mask]}


KINDS: dict[str, type[Placeholder | ConstantChannels | Gathered | Scattered]] = {
    "placeholder": Placeholder,
    "constant": ConstantChannels,
    "gathered": Gathered,
    "scattered": Scattered,
}
OWN = (Placeholder, ConstantChannels, ChannelGather, ChannelScatter, PartialBatchNorm, Gathered, Scattered)
