"""How a live module becomes a torch.fx graph whose nodes know their shapes.

Capture and pruning both start here, so that they see the same layers under the same names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import inspect
import operator
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from ptsim.capture.calls import attributes_restored
from ptsim.capture.chance import RandomState, chance_of, random_state_kept
from ptsim.capture.copies import device_of, hollow_copy
from ptsim.capture.exported import exported_graph
from ptsim.capture.faithful import does_the_same
from ptsim.capture.gradients import refusing_unseen_gradients
from ptsim.capture.looking import let_hooks_look
from ptsim.capture.standins import NOT_THE_CODE
from ptsim.capture.tracers import ShapedTracer, Tracer
from ptsim.capture.words import named_values
from ptsim.errors import UnsupportedModelError, lacks_memory, on_one_line
from ptsim.operators import IN_PARTS, plain_name
from ptsim.units import format_shape

_ASKS = "the code asks what kind of thing a value is"
_JOINING = ("cat", "stack")
_WRITING = ("copy_", "fill_", "zero_")
_NAMES_A_PART = ("getitem", "narrow", "select")
_LIKE = re.compile(r"new_(empty|zeros|ones|full|empty_strided)|(empty|zeros|ones|full|rand|randn|randint)_like")


class Way(enum.Enum):
    """A way to trace a network, in the order in which they are tried."""

    PLAIN = "torch.fx, without shapes"
    SHAPED = "torch.fx, where the code may look at shapes"
    WITHOUT_BUFFERS = "torch.fx, where the code may look at buffers' values"
    EXPORT = "torch.export"


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def symbolic_graph(
    model: nn.Module,
    images_shape: tuple[int, ...] | None = None,
    *,
    buffers: bool = False,
    ways: Sequence[Way] = tuple(Way),
) -> fx.GraphModule:
    """The model's graph in the mode that it is in; it shares its modules and parameters with the model.

    With `buffers` what is computed from buffers, and what the code does to gradients, is part of the graph, unless the
    code looks at their values.

    With `images_shape` (N, C, H, W) the model's code may also look at shapes; `meta["looked"]` then says at which. What
    torch.fx cannot trace is then left to `torch.export`; `meta["traced_by"]` says which of the two it was, and
    `meta["draws"]` whether the code has drawn random numbers, which may decide on the way that it goes, and
    `meta["changes"]` what it has changed in attributes, which may decide at the next call (see `ways`).

    `ways` are those that may be tried, in order; `meta["way"]` says which it was. Who traces a network again
    that has only shrunk knows which one works. Each of them meets the same random numbers, also those that the code
    draws from generators of its own. In training torch follows gradients, in evaluation it does not.

    Raises:
        UnsupportedModelError: neither can trace the model, or its forward needs more than the images.
    """
    _check_takes_images(model)
    name = type(model).__name__
    makers: dict[Way, Callable[[], Tracer]] = {Way.PLAIN: functools.partial(Tracer, buffers=buffers, backward=buffers)}
    if images_shape is not None:
        makers[Way.SHAPED] = functools.partial(ShapedTracer, model, images_shape, backward=buffers)
    if buffers:
        makers[Way.WITHOUT_BUFFERS] = functools.partial(Tracer, backward=True)
    errors: dict[Way, Exception] = {}
    start = RandomState.now(chance_of(model).generators)
    for way in ways:
        if way not in makers:
            continue
        try:
            with attributes_restored(model) as changes, torch.set_grad_enabled(model.training):
                tracer = makers[way]()
                graph = tracer.trace(model)
                changed = changes()
                unsure = tracer.asked and len(ways) > 1
                if unsure and images_shape is not None and not does_the_same(model, graph, images_shape, start):
                    raise fx.proxy.TraceError(_ASKS)
                _name_parts(graph)
                # Tensors that the code made are attributes of the model until here.
                module = fx.GraphModule(tracer.root, graph, name)
            break
        except UnsupportedModelError:  # found here: no other tracer does better
            raise
        except Exception as error:  # torch.fx lets any error of the traced code through
            if lacks_memory(error):
                raise
            errors[way] = error
            start.restore()  # the next one meets the same numbers
    else:
        exported = _exported(model, images_shape, ways, errors, gradients=buffers)
        asks = any(str(error) == _ASKS for error in errors.values())
        if (
            asks
            and images_shape is not None
            and not does_the_same(model, exported.graph, images_shape, start, exported)
        ):
            raise UnsupportedModelError(
                f"{_ASKS} in {name}, and computes something else while torch.fx and torch.export trace it"
            )
        exported.meta["draws"] = not start.is_now()
        return exported
    module.meta["looked"] = tracer.looked if isinstance(tracer, ShapedTracer) else {}
    module.meta["traced_by"], module.meta["way"] = "torch.fx", way
    module.meta["draws"], module.meta["changes"] = not start.is_now(), changed
    return module


def _check_takes_images(model: nn.Module) -> None:
    """Refuse a network whose forward cannot be called with the images alone."""
    try:
        signature = inspect.signature(model.forward)
    except ValueError:  # of compiled code, which does not say
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise UnsupportedModelError(
            f"the forward of {type(model).__name__} cannot be called with the images alone: {error}",
            hint="give its other arguments defaults, or wrap the network in a module that makes them from the images"
            if any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in signature.parameters.values())
            else "let it take the images as its first argument",
        ) from error


def _exported(
    model: nn.Module,
    images_shape: tuple[int, ...] | None,
    ways: Sequence[Way],
    errors: Mapping[Way, Exception],
    *,
    gradients: bool,
) -> fx.GraphModule:
    """The graph by torch.export, after the `errors` of torch.fx; with `gradients` it shows what is done to them."""
    last = errors.get(Way.SHAPED) or next(iter(errors.values()), None)
    try:
        assert images_shape is not None, "else there is nothing to export for"
        assert Way.EXPORT in ways, "else it is left out"
        with (
            _disable_current_modes(),
            attributes_restored(model),
            torch.set_grad_enabled(model.training),
            _nothing_remembered(model),
        ):
            twin = hollow_copy(model, str(device_of(model)))
            let_hooks_look(twin)
            with refusing_unseen_gradients() if gradients else contextlib.nullcontext():
                module = exported_graph(model, twin, images_shape)
    except UnsupportedModelError:
        raise
    except Exception as error:  # it, too, lets any error of the model's code through
        if lacks_memory(error):
            raise
        last, name = last or error, type(model).__name__
        if "not installed as a submodule" in str(last):
            raise UnsupportedModelError(
                f"{name} calls a layer that is no part of it, so that no optimizer trains it{_place(last)}",
                hint="keep layers in nn.ModuleList or nn.ModuleDict, not in a plain list or dict",
            ) from last
        raise UnsupportedModelError(
            f"torch.fx cannot trace {name}: {_one_line(last)}{_place(last)}; nor can torch.export",
            hint="tracing needs a forward without branches on tensor values",
        ) from last
    module.meta["traced_by"], module.meta["way"], module.meta["changes"] = "torch.export", Way.EXPORT, {}
    return module


@contextlib.contextmanager
def _nothing_remembered(model: nn.Module) -> Iterator[None]:
    """Functions of the model's code that remember what they gave (`functools.cache`) forget what they made inside.

    It is no real tensor. One that made nothing inside keeps what it has.
    """
    functions: list[Any] = [value for value in named_values(model.modules()) if hasattr(value, "cache_info")]
    made = [function.cache_info().misses for function in functions]
    try:
        yield
    finally:
        for function, before in zip(functions, made, strict=True):
            if function.cache_info().misses != before:
                function.cache_clear()


def by_export(graph: fx.GraphModule) -> bool:
    """True if `torch.export` traced it: all shapes, and what the code computes with them, are constants in it."""
    return bool(graph.meta["traced_by"] == "torch.export")


def note_tracer(name: str, graph: fx.GraphModule) -> None:
    """A warning where not torch.fx but `torch.export` has traced the network."""
    if by_export(graph):
        warnings.warn(f"{name} is traced by torch.export, because torch.fx cannot trace its code", stacklevel=3)


def trace_graph(model: nn.Module, input_shape: tuple[int, int, int], *, batch: int = 2) -> fx.GraphModule:
    """The model's graph as evaluation mode runs it; `node.meta["tensor_meta"].shape` holds shapes for `batch` images.

    The model is left as it was: no mode, buffer or random state changes.

    Raises:
        UnsupportedModelError: torch.fx cannot trace the model, or its forward fails on such an image.
    """
    with evaluation_mode(model), torch.no_grad(), random_state_kept(model):
        module = symbolic_graph(model, (batch, *input_shape))
        with naming_the_image(model, input_shape):
            ShapeProp(module).propagate(example_input(model, input_shape, batch=batch))
    return module


def traced_into(model: nn.Module, graph: fx.GraphModule) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose own code was traced: neither called as a whole nor part of one that is."""
    calls = called_modules(graph)
    inside = tuple(f"{call}." for call in calls)
    return ((p, module) for p, module in model.named_modules() if p not in calls and not p.startswith(inside))


