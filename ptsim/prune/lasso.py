"""What pushes channels towards zero: PruneTrain's group lasso and its λ.

Eq. 2 of the paper: the penalty is the sum of the Euclidean norms of all input-channel and all output-channel groups,
one λ for all, no size factor, norms smoothed as √(Σw² + 1e-8). The two groups of a weight overlap on it, so its
gradient is λ·w·(1/‖w_out‖ + 1/‖w_in‖): written by hand, without an autograd graph (METHOD.md §1).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptsim.errors import UsageError
from ptsim.prune.groups import ChannelGroups, weight_GOIK

SMOOTHING = 1e-8  # METHOD.md §1


class GroupLasso:
    """The penalty Σ‖W_g‖ of a model's channel groups, its gradient and its proximal step.

    Holds references to the model's parameters: make a new one after every reconfiguration.
    """

    def __init__(self, model: nn.Module, groups: ChannelGroups) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.terms = [(layer, parameters[layer.weight], inp, out) for layer, inp, out in groups.penalised()]

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
        for layer, weight, inputs, outputs in self.terms:
            W = weight_GOIK(weight, layer)
            square = W.square()
            factor: Tensor | float = 0.0
            if inputs:
                factor = (square.sum((1, 3), keepdim=True) + SMOOTHING).rsqrt()
            if outputs:
                factor = factor + (square.sum((2, 3), keepdim=True) + SMOOTHING).rsqrt()
            gradient = (W * factor).mul_(coefficient)
            if layer.transposed:
                gradient = gradient.reshape(weight.shape[1], weight.shape[0], *weight.shape[2:]).transpose(0, 1)
            gradient = gradient.reshape(weight.shape)
            if weight.grad is None:
                weight.grad = gradient.clone(memory_format=torch.preserve_format)
            else:
                weight.grad.add_(gradient)

    @torch.no_grad()
    def proximal_step(self, shrinkage: float) -> None:
        """Shrink every group towards zero by `shrinkage` (= step size · λ): first input groups, then output groups.

        The joint proximal operator of overlapping groups has no closed form; the two are applied one after the other
        and each gives exact zeros. To match the strength of `add_gradient` under SGD with momentum μ, pass
        lr·λ/(1−μ): what momentum accumulates from a constant gradient (METHOD.md §1).
        """
        for layer, weight, inputs, outputs in self.terms:
            W = weight_GOIK(weight, layer)
            for wanted, dims in ((inputs, (1, 3)), (outputs, (2, 3))):
                if wanted:
                    norms = W.square().sum(dims, keepdim=True).sqrt()
                    W = W * (1 - shrinkage / norms.clamp_min(torch.finfo(W.dtype).tiny)).clamp_min(0)
            if layer.transposed:
                W = W.reshape(weight.shape[1], weight.shape[0], *weight.shape[2:]).transpose(0, 1)
            weight.copy_(W.reshape(weight.shape))


def penalty_coefficient(cross_entropy: float, penalty: float, ratio: float) -> float:
    """λ from the penalty ratio (paper, Eq. 3): r = λR/(ℓ₀ + λR), so λ = r·ℓ₀/((1−r)·R).

    Args:
        cross_entropy: ℓ₀, of the very first mini-batch before any update.
        penalty: R(W₀), Σ of the group norms of the initial weights; may be 0 only if the ratio is.
        ratio: r in [0, 1).

    Raises:
        UsageError: a value out of its bounds.
    """
    if not 0 <= ratio < 1:
        raise UsageError(f"the penalty ratio is {ratio}; it has to be in [0, 1)")
    if not 0 <= cross_entropy < float("inf"):
        raise UsageError(
            f"the first mini-batch's cross-entropy is {cross_entropy}; it has to be finite and not negative"
        )
    if ratio == 0:
        return 0.0
    if not 0 < penalty < float("inf"):
        raise UsageError(f"the penalty of the initial weights is {penalty}; no λ gives the ratio {ratio}")
    return ratio * cross_entropy / ((1 - ratio) * penalty)
