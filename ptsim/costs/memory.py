"""How much device memory does one training iteration need, does it fit, and what is the largest mini-batch that does?

A captured network brings the peak with it: moments of a watched iteration (`capture.footprint`), which grow with the
mini-batch; the highest counts. For a network without them (an older trace) one iteration is walked over its layers:
forward, where every layer adds what autograd newly keeps for backward and outputs live until their last reader;
backward in reverse, where kept tensors go, gradients of activations come and go, and gradients of parameters stay.
zero_grad(set_to_none=True) is assumed before forward, so parameter gradients exist from backward to the update.

On a GPU comes what libraries take: layout copies around convolutions, cuBLAS's workspace, half-precision copies of the
weights under autocast, and the caching allocator's rounding. `peak_bytes` is meant to match
torch.cuda.max_memory_allocated(), and the CPU allocator's log where oneDNN has AVX-512. `device_bytes` is what must be
free for the iteration to run, and errs upwards: it adds segment rounding, fragmentation and the CUDA context, on a CPU
the scratch of oneDNN's slower kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from ptsim.errors import UnknownNameError
from ptsim.hardware.spec import Device
from ptsim.network import Footprint, Layer, LayerKind, MemoryFormat, Network, Precision
from ptsim.units import MIB

# fp32 state per parameter, and whole-model temporaries of torch's "foreach" update on a GPU (a gradient with weight
# decay added for SGD and RMSprop, the denominator for Adam).
_OPTIMIZER_STATES = {"sgd": 1, "adam": 2, "adamw": 2, "rmsprop": 1}
_UPDATE_COPIES = 1
# c10/cuda/CUDACachingAllocator.h: kMinBlockSize, kSmallBuffer, kLargeBuffer, kMinLargeAlloc, kSmallSize.
_BLOCK, _SMALL_SEGMENT, _LARGE_SEGMENT = 512, 2 * MIB, 20 * MIB
# aten/src/ATen/cuda/CublasHandlePool.cpp: 32 MiB on Hopper and newer, else 4096·2 + 16·8 KiB.
_CUBLAS_WORKSPACE = {"hopper": 32 * MIB, "blackwell": 32 * MIB}
_CUBLAS_WORKSPACE_OTHER = (4096 * 2 + 16 * 8) * 1024
# Margins of `device_bytes`, chosen to err upwards: a process's CUDA context with cuDNN and cuBLAS loaded (measured on
# data-center GPUs: 0.3 to 0.7 GiB), and blocks that the allocator cannot reuse.
CONTEXT_BYTES = 800 * MIB
FRAGMENTATION = 0.08
# Of the memory that a data sheet names, a process sees less: 98–99 % of HBM, 92 % of GDDR6 with in-band ECC (torch's
# total_memory: T4 14.75 of 16 GiB, A10 and L4 22.1 of 24). The worst of them is assumed of all.
VISIBLE_SHARE = 0.92
# Against the CPU allocator's log (`analysis/check_counts.py --peaks`) peaks are at most 3.6 % too low in fp32; under
# bf16 autocast, where oneDNN's products take scratch of their own, 9.4 % on torchvision's networks, 15 % on small ones.
CPU_MARGIN, CPU_HALF_MARGIN = 0.05, 0.2
# On a CPU without AVX-512 oneDNN has no blocked kernel for the weights' gradient of a convolution whose output is
# narrower than its kernel. The matrix product that it falls back to takes scratch of four times the weights a thread,
# and the unfolded image: seen in the CPU allocator's log (torch 2.14.1, AVX2, 1 and 2 threads; VGG-11's 2×2 maps).
_FALLBACK_COPIES = 4
MOST_IMAGES = 2**20  # of a mini-batch that anybody asks for: the search for the largest ends there

# What autocast runs in fp32 (aten/src/ATen/autocast_mode.h, AT_FORALL_FP32 and its CPU sister, without losses): on a
# GPU most reductions, exponentials and normalisations, on a CPU next to nothing. BatchNorm and instance normalisation
# run in the type of their input on both.
_FP32_OPS_GPU = frozenset(
    {"softmax", "log_softmax", "softmin", "gumbel_softmax", "softplus", "pow", "exp", "log", "log1p", "reciprocal"}
    | {"rsqrt", "sum", "normalize", "interpolate", "upsample", "layer_norm", "group_norm", "local_response_norm"}
)
_FP32_OPS_CPU = frozenset({"avg_pool3d", "grid_sampler", "prod"})
_HALF_KINDS = (LayerKind.CONV, LayerKind.LINEAR, LayerKind.MATMUL)
_SWIN_OP, _SWIN_HEAD_CHANNELS = "shifted_window_attention", 32  # in all of torchvision's Swin transformers
_PASSING_OPS = frozenset({"add", "sub"})  # their gradient is the gradient they get


class MemoryNeed(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on each device for one training iteration.

    Attributes:
        activation_bytes: all that autograd keeps at the end of the forward pass, the input images included.
        parameter_bytes: weights, their half-precision copies under autocast, and buffers.
        gradient_bytes: one fp32 gradient per parameter.
        optimizer_bytes: the optimizer's state.
        workspace_bytes: what libraries take at most beside tensors.
        peak_bytes: the largest sum that is alive at one moment; less than the sum of the parts, which do not all meet.
        device_bytes: what must be free on the device, an upper estimate.
    """

    activation_bytes: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    workspace_bytes: int
    peak_bytes: int
    device_bytes: int


