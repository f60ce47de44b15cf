"""The rules of operators that have no weights: what works element by element, joins, combines or makes tensors.

Those that only move elements have their rules in `ptsim.prune.movement_rules`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ptsim.prune.labels import POOLS, Facets, Label, broadcast, compress
from ptsim.prune.rules import Call, rule, rule_named, tensor_labels

ELEMENTWISE = """
    relu relu6 leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh sigmoid tanh softplus
    softsign logsigmoid log_sigmoid tanhshrink hardshrink softshrink threshold _threshold rrelu dropout alpha_dropout
    feature_dropout dropout1d dropout2d dropout3d feature_alpha_dropout stochastic_depth contiguous clone detach float
    double half bfloat16 abs neg exp log sqrt rsqrt square clamp clip pow erf sign cos sin floor round reciprocal
    add sub mul div truediv iadd isub imul itruediv maximum minimum multiply divide subtract rsub addcmul addcdiv lerp
    true_divide floor_divide floordiv remainder fmod mod ipow float_power atan2 hypot copysign
    where identity drop_path masked_fill nan_to_num requires_grad
    tan sinh cosh asin acos atan asinh acosh atanh exp2 expm1 log1p log2 log10 erfc ceil trunc frac sgn logit pos
    clamp_min clamp_max zeros_like ones_like full_like empty_like type bool int long short
    eq ne lt gt le ge isnan isinf isfinite logical_and logical_or logical_xor logical_not and or xor invert
    copy fill zero
    """
# Of the argument `dim`; 1 for the others.
POSITIONS = dict.fromkeys(("normalize", "norm", "topk", "kthvalue", "linalg_norm", "linalg_vector_norm"), 2)
ACTIVATIONS = tuple(
    kind
    for name, kind in vars(nn.modules.activation).items()
    if getattr(kind, "__module__", "") == nn.modules.activation.__name__ and name in nn.modules.activation.__all__
    if name not in ("MultiheadAttention", "PReLU", "GLU", "Softmax", "Softmax2d", "Softmin", "LogSoftmax")
)
_PADDINGS = tuple(
    kind
    for name, kind in vars(nn.modules.padding).items()
    if isinstance(kind, type) and kind.__module__ == nn.modules.padding.__name__ and not name.startswith("__")
)


# ---------------------------------------------------------------------- element by element


@rule(ELEMENTWISE)
def elementwise(call: Call) -> Label:
    """Operands broadcast against each other: positions that meet are the same channel."""
    if not isinstance(call.value, Tensor):
        call.refuse(f"{call.op} mixes channels in a way that has no rule")
    return meet(
        call, [(label, n.meta["value"]) for label, n in zip(call.labels, call.sources, strict=True)], call.value
    )


@rule(
    "to _to_copy as_tensor type_as alias lift_fresh lift_fresh_copy",
    nn.Identity,
    nn.modules.dropout._DropoutNd,
    *ACTIVATIONS,
)
def unchanged(call: Call) -> Label:
    """The first operand's channels come out."""
    return call.labels[0]


@rule("max min")
def extreme(call: Call) -> Label:
    """Of two tensors the larger element, or the largest along an axis."""
    return elementwise(call) if isinstance(call.value, Tensor) and len(call.sources) == 2 else reduced(call)


@rule("glu", nn.GLU)
def gated(call: Call) -> Label:
    """A gated linear unit: the two halves meet."""
    dim = call.module.dim if isinstance(call.module, nn.GLU) else call.argument(1, "dim", -1)
    call.state.sensitive(call.x)
    halves = call.expanded(call.x, call.sources[0]).chunk(2, dim)
    return meet(call, [(compress(half), call.value) for half in halves], call.value)


