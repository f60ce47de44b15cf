"""Profiled steps of other programs: written by hand in Kineto's form, and recorded here by torch.profiler."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule

from ptsim.answers.predict import Prediction, predict
from ptsim.capture.network import capture_network
from ptsim.cli.main import run
from ptsim.costs.scaling import load_scaling
from ptsim.errors import UsageError
from ptsim.hardware.catalog import load_device
from ptsim.hardware.profile import OperatorSetting, operator_of
from ptsim.hardware.profile_file import read_device_profile, write_device_profile
from ptsim.measure.kineto import import_kineto
from ptsim.measure.kineto_events import read_recording
from ptsim.measure.kineto_steps import read_steps
from ptsim.network import LayerKind, Network, Precision
from tests.measure.recordings import gpu_trace, write


def test_kernels_of_agpu_trace_are_added_up_by_the_operators_that_launched_them(tmp_path: Path) -> None:
    found = import_kineto([write(tmp_path / "rank0.json", gpu_trace())])
    (row,) = found.operators
    assert (row.op, row.forward_seconds, row.backward_seconds) == ("conv2d", pytest.approx(2e-3), pytest.approx(3e-3))
    assert row.shape is not None
    assert row.shape.inputs == ((8, 16, 16),)
    assert row.shape.output == (32, 8, 8)
    assert row.shape.stride == (2, 2)
    assert not row.shape.input_needs_gradient
    assert (found.precision, found.memory_format) == (Precision.FP16, "channels_last")
    assert found.device == "NVIDIA A100-SXM4-80GB"


def test_communication_is_exposed_where_nothing_computes(tmp_path: Path) -> None:
    found = import_kineto([write(tmp_path / "rank0.json", gpu_trace())])
    # The all-reduce runs from 4.5 to 8.5 ms of a step; a kernel covers it up to 5.5 ms.
    assert found.communication_seconds == pytest.approx(4e-3)
    assert found.exposed_communication_seconds == pytest.approx(3e-3)
    assert found.overlap_fraction == pytest.approx(0.25)


def test_a_collective_that_another_thread_launches_outside_of_operators_is_communication(tmp_path: Path) -> None:
    """As Horovod's does: 4 ms behind 5 ms of a step's kernels, of which the backward one covers 1 ms."""
    document = gpu_trace()
    for event in [event for event in document["traceEvents"] if event["name"].startswith("nccl")]:
        number = event["args"].pop("External id") + 1000
        event["args"]["correlation"] = number
        call = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 99, "tid": 77}
        begin_us = 2e3 * (number // 1100) + 950  # in the step of the host
        document["traceEvents"].append(call | {"ts": begin_us, "dur": 1.0, "args": {"correlation": number}})
    found = import_kineto([write(tmp_path / "a.json", document)])
    assert found.communication_seconds == pytest.approx(4e-3)
    assert found.exposed_communication_seconds == pytest.approx(3e-3)
    assert found.step_seconds == pytest.approx(12e-3)


def test_a_step_whose_forward_pass_was_not_recorded_is_left_out_with_its_time(tmp_path: Path) -> None:
    document = gpu_trace(num_steps=4)
    document["traceEvents"] = [
        event
        for event in document["traceEvents"]
        if not (event["name"] in ("aten::conv2d", "aten::convolution") and event["ts"] < 2000)
    ]
    steps = read_steps(read_recording(write(tmp_path / "rank0.json", document)))
    # The two whole steps begin 12 ms apart; the last one ends with its update, 9.5 ms after its begin.
    assert [step.step_s for step in steps] == pytest.approx([12e-3, 12e-3, 9.5e-3])


def test_a_gpu_step_lasts_from_its_first_kernel_to_the_next_steps_although_the_host_runs_ahead(tmp_path: Path) -> None:
    found = import_kineto([write(tmp_path / "rank0.json", gpu_trace(num_steps=4))])
    assert found.step_seconds == pytest.approx(12e-3)
    assert found.images_per_second == pytest.approx(8 * 4 / 12e-3)
    step = found.profile.steps[0]
    # 2 ms forward, 3.5 ms with the gap in front of backward, 0.5 ms update; no communication.
    assert (step.forward_s, step.backward_s, step.optimizer_s) == pytest.approx((2e-3, 3.5e-3, 0.5e-3))
    assert step.num_parameters == 32 * 8 * 9


def test_a_step_without_shapes_has_its_times_and_tells_nothing_of_mini_batch_and_operators(tmp_path: Path) -> None:
    document = gpu_trace()
    for event in document["traceEvents"]:
        for key in ("Input Dims", "Input type", "Input Strides", "Concrete Inputs"):
            event["args"].pop(key, None)
    found = import_kineto([write(tmp_path / "rank0.json", document)])
    assert (found.batch, found.images_per_second, found.memory_format) == (None, None, "contiguous")
    assert [note.partition(";")[0] for note in found.notes] == [
        "number formats were not recorded", "strides were not recorded",
        "no shapes were recorded, so nothing can be predicted from it",
    ]  # fmt: skip
    step = found.profile.steps[0]
    assert (found.profile.operators, step.step_s) == ((), pytest.approx(6e-3))
    assert (step.num_parameters, step.num_tensors, step.num_layers) == (0, 1, 1)
    assert (step.layers_forward_s, step.layers_backward_s) == (0, 0)


def test_passes_whose_gradients_add_up_are_one_step_of_more_images(tmp_path: Path) -> None:
    """The second step's operators, which begin 2 ms later and whose kernels 12 ms later, belong to the first step."""
    document = gpu_trace(num_steps=2)
    document["traceEvents"] = [
        event
        for event in document["traceEvents"]
        if event["name"] != "ProfilerStep#1"
        and not (event["name"].startswith("Optimizer") and event["ts"] < 2000)
        and not (event["name"] in ("aten::add_", "sgd_update") and event["args"]["External id"] == 6)
    ]
    document["traceEvents"][0]["dur"] = 4000.0  # the one step's mark
    found = import_kineto([write(tmp_path / "rank0.json", document)])
    # From the first kernel, at 5 ms, to the end of the update, at 26.5: two passes of 2 + 3.5 ms.
    assert found.step_seconds == pytest.approx(21.5e-3)
    assert (found.forward_seconds, found.backward_seconds) == pytest.approx((4e-3, 7e-3))
    assert found.images_per_second == pytest.approx(8 * 2 * 4 / 21.5e-3)
    assert found.operators[0].calls_per_step == 2
    step = found.profile.steps[0]
    assert (step.forward_s, step.backward_s, step.optimizer_s) == pytest.approx((2e-3, 3.5e-3, 0.5e-3))
    assert step.step_s == pytest.approx(6e-3)
    assert (step.num_parameters, step.num_tensors, step.num_layers) == (32 * 8 * 9, 1, 1)
    assert any("gradients of 2 passes" in note for note in found.notes)


