"""How do network, optimizer and weight average come back from tensors and plain data, pruned as they were?

Names of tensors: `network/NAME`, `optimizer/PARAMETER/KEY`, `optimizer/PARAMETER/KEY[INDEX]` where the optimizer keeps
a list, `ema/NAME`. Buffers that a network does not call persistent are stored as well: pruning has cut them, so that a
freshly built network does not have them.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import Tensor, nn

from ptsim.errors import UsageError, on_one_line
from ptsim.prune.structure import apply_structure, structure_of
from ptsim.textfile import LARGEST, LARGEST_INTEGER
from ptsim.training.wrapping import averaged

if TYPE_CHECKING:
    from ptsim.training.pruner_state import StoredState

_TENSOR = "tensor"  # marks a number that an optimizer keeps in a tensor
_LISTED = re.compile(r"(.+)\[(\d{1,9})\]")


def full_state(network: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, those included that a `state_dict` leaves out.

    Raises:
        UsageError: a module keeps an extra state that is no tensor.
    """
    state = dict(network.named_buffers()) | dict(network.state_dict())
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise UsageError(
                f"{name} in the state of this {type(network).__name__} is a {type(value).__name__}, no tensor, and "
                "cannot be stored",
                hint="let get_extra_state give a tensor",
            )
    return state


