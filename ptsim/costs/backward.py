"""What do torch's formulas for gradients read and write, of operators that are no products and no normalisations?

What they make a forward pass do beside its own work stands here, too: an operator in place copies its input first, if
its gradient needs what it overwrites.

Of what works element by element, a line of a table is the kernels that autograd runs for one operand's gradient: how
many tensors as large as the result they read and write together, how often they read either operand (which may be
smaller: it was broadcast), and how many tensors of booleans. Where an operand was broadcast, its gradient is summed up
then, which reads it whole and writes it as small as the operand is.

Source: torch's tools/autograd/derivatives.yaml and torch/csrc/autograd/FunctionsManual.cpp (torch 2.8 to 2.14). A test
runs every line on the CPU and adds up what its operators read and write.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Collection, Sequence
from typing import NamedTuple

from ptsim.network import Layer, Shape
from ptsim.operators import IN_PARTS


class Gradient(NamedTuple):
    """The kernels that make one operand's gradient: tensors that they read and write, and their number."""

    whole: int  # as large as the result
    kernels: int = 1
    first: int = 0  # as large as the first operand
    second: int = 0  # as large as the second one
    masks: int = 0  # of booleans, as large as the result or, where it is an operand, as the mask
    third: int = 0  # as large as the third operand

    @property
    def by_operand(self) -> tuple[int, int, int]:
        """Tensors as large as each of them."""
        return self.first, self.second, self.third


POSITION_BYTES = 8  # of an index
_HANDED_ON = Gradient(0, 0)
_NEGATIVE, _SCALED, _MASKED = Gradient(2), Gradient(2), Gradient(2, masks=1)  # the gradient in, another one out
_DIVISOR = Gradient(8, 4, 1, 2)  # of a / b: −dy, a / b, that / b, and their product
# Both are compared with each other twice; where they are equal, either gets half of the gradient.
_EXTREME = Gradient(7, 5, 2, 2, 4)

# Of an operator with a single tensor, beside numbers.
_OF_ONE: dict[str, Gradient] = {
    "add": _HANDED_ON,
    "sub": _HANDED_ON,
    "pos": _HANDED_ON,
    "rsub": _NEGATIVE,
    "neg": _NEGATIVE,
    "mul": _SCALED,
    "twofold": _SCALED,
    "div": _SCALED,
    "rdiv": Gradient(9, 4),  # of `1 / x`: the product's and the reciprocal's
    "where": _MASKED,
    "masked_fill": _MASKED,
    "exp": Gradient(3),
    "log": Gradient(3),
    "log1p": Gradient(5, 2),
    "sqrt": Gradient(5, 2),
    "rsqrt": Gradient(7, 3),
    "pow": Gradient(7, 3),
    "square": Gradient(7, 3),
    "reciprocal": Gradient(7, 3),
    "abs": Gradient(5, 2),
    "sin": Gradient(5, 2),
    "cos": Gradient(7, 3),
}
# Of an operator with three tensors.
_OF_THREE: dict[str, tuple[Gradient, Gradient, Gradient]] = {
    "addcmul": (_HANDED_ON, Gradient(2, 2, third=3), Gradient(2, 2, second=3)),
    "addcdiv": (_HANDED_ON, Gradient(2, 3, third=5), Gradient(6, 5, second=3, third=3)),
}
# Of an operator with two tensors; the condition of `where` and the mask of `masked_fill` are none of them.
_OF_TWO: dict[str, tuple[Gradient, Gradient]] = {
    "add": (_HANDED_ON, _HANDED_ON),
    "sub": (_HANDED_ON, _NEGATIVE),
    "scaled_add": (_HANDED_ON, _SCALED),
    "scaled_sub": (_HANDED_ON, Gradient(4, 2)),
    "rsub": (_NEGATIVE, _HANDED_ON),
    "mul": (Gradient(2, second=1), Gradient(2, first=1)),
    "div": (Gradient(2, second=1), _DIVISOR),
    "rdiv": (_DIVISOR._replace(first=2, second=1), Gradient(2, first=1)),
    "maximum": (_EXTREME, _EXTREME),
    "minimum": (_EXTREME, _EXTREME),
    "where": (_MASKED, _MASKED),
    "lerp": (_SCALED, _SCALED),
}
_CONDITIONED = {"where": 0, "masked_fill": 1}  # which of their tensors is of booleans
_CASTS = frozenset({"type", "to", "float", "half", "bfloat16", "double", "type_as"})

