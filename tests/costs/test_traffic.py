from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptsim.costs.kernels import network_kernels
from ptsim.costs.traffic import LayerTraffic, batch_norm_bytes, network_traffic, update_traffic
from ptsim.criteria import penalty_work
from ptsim.network import Layer, LayerKind, Network, Parameter, Precision
from ptsim.optimizers import OPTIMIZERS
from ptsim.setting import StepSetting
from tests.traces import residual_network


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


def moved_by(only: Layer, *, batch: int) -> LayerTraffic:
    """What one layer moves in fp32."""
    alone = Network(name="n", input_shape=(16, 8, 8), num_classes=1, layers=(only,), edges=(), parameters=())
    return network_traffic(alone, StepSetting(batch=batch))[0]


def test_batch_norm_has_three_accesses_forward_and_five_backward() -> None:
    moved = moved_by(layer(LayerKind.BATCH_NORM, "batch_norm"), batch=4)
    assert moved.forward_bytes == 3 * ELEMENTS * 4 * 4
    assert moved.backward_bytes == 5 * ELEMENTS * 4 * 4


def test_a_convolution_reads_and_writes_its_operands_once_per_pass() -> None:
    conv = layer(LayerKind.CONV, "conv2d", num_parameters=2304, kernel_size=(3, 3))
    moved = moved_by(conv, batch=2)
    assert moved.forward_bytes == (2 * 2 * ELEMENTS + 2304) * 4
    # weight gradient: x, dy → dW; input gradient: dy, W → dx
    assert moved.backward_bytes == (4 * 2 * ELEMENTS + 2 * 2304) * 4


def test_the_first_convolution_has_no_input_gradient() -> None:
    conv = layer(LayerKind.CONV, "conv2d", num_parameters=2304, kernel_size=(3, 3), input_needs_gradient=False)
    assert moved_by(conv, batch=1).backward_bytes == (2 * ELEMENTS + 2304) * 4


def test_relu_reads_what_it_kept_and_a_sum_hands_its_gradient_on() -> None:
    assert moved_by(layer(LayerKind.ACTIVATION, "relu"), batch=1).backward_bytes == 12 * ELEMENTS
    added = moved_by(layer(LayerKind.ELEMENTWISE, "add", inputs=2), batch=1)
    assert added.forward_bytes == 12 * ELEMENTS
    assert added.backward_bytes == 0


@pytest.mark.parametrize("op", ["sub", "rsub"])
def test_the_gradient_of_a_subtrahend_is_read_and_its_negative_written(op: str) -> None:
    moved = moved_by(layer(LayerKind.ELEMENTWISE, op, inputs=2), batch=1)
    assert (moved.forward_bytes, moved.backward_bytes) == (12 * ELEMENTS, 8 * ELEMENTS)


def test_gradients_of_branches_are_added_up_where_they_meet() -> None:
    """By hand, a ReLU whose output a convolution and a sum read: 3 accesses of its own and 3 of the addition."""
    relu, conv = layer(LayerKind.ACTIVATION, "relu"), layer(LayerKind.CONV, "conv2d", num_parameters=256)
    total = layer(LayerKind.ELEMENTWISE, "add", inputs=2)
    branched = Network(
        name="b",
        input_shape=(16, 8, 8),
        num_classes=2,
        layers=(relu, conv, total),
        edges=(("relu", "conv2d"), ("relu", "add"), ("conv2d", "add")),
        parameters=(),
    )
    moved = network_traffic(branched, StepSetting(batch=2))
    assert [m.backward_bytes for m in moved] == [2 * 6 * 4 * ELEMENTS, 4 * (2 * 4 * ELEMENTS + 2 * 256), 0]


def test_a_layer_norm_keeps_its_row_on_the_chip() -> None:
    moved = moved_by(layer(LayerKind.NORM, "layer_norm"), batch=4)
    assert (moved.forward_bytes, moved.backward_bytes) == (2 * ELEMENTS * 16, 4 * ELEMENTS * 16)


