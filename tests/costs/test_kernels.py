"""Kernels of a training step: counts by hand."""

import itertools
import math

import msgspec
import numpy as np
import pytest

from ptsim.costs.kernels import Pass, Work, convolution_kernels, layer_kernels, network_kernels
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


def on_16_channels(kind, op, *shapes, **changes):
    """An operator without a kernel size whose output has 16 channels of 8×8."""
    layer = Layer(
        name=op, kind=kind, op=op, in_channels=16, out_channels=16, input_shapes=shapes, output_shape=(16, 8, 8)
    )
    return msgspec.structs.replace(layer, **changes)


@pytest.mark.parametrize(("kernel", "stride", "groups"), [(1, 1, 1), (3, 1, 1), (3, 2, 1), (7, 2, 1), (3, 1, 8)])
def test_every_pass_of_a_convolution_multiplies_as_often_as_the_forward_pass(kernel, stride, groups):
    layer = convolution(kernel=kernel, stride=stride, groups=groups)
    for product in convolution_kernels(layer, batch=5, element=4):
        assert product.m * product.n * product.k * product.groups == pytest.approx(5 * layer.forward_macs)


def test_the_gradient_of_a_product_that_was_broadcast_is_a_product_and_a_sum():
    # y = s · x of a squeeze-and-excitation block: dx = s · dy reads dy and s and writes dx; ds = Σ x · dy reads both,
    # writes their product, reads it again and writes ds: six times an image of 8×8, and two numbers for each channel.
    layer = on_16_channels(LayerKind.ELEMENTWISE, "mul", (16, 1, 1), (16, 8, 8))
    network = Network(name="n", input_shape=(16, 8, 8), num_classes=1, layers=(layer,), edges=(), parameters=())
    kernels = network_kernels(
        network, StepSetting(batch=2, precision=Precision.FP32, memory_format="contiguous"), tensor_cores=False
    )
    assert kernels.moved_bytes[kernels.step != Pass.FORWARD].sum() == 4 * 2 * 16 * (6 * 8 * 8 + 2)


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


def test_batch_norm_of_contiguous_images_has_a_block_a_channel():
    network = residual_network((16, 32, 64))
    channels = [layer.out_channels for layer in network.layers if layer.kind is LayerKind.BATCH_NORM]

    def blocks(memory_format):
        setting = StepSetting(batch=3, memory_format=memory_format)
        kernels = network_kernels(network, setting, tensor_cores=False)
        assert np.isinf(kernels.blocks[kernels.work != Work.NORM]).all()
        return kernels.blocks[kernels.work == Work.NORM]

    assert sorted(blocks("contiguous")) == sorted(2 * channels)
    assert np.isinf(blocks("channels_last")).all()


def test_batch_norm_of_features_has_no_blocks_of_channels():
    shape = ((64,), (64,))
    layer = Layer(
        name="norm", kind=LayerKind.BATCH_NORM, op="batch_norm", in_channels=64, out_channels=64,
        input_shapes=shape[:1], output_shape=shape[1],
    )  # fmt: skip
    assert all(math.isinf(kernel.blocks) for kernel in layer_kernels(layer, 7, 4, 4, 4, planar=True))


@pytest.mark.parametrize(
    ("shape", "planar", "blocks"), [((64, 9), True, 64), ((64, 9), False, 64), ((64, 9, 9, 9), False, math.inf)]
)
def test_batch_norm_over_one_axis_is_never_channels_last(shape, planar, blocks):
    layer = Layer(
        name="norm", kind=LayerKind.BATCH_NORM, op="batch_norm", in_channels=64, out_channels=64, input_shapes=(shape,),
        output_shape=shape,
    )  # fmt: skip
    assert {kernel.blocks for kernel in layer_kernels(layer, 7, 4, 4, 4, planar=planar)} == {blocks}


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


def rows(kernels):
    """What counts of every kernel, by pass."""
    return {k.step: (k.m, k.n, k.k, k.groups, k.moved_bytes, k.footprint_bytes) for k in kernels}


