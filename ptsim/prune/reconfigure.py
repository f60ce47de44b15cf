"""When and how does the network shrink? PruneTrain's reconfiguration, in process (docs/method.md §2).

Decide which channels are sparse in every layer that touches them, take them out of the model, its optimizer and its
averaged copies, and remove residual branches that are left without an inner channel.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, fx, nn

from ptsim.capture.graph import example_input, output_tensors
from ptsim.errors import UsageError
from ptsim.prune.alignment import SHAPE_ERRORS, settled, tried_out
from ptsim.prune.cut import cut_model, cut_optimizer, unwrap
from ptsim.prune.density import THRESHOLD
from ptsim.prune.gating import Gate, apply_gate, find_gates
from ptsim.prune.groups import ChannelGroups, component_maxima, find_groups, labelled
from ptsim.prune.labels import BATCH_NORMS
from ptsim.prune.propagate import MODES, Graphs
from ptsim.prune.removal import Removal, collapsed_layers, find_removals, remove_branch
from ptsim.prune.selection import balanced, keep_one, round_up
from ptsim.prune.steps import same_calls, same_steps
from ptsim.units import some_of

COLLAPSED = (
    "the network has collapsed: its output hardly depends on the image any more, every weight of {} is below the "
    "threshold; train again with a lower penalty ratio"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surgery:
    """What one reconfiguration did.

    `channels_removed` counts output channels of convolutions and linear layers; `groups` are those of the network as it
    is now. `collapsed`: its output hardly depends on the image; the first of the `notes` says so.
    """

    changed: bool
    collapsed: bool
    channels_removed: int
    layers_removed: tuple[str, ...]
    notes: tuple[str, ...]
    groups: ChannelGroups
    removed: Tensor  # mask of the components that the network had before


@torch.no_grad()
def reconfigure(
    model: nn.Module,
    groups: ChannelGroups,
    *,
    threshold: float = THRESHOLD,
    optimizer: torch.optim.Optimizer | None = None,
    shadows: Sequence[nn.Module] = (),
    mode: Literal["union", "gating"] = "union",
    channel_multiple: int = 1,
    importance_of: Callable[[nn.Module, ChannelGroups], Tensor] = component_maxima,
) -> Surgery:
    """Remove every channel whose weights are below `threshold` in all its producers and all its consumers, in place.

    Parameters that shrink are replaced by new ones; the optimizer's groups and state follow. Channel counts are rounded
    up to `channel_multiple` by keeping dead channels. At least one channel of every layer stays, with a note.

    Args:
        model: the network itself, not a DistributedDataParallel around it.
        groups: its channel groups, from `find_groups` or the last `Surgery`.
        threshold: a channel is sparse if the largest |w| is strictly below.
        optimizer: whose state is carried over; any torch optimizer with per-element state.
        shadows: averaged copies of the model (`AveragedModel` or plain modules) that are cut alike.
        mode: how channels are handled where branches meet at a sum (docs/method.md §2.3).
        channel_multiple: 8 keeps tensor cores fed.
        importance_of: gives what is compared with the threshold, per component (a criterion's `importance`).

    Raises:
        UsageError: a threshold or multiple out of bounds.
    """
    _check(threshold, channel_multiple, mode)
    importance = importance_of(model, groups)
    sparse = groups.prunable & (importance < threshold)
    collapsed = collapsed_layers(model, groups, threshold)
    decision = _decide(model, groups, sparse, importance, channel_multiple)
    plan, after = decision.plan, decision.groups
    notes = [*decision.notes, *_held_by_groups(groups, sparse, importance, decision.plan.removed)]
    if collapsed:
        notes.insert(0, COLLAPSED.format(some_of(collapsed)))
    if plan.changes:
        operate(model, groups, plan, optimizer=optimizer, shadows=shadows)
    gates = find_gates(model, after, threshold, channel_multiple) if mode == "gating" else ()
    gated = _gated(decision.bones, after, gates) if gates else None
    if gated is not None:
        for gate in gates:
            _gate(model, gate, optimizer, shadows)
        notes.append(f"{len(gates)} layers read or write only their own channels of a residual stream")
        after = gated
    elif gates:
        notes.append("channel gating is left out: the code of the network needs its layers as they are")
    return Surgery(
        changed=plan.changes or gated is not None,
        collapsed=bool(collapsed),
        channels_removed=sum(int(plan.removed[layer.outputs].sum()) for layer in groups.layers),
        layers_removed=tuple(name for removal in plan.removals for name in weighted_layers(groups, removal)),
        notes=tuple(notes),
        groups=after,
        removed=plan.removed,
    )


def _held_by_groups(groups: ChannelGroups, sparse: Tensor, importance: Tensor, removed: Tensor) -> list[str]:
    """A note about sparse channels that stay because all groups of a convolution have to lose as many."""
    held = sparse & ~removed & ~balanced(groups, sparse, importance)
    names = [
        layer.layer
        for layer in groups.layers
        if layer.grouped and bool(held[torch.cat([layer.inputs, layer.outputs])].any())
    ]
    if not names:
        return []
    number = int(groups.channel_counts()[held].sum())
    why = "because every group of a convolution has to lose as many as the others"
    return [f"{number} sparse channels stay, {why}: {some_of(names)}"]


def _gated(bones: nn.Module, groups: ChannelGroups, gates: Sequence[Gate]) -> ChannelGroups | None:
    """The groups of a copy without storage once it is gated; None where its code then fails or calls something else."""
    for gate in gates:
        apply_gate(bones, gate)
    if not runs(bones, groups):
        return None
    try:
        gated = find_groups(bones, groups.input_shape)
    except SHAPE_ERRORS:
        return None
    changed = {path for gate in gates for path in (gate.layer, gate.norm) if path is not None}
    return gated if same_calls(groups.graphs, gated.graphs, changed) else None


def _gate(model: nn.Module, gate: Gate, optimizer: torch.optim.Optimizer | None, shadows: Sequence[nn.Module]) -> None:
    """Gate one layer of the model and its copies."""
    for shadow in map(unwrap, shadows):
        apply_gate(shadow, gate)
    replacements = apply_gate(model, gate)
    if optimizer is not None:
        cut_optimizer(optimizer, replacements)


@torch.no_grad()
def remove_channels(model: nn.Module, groups: ChannelGroups, sparse: Tensor) -> Decision:
    """What `reconfigure` does once it knows which components are sparse, in place; the model may have no storage.

    What is left is not looked at for a further reconfiguration, unless the decision is asked for its `groups`.

    Args:
        model: whose `groups` these are.
        groups: its channel groups.
        sparse: a mask of components; those that cannot be pruned stay.
    """
    importance = (~sparse).to(torch.float32)
    decision = _decide(model, groups, sparse & groups.prunable, importance, 1, further=False)
    if decision.plan.changes:
        operate(model, groups, decision.plan)
    return decision


@torch.no_grad()
def repeat_removal(
    model: nn.Module, groups: ChannelGroups, sparse: Tensor, removals: tuple[Removal, ...]
) -> tuple[Tensor, tuple[str, ...]]:
    """What `remove_channels` does to a copy of the same model with other channels, without its rehearsal.

    Args:
        model: whose `groups` these are.
        groups: its channel groups.
        sparse: a mask of components; none of those that `groups.sensitive` names, whose removal has to be tried out.
        removals: what a decision about an equal model was where `find_removals` finds the same branches.

    Returns:
        A mask of the components that are gone, and notes about layers that keep a channel.
    """
    plan, notes = _plan(groups, sparse & groups.prunable, (~sparse).to(torch.float32), 1, removals)
    if plan.changes:
        operate(model, groups, plan)
    return plan.removed, notes


def _check(threshold: float, channel_multiple: int, mode: str) -> None:
    if not threshold > 0:
        raise UsageError(f"the threshold is {threshold}; it has to be positive")
    if channel_multiple < 1:
        raise UsageError(f"the channel multiple is {channel_multiple}; it has to be at least 1")
    if mode not in ("union", "gating"):
        raise UsageError(f"unknown reconfiguration mode {mode!r}; known: union, gating")


def runs(model: nn.Module, groups: ChannelGroups) -> bool:
    """True if the model's own code, not only its graph (which has no in-place sums), runs in training and evaluation.

    Its outputs have to be of the shapes that they had when `groups` was made.
    """
    training = {module: module.training for module in model.modules()}
    try:
        for mode in MODES:
            given = model.train(mode == "train")(example_input(model, groups.input_shape))
            output = groups.graphs.get(mode, groups.graph).graph.output_node()
            before = fx.map_arg(output.args, lambda node: node.meta["value"])
            now, then = ([tensor.shape for tensor in output_tensors(found)] for found in (given, before))
            if now != then:
                return False
        return True
    except SHAPE_ERRORS:
        return False
    finally:
        for module, was in training.items():
            module.training = was


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutPlan:
    """Which components go (a mask), and which residual branches."""

    removed: Tensor
    removals: tuple[Removal, ...] = ()

    @property
    def changes(self) -> bool:
        """True if anything goes."""
        return bool(self.removed.any()) or bool(self.removals)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """The plan that goes furthest and works, and the copy of the model that it was rehearsed on.

    Attributes:
        plan: what goes.
        bones: the rehearsal copy after it.
        rescued: notes about layers of which every channel was sparse.
        decided: the other notes: what was tried out and what became of branches, whichever of their channels go.
        before: the groups of the model that it is about.
        after: what `labelled` gives for `bones`; None if nothing has changed, or if it was not needed.
    """

    plan: CutPlan
    bones: nn.Module
    rescued: tuple[str, ...] = ()
    decided: tuple[str, ...] = ()
    before: ChannelGroups
    after: tuple[nn.Module, ChannelGroups] | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know."""
        return (*self.rescued, *self.decided)

    @functools.cached_property
    def groups(self) -> ChannelGroups:
        """The groups of what is left: looked for when they are asked for, because reshapes have to be tried out."""
        if not self.plan.changes:
            return self.before
        return settled(*(self.after or labelled(self.bones, self.before.input_shape)))


def _decide(
    model: nn.Module,
    groups: ChannelGroups,
    sparse: Tensor,
    importance: Tensor,
    multiple: int,
    *,
    further: bool = True,
) -> Decision:
    """The plan that goes furthest and works.

    Every plan is carried out on shapes first; a branch whose code cannot bear a tensor without channels keeps one.
    `further`: what is left has to be a network that can be reconfigured again, and its labels are needed for that.
    """

    def rehearsed(sparse: Tensor, removals: tuple[Removal, ...]) -> Decision | None:
        plan, rescued = _plan(groups, sparse, importance, multiple, removals)
        return _rehearse(model, groups, plan, rescued, further=further)

    removals, notes = find_removals(groups, sparse), list[str]()
    if frozen := _kept_in_evaluation(model, groups, removals):
        removals = tuple(r for r in removals if r not in frozen)
        notes = [f"{r.constant}: the branch keeps a channel, its BatchNorm stays in evaluation mode" for r in frozen]
    found = rehearsed(sparse, removals)
    if found is None and removals:
        working = tuple(r for r in removals if rehearsed(sparse, (r,)))
        why = "the branch keeps a channel, without it the code would fail or do another thing"
        notes += [f"{r.constant}: {why}" for r in removals if r not in working]
        found = (rehearsed(sparse, working) if working else None) or rehearsed(sparse, ())
    if found is None:
        notes = ["channels that pass a reshape or split are kept: what is left would be mixed up"]
        found = rehearsed(sparse & ~groups.sensitive, ())
    if found is None:
        notes = ["all channels are kept: with those left the model's code would not run, or would do something else"]
        nothing = CutPlan(removed=torch.zeros_like(sparse))
        found = Decision(plan=nothing, bones=groups.rehearsal_copy(model), before=groups)
    notes += [f"{r.constant}: the residual branch is removed, its constant stays" for r in found.plan.removals]
    return dataclasses.replace(found, decided=tuple(notes))


def _kept_in_evaluation(model: nn.Module, groups: ChannelGroups, removals: tuple[Removal, ...]) -> tuple[Removal, ...]:
    """The branches whose last BatchNorm does not go into training mode with the network.

    Code that keeps its BatchNorms in evaluation mode would not find them in what stands in their place.
    """
    norms = [r for r in removals if isinstance(model.get_submodule(r.constant), BATCH_NORMS)]
    if not norms:
        return ()
    networks = [groups.rehearsal_copy(model).train(), *([model] if model.training else [])]
    return tuple(r for r in norms if not all(network.get_submodule(r.constant).training for network in networks))


def _plan(
    groups: ChannelGroups, sparse: Tensor, importance: Tensor, multiple: int, removals: tuple[Removal, ...]
) -> tuple[CutPlan, tuple[str, ...]]:
    """The plan, and notes about layers that keep a channel."""
    dead = {name for removal in removals for name in weighted_layers(groups, removal)}
    removed, rescued = keep_one(groups, sparse | only_in(groups, dead), importance, skip=dead)
    removed = round_up(groups, removed, importance, multiple, skip=dead)
    notes = tuple(f"{layer}: every channel is sparse; one is kept" for layer in rescued)
    return CutPlan(removed=removed, removals=removals), notes


def _rehearse(
    model: nn.Module, groups: ChannelGroups, plan: CutPlan, rescued: tuple[str, ...], *, further: bool
) -> Decision | None:
    """Carry the plan out on a copy; None if the copy fails or would mix channels up."""
    bones = groups.rehearsal_copy(model)
    if not plan.changes:
        return Decision(plan=plan, bones=bones, rescued=rescued, before=groups)
    try:
        operate(bones, groups, plan)
        if plan.removals and not runs(bones, groups):  # an in-place sum needs the constant at full size
            plan = dataclasses.replace(plan, removals=tuple(dataclasses.replace(r, full=True) for r in plan.removals))
            bones = groups.rehearsal_copy(model)
            operate(bones, groups, plan)
            if not runs(bones, groups):
                return None
        graphs = aligned_graphs(model, groups, plan)
        if graphs is None:
            return None
        after = labelled(bones, groups.input_shape) if further or not graphs else None
        graphs = graphs if after is None else after[1].graphs
        if not same_steps(groups.graphs, graphs, constants=[removal.constant for removal in plan.removals]):
            return None
        return Decision(plan=plan, bones=bones, rescued=rescued, before=groups, after=after)
    except SHAPE_ERRORS:
        return None


def aligned_graphs(model: nn.Module, groups: ChannelGroups, plan: CutPlan) -> Graphs | None:
    """None if the model's code does not handle what the plan leaves as it handled the whole; else what it does then.

    A reshape or split could mix up channels, and a condition on shapes could come out differently. Where no channel
    that goes passes one, nothing is looked at, and there are no graphs.
    """
    if not bool((plan.removed & groups.sensitive).any()):
        return {}
    seen = tried_out(groups.rehearsal_copy(model), groups, plan.removed, lambda m: operate(m, groups, plan))
    return None if seen is None or len(seen[0]) else seen[1]


def weighted_layers(groups: ChannelGroups, removal: Removal) -> tuple[str, ...]:
    """The convolutions and linear layers that go with a branch."""
    gone = {*removal.dead, removal.constant}
    return tuple(layer.layer for layer in groups.layers if layer.layer in gone)


def only_in(groups: ChannelGroups, layers: set[str]) -> Tensor:
    """The prunable components that no layer but `layers` touches, as a mask."""
    inside, outside = torch.zeros_like(groups.prunable), torch.zeros_like(groups.prunable)
    for layer in groups.layers:
        for axis in (layer.inputs, layer.outputs):
            (inside if layer.layer in layers else outside)[axis] = True
    return inside & ~outside & groups.prunable


def operate(
    model: nn.Module,
    groups: ChannelGroups,
    plan: CutPlan,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    shadows: Sequence[nn.Module] = (),
) -> None:
    """Carry the plan out on the model, its optimizer and its copies."""
    cut = groups.cut_for(plan.removed)
    for network in (model, *map(unwrap, shadows)):
        steps = [cut_model(network, cut), *(remove_branch(network, removal) for removal in plan.removals)]
        if optimizer is not None and network is model:
            for replacements in steps:
                cut_optimizer(optimizer, replacements)
