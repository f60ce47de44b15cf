"""Where the steps of a recording are and how long their phases took: recordings of a few events, times by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule

from ptsim.errors import FileFormatError
from ptsim.measure.kineto_events import read_recording
from ptsim.measure.kineto_steps import read_steps
from tests.measure.recordings import CONV, NODE, UPDATE, Events, ms


def test_the_gpu_is_idle_from_the_last_kernel_to_the_next_steps_first(tmp_path: Path) -> None:
    """Waiting for the loader lies between two steps: 2 + 3 + 0.5 ms of work in 12 ms, in 6.5 ms for the last step."""
    events = Events()
    for i in range(2):
        events.step(2.0 * i, 12.0 * i)
    idle = [step.device_idle for step in events.steps(tmp_path)]
    assert idle == pytest.approx([1 - 5.5 / 12, 1 - 5.5 / 6.5])


def test_what_the_last_step_still_runs_is_no_idleness_of_the_next(tmp_path: Path) -> None:
    """The second step begins at 6 ms; a copy of the first one runs from 5.2 to 8 ms, over its first kernel's end."""
    events = Events()
    events.step(0.0, 0.0, update=False)
    events.update((1.2, 0.2), (5.2, 2.8))
    events.step(2.0, 6.0, forward=1.0)  # kernels from 6 to 10 and from 11 to 11.5
    idle = [step.device_idle for step in events.steps(tmp_path)]
    assert idle == pytest.approx([0.2 / 6, 1.0 / 5.5])


def test_the_host_is_idle_where_it_runs_nothing_or_waits(tmp_path: Path) -> None:
    events = Events()
    events.step(0.0, 0.0)  # busy for 0.2, 0.3 and 0.05 ms of 2
    events.add("cpu_op", "aten::convolution", (0.15, 0.1))  # inside another
    events.add("cpu_op", "aten::item", (0.85, 0.3))  # busy for 0.3 ms less 0.2
    events.add("cuda_runtime", "cudaStreamSynchronize", (0.9, 0.2))
    events.add("cuda_runtime", "cudaLaunchKernel", (1.5, 0.1))
    events.add("cuda_runtime", "cudaDeviceSynchronize", (1.7, 0.2))
    events.add("cpu_op", "aten::stack", (1.95, 0.5), tid=3)  # the loader's, 0.05 ms of it in the step
    (step,) = events.steps(tmp_path)
    assert step.host_idle == pytest.approx(1 - 0.8 / 2)


@pytest.mark.parametrize("runtime", ["cuda", "hip"])
@pytest.mark.parametrize("old", [False, True])
def test_the_host_is_as_idle_by_every_name(tmp_path: Path, runtime: str, old: bool) -> None:
    """0.55 ms of operators in 2 ms, of which 0.1 is waiting, and 0.1 of a launch; old versions call marks operators."""
    events = Events()
    events.step(0.0, 0.0)
    events.add(f"{runtime}_runtime", f"{runtime}StreamSynchronize", (0.15, 0.1))
    events.add(f"{runtime}_runtime", f"{runtime}LaunchKernel", (1.5, 0.1))
    for event in events.events if old else ():
        event["cat"] = "Operator" if event["cat"] in ("cpu_op", "user_annotation") else event["cat"]
    (step,) = events.steps(tmp_path)
    assert step.host_idle == pytest.approx(1 - 0.55 / 2)


@pytest.mark.parametrize("tail", [False, True], ids=["whole steps", "and a pass without its update"])
def test_passes_that_are_marked_one_by_one_are_one_step_up_to_the_update(tmp_path: Path, tail: bool) -> None:
    """Kernels of two passes begin at 0 and 6 ms, the update at 12; the next step begins at 13, the tail at 26."""
    events = Events()
    for i in range(2):
        events.step(4.0 * i, 13.0 * i, update=False)
        events.step(4.0 * i + 2, 13.0 * i + 6)
    if tail:
        events.step(8.0, 26.0, update=False)
    steps = events.steps(tmp_path)
    assert [step.passes for step in steps] == [2, 2]
    assert ms(*(step.step_s for step in steps)) == pytest.approx([13, 13 if tail else 12.5])
    for step in steps:
        assert ms(step.forward_s, step.backward_s, step.optimizer_s) == pytest.approx([4, 6, 0.5])
        assert step.compute_s == pytest.approx((4e-3 + 6e-3) / 2 + 0.5e-3)
    found = events.imported(tmp_path)
    assert found.images_per_second == pytest.approx(2 * 4 / 13e-3)
    assert found.optimizer_seconds == pytest.approx(0.5e-3)


