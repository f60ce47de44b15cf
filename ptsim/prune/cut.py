"""How is a channel taken out of a live model, its optimizer and its copies?

A `Cut` says by name what to keep of which axis; the same cut applies to the model, to an average of its weights and to
the optimizer's state. Parameters become new `nn.Parameter`s; the optimizer's groups are pointed at them.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ptsim.capture.graph import evaluation_mode
from ptsim.capture.words import words_of
from ptsim.prune.labels import (
    BATCH_NORMS,
    CONVS,
    INSTANCE_NORMS,
    TRANSPOSED_CONVS,
    WIDTH,
    AxisKey,
    tensor_names,
)
from ptsim.prune.numbers import Attribute, Values, set_numbers

ORIGINS = "_ptsim_origins"  # attribute of a module: where the elements of a buffer that no state dict holds came from
_OWN = frozenset(vars(nn.Module()))
_DEEPEST = 4  # of lists in lists that are looked through
_LAYERS = (*CONVS, *TRANSPOSED_CONVS, nn.Linear, *BATCH_NORMS, *INSTANCE_NORMS, nn.GroupNorm)
_COUNTS = {  # the names of what they keep
    "in_channels", "out_channels", "in_features", "out_features", "num_features", "num_channels", "groups",
    "num_groups",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cut:
    """Indices to keep (ascending) by (tensor name, dimension).

    Dimension −1 stands for the inputs of a grouped convolution, of which every group keeps others: a matrix with the
    kept positions along axis 1 for every position along axis 0. `numbers` are values of attributes.
    """

    keep: Mapping[AxisKey, Tensor]
    numbers: Values = dataclasses.field(default_factory=dict)

    def by_tensor(self) -> dict[str, dict[int, Tensor]]:
        """Tensor name → dimension → indices."""
        tensors: dict[str, dict[int, Tensor]] = {}
        for (name, dim), indices in self.keep.items():
            tensors.setdefault(name, {})[dim] = indices
        return tensors


@dataclasses.dataclass(frozen=True)
class Replacement:
    """A parameter's successor and what of it was kept; `new` is None if the parameter is gone."""

    old: nn.Parameter
    new: nn.Parameter | None
    kept: Mapping[int, Tensor]


def cut_model(model: nn.Module, cut: Cut) -> list[Replacement]:
    """Cut the parameters and buffers of `model` in place and bring its modules' attributes in line."""
    tensors = cut.by_tensor()
    names = tensor_names(model)
    layers = [(module, names.get(id(filters_of(module)), "")) for module in model.modules()]
    successors: dict[int, nn.Parameter] = {}
    buffers: dict[int, Tensor] = {}  # one that has two names stays one
    held = [*model.buffers()]  # until the end: another tensor could get the id of one that is gone
    followed = _named_alike(model)
    replacements = []
    touched: set[int] = set()
    for module, _ in layers:
        for key, parameter in list(module._parameters.items()):
            kept = tensors.get(names[id(parameter)]) if parameter is not None else None
            if parameter is None or kept is None:
                continue
            if id(parameter) not in successors:
                new = successors[id(parameter)] = narrowed(parameter, kept)
                replacements.append(Replacement(parameter, new, kept))
            module._parameters[key] = successors[id(parameter)]
            touched.add(id(module))
        for key, buffer in list(module._buffers.items()):
            kept = tensors.get(names[id(buffer)]) if buffer is not None else None
            if buffer is not None and kept is not None:
                if key in module._non_persistent_buffers_set:
                    origins = vars(module).setdefault(ORIGINS, {})
                    origins[key] = take(origins.get(key, places(buffer)), kept)
                module._buffers[key] = buffers.setdefault(id(buffer), take(buffer, kept))
                touched.add(id(module))
    for module, weight in layers:  # whose filters may be a parameter of another module, which computes them
        if id(module) in touched or weight in tensors:
            sync_attributes(module, _groups_left(module, tensors.get(weight, {})))
    for module, _ in layers:
        if id(module) in touched:
            _compute_anew(module)
    for path, module in norms_without_tensors(model):
        kept = tensors.get(f"{path}.{WIDTH}")
        if kept is not None:
            set_width(module, len(kept[0]))
    set_numbers(model, _numbers_left(followed) | dict(cut.numbers))
    follow_lists(model, successors | buffers)
    del held
    return replacements


_Alike: TypeAlias = "list[tuple[Attribute, int, Sequence[nn.Module]]]"


