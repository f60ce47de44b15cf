"""How strong is the regulariser? λ from the penalty's share of the first loss (docs/method.md Eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ptsim.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def penalty_coefficient(cross_entropy: float, penalty: float, ratio: float) -> float:
    """λ from the penalty ratio (paper, Eq. 3): r = λR/(ℓ₀ + λR), so λ = r·ℓ₀/((1−r)·R).

    Args:
        cross_entropy: ℓ₀, of the very first mini-batch before any update; may be 0 only if the ratio is.
        penalty: R(W₀), Σ of the group norms of the initial weights; may be 0 only if the ratio is.
        ratio: r in [0, 1).

    Raises:
        UsageError: a value out of its bounds.
    """
    if not 0 <= ratio < 1:
        raise UsageError(f"the penalty ratio is {ratio}; it has to be in [0, 1)")
    if not 0 <= cross_entropy < float("inf"):
        raise UsageError(
            f"the run's first loss is {cross_entropy}, from which λ follows; it has to be finite and not negative",
            hint="a loss that may be negative: set pruner.penalty_coefficient before the first step"
            if cross_entropy < 0
            else "the images, the weights or what the network computes hold a number that is not finite",
        )
    if ratio == 0:
        return 0.0
    if cross_entropy == 0:
        raise UsageError(
            f"the run's first loss is 0, of which no λ gives the ratio {ratio}",
            hint="set pruner.penalty_coefficient before the first step",
        )
    if not 0 < penalty < float("inf"):
        raise UsageError(f"the penalty of the initial weights is {penalty}; no λ gives the ratio {ratio}")
    return ratio * cross_entropy / ((1 - ratio) * penalty)


def proximal_shrinkages(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], coefficient: float) -> list[float]:
    """By how much a proximal step shrinks each weight, to match the gradient route: lr·λ·(1−d)/(1−μ) of its group.

    That is what momentum μ with dampening d accumulates from a constant gradient (docs/method.md §1). A weight that the
    optimizer does not hold, or whose group has no learning rate, stays as it is.
    """
    rates: dict[int, float] = {}
    for group in optimizer.param_groups:
        momentum = group.get("momentum") or 0.0
        carried = (1 - (group.get("dampening") or 0.0)) / (1 - momentum) if 0 < momentum < 1 else 1.0
        rate = float(group.get("lr") or 0.0) * carried
        rates.update({id(parameter): rate for parameter in group["params"]})
    return [rates.get(id(weight), 0.0) * coefficient for weight in weights]


def per_weight(shrinkage: float | Sequence[float], num_weights: int) -> Sequence[float]:
    """One number for each weight, from one for all or one for each."""
    return [shrinkage] * num_weights if isinstance(shrinkage, int | float) else shrinkage
