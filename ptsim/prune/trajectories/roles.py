"""Where does a layer stand in a network: its role and its relative depth? From the network as data alone."""

from __future__ import annotations

from ptsim.network import LayerKind, Network
from ptsim.operators import SCALED_SUMS, SUMS

ROLES = ("stem", "stream", "branch", "plain")
_WEIGHTED = (LayerKind.CONV, LayerKind.LINEAR)


def roles(network: Network) -> dict[str, tuple[str, float]]:
    """Role and relative depth (0 to 1) of every convolution and linear layer, by name.

    "stream": its output meets others at a sum (short-cuts share these channels); "stem": the first layer, where no sum
    follows directly; "branch": another layer of a network with sums; "plain": of one without.
    """
    layers = {layer.name: layer for layer in network.layers}
    following: dict[str, list[str]] = {}
    for source, target in network.edges:
        following.setdefault(source, []).append(target)
    weighted = [layer.name for layer in network.layers if layer.kind in _WEIGHTED]
    has_sums = any(_is_sum(layers[name].kind, layers[name].op, layers[name].input_shapes) for name in layers)

    def meets_a_sum(name: str) -> bool:
        waiting, seen = list(following.get(name, ())), set()
        while waiting:
            at = waiting.pop()
            layer = layers[at]
            if at in seen or layer.kind in _WEIGHTED:
                continue
            seen.add(at)
            if _is_sum(layer.kind, layer.op, layer.input_shapes):
                return True
            waiting += following.get(at, ())
        return False

    last = max(len(weighted) - 1, 1)
    found = {}
    for index, name in enumerate(weighted):
        if meets_a_sum(name) and index:
            role = "stream"
        elif index == 0:
            role = "stem"
        else:
            role = "branch" if has_sums else "plain"
        found[name] = role, index / last
    return found


def _is_sum(kind: LayerKind, op: str, inputs: tuple[tuple[int, ...], ...]) -> bool:
    return kind is LayerKind.ELEMENTWISE and op in SUMS | SCALED_SUMS and len(inputs) > 1
