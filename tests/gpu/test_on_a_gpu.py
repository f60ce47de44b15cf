"""Every branch of ptsim that asks for CUDA, on a real GPU. Nothing here runs without one; `COVERED` in
`test_cuda_lines.py` says which function each test reaches."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

import ptsim
from ptsim import zoo
from ptsim.capture.network import capture_network
from ptsim.cli.main import run
from ptsim.hardware.catalog import match_device
from ptsim.hardware.profile import Operator, OperatorSetting
from ptsim.measure import operators
from ptsim.measure.load import LoadWatch
from ptsim.measure.nvml import NvmlMeter, open_meter
from ptsim.measure.operators import copy_bandwidth_bytes_per_s, launch_overhead_s, time_operator
from ptsim.measure.profile import Budget, layout, profile_network
from ptsim.measure.timers import StepTimer
from ptsim.network import LayerKind, Precision
from ptsim.prune.criteria.group_lasso import GroupLasso
from ptsim.prune.groups import find_groups
from ptsim.training.config import Config
from ptsim.training.data import Share
from ptsim.training.datasets import load_data
from ptsim.training.peak import PeakMemory
from ptsim.training.step import fits
from tests.training.runs import settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    pytest.mark.filterwarnings("default"),  # cuDNN's and the driver's own stand in the report, and fail nothing
]
CUDA = "cuda:0"


def trained(folder, **changes):
    result = ptsim.train(settings(device=CUDA, **changes), out=folder)
    return result, ptsim.read_trace(folder)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_a_run_trains_prunes_and_records_memory_energy_and_versions(tmp_path, precision):
    _, trace = trained(tmp_path / "run", precision=precision, profile=True, memory_format="channels_last")
    assert trace.complete
    assert trace.reconfigurations
    assert trace.run.device.kind == "cuda"
    assert {"cuda", "cudnn"} <= set(trace.run.versions)
    assert all(epoch.peak_memory_bytes > 0 for epoch in trace.epochs)
    assert all(epoch.device.energy_j > 0 for epoch in trace.epochs)
    assert all(epoch.time.wall_s >= epoch.time.forward_s + epoch.time.backward_s for epoch in trace.epochs)
    assert trace.profiles[0].peak_memory_bytes > 0


def test_a_run_is_costed_and_reported_with_the_gpu_that_it_ran_on(tmp_path):
    _, trace = trained(tmp_path / "run", memory_format="channels_last")
    assert ptsim.cost(trace).peak_memory_bytes > 0
    page = ptsim.write_report([trace], tmp_path / "report")
    assert trace.run.device.name in page.read_text()


def test_the_same_run_on_gpu_and_cpu_begins_with_the_same_loss(tmp_path):
    _, gpu = trained(tmp_path / "gpu")
    ptsim.train(settings(), out=tmp_path / "cpu")
    cpu = ptsim.read_trace(tmp_path / "cpu")
    assert gpu.epochs[0].train_loss == pytest.approx(cpu.epochs[0].train_loss, rel=1e-3)
    assert gpu.run.device.kind != cpu.run.device.kind


def test_a_resumed_run_goes_on_on_the_gpu(tmp_path):
    stopped = settings(device=CUDA)

    def stop(epoch):
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ptsim.train(stopped, out=tmp_path / "run", on_epoch=stop)
    ptsim.train(resume=tmp_path / "run")
    assert ptsim.read_trace(tmp_path / "run").complete


@pytest.fixture
def two_gibibytes():
    """All that the allocator may have."""
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 2**31 / total))
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_minibatch_that_does_not_fit_is_told_without_leaving_memory_taken(two_gibibytes):
    """Of 32,768 images one output of the first convolution alone has two gibibytes."""
    model = zoo.create("resnet20").to(CUDA)
    learner = SimpleNamespace(
        model=model,
        device=torch.device(CUDA),
        recipe=SimpleNamespace(input_shape=(3, 32, 32)),
        config=SimpleNamespace(precision=Precision.FP32),
        pruner=SimpleNamespace(criterion=SimpleNamespace(add_gradient=lambda _: None)),
    )
    assert fits(learner, 8)  # from now on the libraries have their workspaces
    before, buffers = torch.cuda.memory_allocated(), [buffer.tolist() for buffer in model.buffers()]
    assert not fits(learner, 2**15)
    assert torch.cuda.memory_allocated() - before < 2**20
    assert [buffer.tolist() for buffer in model.buffers()] == buffers
    assert all(parameter.grad is None for parameter in model.parameters())
    assert fits(learner, 8)


def test_a_minibatch_grows_as_far_as_it_may_where_a_trial_step_fits(tmp_path):
    _, trace = trained(tmp_path / "run", dynamic_batch=True, max_batch=48, batch_granularity=16)
    assert trace.reconfigurations
    assert max(epoch.batch_per_gpu for epoch in trace.epochs) == 48


@pytest.fixture
def pinned(monkeypatch):
    """Of every tensor that a loader has given: did it lie in pinned memory?"""
    found = []

    class Seen(torch.utils.data.DataLoader):
        def __iter__(self):
            for batch in super().__iter__():
                found.extend(tensor.is_pinned() for tensor in batch)
                yield batch

    monkeypatch.setattr(torch.utils.data, "DataLoader", Seen)
    return found


def image_files(folder):
    """Settings of a run on images in class folders that it writes."""
    for split, count in (("train", 8), ("val", 4)):
        for label in ("a", "b"):
            place = folder / split / label
            place.mkdir(parents=True)
            for index in range(count):
                pixels = bytes((13 * index + 5 * step + 100 * (label == "a")) % 256 for step in range(3 * 12 * 12))
                Image.frombytes("RGB", (12, 12), pixels).save(place / f"{index}.png")
    return {"dataset": "imagefolder", "data_dir": str(folder)}


@pytest.mark.parametrize("data_memory_bytes", [None, 1000])  # decoded at once, and batch by batch
def test_images_from_files_come_through_pinned_memory(tmp_path, pinned, data_memory_bytes):
    files = image_files(tmp_path / "data") | {"data_memory_bytes": data_memory_bytes}
    _, trace = trained(tmp_path / "run", **files, train_limit=None, batch=4, epochs=2)
    assert trace.complete
    assert set(pinned) == (set() if data_memory_bytes is None else {True})


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("data_memory_bytes", [None, 1000])
def test_augmented_images_are_on_the_gpu_and_those_of_the_cpu(tmp_path, data_memory_bytes, memory_format):
    settings_ = {"model": "resnet20", "augment": "crop_flip", "batch": 4, "memory_format": memory_format}
    config = Config(**image_files(tmp_path), **settings_, data_memory_bytes=data_memory_bytes, num_workers=0)
    found = []
    for device in (torch.device("cpu"), torch.device(CUDA)):
        data = load_data(config, input_shape=(3, 12, 12), device=device)
        found.append([*data.training_batches(1, 4, Share()), *data.validation_batches(4, Share())])
        assert {tensor.device for batch in found[-1] for tensor in batch} == {device}
    assert len(found[1]) == 16 // 4 + 8 // 4
    for (images, labels), (there, labels_there) in zip(*found, strict=True):
        assert there.is_contiguous(memory_format=layout(memory_format))
        torch.testing.assert_close(there.cpu(), images)
        assert labels_there.tolist() == labels.tolist()


def test_live_data_sets_come_through_pinned_memory(tmp_path, pinned):
    images, labels = torch.rand(32, 3, 8, 8), torch.randint(0, 4, (32,))
    data = torch.utils.data.TensorDataset(images, labels)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    changes = {"device": "cuda", "epochs": 2, "batch": 8, "interval": 1}
    ptsim.train(changes, model=model, data=(data, data), out=tmp_path / "run")
    assert ptsim.read_trace(tmp_path / "run").complete
    assert set(pinned) == {True}


@pytest.mark.parametrize("half", [True, False])
def test_ones_own_loop_prunes_on_the_gpu_and_its_number_format_is_seen(tmp_path, half):
    """In fp16 with a gradient scaler; else by torch's own switches, which let convolutions be TF32."""
    torch.manual_seed(0)
    kind = torch.device(CUDA).type
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).to(CUDA)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler(kind, enabled=half)
    pruner = ptsim.PruneTrain(
        model,
        optimizer,
        input_shape=(3, 8, 8),
        penalty_ratio=0.5,
        interval=1,
        scaler=scaler,
        record=tmp_path / "run",
    )
    for _ in range(2):
        for _ in range(4):
            images, labels = torch.randn(8, 3, 8, 8, device=CUDA), torch.randint(0, 4, (8,), device=CUDA)
            with torch.autocast(kind, torch.float16, enabled=half):
                loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            pruner.step(loss)
            scaler.step(optimizer)
            scaler.update()
        pruner.end_epoch()
    trace = ptsim.read_trace(tmp_path / "run")
    assert len(trace.epochs) == 2
    single = Precision.TF32 if torch.cuda.get_device_capability()[0] >= 8 else Precision.FP32
    assert trace.run.precision is (Precision.FP16 if half else single)
    assert {parameter.device for parameter in model.parameters()} == {torch.device(CUDA)}
    assert pruner.batch == 8  # 32 images an epoch have no room for 32 more


