"""Counts how often weights are cast: autocast does it once in each of its blocks."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Casts(TorchDispatchMode):
    """Casts of tensors of one shape to another number format."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.number, self._shape = 0, shape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cast = func is torch.ops.aten._to_copy.default and args[0].dtype is torch.float32
        self.number += cast and tuple(args[0].shape) == self._shape
        return func(*args, **(kwargs or {}))
