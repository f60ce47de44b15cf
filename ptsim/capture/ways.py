"""Which ways does a model's code take? Random numbers may decide, and so may what it keeps from one call to the next.

Stochastic depth is often written so: `if torch.rand(1) < p: continue`. torch.fx sees only the way that is
taken while it traces, so such code is traced again and again, each time with other numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import fx, nn

from ptsim.capture.calls import CONTAINERS, Changes, attributes_restored, later_calls, left_behind
from ptsim.capture.chance import chance_of, random_state_kept, seed_all
from ptsim.capture.gradients import MARKS
from ptsim.capture.graph import evaluation_mode, symbolic_graph
from ptsim.capture.standins import is_the_models
from ptsim.errors import PtsimError, UnsupportedModelError

_MOST_TRACES, _FRUITLESS_TRACES = 256, 32  # of code that lets random numbers decide
_FLOATS = re.compile(r"(?<![\w.])\d+(\.\d+(e[+-]?\d+)?|e[+-]?\d+)")
# Operators that write; those that hand out a tensor's memory.
_ACTS = re.compile(
    r"(set(item|attr)|i(add|sub|mul|truediv|pow)|.*[^_]_|_?set_grad_enabled|_(enter|exit)_autocast|manual_seed)$"
)
READING = ("item", "tolist", "numpy", "equal", "allclose", "is_nonzero")  # give numbers that depend on values
_HANDS_OUT = ("numpy", "data_ptr", "storage", "untyped_storage")
_WITHOUT_EFFECTS = ("torch", "_operator", "math", "builtins")


def each_way(
    model: nn.Module,
    images_shape: tuple[int, ...],
    tell: Callable[[fx.GraphModule, int], object],
    *,
    seeds: Iterable[int] | None = None,
    **how: Any,
) -> bool:
    """Trace the model in the mode that it is in, once for every way that random numbers lead it; False if too many.

    It is traced again, each time with other numbers, until several ways in a row tell nothing new. Ways that differ
    only in the numbers that they compute with, or in what is never used, are one. The random state is left as it was.

    Args:
        model: left as it is.
        images_shape: (N, C, H, W).
        tell: is given the graph of each new way and the seed that leads to it, and gives all that is known by now.
        seeds: those of the ways that are known from an earlier look; nothing further is tried.
        how: handed on to `symbolic_graph`.

    Raises:
        UnsupportedModelError: the model cannot be traced; its code goes another way at a later call, or nobody can
            repeat its way.
    """
    chance = chance_of(model)
    ways, fruitless, known = set[str](), 0, object()
    with random_state_kept(model, []):
        for seed in range(_MOST_TRACES) if seeds is None else seeds:
            seed_all(seed, chance.generators)
            graph = symbolic_graph(model, images_shape, **how)
            way = way_of(graph)
            if seeds is None and not ways:
                _refuse_other_calls(model, images_shape, way, graph, seed, how)
            fruitless += 1
            if way not in ways:
                if ways and chance.untold:
                    raise UnsupportedModelError(
                        f"the code of {type(model).__name__} draws from a generator that it makes anew at every call, "
                        "and what it draws decides which way it goes: no two looks at it agree",
                        hint="let it draw from torch's own generator, or from one that the module keeps",
                    )
                ways.add(way)
                told = tell(graph, seed)
                known, fruitless = told, 0 if told != known else fruitless
            if seeds is None and not (chance.untold or graph.meta["draws"]):
                return True
            if seeds is None and fruitless == _FRUITLESS_TRACES:
                return True
    return seeds is not None


def _refuse_other_calls(
    model: nn.Module,
    images_shape: tuple[int, ...],
    way: str,
    graph: fx.GraphModule,
    seed: int,
    how: Mapping[str, Any],
) -> None:
    """Raise an `UnsupportedModelError` if the code goes another way once it finds what the call before has left."""
    changes: Changes = graph.meta["changes"]
    generators = chance_of(model).generators
    for attributes in later_calls(changes):
        with attributes_restored(model):
            shared: dict[int, Any] = {}  # modules may keep one list or dict together
            for (path, name), value in attributes.items():
                table = vars(model.get_submodule(path))
                held = table.get(name)
                table[name] = shared.setdefault(id(held), value) if isinstance(held, CONTAINERS) else value
            seed_all(seed, generators)
            try:
                later = way_of(symbolic_graph(model, images_shape, **{**how, "ways": (graph.meta["way"],)}))
            except PtsimError:
                later = ""
        if later != way:
            path, name = next(iter(attributes))
            flag = isinstance(attributes[path, name], bool)
            kind = type(model.get_submodule(path)).__name__
            raise UnsupportedModelError(
                f"the code of {type(model).__name__} does not compute the same at every call: it goes by "
                f"{kind}.{name}, which each call changes",
                hint="call it on an image once before it is handed over"
                if flag
                else "keep such a tensor in a buffer, and let the training loop set a flag that decides",
            )


def unused_nodes(graph: fx.GraphModule, kept: Collection[fx.Node] = ()) -> list[fx.Node]:
    """What is computed and never used, from the last to the first: numbers that the code prints or keeps.

    But for the nodes `kept`, and what they are computed from.
    """
    unused: dict[fx.Node, None] = {}
    for node in reversed(graph.graph.nodes):
        if (
            node.op in ("call_function", "call_method")
            and node not in kept
            and all(user in unused for user in node.users)
        ):
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            place = str(getattr(node.target, "__module__", None) or "torch")
            package = "" if place.startswith("torch._functorch") else place.partition(".")[0]  # vmap opens and closes
            told_to = any(given is True for given in (*node.args, node.kwargs.get("inplace")))
            acts = told_to or "out" in node.kwargs or _ACTS.match(name) or (name in _HANDS_OUT and is_the_models(node))
            if not acts and package in _WITHOUT_EFFECTS and node.name not in graph.meta["looked"]:
                unused[node] = None
    return [node for node in unused if node.target not in MARKS]


def combining(unused: Iterable[fx.Node]) -> set[fx.Node]:
    """Of the unused nodes those that take several values, whose shapes have to agree, and what leads to them.

    A residual stream goes on to its end, for example, where only skip connections are read.
    """
    unused = dict.fromkeys(unused)
    found: set[fx.Node] = set()
    for node in unused:  # from the last to the first
        if node not in found and node.target not in READING and len(node.all_input_nodes) > 1:
            found.add(node)
        if node in found:
            found.update(given for given in node.all_input_nodes if given in unused)
    return found


def left_for_the_loop(graph: fx.GraphModule) -> list[fx.Node]:
    """What the code leaves in attributes and does not use itself: a second output, for a loss in the loop to read."""
    left, unused = left_behind(graph.meta["changes"]), set(unused_nodes(graph))
    return [node for node in graph.graph.nodes if node in left and all(user in unused for user in node.users)]


def read_alone(graph: fx.GraphModule) -> list[fx.Node]:
    """Of the unused nodes those that hand values to the code, which prints or notes them, and what leads to them."""
    found: dict[fx.Node, None] = {}
    for node in unused_nodes(graph):
        if (node.target in READING) if not node.users else all(user in found for user in node.users):
            found[node] = None
    return list(found)


def way_of(graph: fx.GraphModule) -> str:
    """What the graph does, in words that are equal for equal ways."""
    unused = set(unused_nodes(graph))
    numbers: dict[fx.Node, str] = {}
    for node in graph.graph.nodes:
        if node not in unused:
            numbers[node] = f"%{len(numbers)}"
    steps = (f"{node.op} {node.target} {fx.map_arg((node.args, node.kwargs), numbers.__getitem__)}" for node in numbers)
    return _FLOATS.sub("", "\n".join(steps))


def take_fullest_way(model: nn.Module, images_shape: tuple[int, ...]) -> int:
    """Seed the generators of the CPU so that training goes the way with the most calls: nothing is skipped, perhaps.

    Gives how many ways were met. The model is left as it was, but for generators of its own.

    Raises:
        UnsupportedModelError: see `each_way`.
    """
    found: list[tuple[int, int]] = []  # calls, and the first seed that leads to them

    def tell(graph: fx.GraphModule, seed: int) -> int:
        found.append((len(graph.graph.nodes), -seed))
        return max(found)[0]

    with evaluation_mode(model):  # restores every module's own mode afterwards
        model.train()
        each_way(model, images_shape, tell)
    seed_all(-max(found)[1], chance_of(model).generators)
    return len(found)


def fullest_graph(model: nn.Module, images_shape: tuple[int, ...]) -> fx.GraphModule:
    """The training graph, of the way with the most calls where random numbers decide.

    Raises:
        UnsupportedModelError: the model cannot be traced.
    """
    with random_state_kept(model, []), evaluation_mode(model):
        model.train()
        graph = symbolic_graph(model, images_shape)
        if graph.meta["draws"]:
            take_fullest_way(model, images_shape)
            graph = symbolic_graph(model, images_shape)
    return graph
