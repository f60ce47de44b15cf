"""What a network is, as data: layers with shapes, edges between them, parameters in gradient-ready order.

The shared vocabulary of the house: capture makes a `Network` from a live module, the trace stores it, cost and sim
read it. All shapes are per image, without the mini-batch axis. Counts are for one image unless a name says otherwise,
or unless the layer runs `once` a mini-batch.
"""

from __future__ import annotations

import functools
import hashlib
import math
from enum import StrEnum
from typing import Annotated, Literal, TypeAlias

import msgspec

# Bounds that nothing real exceeds, so that what is read can be multiplied; 0 channels are what pruning has removed.
Extent: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Step: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
Amount: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**60)]
Difference: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**60), le=2**60)]  # of two watched sizes
Shape: TypeAlias = Annotated[tuple[Extent, ...], msgspec.Meta(max_length=16)]

MemoryFormat = Literal["contiguous", "channels_last"]  # how activations lie in memory: NCHW or NHWC


class LayerKind(StrEnum):
    """What a layer does, in the terms that costs depend on."""

    CONV = "conv"
    LINEAR = "linear"
    BATCH_NORM = "batch_norm"
    NORM = "norm"  # layer, group, instance and local-response normalisation
    ACTIVATION = "activation"
    POOL = "pool"
    ELEMENTWISE = "elementwise"  # add, multiply and other point-wise arithmetic between tensors
    CONCAT = "concat"
    DROPOUT = "dropout"
    MATMUL = "matmul"  # batched products, scaled dot-product attention
    RESHAPE = "reshape"  # moves or renames elements: flatten, transpose, chunk, roll, gather, scatter, pad
    OTHER = "other"


PRODUCTS = (LayerKind.CONV, LayerKind.LINEAR, LayerKind.MATMUL)  # whose multiply–accumulates are counted


class Precision(StrEnum):
    """Number format of the matrix products; parameters and optimizer state stay fp32."""

    FP32 = "fp32"
    TF32 = "tf32"
    BF16 = "bf16"
    FP16 = "fp16"

    @property
    def activation_bytes(self) -> int:
        """Bytes of one activation element under autocast."""
        return 2 if self in (Precision.BF16, Precision.FP16) else 4


