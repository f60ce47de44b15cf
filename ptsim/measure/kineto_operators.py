"""Which of a network's operators is an ATen call that the profiler recorded with its shapes?

Arguments come as torch.profiler writes them with `record_shapes=True`: "Input Dims" has the shape of every tensor,
"Input type" its number format, "Concrete Inputs" the value of everything else as text. Their order is that of the
operator's schema.

Source: torch's aten/src/ATen/native/native_functions.yaml.
"""

from __future__ import annotations

import json
import math
from typing import Any

from ptsim.consistency import MOST_ELEMENTS, operator_problem
from ptsim.hardware.profile import OperatorShape
from ptsim.measure.kineto_events import Event
from ptsim.network import LayerKind, MemoryFormat
from ptsim.operators import KIND_OF_OP, is_transposed, usual_name

Shape = tuple[int, ...]
_LARGEST_SIZE = 2**31

_SAME_SHAPE = (LayerKind.BATCH_NORM, LayerKind.NORM, LayerKind.ACTIVATION, LayerKind.DROPOUT)


def operator_shape(event: Event) -> OperatorShape | None:
    """The operator with its shapes for one image; None where they were not recorded, or cannot be told.

    Args:
        event: an outermost ATen operator of a forward pass, with what ran inside it.
    """
    try:
        shape = _operator_shape(event)
    except (TypeError, ValueError, LookupError, ZeroDivisionError, OverflowError):  # a file may say anything
        return None
    return None if shape is None or _is_impossible(shape) else shape


def _is_impossible(shape: OperatorShape) -> bool:
    """Whether no operator has this shape, so that a profile with it could not be read."""
    tensors = (*shape.output, *(size for given in shape.inputs for size in given))  # an empty one has no work
    at_least_one = (shape.batch, shape.groups, *shape.kernel, *shape.stride, *shape.dilation, *tensors)
    if min(at_least_one) < 1 or min(shape.padding, default=0) < 0:
        return True
    if max(*at_least_one, *shape.padding) > _LARGEST_SIZE:
        return True
    return operator_problem(shape.kind, shape.inputs, shape.output, shape.groups) is not None


def _operator_shape(event: Event) -> OperatorShape | None:
    op = operator_name(event)
    kind = KIND_OF_OP.get(op, LayerKind.OTHER)
    tensors = _tensors(event)
    if kind in (LayerKind.OTHER, LayerKind.RESHAPE) or not tensors or not tensors[0]:
        return None
    batch, first = tensors[0][0], tensors[0][1:]
    values = event.arguments.get("concrete inputs") or []
    given: dict[str, Any]
    match kind:
        case LayerKind.CONV:
            return _convolution(event, op, tensors, values)
        case LayerKind.LINEAR if len(tensors) > 1 and len(tensors[1]) == 2:
            given = {"inputs": (first,), "output": (*first[:-1], tensors[1][0]), "bias": len(tensors) > 2}
        case LayerKind.POOL:
            pooled = _pool(op, first, values)
            if pooled is None:
                return None
            given = dict(inputs=(first,), **pooled)
        case LayerKind.ELEMENTWISE | LayerKind.CONCAT:
            shapes = [shape for shape in tensors if shape]
            if any(shape[0] != batch for shape in shapes):
                return None
            inputs = tuple(shape[1:] for shape in shapes)
            given = {"inputs": inputs, "output": _joined(op, kind, inputs, values)}
        case _ if kind in _SAME_SHAPE:
            has_weight = kind in (LayerKind.BATCH_NORM, LayerKind.NORM) and len(tensors) > 1
            given = {"inputs": (first,), "output": first, "bias": has_weight}
        case _:
            return None
    return OperatorShape(op=op, kind=kind, batch=batch, inplace=event.name.endswith("_"), **given)


def operator_name(event: Event) -> str:
    """The operator's usual name: "aten::relu_" is "relu"; that of a custom autograd function is its class."""
    return usual_name(event.name.rpartition("::")[2].strip("_"))


def number_type(event: Event) -> str | None:
    """The number format that the products inside ran in, as the profiler calls it ("float", "c10::Half")."""
    for name, position in (("aten::_convolution", 0), ("aten::convolution", 0), ("aten::addmm", 1), ("aten::mm", 0)):
        for inner in event.walk():
            types = inner.arguments.get("input type")
            if inner.name == name and isinstance(types, list) and len(types) > position and types[position]:
                return str(types[position])
    return None


def memory_format(event: Event) -> MemoryFormat | None:
    """How a convolution's input lies in memory; None where strides were not recorded, or one image row says nothing."""
    dims, strides = event.arguments.get("input dims"), event.arguments.get("input strides")
    try:
        (_, channels, _, width), (_, stride, _, _) = dims[0], strides[0]  # type: ignore[index] # caught below
    except (TypeError, ValueError, IndexError, KeyError):
        return None
    if channels == 1 or width == 1:
        return None
    return "channels_last" if stride == 1 else "contiguous"


def number_of_elements(event: Event) -> int:
    """Of the first tensor that the event was given; 0 where shapes were not recorded."""
    try:
        tensors = _tensors(event)
    except (TypeError, ValueError, OverflowError):
        return 0
    elements = math.prod(tensors[0]) if tensors else 0
    return elements if 0 <= elements <= MOST_ELEMENTS else 0


