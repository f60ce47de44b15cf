import copy
import functools
import math
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ptsim.capture.network import capture_network
from ptsim.errors import MissingMeasurementError, UnsupportedModelError
from ptsim.measure import profile as profiling
from ptsim.measure.profile import Budget, number_format, profile_network
from ptsim.network import Precision
from tests.measure.casts import Casts
from tests.test_errors import GPU_WITHOUT_MEMORY, MACHINE_WITHOUT_MEMORY


class Small(nn.Module):
    """Convolution, BatchNorm, an in-place ReLU used twice, a residual sum in place, dropout, a head."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.conv2(x)
        y += x
        return self.fc(self.dropout(self.relu(y).mean((2, 3))))


def describe(model):
    return capture_network(model, name="small", input_shape=(3, 16, 16), num_classes=5)


def profile(model, **changes):
    options = {"batch": 4, "precision": Precision.FP32, "memory_format": "contiguous", "device": "cpu"} | changes
    return profile_network(model, describe(model), **options)


def test_every_layer_of_the_network_has_a_forward_and_where_autograd_works_a_backward_time():
    model = Small()
    result = profile(model)
    layers = {layer.layer: layer for layer in result.layers}
    assert list(layers) == ["conv1", "bn1", "relu", "conv2", "add", "relu:1", "mean", "dropout", "fc"]
    assert all(layer.forward_s > 0 for layer in result.layers)
    assert all(layers[name].backward_s > 0 for name in ("conv1", "bn1", "relu", "conv2", "relu:1", "fc"))
    assert result.step_s >= result.forward_s
    assert result.optimizer_s >= 0
    assert result.num_samples == 5
    assert result.peak_memory_bytes is None
    assert result.architecture == describe(model).id


def test_a_frozen_first_layer_has_no_backward_time():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 5))
    model[0].requires_grad_(False)
    layers = {layer.layer: layer for layer in profile(model).layers}
    assert layers["0"].backward_s is None
    assert layers["2"].backward_s > 0


def test_weights_buffers_gradients_optimizer_mode_and_random_state_stay_as_they_were():
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.rand(4, 3, 16, 16)).sum().backward()
    optimizer.step()
    model.eval()
    weights = copy.deepcopy(model.state_dict())
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    random_state = torch.get_rng_state()

    profile(model, optimizer=optimizer, regularizer=functools.partial(_shrink, model))

    assert not model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    for index, entry in optimizer.state_dict()["state"].items():
        assert torch.equal(entry["momentum_buffer"], state["state"][index]["momentum_buffer"])


def _shrink(model):
    for parameter in model.parameters():
        parameter.grad.add_(parameter.detach(), alpha=0.1)


def test_optimizer_and_regulariser_are_timed_where_there_are_any():
    model = Small()
    bare = profile(model)
    full = profile(
        model,
        optimizer=torch.optim.Adam(model.parameters()),
        regularizer=functools.partial(_shrink, model),
    )
    assert full.optimizer_s > bare.optimizer_s
    assert full.regularizer_s > bare.regularizer_s


def test_sixteen_bit_products_run_under_autocast_and_leave_no_switch_behind():
    before = torch.backends.cuda.matmul.allow_tf32
    result = profile(Small(), precision=Precision.BF16)
    assert result.precision is Precision.BF16
    assert torch.backends.cuda.matmul.allow_tf32 == before
    with number_format(Precision.BF16, torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


def test_channels_last_images_are_profiled_too():
    model = Small().to(memory_format=torch.channels_last)
    assert math.isfinite(profile(model, memory_format="channels_last").step_s)


def test_a_description_of_another_network_is_refused():
    model = Small()
    with pytest.raises(UnsupportedModelError, match=r"layers that the model does not have: conv9, flat"):
        profile_network(
            model,
            describe(nn.Sequential(OrderedDict(conv9=nn.Conv2d(3, 4, 3), flat=nn.Flatten(), fc=nn.Linear(784, 5)))),
            batch=2,
            precision=Precision.FP32,
            memory_format="contiguous",
            device="cpu",
        )


def test_a_mini_batch_of_zero_is_refused():
    with pytest.raises(ValueError, match="batch is 0, expected a positive number"):
        profile(Small(), batch=0)


@pytest.mark.parametrize(
    "error", [*GPU_WITHOUT_MEMORY, *MACHINE_WITHOUT_MEMORY], ids=lambda error: str(error)[:24] or "MemoryError"
)
def test_a_copy_that_does_not_fit_is_told_in_a_sentence(monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(profiling, "_Run", full)
    with pytest.raises(MissingMeasurementError, match="at mini-batch 4: a second copy does not fit into cpu"):
        profile(Small())


def test_another_error_is_no_lack_of_memory(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(profiling, "_Run", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        profile(Small())


@pytest.mark.parametrize(
    ("kind", "max_seconds", "taken", "layered"),
    [
        # 60 s of the first step are no measure of the others on a GPU, where cuDNN tries its algorithms
        ("cuda", 100.0, [1, 1, 5], 3),
        ("cuda", math.inf, [1, 1, 5], 3),
        ("cuda", 61.0, [1, 1, 3], 1),  # 1 s is left: 7 steps after the second one
        ("cuda", 50.0, [1, 1, 1], 1),
        ("cpu", 100.0, [1, 1], 1),
        ("cpu", math.inf, [1, 1, 5], 3),
    ],
)
def test_what_can_be_afforded_is_judged_by_a_step_of_the_usual_kind(monkeypatch, kind, max_seconds, taken, layered):
    """The first step takes 60 s, every other one an eighth of a second."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(profiling, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 7)
    asked = []

    def steps(count):
        now.seconds += 0.125 * count if asked else 60.0
        asked.append(count)
        return [(0.125,)] * count

    run = SimpleNamespace(device=SimpleNamespace(type=kind), steps=steps, layered_step=dict)
    found = profiling._take(run, Budget(max_seconds=max_seconds))
    assert asked == taken
    assert (len(found.steps), len(found.layered)) == (taken[-1], layered)
    assert found.peak_bytes == (7 if kind == "cuda" else None)


@pytest.mark.parametrize(("precision", "steps"), [(Precision.BF16, 10), (Precision.FP32, 0)])
def test_every_step_casts_the_weights_as_a_training_step_does(precision, steps):
    """Two that warm up, five whole ones, three with clocks around the layers."""
    model = Small()
    network = describe(model)
    with Casts((8, 8, 3, 3)) as seen:
        profile_network(model, network, batch=4, precision=precision, memory_format="contiguous", device="cpu")
    assert seen.number == steps


@pytest.mark.parametrize(("count", "low_s", "high_s"), [(1, 1, 1), (12, 1, 12), (19, 1, 19), (20, 2, 19), (41, 3, 39)])
def test_the_range_of_fewer_than_twenty_steps_is_from_the_fastest_to_the_slowest(count, low_s, high_s):
    """Of more it is from the 5th to the 95th percentile. Steps of 1, 2, 3, … s, in no order."""
    steps = [(0.0, float(1 + 7 * i % count)) for i in range(count)]
    assert sorted(step[-1] for step in steps) == [1.0 + i for i in range(count)]
    assert [profiling._rank(steps, fraction) for fraction in (0.05, 0.95)] == [low_s, high_s]
