import msgspec
import pytest

from ptsim.costs import datasheet
from ptsim.costs.datasheet import datasheet_step, load_fit, waiting_share
from ptsim.costs.scaled import nearest_profile, scaled_step
from ptsim.costs.step import Measurements, step_time
from ptsim.costs.tiers import Tier
from ptsim.costs.times import LayerTime, StepTime
from ptsim.errors import MissingMeasurementError, UnknownNameError, UsageError
from ptsim.hardware.catalog import load_device
from ptsim.network import Layer, LayerKind, Network, Precision
from ptsim.setting import StepSetting
from ptsim.trace.schema import LayerProfile
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
    measured_s = scaled(A100, A100).layers[0].forward_s
    waiting = waiting_share(PROFILE.step_s, predicted(A100, 64))
    assert predicted(V100, 64).overhead_s < predicted(A100, 64).overhead_s
    still = waiting * predicted(V100, 64).overhead_s / predicted(A100, 64).overhead_s
    ratio = there.forward_s / here.forward_s
    assert step.layers[0].forward_s == pytest.approx(measured_s * ((1 - waiting) * ratio + still))
    assert step.low_s <= step.compute_s <= step.high_s


def test_the_profile_of_the_nearest_mini_batch_is_taken():
    other = profile_of(NETWORK, batch=512, device=device_info())
    assert nearest_profile(NETWORK, [PROFILE, other], fp32(128)) is PROFILE
    assert nearest_profile(NETWORK, [PROFILE, other], fp32(300)) is other
    assert nearest_profile(NETWORK, [PROFILE, other], fp32(250)) is other  # 512 / 250 is less than 250 / 64
    later = msgspec.structs.replace(PROFILE, step_s=7.0)
    assert nearest_profile(NETWORK, [PROFILE, later, other], fp32(64)) is later
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


def made(layers, optimizer_s, regularizer_s, overhead_s, *, unit=1.0):
    """A step of 3 layers, (forward, backward) in units of time; half and twice as long at the ends of its interval."""
    kinds = (LayerKind.CONV, LayerKind.ACTIVATION, LayerKind.POOL)
    step = StepTime(
        layers=tuple(
            LayerTime(layer=name, kind=kind, forward_s=unit * f, backward_s=unit * b, tier=Tier.DATASHEET)
            for name, kind, (f, b) in zip("abc", kinds, layers, strict=True)
        ),
        optimizer_s=unit * optimizer_s,
        regularizer_s=unit * regularizer_s,
        overhead_s=unit * overhead_s,
        low_s=0.0,
        high_s=0.0,
        tier=Tier.DATASHEET,
    )
    return msgspec.structs.replace(step, low_s=step.compute_s / 2, high_s=2 * step.compute_s)


@pytest.mark.parametrize(
    ("step_s", "waits_s", "waited_s"),
    [
        (10.0, 0.0, 0.0),  # the kernels alone, predicted to take 6 s, took 10
        (8.0, 2.0, 2.0),
        (12.0, 2.0, 2.0 + 4.0 * 0.8),
        (7.0, 2.0, 2.0 - 1.0 * 0.8),
        (4.0, 2.0, 0.0),  # no wait is shorter than none
    ],
)
def test_a_step_waited_for_its_host_as_long_as_prediction_and_measurement_together_say(
    step_s, waits_s, waited_s, monkeypatch
):
    """Hosts are off by 0.6 of 2 s, kernels by 0.1 of 6 s: 1.2² and 0.6², 80 and 20 % of what differs."""
    known = msgspec.structs.replace(datasheet.load_intervals().known_device, base=0.1)
    all_of_them = msgspec.structs.replace(datasheet.load_intervals(), known_device=known)
    monkeypatch.setattr(datasheet, "load_intervals", lambda: all_of_them)
    predicted = made([(1.0, 2.0), (1.0, 1.0), (0.0, 0.0)], 0.5, 0.5, waits_s)
    assert datasheet.waiting_share(step_s, predicted) == pytest.approx(waited_s / step_s)


