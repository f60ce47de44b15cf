"""PruneTrain's group lasso: its value, its gradient and its proximal step.

Eq. 2 of the paper: the penalty is the sum of the Euclidean norms of all input-channel and all output-channel groups,
one λ for all, no size factor, norms smoothed as √(Σw² + 1e-8). The two groups of a weight overlap on it, so its
gradient is λ·w·(1/‖w_out‖ + 1/‖w_in‖): written by hand, without an autograd graph (docs/method.md §1).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ptsim.criteria import GATHERED_ELEMENTS, GATHERED_KERNELS, group_lasso_work
from ptsim.network import Network
from ptsim.prune.criteria.coefficient import per_weight
from ptsim.prune.groups import ChannelGroups, component_maxima, weight_GOIK
from ptsim.prune.labels import Weighted

SMOOTHING = 1e-8  # docs/method.md §1


class _Term(NamedTuple):
    """A penalised weight, and whether its input and its output channels are groups."""

    layer: Weighted
    weight: nn.Parameter
    inputs: bool
    outputs: bool


class GroupLasso:
    """The penalty Σ‖W_g‖ of a model's channel groups, its gradient and its proximal step.

    Holds references to the model's parameters: make a new one after every reconfiguration.

    `form`: how the gradient is computed. "per_tensor" takes each weight by itself: few accesses to memory, about 10
    launches a weight. "gathered" takes all weights as one vector: about 12 launches in all, more accesses, and tables.
    The default is gathered on a GPU, where launches count, and per tensor on a CPU. `limits`: of weights with more
    elements than the first the norms of the kernels are gathered; those with more kernels than the second are taken by
    themselves.
    """

    label: ClassVar[str] = "group lasso"

    def __init__(
        self,
        model: nn.Module,
        groups: ChannelGroups,
        *,
        form: Literal["per_tensor", "gathered"] | None = None,
        limits: tuple[int, int] = (GATHERED_ELEMENTS, GATHERED_KERNELS),
    ) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.terms = [_Term(layer, parameters[layer.weight], inp, out) for layer, inp, out in groups.penalised()]
        self.weights: Sequence[nn.Parameter] = [term.weight for term in self.terms]
        if form is None:
            form = "gathered" if self.terms and all(weight.is_cuda for weight in self.weights) else "per_tensor"
        self.form = form
        self._by_element, most = limits if form == "gathered" else (0, 0)
        self._small = [term for term in self.terms if _num_kernels(term) <= most]
        self._large = [term for term in self.terms if _num_kernels(term) > most]
        self._gathered: _GatheredGradient | None = None

    def penalty(self) -> Tensor:
        """Σ of the group norms (without λ); differentiable, so that the hand-written gradient can be checked."""
        total: Tensor | None = None
        for layer, weight, inputs, outputs in self.terms:
            square = weight_GOIK(_wide(weight), layer).square()
            for wanted, dims in ((inputs, (1, 3)), (outputs, (2, 3))):
                if wanted:
                    norms = (square.sum(dims) + SMOOTHING).sqrt().sum()
                    total = norms if total is None else total + norms
        return torch.zeros(()) if total is None else total

    @torch.no_grad()
    def value(self) -> Tensor:
        """The penalty without an autograd graph."""
        return self.penalty()

    @torch.no_grad()
    def add_gradient(self, coefficient: float) -> None:
        """Add λ·∂penalty/∂w to the gradient of every penalised weight.

        Call after backward, after gradients are unscaled (AMP) and reduced (data parallelism).
        """
        for weight in self.weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        if self._small:
            strides = [term.weight.stride() for term in self._small]
            if self._gathered is None or self._gathered.strides != strides:  # another memory format since
                self._gathered = _GatheredGradient(self._small, self._by_element)
            self._gathered.add(coefficient)
        for term in self._large:
            _add_gradient(term, coefficient)

    @torch.no_grad()
    def proximal_step(self, shrinkage: float | Sequence[float]) -> None:
        """Shrink every group towards zero by `shrinkage` (= step size · λ): first input groups, then output groups.

        The joint proximal operator of overlapping groups has no closed form; the two are applied one after the other
        and each gives exact zeros. To match the strength of `add_gradient` under SGD with momentum μ, pass
        lr·λ/(1−μ): what momentum accumulates from a constant gradient (docs/method.md §1). One number for each of
        `weights` where their learning rates differ.
        """
        amounts = per_weight(shrinkage, len(self.terms))
        for (layer, weight, inputs, outputs), amount in zip(self.terms, amounts, strict=True):
            W = _wide(weight)
            for wanted, of_outputs in ((inputs, False), (outputs, True)):
                if wanted:
                    norms = _channel_sums(_squares(W, layer), W, layer, outputs=of_outputs).sqrt_()
                    shrunk = (1 - amount / norms.clamp_min_(torch.finfo(W.dtype).tiny)).clamp_min_(0)
                    W.mul_(_over_kernels(shrunk, W))
            if W is not weight:
                weight.copy_(W)

    @classmethod
    def importance(cls, model: nn.Module, groups: ChannelGroups) -> Tensor:
        """Largest |w| of every component, over all its producers and consumers (docs/method.md §2.2)."""
        return component_maxima(model, groups)

    @classmethod
    def traffic(cls, network: Network) -> int:
        """Bytes that one `add_gradient` reads and writes on a GPU."""
        return group_lasso_work(network, gpu=True).num_bytes

    @classmethod
    def launches(cls, network: Network) -> int:
        """Kernels that one `add_gradient` launches on a GPU."""
        return group_lasso_work(network, gpu=True).num_launches


def _wide(weight: Tensor) -> Tensor:
    """In float32 what is narrower: in float16 the square of 1e-4 is 0, and so is what smooths the norm."""
    return weight.float() if weight.element_size() < 4 else weight


def _squares(weight: Tensor, layer: Weighted) -> Tensor:
    """w² in the order of storage, as (groups, first axis per group, all the rest)."""
    return _storage(weight).square().view(layer.groups, weight.shape[0] // layer.groups, -1)


def _channel_sums(squares: Tensor, weight: Tensor, layer: Weighted, *, outputs: bool) -> Tensor:
    """Σw² of every output or every input channel, as (groups, first axis per group or 1, second axis or 1).

    Sums run in the order in which the weight is stored (channels last or first), and over whole rows first: in another
    order, or over the few elements of a kernel, a CPU takes many times as long.
    """
    if outputs != layer.transposed:  # of a transposed convolution the inputs come first
        return squares.sum(2, keepdim=True)
    second = weight.shape[1]
    if _is_channels_last(weight):
        return squares.view(layer.groups, -1, second).sum(1, keepdim=True)
    return squares.sum(1).view(layer.groups, second, -1).sum(2)[:, None, :]


def _over_kernels(factor: Tensor, weight: Tensor) -> Tensor:
    """A factor of shape (groups, first axis per group or 1, second axis or 1) as one that the weight broadcasts."""
    groups, _, second = factor.shape
    if groups > 1:
        factor = factor.expand(-1, weight.shape[0] // groups, -1)
    return factor.reshape(-1, second, *[1] * (weight.ndim - 2))


def _add_gradient(term: _Term, coefficient: float) -> None:
    """λ·w·(1/‖w_in‖ + 1/‖w_out‖) of one weight."""
    layer, weight = term.layer, term.weight
    W = _wide(weight)
    squares = _squares(W, layer)
    sums = [
        _channel_sums(squares, W, layer, outputs=of_outputs)
        for wanted, of_outputs in ((term.inputs, False), (term.outputs, True))
        if wanted
    ]
    del squares
    if sums:
        assert weight.grad is not None, "made by the caller"
        factor = functools.reduce(torch.add, [square.add_(SMOOTHING).rsqrt_() for square in sums])
        weight.grad.addcmul_(weight, _over_kernels(factor, weight).to(weight.dtype), value=coefficient)


class _GatheredGradient:
    """Weights of several layers as one vector, with segments for their groups of channels.

    An entry is a weight, in the order of storage, or the norm of a whole kernel, in the order (group, out, in). So the
    entries of an output channel are a segment as they stand; those of an input channel are gathered first. Sums run
    over segments, not with atomic additions, so that every rank of a data-parallel run and every repetition gets the
    same bits. Entries without a group read a factor of 0 at the end of the table of inverse norms.
    """

    def __init__(self, terms: Sequence[_Term], most: int) -> None:
        self.parts = [
            (term, term.layer.transposed or _num_kernels(term) < term.weight.numel() > most) for term in terms
        ]
        self.strides = [term.weight.stride() for term in terms]
        device, kind = terms[0].weight.device, _wide(terms[0].weight).dtype
        lengths: tuple[list[Tensor], list[Tensor]] = ([], [])  # of the groups of outputs and of inputs
        ids: tuple[list[Tensor], list[Tensor]] = ([], [])  # of each entry's group; -1: none
        gathered: list[Tensor] = []
        self.sizes: list[int] = []
        start, counts = 0, [0, 0]
        for term, by_kernel in self.parts:
            entries = _entries(term, by_kernel=by_kernel)
            size = entries.numel()
            of_output, of_input = entries.flatten(0, 1), entries.transpose(1, 2).flatten(0, 1)
            for axis, members, has in ((0, of_output, term.outputs), (1, of_input, term.inputs)):
                members = members.flatten(1)
                group = torch.full((size,), -1)
                if has:
                    numbers = torch.arange(len(members)) + counts[axis]
                    group[members.flatten()] = numbers.repeat_interleave(members.shape[1])
                if has or axis == 0:  # the segments of outputs cover the vector
                    lengths[axis].append(torch.full((len(members),), members.shape[1]))
                    counts[axis] += len(members)
                ids[axis].append(group)
            if term.inputs:
                gathered.append(of_input.flatten() + start)
            self.sizes.append(size)
            start += size
        self.offsets = [_offsets(parts).to(device) for parts in lengths]
        self.order = torch.cat([torch.empty(0, dtype=torch.int64), *gathered]).int().to(device)
        outputs, inputs = (torch.cat(parts) for parts in ids)
        none = sum(counts)
        self.output_of = torch.where(outputs < 0, none, outputs).int().to(device)
        self.input_of = torch.where(inputs < 0, none, inputs + counts[0]).int().to(device)
        self.none = torch.full((1,), torch.inf, dtype=kind, device=device)  # 1/√∞ = 0

    def add(self, coefficient: float) -> None:
        together: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for (term, by_kernel), factor in zip(self.parts, torch.split(self._factors(), self.sizes), strict=True):
            weight, gradient = term.weight, term.weight.grad
            assert gradient is not None, "made by the caller"
            if by_kernel:
                factors = factor.view(weight_GOIK(weight, term.layer).shape[:3])
                if term.layer.transposed:
                    factors = factors.transpose(1, 2)
                gradient.addcmul_(weight, _over_kernels(factors, weight).to(weight.dtype), value=coefficient)
            else:
                factor = _unstore(factor, weight).to(weight.dtype)
                for found, one in zip(together, (gradient, weight, factor), strict=True):
                    found.append(one)
        if together[0]:
            torch._foreach_addcmul_(*together, value=coefficient)

    def _factors(self) -> Tensor:
        """1/‖w_in‖ + 1/‖w_out‖ of every entry."""
        entries = [
            (_kernel_norms(term) if by_kernel else _storage(_wide(term.weight))).reshape(-1)
            for term, by_kernel in self.parts
        ]
        square = torch.cat(entries).square_()
        del entries
        sums = [torch.segment_reduce(square, "sum", offsets=self.offsets[0], unsafe=True)]
        square = square.index_select(0, self.order)
        sums.append(torch.segment_reduce(square, "sum", offsets=self.offsets[1], unsafe=True))
        del square
        table = torch.cat([*sums, self.none]).add_(SMOOTHING).rsqrt_()
        return table.index_select(0, self.output_of).add_(table.index_select(0, self.input_of))


def _entries(term: _Term, *, by_kernel: bool) -> Tensor:
    """Where in its part of the vector a layer's weights stand, as (groups, out per group, in per group, kernel)."""
    if by_kernel:
        return torch.arange(_num_kernels(term)).view(*weight_GOIK(term.weight, term.layer).shape[:3], 1)
    return weight_GOIK(_unstore(torch.arange(term.weight.numel()), term.weight), term.layer)


