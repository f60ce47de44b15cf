"""What does a model's code see in place of a value while torch.fx traces it?"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from ptsim.capture.gradients import hooked_gradient

NOT_THE_CODE = tuple(f"{folder}/" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
_DEVICE_QUESTIONS = frozenset({"is_cpu", "is_cuda", "is_maia", "is_meta", "is_mps", "is_mtia", "is_xla", "is_xpu"})


def _on(name: str, device: torch.device) -> Any:
    """What the attribute `name` of a tensor on `device` says of the device; None for every other attribute."""
    if name == "device":
        return device
    if name == "get_device":
        return lambda: -1 if device.type == "cpu" else device.index or 0
    return name == f"is_{device.type}" if name in _DEVICE_QUESTIONS else None


def is_the_models(node: fx.Node) -> bool:
    """True for a parameter or buffer, or what was made of one alone, which may share its memory."""
    while node.op.startswith("call") and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


_COPYING = frozenset({"imul", "itruediv", "ipow"})  # where a gradient needs what they overwrite


def _in_place(name: str) -> Any:
    """`weight -= …` on the memory of a parameter or buffer; of an activation torch.fx makes a new tensor, as ever.

    `node.meta["augments"]` tells that it does not, and `node.meta["overwrites"]` of a product, a quotient or a power.
    """

    def method(self: _Noted, other: Any) -> Any:
        if is_the_models(self.node):
            return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})
        made = getattr(operator, name[1:])(self, other)
        if isinstance(made, fx.Proxy):
            made.node.meta["augments"] = True
            if name in _COPYING:
                made.node.meta["overwrites"] = True
        return made

    return method


class _Noted:
    """Notes what the code writes into a value, which torch.fx itself does not."""

    tracer: Any
    node: fx.Node

    @property  # type: ignore[misc] # an object's class can be set
    def __class__(self) -> Any:
        """Its class, which `isinstance` looks at; for the model's code that of the value, where it can be told."""
        asking = sys._getframe(1).f_code
        ours = asking.co_filename.startswith(NOT_THE_CODE) and asking.co_name != "is_tensor"
        return type(self) if ours else self.tracer.kind_of(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """What the code sets of a tensor (`weight.data = …`) is a node of the graph."""
        if hasattr(Tensor, name):
            self.tracer.create_proxy("call_function", setattr, (self, name, value), {})
        else:
            super().__setattr__(name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ipow"):
    setattr(_Noted, f"__{_name}__", _in_place(_name))


class StandIn(_Noted, fx.Proxy):
    """Records `x[index] = value` and hooks, as torch.fx does not, and notes where code may see that it is no tensor."""

    def __getattr__(self, name: str) -> Any:
        self.tracer.asked |= not hasattr(Tensor, name)  # `hasattr` finds everything
        return _PlainAttribute(self, name)

    def register_hook(self, hook: Any) -> Any:
        """A hook on the gradient is noted; it can be taken off again."""
        self.tracer.create_proxy("call_function", hooked_gradient, (self,), {})
        return SimpleNamespace(remove=lambda: None)


class _PlainAttribute(_Noted, fx.proxy.Attribute):
    """`weight.data`, or `x.view` before it is called."""

    def __getattr__(self, name: str) -> Any:
        return _PlainAttribute(self, name)


class _Looks:
    """Stands for a value; numbers and tuples of numbers can be looked at."""

    tracer: Any
    node: fx.Node

    def __int__(self) -> int:
        return int(self.tracer.look(self.node, "number"))

    def __index__(self) -> int:
        return int(self.tracer.look(self.node, "number"))

    def __float__(self) -> float:
        return float(self.tracer.look(self.node, "number"))

    def __len__(self) -> int:
        if isinstance(self.tracer._values[self.node], Tensor):
            return int(self.tracer.create_proxy("call_method", "size", (self, 0), {}))
        return len(self.tracer.look(self.node, "condition"))

    def __iter__(self) -> Iterator[Any]:
        value = self.tracer._values[self.node]
        return iter([operator.getitem(self, index) for index in range(len(value))])  # type: ignore[call-overload] # fx's


class ShapedStandIn(_Looks, StandIn):
    """Knows the value's shape, or the number, and says the truth about them."""

    def __getattr__(self, name: str) -> Any:
        self.tracer.asked |= not hasattr(self.tracer._values[self.node], name)
        known = _on(name, self.tracer.device) if isinstance(self.tracer._values[self.node], Tensor) else None
        return _Attribute(self, name) if known is None else known


class _Attribute(_Looks, _Noted, fx.proxy.Attribute):
    """`x.shape`, or `x.view` before it is called."""

    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)