@pytest.mark.parametrize("left_out", [None, 0, 1], ids=["every update", "the first left out", "the second left out"])
def test_several_steps_under_one_mark_are_as_many(tmp_path: Path, left_out: int | None) -> None:
    """A mark for every two, whose kernels begin 10 ms after the others': 2 + 3 + 1 + 0.5 ms, the last one alone.

    What is left out is left out by a GradScaler.
    """
    events, scaled = Events(), left_out is not None
    for i in range(4):
        events.step(2.0 * i, 10.0 * i, update=i != left_out)
        if scaled:
            events.add("cpu_op", "aten::_amp_update_scale_", (2.0 * i + 1.6, 0.1))
    events.mark({0.0: 4.0, 4.0: 4.0})
    steps = events.steps(tmp_path)
    assert [step.passes for step in steps] == [1] * (3 if scaled else 4)
    assert ms(*(step.step_s for step in steps)) == pytest.approx([10.0, 10.0, 10.0, 6.5][scaled:])
    assert ms(*(step.optimizer_s for step in steps)) == pytest.approx([0.5] * len(steps))
    found = events.imported(tmp_path)
    assert found.images_per_second == pytest.approx(4 / 10e-3)
    assert not any("gradients" in note for note in found.notes)


@pytest.mark.parametrize(("others", "refused"), [(30, True), (2, True), (1, False)])
def test_several_gpus_of_one_process_are_refused(tmp_path: Path, others: int, refused: bool) -> None:
    """As DataParallel runs them, beside 30 kernels of the first; one in thirty (3 %) takes no part."""
    recorded = Events()
    for i in range(10):
        recorded.step(10.0 * i, 5 + 10.0 * i)  # three kernels
    for i in range(others):
        recorded.device("a replica's", (5 + i, 0.5), device=1)
    if not refused:
        assert len(recorded.steps(tmp_path)) == 10
        return
    with pytest.raises(FileFormatError, match="holds kernels of 2 GPUs that one process ran"):
        recorded.steps(tmp_path)


def test_a_mark_between_the_passes_of_a_step_divides_no_step(tmp_path: Path) -> None:
    """Six passes, an update after every second one, a mark for every three: 13 ms from one first kernel to the next."""
    events = Events()
    for i in range(3):
        events.step(4.0 * i, 13.0 * i, update=False)
        events.step(4.0 * i + 2, 13.0 * i + 6)
    events.mark({0.0: 6.0, 6.0: 6.0})
    steps = events.steps(tmp_path)
    assert [step.passes for step in steps] == [2, 2, 2]
    assert ms(*(step.step_s for step in steps)) == pytest.approx([13, 13, 12.5])
    assert ms(*(step.optimizer_s for step in steps)) == pytest.approx([0.5] * 3)


def test_a_step_whose_update_a_grad_scaler_leaves_out_is_no_pass_of_the_next(tmp_path: Path) -> None:
    events = Events()
    for index in range(3):
        events.step(10.0 * index, 10.0 * index + 1, update=index > 0)
        events.add("cpu_op", "aten::_amp_update_scale_", (10.0 * index + 1.6, 0.1))
    steps = events.steps(tmp_path)
    assert [step.passes for step in steps] == [1, 1]
    assert ms(steps[0].step_s) == pytest.approx([10.0])


@pytest.mark.parametrize(("cut_off", "ends"), [(False, 9), (True, 8)])
def test_validation_between_two_steps_is_part_of_neither(tmp_path: Path, cut_off: bool, ends: float) -> None:
    """Its kernels run from 9 to 15 ms; the first step ends where they begin, and the next one begins at 20 ms.

    A pass in front of it without an update, whose kernels begin at 8 ms, is no step.
    """
    events = Events()
    events.step(0.0, 0.0)
    if cut_off:
        events.step(2.0, 8.0, update=False)
    events.add("user_annotation", "ProfilerStep#1", (4.0, 2.0))
    events.add("cpu_op", "aten::conv2d", (4.5, 0.5), (9.0, 6.0), **CONV)
    events.step(6.0, 20.0)
    assert ms(*(step.step_s for step in events.steps(tmp_path))) == pytest.approx([ends, 6.5])