def meet(call: Call, operands: list[tuple[Label, Tensor]], value: Tensor) -> Label:
    """The label of operands that are broadcast against each other; channels that meet are united."""
    rank = value.ndim
    tensors: list[tuple[Tensor, list[int]]] = []
    facets: list[tuple[Facets, list[int]]] = []
    for label, operand in operands:
        shape = [1] * (rank - operand.ndim) + list(operand.shape)
        if isinstance(label, Facets):
            if label.labels or len(operands) == 1:  # a parameter of one element meets every channel alike
                facets.append((label, shape))
        elif isinstance(label, Tensor):
            tensors.append((label.view([1] * (rank - label.ndim) + list(label.shape)), shape))
    if not tensors:
        return _computed(call, [facet for facet, _ in facets], rank)
    for facet, shape in facets:
        tensors.append((_facet(call, facet, shape, tensors), shape))
    result, result_shape = tensors[0]
    for label, shape in tensors[1:]:
        result, result_shape = _pair(call, result, result_shape, label, shape)
    return result


def _computed(call: Call, facets: list[Facets], rank: int) -> Label:
    """Parameters and buffers computed with each other: what lies along one axis of the result is one channel."""
    axes: dict[tuple[int, ...], Tensor] = {}
    for label in (label for facet in facets for label in facet.labels):
        aligned = label.view([1] * (rank - label.ndim) + list(label.shape))
        dims = tuple(d for d, length in enumerate(aligned.shape) if length > 1)
        if dims in axes:
            call.state.unite(axes[dims], aligned)
        elif any(not set(dims).isdisjoint(others) for others in axes):
            return call.stays(f"{call.op} computes a parameter")
        else:
            axes[dims] = aligned
    return Facets([axes[dims] for dims in sorted(axes)])


def _facet(call: Call, facets: Facets, shape: list[int], tensors: list[tuple[Tensor, list[int]]]) -> Tensor:
    """The axis of a parameter that runs along the channels it meets; a constant that stays if there is none."""
    rank = len(shape)
    varying = {d for label, _ in tensors for d, length in enumerate(label.shape) if length > 1}
    aligned = [label.view([1] * (rank - label.ndim) + list(label.shape)) for label in facets.labels]
    for label in aligned:
        along_dims = {d for d, length in enumerate(label.shape) if length > 1}
        if along_dims == varying:
            return label
        if not varying and len(aligned) == 1 and all(size[dim] == 1 for _, size in tensors for dim in along_dims):
            return label  # it spreads what is one channel, such as noise of one plane
    for label, _ in tensors if not varying else ():
        if bool((label < 0).all()):  # the parameter runs along what stays
            for axis in aligned:
                call.state.unite(axis, label)
    return call.state.reason_label(f"{call.op} combines it with a parameter").view([1] * rank)


def _pair(call: Call, a: Tensor, a_shape: list[int], b: Tensor, b_shape: list[int]) -> tuple[Tensor, list[int]]:
    state = call.state
    shape = [max(m, n) for m, n in zip(a_shape, b_shape, strict=True)]
    a_spread = any(n == 1 < size and k > 1 for n, size, k in zip(a_shape, shape, b.shape, strict=True))
    b_spread = any(n == 1 < size and k > 1 for n, size, k in zip(b_shape, shape, a.shape, strict=True))
    if a_spread:  # one channel of `a` serves all channels of `b`
        state.freeze(a, f"{call.op} spreads one channel over several")
    if b_spread:
        state.freeze(b, f"{call.op} spreads one channel over several")
    if a_spread and b_spread:
        state.freeze(torch.cat([a.flatten(), b.flatten()]), f"{call.op} makes an outer product")
        return state.reason_label(f"{call.op} makes an outer product").view([1] * a.ndim), shape
    if a_spread:
        return b, shape
    if b_spread:
        return a, shape
    state.unite(a, b)
    a, b = broadcast(a, b)
    return torch.where(a >= 0, a, b), shape


# ---------------------------------------------------------------------- joining and padding


