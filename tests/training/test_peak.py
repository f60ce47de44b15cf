"""The peak of training passes alone, on an allocator that only pretends to be a GPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

import ptsim
from ptsim.measure import timers
from ptsim.network import Precision
from ptsim.training import recorder as recorder_module
from ptsim.training.peak import PeakMemory
from ptsim.training.watch import Watch
from tests.training.runs import settings

GPU = torch.device("cuda")


class Allocator:
    """What torch's knows: how much was allocated at most since the last reset."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peak, self.resets = 0, 0
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: self.peak)

    def reset(self, _: Any) -> None:
        self.peak, self.resets = 0, self.resets + 1

    def takes(self, num_bytes: int) -> None:
        self.peak = max(self.peak, num_bytes)


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    return Allocator(monkeypatch)


def test_the_most_of_what_training_took_before_and_after_validation(allocator: Allocator) -> None:
    memory = PeakMemory(GPU)
    assert memory.total() is None
    memory.begin()
    allocator.takes(5)
    memory.rest()
    allocator.takes(90)
    memory.rest()  # once more, for a second pass
    memory.go_on()
    allocator.takes(7)
    assert (memory.so_far(), memory.so_far()) == (7, 7)  # and the training goes on
    memory.go_on()
    allocator.takes(6)
    assert allocator.resets == 2  # a pass that follows training resets nothing
    assert memory.total() == 7
    allocator.takes(80)  # after the epoch
    assert memory.total() == 7
    memory.begin()
    allocator.takes(3)
    memory.rest()
    memory.go_on()
    allocator.takes(2)
    assert memory.so_far() == 3
    assert memory.total() == 3


def test_a_cpu_has_no_such_allocator(allocator: Allocator) -> None:
    memory = PeakMemory(torch.device("cpu"))
    memory.begin()
    memory.go_on()
    memory.rest()
    assert (memory.total(), allocator.resets) == (None, 0)


class Event:
    """A CUDA event, all of them at the same time."""

    def record(self, _stream: Any) -> None:
        pass

    def elapsed_time(self, _other: Any) -> float:
        return 0.0

    def synchronize(self) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks of a GPU that is not there."""
    monkeypatch.setattr(timers, "cuda_event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


def network() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.usefixtures("gpu")
def test_validation_in_and_after_an_epoch_is_no_part_of_its_peak(allocator: Allocator, told: bool) -> None:
    """A training pass takes 10 bytes an image, a pass of validation 1000; the third mini-batch is the largest."""
    model, optimizer = network()
    model[0].register_forward_pre_hook(
        lambda _, args: allocator.takes((10 if torch.is_grad_enabled() else 1000) * len(args[0]))
    )
    watch = Watch(model, optimizer, GPU)
    batches = [torch.rand(size, 3, 8, 8) for size in (2, 2, 3, 1)]

    def validate() -> None:
        model.eval()
        with torch.no_grad():
            model(torch.rand(2, 3, 8, 8))
        model.train()

    for epoch in range(2):
        for number, images in enumerate(watch.data(batches) if told else batches):
            model(images).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if number == 1 and epoch == 0:
                validate()
        validate()
        watch.finish()
        assert watch.memory.total() == 30
        watch.reset()


@pytest.mark.usefixtures("gpu", "allocator")
def test_a_pass_without_gradients_that_is_none_of_validation_is_training(allocator: Allocator) -> None:
    """Before the first update, in training mode, and between forward and update: a teacher's, for instance."""
    model, optimizer = network()
    watch = Watch(model, optimizer, GPU)
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        model.eval()(images)
    output = model.train()(images)
    with torch.no_grad():
        model(images)
        model.eval()(images)
    allocator.takes(50)
    model.train()
    output.sum().backward()
    optimizer.step()
    assert watch.memory.total() == 50
    assert allocator.resets == 1


@pytest.mark.usefixtures("gpu", "allocator")
def test_the_format_follows_the_switches_that_a_program_has_set_anew() -> None:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch 2.9 brought the new switches")
    model, optimizer = network()
    watch = Watch(model, optimizer, GPU)
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        for value, precision in (("tf32", Precision.TF32), ("ieee", Precision.FP32)):
            conv.fp32_precision = value
            model(torch.rand(2, 3, 8, 8))
            assert watch.precision is precision
    finally:
        conv.fp32_precision = before


def test_images_on_the_device_are_no_part_of_what_ptsims_own_loop_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """96 and 512 images of 3×8×8 bytes, and as many classes of 8."""
    real = recorder_module.measure_epoch
    monkeypatch.setattr(
        recorder_module,
        "measure_epoch",
        lambda *given, **told: msgspec.structs.replace(real(*given, **told), peak_bytes=10**9),
    )
    ptsim.train(settings(epochs=1, interval=1, profile=False), out=tmp_path / "run")
    (epoch,) = ptsim.read_trace(tmp_path / "run").epochs
    assert epoch.peak_memory_bytes == 10**9 - (96 + 512) * (3 * 8 * 8 + 8)
