"""How measurements of one device are put together: later ones with earlier ones, several rounds with each other."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import msgspec

from ptsim.hardware.profile import OperatorTime, StepMeasurement


def merge_operators(known: Iterable[OperatorTime], new: Iterable[OperatorTime]) -> tuple[OperatorTime, ...]:
    """Both, each operator and context once; of two measurements the new one."""
    merged = {(time.operator, time.context): time for time in known}
    merged |= {(time.operator, time.context): time for time in new}
    return tuple(merged.values())


def mean_time(times: Sequence[OperatorTime]) -> OperatorTime:
    """The mean of measurements of one operator in one context; a pass that some of them lack is that of the others."""

    def mean(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    return msgspec.structs.replace(
        times[0],
        forward_s=statistics.fmean(time.forward_s for time in times),
        backward_s=mean(time.backward_s for time in times),
        weight_gradient_s=mean(time.weight_gradient_s for time in times),
        input_gradient_s=mean(time.input_gradient_s for time in times),
        host_s=mean(time.host_s for time in times),
    )


def _what(step: StepMeasurement) -> tuple[object, ...]:
    """What was measured; rounds of anything else are no further rounds of it."""
    update = step.optimizer, step.momentum, step.criterion, step.proximal
    return step.architecture, step.setting, step.batch, *update


def with_round(steps: Sequence[StepMeasurement], new: StepMeasurement) -> tuple[StepMeasurement, ...]:
    """The steps with one more round of one network: all its times become the means over its rounds.

    The range of its steps becomes that of all rounds together, so that it holds what the device's speed drifted.
    """
    old = next((step for step in steps if _what(step) == _what(new)), None)
    if old is None:
        return (*steps, new)
    num_rounds = old.num_rounds + new.num_rounds

    def mean(field: str) -> float | None:
        before, after = getattr(old, field), getattr(new, field)
        if before is None or after is None:
            return before if after is None else after  # type: ignore[no-any-return] # getattr's
        return (old.num_rounds * before + new.num_rounds * after) / num_rounds  # type: ignore[no-any-return] # getattr's

    joined = msgspec.structs.replace(
        new,
        num_samples=old.num_samples + new.num_samples,
        num_rounds=num_rounds,
        peak_memory_bytes=max(filter(None, (old.peak_memory_bytes, new.peak_memory_bytes)), default=None),
        **{field: mean(field) for field in StepMeasurement.__struct_fields__ if field.endswith("_s")},
    )
    joined = msgspec.structs.replace(
        joined,
        step_low_s=min(old.step_low_s, new.step_low_s),
        step_high_s=max(old.step_high_s, new.step_high_s),
    )
    return tuple(joined if step is old else step for step in steps)
