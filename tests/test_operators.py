"""One name for every operator, however it is called."""

from __future__ import annotations

import pytest
import torch

from ptsim.network import LayerKind
from ptsim.operators import DIFFERENCES, KIND_OF_OP, SUMS, hands_on, plain_name, registered_by


@pytest.mark.parametrize(
    ("called", "name", "kind"),
    [
        ("add", "add", LayerKind.ELEMENTWISE),
        ("add_", "add", LayerKind.ELEMENTWISE),
        ("__add__", "add", LayerKind.ELEMENTWISE),
        ("iadd", "add", LayerKind.ELEMENTWISE),
        ("isub", "sub", LayerKind.ELEMENTWISE),
        ("subtract", "sub", LayerKind.ELEMENTWISE),
        ("itruediv", "div", LayerKind.ELEMENTWISE),
        ("divide", "div", LayerKind.ELEMENTWISE),
        ("multiply_", "mul", LayerKind.ELEMENTWISE),
        ("interpolate", "interpolate", LayerKind.POOL),  # not Python's way to write something in place
        ("__rtruediv__", "rdiv", LayerKind.ELEMENTWISE),
        ("grid_sampler", "grid_sample", LayerKind.POOL),
        ("concat", "cat", LayerKind.CONCAT),
        ("index_select", "index_select", LayerKind.RESHAPE),
        ("LogSigmoid", "logsigmoid", LayerKind.ACTIVATION),
        ("log_sigmoid", "logsigmoid", LayerKind.ACTIVATION),
        ("i", "i", LayerKind.OTHER),
        ("_", "", LayerKind.OTHER),
    ],
)
def test_an_operator_has_one_name(called: str, name: str, kind: LayerKind) -> None:
    assert plain_name(called) == name
    assert KIND_OF_OP.get(name, LayerKind.OTHER) is kind


def test_sums_and_differences_are_named_plainly() -> None:
    assert {plain_name(name) for name in ("add", "iadd", "add_")} == SUMS
    assert {plain_name(name) for name in ("sub", "isub", "subtract", "rsub")} == DIFFERENCES


@pytest.mark.parametrize("op", ["add", "sub", "rsub", "mul"])
def test_an_operand_gets_the_gradient_itself_where_torch_makes_no_tensor_for_it(op: str) -> None:
    operands = [torch.rand(3, requires_grad=True) for _ in range(2)]
    result = getattr(torch, op)(*operands)
    assert result.grad_fn is not None
    gradient = torch.ones(3)
    found = result.grad_fn(gradient)
    assert [hands_on(op, n) for n in range(2)] == [given.data_ptr() == gradient.data_ptr() for given in found]


@pytest.mark.parametrize(
    ("function", "library"),
    [
        (torch.ops.aten.relu.default, "aten"),
        (torch.ops.aten.relu, "aten"),
        (torch.relu, None),
        (torch.nn.functional.relu, None),
        (torch.ops.higher_order.cond, None),
        ("relu", None),
    ],
)
def test_an_operator_belongs_to_the_library_that_registered_it(function: object, library: str | None) -> None:
    assert registered_by(function) == library
