"""Counts of networks that no zoo of ours has, against what torch counts when they run for real."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
import torch
from torch import fx, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from analysis.check_counts import counted, kept_bytes, peak_bytes, torch_macs
from ptsim.capture.counts import counter, einsum_macs
from ptsim.capture.network import capture_network
from ptsim.consistency import network_problem
from ptsim.costs.flops import inference_macs, training_macs
from ptsim.costs.kernels import Work, convolution_kernels
from ptsim.costs.memory import iteration_memory
from ptsim.costs.traffic import network_traffic
from ptsim.network import LayerKind, Network, Precision
from ptsim.setting import StepSetting
from tests.capture import user_models

IMAGE = (3, 32, 32)
NAMES = (
    *("unet", "se", "mobile", "super_resolution", "convnext", "norms", "dilated", "one_dimensional", "volume"),
    *("encoder", "attention", "biased", "standardised", "shuffle", "pyramid", "bilinear", "parametrised", "dense"),
    *("gated", "mixer", "max_normed"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_macs_and_kept_bytes_are_torchs_at_every_mini_batch(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(user_models, name)()
    network = capture_network(model, name=name, input_shape=IMAGE, num_classes=10)
    for batch in (2, 8):
        images = torch.rand(batch, *IMAGE)
        forward, step = torch_macs(model, images)
        assert inference_macs(network, images=batch) // batch == forward
        assert training_macs(network, images=batch) // batch == step
        assert iteration_memory(network, StepSetting(batch=batch)).activation_bytes == kept_bytes(model, images)


@pytest.mark.slow
def test_what_has_no_mini_batch_axis_is_counted_once_a_mini_batch() -> None:
    network = capture_network(user_models.biased(), name="b", input_shape=IMAGE, num_classes=10)
    once = {layer.name: layer for layer in network.layers if layer.once}
    assert {"mlp.0", "mlp.1", "mlp.2"} <= once.keys()
    assert once["mlp.0"].forward_macs == 64 * 64 * 2 * 256
    assert training_macs(network, images=8) - training_macs(network, images=7) == training_macs(
        network, images=3
    ) - training_macs(network, images=2)
    bias_added = [layer for layer in network.layers if layer.op == "add" and layer.shared_inputs == (1,)]
    assert [layer.input_sizes(8) for layer in bias_added] == [(8 * 4 * 64 * 64, 4 * 64 * 64)] * 2
    assert msgspec.json.decode(msgspec.json.encode(network), type=Network) == network
    place = network.layers.index(once["mlp.0"])
    moved = [network_traffic(network, StepSetting(batch=b))[place] for b in (1, 64)]
    assert moved[0] == moved[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnext", "encoder", "standardised", "norms", "volume", "gated", "mixer"])
def test_kept_bytes_under_autocast_are_torchs(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(user_models, name)()
    network = capture_network(model, name=name, input_shape=IMAGE, num_classes=10)
    counts = counted(network, precision=Precision.BF16, batch=8, peaks=False)
    torchs = kept_bytes(model, torch.rand(8, *IMAGE), Precision.BF16)
    assert counts["kept_bytes"] / torchs == pytest.approx(1, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["unet", "se", "super_resolution", "convnext", "encoder", "parametrised", "gated", "biased"]
)
def test_the_peak_of_a_step_is_what_the_allocator_logged(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(user_models, name)()
    network = capture_network(model, name=name, input_shape=IMAGE, num_classes=10)
    seen = peak_bytes(model, torch.rand(4, *IMAGE), network)
    assert iteration_memory(network, StepSetting(batch=4)).peak_bytes / seen == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_a_checkpointed_step_keeps_less_and_its_second_forward_pass_is_said_not_to_be_counted() -> None:
    model = user_models.checkpointed()
    with pytest.warns(UserWarning, match="c keeps less than its layers need for backward"):
        network = capture_network(model, name="c", input_shape=IMAGE, num_classes=10)
    images = torch.rand(4, *IMAGE)
    assert iteration_memory(network, StepSetting(batch=4)).activation_bytes == kept_bytes(model, images)


@pytest.mark.slow
def test_a_network_that_cannot_run_in_half_precision_has_footprints_of_fp32_alone() -> None:
    network = capture_network(user_models.bilinear(), name="b", input_shape=IMAGE, num_classes=10)
    assert {(seen.device, seen.half) for seen in network.footprints} == {("cpu", False), ("gpu", False)}
    assert network.id == msgspec.structs.replace(network, footprints=()).id


@pytest.mark.slow
def test_what_a_gpu_keeps_differs_by_its_rules_alone() -> None:
    network = capture_network(user_models.encoder(), name="e", input_shape=IMAGE, num_classes=10)
    kept = {(seen.device, seen.half): seen.kept_image_bytes for seen in network.footprints}
    # Two dropouts behind 65 tokens, of 48 and 192 channels: a byte instead of an fp32 mask; attention keeps none.
    assert kept["cpu", False] - kept["gpu", False] >= 3 * 65 * (48 + 192)
    assert kept["gpu", True] < kept["gpu", False]


@pytest.mark.slow
def test_a_cpu_alone_mirrors_in_fp32_and_a_gpu_alone_takes_powers_in_fp32() -> None:
    """The first convolution's 8 maps of 6 × 6 are kept for the gradient of what follows: 4 bytes of each, or 2."""
    bytes_kept = {}
    for name, inner in (("mirrored", nn.ReflectionPad2d(1)), ("powers", nn.LPPool2d(2, 2))):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), inner, nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
        )
        network = capture_network(model, name=name, input_shape=(3, 8, 8), num_classes=4)
        bytes_kept |= {(name, seen.device, seen.half): seen.kept_image_bytes for seen in network.footprints}
    assert bytes_kept["mirrored", "cpu", True] - bytes_kept["mirrored", "gpu", True] == 2 * 8 * 6 * 6
    assert bytes_kept["powers", "gpu", True] - bytes_kept["powers", "cpu", True] >= 2 * 8 * 6 * 6
    assert all(bytes_kept[name, "cpu", False] == bytes_kept[name, "gpu", False] for name in ("mirrored", "powers"))