def load_full_state(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put stored parameters and buffers into a network of the same structure.

    Raises:
        UsageError: names or shapes do not match.
    """
    buffers = dict(network.named_buffers())
    persistent = network.state_dict().keys()
    others = {name: tensor for name, tensor in tensors.items() if name in buffers and name not in persistent}
    try:
        network.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in others})
        for name, tensor in others.items():
            if tensor.shape != buffers[name].shape:
                raise RuntimeError(f"{name} has the shape {tuple(tensor.shape)}, expected {tuple(buffers[name].shape)}")
            buffers[name].copy_(tensor)
    except RuntimeError as error:
        reason = on_one_line(error)
        raise UsageError(f"the stored weights do not fit the network: {reason}") from error


def tensors_of(network: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> dict[str, Tensor]:
    """Every tensor of a run by name."""
    tensors = {f"network/{name}": tensor for name, tensor in full_state(network).items()}
    if ema is not None:
        tensors |= {f"ema/{name}": tensor for name, tensor in full_state(ema).items()}
    return tensors | optimizer_tensors(network, optimizer)


def load_tensors(
    network: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None, state: StoredState
) -> None:
    """Take over what `tensors_of` gave of a network of this very structure.

    Warns of an average that only one of both has: one of which the state knows nothing begins with its weights.

    Raises:
        UsageError: names, shapes or entries do not match.
    """
    tensors = state.named_tensors()
    weights, average = part(tensors, "network/"), part(tensors, "ema/")
    load_full_state(network, weights)
    if ema is not None and average:
        load_full_state(ema, average)
    elif ema is not None:
        load_full_state(averaged(ema, network), weights)
        warnings.warn("the state holds no average of the weights: it begins anew with the weights", stacklevel=3)
    elif average:
        problem = "the state holds an average of the weights, which does not go on: PruneTrain has no ema"
        warnings.warn(problem, stacklevel=3)
    load_groups(optimizer, state.groups or [])
    for parameter in network.parameters():  # what later updates have left there, where a state is gone back to
        optimizer.state.pop(parameter, None)
    load_optimizer(network, optimizer, tensors, state.optimizer or {})  # its form is one of the settings


def load_groups(optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Take over what `group_settings` gave of an optimizer of this kind.

    Raises:
        UsageError: one of the settings is none that it can have.
    """
    for group, settings in zip(optimizer.param_groups, groups, strict=False):
        for name, given in settings.items():
            present, told = group.get(name), isinstance(given, dict) and given.keys() == {_TENSOR}
            value = given[_TENSOR] if told else given
            if not _can_follow(present, value):
                huge = isinstance(value, int) and abs(value) > LARGEST  # perhaps more digits than Python prints
                found = "a huge number" if huge else f"{value!r:.80}"
                raise UsageError(f"not a state of this run: the optimizer's {name} is {found}")
            if isinstance(present, Tensor):
                present.fill_(value)
            elif told and name not in group:  # what the optimizer makes at its first update
                group[name] = torch.tensor(value)
            else:
                group[name] = tuple(value) if isinstance(present, tuple) else value


def _can_follow(present: object, value: object) -> bool:
    """Whether a setting of an optimizer that is `present` can become `value`; what is positive stays so.

    A few settings are negative, the exponent by which Adafactor's decay goes, or infinite, as Prodigy's growth.
    """
    if isinstance(value, float) and not isinstance(present, Tensor) and value == present:
        return True
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return present is None or isinstance(present, type(value)) or (value is None and isinstance(present, bool))
    if isinstance(present, tuple):
        return isinstance(value, list) and len(value) == len(present) and all(map(_can_follow, present, value))
    if not isinstance(value, int | float) or isinstance(present, bool):
        return False
    most = LARGEST_INTEGER if isinstance(value, int) else LARGEST
    if not -most <= value <= most:
        return False
    if present is None:
        return value >= 0
    return isinstance(present, int | float | Tensor) and (value >= 0 or bool(present < 0))


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name begins with `prefix`, by the rest of the name."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def with_tensors(network: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> dict[str, Any]:
    """The part of a state that holds weights, average and optimizer."""
    tensors = tensors_of(network, optimizer, ema)
    return {
        "optimizer": optimizer_scalars(network, optimizer),
        "groups": group_settings(optimizer),
        "tensors": {name: tensor.detach().clone() for name, tensor in tensors.items()},
    }


def optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors, as `optimizer/PARAMETER/KEY`; those of a list as `optimizer/PARAMETER/KEY[INDEX]`."""
    tensors: dict[str, Tensor] = {}
    for name, key, value in _entries(network, optimizer):
        parts = {f"{key}[{n}]": part for n, part in enumerate(value)} if isinstance(value, list) else {key: value}
        tensors |= {f"optimizer/{name}/{place}": part for place, part in parts.items() if isinstance(part, Tensor)}
    return tensors


def optimizer_scalars(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The optimizer's entries that are no tensors, by parameter and key; a list has None in the place of a tensor.

    Raises:
        UsageError: one of them is neither a number, a word, nor a list of those and of tensors.
    """
    scalars: dict[str, dict[str, Any]] = {}
    for name, key, value in _entries(network, optimizer):
        if isinstance(value, list):
            value = [None if isinstance(part, Tensor) else part for part in value]
        if isinstance(value, Tensor):
            continue
        if not _is_plain(value, depth=2):
            raise UsageError(
                f"the optimizer keeps {key!r} of {name} in a {type(value).__name__}, which ptsim cannot store",
                hint="PruneTrain.state_dict(tensors=False) leaves the optimizer's state to the loop",
            )
        scalars.setdefault(name, {})[key] = value
    return scalars


def _is_plain(value: object, *, depth: int) -> bool:
    if isinstance(value, list | tuple):
        return depth > 0 and all(_is_plain(inner, depth=depth - 1) for inner in value)
    return value is None or isinstance(value, bool | int | float | str)


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The numbers, words and switches of every parameter group: rates, momenta, decays, and counts in tensors."""
    plain = (bool, int, float, str, type(None))
    groups = []
    for group in optimizer.param_groups:
        settings: dict[str, Any] = {}
        for name, value in group.items():
            if isinstance(value, Tensor) and value.numel() == 1:
                settings[name] = {_TENSOR: value.item()}
            elif isinstance(value, plain):
                settings[name] = value
            elif isinstance(value, tuple) and all(isinstance(v, plain) for v in value):
                settings[name] = list(value)
        groups.append(settings)
    return groups


def load_optimizer(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Mapping[str, Any]],
) -> None:
    """Take over stored entries; tensors of other names are left alone.

    Raises:
        UsageError: names or shapes do not match.
    """
    parameters = dict(network.named_parameters())
    for path, entries in scalars.items():
        if path not in parameters:
            raise UsageError(f"the optimizer has no parameter {path!r}")
        optimizer.state[parameters[path]].update(copy.deepcopy(dict(entries)))
    # One kernel for all arithmetic, and a graph of kernels, read an update's number where the weights are.
    by_kernel = [group for group in optimizer.param_groups if group.get("fused") or group.get("capturable")]
    with_scalars = {id(parameter) for group in by_kernel for parameter in group["params"]}
    kinds: dict[tuple[str, int], tuple[bool, bool]] = {}
    for name, tensor in part(tensors, "optimizer/").items():
        path, _, key = name.rpartition("/")
        parameter = parameters.get(path)
        listed = _LISTED.fullmatch(key)  # its shape follows from nothing that is known here
        single = tensor.numel() <= 1 and tensor.dim() <= 1
        if parameter is None or not (listed or single or _fits(tensor, parameter)):
            raise UsageError(f"the optimizer's state {name!r} does not fit the network")
        # A scalar fits every parameter; but what is a tensor for one vector is no scalar for another.
        kind = tensor.dim() > 0, tensor.numel() == 0 < parameter.numel()
        if listed is None and kinds.setdefault((key, parameter.dim()), kind) != kind:
            raise UsageError(f"the optimizer's state {name!r} has another form than that of other parameters")
        if listed is not None:
            values = optimizer.state[parameter].get(listed[1])
            if not isinstance(values, list) or int(listed[2]) >= len(values):
                raise UsageError(f"the optimizer's state {name!r} belongs to a list that this optimizer lacks")
            values[int(listed[2])] = tensor.clone().to(parameter.device)
            continue
        # Others keep scalars such as Adam's step on the CPU; what is shaped like a weight lies like it.
        like = parameter if tensor.shape == parameter.shape and tensor.dim() else tensor
        stored = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
        beside = tensor.dim() == 0 and id(parameter) not in with_scalars
        optimizer.state[parameter][key] = stored if beside else stored.to(parameter.device)


def _fits(tensor: Tensor, parameter: Tensor) -> bool:
    """Of the parameter's shape, flat perhaps, or with some axes missing or of length 1 (factored moments)."""
    if tensor.ndim == 1 and len(tensor) == parameter.numel():
        return True
    axes = iter(parameter.shape)
    return all(any(n in (1, m) for m in axes) for n in tensor.shape)


def parameter_names(network: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """What each of the optimizer's groups holds, in order; "" for a parameter that is not the network's."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return [[names.get(id(parameter), "") for parameter in group["params"]] for group in optimizer.param_groups]


def reshape(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: nn.Module | None,
    structure: Mapping[str, Any],
    names: Sequence[Sequence[str]],
) -> None:
    """Give a freshly built network, its optimizer and its average the shapes of a stored structure.

    Args:
        network: as the loop builds it, not pruned; one that has the shapes already is left as it is.
        optimizer: made for it; its state is forgotten if its parameters change.
        ema: the copy of the network in an average of the weights.
        structure: as `structure_of` wrote it.
        names: as `parameter_names` gave them.

    Raises:
        UsageError: the structure or the groups do not belong to this network or optimizer.
    """
    before = {id(parameter): name for name, parameter in network.named_parameters()}
    if not has_structure(network, structure):
        apply_structure(network, dict(structure))
        optimizer.state.clear()
    if ema is not None and not has_structure(ema, structure):
        apply_structure(ema, dict(structure))
    regroup(network, optimizer, names, before)


def regroup(
    network: nn.Module, optimizer: torch.optim.Optimizer, names: Sequence[Sequence[str]], before: Mapping[int, str]
) -> None:
    """Let each of the optimizer's groups hold the parameters that `names` say, which go by `parameter_names`.

    Groups that are made anew for a pruned network may differ: what pruning puts in is of other kinds of layers.

    Args:
        network: in the shapes of the state.
        optimizer: of this network, or of its parameters before it got those shapes.
        names: for every group.
        before: names of the network's parameters at that time, by id.

    Raises:
        UsageError: the groups do not belong to this network or optimizer.
    """
    found = len(optimizer.param_groups)
    if len(names) != found:
        raise UsageError(f"the optimizer has {found} parameter groups, the state has {len(names)}")
    parameters = dict(network.named_parameters())
    held_before = {before[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in before}
    stored = [name for held in names for name in held if name]
    odd = {*stored} - parameters.keys() or (held_before & parameters.keys()) - {*stored}
    if odd or len({*stored}) < len(stored):
        which = min(odd) if odd else "one of them twice"
        raise UsageError(f"the state's optimizer holds other parameters than this one: {which}")
    known = {id(parameter) for parameter in parameters.values()} | before.keys()
    theirs = {
        before.get(id(parameter), id(parameter)): name
        for group in optimizer.param_groups
        for parameter, name in zip(group["params"], group.get("param_names", ()), strict=False)
    }
    for group, held in zip(optimizer.param_groups, names, strict=True):
        others = iter([parameter for parameter in group["params"] if id(parameter) not in known])
        try:
            group["params"] = [parameters[name] if name else next(others) for name in held]
        except StopIteration as error:
            raise UsageError("the state's optimizer holds parameters that this one does not have") from error
        if "param_names" in group:  # of an optimizer that was given named parameters
            keys = (name or id(parameter) for name, parameter in zip(held, group["params"], strict=True))
            group["param_names"] = [theirs.get(key, key) for key in keys]


def has_structure(network: nn.Module, structure: Mapping[str, Any]) -> bool:
    """Whether the network has been cut to these shapes already."""
    return bool(_as_json(structure_of(network)) == _as_json(structure))


def _as_json(structure: Mapping[str, Any]) -> Any:
    return msgspec.json.decode(msgspec.json.encode(structure))


def _entries(network: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, Any]]:
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield name, key, value
