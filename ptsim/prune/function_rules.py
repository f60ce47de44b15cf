"""The rules of operators that have no weights: what works element by element, moves, joins, combines or makes tensors.

Operators that only move elements (reshape, permute, chunk, roll, …) are run on the labels themselves, so that channel
shuffles, window partitions and flattens need no rule of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ptsim.prune.labels import POOLS, Facets, Label, along, broadcast, compress
from ptsim.prune.rules import Call, FirstAttribute, RefusedError, rule, rule_named

ELEMENTWISE = """
    relu relu6 leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh sigmoid tanh softplus
    softsign logsigmoid tanhshrink hardshrink softshrink threshold rrelu dropout alpha_dropout feature_dropout
    dropout1d dropout2d dropout3d feature_alpha_dropout stochastic_depth contiguous clone detach float double
    half bfloat16 abs neg exp log sqrt rsqrt square clamp clip pow erf sign cos sin floor round reciprocal
    add sub mul div truediv iadd isub imul itruediv maximum minimum multiply divide subtract rsub addcmul addcdiv lerp
    true_divide floor_divide floordiv remainder fmod mod ipow float_power atan2 hypot copysign
    where identity drop_path masked_fill nan_to_num requires_grad
    tan sinh cosh asin acos atan asinh acosh atanh exp2 expm1 log1p log2 log10 erfc ceil trunc frac sgn logit pos
    clamp_min clamp_max zeros_like ones_like full_like empty_like type bool int long short
    eq ne lt gt le ge isnan isinf isfinite logical_and logical_or logical_xor logical_not and or xor invert
    copy fill zero
    """
MOVED_WHOLE = "transpose permute flatten unsqueeze swapaxes swapdims movedim moveaxis t numpy_T"
MOVED = """
    view reshape squeeze expand expand_as view_as reshape_as chunk split tensor_split unbind roll repeat narrow
    select index_select flip unflatten tile repeat_interleave channel_shuffle pixel_unshuffle split_with_sizes slice
    """
POSITIONS = {"normalize": 2, "norm": 2, "topk": 2, "kthvalue": 2}  # of the argument `dim`; 1 for the others
_KEEPING = tuple(
    kind
    for name, kind in vars(nn.modules.activation).items()
    if getattr(kind, "__module__", "") == nn.modules.activation.__name__ and name in nn.modules.activation.__all__
    if name != "MultiheadAttention"
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


@rule("to _to_copy type_as alias lift_fresh lift_fresh_copy", nn.Identity, nn.modules.dropout._DropoutNd, *_KEEPING)
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


# ---------------------------------------------------------------------- movement


@rule(MOVED_WHOLE, nn.Flatten)
def moved_whole(call: Call) -> Label:
    """Moved as a whole: what comes out does not depend on how many channels there are."""
    return _movement(call, call.module or call.node.target, counts=False)


@rule(MOVED, nn.Unflatten, nn.ChannelShuffle, nn.PixelUnshuffle, shapes=True)
def moved(call: Call) -> Label:
    """Moved as the arguments say, which may hold for this number of channels alone: tried out later."""
    return _movement(call, call.module or call.node.target, counts=True)


@rule("unfold", shapes=True)
def unfolded(call: Call) -> Label:
    """The method takes windows of an axis; the function copies windows of an image into the channels."""
    if call.node.op == "call_function":
        call.refuse(f"{call.op} mixes channels in a way that has no rule")
    return moved(call)


@rule("getitem", tuples=True, shapes=True)
def item(call: Call) -> Label:
    """A part of a tensor, or of what an operator returned."""
    first, index = call.labels[0], call.node.args[1]
    if isinstance(first, tuple):
        if isinstance(index, int | slice):
            part: Label = first[index]
            return part
        call.refuse(f"{call.op} has no rule")
    return moved(call)


@rule("getattr", tuples=True)
def attribute(call: Call) -> Label:
    """An attribute that is a tensor: the transposed one, or a field of a named tuple."""
    name, label = str(call.node.args[1]), call.labels[0]
    if isinstance(label, tuple):
        field: Label = label[1 if name == "indices" else 0]
        return field
    if name == "data":
        return label
    if name in ("T", "mT", "H", "mH"):
        return _movement(call, FirstAttribute(name), counts=False)
    raise RefusedError(f"{call.op} has no rule")


@rule("setitem", tuples=True)
def assigned(call: Call) -> Label:
    """`x[index] = value`: allowed where the index leaves whole channels, and what is assigned are the same ones."""
    target, index, given = call.node.args
    x, value = call.label_of(target), call.label_of(given)
    kept = _indexed(x, index) if isinstance(x, Tensor) else None
    if kept is None or (value is None and isinstance(given, fx.Node)) or isinstance(value, Facets | tuple):
        call.refuse(f"{call.op} assigns to some of these channels")
    if isinstance(value, Tensor) and isinstance(target, fx.Node) and isinstance(given, fx.Node):
        part = target.meta["value"][call.argument(1, "index")]
        meet(call, [(kept, part), (value, given.meta["value"])], part)
    return None


def _indexed(x: Tensor, index: Any) -> Tensor | None:
    """The label of `x[index]`; None if it takes a part of the channels, or is more than numbers and slices."""
    whole = slice(None)
    parts: list[Any] = list(index) if isinstance(index, tuple) else [index]
    at = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
    parts[at : at + 1] = [whole] * (x.ndim - len(parts) + (at < len(parts)))
    if len(parts) != x.ndim or not all(isinstance(part, int | slice) for part in parts):
        return None
    if any(part != whole for part, length in zip(parts, x.shape, strict=True) if length > 1):
        return None
    return x.view([length for length, part in zip(x.shape, parts, strict=True) if not isinstance(part, int)])


def _movement(call: Call, target: Any, *, counts: bool) -> Label:
    """Run the operator itself on the labels; `counts`: its arguments may depend on the number of channels."""
    state, inputs = call.state, call.sources
    first = call.labels[0]
    if any(isinstance(label, Facets) for label in call.labels):
        if (len(inputs) > 1 and not call.name.endswith("_as")) or not isinstance(first, Facets):
            call.refuse(f"{call.op} has no rule")
        facets = [call.moved(target, {inputs[0]: label}) for label in first.labels]
        if any(not isinstance(label, Tensor) for label in facets):
            return call.stays(f"{call.op} takes a parameter apart")
        for axis in first.labels if counts else ():
            state.sensitive(axis)
        return Facets([label for label in facets if isinstance(label, Tensor) and label.numel() > 1])
    labels = [label for label in call.labels if isinstance(label, Tensor)]
    if len(labels) < len(inputs):
        call.refuse(f"{call.op} has no rule")
    for label in labels if counts else ():
        state.sensitive(label)
    try:
        result = call.moved(target, dict(zip(inputs, labels, strict=True)))
    except (RuntimeError, TypeError) as error:  # it does not move whole numbers
        raise RefusedError(f"{call.op} has no rule") from error
    if counts:
        _note_numbers(call, labels[0], result)
        groups = getattr(target, "groups", None)  # of a module that shuffles
        if call.name == "channel_shuffle":
            groups = call.argument(1, "groups")
        state.fold(labels[0], result, groups)
    return result


def _note_numbers(call: Call, x: Tensor, result: Label) -> None:
    """Which channels do numbers count that the model keeps and that stand among the arguments?"""
    name, shape = call.name, call.sources[0].meta["value"].shape
    arguments: Any = call.node.args[1:]
    if name in ("split", "split_with_sizes"):
        sizes = next((call.node.kwargs[key] for key in call.node.kwargs if key.startswith("split")), *arguments[:1])
        every, start = _rows(x, call.argument(2, "dim", 0), shape), 0
        for at, part in enumerate(call.value):
            length = part.shape[call.argument(2, "dim", 0)]
            call.state.number(sizes[at] if isinstance(sizes, list | tuple) else sizes, every[start : start + length])
            start += length
    elif name == "getitem":
        for dim, part in _slices(arguments[0], len(shape)):
            for bound in (part.start, part.stop):
                if isinstance(bound, int):
                    every = _rows(x, dim, shape)
                    call.state.number(bound, every[: int(bound)] if int(bound) >= 0 else every[int(bound) :])
    elif name == "narrow":
        dim, start, length = (call.source(place, key) for place, key in enumerate(("dim", "start", "length"), 1))
        if isinstance(start, int) and isinstance(length, int):
            every = _rows(x, dim, shape)
            call.state.number(start, every[: int(start)])
            call.state.number(length, every[int(start) : int(start) + int(length)])
    elif name in ("view", "reshape", "expand") and isinstance(result, Tensor):
        sizes = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], list | tuple) else arguments
        for dim, size in enumerate(sizes):
            if isinstance(size, int) and int(size) == result.shape[dim]:
                call.state.number(size, _rows(result, dim, result.shape))


def _rows(label: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """The label with `dim` in front, at its full length."""
    return label.movedim(dim, 0).expand(shape[dim], *[-1] * (label.ndim - 1))


def _slices(index: Any, rank: int) -> list[tuple[int, slice]]:
    """The slices of an index of numbers, slices and an ellipsis, with the axes that they are for."""
    parts = list(index) if isinstance(index, tuple) else [index]
    at = next((place for place, part in enumerate(parts) if part is Ellipsis), len(parts))
    parts[at : at + 1] = [slice(None)] * (rank - len(parts) + (at < len(parts)))
    if len(parts) != rank or any(part is None for part in parts):
        return []
    return [(dim, part) for dim, part in enumerate(parts) if isinstance(part, slice)]


@rule("einops.rearrange einops.repeat einops.Rearrange", shapes=True)
def rearranged(call: Call) -> Label:
    """Einops' movements, as a pattern says."""
    return moved(call)


