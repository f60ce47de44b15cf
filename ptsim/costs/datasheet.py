"""How long a training step takes by the data sheet: a roofline per kernel, with efficiencies fitted to measurements.

A matrix product runs in tiles. Its blocks are dealt to the SMs in whole waves; a block multiplies at the peak rate
times `simt` or `tensor`, and waits for its operands, which reach an SM at `feed_bytes_per_clock`: the term that keeps
fast tensor cores far from their peak and that grows for small tiles, so that odd and small channel counts make stairs.
Everything else is bytes over memory bandwidth. The numbers of `Efficiency` are the same for all GPUs; what
differs between GPUs is in the catalog. `analysis/fit_efficiency.py` fits them; `efficiency.toml` holds the result.

The interval is what cross-validation found (`analysis/cross_validate.py`, `residuals.toml`): residuals on networks and
GPUs left out of the fit, in units of a spread that grows with the share of the step that the fit's rows say little of.
"""

from __future__ import annotations

import functools
import math

import msgspec
import numpy as np
import numpy.typing as npt

from ptsim.costs.kernels import Floats, Kernels, Pass, Work, network_kernels
from ptsim.costs.shipped import shipped
from ptsim.costs.software import again_of, is_young, may_be_young, update_of, zeroing_of
from ptsim.costs.tiers import Tier
from ptsim.costs.times import LayerTime, StepTime
from ptsim.costs.traffic import cast_bytes
from ptsim.criteria import step_penalty
from ptsim.hardware.catalog import load_device
from ptsim.hardware.spec import GENERATIONS, Device
from ptsim.network import Network, Precision
from ptsim.setting import StepSetting


