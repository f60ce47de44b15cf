"""Prices of steps, surgery and wrapping: their parts by hand, and what several projections share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from ptsim.answers.repredict import device_profile_of
from ptsim.costs.collectives import all_reduce
from ptsim.costs.datasheet import datasheet_step, load_fit
from ptsim.costs.energy import published_power
from ptsim.costs.scaling import load_scaling
from ptsim.hardware.profile import StepMeasurement
from ptsim.network import LayerKind, Parameter
from ptsim.setting import StepSetting, TorchVersion
from ptsim.sim.options import Options
from ptsim.sim.planning import plan_run
from ptsim.sim.pricing import Pricer
from ptsim.sim.projection import RunProjection
from ptsim.sim.run import StepCache, change, project, record_steps
from ptsim.sim.scenario import Scenario
from ptsim.sim.step import simulate_steps
from ptsim.sim.work import StepResult, TrainingJob
from ptsim.trace.io import read_trace
from ptsim.trace.schema import Reconfiguration
from ptsim.trace.trace import Trace
from tests.sim.plans import cluster
from tests.traces import shrinking_trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Surgery after epochs 1 and 3 took 0.25 s each."""
    return read_trace(shrinking_trace(tmp_path_factory.mktemp("run"), num_train=20_000))


def run(trace: Trace, gpus: int, **options: Any) -> RunProjection:
    return project(trace, cluster(), gpus, change(Options(), {"autotune_trials": 0, **options}))


def ends(projection: RunProjection) -> tuple[float, ...]:
    """Of the run, of its first epoch and of its reconfigurations."""
    p, first = projection, projection.epochs[0]
    return (p.low_s, p.high_s, first.low_s, first.high_s, p.reconfiguration_low_s, p.reconfiguration_high_s)


@pytest.mark.parametrize("first", [1, 8])
def test_the_interval_of_many_gpus_is_their_own_whatever_was_projected_before(trace: Trace, first: int) -> None:
    """Of a step from the data sheet eight GPUs have another interval than one."""
    unmeasured, cache = msgspec.structs.replace(trace, profiles=()), StepCache()
    shared = {gpus: project(unmeasured, cluster(), gpus, cache=cache) for gpus in (first, 9 - first)}
    assert shared[1].tier == shared[8].tier == "datasheet"
    for gpus in (1, 8):
        assert ends(shared[gpus]) == ends(project(unmeasured, cluster(), gpus))


@pytest.mark.parametrize(
    "options", [{}, {"micro_batches": 4, "autotune_trials": 3}, {"mixed_devices": {"v100-sxm2-16gb": 2}}]
)
def test_one_gpu_and_one_of_several_keep_their_own_steps_whatever_was_projected_before(
    trace: Trace, options: dict[str, Any]
) -> None:
    """On GPUs, where one among others is slower than alone, and over gloo, where it is not."""
    over_gloo, cache = msgspec.structs.replace(cluster(), library="gloo"), StepCache()
    changed = change(Options(), options)
    for machine, gpus in ((cluster(), 8), (cluster(), 1), (over_gloo, 8), (cluster(), 64), (over_gloo, 1)):
        shared = project(trace, machine, gpus, changed, cache=cache)
        assert shared == project(trace, machine, gpus, changed)


@pytest.mark.parametrize(
    ("durations", "options", "expected_s"),
    [
        ([(1, 0.25), (1, 1.0), (3, 0.5)], {}, 1.75),  # another program changes the network after pruning did
        ([(1, 0.4), (3, 0.25), (4, 0.1)], {"one_time_epoch": 3}, 0.25),  # none before epoch 3: the median
        ([(1, 0.4), (3, 0.25), (4, 0.1)], {"one_time_epoch": 2}, 0.4),
        ([(1, 0.4), (3, None)], {}, 0.8),  # the only one that was measured stands for the other
    ],
)
def test_surgery_takes_what_was_recorded_before_that_epoch_and_else_the_median(
    trace: Trace, durations: list[tuple[int, float | None]], options: dict[str, Any], expected_s: float
) -> None:
    first = trace.reconfigurations[0]
    events: tuple[Reconfiguration, ...] = tuple(
        msgspec.structs.replace(first, epoch=epoch, measured_duration_s=seconds) for epoch, seconds in durations
    )
    projection = run(msgspec.structs.replace(trace, reconfigurations=events), 1, **options)
    assert projection.reconfiguration_s == pytest.approx(expected_s)


