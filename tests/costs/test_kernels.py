"""Kernels of a training step: counts by hand."""

import itertools

import msgspec
import numpy as np
import pytest

from ptsim.costs.kernels import Pass, Work, convolution_kernels, network_kernels
from ptsim.network import Layer, LayerKind, Network, Precision
from ptsim.setting import StepSetting
from tests.traces import residual_network


def convolution(in_channels=64, out_channels=128, kernel=3, stride=1, size=8, groups=1, **changes):
    out = size // stride
    return Layer(
        name="conv",
        kind=LayerKind.CONV,
        op="conv2d",
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=(kernel, kernel),
        stride=(stride, stride),
        padding=(kernel // 2, kernel // 2),
        groups=groups,
        input_shapes=((in_channels, size, size),),
        output_shape=(out_channels, out, out),
        forward_macs=in_channels // groups * out_channels * kernel**2 * out**2,
        **changes,
    )


@pytest.mark.parametrize(("kernel", "stride", "groups"), [(1, 1, 1), (3, 1, 1), (3, 2, 1), (7, 2, 1), (3, 1, 8)])
def test_every_pass_of_a_convolution_multiplies_as_often_as_the_forward_pass(kernel, stride, groups):
    layer = convolution(kernel=kernel, stride=stride, groups=groups)
    for product in convolution_kernels(layer, batch=5, element=4):
        assert product.m * product.n * product.k * product.groups == pytest.approx(5 * layer.forward_macs)


def test_the_gradient_of_a_product_that_was_broadcast_is_a_product_and_a_sum():
    # y = s · x of a squeeze-and-excitation block: dx = s · dy reads dy and writes dx; ds = Σ x · dy reads both, writes
    # their product and reads it again.
    layer = Layer(
        name="mul",
        kind=LayerKind.ELEMENTWISE,
        op="mul",
        in_channels=16,
        out_channels=16,
        input_shapes=((16, 1, 1), (16, 8, 8)),
        output_shape=(16, 8, 8),
    )
    network = Network(name="n", input_shape=(16, 8, 8), num_classes=1, layers=(layer,), edges=(), parameters=())
    kernels = network_kernels(
        network, StepSetting(batch=2, precision=Precision.FP32, memory_format="contiguous"), tensor_cores=False
    )
    assert kernels.moved_bytes[kernels.step != Pass.FORWARD].sum() == 6 * 4 * 2 * 16 * 8 * 8


def test_the_first_layer_has_no_gradient_of_its_input():
    layer = convolution(input_needs_gradient=False)
    assert {k.step for k in convolution_kernels(layer, batch=1, element=4)} == {Pass.FORWARD, Pass.WEIGHT_GRADIENT}


def test_frozen_weights_have_no_gradient():
    layer = convolution(bias=True, weight_needs_gradient=False)
    assert {k.step for k in convolution_kernels(layer, batch=1, element=4)} == {Pass.FORWARD, Pass.INPUT_GRADIENT}


def test_a_bias_is_added_and_summed_by_kernels_of_its_own():
    plain = list(convolution_kernels(convolution(), batch=2, element=4))
    biased = list(convolution_kernels(convolution(bias=True), batch=2, element=4))
    output_bytes = 2 * 128 * 8 * 8 * 4
    assert sum(k.moved_bytes for k in biased) - sum(k.moved_bytes for k in plain) == 3 * output_bytes


def test_one_channel_per_group_is_a_depthwise_convolution():
    layer = convolution(in_channels=32, out_channels=32, groups=32)
    assert {k.work for k in convolution_kernels(layer, batch=2, element=4)} == {Work.DEPTHWISE}


@pytest.mark.parametrize(
    ("kernel", "stride", "groups", "fewer"), [(3, 1, 1, True), (3, 1, 8, True), (3, 2, 8, False), (5, 1, 8, False)]
)
def test_winograd_is_for_undilated_3x3_convolutions_with_and_without_groups(kernel, stride, groups, fewer):
    layer = convolution(kernel=kernel, stride=stride, groups=groups)
    assert {k.winograd for k in convolution_kernels(layer, batch=2, element=4)} == {fewer}
    dilated = msgspec.structs.replace(layer, dilation=(2, 2))
    assert not any(k.winograd for k in convolution_kernels(dilated, batch=2, element=4))


def layout_bytes(memory_format, tensor_cores, precision=Precision.FP16):
    kernels = network_kernels(
        residual_network((16, 32, 64)),
        StepSetting(batch=4, precision=precision, memory_format=memory_format),
        tensor_cores=tensor_cores,
    )
    return float(kernels.layout_bytes.sum())


def test_half_precision_tensor_cores_pay_for_the_contiguous_layout():
    assert layout_bytes("contiguous", tensor_cores=True) > 0
    assert layout_bytes("channels_last", tensor_cores=True) == 0
    assert layout_bytes("contiguous", tensor_cores=False) == 0
    assert layout_bytes("contiguous", tensor_cores=True, precision=Precision.TF32) == 0


def test_odd_channel_counts_are_padded_by_a_copy_in_half_precision():
    def copied(channels):
        layer = convolution(out_channels=channels)
        return sum(k.layout_bytes for k in convolution_kernels(layer, batch=1, element=2, halves=True))

    assert copied(128) == 0
    assert copied(127) > 0


def test_batch_norm_moves_eight_times_its_input():
    network = residual_network((16, 32, 64))
    kernels = network_kernels(
        network, StepSetting(batch=3, precision=Precision.FP32, memory_format="contiguous"), tensor_cores=False
    )
    elements = sum(layer.input_elements for layer in network.layers if layer.kind is LayerKind.BATCH_NORM)
    assert kernels.moved_bytes[kernels.work == Work.NORM].sum() == 8 * 4 * 3 * elements


def test_work_grows_in_proportion_to_the_mini_batch():
    def moved(batch):
        return network_kernels(
            residual_network((16, 32, 64)),
            StepSetting(batch=batch, precision=Precision.FP32, memory_format="contiguous"),
            tensor_cores=False,
        )

    one, two = moved(8), moved(16)
    stream = one.work == Work.STREAM
    np.testing.assert_allclose(two.moved_bytes[stream], 2 * one.moved_bytes[stream])


def layer_norm(channels=16, size=8):
    return Layer(
        name="norm",
        kind=LayerKind.NORM,
        op="layer_norm",
        in_channels=channels,
        out_channels=channels,
        input_shapes=((channels, size, size),),
        output_shape=(channels, size, size),
        num_parameters=2 * channels,
    )


def chain(*layers):
    named = [msgspec.structs.replace(layer, name=f"{i}") for i, layer in enumerate(layers)]
    edges = tuple((a.name, b.name) for a, b in itertools.pairwise(named))
    return Network(name="n", input_shape=(16, 8, 8), num_classes=1, layers=tuple(named), edges=edges, parameters=())


def test_autocast_normalises_layers_in_fp32_and_converts_before_and_after():
    network = chain(convolution(16, 16), layer_norm(), convolution(16, 16))
    kernels = network_kernels(
        network, StepSetting(batch=2, precision=Precision.FP16, memory_format="contiguous"), tensor_cores=False
    )
    elements = 2 * 16 * 8 * 8
    norm = kernels.moved_bytes[kernels.work == Work.NORM]
    assert norm.tolist() == [2 * 4 * elements, 4 * 4 * elements]
    # Images to half for the first convolution, its output to fp32, the normalised to half; each but for the images' has
    # a gradient: read in one width and written in the other.
    conversions = kernels.moved_bytes[(kernels.work == Work.STREAM)]
    assert conversions.tolist() == [6 * elements] * 6


def test_without_autocast_nothing_is_converted():
    network = chain(convolution(16, 16), layer_norm(), convolution(16, 16))
    kernels = network_kernels(
        network, StepSetting(batch=2, precision=Precision.FP32, memory_format="contiguous"), tensor_cores=False
    )
    assert not np.any(kernels.work == Work.STREAM)


@pytest.mark.parametrize(
    ("groups", "channels", "memory_format", "odd"),
    [
        (32, 128, "channels_last", False),  # ResNeXt
        (4, 128, "channels_last", True),  # RegNet
        (4, 128, "contiguous", False),
        (1, 128, "channels_last", False),
        (128, 128, "channels_last", False),  # depthwise
    ],
)
def test_groups_that_have_no_tensor_core_kernel_in_channels_last(groups, channels, memory_format, odd):
    kernels = network_kernels(
        chain(convolution(channels, channels, groups=groups)),
        StepSetting(batch=2, precision=Precision.FP16, memory_format=memory_format),
        tensor_cores=True,
    )
    assert kernels.odd_groups[kernels.work != Work.STREAM].all() == odd


def test_the_gradients_of_a_concatenation_are_slices():
    layer = Layer(
        name="cat",
        kind=LayerKind.CONCAT,
        op="cat",
        in_channels=32,
        out_channels=32,
        input_shapes=((16, 8, 8), (16, 8, 8)),
        output_shape=(32, 8, 8),
    )
    kernels = network_kernels(
        chain(layer), StepSetting(batch=2, precision=Precision.FP32, memory_format="contiguous"), tensor_cores=False
    )
    assert kernels.step.tolist() == [Pass.FORWARD]


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_what_runs_once_a_mini_batch_takes_the_same_kernels_at_every_mini_batch(precision):
    layer = convolution(once=True, num_parameters=64 * 128 * 9)
    network = Network(
        name="once", input_shape=(64, 8, 8), num_classes=128, layers=(layer,), edges=(), parameters=()
    )  # fmt: skip
    one, many = (
        network_kernels(
            network, StepSetting(batch=n, precision=precision, memory_format="contiguous"), tensor_cores=True
        )
        for n in (1, 32)
    )
    for field in one.__struct_fields__:
        assert np.array_equal(getattr(one, field), getattr(many, field)), field


def test_an_operator_on_a_tensor_without_elements_launches_no_kernel() -> None:
    network = residual_network()
    index = next(i for i, layer in enumerate(network.layers) if layer.name == "layer1.0.relu1")
    gone = msgspec.structs.replace(
        network.layers[index], in_channels=0, out_channels=0, input_shapes=((0, 32, 32),), output_shape=(0, 32, 32)
    )
    assert gone.is_removed
    assert not network.layers[index].is_removed
    layers = (*network.layers[:index], gone, *network.layers[index + 1 :])
    changed = msgspec.structs.replace(network, layers=layers)
    before, after = (network_kernels(n, StepSetting(batch=8), tensor_cores=False) for n in (network, changed))
    assert index in before.layer
    assert index not in after.layer
    assert len(before.layer) - len(after.layer) == 2  # ReLU's forward and backward
