"""What does a run take beside its training steps? Input, loop and reconfigurations, as its trace recorded them."""

from __future__ import annotations

import statistics

from ptsim.trace.schema import Epoch, Reconfiguration
from ptsim.trace.trace import Trace


def beyond_steps_s(epoch: Epoch) -> float:
    """Seconds of an epoch's wall time in none of the phases of a training step: waiting for data, metrics, the loop."""
    t = epoch.time
    steps_s = t.forward_s + t.backward_s + t.regularizer_s + t.optimizer_s + t.exposed_communication_s
    return max(t.wall_s - steps_s, 0.0)


def beyond_steps_s_per_image(epoch: Epoch) -> float | None:
    """The same per image of a rank; None of an epoch without images."""
    return beyond_steps_s(epoch) * epoch.world_size / epoch.num_images if epoch.num_images else None


def input_s_per_image(trace: Trace) -> float | None:
    """The median of `beyond_steps_s_per_image` over epochs; None where no epoch was measured.

    The first epoch is left out where there are others: it warms up.
    """
    measured = [epoch for epoch in trace.epochs if epoch.measured_time is not None]
    epochs = measured[1:] or measured
    values = [value for epoch in epochs if (value := beyond_steps_s_per_image(epoch)) is not None]
    return statistics.median(values) if values else None


def changes(trace: Trace) -> tuple[Reconfiguration, ...]:
    """The reconfigurations that changed the network; one that finds nothing to prune takes next to no time."""
    return tuple(event for event in trace.reconfigurations if event.before != event.after)


def measured_changes(trace: Trace) -> tuple[Reconfiguration, ...]:
    """Those of `changes` whose time was measured: what another program does between two epochs is not."""
    return tuple(event for event in changes(trace) if event.measured_duration_s is not None)


def paid_s(trace: Trace) -> float:
    """Seconds of all reconfigurations, as far as they were measured."""
    return sum(event.measured_duration_s or 0.0 for event in trace.reconfigurations)


def reconfiguration_s(trace: Trace) -> float | None:
    """Median seconds of a reconfiguration that changed the network; None where none was measured."""
    values = [event.duration_s for event in measured_changes(trace)]
    return statistics.median(values) if values else None
