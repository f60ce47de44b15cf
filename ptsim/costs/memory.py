"""How much device memory does one training iteration need, does it fit, and what is the largest mini-batch that does?

A network brings its footprint with it: moments of an iteration that was watched when it was captured
(`capture.footprint`), which grow with the mini-batch; the highest counts.

On a GPU comes what libraries take: layout copies around convolutions, cuBLAS's workspace, half-precision copies of the
weights under autocast, and the caching allocator's rounding. `peak_bytes` is meant to match
torch.cuda.max_memory_allocated(), and the CPU allocator's log where oneDNN has AVX-512. `device_bytes` is what must be
free for the iteration to run, and errs upwards: it adds segment rounding, fragmentation and the CUDA context, on a CPU
the scratch of oneDNN's slower kernels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import msgspec

from ptsim.costs.buckets import Bucket, ddp_buckets
from ptsim.costs.walked import layer_workspace, walked_footprint
from ptsim.criteria import step_penalty
from ptsim.hardware.spec import Device
from ptsim.network import ALLOCATOR_BLOCK, Footprint, LayerKind, MemoryFormat, Network
from ptsim.operators import num_taps
from ptsim.optimizers import kind_of
from ptsim.setting import StepSetting
from ptsim.units import MIB

# Whole-model temporaries of torch's "foreach" update on a GPU: a gradient with weight decay added for SGD and RMSprop,
# the denominator for Adam.
_UPDATE_COPIES = 1
# c10/cuda/CUDACachingAllocator.h: kSmallBuffer, kLargeBuffer.
_SMALL_SEGMENT, _LARGE_SEGMENT = 2 * MIB, 20 * MIB
# aten/src/ATen/cuda/CublasHandlePool.cpp: 32 MiB on Hopper (in newer versions on Blackwell, too), else
# 4096·2 + 16·8 KiB, for every pair of a handle and a stream. A thread has its own handle for each GPU (cuda/detail/
# DeviceThreadHandles.h), and backward runs in autograd's thread of the GPU (torch/csrc/autograd/engine.cpp, "Allocating
# GPUs to autograd threads"), DDP or not: two of them. From torch 2.15 on it is there for the time of a product only
# (TORCH_CUBLAS_WORKSPACE_CACHE), so that this errs upwards.
_CUBLAS_WORKSPACE = {"hopper": 32 * MIB, "blackwell": 32 * MIB}
_CUBLAS_WORKSPACE_OTHER = (4096 * 2 + 16 * 8) * 1024
# Margins of `device_bytes`, chosen to err upwards: a process's CUDA context with cuDNN and cuBLAS loaded (measured on
# data-center GPUs: 0.3 to 0.7 GiB), and blocks that the allocator cannot reuse.
CONTEXT_BYTES = 800 * MIB
FRAGMENTATION = 0.08
# Of the memory that a data sheet names, a process sees less: 98–99 % of HBM (V100 15.78 of 16 GiB, A100 39.39 of 40),
# 92 % of GDDR6 with in-band ECC (torch's total_memory: T4 14.75 of 16 GiB, A10 and L4 22.1 of 24). Of memory that is
# not known to be HBM the worst is assumed.
VISIBLE_SHARE, VISIBLE_SHARE_HBM = 0.92, 0.98
# Against the CPU allocator's log (`analysis/check_counts.py --peaks`) peaks are at most 3.6 % too low in fp32; under
# bf16 autocast, where oneDNN's products take scratch of their own, 9.4 % on torchvision's networks, 15 % on small ones.
CPU_MARGIN, CPU_HALF_MARGIN = 0.05, 0.2
# On a CPU without AVX-512 oneDNN has no blocked kernel for the weights' gradient of a convolution whose output is
# narrower than its kernel. The matrix product that it falls back to takes scratch of four times the weights a thread,
# and the unfolded image: seen in the CPU allocator's log (torch 2.14.1, AVX2, 1 and 2 threads; VGG-11's 2×2 maps).
_FALLBACK_COPIES = 4
MOST_IMAGES = 2**20  # of a mini-batch that anybody asks for: the search for the largest ends there


class MemoryNeed(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on each device for one training iteration.

    Attributes:
        activation_bytes: all that autograd keeps at the end of the forward pass, the input images included.
        parameter_bytes: weights, their half-precision copies under autocast, and buffers.
        gradient_bytes: one fp32 gradient per parameter that gets one, and DDP's buckets where they are beside them.
        optimizer_bytes: the optimizer's state.
        workspace_bytes: what libraries take at most beside tensors, and the tables of a criterion's penalty.
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

    def fits(self, device: Device) -> bool:
        """Whether a process on that device can have so much memory."""
        return self.device_bytes <= usable_bytes(device)


def iteration_memory(
    network: Network, setting: StepSetting, *, device: Device | None = None, buckets: Sequence[Bucket] | None = None
) -> MemoryNeed:
    """What one iteration needs on each device.

    Args:
        network: what is trained.
        setting: how a step is run. channels_last spares the layout copies around tensor-core convolutions; on several
            GPUs DistributedDataParallel's buckets hold the gradients all the time, or are there beside them, and so are
            gradients that accumulate over several passes, whole, since the last pass alone reduces them, and those that
            older software zeroes. Else sharded gradients leave the GPU's own share and two buckets: one fills while
            that before it is reduced.
        device: a GPU adds workspaces and rounding; None and a CPU are tensors alone.
        buckets: of the gradients; None for those of DDP's own caps.

    Raises:
        ValueError: batch is not positive.
        UnknownNameError: no such optimizer.
    """
    batch, precision, memory_format = setting.pass_batch, setting.precision, setting.memory_format
    if batch <= 0:
        raise ValueError(f"batch is {batch}, expected a positive number of images")
    optimizer = kind_of(setting)
    gpu = device is not None and device.is_gpu
    block = ALLOCATOR_BLOCK if gpu else 1
    seen = footprint_of(network, gpu=gpu, half=setting.half)
    weights = _round_each((4 * p.num_elements for p in network.parameters), block)
    learnt = _round_each((4 * p.num_elements for p in network.gradients), block)
    shared = setting.num_gpus if setting.sharding != "none" else 1
    states = _share(optimizer.states(setting.momentum) * learnt, shared)
    library = _library_workspace(network, device) if device is not None and gpu else 0
    gradients = _held_gradients(network, setting, learnt, buckets)
    apart = learnt if setting.buckets_apart else 0
    copies = seen.weight_copy_bytes
    kept = seen.kept_fixed_bytes + batch * seen.kept_image_bytes - copies
    highest = _highest(seen, network, batch, memory_format=memory_format, buckets=setting.holds_gradients)
    images = -(-batch * (4 * math.prod(network.input_shape) + 8) // block) * block  # 8: the label
    width = precision.activation_bytes
    workspace = max((layer_workspace(layer, batch, width, memory_format) for layer in network.layers), default=0)
    penalty = step_penalty(network, setting, gpu=gpu)
    held_bytes = library + penalty.table_bytes
    persistent = weights + seen.buffer_bytes + states + held_bytes + images + gradients + apart
    if gpu and setting.groups_updates:
        copies_of_update = _share(_UPDATE_COPIES * learnt, shared)
    else:
        copies_of_update = 4 * max((p.num_elements for p in network.gradients), default=0)
    update = (0 if setting.holds_gradients else learnt) + max(copies_of_update, penalty.scratch_bytes)
    peak = persistent + max(highest, update)
    margin = CPU_HALF_MARGIN if setting.half else CPU_MARGIN
    return MemoryNeed(
        activation_bytes=kept,
        parameter_bytes=weights + seen.buffer_bytes + copies,
        gradient_bytes=(gradients or learnt) + apart,
        optimizer_bytes=states,
        workspace_bytes=held_bytes + workspace,
        peak_bytes=peak,
        device_bytes=_device_bytes(peak, persistent)
        if gpu
        else round((1 + margin) * peak) + fallback_scratch(network, 1 if device is None else device.num_sms),
    )


def _held_gradients(network: Network, setting: StepSetting, learnt: int, buckets: Sequence[Bucket] | None) -> int:
    """Bytes of gradients that are there all the time: in buckets on several GPUs, and from one pass to the next.

    Args:
        network: what is trained.
        setting: how a step is run.
        learnt: bytes of all gradients.
        buckets: of the gradients; None for those of DDP's own caps.
    """
    if not setting.holds_gradients:
        return 0
    if setting.sharding != "zero2" or setting.passes > 1:
        return learnt
    used = ddp_buckets(network) if buckets is None else buckets
    sizes = (0, *(bucket.num_bytes for bucket in used))
    neighbours = max((reduced + filling for reduced, filling in itertools.pairwise(sizes)), default=0)
    return min(learnt, _share(learnt, setting.num_gpus) + neighbours)


def _share(num_bytes: float, parts: int) -> int:
    """The largest of so many equal shares."""
    return math.ceil(num_bytes / parts)


def largest_batch(
    network: Network,
    setting: StepSetting,
    *,
    capacity_bytes: int,
    granularity: int = 1,
    limit: int = MOST_IMAGES,
    device: Device | None = None,
    buckets: Sequence[Bucket] | None = None,
) -> int:
    """The largest multiple of `granularity` images, up to `limit`, whose iteration fits; 0 where not even one does.

    `MemoryNeed.device_bytes` is compared with `capacity_bytes`, the memory of the device. The PruneTrain paper's
    granularity is 32. The mini-batch of `setting` does not count; the other arguments are those of `iteration_memory`.

    Raises:
        ValueError: granularity is not positive, or as for `iteration_memory`.
    """
    if granularity <= 0:
        raise ValueError(f"granularity is {granularity}, expected a positive number of images")

    def fits(steps: int) -> bool:
        need = iteration_memory(network, setting.with_batch(steps * granularity), device=device, buckets=buckets)
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
    if not device.is_gpu:
        return device.memory_bytes
    return int((VISIBLE_SHARE_HBM if device.stacked_memory else VISIBLE_SHARE) * device.memory_bytes)


def footprint_of(network: Network, *, gpu: bool, half: bool) -> Footprint:
    """The network's own footprint, watched when it was captured; by rules where it has none (`costs.walked`)."""
    wanted = ("gpu" if gpu else "cpu", half)
    watched = next((seen for seen in network.footprints if (seen.device, seen.half) == wanted), None)
    return watched or walked_footprint(network, gpu=gpu, half=half)


