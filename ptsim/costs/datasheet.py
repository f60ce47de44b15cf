"""How long a training step takes by the data sheet: a roofline per kernel, with efficiencies fitted to measurements.

A matrix product runs in tiles. Its blocks are dealt to the SMs in whole waves; a block multiplies at the peak rate
times `simt` or `tensor`, and waits for its operands, which reach an SM at `feed_bytes_per_clock`: the term that keeps
fast tensor cores far from their peak and that grows for small tiles, so that odd and small channel counts make stairs.
Everything else is bytes over memory bandwidth. The numbers of `Efficiency` are the same for all GPUs; what
differs between GPUs is in the catalog. `analysis/fit_efficiency.py` fits them; `efficiency.toml` holds the result.
"""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path

import msgspec
import numpy as np

from ptsim.costs.kernels import Floats, Kernels, Pass, Work, network_kernels
from ptsim.costs.times import LayerTime, StepSetting, StepTime, Tier
from ptsim.costs.traffic import regularizer_traffic, update_traffic
from ptsim.hardware.catalog import load_device
from ptsim.hardware.spec import Device
from ptsim.network import Network, Precision


class Efficiency(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What kernels reach of a data sheet's promises.

    Attributes:
        simt, tensor: share of the peak that the inner loop of a product sustains, on CUDA cores and tensor cores.
        feed_bytes_per_clock: operand bytes that one SM takes in per clock.
        ramp: extra depth k that a tile's start and end cost.
        latency: blocks' worth of time that an SM idles before its first result.
        winograd: by how much 3×3 kernels on CUDA cores multiply less in effect.
        input_gradient, weight_gradient, strided: rate of these passes relative to the forward pass.
        product_bandwidth, stream_bandwidth, norm_bandwidth, layout_bandwidth: share of the memory bandwidth that
            products, element-wise kernels, normalisations and layout conversions reach.
        pascal_bandwidth: bandwidth that the Pascal memory controllers deliver relative to their successors' share; the
            Volta white paper says 1.5 × in all for V100 over P100, whose stated bandwidths differ 1.23 ×: 0.82.
        depthwise_bandwidth, depthwise_rate: shares of bandwidth and of the fp32 peak of depthwise convolutions.
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
    pascal_bandwidth: float
    depthwise_bandwidth: float
    depthwise_rate: float
    hiding: float
    overlap: float
    launch_s: float
    product_s: float
    cache: float
    throttle: float
    boost: float


class Host(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the host needs to launch things: seconds per forward operator, per backward kernel, per parameter tensor."""

    forward_s: float
    backward_s: float
    update_s: float


class Residuals(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """5 % and 95 % quantiles of log(measured / predicted) on rows left out of the fit."""

    low: float
    high: float


class Fit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `efficiency.toml` holds: the fit, its GPUs' own factors of time, residuals on these GPUs and on others."""

    efficiency: Efficiency
    host: Host
    devices: dict[str, float]
    known_device: Residuals
    new_device: Residuals


class Chip(msgspec.Struct, frozen=True, kw_only=True):
    """A device as the model sees it; every field may be a column, one value per kernel.

    Attributes:
        tensor: the products run on tensor cores.
        boosts: 1 where the board clocks beyond its stated boost clock.
        pascal: 1 for that generation's memory controller.
        power_ratio: power per SM and clock relative to the generation's best-fed board, at most 1.
    """

    peak_flops_per_s: Floats | float
    simt_flops_per_s: Floats | float
    tensor: Floats | float
    num_sms: Floats | float
    clock_hz: Floats | float
    bandwidth_bytes_per_s: Floats | float
    l2_bytes: Floats | float
    power_ratio: Floats | float
    boosts: Floats | float
    pascal: Floats | float


# Watts per SM and GHz of the board of each generation that holds its boost clock best, from the catalog: GTX 1080 Ti
# (128 cores per SM), V100 SXM2, RTX 2080 Ti, A100 SXM4, RTX 4090, H100 SXM5, B200.
_FULL_POWER = {
    "pascal": 3.6,
    "volta": 2.45,
    "turing": 2.38,
    "ampere": 2.52,
    "ada": 1.39,
    "hopper": 2.9,
    "blackwell": 3.4,
}
_TENSOR_SINCE = {Precision.FP16: "volta", Precision.BF16: "ampere", Precision.TF32: "ampere"}
_GENERATIONS = ("cpu", "pascal", "volta", "turing", "ampere", "ada", "hopper", "blackwell")
_TILES = ((256, 128), (128, 128), (128, 64), (64, 128), (64, 64), (128, 32), (32, 128), (64, 32), (32, 32))
_SPLIT_DEPTH = 256  # least depth k of a slice when the depth is split over blocks …
_SPLIT_BLOCKS = 4  # … and how many of them an SM gets


def uses_tensor_cores(device: Device, precision: Precision) -> bool:
    """Whether products of this precision run on tensor cores there."""
    since = _TENSOR_SINCE.get(precision)
    return since is not None and _GENERATIONS.index(device.architecture) >= _GENERATIONS.index(since)


def chip_of(device: Device, precision: Precision) -> Chip:
    """The device in the model's terms for products of this precision."""
    # Autocast on cores without tensor units keeps half-precision tensors and multiplies in fp32.
    products = Precision.FP32 if precision is Precision.FP16 and not uses_tensor_cores(device, precision) else precision
    power = device.power_w / (device.num_sms * device.boost_clock_hz / 1e9)
    return Chip(
        peak_flops_per_s=device.peak_flops_per_s[products],
        simt_flops_per_s=device.peak_flops_per_s[Precision.FP32],
        tensor=float(uses_tensor_cores(device, precision)),
        num_sms=float(device.num_sms),
        clock_hz=device.boost_clock_hz,
        bandwidth_bytes_per_s=device.memory_bandwidth_bytes_per_s,
        l2_bytes=float(device.l2_bytes),
        boosts=float(device.boosts_beyond),
        pascal=float(device.architecture == "pascal"),
        power_ratio=min(1.0, power / _FULL_POWER.get(device.architecture, power)),
    )


def kernel_seconds(kernels: Kernels, chip: Chip, efficiency: Efficiency) -> Floats:
    """Seconds of every kernel on the device."""
    e = efficiency
    resident = np.minimum(1.0, chip.l2_bytes / np.maximum(kernels.footprint_bytes, 1.0))
    controller = 1 + (e.pascal_bandwidth - 1) * np.asarray(chip.pascal)
    bandwidth = chip.bandwidth_bytes_per_s * controller * (1 + (e.cache - 1) * resident)
    share = np.array([e.product_bandwidth, e.depthwise_bandwidth, e.norm_bandwidth, e.stream_bandwidth])
    memory = kernels.moved_bytes / (share[kernels.work] * bandwidth)
    compute = np.zeros_like(memory)
    is_product, is_depthwise = kernels.work == Work.PRODUCT, kernels.work == Work.DEPTHWISE
    compute[is_product] = _product_seconds(kernels, chip, e)[is_product]
    macs = kernels.m * kernels.n * kernels.k * kernels.groups
    compute[is_depthwise] = (2 * macs / (e.depthwise_rate * chip.simt_flops_per_s))[is_depthwise]
    largest = np.maximum(np.maximum(compute, memory), 1e-12)
    both = largest * ((compute / largest) ** e.overlap + (memory / largest) ** e.overlap) ** (1 / e.overlap)
    total: Floats = both + kernels.layout_bytes / (e.layout_bandwidth * bandwidth)
    total = total + e.launch_s * kernels.launches + (e.product_s - e.launch_s) * is_product
    return total


def _product_seconds(kernels: Kernels, chip: Chip, e: Efficiency) -> Floats:
    """The multiplying part of the products: the best tile's whole waves of blocks."""
    clock = chip.clock_hz * np.asarray(chip.power_ratio) ** e.throttle * (1 + (e.boost - 1) * np.asarray(chip.boosts))
    rate = chip.peak_flops_per_s / (chip.num_sms * chip.clock_hz)  # FLOP per SM and clock
    tensor = np.asarray(chip.tensor) > 0
    flops_clocks = 1 / (rate * np.where(tensor, e.tensor, e.simt))
    m, n, k = np.maximum(kernels.m, 1), np.maximum(kernels.n, 1), np.maximum(kernels.k, 1)
    grain = np.where(tensor, 16 / kernels.element_bytes, 1)  # tensor cores load 16 bytes of depth at once
    depth = np.ceil(k / grain) * grain
    best = np.full(m.shape, np.inf)
    for rows, columns in _TILES:
        blocks = np.ceil(m / rows) * np.ceil(n / columns) * np.maximum(kernels.groups, 1)
        split = np.clip(_SPLIT_BLOCKS * chip.num_sms / blocks, 1, np.maximum(depth / _SPLIT_DEPTH, 1))
        per_sm = np.ceil(blocks * split / chip.num_sms - 1e-9)
        feed_clocks = kernels.element_bytes * (rows + columns) / (2 * rows * columns) / e.feed_bytes_per_clock
        work = 2.0 * rows * columns * (depth / split + e.ramp)
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


@functools.lru_cache(maxsize=1)
def load_fit() -> Fit:
    """The fitted efficiencies that ptsim ships."""
    return msgspec.convert(tomllib.loads((Path(__file__).parent / "efficiency.toml").read_text("utf-8")), Fit)


def datasheet_step(network: Network, device: Device, setting: StepSetting, *, fit: Fit | None = None) -> StepTime:
    """One training step by roofline and fitted efficiencies.

    The host launches every operator; where that takes longer than the GPU, `overhead_s` is what the GPU waits. `fit`
    stands in for the fit that ptsim ships.
    """
    fit = fit or load_fit()
    precision = setting.precision
    kernels = network_kernels(
        network,
        batch=setting.batch,
        precision=precision,
        memory_format=setting.memory_format,
        tensor_cores=uses_tensor_cores(device, precision),
    )
    factor, residuals = _device_factor(device, fit)
    seconds = kernel_seconds(kernels, chip_of(device, precision), fit.efficiency) * factor
    count = len(network.layers)
    is_forward = kernels.step == Pass.FORWARD
    forward = np.bincount(kernels.layer[is_forward], seconds[is_forward], count)
    backward = np.bincount(kernels.layer[~is_forward], seconds[~is_forward], count)
    streaming = fit.efficiency.stream_bandwidth * device.memory_bandwidth_bytes_per_s
    optimizer_s = update_bytes(network, setting.optimizer, precision) / streaming
    regularizer_s = regularizer_traffic(network) / streaming if setting.regularizer else 0.0
    gpu_s = float(forward.sum() + backward.sum()) + optimizer_s + regularizer_s
    overhead_s = max(0.0, host_seconds(network, kernels, fit.host) - gpu_s)
    total_s = gpu_s + overhead_s
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
        low_s=total_s * float(np.exp(residuals.low)),
        high_s=total_s * float(np.exp(residuals.high)),
        tier=Tier.DATASHEET,
    )


def update_bytes(network: Network, optimizer: str, precision: Precision) -> float:
    """What an update moves; under autocast with the casts of weights and gradients and the scaler's division."""
    casts = 20 if precision.activation_bytes == 2 else 0
    return float(update_traffic(network, optimizer) + casts * network.num_parameters)


def _device_factor(device: Device, fit: Fit) -> tuple[float, Residuals]:
    """The factor of the fit's GPU with the same chip (its own where it is there), and the residuals to expect."""
    chips = {name: load_device(name) for name in fit.devices}
    same = [n for n, c in chips.items() if (c.architecture, c.num_sms) == (device.architecture, device.num_sms)]
    if not same:
        return 1.0, fit.new_device
    return fit.devices[device.name if device.name in same else same[0]], fit.known_device


def host_seconds(network: Network, kernels: Kernels, host: Host) -> float:
    """Seconds that the host needs to launch forward, backward and update."""
    is_forward = kernels.step == Pass.FORWARD
    launches = kernels.launches
    return (
        float(launches[is_forward].sum()) * host.forward_s
        + float(launches[~is_forward].sum()) * host.backward_s
        + len(network.parameters) * host.update_s
    )
