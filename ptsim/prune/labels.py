"""What does a channel label look like, and what do all labels of a network say together?

Every activation carries a *label*: an int64 tensor of the activation's rank, 1 long in every axis along which the
channel does not change. A label ≥ 0 is a *slot*, one position of one axis of one parameter or buffer; slots that must
be kept or removed together are recorded as pairs. A label < 0 marks a position that has to stay, −1 − index into
`reasons`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ptsim.prune.numbers import Number

ENDS = ("it is the network's input", "it is the network's output")  # why the channels of images and classes stay
WIDTH = "width"  # stands for a tensor of a normalisation that has none
UNKNOWN = -(2**40)  # the label of an axis that an earlier network did not have
Mode: TypeAlias = Literal["train", "eval"]
AxisKey: TypeAlias = tuple[str, int]  # tensor's qualified name, dimension
NO_SLOTS = torch.empty(0, dtype=torch.int64)
NO_PAIRS = torch.empty((2, 0), dtype=torch.int64)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
INSTANCE_NORMS = (nn.modules.instancenorm._InstanceNorm,)
POOLS = tuple(
    getattr(nn.modules.pooling, name)
    for name in ("_MaxPoolNd", "_AvgPoolNd", "_AdaptiveAvgPoolNd", "_AdaptiveMaxPoolNd", "_LPPoolNd")
)


@dataclasses.dataclass
class Facets:
    """A parameter or buffer used directly: one label per axis longer than 1; the operator decides which one counts."""

    labels: list[Tensor]


Label: TypeAlias = "Tensor | Facets | tuple[Any, ...] | None"


@dataclasses.dataclass(frozen=True)
class Weighted:
    """A convolution or linear layer: where its weight is and the slots of its input and output channels.

    `inputs` has one slot per input channel; for a grouped convolution they belong to no axis of the weight alone.
    `trained` is False for a fixed filter in a buffer and for a frozen parameter beside others that are trained.
    """

    layer: str
    weight: str
    groups: int
    depthwise: bool
    transposed: bool
    inputs: Tensor
    outputs: Tensor
    nodes: tuple[str, ...]
    trained: bool = True

    @property
    def decides(self) -> bool:
        """True if its weights say which channels are sparse: depthwise and fixed filters follow their neighbours."""
        return self.trained and not self.depthwise

    @property
    def grouped(self) -> bool:
        """True if its channels lie in groups that stay equal; those of a depthwise one are removed one by one."""
        return self.groups > 1 and not self.depthwise


def tensor_names(model: nn.Module) -> dict[int, str]:
    """Id of every parameter and buffer → its (first) qualified name."""
    names: dict[int, str] = {}
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        names.setdefault(id(tensor), name)
    return names


class State:
    """What all graphs of one model have said so far: slots per axis, pairs, freezes and weighted layers.

    With `seed` (the component of every position of every axis of an earlier, larger model) nothing is learnt; instead
    every pair whose components differ is collected in `misaligned`: the smaller model would mix up channels.

    `touched` are tensors, by name, whose channels stay because of hooks, and the reason.
    `watched` are labels of what a hooked layer takes and gives, which stay if `hooks_meet`: if a hook that changes
    something computes with what another one has left.

    While `aside`, what is called is not used: what its operands share has to fit together, nothing has to stay.

    `moves` has what operators give that take apart or rearrange by number, by mode and node: what follows may treat the
    parts unlike.
    """

    def __init__(self, model: nn.Module, seed: Mapping[AxisKey, Tensor] | None = None) -> None:
        self.names = tensor_names(model)
        self.tensors: dict[str, Tensor] = dict(model.named_parameters())
        self.own = [*model.parameters(), *model.buffers()]
        self.modules = dict(model.named_modules())
        self.trains = any(parameter.requires_grad for parameter in model.parameters())
        self.regrouped = {  # weights of convolutions whose number of groups is an attribute that can change
            self.names[id(module._parameters["weight"])]
            for module in model.modules()
            if isinstance(module, CONVS) and module.groups > 1 and module._parameters.get("weight") is not None
        }
        self.seed = seed
        self.axes: dict[AxisKey, Tensor] = {}
        self.num_slots = 0
        self.pairs: list[Tensor] = []
        self.frozen: list[tuple[Tensor, int]] = []
        self.reasons: list[str] = []
        self.layers: dict[str, Weighted] = {}
        self.sensitive_slots: list[Tensor] = []
        self.folds: list[Tensor] = []
        self.numbers: list[tuple[Number, Tensor]] = []
        self.moves: dict[tuple[str, str], tuple[Tensor, ...]] = {}
        self.touched: dict[str, str] = {}
        self.watched: list[Tensor] = []
        self.hooks_meet = False
        self.aside = False

    def note(self, touched: Iterable[int], foreign: bool, place: str) -> None:
        """Hooks of what is called `place` write into tensors, or by their values; and with foreign ones, perhaps."""
        for key in touched:
            self.touched.setdefault(
                self.names[key], f"a hook of {place} writes into {self.names[key]} or by its values"
            )
        self.hooks_meet |= foreign

    def freeze_touched(self) -> None:
        """Once all graphs are followed: what hooks write into stays, and what they hand to each other."""
        for (name, _), slots in self.axes.items():
            if name in self.touched:
                self.freeze(slots, self.touched[name])
        for label in self.watched if self.hooks_meet else ():
            self.freeze(label, "a hook changes something by what another one has left")

    def axis(self, name: str, dim: int, size: int) -> Tensor:
        """The slots of one axis (dim −1: the input channels of a grouped convolution), made at the first call."""
        key = (name, dim)
        if key not in self.axes:
            if self.seed is not None:
                self.axes[key] = self.seed[key] if key in self.seed else torch.full((size,), UNKNOWN)
            else:
                self.axes[key] = torch.arange(self.num_slots, self.num_slots + size)
                self.num_slots += size
        return self.axes[key]

    def bind(self, tensor: Tensor | None, slots: Tensor) -> None:
        """A vector (bias, BatchNorm's) has one entry per channel."""
        if tensor is None:
            return
        name = self.names.get(id(tensor))
        assert name is not None, "a parameter of a module of the model"
        self.unite(self.axis(name, 0, tensor.shape[0]), slots)

    def weighted(
        self,
        layer: str,
        weight: Tensor,
        groups: int,
        inputs: Tensor,
        outputs: Tensor,
        node: str,
        *,
        transposed: bool = False,
    ) -> None:
        """Record a convolution or linear layer, once per weight; what a weight that never changes reads has to stay.

        The outputs of a fixed filter may go once nothing reads them. A frozen parameter keeps its outputs as well. In a
        network without a single trainable parameter none is called frozen: it is pruned as its weights are.
        """
        name = self.names[id(weight)]
        known = self.layers.get(name)
        nodes = (*known.nodes, node) if known is not None and node not in known.nodes else (node,)
        layer = known.layer if known is not None else layer
        depthwise = groups > 1 and groups == len(inputs)
        trained = isinstance(weight, nn.Parameter) and (weight.requires_grad or not self.trains)
        if not trained and not depthwise:
            if isinstance(weight, nn.Parameter):
                self.freeze(torch.cat([inputs, outputs]), f"{layer} is frozen: its weights are not trained")
            else:
                self.freeze(inputs, f"{layer} reads them with a fixed filter")
        self.layers[name] = Weighted(layer, name, groups, depthwise, transposed, inputs, outputs, nodes, trained)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Positions that meet are one channel; a position that stays freezes the other one."""
        if self.aside and self.seed is not None:
            return
        a, b = broadcast(a, b)
        a, b = a.flatten(), b.flatten()
        known = (a != UNKNOWN) & (b != UNKNOWN)
        a, b = a[known], b[known]
        both = (a >= 0) & (b >= 0)
        self.pairs.append(torch.stack([a[both], b[both]]))
        for slots, other in ((a, b), (b, a)):
            stays = (slots >= 0) & (other < 0)
            if bool(stays.any()) and not self.aside:
                for code in distinct(other[stays]).tolist():
                    self.frozen.append((slots[stays & (other == code)], -1 - int(code)))

    def freeze(self, label: Tensor, reason: str) -> None:
        """These channels have to stay."""
        slots = label.flatten()
        slots = slots[slots >= 0]
        if len(slots) and not self.aside:
            self.frozen.append((slots, self._reason(reason)))

    def stays(self, value: Tensor, reason: str) -> Tensor:
        """The label of a tensor of which nothing can be removed."""
        return self.reason_label(reason).view([1] * value.ndim)

    def opaque(self, x: Tensor, value: Tensor, reason: str) -> Tensor:
        """Freeze what flows in; nothing of what flows out can be removed."""
        self.freeze(x, reason)
        return self.stays(value, reason)

    def reason_label(self, reason: str) -> Tensor:
        """The negative label that stands for `reason`."""
        return torch.tensor(-1 - self._reason(reason))

    def sensitive(self, label: Tensor) -> None:
        """These channels pass an operator whose result depends on how many they are."""
        if label.numel() > 1 and not self.aside:
            slots = label.flatten()
            self.sensitive_slots.append(distinct(slots[slots >= 0]))

    def number(self, number: Any, rows: Tensor) -> None:
        """An attribute of the model says how many rows of channels there are, (rows, channels that go in one row).

        A number of something else (the size of the parts of an uneven split, the end of a slice beyond the last
        channel) does not follow them.
        """
        if isinstance(number, Number) and self.seed is None and len(rows) == abs(int(number)):
            self.numbers.append((number, rows.flatten(1) if rows.ndim > 1 else rows[:, None]))
            self.sensitive(rows)

    def fold(self, before: Tensor, after: Label, groups: int | None) -> None:
        """Note how an operator folds one axis of channels into several, or cuts it into equal parts.

        If channels go in step (all with one index along one of the folded axes), the operator's result stays in order.
        """
        size = before.numel()
        folded: Tensor | None = None
        if size < 2 or max(before.shape) < size or bool((before < 0).any()):
            return
        if groups is not None and size % groups == 0:
            folded = before.reshape(groups, -1)
        elif isinstance(after, Tensor) and after.numel():
            folded = after.reshape([n for n in after.shape if n > 1])
            if folded.ndim < 2 and size % max(1, after.numel()) == 0:  # a slice
                folded = before.reshape(-1, max(1, after.numel()))
        elif isinstance(after, tuple):
            parts = [part.flatten() for part in after if isinstance(part, Tensor)]
            if len({len(part) for part in parts}) == 1:
                folded = torch.stack(parts)
        if folded is not None and folded.ndim > 1 and min(folded.shape) > 1 and bool((folded >= 0).all()):
            self.folds.append(folded)

    def learnt(self) -> tuple[int, ...]:
        """How much is known: counts of slots, components, those that stay, those to try out, and layers.

        A further graph that tells nothing new leaves all of them as they are.
        """
        component_of = connected(self.pairs, self.num_slots)
        stay, tried = (
            len(distinct(component_of[torch.cat([NO_SLOTS, *found])]))
            for found in ([slots for slots, _ in self.frozen], self.sensitive_slots)
        )
        components = int(component_of.max()) + 1 if self.num_slots else 0
        return self.num_slots, components, stay, tried, len(self.layers)

    @property
    def misaligned(self) -> Tensor:
        """Components that would be mixed up (with `seed`)."""
        bad = [pair[:, pair[0] != pair[1]].flatten() for pair in self.pairs]
        bad += [slots for slots, _ in self.frozen]
        return distinct(torch.cat(bad)) if bad else torch.empty(0, dtype=torch.int64)

    def _reason(self, reason: str) -> int:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return self.reasons.index(reason)


def broadcast(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both at their common shape."""
    shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call] # torch's gap
    return a.expand(shape), b.expand(shape)


