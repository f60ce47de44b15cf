from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import random
from collections.abc import Callable
from typing import Literal

import numpy
import pytest
import torch
from _pytest.mark import ParameterSet
from torch import fx, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import ptsim
from analysis.check_counts import kept_bytes
from ptsim import zoo
from ptsim.capture import footprint
from ptsim.capture.copies import copied
from ptsim.capture.network import capture_network
from ptsim.capture.rehearsal import rehearse
from ptsim.capture.tracers import Tracer
from ptsim.costs.flops import inference_macs, layer_macs, training_macs
from ptsim.costs.memory import iteration_memory
from ptsim.errors import UnsupportedModelError
from ptsim.network import LayerKind, Network
from ptsim.prune.groups import find_groups
from ptsim.prune.reconfigure import reconfigure
from ptsim.setting import StepSetting


def slow(name: str) -> ParameterSet:
    return pytest.param(name, marks=pytest.mark.slow)


def capture(name: str) -> tuple[nn.Module, Network]:
    entry = zoo.find(name)
    model = entry.build(num_classes=entry.num_classes)
    network = capture_network(model, name=name, input_shape=entry.input_shape, num_classes=entry.num_classes)
    return model, network


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg11", "torchvision:shufflenet_v2_x0_5"])
def test_forward_macs_are_half_of_what_torch_counts(name: str) -> None:
    model, network = capture(name)
    with FlopCounterMode(display=False) as mode, torch.no_grad():
        model.eval()(torch.rand(1, *network.input_shape))
    assert 2 * network.forward_macs == mode.get_total_flops()


@pytest.mark.parametrize("name", ["resnet20", slow("torchvision:squeezenet1_1"), slow("torchvision:swin_t")])
def test_a_step_without_arithmetic_does_what_a_real_one_does(name: str) -> None:
    entry = zoo.find(name)
    model = entry.build(num_classes=entry.num_classes)
    hollow, real = (rehearse(model, entry.input_shape, 2, hollow=hollow) for hollow in (True, False))
    assert hollow.steps == real.steps
    assert hollow.ready == real.ready


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "name",
    ["resnet20", slow("torchvision:efficientnet_b0"), slow("torchvision:convnext_tiny"), slow("torchvision:swin_t")],
)
def test_memory_without_arithmetic_is_that_of_a_real_step(
    name: str, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = zoo.find(name)
    model = entry.build(num_classes=entry.num_classes)
    shape = (3, 64, 64) if name.startswith("torchvision") else entry.input_shape
    hollow = footprint._watch(model, shape, 2, gpu=False, half=half)
    monkeypatch.setattr(footprint, "NoArithmetic", contextlib.nullcontext)
    monkeypatch.setattr(footprint, "hollow_copy", copied)
    real = footprint._watch(model, shape, 2, gpu=False, half=half)
    assert hollow.kept == real.kept
    assert max(seen.alive for seen in hollow.seen) == max(seen.alive for seen in real.seen)


@pytest.mark.slow
def test_a_capture_leaves_the_model_and_the_random_state_alone() -> None:
    model = zoo.create("resnet20").train()
    model.layer1.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    capture_network(model, name="r", input_shape=(3, 32, 32), num_classes=10)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


class SometimesSkipped(nn.Module):
    """Stochastic depth as people write it: in training a block is left out where a random number says so."""

    def __init__(self, skips: Callable[[], object]) -> None:
        super().__init__()
        self.skips = skips
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if self.training and self.skips():
                continue
            x = x + block(x)
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    "skips",
    [
        lambda: random.random() < 0.5,
        lambda: numpy.random.rand() < 0.5,
        lambda: torch.rand(1).item() < 0.5,
        lambda: torch.rand(1) > 0.5,
        lambda: torch.empty(1).bernoulli_(0.5),
        lambda: torch.randint(0, 2, ()),
    ],
)
def test_where_random_numbers_decide_the_way_on_which_nothing_is_skipped_is_described(
    skips: Callable[[], object],
) -> None:
    model, unskipped = SometimesSkipped(skips), SometimesSkipped(lambda: False)
    state = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    with pytest.warns(UserWarning, match="random numbers decide what SometimesSkipped computes"):
        network = capture_network(model, name="r", input_shape=(3, 8, 8), num_classes=2)
    whole = capture_network(unskipped, name="r", input_shape=(3, 8, 8), num_classes=2)
    assert whole.forward_macs > 2 * 4 * 4 * 9 * 6 * 6  # both blocks: 4 × 4 kernels of 3 × 3 on 6 × 6 pixels
    assert network == whole
    assert network.footprints == whole.footprints
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert str(numpy.random.get_state()) == state[2]


