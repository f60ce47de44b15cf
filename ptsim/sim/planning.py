"""What is trained when: the epochs of a projection, each with its network, mini-batch and number of steps."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ptsim.costs.memory import iteration_memory, largest_batch
from ptsim.errors import UsageError
from ptsim.network import Network
from ptsim.sim.rounding import rounded
from ptsim.sim.scenario import Scenario
from ptsim.trace.pace import changes
from ptsim.trace.schema import Epoch

_NOTED_ROOM = 0.02  # share of an epoch's steps that are not full, above which a note says so


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """An epoch as it will be projected."""

    epoch: Epoch
    network: Network
    id: str  # the network's
    batch: int
    num_iterations: int
    new: bool  # the network differs from the epoch before, so that the run reconfigures in front of it


class RunPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All epochs, and what was assumed."""

    stages: tuple[Stage, ...]
    notes: tuple[str, ...]


def plan_run(scenario: Scenario) -> RunPlan:
    """The epochs that the options ask for.

    Raises:
        UsageError: a one-time reconfiguration after the last epoch, or a mini-batch with fewer images than
            micro-batches.
    """
    planner = _Planner(scenario)
    stages = planner.stages()
    planner.note_assumptions(stages)
    return RunPlan(stages=tuple(stages), notes=tuple(planner.notes))


