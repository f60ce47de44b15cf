from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from analysis.check_counts import Subject, agreement, compare, kept_bytes, peak_bytes, subject, torch_macs
from ptsim import zoo
from ptsim.capture.network import capture_network
from ptsim.costs.buckets import Bucket, ddp_buckets
from ptsim.costs.flops import inference_macs, training_macs
from ptsim.costs.memory import MemoryNeed, fallback_scratch, iteration_memory, largest_batch, usable_bytes
from ptsim.errors import UnknownNameError
from ptsim.hardware.catalog import load_device
from ptsim.network import Footprint, Layer, LayerKind, Moment, Network, Parameter, Precision
from ptsim.setting import StepSetting, TorchVersion
from tests.traces import NetworkBuilder, residual_network


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
    squares = 4 * 2100 * 2100
    assert penalised.peak_bytes - plain.peak_bytes == tables + max(0, squares - copies)


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


def by_hand(**changes: object) -> Network:
    """300 features to 10 classes with footprints written by hand; `idle` never gets a gradient.

    Parameters take 12,060 bytes and on a GPU, in blocks of 512, 24 + 1 + 1 blocks; gradients 12,040 and 25 blocks.
    """
    moments = (
        Moment(fixed_bytes=1000, image_bytes=400, gradient_bytes=0),
        Moment(fixed_bytes=500, image_bytes=300, gradient_bytes=12_040),
    )
    cpu = Footprint(
        device="cpu",
        half=False,
        kept_fixed_bytes=700,
        kept_image_bytes=100,
        weight_copy_bytes=200,
        buffer_bytes=64,
        contiguous=moments,
        channels_last=(Moment(fixed_bytes=100, image_bytes=50, gradient_bytes=12_000),),
    )
    large = (Moment(fixed_bytes=1000, image_bytes=10**6, gradient_bytes=0),)
    gpu = msgspec.structs.replace(cpu, device="gpu", buffer_bytes=512, contiguous=large)
    network = Network(
        name="by hand",
        input_shape=(3, 10, 10),
        num_classes=10,
        layers=(
            Layer(
                name="l",
                kind=LayerKind.LINEAR,
                op="linear",
                in_channels=300,
                out_channels=10,
                input_shapes=((300,),),
                output_shape=(10,),
                num_parameters=3010,
            ),
        ),
        edges=(),
        parameters=(
            Parameter(name="l.bias", layer="l", shape=(10,)),
            Parameter(name="l.weight", layer="l", shape=(10, 300)),
            Parameter(name="idle", layer="", shape=(5,)),
        ),
        footprints=(gpu, msgspec.structs.replace(cpu, half=True, kept_image_bytes=50), cpu),
    )
    return msgspec.structs.replace(network, **changes)


@pytest.mark.parametrize(
    ("device", "options", "activations", "states", "peak", "needed"),
    [
        # There all the time: 12,060 of weights, 64 of buffers, 12,040 of momentum, 4 · 300 + 8 an image: 30,204. The
        # update adds gradients and a copy of the largest weight, 12,040 + 12,000: more than 200 of loss and a moment.
        (None, {"batch": 5}, 1000, 12_040, 54_244, 56_956),
        (None, {"batch": 5, "momentum": 0.0}, 1000, 0, 42_204, 44_314),
        (None, {"batch": 5, "optimizer": "adam"}, 1000, 24_080, 66_284, 69_598),
        # 144,964; 4,000 of loss; the second moment with its gradients, 500 + 30,000 + 12,040, exceeds 41,000.
        (None, {"batch": 100}, 10_500, 12_040, 191_504, 201_079),
        (None, {"batch": 100, "precision": Precision.BF16}, 5500, 12_040, 191_504, 229_805),
        # 4,000 + 100 + 5,000 + 12,000 is less than the update's 24,040.
        (None, {"batch": 100, "memory_format": "channels_last"}, 10_500, 12_040, 169_004, 177_454),
        # 12,040 of gradients are there all the time, so that the first moment is the highest: 157,004 + 45,000.
        (None, {"batch": 100, "num_gpus": 2}, 10_500, 12_040, 202_004, 212_104),
        (None, {"batch": 199, "passes": 2}, 10_500, 12_040, 202_004, 212_104),
        # A third of 12,040 is 4,013.3: 12,060 + 64 + 4,014 + 6,040 + 12,040, and 12,000 of the update.
        (None, {"batch": 5, "num_gpus": 3, "sharding": "zero1"}, 1000, 4014, 46_218, 48_529),
        # 13,312 + 512 + 12,800, 12 blocks of images and 2 · (4096 · 2 + 16 · 8) KiB of cuBLAS are 17,072,128; the
        # update 2 times 12,800. 8 % of that and 22 MiB more are 19.15 segments of 2 MiB; 20, and 800 MiB of context.
        ("t4", {"batch": 5, "memory_format": "channels_last"}, 1000, 12_800, 17_097_728, 880_803_840),
        # 18,274,304, 40,000 of loss and 1,000,001,000 of the moment: with 8 % of these two and 22 MiB 534.7 segments.
        ("t4", {"batch": 1000}, 100_500, 12_800, 1_018_315_304, 1_960_837_120),
        # A third of 12,800 of state and another of the update; the gradients are in buckets. 19.14 segments.
        (
            "t4",
            {"batch": 5, "num_gpus": 3, "sharding": "zero1", "memory_format": "channels_last"},
            1000,
            4267,
            17_080_662,
            880_803_840,
        ),
    ],
)
def test_every_part_of_the_need_is_the_sum_made_by_hand(
    device: str | None, options: dict[str, Any], activations: int, states: int, peak: int, needed: int
) -> None:
    found = iteration_memory(by_hand(), StepSetting(**options), device=None if device is None else load_device(device))
    assert found == MemoryNeed(
        activation_bytes=activations,
        parameter_bytes=12_060 + 64 + 200 if device is None else 26 * 512 + 512 + 200,
        gradient_bytes=12_040 if device is None else 25 * 512,
        optimizer_bytes=states,
        workspace_bytes=0 if device is None else 2 * 8320 * 1024,
        peak_bytes=peak,
        device_bytes=needed,
    )


