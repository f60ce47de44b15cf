"""Which positions of which tensors are the same channel? Channel labels, propagated through a torch.fx graph.

Every activation carries a *label*: an int64 tensor of the activation's rank, 1 long in every axis along which the
channel does not change. A label ≥ 0 is a *slot*, one position of one axis of one parameter or buffer; slots that must
be kept or removed together are recorded as pairs. A label < 0 marks a position that has to stay, −1 − index into
`reasons`. Each operator has a rule; one without a rule freezes the channels that flow into it, with a reason.

Operators that only move elements (reshape, permute, chunk, roll, …) are run on the labels themselves, so that channel
shuffles, window partitions and flattens need no rule of their own.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn

from ptsim.capture.graph import example_input, hollow_copy, symbolic_graph

WIDTH = "width"  # stands for a tensor of a normalisation that has none
UNKNOWN = -(2**40)  # the label of an axis that an earlier network did not have
AxisKey: TypeAlias = tuple[str, int]  # tensor's qualified name, dimension


@dataclasses.dataclass
class Facets:
    """A parameter or buffer used directly: one label per axis longer than 1; the operator decides which one counts."""

    labels: list[Tensor]


Label: TypeAlias = "Tensor | Facets | tuple[Any, ...] | None"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTWISE = _words(
    """
    relu relu6 leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh sigmoid tanh softplus
    softsign logsigmoid tanhshrink hardshrink softshrink threshold rrelu dropout alpha_dropout feature_dropout
    dropout1d dropout2d dropout3d feature_alpha_dropout stochastic_depth contiguous clone detach float double
    half bfloat16 to abs neg exp log sqrt rsqrt square clamp clip pow erf sign cos sin floor round reciprocal
    add sub mul div truediv iadd isub imul itruediv maximum minimum multiply divide subtract rsub addcmul addcdiv lerp
    true_divide floor_divide floordiv remainder fmod mod ipow float_power atan2 hypot copysign
    where identity drop_path masked_fill nan_to_num requires_grad
    tan sinh cosh asin acos atan asinh acosh atanh exp2 expm1 log1p log2 log10 erfc ceil trunc frac sgn logit pos
    clamp_min clamp_max zeros_like ones_like full_like empty_like type type_as bool int long short
    eq ne lt gt le ge isnan isinf isfinite logical_and logical_or logical_xor logical_not and or xor invert
    """
)
MOVEMENT_SAFE = _words(
    """
    transpose permute flatten unsqueeze swapaxes swapdims movedim moveaxis t numpy_T
    """
)
MOVEMENT = MOVEMENT_SAFE | _words(
    """
    view reshape squeeze expand expand_as view_as chunk split tensor_split unbind getitem roll repeat narrow
    select index_select flip unflatten tile repeat_interleave channel_shuffle pixel_shuffle pixel_unshuffle
    unfold split_with_sizes
    """
)
REDUCTION = _words(
    """
    mean sum amax amin prod std var norm logsumexp argmax argmin
    """
)
ALONG = _words(
    """
    softmax log_softmax softmin cumsum normalize
    """
)
SPATIAL = _words(
    """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d
    interpolate upsample upsample_nearest upsample_bilinear
    """
)
EXTREMES = _words("max min median mode topk sort kthvalue")
CONSTANTS = _words(
    "new_zeros new_ones new_full new_empty new_tensor"
)  # of the tensor they are called on, only its type
POSITIONS = {"normalize": 2, "norm": 2, "topk": 2, "kthvalue": 2}  # of the argument `dim`; 1 for the others
OURS_TO_READ = ("torch", "torchvision", "_operator", "operator", "math", "builtins")  # functions known by their names
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
INSTANCE_NORMS = (nn.modules.instancenorm._InstanceNorm,)
_POOLS = tuple(
    getattr(nn.modules.pooling, name)
    for name in ("_MaxPoolNd", "_AvgPoolNd", "_AdaptiveAvgPoolNd", "_AdaptiveMaxPoolNd", "_LPPoolNd")
)


@dataclasses.dataclass(frozen=True)
class Weighted:
    """A convolution or linear layer: where its weight is and the slots of its input and output channels.

    `inputs` has one slot per input channel; for a grouped convolution they belong to no axis of the weight alone.
    `trained` is False for a fixed filter in a buffer and for a frozen parameter beside others that are trained.
    """

    layer: str
    weight: str
    groups: int
    depthwise: bool
    transposed: bool
    inputs: Tensor
    outputs: Tensor
    nodes: tuple[str, ...]
    trained: bool = True

    @property
    def decides(self) -> bool:
        """True if its weights say which channels are sparse: depthwise and fixed filters follow their neighbours."""
        return self.trained and not self.depthwise


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


def tensor_names(model: nn.Module) -> dict[int, str]:
    """Id of every parameter and buffer → its (first) qualified name."""
    names: dict[int, str] = {}
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        names.setdefault(id(tensor), name)
    return names


class Propagation(fx.Interpreter):
    """One pass over one graph; slots, pairs and freezes accumulate over several graphs of the same model in `state`."""

    def __init__(self, module: fx.GraphModule, state: State) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.looked: dict[str, str] = module.meta["looked"]
        self.state = state
        self.labels: dict[fx.Node, Label] = {}
        self.counts: dict[fx.Node, Any] = {}  # what a number or shape says about: slots, or slots per axis
        self.op = ""

    def run_node(self, n: fx.Node) -> Any:
        """Run the node on meta tensors, then its rule on the labels."""
        value = super().run_node(n)
        n.meta["value"] = value
        self.labels[n] = self._rule(n, value)
        if n.op.startswith("call"):
            self._count(n, value)
            for slots in _flat(self.counts.get(n)) if n.name in self.looked else ():
                if self.looked[n.name] == "number":
                    self.state.freeze(slots, f"the model's code computes with the number of these channels ({n.name})")
                else:
                    self.state.sensitive(slots)
        return value

    def _count(self, node: fx.Node, value: Any) -> None:
        """Follow numbers that say how many channels there are; freeze the channels where one enters the arithmetic.

        Shapes that a reshape or a slice is given may change with the network: they are tried out later.
        """
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        name, arguments = _name(node), node.args
        if isinstance(value, (Tensor, nn.Module)) or self.labels.get(node) is not None:
            if name not in MOVEMENT:
                for n in node.all_input_nodes:
                    for slots in _flat(self.counts.get(n)):
                        self.state.freeze(slots, f"{self.op} computes with the number of these channels")
            return
        if source is None:
            return
        known = self.counts.get(source)
        if isinstance(source.meta["value"], Tensor):
            axes = self._axes(source)
            dim = self._argument(node, 1, "dim") if name == "size" else None
            if isinstance(dim, int):
                self.counts[node] = axes[dim]
            elif name in ("size", "getattr"):
                self.counts[node] = tuple(axes) if isinstance(value, tuple) else None
            elif name != "dim":
                self.counts[node] = torch.cat([*axes, _NO_SLOTS])
        elif name == "getitem" and isinstance(known, tuple) and isinstance(arguments[1], (int, slice)):
            self.counts[node] = known[arguments[1]]
        else:
            parts = [slots for n in node.all_input_nodes for slots in _flat(self.counts.get(n))]
            self.counts[node] = torch.cat([*parts, _NO_SLOTS])

    def _axes(self, node: fx.Node) -> list[Tensor]:
        """Per axis of a tensor the slots of the channels along it."""
        label, rank = self.labels.get(node), node.meta["value"].ndim
        labels = label.labels if isinstance(label, Facets) else [label] if isinstance(label, Tensor) else []
        axes = []
        for dim in range(rank):
            along = [part.flatten() for part in labels if part.ndim == rank and part.shape[dim] > 1]
            slots = torch.cat([*along, _NO_SLOTS])
            axes.append(slots[slots >= 0])
        return axes

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module; a BatchNorm on meta tensors only checks and hands on the shape (its decomposition is slow)."""
        module = self.fetch_attr(target)
        if type(module).__name__ in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d") and args and args[0].is_meta:
            if args[0].shape[1] != module.num_features:
                raise RuntimeError(f"{target} expects {module.num_features} channels, got {args[0].shape[1]}")
            return torch.empty_like(args[0])
        return super().call_module(target, args, kwargs)

    # ------------------------------------------------------------------ dispatch

    def _rule(self, node: fx.Node, value: Any) -> Label:
        state = self.state
        if node.op == "placeholder":
            return state.stays(value, "it is the network's input") if isinstance(value, Tensor) else None
        if node.op == "get_attr":
            return self._attribute(value)
        if node.op == "output":
            for label in self._tensor_labels(node):
                state.freeze(label, "it is the network's output")
            return None
        if node.op == "call_module":
            module = self.fetch_attr(str(node.target))
            self.op = f"{node.target} ({type(module).__name__})"
            return self._module(node, module, value)
        name = _name(node)
        self.op = f"{name} at {node.name}"
        if callable(node.target) and not (getattr(node.target, "__module__", "") or "torch").startswith(OURS_TO_READ):
            return self._opaque(node, value, f"{self.op}, a function that is not traced, has no rule")
        return self._function(node, name, value)

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

    def _tensor_labels(self, node: fx.Node) -> list[Tensor]:
        found: list[Tensor] = []

        def collect(label: Label) -> None:
            if isinstance(label, Tensor):
                found.append(label)
            elif isinstance(label, tuple):
                for part in label:
                    collect(part)

        for source in node.all_input_nodes:
            collect(self.labels.get(source))
        return found

    def _opaque(self, node: fx.Node, value: Any, reason: str) -> Label:
        for label in self._tensor_labels(node):
            self.state.freeze(label, reason)
        return self._stays(value, reason)

    def _stays(self, value: Any, reason: str) -> Label:
        if isinstance(value, Tensor):
            return self.state.stays(value, reason)
        if isinstance(value, (tuple, list)):
            return tuple(self._stays(part, reason) for part in value)
        return None

    # ------------------------------------------------------------------ modules

    def _module(self, node: fx.Node, module: nn.Module, value: Any) -> Label:
        state, path = self.state, str(node.target)
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        x = self.labels.get(source) if source is not None else None
        if not isinstance(x, Tensor) or source is None or not isinstance(value, Tensor | tuple | list):
            return self._opaque(node, value, f"{self.op} is used in a way that has no rule")
        rank = source.meta["value"].ndim
        rule = getattr(module, "ptsim_labels", None)
        if rule is not None:  # what pruning itself puts in
            result: Label = rule(state, path, x, value)
            return result
        if not isinstance(value, Tensor):
            if isinstance(module, _POOLS):  # with indices
                return self._constant_along(node, _spatial_dims(rank), x, value)
            return self._opaque(node, value, f"{self.op} mixes channels in a way that has no rule")
        if isinstance(module, CONVS):
            bias = module.bias
            return self._conv(node, path, module.weight, bias, module.groups, module.kernel_size, x, value)
        if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            return self._conv(
                node, path, module.weight, module.bias, module.groups, module.kernel_size, x, value, transposed=True
            )
        if isinstance(module, nn.Linear):
            return self._linear(node, path, module.weight, module.bias, x, value)
        if isinstance(module, (*BATCH_NORMS, *INSTANCE_NORMS)):
            return self._per_channel(node, path, module, x, value)
        if isinstance(module, nn.GroupNorm) and module.num_groups == module.num_channels:
            return self._per_channel(node, path, module, x, value)
        if isinstance(module, nn.PReLU):
            return self._per_channel(node, path, module, x, value) if module.num_parameters > 1 else x
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, getattr(nn, "RMSNorm", nn.LayerNorm))):
            return self._normalisation(node, module, x, value)
        if isinstance(module, (*_POOLS, nn.Upsample)) or type(module).__module__ == "torch.nn.modules.padding":
            return self._constant_along(node, _spatial_dims(rank), x, value)
        if isinstance(module, (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d)):
            dim = getattr(module, "dim", 1)
            return self._constant_along(node, [dim if dim is not None else 1], x, value)
        if isinstance(module, (nn.Flatten, nn.Unflatten, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle)):
            return self._movement(node, module, value, safe=isinstance(module, nn.Flatten))
        if isinstance(module, nn.GLU):
            return self._halves(node, module.dim, x, value)
        if isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd)):
            return x
        if type(module).__module__ == "torch.nn.modules.activation" and not isinstance(module, nn.MultiheadAttention):
            return x
        return self._opaque(node, value, f"{self.op} mixes channels in a way that has no rule")

    def _vector(self, node: fx.Node, x: Tensor, dim: int, size: int) -> Tensor | None:
        """The label as a vector along `dim`; None (and frozen) if it changes along another axis as well."""
        dim %= x.ndim
        if any(length > 1 for d, length in enumerate(x.shape) if d != dim):
            self.state.freeze(x, f"{self.op} meets channels that lie along several axes")
            return None
        return x.flatten().expand(size)

    def _conv(
        self,
        node: fx.Node,
        layer: str,
        weight: Tensor,
        bias: Tensor | None,
        groups: int,
        kernel_size: tuple[int, ...],
        x: Tensor,
        value: Tensor,
        *,
        transposed: bool = False,
    ) -> Tensor:
        state = self.state
        dim = value.ndim - 1 - len(kernel_size)
        name = state.names.get(id(weight))
        if name is None or dim < 0:
            return state.opaque(x, value, f"{self.op} computes its weight")
        out_channels = value.shape[dim]
        in_channels = weight.shape[0] if transposed else weight.shape[1] * groups
        vector = self._vector(node, x, dim, in_channels)
        if transposed and groups > 1:
            return state.opaque(x, value, f"{self.op} is a grouped transposed convolution")
        outputs = state.axis(name, 1 if transposed else 0, out_channels)
        if groups == 1:
            was_grouped = state.seed is not None and (name, -1) in state.seed  # and one group is left
            inputs = state.axis(name, -1 if was_grouped else 0 if transposed else 1, in_channels)
        else:  # whole groups go together
            inputs = state.axis(name, -1, in_channels)
            state.unite(inputs.view(groups, -1)[:, :1], inputs.view(groups, -1))
            state.unite(inputs.view(groups, -1)[:, :1], outputs.view(groups, -1))
        if vector is None:
            state.freeze(inputs, f"{self.op} meets channels that lie along several axes")
        else:
            state.unite(inputs, vector)
        state.weighted(layer, weight, groups, inputs, outputs, node.name, transposed=transposed)
        state.bind(bias, outputs)
        return _along(outputs, dim, value.ndim)

    def _linear(
        self, node: fx.Node, layer: str, weight: Tensor, bias: Tensor | None, x: Tensor, value: Tensor
    ) -> Tensor:
        state = self.state
        name = state.names.get(id(weight))
        if name is None:
            return state.opaque(x, value, f"{self.op} computes its weight")
        vector = self._vector(node, x, -1, weight.shape[1])
        inputs, outputs = state.axis(name, 1, weight.shape[1]), state.axis(name, 0, weight.shape[0])
        if vector is None:
            state.freeze(inputs, f"{self.op} meets channels that lie along several axes")
        else:
            state.unite(inputs, vector)
        state.weighted(layer, weight, 1, inputs, outputs, node.name)
        state.bind(bias, outputs)
        return _along(outputs, value.ndim - 1, value.ndim)

    def _per_channel(self, node: fx.Node, path: str, module: nn.Module, x: Tensor, value: Tensor) -> Label:
        dim = 1
        vector = self._vector(node, x, dim, value.shape[dim])
        if vector is None:
            return self._opaque(node, value, f"{self.op} meets channels that lie along several axes")
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for tensor in tensors:
            if tensor.ndim == 1 and tensor.shape[0] == value.shape[dim]:
                self.state.bind(tensor, vector)
        if not tensors:  # its width stands in an attribute alone
            self.state.unite(self.state.axis(f"{path}.{WIDTH}", 0, value.shape[dim]), vector)
        return x

    def _normalisation(self, node: fx.Node, module: nn.Module, x: Tensor, value: Any) -> Label:
        if isinstance(module, nn.GroupNorm):
            dims: Iterable[int] = [1]
        elif isinstance(module, nn.LocalResponseNorm):
            dims = [1]
        else:
            dims = range(-len(module.normalized_shape), 0)  # type: ignore[arg-type] # always a tuple
        return self._constant_along(node, dims, x, value, verb="normalises over")

    def _constant_along(
        self, node: fx.Node, dims: Iterable[int], x: Tensor, value: Any, verb: str = "combines"
    ) -> Label:
        """Pass the label through if the channel does not change along `dims`; else freeze it."""
        if all(x.shape[dim] == 1 for dim in dims):
            return tuple(x for _ in value) if isinstance(value, (tuple, list)) else x
        return self._opaque(
            node, value, f"{self.op} {verb} these channels, so that removing one would change the others"
        )

    # ------------------------------------------------------------------ functions

    def _function(self, node: fx.Node, name: str, value: Any) -> Label:
        if isinstance(value, (tuple, list)) and not any(isinstance(part, Tensor) for part in value):
            return None
        if not isinstance(value, (Tensor, tuple, list)):
            return None
        sources = [n for n in node.all_input_nodes if self.labels.get(n) is not None]
        first = self.labels.get(sources[0]) if sources else None
        if not sources or name in CONSTANTS:
            return self._stays(value, f"{self.op} makes a constant tensor")
        if name == "getattr":
            return self._attribute_of(node, first, value)
        if name == "getitem" and isinstance(first, tuple) and isinstance(node.args[1], (int, slice)):
            return first[node.args[1]]
        if name in ("cat", "concat", "concatenate", "stack") and isinstance(value, Tensor):
            return self._concatenate(node, value, stack=name == "stack")
        if any(isinstance(self.labels[n], tuple) for n in sources):
            return self._opaque(node, value, f"{self.op} has no rule")
        if name in ("to", "type_as"):
            return first
        if name in ELEMENTWISE and isinstance(value, Tensor):
            return self._elementwise([(self.labels[n], n.meta["value"]) for n in sources], value)
        if name in ("max", "min") and isinstance(value, Tensor) and len(sources) == 2:
            return self._elementwise([(self.labels[n], n.meta["value"]) for n in sources], value)
        if name in MOVEMENT and not (name == "unfold" and node.op == "call_function"):
            target = node.target if callable(node.target) else name
            return self._movement(node, target, value, safe=name in MOVEMENT_SAFE)
        if isinstance(first, Facets):
            return self._opaque(node, value, f"{self.op} has no rule")
        assert isinstance(first, Tensor), "facets and tuples are handled above"
        if name in ("conv1d", "conv2d", "conv3d", "linear", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
            return self._functional_layer(node, name, first, value)
        if name in ("batch_norm", "instance_norm", "prelu"):
            return self._functional_per_channel(node, first, value)
        if name == "layer_norm":
            dims: Iterable[int] = range(-len(self._argument(node, 1, "normalized_shape")), 0)
            return self._constant_along(node, dims, first, value, verb="normalises over")
        if name in ("group_norm", "local_response_norm"):
            return self._constant_along(node, [1], first, value, verb="normalises over")
        if name in SPATIAL:
            return self._constant_along(node, _spatial_dims(first.ndim), first, value)
        if name == "pad" and isinstance(value, Tensor):
            widths = self._argument(node, 1, "pad")
            return self._pad(
                node, [-1 - index // 2 for index, width in enumerate(widths) if width], widths, first, value
            )
        if name in REDUCTION or name in EXTREMES:
            return self._reduce(node, name, first, value)
        if name in ALONG:
            dim = self._argument(node, POSITIONS.get(name, 1), "dim", 1 if name == "normalize" else None)
            if isinstance(dim, int):
                return self._constant_along(node, [dim], first, value)
        if name == "glu" and isinstance(value, Tensor):
            return self._halves(node, self._argument(node, 1, "dim", -1), first, value)
        return self._opaque(node, value, f"{self.op} mixes channels in a way that has no rule")

    def _argument(self, node: fx.Node, position: int, name: str, default: Any = None) -> Any:
        """The value of one argument of a call."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if name == "dim" and "axis" in kwargs:
            name = "axis"
        return kwargs[name] if name in kwargs else args[position] if len(args) > position else default

    def _attribute_of(self, node: fx.Node, label: Label, value: Any) -> Label:
        """An attribute that is a tensor: the transposed one, or a field of a named tuple."""
        attribute = str(node.args[1])
        if isinstance(label, tuple):
            field: Label = label[1 if attribute == "indices" else 0]
            return field
        if attribute == "data":
            return label
        if attribute in ("T", "mT", "H", "mH"):
            return self._movement(node, _FirstAttribute(attribute), value, safe=True)
        return self._opaque(node, value, f"{self.op} has no rule")

    def _functional_layer(self, node: fx.Node, name: str, x: Tensor, value: Any) -> Label:
        weight, bias = self._argument(node, 1, "weight"), self._argument(node, 2, "bias")
        groups = 1 if name == "linear" else self._argument(node, 6, "groups", 1)
        if any(t is not None and id(t) not in self.state.names for t in (weight, bias)):
            return self._opaque(node, value, f"{self.op} computes its weight")
        if name == "linear":
            return self._linear(node, node.name, weight, bias, x, value)
        transposed = name.startswith("conv_transpose")
        size = tuple(weight.shape[2:])
        label = self._conv(node, node.name, weight, bias, groups, size, x, value, transposed=transposed)
        if groups > 1:  # their number stands in the model's code
            self.state.sensitive(x)
            self.state.sensitive(label)
        return label

    def _functional_per_channel(self, node: fx.Node, x: Tensor, value: Any) -> Label:
        """A normalisation or PReLU whose vectors are parameters or buffers of the model."""
        vector = self._vector(node, x, 1, value.shape[1])
        vectors = [n.meta["value"] for n in node.all_input_nodes[1:] if isinstance(n.meta["value"], Tensor)]
        vectors = [v for v in vectors if v.numel() > 1 or value.shape[1] == 1]
        if vector is None or any(id(v) not in self.state.names or v.shape != vector.shape for v in vectors):
            return self._opaque(node, value, f"{self.op} meets channels in a way that has no rule")
        for tensor in vectors:
            self.state.bind(tensor, vector)
        return x

    def _halves(self, node: fx.Node, dim: int, x: Tensor, value: Tensor) -> Label:
        """A gated linear unit: the two halves meet."""
        self.state.sensitive(x)
        halves = self._expanded(x, node.all_input_nodes[0]).chunk(2, dim)
        return self._elementwise([(compress(half), value) for half in halves], value)

    def _elementwise(self, operands: list[tuple[Label, Tensor]], value: Tensor) -> Label:
        """Operands broadcast against each other: positions that meet are the same channel."""
        state, rank = self.state, value.ndim
        tensors: list[tuple[Tensor, list[int]]] = []
        facets: list[tuple[Facets, list[int]]] = []
        for label, operand in operands:
            shape = [1] * (rank - operand.ndim) + list(operand.shape)
            if isinstance(label, Facets):
                if label.labels or len(operands) == 1:  # a parameter of one element meets every channel alike
                    facets.append((label, shape))
            elif isinstance(label, Tensor):
                tensors.append((label.view([1] * (rank - label.ndim) + list(label.shape)), shape))
        if not tensors:
            whole = len(facets) == 1 and math.prod(facets[0][1]) == value.numel()
            return facets[0][0] if whole else state.stays(value, f"{self.op} computes a parameter")
        for facet, shape in facets:
            tensors.append((self._facet(facet, shape, tensors), shape))
        result, result_shape = tensors[0]
        for label, shape in tensors[1:]:
            result, result_shape = self._meet(result, result_shape, label, shape)
        return result

    def _facet(self, facets: Facets, shape: list[int], tensors: list[tuple[Tensor, list[int]]]) -> Tensor:
        """The axis of a parameter that runs along the channels it meets; a constant that stays if there is none."""
        rank = len(shape)
        varying = {d for label, _ in tensors for d, length in enumerate(label.shape) if length > 1}
        for label in facets.labels:
            aligned = label.view([1] * (rank - label.ndim) + list(label.shape))
            if {d for d, length in enumerate(aligned.shape) if length > 1} == varying:
                return aligned
        return self.state.reason_label(f"{self.op} combines it with a parameter").view([1] * rank)

    def _meet(self, a: Tensor, a_shape: list[int], b: Tensor, b_shape: list[int]) -> tuple[Tensor, list[int]]:
        state = self.state
        shape = [max(m, n) for m, n in zip(a_shape, b_shape, strict=True)]
        a_spread = any(n == 1 < size and k > 1 for n, size, k in zip(a_shape, shape, b.shape, strict=True))
        b_spread = any(n == 1 < size and k > 1 for n, size, k in zip(b_shape, shape, a.shape, strict=True))
        if a_spread:  # one channel of `a` serves all channels of `b`
            state.freeze(a, f"{self.op} spreads one channel over several")
        if b_spread:
            state.freeze(b, f"{self.op} spreads one channel over several")
        if a_spread and b_spread:
            state.freeze(torch.cat([a.flatten(), b.flatten()]), f"{self.op} makes an outer product")
            return state.reason_label(f"{self.op} makes an outer product").view([1] * a.ndim), shape
        if a_spread:
            return b, shape
        if b_spread:
            return a, shape
        state.unite(a, b)
        a, b = _broadcast(a, b)
        return torch.where(a >= 0, a, b), shape

    def _expanded(self, label: Tensor, node: fx.Node) -> Tensor:
        return label.expand(node.meta["value"].shape)

    def _movement(self, node: fx.Node, target: Any, value: Any, *, safe: bool) -> Label:
        """Run the operator itself on the labels."""
        inputs = [n for n in node.all_input_nodes if self.labels.get(n) is not None]
        first = self.labels[inputs[0]]
        if any(isinstance(self.labels[n], Facets) for n in inputs):
            if len(inputs) > 1 or not isinstance(first, Facets):
                return self._opaque(node, value, f"{self.op} has no rule")
            moved = [self._moved(node, target, {inputs[0]: label}) for label in first.labels]
            if any(not isinstance(label, Tensor) for label in moved):
                return self._stays(value, f"{self.op} takes a parameter apart")
            if not safe:
                for axis in first.labels:
                    self.state.sensitive(axis)
            return Facets([label for label in moved if isinstance(label, Tensor)])
        if any(not isinstance(self.labels[n], Tensor) for n in inputs):
            return self._opaque(node, value, f"{self.op} has no rule")
        if not safe:
            for n in inputs:
                label = self.labels[n]
                assert isinstance(label, Tensor), "the others are handled above"
                self.state.sensitive(label)
        try:
            moved_label = self._moved(node, target, {n: self.labels[n] for n in inputs})
        except (RuntimeError, TypeError):  # it does not move whole numbers
            return self._opaque(node, value, f"{self.op} has no rule")
        if not safe and isinstance(first, Tensor):
            groups = getattr(target, "groups", None)  # of a module that shuffles
            if _name(node) == "channel_shuffle":
                groups = self._argument(node, 1, "groups")
            self.state.fold(first, moved_label, groups)
        return moved_label

    def _moved(self, node: fx.Node, target: Any, labels: Mapping[fx.Node, Any]) -> Label:
        def argument(n: fx.Node) -> Any:
            return self._expanded(labels[n], n) if n in labels else self.env[n]

        if isinstance(target, _FirstAttribute):
            return compress(target(argument(node.all_input_nodes[0])))
        args: Any = fx.map_arg(node.args, argument)
        kwargs: Any = fx.map_arg(node.kwargs, argument)
        if target == "view":  # labels may be laid out differently
            target = "reshape"
        result = getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)
        return tuple(compress(part) for part in result) if isinstance(result, (tuple, list)) else compress(result)

    def _concatenate(self, node: fx.Node, value: Tensor, *, stack: bool) -> Label:
        dim = self._argument(node, 1, "dim", 0) % value.ndim
        parts: Any = node.args[0] if node.args else node.kwargs["tensors"]
        if isinstance(parts, fx.Node):  # the pieces of a chunk, or all that a module returned
            given, values = self.labels.get(parts), parts.meta["value"]
            labels: list[Label] = list(given) if isinstance(given, tuple) else [None]
        else:
            labels, values = [self.labels.get(part) for part in parts], [part.meta["value"] for part in parts]
        pieces: list[tuple[Tensor, list[int]]] = []
        facets: list[tuple[int, Facets, list[int]]] = []
        for index, (label, part) in enumerate(zip(labels, values, strict=True)):
            shape = list(part.shape)
            if stack:
                shape.insert(dim, 1)
                if isinstance(label, Tensor):
                    label = label.unsqueeze(dim)
            if isinstance(label, Facets) and not stack:
                facets.append((index, label, shape))
            elif isinstance(label, Tensor):
                pieces.append((label, shape))
            else:
                return self._opaque(node, value, f"{self.op} joins what has no rule")
        if facets or not pieces:
            if not pieces:
                return self._opaque(node, value, f"{self.op} joins parameters")
            for index, facet, shape in facets:
                pieces.insert(index, (self._facet(facet, shape, [p for p in pieces if p[0].numel() > 1]), shape))
        others = any(length > 1 for label, _ in pieces for d, length in enumerate(label.shape) if d != dim)
        if others:
            if any(label.shape[dim] > 1 for label, _ in pieces):
                return self._opaque(node, value, f"{self.op} joins channels that lie along several axes")
            result = pieces[0][0]
            for label, _ in pieces[1:]:
                self.state.unite(result, label)
                wide, other = _broadcast(result, label)
                result = torch.where(wide >= 0, wide, other)
            return result
        joined = [label.expand([shape[d] if d == dim else 1 for d in range(value.ndim)]) for label, shape in pieces]
        return compress(torch.cat(joined, dim))

    def _pad(self, node: fx.Node, dims: list[int], widths: Any, x: Tensor, value: Tensor) -> Label:
        if all(x.shape[dim] == 1 for dim in dims):
            return x
        if any(width < 0 for width in widths) or any(
            length > 1 for d, length in enumerate(x.shape) if d - x.ndim not in dims
        ):
            return self._opaque(node, value, f"{self.op} cuts the channels")
        stays = int(self.state.reason_label(f"{self.op} fills it with constants"))
        sizes = [value.shape[d] if x.shape[d] > 1 else 1 for d in range(x.ndim)]
        padding = [width if x.shape[-1 - index // 2] > 1 else 0 for index, width in enumerate(widths)]
        padded = nn.functional.pad(x, padding, value=stays)
        assert list(padded.shape) == sizes, "padding of the channel axis"
        self.state.sensitive(x)
        return padded

    def _reduce(self, node: fx.Node, name: str, x: Tensor, value: Any) -> Label:
        dims = self._argument(node, POSITIONS.get(name, 1), "dim", -1 if name in ("topk", "sort", "mode") else None)
        if isinstance(dims, int) and not isinstance(dims, bool):
            dims = [dims]
        results = value if isinstance(value, (tuple, list)) else [value]
        if not isinstance(dims, (list, tuple)) or not dims or not all(isinstance(part, Tensor) for part in results):
            return self._opaque(node, value, f"{self.op} combines these channels")
        if any(x.shape[dim] > 1 for dim in dims):
            return self._constant_along(node, dims, x, value)
        if results[0].ndim < x.ndim:
            gone = {dim % x.ndim for dim in dims}
            x = x.view([length for d, length in enumerate(x.shape) if d not in gone])
        return x if isinstance(value, Tensor) else tuple(x for _ in results)


class State:
    """What all graphs of one model have said so far: slots per axis, pairs, freezes and weighted layers.

    With `seed` (the component of every position of every axis of an earlier, larger model) nothing is learnt; instead
    every pair whose components differ is collected in `misaligned`: the smaller model would mix up channels.
    """

    def __init__(self, model: nn.Module, seed: Mapping[AxisKey, Tensor] | None = None) -> None:
        self.names = tensor_names(model)
        self.trains = any(parameter.requires_grad for parameter in model.parameters())
        self.seed = seed
        self.axes: dict[AxisKey, Tensor] = {}
        self.num_slots = 0
        self.pairs: list[Tensor] = []
        self.frozen: list[tuple[Tensor, int]] = []
        self.reasons: list[str] = []
        self.layers: dict[str, Weighted] = {}
        self.sensitive_slots: list[Tensor] = []
        self.folds: list[Tensor] = []

    def axis(self, name: str, dim: int, size: int) -> Tensor:
        """The slots of one axis (dim −1: the input channels of a grouped convolution), made at the first call."""
        key = (name, dim)
        if key not in self.axes:
            if self.seed is not None:
                self.axes[key] = self.seed[key] if key in self.seed else torch.full((size,), UNKNOWN)
            else:
                self.axes[key] = torch.arange(self.num_slots, self.num_slots + size)
                self.num_slots += size
        return self.axes[key]

    def bind(self, tensor: Tensor | None, slots: Tensor) -> None:
        """A vector (bias, BatchNorm's) has one entry per channel."""
        if tensor is None:
            return
        name = self.names.get(id(tensor))
        assert name is not None, "a parameter of a module of the model"
        self.unite(self.axis(name, 0, tensor.shape[0]), slots)

    def weighted(
        self,
        layer: str,
        weight: Tensor,
        groups: int,
        inputs: Tensor,
        outputs: Tensor,
        node: str,
        *,
        transposed: bool = False,
    ) -> None:
        """Record a convolution or linear layer, once per weight; what a weight that never changes reads has to stay.

        The outputs of a fixed filter may go once nothing reads them. A frozen parameter keeps its outputs as well. In a
        network without a single trainable parameter none is called frozen: it is pruned as its weights are.
        """
        name = self.names[id(weight)]
        known = self.layers.get(name)
        nodes = (*known.nodes, node) if known is not None and node not in known.nodes else (node,)
        layer = known.layer if known is not None else layer
        depthwise = groups > 1 and groups == len(inputs)
        trained = isinstance(weight, nn.Parameter) and (weight.requires_grad or not self.trains)
        if not trained and not depthwise:
            if isinstance(weight, nn.Parameter):
                self.freeze(torch.cat([inputs, outputs]), f"{layer} is frozen: its weights are not trained")
            else:
                self.freeze(inputs, f"{layer} reads them with a fixed filter")
        self.layers[name] = Weighted(layer, name, groups, depthwise, transposed, inputs, outputs, nodes, trained)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Positions that meet are one channel; a position that stays freezes the other one."""
        a, b = _broadcast(a, b)
        a, b = a.flatten(), b.flatten()
        known = (a != UNKNOWN) & (b != UNKNOWN)
        a, b = a[known], b[known]
        both = (a >= 0) & (b >= 0)
        self.pairs.append(torch.stack([a[both], b[both]]))
        for slots, other in ((a, b), (b, a)):
            stays = (slots >= 0) & (other < 0)
            if bool(stays.any()):
                for code in _distinct(other[stays]).tolist():
                    self.frozen.append((slots[stays & (other == code)], -1 - int(code)))

    def freeze(self, label: Tensor, reason: str) -> None:
        """These channels have to stay."""
        slots = label.flatten()
        slots = slots[slots >= 0]
        if len(slots):
            self.frozen.append((slots, self._reason(reason)))

    def stays(self, value: Tensor, reason: str) -> Tensor:
        """The label of a tensor of which nothing can be removed."""
        return self.reason_label(reason).view([1] * value.ndim)

    def opaque(self, x: Tensor, value: Tensor, reason: str) -> Tensor:
        """Freeze what flows in; nothing of what flows out can be removed."""
        self.freeze(x, reason)
        return self.stays(value, reason)

    def reason_label(self, reason: str) -> Tensor:
        """The negative label that stands for `reason`."""
        return torch.tensor(-1 - self._reason(reason))

    def sensitive(self, label: Tensor) -> None:
        """These channels pass an operator whose result depends on how many they are."""
        if label.numel() > 1:
            slots = label.flatten()
            self.sensitive_slots.append(_distinct(slots[slots >= 0]))

    def fold(self, before: Tensor, after: Label, groups: int | None) -> None:
        """Note how an operator folds one axis of channels into several, or cuts it into equal parts.

        If channels go in step (all with one index along one of the folded axes), the operator's result stays in order.
        """
        size = before.numel()
        folded: Tensor | None = None
        if size < 2 or max(before.shape) < size or bool((before < 0).any()):
            return
        if groups is not None and size % groups == 0:
            folded = before.reshape(groups, -1)
        elif isinstance(after, Tensor):
            folded = after.reshape([n for n in after.shape if n > 1])
            if folded.ndim < 2 and size % max(1, after.numel()) == 0:  # a slice
                folded = before.reshape(-1, max(1, after.numel()))
        elif isinstance(after, tuple):
            parts = [part.flatten() for part in after if isinstance(part, Tensor)]
            if len({len(part) for part in parts}) == 1:
                folded = torch.stack(parts)
        if folded is not None and folded.ndim > 1 and min(folded.shape) > 1 and bool((folded >= 0).all()):
            self.folds.append(folded)

    @property
    def misaligned(self) -> Tensor:
        """Components that would be mixed up (with `seed`)."""
        bad = [pair[:, pair[0] != pair[1]].flatten() for pair in self.pairs]
        bad += [slots for slots, _ in self.frozen]
        return _distinct(torch.cat(bad)) if bad else torch.empty(0, dtype=torch.int64)

    def _reason(self, reason: str) -> int:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return self.reasons.index(reason)


_NO_SLOTS = torch.empty(0, dtype=torch.int64)


@dataclasses.dataclass(frozen=True)
class _FirstAttribute:
    """`x.T` as a function of x."""

    name: str

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = getattr(x, self.name)
        return result


def _name(node: fx.Node) -> str:
    """What a call is called: without the underscore of an in-place form; empty for a module."""
    if node.op == "call_module":
        return ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name.rstrip("_") or name


def _flat(counts: Any) -> list[Tensor]:
    """The slots behind a number or a shape."""
    if counts is None:
        return []
    return [part for part in counts if isinstance(part, Tensor)] if isinstance(counts, tuple) else [counts]


def _spatial_dims(rank: int) -> range:
    """Axes that pooling and padding work on: all after (N, C); the last one of a rank-3 tensor."""
    return range(2, rank) if rank > 2 else range(rank - 1, rank)


def _broadcast(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call] # torch's gap
    return a.expand(shape), b.expand(shape)


def _distinct(slots: Tensor) -> Tensor:
    distinct: Tensor = torch.unique(slots)
    return distinct


def _along(slots: Tensor, dim: int, rank: int) -> Tensor:
    shape = [1] * rank
    shape[dim] = len(slots)
    return slots.view(shape)


def compress(label: Tensor) -> Tensor:
    """The label 1 long in every axis along which it does not change."""
    for dim in range(label.ndim):
        if label.shape[dim] > 1:
            first = label.narrow(dim, 0, 1)
            if label.stride(dim) == 0 or bool((label == first).all()):
                label = first
    return label


def propagate(
    model: nn.Module, input_shape: tuple[int, int, int], seed: Mapping[AxisKey, Tensor] | None = None
) -> tuple[State, dict[Literal["train", "eval"], fx.GraphModule]]:
    """Propagate labels through `model` (usually a `skeleton`) as training and, where it differs, evaluation runs it."""
    state = State(model, seed)
    graphs: dict[Literal["train", "eval"], fx.GraphModule] = {}
    modes = {module: module.training for module in model.modules()}
    images = example_input(model, input_shape)
    for mode in ("train", "eval"):
        for module in model.modules():
            module.training = mode == "train"
        traced = symbolic_graph(model, tuple(images.shape))
        if mode == "eval" and traced.code == graphs["train"].code:
            break
        traced.train(mode == "train")
        with torch.no_grad():
            Propagation(traced, state).run(images)
        graphs[mode] = traced
    for module, training in modes.items():
        module.training = training
    return state, graphs
