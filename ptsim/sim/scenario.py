"""Which run is projected onto what: the inputs of a projection, resolved once and checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import msgspec

from ptsim.costs.buckets import Bucket, ddp_buckets
from ptsim.costs.memory import usable_bytes
from ptsim.costs.step import Measurements
from ptsim.errors import UsageError
from ptsim.hardware.catalog import load_device
from ptsim.hardware.profile import DeviceProfile
from ptsim.hardware.spec import Cluster, Device
from ptsim.network import Network
from ptsim.setting import OF_RUNS, StepSetting, parse_precision
from ptsim.sim.options import Options
from ptsim.trace.schema import Epoch
from ptsim.trace.trace import Trace

T = TypeVar("T")
_MOST_GPUS = 1_000_000


class StepCache:
    """What several projections of the same trace share: step times, memory needs, plans without communication.

    A cache belongs to one trace and one device profile.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is under `key`, made if it is new. A key always stands for the same type."""
        if key not in self._known:
            self._known[key] = make()
        known: T = self._known[key]
        return known


class Scenario:
    """One projection's inputs: the recorded run, the cluster, and every option with its default filled in."""

    def __init__(
        self,
        trace: Trace,
        cluster: Cluster,
        num_gpus: int,
        options: Options,
        *,
        device: Device | None = None,
        device_profile: DeviceProfile | None = None,
        cache: StepCache | None = None,
    ) -> None:
        """Resolve names and defaults.

        Raises:
            UsageError: no epochs in the trace, no GPUs, an option out of its bounds, an unknown device, or a planned
                run where a measured one is needed.
        """
        options.check()
        if not trace.epochs:
            raise UsageError(f"{trace.path} has no finished epoch; there is nothing to project")
        for name, what in (("jitter", "the jitter of its steps"), ("input_images_per_s", "its waiting for data")):
            if getattr(options, name) == "recorded":
                trace.require_measured(f"take {what} from")
        if num_gpus < 1:
            raise UsageError(f"{num_gpus} GPUs; at least 1 is needed")
        if num_gpus > _MOST_GPUS:
            raise UsageError(f"{num_gpus:,} GPUs; at most {_MOST_GPUS:,} are simulated")
        self.trace, self.cluster, self.num_gpus, self.options = trace, cluster, num_gpus, options
        self.cache = cache or StepCache()
        run = trace.run
        self.device = device or (cluster.gpu if options.device is None else load_device(options.device))
        self.device_key = msgspec.json.encode(self.device)
        nominal = options.memory_bytes or self.device.memory_bytes
        self.memory_bytes = usable_bytes(msgspec.structs.replace(self.device, memory_bytes=nominal))
        self.precision = parse_precision(options.precision) if options.precision else run.precision
        self.memory_format = options.memory_format or run.memory_format
        self.optimizer, self.momentum = trace.optimizer, trace.momentum
        self.criterion, self.proximal = trace.criterion, trace.proximal
        self.told_update, self.told_penalties = trace.told_update, trace.told_penalties
        self.measurements = Measurements.of(trace, self.device, device_profile)
        self.overlap = not trace.compiled if options.overlap is None else options.overlap
        asked = options.broadcast_buffers
        self.broadcast_buffers = trace.broadcasts_buffers if asked is None else asked
        self.spread = recorded_jitter(trace.epochs)

    def num_passes(self, batch: int, epoch: Epoch) -> int:
        """Passes that a mini-batch is split into: as asked for, else as recorded, as far as there are images."""
        return self.options.micro_batches or min(epoch.passes, batch)

    def setting(self, batch: int, epoch: Epoch) -> StepSetting:
        """How a pass of a mini-batch is run, with the regularizer where the epoch has one."""
        return StepSetting(
            batch=-(-batch // self.num_passes(batch, epoch)),
            precision=self.precision,
            memory_format=self.memory_format,
            optimizer=self.optimizer,
            momentum=self.momentum,
            proximal=self.proximal,
            regularizer=self.criterion if epoch.regularized else None,
            num_gpus=self.num_gpus,
            bucket_views=self.trace.bucket_views,
            sharding=self.options.sharding if self.num_gpus > 1 else "none",
            told_update=self.told_update,
            told_penalties=self.told_penalties,
            torch_version=OF_RUNS,
        )

    def memory_setting(self, batch: int, epoch: Epoch) -> StepSetting:
        """What the memory of a mini-batch depends on: all its passes, between which gradients stay."""
        setting = self.setting(batch, epoch)
        alike = setting.sharding == "none" and setting.data_parallel  # buckets are as large on any number of GPUs
        return msgspec.structs.replace(
            setting,
            batch=batch,
            passes=self.num_passes(batch, epoch),
            num_gpus=2 if alike else setting.num_gpus,
        )

    def buckets(self, network: Network, identity: str) -> tuple[Bucket, ...]:
        """DDP's buckets of the network's gradients under the options; none on a single GPU."""
        if self.num_gpus == 1:
            return ()
        first, others = self.options.first_cap_bytes, self.options.bucket_bytes
        rebuilt = not self.options.find_unused_parameters
        return self.cache.get(
            ("buckets", identity, first, others, rebuilt),
            lambda: ddp_buckets(network, first_bucket_bytes=first, bucket_bytes=others, rebuilt=rebuilt),
        )


def recorded_jitter(epochs: Sequence[Epoch]) -> float:
    """The standard deviation of the logarithm of a step's duration, from the recorded 10th and 90th percentiles.

    Percentiles, not the standard deviation: the first steps after a start would dominate that. The median over epochs;
    0 where nobody measured steps.
    """
    steps = [epoch.measured_step for epoch in epochs]
    spreads = sorted(
        math.log(step.p90_s / step.p10_s) / (2 * 1.2816) for step in steps if step is not None and step.p10_s > 0
    )
    return spreads[len(spreads) // 2] if spreads else 0.0
