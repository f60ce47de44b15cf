"""Which residual branches are left without an inner channel, and how do they go without changing the function?

A convolution none of whose inputs is left gives a constant. If everything that follows from it is constant as well
until a sum with a live tensor, the branch has nothing left to compute: the last BatchNorm (or convolution) in front of
the sum becomes `ConstantChannels`, all layers that only led there become `Placeholder`s. Found in the graph, whatever
the block is called. A method of the model's code that cannot bear a tensor without channels is noticed by running the
result on shapes; then a channel stays instead.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn

from ptsim.operators import SUMS, plain_name
from ptsim.prune.cut import Replacement
from ptsim.prune.function_rules import is_elementwise
from ptsim.prune.groups import ChannelGroups
from ptsim.prune.labels import BATCH_NORMS, CONVS, POOLS
from ptsim.prune.modules import ChannelScatter, ConstantChannels, Gathered, Placeholder, Scattered
from ptsim.prune.steps import only_for


@dataclasses.dataclass(frozen=True)
class Removal:
    """One branch: the layers that go, the one whose constant stays, and the layer in front of that one (its bias).

    `full`: the constant has to be written out at the branch's size.
    """

    dead: tuple[str, ...]
    constant: str
    before: str | None
    full: bool


def find_removals(groups: ChannelGroups, sparse: Tensor) -> tuple[Removal, ...]:
    """The branches that are left without an inner channel once the components of the mask `sparse` are gone.

    Of the two operands of a sum at most one is among them, so that the sum still has an image's size and mini-batch.
    It is the layer that gives the constant which has to be left without an input: what layers in front of it make of
    nothing, such as the shift of a BatchNorm, may be more than nothing. Where evaluation runs other code than training,
    both have to have the branch.
    """
    training, *others = (_in_graph(groups, graph, sparse) for graph in groups.graphs.values())
    found = []
    for constant, removal in training.items():
        again = [other[constant] for other in others if constant in other]
        if len(again) == len(others) and all({*removal.dead} == {*other.dead} for other in again):
            full = removal.full or any(other.full for other in again)
            found.append(dataclasses.replace(removal, full=full))
    return tuple(found)


def _in_graph(groups: ChannelGroups, graph: fx.GraphModule, sparse: Tensor) -> dict[str, Removal]:
    """The branches of one graph, by the layer whose constant stays."""
    nodes = {node.name: node for node in graph.graph.nodes}
    calls = Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_module")
    fixed = {layer.layer for layer in groups.layers if not layer.trained and not layer.depthwise}
    found: dict[fx.Node, Removal] = {}  # by the sum that the branch leads to
    for layer in groups.layers:
        if layer.depthwise or len(layer.inputs) == 0 or not bool(sparse[layer.inputs].all()) or len(layer.nodes) != 1:
            continue
        node = nodes.get(layer.nodes[0])
        if node is None or node.op != "call_module":
            continue
        ended = _branch(graph, node, calls)
        if ended is not None and fixed.isdisjoint((*ended[1].dead, ended[1].constant)):
            found.setdefault(*ended)
    outer = {path for removal in found.values() for path in removal.dead}
    return {removal.constant: removal for removal in found.values() if removal.constant not in outer}


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node computes with, but for parameters used directly."""
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("value"), Tensor) and n.op != "get_attr"]


def _branch(graph: fx.GraphModule, start: fx.Node, calls: Counter[str]) -> tuple[fx.Node, Removal] | None:
    """The sum that the branch of `start` leads to, and the branch; None if it does not go as a whole."""
    constant = {start}
    exits = []
    after = False
    for node in graph.graph.nodes:
        after = after or node is start
        if not after or node is start:
            continue
        inputs = _inputs(node)
        if any(n in constant for n in inputs):
            if node.op != "output" and all(n in constant for n in inputs):
                constant.add(node)
            else:
                exits.append(node)
    if len(exits) != 1:
        return None
    end = exits[0]
    name = end.target if isinstance(end.target, str) else getattr(end.target, "__name__", "")
    ends = [n for n in _inputs(end) if n in constant]
    if plain_name(name) not in SUMS or len(ends) != 1 or len(_inputs(end)) != 2:
        return None
    (other,) = (n for n in _inputs(end) if n is not ends[0])
    if _is_spread(graph, other) or other.meta["value"].shape != end.meta["value"].shape:
        return None  # a constant would not have the sum's size
    last, pointwise = ends[0], False
    while not _is_affine(graph, last):
        sources, gated = _inputs(last), _is_scatter(graph, last)
        if not (gated or _is_pointwise(graph, last)) or len(sources) != 1 or len(sources[0].users) != 1:
            return None
        last, pointwise = sources[0], pointwise or not gated
    path = str(last.target)
    if calls[path] != 1 or (len(last.users) != 1):
        return None
    dead = only_for(graph, [last])
    dead_calls = Counter(str(node.target) for node in dead if node.op == "call_module")
    paths = tuple(
        target
        for target, count in dead_calls.items()
        if calls[target] == count
        and not isinstance(_module(graph, target), _KEPT)
        and not _is_activation(graph, target)
    )
    if str(start.target) not in (*paths, path):
        return None
    before = _layer_in_front(graph, last)
    if start is not last and start is not before:
        return None
    front = None if before is None else str(before.target)
    return end, Removal(dead=paths, constant=path, before=front, full=pointwise)