def test_ranks_count_with_their_mean(tmp_path: Path) -> None:
    files = [write(tmp_path / f"rank{rank}.json", gpu_trace(rank=rank, comm_ms=4.0 + rank)) for rank in range(3)]
    found = import_kineto(files)
    assert [rank.rank for rank in found.ranks] == [0, 1, 2]
    assert found.exposed_communication_seconds == pytest.approx(1e-3 * (3 + 3.5 + 4.5) / 3)  # less the 0.5 ms update


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_time_that_one_rank_does_not_say_is_no_zero_in_the_mean(tmp_path: Path, order: tuple[int, int]) -> None:
    whole, part = gpu_trace(), gpu_trace(rank=1)
    part["traceEvents"] = [event for event in part["traceEvents"] if not event["name"].startswith("Optimizer")]
    files = [write(tmp_path / "0.json", whole), write(tmp_path / "1.json", part)]
    found = import_kineto([files[i] for i in order])
    assert sorted(rank.optimizer_seconds is None for rank in found.ranks) == [False, True]
    assert found.optimizer_seconds == pytest.approx(0.5e-3)
    assert found.forward_seconds == pytest.approx(2e-3)
    assert import_kineto(files[1:]).optimizer_seconds is None


@pytest.mark.parametrize("communicates", [True, False])
def test_images_of_a_job_of_unknown_size_are_said_to_be_those_of_one_rank(tmp_path: Path, communicates: bool) -> None:
    document = gpu_trace()
    del document["distributedInfo"]
    if not communicates:
        document["traceEvents"] = [e for e in document["traceEvents"] if not e["name"].startswith("nccl")]
    found = import_kineto([write(tmp_path / "a.json", document)])
    assert found.images_per_second == pytest.approx(4 / 12e-3)
    assert any("no file says how many ranks" in note for note in found.notes) == communicates


