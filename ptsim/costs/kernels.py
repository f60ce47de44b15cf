"""Which kernels a training step runs, as columns: matrix products with their shapes, and bytes that stream.

Every layer becomes a few kernels (forward; gradient of the input; gradient of the weights). A matrix product is
described as the implicit GEMM that cuDNN runs, m×n×k per group; everything else is the bytes it moves. The columns
depend on network, mini-batch, number format and layout only; what a device makes of them is `costs.datasheet`.

This is the one table of what an operator reads and writes: `costs.traffic` adds the same kernels' bytes up. Every
operand is read and every result written once, from and to device memory; what caches keep between kernels is not
credited. BatchNorm is counted as docs/method.md §6 does: 8 accesses per element, 3 forward (statistics, normalise in,
out) and 5 backward (x and dy for the reductions; x, dy in, dx out). Layer and group norms keep a row of their input on
the chip: 2 forward (in, out) and 4 backward (x and dy for the reductions over the batch; dy in, dx out). What the
gradients of other operators read and write stands in `costs.backward`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from enum import IntEnum

import msgspec
import numpy as np
import numpy.typing as npt

from ptsim.costs.backward import (
    POSITION_BYTES,
    Moved,
    gradient_of_elementwise,
    gradient_of_pool,
    gradient_of_view,
    joins_gradients,
    made_first,
    passes_of_activation,
    passes_of_move,
    positions_bytes,
)
from ptsim.costs.widths import Widths, sources_of
from ptsim.network import PRODUCTS, Layer, LayerKind, Network, Precision
from ptsim.operators import BILINEAR, is_transposed, num_taps, second_features
from ptsim.setting import StepSetting

Floats = npt.NDArray[np.float64]

LOADED_HALVES = 8  # channels that half-precision tensor-core kernels load at once: 16 bytes
BATCH_NORM_FORWARD, BATCH_NORM_BACKWARD = 3, 5  # accesses per element
_NORM_FORWARD, _NORM_BACKWARD = 2, 4
_CONVERTED_BYTES = 3  # of an element between half precision and fp32, in the mean


class Work(IntEnum):
    """What decides a kernel's time."""

    PRODUCT = 0  # GEMM or convolution as implicit GEMM
    DEPTHWISE = 1  # convolution with one channel per group: no reuse, a direct kernel
    NORM = 2  # two-pass reductions over a tensor
    STREAM = 3  # element-wise: reads and writes once


class Pass(IntEnum):
    """Part of the step that the kernel belongs to."""

    FORWARD = 0
    INPUT_GRADIENT = 1
    WEIGHT_GRADIENT = 2


