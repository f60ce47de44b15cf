"""Criteria beside the group lasso: network slimming, and one that somebody else's package brings."""

import copy
import functools
import importlib.metadata

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ptsim
from ptsim.capture.network import capture_network
from ptsim.costs.datasheet import datasheet_step
from ptsim.criteria import CRITERIA, PenaltyWork, penalty_work, step_penalty
from ptsim.errors import UnknownNameError, UsageError
from ptsim.hardware.catalog import load_device
from ptsim.network import Layer, LayerKind, Network, Parameter
from ptsim.prune.criteria.group_lasso import GroupLasso
from ptsim.prune.criteria.slimming import Slimming
from ptsim.prune.groups import find_groups
from ptsim.prune.reconfigure import reconfigure
from ptsim.setting import StepSetting, ToldPenalty
from tests.prune.helpers import SMALL_IMAGE, enliven, small_resnet
from tests.prune.test_gating import Meeting


def silenced(model, groups, fraction=0.4):
    """A model some of whose channels have γ = β = 0 in every BatchNorm of their component: by hand."""
    generator = torch.Generator().manual_seed(3)
    chosen = groups.prunable & (torch.rand(groups.num_components, generator=generator) < fraction)
    with torch.no_grad():
        for path, module in model.named_modules():
            components = groups.axes.get((f"{path}.weight", 0))
            if isinstance(module, nn.BatchNorm2d) and components is not None:
                module.weight[chosen[components]] = 0
                module.bias[chosen[components]] = 0
    return chosen


@pytest.mark.parametrize("training", [True, False])
def test_what_slimming_takes_out_changes_nothing_of_the_function(training):
    torch.manual_seed(0)
    model = small_resnet().double()
    enliven(model)
    groups = find_groups(model, SMALL_IMAGE)
    silenced(model, groups)
    dense = copy.deepcopy(model)
    surgery = reconfigure(model, groups, importance_of=Slimming.importance)
    assert surgery.channels_removed > 0
    images = torch.rand(4, *SMALL_IMAGE, dtype=torch.float64)
    ours, theirs = model.train(training)(images), dense.train(training)(images)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_channel_that_is_not_silent_at_zero_stays():
    """sigmoid(0) is a half: the consumer hears it, so γ = β = 0 does not make the channel superfluous."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip
    with torch.no_grad():
        for norm in (model[1], model[4]):
            norm.weight[:2] = norm.bias[:2] = 0
    groups = find_groups(model, SMALL_IMAGE)
    reconfigure(model, groups, importance_of=Slimming.importance)
    assert (model[0].out_channels, model[3].out_channels) == (4, 3)


def test_the_gradient_is_the_sign_and_the_proximal_step_a_soft_threshold():
    model = small_resnet()
    enliven(model)
    criterion = Slimming(model, find_groups(model, SMALL_IMAGE))
    (0.3 * criterion.penalty()).backward()
    expected = [weight.grad.clone() for weight in criterion.weights]
    model.zero_grad()
    criterion.add_gradient(0.3)
    for weight, gradient in zip(criterion.weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)
    weight = criterion.weights[0]
    with torch.no_grad():
        weight[:3] = torch.tensor([0.5, -0.05, -0.4], dtype=torch.float64)
    criterion.proximal_step(0.1)
    torch.testing.assert_close(weight[:3].detach(), torch.tensor([0.4, 0.0, -0.3], dtype=torch.float64))


@pytest.mark.slow
def test_traffic_is_three_accesses_to_every_scale():
    network = capture_network(small_resnet(), name="n", input_shape=SMALL_IMAGE, num_classes=5)
    channels = sum(layer.out_channels for layer in network.layers if layer.kind is LayerKind.BATCH_NORM)
    assert Slimming.traffic(network) == 3 * 4 * channels


class OnlyTheFirst(Slimming):
    """Somebody else's criterion: penalises one BatchNorm alone."""

    label = "the first scale"

    def __init__(self, model, groups):
        super().__init__(model, groups)
        self.weights = self.weights[:1]

    @classmethod
    def traffic(cls, network):
        return 10**12

    @classmethod
    def launches(cls, network):
        return 2