def test_the_flat_regulariser_equals_the_one_layer_by_layer():
    torch.manual_seed(0)
    model = zoo.create("resnet20").to(CUDA)
    groups = find_groups(model, (3, 32, 32))
    gradients = []
    for form in ("gathered", "per_tensor"):
        model.zero_grad(set_to_none=True)
        GroupLasso(model, groups, form=form).add_gradient(0.1)
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert GroupLasso(model, groups).form == "gathered"
    for flat, single in zip(*gradients, strict=True):
        torch.testing.assert_close(flat, single, rtol=1e-4, atol=1e-6)


def test_events_time_what_the_gpu_does():
    a = torch.randn(4096, 4096, device=CUDA)
    timer = StepTimer(CUDA)
    for _ in range(3):
        with timer.phase("forward"):
            a @ a
        timer.end_step()
    seconds, steps = timer.finish()
    floor_s = 3 * 2 * 4096**3 / 4e15  # faster than any GPU of today
    assert floor_s < seconds.forward_s <= seconds.wall_s
    assert steps.median_s > 0


def test_nvml_measures_energy_clocks_and_memory_under_load():
    meter = open_meter(torch.device(CUDA))
    info = meter.info()
    assert info.kind == "cuda"
    a = torch.randn(8192, 8192, device=CUDA)
    meter.start()
    for _ in range(60):
        a @ a
    torch.cuda.synchronize()
    use = meter.stop()
    assert isinstance(meter, NvmlMeter)
    meter.close()
    known = match_device(info.name)
    assert known is not None, f"the catalog does not know {info.name!r}"
    assert use is not None
    assert 0 < use.power_w <= 1.1 * (info.power_limit_w or 2000)
    assert use.energy_j > 0
    assert use.sm_clock_hz > 0
    assert use.peak_memory_bytes > a.nbytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_profile_has_times_and_a_peak_and_tunes_its_convolutions(precision, monkeypatch):
    torch.manual_seed(0)
    tuned, convolution = [], torch.nn.Conv2d.forward

    def seen(layer, images):
        tuned.append(torch.backends.cudnn.benchmark)
        return convolution(layer, images)

    model = zoo.create("torchvision:resnet18")
    network = capture_network(model, name="resnet18", input_shape=(3, 224, 224), num_classes=1000)
    here = model.to(CUDA)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", seen)
    before = torch.backends.cudnn.benchmark
    profile = profile_network(
        here, network, batch=16, precision=Precision(precision), memory_format="contiguous",
        optimizer=torch.optim.SGD(here.parameters(), lr=0.1, momentum=0.9), device=torch.device(CUDA),
        budget=Budget(min_seconds=0.2),
    )  # fmt: skip
    assert profile.forward_s > 0
    assert profile.backward_s > profile.forward_s / 2
    assert profile.peak_memory_bytes > 0
    assert tuned
    assert all(tuned)
    assert torch.backends.cudnn.benchmark == before


