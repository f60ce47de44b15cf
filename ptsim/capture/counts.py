"""How many multiply–accumulates does each graph node do in a forward pass? fvcore's counts, one scope per node.

fvcore attributes what it counts to modules; functional calls have none. So every node runs inside a scope module of
its own, and fvcore's per-module counts are per-node counts that sum to its total. Its gaps (element-wise operators,
pooling, attention) are filled through its own handles: one per output element, or per input element where an
operator reduces.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from ptsim.capture.chance import random_state_kept
from ptsim.capture.copies import copied
from ptsim.capture.graph import Way, example_input, output_tensors, symbolic_graph
from ptsim.errors import UnsupportedModelError, lacks_memory, on_one_line

with warnings.catch_warnings():
    for deprecated in (DeprecationWarning, FutureWarning):  # of torch 2.11, and of 2.14
        warnings.simplefilter("ignore", deprecated)  # fvcore uses torch.jit.script, which torch deprecates
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import bmm_flop_jit, conv_flop_count, elementwise_flop_counter, get_shape

_ONE_PER_OUTPUT = """
    add add_ sub sub_ rsub mul mul_ div div_ neg pow square sqrt rsqrt exp log abs maximum minimum where lerp reciprocal
    addcmul addcdiv masked_fill relu relu_ relu6 relu6_ leaky_relu leaky_relu_ prelu elu elu_ celu selu gelu silu silu_
    sin cos log1p erf mish
    sigmoid sigmoid_ tanh tanh_ hardtanh hardtanh_ hardswish hardswish_ hardsigmoid hardsigmoid_ softplus softmax
    log_softmax glu clamp clamp_ threshold threshold_ upsample_nearest2d upsample_bicubic2d"""
_ONE_PER_INPUT = """
    mean sum amax amin max_pool2d max_pool2d_with_indices avg_pool2d adaptive_max_pool2d adaptive_avg_pool1d avg_pool1d
    max_pool1d var std linalg_vector_norm"""
# Move, make or name elements; fvcore would warn that it does not know them.
_FREE = """
    flatten expand expand_as repeat repeat_interleave index_select scatter scatter_ pad unfold movedim bernoulli
    bernoulli_ dropout_ feature_dropout clone fill_ unflatten size numel new_ones ones_like rand_like rand dropout
    alpha_dropout index_add index_copy index_copy_ flip detach reshape_as view_as resolve_conj lift_fresh alias
    native_dropout empty_like feature_dropout_ tile tensor_split stack pixel_shuffle channel_shuffle
    _shape_as_tensor scalar_tensor eq ne lt gt"""

_FEW_POINTS = 25  # aten/src/ATen/native/Distance.cpp, cdist_impl
_NODE = "node_"  # before a node's name in that of its scope: a module cannot be called `to`


def forward_macs(model: nn.Module, input_shape: tuple[int, int, int], way: Way) -> dict[str, Counter[str]]:
    """Node of the training graph, traced in that way → operator → operations for one image in evaluation mode.

    One MAC is one operation. Every node is listed.

    Runs one image for real: torch.jit's tracer, which fvcore stands on, does not take tensors without storage.
    """
    with (
        torch.no_grad(),
        random_state_kept(model),
        _no_fused_attention(),
        _sizes_unchecked(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        graph = symbolic_graph(_detached_copy(model).train(), (1, *input_shape), ways=(way,))
        analysis = counter(_Scoped(graph.eval()), example_input(model, input_shape, batch=1))
        try:
            by_module = analysis.by_module_and_operator()
        except Exception as error:  # the model's code runs here, on what torch.jit puts in the place of sizes
            if lacks_memory(error):
                raise
            why = on_one_line(str(error).partition("While executing")[0])
            raise UnsupportedModelError(f"the operations of {type(model).__name__} cannot be counted: {why}") from error
    prefix = f"scopes.{_NODE}"
    return {name.removeprefix(prefix): counts for name, counts in by_module.items() if name.startswith(prefix)}


def counter(model: nn.Module, images: torch.Tensor) -> FlopCountAnalysis:
    """The analysis of fvcore for `model` with its gaps filled and its warnings off."""
    analysis = FlopCountAnalysis(model, images)
    handles: dict[str, Any] = {f"aten::{op}": elementwise_flop_counter(0, 1) for op in _ONE_PER_OUTPUT.split()}
    handles |= {f"aten::{op}": elementwise_flop_counter(1, 0) for op in _ONE_PER_INPUT.split()}
    handles |= {f"aten::{op}": None for op in _FREE.split()}
    handles["aten::scaled_dot_product_attention"] = _attention_macs
    handles["aten::_convolution_mode"] = _conv_macs
    handles["aten::einsum"] = _einsum_macs
    handles["aten::bilinear"] = _bilinear_macs
    handles["torchvision::deform_conv2d"] = _conv_macs  # as an ordinary one
    handles |= {f"aten::{op}": _recurrent_macs for op in ("lstm", "gru", "rnn_tanh", "rnn_relu")}
    handles["aten::linear"] = _product(0, "linear")
    handles |= {f"aten::{op}": _product(0, "matmul") for op in ("matmul", "inner")}
    handles["aten::baddbmm"] = _product(1, "matmul")
    handles["aten::addbmm"] = lambda inputs, outputs: Counter(matmul=bmm_flop_jit(inputs[1:3], outputs))
    handles["aten::tensordot"] = _tensordot_macs
    handles["aten::cdist"] = _distance_macs
    handles["aten::affine_grid_generator"] = _coordinates_macs
    analysis.set_op_handle(**handles)
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")


def _product(first: int, name: str) -> Callable[[list[Any], list[Any]], Counter[str]]:
    """Counts a product, broadcast as torch does: every element of the result is a sum over an operand's last axis."""

    def count(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        operand, out = get_shape(inputs[first]), get_shape(outputs[0])
        assert operand is not None and out is not None, "both are tensors"  # noqa: PT018 - one fact
        return Counter({name: math.prod(out) * math.prod(operand[-1:])})

    return count


def _tensordot_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """(A·K)·(K·B)·(A·B) is the square of A·B·K, whichever axes the K are."""
    shapes = [get_shape(value) for value in (*inputs[:2], outputs[0])]
    return Counter(matmul=math.isqrt(math.prod(math.prod(shape) for shape in shapes if shape is not None)))


def _distance_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Euclidean distances between more than 25 points: torch multiplies every one with every other one."""
    first, second, (p, mode) = get_shape(inputs[0]), get_shape(inputs[1]), (value.toIValue() for value in inputs[2:4])
    assert first is not None and second is not None, "both are tensors"  # noqa: PT018 - one fact
    multiplied = p == 2 and (mode == 1 or (not mode and max(first[-2], second[-2]) > _FEW_POINTS))
    return Counter(matmul=multiplied * math.prod(get_shape(outputs[0]) or ()) * first[-1])


def _coordinates_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Every place, of as many coordinates and a one, by a matrix."""
    grid = get_shape(outputs[0])
    assert grid is not None, "a tensor"
    return Counter(matmul=math.prod(grid) * (grid[-1] + 1))


def _recurrent_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Every matrix of weights once for each vector of each sequence; input, states, and the list of weights."""
    sequences = get_shape(inputs[0])
    assert sequences is not None, "torch makes a mini-batch of a single sequence"
    weights = [get_shape(weight) for weight in inputs[2].node().inputs()]
    matrices = sum(math.prod(shape) for shape in weights if shape is not None and len(shape) == 2)
    return Counter(matmul=math.prod(sequences[:2]) * matrices)


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> float:
    """Q·Kᵀ and its product with V; shapes (…, L, E), (…, S, E), (…, S, E')."""
    query, key, value = (get_shape(x) for x in inputs[:3])
    assert query is not None and key is not None and value is not None, "attention takes three tensors"  # noqa: PT018 - one fact
    return float(math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))


def _einsum_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Operands are contracted in pairs, as torch does; fvcore's own handle rounds to four digits."""
    shapes = [get_shape(operand) for operand in inputs[1].node().inputs()]
    path = [place.toIValue() for place in inputs[2].node().inputs()] if len(inputs) > 2 else None  # of opt_einsum
    given = [tuple(shape) for shape in shapes if shape is not None]
    return Counter(einsum=einsum_macs(inputs[0].toIValue(), given, path))


def _bilinear_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Every weight (out, in, in) once for each pair of vectors; of the two products that torch makes the large one."""
    weight, out = get_shape(inputs[2]), get_shape(outputs[0])
    assert weight is not None and out is not None, "both are tensors"  # noqa: PT018 - one fact
    return Counter(bilinear=math.prod(out[:-1]) * math.prod(weight))


def einsum_macs(equation: str, shapes: Sequence[tuple[int, ...]], path: Sequence[int] | None = None) -> int:
    """Multiply–accumulates of the pairwise products; sums of one operand and outer products have none.

    `path` has the places of every two operands among those that are left, where a product comes last; without one
    they are multiplied from left to right.
    """
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    spelled = []
    for term, shape in zip(terms, shapes, strict=True):
        missing = len(shape) - len(term.replace("...", ""))
        spelled.append(term.replace("...", "".join(chr(0x100 + missing - i) for i in range(missing))))
    if not arrow:
        result = "..." + "".join(label for label in left if label.isalpha() and left.count(label) == 1)
    kept = set(result) | {label for term in spelled for label in term if ord(label) >= 0x100}
    sizes: dict[str, int] = {}
    for term, shape in zip(spelled, shapes, strict=True):
        for label, size in zip(term, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    total, left_over = 0, [set(term) for term in spelled]
    for first, second in zip(path[::2], path[1::2], strict=True) if path else [(0, 1)] * (len(spelled) - 1):
        one, other = left_over[first], left_over[second]
        left_over = [term for place, term in enumerate(left_over) if place not in (first, second)]
        later = kept.union(*left_over)
        # A label that nothing else has is summed away before the product.
        one, other = one & (other | later), other & (one | later)
        if not one | other <= later:  # else nothing is summed: an element-wise product
            total += math.prod(sizes[label] for label in one | other)
        left_over.insert(len(left_over) if path else 0, (one | other) & later)
    return total


def _detached_copy(model: nn.Module) -> nn.Module:
    """A copy that needs no gradients; code and hooks may write into its parameters and buffers."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for p in model.parameters()}
    return copied(model, memo)


def _conv_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """A convolution that is called with its input and its weight first."""
    x, weight, out = get_shape(inputs[0]), get_shape(inputs[1]), get_shape(outputs[0])
    return Counter(conv=conv_flop_count(x, weight, out))


class _Scope(nn.Module):
    """A name for fvcore; runs what it is given."""

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


class _Scoped(nn.Module):
    """The graph with every call inside a scope of the node's name. The graph's own modules are hidden from fvcore."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        calls = [n.name for n in graph.graph.nodes if n.op.startswith("call_")]
        self.scopes = nn.ModuleDict({_NODE + name: _Scope() for name in calls})
        self._interpreter = _ScopedInterpreter(graph, self.scopes)
        self.eval()

    def forward(self, images: torch.Tensor) -> Any:
        made = self._interpreter.run(images)
        unused, self._interpreter.unused = self._interpreter.unused, []
        return tuple(output_tensors((made, unused)))  # torch.jit knows no other records, and drops what is not returned


class _ScopedInterpreter(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, scopes: nn.ModuleDict) -> None:
        super().__init__(graph)
        self._scopes = scopes
        self.unused: list[Any] = []  # what nobody uses

    def run_node(self, n: fx.Node) -> Any:
        if _NODE + n.name in self._scopes:
            made = self._scopes[_NODE + n.name](lambda: super(_ScopedInterpreter, self).run_node(n))
            if not n.users:
                self.unused.append(made)
            return made
        return super().run_node(n)


@contextlib.contextmanager
def _no_fused_attention() -> Iterator[None]:
    """nn.MultiheadAttention as training runs it: evaluation mode would take one fused operator that nobody counts."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _sizes_unchecked() -> Iterator[None]:
    """Inside, two checks of torch's are left out.

    The training graph of norms that call `F.batch_norm` themselves (timm's) takes one image of one pixel, too: torch
    refuses such statistics as meaningless; here nothing but their shape counts. And sizes in torch.jit are tensors,
    which the check of an unpooling takes for a mistake.
    """
    names = vars(functional)
    checks: dict[str, Any] = {
        name: names[name] for name in ("_verify_batch_size", "_check_unpool_output_size") if name in names
    }
    names.update(dict.fromkeys(checks, lambda *_: None))
    try:
        yield
    finally:
        names.update(checks)