def _named_alike(model: nn.Module) -> _Alike:
    """Numbers that a module of the model's own keeps under the name that its layers have for theirs, and those layers.

    No `forward` names them, but methods that are called after training may: RepVGG's `switch_to_deploy` makes a kernel
    for its `in_channels`.
    """
    kept = [
        (path, module, name)
        for path, module in model.named_modules()
        if not isinstance(module, _LAYERS)
        for name in vars(module).keys() & _COUNTS
        if type(vars(module)[name]) is int
    ]
    read = frozenset[str]().union(*map(words_of, model.modules())) if kept else frozenset[str]()
    found: _Alike = []
    for path, module, name in kept:
        number = vars(module)[name]
        layers = [part for part in module.modules() if isinstance(part, _LAYERS) and getattr(part, name, 0) == number]
        if name not in read and layers:
            found.append((Attribute(path, name), number, layers))
    return found


def _numbers_left(followed: _Alike) -> dict[Attribute, int]:
    """What those numbers are once the layers are cut, where these agree."""
    found = {}
    for attribute, before, layers in followed:
        left = {getattr(layer, attribute.name) for layer in layers}
        if len(left) == 1 and before not in left:
            found[attribute] = left.pop()
    return found


def follow_lists(model: nn.Module, successors: Mapping[int, Tensor]) -> None:
    """Put the successors of parameters and buffers, by id, in their places in lists, tuples and dicts of modules, too.

    A list in which something changes becomes another list; modules that share one go on sharing it.
    """
    known: dict[int, Any] = {}

    def renewed(value: Any, depth: int) -> Any:
        if not depth or not isinstance(value, (list, tuple, dict)):
            return successors.get(id(value), value)
        if id(value) not in known:
            known[id(value)] = value  # for one that holds itself
            known[id(value)] = _with_parts(value, lambda part: renewed(part, depth - 1))
        return known[id(value)]

    for module in model.modules() if successors else ():
        for name, value in list(vars(module).items()):
            if name not in _OWN:
                vars(module)[name] = renewed(value, _DEEPEST)


def _with_parts(value: Any, renewed: Callable[[Any], Any]) -> Any:
    """A list, tuple or dict of the same kind with other parts; it itself if they are the same."""
    old = list(value.values()) if isinstance(value, dict) else list(value)
    parts = [renewed(part) for part in old]
    if all(a is b for a, b in zip(parts, old, strict=True)):
        return value
    if isinstance(value, tuple):
        return type(value)._make(parts) if hasattr(value, "_make") else type(value)(parts)
    other = copy.copy(value)
    if isinstance(value, dict):
        other.update(zip(value, parts, strict=True))
    else:
        other[:] = parts
    return other


def narrowed(parameter: nn.Parameter, kept: Mapping[int, Tensor]) -> nn.Parameter:
    """The kept part of a parameter, with that of its gradient and what was noted on it."""
    new = nn.Parameter(take(parameter.detach(), kept), requires_grad=parameter.requires_grad)
    if parameter.grad is not None:
        new.grad = take(parameter.grad, kept)
    take_notes(parameter, new, kept)
    return new


def take_notes(old: nn.Parameter, new: nn.Parameter, kept: Mapping[int, Tensor] | None) -> None:
    """What users and optimizers have noted on a parameter goes along: attributes, and hooks on its gradient.

    Tensors of its shape are cut like it; where `kept` is not known they are left behind. The hooks' table is the same
    one, so that a handle that the user holds still removes its hook.
    """
    for name, value in vars(old).items():
        shaped = isinstance(value, Tensor) and value.shape == old.shape
        if not shaped:
            setattr(new, name, value)
        elif kept is not None:
            setattr(new, name, take(value, kept))
    for table in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if hooks := getattr(old, table):
            needs_gradient = new.requires_grad
            setattr(new.requires_grad_(True), table, hooks)  # a tensor without a gradient takes none
            new.requires_grad_(needs_gradient)


def _compute_anew(module: nn.Module) -> None:
    """Older normalisations and masks leave on a module what they computed at its last call: of the new shape now."""
    for hook in module._forward_pre_hooks.values():
        name = getattr(hook, "name", getattr(hook, "_tensor_name", None))
        if isinstance(name, str) and isinstance(vars(module).get(name), Tensor):
            with evaluation_mode(module), torch.no_grad():
                hook(module, ())