def sliced_by(node: fx.Node) -> fx.Node | None:
    """The `tensor_split` of which a node is a part: torch makes every part by a slice of its own, as `x[:, :8]` does.

    None of any other node. Those of `chunk`, `split` and `unbind` are made by one operator, which also joins their
    gradients. Source: torch's aten/src/ATen/native/TensorShape.cpp, `tensor_split`, and native_functions.yaml.
    """
    if node.target is not operator.getitem or not isinstance(node.args[1], int):
        return None
    given = node.args[0]
    return given if isinstance(given, fx.Node) and plain_name(_called(given)) == "tensor_split" else None


def _name_parts(graph: fx.Graph) -> None:
    """Give the parts of a `tensor_split` that go into a concatenation as they are a node each (see `sliced_by`)."""
    for node in graph.nodes:
        joining = [user for user in node.users if user.args[:1] == (node,) and plain_name(_called(user)) in _JOINING]
        if plain_name(_called(node)) != "tensor_split" or not joining:
            continue
        places = node.args[1] if len(node.args) > 1 else next(iter(node.kwargs.values()))
        number = places if isinstance(places, int) else len(places) + 1 if isinstance(places, list | tuple) else 0
        with graph.inserting_after(node):
            parts = [graph.call_function(operator.getitem, (node, place)) for place in reversed(range(number))]
        for part in parts:
            part.meta["grad"] = node.meta["grad"]
        for user in joining if parts else ():
            user.args = (tuple(reversed(parts)), *user.args[1:])