@pytest.mark.slow
def test_resnet20_is_described_as_the_paper_describes_it() -> None:
    _, network = capture("resnet20")
    assert network.forward_macs == 40_813_184  # 41 MMAC
    assert network.num_parameters == 272_474
    kinds = [layer.kind for layer in network.layers]
    assert kinds.count(LayerKind.CONV) == 21
    assert kinds.count(LayerKind.BATCH_NORM) == 21
    assert not network.layer("conv1").input_needs_gradient
    assert network.layer("layer1.0.conv1").input_needs_gradient
    assert ("layer1.0.bn2", "add") in network.edges
    assert network.parameters[0].layer == "fc"
    assert network.parameters[-1].name == "conv1.weight"


@pytest.mark.slow
def test_auxiliary_heads_train_but_do_not_infer() -> None:
    _, network = capture("torchvision:googlenet")
    auxiliary = {layer.name.split(".")[0] for layer in network.layers if layer.training_only}
    assert {"aux1", "aux2"} <= auxiliary
    assert abs(network.forward_macs / 1.4983e9 - 1) < 0.01  # torchvision's model card: 1.5 GFLOPS
    assert network.num_parameters > 6_624_904  # the card's count is without the heads


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["union", "gating"])
def test_a_pruned_network_is_described_as_it_now_is(mode: Literal["union", "gating"]) -> None:
    model = zoo.create("resnet20")
    with torch.no_grad():
        model.layer1[0].conv1.weight[3:9].zero_()
        model.layer2[1].conv1.weight.zero_()
        for block in (model.layer1[0], model.layer2[1]):
            block.conv2.weight[:, (block.conv1.weight == 0).all((1, 2, 3))] = 0
        model.layer2[1].conv2.weight.zero_()
        model.layer3[0].conv2.weight[10:20].zero_()
    surgery = reconfigure(model, find_groups(model, (3, 32, 32)), mode=mode)
    assert surgery.changed
    network = capture_network(model, name="pruned", input_shape=(3, 32, 32), num_classes=10)
    images = torch.rand(3, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model.train()(images).sum().backward()
    assert 2 * 3 * training_macs(network) == counter.get_total_flops()
    assert iteration_memory(network, StepSetting(batch=3)).activation_bytes == kept_bytes(model, images)
    assert network.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert "layer2.1.conv2" not in {layer.name for layer in network.layers if layer.kind is LayerKind.CONV}


@pytest.mark.slow
def test_shared_and_frozen_layers_keep_their_backward_work() -> None:
    shared = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    frozen = nn.Conv2d(3, 4, 1).requires_grad_(False)
    model = nn.Sequential(shared, shared, nn.ReLU(), frozen, nn.Flatten(), nn.Linear(4 * 64, 2))
    network = capture_network(model, name="s", input_shape=(3, 8, 8), num_classes=2)
    assert [layer.name for layer in network.layers[:2]] == ["0", "0:1"]
    assert [layer.num_parameters for layer in network.layers[:2]] == [81, 0]
    assert layer_macs(network.layers[1]).training == 3 * 81 * 64
    assert layer_macs(network.layer("3")).weight_gradient == 0
    assert layer_macs(network.layer("3")).input_gradient == 3 * 4 * 64
    assert [parameter.name for parameter in network.parameters] == ["5.bias", "5.weight", "0.weight"]


class Pooled(nn.Module):
    def __init__(self, pool: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.pool, self.head = nn.Conv2d(3, 4, 1), pool, nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.pool(self.conv(x)).mean((2, 3)))
        return logits


def unpooled(x: torch.Tensor) -> torch.Tensor:
    x, places = functional.max_pool2d(x, 3, 2, return_indices=True)
    return functional.max_unpool2d(x, places, 3, 2)


@pytest.mark.parametrize(
    ("pool", "op", "stride"),
    [
        (nn.LPPool2d(2, 3), "lp_pool2d", (3, 3)),
        (lambda x: functional.lp_pool2d(x, 2.0, 3), "lp_pool2d", (3, 3)),
        (lambda x: functional.lp_pool2d(x, 2.0, 3, 2), "lp_pool2d", (2, 2)),
        (unpooled, "max_unpool2d", (2, 2)),
    ],
)
def test_the_windows_of_a_pool_are_told_whatever_else_it_is_given(
    pool: Callable[[torch.Tensor], torch.Tensor], op: str, stride: tuple[int, int]
) -> None:
    network = capture_network(Pooled(pool), name="p", input_shape=(3, 9, 9), num_classes=2)
    assert [(layer.kernel_size, layer.stride) for layer in network.layers if layer.op == op] == [((3, 3), stride)]


class Computing(nn.Module):
    """Four channels of an image of 16×16, and what a function makes of them with these parameters."""

    def __init__(self, function: Callable[..., torch.Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.conv, self.head, self.function = nn.Conv2d(3, 4, 1), nn.Linear(1, 2), function
        self.own = nn.ParameterList(torch.rand(shape) for shape in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.function(self.conv(x), *self.own)
        logits: torch.Tensor = self.head(made.flatten(1).mean(1, keepdim=True))
        return logits


@pytest.mark.parametrize(
    ("computing", "expected"),
    [
        (
            Computing(lambda x, w: functional.conv2d(x, w, None, (2, 1), (1, 2), (1, 2), 2), (6, 2, 3, 5)),
            {"op": "conv2d", "in_channels": 4, "out_channels": 6, "kernel_size": (3, 5), "stride": (2, 1),
             "padding": (1, 2), "dilation": (1, 2), "groups": 2, "bias": False},
        ),
        (  # its weight begins with the channels of the input
            Computing(lambda x, *w: functional.conv_transpose2d(x, *w, 2, 1, 0, 2, 3), (4, 5, 2, 3), (10,)),
            {"op": "conv_transpose2d", "in_channels": 4, "out_channels": 10, "kernel_size": (2, 3), "stride": (2, 2),
             "padding": (1, 1), "dilation": (3, 3), "groups": 2, "bias": True},
        ),
        (  # (5 - 1) · 2 / 2 and (3 - 1) · 2 / 2
            Computing(lambda x, w: functional.conv2d(x, w, padding="same", dilation=2), (6, 4, 5, 3)),
            {"op": "conv2d", "kernel_size": (5, 3), "stride": (1, 1), "padding": (4, 2), "dilation": (2, 2)},
        ),
        (
            Computing(lambda x, *w: functional.linear(x.mean((2, 3)), *w), (6, 4), (6,)),
            {"op": "linear", "in_channels": 4, "out_channels": 6, "bias": True},
        ),
        (
            Computing(lambda x, w: functional.linear(x.mean((2, 3)), w), (6, 4)),
            {"op": "linear", "in_channels": 4, "out_channels": 6, "bias": False},
        ),
        (
            Computing(lambda x, w: functional.bilinear(x.mean((2, 3)), x.mean((1, 2))[:, :7], w), (5, 4, 7)),
            {"op": "bilinear", "in_channels": 4, "out_channels": 5},
        ),
        (
            Computing(lambda x: functional.max_pool2d(x, 3, 2, 1, (2, 1))),
            {"op": "max_pool2d", "in_channels": 4, "kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1),
             "dilation": (2, 1)},
        ),
        (
            Computing(lambda x: torch.max_pool2d(x, 3, 2, 1, (2, 1))),
            {"op": "max_pool2d", "kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (2, 1)},
        ),
        (
            Computing(nn.MaxPool2d(3, 2, 1, (2, 1))),
            {"op": "max_pool2d", "in_channels": 4, "kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1),
             "dilation": (2, 1)},
        ),
        (Computing(lambda x: functional.avg_pool2d(x, 3, 2, 1, True)), {"op": "avg_pool2d", "dilation": (1, 1)}),
        (
            Computing(lambda x: functional.max_pool3d(x.unsqueeze(2), (1, 3, 3), 2, 0, 2)),
            {"op": "max_pool3d", "depth": (1, 2, 0, 2)},
        ),
        (
            Computing(nn.LayerNorm((4, 16, 16))),
            {"op": "layer_norm", "in_channels": 16, "out_channels": 16, "bias": True},
        ),
        (Computing(nn.GroupNorm(2, 4, affine=False)), {"op": "group_norm", "in_channels": 4, "bias": False}),
    ],
    ids=lambda given: given["op"] if isinstance(given, dict) else "",
)  # fmt: skip
def test_what_a_layer_is_given_is_told_whether_by_a_module_or_a_function(
    computing: nn.Module, expected: dict[str, object]
) -> None:
    network = capture_network(computing, name="c", input_shape=(3, 16, 16), num_classes=2)
    layer = next(layer for layer in network.layers if layer.op == expected["op"] and layer.name not in ("conv", "head"))
    assert {name: getattr(layer, name) for name in expected} == expected


class HollowConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 1, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv3d(x, self.weight, None, 1, (2, 0, 0), (2, 1, 1))


@pytest.mark.parametrize(
    ("made", "op", "depth"),
    [
        (nn.Conv3d(1, 2, (3, 1, 1), (2, 1, 1), (1, 0, 0)), "conv3d", (3, 2, 1, 1)),
        (nn.Conv3d(1, 2, (5, 1, 1), padding="same", dilation=(2, 1, 1)), "conv3d", (5, 1, 4, 2)),
        (HollowConvolution(), "conv3d", (3, 1, 2, 2)),
        (nn.MaxPool3d((2, 1, 1)), "max_pool3d", (2, 2, 0, 1)),
        (nn.AvgPool3d(3, (1, 2, 2), (1, 0, 0)), "avg_pool3d", (3, 1, 1, 1)),
    ],
)
def test_what_three_axes_have_for_the_first_of_them_is_told(
    made: nn.Module, op: str, depth: tuple[int, int, int, int]
) -> None:
    channels = 2 if op == "conv3d" else 1
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.Unflatten(1, (1, 3)), made, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(channels, 2)
    )
    network = capture_network(model, name="v", input_shape=(3, 9, 9), num_classes=2)
    assert [layer.depth for layer in network.layers if layer.op == op] == [depth]
    assert {layer.depth for layer in network.layers if layer.op != op} == {None}


@fx.wrap
def refused_by_jit(x: torch.Tensor) -> torch.Tensor:
    if torch.jit.is_tracing():
        raise ValueError("not for torch.jit")
    return x * 2


def test_what_cannot_be_counted_is_one_sentence() -> None:
    with pytest.raises(UnsupportedModelError, match=r"the operations of Pooled cannot be counted: not for torch\.jit"):
        capture_network(Pooled(lambda x: refused_by_jit(2 * x)), name="p", input_shape=(3, 9, 9), num_classes=2)


class Reading(nn.Module):
    """A convolution, and a recurrent layer that reads what is in the columns of 8 × 8 pixels."""

    def __init__(self, reader: nn.RNNBase) -> None:
        super().__init__()
        self.conv, self.reader = nn.Conv2d(3, 7, 1), reader
        self.head = nn.Linear(reader.hidden_size * (2 if reader.bidirectional else 1), 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, _ = self.reader(self.conv(x).mean(2).transpose(1, 2))
        logits: torch.Tensor = self.head(states.mean(1))
        return logits


@pytest.mark.parametrize(
    ("reader", "macs"),
    [
        (nn.LSTM(7, 5, batch_first=True), 8 * 4 * 5 * (7 + 5)),
        (nn.LSTM(7, 5, batch_first=True, bidirectional=True, bias=False), 2 * 8 * 4 * 5 * (7 + 5)),
        (nn.GRU(7, 5, num_layers=2, batch_first=True), 8 * 3 * 5 * (7 + 5 + 5 + 5)),
        (nn.RNN(7, 5, batch_first=True), 8 * 5 * (7 + 5)),
    ],
)
def test_a_recurrent_layer_multiplies_with_its_weights_at_every_step(reader: nn.RNNBase, macs: int) -> None:
    network = capture_network(Reading(reader), name="r", input_shape=(3, 8, 8), num_classes=2)
    layer = network.layer("reader")
    assert (layer.kind, layer.forward_macs) == (LayerKind.MATMUL, macs)
    assert layer_macs(layer).training == 3 * macs


class Deformed(nn.Module):
    """A convolution that says where another one reads."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.ops import DeformConv2d

        self.places, self.conv = nn.Conv2d(3, 18, 3, padding=1), DeformConv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.conv(x, self.places(x)).mean((2, 3)))
        return logits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*traced by torch.export")
def test_a_deformable_convolution_multiplies_as_often_as_an_ordinary_one() -> None:
    network = capture_network(Deformed(), name="d", input_shape=(3, 8, 8), num_classes=2)
    macs = [layer.forward_macs for layer in network.layers if layer.kind is LayerKind.CONV]
    assert macs == [3 * 9 * 18 * 64, 3 * 9 * 6 * 64]
    deformed = next(layer for layer in network.layers if layer.op == "deform_conv2d")
    assert (deformed.kernel_size, deformed.padding, deformed.stride) == ((3, 3), (1, 1), (1, 1))


class ReadingAsked(Reading):
    """Looks at a shape, which torch.fx follows no further than to the recurrent layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.ndim == 4
        return super().forward(x)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*traced by torch.export")
def test_what_is_counted_is_traced_as_what_is_described() -> None:
    model = ReadingAsked(nn.LSTM(7, 5, batch_first=True))
    network = capture_network(model, name="r", input_shape=(3, 8, 8), num_classes=2)
    products = {layer.kind: layer.forward_macs for layer in network.layers if layer_macs(layer).forward}
    assert products == {LayerKind.CONV: 3 * 7 * 64, LayerKind.MATMUL: 8 * 4 * 5 * (7 + 5), LayerKind.LINEAR: 5 * 2}


class Stated(nn.Module):
    """A sum and a value that statements of their own write into a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, z = self.conv(x), self.other(x)
        y.add_(x)
        y[:, :, 1:] = z[:, :, 1:]
        logits: torch.Tensor = self.head(torch.relu(y).mean((2, 3)))
        return logits


def test_what_a_statement_writes_into_a_tensor_comes_from_there_on_from_it() -> None:
    network = capture_network(Stated(), name="s", input_shape=(3, 8, 8), num_classes=2)
    assert set(network.edges) == {
        ("conv", "add_"), ("add_", "setitem"), ("other", "getitem"), ("getitem", "setitem"), ("setitem", "relu"),
        ("relu", "mean"), ("mean", "head"),
    }  # fmt: skip


class Cleared(nn.Module):
    """Writes parts of what a convolution gave: of one it names the part, another one it copies, a mask chooses one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        y[:, :, 5:] = 0.0
        y[:, 1:, :3].copy_(y[:, :1, 3:6].detach())
        y[y > 1] = 1.0
        logits: torch.Tensor = self.head(y.mean((2, 3)))
        return logits


def test_what_writes_a_part_of_a_tensor_is_a_layer_with_the_shapes_of_both() -> None:
    network = capture_network(Cleared(), name="c", input_shape=(3, 8, 8), num_classes=2)
    written = {layer.name: layer for layer in network.layers if len(layer.input_shapes) > 1}
    assert {name: (layer.op, layer.input_shapes, layer.fixed_inputs) for name, layer in written.items()} == {
        "setitem": ("fill_part", ((4, 8, 8), (4, 3, 8)), (1,)),
        "copy_": ("setitem", ((4, 8, 8), (3, 3, 8)), (1,)),
        "setitem_1": ("index_put", ((4, 8, 8), (4, 8, 8)), (1,)),
    }
    assert all(layer.output_shape == (4, 8, 8) and layer.inplace for layer in written.values())
    assert {("conv", "setitem"), ("setitem", "copy_"), ("copy_", "setitem_1"), ("setitem_1", "mean")} <= {
        *network.edges
    }


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_a_branch_on_values_is_refused_in_one_sentence() -> None:
    with pytest.raises(UnsupportedModelError, match=r"torch\.fx cannot trace Branching"):
        capture_network(Branching(), name="b", input_shape=(3, 8, 8), num_classes=2)


def test_an_image_that_does_not_fit_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match="fails on an image of 4×32×32"):
        capture_network(zoo.create("resnet20"), name="r", input_shape=(4, 32, 32), num_classes=10)


def test_lazy_modules_are_refused_in_one_sentence() -> None:
    with pytest.raises(UnsupportedModelError, match="Sequential has lazy modules, whose parameters have no shape yet"):
        capture_network(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), name="l", input_shape=(3, 8, 8), num_classes=3)


class _Asserting(nn.Module):
    """Looks at a shape, and normalises vectors: a training mini-batch of one would be refused by BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.norm, self.head = (
            nn.Conv2d(3, 8, 3), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[1] == 3
        logits: torch.Tensor = self.head(self.norm(self.linear(self.conv(images).mean((2, 3)))))
        return logits


@pytest.mark.slow
def test_a_network_that_looks_at_shapes_may_normalise_vectors():
    network = capture_network(_Asserting(), name="asserting", input_shape=(3, 8, 8), num_classes=10)
    assert sum(layer_macs(layer).forward for layer in network.layers) == 3 * 9 * 8 * 36 + 8 * 16 + 16 * 10


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.bias * self.weight


def test_parameters_of_a_users_own_layers_are_found_without_a_walk_through_all_of_them_each_time() -> None:
    model = nn.Sequential(*(_Scale() for _ in range(20)))
    expected = str(fx.Tracer().trace(model))
    walks = []
    walk = model.named_parameters
    model.named_parameters = lambda *args, **kwargs: walks.append(1) or walk(*args, **kwargs)
    assert str(Tracer().trace(model)) == expected
    assert len(walks) == 1


@dataclasses.dataclass
class _Answer:
    logits: torch.Tensor
    features: torch.Tensor


class _Answering(nn.Module):
    """Returns a record, as many libraries' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

    def forward(self, images: torch.Tensor) -> _Answer:
        features = self.second(self.first(images).relu()).mean((2, 3))
        return _Answer(self.head(features), features)


def test_a_model_may_return_a_dataclass() -> None:
    network = capture_network(_Answering(), name="answering", input_shape=(3, 8, 8), num_classes=4)
    assert inference_macs(network) == 3 * 9 * 8 * 36 + 8 * 9 * 6 * 16 + 6 * 4
    found = ptsim.inspect(_Answering(), input_shape=(3, 8, 8))
    assert found.exact
    assert found.prunable_channels == 8  # those of `features` are given away


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripted_layers_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), torch.jit.script(nn.Conv2d(8, 4, 3)), nn.Flatten())
    with pytest.raises(UnsupportedModelError, match="1 is a ScriptModule, whose operators"):
        capture_network(model, name="scripted", input_shape=(3, 8, 8), num_classes=64)


class _Unused(nn.Module):
    """What the sigmoid gives is used for nothing: PyTorch frees it, and what its gradient would need, at once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        torch.sigmoid(y)
        return self.head(y.mean((2, 3)))


def test_what_no_gradient_will_ask_for_is_not_kept() -> None:
    network = capture_network(_Unused(), name="u", input_shape=(3, 16, 16), num_classes=4)
    # An image, and the mean over 8 channels.
    assert {seen.kept_image_bytes for seen in network.footprints if not seen.half} == {4 * (3 * 16 * 16 + 8)}
    assert network.layer("sigmoid").saved_elements == 0
    assert kept_bytes(_Unused(), torch.rand(2, 3, 16, 16)) == 2 * 4 * (3 * 16 * 16 + 8)


def test_nothing_of_what_a_capture_copies_stays_in_memory() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))

    def modules() -> int:
        gc.collect()
        return sum(issubclass(type(known), nn.Module) for known in gc.get_objects())

    before = modules()
    for _ in range(3):  # what other tests have left may go meanwhile
        capture_network(model, name="m", input_shape=(3, 8, 8), num_classes=4)
    assert modules() <= before


class _Resizing(nn.Module):
    """Makes one tensor as large as another one, which it adds."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide, narrow = self.wide(x), self.narrow(x)
        return wide + nn.functional.interpolate(narrow, size=wide.shape[2:])


def test_a_shape_that_is_asked_for_is_no_edge_along_which_a_gradient_comes_back() -> None:
    network = capture_network(_Resizing(), name="resizing", input_shape=(3, 8, 8), num_classes=8)
    assert set(network.edges) == {("narrow", "interpolate"), ("interpolate", "add"), ("wide", "add")}


class _Dropping(nn.Module):
    """Stochastic depth as timm writes it: a number for every image, made like the tensor that it is for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.5) + torch.zeros_like(x)


def test_what_is_made_like_a_tensor_reads_none_of_it() -> None:
    network = capture_network(_Dropping(), name="dropping", input_shape=(3, 8, 8), num_classes=8)
    inputs = {layer.name: layer.input_shapes for layer in network.layers}
    assert inputs == {
        "conv": ((3, 8, 8),),
        "new_empty": (),
        "bernoulli_": ((1, 1, 1),),
        "mul": ((8, 8, 8), (1, 1, 1)),
        "zeros_like": (),
        "add": ((8, 8, 8), (8, 8, 8)),
    }
    made = ("new_empty", "bernoulli_"), ("bernoulli_", "mul"), ("zeros_like", "add")
    assert set(network.edges) == {("conv", "mul"), ("mul", "add"), *made}


class _Mute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: torch.Tensor) -> None:
        self.conv(x)


def test_a_network_that_returns_nothing_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"^mute returns no tensor$"):
        capture_network(_Mute(), name="mute", input_shape=(3, 8, 8), num_classes=8)
