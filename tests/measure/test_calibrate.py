import functools
import itertools
import math
import time

import msgspec
import pytest
import torch

from ptsim.costs.interpolation import convolution_form
from ptsim.errors import (
    FileFormatError,
    MissingMeasurementError,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
)
from ptsim.hardware.profile import OperatorSetting, operator_of
from ptsim.hardware.profile_file import read_device_profile, write_device_profile
from ptsim.measure import calibrate
from ptsim.measure import profile as profiling
from ptsim.measure.calibrate import calibrate_gpu
from ptsim.measure.nvml import cpu_info
from ptsim.measure.rebuild import build_operator
from ptsim.network import Precision
from ptsim.trace.io import read_trace
from ptsim.trace.pace import beyond_steps_s, input_s_per_image
from tests.traces import shrinking_trace

CPU = torch.device("cpu")
FP32 = OperatorSetting(precision=Precision.FP32, memory_format="contiguous")
SMALL = {
    "widths": (4, 6, 8),
    "blocks": (1, 1, 1),
    "input_shape": (3, 8, 8),
    "batch": 4,
    "batch_step": 0,
    "num_train": 40,
    "epochs": 4,
    "remove_layers": False,
}


@pytest.fixture(scope="module", autouse=True)
def hurry():
    """Seven steps of each network are enough for a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "_MIN_STEPS_S", 0.0)
        yield


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return read_trace(shrinking_trace(tmp_path_factory.mktemp("run"), device=cpu_info().name, **SMALL))


@pytest.fixture(scope="module")
def profile(tmp_path_factory, trace):
    out = tmp_path_factory.mktemp("profile") / "here.toml"
    written = calibrate_gpu(out, device=CPU, traces=[trace], grid=False, minutes=2)
    assert read_device_profile(out).steps[0].architecture == written.steps[0].architecture
    return written


def test_a_trace_is_calibrated_with_exactly_its_architectures_and_operators(profile, trace):
    assert profile.complete
    assert profile.device == cpu_info().name
    assert {step.architecture for step in profile.steps} == set(trace.networks)
    known = {time.operator for time in profile.operators}
    for network in trace.networks.values():
        assert {operator_of(layer, batch=4, setting=FP32) for layer in network.layers} <= known
    step = profile.steps[0]
    assert step.step_low_s <= step.step_s <= step.step_high_s
    assert step.optimizer_s > 0
    assert step.regularizer_s is None  # nobody gave one


def test_a_run_whose_gradients_accumulate_is_measured_as_its_passes_ran(tmp_path, trace):
    """Mini-batches of four images in two passes: a step of two."""
    first = msgspec.structs.replace(trace.epochs[0], passes=2)
    accumulated = msgspec.structs.replace(trace, epochs=(first,), reconfigurations=())
    found = calibrate_gpu(tmp_path / "p.toml", device=CPU, traces=[accumulated], grid=False, rounds=1, minutes=1)
    assert [(step.architecture, step.batch) for step in found.steps] == [(first.architecture, 2)]


def test_the_loop_around_the_steps_is_the_traces_own(profile, trace):
    epoch = trace.epochs[1]
    images = epoch.num_images
    t = epoch.time
    outside = t.wall_s - t.forward_s - t.backward_s - t.regularizer_s - t.optimizer_s
    assert beyond_steps_s(epoch) == pytest.approx(outside)
    assert input_s_per_image(trace) == pytest.approx(outside / images, rel=0.5)
    assert profile.input_s_per_image.keys() == {"cifar10"}
    assert profile.reconfiguration_s == pytest.approx(0.25)


def test_a_resumed_calibration_measures_only_what_is_missing(tmp_path, trace, profile):
    out = tmp_path / "half.toml"
    write_device_profile(out, msgspec.structs.replace(profile, steps=profile.steps[:1]))
    asked = []
    again = calibrate_gpu(
        out, device=CPU, traces=[trace], grid=False, resume=True, progress=lambda what, _: asked.append(what)
    )
    assert len(asked) == 3 * (len(trace.networks) - 1)  # rounds
    assert len(again.steps) == len(trace.networks)
    assert again.steps[0].step_s == pytest.approx(profile.steps[0].step_s, rel=1e-5)
    assert again.runs == (trace.fingerprint,)


def _trained_with(trace, optimizer):
    """The first epoch of the run, with another optimizer."""
    run = msgspec.structs.replace(trace.run, hyperparameters={**trace.run.hyperparameters, "optimizer": optimizer})
    return msgspec.structs.replace(trace, run=run, epochs=trace.epochs[:1], reconfigurations=())


def test_runs_of_one_network_are_measured_each_with_its_optimizer_and_what_they_share_once(tmp_path, trace):
    out, asked = tmp_path / "p.toml", []
    traces = [trace, _trained_with(trace, "adam"), _trained_with(trace, "sgd")]
    found = calibrate_gpu(out, device=CPU, traces=traces, grid=False, rounds=1, minutes=2)
    first, last = trace.epochs[0].architecture, trace.epochs[-1].architecture
    measured = [(step.architecture, step.optimizer) for step in found.steps]
    assert measured[:2] == [(first, "sgd"), (last, "sgd")]  # although the third run has the first one, too
    assert measured.count((first, "sgd")) == measured.count((first, "adam")) == 1
    assert len(measured) == len(trace.networks) + 1
    calibrate_gpu(
        out, device=CPU, traces=traces, grid=False, rounds=1, resume=True, progress=lambda what, _: asked.append(what)
    )
    assert asked == []


def test_a_run_whose_optimizer_cannot_be_made_is_refused_before_anything_is_measured(tmp_path, trace):
    out, asked = tmp_path / "p.toml", []
    with pytest.raises(UnknownNameError, match="unknown optimizer 'lion'"):
        calibrate_gpu(
            out,
            device=CPU,
            traces=[trace, _trained_with(trace, "lion")],
            grid=False,
            progress=lambda what, _: asked.append(what),
        )
    assert asked == []
    assert not out.exists()


def test_a_network_that_no_penalty_knows_is_measured_without_one(tmp_path, trace):
    def unknown(*_):
        raise UnsupportedModelError("no groups")

    one = _trained_with(trace, "sgd")
    found = calibrate_gpu(
        tmp_path / "p.toml", device=CPU, traces=[one], make_regularizer=unknown, grid=False, rounds=1, minutes=1
    )
    assert [(step.architecture, step.regularizer_s) for step in found.steps] == [(one.epochs[0].architecture, None)]


@pytest.mark.parametrize("minutes", [0.0, math.inf, math.nan])
def test_a_limit_that_is_none_is_refused(tmp_path, trace, minutes):
    with pytest.raises(UsageError, match="expected a finite number above 0"):
        calibrate_gpu(tmp_path / "none.toml", device=CPU, traces=[trace], grid=False, minutes=minutes)


def test_time_that_has_run_out_leaves_a_valid_file_that_says_it_is_not_complete(tmp_path, trace):
    out = tmp_path / "short.toml"
    assert not calibrate_gpu(out, device=CPU, traces=[trace], grid=False, minutes=1e-9).complete
    assert not read_device_profile(out).complete


def test_the_grid_measures_single_operators_at_odd_channel_counts_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "_ZOO_STEPS", {"cpu": ()})
    monkeypatch.setattr(calibrate, "_GRID_BATCHES", {"cpu": (2,)})
    out = tmp_path / "grid.toml"
    first = calibrate_gpu(out, device=CPU, settings=[FP32], minutes=0.05)
    assert first.complete  # the grid has no end: what was asked for is there
    channels = {time.operator.output[0] for time in first.operators if time.operator.op == "conv2d"}
    assert 57 in channels
    assert all(time.context == "alone" for time in first.operators)
    second = calibrate_gpu(out, device=CPU, settings=[FP32], minutes=0.05, resume=True)
    assert len(second.operators) > len(first.operators)
    assert len({time.operator for time in second.operators}) == len(second.operators)


def test_the_grid_has_convolutions_pools_and_activations_of_every_kind():
    draws = itertools.islice(calibrate._grid([FP32], (8,)), 17, 17 + 6 * 16)
    operators = [operator for draw in draws for operator in calibrate._block(*draw)]
    shapes = {convolution_form(o.groups, o.inputs[0][0]) for o in operators if o.op == "conv2d"}
    assert shapes == {"dense", "depthwise", "grouped"}
    assert {o.op for o in operators} >= {
        *("batch_norm", "relu", "relu6", "silu", "hardswish", "gelu", "add", "linear", "dropout", "cat"),
        *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"),
    }
    for operator in {(o.op, o.groups > 1, o.kernel, o.inplace): o for o in operators}.values():
        small = msgspec.structs.replace(operator, batch=1)
        built = build_operator(small)
        given = [torch.zeros((1, *shape)) for shape in small.inputs]
        assert tuple(built(*given).shape[1:]) == small.output


def test_a_step_too_long_for_the_time_that_is_left_is_taken_once(tmp_path, trace, monkeypatch):
    slow_steps = []
    real = profiling._Run._step

    def slow(self):
        slow_steps.append(self)
        time.sleep(0.2)
        return real(self)

    monkeypatch.setattr(profiling._Run, "_step", slow)
    known = calibrate_gpu(tmp_path / "slow.toml", device=CPU, traces=[trace], grid=False, rounds=1, minutes=0.4 / 60)
    assert len(slow_steps) <= 4  # a first one, and one to measure, of at most two networks
    assert not known.complete


def test_an_interruption_keeps_what_was_measured(tmp_path, trace):
    out = tmp_path / "stopped.toml"

    def stop(what, _):
        if what.endswith("round 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_gpu(out, device=CPU, traces=[trace], grid=False, progress=stop)
    left = read_device_profile(out)
    assert not left.complete
    assert {step.architecture for step in left.steps} == set(trace.networks)


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried to allocate 9.00 GiB", "CUDA error: misaligned address"])
def test_a_network_whose_weights_do_not_fit_on_the_device_is_left_out_and_other_errors_are_not(tmp_path, trace, words):
    def full(*_):
        raise RuntimeError(words)

    ask = functools.partial(calibrate_gpu, tmp_path / "p.toml", device=CPU, traces=[trace], grid=False, minutes=1)
    if "memory" in words:
        found = ask(make_regularizer=full)
        assert (found.complete, found.steps) == (True, ())
    else:
        with pytest.raises(RuntimeError, match="misaligned"):
            ask(make_regularizer=full)


def test_a_file_measured_with_other_software_is_not_gone_on_with(tmp_path, trace, profile):
    out = tmp_path / "old.toml"
    write_device_profile(out, msgspec.structs.replace(profile, software={"torch": "2.0.1"}))
    with pytest.raises(MissingMeasurementError, match=r"measured with torch 2\.0\.1, here is torch"):
        calibrate_gpu(out, device=CPU, traces=[trace], resume=True)


def test_wrong_requests_are_refused_before_anything_is_measured(tmp_path, profile):
    out = tmp_path / "other.toml"
    with pytest.raises(UsageError, match="minutes is 0"):
        calibrate_gpu(out, device=CPU, minutes=0)
    with pytest.raises(FileFormatError, match="its folder does not exist"):
        calibrate_gpu(tmp_path / "none" / "x.toml", device=CPU)
    write_device_profile(out, profile)
    with pytest.raises(UsageError, match="exists"):
        calibrate_gpu(out, device=CPU)
    write_device_profile(out, msgspec.structs.replace(profile, device="NVIDIA L4"))
    with pytest.raises(MissingMeasurementError, match="measured on 'NVIDIA L4'"):
        calibrate_gpu(out, device=CPU, resume=True)
    write_device_profile(out, msgspec.structs.replace(profile, num_threads=77))
    with pytest.raises(MissingMeasurementError, match="with 77 threads"):
        calibrate_gpu(out, device=CPU, resume=True)


def test_the_order_of_architectures_is_from_the_outside_to_the_inside():
    assert calibrate._outside_in(0) == []
    assert calibrate._outside_in(1) == [0]
    assert calibrate._outside_in(5) == [0, 4, 2, 1, 3]


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UnknownNameError, match="unknown optimizer 'lion'; known: adam, adamw, rmsprop, sgd"):
        calibrate.make_optimizer("lion", [])


def test_an_operator_that_a_gpu_cannot_run_is_left_out_unless_nothing_works_any_more(monkeypatch, tmp_path, profile):
    def no_engine(*_):
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    waited = []
    monkeypatch.setattr(calibrate, "time_operator", no_engine)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    operator, gpu = profile.operators[0].operator, torch.device("cuda")
    made = calibrate._Calibration(tmp_path / "gpu.toml", gpu, profile, None)
    made._alone(operator)
    assert (made.profile, waited) == (profile, [gpu])

    def broken(_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        made._alone(operator)
    with pytest.raises(RuntimeError, match="unable to find an engine"):  # on a CPU it is an error like any other
        calibrate._Calibration(tmp_path / "cpu.toml", CPU, profile, None)._alone(operator)
