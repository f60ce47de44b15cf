"""Which channels of a network have to go together, and which cannot go at all?

A *component* is the smallest unit that can be removed: the same channel in every producer, every consumer and every
tensor between them. It is found by propagating channel labels through the torch.fx graph (`propagate.py`), so there is
no table of layer names. Components are numbered from 0; nothing here holds a reference to the model's tensors.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx, nn

from ptsim.capture.chance import random_state_kept
from ptsim.capture.copies import copied
from ptsim.capture.graph import example_input, naming_the_image, note_tracer
from ptsim.errors import UnsupportedModelError, lacks_memory
from ptsim.prune.alignment import SHAPE_ERRORS, settled
from ptsim.prune.cut import Cut
from ptsim.prune.hooks import hooks_carried
from ptsim.prune.labels import ENDS, AxisKey, State, Weighted, compress, connected, distinct
from ptsim.prune.numbers import Number, solved
from ptsim.prune.propagate import Graphs, propagate, skeleton
from ptsim.prune.steps import may_count

NO_DECISION = "no convolution or linear layer with weights of its own decides about it"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edge:
    """Channels with the same producers and consumers, as people see a network: the width of one edge.

    `width` counts the output channels of the layer that writes most of them; inputs where no layer writes them.

    `members` are "layer (out)" and "layer (in)"; `reason` says why the edge cannot be pruned, None if it can.
    """

    name: str
    width: int
    members: tuple[str, ...]
    components: tuple[int, ...]
    reason: str | None

    @property
    def prunable(self) -> bool:
        """True if its channels can be removed."""
        return self.reason is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelGroups:
    """The channel components of one network; made by `find_groups`, stale once the network changes.

    Attributes:
        axes: component of every position of every channel axis, by (tensor name, dimension); dimension −1 stands for
            the input channels of a grouped convolution, which no single axis of its weight holds.
        layers: convolutions and linear layers with the component of each input and output channel.
        prunable: per component.
        reasons: text; `reason_of` holds an index into it per component, −1 where the component is prunable.
        sensitive: per component: passes an operator (reshape, chunk, …) whose meaning depends on the channel count;
            `sensitive_sets` are the components that pass one of them together.
        folds: components as an operator folds them (`State.fold`).
        parts: `axes` before channels were tied to each other so that a fold stays in order.
        part_of: component of every part.
        numbers: those that attributes of the model's code hold, with the rows of components that each counts; −1 stands
            for a channel that stays.
        moves: the parts in what every operator gives that takes apart or rearranges by number; −1 for those that stay.
    """

    input_shape: tuple[int, int, int]
    axes: dict[AxisKey, Tensor]
    layers: tuple[Weighted, ...]
    prunable: Tensor
    reasons: tuple[str, ...]
    reason_of: Tensor
    sensitive: Tensor
    sensitive_sets: tuple[Tensor, ...]
    folds: tuple[Tensor, ...]
    parts: dict[AxisKey, Tensor]
    part_of: Tensor
    numbers: tuple[tuple[Number, Tensor], ...]
    moves: dict[tuple[str, str], tuple[Tensor, ...]]
    graphs: Graphs = dataclasses.field(repr=False)
    shapes_only: bool = True

    @property
    def graph(self) -> fx.GraphModule:
        """As training runs it."""
        return self.graphs["train"]

    @property
    def num_components(self) -> int:
        """Components, prunable or not."""
        return len(self.prunable)

    def penalised(self) -> Iterable[tuple[Weighted, bool, bool]]:
        """(layer, penalise inputs, penalise outputs) for the group lasso (docs/method.md §1).

        An axis counts if at least one of its channels can be removed: this leaves out the inputs of the first
        convolution, the outputs of the last linear layer and axes that cannot be pruned. Depthwise layers and weights
        that are not trained are left out.
        """
        for layer in self.layers:
            if layer.decides:
                inputs, outputs = (bool(self.prunable[axis].any()) for axis in (layer.inputs, layer.outputs))
                if inputs or outputs:
                    yield layer, inputs, outputs

    def main_reason(self) -> str | None:
        """Why most refused components stay, those of images and classes left out; None if there are no others."""
        counts = collections.Counter(self.reasons[index] for index in self.reason_of.tolist() if index >= 0)
        return next((reason for reason, _ in counts.most_common() if reason not in ENDS), None)

    def rehearsal_copy(self, model: nn.Module) -> nn.Module:
        """A copy of the model to try an operation on: without storage where its operators allow it."""
        with hooks_carried(model):
            return skeleton(model) if self.shapes_only else copied(model)

    def edges(self) -> tuple[Edge, ...]:
        """The components bundled by equal producers and consumers, in the order of the network."""
        members = [
            (f"{layer.layer} ({role})", distinct(axis))
            for layer in self.layers
            for axis, role in ((layer.outputs, "out"), (layer.inputs, "in"))
        ]
        reasons, bundle = torch.unique(self.reason_of, return_inverse=True)
        count = len(reasons)
        for _, components in members:  # those of a bundle that are touched part from those that are not
            touched, place = torch.unique(bundle[components], return_inverse=True)
            bundle[components] = count + place
            count += len(touched)
        names: dict[int, list[str]] = {}
        for member, components in members:
            for which in distinct(bundle[components]).tolist():
                names.setdefault(which, []).append(member)
        widths = self.channel_counts()
        found, sizes = torch.unique(bundle, return_counts=True)
        order: Sequence[Tensor] = torch.argsort(bundle, stable=True).split(sizes.tolist())  # type: ignore[no-untyped-call] # torch's gap
        parts = zip(found.tolist(), order, strict=True)
        return tuple(
            self._edge(names[which], components, int(widths[components].sum()))
            for which, components in sorted(parts, key=lambda part: int(part[1][0]))
            if which in names
        )

    def _edge(self, members: list[str], components: Tensor, width: int) -> Edge:
        reason = int(self.reason_of[components[0]])
        return Edge(
            name=next((m.removesuffix(" (out)") for m in members if m.endswith("(out)")), members[0]),
            width=width,
            members=tuple(members),
            components=tuple(components.tolist()),
            reason=None if reason < 0 else self.reasons[reason],
        )

    def channel_counts(self) -> Tensor:
        """Channels that each component stands for: those written; where no layer writes it, those read.

        A flattened image is read in many places.
        """
        written, read = (torch.zeros(self.num_components, dtype=torch.int64) for _ in range(2))
        for layer in self.layers:
            written = torch.maximum(written, torch.bincount(layer.outputs, minlength=self.num_components))
            read = torch.maximum(read, torch.bincount(layer.inputs, minlength=self.num_components))
        return torch.where(written > 0, written, read)

    def cut_for(self, removed: Tensor) -> Cut:
        """What to keep of every axis once the components of the mask `removed` are gone."""
        keep = {}
        for (name, dim), components in self.axes.items():
            if dim >= 0:
                gone = removed[components]
                if bool(gone.any()):
                    keep[(name, dim)] = torch.nonzero(~gone).flatten()
        for layer in self.layers:
            if layer.groups > 1 and bool(removed[layer.inputs].any()):
                inside = _inputs_kept(removed[layer.inputs].view(layer.groups, -1))
                if inside is not None:
                    rows = len(layer.outputs) // layer.groups
                    keep[(layer.weight, -1)] = inside.repeat_interleave(rows, 0)
        left = [(number, int((~_gone(removed, rows)).sum())) for number, rows in self.numbers]
        return Cut(keep, solved((number, count if int(number) >= 0 else -count) for number, count in left))

    @property
    def num_channels(self) -> tuple[int, int]:
        """Channels that can be removed and channels that cannot: the widths of the edges."""
        widths = self.channel_counts()
        return int(widths[self.prunable].sum()), int(widths[~self.prunable].sum())


def find_groups(model: nn.Module, input_shape: tuple[int, int, int]) -> ChannelGroups:
    """The channel components of `model` for images of `input_shape` (C, H, W).

    Runs on shapes only (meta tensors) wherever the model's operators allow it; the model itself is not touched.

    Raises:
        UnsupportedModelError: neither torch.fx nor torch.export can trace it, or its forward fails on such an image.
    """
    return settled(*labelled(model, input_shape))


def labelled(model: nn.Module, input_shape: tuple[int, int, int]) -> tuple[nn.Module, ChannelGroups]:
    """The copy of the model that was looked at and its components, before `settled` tries out what reshapes mix up.

    Raises:
        UnsupportedModelError: see `find_groups`.
    """
    try:
        with hooks_carried(model):
            bones = skeleton(model)
    except UnsupportedModelError:
        raise
    except Exception as error:  # a deep copy runs code of the model's parts
        if lacks_memory(error):
            raise
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied: {' '.join(str(error).split())}"
        ) from error
    shapes_only = True
    try:
        state, graphs = propagate(bones, input_shape)
    except UnsupportedModelError:
        raise
    except Exception:  # meta tensors do not support every operator, or the model does not run on such an image
        with hooks_carried(model):
            bones, shapes_only = copied(model), False
        with naming_the_image(model, input_shape), torch.no_grad(), random_state_kept(model):
            bones.eval()(example_input(bones, input_shape))
            state, graphs = propagate(bones.train(model.training), input_shape)
    note_tracer(type(model).__name__, graphs["train"])
    groups = dataclasses.replace(_assemble(state, input_shape, graphs), shapes_only=shapes_only)
    if may_count(bones, groups.graphs):
        layers = [torch.unique(layer.outputs) for layer in groups.layers]
        groups = dataclasses.replace(
            groups, sensitive=torch.ones_like(groups.sensitive), sensitive_sets=(*groups.sensitive_sets, *layers)
        )
    return bones, groups


def _gone(removed: Tensor, rows: Tensor) -> Tensor:
    """Which rows of components, (rows, components of a row), are gone as a whole."""
    return (removed[rows.clamp(min=0)] & (rows >= 0)).all(1)


def _inputs_kept(gone: Tensor) -> Tensor | None:
    """Of (groups, inputs of a group) the kept inputs of every group; None if only whole groups go."""
    left = ~gone.all(1)
    if not bool(gone[left].any()) and bool(left.any()):
        return None
    number = int((~gone).sum(1).max())
    order = torch.argsort(gone.to(torch.int8), dim=1, stable=True)  # the kept ones first
    return order[:, :number].sort(1).values


def axes_for(model: nn.Module, input_shape: tuple[int, int, int]) -> dict[AxisKey, Tensor]:
    """The components of every axis as images of `input_shape` would find them; empty if the model cannot take them."""
    try:
        with hooks_carried(model):
            bones = skeleton(model)
        state, graphs = propagate(bones, input_shape)
    except SHAPE_ERRORS:
        return {}
    return _assemble(state, input_shape, graphs).axes


def _assemble(state: State, input_shape: tuple[int, int, int], graphs: Graphs) -> ChannelGroups:
    count = state.num_slots
    component_of = connected(state.pairs, count)
    num_components = int(component_of.max()) + 1 if count else 0

    axes = {key: component_of[slots] for key, slots in state.axes.items()}
    layers = tuple(
        dataclasses.replace(layer, inputs=component_of[layer.inputs], outputs=component_of[layer.outputs])
        for layer in state.layers.values()
    )
    reason_of = torch.full((num_components,), -1)
    for slots, reason in reversed(state.frozen):  # the first reason in the network's order wins
        reason_of[component_of[slots]] = reason
    weighted = torch.zeros(num_components, dtype=torch.bool)
    for layer in layers:
        if layer.decides:
            weighted[layer.inputs] = True
            weighted[layer.outputs] = True
    reasons = [*state.reasons, NO_DECISION]
    reason_of[(reason_of < 0) & ~weighted] = len(reasons) - 1
    sensitive = torch.zeros(num_components, dtype=torch.bool)
    sensitive_sets = tuple(component_of[slots] for slots in state.sensitive_slots)
    for members in sensitive_sets:
        sensitive[members] = True
    return ChannelGroups(
        input_shape=input_shape,
        axes=axes,
        layers=layers,
        prunable=reason_of < 0,
        reasons=tuple(reasons),
        reason_of=reason_of,
        sensitive=sensitive,
        sensitive_sets=sensitive_sets,
        folds=tuple(component_of[slots] for slots in state.folds),
        numbers=tuple(
            (number, torch.where(rows >= 0, component_of[rows.clamp(min=0)], -1)) for number, rows in state.numbers
        ),
        moves={
            key: tuple(compress(torch.where(label >= 0, component_of[label.clamp(min=0)], -1)) for label in labels)
            for key, labels in state.moves.items()
        },
        parts=axes,
        part_of=torch.arange(num_components),
        graphs=graphs,
    )


def weight_GOIK(weight: Tensor, layer: Weighted) -> Tensor:  # noqa: N802 - its name is its shape
    """The weight of a convolution or linear layer as (groups, out per group, in per group, kernel elements)."""
    W = weight.reshape(layer.groups, weight.shape[0] // layer.groups, weight.shape[1], -1)
    return W.transpose(1, 2) if layer.transposed else W  # of a transposed one the inputs come first


def component_maxima(model: nn.Module, groups: ChannelGroups) -> Tensor:
    """Largest |w| over all producers' outputs and all consumers' inputs, per component (on the CPU).

    Depthwise convolutions (docs/method.md §1) and fixed filters have no say. A weight that is not finite counts as
    infinite.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    maxima: Tensor | None = None
    for layer in groups.layers:
        if not layer.decides:
            continue
        W = weight_GOIK(parameters[layer.weight].detach().abs().nan_to_num(torch.inf), layer)
        if maxima is None:
            maxima = torch.zeros(groups.num_components, dtype=W.dtype, device=W.device)
        for axis, values in ((layer.inputs, W.amax((1, 3))), (layer.outputs, W.amax((2, 3)))):
            maxima.scatter_reduce_(0, axis.to(W.device), values.flatten().to(maxima.dtype), "amax")
    return torch.zeros(groups.num_components) if maxima is None else maxima.cpu()
