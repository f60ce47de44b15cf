"""Joules of projected runs, at watts by hand: an A100 idles at 50 W and takes 400 W at most.

The assumed shares of the 350 W between are 0.85, 0.65 and 0.25 while it multiplies, streams memory and waits.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ptsim.costs.energy import PowerSample, fit_power
from ptsim.costs.scaling import load_scaling
from ptsim.costs.step import Measurements, step_time
from ptsim.hardware.catalog import load_device, match_device
from ptsim.setting import StepSetting
from ptsim.sim.options import Options
from ptsim.sim.power import Power
from ptsim.sim.projection import RunProjection
from ptsim.sim.run import change, project
from ptsim.sim.scenario import Scenario
from ptsim.trace.io import read_trace
from ptsim.trace.trace import Trace
from tests.sim.plans import cluster
from tests.traces import shrinking_trace

MULTIPLYING_W, STREAMING_W, WAITING_W, IDLE_W = 347.5, 277.5, 137.5, 50.0


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """With NVML's 300 W in every epoch."""
    return read_trace(shrinking_trace(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def trace(sampled: Trace) -> Trace:
    """Without, so that the data sheet's watts count."""
    epochs = tuple(msgspec.structs.replace(epoch, device=None) for epoch in sampled.epochs)
    return msgspec.structs.replace(sampled, epochs=epochs)


def run(trace: Trace, gpus: int, **options: Any) -> RunProjection:
    return project(trace, cluster(), gpus, change(Options(), options))


def energies(projection: RunProjection) -> list[float]:
    return [epoch.energy_j for epoch in projection.epochs if epoch.energy_j is not None]


def test_penalty_and_update_are_paid_for_once_and_the_sums_of_further_passes_each_time(trace: Trace) -> None:
    first = trace.epochs[0]
    epoch = run(trace, 1, micro_batches=4).epochs[0]
    one = step_time(
        trace.network_of(first),
        cluster().gpu,
        StepSetting(batch=16, momentum=0.9, regularizer="group_lasso"),
        measurements=Measurements(profiles=trace.profiles, source_device=match_device(trace.run.device.name)),
    )
    streaming_s = one.forward_s + one.backward_s - one.product_s
    pass_j = MULTIPLYING_W * one.product_s + STREAMING_W * streaming_s + WAITING_W * one.overhead_s
    assert min(one.regularizer_s, one.optimizer_s) > 0
    updating_s = (1 + 3 * 3 / 11) * one.optimizer_s  # three sums of gradients move 3 values a parameter, an update 11
    step_j = 4 * pass_j + STREAMING_W * (updating_s + one.regularizer_s)
    assert epoch.energy_j == pytest.approx(epoch.num_iterations * step_j, rel=1e-6)


@pytest.mark.parametrize(
    ("gpus", "options"),
    [
        (1, {"straggler_fraction": 1.0, "straggler_slowdown": 3.0}),
        (8, {"mixed_devices": {"t4": 2}}),  # the joules are of A100s alone: they wait for the T4s
        (8, {"input_images_per_s": 500.0}),
        (64, {"broadcast_buffers": True}),
    ],
)
def test_what_lengthens_a_step_is_paid_for_at_the_power_of_waiting(
    trace: Trace, gpus: int, options: dict[str, Any]
) -> None:
    plain, slow = run(trace, gpus), run(trace, gpus, **options)
    longer_s = [epoch.total_s - other.total_s for epoch, other in zip(slow.epochs, plain.epochs, strict=True)]
    more_j = [energy - other for energy, other in zip(energies(slow), energies(plain), strict=True)]
    assert min(longer_s) > 0
    assert more_j == pytest.approx([gpus * WAITING_W * seconds for seconds in longer_s], rel=1e-6)
    assert slow.energy_low_j is not None
    assert slow.energy_j is not None
    assert slow.energy_low_j <= slow.energy_j


def test_gpus_wait_while_the_run_reconfigures(trace: Trace) -> None:
    """2 surgeries of 100 s and a compilation of 10 s at the start and after both: 230 s on 8 GPUs."""
    now, later = (run(trace, 8, surgery_s=s, compile_s=s / 10) for s in (0.0, 100.0))
    assert later.total_s - now.total_s == pytest.approx(230)
    assert now.energy_j is not None
    assert later.energy_j is not None
    assert later.energy_j - now.energy_j == pytest.approx(8 * 230 * WAITING_W, rel=1e-6)


def test_gpus_work_at_their_mean_power_in_what_failures_add(trace: Trace) -> None:
    faults = {"mtbf_gpu_hours": 1e3, "checkpoint_interval_s": 0.1, "checkpoint_s": 0.05, "num_runs": 2}
    steady, failing = run(trace, 8), run(trace, 8, faults=faults)
    assert steady.energy_j is not None
    assert failing.energy_j is not None
    added = failing.faults_s / sum(epoch.total_s for epoch in steady.epochs)
    assert added > 0.1
    assert failing.energy_j - steady.energy_j == pytest.approx(added * sum(energies(steady)), rel=1e-6)


def test_time_and_power_err_independently_and_no_board_takes_less_than_idle_power(trace: Trace) -> None:
    """The assumed watts are 25 % unsure: 5, 12 and 13 are a right triangle."""
    power = Power(Scenario(trace, cluster(), 8, Options()))
    assert power.run_range_j(1000.0, 0.4, 1.6, 0.0) == pytest.approx((350.0, 1650.0))
    assert power.run_range_j(1000.0, 0.4, 1.6, 1.0) == pytest.approx((8 * IDLE_W, 1650.0))
    assert power.run_range_j(None, 0.4, 1.6, 1.0) == (None, None)


def test_a_device_whose_power_is_not_known_takes_no_energy(trace: Trace) -> None:
    silent = msgspec.structs.replace(load_device("a100-sxm4-40gb"), power_w=IDLE_W)
    p = project(trace, cluster(), 8, device=silent)
    assert (p.energy_j, p.energy_low_j, p.energy_high_j) == (None, None, None)
    assert {epoch.energy_j for epoch in p.epochs} == {None}


@pytest.mark.parametrize(
    ("device", "power_w", "source"),
    [
        ("a100-sxm4-40gb", 300.0, "NVML samples"),
        ("a100-sxm4-40gb", 601.0, "assumed"),  # more than one and a half times the board's limit
        ("a100-sxm4-40gb", 24.0, "assumed"),  # less than half of what it takes idle
        ("a100-sxm4-40gb", None, "assumed"),
        ("v100-sxm2-16gb", 300.0, "assumed"),  # recorded on another board
    ],
)
def test_recorded_powers_count_for_the_board_that_they_are_of(
    sampled: Trace, device: str, power_w: float | None, source: str
) -> None:
    used = [
        msgspec.structs.replace(
            epoch.device, power_w=power_w, energy_j=None if power_w is None else power_w * epoch.time.wall_s
        )
        for epoch in sampled.epochs
        if epoch.device is not None
    ]
    epochs = tuple(msgspec.structs.replace(e, device=d) for e, d in zip(sampled.epochs, used, strict=True))
    model = Power(Scenario(msgspec.structs.replace(sampled, epochs=epochs), cluster(device=device), 8, Options())).model
    assert model is not None
    assert model.source == source


@pytest.mark.parametrize("world_size", [1, 4])
def test_what_a_recorded_epoch_waited_is_no_work_in_the_fit(sampled: Trace, world_size: int) -> None:
    """Of an epoch twice as long as its steps, the GPU waits for half. Among others a GPU computes more slowly."""
    first = msgspec.structs.replace(sampled.epochs[0], world_size=world_size)
    setting = sampled.setting_of(first)
    device = cluster().gpu
    known = Measurements(profiles=sampled.profiles, source_device=device)
    alone = step_time(sampled.network_of(first), device, setting.alone, measurements=known)
    step = alone if world_size == 1 else alone.scaled(1 + load_scaling().slowdown)
    wall_s = 2 * step.compute_s * first.num_iterations
    time = msgspec.structs.replace(first.time, wall_s=wall_s)
    assert first.device is not None
    use = msgspec.structs.replace(first.device, energy_j=300.0 * wall_s)
    one = msgspec.structs.replace(sampled, epochs=(msgspec.structs.replace(first, measured_time=time, device=use),))
    sample = PowerSample(step=step, waiting_s=step.compute_s, power_w=300.0)
    model, expected = Power(Scenario(one, cluster(), 1, Options())).model, fit_power(device, [sample])
    assert model is not None
    found = (model.product_w, model.stream_w, model.waiting_w)
    assert found == pytest.approx((expected.product_w, expected.stream_w, expected.waiting_w))