@pytest.mark.parametrize("on_gpu", [True, False])
def test_activations_that_are_computed_again_are_no_operators_backward_pass(tmp_path: Path, on_gpu: bool) -> None:
    """A node of 1 ms of the host and 3 ms of the GPU, around 0.3 and 2 ms more of a checkpoint's forward pass."""
    events = Events(on_gpu=on_gpu)
    events.add("user_annotation", "ProfilerStep#0", (0.0, 4.0))
    events.layer((0.1, 0.2), (1.0, 1.0), ((0.0, 2.0), (2.0, 3.0)))
    events.add("cpu_op", "ConvolutionBackward0", (1.1, 0.8), tid=2, **{"Sequence number": 0})  # the node's own
    events.add("cpu_op", "aten::conv2d", (1.2, 0.3), tid=2, **{"Sequence number": 70})
    events.add("cpu_op", "aten::convolution", (1.25, 0.2), (5.0, 2.0), tid=2, **{"Sequence number": 70})
    events.update((3.0, 0.2), (8.0, 0.5))
    (step,) = events.steps(tmp_path)
    (call,) = step.calls
    assert ms(call.backward_s, step.recomputed_s) == pytest.approx([3.0, 2.0] if on_gpu else [0.7, 0.3])
    assert ms(step.backward_s) == pytest.approx([5.0] if on_gpu else [1.0])  # of the step it is a part
    found = events.imported(tmp_path)
    assert f"{'40' if on_gpu else '30'}% of the backward pass computes activations again" in " ".join(found.notes)
    assert ms(found.profile.steps[0].layers_backward_s) == pytest.approx([5.0] if on_gpu else [1.0])


def test_what_a_gradient_of_a_gradient_runs_is_no_recomputation(tmp_path: Path) -> None:
    """Its operators have numbers, too; and the older kind of checkpoints runs a backward pass inside a node."""
    events = Events(on_gpu=False)
    events.add("user_annotation", "ProfilerStep#0", (0.0, 4.0))
    events.layer((0.1, 0.2), (1.0, 1.0), ((0.0, 2.0), (2.0, 3.0)))
    events.add("cpu_op", "aten::mul", (1.1, 0.1), tid=2, **{"Sequence number": 70})
    events.add("cpu_op", f"{NODE}ConvolutionBackward0", (1.3, 0.4), tid=2, **{"Sequence number": 71})
    events.add("cpu_op", "aten::conv2d", (1.4, 0.1), tid=2, **{"Sequence number": 72})
    events.update((3.0, 0.2), (8.0, 0.5))
    (step,) = events.steps(tmp_path)
    assert ms(step.calls[0].backward_s, step.recomputed_s) == pytest.approx([1.0, 0.0])
    assert not any("again" in note for note in events.imported(tmp_path).notes)


def test_a_custom_autograd_function_is_part_of_the_step_and_noted(tmp_path: Path) -> None:
    """As torch.compile and checkpointing record theirs: 5 ms forward behind a convolution of 2, 4 ms backward."""
    events = Events()
    events.add("user_annotation", "ProfilerStep#0", (0.0, 3.0))
    events.layer((0.1, 0.2), (1.5, 0.2), ((0.0, 2.0), (11.0, 3.0)))
    events.layer((0.4, 0.2), (1.2, 0.2), ((2.0, 5.0), (7.0, 4.0)), name="Fused")
    events.update((2.0, 0.2), (14.0, 1.0))
    (step,) = events.steps(tmp_path)
    assert ms(step.forward_s, step.backward_s, step.optimizer_s) == pytest.approx([7, 7, 1])
    found = events.imported(tmp_path)
    assert [(row.op, *ms(row.forward_seconds, row.backward_seconds)) for row in found.operators] == [
        ("conv2d", pytest.approx(2), pytest.approx(3)),
        ("Fused", pytest.approx(5), pytest.approx(4)),
    ]
    assert "the profile leaves out Fused, whose shapes cannot be told" in found.notes
    kept = found.profile.steps[0]
    assert ms(kept.layers_forward_s, kept.layers_backward_s) == pytest.approx([2, 3])
    assert kept.num_layers == 1