@pytest.mark.parametrize(
    ("ranks", "communicates", "parallel"),
    [(8, True, True), (8, False, True), (None, True, True), (1, False, False), (None, False, False)],
)
def test_a_step_is_one_of_several_gpus_where_the_file_says_so_or_it_communicates(
    tmp_path: Path, ranks: int | None, communicates: bool, parallel: bool
) -> None:
    """Else the hooks of its gradients, which it holds, would be counted once more."""
    document = gpu_trace(distributedInfo=None if ranks is None else {"rank": 0, "world_size": ranks})
    if not communicates:
        document["traceEvents"] = [e for e in document["traceEvents"] if not e["name"].startswith("nccl")]
    (step,) = import_kineto([write(tmp_path / "a.json", document)]).profile.steps
    assert step.data_parallel == parallel


def test_a_profiled_step_is_projected_onto_more_gpus(tmp_path: Path) -> None:
    """One that was recorded on 8 holds the hooks of its gradient, and what its all-reduce slows it down.

    64 are three doublings of the node that it was recorded on.
    """
    alone, many = _predicted(tmp_path, gpu_trace())
    assert alone.tier == "profiled"
    assert alone.step_seconds == pytest.approx(6e-3)  # the recorded 2 + 3.5 + 0.5 ms
    assert any("recorded on one of several GPUs" in note for note in alone.notes)
    fitted = load_scaling()
    farther = (1 + fitted.slowdown + 3 * fitted.straggle) / (1 + fitted.slowdown)
    expected = farther * alone.step_seconds + many.communication_wait_seconds
    assert many.step_seconds == pytest.approx(expected, rel=1e-9)
    assert many.communication_wait_seconds > 0
    assert many.hook_seconds == 0
    assert not any("recorded on one of several GPUs" in note for note in many.notes)


def test_a_step_that_was_profiled_on_one_gpu_gets_hooks_on_more(tmp_path: Path) -> None:
    """The only tensor is reduced when backward is over, so that nothing is slowed down."""
    single = gpu_trace(comm_ms=0.0, distributedInfo={"rank": 0, "world_size": 1})
    alone, many = _predicted(tmp_path, single)
    assert not any("recorded on one of several GPUs" in note for note in alone.notes)
    assert many.hook_seconds == load_scaling().tensor_s
    slower_s = (1 + load_scaling().slowdown + 3 * load_scaling().straggle) * alone.step_seconds
    expected = slower_s + many.hook_seconds + many.communication_wait_seconds
    assert many.step_seconds == pytest.approx(expected, rel=1e-9)


def _predicted(folder: Path, document: dict[str, Any]) -> tuple[Prediction, Prediction]:
    """The recorded network on one GPU and on 64."""
    out = folder / "profile.toml"
    assert run(["import", "kineto", str(write(folder / "rank0.json", document)), "-o", str(out)]) == 0
    network = _convolution_of(read_device_profile(out).operators[0].operator.inputs[0])

    def on(**where: Any) -> Prediction:
        return predict(network, profile=out, batch=4, precision="fp16", memory_format="channels_last", **where)

    return on(), on(cluster="dgx-a100-80gb", gpus=64)


def test_the_operators_of_a_recorded_network_are_those_that_capture_finds(
    recorded: tuple[Path, nn.Module, Network],
) -> None:
    path, _, network = recorded
    found = import_kineto([path], device="a processor", memory_bytes=2**34)
    setting = OperatorSetting(precision=Precision.FP32, memory_format="contiguous")
    expected = {operator_of(layer, batch=6, setting=setting) for layer in network.layers if not layer.view}
    expected = {op for op in expected if op.kind not in (LayerKind.RESHAPE, LayerKind.OTHER)}
    assert {time.operator for time in found.profile.operators} == expected
    step = found.profile.steps[0]
    assert (step.num_parameters, step.num_tensors) == (network.num_parameters, len(network.parameters))
    assert 0 < found.forward_seconds + found.backward_seconds < found.step_seconds
    assert found.communication_seconds == 0


def test_the_profiled_network_itself_is_predicted_to_take_what_it_took(
    recorded: tuple[Path, nn.Module, Network], tmp_path: Path
) -> None:
    path, _, network = recorded
    found = import_kineto([path], device="a processor", memory_bytes=2**34, network=network)
    write_device_profile(tmp_path / "p.toml", found.profile)
    predicted = predict(network, profile=tmp_path / "p.toml", batch=6)
    assert predicted.step_seconds == pytest.approx(found.profile.steps[0].step_s, rel=1e-5)  # six digits in the file