# Activations of several kernels: tensors that they read and write forward, kernels; the same backward, and booleans.
_COMPOSITE: dict[str, tuple[int, int, int, int, int]] = {
    "clamp": (2, 1, 4, 4, 6),
    "clip": (2, 1, 4, 4, 6),
    "erf": (2, 1, 11, 5, 0),
    "softmin": (4, 2, 5, 2, 0),
    "tanhshrink": (5, 2, 8, 3, 0),
    "softsign": (7, 3, 22, 8, 0),
    "gumbel_softmax": (12, 6, 5, 2, 0),
}
# Operators whose gradient needs what they read; that of `relu`, `sigmoid` or `exp` needs what they gave. So did that of
# `hardtanh` and `relu6` in place before PyTorch 1.10 (pytorch issue 95432), which is not told apart: 9 % of
# MobileNetV2's bytes in fp32 are copies that it did not make then, and of 5.1 GB for 64 images it needed 1.6 less.
_INPUT_NEEDED = """
    silu mish hardswish hardsigmoid relu6 hardtanh threshold clamp clamp_min clamp_max clip erf erfc erfinv abs log
    log1p log2 log10 logit sin sinh asin cos cosh acos atan sinc pow square lgamma digamma nan_to_num
"""
_NEED_INPUT = frozenset(_INPUT_NEEDED.split())
_NEED_FIRST = frozenset({"mul", "div"})  # … for the gradient of their second operand
# Backward joins the parts' gradients. So it is taken of `tensor_split` where its parts are used without being named.
# Older traces spell `split` with sizes as torch does.
_JOINED = IN_PARTS | {"split_with_sizes"}
# Backward writes zeros, and the part's gradient there: of an index once for each axis of which it takes a part.
_PARTS = frozenset({"getitem", "narrow", "select", "slice", "diagonal"})
WRITING = frozenset({"setitem", "fill_part", "update_part", "index_put"})  # of a tensor and, last, of a part of it
_MADE = frozenset({"zeros_like", "new_zeros"})  # of no other tensor's elements
_REPEATING = frozenset({"repeat", "tile", "repeat_interleave"})  # backward sums up
_FILLED = frozenset(
    {"pad", "constant_pad1d", "constant_pad2d", "zero_pad1d", "zero_pad2d"}
)  # aten/src/ATen/native/PadNd.cpp
_MIRRORED = frozenset({"reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"})
# Elements by positions: backward writes zeros, to which the gradients are added, since a position may come twice.
_CHOSEN = frozenset({"getitem", "index_select", "gather", "take"})
_SPREAD = frozenset({"expand", "expand_as", "broadcast_to"})  # backward sums up


class Moved(NamedTuple):
    """Bytes that so many kernels read and write."""

    num_bytes: float
    kernels: int


NOTHING = Moved(0, 0)


def made_first(layer: Layer, batch: int, given: int, width: int) -> Moved:
    """Forward, before the operator's own kernel: a copy of what it overwrites, or the reciprocal of `1 / x`."""
    if layer.op == "rdiv" and not layer.num_parameters:
        return Moved(2 * layer.output_elements * batch * width, 1)
    if layer.inplace:
        sizes, learns = _operands(layer, batch)
        if any(learns) if layer.op in _NEED_INPUT else layer.op in _NEED_FIRST and any(learns[1:]):
            return Moved(2 * sizes[0] * given, 1)
    return NOTHING


def gradient_of_elementwise(
    layer: Layer, batch: int, given: int, width: int, truths: Collection[int] = frozenset()
) -> Moved:
    """Backward of an operator that works element by element.

    Args:
        layer: the operator; a parameter among its operands counts as the last of them.
        batch: images, or 1 for a layer that runs once a mini-batch.
        given: bytes per element of the operands.
        width: of the result.
        truths: positions of operands of booleans, which take a byte each.
    """
    result = of_mask = layer.output_elements * batch
    sizes, learns = _operands(layer, batch)
    bytes_ = [size * (1 if index in truths else given) for index, size in enumerate(sizes)]
    if (mask := _CONDITIONED.get(layer.op, len(sizes))) < len(sizes) > 1:
        of_mask = sizes.pop(mask)
        del learns[mask], bytes_[mask]
    formulas = _formulas(layer.op, len(sizes))
    if formulas is None:  # reads the gradient and the operands, writes the operands' gradients
        operands = 1 if layer.op in _CASTS else 2
        return Moved(operands * sum(bytes_) + result * width, 1)
    moved, kernels = 0.0, 0
    for formula, size, learnt in zip(formulas, sizes, learns, strict=True):
        if learnt:
            read = sum(times * size for times, size in zip(formula.by_operand, bytes_, strict=False))
            moved += formula.whole * result * width + read + formula.masks * of_mask
            kernels += formula.kernels
            if size < result:  # it was broadcast
                moved += result * width + size * given
                kernels += 1
    return Moved(moved, kernels)