@pytest.mark.parametrize("unused", [False, True])
def test_wrapping_broadcasts_the_network_and_the_order_of_its_buckets(trace: Trace, unused: bool) -> None:
    """A broadcast is half an all-reduce. The first step sends all gradients together, after backward."""
    caps = {"bucket_bytes": 100_000, "first_bucket_bytes": 50_000}
    projection, network = run(trace, 64, find_unused_parameters=unused, **caps), trace.network_of(trace.epochs[0])

    def seconds(num_bytes: int) -> float:
        return all_reduce(num_bytes, cluster(), 64).seconds

    gradient = 4 * network.num_parameters
    norms = [layer for layer in network.layers if layer.kind is LayerKind.BATCH_NORM]
    buffers = sum(8 * layer.out_channels + 8 for layer in norms)  # two fp32 a channel, and an int64
    expected = seconds(gradient + buffers) / 2
    if not unused:  # then buckets are made anew, in an order of one int32 for every parameter
        shown_s = projection.epochs[0].exposed_communication_s  # by every step, and so no part of wrapping
        expected += seconds(4 * len(network.parameters)) / 2 + max(0.0, seconds(gradient) - shown_s)
    assert projection.startup_s == pytest.approx(expected, rel=1e-9)


def test_a_later_step_beside_compilation_and_warm_up_costs_what_it_takes(trace: Trace) -> None:
    """On 8 GPUs: 3 warm-up steps and 7 s of compilation come on top of the broadcasts."""
    plain, warm = run(trace, 8), run(trace, 8, compile_s=7.0, warmup_steps=3)
    assert warm.startup_s - plain.startup_s == pytest.approx(7 + 3 * plain.epochs[0].step_s)
    added = [7 + 3 * plain.epochs[epoch].step_s for epoch in (2, 4)]
    assert warm.reconfiguration_s - plain.reconfiguration_s == pytest.approx(sum(added))


@pytest.mark.parametrize(
    ("options", "sent", "moved"),
    [
        ({}, 1.0, 0.0),
        # read 4 bytes and write 2, divide these in place, read them and write 4: 16 of memory for every 4
        ({"gradient_format": "bf16"}, 0.5, 4.0),
        ({"compression": 0.25}, 0.25, 3.0),  # 4 + 1 + 1 + 1 + 1 + 4
        ({"gradient_format": "fp16", "compression": 0.5}, 0.25, 3.0),
    ],
)
def test_a_smaller_gradient_is_sent_faster_and_converted_at_the_memorys_speed(
    trace: Trace, options: dict[str, Any], sent: float, moved: float
) -> None:
    """All gradients are in one bucket; the A100's memory moves 1,555 GB/s."""
    gradient = 4 * trace.network_of(trace.epochs[0]).num_parameters
    expected = all_reduce(round(sent * gradient), cluster(), 8).seconds + moved * gradient / 1555e9
    assert run(trace, 8, **options).epochs[0].communication_s == pytest.approx(expected, rel=1e-9)


def test_buffers_take_half_an_all_reduce_and_are_no_gradient(trace: Trace) -> None:
    plain, broadcast = run(trace, 8), run(trace, 8, broadcast_buffers=True)
    norms = [layer for layer in trace.network_of(trace.epochs[0]).layers if layer.kind is LayerKind.BATCH_NORM]
    added = all_reduce(sum(8 * layer.out_channels + 8 for layer in norms), cluster(), 8).seconds / 2
    assert broadcast.epochs[0].communication_s - plain.epochs[0].communication_s == pytest.approx(added)
    assert broadcast.allreduce_bytes_per_gpu == plain.allreduce_bytes_per_gpu


def test_a_tensor_without_a_gradient_has_a_hook_where_ddp_reduces_it(trace: Trace) -> None:
    """With find_unused_parameters it does: one copy more, in the backward pass, and nothing else takes longer."""
    idle = Parameter(name="idle", layer="", shape=(3,))
    networks = {
        name: msgspec.structs.replace(network, parameters=(*network.parameters, idle))
        for name, network in trace.networks.items()
    }
    alone = msgspec.structs.replace(trace, profiles=())
    plain, beside = (
        run(found, 8, find_unused_parameters=True).epochs[0]
        for found in (alone, msgspec.structs.replace(alone, networks=networks))
    )
    assert beside.backward_s - plain.backward_s == pytest.approx(load_scaling().tensor_s, rel=1e-6)
    assert beside.forward_s == pytest.approx(plain.forward_s, rel=1e-9)


