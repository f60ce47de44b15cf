"""Of which number format and layout are training passes? Names of torch's types, and what a compiled graph keeps."""

from __future__ import annotations

import itertools
from typing import Annotated, Any

import msgspec

from ptsim.capture.graph import output_tensors
from ptsim.measure.profile import HALF_TYPES
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


def kept_format(output: Any) -> Precision | None:
    """Of the half-precision matrices that a compiled graph behind these outputs keeps; None where it keeps none."""
    nodes = [leaf.grad_fn for leaf in output_tensors(output) if leaf.grad_fn]
    for node in itertools.islice(nodes, _NEAR):  # the list grows meanwhile
        for tensor in getattr(node, "saved_tensors", ()):
            if tensor is not None and tensor.ndim > 1 and tensor.dtype in FORMATS:
                return FORMATS[tensor.dtype]
        nodes += [before for before, _ in node.next_functions if before is not None]
    return None