@rule("einops.reduce einops.Reduce", shapes=True)
def reduced_by_pattern(call: Call) -> Label:
    """A reduction by pattern, where what becomes one element is of one channel: least and largest label agree."""
    reduce: Any = sys.modules["einops"].reduce
    module: Any = call.module

    def with_labels(how: str) -> Label:
        if module is not None:
            return call.moved(lambda x: reduce(x, module.pattern, how, **module.axes_lengths), {source: call.x})
        return call.moved(lambda x, pattern, reduction, **axes: reduce(x, pattern, how, **axes), {source: call.x})

    source = call.sources[0]
    call.state.sensitive(call.x)
    least, largest = with_labels("min"), with_labels("max")
    if not isinstance(least, Tensor) or not isinstance(largest, Tensor) or not torch.equal(least, largest):
        call.refuse(f"{call.op} combines these channels, so that removing one would change the others")
    return least


@rule("pixel_shuffle", nn.PixelShuffle, shapes=True)
def pixel_shuffle(call: Call) -> Label:
    """r² neighbouring channels become one of a larger image, and go together."""
    module = call.module
    factor = module.upscale_factor if isinstance(module, nn.PixelShuffle) else call.argument(1, "upscale_factor")
    vector = call.vector(-3, call.sources[0].meta["value"].shape[-3])
    if vector is None:
        call.refuse(f"{call.op} meets channels that lie along several axes")
    together = vector.reshape(-1, factor**2)
    call.state.unite(together[:, :1], together)
    return along(together[:, 0], call.value.ndim - 3, call.value.ndim)