_IDLE = """
from torch import nn


class Net(nn.Module):
    def __init__(self, bias=False, frames=1):
        super().__init__()
        self.conv, self.idle = nn.Conv2d(8, 32, 3, stride=2, padding=1, bias=bias), nn.Linear(3, 3)
        self.frames = frames

    def forward(self, x):
        n, c, h, w = x.shape
        return self.conv(x.reshape(n * self.frames, c // self.frames, h, w)).mean((2, 3))


def profiled():
    return Net()


def other():
    return Net(bias=True)


def clips():
    return Net(frames=2)
"""


@pytest.mark.parametrize(("network", "status"), [("profiled", 0), ("other", 2)])
def test_a_network_is_the_profiled_one_if_as_many_parameters_get_a_gradient(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], network: str, status: int
) -> None:
    """The recorded gradient has 2,304 elements; a layer that forward leaves out has none."""
    (tmp_path / "idle.py").write_text(_IDLE, encoding="utf-8")
    files = [str(write(tmp_path / "rank0.json", gpu_trace())), "-o", str(tmp_path / "out.toml")]
    model = ["--model", f"{tmp_path / 'idle.py'}:{network}", "--input", "8,16,16", "--classes", "32"]
    assert run(["import", "kineto", *files, *model]) == status
    said = "2,336 parameters that get a gradient, the profiled step has 2,304"
    assert (said in capsys.readouterr().err) == (status == 2)


@pytest.mark.parametrize(("network", "shape", "batch"), [("profiled", "8,16,16", 4), ("clips", "16,16,16", 2)])
def test_what_a_network_folds_into_its_mini_batch_is_no_image(
    tmp_path: Path, network: str, shape: str, batch: int
) -> None:
    """Four images were recorded, or two clips of two."""
    (tmp_path / "idle.py").write_text(_IDLE, encoding="utf-8")
    files = [str(write(tmp_path / "rank0.json", gpu_trace())), "-o", str(tmp_path / "out.toml")]
    assert run(["import", "kineto", *files, "--model", f"{tmp_path / 'idle.py'}:{network}", "--input", shape]) == 0
    assert read_device_profile(tmp_path / "out.toml").steps[0].batch == batch


