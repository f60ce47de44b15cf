"""The rules of what a model's code does to gradients (`ptsim.capture.gradients`)."""

from __future__ import annotations

from torch import Tensor

from ptsim.capture.gradients import gradient_goes_to, gradient_of, hooked_gradient
from ptsim.prune.hooks import changes_gradient
from ptsim.prune.labels import Facets, Label
from ptsim.prune.rules import Call, rule


@rule(gradient_of)
def like_the_output(call: Call) -> Label:
    """A gradient has the channels of what it is the gradient of."""
    return call.labels[0]


@rule(gradient_goes_to)
def like_the_input(call: Call) -> Label:
    """Position by position the gradient belongs to what the function was given."""
    x, gradient = (call.label_of(source) for source in call.node.args)
    if (
        isinstance(x, Facets)
        or not isinstance(x, Tensor)
        or not isinstance(gradient, Tensor)
        or x.ndim != gradient.ndim
    ):
        call.refuse(f"{call.op} has a rule for activations alone")
    call.state.unite(x, gradient)
    return x


@rule(hooked_gradient)
def hooked(call: Call) -> Label:
    """A hook on a tensor's gradient may do anything; that of a module is tried out."""
    path = call.argument(1, "path")
    if path is None:
        call.refuse(f"the code puts a hook on a gradient, or has a backward that cannot be followed ({call.node.name})")
    if changes_gradient(call.state.modules[path], call.argument(2, "given"), call.argument(3, "made")):
        call.refuse(f"a hook changes the gradient of {path}")
    return call.x