class _EntryPoint:
    name, value = "first_alone", "tests.prune.test_criteria:OnlyTheFirst"

    def load(self):
        return OnlyTheFirst


def trained(criterion, **more):
    torch.manual_seed(0)
    model = small_resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = ptsim.PruneTrain(
        model, optimizer, input_shape=SMALL_IMAGE, penalty_ratio=0.65, criterion=criterion, **more
    )
    random = torch.Generator().manual_seed(0)
    for _ in range(28):
        images, labels = torch.rand(8, *SMALL_IMAGE, dtype=torch.float64, generator=random), torch.arange(8) % 5
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        pruner.step(loss)
        optimizer.step()
    return pruner, pruner.end_epoch(reconfigure=True)


@pytest.mark.slow
def test_prunetrain_trains_with_slimming_and_prunes():
    pruner, outcome = trained("slimming", regularizer="proximal", threshold=1e-12)
    assert isinstance(pruner.criterion, Slimming)
    timed = pruner.recorder.regularizer
    assert isinstance(timed, functools.partial)
    assert timed.func.__name__ == "proximal_step"  # what a profile runs
    assert outcome.reconfiguration.channels_removed > 0


@pytest.mark.slow
def test_a_criterion_from_outside_the_package_is_added_by_one_line_or_by_an_entry_point(monkeypatch):
    with pytest.raises(UnknownNameError, match="unknown criterion 'first_alone'; known: group_lasso, slimming"):
        trained("first_alone")
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [_EntryPoint()] if group == "ptsim.criteria" else []
    )
    assert "first_alone" in CRITERIA.names()
    pruner, _ = trained("first_alone")
    assert len(pruner.criterion.weights) == 1
    CRITERIA.remove("first_alone")
    CRITERIA.add("by_hand", OnlyTheFirst)
    try:
        pruner, _ = trained("by_hand")
        assert len(pruner.criterion.weights) == 1
        network = pruner.recorder.architecture
        assert penalty_work("by_hand", network, gpu=True) == PenaltyWork(num_bytes=10**12, num_launches=2)
        setting = StepSetting(batch=8, regularizer="by_hand")
        a100 = load_device("a100")
        fastest_s = 1e12 / a100.memory_bandwidth_bytes_per_s
        assert fastest_s < datasheet_step(network, a100, setting).regularizer_s < 2 * fastest_s
        with pytest.raises(UsageError, match="criterion 'group_lasso' exists already"):
            CRITERIA.add("group_lasso", OnlyTheFirst)
    finally:
        CRITERIA.remove("by_hand")


def of_weights(*shapes, norms=()):
    """A network with one convolution or linear layer for each weight, and BatchNorms of these widths."""
    layers, parameters = [], []
    for index, shape in enumerate((*shapes, *((width,) for width in norms))):
        kind = {1: LayerKind.BATCH_NORM, 2: LayerKind.LINEAR, 4: LayerKind.CONV}[len(shape)]
        sizes = {"in_channels": shape[1] if len(shape) > 1 else shape[0], "out_channels": shape[0]}
        places = {"input_shapes": ((sizes["in_channels"], 1, 1),), "output_shape": (shape[0], 1, 1)}
        layers.append(Layer(name=str(index), kind=kind, op=str(kind), **sizes, **places))
        parameters.append(Parameter(name=f"{index}.weight", layer=str(index), shape=shape))
    return Network(
        name="n", input_shape=(3, 1, 1), num_classes=2, layers=tuple(layers), edges=(), parameters=tuple(parameters)
    )


def gathered(entries, launches, accesses):
    """Weights as one vector: three tables and two vectors of 4 bytes an entry."""
    return PenaltyWork(
        num_bytes=4 * accesses, num_launches=launches, table_bytes=12 * entries, scratch_bytes=8 * entries
    )


