"""What does autograd keep for backward? Every storage once, for as long as something holds it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class KeptStorages(Generic[T]):
    """Notes what operators keep inside `watching`; what is used for nothing is freed, and no longer among `alive`."""

    def __init__(self, own: Iterable[Tensor], note: Callable[[Tensor, T | None], T]) -> None:
        """Storages of `own` tensors, which live anyway, do not count.

        Args:
            own: parameters and buffers.
            note: what is to be known of a storage, from the tensor that is kept and what is known of it already.
        """
        self._tensors = list(own)
        # Held: code may give a parameter another storage (`weight.data = …`), and what comes then may lie in its place.
        self._storages = [tensor.untyped_storage() for tensor in self._tensors]
        self.own = {storage._cdata for storage in self._storages}
        self._note = note
        self._found: dict[int, tuple[weakref.ref[torch.UntypedStorage], T]] = {}

    def watching(self) -> torch.autograd.graph.saved_tensors_hooks:
        """The context in which a forward pass is watched."""
        return torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def alive(self) -> dict[int, T]:
        """What was noted of every storage that is still there, by address."""
        now = {tensor.untyped_storage()._cdata for tensor in self._tensors}
        return {
            address: noted
            for address, (storage, noted) in self._found.items()
            if storage() is not None and address not in now
        }

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self.own:
            before, known = self._found.get(address, (None, None))
            if before is None or before() is None:  # another storage, perhaps, which lay there and is gone
                known = None
            self._found[address] = weakref.ref(storage), self._note(tensor, known)
        return tensor.detach()  # else an output holds its operator, which holds it: never freed
