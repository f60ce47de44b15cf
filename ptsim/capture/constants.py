"""What are the constant tensors of a graph made of? Two traces of the same code may differ in them alone."""

from __future__ import annotations

import hashlib
import operator

import torch
from torch import Tensor, fx, nn


def constants_of(graph: fx.GraphModule, model: nn.Module) -> list[str]:
    """Shape, kind and a hash of the elements of every tensor in the graph that is none of the model's own, in order.

    One without storage has no elements.
    """
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    found = (operator.attrgetter(str(node.target))(graph) for node in graph.graph.nodes if node.op == "get_attr")
    return [_written(value) for value in found if isinstance(value, Tensor) and id(value) not in own]


def _written(tensor: Tensor) -> str:
    content = ""
    if not tensor.is_meta:
        dense = tensor.detach().cpu() if tensor.layout is torch.strided else tensor.detach().cpu().to_dense()
        elements = dense.contiguous().flatten().view(torch.uint8)
        content = hashlib.sha256(elements.numpy().tobytes()).hexdigest()
    return f"{tensor.dtype} {tuple(tensor.shape)} {content}"