def test_the_implicit_products_of_a_grouped_strided_convolution():
    """8 groups of 8 → 16 channels, 3×3 with stride 2 from 8×8 to 4×4, 5 images in half precision.

    Every pass reads or writes 5·64·64 inputs, 5·128·16 outputs and 128·8·9 weights of 2 bytes.
    """
    layer = convolution(stride=2, groups=8)
    moved = 2.0 * (5 * 64 * 64 + 5 * 128 * 16 + 128 * 8 * 9)
    kernels = list(convolution_kernels(layer, batch=5, element=2, index=3))
    assert rows(kernels) == {
        Pass.FORWARD: (5 * 16, 16, 8 * 9, 8, moved, moved),
        Pass.INPUT_GRADIENT: (5 * 64, 8, 16 * 9 / 4, 8, moved, moved),  # a quarter of the taps meets an output pixel
        Pass.WEIGHT_GRADIENT: (16, 8 * 9, 5 * 16, 8, moved, moved),
    }
    assert {k.step for k in kernels if k.strided} == {Pass.INPUT_GRADIENT}
    assert not any(k.strided for k in convolution_kernels(convolution(), batch=5, element=2))
    assert {(k.layer, k.element_bytes, k.work, k.launches) for k in kernels} == {(3, 2, Work.PRODUCT, 1)}


def test_a_bilinear_layer_multiplies_every_weight_by_pairs_and_each_input_has_a_gradient():
    """Of 3 and 4 features 5, for 7 images: 60 weights. What the first input makes is as wide as 5 of the second."""
    layer = Layer(
        name="b", kind=LayerKind.LINEAR, op="bilinear", in_channels=3, out_channels=5, input_shapes=((3,), (4,)),
        output_shape=(5,), num_parameters=60, forward_macs=60,
    )  # fmt: skip
    kernels = list(layer_kernels(layer, 7, 4, 4, 4))
    assert [(k.step, k.m, k.n, k.k) for k in kernels] == [
        (Pass.FORWARD, 7, 20, 3),
        (Pass.INPUT_GRADIENT, 7, 3, 20),
        (Pass.WEIGHT_GRADIENT, 20, 3, 7),
        (Pass.INPUT_GRADIENT, 7, 4, 15),
    ]
    assert kernels[0].moved_bytes == 4 * (7 * 3 + 60 + 7 * 20)
    assert kernels[3].moved_bytes == 4 * (7 * 4 + 60 + 7 * 15)
    first = msgspec.structs.replace(layer, input_needs_gradient=False)
    assert [k.step for k in layer_kernels(first, 7, 4, 4, 4)] == [Pass.FORWARD, Pass.WEIGHT_GRADIENT]
    squared = msgspec.structs.replace(layer, input_shapes=((3,),))  # of one input with itself
    assert next((k.m, k.n, k.k) for k in layer_kernels(squared, 7, 4, 4, 4)) == (7, 15, 3)


def test_a_transposed_convolution_lays_its_filters_on_the_few_pixels_of_its_input():
    """8 groups of 8 → 16 channels, 3×3 with stride 2 from 4×4 to 8×8, 5 images: what its mirror image does backward."""
    layer = msgspec.structs.replace(
        convolution(stride=2, groups=8), op="conv_transpose2d", input_shapes=((64, 4, 4),), output_shape=(128, 8, 8)
    )
    moved = 4.0 * (5 * 64 * 16 + 5 * 128 * 64 + 128 * 8 * 9)
    kernels = list(convolution_kernels(layer, batch=5, element=4))
    assert rows(kernels) == {
        Pass.FORWARD: (5 * 64, 16, 8 * 9 / 4, 8, moved, moved),
        Pass.INPUT_GRADIENT: (5 * 16, 8, 16 * 9, 8, moved, moved),
        Pass.WEIGHT_GRADIENT: (8, 16 * 9, 5 * 16, 8, moved, moved),
    }
    assert {k.step for k in kernels if k.strided} == {Pass.FORWARD}
    assert all(k.unfitted for k in kernels)
    assert not any(k.unfitted for k in convolution_kernels(convolution(stride=2, groups=8), batch=5, element=4))