class _Planner:
    """A plan under way, and the notes that accumulate."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario, self.options, self.num_gpus = scenario, scenario.options, scenario.num_gpus
        self.epochs = scenario.trace.epochs
        self.notes: list[str] = []
        self.uneven: set[int] = set()  # global mini-batches that do not divide by the GPUs

    def stages(self) -> list[Stage]:
        options, epochs = self.options, self.epochs
        dense = epochs[0]
        chosen: list[Epoch] = list(epochs)
        if options.one_time_epoch is not None:
            k = options.one_time_epoch
            if k >= len(epochs):
                raise UsageError(f"one_time_epoch is {k}, the trace has {len(epochs)} epochs")
            chosen = [dense if epoch.epoch < k else epochs[k] for epoch in epochs]
        stages: list[Stage] = []
        batch = 0
        for epoch, source in zip(epochs, chosen, strict=True):
            network, identity = self._network(source)
            new = not stages or identity != stages[-1].id
            batch = self._batch(source, network, identity, previous=batch, new=new, epoch=epoch.epoch)
            stages.append(
                Stage(
                    epoch=epoch,
                    network=network,
                    id=identity,
                    batch=batch,
                    num_iterations=epoch.iterations_with(batch, self.num_gpus),
                    new=new and bool(stages),
                )
            )
        return stages

    def _network(self, epoch: Epoch) -> tuple[Network, str]:
        trace, first = self.scenario.trace, self.epochs[0]
        network = trace.network_of(epoch)
        multiple = self.options.channel_multiple
        if multiple == 1:
            return network, epoch.architecture

        def make() -> tuple[Network, str]:
            changed = rounded(network, multiple, trace.network_of(first))
            return changed, changed.id

        return self.scenario.cache.get(("rounded", epoch.architecture, multiple, first.architecture), make)

    def _batch(self, source: Epoch, network: Network, identity: str, *, previous: int, new: bool, epoch: int) -> int:
        """The per-GPU mini-batch of an epoch."""
        options = self.options
        recorded = self.epochs[0] if options.minibatch != "recorded" else source
        per_gpu = recorded.batch_per_gpu
        if options.scaling == "strong":
            total = recorded.batch_per_gpu * recorded.world_size
            per_gpu = max(1, -(-total // self.num_gpus))
            if options.minibatch != "planned" and total % self.num_gpus:
                self.uneven.add(total)
        if options.minibatch != "planned" or (previous and not new):
            return previous or per_gpu if options.minibatch == "planned" else per_gpu
        most = self._largest_batch(source, network, identity)
        if not previous:
            if options.max_batch is not None and options.max_batch < per_gpu:
                self.notes.append(
                    f"mini-batch {per_gpu} is more than max_batch: the run begins with {options.max_batch}"
                )
                per_gpu = options.max_batch
            if most and most < per_gpu and not self._fits(source, network, identity, per_gpu):
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

    def _largest_batch(self, source: Epoch, network: Network, identity: str) -> int:
        """The largest mini-batch per GPU that fits; gradient accumulation needs the memory of one micro-batch."""
        scenario, options = self.scenario, self.options
        limit = source.num_images // self.num_gpus  # one step per epoch is the most that the data set can fill
        limit = min(limit, options.max_batch or limit)
        setting = scenario.memory_setting(max(1, limit), source)
        granularity = setting.passes * options.batch_granularity
        buckets = scenario.buckets(network, identity)
        return scenario.cache.get(
            ("batch", identity, limit, scenario.memory_bytes, scenario.device_key, setting, buckets, granularity),
            lambda: largest_batch(
                network,
                setting,
                capacity_bytes=scenario.memory_bytes,
                granularity=granularity,
                limit=limit,
                device=scenario.device,
                buckets=buckets,
            ),
        )

    def _fits(self, source: Epoch, network: Network, identity: str, batch: int) -> bool:
        scenario = self.scenario
        setting = scenario.memory_setting(batch, source)
        need = iteration_memory(network, setting, device=scenario.device, buckets=scenario.buckets(network, identity))
        return need.device_bytes <= scenario.memory_bytes

    def note_assumptions(self, stages: Sequence[Stage]) -> None:
        trace, options, epochs = self.scenario.trace, self.options, self.epochs
        note = self.notes.append
        if not trace.complete:
            of = f" of {trace.planned_epochs}" if trace.planned_epochs else ""
            why = "interrupted" if trace.end is not None else "truncated or unfinished"
            note(f"the trace is {why}: only its {len(epochs)}{of} recorded epochs are projected")
        elif len(epochs) == 1:
            note("the trace has a single epoch")
        per_node = self.scenario.cluster.gpus_per_node
        full, rest = divmod(self.num_gpus, per_node)
        if rest and full:
            note(f"{self.num_gpus:,} GPUs do not fill nodes of {per_node}: {full} full and one with {rest} are assumed")
        if options.scaling == "strong":
            self._note_uneven()
        num_recorded = sum(event.measured_duration_s is not None for event in changes(trace))
        if num_recorded < 2 and options.surgery_s is None and any(stage.new for stage in stages):
            note(
                "a single reconfiguration was recorded: the interval leaves out how much their times scatter"
                if num_recorded
                else "no reconfiguration was measured: each is taken to need 0.21 s, as a ResNet-50 did on one core"
            )
        if options.one_time_epoch is not None and changes(trace) and not any(stage.new for stage in stages):
            note(f"the network of epoch {options.one_time_epoch} is still the first one: nothing is reconfigured")
        passes = max(epoch.passes for epoch in epochs)
        if options.micro_batches is None and passes > 1:
            note(f"gradients accumulate over up to {passes} passes of a mini-batch, as recorded")
        if options.mixed_devices:
            note(f"devices are mixed: memory and energy are those of the {self.scenario.device.name} alone")
        room = [stage.num_iterations * stage.batch * self.num_gpus / stage.epoch.num_images for stage in stages]
        if max(room) > 2:
            note("one global mini-batch holds more images than an epoch has: one step per epoch is projected")
        elif max(room) > 1 + _NOTED_ROOM:
            note(
                f"the last mini-batch of an epoch is not full and counts as a whole step: up to {max(room) - 1:.0%} "
                "more than the images need"
            )
        if any(stage.batch < (options.micro_batches or 1) for stage in stages):
            raise UsageError(
                f"micro_batches is {options.micro_batches}, more than the "
                f"{min(stage.batch for stage in stages)} images of a GPU's mini-batch"
            )
        if trace.is_planned:
            keeps_up = options.input == "none" and not isinstance(options.input_images_per_s, int | float)
            note(
                "the run is planned: nobody has trained it"
                + ("; the input pipeline is assumed to keep up" if keeps_up else "")
            )
            for assumption in trace.run.assumed:
                note(assumption.note)
        times = [epoch.measured_time for epoch in epochs if epoch.measured_time is not None]
        waited = sum(time.data_wait_s for time in times) / max(1e-12, sum(time.wall_s for time in times))
        if waited > 0.05 and options.input_images_per_s is None and options.input == "none":
            note(
                f"the recorded run waited for data {waited:.0%} of the time; the projection assumes an input pipeline "
                "that keeps up"
            )
        if trace.compiled_note is not None:
            note(trace.compiled_note)
        if trace.reductions_note is not None and self.num_gpus > 1:
            note(trace.reductions_note)
        if not self.scenario.overlap and options.overlap is None and self.num_gpus > 1:
            note("the recorded step was compiled: its gradients become ready together, so nothing hides all-reduces")

    def _note_uneven(self) -> None:
        if self.uneven:
            total = min(self.uneven)
            per_gpu = -(-total // self.num_gpus)
            self.notes.append(
                f"{self.num_gpus:,} GPUs cannot share a global mini-batch of {total} evenly: "
                f"rounded up to {per_gpu} per GPU, {per_gpu * self.num_gpus:,} in all"
            )
