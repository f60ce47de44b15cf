"""The graph of a model that torch.fx cannot trace, by `torch.export`, in the form that torch.fx would give it.

`torch.export` runs the model's code on tensors without storage, so that the code may do anything with them but look at
their values. Its graph has operators only; those that are torch's layers become calls of the model's modules again.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from ptsim.capture.constants import constants_of
from ptsim.capture.copies import dtype_of

# torch 2.8 has no guards to check yet.
_NO_GUARDS: Any = {"check_guards": False} if "check_guards" in signature(ExportedProgram.module).parameters else {}
_LAYERS = re.compile(r"(conv\d?d?|conv_transpose\dd|linear|batch_norm|group_norm|layer_norm|instance_norm|prelu)$")


def exported_graph(model: nn.Module, twin: nn.Module, images_shape: tuple[int, ...]) -> fx.GraphModule:
    """The model's graph for images of `images_shape` (N, C, H, W) in the mode that it is in.

    It shares its modules, parameters and buffers with the model. Shapes are constants in it, and so is what the code
    computes with them; `meta["constants"]` has what its constant tensors are made of, in order.

    Args:
        model: whose graph it is.
        twin: a copy of it where the model really is, so that code that asks for the device goes the right way; only the
            shapes of its tensors count.
        images_shape: mini-batch, channels, height, width.

    Raises:
        Exception: whatever the model's code or `torch.export` raises.
    """
    dtype = dtype_of(model)
    here, there = (next((p.device for p in each.parameters()), torch.device("cpu")) for each in (model, twin))
    with _quiet():
        program = torch.export.export(twin, (torch.empty(images_shape, dtype=dtype, device=there),), strict=False)
        exported = program.module(**_NO_GUARDS)
    found: dict[str, Any] = {}
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    counters: list[fx.Node] = []
    for node in exported.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], copied.__getitem__))
            continue
        layer = _layer(model, node)
        if layer is not None:
            path, module = layer
            found[path] = module
            copied[node] = graph.call_module(path, (copied[node.args[0]],))
            copied[node].name = node.name
            continue
        copied[node] = made = graph.node_copy(node, copied.__getitem__)
        if node.op == "get_attr":
            found[str(node.target)] = _attribute(model, exported, str(node.target))
        elif isinstance(node.target, torch._ops.OpOverload):
            made.target = node.target.overloadpacket
            sources = made.all_input_nodes
            if any(n in counters or str(n.target).endswith("num_batches_tracked") for n in sources):
                counters.append(made)  # BatchNorm counts by itself, also where it is called several times
    for made in reversed(counters):
        graph.erase_node(made)
    for made in reversed(graph.nodes):
        if made.op == "get_attr" and not made.users:
            graph.erase_node(made)
    used = {str(made.target) for made in graph.nodes}
    result = fx.GraphModule({target: value for target, value in found.items() if target in used}, graph)
    result.meta["looked"] = {}
    result.meta["constants"] = constants_of(result, model)
    for name, buffer in result.named_buffers(recurse=False):
        if buffer is found[name] and not hasattr(model, name):  # a constant
            setattr(result, name, buffer.to(here))
    return result


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What fails is raised; `torch.export` would print its graph and log as well."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        printed = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _layer(model: nn.Module, node: fx.Node) -> tuple[str, nn.Module] | None:
    """The path and the module if the node is what one of torch's layers does with its own parameters."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if node.op != "call_function" or not stack or not isinstance(node.target, torch._ops.OpOverload):
        return None
    path = str(stack[-1][0]).partition("@")[0]
    if not path or not _LAYERS.match(node.target.overloadpacket.__name__):
        return None
    module = model.get_submodule(path)
    weight = module._parameters.get("weight")
    reads = [source for source in node.all_input_nodes[1:] if source.op == "get_attr"]
    own = {id(tensor) for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))}
    if (
        not type(module).__module__.startswith("torch.nn.")
        or weight is None
        or getattr(module, "padding_mode", "zeros") != "zeros"
        or len(reads) + 1 != len(node.all_input_nodes)
        or any(id(_attribute(model, model, str(source.target))) not in own for source in reads)
        or not reads
    ):
        return None
    return path, module


def _attribute(model: nn.Module, exported: nn.Module, target: str) -> Any:
    """The model's parameter, buffer or module at a path; a constant that `torch.export` has found, of its graph."""
    for root in (model, exported):
        parent, _, name = target.rpartition(".")
        try:
            return getattr(root.get_submodule(parent), name)
        except AttributeError:
            continue
    raise AttributeError(target)