@pytest.mark.parametrize(
    ("op", "image", "output", "kernel", "stride", "taps", "pixels"),
    [
        ("conv1d", (32,), (32,), (1, 3), (1, 1), 3, 32),
        ("conv1d", (32,), (16,), (1, 3), (1, 2), 3, 16),
        ("conv_transpose1d", (16,), (32,), (1, 4), (1, 2), 4, 16),
        ("conv3d", (4, 8, 8), (4, 8, 8), (3, 3), (1, 1), 27, 4 * 64),
        ("conv3d", (4, 8, 8), (2, 4, 4), (3, 3), (2, 2), 27, 2 * 16),
        ("conv3d", (4, 8, 8), (4, 4, 4), (3, 3), (2, 2), 9, 4 * 16),  # a filter of one image of the row
        ("conv_transpose3d", (2, 4, 4), (4, 8, 8), (2, 2), (2, 2), 8, 2 * 16),
    ],
)
def test_signals_and_volumes_are_multiplied_by_every_tap_at_every_place(
    op, image, output, kernel, stride, taps, pixels
):
    """16 → 24 channels: every pass multiplies 16·24 pairs of channels by all taps at the places of the few pixels."""
    layer = Layer(
        name="c", kind=LayerKind.CONV, op=op, in_channels=16, out_channels=24, kernel_size=kernel, stride=stride,
        input_shapes=((16, *image),), output_shape=(24, *output), forward_macs=16 * 24 * taps * pixels,
    )  # fmt: skip
    kernels = list(convolution_kernels(layer, batch=5, element=2))
    elements = 5 * 16 * math.prod(image) + 5 * 24 * math.prod(output) + 16 * 24 * taps
    assert len(kernels) == 3
    for k in kernels:
        assert k.m * k.n * k.k * k.groups == 5 * 16 * 24 * taps * pixels
        assert k.moved_bytes == 2 * elements
        assert not k.winograd
        assert k.unfitted


@pytest.mark.parametrize(
    ("inputs", "outputs", "groups", "padded"),
    [
        (64, 128, 1, False),
        (3, 64, 1, False),  # kernels for images exist
        (4, 64, 1, False),
        (5, 64, 1, True),
        (64, 127, 1, True),
        (64, 4, 1, False),
        (96, 96, 8, True),  # 12 channels a group
        (96, 96, 96, False),  # depthwise
    ],
)
def test_half_precision_pads_all_channel_counts_but_eights_and_those_of_images(inputs, outputs, groups, padded):
    layer = convolution(inputs, outputs, groups=groups)
    kernels = list(convolution_kernels(layer, batch=2, element=2, halves=True))
    copied = 2 * 2 * (2 * 64 * (inputs + outputs)) if padded else 0  # both read and written
    assert {(k.padded, k.layout_bytes) for k in kernels} == {(padded, copied)}
    assert not any(k.padded for k in convolution_kernels(layer, batch=2, element=2))


@pytest.mark.parametrize(
    ("changes", "odd"),
    [
        ({"groups": 32}, False),
        ({"groups": 32, "outputs": 256}, True),  # twice as many channels out as in
        ({"groups": 32, "dilation": (2, 2)}, True),
        ({"groups": 16}, True),
        ({"groups": 64, "outputs": 64}, False),  # one channel a group: depthwise
        ({"groups": 64, "outputs": 128}, False),
    ],
)
def test_which_groups_have_tensor_core_kernels(changes, odd):
    inputs = 64 if changes["groups"] == 64 else 128
    layer = convolution(inputs, changes.get("outputs", inputs), groups=changes["groups"])
    layer = msgspec.structs.replace(layer, dilation=changes.get("dilation", (1, 1)))
    assert {k.odd_groups for k in convolution_kernels(layer, batch=2, element=2, halves=True)} == {odd}
    for other in ({"halves": True, "foreign": True}, {"halves": False}):
        assert not any(k.odd_groups for k in convolution_kernels(layer, batch=2, element=2, **other))


HALF = {"halves": True, "element": 2}
NCHW = HALF | {"foreign": True}


@pytest.mark.parametrize(
    ("changes", "how", "lone"),
    [
        ({"groups": 1}, {}, False),
        ({"groups": 16}, {}, True),
        ({"groups": 32}, {}, True),
        ({"groups": 32, "outputs": 256}, {}, True),
        ({"groups": 128}, {}, False),  # depthwise
        ({"groups": 32}, HALF, False),  # on tensor cores several groups share a tile
        ({"groups": 32}, NCHW, False),
        ({"groups": 16}, NCHW, True),
        ({"groups": 32, "outputs": 256}, NCHW, True),
        ({"groups": 32, "dilation": (2, 2)}, NCHW, True),
        ({"groups": 16}, HALF, False),  # another kernel, on CUDA cores
    ],
)
def test_whose_groups_have_tiles_of_their_own(changes, how, lone):
    layer = convolution(128, changes.get("outputs", 128), groups=changes["groups"])
    layer = msgspec.structs.replace(layer, dilation=changes.get("dilation", (1, 1)))
    assert {k.lone_groups for k in convolution_kernels(layer, batch=2, **{"element": 4, **how})} == {lone}


