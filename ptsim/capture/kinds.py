"""What kind of layer is a graph node, and what is its geometry?

Decided by the operator's name, so that a module, a function, a method and a Python operator that do the same are the
same. A leaf module of its own kind says so with the attributes `ptsim_kind` and `ptsim_op`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ptsim.capture.graph import written_by
from ptsim.capture.rehearsal import Shape, Step
from ptsim.network import LayerKind
from ptsim.operators import BILINEAR, KIND_OF_OP, TORCH_LIBRARIES, is_transposed, plain_name, registered_by, usual_name

_PRODUCTS = {
    LayerKind.MATMUL: {"matmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"},
    LayerKind.CONV: {"conv", "_convolution"},
    LayerKind.LINEAR: {"linear", "addmm", "mm", BILINEAR},
}

_POOL_ARGUMENTS = ("input", "kernel_size", "stride", "padding")
_OTHER_POOL_ARGUMENTS = {  # by how the name of the operator begins
    "lp": ("input", "norm_type", "kernel_size", "stride"),
    "max_pool": (*_POOL_ARGUMENTS, "dilation"),
    "max_unpool": ("input", "indices", "kernel_size", "stride", "padding"),
}
_NORMS = {"batch_norm": 1, "instance_norm": 1, "group_norm": 1, "layer_norm": -1, "rms_norm": -1}  # where channels lie
_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_DEFORMED = "deform_conv2d"  # of torchvision, as it is registered: stride, padding and dilation number by number
_WINDOWS = re.compile(r"(avg|max|lp)_(un)?pool\dd")  # pools that are given the size of a window
_TURNED = {"sub": "rsub", "div": "rdiv"}  # where a tensor is taken from, or divides, a number or a parameter
_OF_ITSELF = {"mul": "square", "add": "twofold"}  # where both operands are one tensor
_SCALED = {"add": "scaled_add", "sub": "scaled_sub"}  # where the second operand is multiplied by a number
_OF_TWO = {"max": "maximum", "min": "minimum"}  # tensors
_PADDED = {"reflect": "reflection", "replicate": "replication", "circular": "circular"}


def kind_and_op(node: fx.Node, graph: fx.GraphModule, step: Step, counted: Iterable[str] = ()) -> tuple[LayerKind, str]:
    """The node's kind and its operator's name in lower case.

    `counted` names the operators that run inside it, as fvcore calls them. Products among them decide where the node's
    own name is not a known one, or stands for something without products.
    """
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        op = getattr(module, "ptsim_op", None) or _op_of_class(type(module))
        said = getattr(module, "ptsim_kind", None)
    else:
        op = _as_torch_calls_it(node, step, plain_name(_name_of(node)))
        named = not foreign_operator(node) and (_is_torchs(node) or KIND_OF_OP.get(op) not in _PRODUCTS)
        said = None if named else LayerKind.OTHER  # a user's `linear` may be anything
    kind = LayerKind(said or KIND_OF_OP.get(op, LayerKind.OTHER))
    if kind is LayerKind.OTHER or (said is None and kind not in _PRODUCTS):
        inside = set(counted)
        kind = next((kind for kind, ops in _PRODUCTS.items() if inside & ops), kind)
    return kind, op


def _as_torch_calls_it(node: fx.Node, step: Step, op: str) -> str:
    """Python writes `1 - x` as it does `x - 1`, `x * x` is a square, and torch.max takes an axis or another tensor."""
    if written_by(node) is not None:
        return _writing(node, step)
    if op in _OF_ITSELF and takes_one_twice(node):
        return _OF_ITSELF[op]
    if op in _SCALED and len(step.inputs) == 2 and step.keywords.get("alpha", 1) != 1:
        return _SCALED[op]
    if KIND_OF_OP.get(op) is LayerKind.CONCAT and len(step.inputs) == 1 and takes_one_alone(node):
        return "repeat"
    if op in _TURNED and len(step.inputs) == 1 and not _is_handed(node, step, 0):
        return _TURNED[op]
    if op == "pad":
        return _padding_op(step)
    given = (*step.arguments[1:2], step.keywords.get("other"))
    if op in _OF_TWO and any(isinstance(argument, torch.Size) for argument in given):
        return _OF_TWO[op]
    return op


def _padding_op(step: Step) -> str:
    """`F.pad` with a mode is called as the layer that does the same: "reflection_pad2d"."""
    around, mode = (
        step.keywords.get(name, step.arguments[place] if place < len(step.arguments) else None)
        for place, name in enumerate(("pad", "mode"), start=1)
    )
    if mode not in _PADDED or around is None:
        return "pad"
    return f"{_PADDED[mode]}_pad{len(around) // 2}d"


def _writing(node: fx.Node, step: Step) -> str:
    """What writes a part of a tensor: a number, or another tensor's elements one by one or at positions of its own.

    `x[i] += y` adds in place, and writes what it gets where it is already.
    """
    if node.target is operator.setitem and _chooses(step.arguments[1]):
        return "index_put"
    value = node.args[-1]
    part = value.args[0] if isinstance(value, fx.Node) and "augments" in value.meta else None
    if isinstance(part, fx.Node) and part.target is operator.getitem and part.args == node.args[:2]:
        return "update_part"
    return "setitem" if isinstance(step.arguments[-1], torch.Size) and len(step.arguments) > 1 else "fill_part"


def _chooses(index: Any) -> bool:
    """Whether an index has positions or a mask (a `torch.Size` in place of each), rather than numbers and slices."""
    parts = index if type(index) is tuple else (index,)
    return any(isinstance(part, torch.Size | list) for part in parts)


def _is_handed(node: fx.Node, step: Step, place: int) -> bool:
    """True if an argument is a tensor that another node has made; by keyword it is taken for one."""
    if place >= len(node.args):
        return True
    given = node.args[place]
    return isinstance(given, fx.Node) and given.op != "get_attr" and isinstance(step.arguments[place], torch.Size)


def takes_one_twice(node: fx.Node) -> bool:
    """Whether it is called with the same value twice: a product of a tensor with itself has two gradients."""
    given: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), given.append)
    return len(set(given)) < len(given)


def takes_one_alone(node: fx.Node) -> bool:
    """Whether a list of the same value, several times, is all that it is called with: `torch.cat([x, x])`."""
    given = node.args[0] if node.args else node.kwargs.get("tensors")
    return isinstance(given, list | tuple) and len(given) > 1 and all(part is given[0] for part in given)


def foreign_operator(node: fx.Node) -> str | None:
    """The name of an operator that neither torch nor torchvision has registered (`mine::scale`); None for others."""
    if registered_by(node.target) in (None, *TORCH_LIBRARIES, "torchvision"):
        return None
    packet: Any = getattr(node.target, "overloadpacket", node.target)
    return str(packet._qualified_op_name)


def counts_products(counted: Mapping[str, float]) -> bool:
    """Whether products are among what fvcore counts."""
    return _of_products(counted) > 0


def operations(kind: LayerKind, counted: Mapping[str, float]) -> int:
    """What counts as the layer's operations: its products where it is made of them, everything elsewhere."""
    products = _of_products(counted)
    return round(products if kind in _PRODUCTS and products else sum(counted.values()))