def test_a_network_of_other_images_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has as many parameters."""
    (tmp_path / "idle.py").write_text(_IDLE, encoding="utf-8")
    files = [str(write(tmp_path / "rank0.json", gpu_trace())), "-o", str(tmp_path / "out.toml")]
    assert run(["import", "kineto", *files, "--model", f"{tmp_path / 'idle.py'}:profiled", "--input", "8,32,32"]) == 2
    said = "1 of the 1 convolution of .*:profiled were not recorded, such as conv from 8×32×32 to 32×16×16"
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out.toml").exists()


def test_reading_needs_no_torch() -> None:
    import subprocess

    code = "import sys, ptsim.measure.kineto, ptsim.cli.import_; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_agpu_trace_without_a_gpus_name_asks_for_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", gpu_trace(deviceProperties=[]))
    with pytest.raises(UsageError, match="does not name the GPU"):
        import_kineto([path])
    assert import_kineto([path], device="NVIDIA H100 80GB HBM3").profile.memory_bytes > 70e9
    assert import_kineto([path], device=load_device("a100"), memory_bytes=2**35).profile.memory_bytes == 2**35


def test_a_device_is_named_however_the_catalog_knows_it_but_not_as_another_than_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write(tmp_path / "a.json", gpu_trace()), tmp_path / "out.toml"
    assert run(["import", "kineto", str(path), "--device", "a100-80gb", "-o", str(out)]) == 0
    found = read_device_profile(out)
    assert (found.device, found.memory_bytes) == ("NVIDIA A100-SXM4-80GB", 85_000_000_000)
    capsys.readouterr()
    for named, other in (("h100", "h100-sxm5-80gb"), ("NVIDIA H100 80GB HBM3", "h100-sxm5-80gb"), ("a1000", "a1000")):
        assert run(["import", "kineto", str(path), "--device", named, "-o", str(out)]) == 2
        assert f"was recorded on 'NVIDIA A100-SXM4-80GB', which is no {other}" in capsys.readouterr().err
    assert import_kineto([path], device="nvidia a100 sxm4 80gb").device == "a100-sxm4-80gb"
    assert import_kineto([path], memory_bytes=2**35).profile.memory_bytes == 2**35
    unknown = gpu_trace(deviceProperties=[{"id": 0, "name": "NVIDIA A100-SXM-64GB", "totalGlobalMem": 2**36}])
    again = import_kineto([write(tmp_path / "b.json", unknown)], device=load_device("a100"))
    assert (again.profile.device, again.profile.memory_bytes) == ("NVIDIA A100-SXM4-40GB", 2**36)


@pytest.mark.parametrize(
    ("kind", "kernel", "precision"),
    [
        ("c10::Half", "sm80_xmma_fprop", Precision.FP16),
        ("c10::BFloat16", "sm80_xmma_fprop", Precision.BF16),
        ("float", "sm80_xmma_fprop_implicit_gemm_tf32f32_f32", Precision.TF32),
        ("float", "cutlass_80_tensorop_s1688gemm_128x128_nn", Precision.TF32),
        ("float", "ampere_sgemm_128x64_nn", Precision.FP32),
        (None, "ampere_sgemm_128x64_nn", Precision.FP32),
    ],
)
def test_the_number_format_is_that_of_the_products_and_their_kernels(
    tmp_path: Path, kind: str | None, kernel: str, precision: Precision
) -> None:
    document = gpu_trace()
    for event in document["traceEvents"]:
        if event["name"] == "aten::convolution":
            event["args"]["Input type"] = kind and [kind, kind]
        if event["name"] == "sm80_xmma_fprop":
            event["name"] = kernel
    document["traceEvents"] += [
        event | {"name": "vectorized_elementwise_kernel"}  # such as of a bias, in fp32
        for event in document["traceEvents"]
        if event["name"] == kernel
    ]
    found = import_kineto([write(tmp_path / "a.json", document)])
    assert found.precision is precision
    assert any("number formats were not recorded" in note for note in found.notes) == (kind is None)


def _launched_by_calls(document: dict[str, Any]) -> dict[str, Any]:
    """The same in PyTorch 1.12's way: "External id" of a kernel is that of its launch, which may be some operator's."""
    events = document["traceEvents"]
    operators = {event["args"]["External id"]: event for event in events if event["cat"] == "cpu_op"}
    for kernel in [event for event in events if event["cat"] == "kernel"]:
        operator = operators[kernel["args"]["External id"]]
        number = kernel["args"]["External id"] - 1  # the id of another operator
        kernel["args"] |= {"External id": number, "correlation": number}
        begin = operator["ts"] + operator["dur"] / 2
        events.append({**operator, "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": begin, "dur": 1.0,
                       "args": {"External id": number, "correlation": number, "cbid": 211}})  # fmt: skip
    return document


def test_kernels_belong_to_the_operator_that_called_cuda_whatever_their_external_id(tmp_path: Path) -> None:
    by_id = import_kineto([write(tmp_path / "a.json", gpu_trace())])
    by_call = import_kineto([write(tmp_path / "b.json", _launched_by_calls(gpu_trace()))])
    assert by_call.operators == by_id.operators
    assert (by_call.forward_seconds, by_call.backward_seconds) == (by_id.forward_seconds, by_id.backward_seconds)
    assert by_call.optimizer_seconds == by_id.optimizer_seconds
    assert by_call.exposed_communication_seconds == by_id.exposed_communication_seconds


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, Network]:
    """A small residual network, recorded by torch.profiler on the CPU."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.norm(self.conv(x)) + x)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1), Block(), nn.AvgPool2d(2, ceil_mode=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10),
    )  # fmt: skip
    network = capture_network(model, name="small", input_shape=(3, 36, 36), num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images, labels = torch.randn(6, 3, 36, 36), torch.randint(10, (6,))
    path = tmp_path_factory.mktemp("kineto") / "cpu.json.gz"
    steps = schedule(wait=1, warmup=1, active=3)
    with profile(
        activities=[ProfilerActivity.CPU],
        schedule=steps,
        record_shapes=True,
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        for _ in range(5):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            profiler.step()
    return path, model, network


def _convolution_of(image: tuple[int, ...]) -> Network:
    model = nn.Sequential(nn.Conv2d(image[0], 32, 3, stride=2, padding=1, bias=False))
    return capture_network(model, name="one", input_shape=(image[0], image[1], image[2]), num_classes=32)
