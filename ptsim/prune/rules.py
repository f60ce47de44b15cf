"""How does an operator pass channels on? The table of rules, and what a rule is given.

A rule is a function of one `Call`, registered by decorator for the names of functions and methods, for classes of
modules, or for a function object:

    @rule("softmax", nn.Softmax)
    def softmax(call: Call) -> Label:
        return call.along([call.argument(1, "dim")])

It gives the label of what the operator returns, ties labels that meet (`call.state.unite`), and refuses with a reason
what it cannot follow (`call.refuse`). Packages register rules of their own in a module that they name under the entry
point group `ptsim.propagation_rules`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, fx, nn

from ptsim.operators import TORCH_LIBRARIES, registered_by
from ptsim.prune.labels import NO_SLOTS, Facets, Label, State, compress

ENTRY_POINTS = "ptsim.propagation_rules"
_OURS_TO_READ = ("torch", "torchvision", "_operator", "operator", "math", "builtins")  # known by a name alone


class RefusedError(Exception):
    """Raised by a rule: the channels that flow in have to stay; says why."""


class Call:
    """One node of the graph as its rule sees it.

    Attributes:
        state: what has been found out so far; `unite`, `freeze` and `axis` add to it.
        node: of the graph.
        name: of the function or method without the underscore of an in-place form; "" for a module.
        module: that is called, None for a function; `path` is its name.
        value: what the node returns, on tensors without storage.
        op: what messages call it.
    """

    def __init__(
        self,
        interpreter: fx.Interpreter,
        state: State,
        labels: Mapping[fx.Node, Label],
        node: fx.Node,
        value: Any,
        module: nn.Module | None,
    ) -> None:
        self._interpreter, self._labels = interpreter, labels
        self.state, self.node, self.value, self.module = state, node, value, module
        self.name = name_of(node)
        self.path = str(node.target) if module is not None else ""
        self.op = f"{self.name} at {node.name}" if module is None else f"{self.path} ({type(module).__name__})"
        self.sources = [source for source in node.all_input_nodes if labels.get(source) is not None]

    @property
    def labels(self) -> list[Label]:
        """Of every source that has one."""
        return [self._labels[source] for source in self.sources]

    @property
    def x(self) -> Tensor:
        """The label of the first source; refused if that is no single activation."""
        label = self._labels[self.sources[0]] if self.sources else None
        if not isinstance(label, Tensor):
            self.refuse(f"{self.op} has no rule")
        return label

    @property
    def rank(self) -> int:
        """Of the first source."""
        return int(self.sources[0].meta["value"].ndim)

    def label_of(self, source: Any) -> Label:
        """The label of an argument; None for a number."""
        return self._labels.get(source) if isinstance(source, fx.Node) else None

    @property
    def layer(self) -> str:
        """What a layer without a module is called: its node, with brackets where a module has that name."""
        return f"{self.node.name}()" if self.node.name in self.state.modules else self.node.name

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """The value of one argument of a function; "dim" may be called "axis"."""
        args, kwargs = self._interpreter.fetch_args_kwargs_from_env(self.node)
        if name == "dim" and "axis" in kwargs:
            name = "axis"
        return kwargs[name] if name in kwargs else args[position] if len(args) > position else default

    def source(self, position: int, name: str) -> Any:
        """The same argument as it stands in the graph: a node, or a constant."""
        node = self.node
        return node.kwargs[name] if name in node.kwargs else node.args[position] if len(node.args) > position else None

    def refuse(self, reason: str) -> NoReturn:
        """Give up: what flows in has to stay."""
        raise RefusedError(reason)

    def stays(self, reason: str) -> Label:
        """The label of a result of which nothing can be removed."""
        return stays(self.state, self.value, reason)

    def vector(self, dim: int, size: int) -> Tensor | None:
        """The first label as a vector along `dim`; None, and frozen, if it changes along another axis as well."""
        dim %= self.x.ndim
        if any(length > 1 for d, length in enumerate(self.x.shape) if d != dim):
            self.state.freeze(self.x, f"{self.op} meets channels that lie along several axes")
            return None
        return self.x.flatten().expand(size)

    def along(self, dims: Iterable[int], verb: str = "combines") -> Label:
        """The label of an operator that combines positions along `dims`.

        Where the channel does not change along them, it passes. Where it changes along one of them and along others as
        well (branches of a selective kernel), the positions that are combined go together. Channels that are all
        combined with each other have to stay.
        """
        x = compress(self.x)  # channels that go together are one
        dims = [dim % x.ndim for dim in dims]
        inside = [dim for dim in dims if x.shape[dim] > 1]
        if inside:
            if all(length == 1 for dim, length in enumerate(x.shape) if dim not in inside):
                self.refuse(f"{self.op} {verb} these channels, so that removing one would change the others")
            first = x
            for dim in inside:
                first = first.narrow(dim, 0, 1)
            self.state.unite(first, x)
            x = first
        return tuple(x for _ in self.value) if isinstance(self.value, tuple | list) else x

    def expanded(self, label: Tensor, node: fx.Node) -> Tensor:
        """The label at the full size of what `node` returns."""
        return label.expand(node.meta["value"].shape)

    def moved(self, target: Any, labels: Mapping[fx.Node, Any]) -> Label:
        """Run `target` itself on labels in place of the sources' values."""

        def argument(n: fx.Node) -> Any:
            return self.expanded(labels[n], n) if n in labels else self._interpreter.env[n]

        args: Any = fx.map_arg(self.node.args, argument)
        kwargs: Any = fx.map_arg(self.node.kwargs, argument)
        if isinstance(target, FirstAttribute):
            args, kwargs = args[:1], {}
        if target == "view":  # labels may be laid out differently
            target = "reshape"
        result = getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)
        return tuple(compress(part) for part in result) if isinstance(result, tuple | list) else compress(result)


