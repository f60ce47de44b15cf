"""Copies of a live module: with its weights, or hollow, with parameters and buffers that take no memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ptsim.capture.calls import DEEPEST, HOLDERS, objects_of, parts_of
from ptsim.capture.closures import FunctionTwins
from ptsim.errors import UnsupportedModelError

_HOME = "_ptsim_device"  # attribute of a hollow copy: where the original is
_PRUNINGS = "_ptsim_"  # how the attributes begin that pruning keeps on modules


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of any model, also of one that keeps computed tensors, or closures around its modules.

    Parts that `torch.compile` has wrapped run as they were written.
    """
    known = computed_tensors(model) | tabled_tensors(model) | generators(model) | (memo or {})
    compilers = [vars(part)["dynamo_ctx"] for part in model.modules() if compiled_inside(part) is not None]
    known |= {id(compiler): compiler for compiler in compilers}
    functions = FunctionTwins(model, known)
    twin = copy.deepcopy(model, known)
    functions.fill()
    for part in twin.modules():
        if (inside := compiled_inside(part)) is not None:
            vars(part)["forward"] = inside
    return twin


def compiled_inside(module: nn.Module) -> nn.Module | None:
    """The module that `torch.compile` has wrapped in this one; None of any other module."""
    return module._modules.get("_orig_mod") if "dynamo_ctx" in vars(module) else None


def tabled_tensors(model: nn.Module) -> dict[int, Any]:
    """A memo for `deepcopy`: tensors in the tables that pruning keeps on modules are shared by the copy.

    They say where the elements of a cut buffer came from; pruning makes new ones and changes none.
    """
    return {
        id(value): value
        for module in model.modules()
        for name, table in vars(module).items()
        if name.startswith(_PRUNINGS) and isinstance(table, dict)
        for value in table.values()
        if isinstance(value, Tensor)
    }


def generators(model: nn.Module) -> dict[int, Any]:
    """A memo for `deepcopy`: twins of the generators of random numbers that modules keep, in the same state.

    Their own copy works with a tensor, which a mode that forbids arithmetic does not let through.
    """
    found: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Generator):
                with _disable_current_modes():
                    found[id(value)] = torch.Generator(value.device)
                    found[id(value)].set_state(value.get_state())
    return found


def computed_tensors(model: nn.Module) -> dict[int, Any]:
    """A memo for `deepcopy`: the values, without their history, of tensors that modules keep, in containers as well.

    Older normalisations of weights (`torch.nn.utils.weight_norm`, `spectral_norm`) and masks (`torch.nn.utils.prune`)
    compute a layer's weight before every call and leave it there, and code may note what it has computed; torch does
    not copy such a tensor, nor any real one into a network of fake ones. The copy computes its own when it is called.
    Parameters and buffers of the model that stand there as well are left to `deepcopy`, so that they are the copy's
    own, once.
    """
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    return {
        id(value): value.detach().clone().requires_grad_(value.requires_grad and value.is_leaf)
        for table in (*map(vars, model.modules()), *objects_of(model))
        for name, kept in table.items()
        if not name.startswith(_PRUNINGS)
        for value, listed in _tensors_in(kept)
        if id(value) not in own and not (value.is_leaf and (listed or isinstance(value, nn.Parameter)))
    }


def _tensors_in(kept: Any, depth: int = DEEPEST, *, listed: bool = False) -> Iterator[tuple[Tensor, bool]]:
    """The tensors in an attribute, and whether each stands in something else than a dict."""
    if isinstance(kept, Tensor):
        yield kept, listed
    elif depth and isinstance(kept, HOLDERS):
        for part in parts_of(kept):
            yield from _tensors_in(part, depth - 1, listed=not isinstance(kept, dict))


def hollow_copy(model: nn.Module, device: str | None = None) -> nn.Module:
    """A deep copy whose parameters and buffers are new, on `device` (a fake or meta one takes no memory).

    Its BatchNorms average their statistics with a fixed momentum, since an average over all batches (momentum None)
    reads a counter's value, which is not there.

    Raises:
        UnsupportedModelError: a parameter has no shape yet.
    """
    if any(nn.parameter.is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise UnsupportedModelError(
            f"{type(model).__name__} has lazy modules, whose parameters have no shape yet",
            hint="run one image through the model before it is handed over",
        )
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if device:
            twin = torch.empty_like(tensor, device=device)
        elif isinstance(tensor, nn.Parameter):  # contiguous: a model in channels-last is captured as any other
            twin = torch.empty(tensor.shape, dtype=tensor.dtype)
        else:
            strides = torch.empty_like(tensor, device="meta").stride()
            twin = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype)
        memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
    twin_model = copied(model, memo)
    if device:
        home = device_of(model)
        setattr(twin_model, _HOME, torch.device("cpu") if home.type == "meta" else home)  # it has never been anywhere
    for module in twin_model.modules():
        if hasattr(module, "num_batches_tracked") and getattr(module, "momentum", 0.1) is None:
            module.momentum = 0.1  # type: ignore[assignment] # a number
    return twin_model


def dtype_of(model: nn.Module) -> torch.dtype:
    """The floating-point type of the network's parameters, and so of the images that it takes."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def device_of(model: nn.Module) -> torch.device:
    """Where the network is, and of a copy without storage where the original is."""
    device = getattr(model, _HOME, None)
    return device or next((p.device for p in model.parameters()), torch.device("cpu"))