@pytest.mark.parametrize("other", [{"penalty_coefficient": 0.0}, {"passes": 4}])
def test_epochs_of_one_network_that_are_run_differently_have_prices_of_their_own(
    trace: Trace, other: dict[str, Any]
) -> None:
    first, *rest = trace.epochs
    mixed = msgspec.structs.replace(trace, epochs=(msgspec.structs.replace(first, **other), *rest))
    plain, found = run(trace, 8).epochs, run(mixed, 8).epochs
    assert plain[0].step_s == plain[1].step_s == found[1].step_s
    assert found[0].step_s != found[1].step_s
    assert (found[0].regularizer_s > 0) == ("passes" in other)


def test_epochs_of_one_network_with_other_mini_batches_have_prices_of_their_own(trace: Trace) -> None:
    """The second epoch with 256 images a GPU in place of 64 costs what it does where all epochs have as many."""
    first, second, *rest = trace.epochs
    assert (first.architecture, first.batch_per_gpu) == (second.architecture, 64)
    larger = [msgspec.structs.replace(epoch, batch_per_gpu=256) for epoch in (first, second)]
    mixed, all_large = (
        run(msgspec.structs.replace(trace, epochs=(begin, larger[1], *rest)), 8).epochs for begin in (first, larger[0])
    )
    assert mixed[1].step_s == all_large[1].step_s
    assert mixed[1].needed_memory_bytes == all_large[1].needed_memory_bytes
    assert mixed[0].step_s == run(trace, 8).epochs[0].step_s
    assert mixed[0].step_s < mixed[1].step_s


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((8, {}), (8, {"sharding": "zero1"})),
        ((2, {"sharding": "zero1"}), (4, {"sharding": "zero1"})),  # a half and a quarter of the update
        # passes of 16 images: two of each mini-batch of 32, and one of 16
        ((2, {"scaling": "strong", "micro_batches": 2}), (4, {"scaling": "strong"})),
        ((1, {"autotune_trials": 3}), (1, {"autotune_trials": 6})),
        ((1, {"channel_multiple": 16}), (1, {"channel_multiple": 32})),
        ((8, {}), (8, {"first_bucket_bytes": 100_000})),
        ((8, {"first_bucket_bytes": 100_000}), (8, {"first_bucket_bytes": 100_000, "bucket_bytes": 150_000})),
        ((8, {"first_bucket_bytes": 100_000}), (8, {"first_bucket_bytes": 100_000, "find_unused_parameters": True})),
        ((1, {"minibatch": "planned"}), (1, {"minibatch": "planned", "max_batch": 100})),
        ((1, {"minibatch": "planned"}), (1, {"minibatch": "planned", "memory_bytes": 2 << 30})),
        ((1, {"minibatch": "planned"}), (1, {"minibatch": "planned", "batch_granularity": 1000})),
    ],
)
def test_projections_of_a_study_are_the_same_whatever_was_projected_before(
    trace: Trace, before: tuple[int, dict[str, Any]], after: tuple[int, dict[str, Any]]
) -> None:
    cache, found = StepCache(), []
    for gpus, options in (before, after):
        changed = change(Options(), options)
        found.append(project(trace, cluster(), gpus, changed, cache=cache))
        assert found[-1] == project(trace, cluster(), gpus, changed)
    assert (found[0].total_s, found[0].energy_j) != (found[1].total_s, found[1].energy_j)


def test_every_kind_of_mixed_gpu_has_times_of_its_own(trace: Trace) -> None:
    """A mean over eight GPUs is linear: one T4 and one V100 add to it what either adds by itself."""
    own, t4, v100, both = (
        run(trace, 8, mixed_devices=dict.fromkeys(names, 1))
        for names in ((), ("t4",), ("v100-sxm2-16gb",), ("v100-sxm2-16gb", "t4"))
    )
    assert own.compute_s < v100.compute_s < t4.compute_s
    assert both.compute_s == pytest.approx(t4.compute_s + v100.compute_s - own.compute_s)
    assert both.epochs[0].step_s == pytest.approx(t4.epochs[0].step_s)  # all wait for the slowest


