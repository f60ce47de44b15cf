"""Which functions of ptsim ask for CUDA or NVML, and which test marked gpu reaches each: no branch may be forgotten."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import ptsim
from tests.gpu import test_on_a_gpu

ROOT = Path(ptsim.__file__).parent
sys.path.insert(0, str(Path(__file__).parents[2] / "analysis"))
lines_by_function = importlib.import_module("cuda_lines").lines_by_function


def functions_that_ask_for_cuda():
    """`module:Class.function` of every function that has a line which says cuda, calls NVML, or is a GPU's alone."""
    return {
        f"{path.relative_to(ROOT).with_suffix('').as_posix()}:{function}"
        for path in sorted(ROOT.rglob("*.py"))
        for function in lines_by_function(path.read_text(encoding="utf-8"))
        if function
    }


@pytest.mark.slow
def test_every_function_that_asks_for_cuda_is_reached_by_a_test_marked_gpu_or_listed_with_the_reason():
    found = functions_that_ask_for_cuda()
    assert found - set(COVERED) - set(UNREACHED) == set(), "name the test that reaches it, or say why none does"
    assert (set(COVERED) | set(UNREACHED)) - found == set(), "these no longer ask for CUDA"


def test_the_tests_that_are_named_exist():
    assert {test for test in COVERED.values() if not hasattr(test_on_a_gpu, test)} == set()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # as on a GPU
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_a_resumed_run_goes_on_on_the_gpu", {}),
        ("test_a_run_is_costed_and_reported_with_the_gpu_that_it_ran_on", {}),
        ("test_a_minibatch_grows_as_far_as_it_may_where_a_trial_step_fits", {}),
        ("test_ones_own_loop_prunes_on_the_gpu_and_its_number_format_is_seen", {"half": True}),
        ("test_ones_own_loop_prunes_on_the_gpu_and_its_number_format_is_seen", {"half": False}),
    ],
)
def test_what_is_asked_of_a_gpu_is_right_use_of_ptsim_on_a_cpu(name, arguments, tmp_path, monkeypatch):
    """Nobody has a GPU at hand to find out; the CPU stands for one that has no TF32."""
    monkeypatch.setattr(test_on_a_gpu, "CUDA", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    getattr(test_on_a_gpu, name)(tmp_path, **arguments)


REACHED_BY = {
    "test_calibrate_gpu_writes_a_profile_of_this_gpu": [
        "cli/calibrate_gpu:_device",
        "measure/calibrate:_begin",
        "measure/calibrate:_usual_settings",
    ],
    "test_the_passes_of_one_operator_are_timed_in_a_graph": [
        "measure/operators:_kernel_seconds",
        "measure/operators:_median_between_events",
        "measure/operators:_side_stream",
        "measure/operators:host_seconds",
        "measure/operators:time_operator",
    ],
    "test_a_capture_that_fails_takes_no_later_operator_with_it": [
        "measure/operators:_leave_failed_capture",
    ],
    "test_calibrate_network_joins_by_nccl_and_says_that_one_rank_is_too_few": [
        "cli/calibrate_network:_live",
    ],
    "test_doctor_sees_the_gpu": [
        "cli/doctor:_nvml",
        "cli/doctor:_print",
        "cli/doctor:_torch",
    ],
    "test_a_run_is_costed_and_reported_with_the_gpu_that_it_ran_on": [
        "costs/run:recorded_device",
        "report/methods:_run_facts",
    ],
    "test_a_run_trains_prunes_and_records_memory_energy_and_versions": [
        "measure/tf32:_new_switches",
        "measure/tf32:_old_values",
        "measure/tf32:tf32_allowed",
        "training/facts:check_numbers",
        "training/loop:_check_team",
        "training/loop:_train",
        "training/pruning:PruneTrain._reconfigure",
        "training/peak:PeakMemory.go_on",
        "training/peak:PeakMemory.so_far",
        "training/tracefile:library_versions",
    ],
    "test_copies_and_launches_have_plausible_rates": [
        "measure/load:LoadWatch.load",
        "measure/load:_Reference.__call__",
        "measure/load:_Reference.__init__",
        "measure/operators:_median_seconds",
        "measure/operators:_wake",
        "measure/operators:copy_bandwidth_bytes_per_s",
    ],
    "test_nvml_measures_energy_clocks_and_memory_under_load": [
        "measure/nvml:NvmlMeter.__init__",
        "measure/nvml:NvmlMeter._energy_j",
        "measure/nvml:_instant_mw",
        "measure/nvml:_memory",
        "measure/nvml:NvmlMeter._power_w",
        "measure/nvml:NvmlMeter._read_info",
        "measure/nvml:NvmlMeter._sample",
        "measure/nvml:NvmlMeter.close",
        "measure/nvml:open_meter",
    ],
    "test_a_profile_has_times_and_a_peak_and_tunes_its_convolutions": [
        "measure/profile:_as_in_training",
        "measure/profile:_held_bytes",
        "measure/profile:_take",
        "measure/profile:_Run.instant",
        "measure/profile:profile_network",
        "measure/profile:tuned_convolutions",
        "measure/profile:_Run.wait",
    ],
    "test_events_time_what_the_gpu_does": [
        "measure/timers:StepTimer.__init__",
        "measure/timers:_CudaClock.__init__",
        "measure/timers:_CudaClock.mark",
        "measure/timers:_CudaClock.resolve",
        "measure/timers:cuda_event",
    ],
    "test_the_flat_regulariser_equals_the_one_layer_by_layer": [
        "prune/criteria/group_lasso:GroupLasso.__init__",
    ],
    "test_images_from_files_come_through_pinned_memory": [
        "training/data:StreamedData._batches",
        "training/datasets:quarter_of_memory_bytes",
    ],
    "test_a_device_that_does_not_exist_is_refused": [
        "training/distributed:_device",
    ],
    "test_a_minibatch_that_does_not_fit_is_told_without_leaving_memory_taken": [
        "training/step:fits",
    ],
    "test_a_minibatch_grows_as_far_as_it_may_where_a_trial_step_fits": [
        "training/minibatch:BatchPolicy.grow",
    ],
    "test_live_data_sets_come_through_pinned_memory": [
        "training/live:LiveData.__init__",
    ],
    "test_ones_own_loop_prunes_on_the_gpu_and_its_number_format_is_seen": [
        "measure/tf32:convolutions_use_tf32",
        "training/formats:pass_format",
        "training/growth:proposed_batch",
    ],
}
COVERED = {function: test for test, functions in REACHED_BY.items() for function in functions}
UNREACHED = {
    "capture/standins:_on": "answers for a stand-in, which has no device of its own",
    "cli/doctor:_gpu_remedy": "says why torch sees no GPU",
    "costs/profiled:profiled_step": "reads a profile, which says on what it was measured",
    "hardware/catalog:profiled_device": "the same",
    "measure/calibrate:_Calibration._alone": "an operator that cuDNN has no kernel for",
    "measure/collectives:_timed": "all-reduces by NCCL need two GPUs",
    "measure/collectives:measure_table": "the same",
    "measure/kineto:_profile": "reads files, which say on what they were recorded",
    "export/chakra:_step_content": "reads a trace, which says on what it was recorded",
    "training/distributed:join_team": "the backend is that of several ranks, and NCCL wants a GPU for each",
    "training/wrapping:wrap": "DistributedDataParallel needs two GPUs",
}
