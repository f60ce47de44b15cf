"""How is a pruned network rebuilt in another process, without pickle?

`structure_of` writes down the shapes of every parameter and buffer and the modules that pruning put in; on a freshly
built dense network `apply_structure` makes the same shapes. Weights are loaded afterwards, by name. A state dict leaves
out buffers that are not persistent; of those the structure says which elements of the dense network's are left.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, TypeAlias

import msgspec
import torch
from torch import Tensor, nn

from ptsim.errors import UsageError
from ptsim.prune.cut import (
    ORIGINS,
    follow_lists,
    normed_weight,
    norms_without_tensors,
    set_width,
    sync_attributes,
    take_notes,
    width,
)
from ptsim.prune.labels import CONVS
from ptsim.prune.modules import KINDS, OWN, ConstantChannels, Gathered, Placeholder, Scattered
from ptsim.prune.numbers import changed_numbers, restore_numbers
from ptsim.prune.removal import set_module

VERSION = 1
_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]


class Structure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `structure_of` writes down, checked.

    Attributes:
        tensors: shape of every parameter and buffer, by name.
        modules: kind and constructor arguments of what pruning put in, by path.
        widths: channels of the normalisations that have no tensors, by path.
        groups: of the convolutions, by path; absent in structures of earlier versions, where only whole groups went.
        numbers: what cuts have made of numbers that the model keeps in attributes, by path and name.
        origins: of every cut buffer that is not persistent the places of its elements in the flattened dense one.
    """

    version: int
    tensors: dict[str, tuple[Annotated[int, msgspec.Meta(ge=0)], ...]]
    modules: dict[str, dict[str, Any]]
    widths: dict[str, Annotated[int, msgspec.Meta(ge=1)]] = {}
    groups: dict[str, Annotated[int, msgspec.Meta(ge=1)]] = {}
    origins: dict[str, list[_Count]] = {}
    numbers: dict[str, _Count | list[_Count]] = {}


def structure_of(model: nn.Module) -> dict[str, Any]:
    """The shapes of the model as JSON-able data, in the form of `Structure`."""
    tensors = {name: list(tensor.shape) for name, tensor in model.named_parameters()}
    tensors |= {name: list(tensor.shape) for name, tensor in model.named_buffers()}
    kinds = {kind: name for name, kind in KINDS.items()}
    modules = {
        path: {"kind": kinds[type(module)], **module.config()}
        for path, module in model.named_modules()
        if isinstance(module, (Placeholder, ConstantChannels, Gathered, Scattered))
    }
    widths = {path: width(module) for path, module in norms_without_tensors(model)}
    origins = {
        (f"{path}.{key}" if path else key): at.flatten().tolist()
        for path, module in model.named_modules()
        for key, at in vars(module).get(ORIGINS, {}).items()
        if not isinstance(module, OWN)
    }
    structure = {"version": VERSION, "tensors": tensors, "modules": modules, "widths": widths}
    groups = {path: module.groups for path, module in model.named_modules() if isinstance(module, CONVS)}
    numbers = changed_numbers(model)
    structure |= {"groups": groups} | ({"origins": origins} if origins else {})
    return structure | ({"numbers": numbers} if numbers else {})