def _operands(layer: Layer, batch: int) -> tuple[list[int], list[bool]]:
    """Elements of every operand, a parameter last, and whether anybody needs its gradient."""
    sizes = list(layer.input_sizes(batch))
    learns = [layer.input_needs_gradient and index not in layer.fixed_inputs for index in range(len(sizes))]
    if layer.num_parameters:
        sizes.append(layer.num_parameters)
        learns.append(layer.weight_needs_gradient)
    return sizes, learns


def _formulas(op: str, operands: int) -> Sequence[Gradient] | None:
    if operands == 1 and op in _OF_ONE:
        return (_OF_ONE[op],)
    return _OF_TWO.get(op) if operands == 2 else _OF_THREE.get(op) if operands == 3 else None


def passes_of_activation(layer: Layer, batch: int, given: int, width: int) -> tuple[Moved, Moved]:
    """Forward and backward: the input in, the output out; its gradient and what was kept in, the input's out."""
    x, y = sum(layer.input_sizes(batch)) * given, layer.output_elements * batch * width
    if layer.op in _COMPOSITE:
        forward, there, backward, back, masks = _COMPOSITE[layer.op]
        return Moved(forward * x, there), Moved(backward * x + masks * layer.output_elements * batch, back)
    if layer.op == "prelu" and layer.num_parameters and layer.weight_needs_gradient:
        slopes = layer.num_parameters * given  # their gradient is made for every element, and summed up
        return Moved(x + y, 1), Moved(5 * x + 2 * slopes, 2)
    return Moved(x + y, 1), Moved(2 * x + y, 1)


def gradient_of_view(layer: Layer, batch: int, width: int) -> Moved | None:
    """Backward of an operator that hands out its input's memory; None where the gradient is handed on as well."""
    elements, *_ = *layer.input_sizes(batch), layer.num_parameters  # a second operand lends its shape alone
    whole, part = elements * width, layer.output_elements * batch * width
    if layer.op in _JOINED:  # of parts that nobody reads, zeros; of `unbind` a single one for each
        if part < whole:
            return Moved(whole + part, 2) if layer.op == "unbind" else Moved(3 * whole - part, 2)
        return Moved(2 * whole, 1)
    if layer.op in _PARTS and part < whole:
        left = _left_by_axis(layer, elements, layer.output_elements * batch)
        moved = sum(before + 2 * after for before, after in itertools.pairwise(left)) * width
        return Moved(moved, 2 * (len(left) - 1))
    if layer.op == "unfold" or (layer.op in _SPREAD and part > whole):
        return Moved(whole + part, 1)
    return None


