"""One name for every operator, however it is called."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ptsim.network import LayerKind
from ptsim.operators import (
    AUTOCAST_FP32_CPU,
    AUTOCAST_FP32_GPU,
    DIFFERENCES,
    KIND_OF_OP,
    SUMS,
    hands_on,
    plain_name,
    registered_by,
)


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


def listed_by_torch(policy: str) -> set[str]:
    """The operators under a macro of the header in which torch lists what a GPU's autocast does."""
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    lines = itertools.takewhile(str.strip, header.read_text().partition(f"#define {policy}(_)")[2].splitlines())
    return set(re.findall(r"_\((\w+)", "\n".join(lines)))


def is_loss(name: str) -> bool:
    return "loss" in name or name in ("kl_div", "binary_cross_entropy", "binary_cross_entropy_with_logits")


def test_on_a_gpu_autocast_runs_in_fp32_what_torch_lists() -> None:
    listed = listed_by_torch("AT_FORALL_FP32") | listed_by_torch("AT_FORALL_FP32_SET_OPT_DTYPE")
    assert {"cdist", "softmax"} <= listed
    assert {name for name in listed if name in KIND_OF_OP and not is_loss(name)} <= AUTOCAST_FP32_GPU
    others = listed_by_torch("AT_FORALL_LOWER_PRECISION_FP") | listed_by_torch("AT_FORALL_PROMOTE")
    assert {"conv2d", "grid_sampler"} <= others
    assert not others & AUTOCAST_FP32_GPU


NARROWED_ON_CPU = """
    conv1d conv2d conv3d bmm mm linalg_vecdot baddbmm addmm _addmm_activation addbmm linear _convolution matmul conv_tbc
    mkldnn_rnn_layer conv_transpose1d conv_transpose2d conv_transpose3d prelu scaled_dot_product_attention
    _native_multi_head_attention
"""
WIDEST_ON_CPU = "stack cat index_copy"
COMPLEX_OR_INNER = "polar stft view_as_complex linalg_eig linalg_eigvals _grid_sampler_2d_cpu_fallback _lu_with_info"


def test_on_a_cpu_autocast_runs_in_fp32_what_torch_has_registered() -> None:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    registered = {name[6:].partition(".")[0] for name in names if has_kernel(name, "AutocastCPU")}
    assert {"cdist", "conv2d"} <= registered
    others = " ".join((NARROWED_ON_CPU, WIDEST_ON_CPU, COMPLEX_OR_INNER)).split()
    wide = {name for name in registered.difference(others) if not is_loss(name) and not name.startswith("fft_")}
    made_of_them = {"grid_sample", "lp_pool3d", "local_response_norm"}
    there = {name[6:].partition(".")[0] for name in names}  # in this torch
    assert (AUTOCAST_FP32_CPU - made_of_them) & there <= wide
    assert {name for name in wide if name in KIND_OF_OP} <= AUTOCAST_FP32_CPU


MAPS = torch.rand(2, 8, 8, 8)
VOLUMES = torch.rand(2, 2, 4, 4, 4)
CALLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "avg_pool3d": lambda x: F.avg_pool3d(x, 2),
    "max_pool3d": lambda x: F.max_pool3d(x, 2),
    "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x, 1),
    "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(x, 1),
    "lp_pool3d": lambda x: F.lp_pool3d(x, 2, 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "lp_pool2d": lambda x: F.lp_pool2d(x, 2, 2),
    "reflection_pad2d": nn.ReflectionPad2d(1),
    "replication_pad2d": nn.ReplicationPad2d(1),
    "local_response_norm": nn.LocalResponseNorm(2),
    "cdist": lambda x: torch.cdist(x, x),
    "prod": lambda x: torch.prod(x, 1),
    "softmax": lambda x: x.softmax(1),
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "sum": lambda x: x.sum(1),
}


@pytest.mark.parametrize("op", CALLS)
def test_a_cpus_autocast_gives_the_width_that_the_list_says(op: str) -> None:
    given = (VOLUMES if op.endswith("3d") else MAPS).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result = CALLS[op](given)
    assert (result.dtype is torch.float32) == (op in AUTOCAST_FP32_CPU)