def test_a_second_profile_has_the_peak_of_the_first_and_leaves_no_memory_taken():
    model = zoo.create("resnet20").to(CUDA)
    network = capture_network(model, name="resnet20", input_shape=(3, 32, 32), num_classes=10)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = torch.cuda.memory_allocated()
    first, second = (
        profile_network(
            model, network, batch=64, precision=Precision.FP32, memory_format="contiguous", optimizer=sgd,
            device=torch.device(CUDA),
        )
        for _ in range(2)
    )  # fmt: skip
    assert second.peak_memory_bytes == pytest.approx(first.peak_memory_bytes, rel=0.02)
    assert torch.cuda.memory_allocated() - before <= 3 * 32 * 2**20  # cuBLAS's workspaces, of forward and of backward


def test_what_validation_takes_is_no_part_of_the_peak():
    memory = PeakMemory(torch.device(CUDA))
    memory.begin()
    before = torch.cuda.memory_allocated()
    for megabytes, training in ((8, True), (64, False), (16, True), (32, False)):
        (memory.go_on if training else memory.rest)()
        torch.empty(megabytes * 2**20, dtype=torch.uint8, device=CUDA)
    assert 8 * 2**20 < memory.total() - before <= 16 * 2**20


def test_an_optimizer_of_one_kernel_goes_on_from_a_state_that_was_stored_on_the_cpu():
    def begun():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).to(CUDA)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        return model, optimizer, ptsim.PruneTrain(model, optimizer, input_shape=(3, 8, 8), interval=9)

    def step(model, optimizer, pruner):
        loss = nn.functional.cross_entropy(model(torch.ones(4, 3, 8, 8, device=CUDA)), torch.arange(4, device=CUDA))
        optimizer.zero_grad()
        loss.backward()
        pruner.step(loss)
        optimizer.step()

    model, optimizer, pruner = begun()
    step(model, optimizer, pruner)
    pruner.end_epoch()
    state = pruner.state_dict()
    state["tensors"] = {name: tensor.cpu() for name, tensor in state["tensors"].items()}
    step(model, optimizer, pruner)
    pruner.close()
    other, resumed, again = begun()
    again.load_state_dict(state)
    step(other, resumed, again)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_copies_and_launches_have_plausible_rates():
    device = torch.device(CUDA)
    assert 1e10 < copy_bandwidth_bytes_per_s(device) < 2e13
    assert 1e-7 < launch_overhead_s(device) < 1e-3
    watch = LoadWatch(device)
    with watch.measuring():
        torch.zeros(1, device=device).add_(1)
        time.sleep(1.1)  # of less nothing is said
    assert watch.load() is not None