class Kernel(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel of one layer, for the whole mini-batch.

    Attributes:
        layer: position in `network.layers`.
        m, n, k, groups: shape of the product; multiply–accumulates are m·n·k·groups.
        element_bytes: of a product's operands; elsewhere of what it reads and writes, in the mean (backward: of its
            layer's output).
        winograd: a 3×3 convolution with stride 1, for which fp32 kernels exist that multiply less, for groups too
            (cuDNN developer guide, algorithms of cudnnConvolutionForward: group count greater than 0).
        strided: the gradient of a strided convolution's input, or a strided transposed convolution, whose output pixels
            differ in work.
        padded: channels are filled up to whole loads by a copy.
        odd_groups: a grouped convolution in channels_last for which no tensor-core kernel exists.
        lone_groups: a grouped convolution, not with `odd_groups`, each of whose tiles holds one group.
        unfitted: of a kind that no row of any fit has: transposed convolutions, those over one or three axes, and those
            with groups of fewer than four channels or with 1×1 kernels in groups.
        moved_bytes: every operand read once, every result written once.
        layout_bytes: what conversions between NCHW and NHWC around the kernel move.
        blocks: thread blocks that it runs in, where those may be fewer than a GPU's SMs; infinite elsewhere. In the
            contiguous layout a BatchNorm's reductions give every channel one block (cuDNN's kernels `bn_…_1C11`; ATen's
            batch_norm_collect_statistics_kernel).
        footprint_bytes: distinct bytes touched, to tell what stays in the L2 cache.
        launches: how often the host launches something for it.
    """

    layer: int
    work: Work
    step: Pass
    moved_bytes: float
    footprint_bytes: float
    m: float = 0.0
    n: float = 0.0
    k: float = 0.0
    groups: float = 0.0
    element_bytes: float = 4.0
    winograd: bool = False
    strided: bool = False
    padded: bool = False
    odd_groups: bool = False
    lone_groups: bool = False
    unfitted: bool = False
    layout_bytes: float = 0.0
    blocks: float = math.inf
    launches: float = 1.0


class Kernels(msgspec.Struct, frozen=True, kw_only=True):
    """Kernels as columns; `Kernel` says what each is."""

    layer: npt.NDArray[np.intp]
    work: npt.NDArray[np.intp]
    step: npt.NDArray[np.intp]
    m: Floats
    n: Floats
    k: Floats
    groups: Floats
    element_bytes: Floats
    winograd: npt.NDArray[np.bool_]
    strided: npt.NDArray[np.bool_]
    padded: npt.NDArray[np.bool_]
    odd_groups: npt.NDArray[np.bool_]
    lone_groups: npt.NDArray[np.bool_]
    unfitted: npt.NDArray[np.bool_]
    moved_bytes: Floats
    layout_bytes: Floats
    footprint_bytes: Floats
    blocks: Floats
    launches: Floats

    @classmethod
    def of(cls, kernels: Iterable[Kernel]) -> Kernels:
        """The columns of these kernels."""
        rows = list(kernels)
        flags = dict.fromkeys(("winograd", "strided", "padded", "odd_groups", "lone_groups", "unfitted"), np.bool_)
        integers = {"layer": np.intp, "work": np.intp, "step": np.intp, **flags}
        return cls(
            **{
                name: np.array([getattr(row, name) for row in rows], dtype=integers.get(name, np.float64))
                for name in cls.__struct_fields__
            }
        )


def network_kernels(network: Network, setting: StepSetting, *, tensor_cores: bool) -> Kernels:
    """The kernels of forward and backward of a mini-batch.

    Args:
        network: what is trained.
        setting: how. Under fp16 and bf16 (autocast) activations take two bytes where autocast's rules leave them so,
            and are converted where an operator wants the other format.
        tensor_cores: the device multiplies this precision on tensor cores, whose half-precision kernels want NHWC.
    """
    batch, precision, element = setting.batch, setting.precision, setting.precision.activation_bytes
    halves, planar = tensor_cores and setting.half, setting.memory_format == "contiguous"
    foreign = _is_foreign(setting, tensor_cores)
    gradients = _returned(network)
    widths = Widths(network, precision, gpu=True)
    rows: list[Kernel] = []
    for index, layer in enumerate(network.layers):
        if layer.is_removed:  # an operator on a tensor without elements launches no kernel
            continue
        images, given, width = layer.repeats(batch), widths.inputs[layer.name], widths.output[layer.name]
        rows.extend(_conversions(index, layer, images, given, width, precision))
        truths = frozenset(i for i, bytes_ in enumerate(given) if bytes_ == 1) if max(given) > 1 else frozenset()
        made = layer_kernels(
            layer, images, max(given), width, element,
            truths=truths if len(given) == len(layer.input_shapes) else frozenset(),
            foreign=foreign, halves=halves, planar=planar, index=index,
        )  # fmt: skip
        rows.extend(made)
        extra = gradients.get(layer.name, 1) - 1
        if extra > 0 and _learns(layer) and not joins_gradients(layer):  # gradients of the branches are added up
            size = float(layer.output_elements * images * width)
            rows.append(_stream(index, Pass.INPUT_GRADIENT, 3 * extra * size, 3 * size, width, extra))
    return Kernels.of(rows)


def _is_foreign(setting: StepSetting, tensor_cores: bool) -> bool:
    """Whether convolutions want another layout: half-precision kernels of tensor cores are NHWC, others are NCHW."""
    return tensor_cores and setting.half if setting.memory_format == "contiguous" else not tensor_cores


def pads_channels(setting: StepSetting, tensor_cores: bool) -> bool:
    """Whether convolutions copy tensors only because their channels are no multiple of `LOADED_HALVES`.

    In a layout that they copy anyway, padding costs nothing more.
    """
    return tensor_cores and setting.half and not _is_foreign(setting, tensor_cores)


def _returned(network: Network) -> dict[str, int]:
    """Layer → how many gradients its readers hand back to it."""
    found: dict[str, int] = {}
    sources = sources_of(network)
    for layer in network.layers:
        read = sources[layer.name]
        fixed = layer.fixed_inputs if len(read) == len(layer.input_shapes) else ()
        for index, source in enumerate(read):
            found[source] = found.get(source, 0) + (layer.input_needs_gradient and index not in fixed)
    return found


def convolution_kernels(
    layer: Layer, *, batch: int, element: int, foreign: bool = False, halves: bool = False, index: int = 0
) -> Iterator[Kernel]:
    """Forward, and the gradients of input and weights that are needed, of a convolution.

    Args:
        layer: the convolution.
        batch: images.
        element: bytes of one element.
        foreign: the kernel wants another memory layout than the tensors have.
        halves: it runs on tensor cores in half precision.
        index: position in the network.
    """
    channels_in, channels_out = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    x = float(batch * math.prod(layer.input_shapes[0]) * element)
    y = float(batch * layer.output_elements * element)
    w = float(layer.out_channels * channels_in * num_taps(layer) * element)
    stride = _stride(layer)
    depthwise = layer.is_depthwise
    # Half-precision tensor-core kernels load 16 bytes at once; other channel counts are padded by a copy. Kernels for
    # images of three or four channels exist.
    ragged = halves and any(count % LOADED_HALVES for count in (channels_in, channels_out) if count > 4)
    # cuDNN's NHWC kernels for groups, several of which share a tile, want as many channels out as in and whole warps of
    # groups (ResNeXt has 32 or 64). Whether groups share tiles in TF32, too, the rows of the fit do not say.
    usual = channels_in == channels_out and layer.groups % 32 == 0 and layer.dilation == (1, 1)
    grouped = layer.groups > 1 and not depthwise
    odd_groups = halves and not foreign and grouped and not usual
    transposed, flat = is_transposed(layer.op), layer.spatial_axes == 2
    narrow = grouped and (min(channels_in, channels_out) < 4 or num_taps(layer) == 1)
    square = flat and layer.kernel_size == (3, 3)
    spread = Pass.FORWARD if transposed else Pass.INPUT_GRADIENT  # from few pixels to many
    for step, (m, n, k) in _implicit_products(layer, batch).items():
        if step is Pass.INPUT_GRADIENT and not layer.input_needs_gradient:
            continue
        if step is Pass.WEIGHT_GRADIENT and not layer.weight_needs_gradient:
            continue
        yield Kernel(
            layer=index,
            work=Work.DEPTHWISE if depthwise else Work.PRODUCT,
            step=step,
            m=m,
            n=n,
            k=k,
            groups=layer.groups,
            element_bytes=element,
            winograd=square and stride == 1 and layer.dilation == (1, 1),
            strided=step is spread and stride > 1,
            padded=ragged and not depthwise,
            odd_groups=odd_groups,
            lone_groups=grouped and not (halves and (usual or not foreign)),
            unfitted=transposed or not flat or narrow,
            moved_bytes=x + y + w,
            layout_bytes=2 * (x + y) if (foreign or ragged) and not depthwise else 0.0,
            footprint_bytes=x + y + w,
        )
    if layer.bias:  # added by a kernel of its own
        yield _stream(index, Pass.FORWARD, 2 * y, y, element)
    yield from _bias_gradient(index, layer, y, element)


def _bias_gradient(index: int, layer: Layer, size: float, element: int) -> Iterator[Kernel]:
    """The sum over the output's gradient of `size` bytes, where there is a bias that learns."""
    if layer.bias and layer.weight_needs_gradient:
        yield _stream(index, Pass.WEIGHT_GRADIENT, size, size, element)


