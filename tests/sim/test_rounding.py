from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
import torch
from torch import nn

from ptsim.capture.network import capture_network
from ptsim.costs.memory import iteration_memory
from ptsim.hardware.catalog import load_device
from ptsim.network import Layer, LayerKind, MemoryFormat, Network, Precision
from ptsim.prune.groups import find_groups
from ptsim.prune.modules import ConstantChannels, Gathered, Placeholder, Scattered
from ptsim.prune.reconfigure import reconfigure
from ptsim.setting import StepSetting
from ptsim.sim.rounding import rounded
from tests.traces import NetworkBuilder, residual_network

POOL = Layer(
    name="pool", kind=LayerKind.POOL, op="max_pool2d", in_channels=3, out_channels=3, input_shapes=((3, 4, 4),),
    output_shape=(3, 2, 2),
)  # fmt: skip


def test_a_rounded_network_is_the_one_with_those_widths() -> None:
    pruned = residual_network((12, 25, 50), (2, 2, 2), inner=(11, 20, 44))
    assert rounded(pruned, 8).id == residual_network((16, 32, 56), (2, 2, 2), inner=(16, 24, 48)).id


def test_multiples_stay_as_they_are() -> None:
    network = residual_network()
    assert rounded(network, 8).id == network.id
    assert rounded(network, 1) is network


def test_image_channels_and_classes_are_not_rounded() -> None:
    network = rounded(residual_network((12, 25, 50), num_classes=10), 8)
    assert network.layers[0].in_channels == 3
    assert network.layers[-1].out_channels == 10


def test_hidden_linear_layers_are_rounded_and_flattened_maps_follow() -> None:
    def classifier(width: int, hidden: int) -> NetworkBuilder:
        net = NetworkBuilder("mlp", (3, 4, 4), 5)
        flat = net.flatten("flatten", net.relu("relu", net.conv("conv", None, width)))
        net.linear("head", net.relu("relu2", net.linear("hidden", flat, hidden)), 5)
        return net

    assert rounded(classifier(6, 30).build(), 8).id == classifier(8, 32).build().id


def test_counts_of_parameters_stay_consistent() -> None:
    network = rounded(residual_network((12, 25, 50), inner=(11, 20, 44)), 8)
    for layer in network.layers:
        owned = sum(p.num_elements for p in network.parameters if p.layer == layer.name)
        assert layer.num_parameters == owned
        if layer.kind is LayerKind.CONV:
            assert layer.out_channels % 8 == 0


