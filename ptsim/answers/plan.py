"""What would a run look like that nobody has trained? A trace with architectures and iterations, marked as planned.

The entry point of `ptsim.plan` and `ptsim plan`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ptsim.answers.plan_options import PlanOptions
from ptsim.costs.flops import inference_macs, training_macs
from ptsim.costs.traffic import batch_norm_bytes
from ptsim.errors import UsageError
from ptsim.network import MemoryFormat, Network, Precision
from ptsim.optimizers import OPTIMIZERS
from ptsim.setting import changed, parse_precision
from ptsim.trace import pace
from ptsim.trace.schema import (
    MOST_EPOCHS,
    NO_DEVICE,
    SCHEMA_VERSION,
    Dataset,
    Draw,
    End,
    Epoch,
    Reconfiguration,
    Run,
    gone_share,
)
from ptsim.trace.trace import Trace, product_sizes
from ptsim.units import listed, time_stamp

if TYPE_CHECKING:
    from ptsim.prune.trajectories.build import Dense, Step
    from ptsim.prune.trajectories.problem import Trajectory

TOLERANCE = 0.005  # how far a planned fraction may be from its target
DEFAULT_INTERVAL = 5
MOST_DRAWS = 100
_MOST_RECONFIGURATIONS = 1000  # each takes a network to be made and counted
_PROPOSALS = 6  # fractions near those that cannot be, which are tried out before they are proposed
_CORRECTIONS = 2  # of the table that turns widths into costs, which bring nothing any more; most plans need none


class Fractions(msgspec.Struct, frozen=True, kw_only=True):
    """A run's costs over those of its first network, held. `inference` is of the network that the run ends with."""

    training_flops_fraction: float
    inference_flops_fraction: float
    bn_bytes_fraction: float
    allreduce_bytes_fraction: float
    architectures: int


