"""Which positions of which tensors are the same channel? Labels, propagated through a torch.fx graph.

What a label is stands in `labels`, what an operator does with it in `rules` and the modules of rules beside it. An
operator without a rule freezes the channels that flow into it, with a reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from ptsim.capture.calls import HOLDERS, Changes, attributes_restored
from ptsim.capture.constants import constants_of
from ptsim.capture.copies import hollow_copy
from ptsim.capture.graph import Way, example_input, output_tensors
from ptsim.capture.tracers import kept_shape, plain_arguments
from ptsim.capture.ways import READING, combining, each_way, left_for_the_loop, unused_nodes
from ptsim.capture.words import words_of
from ptsim.errors import UnsupportedModelError, lacks_memory
from ptsim.prune import (  # noqa: F401 - they register their rules
    function_rules,
    gradient_rules,
    layer_rules,
    movement_rules,
    product_rules,
)
from ptsim.prune.hooks import changes_gradient, hooks_of, hooks_watched, mixing_hooks
from ptsim.prune.labels import ENDS, NO_SLOTS, AxisKey, Facets, Label, Mode, State
from ptsim.prune.numbers import Number, named_numbers
from ptsim.prune.rules import (
    Call,
    RefusedError,
    Rule,
    axes_of,
    is_known,
    name_of,
    rule_for_function,
    rule_for_module,
    stays,
    takes_shapes,
    takes_sizes,
    takes_tuples,
    tensor_labels,
)

MODES: tuple[Mode, ...] = ("train", "eval")
Graphs: TypeAlias = Mapping[Mode, fx.GraphModule]  # of a mode that differs from training alone


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters and buffers are on the meta device: shapes without storage."""
    bones = hollow_copy(model, device="meta")
    for path, buffer in model.named_buffers():
        if (
            path.endswith((".mask", ".index")) and not buffer.is_floating_point()
        ):  # which channels are gated is structure
            parent, _, name = path.rpartition(".")
            bones.get_submodule(parent)._buffers[name] = buffer.clone()
    return bones


