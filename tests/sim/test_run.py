from __future__ import annotations

import datetime
import itertools
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

import ptsim
from ptsim.answers.repredict import device_profile_of
from ptsim.costs.buckets import ddp_buckets
from ptsim.costs.collectives import all_reduce
from ptsim.costs.energy import published_power
from ptsim.costs.memory import VISIBLE_SHARE_HBM, MemoryNeed, iteration_memory
from ptsim.costs.scaling import hook_seconds, load_scaling
from ptsim.costs.step import Measurements, step_time
from ptsim.errors import FileFormatError, UnknownNameError, UsageError
from ptsim.hardware.catalog import load_device, match_device
from ptsim.hardware.spec import Cluster
from ptsim.network import LayerKind, Network, Parameter, Precision
from ptsim.setting import StepSetting
from ptsim.sim.options import Options
from ptsim.sim.planning import plan_run
from ptsim.sim.projection import EpochProjection, RunProjection, projections_frame
from ptsim.sim.run import StepCache, change, project, record_steps
from ptsim.sim.scenario import Scenario, recorded_jitter
from ptsim.trace.io import read_trace
from ptsim.trace.schema import Draw
from ptsim.trace.trace import Trace
from ptsim.units import MIB, format_bytes
from tests.sim.plans import cluster
from tests.traces import dense_trace, shrinking_trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return read_trace(shrinking_trace(tmp_path_factory.mktemp("run"), num_train=20_000))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return read_trace(dense_trace(tmp_path_factory.mktemp("run"), num_train=20_000))


def run(trace: Trace, gpus: int, where: Any = None, **options: Any) -> RunProjection:
    return project(trace, where or cluster(), gpus, change(Options(), options))


def _with_cores(number: int) -> Cluster:
    return msgspec.structs.replace(cluster(), cores_per_node=number)


def test_the_hooks_of_gradients_are_part_of_backward_and_of_nothing_else(dense: Trace) -> None:
    one, two = (run(dense, gpus, contention=0.0).epochs[0] for gpus in (1, 2))
    hooks_s = hook_seconds(cluster(), 2) * len(dense.networks[one.architecture].gradients)
    assert hooks_s > 0
    slower = 1 + load_scaling().slowdown
    assert two.forward_s == pytest.approx(slower * one.forward_s, rel=1e-9)
    assert two.optimizer_s == pytest.approx(slower * one.optimizer_s, rel=1e-9)
    assert two.backward_s == pytest.approx(slower * one.backward_s + hooks_s, rel=1e-9)
    assert (one.hooks_s, two.hooks_s) == (0.0, pytest.approx(hooks_s, rel=1e-9))
    accumulated = run(dense, 2, contention=0.0, micro_batches=4).epochs[0]
    assert accumulated.hooks_s == pytest.approx(hooks_s, rel=1e-9)  # they run in the last pass only


def test_what_was_profiled_on_another_device_is_not_measured_on_this_one(trace: Trace) -> None:
    """A run that began on an A100, which its first line names, and went on with an H100."""
    last = trace.epochs[-1].architecture
    there = [
        msgspec.structs.replace(p, device="NVIDIA H100 80GB HBM3") for p in trace.profiles if p.architecture == last
    ]
    here = [p for p in trace.profiles if p.architecture != last]
    assert there
    mixed, began = (msgspec.structs.replace(trace, profiles=tuple(some)) for some in ([*here, *there], here))
    projected = run(mixed, 1)
    assert [epoch.step_s for epoch in projected.epochs] == [epoch.step_s for epoch in run(began, 1).epochs]
    assert (projected.epochs[0].tier, projected.epochs[-1].tier) == ("measured", "datasheet")
    assert ptsim.predict(mixed, gpu="a100").tier == "datasheet"
    assert {step.architecture for step in device_profile_of([mixed]).steps} == {p.architecture for p in here}


def test_a_parameter_without_gradient_has_a_hook_where_ddp_looks_for_unused_ones(dense: Trace) -> None:
    """It is in a bucket then; the hook is part of backward, and no other part is a crumb longer for it."""
    (identity,) = dense.networks
    network = dense.networks[identity]
    idle = Parameter(name="idle", layer="", shape=(1000,))
    changed = msgspec.structs.replace(network, parameters=(*network.parameters, idle))
    trace = msgspec.structs.replace(dense, networks={identity: changed})
    for unused in (False, True):
        one, two = (run(trace, n, contention=0.0, find_unused_parameters=unused).epochs[0] for n in (1, 2))
        hooks_s = hook_seconds(cluster(), 2) * (len(network.gradients) + unused)
        slower = 1 + load_scaling().slowdown
        assert two.backward_s == pytest.approx(slower * one.backward_s + hooks_s, rel=1e-9)
        assert two.forward_s == pytest.approx(slower * one.forward_s, rel=1e-9)


def test_gpus_pay_for_hooks_and_for_no_more_than_their_share_of_the_update(dense: Trace) -> None:
    """On the data sheet's watts: hooks, reductions and gathering at the power of waiting, an update at streaming's.

    What a GPU among others computes more slowly is at the power of what it computes.
    """
    trace = msgspec.structs.replace(dense, epochs=tuple(msgspec.structs.replace(e, device=None) for e in dense.epochs))
    power = published_power(cluster().gpu)
    one, two = (run(trace, gpus, contention=0.0).epochs[0] for gpus in (1, 2))
    each_j = [epoch.energy_j / (gpus * epoch.num_iterations) for gpus, epoch in ((1, one), (2, two)) if epoch.energy_j]
    slower = 1 + load_scaling().slowdown
    beside_s = two.step_s - one.step_s - (slower - 1) * one.compute_s
    assert each_j[1] == pytest.approx(slower * each_j[0] + beside_s * power.waiting_w, rel=1e-6)
    whole, sharded = (run(trace, 8, contention=0.0, sharding=name).epochs[0] for name in ("none", "zero1"))
    assert sharded.forward_s == pytest.approx(whole.forward_s, rel=1e-9)
    assert sharded.backward_s == pytest.approx(whole.backward_s, rel=1e-9)
    assert sharded.optimizer_s == pytest.approx(whole.optimizer_s / 8, rel=1e-9)
    updating_s = whole.optimizer_s - sharded.optimizer_s
    waiting_s = (whole.step_s - whole.compute_s) - (sharded.step_s - sharded.compute_s)
    saved_j = 8 * whole.num_iterations * (updating_s * power.stream_w + waiting_s * power.waiting_w)
    assert whole.energy_j is not None
    assert sharded.energy_j is not None
    assert whole.energy_j - sharded.energy_j == pytest.approx(saved_j, rel=1e-6)


