"""How a live module becomes a torch.fx graph whose nodes know their shapes.

Capture and pruning both start here, so that they see the same layers under the same names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ptsim.errors import UnsupportedModelError


class Tracer(fx.Tracer):
    """Keeps torch's own modules whole, and every module that says `ptsim_leaf = True` (what pruning puts in)."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """True for a module that becomes one node."""
        return getattr(module, "ptsim_leaf", False) or super().is_leaf_module(module, qualified_name)


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


def symbolic_graph(model: nn.Module) -> fx.GraphModule:
    """The model's graph in the mode that it is in; it shares its modules and parameters with the model.

    Raises:
        UnsupportedModelError: torch.fx cannot trace the model.
    """
    name = type(model).__name__
    tracer = Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:  # torch.fx lets any error of the traced code through
        raise UnsupportedModelError(
            f"torch.fx cannot trace {name}: {_one_line(error)}",
            hint="symbolic tracing needs a forward without branches on tensor values",
        ) from error
    return fx.GraphModule(tracer.root, graph, name)


def trace_graph(model: nn.Module, input_shape: tuple[int, int, int], *, batch: int = 2) -> fx.GraphModule:
    """The model's graph as evaluation mode runs it; `node.meta["tensor_meta"].shape` holds shapes for `batch` images.

    The model is left as it was: no mode, buffer or random state changes.

    Raises:
        UnsupportedModelError: torch.fx cannot trace the model, or its forward fails on such an image.
    """
    with evaluation_mode(model), torch.no_grad(), torch.random.fork_rng():
        module = symbolic_graph(model)
        with naming_the_image(model, input_shape):
            ShapeProp(module).propagate(example_input(model, input_shape, batch=batch))
    return module


@contextlib.contextmanager
def naming_the_image(model: nn.Module, input_shape: tuple[int, int, int]) -> Iterator[None]:
    """What fails inside becomes an `UnsupportedModelError` that names the model and the image it was given."""
    try:
        yield
    except Exception as error:  # the model's own code runs here
        shape = "×".join(str(n) for n in input_shape)
        raise UnsupportedModelError(
            f"{type(model).__name__} fails on an image of {shape}: {_one_line(error)}"
        ) from error


def example_input(model: nn.Module, input_shape: tuple[int, int, int], *, batch: int = 2) -> Tensor:
    """Random images of the model's device and floating-point type, shape (batch, C, H, W), from a seed of their own."""
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((batch, *input_shape), generator=generator)
    return images.to(device=reference.device, dtype=reference.dtype)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).partition("While executing")[0].split())
    return text[:300] or type(error).__name__
