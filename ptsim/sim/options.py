"""What may be changed when a recorded run is projected: everything has PyTorch's or the recorded run's own default."""

from __future__ import annotations

import datetime
import math
import re
import sys
from typing import Literal

import msgspec

from ptsim.costs.algorithms import AUTO, check_choice
from ptsim.costs.input import find_pipeline
from ptsim.errors import UsageError
from ptsim.hardware.spec import Cluster
from ptsim.network import MemoryFormat
from ptsim.setting import PrecisionName, Sharding
from ptsim.units import MIB, UsdPerHour, counted, format_quantity

Scaling = Literal["weak", "strong"]
MiniBatch = Literal["recorded", "planned", "fixed"]
GradientFormat = Literal["fp32", "fp16", "bf16"]

_LINK = re.compile(r"(gpu|node|leaf)( \d+( (in|out|up|down)( nic \d+)?)?)?")

_BOUNDS: dict[str, tuple[float, float | None]] = {  # option → smallest and largest value; None: any finite one
    "batch_granularity": (1, None),
    "max_batch": (1, None),
    "memory_bytes": (1, None),
    "micro_batches": (1, None),
    "first_bucket_bytes": (1, None),
    "bucket_bytes": (1, None),
    "contention": (0, 1),
    "channel_multiple": (1, 2**16),
    "one_time_epoch": (0, None),
    "surgery_s": (0, None),
    "compile_s": (0, None),
    "autotune_trials": (0, None),
    "warmup_steps": (0, None),
    "input_stored_pixels": (1, None),
    "input_storage_bytes_per_s": (1, None),
    "jitter": (0, 2),
    "straggler_fraction": (0, 1),
    "straggler_slowdown": (1, None),
    "jobs": (1, 10_000),
    "sampled_steps": (1, None),
    "price_usd_per_gpu_hour": (UsdPerHour.least, UsdPerHour.most),
}
_RATES = 1e-3, 1e12  # images per second that one GPU can be given
_LONGEST = 1e12  # hours or seconds: beyond it a simulated clock no longer sees a second pass
_TORCH_BUCKET_BYTES = 25 * MIB
GRADIENT_BYTES: dict[GradientFormat, int] = {"fp32": 4, "fp16": 2, "bf16": 2}