@pytest.mark.parametrize(
    ("groups", "size", "unfitted"), [(1, 1, False), (32, 3, False), (32, 1, True), (64, 3, True), (128, 3, False)]
)
def test_groups_of_which_no_row_of_the_fit_knows(groups, size, unfitted):
    """1×1 kernels in groups, and groups of two channels; depthwise convolutions have rows."""
    layer = msgspec.structs.replace(convolution(128, 128, groups=groups), kernel_size=(size, size))
    assert {k.unfitted for k in convolution_kernels(layer, batch=2, element=4)} == {unfitted}


@pytest.mark.parametrize(
    ("memory_format", "precision", "tensor_cores", "converts"),
    [
        ("contiguous", Precision.FP16, True, True),
        ("contiguous", Precision.FP16, False, False),
        ("contiguous", Precision.TF32, True, False),
        ("channels_last", Precision.FP16, True, False),
        ("channels_last", Precision.TF32, True, False),
        ("channels_last", Precision.FP16, False, True),
        ("channels_last", Precision.FP32, False, True),
    ],
)
def test_a_kernel_of_another_layout_moves_input_and_output_twice_more(memory_format, precision, tensor_cores, converts):
    """Three kernels of a convolution of 16 → 16 channels on 8×8 for 2 images."""
    setting = StepSetting(batch=2, precision=precision, memory_format=memory_format)
    kernels = network_kernels(chain(convolution(16, 16)), setting, tensor_cores=tensor_cores)
    size = 2 * 16 * 64 * precision.activation_bytes
    assert kernels.layout_bytes.sum() == (3 * 2 * 2 * size if converts else 0)


def dense(**changes):
    """A linear layer of 32 → 8 features on 10 tokens."""
    layer = Layer(
        name="linear",
        kind=LayerKind.LINEAR,
        op="linear",
        in_channels=32,
        out_channels=8,
        input_shapes=((10, 32),),
        output_shape=(10, 8),
        num_parameters=8 * 32,
        forward_macs=10 * 8 * 32,
    )
    return msgspec.structs.replace(layer, **changes)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (dense(), {"FORWARD": (20, 8, 32, 1), "INPUT_GRADIENT": (20, 32, 8, 1), "WEIGHT_GRADIENT": (8, 32, 20, 1)}),
        (dense(input_needs_gradient=False), {"FORWARD": (20, 8, 32, 1), "WEIGHT_GRADIENT": (8, 32, 20, 1)}),
        (dense(weight_needs_gradient=False), {"FORWARD": (20, 8, 32, 1), "INPUT_GRADIENT": (20, 32, 8, 1)}),
        # Of other products the count alone is known: 4·6 rows of 10 with 5 multiplications each, for each of 2 images.
        (
            dense(kind=LayerKind.MATMUL, output_shape=(4, 6, 10), forward_macs=240 * 5),
            {"FORWARD": (24, 10, 5, 2), "INPUT_GRADIENT": (24, 5, 10, 2), "WEIGHT_GRADIENT": (10, 5, 24, 2)},
        ),
    ],
)
def test_the_products_of_a_dense_layer_and_their_operands(layer, expected):
    setting = StepSetting(batch=2, precision=Precision.FP32)
    kernels = network_kernels(chain(layer), setting, tensor_cores=False)
    found = {
        Pass(step).name: (m, n, k, groups)
        for step, m, n, k, groups in zip(kernels.step, kernels.m, kernels.n, kernels.k, kernels.groups, strict=True)
    }
    assert found == expected
    m, n, k, groups = expected["FORWARD"]
    size = 4 * groups * (m * n + n * k + m * k)
    assert set(kernels.moved_bytes) == set(kernels.footprint_bytes) == {size}


@pytest.mark.parametrize(("once", "times"), [(False, 2), (True, 1)])
def test_gradients_of_three_readers_are_added_twice(once, times):
    """A ReLU of 1,024 elements, 2 images: 3 accesses of its own backward pass, and 3 for each of two additions.

    What runs once a mini-batch, as on weights, does so once.
    """
    relu = on_16_channels(LayerKind.ACTIVATION, "relu", (16, 8, 8), once=once)
    readers = [msgspec.structs.replace(relu, name=f"r{i}") for i in range(3)]
    network = msgspec.structs.replace(
        chain(relu), layers=(relu, *readers), edges=tuple(("relu", reader.name) for reader in readers)
    )
    kernels = network_kernels(network, StepSetting(batch=2), tensor_cores=False)
    size = times * 1024 * 4
    own = kernels.layer == 0
    assert kernels.moved_bytes[own].tolist() == [2 * size, 3 * size, 2 * 3 * size]
    assert kernels.footprint_bytes[own].tolist() == [size, 2 * size, 3 * size]
    assert kernels.launches[own].tolist() == [1, 1, 2]
    assert kernels.step[own].tolist() == [Pass.FORWARD, Pass.INPUT_GRADIENT, Pass.INPUT_GRADIENT]


