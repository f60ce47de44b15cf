"""Which records of a trace cannot be true: fields against each other, names and numbers against earlier lines.

Types and bounds of single fields stand in `schema.py`; msgspec checks them before a record comes here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ptsim.consistency import MOST_MOMENTUM, network_problem
from ptsim.network import Network
from ptsim.trace.schema import AnyRecord, Architecture, Draw, End, Epoch, Profile, Reconfiguration, Run

# Arguments of DistributedDataParallel that a run of an own loop has among its hyper-parameters, true or false.
DDP_SETTINGS = ("gradient_as_bucket_view", "broadcast_buffers")
_CLOCKS = 2.0  # how far the parts of an epoch or a step, which other clocks measure, may exceed the whole
_SURGERY = (1e-6, 1e6)  # seconds that changing a network can take
_LEAST_SPREAD = 1e-6  # of the 90th percentile of an epoch's steps: a 10th percentile below it is no step's time
# Images of updates that a GradScaler leaves out are counted, too: of a hundred in a row until it has found its scale,
# and of one for every update that is made, where it tries a larger scale after each.
_LEFT_OUT = 100


def record_problem(record: AnyRecord, networks: Mapping[str, Network]) -> str | None:
    """Why the record cannot be true, as a sentence without its end; None where nothing contradicts itself.

    Args:
        record: one line, decoded.
        networks: those that earlier lines describe, by id.
    """
    match record:
        case Run():
            return seed_problem(record.seed) or hyperparameters_problem(record.hyperparameters)
        case Architecture():
            if record.network.id != record.id:
                return f"field 'id' is {record.id!r}, but the network's content has the id {record.network.id!r}"
            return network_problem(record.network)
        case Profile():
            return _unknown(networks, architecture=record.architecture) or _profile_problem(
                record, networks[record.architecture]
            )
        case Epoch():
            return _unknown(networks, architecture=record.architecture) or _epoch_problem(
                record, networks[record.architecture]
            )
        case Reconfiguration():
            return _unknown(networks, before=record.before, after=record.after) or _surgery_problem(record)
        case Draw():
            return seed_problem(record.seed) or _draw_problem(record, networks)
        case _:
            return None


def order_problem(record: AnyRecord, *, run: Run | None, epochs: Sequence[Epoch], ended: bool) -> str | None:
    """Why the record cannot stand here, as a sentence without its end; None where it can.

    Args:
        record: one line, decoded.
        run: the first line; None if this is it.
        epochs: those before this line.
        ended: an end record stands before it.
    """
    if (run is None) != isinstance(record, Run):
        return "a second run record" if run else f"the first record is {tag_of(record)!r}, expected 'run'"
    if ended:
        return f"found {tag_of(record)!r} after the end record"
    num_epochs = len(epochs)
    last = max(0, num_epochs - 1)
    match record:
        case Epoch() if record.epoch != num_epochs:
            return f"field 'epoch' is {record.epoch}, expected {num_epochs}"
        case Reconfiguration() if record.epoch != last:
            return f"field 'epoch' is {record.epoch}, expected {last}, the epoch before this line"
        case Draw() if run is not None and run.origin != "planned":
            return "found a draw in a run that is not planned"
        case End():
            return _end_problem(record, epochs)
        case _:
            return None


def _end_problem(end: End, epochs: Sequence[Epoch]) -> str | None:
    """The counts against the epochs: a run that was resumed has counted those of all sessions.

    Seconds and joules are measured by other clocks and meters, and nothing is computed from the end's.
    """
    if end.epochs != len(epochs):
        return f"field 'epochs' is {end.epochs}, but the trace has {len(epochs)}"
    iterations = sum(epoch.num_iterations for epoch in epochs)
    if end.num_iterations != iterations:
        return f"field 'num_iterations' is {end.num_iterations}, but the epochs have {iterations}"
    return None


def tag_of(record: AnyRecord) -> str:
    """What the file calls records of this kind."""
    return str(type(record).__struct_config__.tag)


def seed_problem(seed: int) -> str | None:
    """What torch takes as a seed has 64 bits; others may have more digits than Python prints."""
    return None if -(2**63) <= seed < 2**64 else "field 'seed' is out of range, expected -2**63 to 2**64 - 1"


def hyperparameters_problem(hyperparameters: Mapping[str, Any]) -> str | None:
    """Of those that ptsim itself reads: texts, a whole number of epochs, the momentum, and what DDP was told."""
    for name, kind in (("optimizer", str), ("criterion", str), ("epochs", int)):
        value = hyperparameters.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            return f"hyperparameters.{name} is {value!r}, expected {'a text' if kind is str else 'a whole number'}"
    for name in DDP_SETTINGS:
        if not isinstance(value := hyperparameters.get(name), bool | None):
            return f"hyperparameters.{name} is {value!r}, expected true or false"
    momentum = hyperparameters.get("momentum")
    if momentum is not None:
        if isinstance(momentum, bool) or not isinstance(momentum, int | float):
            return f"hyperparameters.momentum is {momentum!r}, expected a number"
        if not 0 <= momentum <= MOST_MOMENTUM:  # which may have more digits than Python prints
            return f"hyperparameters.momentum is out of range, expected 0 to {MOST_MOMENTUM}"
    return None


def _profile_problem(profile: Profile, network: Network) -> str | None:
    if (problem := _strangers("layers", (layer.layer for layer in profile.layers), network)) is not None:
        return problem
    if not profile.step_s:
        return "field 'step_s' is 0, expected more"
    parts = profile.forward_s + profile.backward_s + profile.regularizer_s + profile.optimizer_s
    if parts > _CLOCKS * profile.step_s:
        return f"the parts of the step take {parts:g} s, but field 'step_s' is {profile.step_s:g}"
    low = profile.step_s if profile.step_low_s is None else profile.step_low_s
    high = profile.step_s if profile.step_high_s is None else profile.step_high_s
    if not low <= profile.step_s <= high:
        return f"field 'step_s' is {profile.step_s:g}, expected between step_low_s {low:g} and step_high_s {high:g}"
    return None


def _surgery_problem(record: Reconfiguration) -> str | None:
    seconds, (least, most) = record.measured_duration_s, _SURGERY
    if record.before == record.after or not seconds or least <= seconds <= most:
        return None
    return f"field 'duration_s' is {seconds:g}, expected 0 or {least:g} to {most:g}: no network is changed in that time"


def most_images(num_iterations: int, batch: int) -> int:
    """Images of so many updates of `batch` images on a rank, at most: with those of updates that were left out."""
    return (2 * num_iterations + _LEFT_OUT) * batch


def _epoch_problem(epoch: Epoch, network: Network) -> str | None:
    most = most_images(epoch.num_iterations, epoch.batch_per_gpu) * epoch.world_size
    if epoch.num_images > most:
        return f"field 'num_images' is {epoch.num_images}, expected at most {most} in {epoch.num_iterations} iterations"
    if epoch.measured_step is not None:
        step = epoch.measured_step
        if not step.p10_s <= step.median_s <= step.p90_s:
            return f"the step times p10 {step.p10_s:g}, median {step.median_s:g}, p90 {step.p90_s:g} s do not rise"
        if 0 < step.p10_s < _LEAST_SPREAD * step.p90_s:
            return f"the step times p10 {step.p10_s:g} and p90 {step.p90_s:g} s are no times of steps of one epoch"
    if epoch.measured_time is not None:
        time = epoch.measured_time
        if not time.wall_s:
            return "field 'wall_s' is 0, expected more"
        if abs(time.exposed_communication_s) > _CLOCKS * time.wall_s:
            exposed = f"field 'exposed_communication_s' is {time.exposed_communication_s:g}"
            return f"{exposed}, but field 'wall_s' is {time.wall_s:g}"
        parts = time.data_wait_s + time.forward_s + time.backward_s + time.regularizer_s + time.optimizer_s
        if parts > _CLOCKS * time.wall_s:
            return f"the parts of the epoch take {parts:g} s, but field 'wall_s' is {time.wall_s:g}"
    return _strangers("densities", (density.layer for density in epoch.densities), network) or _strangers(
        "channel_maxima", epoch.channel_maxima or (), network
    )


def _draw_problem(draw: Draw, networks: Mapping[str, Network]) -> str | None:
    starts = [start for start, _ in draw.architectures]
    if starts[:1] != [0] or starts != sorted(set(starts)):
        return f"field 'architectures' begins at the epochs {starts}, expected ascending ones from 0"
    problems = (_unknown(networks, architectures=name) for _, name in draw.architectures)
    return next((problem for problem in problems if problem is not None), None)


def _strangers(field: str, names: Iterable[str], network: Network) -> str | None:
    known = {layer.name for layer in network.layers}
    name = next((name for name in names if name not in known), None)
    return None if name is None else f"field {field!r} names the layer {name!r}, which the architecture does not have"


def _unknown(networks: Mapping[str, Network], **references: str) -> str | None:
    for field, architecture in references.items():
        if architecture not in networks:
            return f"field {field!r} names the architecture {architecture!r}, which no earlier line describes"
    return None