class Layer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One operator of the forward pass.

    Attributes:
        name: unique in the network; the module path, or the graph node's name for a functional call.
        op: the operator's own name in lower case ("conv2d", "relu", "silu", "max_pool2d").
        in_channels, out_channels: channel counts (features for a linear layer).
        kernel_size, stride, padding, dilation: (height, width); the height of one axis does nothing: 1, padding 0.
        depth: the same four of the axis in front of these, where there are three; None where there is none, where a
            kernel has no size, and in what older ptsim wrote.
        input_shapes: one shape per tensor input, each without the mini-batch axis.
        output_shape: without the mini-batch axis.
        num_parameters: trainable parameters owned by this layer, to which a gradient comes.
        forward_macs: multiply–accumulates of the forward pass for one image, as fvcore counts them; for operators
            without products fvcore's element-wise operation count (1 per output element and operation).
        input_needs_gradient: False where no gradient flows into the input (the first layer), so that the
            backward pass computes only the weight gradient; or where none comes from the output (a comparison).
        weight_needs_gradient: False where the layer has weights and all of them are frozen, or a fixed filter; of a
            product of activations, where only one operand has a gradient.
        inplace: the operator overwrites its input, so its output needs no memory of its own.
        view: the output is the input's memory under another shape; nothing moves.
        training_only: evaluation does not run it (an auxiliary head), so it is no part of inference.
        once: no tensor of it has a mini-batch axis (weights being standardised, a bias being looked up), so that it
            runs once a mini-batch whatever its size; its shapes are whole, its counts those of the one run.
        shared_inputs: positions among `input_shapes` of tensors without a mini-batch axis, which all images share.
        fixed_inputs: positions of tensors to which no gradient goes (a mask) beside others to which one does.
        saved_elements: floating-point elements that autograd newly keeps for backward per image. A tensor that
            several operators keep is counted once, at the first in execution order; parameters are not counted.
        saved_other_bytes: bytes of other kinds kept per image (pooling indices, dropout masks).
        output_saved: some layer keeps this layer's output for backward, so that it outlives the forward pass.
        saved_fixed_bytes: bytes kept that do not grow with the mini-batch (BatchNorm's batch statistics).
    """

    name: str
    kind: LayerKind
    op: str
    in_channels: Extent
    out_channels: Extent
    input_shapes: tuple[Shape, ...]
    output_shape: Shape
    kernel_size: tuple[Step, Step] = (1, 1)
    stride: tuple[Step, Step] = (1, 1)
    padding: tuple[Extent, Extent] = (0, 0)
    dilation: tuple[Step, Step] = (1, 1)
    depth: tuple[Step, Step, Extent, Step] | None = None
    groups: Step = 1
    bias: bool = False
    num_parameters: Amount = 0
    forward_macs: Amount = 0
    input_needs_gradient: bool = True
    weight_needs_gradient: bool = True
    inplace: bool = False
    view: bool = False
    training_only: bool = False
    once: bool = False
    shared_inputs: tuple[Extent, ...] = ()
    fixed_inputs: tuple[Extent, ...] = ()
    saved_elements: Amount = 0
    saved_other_bytes: Amount = 0
    saved_fixed_bytes: Amount = 0
    output_saved: bool = False

    @property
    def input_elements(self) -> int:
        """Elements of all inputs for one image."""
        return sum(math.prod(shape) for shape in self.input_shapes)

    @property
    def output_elements(self) -> int:
        """Elements of the output for one image."""
        return math.prod(self.output_shape)

    @property
    def is_removed(self) -> bool:
        """Pruning has taken all of it: the output has no elements, so nothing is left to compute."""
        return self.output_elements == 0

    @property
    def is_depthwise(self) -> bool:
        """A convolution of every channel by itself, which has the channels of its input."""
        return self.kind is LayerKind.CONV and self.groups == self.in_channels > 1

    @property
    def spatial_axes(self) -> int:
        """Of a convolution's images: 1, 2 or 3, as its operator's name says."""
        return int(self.op[-2]) if self.op.endswith(("1d", "3d")) else 2

    def unfolded(self, shape: Shape) -> tuple[int, Shape]:
        """Of a convolution's tensor: how many it holds for each of the network's images, and the shape of one.

        More than one where the code folds patches, frames or groups of channels into the mini-batch.
        """
        axes = 1 + self.spatial_axes
        return math.prod(shape[:-axes]), shape[-axes:]

    def repeats(self, images: int, mini_batches: int = 1) -> int:
        """How often the layer's counts occur in so many images: for each, or for each mini-batch of them."""
        return mini_batches if self.once else images

    def saved_bytes(self, batch: int, element_bytes: int) -> int:
        """Bytes newly kept for backward by a mini-batch whose activations take `element_bytes` each."""
        growing = self.saved_elements * element_bytes + self.saved_other_bytes
        return self.repeats(batch) * growing + self.saved_fixed_bytes

    def input_sizes(self, batch: int) -> tuple[int, ...]:
        """Elements of every input for a mini-batch of `batch` images."""
        return tuple(
            math.prod(shape) * (1 if index in self.shared_inputs else batch)
            for index, shape in enumerate(self.input_shapes)
        )


class Parameter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One trainable tensor: what data-parallel training reduces. `layer` is "" where no gradient ever comes."""

    name: str
    layer: str
    shape: Shape

    @property
    def num_elements(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)


class Moment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is alive at one moment of an iteration, beyond weights, optimizer state, images and `gradient_bytes`."""

    fixed_bytes: Difference
    image_bytes: Difference
    gradient_bytes: Difference  # of parameters whose gradient is there


ALLOCATOR_BLOCK = 512  # bytes that a tensor on a GPU takes multiples of: c10/cuda/CUDACachingAllocator.h, kMinBlockSize


class Footprint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Memory of one training iteration's tensors, watched while it ran without arithmetic (`capture.footprint`).

    Attributes:
        device, half: whose rules: a CPU's or a GPU's, with fp32 activations or under half-precision autocast.
        kept_fixed_bytes, kept_image_bytes: what autograd keeps at the end of the forward pass, whatever the mini-batch
            and for every image; weights and buffers left out, their half-precision copies not.
        weight_copy_bytes: half-precision copies of weights among `kept_fixed_bytes`.
        buffer_bytes: buffers and frozen weights, there all the time.
        contiguous, channels_last: the moments that can be the highest, for either memory format of the activations.
    """

    device: Literal["cpu", "gpu"]
    half: bool
    kept_fixed_bytes: Difference
    kept_image_bytes: Difference
    weight_copy_bytes: Difference
    buffer_bytes: Difference
    contiguous: tuple[Moment, ...]
    channels_last: tuple[Moment, ...]


class Network(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, cache_hash=True
):
    """A network as data.

    Attributes:
        name: what the user called it; not part of the identity.
        input_shape: (channels, height, width) of one image.
        layers: in execution order of the forward pass.
        edges: (from layer, to layer), by name; the network's input has no name here.
        parameters: every trainable tensor, in the order in which its gradient becomes ready in backward.
        footprints: memory as a watched step took it; not part of the identity. Without them (a network that was not
            captured, or by an older ptsim) `costs.memory` reckons from the layers.
    """

    name: str
    input_shape: tuple[Extent, Extent, Extent]
    num_classes: Extent
    layers: tuple[Layer, ...]
    edges: tuple[tuple[str, str], ...]
    parameters: tuple[Parameter, ...]
    footprints: tuple[Footprint, ...] = ()

    @property
    def id(self) -> str:
        """Content address: equal networks have equal ids whatever they are called (16 hexadecimal digits)."""
        return _content_id(self)

    @property
    def num_parameters(self) -> int:
        """Trainable parameters."""
        return sum(parameter.num_elements for parameter in self.parameters)

    @property
    def gradients(self) -> tuple[Parameter, ...]:
        """The parameters that get a gradient: those of a layer that forward calls. Only these are reduced."""
        return tuple(parameter for parameter in self.parameters if parameter.layer)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all gradients in fp32: what one data-parallel update reduces."""
        return 4 * self.num_learnt

    @property
    def num_learnt(self) -> int:
        """Elements of the parameters that get a gradient: what one update changes."""
        return sum(parameter.num_elements for parameter in self.gradients)

    @property
    def forward_macs(self) -> int:
        """Multiply–accumulates of convolutions, linear layers and other matrix products, for one image's inference.

        What runs `once` a mini-batch is part of it, whole.
        """
        return sum(layer.forward_macs for layer in self.layers if layer.kind in PRODUCTS and not layer.training_only)

    def layer(self, name: str) -> Layer:
        """The layer called `name`.

        Raises:
            KeyError: there is none.
        """
        return _layers_by_name(self)[name]


@functools.lru_cache(maxsize=1024)
def _content_id(network: Network) -> str:
    content = msgspec.json.encode(msgspec.structs.replace(network, name="", footprints=()))
    return hashlib.sha256(content).hexdigest()[:16]


@functools.lru_cache(maxsize=1024)
def _layers_by_name(network: Network) -> dict[str, Layer]:
    return {layer.name: layer for layer in network.layers}
