"""The data-sheet tier: limits that physics sets, and orders that every measurement shows."""

import itertools
import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptsim.costs import datasheet
from ptsim.costs.datasheet import (
    Chip,
    Efficiency,
    Host,
    Interval,
    chip_of,
    datasheet_step,
    device_factor,
    kernel_seconds,
    launch_order,
    load_fit,
    load_intervals,
    uncertainty,
    uses_tensor_cores,
    waiting_seconds,
)
from ptsim.costs.kernels import Kernel, Kernels, Pass, Work, convolution_kernels, network_kernels, product_kernels
from ptsim.costs.software import update_bytes
from ptsim.costs.step import step_time
from ptsim.costs.tiers import Tier
from ptsim.errors import UnknownNameError, UsageError
from ptsim.hardware.catalog import device_names, load_device
from ptsim.network import Parameter, Precision
from ptsim.setting import OF_RUNS, StepSetting
from tests.costs.test_kernels import convolution
from tests.traces import NetworkBuilder, residual_network

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


def test_a_penalty_takes_what_it_moves_or_what_its_kernels_take_at_least():
    """Slimming: two kernels for each of 15 BatchNorms. A proximal step of the group lasso: 40 bytes a weight."""
    device, fit = load_device("v100-sxm2-16gb"), load_fit().efficiency
    slim, shrunk = (
        datasheet_step(
            network, device, StepSetting(batch=8, regularizer=criterion, proximal=criterion == "group_lasso")
        )
        for network, criterion in ((NETWORK, "slimming"), (WIDE, "group_lasso"))
    )
    assert slim.regularizer_s == pytest.approx(30 * fit.launch_s)
    weights = sum(parameter.num_elements for parameter in WIDE.parameters if len(parameter.shape) > 1)
    assert shrunk.regularizer_s == pytest.approx(40 * weights / (fit.stream_bandwidth * 900e9))


def test_every_gpu_of_the_fit_gets_its_own_factor():
    factors = load_fit().devices
    small, large = "v100-sxm2-16gb", "v100-sxm2-32gb"  # the same chip twice
    other = device_factor(load_device("v100-pcie-16gb"), load_fit())  # and on a board that has no rows
    assert other == pytest.approx(np.cbrt(factors[small] * factors[large] * factors["titan-v"]))
    setting = StepSetting(batch=64, precision=Precision.FP32)
    took = {name: datasheet_step(WIDE, load_device(name), setting) for name in factors}
    assert took[small].forward_s / took[large].forward_s == pytest.approx(factors[small] / factors[large])


def test_an_unknown_chip_gets_the_wider_interval():
    setting = StepSetting(batch=32, torch_version=OF_RUNS)
    known, unknown = (datasheet_step(NETWORK, load_device(name), setting) for name in ("a100-pcie", "l4"))
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


# Numbers that leave nothing but the multiplying part: half of 100 FLOP a clock on each of 4 SMs at 1 GHz.
PLAIN = Efficiency(
    simt=0.5, tensor=0.8, wide=0.5, feed_bytes_per_clock=1e30, ramp=0.0, latency=0.0, winograd=3.0, input_gradient=0.5,
    weight_gradient=0.25, strided=0.2, product_bandwidth=0.5, stream_bandwidth=0.8, norm_bandwidth=0.4,
    layout_bandwidth=0.25, elements_per_clock=1e30, norm_block=1.5, pascal_bandwidth=0.5, depthwise_bandwidth=0.2,
    depthwise_rate=0.1, depthwise_base=6.0, depthwise_halves=2.0, odd_groups=0.25, hiding=1.0, overlap=1.0,
    launch_s=0.0, product_s=0.0, cache=3.0, throttle=0.5, boost=1.25,
)  # fmt: skip
CHIP = Chip(
    peak_flops_per_s=400e9, simt_flops_per_s=800e9, issue_flops_per_s=1e9, tensor=0.0, num_sms=4.0, clock_hz=1e9,
    bandwidth_bytes_per_s=1e9, l2_bytes=1e6, power_ratio=1.0, boosts=0.0, pascal=0.0, wide=0.0, free=0.0,
)  # fmt: skip
TILE_S = 2 * 32 * 32 * 64 / 50 / 1e9  # one block of 32 × 32 results, 64 deep


