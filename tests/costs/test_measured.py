import msgspec
import pytest

from ptsim.costs.measured import find_profile, measured_step, of_profile
from ptsim.costs.tiers import Tier
from ptsim.errors import MissingMeasurementError
from ptsim.network import Parameter, Precision
from ptsim.setting import StepSetting
from ptsim.trace.schema import LayerProfile
from tests.traces import device_info, profile_of, residual_network

NETWORK = residual_network()
PROFILE = profile_of(NETWORK, batch=64, device=device_info())


def fp32(batch, *, regularizer=None):
    return StepSetting(batch=batch, precision=Precision.FP32, regularizer=regularizer)


def test_a_profiled_step_takes_what_the_whole_steps_took_and_its_layers_share_it_out():
    doubled = msgspec.structs.replace(
        PROFILE,
        layers=tuple(
            LayerProfile(layer=p.layer, forward_s=2 * p.forward_s, backward_s=p.backward_s) for p in PROFILE.layers
        ),
    )
    step = measured_step(NETWORK, [doubled], fp32(64, regularizer="group_lasso"))
    assert step.compute_s == pytest.approx(PROFILE.step_s)
    assert step.forward_s == pytest.approx(PROFILE.forward_s)
    assert step.backward_s == pytest.approx(PROFILE.backward_s)
    assert step.layers[0].forward_s == pytest.approx(PROFILE.layers[0].forward_s)
    assert step.tier is Tier.MEASURED
    assert {layer.tier for layer in step.layers} == {Tier.MEASURED}


def test_without_the_group_lasso_its_measured_time_is_left_out():
    step = measured_step(NETWORK, [PROFILE], fp32(64))
    assert step.compute_s == pytest.approx(PROFILE.step_s - PROFILE.regularizer_s)
    assert step.regularizer_s == 0


def test_the_interval_is_the_range_of_the_whole_steps():
    spread = msgspec.structs.replace(PROFILE, step_low_s=0.9 * PROFILE.step_s, step_high_s=1.3 * PROFILE.step_s)
    step = measured_step(NETWORK, [spread], fp32(64, regularizer="group_lasso"))
    assert (step.low_s, step.high_s) == pytest.approx((0.9 * PROFILE.step_s, 1.3 * PROFILE.step_s))


def test_the_interval_of_a_step_without_the_penalty_is_as_wide_relative_to_it():
    """4 s, of which the penalty took 1; the fastest step took 3 s, the slowest 6."""
    parts = {"forward_s": 1.0, "backward_s": 1.5, "optimizer_s": 0.5, "regularizer_s": 1.0, "step_s": 4.0}
    profile = msgspec.structs.replace(PROFILE, **parts, step_low_s=3.0, step_high_s=6.0)
    step = measured_step(NETWORK, [profile], fp32(64))
    assert (step.low_s, step.compute_s, step.high_s) == pytest.approx((2.25, 3.0, 4.5))


def test_a_step_whose_spread_nobody_recorded_is_as_unsure_as_the_sum_of_its_layers_is_wrong():
    """By a fifth of the step: the layers took longer than the passes, which took no time, or the passes did."""
    layers_s = sum(layer.forward_s + (layer.backward_s or 0.0) for layer in PROFILE.layers)
    for passes_s in (0.0, 2 * layers_s):
        half = {"forward_s": passes_s / 2, "backward_s": passes_s / 2, "step_s": 5 * layers_s}
        step = measured_step(NETWORK, [msgspec.structs.replace(PROFILE, **half)], fp32(64, regularizer="group_lasso"))
        assert step.compute_s == pytest.approx(5 * layers_s)
        assert (step.low_s, step.high_s) == pytest.approx((5 * layers_s / 1.2, 5 * layers_s * 1.2))


def test_the_interval_holds_the_step_whatever_was_recorded_as_the_fastest_and_the_slowest():
    for low, high in ((1.1, 1.2), (0.8, 0.9)):
        profile = msgspec.structs.replace(PROFILE, step_low_s=low * PROFILE.step_s, step_high_s=high * PROFILE.step_s)
        step = measured_step(NETWORK, [profile], fp32(64, regularizer="group_lasso"))
        expected = (min(low, 1.0) * PROFILE.step_s, max(high, 1.0) * PROFILE.step_s)
        assert (step.low_s, step.high_s) == pytest.approx(expected)


