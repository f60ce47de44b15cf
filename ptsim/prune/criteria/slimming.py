"""Network slimming: L1 on BatchNorm's scale γ. A channel whose γ and β are zero carries nothing and goes.

Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017. As in the authors'
code a pruned channel loses γ and β together, so the pruned network equals the network with both set to zero. Only
channels of which that is true are candidates: all their producers end in a BatchNorm, and with γ = β = 0 nothing but
zeros reaches any consumer (so no sigmoid lies in between).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ptsim.capture.copies import copied
from ptsim.capture.graph import evaluation_mode, example_input, output_tensors
from ptsim.criteria import slimming_work
from ptsim.network import Network
from ptsim.operators import plain_name
from ptsim.prune.criteria.coefficient import per_weight
from ptsim.prune.function_rules import ACTIVATIONS, elementwise
from ptsim.prune.groups import ChannelGroups
from ptsim.prune.rules import name_of, rule_named

# Not zero where their argument is, by what lies beside it or at random.
_NOT_AT_ZERO = (
    *("softmax", "softmin", "log_softmax", "logsoftmax", "alpha_dropout", "alphadropout", "feature_alpha_dropout"),
    *("featurealphadropout", "empty_like"),
)
_SHIFTS = ("bias", "running_mean")  # of a module: what it adds to a zero


class Slimming:
    """The penalty Σ|γ| of the BatchNorms whose channels can be pruned. Subgradient λ·sign(γ)."""

    label: ClassVar[str] = "network slimming (L1 on BatchNorm's γ)"

    def __init__(self, model: nn.Module, groups: ChannelGroups) -> None:
        """Holds references to the model's parameters: make a new one after every reconfiguration."""
        self.weights: Sequence[nn.Parameter] = [
            norm.weight for _, norm, components in norms(model, groups) if bool(groups.prunable[components].any())
        ]

    def penalty(self) -> Tensor:
        """Σ|γ| (without λ); differentiable."""
        return sum((weight.abs().sum() for weight in self.weights), torch.zeros(()))

    @torch.no_grad()
    def value(self) -> Tensor:
        """The penalty without an autograd graph."""
        return self.penalty()

    @torch.no_grad()
    def add_gradient(self, coefficient: float) -> None:
        """Add λ·sign(γ) to the gradient of every penalised γ; call it after unscaling and all-reduce."""
        for weight in self.weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            weight.grad.add_(weight.sign(), alpha=coefficient)

    @torch.no_grad()
    def proximal_step(self, shrinkage: float | Sequence[float]) -> None:
        """Soft threshold: every |γ| shrinks by `shrinkage` (or its weight's), to exactly zero where it was less."""
        for weight, amount in zip(self.weights, per_weight(shrinkage, len(self.weights)), strict=True):
            weight.copy_(weight.sign() * (weight.abs() - amount).clamp_min(0))

    @classmethod
    @torch.no_grad()
    def importance(cls, model: nn.Module, groups: ChannelGroups) -> Tensor:
        """Largest |γ| over the BatchNorms of each component; infinite where zeros in γ and β do not silence it."""
        largest = torch.full((groups.num_components,), -torch.inf)
        for _, norm, components in norms(model, groups):
            sizes = norm.weight.detach().abs().nan_to_num(torch.inf).float().cpu()
            largest.scatter_reduce_(0, components, sizes, "amax")
        largest[largest == -torch.inf] = torch.inf
        quiet = groups.prunable & largest.isfinite()
        largest[_heard(model, groups, quiet) | _read_past_norms(model, groups)] = torch.inf
        return largest

    @classmethod
    def traffic(cls, network: Network) -> int:
        """Bytes that one `add_gradient` reads and writes."""
        return slimming_work(network, gpu=True).num_bytes

    @classmethod
    def launches(cls, network: Network) -> int:
        """Kernels that one `add_gradient` launches on a GPU."""
        return slimming_work(network, gpu=True).num_launches


def norms(model: nn.Module, groups: ChannelGroups) -> Iterator[tuple[str, _BatchNorm, Tensor]]:
    """(path, module, component of each channel) of the BatchNorms with a trained scale."""
    for path, module in model.named_modules():
        components = groups.axes.get((f"{path}.weight", 0))
        if isinstance(module, _BatchNorm) and components is not None and module.weight.requires_grad:
            yield path, module, components


