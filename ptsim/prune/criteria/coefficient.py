"""How strong is the regulariser? λ from the penalty's share of the first loss (docs/method.md Eq. 3)."""

from __future__ import annotations

from ptsim.errors import UsageError


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
            f"the run's first loss is {cross_entropy}, from which λ follows; it has to be finite and not negative",
            hint="a loss that may be negative: set pruner.penalty_coefficient before the first step",
        )
    if ratio == 0:
        return 0.0
    if not 0 < penalty < float("inf"):
        raise UsageError(f"the penalty of the initial weights is {penalty}; no λ gives the ratio {ratio}")
    return ratio * cross_entropy / ((1 - ratio) * penalty)