def _of_products(counted: Mapping[str, float]) -> float:
    return sum(count for op, count in counted.items() if any(op in ops for ops in _PRODUCTS.values()))


def geometry(
    node: fx.Node, graph: fx.GraphModule, step: Step, op: str, inputs: tuple[Shape, ...], output: Shape
) -> dict[str, Any]:
    """Channels, kernel, stride, padding, dilation, groups and bias, as `Layer` has them.

    `op` is what `kind_and_op` said; `inputs` and `output` are shapes of one image.
    """
    channels = {
        "in_channels": _channels(inputs[0]) if inputs else 0,
        "out_channels": _channels(output),
    }
    row = "1d" in op
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        kernel, stride = getattr(module, "kernel_size", None), getattr(module, "stride", None)
        depth = _depth(op, kernel, stride, getattr(module, "padding", 0), getattr(module, "dilation", 1))
        return channels | _module_geometry(module, row=row) | depth
    if not _is_torchs(node):
        return channels
    if KIND_OF_OP.get(op) is LayerKind.CONV:
        names = _TRANSPOSED_ARGUMENTS if is_transposed(op) else _CONV_ARGUMENTS
        given = dict(zip(names, step.arguments, strict=False)) | step.keywords
        weight = given["weight"]
        groups = given.get("groups", 1)
        first, second = weight[0], weight[1] * groups
        kernel, dilation = _pair(weight[2:], row=row), _pair(given.get("dilation", 1), row=row)
        return {
            "in_channels": first if is_transposed(op) else second,
            "out_channels": second if is_transposed(op) else first,
            "kernel_size": kernel,
            "stride": _pair(given.get("stride", 1), row=row),
            "padding": _padding(given.get("padding", 0), kernel, dilation, row=row),
            "dilation": dilation,
            "groups": groups,
            "bias": given.get("bias") is not None,
            **_depth(op, weight[2:], given.get("stride", 1), given.get("padding", 0), given.get("dilation", 1)),
        }
    if op == _DEFORMED:
        weight, groups = step.arguments[1], step.arguments[11]
        strides, paddings, dilations = _in_pairs(step.arguments[5:11])
        return {
            "in_channels": weight[1] * groups, "out_channels": weight[0], "kernel_size": tuple(weight[2:]),
            "groups": groups, "stride": strides, "padding": paddings, "dilation": dilations, "bias": True,
        }  # fmt: skip
    if op == BILINEAR:
        return {"in_channels": inputs[0][-1], "out_channels": output[-1]}
    if op == "linear":
        given = dict(zip(("input", "weight", "bias"), step.arguments, strict=False)) | step.keywords
        weight = given["weight"]
        out_channels = weight[0] if len(weight) > 1 else 1
        return {"in_channels": weight[-1], "out_channels": out_channels, "bias": given.get("bias") is not None}
    if op in _NORMS and step.inputs and len(step.inputs[0]) > 1:
        return dict.fromkeys(("in_channels", "out_channels"), step.inputs[0][_NORMS[op]])
    if _WINDOWS.match(op):
        order = next((some for start, some in _OTHER_POOL_ARGUMENTS.items() if op.startswith(start)), _POOL_ARGUMENTS)
        given = dict(zip(order, step.arguments, strict=False)) | step.keywords
        kernel = _pair(given["kernel_size"], row=row)
        stride = given.get("stride")
        return channels | {
            "kernel_size": kernel,
            "stride": kernel if stride in (None, []) else _pair(stride, row=row),
            "padding": _padding(given.get("padding", 0), kernel, (1, 1), row=row),
            "dilation": _pair(given.get("dilation", 1), row=row),
            **_depth(op, given["kernel_size"], stride, given.get("padding", 0), given.get("dilation", 1)),
        }
    return channels