@pytest.mark.parametrize(
    ("shapes", "gpu", "work"),
    [
        # 48 elements in 12 kernels: 7 · 48 + 2 · 12 accesses; the squares as scratch
        ([(4, 3, 2, 2)], False, PenaltyWork(num_bytes=4 * 360, num_launches=10, scratch_bytes=4 * 48)),
        # a network for grey images: its one input channel makes no convolution depthwise
        ([(8, 1, 3, 3)], False, PenaltyWork(num_bytes=4 * 520, num_launches=10, scratch_bytes=4 * 72)),
        # 9 accesses to each of 12 + 32 elements; scratch for the larger one
        ([(4, 3), (8, 4)], False, PenaltyWork(num_bytes=4 * 396, num_launches=20, scratch_bytes=4 * 32)),
        # just small enough to be gathered element by element: 20 accesses; 10 launches and 2 for up to 48 weights
        ([(512, 512, 2, 2)], True, gathered(2**20, 12, 20 * 2**20)),
        # 2^19 kernels of 9 elements, gathered by their norms: 4 · 9 + 18 accesses a kernel, 2 launches a weight
        ([(1024, 512, 3, 3)], True, gathered(2**19, 10 + 1 + 2, 54 * 2**19)),
        ([(2048, 2048)], True, gathered(2**22, 12, 20 * 2**22)),  # just few enough to be gathered
        ([(2048, 2049)], True, PenaltyWork(num_bytes=36 * 2048 * 2049, num_launches=10, scratch_bytes=4 * 2048 * 2049)),
        ([(2, 2)] * 48, True, gathered(192, 12, 20 * 192)),
        ([(2, 2)] * 49, True, gathered(196, 10 + 1 + 2, 20 * 196)),
        ([(2, 2)] * 129, True, gathered(516, 10 + 2 + 3, 20 * 516)),
    ],
)
def test_what_the_group_lasso_takes_is_worked_out_by_hand(shapes, gpu, work):
    network = of_weights(*shapes)
    assert penalty_work("group_lasso", network, gpu=gpu) == work
    if gpu:
        assert (GroupLasso.traffic(network), GroupLasso.launches(network)) == (work.num_bytes, work.num_launches)


def test_proximal_steps_and_slimming_take_what_is_worked_out_by_hand():
    network = of_weights((4, 3, 2, 2), (8, 4), norms=(8, 5))
    # two groups of axes: squares 2, sums 1, the scaling 2 accesses each; 10 and 9 launches
    by_lasso = PenaltyWork(num_bytes=4 * 10 * (48 + 32), num_launches=2 * 19, scratch_bytes=4 * 48)
    assert penalty_work("group_lasso", network, gpu=True, proximal=True) == by_lasso
    assert penalty_work("slimming", network, gpu=False) == PenaltyWork(num_bytes=4 * 3 * 13, num_launches=2 * 2)
    by_slimming = PenaltyWork(num_bytes=4 * 13 * 13, num_launches=2 * 6)
    assert penalty_work("slimming", network, gpu=True, proximal=True) == by_slimming
    assert (Slimming.traffic(network), Slimming.launches(network)) == (4 * 3 * 13, 4)


