"""The rules of operators that move elements: another order, another shape, a part of them.

The operators are run on the labels themselves (reshape, permute, chunk, roll, …), so that channel shuffles, window
partitions and flattens need no rule of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ptsim.prune.function_rules import meet
from ptsim.prune.labels import Facets, Label, along, compress
from ptsim.prune.rules import Call, FirstAttribute, RefusedError, rule

MOVED_WHOLE = "transpose permute flatten unsqueeze swapaxes swapdims movedim moveaxis t numpy_T"
MOVED = """
    view reshape squeeze expand expand_as broadcast_to view_as reshape_as chunk split tensor_split unbind roll repeat
    narrow select index_select flip unflatten tile repeat_interleave channel_shuffle pixel_unshuffle split_with_sizes
    slice
    """


@rule(MOVED_WHOLE, nn.Flatten)
def moved_whole(call: Call) -> Label:
    """Moved as a whole: what comes out does not depend on how many channels there are."""
    return _movement(call, call.module or call.node.target, counts=False)


@rule(MOVED, nn.Unflatten, nn.ChannelShuffle, nn.PixelUnshuffle, shapes=True)
def moved(call: Call) -> Label:
    """Moved as the arguments say, which may hold for this number of channels alone: tried out later."""
    return _movement(call, call.module or call.node.target, counts=not _beside_channels(call))


_ALONG = {"chunk": 2, "split": 2, "tensor_split": 2, "split_with_sizes": 2, "narrow": 1, "select": 1, "unbind": 1}


def _beside_channels(call: Call) -> bool:
    """True for a part taken along axes on which no channel lies: their number does not matter."""
    label = call.labels[0]
    if not isinstance(label, Tensor):
        return False
    if call.name == "getitem":
        return _indexed(label, call.node.args[1]) is not None
    dim = call.argument(_ALONG[call.name], "dim", 0) if call.name in _ALONG else None
    return isinstance(dim, int) and label.shape[dim] == 1


@rule("unfold im2col", nn.Unfold, shapes=True)
def unfolded(call: Call) -> Label:
    """The method takes windows of an axis; the function copies every channel's window into neighbouring channels."""
    if call.node.op == "call_method":
        return moved(call)
    channels = call.sources[0].meta["value"].shape[1]
    vector = call.vector(1, channels)
    if vector is None:
        call.refuse(f"{call.op} meets channels that lie along several axes")
    return along(vector.repeat_interleave(call.value.shape[1] // channels), 1, call.value.ndim)


@rule("fold col2im", nn.Fold, shapes=True)
def folded(call: Call) -> Label:
    """What `unfold` made is summed up again: the neighbouring channels of one window go together."""
    vector = call.vector(1, call.sources[0].meta["value"].shape[1])
    if vector is None:
        call.refuse(f"{call.op} meets channels that lie along several axes")
    together = vector.reshape(call.value.shape[1], -1)
    call.state.unite(together[:, :1], together)
    return along(together[:, 0], 1, call.value.ndim)


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


@rule("setitem", tuples=True, shapes=True)
def assigned(call: Call) -> Label:
    """`x[index] = value`: allowed where what is assigned are the same channels, tried out if it is a part of them."""
    target, index, given = call.node.args
    x, value = call.label_of(target), call.label_of(given)
    kept = _indexed(x, index) if isinstance(x, Tensor) else None
    if isinstance(x, Tensor) and kept is None:
        kept = _part(call, x, index)
    if kept is None or (value is None and isinstance(given, fx.Node)) or isinstance(value, Facets | tuple):
        call.refuse(f"{call.op} assigns to some of these channels")
    if isinstance(value, Tensor) and isinstance(target, fx.Node) and isinstance(given, fx.Node):
        part = target.meta["value"][call.argument(1, "index")]
        meet(call, [(kept, part), (value, given.meta["value"])], part)
    return kept


def _part(call: Call, x: Tensor, index: Any) -> Tensor | None:
    """The label of a part of the channels; None if the index is more than numbers and slices."""
    given = call.argument(1, "index")
    parts = given if isinstance(given, tuple) else (given,)
    if not all(isinstance(part, int | slice) or part is Ellipsis for part in parts):
        return None
    call.state.sensitive(x)
    _note_slices(call, x, index)
    return compress(call.expanded(x, call.sources[0])[given])


def _indexed(x: Tensor, index: Any) -> Tensor | None:
    """The label of `x[index]`; None if it takes a part of the channels, or is more than numbers and slices."""
    parts = _by_axis(index, x.ndim)
    if len(parts) != x.ndim or not all(isinstance(part, int | slice) for part in parts):
        return None
    if any(part != slice(None) for part, length in zip(parts, x.shape, strict=True) if length > 1):
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
    if len(inputs) > 1 and not call.name.endswith("_as"):  # an index of its own: its values are not these labels
        call.refuse(f"{call.op} takes channels by the values of a tensor")
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
        _note_slices(call, x, arguments[0])
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


def _note_slices(call: Call, x: Tensor, index: Any) -> None:
    shape = call.sources[0].meta["value"].shape
    for dim, part in _slices(index, len(shape)):
        for bound in (part.start, part.stop):
            if isinstance(bound, int):
                every = _rows(x, dim, shape)
                call.state.number(bound, every[: int(bound)] if int(bound) >= 0 else every[int(bound) :])


def _rows(label: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """The label with `dim` in front, at its full length."""
    return label.movedim(dim, 0).expand(shape[dim], *[-1] * (label.ndim - 1))


def _by_axis(index: Any, rank: int) -> list[Any]:
    """The parts of an index, with whole slices for the axes that it leaves out; another length if it is none."""
    parts = list(index) if isinstance(index, tuple) else [index]
    at = next((place for place, part in enumerate(parts) if part is Ellipsis), len(parts))
    parts[at : at + 1] = [slice(None)] * (rank - len(parts) + (at < len(parts)))
    return parts


def _slices(index: Any, rank: int) -> list[tuple[int, slice]]:
    """The slices of an index of numbers, slices and an ellipsis, with the axes that they are for."""
    parts = _by_axis(index, rank)
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
