"""Which runs can be compared with which: a pruned run with the dense run of the same network and data.

Two runs can be compared when they did the same task (`is_same_task`). Their *measured times* tell what pruning saved
only where nothing else that takes time differs (`time_differences`). Projections have the cluster in common, whatever
machines recorded the runs.

Where no dense run was recorded, the pruned run's own first architecture, held for as many epochs, stands in for it.
That baseline was never trained, so it has no accuracy, and everything that shows it says so.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath

import msgspec

from ptsim.optimizers import OPTIMIZERS
from ptsim.textfile import printable
from ptsim.trace.io import trace_name
from ptsim.trace.schema import DeviceUse, Epoch
from ptsim.trace.trace import Trace
from ptsim.units import in_turn


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """A pruned run and what it is measured against, cut to the epochs that both have.

    Attributes:
        label, setting: the pruned run's, as `run_labels` and `setting_labels` say.
        baseline: the dense run, or the pruned run's first architecture held (`trained` is then False).
        trained: the baseline is a recorded run of its own.
        notes: what a reader must know about this comparison.
    """

    label: str
    setting: str
    pruned: Trace
    baseline_label: str
    baseline: Trace
    trained: bool
    notes: tuple[str, ...] = ()

    @property
    def shrank(self) -> bool:
        """The pruned run trained more than one architecture; one that is pruned at its end saves no training time."""
        return len({epoch.architecture for epoch in self.pruned.epochs}) > 1


# Settings that do not change what is trained: runs that differ in nothing else are repeats of one another, unless they
# took another time for it (`_TIME`).
_WITHOUT_EFFECT = frozenset(
    {"seed", "data_dir", "download", "num_workers", "num_threads", "device", "profile", "keep_every"}
    | {"record_channel_maxima", "loggers"}
)


_LONGEST_NAME = 60  # letters of a network's, a data set's or a device's name in a label


def model_name(trace: Trace) -> str:
    """What the network is called, as it can be shown anywhere."""
    return printable(trace.run.model, _LONGEST_NAME)


def data_name(trace: Trace) -> str:
    """What the data is called: a folder of images by the folder's name, everything else by its own."""
    name = trace.run.dataset.name
    folder = str(trace.run.hyperparameters.get("data_dir") or "")
    return printable((PurePath(folder).name or name) if name == "imagefolder" else name, _LONGEST_NAME)


def device_name(trace: Trace) -> str:
    """What the recording device is called."""
    return printable(trace.run.device.name, _LONGEST_NAME)


# What makes the task of a run. Two runs that differ here are never compared.
_TASK: Mapping[str, Callable[[Trace], object]] = {
    "network": lambda trace: str(PurePath(trace.run.model)),  # ./net.py:build is net.py:build
    "data set": data_name,
    "classes": lambda trace: trace.run.dataset.num_classes,
    "training images": lambda trace: trace.run.dataset.num_train,
    "image shape": lambda trace: trace.run.dataset.input_shape,
}


def _first_network(trace: Trace) -> str | None:
    """How large the network was before any pruning: a file of one name may have been edited between two runs."""
    if not trace.epochs:
        return None
    network = trace.network_of(trace.epochs[0])
    return f"{network.num_parameters:,} parameters ({network.forward_macs:,} MACs)"


def _optimizer(trace: Trace) -> str:
    """What updates the weights, and whether it moves a momentum; how large that is takes no time.

    Of a loop of one's own the optimizer's class counts, which may be costed as another one.
    """
    name = str(trace.run.hyperparameters.get("optimizer_class") or trace.optimizer).lower()
    if trace.optimizer not in OPTIMIZERS.own:
        return f"{name} without momentum" if trace.momentum == 0 else name
    kind = OPTIMIZERS.find(trace.optimizer)
    more = kind.states(trace.momentum) - kind.states()
    return name if not more else f"{name} {'with' if more > 0 else 'without'} momentum"


def _compiler(trace: Trace) -> str:
    """What compiles the steps: the backend of torch.compile; "none" of eager steps."""
    return str(trace.run.hyperparameters.get("compile_backend") or "inductor") if trace.compiled else "none"


