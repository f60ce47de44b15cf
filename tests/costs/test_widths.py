"""What autocast leaves of every tensor, and what autograd keeps, by hand: 3 images of 48 elements."""

from __future__ import annotations

import msgspec
import pytest

from ptsim.costs.widths import Widths
from ptsim.network import Layer, LayerKind, Network, Precision

SHAPE = (3, 4, 4)


def layer(kind: LayerKind, op: str, *, inputs: int = 1, **changes: object) -> Layer:
    plain = Layer(
        name="x", kind=kind, op=op, in_channels=3, out_channels=3, input_shapes=(SHAPE,) * inputs, output_shape=SHAPE
    )
    return msgspec.structs.replace(plain, **changes)


def widths(only: Layer, sources: str, *, gpu: bool, precision: Precision = Precision.FP16) -> Widths:
    """After `half`, a convolution, and `wide`, which multiplies its output by an fp32 parameter."""
    half = layer(LayerKind.CONV, "conv2d", name="half")
    wide = layer(LayerKind.ELEMENTWISE, "mul", name="wide", num_parameters=3)
    names = {"h": "half", "w": "wide"}
    edges = (("half", "wide"), *((names[source], "x") for source in sources))
    network = Network(name="n", input_shape=SHAPE, num_classes=2, layers=(half, wide, only), edges=edges, parameters=())
    return Widths(network, precision, gpu=gpu)


@pytest.mark.parametrize(
    ("kind", "op", "sources", "on_gpu", "on_cpu"),
    [
        (LayerKind.ACTIVATION, "relu", "h", 2, 2),
        (LayerKind.ACTIVATION, "relu", "w", 4, 4),
        (LayerKind.ACTIVATION, "softmax", "h", 4, 2),
        (LayerKind.NORM, "layer_norm", "h", 4, 2),
        (LayerKind.NORM, "instance_norm", "h", 2, 2),
        (LayerKind.BATCH_NORM, "batch_norm", "h", 2, 2),
        (LayerKind.POOL, "grid_sample", "h", 2, 4),
        (LayerKind.POOL, "lp_pool2d", "h", 4, 2),
        (LayerKind.POOL, "max_pool3d", "h", 2, 4),
        (LayerKind.RESHAPE, "reflection_pad2d", "h", 2, 4),
        (LayerKind.NORM, "local_response_norm", "h", 4, 4),
        (LayerKind.OTHER, "cdist", "h", 4, 4),
        (LayerKind.OTHER, "renorm", "h", 4, 2),
        (LayerKind.OTHER, "cumsum", "h", 4, 2),
        (LayerKind.OTHER, "prod", "h", 4, 4),
        (LayerKind.MATMUL, "matmul", "w", 2, 2),
        (LayerKind.CONCAT, "cat", "hw", 4, 4),
        (LayerKind.ACTIVATION, "relu", "", 4, 4),  # of the images
    ],
)
def test_the_width_of_a_result(kind: LayerKind, op: str, sources: str, on_gpu: int, on_cpu: int) -> None:
    only = layer(kind, op, inputs=max(1, len(sources)))
    assert [widths(only, sources, gpu=gpu).output["x"] for gpu in (True, False)] == [on_gpu, on_cpu]
    assert widths(only, sources, gpu=True, precision=Precision.TF32).output["x"] == 4


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_a_comparison_gives_a_byte_an_element_and_so_does_what_moves_it(precision: Precision) -> None:
    larger = layer(LayerKind.OTHER, "gt", name="larger", input_needs_gradient=False)
    spread = layer(LayerKind.RESHAPE, "expand", name="spread", view=True)
    both = layer(LayerKind.OTHER, "and", name="both", inputs=2)
    numbers = layer(LayerKind.ELEMENTWISE, "float", name="numbers")
    product = layer(LayerKind.ELEMENTWISE, "mul", name="product", inputs=2)
    half = layer(LayerKind.CONV, "conv2d", name="half")
    edges = [("half", "larger"), ("larger", "spread"), ("larger", "both"), ("spread", "both"), ("both", "numbers")]
    edges += [("half", "product"), ("both", "product")]
    network = Network(
        name="n", input_shape=SHAPE, num_classes=2, layers=(half, larger, spread, both, numbers, product),
        edges=tuple(edges), parameters=(),
    )  # fmt: skip
    found = Widths(network, precision, gpu=True).output
    width = precision.activation_bytes
    assert found == {"half": width, "larger": 1, "spread": 1, "both": 1, "numbers": 4, "product": width}


@pytest.mark.parametrize("op", ["zeros_like", "new_zeros"])
def test_zeros_like_what_was_made_before_are_as_wide_and_stay_so_when_written(op: str) -> None:
    half = layer(LayerKind.CONV, "conv2d", name="half")
    zeros = layer(LayerKind.RESHAPE, op, name="zeros", inputs=0, input_needs_gradient=False)
    written = layer(LayerKind.RESHAPE, "setitem", name="written", inputs=2, inplace=True)
    network = Network(
        name="n", input_shape=SHAPE, num_classes=2, layers=(half, zeros, written),
        edges=(("zeros", "written"), ("half", "written")), parameters=(),
    )  # fmt: skip
    assert Widths(network, Precision.FP16, gpu=True).output == {"half": 2, "zeros": 2, "written": 2}


def test_a_parameter_among_the_operands_makes_the_result_fp32() -> None:
    for kind, expected in ((LayerKind.ELEMENTWISE, 4), (LayerKind.CONCAT, 4), (LayerKind.ACTIVATION, 2)):
        assert widths(layer(kind, "o", num_parameters=3), "h", gpu=True).output["x"] == expected


