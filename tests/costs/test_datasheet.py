"""The data-sheet tier: limits that physics sets, and orders that every measurement shows."""

import itertools

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptsim.costs import datasheet
from ptsim.costs.datasheet import (
    Host,
    Interval,
    chip_of,
    datasheet_step,
    device_factor,
    kernel_seconds,
    launch_order,
    load_fit,
    uses_tensor_cores,
    waiting_seconds,
)
from ptsim.costs.kernels import Kernels, Pass, Work, convolution_kernels, network_kernels, product_kernels
from ptsim.costs.step import step_time
from ptsim.costs.tiers import Tier
from ptsim.errors import UnknownNameError, UsageError
from ptsim.hardware.catalog import device_names, load_device
from ptsim.network import Parameter, Precision
from ptsim.setting import StepSetting
from tests.costs.test_kernels import convolution
from tests.traces import residual_network

NETWORK = residual_network((16, 32, 64))
WIDE = residual_network((256, 512, 1024))


@pytest.fixture(scope="module", autouse=True)
def kernels_are_made_once():
    """They depend on no device, and the laws of the catalog ask for the same ones of every device."""
    made = {}

    def once(network, setting, *, tensor_cores):
        key = id(network), setting, tensor_cores
        if key not in made:
            made[key] = network, network_kernels(network, setting, tensor_cores=tensor_cores)
        return made[key][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasheet, "network_kernels", once)
        yield


def seconds(layer, device="a100", batch=64, precision=Precision.TF32):
    kernels = Kernels.of(convolution_kernels(layer, batch=batch, element=precision.activation_bytes))
    return kernel_seconds(kernels, chip_of(load_device(device), precision), load_fit().efficiency)


@pytest.mark.parametrize("name", device_names())
def test_no_device_beats_its_data_sheet(name):
    device = load_device(name)
    for precision, peak in device.peak_flops_per_s.items():
        layer = convolution(in_channels=512, out_channels=512, kernel=1, size=28)
        kernels = Kernels.of(convolution_kernels(layer, batch=64, element=precision.activation_bytes))
        took = kernel_seconds(kernels, chip_of(device, precision), load_fit().efficiency)
        boost = 1.15 if device.boosts_beyond else 1.0
        assert took[0] > 2 * 64 * layer.forward_macs / (peak * boost)


def test_bytes_of_a_large_tensor_move_at_most_at_the_memory_bandwidth():
    step = datasheet_step(WIDE, load_device("v100"), StepSetting(batch=256, precision=Precision.FP32))
    for time, layer in zip(step.layers, WIDE.layers, strict=True):
        if layer.kind == "batch_norm":
            assert time.forward_s >= 3 * 4 * 256 * layer.input_elements / 900e9


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 512), precision=st.sampled_from([Precision.FP32, Precision.TF32, Precision.FP16]))
def test_a_larger_mini_batch_never_takes_less_time(batch, precision):
    device = load_device("a100")
    small = datasheet_step(NETWORK, device, StepSetting(batch=batch, precision=precision))
    large = datasheet_step(NETWORK, device, StepSetting(batch=2 * batch, precision=precision))
    assert large.compute_s >= small.compute_s * 0.999


@pytest.mark.slow
@pytest.mark.parametrize("name", device_names())
def test_on_no_device_is_a_larger_mini_batch_faster_or_costlier_per_image(name):
    device = load_device(name)
    for precision in device.peak_flops_per_s:
        batches = [1, 2, 8, 32, 128, 512]
        took = [datasheet_step(WIDE, device, StepSetting(batch=b, precision=precision)).compute_s for b in batches]
        assert all(after >= before * (1 - 1e-9) for before, after in itertools.pairwise(took)), precision
        per_image = [t / b for t, b in zip(took, batches, strict=True)]
        assert all(after <= before * 1.05 for before, after in itertools.pairwise(per_image)), precision


