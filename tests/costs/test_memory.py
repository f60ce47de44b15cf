from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from analysis.check_counts import Subject, agreement, compare, kept_bytes, peak_bytes, subject, torch_macs
from ptsim import zoo
from ptsim.capture.network import capture_network
from ptsim.costs.flops import inference_macs, training_macs
from ptsim.costs.memory import fallback_scratch, iteration_memory, largest_batch, usable_bytes
from ptsim.errors import UnknownNameError
from ptsim.hardware.catalog import load_device
from ptsim.network import Network, Precision
from ptsim.setting import StepSetting
from tests.traces import residual_network


@pytest.fixture(scope="module")
def resnet() -> Network:
    entry = zoo.find("resnet20")
    return capture_network(entry.build(num_classes=10), name="resnet20", input_shape=(3, 32, 32), num_classes=10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "batch", "peaks"),
    [("resnet20", 7, True), ("vgg11", 4, True), ("torchvision:mobilenet_v3_small", 2, False)],
)
def test_counts_kept_bytes_and_peak_agree_with_torch_on_real_tensors(name: str, batch: int, peaks: bool) -> None:
    row = compare(name, batch=batch, peaks=peaks)
    assert row.inference_macs == row.inference_macs_torch
    assert row.training_macs == row.training_macs_torch
    assert abs(row.kept_bytes / row.kept_bytes_torch - 1) <= 0.02
    if row.peak_bytes and row.peak_bytes_torch:
        about = subject(name, "dense")
        scratch = fallback_scratch(about.network, torch.get_num_threads())
        if torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
            scratch = 0
        assert 0.95 * row.peak_bytes <= row.peak_bytes_torch <= 1.05 * row.peak_bytes + scratch


@pytest.mark.slow
def test_what_a_cpu_must_have_free_covers_the_scratch_of_onednn_without_avx512() -> None:
    """37,822,720 bytes at one thread, as the CPU allocator's log showed: 4 × 512·512·9 weights and unfolded images."""
    network = subject("vgg11", "dense").network
    need = iteration_memory(network, StepSetting(batch=4))
    assert need.device_bytes - need.peak_bytes >= 37_822_720
    assert fallback_scratch(network, 2) >= 75_645_184  # at two threads
    assert fallback_scratch(subject("resnet20", "dense").network, 8) == 0  # its maps are no narrower than 8


class Convolutions(nn.Module):
    """Dense, grouped, depthwise, strided, transposed, with padding in words, and with weights that a node makes."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv2d(3, 8, 5, stride=2, padding=2)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, dilation=2)
        self.depthwise = nn.Conv2d(12, 24, 3, groups=12, stride=(2, 1), bias=False)
        self.same = nn.Conv2d(24, 24, (1, 5), padding="same")
        self.transposed = nn.ConvTranspose2d(24, 24, 2, stride=2, groups=3)
        self.weight = nn.Parameter(torch.rand(4, 24, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.grouped(self.dense(x)).relu())
        x = self.transposed(self.same(x))
        return F.conv2d(x, self.weight * 2).mean((2, 3))


@pytest.mark.slow
def test_every_kind_of_convolution_is_counted_as_torch_counts_it() -> None:
    model, images = Convolutions(), torch.rand(2, 3, 33, 29)
    network = capture_network(model, name="c", input_shape=(3, 33, 29), num_classes=4)
    assert (inference_macs(network), training_macs(network)) == torch_macs(model, images)
    assert iteration_memory(network, StepSetting(batch=2)).activation_bytes == kept_bytes(model, images)


@pytest.mark.slow
def test_under_autocast_kept_bytes_are_activations_and_copies_of_the_weights(resnet: Network) -> None:
    model, images = zoo.create("resnet20"), torch.rand(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_bytes(model, images)
    need = iteration_memory(resnet, StepSetting(batch=4, precision=Precision.BF16))
    fp32 = iteration_memory(resnet, StepSetting(batch=4))
    copies = need.parameter_bytes - fp32.parameter_bytes
    assert copies == 2 * (270_256 + 640)  # of the weights; biases are copied too and not kept
    assert (need.activation_bytes + copies) / kept == pytest.approx(1, rel=0.001)


class MixedWidths(nn.Module):
    """What autocast runs in both widths: LayerNorm, a scale and a score bias in fp32, softmax behind it."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.bias = nn.Parameter(torch.zeros(64, 64))
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.scale * self.outer(F.gelu(self.inner(self.norm(x))))
        scores = torch.matmul(self.query(x), self.key(x).transpose(1, 2)) + self.bias
        return self.head(torch.matmul(scores.softmax(-1), self.value(x)).mean(1))


@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_operators_of_both_widths_keep_what_torch_keeps(precision: Precision) -> None:
    model = MixedWidths()
    network = capture_network(model, name="m", input_shape=(3, 32, 32), num_classes=5)
    row = agreement(Subject("m", "dense", model, network), precision=precision, batch=4)
    assert row.kept_bytes / row.kept_bytes_torch == pytest.approx(1, abs=0.02)
    half = precision is Precision.BF16
    gpu = iteration_memory(
        network, StepSetting(batch=4, precision=precision), device=load_device("a100")
    ).activation_bytes
    cpu = iteration_memory(network, StepSetting(batch=4, precision=precision)).activation_bytes
    assert (gpu > cpu) == half  # a GPU's autocast normalises and exponentiates in fp32