@pytest.mark.parametrize(
    ("asked", "measured_s", "penalty_s", "waits_s"),
    [
        (True, 0.125, (0.0625, 0.125), (0.73, 1.0)),
        (False, 0.125, (0.0, 0.0), (0.73, 0.365)),
        (True, 0.125, (0.0625, 0.125), (0.73, 0.0)),
        (True, 0.0, (0.01 * 5.525 / 1.46, 0.0), (0.0, 0.3)),
    ],
)
def test_a_carried_over_step_by_hand(asked, measured_s, penalty_s, waits_s):
    """Layers whose prediction is 0 on either side take the ratio of the whole pass: 0.6 / 0.3 and 0.5 / 0.4 s.

    What is left of the measured step beside its parts is 0.125 s. The penalty takes 0.01 / 0.02 as long, or what is
    predicted where it was not measured. The step is predicted to take as long as it was measured here. Where half of
    that is waiting for the host, half of every measured part was. That half stays where the wait there is at least
    as long, half of it where it is half as long, nothing where there is none. What it is longer comes on top.
    """
    busy = 0.5 if waits_s[0] else 1.0
    still = {1.0: 0.5, 0.365: 0.25}.get(waits_s[1], 0.0)
    unit = (5.65 if asked and measured_s else 5.525) / 1.46
    longer_s = unit * {1.0: 0.27, 0.3: 0.3}.get(waits_s[1], 0.0)
    measured = [(1.0, 2.0), (0.5, 1.0), (0.25, 0.4)]
    layers = tuple(
        LayerProfile(layer=name, forward_s=f, backward_s=b) for name, (f, b) in zip("abc", measured, strict=True)
    )
    shape = {"op": "o", "in_channels": 1, "out_channels": 1, "input_shapes": ((1, 1, 1),), "output_shape": (1, 1, 1)}
    network = Network(
        name="n",
        input_shape=(1, 1, 1),
        num_classes=1,
        layers=tuple(Layer(name=name, kind=LayerKind.CONV, **shape) for name in "abc"),
        edges=(),
        parameters=(),
    )
    profile = msgspec.structs.replace(
        PROFILE,
        architecture=network.id,
        layers=layers,
        forward_s=1.75,
        backward_s=3.4,
        optimizer_s=0.25,
        regularizer_s=measured_s,
        step_s=5.525 + measured_s,
    )
    here = made([(0.1, 0.2), (0.0, 0.1), (0.2, 0.1)], 0.01, 0.02, waits_s[0], unit=unit)
    there = made([(0.3, 0.2), (0.3, 0.3), (0.0, 0.0)], 0.05, 0.01, waits_s[1], unit=unit)
    step = scaled_step(network, profile, here=here, there=there, regularizer=asked)
    assert [t.forward_s for t in step.layers] == pytest.approx(
        [3.0 * busy + still, busy + 0.5 * still, 0.5 * busy + 0.25 * still]
    )
    assert [t.backward_s for t in step.layers] == pytest.approx(
        [2.0 * busy + 2.0 * still, 3.0 * busy + still, 0.5 * busy + 0.4 * still]
    )
    scaled_penalty_s = penalty_s[0] * busy + penalty_s[1] * still
    assert (step.optimizer_s, step.regularizer_s) == pytest.approx((1.25 * busy + 0.25 * still, scaled_penalty_s))
    assert step.overhead_s == pytest.approx(0.125 * (busy + still) + longer_s)
    total_s = busy * (10.0 + 1.25 + 0.125) + still * (1.75 + 3.4 + 0.25 + 0.125) + longer_s + scaled_penalty_s
    assert (step.low_s, step.high_s) == pytest.approx((total_s / 2, 2 * total_s))
    assert {step.tier, *(t.tier for t in step.layers)} == {Tier.SCALED}


def test_a_step_that_was_carried_over_waits_for_its_host_as_one_from_the_data_sheet():
    """The kernels of one image take less time than their launches."""
    known = Measurements(profiles=(PROFILE,), source_device=A100)
    one, sheet = (step_time(NETWORK, A100, fp32(1), measurements=m) for m in (known, None))
    assert (one.tier, sheet.tier) == (Tier.SCALED, Tier.DATASHEET)
    here = datasheet_step(NETWORK, A100, fp32(64))
    assert sheet.overhead_s > sheet.forward_s + sheet.backward_s
    gap_s = PROFILE.step_s - PROFILE.forward_s - PROFILE.backward_s - PROFILE.optimizer_s - PROFILE.regularizer_s
    assert one.overhead_s == pytest.approx(gap_s + sheet.overhead_s - here.overhead_s)


