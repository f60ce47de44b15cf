"""Energy: joules by hand, and a power model that comes back from its own samples."""

import msgspec
import pytest

from ptsim.costs.energy import (
    PowerModel,
    PowerSample,
    fit_power,
    is_plausible,
    price_usd,
    published_power,
    step_energy,
)
from ptsim.costs.tiers import Tier
from ptsim.costs.times import LayerTime, StepTime
from ptsim.errors import MissingMeasurementError
from ptsim.hardware.catalog import load_device
from ptsim.network import LayerKind

A100 = load_device("a100")


def step(conv_s=1.0, norm_s=0.5, overhead_s=0.0):
    def layer(kind, seconds):
        return LayerTime(layer=kind, kind=kind, forward_s=seconds / 3, backward_s=2 * seconds / 3, tier=Tier.MEASURED)

    total = conv_s + norm_s + overhead_s
    return StepTime(
        layers=(layer(LayerKind.CONV, conv_s), layer(LayerKind.BATCH_NORM, norm_s)),
        optimizer_s=0.0,
        regularizer_s=0.0,
        overhead_s=overhead_s,
        low_s=0.9 * total,
        high_s=1.1 * total,
        tier=Tier.MEASURED,
    )


MODEL = PowerModel(product_w=300, stream_w=200, waiting_w=100, relative_error=0.1, source="test")


def test_joules_are_watts_times_seconds_of_each_activity():
    energy = step_energy(step(1.0, 0.5, 0.25), A100, waiting_s=0.25, model=MODEL)
    assert energy.joules == pytest.approx(300 * 1.0 + 200 * 0.5 + 100 * 0.5)
    assert energy.mean_power_w == pytest.approx(450 / 2)


def test_errors_of_time_and_power_add_by_squares():
    energy = step_energy(step(), A100, model=MODEL)
    assert energy.high_j / energy.joules - 1 == pytest.approx((0.1**2 + 0.1**2) ** 0.5)
    assert energy.low_j < energy.joules < energy.high_j


def test_the_published_model_stays_between_idle_power_and_board_limit():
    model = published_power(A100)
    assert A100.idle_power_w < model.waiting_w < model.stream_w < model.product_w < A100.power_w


def test_a_fit_recovers_the_powers_that_made_the_samples():
    steps = [(step(c, n), w) for c, n, w in [(1, 0, 0), (0, 1, 0), (1, 1, 3), (2, 1, 0), (1, 3, 1), (0.1, 0.1, 4)]]
    samples = [
        PowerSample(step=s, waiting_s=w, power_w=step_energy(s, A100, waiting_s=w, model=MODEL).mean_power_w)
        for s, w in steps
    ] * 10
    model = fit_power(A100, samples)
    assert model.product_w == pytest.approx(300, rel=0.03)
    assert model.stream_w == pytest.approx(200, rel=0.03)
    assert model.waiting_w == pytest.approx(100, rel=0.06)
    assert model.source == "NVML samples"


def test_a_fit_explains_the_mean_power_even_of_a_single_composition():
    samples = [PowerSample(step=step(), waiting_s=0.1, power_w=250.0)] * 20
    energy = step_energy(step(), A100, waiting_s=0.1, model=fit_power(A100, samples))
    assert energy.mean_power_w == pytest.approx(250, rel=0.01)


@pytest.mark.parametrize("absurd_w", [0.0, -5.0, 4e6, 3.0])
def test_a_power_that_the_board_cannot_have_is_no_sample(absurd_w):
    good = [PowerSample(step=step(), waiting_s=0.1, power_w=250.0)] * 8
    assert fit_power(A100, [*good, PowerSample(step=step(), waiting_s=0.1, power_w=absurd_w)]) == fit_power(A100, good)
    with pytest.raises(MissingMeasurementError):
        fit_power(A100, [PowerSample(step=step(), waiting_s=0.1, power_w=absurd_w)])


def test_one_sample_makes_the_model_less_sure_than_many():
    sample = PowerSample(step=step(), waiting_s=0.1, power_w=250.0)
    few, many = fit_power(A100, [sample]), fit_power(A100, [sample] * 10)
    assert published_power(A100).relative_error > few.relative_error > many.relative_error == 0.05


def test_without_samples_there_is_no_fit():
    with pytest.raises(MissingMeasurementError, match="no power was sampled on a100-sxm4-40gb"):
        fit_power(A100, [])


def test_money_is_gpus_times_hours_times_price():
    assert price_usd(7200, 8, 2.5) == pytest.approx(40.0)
    with pytest.raises(ValueError, match="negative"):
        price_usd(-1, 8, 2.5)


def test_a_negative_waiting_time_is_refused():
    with pytest.raises(ValueError, match="negative"):
        step_energy(step(), A100, waiting_s=-1.0)


def test_a_step_that_takes_no_time_takes_no_energy():
    nothing = msgspec.structs.replace(step(), layers=(), low_s=0.0, high_s=0.0)
    assert step_energy(nothing, A100).joules == 0