def _num_kernels(term: _Term) -> int:
    return math.prod(weight_GOIK(term.weight, term.layer).shape[:3])


def _kernel_norms(term: _Term) -> Tensor:
    """The norm of every kernel up to its sign, as (groups, out per group, in per group, 1)."""
    W = weight_GOIK(_wide(term.weight), term.layer)
    return W if W.shape[3] == 1 else torch.linalg.vector_norm(W, dim=3, keepdim=True)


def _offsets(lengths: Sequence[Tensor]) -> Tensor:
    """Where segments of these lengths begin, and the end of the last."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), *lengths]).cumsum(0)


def _is_channels_last(weight: Tensor) -> bool:
    """The second axis stands last in storage."""
    return not weight.is_contiguous() and weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)


def _storage(weight: Tensor) -> Tensor:
    """The weight as a contiguous view in its order of storage (channels last or first)."""
    return weight.permute(0, 2, 3, 1) if _is_channels_last(weight) else weight.contiguous()


def _unstore(vector: Tensor, weight: Tensor) -> Tensor:
    """A vector in the weight's order of storage as a tensor of the weight's shape and strides."""
    if _is_channels_last(weight):
        out, inner, height, width = weight.shape
        return vector.view(out, height, width, inner).permute(0, 3, 1, 2)
    return vector.view(weight.shape)
