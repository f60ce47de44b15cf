"""What does one training step of this module do, node by node, without doing its arithmetic?

A copy of the model runs forward and backward inside `NoArithmetic`: shapes, strides, storages and autograd's formulas
are the CPU's own, the numbers are not there. What autograd keeps is seen by `saved_tensors_hooks`, the order of the
gradients by hooks on the parameters. Tests check that a run with real tensors gives the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ptsim.capture.chance import random_state_kept
from ptsim.capture.copies import copied, dtype_of, hollow_copy
from ptsim.capture.graph import (
    naming_the_image,
    only_written,
    output_tensors,
    parts_used,
    reads_none,
    shape_written,
    sliced_by,
    symbolic_graph,
    written_by,
)
from ptsim.capture.hollow import NoArithmetic
from ptsim.capture.kept import KeptStorages
from ptsim.capture.looking import let_hooks_look
from ptsim.capture.ways import read_alone

Shape = tuple[int, ...]


@dataclasses.dataclass
class Step:
    """What one node did. Shapes include the mini-batch axis.

    Attributes:
        arguments, keywords: of the call, with a `torch.Size` in place of every tensor.
        inputs: shapes of the tensors that other nodes handed over; parameters and buffers are not among them. Of what
            writes a part of a tensor, those of the tensor and of the part.
        outputs: shapes of what it returned; empty for a node that returns no tensor. Of parts of which some are never
            read, that of those that are, together.
        needs_gradient: of each input.
        gives_gradient: what it returned has one, to hand back to these.
        weights_need_gradient: of the module's parameters, or of those that the call takes; None where there are none.
        matrices_need_gradient: of those with more than one axis.
        idle: some of these are trained, and no gradient comes to any: what it returns is used for nothing, perhaps.
        works: False for a node that hands an input on, such as Identity or a tuple's item, and for a part that is only
            written; a part of a `tensor_split` works in the place of it all.
        saved_elements, saved_bytes: floating-point elements, their bytes, that autograd newly keeps.
        saved_other_bytes: bytes of other kinds.
        output_saved: some node keeps what this one returned.
        product_flops: of the matrix products and convolutions that torch knows by their shapes.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...] = ()
    needs_gradient: tuple[bool, ...] = ()
    gives_gradient: bool = False
    weights_need_gradient: bool | None = None
    matrices_need_gradient: bool = False
    idle: bool = False
    works: bool = False
    inplace: bool = False
    view: bool = False
    saved_elements: int = 0
    saved_bytes: int = 0
    saved_other_bytes: int = 0
    output_saved: bool = False
    product_flops: int = 0


@dataclasses.dataclass
class Rehearsal:
    """One training step: the copy that ran, its graph, what each node did, and parameters as their gradients came.

    `idle` are the trainable parameters that got no gradient, which come last in `ready`.
    """

    model: nn.Module
    graph: fx.GraphModule
    steps: dict[str, Step]
    ready: tuple[str, ...]
    idle: frozenset[str]


def rehearse(
    model: nn.Module, input_shape: tuple[int, int, int], batch: int, *, hollow: bool = True, backward: bool = True
) -> Rehearsal:
    """Run one training step of a copy of `model` on `batch` images and watch it.

    Args:
        model: left as it is.
        input_shape: (channels, height, width).
        batch: images.
        hollow: without arithmetic and memory; False runs real CPU tensors, which gives the same, slower.
        backward: go back as well; without, `ready` and `idle` are empty.

    Raises:
        UnsupportedModelError: see `symbolic_graph` and `hollow_copy`; or its forward fails on such an image.
    """
    mode = NoArithmetic() if hollow else contextlib.nullcontext()
    with warnings.catch_warnings(), random_state_kept(model, []), mode, torch.device("cpu"), torch.enable_grad():
        warnings.simplefilter("ignore")  # the model's own: a rehearsal is not the place to repeat them
        twin = hollow_copy(model) if hollow else copied(model).cpu()
        let_hooks_look(twin.train())
        graph = symbolic_graph(twin, (batch, *input_shape))
        for node in read_alone(graph):
            graph.graph.erase_node(node)
        watcher = _Watcher(graph, twin)
        dtype = dtype_of(twin)
        with naming_the_image(model, input_shape), contextlib.ExitStack() as after:
            after.callback(watcher.let_go)
            with watcher.kept.watching():
                outputs = list(output_tensors(watcher.run(torch.rand(batch, *input_shape, dtype=dtype))))
            watcher.finish()
            ready, idle = _gradient_order(twin, outputs) if backward else ((), frozenset[str]())
            watcher.tell_idle({twin.get_parameter(name) for name in idle})
    return Rehearsal(twin, graph, watcher.steps, ready, idle)


def _read_parts(parts: tuple[Shape, ...], used: frozenset[int], whole: Shape) -> tuple[Shape, ...]:
    """The shapes of all parts, or that of those that are used beside each other."""
    read = [parts[place] for place in sorted({place % len(parts) for place in used})]
    if not 0 < len(read) < len(parts):
        return parts
    if len(read[0]) < len(whole):  # of `unbind`
        return ((len(read), *read[0]),)
    axis = next((i for i, sizes in enumerate(zip(parts[0], whole, strict=True)) if sizes[0] != sizes[1]), 0)
    return ((*whole[:axis], sum(part[axis] for part in read), *whole[axis + 1 :]),)


# In which step a storage was first kept, its bytes, and those of one element if that is floating-point, else 0.
_Kept = tuple[Step | None, int, int]