def test_the_published_model_by_hand():
    """Of the 350 W between 50 W idle and the limit of 400 W: 85 % while it multiplies, 65 % streaming, 25 % waiting."""
    assert published_power(A100) == PowerModel(
        product_w=pytest.approx(347.5),
        stream_w=pytest.approx(277.5),
        waiting_w=pytest.approx(137.5),
        relative_error=0.25,
        source="assumed",
    )


def test_the_update_and_the_penalty_stream_memory():
    longer = msgspec.structs.replace(step(1.0, 0.5), optimizer_s=0.25, regularizer_s=0.125)
    assert step_energy(longer, A100, model=MODEL).joules == pytest.approx(300 + 200 * (0.5 + 0.25 + 0.125))


@pytest.mark.parametrize(
    ("low_s", "high_s", "error", "low", "high"),
    [
        (0.7, 1.4, 0.3, 1 - 0.3 * 2**0.5, 1.5),  # 3-4-5
        (0.6, 1.3, 0.3, 0.5, 1 + 0.3 * 2**0.5),
        (0.2, 1.0, 0.9, 0.0, 1.9),  # no energy is less than none
    ],
)
def test_the_interval_of_energy_by_hand(low_s, high_s, error, low, high):
    one = msgspec.structs.replace(step(1.0, 0.0), low_s=low_s, high_s=high_s)
    energy = step_energy(one, A100, model=msgspec.structs.replace(MODEL, relative_error=error))
    assert (energy.low_j, energy.high_j) == pytest.approx((300 * low, 300 * high))


def test_the_interval_of_time_is_relative_to_the_steps_own_length():
    """2 s of multiplying, 1.4 to 2.8 of them: as far from 600 J as 0.7 and 1.4 of one second from 300."""
    two = msgspec.structs.replace(step(2.0, 0.0), low_s=1.4, high_s=2.8)
    energy = step_energy(two, A100, model=msgspec.structs.replace(MODEL, relative_error=0.3))
    assert (energy.low_j, energy.high_j) == pytest.approx((600 * (1 - 0.3 * 2**0.5), 600 * 1.5))


def test_a_gpu_that_only_waits_draws_the_power_of_waiting():
    nothing = msgspec.structs.replace(step(), layers=(), low_s=0.0, high_s=0.0)
    assert step_energy(nothing, A100, model=MODEL).mean_power_w == 100
    waited = step_energy(nothing, A100, waiting_s=2.0, model=MODEL)
    assert (waited.joules, waited.low_j, waited.high_j) == pytest.approx((200, 180, 220))


@pytest.mark.parametrize(
    ("power_w", "plausible"), [(24.9, False), (25.0, True), (400.0, True), (600.0, True), (600.1, False)]
)
def test_a_mean_power_is_at_least_half_of_idle_and_at_most_half_as_much_again_as_the_limit(power_w, plausible):
    assert is_plausible(A100, power_w) is plausible


def test_a_fit_is_as_unsure_as_its_samples_scatter():
    """250 W in the mean, 20 % more and less: 1.645 times 0.2. Nothing draws more than a tenth over the limit's span."""
    samples = [PowerSample(step=step(), waiting_s=0.1, power_w=power_w) for power_w in (200.0, 300.0)] * 20
    assert fit_power(A100, samples).relative_error == pytest.approx(0.329, rel=0.01)
    full = [PowerSample(step=step(1.0, 0.0), waiting_s=0.0, power_w=600.0)] * 20
    assert fit_power(A100, full).product_w == pytest.approx(50 + 1.1 * 350, rel=1e-3)


@pytest.mark.parametrize(("samples", "error"), [(1, 0.125), (3, 0.0625), (4, 0.05), (9, 0.05)])
def test_the_assumptions_error_is_shared_out_over_the_samples(samples, error):
    """0.25 over one more than there are, and not less than the 5 % of NVML itself."""
    drawn = step_energy(step(), A100, waiting_s=0.1).mean_power_w
    model = fit_power(A100, [PowerSample(step=step(), waiting_s=0.1, power_w=drawn)] * samples)
    assert model.relative_error == pytest.approx(error)


@pytest.mark.parametrize("wrong", [(-1.0, 1, 1.0), (1.0, -1, 1.0), (1.0, 1, -1.0)])
def test_no_time_count_or_price_is_negative(wrong):
    with pytest.raises(ValueError, match="negative"):
        price_usd(*wrong)
    assert price_usd(0.0, 8, 2.5) == price_usd(3600, 0, 2.5) == price_usd(3600, 8, 0.0) == 0


def test_the_assumption_weighs_a_tenth_of_a_sample_and_nobody_draws_less_than_when_idle():
    """One sample at half of the 350 W above idle: (0.5 + 0.1 · 0.85) / 1.1 of them; none of streaming and waiting."""
    only = PowerSample(step=step(1.0, 0.0), waiting_s=0.0, power_w=225.0)
    model = fit_power(A100, [only])
    assert model.product_w == pytest.approx(50 + 350 * 0.585 / 1.1)
    assert (model.stream_w, model.waiting_w) == pytest.approx((277.5, 137.5))
    less = fit_power(A100, [msgspec.structs.replace(only, power_w=30.0)] * 20)
    assert less.product_w == pytest.approx(50, abs=1e-6)