def _left_by_axis(layer: Layer, elements: int, part: int) -> list[int]:
    """Of so many elements those that are left after each axis of which an index takes some, until there is the part."""
    kept = _kept(layer.input_shapes[0], layer.output_shape) if layer.input_shapes else None
    if kept is None:  # of a parameter, perhaps
        return [elements, part]
    cuts = [pair for pair in zip(kept, layer.input_shapes[0], strict=True) if pair[0] != pair[1]]
    return list(itertools.accumulate(cuts, lambda left, cut: left * cut[0] // cut[1], initial=elements))


@functools.lru_cache(maxsize=1024)
def _kept(whole: Shape, part: Shape) -> tuple[int, ...] | None:
    """How many of every axis an index keeps, 1 of one that it takes away, such that few are cut; None if it is none."""
    if not whole:
        return () if all(size == 1 for size in part) else None
    ways = [(1, part)]
    if part and part[0] <= whole[0]:
        ways.append((part[0], part[1:]))
    found = [(size, *rest) for size, left in ways if (rest := _kept(whole[1:], left)) is not None]
    if part and part[0] == 1 and (new_axis := _kept(whole, part[1:])) is not None:
        found.append(new_axis)
    return min(found, key=lambda kept: sum(map(operator.ne, kept, whole)), default=None)


def passes_of_move(layer: Layer, batch: int, given: int, width: int) -> tuple[Moved, Moved]:
    """Forward and backward of what moves elements; the gradient of a copy moves once more, as it is laid out again."""
    if layer.op in WRITING and len(layer.input_shapes) > 1:
        return _passes_of_writing(layer, batch, width)
    y = layer.output_elements * batch * width
    x = (layer.input_sizes(batch)[0] if layer.input_shapes else layer.num_parameters) * given
    if layer.op in _MADE:
        return Moved(y, 1), NOTHING
    if layer.op == "clone":
        return Moved(2 * y, 1), NOTHING
    if layer.op in _REPEATING:
        return Moved(x + y, 1), Moved(x + y, 1)
    if layer.op in _FILLED and x != y:  # all of it is filled, and what is given copied into it; else a part is copied
        filled, copied = Moved(max(x, y) + 2 * min(x, y), 2), Moved(2 * min(x, y), 1)
        return (filled, copied) if y > x else (copied, filled)
    if layer.op in _MIRRORED:  # zeros, to which every element's gradient is added
        return Moved(x + y, 1), Moved(x + 3 * y, 2)
    if layer.op in _CHOSEN:
        return Moved(2 * y, 1), Moved(x + 3 * y, 2)
    return Moved(2 * y, 1), Moved(2 * y, 1)


def _passes_of_writing(layer: Layer, batch: int, width: int) -> tuple[Moved, Moved]:
    """Forward and backward of what writes a part of a tensor (`x[i] = y`), of which the layer has both shapes.

    Of a part that is named by numbers and slices torch copies the gradient, takes the part out of it and, where the
    tensor itself has a gradient, writes zeros, which it copies into the first copy. Of the whole it writes zeros alone.
    Where positions or a mask choose, the gradient is copied and zeros are put there; the part is gathered. What was
    broadcast while it was written counts as large as the part.

    Source: torch/csrc/autograd/functions/tensor.cpp, CopySlices and CopyBackwards; derivatives.yaml, `index_put`.
    """
    sizes = layer.input_sizes(batch)
    whole, part = sizes[0] * width, sizes[-1] * width
    given, put = (0 not in layer.fixed_inputs), (len(sizes) - 1 not in layer.fixed_inputs)
    forward = Moved(part if layer.op == "fill_part" else 2 * part, 1)
    if layer.op == "index_put":
        if not layer.inplace:
            forward = Moved(2 * whole + 2 * part, 2)
        return forward, Moved(given * (2 * whole + 3 * part) + put * 2 * part, 3 * given + put)
    if part >= whole:
        return forward, Moved(whole, 1) if given else NOTHING
    backward = Moved(2 * whole + (2 + 3 * given) * part, 2 + 2 * given)
    if layer.op == "update_part":  # that of what was done in place before is copied, taken out and put back as well
        backward = Moved(backward.num_bytes + 2 * whole + (2 + 2 * given) * part, backward.kernels + 2 + given)
    return forward, backward


def joins_gradients(layer: Layer) -> bool:
    """True where several readers each read a part of their own, whose gradients are joined rather than added."""
    return layer.view and layer.op in _JOINED


def gradient_of_pool(layer: Layer, batch: int, given: int, width: int) -> Moved | None:
    """Backward of what makes few elements of many, or of a few many; None where the gradient is spread as a view."""
    whole, few = sum(layer.input_sizes(batch)), layer.output_elements * batch
    x, y = whole * given, few * width
    match layer.op:
        case "sum":
            return None
        case "amax" | "amin":  # which elements are equal to it, how many, and its share times each of them
            return Moved(2 * x + 4 * y + 3 * whole + 16 * few, 4)
        case "var":  # the mean, what each element is above it, and its product with the gradient
            return Moved(5 * x + 5 * y, 4)
        case "std":  # first the variance's gradient, with none where it is 0
            return Moved(5 * x + 13 * y + 2 * few, 8)
        case "max" | "min":  # zeros are written, and the gradient where the element was found
            return Moved(x + 2 * y + positions_bytes(layer, batch), 2)
        case "grid_sample":  # both operands are read, and both have a gradient
            return Moved(2 * x + y, 1)
    return Moved(x + y + positions_bytes(layer, batch), 1)


def positions_bytes(layer: Layer, batch: int) -> int:
    """Of a pool, or a largest or least element along an axis, that tells where it was found."""
    told = layer.op in ("max", "min") or "max_pool" in layer.op
    return POSITION_BYTES * layer.output_elements * batch if told else 0
