"""Which operator a recorded ATen call is: shapes by hand from the definitions, and from torch itself."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ptsim.measure.kineto_events import Event
from ptsim.measure.kineto_operators import (
    computes_input_gradient,
    memory_format,
    number_of_elements,
    number_type,
    operator_name,
    operator_shape,
)

IMAGE = [4, 8, 5, 6]  # four images


def call(name: str, dims: list[Any] | None = None, values: list[str] | None = None, **arguments: Any) -> Event:
    known = {"input dims": dims, "concrete inputs": values, **arguments}
    return Event(name=name, category="cpu_op", thread=("1", "1"), begin_s=0.0, end_s=1.0, arguments=known)


CONV = [[4, 8, 15, 16], [32, 4, 3, 5], []]
# Name, shapes, values of the other arguments, and what the operator then is.
SHAPES: dict[str, tuple[str, list[Any], list[str], dict[str, Any]]] = {
    # (15 + 2·1 - 2 - 1) // 2 + 1 = 8, (16 + 2·2 - 2·4 - 1) // 1 + 1 = 12
    "convolution": (
        "aten::conv2d", CONV, ["", "", "", "[2, 1]", "[1, 2]", "[1, 2]", "2"],
        {"inputs": ((8, 15, 16),), "output": (32, 8, 12), "kernel": (3, 5), "stride": (2, 1), "padding": (1, 2),
         "dilation": (1, 2), "groups": 2, "bias": False, "batch": 4, "op": "conv2d"},
    ),
    "with a bias and one number for both axes": (
        "aten::conv2d", [[4, 8, 15, 16], [32, 8, 3, 3], [32]], ["", "", "", "[2]", "[1]", "[1]", "1"],
        {"output": (32, 8, 8), "stride": (2, 2), "padding": (1, 1), "groups": 1, "bias": True},
    ),
    "without values": ("aten::conv2d", [[4, 8, 15, 16], [32, 8, 3, 3], []], [], {"output": (32, 13, 14)}),
    # an even kernel of 2 pads nothing in front, one of 4 pads 1; the image keeps its size
    "same padding": (
        "aten::conv2d", [[4, 8, 15, 16], [8, 8, 2, 4], []], ["", "", "", "[1, 1]", "same", "[1, 1]", "1"],
        {"output": (8, 15, 16), "padding": (0, 1)},
    ),
    "valid padding": (
        "aten::conv2d", [[4, 8, 15, 16], [8, 8, 2, 4], []], ["", "", "", "[1, 1]", "'valid'", "[1, 1]", "1"],
        {"output": (8, 14, 13), "padding": (0, 0)},
    ),
    # upwards 4 × 4 windows of 5 + 2 and of 7 would begin at 0, 2, 4, 6; the first image ends at 6 behind its padding
    "max pooling upwards": (
        "aten::max_pool2d_with_indices", [[4, 8, 5, 7]], ["", "[2, 2]", "[2, 2]", "[1, 0]", "[1, 1]", "True"],
        {"op": "max_pool2d", "output": (8, 3, 4), "padding": (1, 0)},
    ),
    "max pooling": (
        "aten::max_pool2d", [[4, 8, 5, 7]], ["", "[2, 2]", "[2, 2]", "[1, 0]", "[1, 1]", "False"],
        {"output": (8, 3, 3)},
    ),
    # (9 - 2·2 - 1) // 3 + 1 = 2 without a stride of its own
    "dilated max pooling": (
        "aten::max_pool2d", [[4, 8, 9, 9]], ["", "[3, 3]", "[]", "[0, 0]", "[2, 2]", "False"],
        {"output": (8, 2, 2), "stride": (3, 3), "dilation": (2, 2)},
    ),
    "average pooling upwards": (
        "aten::avg_pool2d", [[4, 8, 7, 7]], ["", "[2, 2]", "[2, 2]", "[0, 0]", "True", "False", ""],
        {"output": (8, 4, 4), "dilation": (1, 1)},
    ),
    "average pooling": (
        "aten::avg_pool2d", [[4, 8, 7, 7]], ["", "[2, 2]", "[2, 2]", "[0, 0]", "False", "True", ""],
        {"output": (8, 3, 3)},
    ),
    "adaptive pooling": ("aten::adaptive_avg_pool2d", [IMAGE], ["", "[3, 2]"], {"output": (8, 3, 2)}),
    "mean of the image": ("aten::mean", [IMAGE], ["", "[2, 3]", "False"], {"output": (8,)}),
    "mean that keeps its axes": ("aten::mean", [IMAGE], ["", "[2, 3]", "True"], {"output": (8, 1, 1)}),
    "mean from the back": ("aten::mean", [IMAGE], ["", "[-1]", "False"], {"output": (8, 5)}),
    "concatenation": ("aten::cat", [[IMAGE, [4, 3, 5, 6]]], ["", "1"], {"output": (11, 5, 6)}),
    "concatenation from the back": ("aten::cat", [[IMAGE, [4, 8, 5, 2]]], ["", "-1"], {"output": (8, 5, 8)}),
    "broadcast sum": (
        "aten::add", [IMAGE, [4, 8, 1, 1], []], [], {"inputs": ((8, 5, 6), (8, 1, 1)), "output": (8, 5, 6)}
    ),
    "sum of fewer axes": ("aten::add", [[4, 8, 5], [4, 5], []], [], {"output": (8, 5)}),
    "scaled by a number": ("aten::mul", [IMAGE, []], [], {"inputs": ((8, 5, 6),), "output": (8, 5, 6)}),
    "linear": (
        "aten::linear", [[4, 7, 16], [10, 16], [10]], [],
        {"inputs": ((7, 16),), "output": (7, 10), "bias": True},
    ),
    "linear without bias": ("aten::linear", [[4, 16], [10, 16], []], [], {"output": (10,), "bias": False}),
    "batch norm": ("aten::batch_norm", [IMAGE, [8], [8], [8], [8]], [], {"output": (8, 5, 6), "bias": True}),
    "activation with a weight": ("aten::prelu", [IMAGE, [8]], [], {"output": (8, 5, 6), "bias": False}),
    "in place": ("aten::relu_", [IMAGE], [], {"op": "relu", "inplace": True, "bias": False, "output": (8, 5, 6)}),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_a_calls_shapes_are_those_of_one_image(case: str) -> None:
    name, dims, values, expected = SHAPES[case]
    shape = operator_shape(call(name, dims, values))
    assert shape is not None
    assert shape.batch == 4
    assert {field: getattr(shape, field) for field in expected} == expected


@pytest.mark.parametrize(
    ("name", "dims", "values"),
    [
        ("aten::conv_transpose2d", CONV, []),
        ("aten::conv2d", [[8, 15, 16], [32, 8, 3, 3], []], []),  # a single image without its axis
        ("aten::mean", [IMAGE], ["", "[0]", "False"]),
        ("aten::mean", [IMAGE], ["", ""]),
        ("aten::cat", [[IMAGE, IMAGE]], ["", "0"]),  # joins mini-batches
        ("aten::stack", [[IMAGE, IMAGE]], ["", "1"]),  # makes an axis
        ("aten::add", [IMAGE, [8, 5, 6]], []),  # whose first axis is another one
        ("aten::flatten", [IMAGE], ["", "1", "-1"]),
        ("Fused", [IMAGE], []),
        ("aten::relu", [], []),
    ],
)
def test_what_is_no_operator_on_images_has_no_shape(name: str, dims: list[Any], values: list[str]) -> None:
    assert operator_shape(call(name, dims, values)) is None


def test_every_pooling_and_padding_has_the_size_that_torch_gives_it() -> None:
    for size, kernel, stride, upwards in itertools.product(range(4, 9), (1, 2, 3), (1, 2, 3), (True, False)):
        for padding in range(kernel // 2 + 1):
            image = torch.zeros(1, 1, size, size)
            expected = tuple(F.max_pool2d(image, kernel, stride, padding, ceil_mode=upwards).shape[1:])
            values = ["", *(f"[{n}, {n}]" for n in (kernel, stride, padding, 1)), str(upwards)]
            shape = operator_shape(call("aten::max_pool2d", [[1, 1, size, size]], values))
            assert shape is not None
            assert shape.output == expected, values


@pytest.mark.parametrize(
    ("name", "op"),
    [("aten::relu_", "relu"), ("aten::_softmax", "softmax"), ("aten::max_pool2d_with_indices", "max_pool2d"),
     ("torchvision::nms", "nms"), ("CompiledFunction", "CompiledFunction")],
)  # fmt: skip
def test_an_operator_has_one_name(name: str, op: str) -> None:
    assert operator_name(call(name)) == op


@pytest.mark.parametrize(
    ("dims", "strides", "expected"),
    [
        ([4, 8, 5, 6], [240, 30, 6, 1], "contiguous"),
        ([4, 8, 5, 6], [240, 1, 48, 8], "channels_last"),
        ([4, 1, 5, 6], [30, 1, 6, 1], None),  # one channel lies either way
        ([4, 8, 6, 1], [48, 1, 8, 8], None),  # one column, too
        ([4, 8], [8, 1], None),
    ],
)
def test_strides_tell_the_layout(dims: list[int], strides: list[int], expected: str | None) -> None:
    assert memory_format(call("aten::conv2d", [dims], **{"input strides": [strides]})) == expected


@pytest.mark.parametrize(
    ("name", "types", "expected"),
    [
        ("aten::_convolution", ["c10::Half", "float"], "c10::Half"),
        ("aten::mm", ["c10::BFloat16", "float"], "c10::BFloat16"),
        ("aten::addmm", ["float", "c10::Half", "c10::Half"], "c10::Half"),  # bias first
        ("aten::addmm", ["float"], None),
        ("aten::relu", ["c10::Half"], None),
    ],
)
def test_the_number_format_is_that_of_the_product_inside(name: str, types: list[str], expected: str | None) -> None:
    outer = call("aten::conv2d", **{"input type": ["float", "float"]})
    outer.children = [call(name, **{"input type": types})]
    assert number_type(outer) == expected


@pytest.mark.parametrize(
    ("mask", "expected"),
    [("[True, True, False]", True), ("[False, True, False]", False), ("[1, 1, 0]", True), ("[0, 1, 0]", False),
     ("", True)],
)  # fmt: skip
def test_the_mask_of_a_convolutions_backward_says_whether_its_input_gets_a_gradient(mask: str, expected: bool) -> None:
    node = call("autograd::engine::evaluate_function: ConvolutionBackward0")
    node.children = [call("aten::convolution_backward", values=["", "", mask])]
    assert computes_input_gradient(node) == expected


@pytest.mark.parametrize(
    ("dims", "expected"), [([[32, 8, 3, 3], [2]], 2304), ([], 0), ([[2**25, 2**25]], 0), ([[2**24, 2**24]], 2**48)]
)
def test_a_gradients_elements_are_the_product_of_its_axes(dims: list[Any], expected: int) -> None:
    assert number_of_elements(call("torch::autograd::AccumulateGrad", dims)) == expected
