"""What is this live module, as data? Layers with shapes and counts, edges, and the order in which gradients come.

The network is described as *training* runs it: one step is rehearsed at two mini-batch sizes (see `rehearsal`); what
grows with the mini-batch is per image, what does not is fixed. The model, its mode, buffers and the random state are
left alone. Auxiliary heads that only training runs (GoogLeNet, Inception) are layers with `training_only = True`.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ptsim.capture.chance import chance_of, random_state_kept
from ptsim.capture.counts import forward_macs
from ptsim.capture.footprint import footprints
from ptsim.capture.graph import evaluation_mode, note_tracer, reads_none, symbolic_graph, written_by
from ptsim.capture.kinds import (
    counts_products,
    foreign_operator,
    geometry,
    kind_and_op,
    operations,
    takes_one_twice,
)
from ptsim.capture.rehearsal import Rehearsal, Shape, Step, rehearse
from ptsim.capture.ways import fullest_graph, take_fullest_way
from ptsim.consistency import layer_problem
from ptsim.errors import UnsupportedModelError
from ptsim.network import Layer, LayerKind, Network, Parameter
from ptsim.operators import BILINEAR, is_transposed, num_taps

_BATCHES = (2, 3)  # two sizes tell what scales; not 1, which BatchNorm refuses in training


def capture_network(model: nn.Module, *, name: str, input_shape: tuple[int, int, int], num_classes: int) -> Network:
    """The network that `model` is, for images of `input_shape` (channels, height, width).

    Modules of torch, and those that say `ptsim_leaf = True`, are one layer each; such a module may name its kind and
    operator by attributes `ptsim_kind` and `ptsim_op`. Parameters that get no gradient come last. Where random numbers
    decide which layers a step calls, the way with the most calls is described, and a warning says so.

    Raises:
        UnsupportedModelError: torch.fx cannot trace the model, or its forward fails on such an image.
    """
    refuse_scripts(model)
    with random_state_kept(model, []):  # each look at the network begins with the same random numbers
        small = rehearse(model, input_shape, _BATCHES[0])
        if small.graph.meta["draws"] or small.graph.meta["changes"] or chance_of(model).untold:
            ways = take_fullest_way(model, (_BATCHES[0], *input_shape))
            if ways > 1:
                warnings.warn(
                    f"random numbers decide what {type(model).__name__} computes in a training step: of the {ways} "
                    "ways that were met, the one with the most operations is described",
                    stacklevel=3,
                )
            small = rehearse(model, input_shape, _BATCHES[0])
        return _described(model, small, name=name, input_shape=input_shape, num_classes=num_classes)


def refuse_scripts(model: nn.Module) -> None:
    """Make sure that the operators of a network can be seen.

    Raises:
        UnsupportedModelError: a part of it with weights is a script.
    """
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and next(module.parameters(), None) is not None:
            raise UnsupportedModelError(
                f"{path or 'the model'} is a ScriptModule, whose operators ptsim cannot see",
                hint="use the module that was given to torch.jit.script or torch.jit.trace",
            )


def _described(
    model: nn.Module, small: Rehearsal, *, name: str, input_shape: tuple[int, int, int], num_classes: int
) -> Network:
    """The network, given what a step does with the smaller mini-batch."""
    large = rehearse(model, input_shape, _BATCHES[1], backward=False)
    graph = small.graph
    if large.steps.keys() != small.steps.keys():
        raise UnsupportedModelError(f"the code of {name} computes something else with a larger mini-batch")
    names = layer_names(graph)
    nodes = [node for node in graph.graph.nodes if node.name in small.steps and small.steps[node.name].works]
    if not nodes:
        raise UnsupportedModelError(f"{name} computes nothing with its images, so that there is nothing to count")
    if not _outputs(graph):
        raise UnsupportedModelError(f"{name} returns no tensor")
    auxiliary = _auxiliary(model, graph, input_shape)
    owners = _owners(small, nodes)
    macs = forward_macs(model, input_shape, graph.meta["way"])
    if not small.steps.keys() <= macs.keys():
        raise UnsupportedModelError(f"the code of {name} computes something else with a single image")
    layers = tuple(
        _layer(node, names[node], small, large.steps[node.name], macs[node.name], owners, auxiliary) for node in nodes
    )
    note_tracer(name, graph)
    _note_unknown(name, small.steps, nodes)
    _note_squares(name, small.steps, large.steps)
    network = Network(
        name=name,
        input_shape=input_shape,
        num_classes=num_classes,
        layers=layers,
        footprints=footprints(model, input_shape),
        edges=tuple(_edges(nodes, names, small.steps)),
        parameters=tuple(
            Parameter(
                name=p,
                layer=names[owners[p]] if p in owners and p not in small.idle else "",
                shape=tuple(small.model.get_parameter(p).shape),
            )
            for p in small.ready
        ),
    )
    _note_recomputation(network, next((p.element_size() for p in model.parameters() if p.is_floating_point()), 4))
    return network


def _layer(
    node: fx.Node,
    name: str,
    small: Rehearsal,
    grown: Step,
    counts: Counter[str],
    owners: Mapping[str, fx.Node],
    auxiliary: set[fx.Node],
) -> Layer:
    """What one node is, from its steps at two mini-batches."""
    graph, step = small.graph, small.steps[node.name]
    inputs, output = _image_shapes(step, grown)
    once = (step.inputs, step.outputs) == (grown.inputs, grown.outputs)
    if not counts_products(counts):
        counts = counts + _products(step, grown, once=once)
    kind, op = kind_and_op(node, graph, step, counts)
    elements, fixed_bytes, other_bytes = (0, 0, 0) if step.idle else _saved(step, grown, once=once)
    for_input, for_weight = _gradients(node, step, kind, op)
    owned = {small.model.get_parameter(p) for p, at in owners.items() if at is node and p not in small.idle}
    layer = Layer(
        name=name,
        kind=kind,
        op=op,
        input_shapes=inputs,
        output_shape=output,
        **geometry(node, graph, step, op, inputs, output),
        num_parameters=sum(p.numel() for p in owned if p.requires_grad),
        forward_macs=operations(kind, counts),
        input_needs_gradient=for_input,
        weight_needs_gradient=for_weight,
        inplace=step.inplace,
        view=step.view,
        training_only=node in auxiliary,
        once=once,
        shared_inputs=tuple(i for i, (a, b) in enumerate(zip(step.inputs, grown.inputs, strict=True)) if a == b),
        fixed_inputs=tuple(i for i, needs in enumerate(step.needs_gradient) if for_input and not needs),
        saved_elements=elements,
        saved_other_bytes=other_bytes,
        saved_fixed_bytes=fixed_bytes,
        output_saved=step.output_saved,
    )
    named = node.op == "call_module" and kind_and_op(node, graph, step)[0] is kind  # its weights may be products, too
    described = layer_problem(layer) is None and (named or _adds_up(layer))
    if kind in (LayerKind.CONV, LayerKind.LINEAR) and not described:
        # A product of another form: vectors by one row of weights, or what a function does that is not looked into.
        for_input, for_weight = _gradients(node, step, LayerKind.MATMUL, op)
        return msgspec.structs.replace(
            layer, kind=LayerKind.MATMUL, input_needs_gradient=for_input, weight_needs_gradient=for_weight
        )
    return layer


def _adds_up(layer: Layer) -> bool:
    """Whether a convolution or linear layer multiplies as often as one of its channels and its kernel does."""
    if layer.kind not in (LayerKind.CONV, LayerKind.LINEAR) or layer.op == BILINEAR or layer.spatial_axes == 3:
        return True
    if layer.kind is LayerKind.LINEAR:
        return layer.forward_macs == layer.output_elements * layer.in_channels
    folded, image = layer.unfolded(layer.input_shapes[0] if is_transposed(layer.op) else layer.output_shape)
    filters = layer.out_channels * layer.in_channels // layer.groups * num_taps(layer)
    return layer.forward_macs == folded * math.prod(image[1:]) * filters


def _gradients(node: fx.Node, step: Step, kind: LayerKind, op: str) -> tuple[bool, bool]:
    """Whether backward makes a gradient of the layer's input, and one of its weights or a product's second operand."""
    learns, trained = step.gives_gradient and not step.idle, step.weights_need_gradient
    if kind in (LayerKind.CONV, LayerKind.LINEAR) and op != BILINEAR:  # a second input is the weight, by other nodes
        of_weights = step.matrices_need_gradient or any(step.needs_gradient[1:])
        return learns and any(step.needs_gradient[:1]), learns and of_weights
    for_input = learns and any(step.needs_gradient)
    if kind is LayerKind.MATMUL and (not learns or (sum(step.needs_gradient) == 1 and not trained)):
        return for_input, for_input and trained is None and takes_one_twice(node)
    return for_input, learns if trained else not step.idle and trained is None


def _note_recomputation(network: Network, element_bytes: int) -> None:
    """A warning where less is kept than the layers need: graphs look into `checkpoint` and `torch.autograd.Function`.

    `element_bytes` is of its weights. A network whose own code casts them keeps less for that reason.
    """
    listed = sum(layer.saved_bytes(_BATCHES[0], element_bytes) for layer in network.layers)
    for seen in network.footprints:
        kept = seen.kept_fixed_bytes + _BATCHES[0] * seen.kept_image_bytes
        as_it_is = (seen.device, seen.half) == ("cpu", False) and not seen.weight_copy_bytes
        if as_it_is and kept < 0.999 * listed:
            warnings.warn(
                f"{network.name} keeps less than its layers need for backward (by torch.utils.checkpoint or a backward "
                "of its own): what is computed a second time is not among its MACs and traffic; its peak memory is "
                "that of the step as it runs",
                stacklevel=3,
            )


def layer_names(graph: fx.GraphModule) -> dict[fx.Node, str]:
    """The layer name of every call: the module's path, or the node's name for a functional call.

    The second call of one module is called `path:1`, the third `path:2`.
    """
    names: dict[fx.Node, str] = {}
    taken: set[str] = set()
    for node in graph.graph.nodes:
        if node.op.startswith("call_"):
            name = path = str(node.target) if node.op == "call_module" else node.name
            count = 0
            while name in taken:
                count += 1
                name = f"{path}:{count}"
            taken.add(name)
            names[node] = name
    return names


def training_graph(model: nn.Module, input_shape: tuple[int, int, int]) -> fx.GraphModule:
    """The graph that capture describes: the model's own modules, traced in training mode; modes are left as they were.

    Raises:
        UnsupportedModelError: torch.fx cannot trace the model.
    """
    return fullest_graph(model, (_BATCHES[0], *input_shape))


def _image_shapes(small: Step, large: Step) -> tuple[tuple[Shape, ...], Shape]:
    inputs = tuple(_per_image(a, b) for a, b in zip(small.inputs, large.inputs, strict=True))
    if len(small.outputs) > 1 and small.view and inputs:  # chunk, split, unbind: the pieces together are the input
        return inputs, inputs[0]
    return inputs, _per_image(small.outputs[0], large.outputs[0])


def _per_image(small: Shape, large: Shape) -> Shape:
    """The shape without its mini-batch axis: the first that grew; one that folds more in (windows) keeps the rest."""
    for axis, (a, b) in enumerate(zip(small, large, strict=True)):
        if a != b:
            rest = a // _BATCHES[0]
            return (*small[:axis], *((rest,) if rest > 1 else ()), *small[axis + 1 :])
    return small


def _saved(small: Step, large: Step, *, once: bool) -> tuple[int, int, int]:
    """Elements per image, bytes whatever the mini-batch, bytes of other kinds per image; all where it runs once."""
    if once:
        return small.saved_elements, 0, small.saved_other_bytes
    growth = _BATCHES[1] - _BATCHES[0]
    elements = (large.saved_elements - small.saved_elements) // growth
    num_bytes = (large.saved_bytes - small.saved_bytes) // growth
    other = (large.saved_other_bytes - small.saved_other_bytes) // growth
    fixed = small.saved_bytes - _BATCHES[0] * num_bytes + small.saved_other_bytes - _BATCHES[0] * other
    return elements, fixed, other


def _products(small: Step, large: Step, *, once: bool) -> Counter[str]:
    """Multiply–accumulates of products that torch sees run, where fvcore does not know what they are part of."""
    flops = small.product_flops if once else (large.product_flops - small.product_flops) // (_BATCHES[1] - _BATCHES[0])
    return Counter(matmul=flops // 2)


def _note_unknown(name: str, steps: Mapping[str, Step], nodes: Iterable[fx.Node]) -> None:
    """A warning about operators of other packages in which torch sees no product: what they compute is not known."""
    foreign = {foreign_operator(node) or "" for node in nodes if not steps[node.name].product_flops} - {""}
    if foreign:
        called = ", ".join(sorted(foreign))
        warnings.warn(
            f"{name} calls {called}, of whose arithmetic nothing is known: it counts as none",
            stacklevel=3,
        )


def _note_squares(name: str, small: Mapping[str, Step], large: Mapping[str, Step]) -> None:
    """A warning about what grows with the square of the mini-batch, as images compared with each other do."""
    for node, step in small.items():
        shapes = zip(step.outputs, large[node].outputs, strict=True)
        if any(sum(a != b for a, b in zip(one, other, strict=True)) > 1 for one, other in shapes):
            warnings.warn(
                f"{name} compares the images of a mini-batch with each other ({node}): "
                "what it counts for each holds for a mini-batch of one image",
                stacklevel=3,
            )
            return


def _owners(rehearsal: Rehearsal, nodes: list[fx.Node]) -> dict[str, fx.Node]:
    """Parameter name → the first node that uses it."""
    canonical = {parameter: name for name, parameter in rehearsal.model.named_parameters()}
    works = set(nodes)
    owners: dict[str, fx.Node] = {}
    for node in rehearsal.graph.graph.nodes:
        if node.op == "call_module":
            for parameter in rehearsal.graph.get_submodule(str(node.target)).parameters():
                owners.setdefault(canonical[parameter], node)
        elif node.op == "get_attr":
            parent, _, attribute = str(node.target).rpartition(".")
            value = getattr(rehearsal.graph.get_submodule(parent), attribute)
            user = next((user for user in _followers(node) if user in works), None)
            if value in canonical and user is not None:
                owners.setdefault(canonical[value], user)
    return {name: node for name, node in owners.items() if node in works}


def _followers(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        yield user
    for user in node.users:
        yield from _followers(user)


def _edges(nodes: list[fx.Node], names: Mapping[fx.Node, str], steps: Mapping[str, Step]) -> Iterator[tuple[str, str]]:
    """Producer and consumer layers; nodes that only hand something on are looked through, shapes and numbers are not.

    What a statement of its own writes into a tensor (`y.add_(x)`) comes from there on to those that take the tensor.
    """
    works = set(nodes)
    sources: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in nodes[0].graph.nodes if nodes else ():
        found = dict.fromkeys(s for at in node.all_input_nodes for s in sources[at] if not reads_none(node))
        step = steps.get(node.name)
        if node in works:
            yield from ((names[source], names[node]) for source in found)
            sources[node] = (node,)
        else:
            sources[node] = tuple(found) if step is None or step.outputs or step.inplace else ()
        if step is not None and step.inplace and not node.users and isinstance(node.args[0], fx.Node):
            sources[node.args[0]] = sources[node]
        if (base := written_by(node)) is not None:
            sources[base] = sources[node]


def _auxiliary(model: nn.Module, graph: fx.GraphModule, input_shape: tuple[int, int, int]) -> set[fx.Node]:
    """Nodes that only extra outputs of training need: training returns several tensors where evaluation returns one."""
    outputs = _outputs(graph)
    if len(outputs) < 2:
        return set()
    with evaluation_mode(model):
        if len(_outputs(symbolic_graph(model, (_BATCHES[0], *input_shape)))) > 1:
            return set()
    needed: set[fx.Node] = set()
    waiting = [outputs[0]]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    return set(graph.graph.nodes) - needed


def _outputs(graph: fx.GraphModule) -> list[fx.Node]:
    """What the graph returns, in order; a named tuple or a dataclass is a call of its class."""
    returned: Any = graph.graph.output_node().args
    (first,) = returned
    if isinstance(first, fx.Node) and first.op == "call_function" and isinstance(first.target, type):
        returned = first.args, first.kwargs
    return [node for node in pytree.tree_leaves(returned) if isinstance(node, fx.Node)]