def test_a_single_gpu_reduces_no_map_of_used_parameters(trace: Trace) -> None:
    assert run(trace, 1, find_unused_parameters=True) == run(trace, 1)


def test_what_is_said_of_mixed_gpus_is_said_of_no_others(trace: Trace) -> None:
    assert not any("mixed" in note for gpus in (1, 8) for note in run(trace, gpus).notes)


def test_a_gpu_that_is_alone_would_take_longer_among_others_by_slowdown_and_hooks(trace: Trace) -> None:
    """As two GPUs show: they differ in that, and in what they wait for each other."""
    alone, two = (project(trace, cluster(), gpus).epochs[0] for gpus in (1, 2))
    scenario = Scenario(trace, cluster(), 1, Options())
    stage = plan_run(scenario).stages[0]
    assert Pricer(scenario).among_others_s(stage) == pytest.approx(two.compute_s - alone.compute_s, rel=1e-6)
    hooks_s = load_scaling().tensor_s * len(stage.network.gradients)
    assert Pricer(scenario).among_others_s(stage) == pytest.approx(hooks_s + load_scaling().slowdown * alone.compute_s)


def test_a_run_is_of_todays_software_and_its_interval_allows_for_no_other(trace: Trace) -> None:
    """Where nobody says the version, an A100's step from the data sheet may be one of young software, and longer."""
    epochs = tuple(msgspec.structs.replace(epoch, measured_step=None) for epoch in trace.epochs)  # nor any spread
    first = run(msgspec.structs.replace(trace, profiles=(), epochs=epochs), 1).epochs[0]
    known, unknown = (
        datasheet_step(
            trace.network_of(epochs[0]),
            cluster().gpu,
            StepSetting(batch=64, momentum=0.9, regularizer="group_lasso", torch_version=version),
        )
        for version in (TorchVersion(2, 8), None)
    )
    assert first.step_s == pytest.approx(known.compute_s)
    assert first.high_s == pytest.approx(first.num_iterations * known.high_s)
    assert unknown.high_s > known.high_s