@pytest.mark.parametrize(
    ("name", "backward_ms", "noted"), [("Fused", 0.02, False), ("Fused", 0.03, True), ("aten::reshape", 0.03, False)]
)
def test_what_is_left_out_is_noted_from_a_hundredth_of_the_operators_time(
    tmp_path: Path, name: str, backward_ms: float, noted: bool
) -> None:
    """Beside a convolution of 5 ms, which is 99 of 100 parts with 0.0505 ms: 0.03 ms forward and the rest backward.

    No profile has a row for a reshaping.
    """
    events = Events()
    events.layer((0.1, 0.2), (1.5, 0.2), ((0.0, 2.0), (11.0, 3.0)))
    events.layer((0.4, 0.2), (1.2, 0.2), ((2.0, 0.03), (7.0, backward_ms)), name=name)
    assert any("leaves out" in note for note in events.imported(tmp_path).notes) == noted


@pytest.mark.parametrize(("on_gpu", "forward", "backward"), [(True, 8, 4), (False, 2, 10)])
def test_a_step_of_two_networks_counts_each_update_once(
    tmp_path: Path, on_gpu: bool, forward: float, backward: float
) -> None:
    """A critic of 2 + 3 ms and its update of 1, then a generator of 3 + 4 and its update of 2: 15 ms.

    On a GPU the forward pass is what lies before the last forward kernel's end, on a CPU before the first backward
    node's begin; the critic's update is in neither.
    """
    events = Events(on_gpu=on_gpu)
    events.add("user_annotation", "ProfilerStep#0", (0.0, 20.0))
    for at, name, times in ((0.0, "aten::conv2d", (2.0, 3.0, 1.0)), (6.0, "aten::linear", (3.0, 4.0, 2.0))):
        spans = (at, times[0]), (at + times[0], times[1])
        events.layer(*spans, spans, name=name)
        last = at + times[0] + times[1], times[2]
        events.update(last, last)
    (step,) = events.steps(tmp_path)
    assert step.passes == 1
    assert ms(step.forward_s, step.backward_s, step.optimizer_s) == pytest.approx([forward, backward, 3])


def test_communication_that_an_update_waits_for_is_taken_off_once(tmp_path: Path) -> None:
    """A critic's update from 5 to 6 ms, of which 0.4 are an all-reduce alone; a generator's of 2 ms as above."""
    events = Events()
    events.add("user_annotation", "ProfilerStep#0", (0.0, 20.0))
    events.layer((0.0, 2.0), (2.0, 3.0), ((0.0, 2.0), (2.0, 3.0)))
    events.add("user_annotation", UPDATE, (5.0, 1.0))
    for at, name in ((5.0, "aten::add_"), (5.4, "aten::all_reduce"), (5.8, "aten::add_")):
        events.add("cpu_op", name, (at, 0.1))
        kernel = ("ncclDevKernel_AllReduce", (5.3, 0.4)) if "reduce" in name else ("sgd", (at, 0.2))
        events.device(*kernel, **{"External id": len(events.events)})
    events.layer((6.0, 3.0), (9.0, 4.0), ((6.0, 3.0), (9.0, 4.0)), name="aten::linear")
    events.update((13.0, 2.0), (13.0, 2.0))
    (step,) = events.steps(tmp_path)
    assert ms(step.forward_s, step.backward_s, step.optimizer_s) == pytest.approx([8, 4, 2.6])
    assert ms(step.exposed_s) == pytest.approx([0.4])


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize(("on_gpu", "update"), [(True, 0.5), (False, 3.0)])
def test_an_optimizer_that_runs_the_pass_as_its_closure_takes_only_what_follows(
    tmp_path: Path, on_gpu: bool, update: float, marked: bool
) -> None:
    """As Lightning trains: the update's mark, from 0 to 10 ms, is around a pass of two layers that ends at 7."""
    events = Events(on_gpu=on_gpu)
    if marked:
        events.add("user_annotation", "ProfilerStep#0", (0.0, 11.0))
    events.add("user_annotation", UPDATE, (0.0, 10.0))
    events.layer((1.0, 1.0), (5.0, 2.0), ((20.0, 1.0), (24.0, 2.0)))
    events.layer((2.0, 1.0), (3.0, 2.0), ((21.0, 1.0), (22.0, 2.0)))
    events.add("cpu_op", "aten::add_", (7.0, 1.0), (28.0, 0.5))
    (step,) = events.steps(tmp_path)
    assert ms(step.forward_s, step.backward_s, step.optimizer_s) == pytest.approx([2, 4, update])


