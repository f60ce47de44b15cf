"""One recorded run predicted again: its steps, its pace, its memory, energy and communication, epoch by epoch.

What a prediction may see is said in `answers.validate`.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from ptsim.answers.utilization import epochs_utilization
from ptsim.costs.collectives import all_reduce, nodes_for
from ptsim.costs.energy import PowerModel, PowerSample, fit_power, is_plausible, step_energy
from ptsim.costs.measured import find_profile, measured_step, of_profile, recorded_step
from ptsim.costs.memory import iteration_memory
from ptsim.costs.profiled import profiled_step
from ptsim.costs.scaling import among, contention_of, hook_seconds
from ptsim.costs.times import StepTime
from ptsim.criteria import GROUP_LASSO
from ptsim.errors import MissingMeasurementError, UsageError
from ptsim.hardware.catalog import match_device
from ptsim.hardware.profile import DeviceProfile, OperatorTime, StepMeasurement
from ptsim.hardware.profile_merge import merge_operators
from ptsim.hardware.spec import Cluster, Device
from ptsim.network import Network
from ptsim.sim import ddp
from ptsim.sim.bounded import SecondsRange, data_parallel_step
from ptsim.trace.pace import (
    beyond_steps_s_per_image,
    changes,
    input_s_per_image,
    measured_changes,
    paid_s,
    reconfiguration_s,
)
from ptsim.trace.pairs import work_of
from ptsim.trace.schema import Epoch
from ptsim.trace.trace import Trace
from ptsim.units import counted


class EpochCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One epoch; errors are (predicted - measured) / measured. The interval is 90 %."""

    epoch: int
    architecture: str
    batch_per_gpu: int
    num_gpus: int
    tier: str
    measured_seconds: float
    predicted_seconds: float
    low_seconds: float
    high_seconds: float
    error: float
    measured_mfu_fraction: float | None
    predicted_mfu_fraction: float | None
    measured_memory_bytes: int | None
    predicted_memory_bytes: int
    measured_energy_joules: float | None
    predicted_energy_joules: float | None
    measured_exposed_communication_seconds: float
    predicted_exposed_communication_seconds: float | None

    @property
    def inside(self) -> bool:
        """Whether the interval holds what was measured."""
        return self.low_seconds <= self.measured_seconds <= self.high_seconds


class RunCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One run: training epochs and reconfigurations."""

    trace: str
    model: str
    dataset: str
    device: str
    dense: bool
    measured_seconds: float
    predicted_seconds: float
    low_seconds: float
    high_seconds: float
    error: float
    measured_mfu_fraction: float | None
    predicted_mfu_fraction: float | None
    measured_reconfiguration_seconds: float
    predicted_reconfiguration_seconds: float
    measured_energy_joules: float | None
    predicted_energy_joules: float | None
    measured_exposed_communication_seconds: float
    predicted_exposed_communication_seconds: float | None
    epochs: tuple[EpochCheck, ...]
    notes: tuple[str, ...]


def device_profile_of(traces: Sequence[Trace]) -> DeviceProfile:
    """What the profiles inside some runs measured, as a device profile: operators and whole steps.

    Raises:
        MissingMeasurementError: no profiles, or runs of different devices.
    """
    with_profiles = [trace for trace in traces if trace.own_profiles]
    if not with_profiles:
        raise MissingMeasurementError("none of the other runs has profiles to predict from")
    devices = dict.fromkeys(_device_words(trace) for trace in with_profiles)
    if len(devices) > 1:
        raise MissingMeasurementError(f"the other runs were made on different devices: {', '.join(devices)}")
    operators, steps = _operators_and_steps(with_profiles)
    inputs: dict[str, list[float]] = {}
    for trace in with_profiles:
        if (value := input_s_per_image(trace)) is not None:
            inputs.setdefault(trace.run.dataset.name, []).append(value)
    reconfigurations = [value for trace in with_profiles if (value := reconfiguration_s(trace)) is not None]
    info = with_profiles[0].run.device
    kind, memory_bytes = info.must_exist()
    return DeviceProfile(
        created=with_profiles[0].run.created,
        complete=True,
        device=info.name,
        kind=kind,
        memory_bytes=memory_bytes,
        num_threads=info.num_threads,
        software=with_profiles[0].run.versions,
        reconfiguration_s=statistics.median(reconfigurations) if reconfigurations else None,
        input_s_per_image={name: statistics.median(values) for name, values in inputs.items()},
        sources=tuple(str(trace.path) for trace in with_profiles),
        runs=tuple(trace.fingerprint for trace in with_profiles),
        operators=operators,
        steps=steps,
    )


def _operators_and_steps(traces: Sequence[Trace]) -> tuple[tuple[OperatorTime, ...], tuple[StepMeasurement, ...]]:
    """What the profiles inside some runs measured; of two measurements of one operator the later one."""
    operators: tuple[OperatorTime, ...] = ()
    steps = []
    for trace in traces:
        for profile in trace.own_profiles:
            if trace.penalty_ratio == 0:  # older traces: microseconds between two clocks
                profile = msgspec.structs.replace(profile, regularizer_s=0.0)
            network = trace.networks[profile.architecture]
            step, times = of_profile(
                network,
                profile,
                optimizer=trace.optimizer,
                momentum=trace.momentum,
                criterion=trace.criterion or GROUP_LASSO,
                proximal=trace.proximal,
            )
            operators = merge_operators(operators, times)
            steps.append(step)
    return operators, tuple(steps)


def _device_words(trace: Trace) -> str:
    """The device as its times are told apart: a CPU with another number of threads is another one."""
    info = trace.run.device
    return info.name if info.num_threads is None else f"{info.name} with {counted(info.num_threads, 'thread')}"


class _Pace(msgspec.Struct, frozen=True, kw_only=True):
    """What a run takes beside its steps, as far as it may be seen; None where nobody measured it."""

    input_s_per_image: float | None
    reconfiguration_s: float | None
    doubts: tuple[str, ...] = ()  # about the profile that the steps come from


_StepOf = Callable[[Epoch], StepTime]


def source_of(
    trace: Trace, runs: Sequence[Trace], profile: DeviceProfile | None, *, holdout: bool
) -> tuple[_StepOf, _Pace]:
    """Where the steps of `trace` and its pace come from."""
    run = trace.run
    if profile is None and not holdout:
        if not trace.profiles:
            raise MissingMeasurementError(
                f"{trace.path} has no profiles to predict from",
                hint="train with profiles (in a loop of your own: profile=True), or give a device profile: --profile",
            )
        first = trace.epochs[0]

        def measured(epoch: Epoch) -> StepTime:
            step = measured_step(trace.network_of(epoch), trace.profiles, trace.setting_of(epoch))
            # What is between the phases is in the pace.
            share = 1.0 - step.overhead_s / step.compute_s if step.compute_s else 1.0
            return msgspec.structs.replace(step, overhead_s=0.0, low_s=step.low_s * share, high_s=step.high_s * share)

        return measured, _Pace(
            input_s_per_image=beyond_steps_s_per_image(first),
            reconfiguration_s=next((event.duration_s for event in measured_changes(trace)), None),
        )
    of_others = profile is None
    if profile is None:
        others = [other for other in runs if other.fingerprint != trace.fingerprint]  # a copy is the run itself
        if not others:
            raise UsageError("holdout needs a device profile or a second run to predict from")
        profile = msgspec.structs.replace(device_profile_of(others), called="the other runs' profile")
    elif holdout and _is_among(trace, profile):
        raise UsageError(f"holdout needs a device profile of other runs; this one was calibrated on {trace.path}")
    known = profile
    with _naming(trace, of_others):
        known.check_device(run.device.name)
    doubts = (*known.doubts(run.versions), *_untold_threads(trace, known))

    def profiled(epoch: Epoch) -> StepTime:
        with _naming(trace, of_others):
            return profiled_step(trace.network_of(epoch), known, trace.setting_of(epoch))

    return profiled, _Pace(
        input_s_per_image=known.input_s_per_image.get(run.dataset.name),
        reconfiguration_s=known.reconfiguration_s,
        doubts=doubts,
    )


@contextlib.contextmanager
def _naming(trace: Trace, of_others: bool) -> Iterator[None]:
    """Inside, what the other runs did not measure is said of the run that is predicted from them alone."""
    try:
        yield
    except MissingMeasurementError as error:
        if not of_others:
            raise
        raise MissingMeasurementError(
            f"{trace.path} cannot be predicted: {error.message}",
            hint="name other runs that measured it, too, or a device profile that did: --profile",
        ) from error


def _untold_threads(trace: Trace, profile: DeviceProfile) -> tuple[str, ...]:
    """What must be known of a profile, as of another profiler's recording, that does not say its number of threads.

    Raises:
        MissingMeasurementError: it says another number than the run had.
    """
    threads = trace.run.device.num_threads
    if profile.num_threads == threads:
        return ()
    if profile.num_threads is not None:
        problem = f"{trace.path} ran with {threads} threads, {profile.called} with {profile.num_threads}"
        raise MissingMeasurementError(problem)
    return (f"{profile.called} does not say how many threads it was recorded with, the run had {threads}",)


def _is_among(trace: Trace, profile: DeviceProfile) -> bool:
    """Whether the profile was calibrated on the run; by its path where an older ptsim noted nothing else."""
    by_path = len(profile.runs) < len(profile.sources)
    sources = {Path(source).resolve() for source in profile.sources if by_path}
    return trace.path.resolve() in sources or trace.fingerprint in profile.runs


class _Parallel(msgspec.Struct, frozen=True, kw_only=True):
    """A data-parallel step: the whole of it, for how long it waits for its all-reduces, and the first after a wrapping.

    Attributes:
        step: with the gradients' hooks, which no profile of one GPU has, and with what many GPUs add to the interval.
        exposed_s, first_exposed_s: what of it is exposed communication.
    """

    step: SecondsRange
    exposed_s: float
    first_exposed_s: float


class _Communication:
    """The steps of one data-parallel run, simulated on its cluster."""

    def __init__(self, cluster: Cluster, num_gpus: int, *, overlap: bool, buffers: bool) -> None:
        self._cluster, self._num_gpus, self._overlap, self._buffers = cluster, num_gpus, overlap, buffers
        self._contention, self._tensor_s = contention_of(cluster, num_gpus), hook_seconds(cluster, num_gpus)
        self._all_reduce = functools.cache(lambda num_bytes: all_reduce(num_bytes, cluster, num_gpus))
        self._known: dict[tuple[str, int, int, bool], _Parallel] = {}
        nodes_for(cluster, num_gpus)  # raises where it has not so many

    def of(self, network: Network, step: StepTime, epoch: Epoch) -> _Parallel:
        key = (network.id, epoch.batch_per_gpu, epoch.passes, epoch.regularized)
        if key not in self._known:
            self._known[key] = self._simulated(network, step)
        return self._known[key]

    def _simulated(self, network: Network, step: StepTime) -> _Parallel:
        parallel = data_parallel_step(
            network,
            step,
            self._all_reduce,
            contention=self._contention,
            tensor_s=self._tensor_s,
            buffers=self._buffers,
            overlap=self._overlap,
        )
        exposed_s = parallel.expected.exposed_communication_s
        return _Parallel(
            step=parallel.interval().among(self._cluster, self._num_gpus, step.tier),
            exposed_s=exposed_s,
            first_exposed_s=max(ddp.first_step_s(network, self._all_reduce), exposed_s),
        )


def check_run(trace: Trace, step_of: _StepOf, pace: _Pace, cluster: Cluster | None) -> RunCheck:
    """The run's time, memory, energy and communication, predicted and measured.

    Args:
        trace: the run.
        step_of: what a step of an epoch takes.
        pace: what the run takes beside its steps.
        cluster: that a data-parallel run ran on; None takes its exposed communication as measured.
    """
    run, parallel_sizes = trace.run, [size for size in trace.world_sizes if size > 1]
    communication: dict[int, _Communication] = {}
    if cluster is not None:
        overlap = not trace.compiled  # a compiled step's gradients become ready together, at its end
        communication = {
            size: _Communication(cluster, size, overlap=overlap, buffers=trace.broadcasts_buffers)
            for size in parallel_sizes
        }
    device = match_device(run.device.name)
    energy = _Energy(trace, device, cluster)
    wrapped = {trace.epochs[0].epoch, *(event.epoch + 1 for event in changes(trace))}  # in front of these epochs
    odd = [epoch.epoch for epoch in trace.epochs if device is not None and not _power_is_plausible(epoch, device)]
    notes = _run_notes(trace, pace, odd)
    if parallel_sizes and cluster is None:
        notes.append("exposed communication is taken as measured, so it adds no error; --cluster predicts it")
    epochs = []
    for epoch in trace.epochs:
        step, parallel = step_of(epoch), None
        if cluster is not None and epoch.world_size in communication:
            step = among(step, cluster, epoch.world_size)
            parallel = communication[epoch.world_size].of(trace.network_of(epoch), step, epoch)
        epochs.append(_check_epoch(trace, epoch, step, pace, device, energy, parallel, epoch.epoch in wrapped))
    measured, predicted = [e.measured_seconds for e in epochs], [e.predicted_seconds for e in epochs]
    measured_s, predicted_s = sum(measured), sum(predicted)
    events_s = paid_s(trace)
    predicted_events_s = (pace.reconfiguration_s or 0.0) * len(measured_changes(trace))
    energies = [epoch.measured_energy_joules for epoch in epochs if epoch.measured_energy_joules is not None]
    predicted_energies = [e.predicted_energy_joules for e in epochs if e.predicted_energy_joules is not None]
    whole_energy = len(energies) == len(epochs) == len(predicted_energies) and not odd
    return RunCheck(
        trace=str(trace.path),
        model=run.model,
        dataset=run.dataset.name,
        device=run.device.name,
        dense=not trace.is_pruned,
        measured_seconds=measured_s + events_s,
        predicted_seconds=predicted_s + predicted_events_s,
        low_seconds=sum(epoch.low_seconds for epoch in epochs) + predicted_events_s,
        high_seconds=sum(epoch.high_seconds for epoch in epochs) + predicted_events_s,
        error=(predicted_s + predicted_events_s) / (measured_s + events_s) - 1,
        measured_mfu_fraction=epochs_utilization(trace, device, zip(trace.epochs, measured, strict=True)),
        predicted_mfu_fraction=epochs_utilization(trace, device, zip(trace.epochs, predicted, strict=True)),
        measured_reconfiguration_seconds=events_s,
        predicted_reconfiguration_seconds=predicted_events_s,
        measured_energy_joules=sum(energies) if whole_energy else None,
        predicted_energy_joules=sum(predicted_energies) if whole_energy else None,
        measured_exposed_communication_seconds=sum(e.measured_exposed_communication_seconds for e in epochs),
        predicted_exposed_communication_seconds=None
        if not communication
        else sum(e.predicted_exposed_communication_seconds or 0.0 for e in epochs),
        epochs=tuple(epochs),
        notes=tuple(notes),
    )


def _run_notes(trace: Trace, pace: _Pace, odd: Sequence[int]) -> list[str]:
    """What a reader must know of the comparison; `odd` are epochs whose energy no such device can have taken."""
    notes = [*pace.doubts, *filter(None, (_unsteady(trace), trace.compiled_note, trace.reductions_note))]
    if not trace.complete:
        of = f" of {trace.planned_epochs}" if trace.planned_epochs else ""
        notes.append(f"the run is not whole: {len(trace.epochs)}{of} epochs are compared")
    if pace.input_s_per_image is None:
        notes.append(f"the time to load {trace.run.dataset.name} was not measured: it counts as 0 s")
    if pace.reconfiguration_s is None and changes(trace):
        notes.append("no reconfiguration was measured: they count as 0 s")
    elif len(measured_changes(trace)) < len(changes(trace)):
        notes.append("reconfigurations that were not measured count as 0 s in both times")
    if odd:
        which = f"epoch {odd[0]}" if len(odd) == 1 else f"{len(odd)} epochs (the first is {odd[0]})"
        device = trace.run.device.name
        notes.append(f"the recorded energy of {which} is impossible for the {device}: energy is not compared")
    return notes


def _unsteady(trace: Trace) -> str | None:
    """What the run's own measurements say of how well anything could predict them; None where they were steady.

    Epochs of one architecture, mini-batch, regulariser and number of ranks do the same work: what their mean steps
    differ by is the machine, and no prediction is meant to follow it.
    """
    alike: dict[object, list[float]] = {}
    for epoch in trace.epochs[1:]:  # the first one warms up
        step_s = (epoch.time.wall_s - epoch.time.data_wait_s) / epoch.num_iterations
        alike.setdefault((work_of(epoch), epoch.regularized), []).append(step_s)
    ratio = max((max(steps) / min(steps) for steps in alike.values() if min(steps) > 0), default=1.0)
    if ratio <= STEADY:
        return None
    return (
        f"epochs that did the same work took up to {ratio:.2f} times as long as each other: the machine was not quiet, "
        "or its clock not steady, and errors up to that are its own"
    )


STEADY = 1.15  # between the slowest and the fastest of epochs that do the same


def _check_epoch(
    trace: Trace,
    epoch: Epoch,
    step: StepTime,
    pace: _Pace,
    device: Device | None,
    energy: _Energy,
    parallel: _Parallel | None,
    wrapped: bool,
) -> EpochCheck:
    network, n = trace.network_of(epoch), epoch.num_iterations
    images = epoch.num_images / epoch.world_size
    exposed_s, beside_s = None, epoch.time.exposed_communication_s
    took = SecondsRange(low_s=step.low_s, expected_s=step.compute_s, high_s=step.high_s)
    if parallel is not None:
        beside_s = parallel.first_exposed_s - parallel.exposed_s if wrapped else 0.0
        took, exposed_s = parallel.step, n * parallel.exposed_s + beside_s
    beside_s += (pace.input_s_per_image or 0.0) * images
    predicted_s = n * took.expected_s + beside_s
    memory = iteration_memory(network, trace.setting_of(epoch), device=device)
    return EpochCheck(
        epoch=epoch.epoch,
        architecture=epoch.architecture,
        batch_per_gpu=epoch.batch_per_gpu,
        num_gpus=epoch.world_size,
        tier=step.tier,
        measured_seconds=epoch.time.wall_s,
        predicted_seconds=predicted_s,
        low_seconds=n * took.low_s + beside_s,
        high_seconds=n * took.high_s + beside_s,
        error=predicted_s / epoch.time.wall_s - 1,
        measured_mfu_fraction=epochs_utilization(trace, device, [(epoch, epoch.time.wall_s)]),
        predicted_mfu_fraction=epochs_utilization(trace, device, [(epoch, predicted_s)]),
        measured_memory_bytes=epoch.peak_memory_bytes,
        predicted_memory_bytes=memory.peak_bytes,
        measured_energy_joules=epoch.device.energy_j if epoch.device else None,
        predicted_energy_joules=energy.joules(step, n, predicted_s),
        measured_exposed_communication_seconds=epoch.time.exposed_communication_s,
        predicted_exposed_communication_seconds=exposed_s,
    )


def fit_power_model(
    trace: Trace, num_epochs: int | None = None, *, cluster: Cluster | None = None
) -> PowerModel | None:
    """The run's GPU's power model, fitted to what NVML sampled in its (first `num_epochs`) epochs.

    On the `cluster` of a data-parallel run its steps count as they are predicted, `among` others. None where nothing
    was sampled, no epoch was profiled, or the catalog does not know the GPU's limits.
    """
    device = match_device(trace.run.device.name)
    if device is None:
        return None
    samples = []
    for epoch in trace.epochs[:num_epochs]:
        network, setting = trace.network_of(epoch), trace.setting_of(epoch)
        profile = find_profile(network, trace.own_profiles, setting.one_pass)
        power_w = epoch.mean_power_w
        if profile is not None and power_w is not None and is_plausible(device, power_w):
            step = recorded_step(network, profile, setting).accumulated(setting.passes)
            step = step if cluster is None else among(step, cluster, epoch.world_size)
            waiting_s = max(epoch.time.wall_s / epoch.num_iterations - step.compute_s, 0.0)
            samples.append(PowerSample(step=step, waiting_s=waiting_s, power_w=power_w))
    return fit_power(device, samples) if samples else None


def _power_is_plausible(epoch: Epoch, device: Device) -> bool:
    power_w = epoch.mean_power_w
    return power_w is None or is_plausible(device, power_w)


class _Energy:
    """The joules of an epoch, from the power of the first epoch: all that a prediction of the later ones may see.

    By its power model, which knows what a step is made of; where the catalog does not know the GPU, by its mean.
    """

    def __init__(self, trace: Trace, device: Device | None, cluster: Cluster | None) -> None:
        several = len(trace.epochs) > 1
        self._power_w = trace.epochs[0].mean_power_w if several else None
        self._model = fit_power_model(trace, 1, cluster=cluster) if several else None
        self._device = device

    def joules(self, step: StepTime, num_iterations: int, predicted_s: float) -> float | None:
        if self._model is not None and self._device is not None:
            waiting_s = max(predicted_s / num_iterations - step.compute_s, 0.0)
            return num_iterations * step_energy(step, self._device, waiting_s=waiting_s, model=self._model).joules
        return None if self._power_w is None else self._power_w * predicted_s
