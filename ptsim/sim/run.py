"""What a recorded run would take on another cluster: time, bytes, memory, energy and money, epoch by epoch.

Every distinct (architecture, mini-batch) is simulated once as a data-parallel step and multiplied by the iterations of
its epochs; reconfigurations, wrapping and failures come on top. An interval follows from simulating the same step
with every duration at the low and at the high end of its own: the tiers' errors are systematic, so they are taken as
fully correlated over layers and epochs. The recorded spread of the steps comes on top, independent of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from ptsim.costs.buckets import Bucket, ddp_buckets
from ptsim.costs.collectives import AllReduceTime, all_reduce, nodes_for
from ptsim.costs.energy import PowerModel, PowerSample, fit_power, price_usd, published_power, step_energy
from ptsim.costs.memory import MemoryNeed, iteration_memory, largest_batch, usable_bytes
from ptsim.costs.step import Measurements, StepSetting, StepTime, Tier, step_time
from ptsim.errors import UsageError
from ptsim.hardware.catalog import load_cluster, load_device, measured_device
from ptsim.hardware.profile import DeviceProfile, read_device_profile
from ptsim.hardware.spec import Cluster, Device
from ptsim.network import LayerKind, Network, Precision
from ptsim.sim import ddp
from ptsim.sim.faults import simulate_faults
from ptsim.sim.options import GRADIENT_BYTES, Options
from ptsim.sim.projection import EpochProjection, RunProjection, projections_frame
from ptsim.sim.rounding import rounded
from ptsim.sim.step import Jitter, Job, StepPlan, StepResult, simulate_steps
from ptsim.trace.io import Trace, read_trace
from ptsim.trace.schema import Epoch, Reconfiguration
from ptsim.units import GIB

if TYPE_CHECKING:
    from pandas import DataFrame

_TIER_ORDER = tuple(Tier)
T = TypeVar("T")


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


class _Stage(msgspec.Struct, frozen=True, kw_only=True):
    """An epoch as it will be projected."""

    epoch: Epoch
    network: Network
    id: str  # the network's
    batch: int
    num_iterations: int
    new: bool  # the network differs from the epoch before, so that the run reconfigures in front of it


class _Simulated(msgspec.Struct, frozen=True, kw_only=True):
    """One simulated step with its bounds and what wrapping its network costs."""

    step: StepTime
    result: StepResult
    scale: float  # mean computation of all GPUs / that of the step; not 1 where devices are mixed or jitter
    forward_s: float
    backward_s: float
    low_s: float
    high_s: float
    wrap_s: float
    peak_memory_bytes: int
    energy_j: float | None  # of one step on one GPU


def project(
    trace: Trace,
    cluster: Cluster,
    num_gpus: int,
    options: Options | None = None,
    *,
    device: Device | None = None,
    device_profile: DeviceProfile | None = None,
    cache: StepCache | None = None,
) -> RunProjection:
    """The recorded run on `num_gpus` GPUs of a cluster.

    GPUs fill nodes one after the other. The optimisation is the recorded one: an epoch sees the images that it saw,
    in mini-batches as the scaling and mini-batch options say.

    Args:
        trace: of a run, complete or not.
        cluster: where.
        num_gpus: how many of its GPUs.
        options: what to change.
        device: instead of the one that `options.device` or the cluster names.
        device_profile: of the projected device, from `ptsim calibrate gpu`.
        cache: step times to share between projections of this trace.

    Raises:
        UsageError: no epochs in the trace, an option out of its bounds, more GPUs than the cluster has, a device that
            does not support the precision, or a mini-batch that has fewer images than micro-batches.
    """
    return _Projector(
        trace, cluster, num_gpus, options or Options(), device, device_profile, cache or StepCache()
    ).project()


class RecordedSteps(msgspec.Struct, frozen=True, kw_only=True):
    """Simulated steps of one architecture and mini-batch, piece by piece. `epoch` is the first that it trains."""

    epoch: int
    network: Network
    batch: int
    precision: Precision
    device: Device
    optimizer: str
    result: StepResult


def record_steps(
    trace: Trace,
    cluster: Cluster,
    num_gpus: int,
    options: Options | None = None,
    *,
    device_profile: DeviceProfile | None = None,
    num_steps: int = 2,
    shown: int = 8,
) -> tuple[RecordedSteps, ...]:
    """What the streams of the first `shown` GPUs do in `num_steps` steps of every architecture of the run.

    Raises:
        UsageError: what `project` raises.
    """
    projector = _Projector(trace, cluster, num_gpus, options or Options(), None, device_profile, StepCache())
    return projector.record(num_steps, shown)


def simulate(
    trace: Trace | str | Path,
    cluster: Cluster | str | Path,
    gpus: Sequence[int] = (1,),
    *,
    options: Options | None = None,
    profile: str | Path | DeviceProfile | None = None,
    **changes: Any,
) -> DataFrame:
    """Project a recorded run onto a cluster, one row per GPU count.

        ptsim.simulate("runs/pruned", "dgx-a100", gpus=[1, 8, 64], scaling="strong")

    Args:
        trace: a trace, its file or its run folder.
        cluster: a cluster, a catalog name or a TOML file.
        gpus: GPU counts.
        options: see `ptsim.sim.options.Options`.
        profile: of `ptsim calibrate gpu`, or its file.
        **changes: single options by name, on top of `options`.

    Returns:
        The columns of `projections_frame`.

    Raises:
        UsageError: an unknown option, and what `project` raises.
    """
    trace = trace if isinstance(trace, Trace) else read_trace(trace)
    cluster = cluster if isinstance(cluster, Cluster) else load_cluster(cluster)
    options = change(options or Options(), changes)
    if isinstance(profile, str | Path):
        profile = read_device_profile(profile)
    cache = StepCache()
    return projections_frame([project(trace, cluster, n, options, device_profile=profile, cache=cache) for n in gpus])


def change(options: Options, changes: dict[str, Any]) -> Options:
    """The options with some replaced, as strictly checked as if they came from a file.

    Raises:
        UsageError: an unknown option, or a value of a wrong type or out of its bounds.
    """
    try:
        changed = msgspec.convert({**msgspec.to_builtins(options), **msgspec.to_builtins(changes)}, Options)
    except msgspec.ValidationError as error:
        raise UsageError(f"options: {error}") from error
    changed.check()
    return changed


class _Projector:
    """One projection under way: the inputs, resolved, and the notes that accumulate."""

    def __init__(
        self,
        trace: Trace,
        cluster: Cluster,
        num_gpus: int,
        options: Options,
        device: Device | None,
        device_profile: DeviceProfile | None,
        cache: StepCache,
    ) -> None:
        options.check()
        if not trace.epochs:
            raise UsageError(f"{trace.path} has no finished epoch; there is nothing to project")
        if num_gpus < 1:
            raise UsageError(f"{num_gpus} GPUs; at least 1 is needed")
        self.num_nodes = nodes_for(cluster, num_gpus)
        self.trace, self.cluster, self.num_gpus, self.options, self.cache = trace, cluster, num_gpus, options, cache
        self.run = trace.run
        self.device = device or load_device(options.device or cluster.device)
        self.device_key = msgspec.json.encode(self.device)
        nominal = options.memory_bytes or self.device.memory_bytes
        self.memory_bytes = usable_bytes(msgspec.structs.replace(self.device, memory_bytes=nominal))
        self.precision = Precision(options.precision) if options.precision else self.run.precision
        self.memory_format = options.memory_format or self.run.memory_format
        optimizer = self.run.hyperparameters.get("optimizer", "sgd")
        self.optimizer = optimizer if isinstance(optimizer, str) else "sgd"
        self.measurements = Measurements(
            profiles=trace.profiles,
            source_device=measured_device(self.run.device.name, self.device),
            device_profile=device_profile,
        )
        compiled = self.run.hyperparameters.get("compile") is True
        self.overlap = not compiled if options.overlap is None else options.overlap
        self.spread = recorded_jitter(trace.epochs)
        self.mixed_tiers: set[Tier] = set()
        self.notes: list[str] = []
        self._power: PowerModel | None = None
        self.all_reduces: dict[int, AllReduceTime] = {}
        self.simulated: dict[tuple[str, int, bool], _Simulated] = {}
        ratio = GRADIENT_BYTES[options.gradient_format] / 4 * options.compression
        self.wire = ddp.memory_bound_conversion(ratio, self.device.memory_bandwidth_bytes_per_s)

    def project(self) -> RunProjection:
        options, trace = self.options, self.trace
        stages = self._stages()
        self._note_assumptions(stages)
        epochs = [self._project_epoch(stage) for stage in stages]
        first = self._simulate(stages[0])
        startup_s = first.wrap_s
        reconfiguration_s = sum(
            self._reconfiguration_s(stage, self._simulate(stage)) for stage in stages[1:] if stage.new
        )
        fixed_s = startup_s + reconfiguration_s
        training_s = sum(epoch.total_s for epoch in epochs)
        low_s = sum(epoch.low_s for epoch in epochs) + fixed_s
        high_s = sum(epoch.high_s for epoch in epochs) + fixed_s
        total_s = training_s + fixed_s
        faults = None
        if options.faults is not None:
            faults = simulate_faults(
                total_s, self.num_gpus, self.cluster.gpus_per_node, options.faults, seed=options.seed
            )
            low_s, high_s = low_s * faults.low_s / total_s, high_s * faults.high_s / total_s
        faults_s = max(0.0, faults.total_s - total_s) if faults else 0.0
        total_s += faults_s

        def over_epochs(seconds: Callable[[EpochProjection], float]) -> float:
            return math.fsum(epoch.num_iterations * seconds(epoch) for epoch in epochs)

        price = options.price_usd_per_gpu_hour
        if price is None:
            price = self.cluster.price_usd_per_gpu_hour
        energy_j, energy_error = self._run_energy_j(epochs, fixed_s, faults_s), 0.0
        if self._power is not None:
            energy_error = self._power.relative_error
        return RunProjection(
            trace=str(trace.path),
            model=self.run.model,
            cluster=self.cluster.name,
            device=self.device.name,
            gpus=self.num_gpus,
            scaling=options.scaling,
            epochs=tuple(epochs),
            reconfiguration_s=reconfiguration_s,
            startup_s=startup_s,
            faults_s=faults_s,
            total_s=total_s,
            compute_s=over_epochs(lambda epoch: epoch.compute_s),
            exposed_communication_s=over_epochs(lambda epoch: epoch.exposed_communication_s),
            input_wait_s=over_epochs(lambda epoch: epoch.input_wait_s),
            straggler_wait_s=over_epochs(lambda epoch: epoch.straggler_wait_s),
            allreduce_bytes_per_gpu=float(over_epochs(lambda epoch: epoch.wire_bytes_per_gpu)),
            energy_j=energy_j,
            # time and power err independently
            energy_low_j=None
            if energy_j is None
            else energy_j * (1 - min(1.0, math.hypot(1 - low_s / total_s, energy_error))),
            energy_high_j=None if energy_j is None else energy_j * (1 + math.hypot(high_s / total_s - 1, energy_error)),
            cost_usd=None if price is None else price_usd(total_s, self.num_gpus, price),
            low_s=low_s,
            high_s=high_s,
            tier=max((*(epoch.tier for epoch in epochs), *self.mixed_tiers), key=_TIER_ORDER.index),
            network_tier=max((time.tier for time in self.all_reduces.values()), key=_TIER_ORDER.index, default=None),
            complete=trace.complete,
            notes=tuple(self.notes),
            faults=faults,
        )

    def record(self, num_steps: int, shown: int) -> tuple[RecordedSteps, ...]:
        recorded: dict[tuple[str, int], RecordedSteps] = {}
        for stage in self._stages():
            key = (stage.id, stage.batch)
            if key in recorded:
                continue
            step = self._step_time(stage, self.device, self.device_key)
            speeds = self._speeds(stage, step)
            if len(set(speeds)) == 1 and self._jitter() is None:  # equal GPUs: simulate only what is shown
                speeds = speeds[:1] * min(shown, self.num_gpus)
            result = self._run_steps(
                stage,
                self._plan(stage, step, "expected", merged=False),
                speeds,
                self._jitter(),
                self.options.contention,
                num_steps=num_steps,
                record_gpus=shown,
            )
            recorded[key] = RecordedSteps(
                epoch=stage.epoch.epoch,
                network=stage.network,
                batch=stage.batch,
                precision=self.precision,
                device=self.device,
                optimizer=self.optimizer,
                result=result,
            )
        return tuple(recorded.values())

    def _run_energy_j(self, epochs: Sequence[EpochProjection], fixed_s: float, faults_s: float) -> float | None:
        """Joules of all GPUs over the run; they wait while it reconfigures, and work at their mean power in faults."""
        model = self._power_model()
        energies = [epoch.energy_j for epoch in epochs if epoch.energy_j is not None]
        if model is None or len(energies) < len(epochs):
            return None
        training_j, training_s = math.fsum(energies), math.fsum(epoch.total_s for epoch in epochs)
        lost = faults_s / training_s if training_s else 0.0
        return training_j * (1 + lost) + self.num_gpus * fixed_s * model.waiting_w

    # -- what is trained when --------------------------------------------------------------------------------------

    def _stages(self) -> list[_Stage]:
        options, epochs = self.options, self.trace.epochs
        dense = epochs[0]
        chosen: list[Epoch] = list(epochs)
        if options.one_time_epoch is not None:
            k = options.one_time_epoch
            if k >= len(epochs):
                raise UsageError(f"one_time_epoch is {k}, the trace has {len(epochs)} epochs")
            chosen = [dense if epoch.epoch < k else epochs[k] for epoch in epochs]
        stages: list[_Stage] = []
        batch = 0
        for epoch, source in zip(epochs, chosen, strict=True):
            network, identity = self._network(source)
            new = not stages or identity != stages[-1].id
            batch = self._batch(source, network, identity, previous=batch, new=new, epoch=epoch.epoch)
            stages.append(
                _Stage(
                    epoch=epoch,
                    network=network,
                    id=identity,
                    batch=batch,
                    num_iterations=self._num_iterations(epoch, batch),
                    new=new and bool(stages),
                )
            )
        return stages

    def _network(self, epoch: Epoch) -> tuple[Network, str]:
        multiple = self.options.channel_multiple
        if multiple == 1:
            return self.trace.network_of(epoch), epoch.architecture

        def make() -> tuple[Network, str]:
            network = rounded(self.trace.network_of(epoch), multiple)
            return network, network.id

        return self.cache.get(("rounded", epoch.architecture, multiple), make)

    def _batch(self, source: Epoch, network: Network, identity: str, *, previous: int, new: bool, epoch: int) -> int:
        """The per-GPU mini-batch of an epoch."""
        options = self.options
        recorded = self.trace.epochs[0] if options.minibatch != "recorded" else source
        per_gpu = recorded.batch_per_gpu
        if options.scaling == "strong":
            per_gpu = max(1, -(-recorded.batch_per_gpu * recorded.world_size // self.num_gpus))
        if options.minibatch != "planned" or (previous and not new):
            return previous or per_gpu if options.minibatch == "planned" else per_gpu
        limit = source.num_images // self.num_gpus  # one step per epoch is the most that the data set can fill
        limit = min(limit, options.max_batch or limit)
        # gradient accumulation needs the memory of one micro-batch
        most = options.micro_batches * self.cache.get(
            (
                "batch",
                identity,
                limit,
                self.memory_bytes,
                self.device_key,
                self.precision,
                self.memory_format,
                options.micro_batches,
                options.batch_granularity,
                self.num_gpus > 1,
            ),
            lambda: largest_batch(
                network,
                capacity_bytes=self.memory_bytes,
                granularity=options.batch_granularity,
                limit=limit // options.micro_batches,
                precision=self.precision,
                optimizer=self.optimizer,
                memory_format=self.memory_format,
                device=self.device,
                data_parallel=self.num_gpus > 1,
            ),
        )
        if not previous:
            if most and most < per_gpu:
                self.notes.append(f"mini-batch {per_gpu} does not fit at first; planned with {most}")
                return most
            return per_gpu
        if most > previous:
            beyond = (
                "" if most <= source.batch_per_gpu else f" (recorded: {source.batch_per_gpu}; accuracy not projected)"
            )
            self.notes.append(f"mini-batch per GPU {previous} → {most} at epoch {epoch}{beyond}")
            return most
        return previous

    def _num_iterations(self, epoch: Epoch, batch: int) -> int:
        if batch == epoch.batch_per_gpu and self.num_gpus == epoch.world_size:
            return epoch.num_iterations
        per_step = batch * self.num_gpus
        whole = epoch.num_images == epoch.num_iterations * epoch.batch_per_gpu * epoch.world_size
        # a recorded epoch of whole mini-batches dropped the rest of the data set; otherwise the rest is one more step
        steps = epoch.num_images / per_step
        return max(1, math.floor(steps) if whole else math.ceil(steps))

    def _note_assumptions(self, stages: Sequence[_Stage]) -> None:
        trace, options, epochs = self.trace, self.options, self.trace.epochs
        note = self.notes.append
        if not trace.complete:
            planned = self.run.hyperparameters.get("epochs")
            of = f" of {planned}" if isinstance(planned, int) else ""
            why = "interrupted" if trace.end is not None else "truncated or unfinished"
            note(f"the trace is {why}: only its {len(epochs)}{of} recorded epochs are projected")
        elif len(epochs) == 1:
            note("the trace has a single epoch")
        full, rest = divmod(self.num_gpus, self.cluster.gpus_per_node)
        if rest and full:
            note(
                f"{self.num_gpus} GPUs do not fill nodes of {self.cluster.gpus_per_node}: "
                f"{full} full and one with {rest} are assumed"
            )
        if options.scaling == "strong":
            uneven = sorted(
                {
                    total
                    for stage in stages
                    if options.minibatch != "planned"
                    and (total := stage.epoch.batch_per_gpu * stage.epoch.world_size) % self.num_gpus
                }
            )
            if uneven:
                per_gpu = -(-uneven[0] // self.num_gpus)
                note(
                    f"a global mini-batch of {uneven[0]} does not divide by {self.num_gpus} GPUs: "
                    f"rounded up to {per_gpu} per GPU, {per_gpu * self.num_gpus:,} in all"
                )
        if options.mixed_devices:
            note(f"devices are mixed: memory and energy are those of the {self.device.name} alone")
        if any(stage.num_iterations * stage.batch * self.num_gpus > 2 * stage.epoch.num_images for stage in stages):
            note("one global mini-batch holds more images than an epoch has: one step per epoch is projected")
        if any(stage.batch < options.micro_batches for stage in stages):
            raise UsageError(
                f"micro_batches is {options.micro_batches}, more than the "
                f"{min(stage.batch for stage in stages)} images of a GPU's mini-batch"
            )
        waited = sum(epoch.time.data_wait_s for epoch in epochs) / max(1e-12, sum(e.time.wall_s for e in epochs))
        if waited > 0.05 and options.input_images_per_s is None:
            note(f"the recorded run waited for data {waited:.0%} of the time; projected with input that keeps up")
        if not self.overlap and options.overlap is None and self.num_gpus > 1:
            note("the recorded step was compiled: its gradients become ready together, so nothing hides all-reduces")
        if options.jobs > 1 and self.num_nodes == 1:
            note("jobs share links between nodes; this job stays inside one")

    # -- one step --------------------------------------------------------------------------------------------------

    def _all_reduce(self, num_bytes: int) -> AllReduceTime:
        if num_bytes not in self.all_reduces:
            self.all_reduces[num_bytes] = all_reduce(
                num_bytes, self.cluster, self.num_gpus, algorithm=self.options.algorithm
            )
        return self.all_reduces[num_bytes]

    def _key(self, stage: _Stage, device_key: bytes) -> tuple[Hashable, ...]:
        """Everything that the computation of a step depends on."""
        batch = -(-stage.batch // self.options.micro_batches)
        regularizer = stage.epoch.penalty_coefficient > 0
        return (stage.id, batch, device_key, self.precision, self.memory_format, self.optimizer, regularizer)

    def _step_time(
        self, stage: _Stage, device: Device, device_key: bytes, measurements: Measurements | None = None
    ) -> StepTime:
        return self.cache.get(
            ("step", *self._key(stage, device_key)),
            lambda: step_time(
                stage.network,
                device,
                StepSetting(
                    batch=-(-stage.batch // self.options.micro_batches),
                    precision=self.precision,
                    memory_format=self.memory_format,
                    optimizer=self.optimizer,
                    regularizer=stage.epoch.penalty_coefficient > 0,
                ),
                measurements=measurements or self.measurements,
            ),
        )

    def _memory(self, stage: _Stage) -> MemoryNeed:
        return self.cache.get(
            ("memory", self.num_gpus > 1, *self._key(stage, self.device_key)),
            lambda: iteration_memory(
                stage.network,
                batch=-(-stage.batch // self.options.micro_batches),
                precision=self.precision,
                optimizer=self.optimizer,
                memory_format=self.memory_format,
                device=self.device,
                data_parallel=self.num_gpus > 1,
            ),
        )

    def _buckets(self, stage: _Stage) -> tuple[Bucket, ...]:
        if self.num_gpus == 1:
            return ()
        first, others = self.options.first_bucket_bytes, self.options.bucket_bytes
        return self.cache.get(
            ("buckets", stage.id, first, others),
            lambda: ddp_buckets(stage.network, first_bucket_bytes=first, bucket_bytes=others),
        )

    def _plan(self, stage: _Stage, step: StepTime, bound: ddp.Bound, *, merged: bool = True) -> StepPlan:
        options, buckets = self.options, self._buckets(stage)

        def compute() -> StepPlan:
            plan = ddp.compute_plan(step, buckets, num_micro_batches=options.micro_batches)
            return plan.merged() if merged else plan

        key = self._key(stage, self.device_key)
        ready = tuple(bucket.ready_layer for bucket in buckets)
        plan = ddp.with_communication(
            self.cache.get(("plan", merged, ready, options.micro_batches, *key), compute),
            buckets,
            self._all_reduce,
            wire=self.wire,
            buffer_bytes=ddp.buffer_bytes(stage.network) if options.broadcast_buffers and self.num_gpus > 1 else 0,
            bound=bound,
            scale=self.cache.get(("scale", bound, *key), lambda: ddp.computation_scale(step, bound)),
        )
        return plan if self.overlap else msgspec.structs.replace(plan, overlap=False)

    def _simulate(self, stage: _Stage) -> _Simulated:
        key = (stage.id, stage.batch, stage.epoch.penalty_coefficient > 0)
        if key not in self.simulated:
            self.simulated[key] = self._simulate_new(stage)
        return self.simulated[key]

    def _simulate_new(self, stage: _Stage) -> _Simulated:
        options, network = self.options, stage.network
        step = self._step_time(stage, self.device, self.device_key)
        speeds, jitter = self._speeds(stage, step), self._jitter()
        plan = self._plan(stage, step, "expected")
        expected = self._run_steps(stage, plan, speeds, jitter, options.contention)
        low, high = (
            self._run_steps(stage, self._plan(stage, step, bound), speeds, jitter, contention)
            for bound, contention in _ends(options.contention)
        )
        wrap_s = options.compile_s + options.warmup_steps * expected.step_s + self._autotune_s(stage, step)
        if self.num_gpus > 1:
            shown_s = ddp.first_step_s(network, plan, self._all_reduce, self.wire)
            wrap_s += max(0.0, shown_s - expected.exposed_communication_s)
            wrap_s += ddp.wrapping_s(network, self._all_reduce)
        need = self._memory(stage)
        if need.device_bytes > self.memory_bytes:
            self.notes.append(
                f"epoch {stage.epoch.epoch}: a mini-batch of {stage.batch} needs {need.device_bytes / GIB:.1f} GiB, "
                f"a process on the {self.device.name} can have {self.memory_bytes / GIB:.1f} GiB: it would not fit"
            )
        n = options.micro_batches
        forward_s, backward_s = self.cache.get(
            ("passes", *self._key(stage, self.device_key)), lambda: (step.forward_s, step.backward_s)
        )
        compute_s = n * (forward_s + backward_s + step.overhead_s) + step.optimizer_s + step.regularizer_s
        return _Simulated(
            step=step,
            result=expected,
            scale=expected.compute_s / compute_s if compute_s else 1.0,
            forward_s=n * forward_s,
            backward_s=n * backward_s,
            low_s=expected.step_s / _widened(expected.step_s / min(low.step_s, expected.step_s), self.spread),
            high_s=expected.step_s * _widened(max(high.step_s, expected.step_s) / expected.step_s, self.spread),
            wrap_s=wrap_s,
            peak_memory_bytes=need.peak_bytes,
            energy_j=self._energy_j(stage, step, expected),
        )

    def _energy_j(self, stage: _Stage, step: StepTime, result: StepResult) -> float | None:
        """Joules of one step on one GPU: what it computes, and the time for which it waits."""
        model = self._power_model()
        if model is None:
            return None
        key = ("energy", model, *self._key(stage, self.device_key))
        computing_j = self.cache.get(key, lambda: step_energy(step, self.device, model=model).joules)
        n = self.options.micro_batches
        updates_j = (step.optimizer_s + step.regularizer_s) * model.stream_w  # once per step, not per micro-batch
        waiting_s = result.step_s - result.compute_s
        return n * computing_j - (n - 1) * updates_j + max(0.0, waiting_s) * model.waiting_w

    def _power_model(self) -> PowerModel | None:
        """From the recorded powers where the run was on this kind of GPU, else from its data sheet."""
        if self._power is None and self.device.power_w > self.device.idle_power_w:
            self._power = self.cache.get(("power", self.device_key), self._fit_power)
        return self._power

    def _fit_power(self) -> PowerModel:
        samples = []
        if self.measurements.source_device == self.device:
            for epoch in self.trace.epochs:
                if epoch.device is None or epoch.device.power_w is None:
                    continue
                stage = _Stage(
                    epoch=epoch,
                    network=self.trace.network_of(epoch),
                    id=epoch.architecture,
                    batch=epoch.batch_per_gpu,
                    num_iterations=epoch.num_iterations,
                    new=False,
                )
                step = self._recorded_step_time(stage)
                waiting_s = max(0.0, epoch.time.wall_s / epoch.num_iterations - step.compute_s)
                samples.append(PowerSample(step=step, waiting_s=waiting_s, power_w=epoch.device.power_w))
        return fit_power(self.device, samples) if samples else published_power(self.device)

    def _recorded_step_time(self, stage: _Stage) -> StepTime:
        regularizer = stage.epoch.penalty_coefficient > 0
        return self.cache.get(
            ("recorded step", stage.id, stage.batch, regularizer, self.device_key),
            lambda: step_time(
                stage.network,
                self.device,
                StepSetting(
                    batch=stage.batch,
                    precision=self.run.precision,
                    memory_format=self.run.memory_format,
                    optimizer=self.optimizer,
                    regularizer=regularizer,
                ),
                measurements=self.measurements,
            ),
        )

    def _run_steps(
        self,
        stage: _Stage,
        plan: StepPlan,
        speeds: tuple[float, ...],
        jitter: Jitter | None,
        contention: float,
        *,
        num_steps: int | None = None,
        record_gpus: int = 0,
    ) -> StepResult:
        options = self.options
        interval = self._input_interval_s(stage)
        job = Job(plan=plan, speeds=speeds, input_interval_s=interval)
        jobs = [job]
        shared = options.jobs if self.num_nodes > 1 else 1
        if shared > 1:
            # equal jobs that start evenly spread over a step: neither the worst nor the best of phases
            lag = plan.compute_s / shared
            jobs += [msgspec.structs.replace(job, start_s=lag * i) for i in range(1, shared)]
        # enough steps for a stable mean; among thousands of GPUs the slowest one varies little from step to step
        if num_steps is None:
            is_random = (jitter is not None and jitter.sigma > 0) or shared > 1
            num_steps = max(1, min(options.sampled_steps, 20_000 // len(speeds))) if is_random else 1
        return simulate_steps(
            jobs,
            contention=contention,
            jitter=jitter,
            num_steps=num_steps,
            num_warmup=2 if shared > 1 else int(interval > 0),
            seed=options.seed,
            record_gpus=record_gpus,
        )[0]

    def _speeds(self, stage: _Stage, step: StepTime) -> tuple[float, ...]:
        """Duration factors of the GPUs; one entry stands for all where they are equal."""
        options = self.options
        unequal = options.jitter != 0 or options.straggler_fraction > 0
        if not options.mixed_devices:
            return (1.0,) * (self.num_gpus if unequal else 1)
        factors: list[float] = []
        for name, count in options.mixed_devices.items():
            device = load_device(name)
            known = msgspec.structs.replace(self.measurements, device_profile=None)  # that is of the cluster's device
            other = self._step_time(stage, device, msgspec.json.encode(device), known)
            factors += [other.compute_s / step.compute_s] * count
            self.mixed_tiers.add(other.tier)
        own = self.cluster.gpus_per_node - len(factors)
        if own < 0:
            raise UsageError(
                f"mixed_devices names {len(factors)} GPUs per node, "
                f"{self.cluster.name} has {self.cluster.gpus_per_node}"
            )
        node = [1.0] * own + factors
        speeds = [node[i % len(node)] for i in range(self.num_gpus)]
        return tuple(speeds) if unequal else tuple(sorted(set(speeds)))

    def _jitter(self) -> Jitter | None:
        options = self.options
        sigma = recorded_jitter(self.trace.epochs) if options.jitter == "recorded" else float(options.jitter)
        if not sigma and not options.straggler_fraction:
            return None
        return Jitter(
            sigma=sigma,
            straggler_fraction=options.straggler_fraction,
            straggler_slowdown=options.straggler_slowdown,
        )

    def _input_interval_s(self, stage: _Stage) -> float:
        rate = self.options.input_images_per_s
        if rate is None:
            return 0.0
        if rate == "recorded":
            # a loader that made the run wait was busy all the time, and can do what it did in the fastest such epoch;
            # one that never did is no limit
            paces = [
                epoch.time.wall_s * epoch.world_size / epoch.num_images
                for epoch in self.trace.epochs
                if epoch.time.data_wait_s >= 0.01 * epoch.time.wall_s and epoch.num_images
            ]
            return stage.batch * min(paces, default=0.0)
        return stage.batch / float(rate)

    def _autotune_s(self, stage: _Stage, step: StepTime) -> float:
        """Every convolution's forward and backward, so many times (cuDNN tries its algorithms at the first step)."""
        if not self.options.autotune_trials or self.device.architecture == "cpu":
            return 0.0
        convolutions = {layer.name for layer in stage.network.layers if layer.kind is LayerKind.CONV}
        once = sum(layer.forward_s + layer.backward_s for layer in step.layers if layer.layer in convolutions)
        return self.options.autotune_trials * once

    def _project_epoch(self, stage: _Stage) -> EpochProjection:
        simulated = self._simulate(stage)
        step, result, scale = simulated.step, simulated.result, simulated.scale
        n = self.options.micro_batches
        total_s = stage.num_iterations * result.step_s
        return EpochProjection(
            epoch=stage.epoch.epoch,
            architecture=stage.id,
            batch_per_gpu=stage.batch,
            num_iterations=stage.num_iterations,
            step_s=result.step_s,
            forward_s=simulated.forward_s * scale,
            backward_s=simulated.backward_s * scale,
            optimizer_s=step.optimizer_s * scale,
            regularizer_s=step.regularizer_s * scale,
            overhead_s=n * step.overhead_s * scale,
            input_wait_s=result.input_wait_s,
            straggler_wait_s=result.straggler_wait_s,
            communication_s=result.communication_s,
            exposed_communication_s=result.exposed_communication_s,
            wire_bytes_per_gpu=result.wire_bytes_per_gpu,
            total_s=total_s,
            low_s=stage.num_iterations * simulated.low_s,
            high_s=stage.num_iterations * simulated.high_s,
            peak_memory_bytes=simulated.peak_memory_bytes,
            energy_j=None if simulated.energy_j is None else self.num_gpus * stage.num_iterations * simulated.energy_j,
            tier=step.tier,
        )

    # -- reconfigurations ------------------------------------------------------------------------------------------

    def _reconfiguration_s(self, stage: _Stage, simulated: _Simulated) -> float:
        surgery = self.options.surgery_s
        if surgery is None:
            surgery = _recorded_surgery_s(self.trace.reconfigurations, stage.epoch.epoch)
        return surgery + simulated.wrap_s