def of_one_kernel(chip=None, efficiency=None, **kernel):
    """Seconds of a product of 32 × 64 by 64 × 32 that moves nothing, with some numbers replaced."""
    shape = {"layer": 0, "work": Work.PRODUCT, "step": Pass.FORWARD, "moved_bytes": 0.0, "footprint_bytes": 4e6}
    only = Kernel(**{**shape, "m": 32, "n": 32, "k": 64, "groups": 1, **kernel})
    changed = (msgspec.structs.replace(made, **(new or {})) for made, new in ((CHIP, chip), (PLAIN, efficiency)))
    return float(kernel_seconds(Kernels.of([only]), *changed)[0])


BACKWARD = {"step": Pass.WEIGHT_GRADIENT}


@pytest.mark.parametrize(
    ("changes", "tiles"),
    [
        ({}, 1),
        ({"efficiency": {"simt": 0.25}}, 2),
        ({"chip": {"wide": 1.0}}, 2),
        ({"chip": {"tensor": 1.0}}, 50 / 80),
        ({"chip": {"tensor": 1.0, "wide": 1.0}}, 50 / 80),
        ({"chip": {"boosts": 1.0}}, 1 / 1.25),
        ({"chip": {"power_ratio": 0.25}}, 2),  # half of the clock
        ({"efficiency": {"latency": 0.5}}, 1.5),
        ({"efficiency": {"ramp": 16.0}}, 80 / 64),
        # Two groups side by side. One of 8 columns takes a quarter of the ramp, but not of the weights' gradient.
        ({"groups": 2, "n": 8, "efficiency": {"ramp": 16.0}}, 68 / 64),
        ({"groups": 2, "n": 64, "efficiency": {"ramp": 16.0}}, 80 / 64),
        ({"groups": 2, "n": 8, "efficiency": {"ramp": 16.0, "weight_gradient": 1.0}, **BACKWARD}, 80 / 64),
        ({"n": 8, "efficiency": {"ramp": 16.0}}, 80 / 64),
        # Groups with tiles of their own: each has 64 columns, of the weights' gradient 64 rows, and a whole ramp.
        ({"groups": 4, "n": 8}, 1),
        ({"groups": 4, "n": 8, "lone_groups": True}, 2),
        ({"groups": 4, "n": 8, "lone_groups": True, "efficiency": {"ramp": 16.0}}, 2 * 80 / 64),
        ({"groups": 4, "n": 64, "lone_groups": True}, 2),
        ({"groups": 4, "n": 65, "lone_groups": True}, 3),
        ({"groups": 4, "m": 8, "lone_groups": True, "step": Pass.INPUT_GRADIENT}, 4),
        ({"groups": 4, "m": 8, "lone_groups": True, **BACKWARD}, 8),
        ({"groups": 4, "m": 64, "n": 8, "lone_groups": True, **BACKWARD}, 8),
        ({"groups": 5}, 2),  # on 4 SMs
        # Tensor cores load 16 bytes of depth at once.
        ({"k": 65, "element_bytes": 2.0, "chip": {"tensor": 1.0}}, 72 / 64 * 50 / 80),
        ({"k": 65, "element_bytes": 4.0, "chip": {"tensor": 1.0}}, 68 / 64 * 50 / 80),
        ({"k": 65, "element_bytes": 2.0}, 65 / 64),
        ({"k": 0}, 1 / 64),
        # A depth of 1,024 is split in slices of at least 256 and at most 4 blocks for every SM.
        ({"k": 1024}, 4),
        ({"k": 1024, "groups": 2}, 8),
        ({"k": 1024, "groups": 8}, 32),
        ({"k": 1024, "chip": {"num_sms": 1.0, "peak_flops_per_s": 100e9}}, 16),
        ({"k": 2**14, "groups": 2}, 2 * 256 / 4),  # 8 slices of 2,048 each
        # 4 bytes of 32 + 32 operands for 2 · 32² FLOP, a byte a clock: 1/8 of a clock a FLOP beside 1/50.
        ({"efficiency": {"feed_bytes_per_clock": 1.0}}, (1 / 50 + 1 / 8) * 50),
        ({"efficiency": {"feed_bytes_per_clock": 1.0}, "element_bytes": 2.0}, (1 / 50 + 1 / 16) * 50),
        ({"efficiency": {"feed_bytes_per_clock": 1.0, "hiding": 2.0}}, math.hypot(1 / 50, 1 / 8) * 50),
        # Of 5 blocks one waits; of 8 × 4 each SM takes 8, and with latencies the small tile is still the best.
        ({"m": 129}, 2),
        ({"m": 256, "n": 128}, 8),
        ({"m": 256, "n": 128, "efficiency": {"latency": 1.0}}, 9),
        # What feeds it decides: 128 × 64 results, 4 blocks side by side, need 3/64 of a clock a FLOP.
        ({"m": 256, "n": 128, "efficiency": {"feed_bytes_per_clock": 1.0}}, 8 * (1 / 50 + 3 / 64) * 50),
        ({"step": Pass.INPUT_GRADIENT}, 2),
        (BACKWARD, 4),
        ({"strided": True}, 5),
        ({"strided": True, "step": Pass.INPUT_GRADIENT}, 10),
        # Winograd gains 1 + 2 · channels / (channels + 32) with the fewer channels of the two.
        ({"winograd": True, "k": 288}, 288 / 64 / 1.125 / 2),  # 32 and 32; 288 deep in 1.125 slices
        ({"winograd": True, "k": 144}, 144 / 64 / (1 + 2 * 16 / 48)),
        ({"winograd": True, "n": 8, "k": 144}, 144 / 64 / (1 + 2 * 8 / 40)),
        ({"winograd": True, "m": 16, "n": 72, **BACKWARD}, 4 / (1 + 2 * 8 / 40)),
        ({"winograd": True, "m": 4, "n": 72, **BACKWARD}, 4 / (1 + 2 * 4 / 36)),
        ({"winograd": True, "k": 144, "chip": {"tensor": 1.0}}, 144 / 64 * 50 / 80),
        # tf32 is allowed: 100 FLOP a clock on CUDA cores against 80 on tensor cores, or 25.
        ({"chip": {"tensor": 1.0, "free": 1.0}}, 50 / 100),
        ({"chip": {"tensor": 1.0, "free": 1.0, "simt_flops_per_s": 200e9}}, 50 / 80),
    ],
)
def test_the_multiplying_part_of_a_product_by_hand(changes, tiles):
    assert of_one_kernel(**changes) == pytest.approx(tiles * TILE_S)


