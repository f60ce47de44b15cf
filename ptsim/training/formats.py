"""Of which number format and layout are training passes? Names of torch's types, and what a compiled graph keeps."""

from __future__ import annotations

import itertools
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from ptsim.capture.graph import output_tensors
from ptsim.measure.profile import HALF_TYPES
from ptsim.measure.tf32 import convolutions_use_tf32
from ptsim.network import MemoryFormat, Precision

FORMATS = {kind: precision for precision, kind in HALF_TYPES.items()}
_NEAR = 32  # nodes of autograd's graph between an output and the last compiled graph: hardly more than a few


class Seen(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What training passes were like: a run that goes on knows it before the next one.

    `batch`: images of the largest forward pass; None where none was seen.
    """

    batch: Annotated[int, msgspec.Meta(ge=1, le=2**31)] | None
    precision: Precision
    memory_format: MemoryFormat


def autocast_format(device: torch.device) -> Precision | None:
    """Of products under autocast; None where there is none now."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return FORMATS.get(torch.get_autocast_dtype(device.type), Precision.FP32)


def pass_format(images: Tensor, device: torch.device, inside: Precision | None) -> Precision:
    """Of the pass of these images that begins now; `inside` is of autocast that was seen within the network's call."""
    if (precision := autocast_format(device)) is not None:
        return precision
    if images.dtype in FORMATS:
        return FORMATS[images.dtype]
    if inside is not None:
        return inside
    if device.type == "cuda" and convolutions_use_tf32() and torch.cuda.get_device_capability(device)[0] >= 8:
        return Precision.TF32
    return Precision.FP32


def layout_of(images: Tensor) -> MemoryFormat:
    """How a pass's images lie in memory."""
    last = images.ndim == 4 and not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
    return "channels_last" if last else "contiguous"


def kept_format(output: Any) -> Precision | None:
    """Of the half-precision matrices that a compiled graph behind these outputs keeps; None where it keeps none."""
    nodes = [leaf.grad_fn for leaf in output_tensors(output) if leaf.grad_fn]
    for node in itertools.islice(nodes, _NEAR):  # the list grows meanwhile
        for tensor in getattr(node, "saved_tensors", ()):
            if tensor is not None and tensor.ndim > 1 and tensor.dtype in FORMATS:
                return FORMATS[tensor.dtype]
        nodes += [before for before, _ in node.next_functions if before is not None]
    return None
