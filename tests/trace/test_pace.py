"""What a run took beside its training steps, by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from ptsim.trace.io import read_trace
from ptsim.trace.pace import beyond_steps_s, changes, input_s_per_image, measured_changes, paid_s, reconfiguration_s
from ptsim.trace.schema import DeviceUse, Epoch, EpochTime
from ptsim.trace.trace import Trace
from tests.traces import shrinking_trace

# forward, backward, penalty, update and all-reduces are 16 + 8 + 4 + 2 + 1 = 31 s; waiting and validation are no part
STEPS = EpochTime(
    wall_s=0.0, data_wait_s=64.0, forward_s=16.0, backward_s=8.0, regularizer_s=4.0, optimizer_s=2.0,
    exposed_communication_s=1.0, validation_s=128.0,
)  # fmt: skip


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    return read_trace(shrinking_trace(tmp_path / "trace.jsonl"))


def timed(trace: Trace, walls_s: Sequence[float | None]) -> Trace:
    """Epochs of 1,000 images on 2 ranks that take so long; None: nobody measured it."""
    epochs: list[Epoch] = []
    for epoch, wall_s in zip(trace.epochs, walls_s, strict=False):
        time = None if wall_s is None else msgspec.structs.replace(STEPS, wall_s=wall_s)
        epochs.append(msgspec.structs.replace(epoch, measured_time=time, world_size=2, num_images=1000))
    return msgspec.structs.replace(trace, epochs=tuple(epochs))


@pytest.mark.parametrize(("wall_s", "beyond_s"), [(131.0, 100.0), (31.0, 0.0), (30.0, 0.0)])
def test_what_is_in_no_phase_of_a_step_is_beyond_it(trace: Trace, wall_s: float, beyond_s: float) -> None:
    assert beyond_steps_s(timed(trace, [wall_s]).epochs[0]) == beyond_s


@pytest.mark.parametrize(
    ("walls_s", "expected"),
    [
        ([131.0, 41.0, 81.0, 61.0], 0.06),  # 100, 10, 50 and 30 s: the first warms up, the median of the others is 30
        ([131.0], 0.2),  # the only one counts
        ([None, 131.0, 41.0], 0.02),  # the first that was measured warms up
        ([None, None], None),
    ],
)
def test_input_takes_the_median_second_of_an_image_of_a_rank(
    trace: Trace, walls_s: Sequence[float | None], expected: float | None
) -> None:
    assert input_s_per_image(timed(trace, walls_s)) == (None if expected is None else pytest.approx(expected))


def test_what_changed_nothing_is_paid_for_and_tells_nothing_of_surgery(trace: Trace) -> None:
    first, second = trace.reconfigurations
    quick, told, slow = (msgspec.structs.replace(first, measured_duration_s=s) for s in (2.0, None, 4.0))
    idle = msgspec.structs.replace(second, after=second.before, measured_duration_s=0.5)
    run = msgspec.structs.replace(trace, reconfigurations=(quick, idle, told, slow))
    assert changes(run) == (quick, told, slow)
    assert measured_changes(run) == (quick, slow)
    assert paid_s(run) == 6.5
    assert reconfiguration_s(run) == 3.0
    assert reconfiguration_s(msgspec.structs.replace(trace, reconfigurations=(idle, told))) is None


@pytest.mark.parametrize(
    ("energy_j", "power_w", "wall_s", "expected"),
    [
        (600.0, 100.0, 2.0, 300.0),  # a board of today says what it drew in the second before, too
        (600.0, None, 2.0, 300.0),
        (0.0, 100.0, 2.0, 0.0),
        (None, 100.0, 2.0, 100.0),
        (600.0, 100.0, 0.0, 100.0),
        (600.0, 100.0, None, None),
        (None, None, 2.0, None),
    ],
)
def test_the_mean_power_is_that_of_the_energy(
    trace: Trace, energy_j: float | None, power_w: float | None, wall_s: float | None, expected: float | None
) -> None:
    (epoch, *_) = timed(trace, [wall_s]).epochs
    used = DeviceUse(energy_j=energy_j, power_w=power_w)
    assert msgspec.structs.replace(epoch, device=used).mean_power_w == expected
    assert msgspec.structs.replace(epoch, device=None).mean_power_w is None