class Odd(nn.Module):
    """A gain that is one number, one number for every image, and no layer whose channels are counted at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gain = nn.Conv2d(3, 9, 3), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.conv(x) * self.gain).mean((1, 2, 3)).sigmoid()


def test_parameters_and_outputs_that_are_one_number_stay_one() -> None:
    network = rounded(capture_network(Odd(), name="odd", input_shape=(3, 8, 8), num_classes=10), 8)
    assert network.layer("conv").out_channels == 16
    assert [p.shape for p in network.parameters if p.name == "gain"] == [()]
    assert network.layers[-1].output_shape == ()


def test_layers_that_pruning_has_emptied_stay_empty() -> None:
    net = NetworkBuilder("emptied", (3, 4, 4), 5)
    net.conv("after", net.conv("conv", None, 0), 8)
    empty = rounded(net.build(), 8)
    assert (empty.layer("conv").out_channels, empty.layer("after").in_channels) == (0, 0)
    assert empty.layer("after").forward_macs == 0


def test_a_network_without_products_is_rounded_too() -> None:
    net = NetworkBuilder("pool", (3, 4, 4), 3)
    pooled = msgspec.structs.replace(net.build(), layers=(POOL,))
    assert rounded(pooled, 8).layers[0].output_shape == (3, 2, 2)


def test_a_multiple_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple 0"):
        rounded(residual_network(), 0)


class Block(nn.Module):
    """Convolutions with BatchNorm, a residual sum, a pool, and a classifier."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner), nn.ReLU())
        self.outer = nn.Sequential(nn.Conv2d(inner, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.pool = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y: torch.Tensor = self.head(self.pool(torch.relu(x + self.outer(self.inner(x)))))
        return y


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_a_rounded_network_needs_the_memory_of_one_captured_with_those_widths(
    gpu: bool, precision: Precision, memory_format: MemoryFormat
) -> None:
    """9 and 20 channels rounded up to 16 and 24: kept activations grow by up to 78 %, as torch's own do."""
    narrow, wide = (
        capture_network(Block(*widths), name="block", input_shape=(3, 32, 32), num_classes=10)
        for widths in ((9, 20), (16, 24))
    )
    change = rounded(narrow, 8)
    assert change.id != narrow.id
    device = load_device("a100") if gpu else None
    for batch in (1, 64):
        setting = StepSetting(batch=batch, precision=precision, memory_format=memory_format)
        is_now, was = iteration_memory(change, setting, device=device), iteration_memory(narrow, setting, device=device)
        captured = iteration_memory(wide, setting, device=device)
        assert is_now.activation_bytes == pytest.approx(captured.activation_bytes, rel=0.02)
        # A CPU's own layout has 9 channels padded to 16 already: scaled, that workspace counts too much.
        padded = not gpu and memory_format == "contiguous"
        assert 0.95 <= is_now.peak_bytes / captured.peak_bytes <= (1.12 if padded else 1.05)
        assert was.activation_bytes < 0.8 * captured.activation_bytes


class Joined(nn.Module):
    """Three branches side by side."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(3, width, 1) for _ in range(3))
        self.last = nn.Conv2d(3 * width, out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(torch.cat([branch(x) for branch in self.branches], 1))
        return y.mean((2, 3))


class Beside(nn.Module):
    """The image beside what a convolution makes of it."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 1), nn.Conv2d(3 + width, out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(torch.cat([x, self.first(x)], 1))
        return y.mean((2, 3))


class Halves(nn.Module):
    """A convolution of the first half of the channels; the other half passes."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv2d(3, width, 1), nn.Conv2d(width // 2, out, 1)
        self.last: nn.Module = nn.Linear(out + width // 2, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.first(x).chunk(2, 1)
        y: torch.Tensor = self.last(torch.cat([self.inner(a), b], 1).mean((2, 3)))
        return y


class Turned(Halves):
    """The halves change places, and every channel is read by itself, with filters of its own kind for all."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out)
        self.inner, self.last = nn.Conv2d(1, out, 3, padding=1), nn.Linear(width * out, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat(self.first(x).chunk(2, 1)[::-1], 1)
        n, channels, height, width = x.shape
        y = self.inner(x.reshape(n * channels, 1, height, width)).mean((2, 3))
        z: torch.Tensor = self.last(y.reshape(n, -1))
        return z


class Patches(Halves):
    """Four patches of the image as images of a convolution."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out)
        self.inner, self.last = nn.Conv2d(width, out, 3, padding=1), nn.Linear(4 * out, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        patches = x.unflatten(3, (4, 2)).permute(0, 3, 1, 2, 4).flatten(0, 1)
        y: torch.Tensor = self.last(self.inner(patches).mean((2, 3)).unflatten(0, (-1, 4)).flatten(1))
        return y


class Paired(Halves):
    """Every feature of one description of the image with every one of another."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out)
        self.other, self.inner, self.last = nn.Conv2d(3, out, 1), nn.Bilinear(width, out, width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.inner(self.first(x).mean((2, 3)), self.other(x).mean((2, 3))))
        return y


class Attended(Halves):
    """A map of mean and maximum over the channels weighs the places; linear layers on channels that lie last."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out)
        self.look, self.inner, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.Linear(width, out), nn.LayerNorm(width)
        self.last = nn.Linear(out, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        seen = self.look(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).mean(1, keepdim=True)
        y: torch.Tensor = self.last(self.inner(self.norm((x * seen).permute(0, 2, 3, 1))).mean((1, 2)))
        return y


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Bottleneck(nn.Module):
    """A convolution in three groups of the sum of two others, one of them depthwise; a third is added later."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, width, 1, bias=False), nn.BatchNorm2d(width)
        self.each, self.other = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Conv2d(3, width, 1)
        self.inner, self.last = nn.Conv2d(width, out, 3, padding=1, groups=3), nn.Conv2d(out, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.each(self.norm(self.first(x))) + self.other(x))
        y: torch.Tensor = x + self.last(self.inner(x))
        return y.mean((2, 3))


def volume(a: int, b: int) -> nn.Sequential:
    """The image's channels as the depth of a volume."""
    convolutions = nn.Conv3d(1, a, 3, padding=1), nn.Conv3d(a, b, 2)
    return nn.Sequential(nn.Unflatten(1, (1, 3)), *convolutions, nn.Flatten(), nn.Linear(b * 2 * 7 * 7, 10))


@pytest.mark.parametrize(
    ("image", "make", "narrow", "wide"),
    [
        (1, lambda a, b: chain(nn.Conv2d(1, a, 3), nn.Conv2d(a, b, 3)), (5, 12), (8, 16)),  # a grey image
        (3, lambda a, b: chain(nn.Conv2d(3, a, 3), nn.Conv2d(a, b, 3)), (1, 12), (8, 16)),  # pruned to a single channel
        (3, lambda a, b: chain(nn.Conv2d(3, a, 3), nn.Conv2d(a, b, 3, groups=a)), (12, 24), (16, 32)),  # depthwise
        # a multiple of 8 channels in 3 groups
        (3, lambda a, b: chain(nn.Conv2d(3, a, 3), nn.Conv2d(a, b, 3, groups=3)), (24, 30), (24, 48)),
        # the same of what such a convolution reads, wherever it is made
        (3, Bottleneck, (27, 30), (48, 48)),
        (3, lambda a, b: chain(nn.Conv2d(3, a, 3), nn.ConvTranspose2d(a, b, 2)), (12, 20), (16, 24)),
        (3, volume, (12, 20), (16, 24)),
        (3, lambda a, b: chain(nn.Conv2d(3, a, 3), nn.PReLU(a), nn.Conv2d(a, b, 3)), (12, 20), (16, 24)),
        (3, Joined, (5, 12), (8, 16)),  # 15 become 24
        (3, Beside, (5, 12), (8, 16)),  # 8 become 11: the image has 3
        (3, Halves, (12, 5), (16, 8)),
        (3, Turned, (12, 5), (16, 8)),
        (3, Patches, (12, 5), (16, 8)),
        (3, Paired, (12, 5), (16, 8)),
        (3, Attended, (12, 20), (16, 24)),
    ],
    ids=[
        *("grey", "single", "depthwise", "grouped", "read", "transposed", "volume", "slopes", "joined", "beside"),
        *("halves", "turned", "patches", "paired", "attended"),
    ],
)
def test_every_form_of_a_convolution_is_as_captured_with_those_widths(
    image: int, make: Callable[[int, int], nn.Module], narrow: tuple[int, int], wide: tuple[int, int]
) -> None:
    was, expected = (
        capture_network(make(*widths), name="form", input_shape=(image, 8, 8), num_classes=10)
        for widths in (narrow, wide)
    )
    assert rounded(expected, 8).id == expected.id  # multiples stay as they are
    change = rounded(was, 8)
    assert [p.shape for p in change.parameters] == [p.shape for p in expected.parameters]
    for layer, other in zip(change.layers, expected.layers, strict=True):
        assert (layer.in_channels, layer.out_channels, layer.groups) == (
            other.in_channels, other.out_channels, other.groups,
        )  # fmt: skip
        assert (layer.input_shapes, layer.output_shape) == (other.input_shapes, other.output_shape)
        assert (layer.num_parameters, layer.forward_macs) == (other.num_parameters, other.forward_macs)


class Last(Halves):
    """A linear layer on channels that lie last."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out)
        self.inner, self.last = nn.Linear(width, out), nn.Linear(out, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.inner(self.first(x).permute(0, 2, 3, 1)).mean((1, 2)))
        return y


@pytest.mark.parametrize(
    ("make", "narrow", "wide", "multiple"),
    [
        (Last, (8, 20), (16, 32), 16),  # as many channels as rows and columns
        (Patches, (4, 5), (8, 8), 8),  # as many as patches
    ],
)
def test_channels_grow_where_they_are_read_among_axes_of_one_length(
    make: Callable[[int, int], nn.Module], narrow: tuple[int, int], wide: tuple[int, int], multiple: int
) -> None:
    was, expected = (
        capture_network(make(*widths), name="form", input_shape=(3, 8, 8), num_classes=10) for widths in (narrow, wide)
    )
    products = [
        [
            (layer.in_channels, layer.out_channels, layer.input_shapes, layer.output_shape, layer.forward_macs)
            for layer in network.layers
            if layer.kind in (LayerKind.CONV, LayerKind.LINEAR)
        ]
        for network in (rounded(was, multiple), expected)
    ]
    assert products[0] == products[1]


class Shortened(nn.Module):
    """A residual block whose branch is removed, between two convolutions."""

    def __init__(self, width: int, *, full: bool) -> None:
        super().__init__()
        self.stem, self.gone = nn.Conv2d(3, width, 3, padding=1), Placeholder(channel_dim=1)
        self.constant = ConstantChannels(width=width, full=full, norm=True, affine=True, tracked=True, offset=False)
        self.last = nn.Conv2d(width, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.last(torch.relu(self.constant(self.gone(x)) + x))


@pytest.mark.parametrize("full", [True, False])
def test_what_is_left_of_a_removed_branch_is_as_wide_as_its_stream(full: bool) -> None:
    small, large = (
        capture_network(Shortened(width, full=full), name="net", input_shape=(3, 8, 8), num_classes=2)
        for width in (13, 16)
    )
    found = rounded(small, 8)
    assert [layer.output_shape for layer in found.layers] == [layer.output_shape for layer in large.layers]
    assert [layer.num_parameters for layer in found.layers] == [layer.num_parameters for layer in large.layers]
    assert [parameter.shape for parameter in found.parameters] == [parameter.shape for parameter in large.parameters]
    assert found.forward_macs == pytest.approx(large.forward_macs, rel=1e-3)


class Gated(nn.Module):
    """Layers that read and write only their own channels of a stream."""

    def __init__(self, width: int, used: int, inner: int) -> None:
        super().__init__()
        mask = [channel < used for channel in range(width)]
        self.stem, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 8, 3)
        self.read = Gathered(nn.Conv2d(used, inner, 1), mask)
        self.write = nn.Conv2d(inner, used, 1, bias=False)
        self.norm = Scattered(nn.BatchNorm2d(width), mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y: torch.Tensor = self.last(torch.relu(x + self.norm(self.write(self.read(x)))))
        return y


class Plain(nn.Module):
    """What `Gated` was before pruning, with one channel more in its stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 14, 3, padding=1), nn.Conv2d(14, 8, 3)
        self.read, self.write = nn.Conv2d(14, 6, 1), nn.Conv2d(6, 14, 1, bias=False)
        self.norm = nn.BatchNorm2d(14)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y: torch.Tensor = self.last(torch.relu(x + self.norm(self.write(self.read(x)))))
        return y


def test_a_gated_layer_has_rounded_channels_of_its_own_in_a_rounded_stream() -> None:
    """5 of 13 channels become 8 of 16."""
    small, large = (
        capture_network(Gated(*widths), name="net", input_shape=(3, 8, 8), num_classes=2)
        for widths in ((13, 5, 11), (16, 8, 16))
    )
    found = rounded(small, 8)
    for layer, other in zip(found.layers, large.layers, strict=True):
        assert (layer.in_channels, layer.out_channels) == (other.in_channels, other.out_channels)
        assert (layer.input_shapes, layer.output_shape) == (other.input_shapes, other.output_shape)
        assert layer.num_parameters == other.num_parameters
    assert [parameter.shape for parameter in found.parameters] == [parameter.shape for parameter in large.parameters]
    assert found.forward_macs == large.forward_macs


def test_no_layer_becomes_wider_than_it_was_before_pruning() -> None:
    """20 channels stay 20 where the next multiple is 24; gates as well."""
    dense = residual_network((20, 36, 52), (2, 2, 2), inner=(12, 28, 44))
    pruned = residual_network((17, 25, 50), (2, 2, 2), inner=(9, 20, 41))
    assert rounded(pruned, 8, dense).id == residual_network((20, 32, 52), (2, 2, 2), inner=(12, 24, 44)).id
    assert rounded(dense, 8, dense).id == dense.id
    # Of 13 channels of a stream that had 14, five are read: eight are then, and the stream is whole.
    before, small = (
        capture_network(net, name="net", input_shape=(3, 8, 8), num_classes=2) for net in (Plain(), Gated(13, 5, 3))
    )
    found = rounded(small, 8, before)
    assert [found.layer(name).out_channels for name in ("stem", "read.gather", "read.layer", "norm.scatter")] == [
        14, 8, 6, 14,
    ]  # fmt: skip


def test_a_group_has_no_more_channels_than_before_pruning() -> None:
    """Three of four groups with 10 channels each are left: the groups were no wider before."""

    def network(first: int, groups: int) -> Network:
        model = chain(nn.Conv2d(3, first, 3), nn.Conv2d(first, 10 * groups, 3, groups=groups))
        return capture_network(model, name="groups", input_shape=(3, 8, 8), num_classes=10)

    found = rounded(network(24, 3), 8, network(32, 4))
    assert (found.layer("1").out_channels, found.layer("1").groups) == (30, 3)


def test_a_depthwise_layer_of_one_channel_grows_with_its_input() -> None:
    """One of 24 channels is left: eight go in, and each of them is convolved by itself."""

    def network(width: int) -> Network:
        each, norm = nn.Conv2d(width, width, 3, groups=width), nn.BatchNorm2d(width)
        model = chain(nn.Conv2d(3, width, 1), each, norm, nn.Conv2d(width, 16, 1))
        return capture_network(model, name="net", input_shape=(3, 8, 8), num_classes=2)

    found = rounded(network(1), 8, network(24))
    assert (found.layer("1").groups, found.layer("1").out_channels) == (8, 8)
    assert found.layer("1").forward_macs == 8 * 3 * 3 * 6 * 6
    assert [p.shape for p in found.parameters] == [p.shape for p in network(8).parameters]


class Excited(nn.Module):
    """What a grouped convolution writes is weighed by channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 24, 1), nn.Conv2d(24, width, 1, groups=3)
        self.weigh = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(self.stem(x))
        y: torch.Tensor = (x * torch.sigmoid(self.weigh(x.mean((2, 3), keepdim=True)))).mean((2, 3))
        return y


def test_what_a_grouped_convolution_writes_and_its_weights_are_equally_many() -> None:
    """33 channels in three groups become 48, and so do the weights, though these alone would be 40."""
    small, large = (
        capture_network(Excited(width), name="net", input_shape=(3, 8, 8), num_classes=2) for width in (33, 48)
    )
    found = rounded(small, 8)
    assert [layer.output_shape for layer in found.layers] == [layer.output_shape for layer in large.layers]


def test_training_and_projecting_round_alike() -> None:
    """The network that `channel_multiple` trains is the one that is projected from a run without it."""
    trained = {}
    for multiple in (1, 8):
        torch.manual_seed(0)
        model = Block(20, 36)
        with torch.no_grad():  # 11 of 20 and 33 of 36 channels are left
            for writer, kept in ((model.stem, 11), (model.outer, 11), (model.inner, 33)):
                for parameter in writer.parameters():
                    parameter[kept:] = 0
            for reader, kept in ((model.inner[0], 11), (model.pool[1], 11), (model.outer[0], 33)):
                reader.weight[:, kept:] = 0
        assert reconfigure(model, find_groups(model, (3, 32, 32)), channel_multiple=multiple).changed
        trained[multiple] = capture_network(model, name="block", input_shape=(3, 32, 32), num_classes=10)
    dense = capture_network(Block(20, 36), name="block", input_shape=(3, 32, 32), num_classes=10)
    found = rounded(trained[1], 8, dense)
    assert [layer.out_channels for layer in found.layers] == [layer.out_channels for layer in trained[8].layers]
    assert [p.shape for p in found.parameters] == [p.shape for p in trained[8].parameters]
    assert {layer.out_channels for layer in found.layers if layer.name in ("stem.0", "inner.0")} == {16, 36}