def _implicit_products(layer: Layer, batch: int) -> dict[Pass, tuple[float, float, float]]:
    """m, n and k of every pass of a convolution, in each group."""
    area, stride = num_taps(layer), _stride(layer)
    channels_in, channels_out = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    tensors = (layer.unfolded(shape) for shape in (layer.input_shapes[0], layer.output_shape))
    pixels_in, pixels_out = (batch * folded * math.prod(image[1:]) for folded, image in tensors)
    if is_transposed(layer.op):  # runs the gradient of a convolution's input forward, and a convolution backward
        return {
            Pass.FORWARD: (pixels_out, channels_out, channels_in * area / stride),
            Pass.INPUT_GRADIENT: (pixels_in, channels_in, channels_out * area),
            Pass.WEIGHT_GRADIENT: (channels_in, channels_out * area, pixels_in),
        }
    return {
        Pass.FORWARD: (pixels_out, channels_out, channels_in * area),
        Pass.INPUT_GRADIENT: (pixels_in, channels_in, channels_out * area / stride),
        Pass.WEIGHT_GRADIENT: (channels_out, channels_in * area, pixels_out),
    }


def _stride(layer: Layer) -> int:
    """Over all axes. A layer does not name that of the depth of three axes: its shapes do."""
    if layer.spatial_axes < 3:
        return math.prod(layer.stride)
    depths = layer.input_shapes[0][-3], layer.output_shape[-3]
    return math.prod(layer.stride) * max(1, round(max(depths) / max(min(depths), 1)))


