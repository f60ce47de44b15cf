"""Does the model's code do the same in a smaller network? What it does is compared step by step, with its numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

from torch import fx, nn

from ptsim.capture.graph import by_export, traced_into
from ptsim.capture.words import words_of
from ptsim.prune.modules import OWN
from ptsim.prune.propagate import Graphs
from ptsim.prune.rules import rule_for_function, takes_shapes

# What code may ask layers for that pruning changes; shapes of tensors are noticed where they are asked for.
_WIDTHS = {
    "out_channels", "in_channels", "out_features", "in_features", "num_features", "num_channels", "num_groups", "numel",
    "parameters",
}  # fmt: skip


def may_count(model: nn.Module, graphs: Graphs) -> bool:
    """True if the model's code may compute with a number of channels, or go its way by it, without a node that says so.

    `torch.export` has no nodes for shapes; otherwise the code of a module that is traced into names such a number.
    """
    return any(
        by_export(graph) or any(_WIDTHS & words_of(module) for _, module in traced_into(model, graph))
        for graph in graphs.values()
    )


def same_steps(before: Graphs, after: Graphs, *, constants: Collection[str] = ()) -> bool:
    """True if the code does the same with the same numbers, but for those that count channels.

    `constants` are layers in whose place there is a constant now: they and what led to them alone may be missing.
    """
    return all(_same(*graphs, constants) for graphs in _by_mode(before, after))


def same_calls(before: Graphs, after: Graphs, changed: Collection[str]) -> bool:
    """True if the code calls the same in both, but for the layers `changed` and what pruning has put around them."""

    def calls(graph: fx.GraphModule) -> Counter[tuple[str, str]]:
        nodes = (node for node in graph.graph.nodes if node.op.startswith("call") and not _put_in(graph, node))
        names = ((node.op, str(node.target)) for node in nodes)
        return Counter(name for name in names if name[0] != "call_module" or not name[1].startswith(tuple(changed)))

    return all(calls(one) == calls(other) for one, other in _by_mode(before, after))


def _by_mode(before: Graphs, after: Graphs) -> Iterator[tuple[fx.GraphModule, fx.GraphModule]]:
    """Both graphs of every mode; that of training where there is no other."""
    for mode in before.keys() | after.keys():
        yield before.get(mode, before["train"]), after.get(mode, after["train"])


def _same(before: fx.GraphModule, after: fx.GraphModule, constants: Collection[str]) -> bool:
    tensors = [graph.meta.get("constants", []) for graph in (after, before)]
    if not constants:
        return tensors[0] == tensors[1] and _steps(after, before) == _steps(before, before)
    ends = {node for node in before.graph.nodes if node.op == "call_module" and str(node.target) in constants}
    found, known = (Counter(_steps(graph, graph, named=False)) for graph in (after, before))
    needed = Counter(_steps(before, before, named=False, without=ends | only_for(before, ends)))
    return not (found - known or needed - found or Counter(tensors[0]) - Counter(tensors[1]))


def only_for(graph: fx.GraphModule, ends: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes whose results only lead to `ends`."""
    found: set[fx.Node] = set()
    for node in reversed(list(graph.graph.nodes)):
        if node.op in ("placeholder", "get_attr", "output") or node in ends or not node.users:
            continue
        if all(user in found or user in ends for user in node.users):
            found.add(node)
    return found


def _steps(
    graph: fx.GraphModule, counting: fx.GraphModule, *, named: bool = True, without: Collection[fx.Node] = ()
) -> list[tuple[str, str, str]]:
    """What every node but `without` does and with which numbers.

    Not with those that count channels, as `counting` knows them. Without `named` it is left open which node's result
    another one takes.
    """
    free = {node.name for node in counting.graph.nodes if node.meta.get("counts")}

    def numbers(node: fx.Node) -> str:
        # Shapes are constants of an exported graph, also those that an operator may be given.
        if node.name in free or (by_export(graph) and takes_shapes(rule_for_function(node))):
            return ""
        if named:
            return f"{node.args} {node.kwargs}"
        return str(fx.map_arg((node.args, node.kwargs), lambda n: "%"))

    return [
        (node.op, str(node.target), numbers(node))
        for node in graph.graph.nodes
        if node not in without and (named or not _put_in(graph, node))
    ]


def _put_in(graph: fx.GraphModule, node: fx.Node) -> bool:
    """True for a step of what pruning has put into the network, and for a parameter, which may be one of its own."""
    if node.op == "get_attr":
        return True
    if node.op == "call_module":
        return isinstance(graph.get_submodule(str(node.target)), OWN)
    # From torch.export: classes, or their names.
    kinds = [kind for _, kind in node.meta.get("nn_module_stack", {}).values()]
    return any(kind in (own, f"{own.__module__}.{own.__qualname__}") for kind in kinds for own in OWN)