class _Watcher(fx.Interpreter):
    """Runs the graph and writes down what every node does; a storage that is kept twice counts at the first node."""

    def __init__(self, graph: fx.GraphModule, model: nn.Module) -> None:
        super().__init__(graph)
        self.steps: dict[str, Step] = {}
        self._current: Step | None = None
        self.kept = KeptStorages((*model.parameters(), *model.buffers()), self._note)
        self._returned: dict[str, list[weakref.ref[torch.UntypedStorage]]] = {}
        self._trained: dict[str, set[nn.Parameter]] = {}

    def run_node(self, n: fx.Node) -> Any:
        handed = [value for at in n.all_input_nodes if at.op != "get_attr" for value in output_tensors(self.env[at])]
        if reads_none(n):
            handed = []
        arguments, keywords = pytree.tree_map_only(Tensor, Tensor.size, self.fetch_args_kwargs_from_env(n))
        step = Step(arguments, keywords, tuple(tuple(t.shape) for t in handed))
        step.needs_gradient = tuple(t.requires_grad for t in handed)
        if weights := self._weights(n):
            self._trained[n.name] = {p for p in weights if p.requires_grad}
            step.weights_need_gradient = bool(self._trained[n.name])
            step.matrices_need_gradient = any(p.dim() > 1 for p in self._trained[n.name])
        versions = [t._version for t in handed]
        learnt = {at: any(t.requires_grad for t in output_tensors(self.env[at])) for at in n.all_input_nodes}
        own = (self.env[at] for at in n.all_input_nodes if at.op == "get_attr")
        storages = {t.untyped_storage()._cdata for t in (*handed, *output_tensors(tuple(own)))}
        self._current = step
        with torch.set_grad_enabled(n.meta.get("grad", torch.is_grad_enabled())), _Products() as products:
            result = super().run_node(n)
        self._current = None
        step.product_flops = products.flops
        if n.op in ("call_module", "call_function", "call_method"):
            given = list(output_tensors(result))
            step.outputs = tuple(tuple(t.shape) for t in given)
            step.gives_gradient = any(t.requires_grad for t in given)
            step.inplace = versions != [t._version for t in handed] or "overwrites" in n.meta
            step.works = bool(given) and (step.inplace or not all(any(t is h for h in handed) for t in given))
            step.view = not step.inplace and all(t.untyped_storage()._cdata in storages for t in given)
            if step.view and handed and len(given) > 1 and (used := parts_used(n)) is not None:
                step.outputs = _read_parts(step.outputs, used, step.inputs[0])
            if (split := sliced_by(n)) is not None:
                whole = self.steps[split.name]
                step.inputs, step.needs_gradient, step.works = whole.inputs[:1], whole.needs_gradient[:1], True
            if only_written(n) or (n.users and all(sliced_by(user) is n for user in n.users)):
                step.works = False
            if (base := written_by(n)) in self.env:
                self._note_written(n, base, step, learnt)
            self.steps[n.name] = step
            self._returned[n.name] = [weakref.ref(t.untyped_storage()) for t in given]
        return result

    def _note_written(self, n: fx.Node, base: fx.Node, step: Step, learnt: dict[fx.Node, bool]) -> None:
        """A statement that writes a part of a tensor: it is given both, and returns the tensor."""
        whole, value = self.env[base], n.args[-1] if len(n.args) > 1 else None
        step.inputs = tuple(whole.shape), shape_written(n, self.env)
        step.needs_gradient = learnt[n.all_input_nodes[0]], isinstance(value, fx.Node) and learnt[value]
        step.outputs, step.gives_gradient = (tuple(whole.shape),), whole.requires_grad
        step.works, step.inplace, step.view = True, True, False

    def finish(self) -> None:
        """Once everything has run: what autograd keeps, and which outputs are among it."""
        self.let_go()  # what is used for nothing is freed now, and what its gradient would have needed
        kept = self.kept.alive()
        for step, num_bytes, element_bytes in kept.values():
            if step is None:
                continue
            if element_bytes:
                step.saved_elements += num_bytes // element_bytes
                step.saved_bytes += num_bytes
            else:
                step.saved_other_bytes += num_bytes
        held = self.kept.own | kept.keys()
        for name, references in self._returned.items():
            storages = (reference() for reference in references)
            self.steps[name].output_saved = any(s is not None and s._cdata in held for s in storages)

    def let_go(self) -> None:
        """Forget the outputs: they hold autograd's graph, which holds `kept`, and no garbage collector sees that."""
        self.env.clear()

    def tell_idle(self, idle: set[nn.Parameter]) -> None:
        """Once it has gone back: to which parameters no gradient has come."""
        for name, trained in self._trained.items():
            if name in self.steps:
                self.steps[name].idle = bool(trained) and trained <= idle

    def _weights(self, n: fx.Node) -> list[nn.Parameter]:
        if n.op == "call_module":
            return list(self.fetch_attr(str(n.target)).parameters())
        return [p for at in n.all_input_nodes if at.op == "get_attr" and isinstance(p := self.env[at], nn.Parameter)]

    def _note(self, tensor: Tensor, known: _Kept | None) -> _Kept:
        element_bytes = tensor.element_size() if tensor.is_floating_point() else 0
        return known or (self._current, tensor.untyped_storage().nbytes(), element_bytes)


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's gap
    """Adds up the FLOPs of the products that run inside, by torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's gap
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(getattr(func, "_overloadpacket", func))
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def _gradient_order(model: nn.Module, outputs: list[Tensor]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Trainable parameters as their gradients become ready; those that get none come last, and once more alone."""
    ready: list[str] = []
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trainable.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: ready.append(name))  # type: ignore[no-untyped-call] # torch's gap
    loss = [output.float().sum() for output in outputs if output.requires_grad]
    if loss:
        torch.autograd.backward(loss)
    idle = [name for name in trainable if name not in set(ready)]
    return (*ready, *idle), frozenset(idle)