def product_kernels(
    m: float,
    n: float,
    k: float,
    *,
    element: int,
    groups: float = 1,
    needs_input_gradient: bool = True,
    needs_weight_gradient: bool = True,
    index: int = 0,
) -> Iterator[Kernel]:
    """The products of y[m,n] = x[m,k]·w[k,n] and of the gradients that are needed, `groups` times."""
    size = float(groups * (m * n + m * k + n * k) * element)
    for step, shape in (
        (Pass.FORWARD, (m, n, k)),
        (Pass.INPUT_GRADIENT, (m, k, n)),
        (Pass.WEIGHT_GRADIENT, (n, k, m)),
    ):
        if step is Pass.INPUT_GRADIENT and not needs_input_gradient:
            continue
        if step is Pass.WEIGHT_GRADIENT and not needs_weight_gradient:
            continue
        yield Kernel(
            layer=index,
            work=Work.PRODUCT,
            step=step,
            m=shape[0],
            n=shape[1],
            k=shape[2],
            groups=groups,
            element_bytes=element,
            moved_bytes=size,
            footprint_bytes=size,
        )


def _conversions(
    index: int, layer: Layer, batch: int, given: tuple[int, ...], width: int, precision: Precision
) -> Iterator[Kernel]:
    """What autocast copies into the other format before a layer, and its gradient after it."""
    if precision.activation_bytes == 4:
        return
    if layer.kind in PRODUCTS:
        wanted = 2
    elif layer.kind is LayerKind.NORM:
        wanted = width
    else:
        return
    sizes = layer.input_sizes(batch)
    if len(sizes) == len(given):
        converted = float(sum(size for size, bytes_ in zip(sizes, given, strict=True) if bytes_ not in (1, wanted)))
    else:  # some input comes from no layer
        converted = sum(bytes_ != wanted for bytes_ in given) / len(given) * sum(sizes)
    if converted:
        size = 6.0 * converted  # read in one width, written in the other
        yield _stream(index, Pass.FORWARD, size, size, _CONVERTED_BYTES)
        if layer.input_needs_gradient:
            yield _stream(index, Pass.INPUT_GRADIENT, size, size, _CONVERTED_BYTES)