def test_the_penalty_of_a_network_that_a_run_did_not_have_is_that_of_the_nearest_per_parameter():
    network = of_weights((10, 10))
    told = [
        ToldPenalty(criterion=name, architecture=architecture, num_parameters=size, num_bytes=moved, num_launches=count)
        for name, architecture, size, moved, count in [
            ("theirs", "small", 40, 1000, 3), ("theirs", "large", 170, 5000, 9), ("another", "equal", 100, 7, 7),
        ]
    ]  # fmt: skip
    setting = StepSetting(batch=1, regularizer="theirs", told_penalties=tuple(told))
    # 100 parameters are 60 from 40 and 70 from 170
    assert step_penalty(network, setting, gpu=True) == PenaltyWork(num_bytes=2500, num_launches=3)
    exact = msgspec.structs.replace(told[1], architecture=network.id)
    known = msgspec.structs.replace(setting, told_penalties=(told[0], exact))
    assert step_penalty(network, known, gpu=True) == PenaltyWork(num_bytes=5000, num_launches=9)
    assert step_penalty(network, msgspec.structs.replace(setting, regularizer=None), gpu=True) == PenaltyWork()
    shrunk = msgspec.structs.replace(setting, regularizer="group_lasso", proximal=True)
    assert step_penalty(network, shrunk, gpu=True).num_launches == 19


def test_a_scale_that_is_no_number_is_not_near_zero():
    model = Meeting()
    with torch.no_grad():
        model.left_norm.weight.copy_(torch.tensor([0.0, torch.nan, 0.25, 0.0]))
        model.right_norm.weight.zero_()
    groups = find_groups(model, (3, 4, 4))
    assert float(Slimming.importance(model, groups)[groups.axes["left.weight", 0][1]]) == torch.inf


def test_a_channel_is_as_far_from_zero_as_its_largest_scale_wherever_it_appears():
    """Two BatchNorms meet at a sum; by hand the larger of |γ|, and Σ|γ| as penalty."""
    model = Meeting()
    with torch.no_grad():
        model.left_norm.weight.copy_(torch.tensor([0.0, -0.5, 0.25, 0.0]))
        model.right_norm.weight.copy_(torch.tensor([0.125, 0.0, 0.0, 0.0]))
    groups = find_groups(model, (3, 4, 4))
    importance = Slimming.importance(model, groups)
    stream = groups.axes["left.weight", 0]
    assert importance[stream].tolist() == [0.125, 0.5, 0.25, 0.0]
    importance[stream] = torch.inf
    assert bool((importance == torch.inf).all())  # images and classes have no scale
    assert float(Slimming(model, groups).value()) == 0.875


class OwnNorm(nn.BatchNorm2d):
    """One that is traced into."""

    def forward(self, x):
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


class Joined(nn.Module):
    """A convolution with a BatchNorm, and what the network makes of its channels and the image."""

    def __init__(self, join, norm=nn.BatchNorm2d, bias=False):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.a, self.norm, self.b = nn.Conv2d(6, 6, 1, bias=False), norm(6), nn.Conv2d(6, 6, 1, bias=bias)
        self.gate, self.head, self.join = nn.Linear(6, 6), nn.Linear(6, 2), join
        self.plain = nn.BatchNorm2d(6, affine=False)
        self.plain.running_mean.fill_(0.5)

    def forward(self, x):
        h = torch.relu(self.first(self.stem(x)))
        return self.head(self.join(self, torch.relu(self.norm(self.a(h))), h).mean((2, 3)))


def gated(net, y, h):
    """Squeeze and excite: the gate is never zero, but it multiplies what is."""
    return y * torch.sigmoid(net.gate(y.mean((2, 3))))[:, :, None, None]


def written(net, y, h):
    y.add_(net.b(h))
    return y


def placed(net, y, h):
    y[:, :, 0] = net.b(h)[:, :, 0]
    return y