def distinct(slots: Tensor) -> Tensor:
    """Every value once, ascending."""
    distinct: Tensor = torch.unique(slots)
    return distinct


def connected(pairs: Sequence[Tensor], count: int) -> Tensor:
    """Which connected part each of `count` nodes is in; parts are numbered as their first nodes come.

    Every node takes the lowest number among its neighbours' and its own, again and again; a part that is a long chain
    takes few rounds, because a node's number is itself a node, whose number counts too.

    Args:
        pairs: neighbours, as tensors of two rows.
        count: number of nodes.
    """
    lowest = torch.arange(count)
    first, second = torch.cat([NO_PAIRS, *pairs], dim=1)
    while True:
        low = torch.minimum(lowest[first], lowest[second])
        found = lowest.scatter_reduce(0, lowest[first], low, "amin").scatter_reduce(0, lowest[second], low, "amin")
        found = found[found]
        if torch.equal(found, lowest):
            numbered: Tensor = torch.unique(lowest, return_inverse=True)[1]
            return numbered
        lowest = found


def along(slots: Tensor, dim: int, rank: int) -> Tensor:
    """A vector as a label of `rank` that changes along `dim`."""
    shape = [1] * rank
    shape[dim] = len(slots)
    return slots.view(shape)


def compress(label: Tensor) -> Tensor:
    """The label 1 long in every axis along which it does not change."""
    for dim in range(label.ndim):
        if label.shape[dim] > 1:
            first = label.narrow(dim, 0, 1)
            if label.stride(dim) == 0 or bool((label == first).all()):
                label = first
    return label