def test_a_device_profile_keeps_the_passes_the_layers_and_the_tensors_that_learn_apart():
    idle = Parameter(name="idle", layer="", shape=(1000,))
    network = msgspec.structs.replace(NETWORK, parameters=(*NETWORK.parameters, idle))
    forward_s, backward_s = (range(1, len(NETWORK.layers) + 1), range(100, len(NETWORK.layers) + 100))
    layers = tuple(
        LayerProfile(layer=layer.name, forward_s=there, backward_s=None if layer.inplace else back)
        for layer, there, back in zip(NETWORK.layers, forward_s, backward_s, strict=True)
    )
    profile = msgspec.structs.replace(PROFILE, layers=layers, step_high_s=9.0)
    step, operators = of_profile(network, profile, optimizer="adam", criterion="slimming", momentum=0.5, proximal=True)
    assert (step.num_parameters, step.num_tensors) == (NETWORK.num_parameters, len(NETWORK.parameters))
    assert (step.forward_s, step.backward_s) == (PROFILE.forward_s, PROFILE.backward_s)
    assert step.layers_forward_s == sum(forward_s)
    without = sum(back for layer, back in zip(NETWORK.layers, backward_s, strict=True) if layer.inplace)
    assert step.layers_backward_s == sum(backward_s) - without
    assert (step.optimizer, step.criterion, step.momentum, step.proximal) == ("adam", "slimming", 0.5, True)
    assert (step.step_low_s, step.step_s, step.step_high_s) == (PROFILE.step_s, PROFILE.step_s, 9.0)
    assert {time.context for time in operators} == {"step"}
    first = next(time for time in operators if time.operator.inputs == ((3, 32, 32),))
    assert (first.forward_s, first.backward_s) == (1, 100)


def test_a_step_in_three_passes_is_three_measured_passes_with_two_sums_one_penalty_and_one_update():
    parts = {"forward_s": 1.0, "backward_s": 2.0, "optimizer_s": 0.5, "regularizer_s": 0.25, "step_s": 4.0}
    profile = msgspec.structs.replace(PROFILE, **parts, step_low_s=3.0, step_high_s=5.0)
    setting = msgspec.structs.replace(fp32(190, regularizer="group_lasso"), passes=3)  # two passes of 64, one of 62
    step = measured_step(NETWORK, [profile], setting)
    # An update with momentum moves 11 values of every parameter in 0.5 s; a sum of two gradients, of which there are
    # two, moves 3. What is left of the 4 s, 0.25 s, is paid by every pass: 3 · (1 + 2 + 0.25) + 0.5 + 0.25.
    sums_s = 2 * 0.5 * 3 / 11
    assert step.compute_s == pytest.approx(10.5 + sums_s)
    assert (step.forward_s, step.backward_s, step.optimizer_s) == pytest.approx((3.0, 6.0, 0.5 + sums_s))
    assert (step.low_s, step.high_s) == pytest.approx(((10.5 + sums_s) * 3 / 4, (10.5 + sums_s) * 5 / 4))
    assert step.accumulated(1).compute_s == pytest.approx(4.0)


def test_a_step_that_takes_no_time_takes_none_in_several_passes():
    parts = dict.fromkeys(("forward_s", "backward_s", "optimizer_s", "regularizer_s"), 0.0)
    step = measured_step(NETWORK, [msgspec.structs.replace(PROFILE, **parts, step_s=1e-9)], fp32(64))
    nothing = msgspec.structs.replace(step, overhead_s=0.0, low_s=0.0, high_s=0.0)
    assert nothing.accumulated(4).compute_s == nothing.accumulated(4).high_s == 0


def test_of_two_profiles_of_the_same_the_later_counts():
    later = msgspec.structs.replace(PROFILE, step_s=7.0)
    assert find_profile(NETWORK, [PROFILE, later], fp32(64)).step_s == 7.0


@pytest.mark.parametrize(
    ("profiles", "batch", "regularizer", "message"),
    [
        ([], 64, "group_lasso", "there is not one profile in the trace"),
        ([PROFILE], 32, "group_lasso", "was profiled at mini-batch 64, fp32, contiguous, not at mini-batch 32"),
        ([msgspec.structs.replace(PROFILE, architecture="0" * 16)], 64, "group_lasso", "none of the 1 profiles"),
        ([msgspec.structs.replace(PROFILE, regularizer_s=0.0)], 64, "group_lasso", "without the regulariser"),
        ([msgspec.structs.replace(PROFILE, layers=PROFILE.layers[1:])], 64, "group_lasso", "lacks conv1"),
    ],
)
def test_what_was_not_measured_is_an_error_that_says_what_was(profiles, batch, regularizer, message):
    with pytest.raises(MissingMeasurementError, match=message):
        measured_step(NETWORK, profiles, fp32(batch, regularizer=regularizer))
