"""What do hooks change: what a layer takes, gives or computes with, and the gradients that go through it?

Hooks on the way forward are run with the network, and watched. Those on gradients are tried on random numbers. All of
them are those of a copy (`FunctionTwins`), so that what they note stays out of the user's lists.
"""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import functools
import inspect
import itertools
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ptsim.capture.graph import output_tensors
from ptsim.capture.looking import random_values
from ptsim.errors import lacks_memory
from ptsim.prune.cut import take

_HARMLESS = (
    *(type(None), bool, int, float, str, list, tuple, dict, set, type, Tensor, nn.Module),
    *(types.ModuleType, types.FunctionType, types.BuiltinFunctionType),
)
_Table: TypeAlias = "dict[int, Any]"
_PARAMETER_HOOKS = "_ptsim_gradient_hooks"  # an attribute of a copy: of the original's parameters, by name


@dataclasses.dataclass
class Seen:
    """What hooks have done: changed an argument, a result or a tensor of the network, and which tensors those were.

    `touched` are the network's tensors, by id, that a hook writes into or reads to do so. `foreign`: a hook has
    computed with a tensor that is neither the network's nor given to it, which another hook may have left.
    """

    changed: bool = False
    foreign: bool = False
    touched: set[int] = dataclasses.field(default_factory=set)


def hooks_of(module: nn.Module) -> list[_Table]:
    """The tables, not empty, of hooks that run when the module is called."""
    shared = (torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks)
    own = (table for part in module.modules() for table in (part._forward_hooks, part._forward_pre_hooks))
    return [table for table in (*shared, *own) if table]


