"""The settings of PruneTrain beside the few that everybody sets, and what is allowed of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from ptsim.errors import UnknownNameError, UsageError
from ptsim.prune.density import THRESHOLD, checked_threshold
from ptsim.setting import as_plain, positive_number, real_number


class PruneSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of PruneTrain that are seldom changed; `PruneTrain` takes them as keywords.

    Attributes:
        criterion: what pushes channels towards zero: "group_lasso", "slimming", or another package's.
        regularizer: the penalty as a gradient, or as a proximal step after every update.
        threshold: a channel is sparse when its largest |w| is below.
        mode: what channels that meet at a sum keep: their union, or each branch its own through gathers (gating).
        channel_multiple: kept channel counts are rounded up to a multiple.
        memory_budget_bytes: per rank, for `PruneTrain.batch`; None is the device's memory.
        batch_granularity, max_batch: `PruneTrain.batch` grows by multiples of the one, up to the other.
        lr_rule: how `PruneTrain.learning_rate_scale` follows the mini-batch.
        profile: measure every architecture layer by layer; takes a second copy of the network for a moment.
        channel_maxima: the largest |w| of every output channel goes into the trace.
    """

    criterion: str = "group_lasso"
    regularizer: Literal["gradient", "proximal"] = "gradient"
    threshold: float = THRESHOLD
    mode: Literal["union", "gating"] = "union"
    channel_multiple: int = 1
    memory_budget_bytes: int | None = None
    batch_granularity: int = 32
    max_batch: int | None = None
    lr_rule: Literal["linear", "sqrt"] = "linear"
    profile: bool = False
    channel_maxima: bool = False


def make_settings(settings: Mapping[str, Any]) -> PruneSettings:
    """The checked settings.

    Raises:
        UnknownNameError: no such setting.
        UsageError: a value of the wrong type or out of its bounds.
    """
    for name in settings:
        if name not in PruneSettings.__struct_fields__:
            raise UnknownNameError("setting of PruneTrain", name, PruneSettings.__struct_fields__)
    try:
        made = msgspec.convert(as_plain(dict(settings)), PruneSettings)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$.")
        raise UsageError(f"setting {place.rstrip('`')!r}: {problem.replace('`', '')}") from error
    for name in ("channel_multiple", "batch_granularity", "max_batch", "memory_budget_bytes"):
        value = getattr(made, name)
        if value is not None and value < 1:
            raise UsageError(f"setting {name!r} is {value}, expected at least 1")
    checked_threshold(made.threshold)
    return made


def checked_plan(penalty_ratio: float, interval: int) -> tuple[float, int]:
    """The two settings that everybody gives.

    Raises:
        UsageError: one is no number, or out of its bounds.
    """
    ratio, epochs = real_number("penalty_ratio", penalty_ratio), positive_number("interval", interval)
    if not 0 <= ratio < 1:
        raise UsageError(f"penalty_ratio is {ratio:g}, expected in [0, 1)")
    return ratio, epochs


def recorded(settings: PruneSettings, *, penalty_ratio: float, interval: int) -> dict[str, Any]:
    """What of them a trace says: everything that decides how a network shrinks."""
    names = ("threshold", "mode", "channel_multiple", "regularizer", "criterion")
    told = {name: getattr(settings, name) for name in names}
    return {"penalty_ratio": penalty_ratio, "interval": interval, **told}