def _module_geometry(module: nn.Module, *, row: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for ours, theirs in (
        ("in_channels", ("in_channels", "in_features", "in1_features", "num_features", "num_channels", "embed_dim")),
        ("out_channels", ("out_channels", "out_features", "num_features", "num_channels", "embed_dim")),
        ("groups", ("groups",)),
    ):
        value = next((getattr(module, name) for name in theirs if isinstance(getattr(module, name, None), int)), None)
        if value is not None:
            found[ours] = value
    for name in ("kernel_size", "stride", "dilation"):
        value = getattr(module, name, None)
        if name == "stride" and value is None:  # of a pool, whose windows then lie side by side
            value = getattr(module, "kernel_size", None)
        if isinstance(value, int | tuple):
            found[name] = _pair(value, row=row)
    if "kernel_size" in found and isinstance(value := getattr(module, "padding", None), int | tuple | str):
        found["padding"] = _padding(value, found["kernel_size"], found.get("dilation", (1, 1)), row=row)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        found |= dict.fromkeys(("in_channels", "out_channels"), module.normalized_shape[-1])
    found["bias"] = isinstance(getattr(module, "bias", None), nn.Parameter)
    return found


def _name_of(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]


def _is_torchs(node: fx.Node) -> bool:
    """True for a method, and for a function whose arguments are those that torch gives it."""
    home = getattr(node.target, "__module__", None) or "torch"
    return node.op == "call_method" or (home.partition(".")[0] == "torch" and foreign_operator(node) is None)


def _op_of_class(kind: type[nn.Module]) -> str:
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", kind.__name__).lower()
    snake = usual_name(snake)
    if match := re.fullmatch(r"(batch_norm|instance_norm|sync_batch_norm)\dd?", snake):
        return match[1]
    return snake


def _in_pairs(numbers: Sequence[int]) -> Iterable[tuple[int, int]]:
    return zip(numbers[::2], numbers[1::2], strict=True)


def _channels(shape: Shape) -> int:
    """The channel axis: first for (C, H, W) and (C,), last for tokens (T, C) and windows."""
    if not shape:
        return 1
    return shape[0] if len(shape) in (1, 3) else shape[-1]


def _pair(value: Any, *, row: bool, height: int = 1) -> tuple[int, int]:
    """(height, width) of what torch accepts: a number, or one per axis (the last two are taken).

    A `row` of values has no height; `height` is what does nothing there.
    """
    numbers = (value,) if isinstance(value, int) else tuple(value)
    if len(numbers) == 1:
        return height if row else numbers[0], numbers[0]
    return numbers[-2:]


def _depth(op: str, kernel: Any, stride: Any, padding: Any, dilation: Any) -> dict[str, Any]:
    """Kernel, stride, padding and dilation of the first of three axes, as `Layer` has them; nothing of fewer axes."""
    if not op.endswith("3d") or kernel is None:
        return {}
    size, step, spread = (
        value if isinstance(value, int) else value[0]
        for value in (kernel, kernel if stride in (None, []) else stride, dilation)
    )
    if isinstance(padding, str):
        around = _padding(padding, (size, size), (spread, spread), row=False)[0]
    else:
        around = padding if isinstance(padding, int) else padding[0]
    return {"depth": (size, step, around, spread)}


def _padding(value: Any, kernel: tuple[int, int], dilation: tuple[int, int], *, row: bool) -> tuple[int, int]:
    if isinstance(value, str):
        if value == "valid":
            return 0, 0
        height, width = ((k - 1) * d // 2 for k, d in zip(kernel, dilation, strict=True))
        return height, width
    return _pair(value, row=row, height=0)