def normed_weight(module: Any) -> tuple[Tensor, Tensor] | None:
    """Direction and length of every filter where torch's weight normalisation computes the weight; None elsewhere."""
    parts: Any = getattr(module, "parametrizations", {})
    listed: Any = parts["weight"] if isinstance(parts, nn.ModuleDict) and "weight" in parts else ()
    if len(listed) == 1 and type(listed[0]).__name__ == "_WeightNorm" and listed[0].dim == 0:
        return listed.original1, listed.original0
    for hook in module._forward_pre_hooks.values():  # the older form
        if type(hook).__name__ == "WeightNorm" and hook.name == "weight" and hook.dim == 0:
            return module.weight_v, module.weight_g
    return None


def filters_of(module: nn.Module) -> Tensor | None:
    """The parameter that is a layer's weight, or of which its weight is computed filter by filter."""
    normed = normed_weight(module)
    return dict(module._parameters.items()).get("weight") if normed is None else normed[0]  # a script's is no dict


def _groups_left(module: nn.Module, kept: Mapping[int, Tensor]) -> int | None:
    """How many groups of a convolution have an output left; None for other modules."""
    if not isinstance(module, CONVS):
        return None
    if module.groups == 1 or 0 not in kept:
        return module.groups
    return len(torch.unique(kept[0] // (module.out_channels // module.groups)))


def places(tensor: Tensor) -> Tensor:
    """The place of every element in the flattened tensor."""
    return torch.arange(tensor.numel()).view(tensor.shape)


def norms_without_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The normalisations per channel whose width is an attribute alone: no scale, shift or statistics."""
    for path, module in model.named_modules():
        per_channel = isinstance(module, (*BATCH_NORMS, *INSTANCE_NORMS)) or (
            isinstance(module, nn.GroupNorm) and module.num_groups > 1
        )
        if per_channel and next(module.parameters(), None) is None and next(module.buffers(), None) is None:
            yield path, module


def width(module: nn.Module) -> int:
    """The channels that a normalisation remembers."""
    return int(module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features)  # type: ignore[arg-type] # an int


def set_width(module: nn.Module, channels: int) -> None:
    """Make a normalisation remember another number of channels."""
    if isinstance(module, nn.GroupNorm):
        module.num_groups, module.num_channels = channels * module.num_groups // module.num_channels, channels
    else:
        module.num_features = channels  # type: ignore[assignment] # an int


def take(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """The kept part of a tensor, in the same memory format."""
    part = tensor
    if tensor.is_meta and kept:  # only shapes: torch takes many times as long to find them
        shape = list(tensor.shape)
        for dim, indices in kept.items():
            shape[dim if dim >= 0 else 1] = indices.shape[-1]
        part, kept = torch.empty(shape, dtype=tensor.dtype, device="meta"), {}
    for dim, indices in sorted(kept.items()):
        if dim < 0:
            part = part.take_along_dim(indices.view(*indices.shape, *[1] * (part.ndim - 2)).to(tensor.device), 1)
            continue
        part = part.index_select(dim, indices.to(tensor.device))
    if part is tensor:
        return tensor.clone()
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return part.contiguous(memory_format=torch.channels_last)
    return part.contiguous()


def sync_attributes(module: nn.Module, groups: int | None = None) -> None:
    """Bring the channel counts that a module remembers in line with the shapes of its tensors.

    `groups` of a convolution are not told by a shape; None if only whole ones can have gone.
    """
    sync = getattr(module, "ptsim_sync", None)
    if sync is not None:
        sync()
    filters = filters_of(module)
    if isinstance(module, CONVS):
        shape = (module.weight if filters is None else filters).shape
        per_group = module.out_channels // module.groups
        module.out_channels = shape[0]
        whole = module.out_channels // per_group if module.groups > 1 else 1
        module.groups = whole if groups is None else groups
        module.in_channels = shape[1] * module.groups
    elif isinstance(module, TRANSPOSED_CONVS):
        inputs, outputs = module.weight.shape[:2]
        module.groups = inputs // (module.in_channels // module.groups) if module.groups > 1 else 1
        module.in_channels, module.out_channels = inputs, outputs * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = (module.weight if filters is None else filters).shape
    elif isinstance(module, (*BATCH_NORMS, *INSTANCE_NORMS)):
        vectors = (module.weight, module.bias, module.running_mean)
        module.num_features = next(len(v) for v in vectors if v is not None)
    elif isinstance(module, nn.GroupNorm):
        set_width(module, len(module.weight))
    elif isinstance(module, nn.Bilinear):
        module.out_features = len(module.weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def optimizer_inside(optimizer: object) -> torch.optim.Optimizer | None:
    """The optimizer that Accelerate's, SAM or Lookahead is put around; None of one that updates by itself."""
    found = (getattr(optimizer, name, None) for name in ("optimizer", "base_optimizer", "_base_optimizer"))
    return next((inner for inner in found if isinstance(inner, torch.optim.Optimizer)), None)


def cut_optimizer(optimizer: torch.optim.Optimizer, replacements: Iterable[Replacement]) -> None:
    """Point the optimizer's groups at the successors and carry every kept element of its state over.

    Of one that is around another, the other's as well: each may keep a state of a weight (Lookahead's slow weights).

    A state tensor of the parameter's shape is cut like it, whatever its size, also where it lies flat (Prodigy's). One
    that lacks an axis, or has length 1 there (factored moments), is cut in the others, if it is clear which those are.
    Another one of one element (Adam's step) is kept. Works for every optimizer whose state is of these forms. A
    parameter whose state holds lists of tensors (Shampoo's, PSGD's) or tensors of another shape gets a new state.
    """
    successors = {id(r.old): r for r in replacements}
    inner = optimizer_inside(optimizer)
    if inner is not None:
        cut_optimizer(inner, successors.values())
    for group in getattr(optimizer, "param_groups", ()):  # a class of a user's own may only hand on what it is told
        new = [successors[id(p)].new if id(p) in successors else p for p in group["params"]]
        if "param_names" in group:  # of an optimizer that was given named parameters
            group["param_names"] = [n for n, p in zip(group["param_names"], new, strict=True) if p is not None]
        group["params"] = [parameter for parameter in new if parameter is not None]
    states: Any = getattr(optimizer, "state", {})
    for replacement in successors.values():
        state = states.pop(replacement.old, None)
        if state is None or replacement.new is None:
            continue
        cut = {key: _cut_state(value, replacement) for key, value in state.items()}
        odd = next((key for key, value in cut.items() if value is _UNKNOWN), None)
        if odd is None:
            states[replacement.new] = cut
        else:  # an optimizer makes the state of a parameter that has none
            warnings.warn(
                f"optimizer state {odd!r} is not shaped like the weight that it is of; that weight's starts anew",
                stacklevel=2,
            )


_UNKNOWN = object()


def _cut_state(value: object, replacement: Replacement) -> object:
    """A value of a parameter's state, cut with it; `_UNKNOWN` where nobody knows how.

    Bytes are 8-bit states, whose scales belong to blocks of neighbours.
    """
    old, kept = replacement.old, replacement.kept
    if _holds_tensors(value):
        return _UNKNOWN
    if not isinstance(value, Tensor) or (value.numel() == 1 and value.shape != old.shape):
        return value
    if value.dtype in (torch.uint8, torch.int8):
        return _UNKNOWN
    if value.ndim == 1 < old.ndim and len(value) == old.numel():
        return take(value.view(old.shape), kept).flatten()
    axes = _axes_of(value.shape, old.shape, kept)
    return _UNKNOWN if axes is None else take(value, axes)


def _holds_tensors(value: object) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(isinstance(part, Tensor) or _holds_tensors(part) for part in inner)


def _axes_of(state: torch.Size, shape: torch.Size, kept: Mapping[int, Tensor]) -> dict[int, Tensor] | None:
    """What to keep of each axis of a state tensor; None if nobody knows which of the parameter's axes those are."""
    if len(state) == len(shape):
        if any(n not in (1, m) for n, m in zip(state, shape, strict=True)):
            return None
        whole = {dim for dim in range(len(state)) if state[dim] == shape[dim]}
        if any(dim < 0 for dim in kept) and 1 in whole and 0 not in whole:  # every output keeps others
            return None
        return {dim: at for dim, at in kept.items() if (dim if dim >= 0 else 1) in whole}
    if any(dim < 0 for dim in kept):  # a grouped convolution, whose inputs hang on its outputs
        return None
    ways = {
        tuple((place, axis) for place, axis in enumerate(axes) if axis in kept)
        for axes in itertools.combinations(range(len(shape)), len(state))
        if all(n == shape[axis] for n, axis in zip(state, axes, strict=True))
    }
    way = next(iter(ways)) if len(ways) == 1 else None
    if way is None or (way and len(state) == 2 and state[0] == state[1]):  # square: a Kronecker factor, perhaps
        return None
    return {place: kept[axis] for place, axis in way}


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside an `AveragedModel` or `DistributedDataParallel`."""
    while isinstance(
        model, (torch.optim.swa_utils.AveragedModel, nn.parallel.DistributedDataParallel, nn.DataParallel)
    ):
        model = model.module
    return model