@pytest.mark.parametrize("name", device_names())
@pytest.mark.parametrize("field", ["memory_bandwidth_bytes_per_s", "l2_bytes", "boost_clock_hz"])
def test_a_better_device_is_never_slower(name, field):
    device = load_device(name)
    better = {field: type(getattr(device, field))(1.25 * getattr(device, field))}
    if field == "boost_clock_hz":  # the peaks come with the clock, and the watts
        better["peak_flops_per_s"] = {key: 1.25 * peak for key, peak in device.peak_flops_per_s.items()}
        better["power_w"] = 1.25 * device.power_w
    for precision in device.peak_flops_per_s:
        setting = StepSetting(batch=64, precision=precision)
        took = datasheet_step(WIDE, device, setting).compute_s
        assert datasheet_step(WIDE, msgspec.structs.replace(device, **better), setting).compute_s <= took * (1 + 1e-9)


@pytest.mark.parametrize(
    ("slower", "faster"),
    [
        ("p100-pcie", "p100-sxm2"), ("p100", "v100"), ("v100-pcie", "v100"), ("t4", "2080ti"), ("t4", "a10"),
        ("l4", "a10"), ("l4", "l40s"), ("a10", "3090"), ("2080ti", "3090"), ("3090", "4090"), ("v100", "a100"),
        ("a100-pcie", "a100"), ("a100-40gb", "a100-80gb"), ("a100-80gb", "h100-pcie"), ("h100-pcie", "h100"),
        ("h100", "h200"), ("h200", "b200"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_devices_come_in_the_order_that_their_sheets_say(slower, faster, precision):
    setting = StepSetting(batch=256, precision=precision, memory_format="channels_last")
    times = [datasheet_step(WIDE, load_device(name), setting).compute_s for name in (slower, faster)]
    assert times[1] < times[0]


# cuBLAS, square products of 8192: github.com/mli/transformers-benchmarks issue 3 and, for the RTX 4090,
# github.com/zzc0721/torch-performance-test-data issue 78.
@pytest.mark.parametrize(
    ("name", "precision", "measured_flops_per_s"),
    [
        ("3090", Precision.FP32, 24e12),
        ("4090", Precision.FP32, 53.4e12),
        ("4090", Precision.TF32, 85.7e12),
        ("4090", Precision.FP16, 155.5e12),
    ],
)
def test_large_products_reach_on_consumer_boards_what_cublas_was_seen_to_reach(name, precision, measured_flops_per_s):
    product = next(product_kernels(8192, 8192, 8192, element=precision.activation_bytes))
    took = kernel_seconds(Kernels.of([product]), chip_of(load_device(name), precision), load_fit().efficiency)[0]
    assert 2 * 8192**3 / took == pytest.approx(measured_flops_per_s, rel=0.15)


def test_tf32_is_allowed_and_not_demanded():
    # GA102's CUDA cores multiply as fast as its tensor cores in tf32, and 3x3 kernels on them multiply less.
    for name in ("3090", "4090", "a100"):
        layer = convolution(in_channels=256, out_channels=256, size=28)
        assert np.all(seconds(layer, name, precision=Precision.TF32) <= seconds(layer, name, precision=Precision.FP32))


def test_the_interval_widens_with_what_the_fit_knows_little_of():
    def width(network, batch, precision):
        step = datasheet_step(network, load_device("v100"), StepSetting(batch=batch, precision=precision))
        return step.high_s / step.low_s

    usual = width(WIDE, 256, Precision.FP16)
    odd = residual_network(tuple(c + 1 for c in (256, 512, 1024)))
    assert width(odd, 256, Precision.FP16) > usual
    assert width(odd, 256, Precision.FP32) == pytest.approx(width(WIDE, 256, Precision.FP32), rel=0.02)
    assert width(NETWORK, 1, Precision.FP16) > 1.3 * usual


def test_an_interval_is_a_factor_either_way():
    made = Interval(base=0.3, low=-1.0, high=2.0)
    assert made.around(10.0, 0.4, 0.4) == pytest.approx((10 * np.exp(-0.5), 10 * np.exp(1.0)))
    assert made.around(10.0, 0.0, 0.4) == pytest.approx((10 * np.exp(-0.3), 10 * np.exp(1.0)))


def three_kernels():
    layers = [convolution(), convolution(input_needs_gradient=False, weight_needs_gradient=False)]
    kernels = [k for i, layer in enumerate(layers) for k in convolution_kernels(layer, batch=1, element=4, index=i)]
    return Kernels.of(kernels)  # forward and two gradients of the first layer, forward of the second


def test_the_host_launches_forward_and_then_backward_in_reverse():
    assert launch_order(three_kernels()).tolist() == [0, 3, 2, 1]


@pytest.mark.parametrize(
    ("seconds", "waits"),
    [
        ((9.0, 9.0, 9.0, 9.0), 0.0),  # the queue is never empty
        ((0.5, 0.5, 0.5, 0.5), 3.5),  # launched at 0, 1, 3 and 5, since backward takes 2: done at 5.5 after 2.0 of work
        ((9.0, 0.5, 0.5, 0.5), 0.0),  # the first is long enough for the host to launch all others
        ((0.5, 9.0, 0.5, 0.5), 3.5),  # the last that is launched is long: it starts at 5, after 1.5 of work
    ],
)
def test_a_kernel_starts_when_it_is_launched_and_its_predecessor_is_done(seconds, waits):
    host = Host(forward_s=1.0, backward_s=2.0, update_s=0.0)
    assert waiting_seconds(three_kernels(), np.array(seconds), 0.0, 0, host) == pytest.approx(waits)


def test_the_host_updates_tensor_by_tensor_after_it_has_launched_backward():
    host = Host(forward_s=1.0, backward_s=2.0, update_s=0.5)
    work = np.full(4, 0.5)
    assert waiting_seconds(three_kernels(), work, 1.0, 10, host) == pytest.approx(5 + 10 * 0.5 - (4 * 0.5 + 1.0))
    with_penalty = waiting_seconds(three_kernels(), work, 1.0, 10, host, 7)
    assert with_penalty == pytest.approx(5 + 10 * 0.5 + 7 * host.update_s - (4 * 0.5 + 1.0))


def test_a_host_that_is_slower_widens_the_interval_upwards_only_where_it_would_decide():
    def reach(batch):
        step = datasheet_step(NETWORK, load_device("v100"), StepSetting(batch=batch, precision=Precision.FP32))
        return step.high_s / step.compute_s

    assert reach(1) > 2 * reach(4096)


def test_channel_counts_make_stairs():
    took = [float(seconds(convolution(in_channels=256, out_channels=n, size=28))[0]) for n in range(97, 161)]
    assert np.all(np.diff(took) >= -1e-12)
    rises = np.diff(took) / took[:-1]
    assert np.count_nonzero(rises > 0.01) <= 2  # at the edges of tiles
    assert rises[128 - 97] > 0.1


def test_odd_channels_under_autocast_can_be_slower_than_more_even_ones():
    def half(channels):
        layer = convolution(in_channels=256, out_channels=channels, size=28)
        kernels = Kernels.of(convolution_kernels(layer, batch=64, element=2, halves=True))
        return kernel_seconds(kernels, chip_of(load_device("a100"), Precision.FP16), load_fit().efficiency).sum()

    assert half(121) > half(128)


def test_channels_last_is_faster_under_autocast_on_tensor_cores_and_slower_without():
    def step(device, precision, memory_format):
        setting = StepSetting(batch=64, precision=precision, memory_format=memory_format)
        return datasheet_step(WIDE, load_device(device), setting).compute_s

    assert step("3090", Precision.FP16, "channels_last") < step("3090", Precision.FP16, "contiguous")
    assert step("1080ti", Precision.FP32, "channels_last") > step("1080ti", Precision.FP32, "contiguous")


def test_tensor_cores_by_generation():
    assert uses_tensor_cores(load_device("v100"), Precision.FP16)
    assert not uses_tensor_cores(load_device("p100"), Precision.FP16)
    assert uses_tensor_cores(load_device("a100"), Precision.TF32)
    assert not uses_tensor_cores(load_device("a100"), Precision.FP32)


def test_the_step_is_the_sum_of_its_parts_inside_its_interval():
    step = step_time(NETWORK, load_device("t4"), StepSetting(batch=32, precision=Precision.FP16))
    parts = step.forward_s + step.backward_s + step.optimizer_s + step.regularizer_s + step.overhead_s
    assert step.compute_s == pytest.approx(parts)
    assert step.low_s < step.compute_s < step.high_s
    assert step.tier is Tier.DATASHEET


def test_a_small_network_waits_for_the_host():
    tiny = datasheet_step(NETWORK, load_device("h100"), StepSetting(batch=1, precision=Precision.FP32))
    large = datasheet_step(WIDE, load_device("t4"), StepSetting(batch=256, precision=Precision.FP32))
    assert tiny.overhead_s > tiny.forward_s
    assert large.overhead_s == 0


def test_the_group_lasso_and_heavier_optimizers_cost_extra():
    device = load_device("a100")
    plain = datasheet_step(WIDE, device, StepSetting(batch=8, precision=Precision.TF32))
    lasso = datasheet_step(WIDE, device, StepSetting(batch=8, precision=Precision.TF32, regularizer="group_lasso"))
    adam = datasheet_step(WIDE, device, StepSetting(batch=8, precision=Precision.TF32, optimizer="adam"))
    assert lasso.regularizer_s > 0 == plain.regularizer_s
    assert adam.optimizer_s > plain.optimizer_s
    with pytest.raises(UnknownNameError, match="unknown criterion 'ridge'; known: group_lasso, slimming"):
        datasheet_step(WIDE, device, StepSetting(batch=8, regularizer="ridge"))


def test_every_gpu_of_the_fit_gets_its_own_factor():
    factors = load_fit().devices
    small, large = "v100-sxm2-16gb", "v100-sxm2-32gb"  # the same chip twice
    other = device_factor(load_device("v100-pcie-16gb"), load_fit())  # and on a board that has no rows
    assert other == pytest.approx(np.cbrt(factors[small] * factors[large] * factors["titan-v"]))
    setting = StepSetting(batch=64, precision=Precision.FP32)
    took = {name: datasheet_step(WIDE, load_device(name), setting) for name in factors}
    assert took[small].forward_s / took[large].forward_s == pytest.approx(factors[small] / factors[large])


def test_an_unknown_chip_gets_the_wider_interval():
    known = datasheet_step(NETWORK, load_device("a100-pcie"), StepSetting(batch=32, precision=Precision.TF32))
    unknown = datasheet_step(NETWORK, load_device("l4"), StepSetting(batch=32, precision=Precision.TF32))
    assert known.high_s / known.low_s < unknown.high_s / unknown.low_s


def test_a_precision_that_the_device_lacks_is_refused():
    with pytest.raises(UsageError, match=r"v100.* does not support tf32; it supports fp16, fp32"):
        step_time(NETWORK, load_device("v100"), StepSetting(batch=1, precision=Precision.TF32))


def test_a_mini_batch_that_is_not_positive_is_refused():
    with pytest.raises(UsageError, match="mini-batch 0 is not positive"):
        step_time(NETWORK, load_device("v100"), StepSetting(batch=0, precision=Precision.FP32))


def test_kernels_keep_their_columns():
    kernels = Kernels.of(convolution_kernels(convolution(), batch=1, element=4))
    assert kernels.work.tolist() == [Work.PRODUCT] * 3
    assert kernels.step.tolist() == list(Pass)
    assert msgspec.structs.asdict(kernels)["m"].dtype == np.float64


def test_devices_of_any_generation_and_without_half_precision_are_predicted():
    kepler = msgspec.structs.replace(load_device("p100-sxm2-16gb"), architecture="kepler")
    assert not uses_tensor_cores(kepler, Precision.FP16)
    assert datasheet_step(NETWORK, kepler, StepSetting(batch=8, precision=Precision.FP16)).compute_s > 0
    b200 = load_device("b200-sxm-180gb")
    peaks = {Precision.FP32: b200.peak_flops_per_s[Precision.FP32]}
    plain = msgspec.structs.replace(b200, peak_flops_per_s=peaks)
    setting = StepSetting(batch=8)
    assert datasheet_step(NETWORK, plain, setting).forward_s == datasheet_step(NETWORK, b200, setting).forward_s


def test_a_parameter_that_gets_no_gradient_takes_no_time_in_the_update():
    idle = Parameter(name="idle", layer="", shape=(10**6, 100))
    network = msgspec.structs.replace(NETWORK, parameters=(*NETWORK.parameters, idle))
    setting = StepSetting(batch=1, precision=Precision.FP16)
    a100 = load_device("a100")
    assert datasheet_step(network, a100, setting) == datasheet_step(NETWORK, a100, setting)