SLOW = {"efficiency": {"elements_per_clock": 1e-2}}


@pytest.mark.parametrize(
    ("changes", "milliseconds"),
    [
        # 1 MB at 1 GB/s: each kind reaches its share of it. A quarter of the 4 MB lies in the cache, which is 3 times
        # as fast: 1.5 times in all.
        ({"work": Work.STREAM}, 1 / 0.8 / 1.5),
        ({"work": Work.NORM}, 1 / 0.4 / 1.5),
        # Two blocks draw what three of the four SMs could, three blocks all.
        ({"work": Work.NORM, "blocks": 2.0}, 1 / 0.4 / 1.5 * 4 / 3),
        ({"work": Work.NORM, "blocks": 3.0}, 1 / 0.4 / 1.5),
        ({"work": Work.DEPTHWISE, "m": 0}, 1 / 0.2 / 1.5),
        ({"work": Work.STREAM, "footprint_bytes": 1e5}, 1 / 0.8 / 3),
        ({"work": Work.STREAM, "chip": {"pascal": 1.0}}, 1 / 0.8 / 1.5 / 0.5),
        ({"work": Work.STREAM, "layout_bytes": 2e6}, 1 / 0.8 / 1.5 + 2 / 0.25 / 1.5),
        # At most 40 million elements a second through 4 SMs at 1 GHz, however many bytes they have; from the cache 1.5
        # times as many. A block is on one SM. The slower of the two limits decides.
        ({"work": Work.STREAM, **SLOW}, 0.25 / 0.04 / 1.5),
        ({"work": Work.STREAM, **SLOW, "element_bytes": 2.0}, 0.5 / 0.04 / 1.5),
        ({"work": Work.STREAM, **SLOW, "chip": {"num_sms": 8.0}}, 0.25 / 0.08 / 1.5),
        ({"work": Work.STREAM, **SLOW, "chip": {"boosts": 1.0}}, 0.25 / 0.05 / 1.5),
        ({"work": Work.STREAM, **SLOW, "chip": {"pascal": 1.0}}, 0.25 / 0.04 / 1.5),
        ({"work": Work.STREAM, "efficiency": {"elements_per_clock": 0.05}}, 0.25 / 0.2 / 1.5),  # 0.8 GB/s, as memory
        ({"work": Work.STREAM, "efficiency": {"elements_per_clock": 0.06}}, 1 / 0.8 / 1.5),
        ({"work": Work.STREAM, "efficiency": {"elements_per_clock": 0.06}, "element_bytes": 2.0}, 0.5 / 0.24 / 1.5),
        ({"work": Work.NORM, **SLOW, "blocks": 2.0}, 0.25 / 0.04 / 1.5 * 2),
        ({"work": Work.NORM, **SLOW, "blocks": 3.0}, 0.25 / 0.04 / 1.5 * 4 / 3),
        ({"work": Work.NORM, **SLOW, "blocks": 5.0}, 0.25 / 0.04 / 1.5),
        ({"work": Work.DEPTHWISE, "m": 0, **SLOW}, 1 / 0.2 / 1.5),
        (SLOW, 1 / 0.5 / 1.5 + 1e3 * TILE_S),  # products keep their operands
        ({**SLOW, "layout_bytes": 2e6, "element_bytes": 2.0}, (1 / 0.5 + 1 / 0.04) / 1.5 + 1e3 * TILE_S),
        ({"work": Work.STREAM, "launches": 3.0, "efficiency": {"launch_s": 1e-3, "product_s": 5e-3}}, 1 / 1.2 + 3),
        # A product multiplies, too, and of its launches one takes 5 ms.
        ({"k": 64 * 256}, 1 / 0.5 / 1.5 + 1e3 * 256 * TILE_S / 4),
        ({"launches": 2.0, "efficiency": {"launch_s": 1e-3, "product_s": 5e-3}}, 1 / 0.75 + 1e3 * TILE_S + 6),
        # Either hides the other the better, the larger the exponent.
        ({"k": 64 * 4096, "efficiency": {"overlap": 2.0}}, math.hypot(1 / 0.75, 1e3 * 1024 * TILE_S)),
    ],
)
def test_the_memory_and_the_launches_of_a_kernel_by_hand(changes, milliseconds):
    assert 1e3 * of_one_kernel(**{"moved_bytes": 1e6, **changes}) == pytest.approx(milliseconds)


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        # 2 · 10 · 8 · 18 · 4 FLOP at a quarter of 800 GFLOP/s; 32 / 8 as much again for narrow groups.
        ({"odd_groups": True, "m": 10, "n": 8, "k": 18, "groups": 4}, 2 * 5760 * 5 / 200e9),
        ({"odd_groups": True, "m": 16, "n": 8, "k": 18, "groups": 4, **BACKWARD}, 2 * 9216 * 3 / 200e9),
        # 9 taps and 6 more for each of 100 · 1 · 16 pixels, at a tenth of 1 GFLOP/s.
        ({"work": Work.DEPTHWISE, "m": 100, "n": 1, "k": 9, "groups": 16}, 2 * 1600 * 15 / 1e8),
        ({"work": Work.DEPTHWISE, "m": 100, "n": 1, "k": 9, "groups": 16, "element_bytes": 2.0}, 2 * 1600 * 15 / 2e8),
        ({"work": Work.DEPTHWISE, "m": 1, "n": 9, "k": 100, "groups": 16, **BACKWARD}, 2 * 1600 * 15 / 1e8),
    ],
)
def test_convolutions_without_reuse_by_hand(changes, seconds):
    assert of_one_kernel(**changes) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("name", "precision", "changes", "expected"),
    [
        # (peak, issue, tensor, pascal, wide, boosts, power)
        ("p100-sxm2-16gb", Precision.FP16, {}, (10.6e12, 10.6e12, 0, 1, 0, 0, 1)),  # multiplies in fp32
        ("p100-sxm2-16gb", Precision.FP32, {"power_w": 150.0}, (10.6e12, 10.6e12, 0, 1, 0, 0, 150 / 82.88 / 3.6)),
        ("gtx-1080-ti", Precision.FP32, {}, (11.34e12, 11.34e12, 0, 1, 0, 1, 1)),
        ("v100-sxm2-16gb", Precision.FP16, {}, (125e12, 256 * 80 * 1.53e9, 1, 0, 0, 0, 1)),
        ("v100-sxm2-16gb", Precision.FP32, {}, (15.7e12, 256 * 80 * 1.53e9, 0, 0, 0, 0, 1)),
        ("t4", Precision.FP32, {}, (8.1e12, 256 * 40 * 1.59e9, 0, 0, 0, 0, 70 / 63.6 / 2.38)),
        ("rtx-3090", Precision.TF32, {}, (35.6e12, 256 * 82 * 1.695e9, 1, 0, 1, 1, 350 / 138.99 / 2.52)),
        ("rtx-5090", Precision.BF16, {"power_w": 200.0}, (209.5e12, 104.75264e12, 1, 0, 1, 1, 200 / 409.19 / 1.4)),
        # of Blackwell's boards for graphics those for work multiply at twice the rate of those for play
        ("rtx-pro-6000", Precision.BF16, {}, (503.8e12, 125.950976e12, 1, 0, 1, 0, 600 / 491.996 / 1.4)),
        ("b200-sxm-180gb", Precision.BF16, {"power_w": 500.0}, (2250e12, 74.44992e12, 1, 0, 1, 0, 500 / 290.82 / 3.4)),
        ("t4", Precision.FP32, {"architecture": "cpu"}, (8.1e12, 8.1e12, 0, 0, 0, 0, 1)),
    ],
)  # fmt: skip
def test_a_chip_by_hand(name, precision, changes, expected):
    device = msgspec.structs.replace(load_device(name), **changes)
    chip = chip_of(device, precision)
    found = (chip.peak_flops_per_s, chip.issue_flops_per_s, chip.tensor, chip.pascal, chip.wide, chip.boosts)
    assert (*found, chip.power_ratio) == pytest.approx(expected)
    assert chip.free == (precision is Precision.TF32)