def _setting_is_on(name: str) -> Callable[[Trace], object]:
    """Whether a setting that is 0, false or nothing by default is something else."""
    return lambda trace: "on" if trace.run.hyperparameters.get(name) else "off"


# What else decides how long a run takes, beside pruning.
_TIME: Mapping[str, Callable[[Trace], object]] = {
    "network at the start": _first_network,
    "device": lambda trace: trace.run.device.name,
    "threads": lambda trace: trace.run.device.num_threads,
    "ranks": lambda trace: in_turn(trace.world_sizes),
    "mini-batch at the start": lambda trace: trace.epochs[0].batch_per_gpu if trace.epochs else None,
    "passes at the start": lambda trace: trace.epochs[0].passes if trace.epochs else None,
    "precision": lambda trace: str(trace.run.precision),
    "memory format": lambda trace: trace.run.memory_format,
    "optimizer": _optimizer,
    "Nesterov's momentum": _setting_is_on("nesterov"),
    "compiler": _compiler,
    "clipping of gradients": _setting_is_on("clip_norm"),
    "average of the weights": _setting_is_on("ema_decay"),
    "synchronised BatchNorm": _setting_is_on("sync_batch_norm"),
    "torch": lambda trace: trace.run.versions.get("torch"),
}


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One thing in which a pruned run and a dense run differ."""

    what: str
    pruned: object
    dense: object

    def __str__(self) -> str:
        """As a phrase: "device B100 with A100"."""
        return f"{self.what} {self.pruned} with {self.dense}"


def task_of(trace: Trace) -> str:
    """What the run was to learn and from what, in words: equal for runs of the same task alone."""
    return ", ".join(f"{what} {printable(str(of(trace)), 200)}" for what, of in _TASK.items())


def is_same_task(one: Trace, other: Trace) -> bool:
    """Both trained the same network on the same data, so that they can be compared at all."""
    return not _differences(_TASK, one, other)


def time_differences(pruned: Trace, dense: Trace) -> list[Difference]:
    """By what, other than pruning, two runs differ that takes time.

    Empty where the difference of their measured times is pruning's alone.
    """
    return _differences({**_TASK, **_TIME}, pruned, dense)


def _differences(aspects: Mapping[str, Callable[[Trace], object]], pruned: Trace, dense: Trace) -> list[Difference]:
    return [
        Difference(what=what, pruned=of(pruned), dense=of(dense))
        for what, of in aspects.items()
        if of(pruned) != of(dense)
    ]


def run_labels(traces: Sequence[Trace]) -> list[str]:
    """A short name for every run, unique among them: what was trained and how, then only what tells them apart."""
    parts = [
        (
            model_name(trace),
            data_name(trace),
            _method(trace),
            *_pruning_settings(trace),
            _mini_batch(trace),
            device_name(trace),
            f"seed {trace.run.seed}",
            printable(trace_name(trace.path), _LONGEST_NAME),
        )
        for trace in traces
    ]
    varying = [len({value for value in column if value}) > 1 for column in zip(*parts, strict=True)]
    kept = [index for index in (0, 1) if varying[index]] + [2]
    for index in range(3, len(varying)):
        if varying[index] and len({tuple(part[i] for i in kept) for part in parts}) < len(parts):
            kept.append(index)
    labels = [", ".join(part[i] for i in kept if part[i]) for part in parts]
    return [
        f"{label} ({labels[:i].count(label) + 1})" if labels.count(label) > 1 else label
        for i, label in enumerate(labels)
    ]


def setting_labels(traces: Sequence[Trace]) -> list[str]:
    """A name for every run's setting: runs that differ by seed only share theirs, so that they can be averaged."""
    keys = [_setting_key(trace) for trace in traces]
    first: dict[str, Trace] = {}
    for key, trace in zip(keys, traces, strict=True):
        first.setdefault(key, trace)
    names = dict(zip(first, run_labels(list(first.values())), strict=True))
    return [names[key] for key in keys]