def iteration_memory(
    network: Network,
    *,
    batch: int,
    precision: Precision = Precision.FP32,
    optimizer: str = "sgd",
    memory_format: MemoryFormat = "contiguous",
    device: Device | None = None,
    data_parallel: bool = False,
) -> MemoryNeed:
    """What one iteration of `batch` images needs.

    Args:
        network: what is trained.
        batch: images per device.
        precision: of the matrix products; half precision means autocast with fp32 weights.
        optimizer: "sgd" (with momentum), "adam", "adamw" or "rmsprop".
        memory_format: channels_last spares the layout copies around tensor-core convolutions.
        device: a GPU adds workspaces and rounding; None and a CPU are tensors alone.
        data_parallel: DistributedDataParallel's buckets hold the gradients all the time (gradient_as_bucket_view).

    Raises:
        ValueError: batch is not positive, or the optimizer is unknown.
    """
    if batch <= 0:
        raise ValueError(f"batch is {batch}, expected a positive number of images")
    if optimizer not in _OPTIMIZER_STATES:
        raise UnknownNameError("optimizer", optimizer, _OPTIMIZER_STATES)
    gpu = device is not None and device.architecture != "cpu"
    block = _BLOCK if gpu else 1
    seen = _footprint(network, gpu=gpu, half=precision.activation_bytes == 2)
    precision_widths = Widths(network, precision, gpu=gpu)
    weights = _round_each((4 * p.num_elements for p in network.parameters), block)
    buffers = _round_each(_buffer_sizes(network), block) if seen is None else seen.buffer_bytes
    states = _OPTIMIZER_STATES[optimizer] * weights
    library = _library_workspace(network, device) if device is not None and gpu else 0
    gradients = weights if data_parallel else 0
    if seen is None:
        copies = sum(precision_widths.weight_copy(layer) for layer in network.layers)
        kept = sum(precision_widths.saved(layer, batch) for layer in network.layers)
        walk = _Walk(network, batch, precision_widths, block, memory_format=memory_format, stay=data_parallel)
        highest = walk.peak
    else:
        copies = seen.weight_copy_bytes
        kept = seen.kept_fixed_bytes + batch * seen.kept_image_bytes - copies
        highest = _highest(seen, network, batch, memory_format=memory_format, buckets=data_parallel)
    images = -(-batch * (4 * math.prod(network.input_shape) + 8) // block) * block  # 8: the label
    workspace = max(
        _layer_workspace(layer, batch, precision_widths.output[layer.name], memory_format) for layer in network.layers
    )
    persistent = weights + buffers + states + library + images + gradients
    copies_of_update = (
        _UPDATE_COPIES * weights if gpu else 4 * max((p.num_elements for p in network.parameters), default=0)
    )
    update = weights - gradients + copies_of_update
    peak = persistent + max(highest, update)
    margin = CPU_HALF_MARGIN if precision.activation_bytes == 2 else CPU_MARGIN
    return MemoryNeed(
        activation_bytes=kept,
        parameter_bytes=weights + buffers + copies,
        gradient_bytes=weights,
        optimizer_bytes=states,
        workspace_bytes=library + workspace,
        peak_bytes=peak,
        device_bytes=_device_bytes(peak, persistent)
        if gpu
        else round((1 + margin) * peak) + fallback_scratch(network, 1 if device is None else device.num_sms),
    )


def largest_batch(
    network: Network,
    *,
    capacity_bytes: int,
    granularity: int = 1,
    limit: int = MOST_IMAGES,
    precision: Precision = Precision.FP32,
    optimizer: str = "sgd",
    memory_format: MemoryFormat = "contiguous",
    device: Device | None = None,
    data_parallel: bool = False,
) -> int:
    """The largest multiple of `granularity` images, up to `limit`, whose iteration fits; 0 where not even one does.

    `MemoryNeed.device_bytes` is compared with `capacity_bytes`, the memory of the device. The PruneTrain paper's
    granularity is 32. The other arguments are those of `iteration_memory`.

    Raises:
        ValueError: granularity is not positive, or as for `iteration_memory`.
    """
    if granularity <= 0:
        raise ValueError(f"granularity is {granularity}, expected a positive number of images")

    def fits(steps: int) -> bool:
        need = iteration_memory(
            network,
            batch=steps * granularity,
            precision=precision,
            optimizer=optimizer,
            memory_format=memory_format,
            device=device,
            data_parallel=data_parallel,
        )
        return need.device_bytes <= capacity_bytes

    most = limit // granularity
    if most == 0 or not fits(1):
        return 0
    fitting, failing = 1, 2
    while failing <= most and fits(failing):
        fitting, failing = failing, 2 * failing
    failing = min(failing, most + 1)
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        fitting, failing = (middle, failing) if fits(middle) else (fitting, middle)
    return fitting * granularity


def usable_bytes(device: Device) -> int:
    """What a process can have of a catalog device's memory, a lower estimate, to hold `device_bytes` against."""
    return device.memory_bytes if device.architecture == "cpu" else int(VISIBLE_SHARE * device.memory_bytes)


def _footprint(network: Network, *, gpu: bool, half: bool) -> Footprint | None:
    wanted = ("gpu" if gpu else "cpu", half)
    return next((seen for seen in network.footprints if (seen.device, seen.half) == wanted), None)


def _highest(seen: Footprint, network: Network, batch: int, *, memory_format: MemoryFormat, buckets: bool) -> int:
    """The high-water mark beyond what is there all the time; with `buckets` gradients of parameters are."""
    moments = seen.contiguous if memory_format == "contiguous" else seen.channels_last
    loss = 4 * batch * network.num_classes
    return loss + max(
        (m.fixed_bytes + batch * m.image_bytes + (0 if buckets else m.gradient_bytes) for m in moments), default=0
    )


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
            given = tuple(self.output[source] for source in sources[layer.name]) or (4,)  # the images are fp32
            self.inputs[layer.name] = given
            self.output[layer.name] = self._output(layer, max(given))

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
        if self._half and layer.kind in _HALF_KINDS:
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
        return 2 * layer.num_parameters if self._half and layer.kind in _HALF_KINDS else 0

    def _output(self, layer: Layer, given: int) -> int:
        if not self._half:
            return 4
        if layer.kind in _HALF_KINDS:
            return 2
        if layer.op in self._fp32_ops:
            return 4
        if layer.kind in (LayerKind.ELEMENTWISE, LayerKind.CONCAT) and layer.num_parameters:
            return 4  # with an fp32 parameter among the operands the result is fp32
        return given


class _Walk:
    """One iteration's high-water mark beyond weights, optimizer state and images.

    Attributes:
        peak: bytes.
        workspace: the largest workspace of one layer.
        images: bytes of the mini-batch itself, alive all the time.
    """

    def __init__(
        self,
        network: Network,
        batch: int,
        widths: Widths,
        block: int,
        *,
        memory_format: MemoryFormat,
        stay: bool,
    ) -> None:
        """`stay`: gradients of parameters are copied into buckets that are there already."""
        self._stay = stay
        self._network, self._batch, self._widths, self._block = network, batch, widths, block
        self._workspace = {
            layer.name: _layer_workspace(layer, batch, widths.output[layer.name], memory_format)
            for layer in network.layers
        }
        self._sources = sources_of(network)
        self.workspace = max(self._workspace.values(), default=0)
        self.images = self._rounded(batch * (4 * math.prod(network.input_shape) + 8))  # 8: the label
        self._kept = {layer.name: self._kept_bytes(layer) for layer in network.layers}
        self.peak = 0
        at_end = self._forward()
        self._backward(at_end)

    def _rounded(self, num_bytes: int) -> int:
        return -(-num_bytes // self._block) * self._block

    def _kept_bytes(self, layer: Layer) -> int:
        """Newly kept by this layer, without the fp32 images, which are counted for themselves."""
        kept = self._widths.saved(layer, self._batch) + self._widths.weight_copy(layer)
        image = math.prod(self._network.input_shape)
        if not self._sources[layer.name] and layer.saved_elements >= image:
            half = self._widths.weight_copy(layer) > 0
            kept -= 0 if half else self._batch * image * 4
        return self._rounded(kept)

    def _output_bytes(self, layer: Layer) -> int:
        return self._rounded(layer.repeats(self._batch) * layer.output_elements * self._widths.output[layer.name])

    def _forward(self) -> int:
        """Walk the forward pass and return what is alive at its end."""
        storage: dict[str, str | None] = {}  # layer → the layer that made the memory its output lives in
        readers: dict[str, list[int]] = {}
        layers = self._network.layers
        for index, layer in enumerate(layers):
            made_by = [storage[s] for s in self._sources[layer.name]]
            for maker in made_by:
                if maker is not None:
                    readers.setdefault(maker, []).append(index)
            borrowed = layer.view or layer.inplace
            storage[layer.name] = (made_by[0] if made_by else None) if borrowed else layer.name
        saved_somewhere = {storage[layer.name] for layer in layers if layer.output_saved}
        ends: dict[int, list[str]] = {}
        for layer in layers:
            if storage[layer.name] == layer.name and (read := readers.get(layer.name)):
                counted_when_read = layer.name in saved_somewhere
                ends.setdefault(read[0] if counted_when_read else read[-1], []).append(layer.name)

        kept = 0
        live: dict[str, int] = {}
        for index, layer in enumerate(layers):
            for name in ends.get(index, ()):
                if name in saved_somewhere:  # from here on it is among the kept
                    live.pop(name, None)
            kept += self._kept[layer.name]
            if storage[layer.name] == layer.name and not self._keeps_own_output(index, layer, readers, saved_somewhere):
                live[layer.name] = self._output_bytes(layer)
            self._see(kept + sum(live.values()) + self._workspace[layer.name])
            for name in ends.get(index, ()):
                live.pop(name, None)
        loss = 2 * self._rounded(4 * self._batch * self._network.num_classes)  # log-probabilities and their source
        self._see(kept + sum(live.values()) + loss)
        return kept + loss

    def _keeps_own_output(
        self, index: int, layer: Layer, readers: Mapping[str, list[int]], saved: Iterable[str | None]
    ) -> bool:
        """The output is already counted at this layer: it is kept, and its first reader keeps nothing of its size."""
        if layer.name not in set(saved) or layer.saved_elements < layer.output_elements:
            return False
        read = readers.get(layer.name)
        return not read or self._network.layers[read[0]].saved_elements < layer.output_elements

    def _backward(self, kept: int) -> None:
        """Walk the backward pass; gradients of activations are shared where an operator hands its own on."""
        # layer → buffers whose sum is its output's gradient, each with how much of it is this layer's
        gradients: dict[str, list[tuple[int, int]]] = {}
        size: dict[int, int] = {}
        shared: dict[int, int] = {}
        total = kept
        by_name = {layer.name: layer for layer in self._network.layers}
        read = {s for sources in self._sources.values() for s in sources}

        def allocate(num_bytes: int) -> int:
            nonlocal total
            buffer = len(size)
            size[buffer], shared[buffer] = num_bytes, 1
            total += num_bytes
            return buffer

        def release(buffer: int) -> None:
            nonlocal total
            shared[buffer] -= 1
            if shared[buffer] == 0:
                total -= size[buffer]

        for layer in reversed(self._network.layers):
            if layer.name not in read:
                gradients[layer.name] = [(allocate(self._output_bytes(layer)), self._output_bytes(layer))]
            given = gradients.pop(layer.name, [])
            if given:
                own = self._rounded(4 * layer.num_parameters) if layer.weight_needs_gradient else 0
                total += own
                sources = self._sources[layer.name] if layer.input_needs_gradient else []
                sizes = layer.input_sizes(self._batch)
                for index, source in enumerate(sources):
                    if len(sizes) == len(sources):
                        num_bytes = self._rounded(sizes[index] * self._widths.output[source])
                    else:
                        num_bytes = self._output_bytes(by_name[source])
                    if _hands_on(layer):
                        buffer = given[0][0]
                        shared[buffer] += 1
                    else:
                        buffer = allocate(num_bytes)
                    gradients.setdefault(source, []).append((buffer, num_bytes))
                self._see(total + self._widths.weight_copy(layer) + self._workspace[layer.name])
                for buffer, _ in given:
                    release(buffer)
                for source in sources:
                    if len(parts := gradients[source]) > 1:  # the branches' gradients are added where they meet
                        first, num_bytes = parts[0]
                        total_buffer = first
                        if shared[first] > 1:
                            total_buffer = allocate(num_bytes)
                            self._see(total)
                            release(first)
                        for buffer, _ in parts[1:]:
                            release(buffer)
                        gradients[source] = [(total_buffer, num_bytes)]
                if self._stay:
                    total -= own
            total -= self._kept[layer.name]

    def _see(self, num_bytes: int) -> None:
        self.peak = max(self.peak, num_bytes)


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


def _hands_on(layer: Layer) -> bool:
    """The gradient of the input is the gradient of the output: sums, views, and the slices of a concatenation."""
    same = all(math.prod(shape) == layer.output_elements for shape in layer.input_shapes)
    return layer.view or layer.kind is LayerKind.CONCAT or (layer.op in _PASSING_OPS and same)


def _buffer_sizes(network: Network) -> Iterable[int]:
    """Running statistics of BatchNorm, and weights that are frozen and therefore no `Parameter`."""
    for layer in network.layers:
        if layer.kind is LayerKind.BATCH_NORM:
            yield from (4 * layer.out_channels, 4 * layer.out_channels, 8)
        if not layer.weight_needs_gradient and layer.kind in (LayerKind.CONV, LayerKind.LINEAR):
            yield 4 * math.prod(layer.kernel_size) * layer.in_channels // layer.groups * layer.out_channels


def _round_each(sizes: Iterable[int], block: int) -> int:
    return sum(-(-size // block) * block for size in sizes)


def _library_workspace(network: Network, device: Device) -> int:
    if not any(layer.kind in (LayerKind.LINEAR, LayerKind.MATMUL) for layer in network.layers):
        return 0
    return _CUBLAS_WORKSPACE.get(device.architecture, _CUBLAS_WORKSPACE_OTHER)


def _layer_workspace(layer: Layer, batch: int, width: int, memory_format: MemoryFormat) -> int:
    """What cuDNN and oneDNN take around a dense convolution beside its results, at most.

    Contiguous operands are copied to the library's own layout, the weights' gradient is made in it (channels-last: in
    split sums) and copied out. Backward is meant; forward needs less. Seen in the CPU allocator's log of ResNet-20 and
    VGG-11.
    """
    if layer.kind is not LayerKind.CONV or layer.groups > 1:
        return 0
    operands = (sum(layer.input_sizes(batch)) + batch * layer.output_elements) * width
    return max(operands if memory_format == "contiguous" else 0, 4 * layer.num_parameters)


def fallback_scratch(network: Network, num_threads: int) -> int:
    """Bytes that a CPU without AVX-512 may take beyond the peak, at most; part of `device_bytes`, not of `peak_bytes`.

    Args:
        network: what is trained.
        num_threads: that compute; every one takes its own.
    """
    narrow = [
        layer.num_parameters + math.prod(layer.kernel_size) * layer.in_channels * math.prod(layer.output_shape[-2:])
        for layer in network.layers
        if layer.kind is LayerKind.CONV and layer.output_shape[-1] < layer.kernel_size[-1]
    ]
    return 4 * _FALLBACK_COPIES * num_threads * max(narrow, default=0)


def _device_bytes(peak: int, persistent: int) -> int:
    """What the allocator reserves for a peak, and the context beside it."""
    reserved = peak + round(FRAGMENTATION * (peak - persistent)) + _SMALL_SEGMENT + _LARGE_SEGMENT
    return -(-reserved // _SMALL_SEGMENT) * _SMALL_SEGMENT + CONTEXT_BYTES