def apply_structure(model: nn.Module, structure: dict[str, Any]) -> None:
    """Give a freshly built dense model the shapes of `structure`; its values are whatever was there, cut.

    Raises:
        UsageError: the structure does not belong to this kind of model.
    """
    if structure.get("version") != VERSION:
        raise UsageError(f"a model structure of version {structure.get('version')!r}; this ptsim reads {VERSION}")
    try:
        stored = msgspec.convert(structure, Structure)
    except msgspec.ValidationError as error:
        raise UsageError(f"not a model structure: {error}") from error
    for path, config in sorted(stored.modules.items(), key=lambda item: item[0].count(".")):
        _insert(model, path, dict(config))
    for path, module in norms_without_tensors(model):
        set_width(module, stored.widths.get(path, width(module)))
    restore_numbers(model, stored.numbers)
    shapes = stored.tensors
    found = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    if found != set(shapes):
        odd = sorted(found ^ set(shapes))[0]
        raise UsageError(f"the stored structure is not that of a {type(model).__name__}: {odd} is only in one of them")
    resized: dict[int, nn.Parameter] = {}
    buffers: dict[int, Tensor] = {}  # one that has two names stays one
    touched: set[int] = set()
    for path, module in model.named_modules():
        prefix = path + "." if path else ""
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) in resized:
                module._parameters[key] = resized[id(parameter)]
                touched.add(id(module))
                continue
            shape = shapes.get(prefix + key)
            if shape is None or shape == tuple(parameter.shape):
                continue
            new = nn.Parameter(_corner(parameter.detach(), shape, prefix + key), requires_grad=parameter.requires_grad)
            take_notes(parameter, new, None)
            module._parameters[key] = resized[id(parameter)] = new
            touched.add(id(module))
        for key, buffer in list(module._buffers.items()):
            shape = shapes.get(prefix + key)
            if id(buffer) in buffers:
                module._buffers[key] = buffers[id(buffer)]
                touched.add(id(module))
            elif buffer is not None and shape is not None and shape != tuple(buffer.shape):
                origin = stored.origins.get(prefix + key)
                if origin is None:
                    module._buffers[key] = _corner(buffer, shape, prefix + key)
                else:
                    at = _checked(origin, shape, buffer, prefix + key)
                    vars(module).setdefault(ORIGINS, {})[key] = at
                    module._buffers[key] = buffer.flatten()[at.to(buffer.device)].clone()
                buffers[id(buffer)] = module._buffers[key]
                touched.add(id(module))
    follow_lists(model, resized | buffers)
    for path, module in model.named_modules():
        groups = stored.groups.get(path) if isinstance(module, CONVS) else None
        channels, kernel = shapes.get(f"{path}.weight", ())[:1], shapes.get(f"{path}.weight", ())[2:]
        if isinstance(module, CONVS) and channels and kernel != module.kernel_size:
            raise UsageError(f"the stored structure has a kernel of {kernel} at {path}, the model {module.kernel_size}")
        if groups is not None and channels and (groups > channels[0] or channels[0] % groups):
            raise UsageError(f"the stored structure has {channels[0]} channels in {groups} groups at {path}")
        if id(module) in touched or normed_weight(module) is not None:
            sync_attributes(module, groups)


def _insert(model: nn.Module, path: str, config: dict[str, Any]) -> None:
    kind = KINDS.get(str(config.pop("kind", "")))
    try:
        old = model.get_submodule(path)
    except AttributeError as error:
        raise UsageError(f"the stored structure is not that of a {type(model).__name__}: no module {path}") from error
    try:
        if kind in (Placeholder, ConstantChannels):
            new: nn.Module = kind(**config)
        elif kind is Gathered:
            new = Gathered(old, config["mask"])
        elif kind is Scattered and isinstance(old, nn.BatchNorm2d):
            new = Scattered(old, config["mask"])
        else:
            raise UsageError(f"the stored structure puts something unknown at {path}")
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise UsageError(f"the stored structure describes {path} wrongly: {error}") from error
    reference = next(old.parameters(), None)
    if reference is not None:
        new.to(dtype=reference.dtype, device=reference.device)
    set_module(model, path, new.train(old.training))


def _checked(origin: list[int], shape: tuple[int, ...], buffer: Tensor, name: str) -> Tensor:
    if len(origin) != math.prod(shape) or any(place >= buffer.numel() for place in origin):
        raise UsageError(
            f"the stored structure has {len(origin)} elements for {name} of shape {shape}, or wrong places"
        )
    return torch.tensor(origin, dtype=torch.int64).view(shape)


def _corner(tensor: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    if len(shape) != tensor.ndim or any(n > m for n, m in zip(shape, tensor.shape, strict=True)):
        raise UsageError(f"the stored structure has {name} of shape {shape}, the model {tuple(tensor.shape)}")
    return tensor[tuple(slice(n) for n in shape)].clone()
