"""What if the run were longer, or had more images? The same architectures for the same shares of another run.

So a short recorded run, or a planned one, answers for a long one. Nobody has trained the result: it is marked as
planned.
"""

from __future__ import annotations

import bisect
import math

import msgspec

from ptsim.errors import UsageError
from ptsim.trace.schema import MOST_EPOCHS, Assumption, Draw, End, Epoch, Reconfiguration
from ptsim.trace.trace import Trace


def stretch(trace: Trace, *, epochs: int | None = None, images: int | None = None) -> Trace:
    """The run with another number of epochs, or of images in each; every architecture keeps its share of the run.

    Profiles and the spread of steps are kept, times of epochs are not: nobody measured these.

    Raises:
        UsageError: no epoch to stretch, a number below 1, or more than `MOST_EPOCHS` epochs.
    """
    if epochs is None and images is None:
        return trace
    for name, value in (("epochs", epochs), ("images", images)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}, expected at least 1")
    if epochs is not None and epochs > MOST_EPOCHS:
        raise UsageError(f"epochs is {epochs}, expected at most {MOST_EPOCHS}")
    if not trace.epochs:
        raise UsageError(f"{trace.path} has no finished epoch; there is nothing to stretch")
    count, recorded = epochs or len(trace.epochs), len(trace.epochs)
    sources = [trace.epochs[int((number + 0.5) * recorded / count)] for number in range(count)]
    made = tuple(_epoch(source, number, images, trace.run.dataset.num_train) for number, source in enumerate(sources))
    told = [f"{count} epochs instead of {recorded}"] if epochs else []
    told += [f"{images:,} images an epoch instead of {trace.epochs[0].num_images:,}"] if images else []
    what = f"{' and '.join(told)}: every architecture keeps its share of the run"
    run = msgspec.structs.replace(
        trace.run,
        origin="planned",
        assumed=(*trace.run.assumed, Assumption(what=what, source=str(trace.path))),
        hyperparameters=trace.run.hyperparameters | {"epochs": count},
        dataset=msgspec.structs.replace(trace.run.dataset, num_train=images or trace.run.dataset.num_train),
    )
    end = None
    if trace.end is not None:
        steps = sum(epoch.num_iterations for epoch in made)
        end = End(
            status=trace.end.status,
            reason=trace.end.reason,
            epochs=count,
            final_accuracy=None,
            wall_s=None,
            num_iterations=steps,
        )
    return msgspec.structs.replace(
        trace,
        run=run,
        epochs=made,
        reconfigurations=tuple(_events(trace, sources)),
        draws=tuple(_draw(draw, sources, recorded) for draw in trace.draws),
        end=end,
    )


def _epoch(source: Epoch, number: int, images: int | None, num_train: int) -> Epoch:
    steps, seen = source.num_iterations, source.num_images
    if images is not None:
        each = source.batch_per_gpu * source.world_size
        whole = source.num_images % each == 0 and source.num_images < num_train  # the last, smaller step was left out
        steps = max(1, images // each if whole else math.ceil(images / each))
        seen = min(steps * each, images) if whole else images
    return msgspec.structs.replace(
        source,
        epoch=number,
        num_iterations=steps,
        num_images=seen,
        learning_rate=None,
        train_loss=None,
        penalty=None,
        train_accuracy=None,
        validation_loss=None,
        validation_accuracy=None,
        measured_time=None,
        allreduce_bytes=source.allreduce_bytes // source.num_iterations * steps,
        device=None,
    )


def _draw(draw: Draw, sources: list[Epoch], recorded: int) -> Draw:
    """The draw with every network in the epochs that come from those it was planned for."""
    starts = [source.epoch for source in sources]
    moved = {
        len(starts) if first >= recorded else bisect.bisect_left(starts, first): name
        for first, name in draw.architectures
    }
    return msgspec.structs.replace(draw, architectures=tuple(moved.items()))


def _events(trace: Trace, sources: list[Epoch]) -> list[Reconfiguration]:
    """A reconfiguration wherever the network changes from one epoch to the next, and after the last one.

    Those that become one take what the last of them took that changed the network.
    """
    found = []
    for number, source in enumerate(sources):
        following = sources[number + 1].epoch if number + 1 < len(sources) else len(trace.epochs)
        passed = [event for event in trace.reconfigurations if source.epoch <= event.epoch < following]
        if not passed:
            continue
        first, last = passed[0], passed[-1]
        changed = [event for event in passed if event.before != event.after] or passed
        measured = [event.measured_duration_s for event in changed if event.measured_duration_s is not None]
        found.append(
            msgspec.structs.replace(
                last,
                epoch=number,
                before=first.before,
                batch_before=first.batch_before,
                channels_removed=sum(event.channels_removed for event in passed),
                layers_removed=tuple(name for event in passed for name in event.layers_removed),
                measured_duration_s=measured[-1] if measured else None,  # what found nothing took no time
            )
        )
    return found
