"""How does ptsim hook into a loop without keeping anything alive? Hooks hold weakly whom they call, and the network."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from ptsim.training.watch import Watch


class Hook:
    """Calls a method of a watch that may be gone.

    A copy or a pickle of the hooked network has a hook that does nothing. Inside a compiled graph it does nothing
    either.
    """

    def __init__(self, watch: Watch, method: str) -> None:
        self._watch = weakref.ref(watch)
        self._method = method

    def __call__(self, *arguments: Any) -> None:
        """What torch calls."""
        if torch.compiler.is_compiling():
            return
        watch = self._watch()
        if watch is not None:
            getattr(watch, self._method)(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_hook, ()


class CompiledInPlace:
    """Stands in for the compiled call of a module on which `compile` was called, until it is removed."""

    def __init__(self, watch: Watch, module: nn.Module) -> None:
        call = module._compiled_call_impl
        assert call is not None, "asked by who makes it"
        watching = weakref.ref(watch)
        watched = weakref.ref(module)
        removed: list[bool] = []  # another watch may still call this through what it has put around it

        def watched_call(*args: Any, **kwargs: Any) -> Any:
            alive, inside = watching(), watched()
            if removed or alive is None or inside is None:
                return call(*args, **kwargs)
            return alive.called(inside, args, kwargs, call)

        self._module = watched
        self._call = call
        self._instead = watched_call
        self._removed = removed
        module._compiled_call_impl = watched_call

    def remove(self) -> None:
        """The module's own call again, unless it was compiled anew; this watch sees nothing of it any more."""
        self._removed.append(True)
        module = self._module()
        if module is not None and module._compiled_call_impl is self._instead:
            module._compiled_call_impl = self._call


def hooks_on_update(
    optimizer: torch.optim.Optimizer, before: Callable[[], object], after: Callable[[], object]
) -> tuple[RemovableHandle, RemovableHandle]:
    """Two methods, held weakly, that every update calls; an update that trains in a closure calls only `after`."""
    first, then = weakref.WeakMethod(before), weakref.WeakMethod(after)

    def begins(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check = first()
        if check is not None and not has_closure(args, kwargs):
            check()

    def ends(*_: object) -> None:
        follow = then()
        if follow is not None:
            follow()

    return optimizer.register_step_pre_hook(begins), optimizer.register_step_post_hook(ends)


def has_closure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an optimizer's `step`, of which these are the arguments, is given the iteration as a function."""
    return kwargs.get("closure") is not None or any(callable(given) for given in args[1:])


def _nothing(*_: Any) -> None:
    pass


def _no_hook() -> Any:
    return _nothing