@pytest.mark.parametrize(("device", "batch"), [(V100, 1), (load_device("h100"), 1), (A100, 2)])
def test_a_step_that_waits_for_its_host_takes_no_longer_where_its_kernels_do(device, batch):
    """Measured at one image: kernels of 0.1 ms and a host of 5 ms. What the host takes is the same everywhere."""
    took_s = 5e-3
    profile = msgspec.structs.replace(
        PROFILE, batch=1, forward_s=0.4 * took_s, backward_s=0.5 * took_s, optimizer_s=0.1 * took_s,
        regularizer_s=0.0, step_s=took_s, step_low_s=took_s, step_high_s=took_s,
    )  # fmt: skip
    known = Measurements(profiles=(profile,), source_device=A100)
    step = step_time(NETWORK, device, fp32(batch), measurements=known)
    assert step.tier is Tier.SCALED
    assert step.compute_s == pytest.approx(took_s, rel=0.1)


def tier_of(profile, device, *, source=A100, regularizer=None, precision=Precision.FP32):
    setting = StepSetting(batch=64, precision=precision, regularizer=regularizer)
    known = Measurements(profiles=(profile,), source_device=source)
    return step_time(NETWORK, device, setting, measurements=known).tier


def test_a_profile_without_the_penalty_measures_no_step_with_it():
    bare = msgspec.structs.replace(PROFILE, regularizer_s=0.0)
    assert tier_of(bare, A100) is Tier.MEASURED
    assert tier_of(bare, A100, regularizer="group_lasso") is Tier.SCALED


def test_a_profile_in_a_precision_that_its_device_cannot_have_is_carried_nowhere():
    half = profile_of(NETWORK, batch=64, device=device_info(), precision=Precision.BF16)
    assert tier_of(half, load_device("h100"), precision=Precision.BF16) is Tier.SCALED
    assert tier_of(half, A100, source=V100, precision=Precision.BF16) is Tier.DATASHEET
    assert tier_of(PROFILE, A100, precision=Precision.BF16) is Tier.DATASHEET


def measured_at(batch):
    return Measurements(profiles=(profile_of(NETWORK, batch=batch, device=device_info()),), source_device=A100)


CALIBRATED = msgspec.structs.replace(calibrated(NETWORK), device="NVIDIA A100-SXM4-40GB")


@pytest.mark.parametrize(
    ("known", "tier"),
    [
        (None, Tier.DATASHEET),
        (measured_at(32), Tier.MEASURED),
        (measured_at(64), Tier.SCALED),
        (Measurements(device_profile=CALIBRATED), Tier.PROFILED),
    ],
)
@pytest.mark.parametrize(("momentum", "moved"), [(None, 11), (0.0, 6)])
def test_a_step_in_passes_is_that_many_of_a_part_of_the_mini_batch(known, tier, momentum, moved):
    """An update with momentum moves 11 numbers a parameter, without one 6; three sums of gradients move 3 each.

    By the data sheet a sum also takes as long as a kernel does at least.
    """
    one, four = (
        step_time(NETWORK, A100, StepSetting(batch=n, passes=k, momentum=momentum), measurements=known)
        for n, k in ((32, 1), (126, 4))
    )
    assert one.tier is tier
    assert four.forward_s == pytest.approx(4 * one.forward_s)
    least_s = 3 * len(NETWORK.gradients) * load_fit().efficiency.launch_s if tier is Tier.DATASHEET else 0.0
    assert (four.passes, four.optimizer_s) == (4, pytest.approx((moved + 9) / moved * one.optimizer_s + least_s))
    assert four.whole_s == pytest.approx(four.optimizer_s - one.optimizer_s)  # whatever a GPU updates of its own


def test_what_no_device_can_do_is_refused():
    with pytest.raises(UsageError, match="mini-batch 0 is not positive"):
        step_time(NETWORK, A100, fp32(0))
    assert step_time(NETWORK, A100, fp32(1)).compute_s > 0
    with pytest.raises(UsageError, match="v100-sxm2-32gb does not support bf16; it supports fp16, fp32"):
        step_time(NETWORK, V100, StepSetting(batch=1, precision=Precision.BF16))
    with pytest.raises(UnknownNameError, match="unknown optimizer 'lion'"):
        step_time(NETWORK, A100, StepSetting(batch=1, optimizer="lion"))