@pytest.mark.parametrize(
    ("kernel", "deviation"),
    [
        ({}, 0.0),
        ({"element_bytes": 2.0}, 0.12),  # of the whole step
        ({"work": Work.DEPTHWISE}, 0.75 * 0.15),
        ({"groups": 2}, 0.75 * 0.15),
        ({"groups": 2, "work": Work.STREAM}, 0.0),
        ({"groups": 2, "odd_groups": True}, 0.75 * 0.3),
        ({"padded": True}, 0.75 * 0.2),
        ({"unfitted": True}, 0.75 * 0.4),
        ({"unfitted": True, "padded": True}, 0.75 * math.hypot(0.2, 0.4)),
        ({"launches": 5.0, "work": Work.STREAM}, 0.0),
    ],
)
def test_how_unsure_a_step_is_by_hand(kernel, deviation):
    """The kernel takes 3 of 4 ms; the least that one can take is a microsecond a launch, and 8 for a product."""
    stream = {"layer": 0, "work": Work.STREAM, "step": Pass.FORWARD, "moved_bytes": 0.0, "footprint_bytes": 0.0}
    kernels = Kernels.of([Kernel(**{**stream, "launches": 0.0}), Kernel(**{**stream, "work": Work.PRODUCT, **kernel})])
    made = msgspec.structs.replace(PLAIN, launch_s=1e-6, product_s=8e-6)
    least_us = 8 if kernel.get("work", Work.PRODUCT) == Work.PRODUCT else kernel.get("launches", 1)
    found = uncertainty(kernels, np.array([1e-3, 3e-3]), made)
    assert found == pytest.approx(math.hypot(deviation, 0.3 * least_us / 4000))


