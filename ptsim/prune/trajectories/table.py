"""What does a network cost at given edge widths? FLOPs and BatchNorm traffic as products of widths, without a capture.

A convolution's work is proportional to its input times its output channels, a BatchNorm's to its channels; a branch
whose inner edge is empty costs nothing. Grouped convolutions and products without weights are approximated; the plan
is checked against the real networks afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ptsim.costs.flops import inference_macs, layer_macs, training_macs
from ptsim.costs.kernels import BATCH_NORM_BACKWARD, BATCH_NORM_FORWARD
from ptsim.costs.traffic import batch_norm_bytes
from ptsim.network import LayerKind, Network

if TYPE_CHECKING:
    from ptsim.prune.groups import ChannelGroups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """Fractions of dense that the products said, ascending to 1, and what the networks really had."""

    said: tuple[float, ...]
    true: tuple[float, ...]

    def of(self, fractions: np.ndarray) -> np.ndarray:
        """What networks of which the products say `fractions` have; below the smallest seen in proportion to it."""
        found = np.interp(fractions, self.said, self.true)
        below = fractions < self.said[0]
        if self.said[0] > 0:
            found[below] = fractions[below] * self.true[0] / self.said[0]
        return np.asarray(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostTable:
    """Costs as functions of widths; every array has a row per layer and a column per edge.

    Attributes:
        inputs, outputs: share of a layer's input and output channels that an edge holds.
        fixed_inputs, fixed_outputs: share that no edge holds: it cannot be pruned.
        product: whether the layer's work grows with its inputs too.
        dead_with: the layer goes once one of these edges is empty.
        inference, training: MACs of one image, per layer; bn: accesses to BatchNorm's elements.
        full: dense widths.
        seen: what real networks had where the products said otherwise, for each of the three costs.
    """

    inputs: np.ndarray
    outputs: np.ndarray
    fixed_inputs: np.ndarray
    fixed_outputs: np.ndarray
    product: np.ndarray
    dead_with: np.ndarray
    inference: np.ndarray
    training: np.ndarray
    bn: np.ndarray
    full: np.ndarray
    seen: tuple[Seen | None, Seen | None, Seen | None] = (None, None, None)

    def fractions(self, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inference FLOPs, training FLOPs and BatchNorm traffic per image, of dense, for rows of widths."""
        kept = np.atleast_2d(widths) / self.full
        outputs = kept @ self.outputs.T + self.fixed_outputs
        inputs = kept @ self.inputs.T + self.fixed_inputs
        scale = outputs * np.where(self.product, inputs, 1.0)
        if not kept.all():
            scale[(kept == 0).astype(float) @ self.dead_with.T > 0] = 0.0
        raw = (
            (scale @ part) / part.sum() if part.sum() else np.ones(len(kept))
            for part in (self.inference, self.training, self.bn)
        )
        inference, training, bn = (
            found if seen is None else seen.of(found) for found, seen in zip(raw, self.seen, strict=True)
        )
        return inference, training, bn

    def corrected(self, widths: np.ndarray, dense: Network, pruned: Sequence[Network]) -> CostTable:
        """The table that agrees with the networks that rows of `widths` really gave, with straight lines between."""
        said = dataclasses.replace(self, seen=(None, None, None)).fractions(widths)
        costs: tuple[Callable[[Network], int], ...] = (
            inference_macs,
            training_macs,
            lambda network: batch_norm_bytes(network, 4),
        )
        seen = []
        for row, cost in zip(said, costs, strict=True):
            whole = cost(dense)
            true = np.array([cost(network) / whole for network in pruned]) if whole else row
            order = np.argsort(row)
            seen.append(Seen(said=(*row[order], 1.0), true=(*true[order], 1.0)))
        return dataclasses.replace(self, seen=(seen[0], seen[1], seen[2]))

    @functools.cached_property
    def intensity(self) -> np.ndarray:
        """BatchNorm traffic per FLOP of an edge's channels, relative to the network's: how memory-bound it is."""
        macs = self.training @ self.outputs + (self.training * self.product) @ self.inputs
        traffic = self.bn @ self.outputs
        known = (macs > 0) & (traffic > 0)
        ratio = np.ones(len(self.full))
        ratio[known] = traffic[known] / macs[known]
        typical = np.exp(np.mean(np.log(ratio[known]))) if known.any() else 1.0
        ratio[known] /= typical
        ratio[~known] = 1.0
        return ratio


def cost_table(
    network: Network, groups: ChannelGroups, edge_of: np.ndarray, dies_with: dict[str, list[int]], full: np.ndarray
) -> CostTable:
    """The table of a dense network.

    Args:
        network: as captured.
        groups: its channel groups.
        edge_of: the edge of every component, −1 for those that stay.
        dies_with: layer → edges whose emptiness removes it.
        full: the dense width of every edge.
    """
    from ptsim.prune.labels import WIDTH

    weighted = {layer.layer: layer for layer in groups.layers}
    rows = [layer for layer in network.layers if layer.kind in (LayerKind.CONV, LayerKind.LINEAR, LayerKind.BATCH_NORM)]
    others = [layer for layer in network.layers if layer.kind is LayerKind.MATMUL]
    count, edges = len(rows) + len(others), len(full)
    inputs, outputs, dead = (np.zeros((count, edges)) for _ in range(3))
    fixed_inputs, fixed_outputs = np.ones(count), np.ones(count)
    product = np.zeros(count, dtype=bool)
    inference, training, bn = (np.zeros(count) for _ in range(3))

    def shares(components: np.ndarray) -> tuple[np.ndarray, float]:
        held = edge_of[components]
        counts = np.bincount(held[held >= 0], minlength=edges) / len(components)
        return counts, float((held < 0).mean())

    for i, layer in enumerate((*rows, *others)):
        path = layer.name.partition(":")[0]
        if layer.kind is LayerKind.BATCH_NORM:
            keys = (f"{path}.{name}" for name in ("weight", "bias", "running_mean", WIDTH))
            axis = next((groups.axes[(key, 0)] for key in keys if (key, 0) in groups.axes), None)
            if axis is not None:
                outputs[i], fixed_outputs[i] = shares(axis.numpy())
            bn[i] = (BATCH_NORM_FORWARD + BATCH_NORM_BACKWARD) * layer.output_elements
        elif path in weighted:
            found = weighted[path]
            outputs[i], fixed_outputs[i] = shares(found.outputs.numpy())
            product[i] = not found.depthwise
            if product[i]:
                inputs[i], fixed_inputs[i] = shares(found.inputs.numpy())
        macs = layer_macs(layer)
        training[i] = macs.training
        inference[i] = 0 if layer.training_only else macs.forward
        dead[i, dies_with.get(path, [])] = 1.0
    return CostTable(
        inputs=inputs,
        outputs=outputs,
        fixed_inputs=fixed_inputs,
        fixed_outputs=fixed_outputs,
        product=product,
        dead_with=dead,
        inference=inference,
        training=training,
        bn=bn,
        full=full.astype(float),
    )