def test_an_update_that_wraps_another_is_one(tmp_path: Path) -> None:
    """As ZeroRedundancyOptimizer's: from 7 to 10 ms, around one from 7.5 to 8."""
    events = Events(on_gpu=False)
    for at in (0.0, 10.0):
        events.layer((at, 3.0), (at + 3, 4.0), ((0, 0), (0, 0)))
        events.add("user_annotation", "Optimizer.step#ZeroRedundancyOptimizer.step", (at + 7, 3.0))
        events.update((at + 7.5, 0.5), (0, 0))
    steps = events.steps(tmp_path)
    assert [ms(step.step_s, step.optimizer_s) for step in steps] == [pytest.approx([10, 3])] * 2


def test_without_marks_a_step_ends_with_its_update_and_what_follows_the_last_one_is_none(tmp_path: Path) -> None:
    events = Events(on_gpu=False)
    events.add("cpu_op", "aten::stack", (0.0, 1.0))  # the loader's
    for at in (2.0, 9.0):
        events.layer((at, 2.0), (at + 2, 3.0), ((0, 0), (0, 0)))
        events.update((at + 5, 1.0), (0, 0))
    events.add("cpu_op", "aten::conv2d", (16.0, 5.0))
    steps = events.steps(tmp_path)
    assert [ms(s.step_s, s.forward_s, s.backward_s, s.optimizer_s) for s in steps] == [
        pytest.approx([8, 2, 3, 1]),
        pytest.approx([7, 2, 3, 1]),
    ]
    events.events = [event for event in events.events if event["name"] not in (UPDATE, "aten::add_")]
    (step,) = events.steps(tmp_path)
    assert (step.step_s, step.optimizer_s) == (pytest.approx(21e-3), None)
    assert any("lack the update" in note for note in events.imported(tmp_path).notes)


@pytest.mark.parametrize(
    ("copied", "exposed"), [("Memcpy HtoD (Pinned -> Device)", 4), ("Memcpy DtoD (Device -> Device)", 3)]
)
def test_the_next_images_copy_hides_no_communication(tmp_path: Path, copied: str, exposed: float) -> None:
    """An all-reduce from 5 to 9 ms, when only a copy of a millisecond runs beside it."""
    events = Events()
    events.step(0.0, 0.0, update=False)
    events.update((1.2, 0.2), (9.0, 0.5))
    events.add("cpu_op", "aten::copy_", (1.5, 0.2))
    events.device(copied, (6.0, 1.0), category="gpu_memcpy", **{"External id": len(events.events)})
    events.add("cpu_op", "c10d::allreduce_", (1.8, 0.1))
    events.device("ncclDevKernel_AllReduce", (5.0, 4.0), **{"External id": len(events.events)})
    (step,) = events.steps(tmp_path)
    assert ms(step.communication_s, step.exposed_s) == pytest.approx([4, exposed])


def test_what_gloo_does_while_nothing_computes_is_exposed(tmp_path: Path) -> None:
    """From 5 to 9 ms; backward nodes run until 6 and from 8 to 8.5: of 5.5 ms backward 2 are waiting."""
    events = Events(on_gpu=False)
    events.add("user_annotation", "ProfilerStep#0", (0.0, 10.0))
    events.layer((1.0, 1.0), (3.0, 3.0), ((0, 0), (0, 0)))
    events.layer((2.0, 1.0), (8.0, 0.5), ((0, 0), (0, 0)))
    events.add("cpu_op", "gloo:all_reduce", (5.0, 4.0), tid=3)
    events.update((9.0, 1.0), (0, 0))
    (step,) = events.steps(tmp_path)
    assert ms(step.forward_s, step.backward_s, step.optimizer_s) == pytest.approx([2, 3.5, 1])
    assert ms(step.communication_s, step.exposed_s) == pytest.approx([4, 2.5])
    assert step.host_idle == pytest.approx(1 - (1 + 1 + 3 + 0.5 + 0.25) / 10)  # 0.25: of the update
    assert events.imported(tmp_path).overlap_fraction == pytest.approx(1 - 2.5 / 4)