@pytest.mark.slow
def test_the_norm_of_weights_is_no_batch_norm_traffic() -> None:
    network = capture_network(user_models.standardised(), name="s", input_shape=IMAGE, num_classes=10)
    norms = [layer for layer in network.layers if layer.kind is LayerKind.BATCH_NORM]
    assert [layer.once for layer in norms] == [True]


class Folded(nn.Module):
    """One small convolution over every channel of an image alike, as EMA attention has for groups of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.norm, self.all = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(12, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, channels, height, width = x.shape
        y = self.norm(self.each(x.reshape(n * channels, 1, height, width)))
        return self.all(y.reshape(n, 4 * channels, height, width)).mean((2, 3))


def test_what_the_code_folds_into_the_mini_batch_are_more_images_of_a_convolution() -> None:
    network = capture_network(Folded(), name="f", input_shape=(3, 8, 8), num_classes=5)
    each = network.layer("each")
    assert (each.input_shapes, each.output_shape) == (((3, 1, 8, 8),), (3, 4, 8, 8))
    assert each.forward_macs == 3 * 4 * 9 * 64
    assert network_problem(network) is None  # a trace that has it can be read
    products = [k for k in convolution_kernels(each, batch=2, element=4) if k.work is Work.PRODUCT]
    assert {k.m * k.n * k.k * k.groups for k in products} == {2 * each.forward_macs}


class Unused(nn.Module):
    """Two convolutions whose results nobody uses, or only their places, beside one that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unused, self.router = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(4, 2, 1)
        self.head, self.table = nn.Linear(4, 5), nn.Embedding(2, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        self.unused(x)
        return self.head(x.mean((2, 3))) + self.table(self.router(x).mean((2, 3)).argmax(1))


def test_a_layer_to_which_no_gradient_comes_learns_nothing_and_its_trace_can_be_read() -> None:
    torch.manual_seed(0)
    model = Unused()
    network = capture_network(model, name="u", input_shape=(3, 8, 8), num_classes=5)
    assert network_problem(network) is None
    for name in ("unused", "router"):
        layer = network.layer(name)
        assert (layer.num_parameters, layer.weight_needs_gradient, layer.input_needs_gradient) == (0, False, False)
    assert {p.name for p in network.parameters if not p.layer} == {
        "unused.weight", "unused.bias", "router.weight", "router.bias"
    }  # fmt: skip
    forward, step = torch_macs(model, torch.rand(2, 3, 8, 8))
    assert (inference_macs(network), training_macs(network)) == (forward, step)


class Pair(nn.Module):
    """Multiplies two descriptions of an image, of 4 and of 3 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.both = nn.Linear(3, 4), nn.Linear(3, 3), nn.Bilinear(4, 3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.mean((2, 3))
        return self.both(self.a(y), self.b(y))


def test_a_bilinear_layer_multiplies_each_weight_once_for_an_image_and_again_for_every_gradient() -> None:
    network = capture_network(Pair(), name="p", input_shape=(3, 4, 4), num_classes=5)
    layer = network.layer("both")
    assert (layer.kind, layer.in_channels, layer.out_channels) == (LayerKind.LINEAR, 4, 5)
    assert layer.forward_macs == 5 * 4 * 3
    # The linear layers have 12 and 9 weights, and the images no gradient.
    assert training_macs(network, images=7) == 7 * (4 * 60 + 2 * (12 + 9))


class Row(nn.Module):
    """The image as a row of values, by layers or by functions."""

    def __init__(self, *, functional: bool) -> None:
        super().__init__()
        self.functional = functional
        self.conv, self.up = nn.Conv1d(3, 4, 3, 2, 2, 2), nn.ConvTranspose1d(4, 4, 4, 2, 1)
        self.most, self.mean, self.head = nn.MaxPool1d(2), nn.AvgPool1d(3, 2, 1), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2)
        if self.functional:
            x = functional.conv1d(x, self.conv.weight, self.conv.bias, 2, 2, 2)
            x = functional.avg_pool1d(functional.max_pool1d(x, 2), 3, 2, 1)
            x = functional.conv_transpose1d(x, self.up.weight, self.up.bias, stride=2, padding=1)
        else:
            x = self.up(self.mean(self.most(self.conv(x))))
        return self.head(x.mean(2))


@pytest.mark.parametrize("by_functions", [False, True])
def test_what_slides_over_a_row_has_no_stride_and_no_padding_in_the_other_axis(by_functions: bool) -> None:
    network = capture_network(Row(functional=by_functions), name="r", input_shape=(3, 8, 8), num_classes=2)
    found = {
        layer.op: (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        for layer in network.layers
        if layer.op.endswith("1d")
    }
    assert found == {
        "conv1d": ((1, 3), (1, 2), (0, 2), (1, 2)),
        "max_pool1d": ((1, 2), (1, 2), (0, 0), (1, 1)),
        "avg_pool1d": ((1, 3), (1, 2), (0, 1), (1, 1)),
        "conv_transpose1d": ((1, 4), (1, 2), (0, 1), (1, 1)),
    }
    # 32 places of 3 → 4 channels; from 8 to 16 places the gradient of 4 → 4 channels
    macs = {layer.op: layer.forward_macs for layer in network.layers if layer.op.startswith("conv")}
    assert macs == {"conv1d": 32 * 3 * 4 * 3, "conv_transpose1d": 8 * 4 * 4 * 4}


def test_a_border_that_is_cut_off_is_no_padding_of_a_window() -> None:
    layers = [nn.Conv2d(3, 4, 3, padding=2), nn.ZeroPad2d(-1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    network = capture_network(nn.Sequential(*layers), name="b", input_shape=(3, 8, 8), num_classes=2)
    assert [(layer.padding, layer.output_shape) for layer in network.layers[:2]] == [
        ((2, 2), (4, 10, 10)), ((0, 0), (4, 8, 8)),
    ]  # fmt: skip
    assert msgspec.json.decode(msgspec.json.encode(network), type=Network) == network


class Normalised(nn.Module):
    """Five channels of rows, places, volumes and vectors, normalised by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 5, 1), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        rows = functional.batch_norm(x.flatten(2), None, None, training=True).mean(2)
        places = functional.layer_norm(x.permute(0, 2, 3, 1), (5,)).mean((1, 2))
        volumes = functional.instance_norm(x.unsqueeze(2)).mean((2, 3, 4))
        return self.head(rows + places + volumes + functional.group_norm(x.flatten(2), 5).mean(2))