def _layer_in_front(graph: fx.GraphModule, norm: fx.Node) -> fx.Node | None:
    """The convolution or linear layer whose output the BatchNorm `norm` takes; None if it is no such pair."""
    source = next(iter(_inputs(norm)), None)
    if not isinstance(_module(graph, str(norm.target)), BATCH_NORMS) or source is None or source.op != "call_module":
        return None
    layer = _module(graph, str(source.target))
    is_row = isinstance(layer, nn.Linear) and source.meta["value"].ndim == 2  # else the norm is not over its outputs
    return source if is_row or isinstance(layer, CONVS) else None


_KEPT = (nn.modules.dropout._DropoutNd, nn.Identity, nn.Flatten)


def _module(graph: fx.GraphModule, path: str) -> nn.Module:
    return graph.get_submodule(path)


def _is_spread(graph: fx.GraphModule, node: fx.Node) -> bool:
    """True for the constant of a branch removed earlier, which has one element per channel and broadcasts."""
    if node.op == "call_module" and isinstance(module := _module(graph, str(node.target)), ConstantChannels):
        return not module.full
    return _is_pointwise(graph, node) and all(_is_spread(graph, n) for n in _inputs(node)) and bool(_inputs(node))


def collapsed_layers(model: nn.Module, groups: ChannelGroups, threshold: float) -> tuple[str, ...]:
    """The layers without a weight that reaches `threshold`, if together they cut the output off from the images.

    Empty while some path from the images to an output leads through live layers only.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    dead = {
        node: layer.layer
        for layer in groups.layers
        if layer.trained
        and layer.weight in parameters
        and bool((parameters[layer.weight].abs() < threshold).all())  # one that is no number is not dead
        for node in layer.nodes
    }
    reached: set[fx.Node] = set()
    cut_off: dict[str, None] = {}
    sharing: dict[int, set[fx.Node]] = {}  # by memory: what lies there, of which one may be written through another
    for node in groups.graph.graph.nodes:
        together = sharing.setdefault(_memory(node), {node})
        together.add(node)
        if node.op == "output":
            return () if any(n in reached for n in node.all_input_nodes) else tuple(cut_off)
        if node.op == "placeholder":
            reached.add(node)
        elif any(n in reached for n in node.all_input_nodes) and "value" in node.meta:
            if node.name in dead:
                cut_off[dead[node.name]] = None
            elif not isinstance(node.meta["value"], int | float | torch.Size) and not _is_constant(groups.graph, node):
                reached |= together
    return ()


def _memory(node: fx.Node) -> int:
    """The memory of what a node gives, or assigns to; a number of its own if that is no tensor."""
    assigns = getattr(node.target, "__name__", "") == "setitem"
    value = (node.args[0] if assigns and isinstance(node.args[0], fx.Node) else node).meta.get("value")
    place: int = value.untyped_storage()._cdata if isinstance(value, Tensor) else id(node)
    return place


def _is_constant(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(_module(graph, str(node.target)), (Placeholder, ConstantChannels))


def _is_affine(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(_module(graph, str(node.target)), (*BATCH_NORMS, *CONVS, nn.Linear))


def _is_scatter(graph: fx.GraphModule, node: fx.Node) -> bool:
    """True for the end of a gated BatchNorm, with which it goes."""
    return node.op == "call_module" and isinstance(_module(graph, str(node.target)), ChannelScatter)


def _is_activation(graph: fx.GraphModule, path: str) -> bool:
    return type(_module(graph, path)).__module__ == "torch.nn.modules.activation"


def _is_pointwise(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = _module(graph, str(node.target))
        return isinstance(module, _KEPT[:2]) or _is_activation(graph, str(node.target))
    name: Any = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return is_elementwise(name.rstrip("_"))


def remove_branch(model: nn.Module, removal: Removal) -> list[Replacement]:
    """Take the branch out of `model`; the parameters that are gone come back as replacements by nothing."""
    before = None if removal.before is None else model.get_submodule(removal.before)
    last = model.get_submodule(removal.constant)
    constant = ConstantChannels.of(last, before, full=removal.full)
    gone = list(last.parameters())
    end = _with_gates(model, removal.constant)
    for path in dict.fromkeys(_with_gates(model, path) for path in removal.dead):
        if path != end:
            old = model.get_submodule(path)
            gone += old.parameters()
            old = old.layer if isinstance(old, Gathered) else old.norm if isinstance(old, Scattered) else old
            spatial = isinstance(old, (*CONVS, nn.Linear, *POOLS))
            set_module(model, path, Placeholder.of(old) if spatial or _has_tensors(old) else nn.Identity())
    set_module(model, end, constant)
    staying = {id(parameter) for parameter in model.parameters()}  # the constant's, and those that other layers share
    return [Replacement(parameter, None, {}) for parameter in gone if id(parameter) not in staying]


def _with_gates(model: nn.Module, path: str) -> str:
    """The path of the layer together with the gather or scatter that gating has put around it."""
    parent = path.rpartition(".")[0]
    return parent if isinstance(model.get_submodule(parent), (Gathered, Scattered)) else path


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where `path` points, and wherever else the model holds the module that is there now."""
    old = model.get_submodule(path)
    places = [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is old]
    for parent, name in places:
        setattr(parent, name, module)