@pytest.mark.parametrize("kind", ["conv2d", "relu"])
def test_the_passes_of_one_operator_are_timed_in_a_graph(kind):
    setting = OperatorSetting(precision=Precision.BF16, memory_format="channels_last")
    of_conv = {"kind": LayerKind.CONV, "kernel": (3, 3), "padding": (1, 1)}
    more = of_conv if kind == "conv2d" else {"kind": LayerKind.ACTIVATION, "inplace": True}
    shape = (64, 32, 32)
    operator = Operator(op=kind, setting=setting, batch=32, inputs=(shape,), output=shape, **more)
    found = time_operator(operator, torch.device(CUDA))
    assert 0 < found.backward_s < 1e-2
    assert 0 < found.host_s < 1e-2
    if kind == "conv2d":
        assert 2 * 32 * 64 * 64 * 9 * 32 * 32 / 4e15 < found.forward_s < 1e-2  # faster than any GPU of today
        assert min(found.weight_gradient_s, found.input_gradient_s) > 0
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_a_capture_that_fails_takes_no_later_operator_with_it():
    """No graph can have an operator that waits for the GPU; dropout needs random numbers."""
    numbers = torch.ones(1000, device=CUDA)
    assert operators._kernel_seconds(numbers.nonzero, torch.device(CUDA)) > 0
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert 0 < torch.rand(1000, device=CUDA).mean() < 1
    setting = OperatorSetting(precision=Precision.FP32, memory_format="contiguous")
    shape = (64, 32, 32)
    dropout = Operator(kind=LayerKind.DROPOUT, op="dropout", setting=setting, batch=32, inputs=(shape,), output=shape)
    assert 0 < time_operator(dropout, torch.device(CUDA)).forward_s < 1e-2


def test_calibrate_gpu_writes_a_profile_of_this_gpu(tmp_path):
    out = tmp_path / "gpu.toml"
    assert run(["calibrate", "gpu", "--out", str(out), "--minutes", "0.2"]) == 0
    assert 'kind = "cuda"' in out.read_text()


def under_torchrun(*arguments):
    """What `ptsim` with these arguments says as the only rank, which it is started as by torchrun."""
    started = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "ptsim", *arguments]
    return subprocess.run(
        [sys.executable, *started], check=False, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_calibrate_network_joins_by_nccl_and_says_that_one_rank_is_too_few(tmp_path):
    ran = under_torchrun("calibrate", "network", "--out", str(tmp_path / "net.toml"))
    assert ran.returncode
    assert "a single rank reduces nothing" in ran.stderr


def test_torchrun_with_one_rank_uses_the_gpu(tmp_path):
    ran = under_torchrun(
        "train", "--model", "resnet20", "--dataset", "digits", "--train-limit", "64", "--batch", "16", "--epochs", "1",
        "--set", "device=cuda", "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ptsim.read_trace(tmp_path / "run").run.device.kind == "cuda"


def test_doctor_sees_the_gpu(capsys):
    assert run(["doctor", "--json"]) == 0
    assert torch.cuda.get_device_name() in json.dumps(json.loads(capsys.readouterr().out))
    assert run(["doctor"]) == 0
    assert torch.cuda.get_device_name() in capsys.readouterr().out


def test_a_device_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ptsim.errors.UsageError, match="does not exist"):
        ptsim.train(settings(device=f"cuda:{torch.cuda.device_count()}"), out=tmp_path / "run")