@contextlib.contextmanager
def hooks_watched(tables: Sequence[_Table], own: Sequence[Tensor]) -> Iterator[Seen]:
    """Inside, hooks in `tables` are watched in this thread; `own` are all tensors of the network."""
    seen, thread = Seen(), threading.get_ident()

    def watched(hook: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:  # another network, which calls a hook of every module
                return hook(*args, **kwargs)
            with _Writes([*output_tensors((args, kwargs))], own) as writes:
                given = hook(*args, **kwargs)
            touched = writes.touched()
            if given is not None or touched is not None or _may_return(hook):
                seen.changed, seen.foreign = True, seen.foreign or writes.foreign
                seen.touched |= touched or set()
            return given

        return call

    before = [(table, dict(table)) for table in tables]
    for table, hooks in before:
        table.update({key: watched(hook) for key, hook in hooks.items()})
    try:
        yield seen
    finally:
        for table, hooks in before:
            table.update({key: hook for key, hook in hooks.items() if key in table})  # one may have taken itself off


def changes_gradient(module: nn.Module, given: Sequence[Any], made: Any) -> bool:
    """True if a hook on the gradients of a module that is called with `given` and gives `made` changes them."""
    tables = (module._backward_hooks, module._backward_pre_hooks)
    if not any(tables):
        return False

    def random(tensors: Sequence[Any]) -> tuple[Tensor | None, ...]:
        return tuple(random_values(part) if isinstance(part, Tensor) else None for part in tensors)

    inputs, outputs = random(given), random([*output_tensors(made)])
    for table, values in zip(tables, ((inputs, outputs), (outputs,)), strict=True):
        for hook in table.values():
            with _Writes([*output_tensors(values)], list(module.parameters())) as writes:
                try:
                    changed = hook(module, *values)
                except Exception as error:  # the hook's own code runs here
                    if lacks_memory(error):
                        raise
                    changed = error
            if changed is not None or writes.touched() is not None or _may_return(hook):
                return True
    return False


@contextlib.contextmanager
def hooks_carried(model: nn.Module) -> Iterator[None]:
    """Inside, a copy of the model gets to know the hooks on the gradients of its parameters, which `deepcopy` drops."""
    found = parameter_hooks(model)
    if not found or _PARAMETER_HOOKS in vars(model):
        yield
        return
    vars(model)[_PARAMETER_HOOKS] = found
    try:
        yield
    finally:
        del vars(model)[_PARAMETER_HOOKS]


def parameter_hooks(model: nn.Module) -> Mapping[str, list[tuple[bool, Any]]]:
    """By parameter its hooks, and whether each is given the parameter rather than the gradient."""
    known: Mapping[str, list[tuple[bool, Any]]] | None = vars(model).get(_PARAMETER_HOOKS)
    if known is not None:
        return known
    found: dict[str, list[tuple[bool, Any]]] = {}
    for name, parameter in model.named_parameters():
        for later, table in enumerate((parameter._backward_hooks, parameter._post_accumulate_grad_hooks)):
            found.setdefault(name, []).extend((bool(later), hook) for hook in (table or {}).values())
    return {name: hooks for name, hooks in found.items() if hooks}


def mixing_hooks(model: nn.Module) -> Iterator[str]:
    """Names of the parameters of a copy whose gradients a hook of theirs mixes: what is left would get another one.

    Tried out: a hook that is given some of the elements has to give the same of them as if it were given all. One that
    fails would fail in training, too, in plain sight. Not tried are hooks that reach objects of other kinds, such as a
    logger or a clock, which would notice.
    """
    parameters = dict(model.named_parameters())
    for name, found in parameter_hooks(model).items():
        hooks = [(later, hook) for later, hook in found if not _reaches_objects(hook)]
        shape = parameters[name].shape if name in parameters else torch.Size()
        gradient = random_values(torch.empty(shape, device="meta"))
        for dim in range(len(shape)):
            kept = {dim: torch.arange(0, shape[dim], 2)}
            try:
                whole, part = (_hooked(hooks, each) for each in (gradient, take(gradient, kept)))
                same = torch.allclose(take(whole, kept), part, rtol=1e-4)
            except Exception as error:  # the hook's own code runs here
                if lacks_memory(error):
                    raise
                break
            if not same:
                yield name
                break


def _reaches_objects(hook: Any) -> bool:
    """True if the hook is the method of an object, or its code names one."""
    while isinstance(hook, functools.partial):
        if not all(isinstance(given, _HARMLESS) for given in (*hook.args, *hook.keywords.values())):
            return True
        hook = hook.func
    if not inspect.isfunction(hook):
        return True
    named = inspect.getclosurevars(hook)
    values = [*named.nonlocals.values(), *named.globals.values(), *(hook.__defaults__ or ())]
    return not all(isinstance(value, _HARMLESS) for value in values)


def _hooked(hooks: Sequence[tuple[bool, Any]], gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    for later, hook in hooks:
        if later:
            parameter = nn.Parameter(gradient.clone())
            parameter.grad = gradient
            hook(parameter)
            gradient = torch.zeros(()) if parameter.grad is None else parameter.grad
        else:
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
    return gradient


@functools.lru_cache(1024)
def _may_return(hook: Any) -> bool:
    """True if the code of a hook returns something in one place and something else, or nothing, in another."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    code = getattr(hook, "__code__", getattr(getattr(hook, "__func__", None), "__code__", None))
    if code is None:
        return False
    steps = list(dis.get_instructions(code))
    ends = [
        (step.argval if step.opname == "RETURN_CONST" else before.argval if before.opname == "LOAD_CONST" else ...)
        for before, step in itertools.pairwise(steps)
        if step.opname in ("RETURN_VALUE", "RETURN_CONST")
    ]
    joined = any(step.is_jump_target for step in steps if step.opname == "RETURN_VALUE")  # `return a if b else c`
    return joined or (len(ends) > 1 and any(end is not None for end in ends))


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's gap
    """Sees whether something is written into tensors, or into what shares their memory, as `tensor.data` does.

    Args:
        given: to the hook that runs inside.
        own: the tensors of the network.
    """

    def __init__(self, given: Sequence[Tensor], own: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's gap
        self.foreign = False
        self._tensors = [(tensor, tensor.untyped_storage()) for tensor in (*given, *own)]
        self._own: dict[int, int] = {storage._cdata: id(t) for t, storage in self._tensors[len(given) :]}
        self._storages = {storage._cdata for _, storage in self._tensors}
        self._made: dict[int, Any] = {}  # held, so that no address is used twice
        # Memory that NumPy shares is written past torch.
        self._values = [(t, t.detach().clone()) for t, _ in self._tensors if not t.is_meta]
        self._used = set[int]()
        self._written = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Look at the arguments, and at those that the operator writes into."""
        places = func._schema.arguments
        given: Mapping[str, Any] = {place.name: value for place, value in zip(places, args, strict=False)}
        given = {**given, **(kwargs or {})}
        for tensor in output_tensors(list(given.values())):
            storage = tensor.untyped_storage()._cdata
            self._used |= {self._own[storage]} if storage in self._own else set()
            self.foreign |= storage not in self._storages and storage not in self._made
        written = [given.get(place.name) for place in places if place.alias_info and place.alias_info.is_write]
        self._written |= any(t.untyped_storage()._cdata in self._storages for t in output_tensors(written))
        result = func(*args, **(kwargs or {}))
        made = [leaf.untyped_storage() for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        self._made |= {storage._cdata: storage for storage in made}
        return result

    def touched(self) -> set[int] | None:
        """Ids of the network's tensors that were used, if something was written since; None if nothing was."""
        moved = {id(t) for t, storage in self._tensors if t.untyped_storage()._cdata != storage._cdata}
        moved |= {id(t) for t, value in self._values if not torch.equal(t.nan_to_num(), value.nan_to_num())}
        return self._used | moved if self._written or moved else None
