"""How wide does autocast leave each tensor of a step, and so how many bytes does autograd keep of it?"""

from __future__ import annotations

from collections.abc import Sequence

from ptsim.costs.backward import WRITING
from ptsim.network import PRODUCTS, Layer, LayerKind, Network, Precision
from ptsim.operators import AUTOCAST_FP32_CPU, AUTOCAST_FP32_GPU, plain_name

# What autocast runs in fp32, as layers' operators are called.
_FP32_OPS_GPU = frozenset(map(plain_name, AUTOCAST_FP32_GPU))
_FP32_OPS_CPU = frozenset(map(plain_name, AUTOCAST_FP32_CPU))
_SWIN_OP, _SWIN_HEAD_CHANNELS = "shifted_window_attention", 32  # in all of torchvision's Swin transformers
# Operators that give booleans, which take a byte each; those that give them where they are given booleans.
TRUTHS = frozenset({
    *("gt", "lt", "ge", "le", "eq", "ne", "greater", "less", "greater_equal", "less_equal", "not_equal", "isclose"),
    *("logical_and", "logical_or", "logical_xor", "logical_not", "isnan", "isinf", "isfinite", "bool", "signbit"),
})  # fmt: skip
_OF_TRUTHS = frozenset(
    {"and", "or", "xor", "invert", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "any", "all"}
)
_MOVING = (LayerKind.RESHAPE, LayerKind.CONCAT)


class Widths:
    """Bytes per element of what each layer returns and keeps, as autocast's rules decide."""

    def __init__(self, network: Network, precision: Precision, *, gpu: bool) -> None:
        self._gpu = gpu
        self._half = precision.activation_bytes == 2
        self._fp32_ops = _FP32_OPS_GPU if gpu else _FP32_OPS_CPU
        self.output: dict[str, int] = {}
        self.inputs: dict[str, tuple[int, ...]] = {}
        sources = sources_of(network)
        for layer in network.layers:
            # The images are fp32; a tensor like another one is taken for one like that which was made before.
            like = layer.op.endswith("_like") or layer.op.startswith("new_")
            alone = next(reversed(self.output.values()), 4) if like else 4
            given = tuple(self.output[source] for source in sources[layer.name]) or (alone,)
            self.inputs[layer.name] = given
            # What writes a part of a tensor leaves it as wide as it is.
            self.output[layer.name] = self._output(layer, given[0] if layer.op in WRITING else max(given))

    def saved(self, layer: Layer, batch: int) -> int:
        """Bytes that autograd newly keeps at this layer for the whole mini-batch, weight copies left out.

        Where autocast converts an operand, the copy is what is kept, whether or not the original was kept before.
        """
        times = layer.repeats(batch)
        other = times * layer.saved_other_bytes + layer.saved_fixed_bytes
        if self._gpu and layer.kind is LayerKind.DROPOUT and layer.saved_elements >= layer.output_elements:
            return times * layer.output_elements + other  # CUDA keeps a boolean mask
        elements, width, given = times * layer.saved_elements, 4, self.inputs[layer.name]
        inputs = layer.input_sizes(batch)
        if self._half and layer.kind in PRODUCTS:
            width = 2
            if layer.weight_needs_gradient or layer.kind is LayerKind.MATMUL:
                elements = min(elements + _cast_elements(inputs, given), max(elements, sum(inputs)))
        elif self._half and layer.op in self._fp32_ops:
            if max(given) == 2 and layer.kind is LayerKind.NORM:
                elements = max(elements, sum(inputs))
        elif self._half:
            width = max(given)
        softmax = 4 * batch * _swin_scores(layer) if self._half and layer.op == _SWIN_OP else 0
        return elements * width + softmax + other

    def weight_copy(self, layer: Layer) -> int:
        """Bytes of the half-precision copy of the layer's weights that lives from forward to backward."""
        return 2 * layer.num_parameters if self._half and layer.kind in PRODUCTS else 0

    def _output(self, layer: Layer, given: int) -> int:
        if layer.op in TRUTHS or (given == 1 and (layer.op in _OF_TRUTHS or layer.kind in _MOVING)):
            return 1
        if given == 1:  # numbers made of booleans
            return 4
        if not self._half:
            return 4
        if layer.kind in PRODUCTS:
            return 2
        if layer.op in self._fp32_ops:
            return 4
        if layer.kind in (LayerKind.ELEMENTWISE, LayerKind.CONCAT) and layer.num_parameters:
            return 4  # with an fp32 parameter among the operands the result is fp32
        return given


def _cast_elements(inputs: Sequence[int], widths: Sequence[int]) -> int:
    """Elements of the inputs that autocast converts to half precision."""
    if len(inputs) != len(widths):
        return sum(inputs) if min(widths) == 4 else 0
    return sum(elements for elements, width in zip(inputs, widths, strict=True) if width == 4)


def _swin_scores(layer: Layer) -> int:
    """Attention scores of one image in torchvision's window attention, which is one operator of the graph.

    Its bias is fp32, so under autocast the softmax is too: 4 bytes are kept, and a copy in half precision for the
    product, 4 more than the 2 that the operator's other tensors take. A score costs two products over a head's
    channels; what is left of the operator's MACs are the four projections.
    """
    channels = layer.output_shape[-1]
    projections = 4 * channels * layer.output_elements
    return max(0, layer.forward_macs - projections) // (2 * _SWIN_HEAD_CHANNELS)


def sources_of(network: Network) -> dict[str, list[str]]:
    """Layer → the layers it reads, in the edges' order."""
    sources: dict[str, list[str]] = {layer.name: [] for layer in network.layers}
    for source, target in network.edges:
        sources[target].append(source)
    return sources