def layer_kernels(
    layer: Layer,
    batch: int,
    given: int,
    width: int,
    element: int,
    *,
    truths: frozenset[int] = frozenset(),
    foreign: bool = False,
    halves: bool = False,
    planar: bool = False,
    index: int = 0,
) -> Iterator[Kernel]:
    """The kernels of one layer; none forward of a view, and none backward where nobody needs the gradient.

    Args:
        layer: what is computed.
        batch: images, or 1 for a layer that runs once a mini-batch.
        given: bytes per element of its inputs.
        width: of its output.
        element: of a product's operands.
        truths: positions of inputs of booleans, which take a byte each.
        foreign: a convolution's kernel wants another memory layout than the tensors have.
        halves: products run on tensor cores in half precision.
        planar: tensors are contiguous: every channel of an image in one piece.
        index: position in the network.
    """
    made = _kernels_of(
        index, layer, batch, given, width, element, truths=truths, foreign=foreign, halves=halves, planar=planar
    )
    for kernel in made:
        if _learns(layer) or kernel.step is Pass.FORWARD:
            yield kernel


def _learns(layer: Layer) -> bool:
    """Whether anybody needs the gradient of what the layer gives."""
    return layer.input_needs_gradient or (layer.num_parameters > 0 and layer.weight_needs_gradient)


def _kernels_of(
    index: int,
    layer: Layer,
    batch: int,
    given: int,
    width: int,
    element: int,
    *,
    truths: frozenset[int],
    foreign: bool,
    halves: bool,
    planar: bool,
) -> Iterator[Kernel]:
    if layer.view:
        yield from _backward(index, gradient_of_view(layer, batch, width), layer.output_elements * batch * width, width)
        return
    x = float(sum(size * (1 if i in truths else given) for i, size in enumerate(layer.input_sizes(batch))))
    y = float(layer.output_elements * batch * width)
    forward, backward = Pass.FORWARD, Pass.INPUT_GRADIENT
    match layer.kind:
        case LayerKind.CONV:
            yield from convolution_kernels(
                layer, batch=batch, element=element, foreign=foreign, halves=halves, index=index
            )
        case LayerKind.LINEAR if layer.in_channels and layer.out_channels:
            yield from _linear_kernels(layer, batch * layer.output_elements / layer.out_channels, element, index)
            yield from _bias_gradient(index, layer, y, width)
        case LayerKind.LINEAR | LayerKind.MATMUL:
            # Only the count is known: taken as one square-ish product per image over the output's last axis.
            n = float(layer.output_shape[-1]) if layer.output_shape else 1.0
            m = max(layer.output_elements / n, 1.0)
            k = max(layer.forward_macs / max(layer.output_elements, 1), 1.0)
            yield from product_kernels(
                m, n, k, groups=batch, element=element, index=index,
                needs_input_gradient=layer.input_needs_gradient, needs_weight_gradient=layer.weight_needs_gradient,
            )  # fmt: skip
        case LayerKind.BATCH_NORM:
            axes = len(layer.output_shape)  # channels_last lays out images of two and three axes only
            in_planes = axes == 2 or (planar and axes > 2)
            blocks = float(layer.in_channels) if in_planes and layer.in_channels else math.inf
            yield _stream(index, forward, BATCH_NORM_FORWARD * x, x, given, work=Work.NORM, blocks=blocks)
            yield _stream(index, backward, BATCH_NORM_BACKWARD * x, 2 * x, given, work=Work.NORM, blocks=blocks)
        case LayerKind.NORM:  # autocast normalises layers and groups in fp32: the output's width
            batch_norm = layer.op == "instance_norm"  # is one, of images laid side by side
            there, back = (BATCH_NORM_FORWARD, BATCH_NORM_BACKWARD) if batch_norm else (_NORM_FORWARD, _NORM_BACKWARD)
            yield _stream(index, forward, there * y, y, width, work=Work.NORM)
            yield _stream(index, backward, back * y, 2 * y, width, work=Work.NORM)
        case LayerKind.ACTIVATION:
            first, second = passes_of_activation(layer, batch, given, width)
            before = made_first(layer, batch, given, width)
            moved, count = first.num_bytes + before.num_bytes, first.kernels + before.kernels
            yield _stream(index, forward, moved, x, width, count)
            yield from _backward(index, second, 2 * x, width)
        case LayerKind.ELEMENTWISE:
            before = made_first(layer, batch, given, width)
            operands = x + layer.num_parameters * given
            element_bytes = _mean_bytes((operands, given), (y, width))
            yield _stream(index, forward, operands + y + before.num_bytes, x + y, element_bytes, 1 + before.kernels)
            yield from _backward(index, gradient_of_elementwise(layer, batch, given, width, truths), x + y, width)
        case LayerKind.POOL:
            positions = positions_bytes(layer, batch)
            element_bytes = _mean_bytes((x + y, width), (positions, POSITION_BYTES))
            yield _stream(index, forward, x + y + positions, x + y, element_bytes)
            yield from _backward(index, gradient_of_pool(layer, batch, given, width), x + y, width)
        case LayerKind.CONCAT:  # backward hands out slices, which are views
            yield _stream(index, forward, 2 * y, 2 * y, width)
        case LayerKind.DROPOUT:
            mask = float(layer.output_elements * batch)  # a byte each
            element_bytes = _mean_bytes((x + y, width), (mask, 1))
            yield _stream(index, forward, x + y + mask, x + y, element_bytes)
            yield _stream(index, backward, x + y + mask, x + y, element_bytes)
        case LayerKind.RESHAPE:
            first, second = passes_of_move(layer, batch, given, width)
            yield _stream(index, forward, first.num_bytes, 2 * y, width, first.kernels)
            yield from _backward(index, second, 2 * y, width)
        case _:
            before = made_first(layer, batch, given, width)
            yield _stream(index, forward, x + y + before.num_bytes, x + y, width, 1 + before.kernels)
            yield _stream(index, backward, x + y, x + y, width)