def test_a_norm_by_a_function_has_the_channels_that_it_normalises() -> None:
    network = capture_network(Normalised(), name="n", input_shape=(3, 8, 8), num_classes=2)
    norms = {layer.op: (layer.in_channels, layer.out_channels) for layer in network.layers if "norm" in layer.op}
    assert norms == dict.fromkeys(("batch_norm", "layer_norm", "instance_norm", "group_norm"), (5, 5))


@fx.wrap
def mixed(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """A function that is not looked into."""
    return functional.linear(x.flatten(2), places).view(x.shape)


class Scored(nn.Module):
    """Every place reads all 36, and one row of weights makes a number of four."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.places, self.row = (
            nn.Conv2d(3, 4, 3), nn.Parameter(torch.rand(36, 36)), nn.Parameter(torch.rand(4))
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(mixed(self.conv(x), self.places).mean((2, 3)), self.row).unsqueeze(1)


def test_products_that_are_no_linear_layer_are_told_as_products_and_their_trace_can_be_read() -> None:
    network = capture_network(Scored(), name="s", input_shape=(3, 8, 8), num_classes=1)
    assert network_problem(network) is None
    products = {layer.op: layer for layer in network.layers if layer.kind is LayerKind.MATMUL}
    assert {op: (layer.forward_macs, layer.num_parameters) for op, layer in products.items()} == {
        "mixed": (4 * 36 * 36, 36 * 36), "linear": (4, 4)
    }  # fmt: skip
    assert all(layer.input_needs_gradient and layer.weight_needs_gradient for layer in products.values())
    # The images need no gradient.
    assert training_macs(network) == 2 * 36 * 4 * 27 + 3 * (4 * 36 * 36 + 4)


@fx.wrap
def attention_pool(x: torch.Tensor) -> torch.Tensor:
    """No pool with a window, whatever it is called."""
    return (x.flatten(2) * x.flatten(2).softmax(2)).sum(2)[:, :, None, None]


@fx.wrap
def convex_upsample(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """No convolution."""
    return functional.interpolate(x * weights, scale_factor=2)


@fx.wrap
def linear(x: torch.Tensor) -> torch.Tensor:
    """No linear layer."""
    return x * 2


@fx.wrap
def normalize(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """More than a normalisation."""
    return functional.conv2d(x, weight)


@pytest.mark.parametrize(
    ("function", "op", "kind", "macs"),
    [
        (lambda x, w: attention_pool(x), "attention_pool", LayerKind.OTHER, 0),
        (lambda x, w: convex_upsample(x, w.mean()), "convex_upsample", LayerKind.OTHER, 0),
        (lambda x, w: linear(x), "linear", LayerKind.OTHER, 0),
        (lambda x, w: normalize(2 * x, w), "normalize", LayerKind.MATMUL, 2 * 4 * 9 * 36),
    ],
)
def test_a_users_function_is_described_by_what_it_does(
    function: Callable[..., torch.Tensor], op: str, kind: LayerKind, macs: int
) -> None:
    """It may be called as an operator of torch's whose arguments say how large a window or a filter is."""
    network = capture_network(Described(function), name="d", input_shape=(3, 8, 8), num_classes=2)
    assert network_problem(network) is None
    found = [layer for layer in network.layers if layer.op == op and layer.name != "head"]
    assert [(layer.kind, layer.kernel_size) for layer in found] == [(kind, (1, 1))]
    assert sum(layer.forward_macs for layer in found if layer.kind is LayerKind.MATMUL) == macs


class Described(nn.Module):
    """What a function makes of four channels, with a parameter."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function, self.conv, self.weight = function, nn.Conv2d(3, 4, 1), nn.Parameter(torch.rand(2, 4, 3, 3))
        self.head = nn.Linear(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.function(self.conv(x), self.weight).flatten(1).mean(1, keepdim=True))


class Computes(nn.Module):
    """Gives what a function of an image of 3×4×6 and of its own random numbers gives."""

    def __init__(self, function: Callable[..., torch.Tensor], *shape: int) -> None:
        super().__init__()
        self.function, self.own = function, nn.Parameter(torch.rand(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.own)


@pytest.mark.parametrize(
    ("function", "shape", "expected"),
    [
        (torch.matmul, (6,), 3 * 4 * 6),
        (torch.matmul, (6, 5), 3 * 4 * 6 * 5),
        (lambda x, w: w @ x, (5, 4), 3 * 5 * 4 * 6),  # one matrix for all three
        (lambda x, w: x @ w, (2, 3, 6, 5), 2 * 3 * 4 * 6 * 5),
        (torch.inner, (7, 6), 3 * 4 * 6 * 7),
        (functional.linear, (6,), 3 * 4 * 6),
        (functional.linear, (7, 6), 3 * 4 * 6 * 7),
        (lambda x, w: torch.tensordot(x, w, dims=([2], [0])), (4, 5), 3 * 6 * 4 * 5),
        (lambda x, w: torch.tensordot(x, w, dims=2), (4, 6, 5), 3 * 4 * 6 * 5),
        (lambda x, w: torch.baddbmm(x[0, :, :, :5], x[0], w), (3, 6, 5), 3 * 4 * 6 * 5),
        (lambda x, w: torch.addbmm(x[0, 0, :, :5], x[0], w), (3, 6, 5), 3 * 4 * 6 * 5),
    ],
)
def test_every_product_is_counted_as_often_as_it_multiplies(
    function: Callable[..., torch.Tensor], shape: tuple[int, ...], expected: int
) -> None:
    assert counter(Computes(function, *shape), torch.rand(1, 3, 4, 6)).total() == expected


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bnhd,bmhd->bhnm", [(2, 5, 3, 4), (2, 7, 3, 4)]),
        ("ij,jk,kl->il", [(3, 4), (4, 5), (5, 6)]),
        ("...ij,jk", [(2, 7, 3, 4), (4, 5)]),
        ("bij,bkl->bj", [(2, 3, 4), (2, 5, 6)]),  # i, k and l are sums of one operand
        ("ii->i", [(4, 4)]),
    ],
)
def test_einsum_multiplies_as_often_as_torchs_products(equation: str, shapes: list[tuple[int, ...]]) -> None:
    with FlopCounterMode(display=False) as counter:
        torch.einsum(equation, *(torch.rand(shape) for shape in shapes))
    assert 2 * einsum_macs(equation, shapes) == counter.get_total_flops()