@pytest.mark.parametrize(
    ("num_gpus", "passes", "expected"),
    [(8, 1, 10_700_000 + 56_000_000), (2, 1, 85_600_000), (8, 2, 85_600_000)],  # all add up before they are reduced
)
def test_sharded_gradients_leave_a_share_and_two_neighbouring_buckets_and_never_more_than_all(
    num_gpus: int, passes: int, expected: int
) -> None:
    """1.2 MB close the first bucket, 28 MB each of three more, 0.4 MB are left; one fills while another is reduced."""
    sizes = (300_000, 7_000_000, 7_000_000, 7_000_000, 100_000)
    parameters = tuple(Parameter(name=f"p{i}", layer="l", shape=(size,)) for i, size in enumerate(sizes))
    setting = StepSetting(batch=5, num_gpus=num_gpus, passes=passes, sharding="zero2")
    assert iteration_memory(by_hand(parameters=parameters), setting).gradient_bytes == expected


@pytest.mark.parametrize(
    ("caps", "two"), [(None, 1_600_000), ((2**20, 10), 1_600_000), ((10, 10), 800_000), ((500_000, 10), 1_200_000)]
)
def test_sharded_gradients_leave_two_of_the_buckets_that_are_asked_for(caps: tuple[int, int] | None, two: int) -> None:
    """Four tensors of 400,000 bytes: three reach 1 MiB, two reach 500,000, and one reaches 10; 1/8 is a GPU's own."""
    parameters = tuple(Parameter(name=f"p{i}", layer="l", shape=(100_000,)) for i in range(4))
    network = by_hand(parameters=parameters)
    buckets = None if caps is None else ddp_buckets(network, first_bucket_bytes=caps[0], bucket_bytes=caps[1])
    setting = StepSetting(batch=5, num_gpus=8, sharding="zero2")
    plain = iteration_memory(network, msgspec.structs.replace(setting, sharding="zero1"), buckets=buckets)
    need = iteration_memory(network, setting, buckets=buckets)
    assert need.gradient_bytes == min(200_000 + two, 1_600_000)
    assert plain.peak_bytes - need.peak_bytes == plain.gradient_bytes - need.gradient_bytes == max(1_400_000 - two, 0)
    assert largest_batch(network, setting, capacity_bytes=need.device_bytes, buckets=buckets) == 5


@pytest.mark.parametrize(
    ("sizes", "two"), [((), 0), ((900,), 900), ((800, 100, 700), 900), ((100, 700, 800), 1500), ((800, 100, 0), 900)]
)
def test_the_two_buckets_of_a_sharded_gradient_are_neighbours(sizes: tuple[int, ...], two: int) -> None:
    network = by_hand(parameters=(Parameter(name="p", layer="l", shape=(400,)),))
    buckets = [Bucket(parameters=(), num_bytes=size, ready_layer="l") for size in sizes]
    setting = StepSetting(batch=5, num_gpus=16, sharding="zero2")
    assert iteration_memory(network, setting, buckets=buckets).gradient_bytes == 100 + two


