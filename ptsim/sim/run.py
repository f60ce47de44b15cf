"""What a recorded run would take on another cluster: time, bytes, memory, energy and money, epoch by epoch.

`scenario` resolves the inputs, `planning` says what is trained when, `pricing` simulates every distinct step; here the
prices are multiplied by the iterations and added up. Reconfigurations, wrapping and failures come on top. The ends of
the interval are sums of the parts' ends: the tiers' errors are systematic, so they are taken as fully correlated over
epochs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ptsim.costs.flops import flops_utilization, training_macs
from ptsim.costs.tiers import Tier, worst_tier
from ptsim.errors import UnknownNameError
from ptsim.hardware.catalog import load_cluster, load_device
from ptsim.hardware.profile import DeviceProfile
from ptsim.hardware.profile_file import read_device_profile
from ptsim.hardware.spec import Cluster, Device
from ptsim.network import Network
from ptsim.setting import changed, whole_numbers
from ptsim.sim.bounded import SecondsRange
from ptsim.sim.faults import simulate_faults
from ptsim.sim.options import Faults, HourPrice, Options, hour_price
from ptsim.sim.planning import RunPlan, Stage, plan_run
from ptsim.sim.pricing import Pricer, RecordedSteps, spread_on_top
from ptsim.sim.projection import EpochProjection, RunProjection, projections_frame
from ptsim.sim.scenario import Scenario, StepCache
from ptsim.trace.io import read_trace
from ptsim.trace.trace import Trace
from ptsim.units import counted, format_bytes

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["RecordedSteps", "StepCache", "change", "project", "record_steps", "simulate"]


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
    scenario = Scenario(
        trace, cluster, num_gpus, options or Options(), device=device, device_profile=device_profile, cache=cache
    )
    projection = _summed(Pricer(scenario), plan_run(scenario))
    if not trace.draws:
        return projection
    others = [
        project(other, cluster, num_gpus, options, device=device, device_profile=device_profile, cache=scenario.cache)
        for other in trace.drawn()[1:]
    ]
    return _with_draws(projection, others)


def _with_draws(projection: RunProjection, others: Sequence[RunProjection]) -> RunProjection:
    """The projection with the spread of drawn trajectories around it in all its intervals: run, epochs, changes."""
    total_s = projection.total_s
    spread = _log_spread(total_s, [other.total_s for other in others])
    low_s, high_s = _widened(projection.low_s, total_s, projection.high_s, spread)
    low, high = low_s / projection.low_s, high_s / projection.high_s
    energy_low_j, energy_high_j = projection.energy_low_j, projection.energy_high_j
    agree = counted(len(others), "other planned trajectory agrees", "other planned trajectories agree")
    changes_s = projection.reconfiguration_s
    changes_low_s, changes_high_s = _widened(
        projection.reconfiguration_low_s,
        changes_s,
        projection.reconfiguration_high_s,
        _log_spread(changes_s, [other.reconfiguration_s for other in others]),
    )
    return msgspec.structs.replace(
        projection,
        epochs=tuple(
            _epoch_with_draws(epoch, drawn)
            for epoch, *drawn in zip(projection.epochs, *(other.epochs for other in others), strict=True)
        ),
        draw_spread=spread,
        low_s=low_s,
        high_s=high_s,
        reconfiguration_low_s=changes_low_s,
        reconfiguration_high_s=changes_high_s,
        energy_low_j=None if energy_low_j is None else energy_low_j * low,
        energy_high_j=None if energy_high_j is None else energy_high_j * high,
        notes=(
            *projection.notes,
            f"{agree} with what was given; the times differ from this one's by {spread:.1%} (standard deviation), "
            "which is in the interval",
        ),
    )


def _input_images_per_s(epoch: EpochProjection, longer_s: float = 0.0) -> float:
    """What one GPU would need from its host never to wait, in a step that takes `longer_s` longer."""
    return epoch.batch_per_gpu / (epoch.compute_s + epoch.straggler_wait_s + epoch.exposed_communication_s + longer_s)


def _epoch_with_draws(epoch: EpochProjection, drawn: Sequence[EpochProjection]) -> EpochProjection:
    spread = _log_spread(epoch.total_s, [other.total_s for other in drawn])
    low_s, high_s = _widened(epoch.low_s, epoch.total_s, epoch.high_s, spread)
    return msgspec.structs.replace(epoch, low_s=low_s, high_s=high_s)


def _log_spread(seconds: float, others: Sequence[float]) -> float:
    """Standard deviation of the others' logarithms around that of `seconds`; of those that take time at all."""
    logs = [math.log(other / seconds) ** 2 for other in others if seconds > 0 and other > 0]
    return math.sqrt(statistics.fmean(logs)) if logs else 0.0


def _widened(low_s: float, middle_s: float, high_s: float, spread: float) -> tuple[float, float]:
    """The ends of an interval with a log-normal spread on top; ends that are 0 stay."""
    low = middle_s / spread_on_top(middle_s / low_s, spread) if low_s > 0 else low_s
    return low, middle_s * spread_on_top(high_s / middle_s, spread) if middle_s > 0 else high_s


