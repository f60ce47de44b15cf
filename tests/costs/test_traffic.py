from __future__ import annotations

import pytest

from ptsim.costs.traffic import batch_norm_bytes, layer_traffic, regularizer_traffic, update_traffic
from ptsim.network import Layer, LayerKind, Network, Parameter


def layer(kind: LayerKind, op: str, inputs: int = 1, **changes: object) -> Layer:
    fields: dict[str, object] = {
        "name": op,
        "kind": kind,
        "op": op,
        "in_channels": 16,
        "out_channels": 16,
        "input_shapes": ((16, 8, 8),) * inputs,
        "output_shape": (16, 8, 8),
    }
    return Layer(**(fields | changes))  # type: ignore[arg-type] # any field


ELEMENTS = 16 * 8 * 8


def test_batch_norm_has_three_accesses_forward_and_five_backward() -> None:
    moved = layer_traffic(layer(LayerKind.BATCH_NORM, "batch_norm"), batch=4, element_bytes=4)
    assert moved.forward_bytes == 3 * ELEMENTS * 4 * 4
    assert moved.backward_bytes == 5 * ELEMENTS * 4 * 4


def test_a_convolution_reads_and_writes_its_operands_once_per_pass() -> None:
    conv = layer(LayerKind.CONV, "conv2d", num_parameters=2304)
    moved = layer_traffic(conv, batch=2, element_bytes=2)
    assert moved.forward_bytes == (2 * 2 * ELEMENTS + 2304) * 2
    # weight gradient: x, dy → dW; input gradient: dy, W → dx
    assert moved.backward_bytes == (4 * 2 * ELEMENTS + 2 * 2304) * 2


def test_the_first_convolution_has_no_input_gradient() -> None:
    conv = layer(LayerKind.CONV, "conv2d", num_parameters=2304, input_needs_gradient=False)
    assert layer_traffic(conv, batch=1, element_bytes=4).backward_bytes == (2 * ELEMENTS + 2304) * 4


def test_relu_reads_what_it_kept_and_a_sum_only_adds_gradients_up() -> None:
    assert layer_traffic(layer(LayerKind.ACTIVATION, "relu"), batch=1, element_bytes=4).backward_bytes == 12 * ELEMENTS
    added = layer_traffic(layer(LayerKind.ELEMENTWISE, "add", inputs=2), batch=1, element_bytes=4)
    assert added.forward_bytes == 12 * ELEMENTS
    assert added.backward_bytes == 12 * ELEMENTS


def test_a_view_moves_nothing() -> None:
    moved = layer_traffic(layer(LayerKind.RESHAPE, "flatten", view=True), batch=8, element_bytes=4)
    assert (moved.forward_bytes, moved.backward_bytes) == (0, 0)


def network() -> Network:
    return Network(
        name="n",
        input_shape=(16, 8, 8),
        num_classes=2,
        layers=(
            layer(LayerKind.CONV, "conv2d", num_parameters=2304),
            layer(LayerKind.CONV, "depthwise", num_parameters=144, groups=16),
            layer(LayerKind.BATCH_NORM, "batch_norm", num_parameters=32),
        ),
        edges=(("conv2d", "depthwise"), ("depthwise", "batch_norm")),
        parameters=(
            Parameter(name="b.bias", layer="batch_norm", shape=(16,)),
            Parameter(name="b.weight", layer="batch_norm", shape=(16,)),
            Parameter(name="d.weight", layer="depthwise", shape=(16, 1, 3, 3)),
            Parameter(name="c.weight", layer="conv2d", shape=(16, 16, 3, 3)),
        ),
    )


def test_batch_norm_bytes_are_eight_accesses_per_element() -> None:
    assert batch_norm_bytes(network()) == 8 * ELEMENTS * 4
    assert batch_norm_bytes(network(), element_bytes=2) == 8 * ELEMENTS * 2


def test_a_fused_sgd_update_reads_three_and_writes_two_tensors() -> None:
    assert update_traffic(network(), "sgd", fused=True) == 5 * 4 * (2304 + 144 + 32)
    assert update_traffic(network(), "sgd") > update_traffic(network(), "sgd", fused=True)
    with pytest.raises(ValueError, match="lamb"):
        update_traffic(network(), "lamb")


def test_the_regularizer_touches_no_depthwise_and_no_batch_norm_weight() -> None:
    assert regularizer_traffic(network()) == 5 * 4 * 2304


def test_a_mini_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        layer_traffic(network().layers[0], batch=0, element_bytes=4)
