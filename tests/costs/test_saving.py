"""The interval of a saving: a share of the logarithm of the ratio, and what two equal runs differ by."""

from __future__ import annotations

import math

import pytest

from ptsim.costs.saving import SavingError, saving_errors, saving_interval
from ptsim.costs.tiers import Tier


def test_every_tier_has_a_measured_error_with_a_source() -> None:
    assert set(saving_errors()) == set(Tier)
    assert all(error.source and 0 <= error.share < 1 and error.floor > 0 for error in saving_errors().values())


def test_the_width_by_hand() -> None:
    error = SavingError(share=0.3, floor=0.4, source="made up")
    assert error.half_width(math.exp(-1)) == pytest.approx(0.5)  # a 3-4-5 triangle
    assert error.half_width(1.0) == pytest.approx(0.4)


def test_a_saving_of_nothing_is_only_as_unsure_as_two_equal_runs() -> None:
    low, high = saving_interval(1.0, Tier.DATASHEET)
    assert (low, high) == pytest.approx((math.exp(-0.02), math.exp(0.02)))


def test_planned_draws_widen_it_as_an_independent_error() -> None:
    half = saving_errors()[Tier.DATASHEET].half_width(0.7)
    low, high = saving_interval(0.7, Tier.DATASHEET, draws=0.1)
    assert math.log(high / 0.7) == pytest.approx(math.hypot(half, 0.1645))
    assert low * high == pytest.approx(0.49)


def test_a_saving_of_a_third_is_known_to_eight_points_at_the_data_sheet_tier() -> None:
    low, high = saving_interval(0.67, Tier.DATASHEET)
    assert 0.67 - low < 0.08
    assert high - 0.67 < 0.09


@pytest.mark.parametrize("tier", [Tier.MEASURED, Tier.PROFILED])
def test_a_step_measured_on_the_device_narrows_the_saving(tier: Tier) -> None:
    half = math.hypot(0.03, 0.04)  # of two times known to 3 and to 4 %
    low, high = saving_interval(0.7, tier, independent=half)
    assert (low, high) == pytest.approx((0.7 * math.exp(-0.05), 0.7 * math.exp(0.05)))


def test_a_calibrated_saving_is_no_surer_than_two_equal_runs() -> None:
    low, high = saving_interval(0.7, Tier.PROFILED, independent=0.001)
    assert high / low == pytest.approx(math.exp(0.04))


def test_interpolated_layers_err_whatever_the_saving_is() -> None:
    widths = {ratio: saving_interval(ratio, Tier.PROFILED, independent=1.0) for ratio in (0.5, 0.95)}
    assert widths[0.5][1] / 0.5 == pytest.approx(widths[0.95][1] / 0.95)


def test_what_a_data_sheet_predicts_takes_no_narrower_interval_from_its_times() -> None:
    assert saving_interval(0.7, Tier.DATASHEET, independent=0.03) == saving_interval(0.7, Tier.DATASHEET)


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.nan, math.inf])
def test_a_ratio_that_is_none_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="expected a positive number"):
        saving_interval(ratio, Tier.DATASHEET)