def _read_past_norms(model: nn.Module, groups: ChannelGroups) -> Tensor:
    """Components that a layer reads, in part, by a way on which no BatchNorm makes zeros of what another layer wrote.

    Found in the graph: in a trial on images such a writer may be silent, because all layers in front of it are.
    """
    paths = {path for path, _, _ in norms(model, groups)}
    layers = [layer for layer in groups.layers if not layer.depthwise]
    weighted = {name for layer in layers for name in layer.nodes}
    past = torch.zeros_like(groups.prunable)
    for graph in groups.graphs.values():
        loud: set[fx.Node] = set()  # what may be other than zero
        read: set[str] = set()
        for node in graph.graph.nodes:
            sources = [n for n in node.all_input_nodes if n.op != "get_attr" and [*output_tensors(n.meta.get("value"))]]
            if node.name in weighted and not loud.isdisjoint(sources):
                read.add(node.name)
            if node.op == "placeholder" or node.name in weighted or _passes(graph, node, sources, loud, paths):
                loud |= {node, *(sources[:1] if _writes(node) else ())}
        for layer in layers:
            if not read.isdisjoint(layer.nodes):
                past[layer.inputs] = True
    return past


def _passes(
    graph: fx.GraphModule, node: fx.Node, sources: Sequence[fx.Node], loud: Collection[fx.Node], paths: Collection[str]
) -> bool:
    """True if the node may give something else than zero; `paths` are the BatchNorms that make zeros of everything."""
    module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    own = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    if (module is not None and str(node.target) in paths) or any(name.removesuffix(".weight") in paths for name in own):
        return False
    if module is not None and any(getattr(module, name, None) is not None for name in _SHIFTS):
        return True
    kind = plain_name(name_of(node) if module is None else type(module).__name__)
    if kind in ("mul", "matmul", "bmm", "mm"):  # zero if one of the operands is
        return all(source in loud for source in sources)
    if kind == "div":  # if the first one is
        first = next(iter(node.args), None)
        return first in loud or not isinstance(first, fx.Node) or first.op == "get_attr"
    made = not sources and "zeros" not in kind  # of parameters or numbers alone
    if made or any(source in loud for source in sources):
        return True
    return kind in _NOT_AT_ZERO or _moves_zero(node, module, sources)


def _moves_zero(node: fx.Node, module: nn.Module | None, sources: Sequence[fx.Node]) -> bool:
    """True if what works element by element makes something else of zeros, or may, with a parameter beside them."""
    if (rule_named(name_of(node)) is not elementwise) if module is None else (type(module) not in ACTIVATIONS):
        return False
    if node.all_input_nodes != list(sources):
        return True

    def zero(n: fx.Node) -> Tensor:
        return torch.zeros(1, dtype=getattr(n.meta["value"], "dtype", None))

    given: Any = fx.map_arg(node.args, zero)
    named: Any = fx.map_arg(node.kwargs, zero)
    with torch.random.fork_rng(devices=[]):
        try:
            if node.op == "call_method":
                found = getattr(given[0], str(node.target))(*given[1:], **named)
            else:
                function: Any = node.target if module is None else functools.partial(type(module).forward, module)
                found = function(*given, **named)
        except (RuntimeError, TypeError, ValueError):
            return True
    return bool((found != 0).any())


def _writes(node: fx.Node) -> bool:
    """True if what the first operand holds is afterwards what the node gives."""
    return name_of(node) == "setitem" or (node.op == "call_method" and str(node.target).endswith("_"))


def _heard(model: nn.Module, groups: ChannelGroups, quiet: Tensor) -> Tensor:
    """Which of the components `quiet` a consumer still hears once their γ and β are zero: tried out on a copy.

    In both modes, since BatchNorm differs in them; activations that are zero at zero stay silent for every image.
    """
    silenced = copied(model)
    for _, norm, components in norms(silenced, groups):
        gone = quiet[components].to(norm.weight.device)
        for tensor in (norm.weight, norm.bias):
            if tensor is not None:
                tensor[gone] = 0
    heard = torch.zeros_like(quiet)

    def listen(components: Tensor) -> Any:
        def hook(consumer: nn.Module, arguments: tuple[Any, ...]) -> None:
            axis = -1 if isinstance(consumer, nn.Linear) else 1
            loud = (arguments[0].detach().movedim(axis, 0).flatten(1) != 0).any(1).cpu()
            if len(loud) == len(components):
                heard[components[loud]] = True
            else:
                heard[components] = True

        return hook

    modules = dict(silenced.named_modules())
    for layer in groups.layers:
        consumer = modules.get(layer.layer)
        if consumer is None:  # a functional call: nobody can listen
            heard[layer.inputs] = True
        else:
            consumer.register_forward_pre_hook(listen(layer.inputs))
    with torch.random.fork_rng(devices=[]):
        for training in (True, False):
            with evaluation_mode(silenced):
                silenced.train(training)
                silenced(example_input(silenced, groups.input_shape))
    return heard & quiet
