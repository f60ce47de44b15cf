"""What is trained when, and what the notes say of it: numbers by hand."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from ptsim.costs.memory import VISIBLE_SHARE_HBM, iteration_memory
from ptsim.hardware.catalog import load_device
from ptsim.setting import StepSetting
from ptsim.sim.options import Options
from ptsim.sim.planning import RunPlan, plan_run
from ptsim.sim.run import change
from ptsim.sim.scenario import Scenario, StepCache
from ptsim.trace.io import read_trace
from ptsim.trace.trace import Trace
from tests.sim.plans import cluster
from tests.traces import shrinking_trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Mini-batches of 64, 96 and 128 images, of 19,968 an epoch."""
    return read_trace(shrinking_trace(tmp_path_factory.mktemp("run"), num_train=20_000))


def planned(trace: Trace, gpus: int, **options: Any) -> RunPlan:
    return plan_run(Scenario(trace, cluster(), gpus, change(Options(), options)))


@pytest.mark.parametrize(
    ("gpus", "options", "batches", "steps"),
    [
        (1, {}, [64, 64, 96, 96, 128, 128], [312, 312, 208, 208, 156, 156]),  # as recorded
        (3, {}, [64, 64, 96, 96, 128, 128], [104, 104, 70, 70, 52, 52]),  # 69.3 of 288 images: one is not full
        (3, {"scaling": "strong"}, [22, 22, 32, 32, 43, 43], [303, 303, 208, 208, 155, 155]),  # of 66, 96 and 129
        (2, {"minibatch": "fixed"}, [64] * 6, [156] * 6),
        (200, {"scaling": "strong"}, [1] * 6, [100] * 6),  # no GPU is without an image
        (1, {"one_time_epoch": 3}, [64, 64, 64, 96, 96, 96], [312, 312, 312, 208, 208, 208]),
    ],
)
def test_every_recorded_image_is_trained_on_and_what_fills_no_mini_batch_is_a_step(
    trace: Trace, gpus: int, options: dict[str, Any], batches: list[int], steps: list[int]
) -> None:
    stages = planned(trace, gpus, **options).stages
    assert [stage.batch for stage in stages] == batches
    assert [stage.num_iterations for stage in stages] == steps


def test_a_network_of_another_epoch_is_trained_on_the_images_of_the_epoch_that_it_stands_in_for(trace: Trace) -> None:
    """The last epoch has 10,000 images: 104.2 mini-batches of the 96 that epoch 3 had; 78.1 of its own 128."""
    *epochs, last = trace.epochs
    shorter = (*epochs, msgspec.structs.replace(last, num_images=10_000, num_iterations=79))
    found = [
        planned(msgspec.structs.replace(trace, epochs=shorter), 1, **options).stages[-1]
        for options in ({}, {"one_time_epoch": 3})
    ]
    assert [(stage.batch, stage.num_iterations) for stage in found] == [(128, 79), (96, 105)]