def _convolution(event: Event, op: str, tensors: list[Shape], values: list[str]) -> OperatorShape | None:
    if len(tensors) < 2 or len(tensors[0]) != 4 or len(tensors[1]) != 4 or is_transposed(op):
        return None
    (batch, *first), weight = tensors[0], tensors[1]
    stride, dilation = _pair(values, 3, (1, 1)), _pair(values, 5, (1, 1))
    groups, kernel = _number(values, 6, 1), (weight[2], weight[3])
    word = str(values[4]).strip("'\"") if len(values) > 4 else ""
    same = word == "same"
    if same or word == "valid":
        padding = tuple((k - 1) * d // 2 if same else 0 for k, d in zip(kernel, dilation, strict=True))
    else:
        padding = _pair(values, 4, (0, 0))
    height, width = (
        (size + 2 * pad - spread * (k - 1) - 1) // step + 1
        for size, pad, spread, k, step in zip(first[1:], padding, dilation, kernel, stride, strict=True)
    )
    if same:  # an even kernel pads one side more
        height, width = first[1:]
    return OperatorShape(
        op=op,
        kind=LayerKind.CONV,
        batch=batch,
        inputs=(tuple(first),),
        output=(weight[0], height, width),
        kernel=kernel,
        stride=stride,
        padding=(padding[0], padding[1]),
        dilation=dilation,
        groups=groups,
        bias=len(tensors) > 2,
    )


def computes_input_gradient(backward: Event) -> bool:
    """Whether a convolution's backward pass computed the gradient of its input; True for other operators."""
    for inner in backward.walk():
        values = inner.arguments.get("concrete inputs")
        if (
            inner.name == "aten::convolution_backward"
            and isinstance(values, list)
            and values
            and "[" in str(values[-1])
        ):
            return str(values[-1]).strip("[ ").lower().startswith(("true", "1"))
    return True


def _pool(op: str, first: Shape, values: list[str]) -> dict[str, Any] | None:
    if op.startswith("adaptive_"):
        size = _pair(values, 1, None)
        return None if size is None else {"output": (first[0], *size)}
    if op in ("mean", "sum", "amax", "amin"):
        axes = _numbers(values, 1)
        if axes is None:
            return None
        gone = {axis % (len(first) + 1) for axis in axes}
        keep = len(values) > 2 and str(values[2]).lower() == "true"
        sizes = [(1 if i in gone else size) for i, size in enumerate((0, *first)) if keep or i not in gone]
        return None if 0 in gone else {"output": tuple(sizes[1:])}
    if len(first) != 3 or not op.endswith("pool2d"):
        return None
    kernel = _pair(values, 1, (1, 1))
    stride, padding = _pair(values, 2, kernel), _pair(values, 3, (0, 0))
    dilation = _pair(values, 4, (1, 1)) if op == "max_pool2d" else (1, 1)
    upwards = len(values) > 5 - (op != "max_pool2d") and str(values[5 - (op != "max_pool2d")]).lower() == "true"
    height, width = (
        _pooled_size(size + pad, size + 2 * pad - spread * (k - 1) - 1, step, upwards)
        for size, pad, spread, k, step in zip(first[1:], padding, dilation, kernel, stride, strict=True)
    )
    output = (first[0], height, width)
    return {"output": output, "kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}


def _pooled_size(inside: int, last: int, stride: int, upwards: bool) -> int:
    """How many windows of a pooling there are along one axis.

    Args:
        inside: where the image ends, behind the padding in front of it: no window begins there or later.
        last: where the last whole window can begin.
        stride: from one window to the next.
        upwards: whether a window may lie partly behind the end.

    Source: torch's aten/src/ATen/native/Pool.h, pooling_output_shape_pad_lr.
    """
    if not upwards:
        return last // stride + 1
    num = -(-last // stride) + 1
    return num - 1 if (num - 1) * stride >= inside else num


def _joined(op: str, kind: LayerKind, inputs: tuple[Shape, ...], values: list[str]) -> Shape:
    """The output of a concatenation along its axis, or of broadcasting.

    Raises:
        ValueError: it makes an axis, or joins mini-batches.
    """
    if kind is LayerKind.CONCAT:
        axis = _number(values, 1, 1) % (len(inputs[0]) + 1) - 1
        if axis < 0 or op not in ("cat", "hstack"):
            raise ValueError(f"{op} is no concatenation inside an image")
        return tuple(sum(s[i] for s in inputs) if i == axis else size for i, size in enumerate(inputs[0]))
    longest = max(inputs, key=len)
    return tuple(max(shape[i - len(longest)] for shape in inputs if len(shape) >= len(longest) - i)
                 for i in range(len(longest)))  # fmt: skip


def _tensors(event: Event) -> list[Shape]:
    """Shapes of the tensor arguments in order; those of a list of tensors one by one."""
    found: list[Shape] = []
    for dims in event.arguments.get("input dims") or []:
        if dims and isinstance(dims[0], list):
            found += [tuple(map(_size, inner)) for inner in dims]
        elif dims:
            found.append(tuple(map(_size, dims)))
    return found


def _size(value: object) -> int:
    """A whole number as it is; half a pixel, or a text, is none that Kineto writes.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not a whole number")
    return value


def _numbers(values: list[str], position: int) -> tuple[int, ...] | None:
    try:
        parsed = json.loads(str(values[position]))
        return tuple(map(_size, parsed if isinstance(parsed, list) else [parsed]))
    except (LookupError, ValueError, TypeError, RecursionError):
        return None


def _number(values: list[str], position: int, otherwise: int) -> int:
    numbers = _numbers(values, position)
    return numbers[0] if numbers else otherwise


def _pair(values: list[str], position: int, otherwise: Any) -> Any:
    numbers = _numbers(values, position)
    if not numbers:
        return otherwise
    return (numbers[0], numbers[-1])
