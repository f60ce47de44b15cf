import msgspec
import pytest

from ptsim.costs.datasheet import datasheet_step
from ptsim.costs.scaled import nearest_profile, scaled_step
from ptsim.costs.step import Measurements, step_time
from ptsim.costs.tiers import Tier
from ptsim.errors import MissingMeasurementError
from ptsim.hardware.catalog import load_device
from ptsim.network import Precision
from ptsim.setting import StepSetting
from tests.costs.test_profiled import calibrated
from tests.traces import device_info, profile_of, residual_network

A100 = load_device("a100-sxm4-40gb")
V100 = load_device("v100-sxm2-32gb")
NETWORK = residual_network()
PROFILE = profile_of(NETWORK, batch=64, device=device_info())


def fp32(batch, *, regularizer=None):
    return StepSetting(batch=batch, precision=Precision.FP32, regularizer=regularizer)


def predicted(device, batch):
    return datasheet_step(NETWORK, device, fp32(batch, regularizer="group_lasso"))


def scaled(here, there, batch=64):
    return scaled_step(
        NETWORK,
        PROFILE,
        here=predicted(here, PROFILE.batch),
        there=predicted(there, batch),
        regularizer=True,
    )


def test_on_its_own_device_and_mini_batch_scaling_changes_nothing():
    step = scaled(A100, A100)
    assert step.compute_s == pytest.approx(PROFILE.step_s)
    assert step.tier is Tier.SCALED


def test_every_layer_is_scaled_by_the_ratio_of_its_predictions():
    step = scaled(A100, V100)
    here, there = predicted(A100, 64).layers[0], predicted(V100, 64).layers[0]
    share = scaled(A100, A100).layers[0].forward_s
    assert step.layers[0].forward_s == pytest.approx(share * there.forward_s / here.forward_s)
    assert step.low_s <= step.compute_s <= step.high_s


def test_the_profile_of_the_nearest_mini_batch_is_taken():
    other = profile_of(NETWORK, batch=512, device=device_info())
    assert nearest_profile(NETWORK, [PROFILE, other], fp32(128)) is PROFILE
    assert nearest_profile(NETWORK, [PROFILE, other], fp32(300)) is other
    assert nearest_profile(NETWORK, [], fp32(300)) is None


def test_a_step_is_measured_here_scaled_elsewhere_and_from_the_data_sheet_without_measurements():
    def tier(device, batch, measurements):
        return step_time(NETWORK, device, fp32(batch, regularizer="group_lasso"), measurements=measurements).tier

    known = Measurements(profiles=(PROFILE,), source_device=A100)
    assert tier(A100, 64, known) is Tier.MEASURED
    assert tier(A100, 32, known) is Tier.SCALED
    assert tier(V100, 64, known) is Tier.SCALED
    assert tier(V100, 64, None) is Tier.DATASHEET
    assert tier(V100, 64, Measurements(profiles=(PROFILE,))) is Tier.DATASHEET


def test_a_device_profile_of_another_device_is_an_error_and_no_silent_data_sheet():
    foreign = Measurements(device_profile=calibrated(NETWORK))
    with pytest.raises(MissingMeasurementError, match="measured on 'Formula', which is not the v100-sxm2-32gb"):
        step_time(NETWORK, V100, fp32(32), measurements=foreign)


def test_a_device_profile_of_this_device_is_used_for_what_the_trace_did_not_measure():
    own = msgspec.structs.replace(calibrated(NETWORK), device="Tesla V100-SXM2-32GB")
    step = step_time(NETWORK, V100, fp32(32), measurements=Measurements(device_profile=own))
    assert step.tier is Tier.PROFILED
    half = StepSetting(batch=32, precision=Precision.FP16)
    with pytest.raises(MissingMeasurementError, match="holds fp32 contiguous, not fp16 contiguous"):
        step_time(NETWORK, V100, half, measurements=Measurements(device_profile=own))
