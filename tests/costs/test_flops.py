from __future__ import annotations

import msgspec
import pytest

from ptsim.costs.flops import flops_utilization, inference_macs, layer_macs, training_macs
from ptsim.network import Layer, LayerKind, Network
from tests.traces import residual_network


def conv(**changes: object) -> Layer:
    """64 → 128 channels, 3×3, stride 2, on 32×32: 128·64·9·16² MACs."""
    fields: dict[str, object] = {
        "name": "c",
        "kind": LayerKind.CONV,
        "op": "conv2d",
        "in_channels": 64,
        "out_channels": 128,
        "kernel_size": (3, 3),
        "stride": (2, 2),
        "padding": (1, 1),
        "input_shapes": ((64, 32, 32),),
        "output_shape": (128, 16, 16),
        "forward_macs": 128 * 64 * 9 * 16 * 16,
    }
    return Layer(**(fields | changes))  # type: ignore[arg-type] # any field


def test_exact_backward_is_two_forwards_and_one_for_the_first_layer() -> None:
    forward = 128 * 64 * 9 * 256
    assert layer_macs(conv()).training == 3 * forward
    assert layer_macs(conv(input_needs_gradient=False)).training == 2 * forward
    assert layer_macs(conv(weight_needs_gradient=False)).weight_gradient == 0


def test_paper_counts_the_input_gradient_at_padded_input_resolution() -> None:
    macs = layer_macs(conv(), "paper")
    assert macs.forward == macs.weight_gradient == 128 * 64 * 9 * 16**2
    assert macs.input_gradient == (32 + 2) ** 2 * 128 * 9 * 64


def test_paper_pads_nothing_for_1x1_and_three_for_the_7x7_stem() -> None:
    point = conv(kernel_size=(1, 1), forward_macs=128 * 64 * 256)
    assert layer_macs(point, "paper").input_gradient == 32**2 * 128 * 64
    stem = conv(
        in_channels=3,
        out_channels=64,
        kernel_size=(7, 7),
        input_shapes=((3, 224, 224),),
        output_shape=(64, 112, 112),
        forward_macs=64 * 3 * 49 * 112**2,
        input_needs_gradient=False,
    )
    assert layer_macs(stem, "paper").input_gradient == 227**2 * 64 * 49 * 3


def test_paper_counts_all_taps_of_a_volume() -> None:
    """27 taps on 4×8×8, of which a layer names 3×3; the images are padded to 6×10×10."""
    image = (64, 4, 8, 8)
    volume = conv(op="conv3d", stride=(1, 1), input_shapes=(image,), output_shape=(128, 4, 8, 8))
    volume = msgspec.structs.replace(volume, forward_macs=128 * 64 * 27 * 4 * 8 * 8)
    assert layer_macs(volume, "paper").input_gradient == 6 * 10 * 10 * 128 * 27 * 64
    halves = msgspec.structs.replace(volume, groups=2, forward_macs=128 * 32 * 27 * 4 * 8 * 8)
    assert layer_macs(halves, "paper").input_gradient == 6 * 10 * 10 * 128 * 27 * 32


def test_paper_counts_every_image_that_is_folded_into_the_mini_batch() -> None:
    """Five patches of 64×8×8, padded to 10×10."""
    patches = conv(stride=(1, 1), input_shapes=((5, 64, 8, 8),), output_shape=(5, 128, 8, 8))
    assert layer_macs(patches, "paper").input_gradient == 5 * 10 * 10 * 128 * 9 * 64


def test_paper_counts_a_linear_layer_three_times() -> None:
    fields = {"kind": LayerKind.LINEAR, "op": "linear", "in_channels": 64, "out_channels": 10, "forward_macs": 640}
    linear = conv(**fields, kernel_size=(1, 1), input_shapes=((64,),), output_shape=(10,))
    assert layer_macs(linear, "paper").training == 3 * 64 * 10


def test_a_bilinear_layer_has_a_gradient_of_each_input() -> None:
    """Of 3 and 4 features 5: 60 weights."""
    fields = {"kind": LayerKind.LINEAR, "op": "bilinear", "in_channels": 3, "out_channels": 5, "forward_macs": 60}
    layer = conv(**fields, kernel_size=(1, 1), input_shapes=((3,), (4,)), output_shape=(5,))
    assert (layer_macs(layer).input_gradient, layer_macs(layer).training) == (120, 240)
    assert layer_macs(msgspec.structs.replace(layer, input_needs_gradient=False)).training == 120


def test_layers_without_products_have_traffic_and_no_macs() -> None:
    assert layer_macs(conv(kind=LayerKind.BATCH_NORM, op="batch_norm")).training == 0


def test_auxiliary_heads_are_trained_and_not_inferred() -> None:
    network = residual_network()
    assert inference_macs(network) == network.forward_macs < training_macs(network)


def test_an_unknown_convention_is_refused() -> None:
    with pytest.raises(ValueError, match="'exact' or 'paper'"):
        layer_macs(conv(), "rough")  # type: ignore[arg-type] # any field


@pytest.mark.parametrize(
    ("changes", "pixels_and_channels"),
    [
        ({"kernel_size": (7, 7)}, 34**2 * 128 * 49 * 64),  # inside the network a 7×7 is padded as any other
        ({"kernel_size": (5, 5)}, 34**2 * 128 * 25 * 64),
        ({"kernel_size": (5, 5), "input_needs_gradient": False}, 34**2 * 128 * 25 * 64),
        ({"groups": 4}, 34**2 * 128 * 9 * 16),
        ({"input_shapes": ((64, 32, 16),)}, 34 * 18 * 128 * 9 * 64),
        ({"kind": LayerKind.MATMUL, "op": "matmul"}, 128 * 64 * 9 * 16 * 16),  # no convolution: the forward's
    ],
)
def test_papers_input_gradient_by_hand(changes: dict[str, object], pixels_and_channels: int) -> None:
    assert layer_macs(conv(**changes), "paper").input_gradient == pixels_and_channels


def test_what_runs_once_counts_for_every_mini_batch_and_auxiliary_heads_in_training_alone() -> None:
    """MACs of 100 an image, 10 a mini-batch, 7 an image of an auxiliary head; none of them has an input's gradient."""
    plain = {"kind": LayerKind.LINEAR, "op": "linear", "input_needs_gradient": False}
    layers = (
        conv(**plain, forward_macs=100),
        conv(**plain, forward_macs=10, once=True),
        conv(**plain, forward_macs=7, training_only=True),
    )
    network = Network(name="n", input_shape=(3, 8, 8), num_classes=2, layers=layers, edges=(), parameters=())
    assert (inference_macs(network), training_macs(network)) == (110, 2 * 117)
    assert inference_macs(network, images=50, mini_batches=4) == 50 * 100 + 4 * 10
    assert training_macs(network, images=50, mini_batches=4) == 2 * (50 * 107 + 4 * 10)
    assert training_macs(network, "paper", images=50, mini_batches=4) == 3 * (50 * 107 + 4 * 10)


def test_utilisation_is_two_flops_a_mac_over_what_the_gpus_could_do() -> None:
    # 10¹² MACs in 2 GPU seconds of 4·10¹² FLOP/s
    assert flops_utilization(1e12, 2.0, 4e12) == pytest.approx(0.25)
    assert flops_utilization(1e12, 2.0, None) is None