@pytest.mark.parametrize("caps", [{}, {"first_bucket_bytes": 1000}])
def test_planned_mini_batches_that_hold_some_buckets_are_not_taken_for_those_that_hold_others(
    trace: Trace, caps: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def most(*_: Any, buckets: object, **__: Any) -> int:
        asked.append(buckets)
        return 64

    monkeypatch.setattr("ptsim.sim.planning.largest_batch", most)
    cache = StepCache()
    for others in (25_000, 50_000, 25_000):
        given = {"minibatch": "planned", "sharding": "zero2", "bucket_bytes": others, **caps}
        plan_run(Scenario(trace, cluster(), 8, change(Options(), given), cache=cache))
    num_networks = len({epoch.architecture for epoch in trace.epochs})
    assert len(asked) == len(set(asked)) == 2 * num_networks


def test_a_mini_batch_that_does_not_fit_begins_with_what_does(trace: Trace) -> None:
    setting = StepSetting(batch=32, momentum=0.9, regularizer="group_lasso")
    need = iteration_memory(trace.network_of(trace.epochs[0]), setting, device=load_device("a100-sxm4-40gb"))
    nominal = math.ceil(need.device_bytes / VISIBLE_SHARE_HBM)
    plan = planned(trace, 1, minibatch="planned", memory_bytes=nominal)
    assert [stage.batch for stage in plan.stages[:2]] == [32, 32]
    assert "mini-batch 64 does not fit at first; planned with 32" in plan.notes


@pytest.mark.parametrize(
    ("gpus", "says"),
    [
        # 64 images each: 19,968 are 1.02 times 19,584 and 0.61 times 32,768 and less than a third of 65,536
        (312, ""),
        (306, "the last mini-batch of an epoch is not full and counts as a whole step: up to 96% more"),
        (512, "the last mini-batch of an epoch is not full and counts as a whole step: up to 64% more"),
        (1024, "one global mini-batch holds more images than an epoch has: one step per epoch is projected"),
    ],
)
def test_how_much_more_than_the_images_need_is_noted(trace: Trace, gpus: int, says: str) -> None:
    notes = [note for note in planned(trace, gpus, minibatch="fixed").notes if "mini-batch" in note]
    assert len(notes) == (1 if says else 0)
    assert all(says in note for note in notes)


@pytest.mark.parametrize(
    ("waited", "options", "noted"),
    [
        (0.12, {}, True),
        (0.05, {}, False),
        (0.12, {"input_images_per_s": "recorded"}, False),
        (0.12, {"input_images_per_s": 100.0}, False),
    ],
)
def test_a_run_that_waited_for_its_data_says_that_the_projected_one_does_not(
    trace: Trace, waited: float, options: dict[str, Any], noted: bool
) -> None:
    epochs = tuple(
        msgspec.structs.replace(
            epoch, measured_time=msgspec.structs.replace(epoch.time, wall_s=100.0, data_wait_s=100 * waited)
        )
        for epoch in trace.epochs
    )
    notes = planned(msgspec.structs.replace(trace, epochs=epochs), 1, **options).notes
    assert any("the recorded run waited for data 12% of the time" in note for note in notes) == noted


@pytest.mark.parametrize(
    ("options", "first", "says"),
    [
        (
            {"max_batch": 48},
            48,
            ["mini-batch 64 is more than max_batch: the run begins with 48"],
        ),
        ({"max_batch": 16}, 16, ["mini-batch 64 is more than max_batch: the run begins with 16"]),
        ({"max_batch": 64}, 64, []),
        ({"max_batch": 80, "batch_granularity": 60}, 64, []),  # 60 is the only multiple, and 64 fit as well
    ],
)
def test_a_mini_batch_begins_no_larger_than_its_maximum_and_no_smaller_than_it_must(
    trace: Trace, options: dict[str, Any], first: int, says: list[str]
) -> None:
    plan = planned(trace, 1, minibatch="planned", **options)
    assert plan.stages[0].batch == first
    assert [note for note in plan.notes if note.startswith("mini-batch") and "per GPU" not in note] == says
    assert max(stage.batch for stage in plan.stages) <= options["max_batch"]


def test_only_mini_batches_that_are_planned_are_said_to_be_uneven(trace: Trace) -> None:
    """64, 96 and 128 images: by 5 GPUs none divides, by 64 only 96 does not, which a fixed one never is."""
    fixed = [
        [note for note in planned(trace, gpus, scaling="strong", minibatch=kind).notes if "cannot share" in note]
        for gpus, kind in ((5, "fixed"), (64, "fixed"), (64, "recorded"))
    ]
    assert fixed[0] == ["5 GPUs cannot share a global mini-batch of 64 evenly: rounded up to 13 per GPU, 65 in all"]
    assert fixed[1] == []
    assert fixed[2] == ["64 GPUs cannot share a global mini-batch of 96 evenly: rounded up to 2 per GPU, 128 in all"]


@pytest.mark.parametrize(
    ("options", "batches", "says"),
    [
        ({"max_batch": 96}, [64, 96], "mini-batch per GPU 64 → 96 at epoch 2"),  # as recorded
        (
            {"max_batch": 128},
            [64, 128],
            "mini-batch per GPU 64 → 128 at epoch 2 (recorded: 96; accuracy not projected)",
        ),
        # steps of 24 images for each of 2 passes: four times 48 is the most in 230
        (
            {"max_batch": 230, "batch_granularity": 24, "micro_batches": 2},
            [64, 192],
            "mini-batch per GPU 64 → 192 at epoch 2 (recorded: 96; accuracy not projected)",
        ),
    ],
)
def test_a_mini_batch_grows_by_whole_passes_and_says_where_it_outgrows_the_recorded_one(
    trace: Trace, options: dict[str, Any], batches: list[int], says: str
) -> None:
    plan = planned(trace, 1, minibatch="planned", **options)
    assert [plan.stages[0].batch, plan.stages[-1].batch] == batches
    assert [note for note in plan.notes if "→" in note] == [says]


def test_the_largest_pass_of_a_mini_batch_that_does_not_divide_counts(trace: Trace) -> None:
    """10 images in 4 passes are 3, 3, 3 and 1."""
    scenario = Scenario(trace, cluster(), 1, Options(micro_batches=4))
    assert scenario.setting(10, trace.epochs[0]).batch == 3