def _backward(index: int, moved: Moved | None, footprint: float, width: int) -> Iterator[Kernel]:
    """What the gradients read and write; nothing where they are handed on as they are."""
    if moved is not None and moved.kernels:
        yield _stream(index, Pass.INPUT_GRADIENT, moved.num_bytes, footprint, width, moved.kernels)


def _linear_kernels(layer: Layer, rows: float, element: int, index: int) -> Iterator[Kernel]:
    """The products of a linear layer, and of a bilinear one, whose second input has a gradient of as many, too."""
    second = second_features(layer.op, layer.input_shapes)
    yield from product_kernels(
        rows, second * layer.out_channels, layer.in_channels, element=element, index=index,
        needs_input_gradient=layer.input_needs_gradient, needs_weight_gradient=layer.weight_needs_gradient,
    )  # fmt: skip
    if layer.op == BILINEAR and layer.input_needs_gradient:
        pairs = layer.out_channels * layer.in_channels
        products = product_kernels(rows, pairs, second, element=element, index=index)
        yield from (kernel for kernel in products if kernel.step is Pass.INPUT_GRADIENT)


def _mean_bytes(*parts: tuple[float, int]) -> float:
    """Bytes of an element in the mean over these parts, each with its bytes and those of one of its elements."""
    elements = sum(size / each for size, each in parts)
    return sum(size for size, _ in parts) / elements if elements else float(parts[0][1])


def _stream(
    index: int,
    step: Pass,
    moved: float,
    footprint: float,
    element: float,
    launches: float = 1.0,
    *,
    work: Work = Work.STREAM,
    blocks: float = math.inf,
) -> Kernel:
    """A kernel that moves bytes; the columns are those of `Kernel`."""
    return Kernel(
        layer=index,
        work=work,
        step=step,
        element_bytes=element,
        moved_bytes=moved,
        footprint_bytes=footprint,
        blocks=blocks,
        launches=launches,
    )