@dataclasses.dataclass(frozen=True)
class FirstAttribute:
    """`x.T` as a function of x."""

    name: str

    def __call__(self, x: Tensor) -> Tensor:
        """The attribute."""
        result: Tensor = getattr(x, self.name)
        return result


Rule: TypeAlias = Callable[[Call], Label]
_RULES: dict[Any, Rule] = {}  # by name, class of modules or function object
_TUPLES: set[Rule] = set()
_SHAPES: set[Rule] = set()
_SIZES: set[Rule] = set()


def rule(
    *operators: str | type[nn.Module] | Callable[..., Any],
    tuples: bool = False,
    shapes: bool = False,
    sizes: bool = False,
) -> Callable[[Rule], Rule]:
    """Register the decorated function for names of functions and methods, classes of modules, or function objects.

    A later registration takes the place of an earlier one. Names are those of torch's functions, without the
    underscore of an in-place form; functions and classes of other packages are named with their package
    ("einops.rearrange"). A name may be a list, separated by white space.

    Args:
        operators: what the rule is for; a class stands for its subclasses, too.
        tuples: the rule also takes what other operators return as a tuple; otherwise such a call is refused.
        shapes: numbers of channels among the arguments may change with the network, which is tried out; otherwise
            those channels have to stay.
        sizes: so may a shape that is given for the size of its image alone.
    """

    def register(function: Rule) -> Rule:
        for operator in operators:
            for key in operator.split() if isinstance(operator, str) else [operator]:
                _RULES[key] = function
        if tuples:
            _TUPLES.add(function)
        if shapes:
            _SHAPES.add(function)
        if sizes:
            _SIZES.add(function)
        return function

    return register


def takes_tuples(function: Rule) -> bool:
    """True if the rule was registered with `tuples`."""
    return function in _TUPLES


def takes_shapes(function: Rule | None) -> bool:
    """True if the rule was registered with `shapes`."""
    return function in _SHAPES


def takes_sizes(function: Rule | None) -> bool:
    """True if the rule was registered with `sizes`."""
    return function in _SIZES


def rule_named(name: str) -> Rule | None:
    """The rule of functions and methods of this name."""
    return _RULES.get(name)


def rule_for_function(node: fx.Node) -> Rule | None:
    """The rule of a function or method, by the object or by its name; None for an unknown one of another package."""
    _load_foreign()
    target = node.target
    if callable(target) and (target in _RULES or not is_known(target)):
        return _RULES.get(target) or _RULES.get(f"{_package(target)}.{name_of(node)}")
    return _RULES.get(name_of(node))


def is_known(function: Any) -> bool:
    """True for a function of torch or Python, which is known by its name alone."""
    return _package(function) in _OURS_TO_READ


def _package(function: Any) -> str:
    """The package of a function; of what is registered with torch (`torch.ops.mine.scale`) the library."""
    library = registered_by(function)
    if library is not None and library not in TORCH_LIBRARIES:
        return library
    return str(getattr(function, "__module__", "") or "torch").partition(".")[0]


def rule_for_module(module: nn.Module) -> Rule | None:
    """The rule of the nearest of the module's classes that has one."""
    _load_foreign()
    for kind in type(module).__mro__:
        found = _RULES.get(kind) or _RULES.get(f"{kind.__module__.partition('.')[0]}.{kind.__name__}")
        if found is not None:
            return found
    return None


@functools.cache
def _load_foreign() -> None:
    """Import the modules of installed packages that register rules."""
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        point.load()


def name_of(node: fx.Node) -> str:
    """What a call is called: without the underscore of an in-place form; empty for a module."""
    if node.op == "call_module":
        return ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name.rstrip("_") or name


def stays(state: State, value: Any, reason: str) -> Label:
    """The label of `value` if nothing of it can be removed."""
    if isinstance(value, Tensor):
        return state.stays(value, reason)
    if isinstance(value, tuple | list):
        return tuple(stays(state, part, reason) for part in value)
    return None


def tensor_labels(label: Label) -> list[Tensor]:
    """The tensors in a label: of an activation, of several, or of the axes of a parameter."""
    if isinstance(label, tuple):
        return [found for part in label for found in tensor_labels(part)]
    if isinstance(label, Facets):
        return list(label.labels)
    return [label] if isinstance(label, Tensor) else []


def axes_of(label: Label, rank: int) -> list[Tensor]:
    """Per axis of a tensor of `rank` the slots of the channels along it."""
    parts = label.labels if isinstance(label, Facets) else [label] if isinstance(label, Tensor) else []
    axes = []
    for dim in range(rank):
        along = [part.flatten() for part in parts if part.ndim == rank and part.shape[dim] > 1]
        slots = torch.cat([*along, NO_SLOTS])
        axes.append(slots[slots >= 0])
    return axes