def _highest(seen: Footprint, network: Network, batch: int, *, memory_format: MemoryFormat, buckets: bool) -> int:
    """The high-water mark beyond what is there all the time; with `buckets` gradients of parameters are."""
    moments = seen.contiguous if memory_format == "contiguous" else seen.channels_last
    loss = 4 * batch * network.num_classes
    return loss + max(
        (m.fixed_bytes + batch * m.image_bytes + (0 if buckets else m.gradient_bytes) for m in moments), default=0
    )


def _round_each(sizes: Iterable[int], block: int) -> int:
    return sum(-(-size // block) * block for size in sizes)


def _library_workspace(network: Network, device: Device) -> int:
    """Of cuBLAS: one for the products of the forward pass, and one for those of backward."""
    products = [layer for layer in network.layers if layer.kind in (LayerKind.LINEAR, LayerKind.MATMUL)]
    backward = any(layer.input_needs_gradient or layer.weight_needs_gradient for layer in products)
    return (bool(products) + backward) * _CUBLAS_WORKSPACE.get(device.architecture, _CUBLAS_WORKSPACE_OTHER)


def fallback_scratch(network: Network, num_threads: int) -> int:
    """Bytes that a CPU without AVX-512 may take beyond the peak, at most; part of `device_bytes`, not of `peak_bytes`.

    Args:
        network: what is trained.
        num_threads: that compute; every one takes its own.
    """
    narrow = [
        layer.num_parameters
        + num_taps(layer) * layer.in_channels * math.prod(layer.output_shape[-layer.spatial_axes :])
        for layer in network.layers
        if layer.kind is LayerKind.CONV and layer.output_shape[-1] < layer.kernel_size[-1]
    ]
    return 4 * _FALLBACK_COPIES * num_threads * max(narrow, default=0)


def _device_bytes(peak: int, persistent: int) -> int:
    """What the allocator reserves for a peak, and the context beside it."""
    reserved = peak + round(FRAGMENTATION * (peak - persistent)) + _SMALL_SEGMENT + _LARGE_SEGMENT
    return -(-reserved // _SMALL_SEGMENT) * _SMALL_SEGMENT + CONTEXT_BYTES