@pytest.mark.parametrize(
    ("join", "bias", "goes"),
    [
        (lambda net, y, h: y, False, 2),
        (lambda net, y, h: y + h, False, 0),  # γ of `first` is not small
        (lambda net, y, h: y + net.b(h), False, 0),  # a short-cut without a BatchNorm
        (lambda net, y, h: y + net.b(h), True, 0),
        (lambda net, y, h: y + torch.relu(net.b(h)), True, 0),
        (lambda net, y, h: torch.sigmoid(y) * net.b(h), False, 0),
        (lambda net, y, h: (1 + y) * net.b(h), False, 0),
        (lambda net, y, h: y * net.b(h), False, 2),
        (lambda net, y, h: y * y.sigmoid(), False, 2),  # what is not zero is made of y, not written into it
        (lambda net, y, h: torch.subtract(y, 1) * net.b(h), False, 0),
        (lambda net, y, h: y.clamp(min=0.5) * net.b(h), False, 0),
        (lambda net, y, h: F.hardtanh(y, 0.5, 2) * net.b(h), False, 0),
        (lambda net, y, h: F.threshold(y, 0.1, 7.0) * net.b(h), False, 0),
        (lambda net, y, h: F.logsigmoid(y) * net.b(h), False, 0),
        (lambda net, y, h: (y >= 0) * net.b(h), False, 0),
        (lambda net, y, h: 2**y * net.b(h), False, 0),
        (lambda net, y, h: torch.maximum(y, net.gate.bias.view(1, -1, 1, 1)) * net.b(h), False, 0),
        (lambda net, y, h: y.clamp(-1, 1) * net.b(h), False, 2),
        (lambda net, y, h: torch.multiply(torch.where(y > 0.1, y, y / 2), net.b(h)), False, 2),
        (lambda net, y, h: y / (1 + net.b(h) ** 2), False, 2),
        (lambda net, y, h: 1 / (1 + y) * net.b(h), False, 0),
        (lambda net, y, h: (net.gate.bias / (1 + y.mean((2, 3))))[:, :, None, None] * net.b(h), False, 0),
        (lambda net, y, h: torch.maximum(y.mean((2, 3)), net.gate.bias)[:, :, None, None] * net.b(h), False, 0),
        (lambda net, y, h: (y - 1) * net.b(h), False, 0),
        (lambda net, y, h: (1 - y) * net.b(h), False, 0),
        (lambda net, y, h: y.sub_(1) * net.b(h), False, 0),
        (lambda net, y, h: (y + net.gate.bias.view(1, -1, 1, 1)) * net.b(h), False, 0),
        (lambda net, y, h: torch.rsub(y, 1) * net.b(h), False, 0),
        (lambda net, y, h: torch.softmax(y, 2) * net.b(h), False, 0),  # of zeros: a share for every row
        (lambda net, y, h: net.plain(y) * net.b(h), False, 0),
        (lambda net, y, h: y @ net.b(h), False, 2),  # image by image
        (written, False, 0),
        (placed, False, 0),
        (lambda net, y, h: F.pad(y, (1, 1, 1, 1)), False, 2),
        (lambda net, y, h: F.pad(y, (1, 1, 1, 1), value=1.0), False, 0),
        (lambda net, y, h: F.conv2d(y, net.b.weight), False, 0),  # of a function nobody can listen what it hears
    ],
)
def test_a_channel_that_a_layer_without_a_batch_norm_writes_too_stays(join, bias, goes):
    torch.manual_seed(0)
    model = Joined(join, bias=bias)
    with torch.no_grad():
        model.norm.weight[[1, 4]] = model.norm.bias[[1, 4]] = 0
    before = copy.deepcopy(model)
    surgery = reconfigure(model, find_groups(model, SMALL_IMAGE), importance_of=Slimming.importance)
    assert (surgery.changed, model.a.out_channels) == (goes > 0, 6 - goes)
    images = torch.randn(4, *SMALL_IMAGE)
    torch.testing.assert_close(model.eval()(images), before.eval()(images))