def _summed(pricer: Pricer, plan: RunPlan) -> RunProjection:
    """The whole run: its epochs, what begins and changes it, its failures, energy and price."""
    scenario, options = pricer.scenario, pricer.scenario.options
    trace, cluster, num_gpus = scenario.trace, scenario.cluster, scenario.num_gpus
    epochs = tuple(_project_epoch(pricer, stage) for stage in plan.stages)
    startup = pricer.price(plan.stages[0]).wrapping
    changes = SecondsRange.total(pricer.reconfiguration(stage) for stage in plan.stages[1:] if stage.new)
    trained = SecondsRange.total(
        SecondsRange(low_s=epoch.low_s, expected_s=epoch.total_s, high_s=epoch.high_s) for epoch in epochs
    )
    whole = SecondsRange.total((trained, startup, changes))
    fixed_s = startup.expected_s + changes.expected_s
    faults, faults_s = None, 0.0
    if options.faults is not None:
        work_s = whole.expected_s
        faults = simulate_faults(work_s, num_gpus, cluster.gpus_per_node, options.faults, seed=options.seed)
        faults_s = max(0.0, faults.total_s - work_s)
        low, high = faults.low_s / work_s, faults.high_s / work_s
        whole = SecondsRange.around(whole.low_s * low, work_s + faults_s, whole.high_s * high)
    total_s, low_s, high_s = whole.expected_s, whole.low_s, whole.high_s
    price = hour_price(cluster, options)
    needed, among = [_input_images_per_s(epoch) for epoch in epochs], None
    if num_gpus == 1 and pricer.feed.supply is not None:
        among = [
            _input_images_per_s(epoch, pricer.among_others_s(stage))
            for epoch, stage in zip(epochs, plan.stages, strict=True)
        ]
    energy_j = pricer.power.run_j(epochs, fixed_s, faults_s)
    energy_low_j, energy_high_j = pricer.power.run_range_j(energy_j, low_s / total_s, high_s / total_s, low_s)
    return RunProjection(
        trace=str(trace.path),
        model=trace.run.model,
        origin=trace.run.origin,
        cluster=cluster.name,
        device=scenario.device.name,
        gpus=num_gpus,
        scaling=options.scaling,
        epochs=epochs,
        reconfiguration_s=changes.expected_s,
        reconfiguration_low_s=changes.low_s,
        reconfiguration_high_s=changes.high_s,
        startup_s=startup.expected_s,
        faults_s=faults_s,
        total_s=total_s,
        compute_s=_over(epochs, lambda epoch: epoch.compute_s),
        exposed_communication_s=_over(epochs, lambda epoch: epoch.exposed_communication_s),
        communication_wait_s=_over(epochs, lambda epoch: epoch.communication_wait_s),
        input_wait_s=_over(epochs, lambda epoch: epoch.input_wait_s),
        straggler_wait_s=_over(epochs, lambda epoch: epoch.straggler_wait_s),
        allreduce_bytes_per_gpu=_over(epochs, lambda epoch: epoch.wire_bytes_per_gpu),
        energy_j=energy_j,
        energy_low_j=energy_low_j,
        energy_high_j=energy_high_j,
        price=price,
        low_s=low_s,
        high_s=high_s,
        tier=worst_tier(epoch.tier for epoch in epochs) or Tier.DATASHEET,
        network_tier=pricer.links.tier,
        mfu_fraction=_utilization(pricer, plan.stages, epochs),
        input_images_per_s=pricer.feed.images_per_s,
        input_limit_gpus=pricer.feed.limiting_gpus(needed, among),
        draw_spread=0.0,
        complete=trace.complete,
        notes=(
            *plan.notes,
            *pricer.notes,
            *_too_large(scenario, epochs),
            *pricer.feed.notes(needed, among),
            *_doubts(scenario, epochs),
            *_instances(price, num_gpus),
            *_other_gpus(price, scenario),
        ),
        faults=faults,
    )


def _utilization(pricer: Pricer, stages: Sequence[Stage], epochs: Sequence[EpochProjection]) -> float | None:
    scenario = pricer.scenario
    work: dict[str, tuple[Network, int, int]] = {}  # of each network its images and its mini-batches
    for stage in stages:
        network, images, mini_batches = work.get(stage.id, (stage.network, 0, 0))
        images += stage.epoch.num_images
        mini_batches += stage.num_iterations * scenario.num_passes(stage.batch, stage.epoch) * scenario.num_gpus
        work[stage.id] = network, images, mini_batches
    macs = sum(
        training_macs(network, images=images, mini_batches=mini_batches)
        for network, images, mini_batches in work.values()
    )
    gpu_seconds = scenario.num_gpus * math.fsum(epoch.total_s for epoch in epochs)
    return flops_utilization(macs, gpu_seconds, pricer.peak_flops_per_s)


def _over(epochs: Sequence[EpochProjection], of_step: Callable[[EpochProjection], float]) -> float:
    """What steps amount to over the run."""
    return math.fsum(epoch.num_iterations * of_step(epoch) for epoch in epochs)