class Faults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Failing GPUs, and what the job does about them.

    Attributes:
        mtbf_gpu_hours: mean time between failures of one GPU (with its share of the node and network).
        checkpoint_interval_s: training time between checkpoints.
        checkpoint_s: time for which a checkpoint stops training.
        restart_s: time from a failure until training goes on: detection, scheduling, loading.
        policy: "restart" waits for a replacement (which `restart_s` includes); "elastic" goes on without the node.
        repair_s: elastic only: time until the node is back.
        num_runs: simulated repetitions behind the mean and its interval.
    """

    mtbf_gpu_hours: float
    checkpoint_interval_s: float = 1800.0
    checkpoint_s: float = 5.0
    restart_s: float = 300.0
    policy: Literal["restart", "elastic"] = "restart"
    repair_s: float = 4 * 3600.0
    num_runs: int = 20

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: names the option, its value and the bound.
        """
        for name in ("mtbf_gpu_hours", "checkpoint_interval_s"):
            if not 0 < getattr(self, name) <= _LONGEST:
                bound = f"a positive number of at most {_LONGEST:g}"
                raise UsageError(f"{name} is {getattr(self, name):g}, expected {bound}")
        for name in ("checkpoint_s", "restart_s", "repair_s"):
            if not 0 <= getattr(self, name) <= _LONGEST:
                raise UsageError(f"{name} is {getattr(self, name):g}, expected 0 to {_LONGEST:g}")
        if not 1 <= self.num_runs <= 100_000:
            raise UsageError(f"num_runs is {self.num_runs}, expected 1 to 100000")


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to project a run.

    Attributes:
        scaling: "weak" keeps the recorded mini-batch per GPU; "strong" keeps the recorded global one.
        minibatch: "recorded"; "planned": grown at every reconfiguration to what fits the projected device;
            "fixed": the first epoch's throughout.
        batch_granularity, max_batch: a planned per-GPU mini-batch grows by multiples of the first, up to the second.
        memory_bytes: memory of every GPU as a data sheet names it, instead of the device's own.
        device: every GPU's device, instead of the cluster's own (catalog name or TOML file).
        mixed_devices: device → number of GPUs per node of that kind; the rest are the cluster's own.
        precision, memory_format: instead of the recorded ones.
        micro_batches: gradient accumulation: passes that one mini-batch is split into; None: as many as recorded.
        bucket_bytes: DDP's cap (`bucket_cap_mb`).
        first_bucket_bytes: cap of the first bucket; None: as torch, 1 MiB beside its own cap of 25 MiB, and
            `bucket_bytes` itself where that is another.
        gradient_format: number format on the wire (DDP's fp16 and bf16 compression hooks).
        compression: bytes sent / bytes of the gradient, on top of the format.
        sharding: "zero1": every GPU keeps and updates its share of the optimizer's state; "zero2": of the gradients
            too.
        broadcast_buffers: DDP's broadcast of BatchNorm statistics before every forward pass (its default; `ptsim train`
            turns it off and averages them once per epoch); None: as in the recorded run.
        overlap: whether all-reduces start during backward; None: as in the recorded run, which a compiled step does
            not let them (its gradients all become ready at its end).
        find_unused_parameters: DDP's option: it never rebuilds its buckets then, and reduces which were used.
        algorithm: of the all-reduce: "auto", or the name of one.
        network: "formula" treats all links of a kind as equal; "links" sends chunks over the cluster's links one by
            one: NICs, oversubscribed leaf switches, and what the next three options say.
        link_bandwidth: link → factor on its bandwidth: {"node 3 out nic 1": 0.5}, {"gpu 5": 0.8}, {"leaf 0 up": 2}.
        link_latency_s: link → additional latency.
        placement: of several jobs: "packed" one after the other, or "striped": every node has GPUs of all of them.
        contention: by which fraction computation and communication each take longer while they overlap; None: as in
            `costs/scaling.toml` for the link: 0.05 over TCP and 0.2 elsewhere.
        channel_multiple: round pruned channel counts up to a multiple, or to what they were before pruning.
        one_time_epoch: reconfigure once, after this many epochs, and never before or after.
        surgery_s: time to change the network at one reconfiguration; None: as recorded.
        compile_s: recompilation after wrapping (torch.compile).
        autotune_trials: trial runs of every convolution after wrapping, on a GPU (cuDNN's benchmark mode).
        warmup_steps: steps after wrapping that train nothing.
        input: the pipeline that reads and decodes the images (`costs.input.pipelines`), sharing the node's cores
            with all jobs that are on it; "none": never a limit.
        input_stored_pixels: mean height times width of its images as they are stored; None: ImageNet's, or the
            network's input where that is smaller than 128 x 128.
        input_storage_bytes_per_s: at which a node reads images, instead of the cluster's own.
        input_images_per_s: instead of a pipeline: what one GPU is given; None: never a limit; "recorded": data wait as
            the trace says.
        jitter: relative standard deviation of a GPU's step; "recorded": from the trace's step times.
        straggler_fraction, straggler_slowdown: share of GPUs that are slow, and by which factor.
        jobs: equal jobs side by side; by formula they share the links between nodes equally.
        sampled_steps: simulated steps per average where anything is random or shared.
        faults: failing GPUs.
        price_usd_per_gpu_hour: price of a GPU, instead of the cluster's.
        seed: of every random draw.
    """

    scaling: Scaling = "weak"
    minibatch: MiniBatch = "recorded"
    batch_granularity: int = 32
    max_batch: int | None = None
    memory_bytes: int | None = None
    device: str | None = None
    mixed_devices: dict[str, int] = {}
    precision: PrecisionName | None = None
    memory_format: MemoryFormat | None = None
    micro_batches: int | None = None
    first_bucket_bytes: int | None = None
    bucket_bytes: int = _TORCH_BUCKET_BYTES
    gradient_format: GradientFormat = "fp32"
    compression: float = 1.0
    sharding: Sharding = "none"
    broadcast_buffers: bool | None = None
    overlap: bool | None = None
    find_unused_parameters: bool = False
    algorithm: str = AUTO
    network: Literal["formula", "links"] = "formula"
    link_bandwidth: dict[str, float] = {}
    link_latency_s: dict[str, float] = {}
    placement: Literal["packed", "striped"] = "packed"
    contention: float | None = None
    channel_multiple: int = 1
    one_time_epoch: int | None = None
    surgery_s: float | None = None
    compile_s: float = 0.0
    autotune_trials: int = 10  # torch.backends.cudnn.benchmark_limit
    warmup_steps: int = 0
    input: str = "none"
    input_stored_pixels: int | None = None
    input_storage_bytes_per_s: float | None = None
    input_images_per_s: float | Literal["recorded"] | None = None
    jitter: float | Literal["recorded"] = 0.0
    straggler_fraction: float = 0.0
    straggler_slowdown: float = 1.0
    jobs: int = 1
    sampled_steps: int = 20
    faults: Faults | None = None
    price_usd_per_gpu_hour: float | None = None
    seed: int = 0

    @property
    def first_cap_bytes(self) -> int:
        """Cap of the first bucket.

        Source: torch/nn/parallel/distributed.py: `_DEFAULT_FIRST_BUCKET_BYTES` counts only where no cap was given.
        """
        if self.first_bucket_bytes is not None:
            return self.first_bucket_bytes
        return MIB if self.bucket_bytes == _TORCH_BUCKET_BYTES else self.bucket_bytes

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: names the option, its value and the bound.
        """
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if value is None or isinstance(value, str):
                continue
            if not low <= value <= (sys.float_info.max if high is None else high):
                bound = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
                if math.isinf(value):
                    bound = "a finite number"
                raise UsageError(f"{name} is {value:g}, expected {bound}")
        if not 0 < self.compression <= 1:
            raise UsageError(f"compression is {self.compression:g}, expected more than 0 and at most 1")
        slowest, fastest = _RATES
        if isinstance(self.input_images_per_s, int | float) and not slowest <= self.input_images_per_s <= fastest:
            bound = f"expected a positive rate, {slowest:g} to {fastest:g}"
            raise UsageError(f"input_images_per_s is {self.input_images_per_s:g}, {bound}")
        if self.input != "none":
            find_pipeline(self.input)
            if self.input_images_per_s is not None:
                raise UsageError("input and input_images_per_s both say what feeds the GPUs; give one of them")
        else:
            for name in ("input_stored_pixels", "input_storage_bytes_per_s"):
                if getattr(self, name) is not None:
                    raise UsageError(f"{name} needs an input pipeline, such as input = torchvision")
        if any(count < 1 for count in self.mixed_devices.values()):
            raise UsageError(f"mixed_devices is {self.mixed_devices}, expected at least one GPU per node of each kind")
        if self.faults is not None:
            self.faults.check()
        check_choice(self.algorithm)
        self._check_links()

    def _check_links(self) -> None:
        for option, bound in (("link_bandwidth", "a positive factor"), ("link_latency_s", "seconds of at least 0")):
            for name, value in getattr(self, option).items():
                if not _LINK.fullmatch(name):
                    raise UsageError(
                        f"{option} names {name!r}, which is no link",
                        hint="links are called 'gpu 3 out', 'node 1 in', 'node 1 out nic 2', 'leaf 0 up', "
                        "or by the first words of that",
                    )
                if not (value > 0 or (value == 0 and option == "link_latency_s")) or math.isinf(value):
                    raise UsageError(f"{option} of {name!r} is {value:g}, expected {bound}")
        if self.network == "formula":
            for option, neutral in (("link_bandwidth", {}), ("link_latency_s", {}), ("placement", "packed")):
                if getattr(self, option) != neutral:
                    raise UsageError(f'{option} needs network = "links"; a formula treats all links as equal')


class HourPrice(msgspec.Struct, frozen=True, kw_only=True):
    """What a GPU-hour costs.

    Attributes:
        usd: of one GPU.
        source: where it was found, or who said it.
        date: the day of a list price; None where somebody said what he pays.
        instance_gpus: how many GPUs are rented together. A list price is that of a whole instance, a node.
    """

    usd: float
    source: str
    date: datetime.date | None = None
    instance_gpus: int = 1

    def billed_gpus(self, num_gpus: int) -> int:
        """The GPUs of all instances that `num_gpus` GPUs are part of."""
        return -(-num_gpus // self.instance_gpus) * self.instance_gpus

    def billing(self, num_gpus: int) -> str:
        """In words: "9 GPUs are billed as 16"; empty where as many are billed as train."""
        billed = self.billed_gpus(num_gpus)
        if billed == num_gpus:
            return ""
        return f"{counted(num_gpus, 'GPU is', 'GPUs are')} billed as {billed:,}"

    def __str__(self) -> str:
        """In words: "3.06 USD per GPU-hour, the list price of 2026-09-24 for whole instances of 8 GPUs"."""
        text = f"{format_quantity('usd', self.usd)} per GPU-hour"
        if self.date is not None:
            text += f", the list price of {self.date}"
        if self.instance_gpus > 1:
            text += f" for whole instances of {self.instance_gpus} GPUs"
        return text


def hour_price(cluster: Cluster, options: Options) -> HourPrice | None:
    """The price that the options give, 0 included, or the cluster's; None where neither has one."""
    if options.price_usd_per_gpu_hour is not None:
        return HourPrice(usd=options.price_usd_per_gpu_hour, source="given by the user")
    if cluster.price_usd_per_gpu_hour is None:
        return None
    return HourPrice(
        usd=cluster.price_usd_per_gpu_hour,
        source=cluster.sources.get("price_per_gpu", "not stated"),
        date=cluster.price_date,
        instance_gpus=1 if cluster.price_date is None else cluster.gpus_per_node,
    )