def _widened(ratio: float, sigma: float) -> float:
    """The end of a 90 % interval (as a ratio to the middle) with a log-normal spread on top, independent of it."""
    return math.exp(math.hypot(math.log(ratio), 1.645 * sigma))


def _ends(contention: float) -> tuple[tuple[ddp.Bound, float], ...]:
    """The ends of the interval and their contention: 0.1–0.3 around the default of 0.2."""
    return ("low", contention / 2), ("high", min(1.0, contention * 1.5))


def recorded_jitter(epochs: Sequence[Epoch]) -> float:
    """The standard deviation of the logarithm of a step's duration, from the recorded 10th and 90th percentiles.

    Percentiles, not the standard deviation: the first steps after a start would dominate that. The median over epochs.
    """
    spreads = sorted(
        math.log(epoch.step.p90_s / epoch.step.p10_s) / (2 * 1.2816) for epoch in epochs if epoch.step.p10_s > 0
    )
    return spreads[len(spreads) // 2] if spreads else 0.0


def _recorded_surgery_s(reconfigurations: Sequence[Reconfiguration], epoch: int) -> float:
    """What the recorded reconfiguration in front of `epoch` took; the median one's time where there was none."""
    exact = [r.duration_s for r in reconfigurations if r.epoch + 1 == epoch]
    if exact:
        return exact[0]
    durations = sorted(r.duration_s for r in reconfigurations)
    return durations[len(durations) // 2] if durations else 0.0