class _Asked(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a plan, complete and checked."""

    model: str
    images: int
    dataset: str
    num_classes: int
    input_shape: tuple[int, int, int]
    epochs: int
    batch: int
    gpus: int
    interval: int
    pruning: str
    precision: Precision
    memory_format: MemoryFormat
    optimizer: str
    seed: int

    @property
    def events(self) -> tuple[int, ...]:
        """Epochs after which the network is reconfigured: every `interval`, and the last."""
        return tuple(e for e in range(self.epochs) if (e + 1) % self.interval == 0 or e + 1 == self.epochs)


def plan(model: str, options: PlanOptions | None = None, **changes: Any) -> Trace:
    """The trace of a run that nobody has trained.

        ptsim.plan("torchvision:resnet50", images=1_281_167, epochs=90, batch=64, gpus=4, interval=5,
                   pruning="training=0.60,inference=0.47")

    Args:
        model: a zoo name, torchvision:NAME or path/to/file.py:function.
        options: see `ptsim.answers.plan_options.PlanOptions`.
        **changes: single options by name, on top of `options`.

    Raises:
        UnknownNameError: an option, an optimizer or a kind of pruning that does not exist.
        UsageError: a missing or wrong option, or a pruning that this network cannot have.
        UnsupportedModelError: the network cannot be traced.
    """
    from ptsim import zoo
    from ptsim.prune.trajectories import find_kind

    wanted = changed(options or PlanOptions(), changes)
    if not 1 <= wanted.draws <= MOST_DRAWS:
        raise UsageError(f"draws is {wanted.draws}, expected 1 to {MOST_DRAWS}")
    kind = find_kind(wanted.pruning)
    asked = _asked(model, wanted)
    from ptsim.prune.trajectories.build import dense_network  # imports torch: what is missing has been told by now

    entry = zoo.find(model)
    dense = dense_network(
        lambda: entry.make(wanted.num_classes, usual=asked.num_classes),
        name=model,
        input_shape=asked.input_shape,
        num_classes=asked.num_classes,
    )
    if not dense.edges and asked.pruning != "none":
        raise UsageError(f"{model} has no channel that can be pruned")
    typical, *others = _planned(asked, dense, kind, wanted.draws)
    return _with_draws(typical, others)


def _with_draws(typical: Trace, others: Sequence[Trace]) -> Trace:
    """The typical run with the networks that the others would train."""
    draws = []
    for other in others:
        course = {0: other.epochs[0].architecture}
        course |= {event.epoch + 1: event.after for event in pace.changes(other)}
        draws.append(Draw(seed=other.run.seed, architectures=tuple(course.items())))
    networks = {name: network for trace in (typical, *others) for name, network in trace.networks.items()}
    return msgspec.structs.replace(typical, networks=networks, draws=tuple(draws))


def fractions(trace: Trace) -> Fractions:
    """What a run's pruning saves, without a clock: over its first network held for as many iterations.

    Raises:
        UsageError: the trace has no epoch.
    """
    if not trace.epochs:
        raise UsageError(f"{trace.path} has no epoch")
    first = trace.network_of(trace.epochs[0])
    trained: dict[str, list[Epoch]] = {}
    for epoch in trace.epochs:
        trained.setdefault(epoch.architecture, []).append(epoch)
    spent = zip(*(_spent(trace.networks[name], epochs) for name, epochs in trained.items()), strict=True)
    held = _spent(first, trace.epochs)
    training, bn, allreduce = (sum(part) / whole if whole else 1.0 for part, whole in zip(spent, held, strict=True))
    return Fractions(
        training_flops_fraction=training,
        inference_flops_fraction=inference_macs(trace.final_network) / max(inference_macs(first), 1),
        bn_bytes_fraction=bn,
        allreduce_bytes_fraction=allreduce,
        architectures=len(
            {epoch.architecture for epoch in trace.epochs} | {event.after for event in trace.reconfigurations}
        ),
    )


def _spent(network: Network, epochs: Sequence[Epoch]) -> tuple[int, int, int]:
    """Training MACs, BatchNorm bytes and all-reduced bytes of a network that is trained for these epochs."""
    images, updates = sum(e.num_images for e in epochs), sum(e.num_iterations for e in epochs)
    batches = sum(e.num_iterations * e.passes * e.world_size for e in epochs)
    macs = training_macs(network, images=images, mini_batches=batches)
    return macs, images * batch_norm_bytes(network, 4), updates * network.gradient_bytes


def _asked(model: str, options: PlanOptions) -> _Asked:
    """The options with what the model and a published run say where they are None, checked."""
    from ptsim import zoo
    from ptsim.prune.trajectories.catalog import published_runs

    published = published_runs().get(options.pruning)
    if published is None:
        _check_given(options)
    entry = zoo.find(model)

    def given(name: str, value: int | None, default: int | None = None) -> int:
        if value is None and published is not None:
            value = getattr(published, name)
        if value is None:
            value = default
        assert value is not None, "what has no default was given"
        if value < 1:
            raise UsageError(f"{name} is {value}, expected at least 1")
        return value

    images, epochs = given("images", options.images), given("epochs", options.epochs)
    interval = given("interval", options.interval, DEFAULT_INTERVAL)
    num_classes = given("classes", options.num_classes, entry.num_classes)
    shape = options.input_shape or entry.input_shape
    asked = _Asked(
        model=model,
        images=images,
        dataset=_data_name(options.dataset, images, num_classes, shape),
        num_classes=num_classes,
        input_shape=shape,
        epochs=epochs,
        batch=given("batch", options.batch),
        gpus=given("gpus", options.gpus, 1),
        interval=interval if options.interval is not None else min(interval, epochs),
        pruning=options.pruning,
        precision=parse_precision(options.precision),
        memory_format=options.memory_format,
        optimizer=options.optimizer,
        seed=options.seed,
    )
    _check(asked)
    return asked


def _check_given(options: PlanOptions) -> None:
    """Refuse a run of which nobody says how long it is, before torch is imported.

    Raises:
        UsageError: names all that is missing.
    """
    missing = [name for name in ("images", "epochs", "batch") if getattr(options, name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UsageError(
            f"{listed(missing)} {verb} needed to plan a run",
            hint=f"give {listed([f'--{name}' for name in missing])}, or the name of a published run as --pruning",
        )


def _check(asked: _Asked) -> None:
    """Refuse a run that cannot be planned.

    Raises:
        UnknownNameError: no such optimizer.
        UsageError: a number out of its bounds, or more images a step than the data set has.
    """
    if asked.epochs > MOST_EPOCHS:
        raise UsageError(f"epochs is {asked.epochs}, expected at most {MOST_EPOCHS}")
    if len(asked.events) > _MOST_RECONFIGURATIONS:
        raise UsageError(
            f"a run of {asked.epochs} epochs is reconfigured {len(asked.events)} times with the interval "
            f"{asked.interval}, at most {_MOST_RECONFIGURATIONS} are planned"
        )
    if asked.interval > asked.epochs:
        raise UsageError(f"interval is {asked.interval}, more than the {asked.epochs} epochs of the run")
    OPTIMIZERS.find(asked.optimizer)
    if min(asked.input_shape) < 1:
        raise UsageError(f"input_shape is {asked.input_shape}, expected three positive numbers")
    if asked.seed < 0:
        raise UsageError(f"seed is {asked.seed}, expected at least 0")
    if asked.batch * asked.gpus > asked.images:
        raise UsageError(
            f"one step takes {asked.batch * asked.gpus:,} images, {asked.batch:,} on each GPU; the data set has "
            f"{asked.images:,}"
        )


# Training images, classes and, where all have one, shape of the images of published data sets; CIFAR as ptsim calls it.
_KNOWN_DATA: Mapping[str, tuple[int, int, tuple[int, int, int] | None]] = {
    "ImageNet": (1_281_167, 1000, None),
    "cifar10": (50_000, 10, (3, 32, 32)),
    "cifar100": (50_000, 100, (3, 32, 32)),
}


def _data_name(given: str | None, images: int, num_classes: int, input_shape: tuple[int, int, int]) -> str:
    """What the data are called: as given, by the size of a known data set, or by the number of images."""
    if given is not None and not given.strip():
        raise UsageError("dataset is empty, expected a name")
    known = (
        name
        for name, (count, classes, shape) in _KNOWN_DATA.items()
        if (images, num_classes) == (count, classes) and shape in (None, input_shape)
    )
    return given or next(known, f"{images:,} images")


class _Search(msgspec.Struct, frozen=True, kw_only=True):
    """What a search came to: the plan that has what is aimed at, if any, and what all that were made have.

    `refusal` says why where nothing can have it, whatever the widths; then `reached` has what is nearest. `trajectory`
    and `steps` are those of the last network sequence that was made.
    """

    trace: Trace | None
    aimed: dict[str, float]
    reached: tuple[dict[str, float], ...]
    refusal: str | None = None
    trajectory: Trajectory | None = None
    steps: Sequence[Step] = ()


def _planned(asked: _Asked, dense: Dense, kind: object, draws: int) -> list[Trace]:
    """A plan for each of so many seeds."""
    planned: list[Trace] = []
    for seed in range(asked.seed, asked.seed + draws):
        drawn = msgspec.structs.replace(asked, seed=seed)
        search = _search(drawn, dense, kind)
        if search.trace is None:
            raise _refusal(drawn, dense, search, range(asked.seed, asked.seed + draws))
        planned.append(search.trace)
    return planned


def _search(asked: _Asked, dense: Dense, kind: object, *, tries_all: bool = True) -> _Search:
    """The plan that has what is aimed at, if there is one.

    Trying out what channels do that pass a reshape takes most of the time. So networks are made without, until one
    search has come to an end; then all networks of its plan are tried out, or the last of them alone.
    """
    if not dense.takes_trying_out:
        return _searched(asked, dense, kind, sure=True)
    try:
        search = _searched(asked, dense, kind, sure=False)
        if search.trajectory is None:
            return search
        widths = search.trajectory.widths
        rows = slice(None) if search.trace is not None and tries_all else slice(-1, None)
        steps = list(dense.reconfigured(widths[rows]))
        if [step.network.id for step in steps] == [step.network.id for step in search.steps[rows]]:
            return search
    except Exception:  # the model's own code runs here, on channels that were mixed up
        pass
    return _searched(asked, dense, kind, sure=True)


def _searched(asked: _Asked, dense: Dense, kind: object, *, sure: bool) -> _Search:
    from ptsim.prune.trajectories.problem import Kind, Problem
    from ptsim.prune.trajectories.targets import OutOfReachError

    make: Kind = kind  # type: ignore[assignment] # of `find_kind`
    table = dense.table
    best: dict[str, float] = {}
    found: list[dict[str, float]] = []
    aimed, since = {}, 0
    trajectory, steps = None, []
    while since < _CORRECTIONS:
        problem = Problem(
            model=asked.model,
            edges=dense.edges,
            epochs=asked.epochs,
            events=asked.events,
            table=table,
            seed=asked.seed,
        )
        try:
            trajectory = make(asked.pruning, problem)
        except OutOfReachError as error:
            if found:
                break
            return _Search(trace=None, aimed=error.aimed, reached=(error.nearest,), refusal=error.message)
        steps = list(dense.reconfigured(trajectory.widths, sure=sure))
        trace = _trace(asked, dense, trajectory, steps)
        aimed, reached = trajectory.targets, _reached(trace, trajectory)
        found.append(reached)
        if _miss(reached, aimed) <= TOLERANCE:
            return _Search(trace=trace, aimed=aimed, reached=tuple(found), trajectory=trajectory, steps=steps)
        since += 1
        if not best or _miss(reached, aimed) < 0.8 * _miss(best, aimed):
            best, since = reached, 0
        table = table.corrected(trajectory.widths, dense.network, [step.network for step in steps])
    return _Search(trace=None, aimed=aimed, reached=tuple(found), trajectory=trajectory, steps=steps)


def _refusal(asked: _Asked, dense: Dense, search: _Search, seeds: Sequence[int]) -> UsageError:
    """Says what comes nearest, on both sides where both are found, and how to ask for what can be planned.

    Args:
        asked: what the search was for, its seed too.
        dense: the network.
        search: what it came to.
        seeds: all that are to be planned.
    """
    if search.refusal is not None:
        return UsageError(search.refusal, hint=_proposal(asked, dense, search, seeds))
    aimed, reached = search.aimed, search.reached
    nearest, other = _sides(aimed, reached)
    if other is None:
        name = _farthest(nearest, aimed)
        beyond = _search_for(asked, dense, aimed | {name: 2 * aimed[name] - nearest[name]})
        if beyond is not None and beyond.refusal is None:
            reached += beyond.reached
            nearest, other = _sides(aimed, reached)
    wanted, found = (", ".join(f"{name}={round(value, 3):g}" for name, value in of.items()) for of in (aimed, nearest))
    if other is not None:
        found += f", on the other side {', '.join(f'{name}={round(value, 3):g}' for name, value in other.items())}"
    return UsageError(
        f"no pruning of {asked.model} was found that has {wanted}; the nearest has {found}",
        hint=_proposal(asked, dense, msgspec.structs.replace(search, reached=reached), seeds),
    )


def _proposal(asked: _Asked, dense: Dense, search: _Search, seeds: Sequence[int]) -> str | None:
    """The nearest `--pruning` that was tried and planned for all seeds, as a hint; None where none of the first was.

    Fractions that a network has are no promise: a search for them may go another way and miss them.
    """
    from ptsim.prune.trajectories import find_kind
    from ptsim.prune.trajectories.catalog import with_targets

    waiting: dict[str, float] = {}  # how far each is
    tried: list[str] = []

    def note(pruning: str, found: Sequence[dict[str, float]]) -> None:
        for reached in found:
            if min(reached.values()) < 1 - TOLERANCE:  # else nothing is pruned
                waiting.setdefault(with_targets(pruning, reached), _miss(reached, search.aimed))

    try:
        note(asked.pruning, search.reached)
    except UsageError:  # a pruning that takes no fractions
        return None
    while len(tried) < _PROPOSALS and (left := waiting.keys() - tried):
        tried.append(min(left, key=waiting.__getitem__))
        again = msgspec.structs.replace(asked, pruning=tried[-1])
        kind = find_kind(tried[-1])
        for seed in seeds:
            found = _search(msgspec.structs.replace(again, seed=seed), dense, kind, tries_all=False)
            if found.trace is None:
                note(tried[-1], found.reached)
                break
        else:
            return f"--pruning {tried[-1]} asks for the nearest that can be planned"
    return None


def _search_for(asked: _Asked, dense: Dense, targets: Mapping[str, float]) -> _Search | None:
    """The same run with other targets; None where its pruning takes none, or not these."""
    from ptsim.prune.trajectories import find_kind
    from ptsim.prune.trajectories.catalog import with_targets

    try:
        pruning = with_targets(asked.pruning, targets)
        return _search(msgspec.structs.replace(asked, pruning=pruning), dense, find_kind(pruning))
    except UsageError:
        return None


def _sides(
    aimed: Mapping[str, float], reached: Sequence[dict[str, float]]
) -> tuple[dict[str, float], dict[str, float] | None]:
    """What is nearest, and what is nearest of those that miss its farthest fraction to the other side."""
    nearest = min(reached, key=lambda found: _miss(found, aimed))
    name = _farthest(nearest, aimed)
    above = nearest[name] > aimed[name]
    others = [found for found in reached if (found[name] > aimed[name]) != above]
    return nearest, min(others, key=lambda found: _miss(found, aimed), default=None)


def _farthest(reached: Mapping[str, float], aimed: Mapping[str, float]) -> str:
    """The fraction that is farthest from its target."""
    return max(aimed, key=lambda name: abs(reached[name] - aimed[name]))


def _reached(trace: Trace, trajectory: Trajectory) -> dict[str, float]:
    """The fractions that have a target."""
    found = fractions(trace)
    reached = {
        "training": found.training_flops_fraction,
        "inference": found.inference_flops_fraction,
        "bn": found.bn_bytes_fraction,
    }
    return {name: reached[name] for name in trajectory.targets}


def _miss(reached: Mapping[str, float], aimed: Mapping[str, float]) -> float:
    """How far the farthest fraction is from its target."""
    return max((abs(reached[name] - aimed[name]) for name in aimed), default=0.0)


def _reconfiguration(asked: _Asked, epoch: int, before: Network, step: Step) -> Reconfiguration:
    return Reconfiguration(
        epoch=epoch,
        before=before.id,
        after=step.network.id,
        channels_removed=step.channels_removed,
        layers_removed=step.layers_removed,
        measured_duration_s=None,
        batch_before=asked.batch,
        batch_after=asked.batch,
        notes=step.notes,
    )


def _trace(asked: _Asked, dense: Dense, trajectory: Trajectory, steps: list[Step]) -> Trace:
    networks = {dense.network.id: dense.network}
    after_epoch = dict(zip(asked.events, steps, strict=True)) if trajectory.pruned else {}
    epochs, reconfigurations, network = [], [], dense.network
    first = sizes = product_sizes(dense.network)
    iterations = math.ceil(asked.images / (asked.batch * asked.gpus))
    for number in range(asked.epochs):
        epochs.append(
            Epoch(
                epoch=number,
                architecture=network.id,
                batch_per_gpu=asked.batch,
                world_size=asked.gpus,
                learning_rate=None,
                num_iterations=iterations,
                num_images=asked.images,
                penalty_coefficient=None if trajectory.pruned else 0.0,
                train_loss=None,
                penalty=None,
                train_accuracy=None,
                validation_loss=None,
                validation_accuracy=None,
                channel_sparsity=gone_share(sizes[0], first[0]),
                weight_sparsity=gone_share(sizes[1], first[1]),
                measured_time=None,
                measured_step=None,
                allreduce_bytes=network.gradient_bytes * iterations if asked.gpus > 1 else 0,
                peak_memory_bytes=None,
            )
        )
        step = after_epoch.get(number)
        if step is not None:
            networks.setdefault(step.network.id, step.network)
            reconfigurations.append(_reconfiguration(asked, number, network, step))
            network, sizes = step.network, product_sizes(step.network)
    return Trace(
        path=Path(f"planned-{asked.model.rpartition(':')[2]}-{asked.pruning.replace('/', '-')}"),
        run=_run(asked, trajectory),
        networks=networks,
        epochs=tuple(epochs),
        reconfigurations=tuple(reconfigurations),
        profiles=(),
        end=End(
            status="clean",
            reason=None,
            epochs=asked.epochs,
            final_accuracy=None,
            wall_s=None,
            num_iterations=iterations * asked.epochs,
        ),
    )


def _run(asked: _Asked, trajectory: Trajectory) -> Run:
    import ptsim

    return Run(
        schema_version=SCHEMA_VERSION,
        created=time_stamp(),
        model=asked.model,
        dataset=Dataset(
            name=asked.dataset,
            num_classes=asked.num_classes,
            num_train=asked.images,
            num_validation=0,
            input_shape=asked.input_shape,
        ),
        hyperparameters={
            "epochs": asked.epochs,
            "batch": asked.batch,
            "interval": asked.interval,
            "optimizer": asked.optimizer,
            "pruning": asked.pruning,
            "draw": asked.seed,
        },
        seed=asked.seed,
        precision=asked.precision,
        memory_format=asked.memory_format,
        world_size=asked.gpus,
        backend=None,
        device=NO_DEVICE,
        versions={"ptsim": ptsim.__version__},
        git_revision=None,
        origin="planned",
        assumed=trajectory.assumed,
    )