class Brightest(nn.Module):
    """To every channel the images' brightness is added where it is above 100, as of no image of a trial."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.Linear(6, 2)

    def forward(self, zeros):  # however it is called
        x = torch.relu(self.norm(self.conv(zeros))) + F.threshold(zeros.mean(1, keepdim=True), 100, 0)
        return self.head(x.mean((2, 3)))


def test_channels_to_which_bright_images_are_added_stay_though_those_of_a_trial_are_dark():
    model = Brightest()
    with torch.no_grad():
        model.norm.weight[[1, 4]] = model.norm.bias[[1, 4]] = 0
    before = copy.deepcopy(model)
    assert not reconfigure(model, find_groups(model, SMALL_IMAGE), importance_of=Slimming.importance).changed
    images = 200 * torch.rand(4, *SMALL_IMAGE)
    torch.testing.assert_close(model.eval()(images), before.eval()(images))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, OwnNorm])
def test_a_channel_that_only_gates_meet_goes(norm):
    model = Joined(gated, norm)
    with torch.no_grad():
        model.norm.weight[1] = model.norm.bias[1] = 0
    reconfigure(model, find_groups(model, SMALL_IMAGE), importance_of=Slimming.importance)
    assert (model.a.out_channels, model.gate.out_features, model.head.in_features) == (5, 5, 5)


def test_a_channel_whose_scale_is_zero_goes_with_its_shift():
    """As the authors do it: γ decides, and what β alone gives is lost."""
    model = Joined(lambda net, y, h: y)
    with torch.no_grad():
        model.norm.weight[1], model.norm.bias[1] = 0, 0.5
    reconfigure(model, find_groups(model, SMALL_IMAGE), importance_of=Slimming.importance)
    assert (model.a.out_channels, model.head.in_features) == (5, 5)


class Beside(nn.Module):
    """Images that are normalised, and once more beside four channels made of them."""

    def __init__(self):
        super().__init__()
        self.images, self.conv, self.all = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(7)
        self.inner, self.last, self.head = nn.Conv2d(7, 5, 1, bias=False), nn.BatchNorm2d(5), nn.Linear(5, 2)

    def forward(self, x):
        x = self.images(x)
        return self.head(self.last(self.inner(self.all(torch.cat([self.conv(x), x], 1)))).mean((2, 3)))


def test_scales_of_images_alone_and_frozen_ones_are_not_penalised():
    model = Beside()
    with torch.no_grad():
        model.all.weight.copy_(torch.tensor([0.5, -0.25, 0.125, 1.0, 2.0, 2.0, 2.0]))
    model.last.weight.requires_grad_(False)
    groups = find_groups(model, SMALL_IMAGE)
    criterion = Slimming(model, groups)
    assert [id(weight) for weight in criterion.weights] == [id(model.all.weight)]
    assert float(criterion.value()) == 7.875
    importance = Slimming.importance(model, groups)
    assert importance[groups.axes["conv.weight", 0]].tolist() == [0.5, 0.25, 0.125, 1.0]
    assert bool((importance[groups.axes["inner.weight", 0]] == torch.inf).all())


def test_a_depthwise_layer_without_a_batch_norm_in_front_goes_with_the_channels_of_the_one_behind():
    model = nn.Sequential(
        nn.Conv2d(3, 5, 1, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 1, bias=False),
        nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    with torch.no_grad():
        model[5].weight[[1, 4]] = model[5].bias[[1, 4]] = 0
    before = copy.deepcopy(model)
    reconfigure(model, find_groups(model, SMALL_IMAGE), importance_of=Slimming.importance)
    assert [model[i].out_channels for i in (0, 3, 4, 7)] == [5, 4, 4, 4]
    images = torch.randn(4, *SMALL_IMAGE)
    torch.testing.assert_close(model.eval()(images), before.eval()(images))


class Places(nn.Module):
    """A linear layer that reads the channels of every place."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 7, 1, bias=False), nn.BatchNorm2d(7), nn.Linear(7, 2)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).permute(0, 2, 3, 1)).mean((1, 2))


def test_a_linear_layer_hears_the_last_axis():
    model = Places()
    with torch.no_grad():
        model.norm.weight[[1, 4]] = model.norm.bias[[1, 4]] = 0
    reconfigure(model, find_groups(model, SMALL_IMAGE), importance_of=Slimming.importance)
    assert (model.conv.out_channels, model.head.in_features) == (5, 5)