class Propagation(fx.Interpreter):
    """One pass over one graph; slots, pairs and freezes accumulate over several graphs of the same model in `state`."""

    def __init__(
        self,
        module: fx.GraphModule,
        state: State,
        mode: str,
        device: torch.device,
        unused: Collection[fx.Node] = (),
    ) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.unused = unused
        self.mode, self.device = mode, device
        self.looked: dict[str, str] = module.meta["looked"]
        self.state = state
        self.labels: dict[fx.Node, Label] = {}
        self.counts: dict[fx.Node, Any] = {}  # what a number or shape says about: slots, or slots per axis
        self._nodes_of: dict[int, list[fx.Node]] = {}  # id of a value → the nodes that it is the value of
        self.hooked = False  # the module that was called last has a hook that changes what it takes or gives

    def run_node(self, n: fx.Node) -> Any:
        """Run the node on meta tensors, then its rule on the labels."""
        with self.device:  # where the code makes tensors without saying where; labels are real
            value = super().run_node(n)
        n.meta["value"] = value
        self.state.aside = n in self.unused
        known = len(self.state.numbers)
        self.labels[n] = self._rule(n, value)
        if isinstance(value, Tensor) and n.op.startswith("call"):
            for source in self._nodes_of.get(id(value), ()):  # in place: what it gives is what its operand is now
                self.labels[source] = self.labels[n]
        self._nodes_of.setdefault(id(value), []).append(n)  # no value is collected meanwhile
        if n.op.startswith("call"):
            self._count(n, value)
            for slots in _flat(self.counts.get(n)) if n.name in self.looked else ():
                if self.looked[n.name] == "number":
                    self.state.freeze(slots, f"the model's code computes with the number of these channels ({n.name})")
                else:
                    self.state.sensitive(slots)
        self._numbers(n, known)
        if self._takes_shapes(n) and not self.state.aside:
            labels = self.labels[n]
            self.state.moves[self.mode, n.name] = () if isinstance(labels, Facets) else tuple(tensor_labels(labels))
        return value

    def keep(self, left: Iterable[fx.Node]) -> None:
        """What nodes give that the code leaves in attributes stays as it is."""
        for label in (part for node in left for part in tensor_labels(self.labels[node])):
            self.state.freeze(label, "the code leaves it in an attribute, where a loss may read it")

    def _rule_of(self, node: fx.Node) -> Rule | None:
        if node.op == "call_module":
            return rule_for_module(self.fetch_attr(str(node.target)))
        return rule_for_function(node) if node.op.startswith("call") else None

    def _takes_shapes(self, node: fx.Node) -> bool:
        return takes_shapes(self._rule_of(node))

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the node is called with; numbers that the model keeps are plain integers, and devices are this one."""
        args: Any = fx.map_arg(plain_arguments(n.args, self.device), self.env.__getitem__)
        kwargs: Any = fx.map_arg(plain_arguments(n.kwargs, self.device), self.env.__getitem__)
        return args, kwargs

    def _numbers(self, node: fx.Node, known: int) -> None:
        """Numbers that the model keeps stay what they are where they mean anything but channels.

        Those of a layer follow what is cut; arithmetic with one of them would not give the same any more.
        """
        found: list[Number] = []
        fx.node.map_aggregate((node.args, node.kwargs), lambda a: found.append(a) if isinstance(a, Number) else None)
        for number in found:
            if name_of(node) in ("eq", "ne"):  # with the channels that it is compared with
                for slots in [part for n in node.all_input_nodes for part in _flat(self.counts.get(n))]:
                    if len(slots) == int(number):
                        self.state.number(number, slots)
            if not self.state.aside and not any(number is used for used, _ in self.state.numbers[known:]):
                number.fix()
        follows = any(number.synced for number in found) and not function_rules.is_elementwise(name_of(node))
        node.meta["counts"] = len(self.state.numbers) > known or follows

    def _count(self, node: fx.Node, value: Any) -> None:
        """Follow numbers that say how many channels there are; freeze the channels where one enters the arithmetic.

        Shapes that a reshape or a slice is given may change with the network: they are tried out later.
        """
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        name, arguments = name_of(node), node.args
        if isinstance(value, (Tensor, nn.Module)) or self.labels.get(node) is not None:
            tried_out = takes_sizes(self._rule_of(node)) or (node.op != "call_module" and self._takes_shapes(node))
            for n in node.all_input_nodes:
                for slots in _flat(self.counts.get(n)):
                    if tried_out:
                        self.state.sensitive(slots)
                    else:
                        self.state.freeze(slots, f"{name} at {node.name} computes with the number of these channels")
            return
        if source is None:
            return
        known = self.counts.get(source)
        if isinstance(source.meta["value"], Tensor):
            axes = axes_of(self.labels.get(source), source.meta["value"].ndim)
            dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None) if name == "size" else None
            if isinstance(dim, int):
                self.counts[node] = axes[dim]
            elif name in ("size", "getattr"):
                self.counts[node] = tuple(axes) if isinstance(value, tuple) else None
            elif name != "dim":
                self.counts[node] = torch.cat([*axes, NO_SLOTS])
        elif name == "getitem" and isinstance(known, tuple) and isinstance(arguments[1], (int, slice)):
            self.counts[node] = known[arguments[1]]
        else:
            parts = [slots for n in node.all_input_nodes for slots in _flat(self.counts.get(n))]
            self.counts[node] = torch.cat([*parts, NO_SLOTS])

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An attribute; a tensor that the code has made while it was traced goes where the images are."""
        value = super().get_attr(target, args, kwargs)
        made = isinstance(value, Tensor) and id(value) not in self.state.names
        return value.to(self.device) if made else value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module; some without storage only for their shape."""
        module = self.fetch_attr(target)
        self.hooked = False
        if tables := hooks_of(module):
            with hooks_watched(tables, self.state.own) as seen:
                value = super().call_module(target, args, kwargs)
            self.state.note(seen.touched, seen.foreign, str(target))
            self.hooked = seen.changed or changes_gradient(module, args, value)
            return value
        shaped = kept_shape(module, target, args)
        value = super().call_module(target, args, kwargs) if shaped is None else shaped
        self.hooked = changes_gradient(module, args, value)
        return value

    # ------------------------------------------------------------------ dispatch

    def _rule(self, node: fx.Node, value: Any) -> Label:
        state = self.state
        if node.op == "placeholder":
            return state.stays(value, ENDS[0]) if isinstance(value, Tensor) else None
        if node.op == "get_attr":
            return self._attribute(value)
        if node.op == "output":
            for given in node.all_input_nodes:
                for source in given.all_input_nodes if _is_returned_record(given) else (given,):
                    for label in tensor_labels(self.labels.get(source)):
                        state.freeze(label, ENDS[1])
            return None
        module = self.fetch_attr(str(node.target)) if node.op == "call_module" else None
        call = Call(self, state, self.labels, node, value, module)
        try:
            found = self._module(call, module) if module is not None else self._function(call)
            if module is not None and hooks_of(module):
                self.state.watched += [part for label in (*call.labels, found) for part in tensor_labels(label)]
            if not _fits(found, value):
                call.refuse(f"{call.op} is used in a way that has no rule")
            return found
        except RefusedError as refused:
            for source in call.sources:
                for label in tensor_labels(self.labels[source]):
                    state.freeze(label, str(refused))
            return stays(state, value, str(refused))

    def _attribute(self, value: Any) -> Label:
        if not isinstance(value, Tensor):
            return None
        name = self.state.names.get(id(value))
        if name is None:
            return self.state.stays(value, "a constant tensor of the model is combined with it")
        labels = []
        for dim, size in enumerate(value.shape):
            if size > 1:
                shape = [1] * value.ndim
                shape[dim] = size
                labels.append(self.state.axis(name, dim, size).view(shape))
        return Facets(labels)

    def _module(self, call: Call, module: nn.Module) -> Label:
        first = call.node.all_input_nodes[0] if call.node.all_input_nodes else None
        x = self.labels.get(first) if first is not None else None
        if not isinstance(x, Tensor) or not isinstance(call.value, Tensor | tuple | list):
            call.refuse(f"{call.op} is used in a way that has no rule")
        if self.hooked:
            call.refuse(f"a hook changes what {call.op} takes, gives or computes with")
        own = getattr(module, "ptsim_labels", None)
        if own is not None:  # what pruning itself puts in
            result: Label = own(self.state, call.path, x, call.value)
            return result
        found = rule_for_module(module)
        if found is None:
            call.refuse(f"{call.op} has no rule, and may mix these channels")
        return found(call)

    def _function(self, call: Call) -> Label:
        value, target = call.value, call.node.target
        if _is_returned_record(call.node):
            return None
        tensors = isinstance(value, Tensor) or (
            isinstance(value, tuple | list) and any(isinstance(part, Tensor) for part in value)
        )
        found = rule_for_function(call.node)
        if found is None and callable(target) and not is_known(target):
            call.refuse(f"{call.op}, a function that is not traced, has no rule")
        if call.name in READING:
            call.refuse(f"{call.op} reads the values of these channels")
        if call.name == "setattr":
            call.refuse(f"the code sets `{call.node.args[1]}` of a tensor")
        if not tensors and call.name != "setitem":
            return None
        if call.node.kwargs.get("out") is not None:
            call.refuse(f"{call.op} writes into a tensor that is there already (out=)")
        if not call.sources:
            return call.stays(f"{call.op} makes a constant tensor")
        if found is None:
            call.refuse(f"{call.op} has no rule, and may mix these channels")
        if any(isinstance(label, tuple) for label in call.labels) and not takes_tuples(found):
            call.refuse(f"{call.op} has no rule")
        return found(call)


def _is_returned_record(node: fx.Node) -> bool:
    """True for the dataclass around the tensors that a model returns."""
    made = isinstance(node.target, type) and dataclasses.is_dataclass(node.target)
    return made and all(user.op == "output" for user in node.users)


def _fits(label: Label, value: Any) -> bool:
    """True if a label can be one of such a tensor: a last look at what a rule gives."""
    if isinstance(label, tuple):
        return isinstance(value, tuple | list) and len(label) == len(value) and all(map(_fits, label, value))
    if not isinstance(value, Tensor):
        return True
    return all(
        part.ndim == value.ndim and all(n in (1, size) for n, size in zip(part.shape, value.shape, strict=True))
        for part in tensor_labels(label)
    )


def _flat(counts: Any) -> list[Tensor]:
    """The slots behind a number or a shape."""
    if counts is None:
        return []
    return [part for part in counts if isinstance(part, Tensor)] if isinstance(counts, tuple) else [counts]


def propagate(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    seed: Mapping[AxisKey, Tensor] | None = None,
    *,
    wider: Graphs | None = None,
) -> tuple[State, Graphs]:
    """Propagate labels through `model` (usually a `skeleton`) as training and, where it differs, evaluation runs it.

    `wider` are the graphs of the network before it shrank: it is traced again in the same way.
    """
    state = State(model, seed)
    graphs: dict[Mode, fx.GraphModule] = {}
    modes = {module: module.training for module in model.modules()}
    images = example_input(model, input_shape)
    with named_numbers(model) if seed is None else contextlib.nullcontext():
        for mode in MODES:
            for module in model.modules():
                module.training = mode == "train"
            before = None if wider is None else wider.get(mode, wider["train"])
            graph = _followed(model, images, state, mode, graphs.get("train"), before)
            if graph is not None:
                graphs[mode] = graph
    for name in mixing_hooks(model):
        state.touched[name] = f"a hook mixes the gradient of {name}"
    state.freeze_touched()
    for module, training in modes.items():
        module.training = training
    return state, graphs


def _hooks_around(model: nn.Module, images: Tensor, output: Any, state: State) -> None:
    """Run the hooks of the network itself, which are no part of its graph, and note into which tensors they write."""
    tables = [table for table in (model._forward_pre_hooks, model._forward_hooks) if table]
    if tables:
        vars(model)["forward"] = lambda *_, **__: output  # the caller puts it back
        with hooks_watched(tables, state.own) as seen:
            model(images)
        state.note(seen.touched, seen.foreign, type(model).__name__)


def _refuse_collected(model: nn.Module, images: Tensor, output: Any) -> None:
    """Raise an error if the code returns more than the graph gives: what hooks of layers have collected, perhaps."""
    if not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules()):
        return
    try:
        returned = [*output_tensors(model(images))]
    except Exception as error:  # a hook may look at values, which are not there
        if lacks_memory(error):
            raise
        return
    if len(returned) > len([*output_tensors(output)]):
        raise UnsupportedModelError(
            f"{type(model).__name__} returns what hooks of its layers have collected, which torch.fx does not see",
            hint="let the forward method return what the layers give",
        )


def _refuse_read(model: nn.Module, changes: Changes) -> None:
    """Raise an error if a hook has left a tensor in an attribute that the code reads."""
    for (path, name), (_, value) in changes.items():
        kept = isinstance(value, (Tensor, *HOLDERS)) and name != "forward"
        if kept and any(name in words_of(module) for module in model.modules()):
            kind = type(model.get_submodule(path)).__name__
            raise UnsupportedModelError(
                f"a hook leaves a tensor in {kind}.{name}, which the code of {type(model).__name__} reads",
                hint="let the forward method compute it",
            )


def _followed(
    model: nn.Module,
    images: Tensor,
    state: State,
    mode: Mode,
    known: fx.GraphModule | None,
    wider: fx.GraphModule | None,
) -> fx.GraphModule | None:
    """Follow the labels through the model as it is now; its graph, or None if that is `known` and there is no other.

    Where random numbers decide which way the code takes, all its ways are followed.

    Raises:
        UnsupportedModelError: there are too many.
    """
    graphs: dict[int, fx.GraphModule] = {}  # by the seed of every way
    how = {"buffers": True, "ways": tuple(Way) if wider is None else (wider.meta["way"],)}

    def tell(graph: fx.GraphModule, number: int) -> tuple[int, ...] | None:
        left = left_for_the_loop(graph)
        unused = unused_nodes(graph, left)
        combined = combining(unused)
        for node in unused:
            if node not in combined:
                graph.graph.erase_node(node)
        graph.recompile()
        graphs[number] = graph
        if known is None or graph.meta["draws"] or graph.code != known.code:
            if "constants" not in graph.meta:
                graph.meta["constants"] = constants_of(graph, model)
            graph.train(mode == "train")
            name = f"{mode} {number}" if number else mode
            with torch.no_grad(), attributes_restored(model) as changes:
                propagation = Propagation(graph, state, name, images.device, combined)
                output = propagation.run(images)
                propagation.keep(left)
                _hooks_around(model, images, output, state)
                _refuse_read(model, changes())
                _refuse_collected(model, images, output)
        return state.learnt() if graph.meta["draws"] and wider is None else None

    seeds = None if wider is None else wider.meta["seeds"]
    if not each_way(model, tuple(images.shape), tell, seeds=seeds, **how):
        raise UnsupportedModelError(
            f"random numbers decide which way the code of {type(model).__name__} takes, "
            "and too many traces did not show all ways",
            hint="let the code choose between fewer ways",
        )
    first = next(iter(graphs.values()))
    first.meta["seeds"] = tuple(graphs)
    same = known is not None and len(graphs) == 1 and not first.meta["draws"] and first.code == known.code
    return None if same else first
