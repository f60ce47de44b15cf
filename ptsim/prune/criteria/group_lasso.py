"""PruneTrain's group lasso: its value, its gradient and its proximal step.

Eq. 2 of the paper: the penalty is the sum of the Euclidean norms of all input-channel and all output-channel groups,
one λ for all, no size factor, norms smoothed as √(Σw² + 1e-8). The two groups of a weight overlap on it, so its
gradient is λ·w·(1/‖w_out‖ + 1/‖w_in‖): written by hand, without an autograd graph (docs/method.md §1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ptsim.criteria import group_lasso_work
from ptsim.network import Network
from ptsim.prune.groups import ChannelGroups, component_maxima, weight_GOIK
from ptsim.prune.labels import Weighted

SMOOTHING = 1e-8  # docs/method.md §1


class GroupLasso:
    """The penalty Σ‖W_g‖ of a model's channel groups, its gradient and its proximal step.

    Holds references to the model's parameters: make a new one after every reconfiguration.

    `form`: "flat" computes the gradient of all layers in about 20 kernels, "per_tensor" in about 13 per layer, layer by
    layer in the cache; the default is flat on a GPU, where launches count, and per tensor on a CPU, where memory does
    (the flat form was 9 times slower there).
    """

    label: ClassVar[str] = "group lasso"

    def __init__(
        self, model: nn.Module, groups: ChannelGroups, *, form: Literal["per_tensor", "flat"] | None = None
    ) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.terms = [(layer, parameters[layer.weight], inp, out) for layer, inp, out in groups.penalised()]
        self.weights: Sequence[nn.Parameter] = [weight for _, weight, _, _ in self.terms]
        if form is None:
            form = "flat" if self.terms and all(weight.is_cuda for _, weight, _, _ in self.terms) else "per_tensor"
        self.form = form
        self._flat: _FlatGradient | None = None

    def penalty(self) -> Tensor:
        """Σ of the group norms (without λ); differentiable, so that the hand-written gradient can be checked."""
        total: Tensor | None = None
        for layer, weight, inputs, outputs in self.terms:
            square = weight_GOIK(weight, layer).square()
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
        for _, weight, _, _ in self.terms:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight, memory_format=torch.preserve_format)
        if self.form == "flat" and self.terms:
            if self._flat is None:
                self._flat = _FlatGradient(self.terms)
            self._flat.add(coefficient)
            return
        for layer, weight, inputs, outputs in self.terms:
            W = weight_GOIK(weight, layer)
            square = W.square()
            factor: Tensor | float = 0.0
            if inputs:
                factor = (square.sum((1, 3), keepdim=True) + SMOOTHING).rsqrt()
            if outputs:
                factor = factor + (square.sum((2, 3), keepdim=True) + SMOOTHING).rsqrt()
            assert weight.grad is not None, "made above"
            weight.grad.add_(_like_weight(W * factor, layer, weight), alpha=coefficient)

    @torch.no_grad()
    def proximal_step(self, shrinkage: float) -> None:
        """Shrink every group towards zero by `shrinkage` (= step size · λ): first input groups, then output groups.

        The joint proximal operator of overlapping groups has no closed form; the two are applied one after the other
        and each gives exact zeros. To match the strength of `add_gradient` under SGD with momentum μ, pass
        lr·λ/(1−μ): what momentum accumulates from a constant gradient (docs/method.md §1).
        """
        for layer, weight, inputs, outputs in self.terms:
            W = weight_GOIK(weight, layer)
            for wanted, dims in ((inputs, (1, 3)), (outputs, (2, 3))):
                if wanted:
                    norms = W.square().sum(dims, keepdim=True).sqrt()
                    W = W * (1 - shrinkage / norms.clamp_min(torch.finfo(W.dtype).tiny)).clamp_min(0)
            weight.copy_(_like_weight(W, layer, weight))

    @classmethod
    def importance(cls, model: nn.Module, groups: ChannelGroups) -> Tensor:
        """Largest |w| of every component, over all its producers and consumers (docs/method.md §2.2)."""
        return component_maxima(model, groups)

    @classmethod
    def traffic(cls, network: Network) -> int:
        """Bytes that one `add_gradient` reads and writes."""
        return group_lasso_work(network).num_bytes

    @classmethod
    def launches(cls, network: Network) -> int:
        """Kernels that one `add_gradient` launches on a GPU."""
        return group_lasso_work(network).num_launches


def _like_weight(W_GOIK: Tensor, layer: Weighted, weight: Tensor) -> Tensor:
    if layer.transposed:
        return W_GOIK.reshape(weight.shape[1], weight.shape[0], *weight.shape[2:]).transpose(0, 1)
    return W_GOIK.reshape(weight.shape)


class _FlatGradient:
    """All penalised weights as one vector, in their order of storage, with segments for their groups.

    Sums run over contiguous segments, not with atomic additions, so that every rank of a data-parallel run and every
    repetition gets the same bits. Elements without an input (output) group read a factor of 0 at the end of the table.
    """

    def __init__(self, terms: Sequence[tuple[Weighted, nn.Parameter, bool, bool]]) -> None:
        self.weights = [weight for _, weight, _, _ in terms]
        device = self.weights[0].device
        orders: dict[str, list[Tensor]] = {"in": [], "out": []}
        lengths: dict[str, list[Tensor]] = {"in": [], "out": []}
        groups_of: dict[str, list[Tensor]] = {"in": [], "out": []}
        counts = {"in": 0, "out": 0}
        start = 0
        for layer, weight, inputs, outputs in terms:
            G = weight_GOIK(_unstore(torch.arange(weight.numel()), weight), layer)
            for role, wanted, order in (("in", inputs, (0, 2, 1, 3)), ("out", outputs, (0, 1, 2, 3))):
                group = torch.full((weight.numel(),), -1)
                if wanted:
                    members = G.permute(order).reshape(G.shape[order[0]] * G.shape[order[1]], -1)
                    orders[role].append(members.flatten() + start)
                    lengths[role].append(torch.full((len(members),), members.shape[1]))
                    ids = torch.arange(len(members)) + counts[role]
                    group[members.flatten()] = ids.repeat_interleave(members.shape[1])
                    counts[role] += len(members)
                groups_of[role].append(group)
            start += weight.numel()

        def joined(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

        self.lengths = joined(lengths["in"] + lengths["out"]).to(device)
        self.order = joined(orders["in"] + orders["out"]).to(device)
        total = counts["in"] + counts["out"]
        in_of, out_of = joined(groups_of["in"]), joined(groups_of["out"])
        self.in_of = torch.where(in_of < 0, total, in_of).to(device)
        self.out_of = torch.where(out_of < 0, total, out_of + counts["in"]).to(device)
        self.sizes = [weight.numel() for weight in self.weights]

    def add(self, coefficient: float) -> None:
        vector = torch.cat([_storage(weight).view(-1) for weight in self.weights])
        square = vector.square().index_select(0, self.order)
        sums = torch.segment_reduce(square, "sum", lengths=self.lengths, unsafe=True)
        table = nn.functional.pad(sums.add_(SMOOTHING).rsqrt_(), (0, 1))
        factor = table.index_select(0, self.in_of).add_(table.index_select(0, self.out_of))
        parts = torch.split(vector.mul_(factor), self.sizes)
        gradients, additions = [], []
        for weight, part in zip(self.weights, parts, strict=True):
            assert weight.grad is not None, "made by the caller"
            gradients.append(weight.grad)
            additions.append(_unstore(part, weight))
        torch._foreach_add_(gradients, additions, alpha=coefficient)


def _storage(weight: Tensor) -> Tensor:
    """The weight as a contiguous view in its order of storage (channels last or first)."""
    if not weight.is_contiguous() and weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        return weight.permute(0, 2, 3, 1)
    return weight.contiguous()


def _unstore(vector: Tensor, weight: Tensor) -> Tensor:
    """A vector in the weight's order of storage as a tensor of the weight's shape and strides."""
    if not weight.is_contiguous() and weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        out, inner, height, width = weight.shape
        return vector.view(out, height, width, inner).permute(0, 3, 1, 2)
    return vector.view(weight.shape)