def test_a_step_of_nothing_but_launches_is_no_less_sure_than_that():
    only = Kernel(layer=0, work=Work.STREAM, step=Pass.FORWARD, moved_bytes=0.0, footprint_bytes=0.0, launches=9.0)
    made = msgspec.structs.replace(PLAIN, launch_s=1.0)
    assert uncertainty(Kernels.of([only]), np.array([3.0]), made) == pytest.approx(0.3)


def test_transposed_convolutions_and_those_over_other_axes_are_known_to_a_factor_of_two():
    """The step of one layer, of a GPU of the fit: its residuals' ends times √(0.1² + 0.4²), times 0.1 for others."""
    ends = load_intervals().known_device

    def step(op):
        shapes = {"input_shapes": ((256, 28, 28),), "output_shape": (256, 28, 28)}
        layer = msgspec.structs.replace(convolution(256, 256), op=op, **shapes, forward_macs=256 * 256 * 9 * 784)
        network = msgspec.structs.replace(WIDE, layers=(layer,), edges=(), parameters=())
        return datasheet_step(network, load_device("v100"), StepSetting(batch=4096))

    for op, spread in (("conv2d", 0.1), ("conv_transpose2d", math.hypot(0.1, 0.4))):
        found = step(op)
        assert found.overhead_s == 0
        assert math.log(found.high_s / found.compute_s) == pytest.approx(ends.high * spread, rel=0.01)
        assert math.log(found.compute_s / found.low_s) == pytest.approx(-ends.low * spread, rel=0.01)


