"""Energy: joules by hand, and a power model that comes back from its own samples."""

import msgspec
import pytest

from ptsim.costs.energy import PowerModel, PowerSample, fit_power, price_usd, published_power, step_energy
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