@rule("cat concat concatenate hstack stack", tuples=True)
def joined(call: Call) -> Label:
    """One after the other along an axis, or along a new one."""
    value, stack = call.value, call.name == "stack"
    dim = 1 if call.name == "hstack" else call.argument(1, "dim", 0) % value.ndim
    pieces, facets = _pieces(call, dim, stack=stack)
    if facets and not pieces:
        call.refuse(f"{call.op} joins parameters")
    for index, facet, shape in facets:
        pieces.insert(index, (_facet(call, facet, shape, [p for p in pieces if p[0].numel() > 1]), shape))
    if any(length > 1 for label, _ in pieces for d, length in enumerate(label.shape) if d != dim):
        if any(label.shape[dim] > 1 for label, _ in pieces):
            call.refuse(f"{call.op} joins channels that lie along several axes")
        result = pieces[0][0]
        for label, _ in pieces[1:]:
            call.state.unite(result, label)
            wide, other = broadcast(result, label)
            result = torch.where(wide >= 0, wide, other)
        return result
    whole = [label.expand([shape[d] if d == dim else 1 for d in range(value.ndim)]) for label, shape in pieces]
    return compress(torch.cat(whole, dim))


_Pieces = list[tuple[Tensor, list[int]]]


def _pieces(call: Call, dim: int, *, stack: bool) -> tuple[_Pieces, list[tuple[int, Facets, list[int]]]]:
    """What is joined: labels with shapes, and parameters with their places among them."""
    parts: Any = call.source(0, "tensors")
    if isinstance(parts, fx.Node):  # the pieces of a chunk, or all that a module returned
        given, values = call.label_of(parts), parts.meta["value"]
        labels: list[Label] = list(given) if isinstance(given, tuple) else [None] * len(values)
    else:
        labels, values = [call.label_of(part) for part in parts], [part.meta["value"] for part in parts]
    pieces: _Pieces = []
    facets: list[tuple[int, Facets, list[int]]] = []
    for index, (label, part) in enumerate(zip(labels, values, strict=True)):
        shape = list(part.shape)
        if stack:
            shape.insert(dim, 1)
        if isinstance(label, Facets) and not stack:
            facets.append((index, label, shape))
        elif isinstance(label, Tensor):
            pieces.append((label.unsqueeze(dim) if stack else label, shape))
        else:
            call.refuse(f"{call.op} joins what has no rule")
    return pieces, facets