FROZEN = {"weight_needs_gradient": False, "input_needs_gradient": False}


@pytest.mark.parametrize(
    ("device", "kind", "learns", "expected"),
    [
        ("h100-sxm5-80gb", LayerKind.LINEAR, {}, 2 * 32 * 2**20),
        ("h100-sxm5-80gb", LayerKind.LINEAR, {"weight_needs_gradient": False}, 2 * 32 * 2**20),
        ("h100-sxm5-80gb", LayerKind.LINEAR, {"input_needs_gradient": False}, 2 * 32 * 2**20),
        ("h100-sxm5-80gb", LayerKind.LINEAR, FROZEN, 32 * 2**20),
        ("b200-sxm-180gb", LayerKind.MATMUL, {}, 2 * 32 * 2**20),
        ("a100-sxm4-40gb", LayerKind.MATMUL, {}, 2 * 8_519_680),
        ("a100-sxm4-40gb", LayerKind.MATMUL, FROZEN, 8_519_680),
        ("h100-sxm5-80gb", LayerKind.ACTIVATION, {}, 0),
    ],
)
def test_cublas_takes_a_workspace_for_forward_and_one_for_backward_where_there_are_matrix_products(
    device: str, kind: LayerKind, learns: dict[str, bool], expected: int
) -> None:
    network = by_hand()
    layers = (msgspec.structs.replace(network.layers[0], kind=kind, **learns),)
    need = iteration_memory(by_hand(layers=layers), StepSetting(batch=1), device=load_device(device))
    assert need.workspace_bytes == expected


def convolution(**changes: object) -> Layer:
    """3×3 from 2 × 4 × 4 to 3 × 4 × 4: 54 weights."""
    layer = Layer(
        name="c",
        kind=LayerKind.CONV,
        op="conv2d",
        in_channels=2,
        out_channels=3,
        kernel_size=(3, 3),
        input_shapes=((2, 4, 4),),
        output_shape=(3, 4, 4),
        num_parameters=54,
    )
    return msgspec.structs.replace(layer, **changes)


@pytest.mark.parametrize(
    ("layer", "options", "expected"),
    [
        (convolution(), {}, 4 * 5 * (32 + 48)),  # both operands in the library's own layout
        (convolution(), {"precision": Precision.BF16}, 2 * 5 * (32 + 48)),
        (convolution(), {"memory_format": "channels_last"}, 4 * 54),  # split sums of the weights' gradient
        (convolution(num_parameters=540), {}, 4 * 540),
        (convolution(groups=2), {}, 0),
        (convolution(once=True, shared_inputs=(0,)), {}, 4 * (32 + 48)),
    ],
)
def test_a_dense_convolution_takes_copies_of_its_operands_or_weights(
    layer: Layer, options: dict[str, Any], expected: int
) -> None:
    network = by_hand(layers=(layer, *by_hand().layers))
    assert iteration_memory(network, StepSetting(batch=5, **options)).workspace_bytes == expected


def test_scratch_of_narrow_maps_is_four_times_weights_and_unfolded_image_for_every_thread() -> None:
    """2 wide under a kernel of 3: 4 bytes · 4 · (54 + 9 · 2 · 4) a thread; as wide as the kernel none."""
    narrow, as_wide = convolution(output_shape=(3, 2, 2)), convolution(output_shape=(3, 2, 3))
    small = convolution(output_shape=(1, 2, 2), in_channels=1, num_parameters=9)
    network = by_hand(layers=(small, narrow, as_wide))
    assert fallback_scratch(network, 3) == 6048
    signal = convolution(op="conv1d", kernel_size=(1, 3), input_shapes=((2, 2),), output_shape=(3, 2))
    assert fallback_scratch(by_hand(layers=(signal,)), 3) == 4 * 4 * 3 * (54 + 3 * 2 * 2)
    assert fallback_scratch(by_hand(layers=(as_wide, msgspec.structs.replace(narrow, kind=LayerKind.POOL))), 3) == 0
    cpu = msgspec.structs.replace(load_device("a100"), architecture="cpu", num_sms=3)
    for device, scratch in ((None, 2016), (cpu, 6048)):
        assert iteration_memory(network, StepSetting(batch=5), device=device).device_bytes == 56_956 + scratch


