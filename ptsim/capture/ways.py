"""Which ways does a model's code take where random numbers decide, and which of them is described?

Stochastic depth is often written so: `if torch.rand(1) < p: continue`. torch.fx sees only the way that is
taken while it traces, so such code is traced again and again, each time with other numbers.
"""

from __future__ import annotations

import warnings

from torch import fx, nn

from ptsim.capture.chance import chance_of, random_state_kept, seed_all
from ptsim.capture.graph import evaluation_mode, symbolic_graph

_MOST_TRACES, _FRUITLESS_TRACES = 64, 32  # of code that lets random numbers decide


def take_fullest_way(model: nn.Module, images_shape: tuple[int, ...]) -> None:
    """Seed the generators of the CPU so that training goes the way with the most calls: nothing is skipped, perhaps.

    Of the ways that are met until several traces in a row go no new one. A warning says so where there are several.
    The model is left as it was, but for generators of its own.

    Raises:
        UnsupportedModelError: the model cannot be traced.
    """
    own = chance_of(model).generators
    found: dict[str, tuple[int, int]] = {}  # code → calls, and the first seed that leads to it
    fruitless = 0
    with evaluation_mode(model):  # restores every module's own mode afterwards
        model.train()
        for seed in range(_MOST_TRACES):
            seed_all(seed, own)
            traced = symbolic_graph(model, images_shape, generators=own)
            fruitless = fruitless + 1 if traced.code in found else 0
            found.setdefault(traced.code, (len(traced.graph.nodes), seed))
            if not traced.meta["draws"] or fruitless == _FRUITLESS_TRACES:
                break
    if len(found) > 1:
        warnings.warn(
            f"random numbers decide what {type(model).__name__} computes in a training step: of the {len(found)} ways "
            "that were met, the one with the most operations is described",
            stacklevel=4,
        )
    seed_all(max(found.values(), key=lambda way: (way[0], -way[1]))[1], own)


def fullest_graph(model: nn.Module, images_shape: tuple[int, ...]) -> fx.GraphModule:
    """The training graph, of the way with the most calls where random numbers decide.

    Raises:
        UnsupportedModelError: the model cannot be traced.
    """
    own = chance_of(model).generators
    with random_state_kept([], own), evaluation_mode(model):
        model.train()
        graph = symbolic_graph(model, images_shape, generators=own)
        if graph.meta["draws"]:
            take_fullest_way(model, images_shape)
            graph = symbolic_graph(model, images_shape, generators=own)
    return graph