# ---------------------------------------------------------------------- joining and padding


@rule("cat concat concatenate stack", tuples=True)
def joined(call: Call) -> Label:
    """One after the other along an axis, or along a new one."""
    value, stack = call.value, call.name == "stack"
    dim = call.argument(1, "dim", 0) % value.ndim
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
    x, widths = call.x, call.argument(1, "pad")
    dims = [-1 - index // 2 for index, width in enumerate(widths) if width]
    if all(x.shape[dim] == 1 for dim in dims):
        return x
    others = any(length > 1 for d, length in enumerate(x.shape) if d - x.ndim not in dims)
    if others or any(width < 0 for width in widths):
        call.refuse(f"{call.op} cuts the channels")
    stays = int(call.state.reason_label(f"{call.op} fills it with constants"))
    padding = [width if x.shape[-1 - index // 2] > 1 else 0 for index, width in enumerate(widths)]
    call.state.sensitive(x)
    return nn.functional.pad(x, padding, value=stays)


# ---------------------------------------------------------------------- combining


def spatial_dims(rank: int) -> range:
    """Axes that pooling and padding work on: all after (N, C); the last one of a rank-3 tensor."""
    return range(2, rank) if rank > 2 else range(rank - 1, rank)


@rule(
    """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d
    interpolate upsample upsample_nearest upsample_bilinear
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    """,
    nn.Upsample,
    *POOLS,
    *_PADDINGS,
)
def spatial(call: Call) -> Label:
    """Within one channel's image."""
    return call.along(spatial_dims(call.rank))


@rule("max_unpool1d max_unpool2d max_unpool3d", nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d)
def unpooled(call: Call) -> Label:
    """Values go back to where the indices say, channel by channel."""
    values, indices = call.labels[:2]
    if not isinstance(values, Tensor) or not isinstance(indices, Tensor):
        call.refuse(f"{call.op} has no rule")
    call.state.unite(values, indices)
    return call.along(spatial_dims(call.rank))


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


@rule("mean sum amax amin prod std var std_mean var_mean norm logsumexp argmax argmin median mode topk sort kthvalue")
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
        dim = getattr(call.module, "dim", 1 if call.rank > 3 else 0)
        dim = 1 if dim is None else dim
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