@pytest.mark.parametrize("best", [1, 2, 3, 63, 64, 65])
def test_the_largest_batch_is_found_to_the_byte(best: int) -> None:
    network, setting = by_hand(), StepSetting(batch=7)
    capacity = iteration_memory(network, setting.with_batch(best)).device_bytes
    assert largest_batch(network, setting, capacity_bytes=capacity) == best
    assert largest_batch(network, setting, capacity_bytes=capacity - 1) == best - 1
    assert largest_batch(network, setting, capacity_bytes=capacity, granularity=32) == best // 32 * 32


@pytest.mark.parametrize(
    ("granularity", "limit", "expected"), [(1, 2**20, 2**20), (32, 100, 96), (32, 96, 96), (32, 32, 32), (32, 31, 0)]
)
def test_the_largest_batch_is_a_multiple_within_the_limit(granularity: int, limit: int, expected: int) -> None:
    found = largest_batch(by_hand(), StepSetting(batch=1), capacity_bytes=10**15, granularity=granularity, limit=limit)
    assert found == expected
    assert largest_batch(by_hand(), StepSetting(batch=1), capacity_bytes=10**15) == 2**20


def test_a_process_sees_98_percent_of_hbm_92_of_other_memory_and_all_of_a_cpus() -> None:
    assert usable_bytes(load_device("a100-sxm4-40gb")) == 42_090_679_500  # 0.98 · 40 · 2³⁰
    assert usable_bytes(load_device("t4")) == 15_805_479_649  # 0.92 · 16 · 2³⁰
    cpu = msgspec.structs.replace(load_device("t4"), architecture="cpu")
    assert usable_bytes(cpu) == 16 * 2**30


def test_older_software_keeps_gradients_and_updates_one_tensor_after_the_other(resnet: Network) -> None:
    """With many images a step is fullest as backward begins: then all gradients are there, or the last layer's."""
    gpu = load_device("a100")
    versions = TorchVersion(2, 0), TorchVersion(1, 13)
    gradients = sum(-(-4 * p.num_elements // 512) * 512 for p in resnet.gradients)
    needs = [
        iteration_memory(resnet, StepSetting(batch=1024, torch_version=version), device=gpu) for version in versions
    ]
    assert needs[1].peak_bytes - needs[0].peak_bytes == gradients - 4 * (64 * 10 + 10)
    assert iteration_memory(resnet, StepSetting(batch=1024), device=gpu) == needs[0]


def test_an_update_of_older_software_needs_no_copy_of_the_whole_model() -> None:
    """Two tensors of 16 MB: gradients and a copy of both, or gradients and one that is added to the others."""
    net = NetworkBuilder("wide", (4000, 1, 1), 4000)
    net.linear("out", net.linear("in", net.flatten("flat", None), 1000), 4000)
    network, gpu = net.build(), load_device("a100")
    today, old = (
        iteration_memory(network, StepSetting(batch=1, torch_version=version), device=gpu).peak_bytes
        for version in (None, TorchVersion(1, 8))
    )
    assert today - old == pytest.approx(16e6, rel=0.01)


def test_buckets_beside_the_gradients_are_as_large_as_they_are(resnet: Network) -> None:
    """By DDP's default a step has all that it has on one GPU, and the buckets."""
    alone, apart, views = (
        iteration_memory(resnet, StepSetting(batch=256, num_gpus=gpus, bucket_views=views))
        for gpus, views in ((1, True), (8, False), (8, True))
    )
    gradients = sum(4 * p.num_elements for p in resnet.gradients)
    assert apart.peak_bytes - alone.peak_bytes == apart.gradient_bytes - alone.gradient_bytes == gradients
    assert alone.gradient_bytes == views.gradient_bytes == gradients
    assert alone.peak_bytes < views.peak_bytes < apart.peak_bytes + 1
    sharded = iteration_memory(resnet, StepSetting(batch=256, num_gpus=8, bucket_views=False, sharding="zero1"))
    assert apart.peak_bytes - sharded.peak_bytes == pytest.approx(gradients * 7 / 8, abs=1)  # of the momentum
    fewest = [
        iteration_memory(resnet, StepSetting(batch=256, num_gpus=8, bucket_views=views, sharding="zero2"))
        for views in (True, False)
    ]
    assert fewest[0] == fewest[1]


@pytest.mark.parametrize(("beyond", "fits"), [(-1, True), (0, True), (1, False)])
def test_what_may_be_had_to_the_last_byte_fits(beyond: int, fits: bool) -> None:
    device = load_device("t4")
    need = iteration_memory(by_hand(), StepSetting(batch=5), device=device)
    assert msgspec.structs.replace(need, device_bytes=15_805_479_649 + beyond).fits(device) == fits  # 0.92 · 16 · 2³⁰