def _project_epoch(pricer: Pricer, stage: Stage) -> EpochProjection:
    price = pricer.price(stage)
    step, result, scale, scenario = price.step, price.result, price.scale, pricer.scenario
    return EpochProjection(
        epoch=stage.epoch.epoch,
        architecture=stage.id,
        batch_per_gpu=stage.batch,
        num_iterations=stage.num_iterations,
        step_s=result.step_s,
        forward_s=price.forward_s * scale,
        backward_s=price.backward_s * scale,
        product_s=price.product_s * scale,
        hooks_s=price.hooks_s * scale,
        optimizer_s=price.optimizer_s * scale,
        regularizer_s=step.regularizer_s * scale,
        overhead_s=scenario.num_passes(stage.batch, stage.epoch) * step.overhead_s * scale,
        input_wait_s=result.input_wait_s,
        straggler_wait_s=result.straggler_wait_s,
        communication_s=result.communication_s,
        exposed_communication_s=result.exposed_communication_s,
        communication_wait_s=result.communication_wait_s,
        wire_bytes_per_gpu=result.wire_bytes_per_gpu,
        total_s=stage.num_iterations * result.step_s,
        low_s=stage.num_iterations * price.low_s,
        high_s=stage.num_iterations * price.high_s,
        peak_memory_bytes=price.peak_memory_bytes,
        needed_memory_bytes=price.needed_memory_bytes,
        energy_j=None if price.energy_j is None else scenario.num_gpus * stage.num_iterations * price.energy_j,
        tier=price.tier,
    )


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

    One that was trained with several mini-batches, or numbers of passes, is recorded with each.

    Raises:
        UsageError: what `project` raises.
    """
    scenario = Scenario(trace, cluster, num_gpus, options or Options(), device_profile=device_profile)
    pricer = Pricer(scenario)
    first: dict[tuple[str, int, int], Stage] = {}
    for stage in plan_run(scenario).stages:
        first.setdefault((stage.id, stage.batch, scenario.num_passes(stage.batch, stage.epoch)), stage)
    return tuple(pricer.record(stage, num_steps, shown) for stage in first.values())


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
    cache, sizes = StepCache(), whole_numbers("gpus", gpus)
    return projections_frame([project(trace, cluster, n, options, device_profile=profile, cache=cache) for n in sizes])


def _too_large(scenario: Scenario, epochs: Sequence[EpochProjection]) -> tuple[str, ...]:
    """Which epochs need more memory than a GPU has."""
    most = scenario.memory_bytes
    large = [epoch for epoch in epochs if epoch.needed_memory_bytes > most]
    if not large:
        return ()
    worst, first, last = max(large, key=lambda epoch: epoch.needed_memory_bytes), large[0].epoch, large[-1].epoch
    which = f"epoch {first}" if first == last else f"epochs {first} to {last}"
    if len(large) <= last - first:
        which = f"{len(large)} of the {which}"
    up_to = "up to " if len({epoch.needed_memory_bytes for epoch in large}) > 1 else ""
    need, may = format_bytes(worst.needed_memory_bytes), format_bytes(most)
    return (
        f"{which}: a mini-batch of {worst.batch_per_gpu} needs {up_to}{need} (an upper estimate), a process on the "
        f"{scenario.device.name} can have {may}: it would not fit",
    )


def _doubts(scenario: Scenario, epochs: Sequence[EpochProjection]) -> tuple[str, ...]:
    """What must be known of the device profile, where steps come from it."""
    profile = scenario.measurements.device_profile
    if profile is None or all(epoch.tier != Tier.PROFILED for epoch in epochs):
        return ()
    return profile.doubts(num_gpus=scenario.num_gpus)


def _instances(price: HourPrice | None, num_gpus: int) -> tuple[str, ...]:
    """That more GPUs are paid for than train."""
    billing = "" if price is None else price.billing(num_gpus)
    if price is None or not billing:
        return ()
    return (f"{billing}: at the list price one rents whole instances of {price.instance_gpus} GPUs",)


def _other_gpus(price: HourPrice | None, scenario: Scenario) -> tuple[str, ...]:
    """That the cluster's price is not of the GPUs that are projected."""
    own, options = scenario.cluster.device, scenario.options
    if price is None or own is None or options.price_usd_per_gpu_hour is not None:
        return ()
    others = [
        name
        for name in (scenario.device.name, *(load_device(each).name for each in options.mixed_devices))
        if name != own.name
    ]
    if not others:
        return ()
    return (f"the price is of {scenario.cluster.name} with the {own.name}, not of the {', the '.join(others)}",)


def change(options: Options, changes: dict[str, Any]) -> Options:
    """The options with some replaced, as strictly checked as if they came from a file.

    Raises:
        UnknownNameError: an option that does not exist.
        UsageError: a value of a wrong type or out of its bounds.
    """
    inside = changes.get("faults")
    for name in inside if isinstance(inside, dict) else ():
        if name not in Faults.__struct_fields__:
            raise UnknownNameError("option of faults", str(name), Faults.__struct_fields__)
    made = changed(options, changes)
    made.check()
    return made
