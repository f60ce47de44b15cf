"""Run operators on the CPU without their arithmetic: shapes, strides, storages and autograd are real, values are not.

Inside `NoArithmetic` every operator that would compute takes memory for its results and leaves it untouched, so that
the operating system hands none out. Which results it has is asked of the operator itself on tensors without storage,
once for each kind of input. torch's own `FakeTensorMode` gives the same and takes ten times as long per operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# Whose results on tensors without storage lack what the CPU's own hold: positions, and a workspace.
_UNLIKE_META = frozenset({_aten._embedding_bag.default, _aten.mkldnn_rnn_layer.default})
_MOST_RESULTS = 20_000  # remembered; a large network has about 1,000
_KNOWN = "ptsim_known"  # attribute of a tensor that has values


class _Made(NamedTuple):
    """A result with memory of its own."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Given(NamedTuple):
    """A result that is an argument, changed in place."""

    argument: int | str


_Results = Any  # `_Made`, `_Given`, what is no tensor, or a tuple or list of them; None: the operator itself has to run
_RESULTS: dict[Any, _Results] = {}


class NoArithmetic(TorchDispatchMode):
    """Operators without arithmetic; one that needs values which are not there raises a RuntimeError.

    Numbers that the code writes down or draws at random, and what follows from them alone, are computed.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's gap
        self._readers = _Readers()

    def __enter__(self) -> Any:
        self._readers.__enter__()  # type: ignore[no-untyped-call] # torch's gap
        return super().__enter__()  # type: ignore[no-untyped-call] # torch's gap

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call] # torch's gap
        self._readers.__exit__(*error)  # type: ignore[no-untyped-call] # torch's gap

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written_down = func is _aten.lift_fresh.default  # a number or a list of them has become a tensor
        if written_down or all(getattr(tensor, _KNOWN, False) for tensor in _tensors(args, kwargs)):
            return self._numbers(func, args, kwargs)
        if _fills_at_random(func, args):
            filled = func(*args, **kwargs)
            setattr(filled, _KNOWN, True)
            return filled
        given = [(name, _signature(value)) for name, value in kwargs.items()]
        key = (func, torch.get_default_dtype(), _signature(args), *given)
        if key not in _RESULTS:
            if len(_RESULTS) >= _MOST_RESULTS:
                _RESULTS.clear()
            _RESULTS[key] = _results(func, args, kwargs)
        results = _RESULTS[key]
        if results is None:
            return func(*args, **kwargs)
        return _handed(results, args, kwargs)

    @staticmethod
    def _numbers(func: Any, args: Any, kwargs: Any) -> Any:
        """An operator whose inputs have values: it runs, and so do its results, unless it only takes memory."""
        result = func(*args, **kwargs)
        if not func._schema.name.startswith("aten::empty"):
            for leaf in pytree.tree_leaves(result):
                if isinstance(leaf, Tensor):
                    setattr(leaf, _KNOWN, True)
        return result


class _Readers(TorchFunctionMode):
    """Refuses what reads a tensor's memory past its operators."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READERS and not getattr(args[0], _KNOWN, False):
            raise RuntimeError(f"its code looks at the values of a tensor ({func.__name__})")
        return func(*args, **(kwargs or {}))


_READERS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}


def _fills_at_random(func: Any, args: Any) -> bool:
    """Whether it draws every value of the tensor that it is given: `torch.empty(1).bernoulli_(0.5)`."""
    drawn = torch.Tag.nondeterministic_seeded in func.tags and func._schema.is_mutable
    return drawn and not any(isinstance(value, Tensor) for value in args[1:])


def _tensors(args: Any, kwargs: Any) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            for part in value:
                if isinstance(part, Tensor):
                    yield part