def compare_runs(traces: Sequence[Trace]) -> list[Comparison]:
    """A comparison for every pruned run with at least one epoch.

    The baseline is the dense run of the same model, data set and image shape. Among several it is the closest: by the
    network that they begin with, then by device, first mini-batch, what else takes time, and seed.
    """
    comparisons = []
    labels = run_labels(traces)
    dense = [(label, t) for label, t in zip(labels, traces, strict=True) if t.epochs and not t.is_pruned]
    for label, setting, trace in zip(labels, setting_labels(traces), traces, strict=True):
        if not trace.is_pruned or not trace.epochs:
            continue
        candidates = [(name, t) for name, t in dense if is_same_task(t, trace)]
        if not candidates:
            made = "planned" if trace.is_planned else "recorded"
            note = f"no dense run was {made}: the first architecture, held for every epoch, stands in for it"
            held = f"{trace.mark}dense, held"
            comparisons.append(
                Comparison(
                    label=label,
                    setting=setting,
                    pruned=trace,
                    baseline_label=f"{held} ({label})" if len(traces) > 1 else held,
                    baseline=held_dense(trace),
                    trained=False,
                    notes=(note,),
                )
            )
            continue
        baseline_label, baseline = max(candidates, key=lambda named: _closeness(named[1], trace))
        length = min(len(trace.epochs), len(baseline.epochs))
        comparisons.append(
            Comparison(
                label=label,
                setting=setting,
                pruned=first_epochs(trace, length),
                baseline_label=baseline_label,
                baseline=first_epochs(baseline, length),
                trained=True,
                notes=tuple(_notes(trace, baseline, length)),
            )
        )
    return comparisons


PACE_TOLERANCE = 0.05


def pace(comparison: Comparison) -> float | None:
    """Time of the unpruned network in the pruned run over its time in the dense run, without the regulariser.

    The same network with the same mini-batch and passes on the same device should take the same time in both; where it
    does not, the machine ran at another speed, and the ratio of the two runs' measured times is not pruning's alone.
    Medians over epochs. None where the two runs share no such network.
    """
    first = comparison.pruned.epochs[0]
    pruned, dense = (
        [
            (epoch.time.wall_s - epoch.time.regularizer_s) / epoch.num_images
            for epoch in trace.epochs
            if epoch.measured_time is not None and work_of(epoch) == work_of(first)
        ]
        for trace in (comparison.pruned, comparison.baseline)
    )
    if not comparison.trained or not dense or not pruned or time_differences(comparison.pruned, comparison.baseline):
        return None
    return statistics.median(pruned) / statistics.median(dense)


def _notes(trace: Trace, baseline: Trace, length: int) -> list[str]:
    """In what, other than pruning, the two runs differ."""
    notes = []
    if len(trace.epochs) != len(baseline.epochs):
        notes.append(
            f"the runs have {len(trace.epochs)} and {len(baseline.epochs)} epochs; the first {length} are compared"
        )
    notes += [
        f"the runs differ in the {d.what}: {d.pruned} and {d.dense} (dense)" for d in time_differences(trace, baseline)
    ]
    return notes


def first_epochs(trace: Trace, count: int) -> Trace:
    """The run as if it had ended after `count` epochs; a run that is no longer than that is returned as it is."""
    if count >= len(trace.epochs):
        return trace
    kept = trace.epochs[:count]
    return msgspec.structs.replace(
        trace,
        epochs=kept,
        reconfigurations=tuple(r for r in trace.reconfigurations if r.epoch + 1 < count),
        end=None,
    )


