from __future__ import annotations

import pytest

from ptsim.costs.flops import inference_macs, layer_macs, training_macs
from ptsim.network import Layer, LayerKind
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


def test_paper_counts_a_linear_layer_three_times() -> None:
    fields = {"kind": LayerKind.LINEAR, "op": "linear", "in_channels": 64, "out_channels": 10, "forward_macs": 640}
    linear = conv(**fields, kernel_size=(1, 1), input_shapes=((64,),), output_shape=(10,))
    assert layer_macs(linear, "paper").training == 3 * 64 * 10


def test_layers_without_products_have_traffic_and_no_macs() -> None:
    assert layer_macs(conv(kind=LayerKind.BATCH_NORM, op="batch_norm")).training == 0


def test_auxiliary_heads_are_trained_and_not_inferred() -> None:
    network = residual_network()
    assert inference_macs(network) == network.forward_macs < training_macs(network)


def test_an_unknown_convention_is_refused() -> None:
    with pytest.raises(ValueError, match="'exact' or 'paper'"):
        layer_macs(conv(), "rough")  # type: ignore[arg-type] # any field