Call = tuple[Sequence[TrainingJob], dict[str, Any]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What is simulated; one GPU and one step of it is enough."""
    asked: list[Call] = []

    def simulate(jobs: Sequence[TrainingJob], **how: Any) -> tuple[StepResult, ...]:
        asked.append((jobs, how))
        few = [msgspec.structs.replace(job, speeds=(1.0,), counts=()) for job in jobs]
        return simulate_steps(few, **{**how, "jitter": None, "num_steps": 1})

    monkeypatch.setattr("ptsim.sim.pricing.simulate_steps", simulate)
    return asked


@pytest.mark.parametrize(
    ("gpus", "options", "counts", "steps", "warmup"),
    [
        (8, {}, (8,), 1, 0),  # equal GPUs do the same, step for step
        (8, {"input_images_per_s": 100.0}, (8,), 1, 1),  # the first mini-batch is waited for in full
        (16, {"mixed_devices": {"t4": 2}}, (12, 4), 1, 0),
        (8, {"jitter": 0.1, "sampled_steps": 7}, (), 7, 0),
        (5000, {"jitter": 0.1}, (), 4, 0),  # 20,000 of a GPU in all
        (30_000, {"jitter": 0.1}, (), 1, 0),
        (8, {"straggler_fraction": 0.5, "straggler_slowdown": 2.0}, (), 1, 0),
        (16, {"jobs": 3}, (16,), 20, 2),
    ],
)
def test_as_many_gpus_and_steps_are_simulated_as_a_stable_mean_needs(
    trace: Trace,
    calls: list[Call],
    gpus: int,
    options: dict[str, Any],
    counts: tuple[int, ...],
    steps: int,
    warmup: int,
) -> None:
    run(trace, gpus, **options)
    jobs, how = calls[1]  # of the low, the expected and the high end
    assert (jobs[0].counts, how["num_steps"], how["num_warmup"]) == (counts, steps, warmup)
    assert len(jobs[0].speeds) == (len(counts) or gpus)
    number = options.get("jobs", 1)
    assert [job.start_s for job in jobs] == pytest.approx([i * jobs[0].plan.compute_s / number for i in range(number)])
    assert how["sharing"] == tuple(range(1, number + 1))  # the jobs' nodes share the links evenly


def test_recorded_gpus_wait_for_those_that_are_not_shown(trace: Trace) -> None:
    """Two of eight are shown, and none of the T4s for which they wait."""
    options = change(Options(), {"mixed_devices": {"t4": 2}})
    (first, *_) = record_steps(trace, cluster(), 8, options, num_steps=2, shown=2)
    assert {span.gpu for span in first.result.spans} == {0, 1}
    assert {span.step for span in first.result.spans} == {0, 1}
    assert first.result.step_s == pytest.approx(project(trace, cluster(), 8, options).epochs[0].step_s)


def test_a_step_recorded_among_gpus_has_its_hooks_and_its_slowdown_beside_collectives(trace: Trace) -> None:
    profile = device_profile_of([trace])
    among = tuple(msgspec.structs.replace(step, data_parallel=True) for step in profile.steps)
    unmeasured = msgspec.structs.replace(trace, profiles=())

    def priced(gpus: int, steps: tuple[StepMeasurement, ...]) -> RunProjection:
        known = msgspec.structs.replace(profile, steps=steps)
        return project(unmeasured, cluster(), gpus, device_profile=known)

    alone, single, many = priced(1, among), priced(8, profile.steps), priced(8, among)
    assert many.tier == "profiled"
    tensors = len(trace.network_of(trace.epochs[0]).gradients)
    own, other = many.epochs[0], single.epochs[0]
    assert own.hooks_s == 0
    assert own.compute_s == pytest.approx(alone.epochs[0].compute_s, rel=1e-9)
    assert own.exposed_communication_s == pytest.approx(own.communication_wait_s, rel=1e-9)
    slower = 1 + load_scaling().slowdown
    assert other.compute_s == pytest.approx(slower * own.compute_s + tensors * load_scaling().tensor_s, rel=1e-6)
    assert any("one of several GPUs" in note for note in alone.notes)
    assert not any("one of several GPUs" in note for note in (*many.notes, *single.notes))


def test_a_sharded_step_of_two_nodes_scatters_and_gathers_in_rings(trace: Trace) -> None:
    """One bucket; 28 hops of 2 µs and 2 of 5, 15/8 of the message at 25 GB/s, half of it for either."""
    gradient = 4 * trace.network_of(trace.epochs[0]).num_parameters
    ring_s = 66e-6 + 15 / 8 * gradient / 25e9
    sharded, whole = (run(trace, 16, sharding=name) for name in ("zero1", "none"))
    assert sharded.epochs[0].communication_s == pytest.approx(ring_s, rel=1e-9)
    assert whole.epochs[0].communication_s < ring_s
    assert sharded.allreduce_bytes_per_gpu == pytest.approx(whole.allreduce_bytes_per_gpu)


@pytest.mark.parametrize(("precision", "num_bytes"), [("fp32", 12), ("bf16", 24)])
@pytest.mark.parametrize("gpus", [1, 8])
def test_further_passes_sum_up_gradients_and_cast_again(
    trace: Trace, gpus: int, precision: str, num_bytes: int
) -> None:
    """A sum reads two numbers and writes one, with a kernel per tensor, which takes the least time of one.

    In half precision weights and gradients are cast, 2 and 4 bytes each.
    """
    epochs = tuple(msgspec.structs.replace(epoch, device=None) for epoch in trace.epochs)  # without samples of power
    unmeasured = msgspec.structs.replace(trace, profiles=(), epochs=epochs)
    network = trace.network_of(trace.epochs[0])
    once, four = (
        run(unmeasured, gpus, precision=precision, micro_batches=passes, jitter=0.0).epochs[0] for passes in (1, 4)
    )
    fitted = load_fit().efficiency
    again_s = num_bytes * network.num_parameters / (fitted.stream_bandwidth * 1555e9)
    again_s += len(network.gradients) * fitted.launch_s
    again_s *= 1 + load_scaling().slowdown * (gpus > 1)
    assert four.optimizer_s - once.optimizer_s == pytest.approx(3 * again_s)
    assert four.step_s == pytest.approx(four.compute_s + four.exposed_communication_s)
    power = published_power(cluster().gpu)
    waiting_s = four.overhead_s + four.hooks_s + four.exposed_communication_s
    streaming_s = four.step_s - waiting_s - four.product_s
    step_j = four.product_s * power.product_w + streaming_s * power.stream_w + waiting_s * power.waiting_w
    assert four.energy_j == pytest.approx(gpus * four.num_iterations * step_j)
