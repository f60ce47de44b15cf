"""How does a layer compute only its own dense channels where a residual stream keeps the union of all layers'?

Channel gating (docs/method.md §2.3): a gather in front of a layer picks the channels that its own weights use; a
scatter after its BatchNorm puts the channels that it computes where they belong and gives the others the constant that
a zeroed channel has there. Exact in both modes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import torch
from torch import Tensor, nn

from ptsim.prune.cut import Replacement, narrowed, sync_attributes
from ptsim.prune.groups import ChannelGroups, weight_GOIK
from ptsim.prune.labels import CONVS
from ptsim.prune.modules import Gathered, Scattered
from ptsim.prune.removal import set_module


@dataclasses.dataclass(frozen=True)
class Gate:
    """One convolution: which of its present inputs and outputs it keeps (None: all), and the BatchNorm behind it."""

    layer: str
    inputs: Tensor | None
    outputs: Tensor | None
    norm: str | None


def find_gates(model: nn.Module, groups: ChannelGroups, threshold: float, multiple: int = 1) -> tuple[Gate, ...]:
    """The convolutions on residual streams with channels that their own weights do not use.

    A stream is an edge that more than two layers touch. Grouped and shared convolutions are left as they are; outputs
    are gated only where a BatchNorm follows directly and the convolution has no bias. What is left is a multiple of
    `multiple`, or what it was.
    """
    graph = groups.graph
    nodes = {node.name: node for node in graph.graph.nodes}
    calls = Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_module")
    degree = torch.zeros(groups.num_components, dtype=torch.int64)
    for layer in groups.layers:
        for axis in (layer.inputs, layer.outputs):
            degree[axis] += 1
    gates = []
    for layer in groups.layers:
        node = nodes.get(layer.nodes[0])
        if layer.groups > 1 or len(layer.nodes) > 1 or node is None or node.op != "call_module":
            continue
        path = str(node.target)
        module = model.get_submodule(path)
        if not isinstance(module, CONVS) or calls[path] != 1 or module._parameters.get("weight") is None:
            continue  # the weight may be computed
        W = weight_GOIK(module.weight.detach().abs().nan_to_num(torch.inf), layer)
        use_inputs, use_outputs = (
            _used(values.flatten().cpu(), (groups.prunable & (degree > 2))[axis], threshold, multiple)
            for values, axis in ((W.amax((1, 3)), layer.inputs), (W.amax((2, 3)), layer.outputs))
        )
        norm = None
        user = next(iter(node.users)) if len(node.users) == 1 else None
        if user is not None and user.op == "call_module" and calls[str(user.target)] == 1 and module.bias is None:
            follower = model.get_submodule(str(user.target))
            if type(follower) is nn.BatchNorm2d or type(follower).__name__ == "PartialBatchNorm":
                norm = str(user.target)
        inputs = None if bool(use_inputs.all()) else torch.nonzero(use_inputs).flatten()
        outputs = None if norm is None or bool(use_outputs.all()) else torch.nonzero(use_outputs).flatten()
        if inputs is not None or outputs is not None:
            gates.append(Gate(path, inputs, outputs, norm))
    return tuple(gates)


def _used(maxima: Tensor, gateable: Tensor, threshold: float, multiple: int) -> Tensor:
    """Which channels of an axis stay: at least one; the largest of those that are not needed fill it up."""
    used = (maxima >= threshold) | ~gateable
    number = int(used.sum())
    wanted = min(max(1, -(-number // multiple)) * multiple, len(used))
    largest_first = torch.where(used, -1.0, maxima).argsort(descending=True, stable=True)
    used[largest_first[: wanted - number]] = True
    return used


def apply_gate(model: nn.Module, gate: Gate) -> list[Replacement]:
    """Narrow the convolution in place and put the gather and the scatter around it, or narrow those that are there."""
    module = model.get_submodule(gate.layer)
    assert isinstance(module, CONVS), "find_gates lists convolutions"
    kept = {}
    if gate.outputs is not None:
        kept[0] = gate.outputs
    if gate.inputs is not None:
        kept[1] = gate.inputs
    old = module.weight
    assert isinstance(old, nn.Parameter), "a convolution's weight"
    width_in = old.shape[1]
    width_out = old.shape[0]
    module.weight = new = narrowed(old, kept)
    sync_attributes(module)
    if gate.inputs is not None:
        parent = model.get_submodule(gate.layer.rpartition(".")[0])
        if isinstance(parent, Gathered):
            parent.gather.narrow(gate.inputs)
        else:
            set_module(model, gate.layer, Gathered(module, _mask(gate.inputs, width_in, new.device)))
    if gate.outputs is not None and gate.norm is not None:
        parent = model.get_submodule(gate.norm.rpartition(".")[0])
        if isinstance(parent, Scattered):
            parent.norm.narrow(gate.outputs)
        else:
            norm = model.get_submodule(gate.norm)
            assert isinstance(norm, nn.BatchNorm2d), "find_gates says so"
            set_module(model, gate.norm, Scattered(norm, _mask(gate.outputs, width_out, new.device)))
    return [Replacement(old, new, kept)]


def _mask(indices: Tensor, width: int, device: torch.device) -> Tensor:
    mask = torch.zeros(width, dtype=torch.bool)
    mask[indices] = True
    return mask if device.type == "meta" else mask.to(device)
