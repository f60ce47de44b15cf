"""May fp32 products run in TF32? torch's switches, of which there are old and new ones.

torch 2.9 has brought new ones (`fp32_precision`) beside the old ones (`allow_tf32`). Whoever asks an old one after a
program has set a new one gets a RuntimeError, and the first to touch an old one a warning. So the new ones are asked
where there are any; both are set, because torch's compiler asks the old ones.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from ptsim.network import Precision


def convolutions_use_tf32() -> bool:
    """Whether fp32 convolutions run in TF32 where the device has it."""
    new = _new_switches()
    return bool(new[1].fp32_precision == "tf32") if new else torch.backends.cudnn.allow_tf32


@contextlib.contextmanager
def tf32_allowed(precision: Precision) -> Iterator[None]:
    """The switches as `precision` wants them, for forward and backward.

    torch's own defaults would run the backward of fp32 convolutions in TF32.
    """
    wanted, new = precision is not Precision.FP32, _new_switches()
    before = [switch.fp32_precision for switch in new]
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9's, that the old switches will go
        old = _old_values()
        present = old and [*old, *(value == "tf32" for value in before)]
        if present is None or set(present) != {wanted}:
            matmul.allow_tf32 = cudnn.allow_tf32 = wanted
    for switch in new:
        switch.fp32_precision = "tf32" if wanted else "ieee"
    try:
        yield
    finally:
        if old is not None:
            matmul.allow_tf32, cudnn.allow_tf32 = old
        for switch, value in zip(new, before, strict=True):
            switch.fp32_precision = value


def _new_switches() -> tuple[Any, ...]:
    """Those of matrix products, convolutions and recurrent layers; none before torch 2.9."""
    cudnn = torch.backends.cudnn
    found = (torch.backends.cuda.matmul, getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None))
    return found if all(hasattr(switch, "fp32_precision") for switch in found) else ()


def _old_values() -> tuple[bool, bool] | None:
    """Of matrix products and of cuDNN; None where the new switches say something that the old ones cannot."""
    try:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None
