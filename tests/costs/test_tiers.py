"""One ordered list of tiers with its words; another package adds a tier as one row."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

import ptsim
from ptsim.costs.datasheet import datasheet_step
from ptsim.costs.step import Measurements, StepTime, step_time
from ptsim.costs.tiers import Tier, TierRow, add_tier, ordered_tiers, remove_tier, tier_row, worst_tier
from ptsim.errors import UnknownNameError, UsageError
from ptsim.hardware.catalog import load_device
from ptsim.hardware.spec import Device
from ptsim.network import Network
from ptsim.setting import StepSetting
from tests.traces import residual_network

NETWORK = residual_network()


def test_the_order_is_that_of_trust_and_every_tier_has_its_words() -> None:
    assert [row.name for row in ordered_tiers()] == ["measured", "profiled", "scaled", "datasheet"]
    assert all(row.label and row.explanation for row in ordered_tiers())
    assert worst_tier(["scaled", "measured", "datasheet", "profiled"]) == "datasheet"
    assert worst_tier(["scaled", "measured"]) == "scaled"
    assert worst_tier([]) is None
    with pytest.raises(UnknownNameError, match="unknown tier 'guessed'; known: datasheet, measured"):
        tier_row("guessed")


def test_all_reduces_have_words_for_the_tiers_that_they_come_from_and_no_others() -> None:
    """`costs.collectives` makes measured, scaled and datasheet times."""
    assert {row.name for row in ordered_tiers() if row.all_reduce_explanation} == {"measured", "scaled", "datasheet"}


def _halved(network: Network, device: Device, setting: StepSetting, known: Measurements) -> StepTime | None:
    if device.architecture != "turing":
        return None
    step = datasheet_step(network, device, setting)
    layers = tuple(
        msgspec.structs.replace(t, forward_s=t.forward_s / 2, backward_s=t.backward_s / 2, tier="halved")
        for t in step.layers
    )
    return msgspec.structs.replace(step, layers=layers, tier="halved")


@pytest.fixture
def halved() -> Iterator[TierRow]:
    row = TierRow(name="halved", order=35, label="halved", explanation="half of the data sheet", estimate=_halved)
    add_tier(row)
    yield row
    remove_tier("halved")


def test_a_tier_from_outside_is_asked_in_its_place(halved: TierRow) -> None:
    setting = StepSetting(batch=32)
    turing, ampere = load_device("t4"), load_device("a100")
    assert step_time(NETWORK, ampere, setting).tier == Tier.DATASHEET
    ours = step_time(NETWORK, turing, setting)
    assert ours.tier == "halved"
    assert ours.forward_s == pytest.approx(datasheet_step(NETWORK, turing, setting).forward_s / 2)
    prediction = ptsim.predict(NETWORK, gpu="t4", batch=32)
    assert prediction.tier == "halved"
    assert msgspec.to_builtins(prediction)["tier"] == "halved"
    assert tier_row("halved").explanation == "half of the data sheet"
    assert worst_tier(["halved", "scaled"]) == "halved"
    with pytest.raises(UsageError, match="exists already"):
        add_tier(TierRow(name="measured", order=1, label="l", explanation="e", estimate=_halved))


def test_without_it_the_data_sheet_answers_again() -> None:
    assert step_time(NETWORK, load_device("t4"), StepSetting(batch=32)).tier == Tier.DATASHEET
