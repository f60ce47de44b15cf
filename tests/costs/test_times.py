"""Sums over a step's layers, and steps of several passes or of a share of the update, by hand."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ptsim.costs.tiers import Tier
from ptsim.costs.times import LayerTime, Measurements, StepTime
from ptsim.hardware.catalog import load_device
from ptsim.network import LayerKind
from ptsim.trace.io import read_trace
from tests.traces import dense_trace

SECONDS = {
    LayerKind.CONV: (1.0, 2.0),
    LayerKind.ACTIVATION: (0.5, 0.25),
    LayerKind.MATMUL: (0.25, 0.5),
    LayerKind.LINEAR: (0.125, 0.0),
}
# 1.875 forward, 2.75 backward, 0.25 of the update, 0.125 of the penalty and 1 beside them
STEP = StepTime(
    layers=tuple(
        LayerTime(layer=kind, kind=kind, forward_s=forward, backward_s=backward, tier=Tier.MEASURED)
        for kind, (forward, backward) in SECONDS.items()
    ),
    optimizer_s=0.25,
    regularizer_s=0.125,
    overhead_s=1.0,
    low_s=3.0,
    high_s=12.0,
    tier=Tier.MEASURED,
)


def test_a_step_is_the_sum_of_its_parts() -> None:
    assert (STEP.forward_s, STEP.backward_s, STEP.compute_s) == (1.875, 2.75, 6.0)
    assert STEP.product_s == 3.0 + 0.75 + 0.125


@pytest.mark.parametrize("before", [1, 2, 6])
def test_six_passes_take_six_times_as_long_with_one_penalty_and_update(before: int) -> None:
    six = STEP.accumulated(before).accumulated(6)
    assert (six.forward_s, six.backward_s, six.overhead_s) == pytest.approx((11.25, 16.5, 6.0))
    assert (six.optimizer_s, six.regularizer_s, six.passes) == (0.25, 0.125, 6)
    assert (six.low_s, six.high_s) == pytest.approx((34.125 / 2, 2 * 34.125))
    assert six.accumulated(1).compute_s == pytest.approx(6.0)


def test_every_pass_but_the_first_sums_up_all_gradients_whatever_a_gpu_updates() -> None:
    """Four passes are 4 · 5.625 s, and 0.375 s once; three sums of 0.125 s come on top of the 0.25 s of the update."""
    step = msgspec.structs.replace(STEP, whole_s=0.0625, again_s=0.125)
    four = step.accumulated(4)
    assert (four.optimizer_s, four.whole_s) == (0.25 + 0.375, 0.0625 + 0.375)
    assert four.compute_s == 4 * 5.625 + 0.375 + 0.375
    assert four.updating(0.5).optimizer_s == 0.0625 + 0.375 + 0.5 * 0.1875
    assert four.accumulated(1) == step


def test_a_share_of_the_update_leaves_the_rest() -> None:
    half = STEP.updating(0.5)
    assert (half.optimizer_s, half.compute_s) == (0.125, 5.875)
    assert (half.low_s, half.high_s) == pytest.approx((5.875 / 2, 2 * 5.875))
    assert STEP.updating(1.0) == STEP
    cast = msgspec.structs.replace(STEP, whole_s=0.125).updating(0.5)  # which nobody shares
    assert cast.optimizer_s == 0.125 + 0.0625
    nothing = msgspec.structs.replace(STEP, layers=(), optimizer_s=0.0, regularizer_s=0.0, overhead_s=0.0, low_s=0.0)
    assert nothing.updating(0.5).high_s == 12.0  # nothing to be relative to


def test_what_a_run_measured_is_its_profiles_on_the_device_that_it_had_with_its_update(tmp_path: Path) -> None:
    trace = read_trace(dense_trace(tmp_path / "t.jsonl"))
    v100, a100 = load_device("v100"), load_device("a100-sxm4-40gb")
    known = Measurements.of(trace, v100)
    assert (known.profiles, known.source_device, known.device_profile) == (trace.profiles, a100, None)
    assert (known.optimizer, known.momentum) == ("sgd", 0.9)
    own = msgspec.structs.replace(v100, driver_names=(trace.run.device.name,))  # a user's file that describes it
    assert Measurements.of(trace, own).source_device == own
    older = msgspec.structs.replace(
        trace, run=msgspec.structs.replace(trace.run, hyperparameters={"optimizer": "of_another_package"})
    )
    assert Measurements.of(older, v100).optimizer is None
    assert Measurements.of(None, v100) == Measurements()