def _signature(value: Any) -> Any:
    """What of an argument decides about the results."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple([_signature(part) for part in value])
    return type(value), value


def _handed(results: _Results, args: Any, kwargs: Any) -> Any:
    match results:
        case _Made():
            return torch.empty_strided(results.shape, results.stride, dtype=results.dtype)
        case _Given():
            found = args[results.argument] if isinstance(results.argument, int) else kwargs[results.argument]
            if getattr(found, _KNOWN, False):
                setattr(found, _KNOWN, False)
            return found
        case tuple() | list():
            return type(results)(_handed(part, args, kwargs) for part in results)
    return results


def _results(func: Any, args: Any, kwargs: Any) -> _Results:
    """What an operator gives for such arguments."""
    if torch.Tag.data_dependent_output in func.tags:
        raise RuntimeError(f"its code looks at the values of a tensor ({func})")
    device = kwargs.get("device")
    no_tensor = all("Tensor" not in str(returned.type) for returned in func._schema.returns)
    if no_tensor or torch.Tag.inplace_view in func.tags or (device is not None and device.type != "cpu"):
        return None
    if func in _SHORT_WAYS and not kwargs:
        return _SHORT_WAYS[func](*args)
    if func in _UNLIKE_META:
        return _on_zeros(func, args, kwargs)
    hollow = pytree.tree_map_only(Tensor, _without_storage, (args, kwargs))
    if device is not None:
        hollow[1]["device"] = torch.device("meta")
    inputs = {tensor.untyped_storage()._cdata for tensor in _tensors(*hollow)}
    try:
        given = func(*hollow[0], **hollow[1])
    except NotImplementedError as error:
        if torch.Tag.dynamic_output_shape in func.tags:
            raise RuntimeError(f"a shape depends on the values of a tensor ({func})") from error
        return _on_zeros(func, args, kwargs)
    written = [_written(func, returned) for returned in func._schema.returns]
    parts = list(given) if isinstance(given, (tuple, list)) and len(written) > 1 else [given]
    found = []
    for part, argument in zip(parts, written, strict=True):
        if argument is not None:
            found.append(argument)
            continue
        leaves = [leaf for leaf in pytree.tree_leaves(part) if isinstance(leaf, Tensor)]
        if any(leaf.untyped_storage()._cdata in inputs for leaf in leaves):
            return None  # a view
        found.append(pytree.tree_map_only(Tensor, lambda leaf: _Made(leaf.shape, leaf.stride(), leaf.dtype), part))
    return tuple(found) if len(written) > 1 else found[0]


def _on_zeros(func: Any, args: Any, kwargs: Any) -> _Results:
    """What an operator really gives, once it has run with zeros."""
    given = func(*pytree.tree_map_only(Tensor, torch.zeros_like, args), **kwargs)
    return pytree.tree_map_only(Tensor, lambda tensor: _Made(tensor.shape, tensor.stride(), tensor.dtype), given)


def _written(func: Any, returned: Any) -> _Given | None:
    """The argument that a result is, if it is one that was written to."""
    alias = returned.alias_info
    if alias is None or not alias.is_write:
        return None
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.before_set == alias.before_set:
            return _Given(argument.name if argument.kwarg_only else index)
    return None


def _without_storage(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _like(x: Tensor) -> _Made:
    """Of the shape of `x`, in the layout that kernels for images choose: channels-last if `x` has it, or contiguous."""
    made = torch.empty(x.shape, dtype=x.dtype, device="meta", memory_format=suggest_memory_format(x))
    return _Made(made.shape, made.stride(), made.dtype)


def _vector(*shape: int, x: Tensor, weight: Tensor | None) -> _Made:
    # With wider weights than images the CPU, as a GPU, keeps its statistics in their width.
    made = torch.empty(shape, dtype=x.dtype if weight is None else weight.dtype, device="meta")
    return _Made(made.shape, made.stride(), made.dtype)


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Any, mean: Any, variance: Any, training: bool, *_: Any
) -> _Results:
    """The output; of a training step mean and deviation of every channel, else nothing in their places."""
    statistics = _vector(x.shape[1] if training else 0, x=x, weight=weight)
    return _like(x), statistics, statistics


def _batch_norm_back(gradient: Any, x: Tensor, weight: Tensor | None, *more: Any) -> _Results:
    """The gradients of images, weight and bias that the mask asks for."""
    vector = _vector(x.shape[1], x=x, weight=weight)
    return tuple(made if asked else None for made, asked in zip((_like(x), vector, vector), more[-1], strict=True))


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Any, n: int, channels: int, pixels: int, groups: int, *_: Any
) -> _Results:
    """The output, and mean and deviation of every group of every image."""
    statistics = _vector(n, groups, x=x, weight=weight)
    return _like(x), statistics, statistics


def _group_norm_back(
    gradient: Any, x: Tensor, mean: Any, deviation: Any, weight: Tensor | None, *more: Any
) -> _Results:
    """As of a batch norm."""
    return _batch_norm_back(gradient, x, weight, *more)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> _Results:
    """The output, in the layout of the library that the CPU chooses; without storage it would always be contiguous."""
    plain = _aten.convolution.default(*pytree.tree_map_only(Tensor, _without_storage, (x, weight, bias)), *how)
    return _laid_out(plain.shape, x, weight, bias, *how)


def _convolution_back(gradient: Tensor, x: Tensor, weight: Tensor, sizes: Any, *more: Any) -> _Results:
    """The gradients of images, weight and bias that the mask asks for; torch 2.8 has no layout without storage."""
    *how, asked = more
    shapes = (x.shape, weight.shape, (weight.shape[1] * how[-1] if how[3] else weight.shape[0],))
    made = (_laid_out(shape, x, weight, None, *how) for shape in shapes)
    return tuple(part if wanted else None for part, wanted in zip(made, asked, strict=True))


def _laid_out(shape: Sequence[int], x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> _Made:
    """A result of a convolution."""
    layout = torch.contiguous_format
    if x.dim() == len(shape) in (4, 5):  # of a row of values torch makes an image first, and that is contiguous
        library = torch._C._select_conv_backend(x, weight, bias, *how)
        layout = torch._C._conv_determine_backend_memory_format(x, weight, library)
    made = torch.empty(shape, dtype=x.dtype, device="meta", memory_format=layout)
    return _Made(made.shape, made.stride(), made.dtype)


# Where the operators' own way on tensors without storage gives another layout, or is through a dozen others.
_SHORT_WAYS: dict[Any, Callable[..., _Results]] = {
    _aten.convolution.default: _convolution,
    _aten.convolution_backward.default: _convolution_back,
    _aten.native_batch_norm.default: _batch_norm,
    _aten.native_batch_norm_backward.default: _batch_norm_back,
    _aten.native_group_norm.default: _group_norm,
    _aten.native_group_norm_backward.default: _group_norm_back,
}
