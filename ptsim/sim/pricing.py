"""What one step of a planned epoch takes on the projected GPUs, and what wrapping its network costs; with bounds.

Every distinct (architecture, mini-batch) is simulated once, three times over: with every duration at its expected
value and at the low and the high end of its own interval. The tiers' errors are systematic, so they are taken as fully
correlated over layers. The recorded spread of the steps comes on top, independent of that.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import msgspec

from ptsim.costs.buckets import Bucket
from ptsim.costs.memory import MemoryNeed, iteration_memory
from ptsim.costs.scaling import among, contention_of, hook_seconds, slowdown
from ptsim.costs.step import Measurements, StepTime, step_time
from ptsim.costs.tiers import worst_tier
from ptsim.costs.times import Z90
from ptsim.errors import UsageError
from ptsim.hardware.catalog import load_device
from ptsim.hardware.spec import Device
from ptsim.network import LayerKind, Network
from ptsim.setting import StepSetting
from ptsim.sim import ddp
from ptsim.sim.bounded import BOUNDS, SecondsRange, bounded_step
from ptsim.sim.communication import Network as Links
from ptsim.sim.feeding import Feed
from ptsim.sim.options import GRADIENT_BYTES
from ptsim.sim.planning import Stage
from ptsim.sim.power import Power
from ptsim.sim.scenario import Scenario
from ptsim.sim.step import simulate_steps
from ptsim.sim.work import Jitter, StepPlan, StepResult, TrainingJob
from ptsim.trace.pace import changes
from ptsim.trace.schema import Reconfiguration


class StepPrice(msgspec.Struct, frozen=True, kw_only=True):
    """One simulated step with its bounds and what wrapping its network costs."""

    step: StepTime
    result: StepResult
    scale: float  # mean computation of all GPUs / that of the step; not 1 where devices are mixed or jitter
    forward_s: float
    backward_s: float  # with the hooks of its gradients
    product_s: float  # of both, in convolutions, linear layers and matrix products
    hooks_s: float  # of the backward pass, in the gradients' hooks; 0 on one GPU, and where the step was recorded so
    optimizer_s: float  # of the parameters that a GPU updates: its share where the update is sharded
    low_s: float
    high_s: float
    wrapping: SecondsRange
    peak_memory_bytes: int
    needed_memory_bytes: int  # what must be free on a GPU; an upper estimate
    energy_j: float | None  # of one step on one GPU
    tier: str  # the worst of all devices


class RecordedSteps(msgspec.Struct, frozen=True, kw_only=True):
    """Simulated steps of one architecture and mini-batch, piece by piece. `epoch` is the first that it trains."""

    epoch: int
    network: Network
    setting: StepSetting
    device: Device
    buckets: tuple[Bucket, ...]
    result: StepResult


class Pricer:
    """Prices the stages of one scenario; every distinct step once. `notes` accumulate."""

    def __init__(self, scenario: Scenario) -> None:
        """Place the job on the cluster.

        Raises:
            UsageError: more GPUs than the cluster has, or more mixed ones than a node.
        """
        self.scenario, self.options = scenario, scenario.options
        self.links = Links(scenario.cluster, scenario.num_gpus, scenario.options)
        self.power = Power(scenario)
        self.feed = Feed(scenario)
        self.notes = self.links.notes
        if self.options.mixed_devices and not any(self._kinds()):
            self.notes.append(f"all GPUs in use are {scenario.device.name}: mixed_devices take a node's last places")
        given = self.options.contention
        self._contention = contention_of(scenario.cluster, scenario.num_gpus) if given is None else given
        self._prices: dict[tuple[Hashable, ...], StepPrice] = {}
        ratio = GRADIENT_BYTES[self.options.gradient_format] / 4 * self.options.compression
        self._wire = ddp.memory_bound_conversion(ratio, scenario.device.memory_bandwidth_bytes_per_s)

    def price(self, stage: Stage) -> StepPrice:
        """The stage's step."""
        key = (stage.id, stage.batch, self._num_passes(stage), stage.epoch.regularized)
        if key not in self._prices:
            self._prices[key] = self._price(stage)
        return self._prices[key]

    def reconfiguration(self, stage: Stage) -> SecondsRange:
        """What it costs to begin a stage whose network is new: surgery, and all that follows from wrapping it."""
        wrapping = self.price(stage).wrapping
        if self.options.surgery_s is not None:
            surgery = SecondsRange(
                low_s=self.options.surgery_s, expected_s=self.options.surgery_s, high_s=self.options.surgery_s
            )
        else:
            surgery = recorded_surgery(changes(self.scenario.trace), stage.epoch.epoch)
        return SecondsRange(
            low_s=surgery.low_s + wrapping.low_s,
            expected_s=surgery.expected_s + wrapping.expected_s,
            high_s=surgery.high_s + wrapping.high_s,
        )

    @property
    def peak_flops_per_s(self) -> float | None:
        """What the arithmetic of a GPU could do, the mean where devices are mixed; None where one's is not known."""
        scenario = self.scenario
        if not self.options.mixed_devices:
            return scenario.device.peak_flops_per_s.get(scenario.precision)
        devices = [scenario.device, *map(load_device, self.options.mixed_devices)]
        peaks = [device.peak_flops_per_s.get(scenario.precision) for device in devices]
        known = [peak for peak in peaks if peak is not None]
        if len(known) < len(peaks):
            return None
        return math.fsum(known[kind] for kind in self._kinds()) / scenario.num_gpus

    def among_others_s(self, stage: Stage) -> float:
        """By how many seconds a GPU that is alone would compute longer in a step among others.

        Waiting for what they send is not in it.
        """
        cluster, price = self.scenario.cluster, self.price(stage)
        if price.step.data_parallel:
            return 0.0
        hooks_s = hook_seconds(cluster, 2) * len(stage.network.gradients)
        return slowdown(cluster, 2) * price.result.compute_s + hooks_s

    def record(self, stage: Stage, num_steps: int, shown: int) -> RecordedSteps:
        """What the streams of the first `shown` GPUs do in `num_steps` steps of the stage."""
        scenario = self.scenario
        step = self._step_time(stage)
        speeds, _ = self._speeds(stage, step, "expected")
        if self._jitter() is None:  # simulate only what is shown, and one of every kind
            rest = sorted(set(speeds[shown:]))
            speeds = (*speeds[:shown], *rest)
        plan = self._plan(stage, step, "expected", merged=False)
        return RecordedSteps(
            epoch=stage.epoch.epoch,
            network=stage.network,
            setting=scenario.memory_setting(stage.batch, stage.epoch),
            device=scenario.device,
            buckets=scenario.buckets(stage.network, stage.id),
            result=self._simulate(stage, plan, speeds, self._contention, num_steps=num_steps, record_gpus=shown),
        )

    def _price(self, stage: Stage) -> StepPrice:
        options, scenario = self.options, self.scenario
        step = self._step_time(stage)
        plans: dict[ddp.Bound, StepPlan] = {bound: self._plan(stage, step, bound) for bound in BOUNDS}
        _, tier = self._speeds(stage, step, "expected")

        def simulate(bound: ddp.Bound, contention: float) -> StepResult:
            speeds, _ = self._speeds(stage, step, bound)
            return self._simulate(stage, plans[bound], speeds, contention, bound=bound)

        bounded = bounded_step(simulate, self._contention)
        expected = bounded.expected
        step_range = bounded.interval().among(scenario.cluster, scenario.num_gpus, step.tier)
        need = self._memory(stage)
        n = self._num_passes(stage)
        forward_s, backward_s, product_s = scenario.cache.get(
            ("passes", *self._key(stage)), lambda: (step.forward_s, step.backward_s, step.product_s)
        )
        hooks_s, optimizer_s = self._hooks_s(stage, step), self._own_update_s(stage, step)
        compute_s = self._busy_s(stage, step, forward_s + backward_s + step.overhead_s)
        tuning_s = scenario.cache.get(
            ("tuning", options.autotune_trials, *self._key(stage)), lambda: self._autotune_s(stage, step)
        )
        wrapping = {
            bound: self._wrapping_s(
                stage, tuning_s * ddp.computation_scale(step, bound), plans[bound], getattr(bounded, bound), bound
            )
            for bound in BOUNDS
        }
        return StepPrice(
            step=step,
            result=expected,
            scale=expected.compute_s / compute_s if compute_s else 1.0,
            forward_s=n * forward_s,
            backward_s=n * backward_s + hooks_s,
            product_s=n * product_s,
            hooks_s=hooks_s,
            optimizer_s=optimizer_s,
            low_s=expected.step_s / spread_on_top(expected.step_s / step_range.low_s, scenario.spread),
            high_s=expected.step_s * spread_on_top(step_range.high_s / expected.step_s, scenario.spread),
            wrapping=SecondsRange.around(wrapping["low"], wrapping["expected"], wrapping["high"]),
            peak_memory_bytes=need.peak_bytes,
            needed_memory_bytes=need.device_bytes,
            energy_j=self.power.step_j(stage, step, expected),
            tier=tier,
        )

    def _wrapping_s(self, stage: Stage, tuning_s: float, plan: StepPlan, result: StepResult, bound: ddp.Bound) -> float:
        """Compiling, tuning, warming up, and DDP's first messages and step."""
        options, network = self.options, stage.network
        seconds = options.compile_s + options.warmup_steps * result.step_s + tuning_s
        if self.scenario.num_gpus == 1:
            return seconds
        rebuilds = not options.find_unused_parameters
        if rebuilds:
            shards = ddp.shards_of(network, self.scenario.setting(stage.batch, stage.epoch))
            reduce = self._reduction(shards)
            shown_s = ddp.first_step_s(network, reduce, self._wire, bound, plan.head, shards)
            seconds += max(0.0, shown_s - result.exposed_communication_s)
        return seconds + ddp.wrapping_s(network, self.links.all_reduce, bound, rebuilds=rebuilds)

    def _reduction(self, shards: ddp.Shards | None) -> ddp.AllReduce:
        """The time of a bucket's all-reduce, or of the two collectives that stand for it where updates are sharded."""
        return self.links.all_reduce if shards is None else self.links.halves

    def _hooks_s(self, stage: Stage, step: StepTime) -> float:
        """DDP's hooks of all tensors in its buckets, which run during the last backward pass.

        0 on one GPU, and where the recorded step holds them.
        """
        scenario = self.scenario
        buckets = scenario.buckets(stage.network, stage.id)
        return ddp.hooks_s(step, buckets, hook_seconds(scenario.cluster, scenario.num_gpus))

    def _own_update_s(self, stage: Stage, step: StepTime) -> float:
        """The update of the parameters that are a GPU's own, with the sums of all gradients; once per step."""
        share = self.scenario.setting(stage.batch, stage.epoch).update_share
        return step.accumulated(self._num_passes(stage)).updating(share).optimizer_s

    def _busy_s(self, stage: Stage, step: StepTime, pass_s: float) -> float:
        """What a GPU computes in a step whose one pass takes `pass_s`: all passes, hooks and its update."""
        updating_s = self._own_update_s(stage, step) + step.regularizer_s
        return self._num_passes(stage) * pass_s + self._hooks_s(stage, step) + updating_s

    def _num_passes(self, stage: Stage) -> int:
        return self.scenario.num_passes(stage.batch, stage.epoch)

    def _key(self, stage: Stage) -> tuple[Hashable, ...]:
        """Everything that the computation of a step depends on, where it may be one of several GPUs."""
        return (slowdown(self.scenario.cluster, self.scenario.num_gpus), *self._alone_key(stage))

    def _alone_key(self, stage: Stage, device: bytes | None = None) -> tuple[Hashable, ...]:
        """Everything that it depends on where it is the only one."""
        return (stage.id, device or self.scenario.device_key, self.scenario.setting(stage.batch, stage.epoch).alone)

    def _step_time(self, stage: Stage, other: Device | None = None) -> StepTime:
        """Of the projected device, or of another one that is mixed in, of which the device profile is not."""
        scenario = self.scenario
        setting = scenario.setting(stage.batch, stage.epoch)
        if other is None or other == scenario.device:
            device, key = scenario.device, ("step", *self._alone_key(stage))
            measurements = scenario.measurements
        else:  # under a key of its own: elsewhere it may be the projected one, and have a profile
            device, key = other, ("mixed in", *self._alone_key(stage, msgspec.json.encode(other)))
            measurements = Measurements.of(scenario.trace, other)

        def alone() -> StepTime:
            return step_time(stage.network, device, setting, measurements=measurements)

        cluster, num_gpus = scenario.cluster, scenario.num_gpus
        return scenario.cache.get(  # it is the same among however many others on as many nodes
            ("among", num_gpus > 1, cluster.library, slowdown(cluster, num_gpus), *key),
            lambda: among(scenario.cache.get(key, alone), cluster, num_gpus),
        )

    def _memory(self, stage: Stage) -> MemoryNeed:
        scenario = self.scenario
        setting, buckets = scenario.memory_setting(stage.batch, stage.epoch), scenario.buckets(stage.network, stage.id)
        return scenario.cache.get(
            ("memory", stage.id, scenario.device_key, setting, buckets),
            lambda: iteration_memory(stage.network, setting, device=scenario.device, buckets=buckets),
        )

    def _plan(self, stage: Stage, step: StepTime, bound: ddp.Bound, *, merged: bool = True) -> StepPlan:
        options, scenario, buckets = self.options, self.scenario, self.scenario.buckets(stage.network, stage.id)

        def compute() -> StepPlan:
            share = 1.0 if shards is None else shards.share
            plan = ddp.compute_plan(step, buckets, num_micro_batches=passes, tensor_s=tensor_s, update_share=share)
            return plan.merged() if merged else plan

        key, passes = self._key(stage), self._num_passes(stage)
        shards = ddp.shards_of(stage.network, scenario.setting(stage.batch, stage.epoch))
        tensor_s = hook_seconds(scenario.cluster, scenario.num_gpus)
        ready = tuple((bucket.ready_layer, len(bucket.parameters)) for bucket in buckets)
        together = scenario.num_gpus > 1
        plan = ddp.with_communication(
            scenario.cache.get(("plan", merged, ready, tensor_s, shards, passes, *key), compute),
            buckets,
            self._reduction(shards),
            wire=self._wire,
            buffer_bytes=ddp.buffer_bytes(stage.network) if scenario.broadcast_buffers and together else 0,
            used_bytes=4 * len(stage.network.parameters) if options.find_unused_parameters else 0,
            shards=shards,
            bound=bound,
            scale=ddp.computation_scale(step, bound),  # not cached: the interval depends on the number of GPUs
        )
        return plan if scenario.overlap else msgspec.structs.replace(plan, overlap=False)

    def _simulate(
        self,
        stage: Stage,
        plan: StepPlan,
        speeds: tuple[float, ...],
        contention: float,
        *,
        bound: ddp.Bound = "expected",
        num_steps: int | None = None,
        record_gpus: int = 0,
    ) -> StepResult:
        options, jitter = self.options, self._jitter()
        interval = self.feed.interval_s(stage.batch, bound)
        job = TrainingJob(plan=plan, speeds=speeds, input_interval_s=interval)
        if jitter is None and not record_gpus:  # GPUs of equal speed do the same
            kinds = Counter(speeds) if options.mixed_devices else {1.0: len(speeds)}
            job = msgspec.structs.replace(job, speeds=tuple(kinds), counts=tuple(kinds.values()))
        jobs = [job]
        sharing = self._sharing(plan)
        if sharing[-1] > 1:
            # equal jobs that start evenly spread over a step: neither the worst nor the best of phases
            lag = plan.compute_s / len(sharing)
            jobs += [msgspec.structs.replace(job, start_s=lag * i) for i in range(1, len(sharing))]
        # enough steps for a stable mean; among thousands of GPUs the slowest one varies little from step to step
        if num_steps is None:
            is_random = (jitter is not None and jitter.sigma > 0) or len(jobs) > 1
            num_steps = max(1, min(options.sampled_steps, 20_000 // len(job.speeds))) if is_random else 1
        return simulate_steps(
            jobs,
            contention=contention,
            sharing=sharing,
            jitter=jitter,
            num_steps=num_steps,
            num_warmup=2 if len(jobs) > 1 else int(interval > 0),
            seed=options.seed,
            record_gpus=record_gpus,
        )[0]

    def _sharing(self, plan: StepPlan) -> tuple[float, ...]:
        """By how much 1, 2, … communicating jobs slow each other down, for the largest message."""
        if self.options.jobs == 1:
            return (1.0,)
        if not plan.buckets:
            return (1.0,) * self.options.jobs
        sharing = self.links.sharing(max(bucket.num_bytes for bucket in plan.buckets))
        if sharing[-1] == 1:
            note = "the jobs share no link that slows this one down"
            if self.links.num_nodes == 1:
                note = "jobs share links between nodes; this job stays inside one"
            if note not in self.notes:
                self.notes.append(note)
        return sharing

    def _speeds(self, stage: Stage, step: StepTime, bound: ddp.Bound) -> tuple[tuple[float, ...], str]:
        """Duration factor of every GPU, and the worst of their tiers."""
        options, num_gpus = self.options, self.scenario.num_gpus
        if not options.mixed_devices:
            return (1.0,) * num_gpus, step.tier
        factors = [1.0]
        tier = step.tier
        own_scale = ddp.computation_scale(step, bound)
        own_s = self._busy_s(stage, step, _pass_s(step))
        for name in options.mixed_devices:
            other = self._step_time(stage, load_device(name))
            scale = ddp.computation_scale(other, bound) / own_scale
            factor = self._busy_s(stage, other, _pass_s(other)) / own_s * scale
            factors.append(factor)
            tier = worst_tier((tier, other.tier)) or tier
        return tuple(factors[kind] for kind in self._kinds()), tier

    def _kinds(self) -> tuple[int, ...]:
        """Of every GPU, node after node: 0 is the projected device, which comes first in a node, 1 the first mixed one.

        Raises:
            UsageError: more GPUs are named than a node has.
        """
        cluster, mixed = self.scenario.cluster, self.options.mixed_devices
        named = [kind for kind, count in enumerate(mixed.values(), 1) for _ in range(count)]
        if len(named) > cluster.gpus_per_node:
            raise UsageError(
                f"mixed_devices names {len(named)} GPUs per node, {cluster.name} has {cluster.gpus_per_node}"
            )
        node = [0] * (cluster.gpus_per_node - len(named)) + named
        return tuple(node[gpu % len(node)] for gpu in range(self.scenario.num_gpus))

    def _jitter(self) -> Jitter | None:
        options = self.options
        sigma = self.scenario.spread if options.jitter == "recorded" else float(options.jitter)
        if not sigma and not options.straggler_fraction:
            return None
        return Jitter(
            sigma=sigma,
            straggler_fraction=options.straggler_fraction,
            straggler_slowdown=options.straggler_slowdown,
        )

    def _autotune_s(self, stage: Stage, step: StepTime) -> float:
        """Every convolution's forward and backward, so many times (cuDNN tries its algorithms at the first step)."""
        if not self.options.autotune_trials or not self.scenario.device.is_gpu:
            return 0.0
        convolutions = {layer.name for layer in stage.network.layers if layer.kind is LayerKind.CONV}
        once = sum(layer.forward_s + layer.backward_s for layer in step.layers if layer.layer in convolutions)
        return self.options.autotune_trials * once


def _pass_s(step: StepTime) -> float:
    """Forward and backward of one pass, with what the GPU waits for its host."""
    return step.forward_s + step.backward_s + step.overhead_s


# Where no reconfiguration was measured: ResNet-50's on one core (analysis/bench_engine.py); the ends are the fastest
# and the slowest that removed channels among the recorded runs under traces/, which are of ResNet-20 on a busy machine.
ASSUMED_SURGERY = SecondsRange(low_s=0.06, expected_s=0.21, high_s=0.43)


def recorded_surgery(reconfigurations: Sequence[Reconfiguration], epoch: int) -> SecondsRange:
    """What the measured reconfigurations in front of `epoch` took together; the median one's time where there was none.

    Those that changed nothing took next to no time and say nothing of surgery: `reconfigurations` are the others. The
    interval is their spread. With fewer than two it has no width; with none it is `ASSUMED_SURGERY`.
    """
    measured = [r for r in reconfigurations if r.measured_duration_s is not None]
    durations = sorted(r.duration_s for r in measured)
    if not durations:
        return ASSUMED_SURGERY
    exact = [r.duration_s for r in measured if r.epoch + 1 == epoch]
    expected = math.fsum(exact) if exact else durations[len(durations) // 2]
    logs = [math.log(seconds) for seconds in durations if seconds > 0]
    sigma = 0.0
    if len(logs) > 1:
        mean = math.fsum(logs) / len(logs)
        sigma = math.sqrt(math.fsum((value - mean) ** 2 for value in logs) / (len(logs) - 1))
    width = math.exp(Z90 * sigma)
    return SecondsRange(low_s=expected / width, expected_s=expected, high_s=expected * width)


def spread_on_top(ratio: float, sigma: float) -> float:
    """The end of a 90 % interval (as a ratio to the middle) with a log-normal spread on top, independent of it."""
    return math.exp(math.hypot(math.log(ratio), Z90 * sigma))
