"""Where a time comes from, best first, in words: the tiers of step times and of all-reduce times, and their registry.

A tier of step times is one row: its name, its place in the order, what to say of it, and the function that makes the
step where it can. `costs.step` asks the tiers in order. Another package adds one with `add_tier`, or as an entry point
of the group "ptsim.tiers".
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import msgspec

from ptsim.registry import Registry

if TYPE_CHECKING:
    from ptsim.costs.times import Measurements, StepTime
    from ptsim.hardware.spec import Device
    from ptsim.network import Network
    from ptsim.setting import StepSetting


class Tier(StrEnum):
    """The names of ptsim's own tiers, best first."""

    MEASURED = "measured"  # the trace's own profile: this architecture, mini-batch, precision and device
    PROFILED = "profiled"  # interpolated in a device profile of `ptsim calibrate gpu`
    SCALED = "scaled"  # measured elsewhere, times predicted there / predicted here
    DATASHEET = "datasheet"  # roofline with fitted efficiency curves


class StepEstimate(Protocol):
    """How a tier makes a step; None where it has nothing to make it from."""

    def __call__(self, network: Network, device: Device, setting: StepSetting, known: Measurements) -> StepTime | None:
        """One step of `network` on `device`; `known` is what was measured."""


class TierRow(msgspec.Struct, frozen=True, kw_only=True):
    """One tier.

    Attributes:
        name: what results call it.
        order: place among the tiers; a smaller one is asked first and trusted more. ptsim's own are 10, 20, 30 and 40.
        label: two words for tables.
        explanation: half a sentence on a step time's origin.
        all_reduce_explanation: the same of an all-reduce time; empty for a tier that never makes one.
        estimate: makes the step time.
    """

    name: str
    order: int
    label: str
    explanation: str
    estimate: StepEstimate
    all_reduce_explanation: str = ""


TIERS: Registry[TierRow] = Registry(
    "tier",
    entry_points="ptsim.tiers",
    own={
        Tier.MEASURED: "ptsim.costs.step:MEASURED",
        Tier.PROFILED: "ptsim.costs.step:PROFILED",
        Tier.SCALED: "ptsim.costs.step:SCALED",
        Tier.DATASHEET: "ptsim.costs.step:DATASHEET",
    },
)


def add_tier(row: TierRow) -> None:
    """Make a tier of step times available.

    Raises:
        UsageError: the name is taken.
    """
    TIERS.add(row.name, row)
    ordered_tiers.cache_clear()


def remove_tier(name: str) -> None:
    """Forget a tier that `add_tier` made."""
    TIERS.remove(name)
    ordered_tiers.cache_clear()


@functools.cache
def ordered_tiers() -> tuple[TierRow, ...]:
    """All tiers, best first."""
    return tuple(sorted((TIERS.find(name) for name in TIERS.names()), key=lambda row: row.order))


def tier_row(name: str) -> TierRow:
    """The tier called `name`, with its words.

    Raises:
        UnknownNameError: there is none.
    """
    return next((row for row in ordered_tiers() if row.name == name), None) or TIERS.find(name)


def worst_tier(names: Iterable[str]) -> str | None:
    """The least trusted of these tiers; None of none."""
    return max(names, key=lambda name: tier_row(name).order, default=None)