def test_an_update_under_autocast_casts_weights_and_gradients():
    """SGD with momentum moves 44 bytes a parameter in fp32, without it 24; autocast and its scaler 20 more."""
    count = sum(parameter.num_elements for parameter in NETWORK.parameters)
    for precision, momentum, each in (
        (Precision.FP32, None, 44), (Precision.TF32, 0.0, 24), (Precision.FP16, None, 64), (Precision.BF16, 0.0, 44)
    ):  # fmt: skip
        setting = StepSetting(batch=8, precision=precision, momentum=momentum)
        assert update_bytes(NETWORK, setting) == each * count
    a100 = load_device("a100")
    streaming = load_fit().efficiency.stream_bandwidth * a100.memory_bandwidth_bytes_per_s
    assert datasheet_step(NETWORK, a100, StepSetting(batch=8)).optimizer_s == pytest.approx(44 * count / streaming)


@pytest.mark.parametrize(("regularizer", "launches"), [(None, 0), ("group_lasso", 12)])
def test_a_step_that_waits_for_its_host_takes_as_long_as_the_host_update_and_penalty_included(regularizer, launches):
    """Kernels: 4 forward, of which the first is launched at once; back 3 of the linear layer and its bias, then 1 each.

    Then come three tensors. The penalty's two weights are gathered: 10 launches, a concatenation and an addition.
    """
    net = NetworkBuilder("chain", (3, 4, 4), 2)
    net.linear("fc", net.flatten("flat", net.relu("relu", net.conv("conv", None, 2))), 2)
    host = Host(forward_s=1e-3, backward_s=2e-3, update_s=5e-4)
    fit = msgspec.structs.replace(load_fit(), host=host)
    step = datasheet_step(net.build(), load_device("a100"), StepSetting(batch=1, regularizer=regularizer), fit=fit)
    assert step.optimizer_s > 1e-9
    assert step.compute_s == pytest.approx(3 * 1e-3 + 6 * 2e-3 + (3 + launches) * 5e-4, rel=0, abs=1e-12)