def parts_used(node: fx.Node) -> frozenset[int] | None:
    """Which tensors are read of those that a node gives; None where they are not read one by one."""
    reading = [user for user in node.users if user.users or user.target is not operator.getitem]
    places = [user.args[1] if user.target is operator.getitem else None for user in reading]
    used = frozenset(place for place in places if isinstance(place, int))
    return used if all(isinstance(place, int) for place in places) else None


def written_by(node: fx.Node) -> fx.Node | None:
    """The tensor of which a statement writes a part: x of `x[i] = y` and of `x[i].copy_(y)`; None of any other node."""
    given = node.args[0] if node.args else None
    if not isinstance(given, fx.Node):
        return None
    if node.target is operator.setitem:
        return given
    whole = given.args[0] if _called(node) in _WRITING and only_written(given) else None
    return whole if isinstance(whole, fx.Node) else None


def only_written(node: fx.Node) -> bool:
    """Whether a part of a tensor is named to be written and is never read: `x[:, 1:]` of `x[:, 1:].zero_()`."""
    whole = node.args[0] if node.args else None
    if _called(node) not in _NAMES_A_PART or not isinstance(whole, fx.Node) or plain_name(_called(whole)) in IN_PARTS:
        return False
    return bool(node.users) and all(
        _called(user) in _WRITING and user.args[0] is node and not user.users for user in node.users
    )


def shape_written(node: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[int, ...]:
    """The shape of what a statement writes (see `written_by`); where a mask chooses, that of the whole tensor."""
    target = values[node.args[0]]  # type: ignore[index] # a node
    if node.target is not operator.setitem:
        return tuple(target.shape)
    index: Any = fx.map_arg(node.args[1], values.__getitem__)
    masked = any(i.dtype is torch.bool for i in output_tensors(index))
    return tuple(target.shape if masked else target.detach()[index].shape)


def reads_none(node: fx.Node) -> bool:
    """Whether a node makes a tensor like another one and reads none of its elements: `x.new_empty(4)`, `zeros_like`."""
    return _LIKE.fullmatch(_called(node)) is not None


def _called(node: fx.Node) -> str:
    """The name of the function or method that a node calls; of any other node nothing."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", ""))


def called_modules(graph: fx.GraphModule) -> set[str]:
    """Names of the modules that a graph calls as a whole."""
    return {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}


@contextlib.contextmanager
def naming_the_image(model: nn.Module, input_shape: tuple[int, int, int]) -> Iterator[None]:
    """What fails inside becomes an `UnsupportedModelError` that names the model and the image it was given.

    Not a lack of memory, which is not the model's fault.
    """
    try:
        yield
    except Exception as error:  # the model's own code runs here
        if lacks_memory(error):
            raise
        shape = format_shape(input_shape)
        raise UnsupportedModelError(
            f"{type(model).__name__} fails on an image of {shape}: {_one_line(error)}"
        ) from error


def example_input(model: nn.Module, input_shape: tuple[int, int, int], *, batch: int = 2) -> Tensor:
    """Random images of the model's device and floating-point type, shape (batch, C, H, W), from a seed of their own."""
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((batch, *input_shape), generator=generator)
    return images.to(device=reference.device, dtype=reference.dtype)


def output_tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in what a model takes or returns: dicts, sequences, dataclasses, and what torch's pytree knows."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for part in output.values():
            yield from output_tensors(part)
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from output_tensors(part)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from output_tensors(getattr(output, field.name))
    else:
        yield from (leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))


def _place(error: Exception) -> str:
    """The last line of the model's own code in an error's traceback, in brackets."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((*NOT_THE_CODE, "<"))
    ]
    if not frames:
        return ""
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line})"


def _one_line(error: Exception) -> str:
    return on_one_line(str(error).partition("While executing")[0]) or type(error).__name__