@pytest.mark.parametrize("sharding", ["zero1", "zero2"])
def test_what_accumulated_passes_take_while_the_update_is_sharded_adds_up_by_hand(dense: Trace, sharding: str) -> None:
    """4 passes of 16 images on 8 GPUs: each computes and sums up its passes, updates an eighth, and waits."""
    trace = msgspec.structs.replace(dense, epochs=tuple(msgspec.structs.replace(e, device=None) for e in dense.epochs))
    projected = run(trace, 8, contention=0.0, sharding=sharding, micro_batches=4)
    epoch, recorded = projected.epochs[0], trace.epochs[0]
    one = step_time(
        trace.network_of(recorded),
        cluster().gpu,
        StepSetting(batch=-(-epoch.batch_per_gpu // 4), precision=Precision.FP32, num_gpus=8),
        measurements=Measurements(profiles=trace.profiles, source_device=match_device(trace.run.device.name)),
    ).scaled(1 + load_scaling().slowdown)
    power = published_power(cluster().gpu)
    streaming_s = one.forward_s + one.backward_s - one.product_s
    passes_j = 4 * (one.product_s * power.product_w + streaming_s * power.stream_w + one.overhead_s * power.waiting_w)
    passes_s = 4 * (one.forward_s + one.backward_s + one.overhead_s)
    update_s = (1 / 8 + 3 * 3 / 11) * one.optimizer_s  # three sums move 3 values a parameter, the update 11
    waiting_s = epoch.step_s - passes_s - update_s
    step_j = passes_j + update_s * power.stream_w + waiting_s * power.waiting_w
    assert waiting_s > 0
    assert epoch.energy_j == pytest.approx(8 * epoch.num_iterations * step_j, rel=1e-6)
    passes = (epoch.forward_s, epoch.product_s, epoch.overhead_s)
    assert one.overhead_s > 0
    assert passes == pytest.approx((4 * one.forward_s, 4 * one.product_s, 4 * one.overhead_s))


def test_where_all_gpus_are_half_as_fast_every_part_of_the_computation_takes_twice_as_long(trace: Trace) -> None:
    slow = {"straggler_fraction": 1.0, "straggler_slowdown": 2.0}
    usual, slowed = (run(trace, 8, contention=0.0, **options).epochs[0] for options in ({}, slow))
    for part in ("forward", "backward", "product", "hooks", "optimizer", "regularizer", "overhead"):
        seconds = getattr(usual, f"{part}_s")
        assert seconds > 0
        assert getattr(slowed, f"{part}_s") == pytest.approx(2 * seconds), part


def test_the_memory_of_a_step_and_what_must_be_free_for_it_are_the_models(dense: Trace) -> None:
    epoch, projected = dense.epochs[0], run(dense, 8).epochs[0]
    setting = msgspec.structs.replace(dense.setting_of(epoch), num_gpus=8)
    need = iteration_memory(dense.network_of(epoch), setting, device=cluster().gpu)
    assert (projected.peak_memory_bytes, projected.needed_memory_bytes) == (need.peak_bytes, need.device_bytes)
    assert need.device_bytes > need.peak_bytes


def test_utilisation_is_of_the_precision_that_is_asked_for(dense: Trace) -> None:
    """An A100 has 19.5 TFLOP/s in fp32 and 156 in tf32."""
    used = []
    for precision, peak in (("fp32", 19.5e12), ("tf32", 156e12)):
        p = run(dense, 1, precision=precision)
        assert p.mfu_fraction is not None
        used.append(p.mfu_fraction * peak * sum(epoch.total_s for epoch in p.epochs))
    assert used[1] == pytest.approx(used[0])


def test_another_planned_trajectory_is_in_every_interval(trace: Trace) -> None:
    """It goes from the first network to the last in a single surgery of 0.25 s, where this one has two."""
    first, last = trace.epochs[0].architecture, trace.epochs[-1].architecture
    planned = msgspec.structs.replace(trace, draws=(Draw(seed=1, architectures=((0, first), (2, last))),))
    whole = run(planned, 1, autotune_trials=0)
    typical, other = (run(each, 1, autotune_trials=0) for each in planned.drawn())
    spread = abs(math.log(other.total_s / typical.total_s))
    assert spread > 0.01
    assert (whole.total_s, whole.draw_spread) == (typical.total_s, pytest.approx(spread))
    compared: list[tuple[RunProjection | EpochProjection, ...]] = [
        (whole, typical, other),
        *zip(whole.epochs, typical.epochs, other.epochs, strict=True),
    ]
    for one, alone, drawn in compared:
        added = 1.645 * math.log(drawn.total_s / alone.total_s)
        below, above = math.log(alone.total_s / alone.low_s), math.log(alone.high_s / alone.total_s)
        assert math.log(one.total_s / one.low_s) == pytest.approx(math.hypot(below, added))
        assert math.log(one.high_s / one.total_s) == pytest.approx(math.hypot(above, added))
    assert (typical.reconfiguration_low_s, typical.reconfiguration_high_s) == (0.5, 0.5)
    assert whole.reconfiguration_low_s == pytest.approx(0.5 / 2**1.645)  # half a second, and half of that
    assert whole.reconfiguration_high_s == pytest.approx(0.5 * 2**1.645)
    assert typical.energy_low_j is not None
    assert typical.energy_high_j is not None
    assert whole.energy_low_j == pytest.approx(typical.energy_low_j * whole.low_s / typical.low_s)
    assert whole.energy_high_j == pytest.approx(typical.energy_high_j * whole.high_s / typical.high_s)
    assert "1 other planned trajectory agrees with what was given; the times differ from" in whole.notes[-1]
    assert f" by {spread:.1%} (standard deviation)" in whole.notes[-1]


def test_steps_are_recorded_in_the_order_in_which_the_run_first_trains_them(trace: Trace) -> None:
    """The last epoch trains the first network again."""
    first, last = trace.epochs[0], trace.epochs[-1]
    again = msgspec.structs.replace(last, architecture=first.architecture, batch_per_gpu=first.batch_per_gpu)
    grown = msgspec.structs.replace(trace, epochs=(*trace.epochs[:-1], again))
    assert [steps.epoch for steps in record_steps(grown, cluster(), 1)] == [0, 2, 4]
    accumulated = msgspec.structs.replace(trace.epochs[1], passes=2)
    epochs = (first, accumulated, *grown.epochs[2:])
    recorded = record_steps(msgspec.structs.replace(grown, epochs=epochs), cluster(), 1)
    assert [(steps.epoch, steps.setting.passes) for steps in recorded] == [(0, 1), (1, 2), (2, 1), (4, 1)]


def test_the_recorded_spread_of_steps_is_in_the_interval_of_every_epoch(dense: Trace) -> None:
    """The profile has no spread of its own. 4 % below and above are 1.2816 standard deviations, the ends 1.645."""
    width = (1.04 / 0.96) ** (1.645 / (2 * 1.2816))
    for epoch in run(dense, 1).epochs:
        assert epoch.high_s == pytest.approx(width * epoch.total_s)
        assert epoch.low_s == pytest.approx(epoch.total_s / width)


def test_the_jitter_of_a_run_is_that_of_its_middle_epoch(dense: Trace) -> None:
    """Percentiles a factor of 1.1, 1.5 and 1.2 apart; of two epochs nobody knows any."""
    first = dense.epochs[0]
    steps = [msgspec.structs.replace(first.step, p10_s=0.5, p90_s=0.5 * ratio) for ratio in (1.1, 1.5, 1.2)]
    steps += [msgspec.structs.replace(first.step, p10_s=0.0)]
    epochs = [msgspec.structs.replace(first, measured_step=step) for step in (*steps, None)]
    assert recorded_jitter(epochs) == pytest.approx(math.log(1.2) / 2 / 1.2816)
    assert recorded_jitter(epochs[3:]) == 0.0


class TestOneGpu:
    def test_it_needs_no_communication(self, trace: Trace) -> None:
        projection = run(trace, 1)
        assert projection.exposed_communication_s == 0.0
        assert projection.allreduce_bytes_per_gpu == 0.0
        assert all(epoch.communication_s == 0.0 for epoch in projection.epochs)

    def test_it_takes_the_recorded_iterations_times_the_step(self, trace: Trace) -> None:
        device = load_device("a100-sxm4-40gb")
        measurements = Measurements(profiles=trace.profiles, source_device=match_device(trace.run.device.name))
        expected = sum(
            epoch.num_iterations
            * step_time(
                trace.network_of(epoch),
                device,
                StepSetting(batch=epoch.batch_per_gpu, precision=Precision.FP32, regularizer="group_lasso"),
                measurements=measurements,
            ).compute_s
            for epoch in trace.epochs
        )
        recorded_surgery = sum(r.duration_s for r in trace.reconfigurations)
        assert run(trace, 1, autotune_trials=0).total_s == pytest.approx(expected + recorded_surgery, rel=1e-12)


class TestManyGpus:
    @pytest.mark.parametrize("gpus", [2, 8, 12, 64, 1024])
    def test_bytes_are_those_of_the_ring_formula(self, trace: Trace, gpus: int) -> None:
        projection = run(trace, gpus)
        expected = sum(
            epoch.num_iterations * 2 * (gpus - 1) / gpus * 4 * trace.networks[epoch.architecture].num_parameters
            for epoch in projection.epochs
        )
        assert projection.allreduce_bytes_per_gpu == pytest.approx(expected, rel=1e-9)

    def test_a_cap_of_the_users_holds_for_the_first_bucket_too(self, trace: Trace) -> None:
        """As in torch: its small first bucket is part of the defaults only."""
        tensors = len(trace.networks[trace.epochs[0].architecture].parameters)
        one, each = (run(trace, 8, bucket_bytes=cap).epochs[0] for cap in (1 << 40, 1))
        assert run(trace, 8).epochs[0].communication_s == one.communication_s  # the network has less than 1 MiB
        latency_s = all_reduce(0, cluster(), 8).seconds
        assert each.communication_s > one.communication_s + 0.9 * (tensors - 1) * latency_s
        assert (
            run(trace, 8, bucket_bytes=1, first_bucket_bytes=1 << 20).epochs[0].communication_s == one.communication_s
        )
        assert Options(bucket_bytes=4 << 20).first_cap_bytes == 4 << 20
        assert Options().first_cap_bytes == 1 << 20

    def test_infinite_bandwidth_leaves_the_computation(self, trace: Trace) -> None:
        ideal = cluster(bandwidth=math.inf, latency=0.0, inter_bandwidth=math.inf, inter_latency=0.0)
        projection = run(trace, 64, ideal, surgery_s=0.0, autotune_trials=0)
        assert projection.exposed_communication_s == pytest.approx(0.0, abs=1e-12)
        assert projection.total_s == pytest.approx(projection.compute_s, rel=1e-12)

    def test_more_bandwidth_never_costs_time(self, trace: Trace) -> None:
        totals = [run(trace, 64, cluster(inter_bandwidth=b)).total_s for b in (1e8, 1e9, 1e10, 1e11, 1e12)]
        assert totals == sorted(totals, reverse=True)

    def test_more_latency_never_saves_time(self, trace: Trace) -> None:
        totals = [run(trace, 64, cluster(inter_latency=s)).total_s for s in (0, 1e-6, 1e-5, 1e-4)]
        assert totals == sorted(totals)

    def test_weak_scaling_keeps_the_mini_batch_and_shares_the_iterations(self, trace: Trace) -> None:
        projection = run(trace, 8)
        for epoch, recorded in zip(projection.epochs, trace.epochs, strict=True):
            assert epoch.batch_per_gpu == recorded.batch_per_gpu
            assert epoch.num_iterations == -(-recorded.num_images // (8 * recorded.batch_per_gpu))

    def test_no_number_of_gpus_is_faster_than_linear_and_half_empty_steps_are_noted(self, trace: Trace) -> None:
        alone, many = run(trace, 1), run(trace, 64)
        assert many.epochs[0].num_iterations == 5  # of 4,096 images; an epoch has 19,968, which is 4.9 times that
        assert many.total_s >= alone.total_s / 64
        assert any("is not full" in note for note in many.notes)

    def test_strong_scaling_keeps_the_iterations_and_shares_the_mini_batch(self, trace: Trace) -> None:
        projection = run(trace, 8, scaling="strong")
        for epoch, recorded in zip(projection.epochs, trace.epochs, strict=True):
            assert epoch.batch_per_gpu == recorded.batch_per_gpu // 8
            assert epoch.num_iterations == recorded.num_iterations

    def test_the_parts_add_up(self, trace: Trace) -> None:
        p = run(trace, 64, jitter=0.05, input_images_per_s=5000.0)
        parts = p.compute_s + p.exposed_communication_s + p.input_wait_s + p.straggler_wait_s
        assert parts + p.reconfiguration_s + p.startup_s == pytest.approx(p.total_s, rel=0.01)
        assert p.low_s <= p.total_s <= p.high_s

    def test_every_epochs_parts_add_up_to_its_step(self, trace: Trace) -> None:
        for e in run(trace, 64).epochs:
            parts = e.compute_s + e.input_wait_s + e.straggler_wait_s + e.exposed_communication_s
            assert parts == pytest.approx(e.step_s, rel=1e-9)
            assert e.total_s == pytest.approx(e.num_iterations * e.step_s)
            assert e.low_s <= e.total_s <= e.high_s

    def test_half_precision_gradients_halve_the_bytes(self, trace: Trace) -> None:
        full, half = run(trace, 8), run(trace, 8, gradient_format="bf16")
        assert half.allreduce_bytes_per_gpu == pytest.approx(full.allreduce_bytes_per_gpu / 2)

    def test_recorded_input_is_what_the_loader_did_in_its_fastest_epoch(self, dense: Trace) -> None:
        pace = dense.epochs[0].time.wall_s / dense.epochs[0].num_images
        slowness = [9.0, *(3.0 for _ in dense.epochs[1:])]  # the first epoch waited for a cold disk
        epochs = [
            msgspec.structs.replace(
                epoch,
                measured_time=msgspec.structs.replace(
                    epoch.time, wall_s=slow * pace * epoch.num_images, data_wait_s=pace * epoch.num_images
                ),
            )
            for epoch, slow in zip(dense.epochs, slowness, strict=True)
        ]
        p = run(msgspec.structs.replace(dense, epochs=tuple(epochs)), 1, input_images_per_s="recorded")
        assert [e.step_s for e in p.epochs] == pytest.approx([3 * pace * e.batch_per_gpu for e in p.epochs], rel=0.05)

    def test_money_is_gpus_times_hours_times_the_price(self, trace: Trace) -> None:
        p = run(trace, 8, price_usd_per_gpu_hour=3.0)
        assert p.cost_usd == pytest.approx(3.0 * 8 * p.total_s / 3600)
        assert run(trace, 8).cost_usd is None
        assert run(trace, 8, cluster(price=2.0)).cost_usd == pytest.approx(2.0 * p.gpu_hours)

    def test_a_list_price_is_of_whole_instances(self, trace: Trace) -> None:
        listed = msgspec.structs.replace(cluster(price=2.0, gpus_per_node=4), price_date=datetime.date(2026, 11, 9))
        for gpus, billed in ((1, 4), (4, 4), (5, 8), (9, 12)):
            p = run(trace, gpus, listed)
            assert p.billed_gpus == billed
            assert p.gpu_hours == pytest.approx(gpus * p.total_s / 3600)
            assert p.cost_usd == pytest.approx(2.0 * billed * p.total_s / 3600)
            assert any("billed as" in note for note in p.notes) == (gpus != billed)
        paid = run(trace, 5, listed, price_usd_per_gpu_hour=3.0)
        assert paid.cost_usd == pytest.approx(3.0 * 5 * paid.total_s / 3600)

    def test_energy_follows_the_recorded_power_on_the_recorded_gpu(self, trace: Trace) -> None:
        # every epoch was recorded at 300 W; the run also waits for its reconfigurations
        p = run(trace, 1, surgery_s=0.0, input_images_per_s="recorded")
        assert p.energy_j is not None
        assert p.energy_low_j is not None
        assert p.energy_high_j is not None
        assert p.energy_j == pytest.approx(300.0 * p.total_s, rel=0.05)
        assert p.energy_low_j < p.energy_j < p.energy_high_j

    def test_power_stays_within_the_boards_limits(self, trace: Trace) -> None:
        for name in ("v100-sxm2-16gb", "h100-sxm5-80gb"):
            device = load_device(name)
            p = run(trace, 8, device=name)
            assert p.energy_j is not None
            assert 8 * device.idle_power_w * p.total_s < p.energy_j < 8 * device.power_w * p.total_s
            assert p.energy_j > 0.9 * sum(epoch.energy_j or 0.0 for epoch in p.epochs)

    def test_a_shared_network_is_slower(self, trace: Trace) -> None:
        slow = cluster(inter_bandwidth=1e8)
        assert run(trace, 64, slow, jobs=4).total_s > run(trace, 64, slow).total_s

    def test_link_by_link_is_the_formula_on_equal_links(self, trace: Trace) -> None:
        for gpus in (1, 8, 64):
            by_links, by_formula = run(trace, gpus, network="links"), run(trace, gpus)
            assert by_links == by_formula

    def test_one_slow_nic_costs_the_whole_job(self, trace: Trace) -> None:
        rails = msgspec.structs.replace(cluster(inter_bandwidth=1e9), nics_per_node=8)
        whole = run(trace, 64, rails, network="links")
        slow = run(trace, 64, rails, network="links", link_bandwidth={"node 5 out nic 2": 0.1})
        assert slow.exposed_communication_s > 3 * whole.exposed_communication_s
        assert slow.compute_s == whole.compute_s

    def test_jobs_share_what_their_placement_says(self, trace: Trace) -> None:
        slow = cluster(inter_bandwidth=1e8)
        alone = run(trace, 16, slow, network="links")
        packed, striped = (run(trace, 16, slow, network="links", jobs=2, placement=p) for p in ("packed", "striped"))
        assert packed.total_s == alone.total_s
        assert any("share no link" in note for note in packed.notes)
        assert striped.total_s > alone.total_s

    def test_unused_parameters_are_asked_for_every_step(self, trace: Trace) -> None:
        plain, asked = run(trace, 8, autotune_trials=0), run(trace, 8, autotune_trials=0, find_unused_parameters=True)
        added = asked.allreduce_bytes_per_gpu - plain.allreduce_bytes_per_gpu
        expected = sum(
            e.num_iterations * 2 * 7 / 8 * 4 * len(trace.networks[e.architecture].parameters) for e in plain.epochs
        )
        assert added == pytest.approx(expected)

    def test_jobs_inside_a_node_share_nothing(self, trace: Trace) -> None:
        projection = run(trace, 8, jobs=4)
        assert projection.total_s == run(trace, 8).total_s
        assert any("stays inside one" in note for note in projection.notes)

    def test_the_slowest_kind_of_gpu_decides(self, trace: Trace) -> None:
        own, mixed = run(trace, 8), run(trace, 8, mixed_devices={"t4": 2})
        old = run(trace, 8, cluster(device="t4"))
        assert own.total_s < mixed.total_s <= old.total_s * 1.001
        assert mixed.straggler_wait_s > 0
        assert (own.tier, mixed.tier) == ("measured", "scaled")  # the trace has no measurement of a T4
        assert {epoch.tier for epoch in mixed.epochs} == {"scaled"}
        assert any("devices are mixed" in note for note in mixed.notes)

    def test_that_no_mixed_gpu_is_in_use_is_said(self, trace: Trace) -> None:
        """Two T4 come after six A100."""
        for gpus, none in ((6, True), (7, False), (9, False)):
            mixed = run(trace, gpus, mixed_devices={"t4": 2})
            assert (mixed.straggler_wait_s == 0) == none
            assert ("all GPUs in use are a100-sxm4-40gb" in " ".join(mixed.notes)) == none

    def test_mixed_gpus_compute_their_mean_and_wait_for_the_slowest(self, trace: Trace) -> None:
        own, old = run(trace, 8), run(trace, 8, device="t4")
        mixed = run(trace, 8, mixed_devices={"t4": 2})
        assert mixed.compute_s == pytest.approx((6 * own.compute_s + 2 * old.compute_s) / 8)
        assert mixed.compute_s + mixed.straggler_wait_s == pytest.approx(old.compute_s)

    def test_mixed_gpus_are_used_as_far_as_their_own_peaks_allow(self, trace: Trace) -> None:
        """On 12 GPUs the first node has 6 A100 and 2 T4, the second 4 A100: 19.5 and 8.1 TFLOP/s in fp32."""
        own = run(trace, 12, mixed_devices={"a100-sxm4-40gb": 2})
        mixed = run(trace, 12, mixed_devices={"t4": 2})
        assert own.mfu_fraction is not None
        seconds = sum(epoch.total_s for epoch in mixed.epochs) / sum(epoch.total_s for epoch in own.epochs)
        peaks = (10 * 19.5 + 2 * 8.1) / 12 / 19.5
        assert mixed.mfu_fraction == pytest.approx(own.mfu_fraction / seconds / peaks)

    def test_a_price_that_is_of_other_gpus_is_said(self, trace: Trace) -> None:
        def said(**options: Any) -> list[str]:
            return [note for note in run(trace, 8, cluster(price=2.0), **options).notes if "the price is of" in note]

        own, other = (load_device(name).name for name in ("a100-sxm4-40gb", "t4"))
        assert said() == said(device="a100-sxm4-40gb") == said(device="t4", price_usd_per_gpu_hour=1.0) == []
        assert said(device="t4") == [f"the price is of made up with the {own}, not of the {other}"]
        assert len(said(mixed_devices={"t4": 2})) == 1

    def test_a_step_without_input_decides_what_a_gpu_could_take(self, trace: Trace) -> None:
        slow: dict[str, Any] = {"straggler_fraction": 0.1, "straggler_slowdown": 4.0}
        steps = run(trace, 8, _with_cores(2000), **slow).epochs
        most = max(epoch.batch_per_gpu / epoch.step_s for epoch in steps)
        (note,) = [n for n in run(trace, 8, _with_cores(2000), input="torchvision", **slow).notes if "could take" in n]
        assert f"the GPU could take {most:,.0f}: " in note

    def test_no_board_takes_less_than_its_idle_power_over_the_shortest_time(self, dense: Trace) -> None:
        """Of a board that idles at 390 W of 400 W, a quarter less than the expected energy is less than idle."""
        hot = msgspec.structs.replace(load_device("a100-sxm4-40gb"), idle_power_w=390.0)
        p = project(dense, cluster(), 8, Options(), device=hot)
        assert p.energy_low_j == pytest.approx(8 * p.low_s * 390.0)

    def test_what_runs_once_a_pass_is_counted_in_every_pass(self, dense: Trace) -> None:
        network = dense.network_of(dense.epochs[0])
        layers = tuple(msgspec.structs.replace(layer, once=layer.name == "conv1") for layer in network.layers)
        once = msgspec.structs.replace(network, layers=layers)
        marked = msgspec.structs.replace(dense, networks=dict.fromkeys(dense.networks, once))

        def macs(micro_batches: int) -> float:
            p = run(marked, 2, micro_batches=micro_batches)
            assert p.mfu_fraction is not None
            return p.mfu_fraction * 2 * sum(epoch.total_s for epoch in p.epochs) * 19.5e12 / 2

        steps = sum(epoch.num_iterations for epoch in run(marked, 2).epochs)
        each = 2 * network.layer("conv1").forward_macs  # its input needs no gradient
        assert macs(4) - macs(1) == pytest.approx(3 * 2 * steps * each, rel=1e-3)

    def test_a_profile_of_the_clusters_own_gpus_says_nothing_of_those_that_are_mixed_in(self, dense: Trace) -> None:
        options = change(Options(), {"mixed_devices": {"t4": 2}})
        mixed = project(dense, cluster(), 8, options, device_profile=device_profile_of([dense]))
        assert mixed.straggler_wait_s > 0

    @pytest.mark.parametrize("own_first", [True, False])
    def test_a_mixed_in_gpu_takes_as_long_whatever_was_projected_before(self, dense: Trace, own_first: bool) -> None:
        """A T4 of 0.5 s a step, by its device profile, beside A100: the profile is of the projected GPUs alone."""
        profile = device_profile_of([dense])
        slow = [msgspec.structs.replace(step, forward_s=0.5, step_s=1.0) for step in profile.steps]
        known = msgspec.structs.replace(profile, device="Tesla T4", steps=tuple(slow))
        alone, beside = (change(Options(), given) for given in ({"device": "t4"}, {"mixed_devices": {"t4": 2}}))
        cache = StepCache()

        def own() -> RunProjection:
            return project(dense, cluster(), 8, alone, device_profile=known, cache=cache)

        def mixed() -> RunProjection:
            return project(dense, cluster(), 8, beside, cache=cache)

        made = [own(), mixed()] if own_first else [mixed(), own()][::-1]
        assert made[1] == project(dense, cluster(), 8, beside)
        assert made[0].tier == "profiled"

    def test_a_gpu_of_the_projected_kind_is_as_fast_when_it_is_mixed_in(self, dense: Trace) -> None:
        options = change(Options(), {"mixed_devices": {"a100-sxm4-40gb": 2}})
        mixed = project(dense, cluster(), 8, options, device_profile=device_profile_of([dense]))
        assert mixed.straggler_wait_s == 0

    def test_measurements_of_a_device_file_count_where_it_is_mixed_in(self, dense: Trace, tmp_path: Path) -> None:
        """The trace's GPU is that of the file, which has another name than the catalog's."""
        name = "a100-sxm4-40gb"
        text = (Path(ptsim.__file__).parent / "hardware" / "catalog" / "devices" / f"{name}.toml").read_text()
        mine = tmp_path / "mine.toml"
        mine.write_text(text.replace(f'"{name}"', '"mine"'))
        ours, theirs = (
            run(dense, 8, cluster(device="h100-sxm5-80gb"), mixed_devices={device: 2}) for device in (str(mine), name)
        )
        assert ours.compute_s == pytest.approx(theirs.compute_s)

    def test_mixed_gpus_have_the_interval_of_the_slowest(self, trace: Trace) -> None:
        old, mixed = run(trace, 8, device="t4"), run(trace, 8, mixed_devices={"t4": 2})
        assert mixed.high_s / mixed.total_s == pytest.approx(old.high_s / old.total_s, rel=0.02)
        assert mixed.low_s / mixed.total_s == pytest.approx(old.low_s / old.total_s, rel=0.02)

    def test_the_slowest_input_that_is_accepted_is_projected(self, trace: Trace) -> None:
        projection = run(trace, 8, input_images_per_s=1e-3)  # a step waits 64e3 s
        assert projection.input_wait_s == pytest.approx(projection.total_s)

    def test_slow_input_decides_the_pace(self, trace: Trace) -> None:
        projection = run(trace, 8, input_images_per_s=100.0)
        for epoch in projection.epochs:
            assert epoch.step_s == pytest.approx(epoch.batch_per_gpu / 100.0)

    def test_a_pipeline_is_a_rate_from_the_nodes_cores(self, trace: Trace) -> None:
        # images of 32 x 32 as they are stored: 1024 / 113.5e6 + 1024 / 8.68e6 s a core, 2 cores for 8 GPUs
        where = _with_cores(2)
        p = run(trace, 8, where, input="torchvision")
        rate = 2 / 8 / (1024 / 113.5e6 + 1024 / 8.68e6)
        given = run(trace, 8, input_images_per_s=rate)
        assert p.input_images_per_s == pytest.approx(rate)
        assert p.total_s == pytest.approx(given.total_s)
        assert p.input_wait_s == pytest.approx(given.input_wait_s)
        assert p.low_s < p.total_s / 1.3  # another core may be 1.4 times as fast
        assert p.high_s > p.total_s * 1.3
        assert any("the published rates" in note for note in p.notes)

    def test_it_says_from_how_many_gpus_on_the_pipeline_is_the_limit(self, trace: Trace) -> None:
        image_s = 1024 / 113.5e6 + 1024 / 8.68e6
        free = run(trace, 8)
        most = max(epoch.batch_per_gpu / epoch.step_s for epoch in free.epochs)
        cores = math.ceil(5 * most * image_s)  # enough for five GPUs, not for eight
        begins = math.floor(cores / image_s / most) + 1
        starved = run(trace, 8, _with_cores(cores), input="torchvision")
        assert starved.input_limit_gpus == begins
        assert any(f"the limit from {begins} of 8 GPUs" in note for note in starved.notes)
        assert starved.input_wait_s > 0
        fed = run(trace, 8, _with_cores(2 * cores), input="torchvision")
        assert (fed.input_limit_gpus, fed.input_wait_s) == (None, 0.0)
        assert any("no limit, even with all 8 GPUs" in note for note in fed.notes)
        assert fed.total_s == pytest.approx(free.total_s, rel=1e-12)
        assert run(trace, 8).input_limit_gpus is None

    def test_one_gpu_and_several_name_the_same_number(self, trace: Trace) -> None:
        """The cores suffice for six and a half GPUs: of those that train together, and are slower than one alone."""
        alone, together = (max(e.batch_per_gpu / e.step_s for e in run(trace, gpus).epochs) for gpus in (1, 2))
        assert 6.5 * together < 6 * alone
        image_s = 48 / (6.5 * together)  # of one of 48 cores
        options = {"input": "torchvision", "input_stored_pixels": round(113.5e6 * (image_s - 1024 / 8.68e6))}
        assert [run(trace, gpus, _with_cores(48), **options).input_limit_gpus for gpus in (1, 2, 8)] == [7, 7, 7]

    def test_storage_may_be_the_limit(self, trace: Trace) -> None:
        # 0.570 bytes of 1,024 pixels an image; 8 GPUs share 584 kB/s: 1,000 images/s, 125 each
        p = run(trace, 8, _with_cores(1000), input="dali", input_storage_bytes_per_s=0.57 * 1024 * 1000)
        assert p.input_images_per_s == pytest.approx(125.0)
        for epoch in p.epochs:
            assert epoch.step_s == pytest.approx(epoch.batch_per_gpu / 125.0)

    @pytest.mark.slow
    def test_more_jitter_costs_more(self, trace: Trace) -> None:
        totals = [run(trace, 64, jitter=j).total_s for j in (0.0, 0.02, 0.1)]
        assert totals == sorted(totals)

    def test_jitter_comes_from_the_recorded_percentiles(self, trace: Trace) -> None:
        # p10 and p90 at 4 % below and above the median: 1.2816 standard deviations each
        assert recorded_jitter(trace.epochs) == pytest.approx(math.log(1.04 / 0.96) / 2 / 1.2816)

    def test_failures_lengthen_the_run_and_the_interval(self, trace: Trace) -> None:
        steady = run(trace, 8)
        mtbf = 8 * steady.total_s / 3600  # one failure per run on average
        failing = run(
            trace,
            8,
            faults={
                "mtbf_gpu_hours": mtbf,
                "checkpoint_interval_s": steady.total_s / 10,
                "checkpoint_s": steady.total_s / 1000,
                "restart_s": 1.0,
            },
        )
        assert failing.faults is not None
        assert failing.faults_s > 0
        assert failing.total_s == pytest.approx(steady.total_s + failing.faults_s)
        assert failing.faults.goodput == pytest.approx(steady.total_s / failing.total_s)
        assert failing.low_s / steady.low_s == pytest.approx(failing.faults.low_s / steady.total_s)
        assert failing.high_s / steady.high_s == pytest.approx(failing.faults.high_s / steady.total_s)

    def test_the_time_with_rare_failures_is_inside_its_interval(self, trace: Trace) -> None:
        """One of a hundred runs fails and waits ten times its length: the others tell nothing of its tenth more."""
        steady = run(trace, 1)
        faults = {"mtbf_gpu_hours": 100 * steady.total_s / 3600, "restart_s": 10 * steady.total_s, "num_runs": 200}
        for seed in range(5):
            p = run(trace, 1, faults={**faults, "checkpoint_interval_s": 2 * steady.total_s}, seed=seed)
            assert p.faults is not None
            assert p.low_s <= p.total_s <= p.high_s
            assert p.high_s / p.total_s >= steady.high_s / steady.total_s * (1 - 1e-9)

    def test_the_same_seed_gives_identical_bytes(self, trace: Trace) -> None:
        options = {"jitter": "recorded", "faults": {"mtbf_gpu_hours": 50.0}, "seed": 5}
        one, same, other = (msgspec.json.encode(run(trace, 16, **{**options, "seed": seed})) for seed in (5, 5, 6))
        assert one == same
        assert one != other


class TestReconfigurations:
    def test_they_cost_what_was_recorded(self, trace: Trace) -> None:
        assert run(trace, 1, autotune_trials=0).reconfiguration_s == sum(r.duration_s for r in trace.reconfigurations)

    def test_their_interval_is_the_recorded_ones_spread(self, trace: Trace) -> None:
        (first, second) = trace.reconfigurations
        slower = msgspec.structs.replace(second, measured_duration_s=2 * first.duration_s)
        changed = msgspec.structs.replace(trace, reconfigurations=(first, slower))
        p = run(changed, 1, autotune_trials=0)
        # two durations a factor of 2 apart: a standard deviation of ln 2 / sqrt 2
        width = 2 ** (1.645 / math.sqrt(2))
        assert p.reconfiguration_high_s == pytest.approx(width * p.reconfiguration_s)
        assert p.reconfiguration_low_s == pytest.approx(p.reconfiguration_s / width)
        assert p.high_s - sum(e.high_s for e in p.epochs) == pytest.approx(p.reconfiguration_high_s)
        told = run(changed, 1, autotune_trials=0, surgery_s=2.0)
        assert told.reconfiguration_low_s == told.reconfiguration_high_s == 4.0

    def test_one_that_changed_nothing_says_nothing_of_surgery(self, trace: Trace) -> None:
        first = trace.reconfigurations[0]
        idle = [
            msgspec.structs.replace(
                first, epoch=epoch, before=first.before, after=first.before, measured_duration_s=1e-3
            )
            for epoch in (0, 2, 4)
        ]
        p = run(msgspec.structs.replace(trace, reconfigurations=(*idle, *trace.reconfigurations)), 1)
        assert p.reconfiguration_s == run(trace, 1).reconfiguration_s
        assert p.reconfiguration_low_s == run(trace, 1).reconfiguration_low_s
        assert p.reconfiguration_high_s == run(trace, 1).reconfiguration_high_s
        alone = run(msgspec.structs.replace(trace, reconfigurations=tuple(idle)), 1)
        assert any("each is taken to need 0.21 s" in note for note in alone.notes)

    def test_a_single_one_has_no_spread_and_says_so(self, trace: Trace) -> None:
        fewer = msgspec.structs.replace(trace, reconfigurations=trace.reconfigurations[:1])
        p = run(fewer, 1, autotune_trials=0)
        assert p.reconfiguration_low_s == p.reconfiguration_s == p.reconfiguration_high_s
        assert any("the interval leaves out how much their times scatter" in note for note in p.notes)

    def test_without_a_measured_one_surgery_takes_what_a_resnet50_took(self, trace: Trace) -> None:
        unmeasured = [msgspec.structs.replace(event, measured_duration_s=None) for event in trace.reconfigurations]
        changed = [event for event in unmeasured if event.before != event.after]
        p = run(msgspec.structs.replace(trace, reconfigurations=tuple(unmeasured)), 1, autotune_trials=0)
        assert p.reconfiguration_s == pytest.approx(0.21 * len(changed))
        assert p.reconfiguration_low_s == pytest.approx(0.06 * len(changed))
        assert p.reconfiguration_high_s == pytest.approx(0.43 * len(changed))
        assert any("each is taken to need 0.21 s" in note for note in p.notes)
        assert not any("0.21 s" in note for note in run(trace, 1).notes)

    def test_what_follows_from_them_has_the_interval_of_its_tier(self, dense: Trace, trace: Trace) -> None:
        p = run(trace, 64, surgery_s=0.0, device="v100-sxm2-16gb")
        assert p.reconfiguration_low_s < p.reconfiguration_s < p.reconfiguration_high_s

    def test_on_many_gpus_wrapping_comes_on_top(self, trace: Trace) -> None:
        assert run(trace, 64).reconfiguration_s > run(trace, 1).reconfiguration_s

    def test_recompilation_and_warm_up_are_paid_each_time(self, trace: Trace) -> None:
        plain = run(trace, 1, surgery_s=0.0, autotune_trials=0)
        compiled = run(trace, 1, surgery_s=0.0, autotune_trials=0, compile_s=30.0)
        assert plain.reconfiguration_s == 0.0
        assert compiled.reconfiguration_s == 2 * 30.0
        assert compiled.startup_s == 30.0
        warm = run(trace, 1, surgery_s=0.0, autotune_trials=0, warmup_steps=10)
        steps = [trace.epochs[2].epoch, trace.epochs[4].epoch]
        assert warm.reconfiguration_s == pytest.approx(sum(10 * plain.epochs[e].step_s for e in steps))

    def test_autotuning_runs_every_convolution_so_many_times(self, trace: Trace) -> None:
        dense = trace.networks[trace.epochs[0].architecture]
        (profile, *_) = trace.profiles
        kinds = {layer.name: layer.kind for layer in dense.layers}
        once = sum(t.forward_s + (t.backward_s or 0) for t in profile.layers if kinds[t.layer] is LayerKind.CONV)
        assert run(trace, 1, autotune_trials=3).startup_s == pytest.approx(3 * once, rel=0.1)  # profile: with overhead
        assert run(trace, 1, autotune_trials=0).startup_s == 0.0

    def test_tuning_has_the_interval_of_the_step_whose_kernels_it_runs(self, trace: Trace) -> None:
        ends = []
        for option in ({"autotune_trials": 3}, {"autotune_trials": 0, "warmup_steps": 1}):
            p = run(trace, 1, surgery_s=0.0, one_time_epoch=4, device="v100-sxm2-16gb", **option)
            ends.append((p.reconfiguration_low_s / p.reconfiguration_s, p.reconfiguration_high_s / p.reconfiguration_s))
        assert ends[0] == pytest.approx(ends[1])
        assert ends[0][0] < 0.95
        assert ends[0][1] > 1.05

    def test_a_compiled_step_hides_no_all_reduce(self, trace: Trace) -> None:
        settings = {**trace.run.hyperparameters, "compile": True}
        record = msgspec.structs.replace(trace.run, hyperparameters=settings)
        compiled = run(msgspec.structs.replace(trace, run=record), 8)
        for epoch in compiled.epochs:
            assert epoch.exposed_communication_s == pytest.approx(epoch.communication_s)
        assert any("nothing hides all-reduces" in note for note in compiled.notes)
        assert any("eager PyTorch" in note for note in compiled.notes)

    def test_broadcasting_buffers_costs_latency_before_every_step(self, trace: Trace) -> None:
        assert run(trace, 8, broadcast_buffers=True).total_s > run(trace, 8).total_s

    def test_a_dense_run_has_none(self, dense: Trace) -> None:
        assert run(dense, 64).reconfiguration_s == 0.0

    def test_one_time_reconfiguration_holds_the_first_architecture_until_then(self, trace: Trace) -> None:
        projection = run(trace, 1, one_time_epoch=4, autotune_trials=0)
        first, last = trace.epochs[0].architecture, trace.epochs[4].architecture
        assert [e.architecture for e in projection.epochs] == [first] * 4 + [last] * 2
        assert projection.reconfiguration_s == pytest.approx(0.25)
        assert not any("nothing is reconfigured" in note for note in projection.notes)

    def test_a_one_time_reconfiguration_before_the_first_recorded_one_says_that_it_is_none(self, trace: Trace) -> None:
        projection = run(trace, 1, one_time_epoch=1)
        assert {e.architecture for e in projection.epochs} == {trace.epochs[0].architecture}
        assert "the network of epoch 1 is still the first one: nothing is reconfigured" in projection.notes

    def test_channels_can_be_rounded_up(self, trace: Trace) -> None:
        rounded = run(trace, 8, channel_multiple=8)
        assert rounded.allreduce_bytes_per_gpu > run(trace, 8).allreduce_bytes_per_gpu
        assert rounded.epochs[0].architecture == trace.epochs[0].architecture


PENALISED = StepSetting(batch=64, momentum=0.9, regularizer="group_lasso")  # the trace's first step


class TestMiniBatch:
    def test_the_fixed_one_is_the_first_epochs(self, trace: Trace) -> None:
        assert {e.batch_per_gpu for e in run(trace, 1, minibatch="fixed").epochs} == {64}

    def test_the_planned_one_grows_at_reconfigurations_to_what_fits(self, trace: Trace) -> None:
        dense_need = iteration_memory(
            trace.network_of(trace.epochs[0]), PENALISED, device=load_device("a100-sxm4-40gb")
        ).device_bytes
        nominal = math.ceil(dense_need / VISIBLE_SHARE_HBM)
        projection = run(trace, 1, minibatch="planned", memory_bytes=nominal, batch_granularity=8)
        batches = [e.batch_per_gpu for e in projection.epochs]
        assert batches[0] == batches[1] == 64
        assert batches == sorted(batches)
        assert batches[2] > 64
        assert all(batch % 8 == 0 for batch in batches)
        assert all(e.peak_memory_bytes <= dense_need for e in projection.epochs)
        assert any(f"64 → {batches[2]} at epoch 2" in note for note in projection.notes)

    def test_more_memory_never_means_a_smaller_one(self, trace: Trace) -> None:
        sizes = [
            run(trace, 1, minibatch="planned", memory_bytes=m << 30).epochs[-1].batch_per_gpu for m in (1, 2, 4, 8)
        ]
        assert sizes == sorted(sizes)

    def test_it_stops_at_the_given_maximum(self, trace: Trace) -> None:
        assert run(trace, 1, minibatch="planned", max_batch=96).epochs[-1].batch_per_gpu == 96

    def test_one_that_does_not_fit_is_marked(self, trace: Trace) -> None:
        notes = run(trace, 1, memory_bytes=1 << 20).notes
        assert any("would not fit" in note for note in notes)

    def test_one_note_tells_all_epochs_that_do_not_fit(self, trace: Trace) -> None:
        """The networks of epochs 0, 2 and 4 need less and less; what may be had lies between two of them."""
        needs = [epoch.needed_memory_bytes for epoch in run(trace, 1, minibatch="fixed").epochs]
        assert needs[0] == needs[1] > needs[2] == needs[3] > needs[4] == needs[5]
        for most, which, up_to in (
            (needs[2], "epochs 0 to 1", ""),
            (needs[4], "epochs 0 to 3", "up to "),
            (needs[4] - 1, "epochs 0 to 5", "up to "),
        ):
            memory = math.ceil(most / VISIBLE_SHARE_HBM)
            (note,) = (n for n in run(trace, 1, minibatch="fixed", memory_bytes=memory).notes if "fit" in n)
            need = f"{up_to}{format_bytes(needs[0])} (an upper estimate)"
            may = f"a process on the a100-sxm4-40gb can have {format_bytes(most)}"
            assert note == f"{which}: a mini-batch of 64 needs {need}, {may}: it would not fit"
        fits = run(trace, 1, minibatch="fixed", memory_bytes=math.ceil(needs[0] / VISIBLE_SHARE_HBM))
        assert not any("fit" in note for note in fits.notes)

    def test_epochs_among_others_that_do_not_fit_are_counted(self, trace: Trace) -> None:
        small = tuple(
            msgspec.structs.replace(epoch, batch_per_gpu=16) if epoch.epoch in (2, 3) else epoch
            for epoch in trace.epochs
        )
        (told,) = (
            n for n in run(msgspec.structs.replace(trace, epochs=small), 1, memory_bytes=930 << 20).notes if "fit" in n
        )
        assert told.startswith("4 of the epochs 0 to 5: a mini-batch of ")

    def test_what_fills_all_that_the_data_sheet_names_does_not_fit(self, trace: Trace) -> None:
        need = iteration_memory(trace.network_of(trace.epochs[0]), PENALISED, device=load_device("a100-sxm4-40gb"))
        assert any("would not fit" in note for note in run(trace, 1, memory_bytes=need.device_bytes).notes)

    def test_the_buckets_of_several_gpus_need_memory(self, trace: Trace) -> None:
        network, a100 = trace.network_of(trace.epochs[0]), load_device("a100-sxm4-40gb")
        alone, together = run(trace, 1).epochs[0], run(trace, 2).epochs[0]
        assert alone.peak_memory_bytes == iteration_memory(network, PENALISED, device=a100).peak_bytes
        shared = iteration_memory(network, msgspec.structs.replace(PENALISED, num_gpus=2), device=a100)
        assert together.peak_memory_bytes == shared.peak_bytes > alone.peak_memory_bytes

    def test_accumulation_needs_less_memory(self, trace: Trace) -> None:
        whole, parts = run(trace, 1), run(trace, 1, micro_batches=4)
        assert parts.epochs[0].peak_memory_bytes < whole.epochs[0].peak_memory_bytes

    def test_between_its_passes_the_gradients_stay(self, trace: Trace) -> None:
        network, a100 = trace.network_of(trace.epochs[0]), load_device("a100-sxm4-40gb")
        need = iteration_memory(network, msgspec.structs.replace(PENALISED, passes=4), device=a100)
        assert run(trace, 1, micro_batches=4).epochs[0].peak_memory_bytes == need.peak_bytes
        assert need.peak_bytes > iteration_memory(network, PENALISED.with_batch(16), device=a100).peak_bytes

    def test_a_run_that_accumulated_gradients_does_so_in_a_projection(self, trace: Trace) -> None:
        epochs = tuple(msgspec.structs.replace(epoch, passes=4) for epoch in trace.epochs)
        recorded = msgspec.structs.replace(trace, epochs=epochs)

        def times(projection: RunProjection) -> list[EpochProjection]:
            """Without joules: the recorded watts are those of steps of one pass, or of four."""
            return [msgspec.structs.replace(epoch, energy_j=None) for epoch in projection.epochs]

        assert times(run(recorded, 8)) == times(run(trace, 8, micro_batches=4))
        assert times(run(recorded, 8, micro_batches=1)) == times(run(trace, 8))
        # 64 images over 128 GPUs: no pass is without an image
        assert times(run(recorded, 128, scaling="strong")) == times(run(trace, 128, scaling="strong"))

    def test_planned_mini_batches_of_one_sharding_are_not_taken_for_another(
        self, trace: Trace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []

        def most(network: Network, setting: StepSetting, **_: Any) -> int:
            asked.append(setting.sharding)
            return setting.batch

        monkeypatch.setattr("ptsim.sim.planning.largest_batch", most)
        cache = StepCache()
        for sharding in ("none", "zero2"):
            options = change(Options(), {"minibatch": "planned", "sharding": sharding})
            project(trace, cluster(), 8, options, cache=cache)
        assert set(asked) == {"none", "zero2"}

    def test_sharded_gradients_leave_two_buckets_of_the_users_size(
        self, trace: Trace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By default all 700 kB are one bucket, here two neighbours count. One cap's are not taken for another's."""
        network, a100, cache = trace.network_of(trace.epochs[0]), load_device("a100-sxm4-40gb"), StepCache()
        sharded = msgspec.structs.replace(PENALISED, num_gpus=8, sharding="zero2")
        peaks = []
        for cap in (25 * MIB, 20_000):
            options = change(Options(), {"sharding": "zero2", "bucket_bytes": cap})
            buckets = ddp_buckets(network, first_bucket_bytes=min(cap, MIB), bucket_bytes=cap)
            peaks.append(project(trace, cluster(), 8, options, cache=cache).epochs[0].peak_memory_bytes)
            assert peaks[-1] == iteration_memory(network, sharded, device=a100, buckets=buckets).peak_bytes
        whole = sum(-(-4 * p.num_elements // 512) * 512 for p in network.gradients)
        two = max(a.num_bytes + b.num_bytes for a, b in itertools.pairwise(buckets))
        assert peaks[0] - peaks[1] == whole - math.ceil(whole / 8) - two > 4 * network.num_parameters / 3
        asked: list[object] = []

        def most(network: Network, setting: StepSetting, **given: Any) -> int:
            asked.append(given["buckets"])
            return 32  # less than the recorded 64

        def need(network: Network, setting: StepSetting, **given: Any) -> MemoryNeed:
            asked.append(given["buckets"])
            return iteration_memory(network, setting, **given)

        monkeypatch.setattr("ptsim.sim.planning.largest_batch", most)
        monkeypatch.setattr("ptsim.sim.planning.iteration_memory", need)
        plan_run(Scenario(trace, cluster(), 8, change(options, {"minibatch": "planned"})))
        assert asked[:2] == [buckets, buckets]


class TestMarkedResults:
    def test_an_interrupted_run_is_projected_from_what_is_there(self, tmp_path: Path) -> None:
        trace = read_trace(shrinking_trace(tmp_path, epochs=8, recorded_epochs=3, status="interrupted"))
        projection = run(trace, 8)
        assert len(projection.epochs) == 3
        assert not projection.complete
        assert any("interrupted" in note and "3 of 8" in note for note in projection.notes)

    def test_a_crashed_run_too(self, tmp_path: Path) -> None:
        trace = read_trace(shrinking_trace(tmp_path, epochs=8, recorded_epochs=5, status=None))
        assert not run(trace, 8).complete

    def test_a_single_epoch_is_marked(self, tmp_path: Path) -> None:
        projection = run(read_trace(shrinking_trace(tmp_path, epochs=1)), 8)
        assert projection.complete
        assert any("single epoch" in note for note in projection.notes)

    def test_nodes_that_are_not_filled_are_said(self, trace: Trace) -> None:
        assert any("1 full and one with 4" in note for note in run(trace, 12).notes)
        assert not any("fill" in note for note in run(trace, 16).notes)

    def test_uneven_global_mini_batches_are_said(self, trace: Trace) -> None:
        # 64 images over 12 GPUs: 6 each
        assert any("up to 6 per GPU, 72 in all" in note for note in run(trace, 12, scaling="strong").notes)


class TestWrongInput:
    def test_no_epoch_at_all(self, tmp_path: Path) -> None:
        trace = read_trace(shrinking_trace(tmp_path, recorded_epochs=0))
        with pytest.raises(UsageError, match="no finished epoch"):
            run(trace, 8)

    def test_no_gpus(self, trace: Trace) -> None:
        with pytest.raises(UsageError, match="0 GPUs"):
            run(trace, 0)

    def test_more_gpus_than_there_are(self, trace: Trace) -> None:
        single = msgspec.structs.replace(cluster(), inter=None)
        with pytest.raises(UsageError, match="has 8 GPUs, 16 were asked for"):
            run(trace, 16, single)

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ({"scaling": "sideways"}, "scaling"),
            ({"bucket_size": 3}, "bucket_size"),
            ({"contention": 2.0}, "contention is 2"),
            ({"micro_batches": 0}, "micro_batches is 0"),
            ({"micro_batches": 1000}, "more than the 64 images"),
            ({"compression": 0.0}, "compression is 0"),
            ({"jitter": "a lot"}, "jitter"),
            ({"input_images_per_s": -5.0}, "input_images_per_s is -5"),
            ({"input": "magic"}, "magic"),
            ({"input": "dali", "input_images_per_s": 5.0}, "give one of them"),
            ({"input_stored_pixels": 5}, "needs an input pipeline"),
            ({"input": "dali"}, "does not say how many cores"),
            ({"one_time_epoch": 99}, "one_time_epoch is 99, the trace has 6 epochs"),
            ({"mixed_devices": {"t4": 9}}, "9 GPUs per node"),
            ({"mixed_devices": {"t4": 0}}, "at least one GPU"),
            ({"faults": {"mtbf_gpu_hours": 0.0}}, "mtbf_gpu_hours is 0"),
            ({"faults": {"mtbf_gpu_hours": 1.0, "policy": "pray"}}, "policy"),
            ({"precision": "fp8"}, "precision"),
        ],
    )
    def test_options_are_named(self, trace: Trace, options: dict[str, Any], problem: str) -> None:
        with pytest.raises(UsageError, match=problem):
            run(trace, 8, **options)

    def test_an_unknown_device(self, trace: Trace) -> None:
        with pytest.raises(UnknownNameError, match="gpu9000"):
            run(trace, 8, device="gpu9000")


class TestFrames:
    def test_simulate_gives_a_row_per_gpu_count(self, trace: Trace) -> None:
        frame = ptsim.simulate(trace, "dgx-a100", gpus=[1, 8, 64], scaling="strong")
        assert list(frame["gpus"]) == [1, 8, 64]
        needed = {
            "total_seconds", "compute_seconds", "exposed_communication_seconds", "allreduce_bytes_per_gpu",
            "energy_joules", "cost_usd", "low_seconds", "high_seconds", "tier",
        }  # fmt: skip
        assert needed <= set(frame.columns)
        assert (frame["low_seconds"] <= frame["total_seconds"]).all()

    def test_simulate_reads_files(self, tmp_path: Path) -> None:
        shrinking_trace(tmp_path)
        assert len(ptsim.simulate(tmp_path, "dgx-a100")) == 1
        with pytest.raises(FileFormatError):
            ptsim.simulate(tmp_path / "nowhere", "dgx-a100")

    def test_a_cache_changes_nothing(self, trace: Trace) -> None:
        cache = StepCache()
        for gpus in (8, 64):
            assert project(trace, cluster(), gpus, cache=cache) == project(trace, cluster(), gpus)

    def test_epochs_have_a_row_each_with_units_in_the_names(self, trace: Trace) -> None:
        projection = run(trace, 8)
        frame, recorded = projection.epochs_frame(), trace.epochs_frame()
        assert len(frame) == len(recorded) == 6
        assert frame.wall_seconds.tolist() == [epoch.total_s for epoch in projection.epochs]
        first = projection.epochs[0]
        assert frame.forward_seconds[0] == first.num_iterations * first.forward_s
        assert frame.wire_bytes_per_gpu.sum() == pytest.approx(projection.allreduce_bytes_per_gpu)
        seconds = {name for name in recorded if name.endswith("_seconds")}
        assert seconds - set(frame) == {"reconfiguration_seconds", "step_p10_seconds", "step_p90_seconds"}

    def test_the_frame_of_projections_agrees_with_them(self, trace: Trace) -> None:
        projection = run(trace, 8)
        row = projections_frame([projection]).iloc[0]
        assert row["total_seconds"] == projection.total_s
        assert row["gpu_hours"] == pytest.approx(8 * projection.total_s / 3600)


def test_a_step_is_run_as_recorded_but_for_what_is_asked(dense: Trace) -> None:
    settings = {**dense.run.hyperparameters, "momentum": 0.5, "regularizer": "proximal"}
    trace = msgspec.structs.replace(dense, run=msgspec.structs.replace(dense.run, hyperparameters=settings))
    asked = {"memory_format": "channels_last", "precision": "tf32", "sharding": "zero1"}
    made = Scenario(trace, cluster(), 2, change(Options(), asked)).setting(64, trace.epochs[0])
    assert (made.memory_format, made.precision, made.sharding) == ("channels_last", Precision.TF32, "zero1")
    assert (made.momentum, made.proximal) == (0.5, True)


@pytest.mark.parametrize(("options", "most"), [({}, 288), ({"max_batch": 1000}, 288), ({"max_batch": 100}, 96)])
def test_a_planned_mini_batch_is_no_larger_than_the_data_set(trace: Trace, options: dict[str, Any], most: int) -> None:
    """312 mini-batches of 64 are 312 images for each of 64 GPUs; it grows in steps of 32."""
    assert run(trace, 64, minibatch="planned", **options).epochs[-1].batch_per_gpu == most


@pytest.mark.parametrize(("gpus", "said"), [(3, False), (16, False), (9, True)])
def test_gpus_that_do_not_fill_their_nodes_are_said_where_there_is_a_full_one(
    dense: Trace, gpus: int, said: bool
) -> None:
    assert any("do not fill nodes of 8: 1 full and one with 1" in note for note in run(dense, gpus).notes) is said
    assert any("do not fill" in note for note in run(dense, gpus).notes) is said


def test_the_penalty_of_a_sharded_update_is_that_of_all_parameters(trace: Trace) -> None:
    whole, sharded = (run(trace, 8, contention=0.0, sharding=name).epochs[0] for name in ("none", "zero1"))
    assert whole.regularizer_s > 0
    assert sharded.regularizer_s == pytest.approx(whole.regularizer_s)
    assert sharded.forward_s == pytest.approx(whole.forward_s)
    assert sharded.optimizer_s == pytest.approx(whole.optimizer_s / 8)


def test_jitter_makes_a_gpu_no_slower_on_average(dense: Trace) -> None:
    steady, varied = (run(dense, 1, jitter=jitter, sampled_steps=2000) for jitter in (0.0, 0.5))
    assert varied.compute_s == pytest.approx(steady.compute_s, rel=0.04)  # 3.5 standard errors