class Efficiency(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What kernels reach of a data sheet's promises.

    Attributes:
        simt, tensor: share of the peak that the inner loop of a product sustains, on CUDA cores and tensor cores.
        wide: rate of products on the CUDA cores of SMs with 128 of them (from GA102 on), which share the registers' and
            the shared memory's bandwidth of 64, relative to what they promise.
        feed_bytes_per_clock: operand bytes that one SM takes in per clock.
        ramp: extra depth k that a tile's start and end cost.
        latency: blocks' worth of time that an SM idles before its first result.
        winograd: by how much 3×3 kernels on CUDA cores multiply less in effect.
        input_gradient, weight_gradient, strided: rate of these passes relative to the forward pass.
        product_bandwidth, stream_bandwidth, norm_bandwidth, layout_bandwidth: share of the memory bandwidth that
            products, element-wise kernels, normalisations and layout conversions reach.
        elements_per_clock: elements that one SM reads from memory and writes to it per clock, at most, in kernels that
            stream, normalise or convert layouts: a thread has a fixed number of them in flight (Little's law), however
            few their bytes. From the cache they come as much faster as bytes do.
        norm_block: SMs' shares of the bandwidth that one block of a BatchNorm draws: with few blocks SMs idle.
        pascal_bandwidth: bandwidth that the Pascal memory controllers deliver relative to their successors' share; the
            Volta white paper says 1.5 × in all for V100 over P100, whose stated bandwidths differ 1.23 ×: 0.82.
        depthwise_bandwidth, depthwise_rate: shares of the bandwidth, and of the rate at which instructions issue, of
            depthwise convolutions: a filter tap is a multiply-add among several instructions that compute addresses.
        depthwise_base: filter taps that a pixel costs beyond its own.
        depthwise_halves: by how much the kernels for half precision do more per instruction.
        odd_groups: share of the CUDA cores' peak that grouped convolutions without a tensor-core kernel reach.
        hiding: exponent p of (multiply^p + feed^p)^(1/p), clocks per FLOP inside a block.
        overlap: exponent p of (compute^p + memory^p)^(1/p); large means that the smaller one hides.
        launch_s, product_s: least time of a kernel on the GPU; a product is several kernels (transforms, zero fills).
        cache: bandwidth of the L2 cache relative to the memory's.
        throttle: exponent of the clock in the power that a board has per SM and boost clock, relative to the board of
            its generation that has most.
        boost: clock of consumer boards relative to the stated boost clock.
    """

    simt: float
    tensor: float
    wide: float
    feed_bytes_per_clock: float
    ramp: float
    latency: float
    winograd: float
    input_gradient: float
    weight_gradient: float
    strided: float
    product_bandwidth: float
    stream_bandwidth: float
    norm_bandwidth: float
    layout_bandwidth: float
    elements_per_clock: float
    norm_block: float
    pascal_bandwidth: float
    depthwise_bandwidth: float
    depthwise_rate: float
    depthwise_base: float
    depthwise_halves: float
    odd_groups: float
    hiding: float
    overlap: float
    launch_s: float
    product_s: float
    cache: float
    throttle: float
    boost: float


class Host(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the host needs to launch things: seconds per forward kernel, per backward kernel, per parameter tensor."""

    forward_s: float
    backward_s: float
    update_s: float

    def times(self, factor: float) -> Host:
        """A host that needs so many times as long."""
        return Host(
            forward_s=factor * self.forward_s, backward_s=factor * self.backward_s, update_s=factor * self.update_s
        )


class Fit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `efficiency.toml` holds: the fit, and its GPUs' own factors of time.

    `young_software` is the share by which a step takes longer with software that is young for its GPU.
    """

    efficiency: Efficiency
    host: Host
    devices: dict[str, float]
    young_software: float

    def with_host(self, factor: float) -> Fit:
        """The fit with a host that needs so many times as long."""
        return msgspec.structs.replace(self, host=self.host.times(factor))


class Interval(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """90 % of log(measured / predicted) of rows left out of the fit lies between low and high, in units of a spread.

    The spread of a step is √(base² + uncertainty²), with what may make it shorter below and longer above.
    """

    base: float
    low: float
    high: float

    def around(self, seconds: float, below: float, above: float) -> tuple[float, float]:
        """The interval around a predicted time whose uncertainty is `below` and `above`."""
        low, high = self.low * math.hypot(self.base, below), self.high * math.hypot(self.base, above)
        return seconds * math.exp(low), seconds * math.exp(high)


class ManyGpus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The 90 % interval of a step on many GPUs, in units of the interval of the same step on one, below and above."""

    low: float
    high: float


class Intervals(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `residuals.toml` holds: intervals for GPUs of the fit, whose networks were left out, and for other GPUs.

    The others turn either into that of a step on more than one GPU.
    """

    known_device: Interval
    new_device: Interval
    known_device_many_gpus: ManyGpus
    new_device_many_gpus: ManyGpus

    def of_many_gpus(self, *, known: bool) -> ManyGpus:
        """For a GPU of the fit, or another."""
        return self.known_device_many_gpus if known else self.new_device_many_gpus


class Chip(msgspec.Struct, frozen=True, kw_only=True):
    """A device as the model sees it; every field may be a column, one value per kernel.

    Attributes:
        issue_flops_per_s: the FLOP/s if every instruction that issues were a multiply-add.
        tensor: the products run on tensor cores.
        boosts: 1 where the board clocks beyond its stated boost clock.
        pascal: 1 for that generation's memory controller.
        wide: 1 where an SM has 128 fp32 lanes behind the operand paths of 64.
        free: 1 where products may run on CUDA cores too: tf32 is allowed, not demanded, and the faster kernel is taken.
        power_ratio: power per SM and clock relative to the generation's best-fed board, at most 1.
    """

    peak_flops_per_s: Floats | float
    simt_flops_per_s: Floats | float
    issue_flops_per_s: Floats | float
    tensor: Floats | float
    num_sms: Floats | float
    clock_hz: Floats | float
    bandwidth_bytes_per_s: Floats | float
    l2_bytes: Floats | float
    power_ratio: Floats | float
    boosts: Floats | float
    pascal: Floats | float
    wide: Floats | float
    free: Floats | float


# Watts per SM and GHz of the board of each generation that holds its boost clock best, from the catalog: GTX 1080 Ti
# (128 cores per SM), V100 SXM2, RTX 2080 Ti, A100 SXM4, RTX 4090, H100 SXM5, B200.
_FULL_POWER = {
    "pascal": 3.6,
    "volta": 2.45,
    "turing": 2.38,
    "ampere": 2.52,
    "ada": 1.39,
    "hopper": 2.68,
    "blackwell": 3.4,
}
_SMALL_SM_POWER = 1.4  # of Blackwell's boards for graphics, whose tensor cores are those of Ada: RTX 5090
_TENSOR_SINCE = {Precision.FP16: "volta", Precision.BF16: "ampere", Precision.TF32: "ampere"}
# The fit has rows of Pascal only; older chips are taken to be like it.
_BEFORE_VOLTA = GENERATIONS[: GENERATIONS.index("volta")]
_ISSUE = 128  # threads per clock and SM whose instruction issues, from Volta on: four schedulers of a warp
_SINCE_AMPERE = GENERATIONS[GENERATIONS.index("ampere") :]
_TILES = ((256, 128), (128, 128), (128, 64), (64, 128), (64, 64), (128, 32), (32, 128), (64, 32), (32, 32))
# Standard deviation of the logarithm of time of what the rows of the fit scatter in, or hold little of. Half precision
# scatters more than fp32 and tf32, by software and mini-batch; depthwise and grouped convolutions have rows of a few
# GPUs, groups without a tensor-core kernel of one; padded channels, and kernels that take the least that a kernel
# takes, are assumed. Of transposed convolutions, those over one or three axes, and some in groups (`Kernel.unfitted`)
# there is no row at all: a factor of two either way. Hosts: what the machines of the rows differ by.
_UNCERTAINTY = {
    "halves": 0.12,
    "depthwise": 0.15,
    "grouped": 0.15,
    "odd_groups": 0.3,
    "padded": 0.2,
    "least": 0.3,
    "unfitted": 0.4,
    "host": 0.6,
}
_GROUP_COLUMNS = 64  # least columns of a tile that holds one group: fits best of 1, 32, 64, 96, 128 and 192
_SPLIT_DEPTH = 256  # least depth k of a slice when the depth is split over blocks …
_SPLIT_BLOCKS = 4  # … and how many of them an SM gets


def uses_tensor_cores(device: Device, precision: Precision) -> bool:
    """Whether products of this precision run on tensor cores there."""
    since = _TENSOR_SINCE.get(precision)
    return since is not None and device.architecture in GENERATIONS[GENERATIONS.index(since) :]


def chip_of(device: Device, precision: Precision) -> Chip:
    """The device in the model's terms for products of this precision."""
    # Autocast on cores without tensor units keeps half-precision tensors and multiplies in fp32.
    products = Precision.FP32 if precision is Precision.FP16 and not uses_tensor_cores(device, precision) else precision
    simt, num_sms, clock_hz = device.peak_flops_per_s[Precision.FP32], float(device.num_sms), device.boost_clock_hz
    power = device.power_w / (num_sms * clock_hz / 1e9)
    full_power = _FULL_POWER.get(device.architecture, power)
    fp16_flops_per_s = device.peak_flops_per_s.get(Precision.FP16, math.inf)
    if device.architecture == "blackwell" and fp16_flops_per_s < 2048 * num_sms * clock_hz:
        full_power = _SMALL_SM_POWER
    return Chip(
        peak_flops_per_s=device.peak_flops_per_s[products],
        simt_flops_per_s=simt,
        issue_flops_per_s=simt if device.architecture in ("cpu", *_BEFORE_VOLTA) else 2 * _ISSUE * num_sms * clock_hz,
        tensor=float(uses_tensor_cores(device, precision)),
        num_sms=num_sms,
        clock_hz=clock_hz,
        bandwidth_bytes_per_s=device.memory_bandwidth_bytes_per_s,
        l2_bytes=float(device.l2_bytes),
        boosts=float(device.boosts_beyond),
        pascal=float(device.architecture in _BEFORE_VOLTA),
        wide=float(device.architecture in _SINCE_AMPERE and simt > 200 * num_sms * clock_hz),
        free=float(precision is Precision.TF32),
        power_ratio=min(1.0, power / full_power),
    )


def kernel_seconds(kernels: Kernels, chip: Chip, efficiency: Efficiency) -> Floats:
    """Seconds of every kernel on the device."""
    e = efficiency
    resident = np.minimum(1.0, chip.l2_bytes / np.maximum(kernels.footprint_bytes, 1.0))
    controller = 1 + (e.pascal_bandwidth - 1) * np.asarray(chip.pascal)
    nearer = 1 + (e.cache - 1) * resident
    bandwidth = chip.bandwidth_bytes_per_s * controller * nearer
    share = np.array([e.product_bandwidth, e.depthwise_bandwidth, e.norm_bandwidth, e.stream_bandwidth])
    reading = np.minimum(1.0, e.norm_block * kernels.blocks / chip.num_sms)  # share of the SMs
    memory = kernels.moved_bytes / (share[kernels.work] * reading * bandwidth)
    in_flight = e.elements_per_clock * _clock_hz(chip, e) * chip.num_sms * kernels.element_bytes * nearer  # bytes/s
    streams = (kernels.work == Work.STREAM) | (kernels.work == Work.NORM)
    held = kernels.moved_bytes / (np.minimum(1.0, kernels.blocks / chip.num_sms) * in_flight)  # a block is on one SM
    memory = np.where(streams, np.maximum(memory, held), memory)
    layout = kernels.layout_bytes / np.minimum(e.layout_bandwidth * bandwidth, in_flight)
    compute = np.zeros_like(memory)
    is_product, is_depthwise = kernels.work == Work.PRODUCT, kernels.work == Work.DEPTHWISE
    product = _product_seconds(kernels, chip, e)
    free = np.asarray(chip.free) > 0
    if np.any(free):
        simt = msgspec.structs.replace(chip, tensor=0.0 * free, peak_flops_per_s=chip.simt_flops_per_s)
        product = np.where(free, np.minimum(product, _product_seconds(kernels, simt, e)), product)
    compute[is_product] = product[is_product]
    macs = kernels.m * kernels.n * kernels.k * kernels.groups
    width = np.where(kernels.step == Pass.WEIGHT_GRADIENT, kernels.m, kernels.n)  # channels of a group
    odd = 2 * macs * (1 + 32 / np.maximum(width, 1)) / (e.odd_groups * chip.simt_flops_per_s)
    compute = np.where(kernels.odd_groups, odd, compute)
    per_tap = np.where(kernels.element_bytes < 4, e.depthwise_halves, 1.0)
    pixels = np.where(kernels.step == Pass.WEIGHT_GRADIENT, kernels.k, kernels.m * kernels.n) * kernels.groups
    taps = 2 * (macs + e.depthwise_base * pixels) / (e.depthwise_rate * per_tap * chip.issue_flops_per_s)
    compute[is_depthwise] = taps[is_depthwise]
    largest = np.maximum(np.maximum(compute, memory), 1e-12)
    both = largest * ((compute / largest) ** e.overlap + (memory / largest) ** e.overlap) ** (1 / e.overlap)
    total: Floats = both + layout
    total = total + e.launch_s * kernels.launches + (e.product_s - e.launch_s) * is_product
    return total


def _clock_hz(chip: Chip, e: Efficiency) -> Floats | float:
    """What the SMs clock at where power does not limit them."""
    return chip.clock_hz * (1 + (e.boost - 1) * np.asarray(chip.boosts))


def _product_seconds(kernels: Kernels, chip: Chip, e: Efficiency) -> Floats:
    """The multiplying part of the products: the best tile's whole waves of blocks."""
    clock = _clock_hz(chip, e) * np.asarray(chip.power_ratio) ** e.throttle
    rate = chip.peak_flops_per_s / (chip.num_sms * chip.clock_hz)  # FLOP per SM and clock
    tensor = np.asarray(chip.tensor) > 0
    lanes = e.simt * (1 + (e.wide - 1) * np.asarray(chip.wide))
    flops_clocks = 1 / (rate * np.where(tensor, e.tensor, lanes))
    m, n, k = np.maximum(kernels.m, 1), np.maximum(kernels.n, 1), np.maximum(kernels.k, 1)
    grain = np.where(tensor, 16 / kernels.element_bytes, 1)  # tensor cores load 16 bytes of depth at once
    depth = np.ceil(k / grain) * grain
    # Where a tile has one group only, it has at least so many columns (in the weights' gradient rows), filled or not.
    is_weights = kernels.step == Pass.WEIGHT_GRADIENT
    least = np.where(kernels.lone_groups, _GROUP_COLUMNS, 1)
    m, n = np.where(is_weights, np.maximum(m, least), m), np.where(is_weights, n, np.maximum(n, least))
    # Groups that share a tile share its start and end.
    several = (kernels.groups > 1) & ~kernels.lone_groups & ~is_weights
    ramp = e.ramp * np.where(several, np.minimum(n / _TILES[-1][1], 1), 1)
    best = np.full(m.shape, np.inf)
    for rows, columns in _TILES:
        blocks = np.ceil(m / rows) * np.ceil(n / columns) * np.maximum(kernels.groups, 1)
        split = np.clip(_SPLIT_BLOCKS * chip.num_sms / blocks, 1, np.maximum(depth / _SPLIT_DEPTH, 1))
        per_sm = np.ceil(blocks * split / chip.num_sms - 1e-9)
        feed_clocks = kernels.element_bytes * (rows + columns) / (2 * rows * columns) / e.feed_bytes_per_clock
        work = 2.0 * rows * columns * (depth / split + ramp)
        clocks = (flops_clocks**e.hiding + feed_clocks**e.hiding) ** (1 / e.hiding)
        best = np.minimum(best, (per_sm + e.latency) * work * clocks / clock)
    narrow = np.minimum(kernels.n, kernels.k / 9)  # of a forward 3×3 convolution: the fewer of its channels
    narrow = np.where(kernels.step == Pass.WEIGHT_GRADIENT, np.minimum(kernels.m, kernels.n / 9), narrow)
    gain = 1 + (e.winograd - 1) * narrow / (narrow + 32)
    best = np.where(kernels.winograd & ~tensor, best / gain, best)
    slower = np.array([1.0, e.input_gradient, e.weight_gradient])[kernels.step] * np.where(
        kernels.strided, e.strided, 1
    )
    slowed: Floats = best / slower
    return slowed


def launch_order(kernels: Kernels) -> npt.NDArray[np.intp]:
    """Positions of the kernels as the host launches them: forward, then backward through the layers in reverse."""
    positions = np.arange(len(kernels.layer))
    is_forward = kernels.step == Pass.FORWARD
    return np.concatenate([positions[is_forward], positions[~is_forward][::-1]])


def waiting_seconds(
    kernels: Kernels, seconds: Floats, update_s: float, num_tensors: int, host: Host, num_launches: int = 0
) -> float:
    """How long the GPU waits in a step for a host that launches kernels one by one into an empty queue.

    A kernel starts when it has been launched and its predecessor is done, so the step ends at the largest of: launch
    of a kernel, and all work from it on. Steps begin with an empty queue, as where the loss is read after each.

    Args:
        kernels: of forward and backward.
        seconds: of every kernel on the GPU.
        update_s: of the update on the GPU, after them.
        num_tensors: what the host launches to update parameters: one a tensor, with older software several.
        host: what it needs to launch.
        num_launches: kernels of the regulariser. They are launched as the optimizer's are, without a module and without
            a graph: each is assumed to take what the update of a tensor takes. A bare operator takes about a tenth of
            one in a module's forward pass (`python analysis/bench_engine.py --launches`; 1.4 to 3.2 of 19 to 35 µs).
    """
    order = launch_order(kernels)
    each = np.where(kernels.step == Pass.FORWARD, host.forward_s, host.backward_s) * kernels.launches
    launched = np.cumsum(each[order])
    launched -= launched[:1].copy()
    rest = np.cumsum(seconds[order][::-1])[::-1]
    done = np.max(launched + rest, initial=0.0)
    updating_s = (num_launches + num_tensors) * host.update_s
    updated = float(launched[-1:].sum()) + updating_s - update_s
    return max(float(done), updated) - float(rest[:1].sum())


def uncertainty(kernels: Kernels, seconds: Floats, efficiency: Efficiency) -> float:
    """Standard deviation of log(time) on the GPU from the parts that the fit's rows say little of.

    Args:
        kernels: of the step.
        seconds: of every kernel.
        efficiency: says what a kernel takes at least.
    """
    total_s = float(seconds.sum())
    product = kernels.work == Work.PRODUCT
    least = efficiency.launch_s * kernels.launches + (efficiency.product_s - efficiency.launch_s) * product
    shares = {
        "halves": float((kernels.element_bytes < 4).any()),
        "depthwise": float(seconds[kernels.work == Work.DEPTHWISE].sum()) / total_s,
        "grouped": float(seconds[product & (kernels.groups > 1) & ~kernels.odd_groups].sum()) / total_s,
        "odd_groups": float(seconds[kernels.odd_groups].sum()) / total_s,
        "padded": float(seconds[kernels.padded].sum()) / total_s,
        "least": min(float(least.sum()) / total_s, 1.0),
        "unfitted": float(seconds[kernels.unfitted].sum()) / total_s,
    }
    return math.sqrt(sum((_UNCERTAINTY[part] * share) ** 2 for part, share in shares.items()))


def spreads(
    kernels: Kernels,
    seconds: Floats,
    update_s: float,
    num_tensors: int,
    fit: Fit,
    num_launches: int = 0,
) -> tuple[float, float, float]:
    """What the GPU waits for the host, and how far log(time) of the step may be below and above: one deviation each.

    Hosts differ by `_UNCERTAINTY["host"]`, which counts as far as a faster or a slower one changes the step.
    """
    hosts = (fit.host.times(math.exp(sign * _UNCERTAINTY["host"])) for sign in (0, -1, 1))
    waiting, faster, slower = (
        waiting_seconds(kernels, seconds, update_s, num_tensors, host, num_launches) for host in hosts
    )
    gpu_s = float(seconds.sum()) + update_s
    gpu = uncertainty(kernels, seconds, fit.efficiency)
    step_s = gpu_s + waiting
    return (
        waiting,
        math.hypot(gpu, math.log(step_s / (gpu_s + faster))),
        math.hypot(gpu, math.log((gpu_s + slower) / step_s)),
    )


def waiting_share(step_s: float, predicted: StepTime) -> float:
    """Share of a measured step, 0..1, in which the GPU waited for its host; no clock on the GPU can tell.

    What the step takes longer or shorter than predicted is shared out between kernels and wait by the squares of what
    each may be off: kernels by a step's usual spread, the wait by that of hosts.

    Args:
        step_s: seconds that it was measured to take.
        predicted: the same step from the data sheet.
    """
    kernels_s = predicted.compute_s - predicted.overhead_s
    host = (_UNCERTAINTY["host"] * predicted.overhead_s) ** 2
    if not host:
        return 0.0
    gpu = (load_intervals().known_device.base * kernels_s) ** 2
    waited_s = predicted.overhead_s + (step_s - predicted.compute_s) * host / (host + gpu)
    return min(max(waited_s / step_s, 0.0), 1.0)


@functools.lru_cache(maxsize=1)
def load_fit() -> Fit:
    """The fitted efficiencies that ptsim ships."""
    return shipped("efficiency.toml", Fit)


@functools.lru_cache(maxsize=1)
def load_intervals() -> Intervals:
    """The intervals that ptsim ships."""
    return shipped("residuals.toml", Intervals)


def datasheet_step(network: Network, device: Device, setting: StepSetting, *, fit: Fit | None = None) -> StepTime:
    """One training step by roofline and fitted efficiencies.

    The host launches every operator; `overhead_s` is what the GPU waits for that. `fit` stands in for the fit that
    ptsim ships.
    """
    fit = fit or load_fit()
    precision = setting.precision
    slower = 1 + fit.young_software
    young = slower if is_young(device, setting.torch_version) else 1.0
    older = slower if may_be_young(device, setting.torch_version) else 1.0
    kernels = network_kernels(network, setting, tensor_cores=uses_tensor_cores(device, precision))
    factor = device_factor(device, fit)
    seconds = kernel_seconds(kernels, chip_of(device, precision), fit.efficiency) * (factor or 1.0) * young
    count = len(network.layers)
    is_forward = kernels.step == Pass.FORWARD
    forward = np.bincount(kernels.layer[is_forward], seconds[is_forward], count)
    backward = np.bincount(kernels.layer[~is_forward], seconds[~is_forward], count)
    streaming = fit.efficiency.stream_bandwidth * device.memory_bandwidth_bytes_per_s
    update = update_of(network, setting)
    zeroing = zeroing_of(network, setting)
    optimizer_s = update.seconds(streaming, fit.efficiency.launch_s) * young
    penalty = step_penalty(network, setting, gpu=device.is_gpu)
    regularizer_s = max(penalty.num_bytes / streaming, penalty.num_launches * fit.efficiency.launch_s)
    gpu_s = float(forward.sum() + backward.sum()) + optimizer_s + regularizer_s
    update_s = optimizer_s + regularizer_s
    overhead_s, below, above = spreads(kernels, seconds, update_s, update.num_launches, fit, penalty.num_launches)
    interval = load_intervals().new_device if factor is None else load_intervals().known_device
    low_s, high_s = interval.around(gpu_s + overhead_s, below, above)
    return StepTime(
        layers=tuple(
            LayerTime(
                layer=layer.name,
                kind=layer.kind,
                forward_s=float(forward[i]),
                backward_s=float(backward[i]),
                tier=Tier.DATASHEET,
            )
            for i, layer in enumerate(network.layers)
        ),
        optimizer_s=optimizer_s,
        regularizer_s=regularizer_s,
        overhead_s=overhead_s,
        low_s=low_s,
        high_s=older * high_s,
        tier=Tier.DATASHEET,
        whole_s=(cast_bytes(network, setting) / streaming + zeroing.seconds(streaming, fit.efficiency.launch_s))
        * young,
        again_s=again_of(network, setting).seconds(streaming, fit.efficiency.launch_s) * young,
        older=older,
    )


def device_factor(device: Device, fit: Fit) -> float | None:
    """The factor of the fit's GPU, or the mean of those with the same chip; None where none has it."""
    if device.name in fit.devices:
        return fit.devices[device.name]
    same = [name for name in fit.devices if _chip_named(name) == device.chip]
    return math.exp(sum(math.log(fit.devices[name]) for name in same) / len(same)) if same else None


@functools.cache
def _chip_named(name: str) -> str:
    """The chip of a board of the catalog, whose file is read once."""
    return load_device(name).chip