@pytest.mark.parametrize(
    ("shapes", "parameters", "launches"),
    [(((16, 8, 8), (16, 8, 8)), 0, 2), (((16, 1, 1), (16, 8, 8)), 0, 3), (((16, 8, 8),), 16, 3)],
)
def test_a_factor_that_was_broadcast_is_summed_by_one_more_kernel(shapes, parameters, launches):
    layer = on_16_channels(LayerKind.ELEMENTWISE, "mul", *shapes, num_parameters=parameters)
    kernels = network_kernels(chain(layer), StepSetting(batch=2), tensor_cores=False)
    assert kernels.launches.tolist() == [1, launches]


def test_only_the_operand_of_the_other_width_is_converted():
    """A product of a half-precision tensor and an fp32 one, 6 bytes an element of that one; 2 images.

    Scores of 4 · 64 · 64 elements, which a softmax leaves in fp32, times values of 1,024.
    """
    shapes = (16, 8, 8), (4, 64, 64)
    product = dense(kind=LayerKind.MATMUL, input_shapes=shapes, output_shape=(16, 8, 8))
    conv, norm, last = convolution(16, 16), layer_norm(), msgspec.structs.replace(product, name="product")
    network = msgspec.structs.replace(
        chain(conv),
        layers=(conv, norm, last),
        edges=(("conv", "norm"), ("conv", "product"), ("norm", "product")),
    )
    kernels = network_kernels(network, StepSetting(batch=2, precision=Precision.FP16), tensor_cores=False)
    copies = kernels.moved_bytes[(kernels.layer == 2) & (kernels.work == Work.STREAM)]
    assert copies.tolist() == [6 * 2 * 16_384] * 2


@pytest.mark.parametrize(
    ("layer", "given", "width", "forward", "backward"),
    [
        (on_16_channels(LayerKind.BATCH_NORM, "batch_norm", (16, 8, 8)), 2, 2, 2, 2),
        (on_16_channels(LayerKind.NORM, "layer_norm", (16, 8, 8)), 2, 4, 4, 4),  # autocast normalises layers in fp32
        (on_16_channels(LayerKind.ACTIVATION, "relu", (16, 8, 8)), 2, 2, 2, 2),
        (on_16_channels(LayerKind.ELEMENTWISE, "add", (16, 8, 8), (16, 8, 8)), 2, 2, 2, None),
        # two operands of half precision, and a result of fp32
        (on_16_channels(LayerKind.ELEMENTWISE, "add", (16, 8, 8), (16, 8, 8)), 2, 4, (2 + 2 + 4) / 3, None),
        # four elements are read and one is written, with its place in 8 bytes
        (on_16_channels(LayerKind.POOL, "max_pool2d", (16, 16, 16)), 2, 2, (4 * 2 + 2 + 8) / 6, 2),
        (on_16_channels(LayerKind.POOL, "avg_pool2d", (16, 16, 16)), 2, 2, 2, 2),
        # a byte says which were dropped
        (on_16_channels(LayerKind.DROPOUT, "dropout", (16, 8, 8)), 2, 2, (2 + 2 + 1) / 3, (2 + 2 + 1) / 3),
        (on_16_channels(LayerKind.CONCAT, "cat", (8, 8, 8), (8, 8, 8)), 2, 2, 2, None),
    ],
    ids=lambda value: value.op if isinstance(value, Layer) else None,
)
def test_how_many_bytes_an_element_has_that_a_kernel_streams(layer, given, width, forward, backward):
    kernels = list(layer_kernels(layer, 3, given, width, 2))
    (there,) = {kernel.element_bytes for kernel in kernels if kernel.step is Pass.FORWARD}
    assert there == pytest.approx(forward)
    assert {kernel.element_bytes for kernel in kernels if kernel.step is not Pass.FORWARD} == {backward} - {None}