def test_fixed_parts_are_bytes_per_parameter(resnet: Network) -> None:
    need = iteration_memory(resnet, StepSetting(batch=1))
    running_statistics = 2 * 4 * 784 + 21 * 8  # 21 BatchNorms with 784 channels together: 7·16, 7·32 and 7·64 channels
    assert need.parameter_bytes == 4 * 272_474 + running_statistics
    assert need.gradient_bytes == need.optimizer_bytes == 4 * 272_474
    assert iteration_memory(resnet, StepSetting(batch=1, optimizer="adamw")).optimizer_bytes == 2 * 4 * 272_474


def test_activations_grow_in_proportion_and_halve_under_autocast(resnet: Network) -> None:
    one, nine = (iteration_memory(resnet, StepSetting(batch=batch)).activation_bytes for batch in (100, 900))
    assert nine / one == pytest.approx(9, rel=1e-3)
    half = iteration_memory(resnet, StepSetting(batch=100, precision=Precision.BF16)).activation_bytes
    assert half / one == pytest.approx(0.5, rel=0.01)


def test_the_largest_batch_fits_and_one_more_does_not(resnet: Network) -> None:
    device = load_device("v100")
    capacity = usable_bytes(device)
    best = largest_batch(resnet, StepSetting(batch=1), capacity_bytes=capacity, device=device)
    assert iteration_memory(resnet, StepSetting(batch=best), device=device).device_bytes <= capacity
    assert iteration_memory(resnet, StepSetting(batch=best + 1), device=device).device_bytes > capacity
    coarse = largest_batch(resnet, StepSetting(batch=1), capacity_bytes=capacity, device=device, granularity=32)
    assert coarse == best // 32 * 32
    assert largest_batch(resnet, StepSetting(batch=1), capacity_bytes=10**6) == 0
    assert largest_batch(resnet, StepSetting(batch=1), capacity_bytes=capacity, device=device, limit=100) == 100


def test_a_device_is_asked_for_more_than_the_allocator_shows(resnet: Network) -> None:
    need = iteration_memory(resnet, StepSetting(batch=128), device=load_device("a100"))
    assert need.device_bytes > need.peak_bytes > need.activation_bytes
    assert usable_bytes(load_device("t4")) <= 14.75 * 2**30  # what a T4 shows of its 16 GiB


def test_a_smaller_network_needs_less() -> None:
    wide, narrow = residual_network(), residual_network(widths=(4, 8, 16))
    assert (
        iteration_memory(narrow, StepSetting(batch=8)).peak_bytes
        < iteration_memory(wide, StepSetting(batch=8)).peak_bytes
    )


def test_buckets_keep_the_gradients_through_the_forward_pass() -> None:
    """With little activation memory and much weight, forward peaks then come with a gradient for every weight."""
    network = residual_network()
    alone, together = (
        iteration_memory(network, StepSetting(batch=64, num_gpus=1 + parallel)) for parallel in (False, True)
    )
    assert 0 < together.peak_bytes - alone.peak_bytes <= 4 * network.num_parameters


@pytest.mark.parametrize("gpu", [True, False])
def test_a_penalty_holds_tables_on_a_gpu_and_takes_scratch_after_the_backward_pass(gpu: bool) -> None:
    """The layer of 2100 × 2100 weights is too large to be gathered, the others are not."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2100), nn.Linear(2100, 2100), nn.Linear(2100, 10))
    network = capture_network(model, name="linear", input_shape=(3, 4, 4), num_classes=10)
    device = load_device("a100") if gpu else None
    plain = iteration_memory(network, StepSetting(batch=1), device=device)
    penalised = iteration_memory(network, StepSetting(batch=1, regularizer="group_lasso"), device=device)
    tables = 3 * 4 * (48 * 2100 + 2100 * 10) if gpu else 0
    assert penalised.workspace_bytes - plain.workspace_bytes == tables
    copies = plain.gradient_bytes if gpu else 4 * 2100 * 2100  # of the update: on a CPU one tensor at a time
    scratch = 2 * 4 * 2100 * 2100
    assert penalised.peak_bytes - plain.peak_bytes == tables + scratch - copies


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch"), [("resnet20", 8), ("vgg11", 4)])
def test_gradients_that_accumulate_need_one_passs_activations_as_torch_does(name: str, batch: int) -> None:
    model, network = zoo.create(name), subject(name, "dense").network
    measured = peak_bytes(model, torch.randn(batch, 3, 32, 32), network, passes=2)
    need = iteration_memory(network, StepSetting(batch=2 * batch, passes=2))
    scratch = fallback_scratch(network, torch.get_num_threads())
    if torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        scratch = 0
    assert 0.95 * need.peak_bytes <= measured <= 1.05 * need.peak_bytes + scratch
    assert need.activation_bytes == iteration_memory(network, StepSetting(batch=batch)).activation_bytes


def test_wrong_arguments_are_named(resnet: Network) -> None:
    with pytest.raises(ValueError, match="batch is 0"):
        iteration_memory(resnet, StepSetting(batch=0))
    with pytest.raises(UnknownNameError, match="unknown optimizer 'lion'; known: "):
        iteration_memory(resnet, StepSetting(batch=1, optimizer="lion"))
    with pytest.raises(ValueError, match="granularity is 0"):
        largest_batch(resnet, StepSetting(batch=1), capacity_bytes=1, granularity=0)