@pytest.mark.parametrize("precision", list(Precision))
def test_traffic_and_the_kernels_of_a_step_move_the_same_bytes(precision: Precision) -> None:
    network, setting = residual_network(), StepSetting(batch=3, precision=precision)
    kernels = network_kernels(network, setting, tensor_cores=True)
    traffic = network_traffic(network, setting)
    assert sum(t.forward_bytes + t.backward_bytes for t in traffic) == pytest.approx(kernels.moved_bytes.sum())


def test_nothing_runs_backward_where_nobody_needs_the_gradient() -> None:
    scaled = layer(LayerKind.ELEMENTWISE, "mul", inputs=2, input_needs_gradient=False)
    assert moved_by(scaled, batch=1).backward_bytes == 0


def test_a_view_moves_nothing() -> None:
    moved = moved_by(layer(LayerKind.RESHAPE, "flatten", view=True), batch=8)
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
    assert update_traffic(network(), "sgd", momentum=0.0, fused=True) == 3 * 4 * (2304 + 144 + 32)
    with pytest.raises(ValueError, match="lamb"):
        update_traffic(network(), "lamb")


class Moved(TorchDispatchMode):
    """Counts what operators on lists of tensors (torch's "foreach" form) read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "_foreach_" not in str(func):
            return out
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
        read = {leaf.data_ptr(): leaf for leaf in given}.values()
        written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)] or list(args[0])
        self.elements += sum(leaf.numel() for leaf in [*read, *written])
        return out


@pytest.mark.parametrize(
    ("name", "momentum", "states"),
    [("sgd", 0.0, 0), ("sgd", 0.9, 1), ("rmsprop", 0.0, 1), ("rmsprop", 0.9, 2), ("adam", None, 2), ("adamw", None, 2)],
)
def test_an_update_moves_and_keeps_what_its_momentum_needs(name: str, momentum: float | None, states: int) -> None:
    weight = nn.Parameter(torch.ones(1000))
    kinds: dict[str, Any] = {
        "sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW
    }  # fmt: skip
    more = {} if momentum is None else {"momentum": momentum}
    optimizer = kinds[name]([weight], lr=0.1, weight_decay=5e-4, foreach=True, **more)
    weight.grad = torch.ones(1000)
    optimizer.step()
    with Moved() as moved:
        optimizer.step()
    row = OPTIMIZERS.find(name)
    assert moved.elements // 1000 == row.moved(momentum)  # beside them the number of steps
    kept = [v for v in optimizer.state[weight].values() if isinstance(v, Tensor) and v.ndim]
    assert row.states(momentum) == states == len(kept)


def test_the_regularizer_touches_no_depthwise_and_no_batch_norm_weight() -> None:
    """A 3×3 convolution of 2,304 weights; the accesses themselves are counted in tests/prune/test_group_lasso.py."""
    assert penalty_work("group_lasso", network(), gpu=False).num_bytes == 4 * (7 * 9 + 2) * 2304 // 9
    assert penalty_work("group_lasso", network(), gpu=True).num_bytes == 20 * 4 * 2304
    assert penalty_work("slimming", network(), gpu=True).num_bytes == 3 * 4 * 16


def test_a_mini_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        moved_by(network().layers[0], batch=0)


LESS = ELEMENTS // 4  # of an output of 16 × 4 × 4
CASTS = ("type", "to", "float", "half", "bfloat16", "double", "type_as")


@pytest.mark.parametrize(
    ("kind", "op", "forward", "backward"),
    [
        (LayerKind.ACTIVATION, "glu", 4 * (ELEMENTS + LESS), 4 * (2 * ELEMENTS + LESS)),  # dy, what was kept, dx
        (LayerKind.POOL, "avg_pool2d", 4 * (ELEMENTS + LESS), 4 * (ELEMENTS + LESS)),
        (LayerKind.POOL, "max_pool2d", 4 * (ELEMENTS + LESS) + 8 * LESS, 4 * (ELEMENTS + LESS) + 8 * LESS),
        (LayerKind.DROPOUT, "dropout", 4 * (ELEMENTS + LESS) + LESS, 4 * (ELEMENTS + LESS) + LESS),
        (LayerKind.RESHAPE, "roll", 4 * 2 * LESS, 4 * 2 * LESS),
        (LayerKind.RESHAPE, "pad", 4 * 2 * LESS, 4 * (ELEMENTS + 2 * LESS)),  # by less: zeros, and dy in, dx out
        (LayerKind.CONCAT, "cat", 4 * 2 * LESS, 0),
        (LayerKind.NORM, "group_norm", 4 * 2 * LESS, 4 * 4 * LESS),
        (LayerKind.NORM, "instance_norm", 4 * 3 * LESS, 4 * 5 * LESS),  # torch runs a batch norm
        (LayerKind.BATCH_NORM, "batch_norm", 4 * 3 * ELEMENTS, 4 * 5 * ELEMENTS),
        (LayerKind.ELEMENTWISE, "exp", 4 * (ELEMENTS + LESS), 4 * 3 * LESS),  # dy, the result, dx, all of one size
        (LayerKind.ELEMENTWISE, "mul", 4 * (ELEMENTS + LESS), 4 * 2 * LESS),  # by a number: dy, dx
        (LayerKind.ELEMENTWISE, "floordiv", 4 * (ELEMENTS + LESS), 4 * (2 * ELEMENTS + LESS)),  # of no formula known
        *((LayerKind.ELEMENTWISE, cast, 4 * (ELEMENTS + LESS), 4 * (ELEMENTS + LESS)) for cast in CASTS),  # dy, dx
        (LayerKind.ELEMENTWISE, "sub", 4 * (ELEMENTS + LESS), 0),
        (LayerKind.ELEMENTWISE, "rsub", 4 * (ELEMENTS + LESS), 4 * 2 * LESS),  # the gradient read, its negative written
        (LayerKind.OTHER, "interpolate", 4 * (ELEMENTS + LESS), 4 * (ELEMENTS + LESS)),
    ],
)
def test_every_operand_is_read_and_every_result_written(kind: LayerKind, op: str, forward: int, backward: int) -> None:
    """A pooling's 8-byte positions and a dropout's 1-byte mask are written forward and read backward."""
    moved = moved_by(layer(kind, op, output_shape=(16, 4, 4)), batch=3)
    assert (moved.forward_bytes, moved.backward_bytes) == (3 * forward, 3 * backward)


def test_a_frozen_layer_on_images_runs_forward_alone_and_one_that_learns_backward_too() -> None:
    first = layer(LayerKind.BATCH_NORM, "batch_norm", input_needs_gradient=False)
    assert moved_by(first, batch=1).backward_bytes == 0
    learns = layer(LayerKind.BATCH_NORM, "batch_norm", input_needs_gradient=False, num_parameters=32)
    assert moved_by(learns, batch=1).backward_bytes == 4 * 5 * ELEMENTS
    frozen = layer(
        LayerKind.BATCH_NORM, "b", input_needs_gradient=False, num_parameters=32, weight_needs_gradient=False
    )
    assert moved_by(frozen, batch=1).backward_bytes == 0


def test_weights_that_batch_norm_normalises_are_no_images() -> None:
    standardised = layer(LayerKind.BATCH_NORM, "batch_norm", once=True)
    whole = network()
    more = Network(
        name="n", input_shape=(16, 8, 8), num_classes=2, layers=(*whole.layers, standardised), edges=(), parameters=()
    )
    assert batch_norm_bytes(more) == batch_norm_bytes(whole)


def test_an_update_moves_as_many_values_as_its_row_says_for_every_gradient() -> None:
    """SGD with momentum and weight decay 6 + 5, without momentum 6; a parameter without gradient is not touched."""
    elements = 2304 + 144 + 32
    idle = Parameter(name="idle", layer="", shape=(1000,))
    whole = network()
    more = Network(
        name="n",
        input_shape=(16, 8, 8),
        num_classes=2,
        layers=whole.layers,
        edges=whole.edges,
        parameters=(*whole.parameters, idle),
    )
    assert update_traffic(more) == update_traffic(more, OPTIMIZERS.find("sgd")) == 11 * 4 * elements
    assert update_traffic(more, momentum=0.0) == 6 * 4 * elements
    assert update_traffic(more, "adam") == 21 * 4 * elements