@rule("pad")
def padded(call: Call) -> Label:
    """Zeros around an image, or new channels of zeros."""
    x, widths, mode = call.x, call.argument(1, "pad"), call.argument(2, "mode", "constant")
    dims = [-1 - index // 2 for index, width in enumerate(widths) if width]
    if all(x.shape[dim] == 1 for dim in dims):
        return x
    others = any(length > 1 for d, length in enumerate(x.shape) if d - x.ndim not in dims)
    if others or mode != "constant" or any(width < 0 for width in widths):
        call.refuse(f"{call.op} cuts or repeats channels")
    stays = int(call.state.reason_label(f"{call.op} fills it with constants"))
    padding = [width if x.shape[-1 - index // 2] > 1 else 0 for index, width in enumerate(widths)]
    call.state.sensitive(x)
    return nn.functional.pad(x, padding, value=stays)


# ---------------------------------------------------------------------- combining


def spatial_dims(call: Call) -> range:
    """Axes that pooling and padding work on: as many of the last ones as the name says, else all after (N, C)."""
    name = call.name or type(call.module).__name__
    number = re.search(r"([123])d", name)
    return range(call.rank - int(number[1]), call.rank) if number else range(2, call.rank)


@rule(
    """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d lp_pool3d
    interpolate upsample upsample_nearest upsample_bilinear
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
    upsample_trilinear3d
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    """,
    nn.Upsample,
    *POOLS,
    *_PADDINGS,
)
def spatial(call: Call) -> Label:
    """Within one channel's image."""
    return call.along(spatial_dims(call))


@rule("max_unpool1d max_unpool2d max_unpool3d", nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d, sizes=True)
def unpooled(call: Call) -> Label:
    """Values go back to where the indices say, channel by channel."""
    values, indices = call.labels[:2]
    if not isinstance(values, Tensor) or not isinstance(indices, Tensor):
        call.refuse(f"{call.op} has no rule")
    call.state.unite(values, indices)
    return call.along(spatial_dims(call))


@rule("grid_sample grid_sampler grid_sampler_2d grid_sampler_3d")
def sampled(call: Call) -> Label:
    """Every channel is read at the same places: the grid has coordinates in the place of channels, which stay."""
    x, grid = call.source(0, "input"), call.source(1, "grid")
    for label in tensor_labels(call.label_of(grid)):
        call.state.freeze(label, f"{call.op} takes them for coordinates")
    if call.sources[0] is not x:
        call.refuse(f"{call.op} has no rule for what it reads")
    return call.along(range(2, call.rank), verb="reads between")


@rule("affine_grid affine_grid_generator", sizes=True)
def coordinates(call: Call) -> Label:
    """Of the size that it is given the channels do not count."""
    for label in call.labels:
        for part in tensor_labels(label):
            call.state.freeze(part, f"{call.op} makes coordinates of them")
    return call.stays(f"{call.op} makes coordinates")


def _reduced_parameter(call: Call, facets: Facets, dims: Sequence[int], results: Sequence[Tensor]) -> Label:
    """Statistics of a parameter: the channels along the other axes pass, those that are combined have to stay."""
    rank = call.rank
    gone = {dim % rank for dim in dims}
    kept: list[Tensor] = []
    for label in facets.labels:
        if any(label.shape[dim] > 1 for dim in gone):
            call.state.freeze(label, f"{call.op} combines these channels of a parameter")
        elif results[0].ndim == rank:
            kept.append(label)
        else:
            kept.append(label.view([length for dim, length in enumerate(label.shape) if dim not in gone]))
    return Facets(kept) if isinstance(call.value, Tensor) else tuple(Facets(kept) for _ in results)


@rule(
    """
    mean sum amax amin prod std var std_mean var_mean norm linalg_norm linalg_vector_norm logsumexp argmax argmin median
    mode topk sort kthvalue
    """
)
def reduced(call: Call) -> Label:
    """One element, or some, of those along some axes."""
    name, value = call.name, call.value
    dims = call.argument(POSITIONS.get(name, 1), "dim", -1 if name in ("topk", "sort", "mode") else None)
    if isinstance(dims, int) and not isinstance(dims, bool):
        dims = [dims]
    results = value if isinstance(value, tuple | list) else [value]
    if not isinstance(dims, list | tuple) or not dims or not all(isinstance(part, Tensor) for part in results):
        call.refuse(f"{call.op} combines these channels")
    if isinstance(call.labels[0], Facets):
        return _reduced_parameter(call, call.labels[0], dims, results)
    x = call.x
    together = call.along(dims)
    label = together[0] if isinstance(together, tuple) else together
    assert isinstance(label, Tensor), "of one activation"
    if results[0].ndim < x.ndim:
        gone = {dim % x.ndim for dim in dims}
        label = label.view([length for d, length in enumerate(label.shape) if d not in gone])
    return label if isinstance(value, Tensor) else tuple(label for _ in results)


@rule("softmax log_softmax softmin cumsum normalize", nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d)
def weighed(call: Call) -> Label:
    """Against the others along an axis."""
    if call.module is not None:
        dim = getattr(call.module, "dim", None)
        if dim is None:  # as torch chooses it; nn.Softmax2d has none, and takes the channels
            dim = 1 if call.rank not in (0, 1, 3) else 0
    else:
        dim = call.argument(POSITIONS.get(call.name, 1), "dim", 1 if call.name == "normalize" else None)
    if not isinstance(dim, int):
        call.refuse(f"{call.op} mixes channels in a way that has no rule")
    return call.along([dim])


@rule("new_zeros new_ones new_full new_empty new_tensor", tuples=True)
def constant(call: Call) -> Label:
    """Of the tensor it is called on, only its type is used."""
    return call.stays(f"{call.op} makes a constant tensor")


def is_elementwise(name: str) -> bool:
    """True for the name of an operator that works element by element."""
    return rule_named(name) in (elementwise, unchanged)