def test_a_collective_that_a_backward_node_launches_is_no_work_of_its_operator(tmp_path: Path) -> None:
    """As hooks on gradients do: of 3 ms of kernels and an all-reduce of 4 only the 3 are the convolution's."""
    events = Events()
    events.layer((0.1, 0.2), (0.5, 0.3), ((0.0, 2.0), (2.0, 3.0)))
    events.device("ncclDevKernel_AllReduce", (4.0, 4.0), **{"External id": len(events.events) - 1})
    events.update((1.2, 0.2), (9.0, 0.5))
    (step,) = events.steps(tmp_path)
    assert [event.name for event in step.calls[0].backward[0].kernels][1:] == ["ncclDevKernel_AllReduce"]
    assert ms(step.calls[0].forward_s, step.calls[0].backward_s, step.communication_s) == pytest.approx([2, 3, 4])


def test_a_step_of_more_passes_than_most_makes_the_others_no_larger(tmp_path: Path) -> None:
    """Two steps of one pass, 10 ms after each other, and one of two passes that takes 6 + 2 + 3 + 1 + 0.5 ms."""
    events = Events()
    for i in range(4):
        events.step(2.0 * i, (0.0, 10.0, 20.0, 26.0)[i], update=i != 2)
    assert [step.passes for step in events.steps(tmp_path)] == [1, 1, 2]
    found = events.imported(tmp_path)
    assert found.images_per_second == pytest.approx(4 / 10e-3)
    assert not any("gradients" in note for note in found.notes)


def test_the_mini_batch_is_that_of_most_operators(tmp_path: Path) -> None:
    """A convolution takes the eight channels of four images for 32 images of one channel."""
    events = Events()
    for i in range(3):
        events.layer((0.1 + i, 0.2), (9.5 - i, 0.3), ((10.0 * i, 2.0), (90.0 - 10 * i, 3.0)))
    (folded,) = (event for event in events.events if event["name"] == "aten::conv2d" and event["ts"] == 1100)
    folded["args"]["Input Dims"] = [[32, 1, 16, 16], [8, 1, 3, 3], [], [], [], [], []]
    found = events.imported(tmp_path)
    assert sorted(time.operator.batch for time in found.profile.operators) == [4, 32]
    assert found.batch == 4


def test_a_convolution_of_images_has_no_input_gradient_whatever_else_runs_inside_it(tmp_path: Path) -> None:
    """Autocast copies the weight inside the convolution, and that copy has a node of its own."""
    events = Events()
    events.layer((0.1, 0.6), (2.0, 0.5), ((0.0, 2.0), (4.0, 3.0)))
    events.add("cpu_op", "aten::convolution_backward", (2.1, 0.3), tid=2, **{
        "Concrete Inputs": ["", "", "[False, True, False]"]})  # fmt: skip
    events.layer((0.2, 0.1), (3.0, 0.1), ((0.0, 0.1), (8.0, 0.1)), name="aten::to")
    (row,) = events.imported(tmp_path).operators
    assert row.op == "conv2d"
    assert row.shape is not None
    assert not row.shape.input_needs_gradient


@pytest.mark.parametrize(
    ("begins", "median"),
    [((0, 10, 24), 10), ((0, 10, 24, 40), 14)],  # 10, 14, 6.5; 10, 14, 16, 6.5: the upper one of two
)
def test_a_rank_counts_with_its_median_step(tmp_path: Path, begins: tuple[int, ...], median: float) -> None:
    events = Events()
    for i, begin in enumerate(begins):
        events.step(2.0 * i, float(begin))
    found = events.imported(tmp_path)
    assert found.step_seconds == pytest.approx(median * 1e-3)
    assert found.ranks[0].num_steps == len(begins)