@pytest.mark.parametrize(
    ("only", "sources", "on_gpu", "on_cpu"),
    [
        (layer(LayerKind.ACTIVATION, "relu", saved_elements=48), "h", 2 * 144, 2 * 144),
        (layer(LayerKind.ACTIVATION, "relu", saved_elements=48), "w", 4 * 144, 4 * 144),
        (layer(LayerKind.ACTIVATION, "relu", saved_elements=48, once=True), "h", 2 * 48, 2 * 48),
        (layer(LayerKind.ACTIVATION, "softmax", saved_elements=48), "h", 4 * 144, 2 * 144),
        # A GPU's layer norm keeps an fp32 copy of a half-precision input, also where that is kept by somebody else.
        (layer(LayerKind.NORM, "layer_norm", saved_elements=0), "h", 4 * 144, 0),
        (layer(LayerKind.NORM, "layer_norm", saved_elements=0), "w", 0, 0),
        (layer(LayerKind.NORM, "layer_norm", saved_elements=96), "h", 4 * 288, 2 * 288),
        # A GPU keeps a boolean mask in place of a scaled one; 5 bytes an image and 7 in all are of other kinds.
        (
            layer(LayerKind.DROPOUT, "dropout", saved_elements=48, saved_other_bytes=5, saved_fixed_bytes=7),
            "h",
            144 + 15 + 7,
            2 * 144 + 15 + 7,
        ),
        (layer(LayerKind.DROPOUT, "dropout", saved_elements=0, saved_other_bytes=5), "h", 15, 15),
        # A product keeps the half-precision copy of an fp32 operand, whoever keeps the original; but once, and for the
        # weights' gradient only.
        (layer(LayerKind.LINEAR, "linear", saved_elements=0), "h", 0, 0),
        (layer(LayerKind.LINEAR, "linear", saved_elements=0), "w", 2 * 144, 2 * 144),
        (layer(LayerKind.LINEAR, "linear", saved_elements=48), "w", 2 * 144, 2 * 144),
        (layer(LayerKind.LINEAR, "linear", saved_elements=0, weight_needs_gradient=False), "w", 0, 0),
        (layer(LayerKind.MATMUL, "matmul", saved_elements=0, weight_needs_gradient=False), "w", 2 * 144, 2 * 144),
        (layer(LayerKind.MATMUL, "matmul", inputs=2, saved_elements=0), "hw", 2 * 144, 2 * 144),
        (layer(LayerKind.MATMUL, "matmul", inputs=2, saved_elements=48), "hw", 2 * 288, 2 * 288),
        # Of two inputs one comes from no layer: all of it is taken for as wide as what is known.
        (layer(LayerKind.MATMUL, "matmul", inputs=2, saved_elements=0), "w", 2 * 288, 2 * 288),
        (layer(LayerKind.MATMUL, "matmul", inputs=2, saved_elements=0), "h", 0, 0),
        (layer(LayerKind.MATMUL, "matmul", inputs=2, saved_elements=0, shared_inputs=(1,)), "w", 2 * 192, 2 * 192),
    ],
)
def test_bytes_that_autograd_keeps_of_three_images(only: Layer, sources: str, on_gpu: int, on_cpu: int) -> None:
    assert [widths(only, sources, gpu=gpu).saved(only, 3) for gpu in (True, False)] == [on_gpu, on_cpu]


def test_without_autocast_everything_is_kept_in_fp32_but_a_gpus_dropout_mask() -> None:
    kept = layer(LayerKind.LINEAR, "linear", saved_elements=48, num_parameters=9)
    plain = widths(kept, "h", gpu=True, precision=Precision.FP32)
    assert (plain.saved(kept, 3), plain.weight_copy(kept)) == (4 * 144, 0)
    mask = layer(LayerKind.DROPOUT, "dropout", saved_elements=48)
    masks = [widths(mask, "h", gpu=gpu, precision=Precision.FP32).saved(mask, 3) for gpu in (True, False)]
    assert masks == [144, 4 * 144]


def test_only_products_have_half_precision_copies_of_their_weights() -> None:
    for kind, expected in ((LayerKind.LINEAR, 18), (LayerKind.MATMUL, 18), (LayerKind.ACTIVATION, 0)):
        only = layer(kind, "o", num_parameters=9)
        assert widths(only, "h", gpu=True).weight_copy(only) == expected


def test_a_swin_transformers_window_attention_keeps_its_scores_in_fp32_too() -> None:
    """49 tokens of 64 channels are 2 heads of 32: 2 · 49² scores an image, 4 bytes each; a score costs 2 · 32 MACs.

    Beside them are four projections of 64 · 64 · 49 MACs.
    """
    macs = 4 * 64 * 64 * 49 + 2 * 49**2 * 2 * 32
    only = layer(
        LayerKind.MATMUL,
        "shifted_window_attention",
        input_shapes=((49, 64),),
        output_shape=(49, 64),
        forward_macs=macs,
    )
    assert widths(only, "h", gpu=True).saved(only, 3) == 3 * 4 * 2 * 49**2
    assert widths(only, "h", gpu=True, precision=Precision.FP32).saved(only, 3) == 0
    projections = msgspec.structs.replace(only, forward_macs=64 * 64 * 49)
    assert widths(projections, "h", gpu=True).saved(projections, 3) == 0