def held_dense(trace: Trace) -> Trace:
    """The run's first architecture, mini-batch, passes and ranks, held for all its epochs without regulariser.

    Times of the held epochs are those of the median recorded epoch of that architecture, less its regulariser; its GPU
    takes the same power.
    """
    first = trace.epochs[0]
    same = [epoch for epoch in trace.epochs if work_of(epoch) == work_of(first)]
    timed = [epoch for epoch in same if epoch.measured_time is not None]
    typical, time, device = first, first.measured_time, first.device
    if timed:
        typical = sorted(timed, key=lambda epoch: epoch.time.wall_s)[len(timed) // 2]
        wall_s = typical.time.wall_s - typical.time.regularizer_s
        time = msgspec.structs.replace(typical.time, wall_s=wall_s, regularizer_s=0.0)
        device = _in_seconds(typical, wall_s)

    def held(epoch: Epoch) -> Epoch:
        return msgspec.structs.replace(
            typical,
            epoch=epoch.epoch,
            learning_rate=first.learning_rate,
            penalty_coefficient=0.0,
            penalty=0.0,
            train_loss=None,
            train_accuracy=None,
            validation_loss=None,
            validation_accuracy=None,
            channel_sparsity=0.0,
            weight_sparsity=0.0,
            measured_time=time,
            device=device,
            densities=(),
            channel_maxima=None,
        )

    epochs = tuple(held(epoch) for epoch in trace.epochs)
    steps = sum(epoch.num_iterations for epoch in epochs)
    measured = {"final_accuracy": None, "wall_s": None, "energy_j": None}
    end = trace.end and msgspec.structs.replace(trace.end, num_iterations=steps, **measured)
    return msgspec.structs.replace(
        trace,
        networks={first.architecture: trace.networks[first.architecture]},
        epochs=epochs,
        end=end,
        reconfigurations=(),
        draws=(),
        profiles=tuple(profile for profile in trace.profiles if profile.architecture == first.architecture),
    )


def _in_seconds(epoch: Epoch, wall_s: float) -> DeviceUse | None:
    """What the epoch's GPU would have used in so many seconds at the same power."""
    use = epoch.device
    if use is None or use.energy_j is None or not epoch.time.wall_s:
        return use
    return msgspec.structs.replace(use, energy_j=use.energy_j * wall_s / epoch.time.wall_s)


def work_of(epoch: Epoch) -> tuple[str, int, int, int]:
    """What a step computes, but for the penalty, and among how many ranks."""
    return epoch.architecture, epoch.batch_per_gpu, epoch.passes, epoch.world_size


def _method(trace: Trace) -> str:
    if not trace.is_pruned:
        return f"{trace.mark}dense"
    if trace.criterion is None:  # another library has pruned it
        return f"{trace.mark}pruned"
    if asked := trace.run.hyperparameters.get("pruning"):  # of a plan
        return trace.mark + printable(", ".join(str(asked).split(",")), _LONGEST_NAME)
    schedule = str(trace.run.hyperparameters.get("schedule", "continuous"))
    name = {"one_time": "one-time pruning", "ssl": "SSL"}.get(schedule, "PruneTrain")
    ratio = trace.penalty_ratio
    return trace.mark + (name if ratio is None else f"{name} r={ratio:g}")


def _mini_batch(trace: Trace) -> str:
    if not trace.epochs:
        return "no epochs"
    batch, passes = trace.epochs[0].batch_per_gpu, trace.epochs[0].passes
    return f"mini-batch {batch}" + (f" in {passes} passes" if passes > 1 else "")


def _pruning_settings(trace: Trace) -> tuple[str, str, str]:
    if not trace.is_pruned:
        return "", "", ""
    settings = trace.run.hyperparameters
    batch = "dynamic mini-batch" if settings.get("dynamic_batch") else "fixed mini-batch"
    mode = printable(str(settings.get("mode", "union")), _LONGEST_NAME)
    interval = settings.get("interval")
    return batch, mode, "" if interval is None else printable(f"interval {interval}", _LONGEST_NAME)


def _setting_key(trace: Trace) -> str:
    run = trace.run
    decisive = {name: value for name, value in run.hyperparameters.items() if name not in _WITHOUT_EFFECT}
    aspects = (of(trace) for of in (*_TASK.values(), *_TIME.values()))
    return json.dumps([*aspects, decisive], sort_keys=True, default=str)


def _closeness(candidate: Trace, trace: Trace) -> tuple[int, ...]:
    return (
        _first_network(candidate) == _first_network(trace),
        candidate.run.device.name == trace.run.device.name,
        candidate.epochs[0].batch_per_gpu == trace.epochs[0].batch_per_gpu,
        -len(time_differences(trace, candidate)),
        candidate.run.seed == trace.run.seed,
        min(len(candidate.epochs), len(trace.epochs)),
    )