def test_the_profiles_step_is_the_median_with_the_fastest_and_the_slowest(tmp_path: Path) -> None:
    """3 ms backward and half of update beside 2, 5 and 3 ms forward."""
    events = Events()
    for i, forward in enumerate((2.0, 5.0, 3.0)):
        events.step(2.0 * i, 20.0 * i, forward=forward)
    found = events.imported(tmp_path)
    (row,), (operator,), (step,) = found.operators, found.profile.operators, found.profile.steps
    assert ms(row.forward_seconds, row.backward_seconds) == pytest.approx([10 / 3, 3])  # means
    assert ms(operator.forward_s, operator.backward_s) == pytest.approx([10 / 3, 3])
    assert row.calls_per_step == 1
    assert ms(step.step_low_s, step.step_s, step.step_high_s) == pytest.approx([5.5, 6.5, 8.5])
    assert ms(step.forward_s, step.layers_forward_s, step.layers_backward_s) == pytest.approx([3, 3, 3])
    assert step.num_samples == 3


class Square(torch.autograd.Function):
    """A custom function, as fused layers are."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


@pytest.mark.parametrize("closure", [False, True])
def test_what_torch_records_of_accumulation_a_custom_function_and_a_closure_is_read(
    tmp_path: Path, closure: bool
) -> None:
    """Four passes are recorded and marked, each second one with an update, which may run the pass itself."""
    model, images = nn.Conv2d(3, 8, 3, bias=False), torch.randn(4, 3, 16, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = tmp_path / "recorded.json"

    def one_pass() -> torch.Tensor:
        loss: torch.Tensor = Square.apply(model(images)).mean()
        loss.backward()
        return loss

    with profile(
        activities=[ProfilerActivity.CPU],
        schedule=schedule(wait=1, warmup=1, active=4),
        record_shapes=True,
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        for number in range(6):
            updates = number % 2 == 1
            if not (updates and closure):
                one_pass()
            if updates:
                optimizer.step(one_pass if closure else None)
                optimizer.zero_grad()
            profiler.step()
    steps = read_steps(read_recording(path))
    assert [step.passes for step in steps] == [2, 2]
    for step in steps:
        assert [call.event.name for call in step.calls] == ["aten::conv2d", "Square", "aten::mean"] * 2
        assert step.parameters == [8 * 3 * 3 * 3]
        assert step.optimizer_s is not None
        assert 0 < step.forward_s + step.backward_s + step.optimizer_s < step.step_s
        assert min(step.forward_s, step.backward_s, step.optimizer_s) > 0


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_pass_of_several_is_profiled_without_the_sums_of_their_gradients(tmp_path: Path, on_gpu: bool) -> None:
    """Two passes of 2 ms forward and 3 ms backward; the second one's gradients are added to the first one's in 0.5 ms.

    The host, where there is no GPU, takes 0.2 and 0.3 ms and 0.05 for the sum. The update takes 0.5 ms, or 0.2.
    """
    events = Events(on_gpu=on_gpu)
    events.add("user_annotation", "ProfilerStep#0", (0.0, 3.0))
    for begin, gpu, kernel in ((0.1, 0.0, None), (1.1, 6.0, (11.0, 0.5))):
        events.layer((begin, 0.2), (begin + 0.2, 0.3), ((gpu, 2.0), (gpu + 2.0, 3.0)))
        events.add("cpu_op", f"{NODE}torch::autograd::AccumulateGrad", (begin + 0.5, 0.05), tid=2)
        gradient = {"Input Dims": [[8, 8, 3, 3]]}
        events.add("cpu_op", "torch::autograd::AccumulateGrad", (begin + 0.5, 0.05), kernel, tid=2, **gradient)
    events.update((2.0, 0.2), (12.0, 0.5))
    (step,) = events.steps(tmp_path)
    (profiled,) = events.imported(tmp_path).profile.steps
    told = (step.passes, profiled.num_parameters, profiled.num_tensors)
    assert told == (2, 576, 1)
    both, each = ((4, 6.5, 0.5), (2, 3, 0.5, 5.5)) if on_gpu else ((0.4, 0.7, 0.2), (0.2, 0.325, 0.2, 0.725))
    assert ms(step.forward_s, step.backward_s, step.optimizer_s) == pytest.approx(both)
    assert ms(profiled.forward_s, profiled.backward_s, profiled.optimizer_s, profiled.step_s) == pytest.approx(each)
