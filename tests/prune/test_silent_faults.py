"""Code that reads, takes or writes channels past the rules: they stay, or what is left computes the same."""

from __future__ import annotations

import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ptsim
from ptsim.errors import UnsupportedModelError
from ptsim.prune.groups import find_groups
from ptsim.prune.reconfigure import reconfigure

pytestmark = pytest.mark.filterwarnings("ignore:.*traced by torch.export")

IMAGE = (3, 8, 8)


class Net(nn.Module):
    """Two convolutions, and between them the model's own `mix`."""

    def __init__(self, mix: Callable[[Tensor], Tensor], read: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(read, 6, 1), nn.Linear(6, 4)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.mix(torch.relu(self.a(x)))).mean((2, 3)))


def picked(x: Tensor) -> Tensor:
    return x[:, torch.tensor([0, 2, 4])]


def selected(x: Tensor) -> Tensor:
    return torch.index_select(x, 1, torch.tensor([5, 1, 3]))


def pooled_over_channels(x: Tensor) -> Tensor:
    return F.max_pool2d(x.flatten(2), (3, 1), stride=1, padding=(1, 0)).view(x.shape[0], -1, 8, 8)


def repeated(x: Tensor) -> Tensor:
    """A reflected border of two channels."""
    return F.pad(x.unsqueeze(1), (0, 0, 0, 0, 1, 1), mode="reflect").squeeze(1)


def mixed_by_chance(x: Tensor) -> Tensor:
    """Python's random numbers decide; both ways are taken in training."""
    return x.cumsum(1) if random.random() < 0.5 else x


def mixed_seldom(x: Tensor) -> Tensor:
    return x + x.sum(1, keepdim=True) if torch.rand(1).item() < 0.1 else x


def mixed_by_numpy(x: Tensor) -> Tensor:
    return x if np.random.rand() < 0.9 else x.softmax(1)


RNG, DICE, TORCH = np.random.default_rng(1), random.Random(1), torch.Generator().manual_seed(1)


def mixed_by_an_object(x: Tensor) -> Tensor:
    """A generator that stands in the file."""
    return x.cumsum(1) if RNG.random() < 0.5 else x


def mixed_by_a_seed(x: Tensor) -> Tensor:
    return x.cumsum(1) if torch.rand(1, generator=TORCH).item() < 0.5 else x


def mixed_by_a_new_one(x: Tensor) -> Tensor:
    """It starts elsewhere at every call, and no state tells."""
    return x.cumsum(1) if np.random.default_rng().random() < 0.5 else x


def mixed_if_a_tensor(x: Tensor) -> Tensor:
    """What stands for a tensor in torch.fx is none."""
    return x.cumsum(1) if isinstance(x, Tensor) else x


def mixed_without_a_name(x: Tensor) -> Tensor:
    """What stands for a tensor in torch.fx has every attribute."""
    return x if hasattr(x, "name_of_its_layer") else x.cumsum(1)


def turned_in_place(x: Tensor) -> Tensor:
    """What is summed up afterwards are the channels."""
    x = x.clone()
    x.transpose_(1, 3)
    return x.cumsum(3).transpose(1, 3)


def divided_by_a_tensor(x: Tensor) -> Tensor:
    return x * torch.tensor(1 / x.shape[1])


def times_the_middle(x: Tensor) -> Tensor:
    """One of many constants, of which a written list would leave out the middle."""
    values = np.zeros(2001, dtype=np.float32)
    values[1000] = 1 / x.shape[1]
    return x * torch.from_numpy(values)[1000]


def mixed_on_a_cpu(x: Tensor) -> Tensor:
    return x.cumsum(1) if x.device.type == "cpu" else x


def not_for_proxies(compute: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What torch.fx cannot trace, and torch.export can: there every shape is a constant."""

    def code(x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)
        return compute(x)

    return code


CASES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "taken by an index in the code": (picked, 3),
    "selected by an index in the code": (selected, 3),
    "pooled over channels": (pooled_over_channels, 8),
    "channels reflected": (repeated, 10),
    "mixed where Python's random number says so": (mixed_by_chance, 8),
    "mixed where torch's random number says so": (mixed_seldom, 8),
    "mixed where NumPy's random number says so": (mixed_by_numpy, 8),
    "mixed where a generator in the file says so": (mixed_by_an_object, 8),
    "mixed where a generator around the function says so": (
        lambda x: x.cumsum(1) if DICE.random() < 0.5 else x,
        8,
    ),
    "mixed where a generator of torch's says so": (mixed_by_a_seed, 8),
    "mixed if it is a tensor": (mixed_if_a_tensor, 8),
    "mixed if it has no such attribute": (mixed_without_a_name, 8),
    "turned in place": (turned_in_place, 8),
    "divided by their number as a tensor": (divided_by_a_tensor, 8),
    "exported: divided by their number": (not_for_proxies(lambda x: x / x.shape[1]), 8),
    "exported: times a tensor of their number": (not_for_proxies(lambda x: x * torch.full((1,), 1 / x.shape[1])), 8),
    "exported: times a constant of their number": (not_for_proxies(divided_by_a_tensor), 8),
    "exported: times one of many constants": (not_for_proxies(times_the_middle), 8),
    "exported: mixed on a CPU": (not_for_proxies(mixed_on_a_cpu), 8),
    "exported: bounded by their number": (not_for_proxies(lambda x: x.clamp(max=x.shape[1] / 16)), 8),
}


@pytest.mark.parametrize("name", CASES)
def test_channels_stay_that_code_treats_in_a_way_of_its_own(name: str) -> None:
    torch.manual_seed(0)
    model: Any = Net(*CASES[name])
    assert ptsim.inspect(model, input_shape=IMAGE).exact  # what `b` writes goes
    groups = find_groups(model, IMAGE)
    written = next(layer.outputs for layer in groups.layers if layer.layer == "a")
    assert not bool(groups.prunable[written].any())


def prunable(model: nn.Module) -> dict[str, int]:
    """Per convolution how many of the channels that it writes can go."""
    groups = find_groups(model, IMAGE)
    return {layer.layer: int(groups.prunable[layer.outputs].sum()) for layer in groups.layers}


def flipped(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.flip(1)


def all_added(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0] + inputs[0].sum(1, keepdim=True),)


def scaled_in_place(module: nn.Module, inputs: Any, output: Tensor) -> None:
    with torch.no_grad():
        output.mul_(output.shape[1])


def scaled_past_autograd(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.data.mul_(output.shape[1])


def weights_centred(module: nn.Module, inputs: Any) -> None:
    module.weight.data.sub_(module.weight.data.mean())  # type: ignore[operator] # a convolution's


def test_channels_stay_where_a_hook_changes_what_a_layer_takes_or_gives() -> None:
    for register, hook in (
        ("register_forward_hook", flipped),
        ("register_forward_hook", scaled_in_place),
        ("register_forward_hook", scaled_past_autograd),
        ("register_forward_pre_hook", weights_centred),
        ("register_forward_pre_hook", all_added),
    ):
        model: Any = Net(lambda x: x)
        getattr(model.b, register)(hook)
        found = prunable(model)
        assert found.get("a", 0) == found.get("b", 0) == 0, hook


def turned_back(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return (inputs[0].flip(1),)


@pytest.mark.parametrize(("hook", "channels"), [(turned_back, 0), (lambda *_: None, 8)])
def test_channels_stay_where_a_hook_changes_the_gradient(hook: Any, channels: int) -> None:
    model: Any = Net(lambda x: x)
    model.b.register_full_backward_hook(hook)
    assert prunable(model).get("a", 0) == channels


def test_a_layer_with_another_forward_is_traced_into() -> None:
    model: Any = Net(lambda x: x)
    model.b.forward = types.MethodType(lambda layer, x: nn.Conv2d.forward(layer, x).cumsum(1), model.b)
    assert prunable(model) == {"a": 8, "conv2d": 0, "head": 0}


def test_code_that_asks_what_a_value_is_and_adds_in_place_is_traced_by_torch_fx() -> None:
    def added(x: Tensor) -> Tensor:
        y = torch.relu(x[0] if isinstance(x, list) else x)
        y += x
        return y

    graph = find_groups(Net(added), IMAGE).graph
    assert graph.meta["traced_by"] == "torch.fx"


def averaged(model: Any, x: Tensor) -> Tensor:
    """As the model's own forward, but the mean over the features of `a` counts, too."""
    features = torch.relu(model.a(x))
    return model.head(model.b(features).mean((2, 3))) + features.mean((1, 2, 3)).unsqueeze(1)


def test_another_forward_of_the_network_itself_is_the_one_that_counts() -> None:
    model: Any = Net(lambda x: x)
    model.forward = types.MethodType(averaged, model)
    found = prunable(model)
    assert found.get("a", 0) == 0
    assert max(found.values()) == 6


def test_what_is_put_around_a_forward_leaves_it_as_it_is() -> None:
    model: Any = Net(lambda x: x)
    model.forward = types.MethodType(torch.autocast("cpu", torch.bfloat16)(Net.forward), model)
    assert prunable(model) == {"a": 8, "b": 6, "head": 0}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_script_stays_and_the_rest_is_pruned() -> None:
    model: Any = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), torch.jit.script(nn.ReLU()), nn.Flatten(), nn.Linear(384, 4)
    )
    with torch.no_grad():
        model[0].weight[:2].zero_()
        model[1].weight[:, :2].zero_()
    images = torch.rand(2, *IMAGE)
    expected = model(images)
    assert reconfigure(model, find_groups(model, IMAGE)).channels_removed == 2
    assert torch.allclose(model(images), expected, atol=1e-6)


@pytest.mark.parametrize(("hook", "channels"), [(scaled_past_autograd, 0), (lambda *_: None, 8)])
def test_hooks_of_all_modules_count_too(hook: Any, channels: int) -> None:
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        assert prunable(Net(lambda x: x)).get("a", 0) == channels
    finally:
        handle.remove()


def test_hooks_that_only_look_change_nothing() -> None:
    shapes: list[torch.Size] = []
    model: Any = Net(lambda x: x)
    model.b.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    model.b.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    assert prunable(model) == {"a": 8, "b": 6, "head": 0}
    assert not shapes, "what is looked at is a copy, whose hooks note things in lists of their own"
    assert ptsim.inspect(model, input_shape=IMAGE).exact


def test_a_random_choice_between_ways_that_are_both_followed_costs_no_channel() -> None:
    model: Any = Net(lambda x: x * 2 if random.random() < 0.5 else torch.sigmoid(x))
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    assert prunable(model) == {"a": 8, "b": 6, "head": 0}
    assert torch.equal(torch.get_rng_state(), state[0])  # nothing of it can be noticed afterwards
    assert random.getstate() == state[1]
    assert (np.random.get_state()[1] == state[2]).all()


def test_a_choice_by_a_generator_of_the_moment_is_refused() -> None:
    """What it draws cannot be drawn again: for pruning and for counting the same sentence."""
    with pytest.raises(UnsupportedModelError, match="a generator that it makes anew at every call"):
        find_groups(Net(mixed_by_a_new_one), IMAGE)
    with pytest.raises(UnsupportedModelError, match="a generator that it makes anew at every call"):
        ptsim.cost(Net(mixed_by_a_new_one), input_shape=IMAGE)


def test_the_numbers_of_a_generator_in_the_file_go_on_as_if_nothing_had_been_drawn() -> None:
    before = RNG.bit_generator.state, DICE.getstate(), TORCH.get_state()
    for mix in (mixed_by_an_object, lambda x: x * DICE.random(), mixed_by_a_seed):
        prunable(Net(mix))
        ptsim.inspect(Net(mix), input_shape=IMAGE)
    assert RNG.bit_generator.state == before[0]
    assert DICE.getstate() == before[1]
    assert torch.equal(TORCH.get_state(), before[2])


def test_a_network_that_keeps_a_generator_is_counted_and_the_numbers_go_on() -> None:
    model: Any = Net(lambda x: x)
    model.generator = torch.Generator().manual_seed(3)
    before = model.generator.get_state()
    assert ptsim.cost(model, batch=2, input_shape=IMAGE)
    assert prunable(model) == {"a": 8, "b": 6, "head": 0}
    assert torch.equal(model.generator.get_state(), before)


def test_ways_that_differ_in_a_random_number_alone_are_one() -> None:
    model: Any = Net(lambda x: x * random.random())
    assert prunable(model) == {"a": 8, "b": 6, "head": 0}
    assert len(find_groups(model, IMAGE).graph.meta["seeds"]) == 1
    assert ptsim.inspect(model, input_shape=IMAGE).exact


def test_more_random_ways_than_are_tried_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptsim.capture.ways._MOST_TRACES", 4)
    with pytest.raises(UnsupportedModelError, match="random numbers decide which way the code of Net takes"):
        find_groups(Net(mixed_by_chance), IMAGE)


class NumpyConstant(Net):
    """Divides by the number of channels, which NumPy computes while the code is traced."""

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.from_numpy(np.full(1, 1 / self.a.out_channels, dtype=np.float32))
        return self.head(self.b(torch.relu(self.a(x)) * scale).mean((2, 3)))


def test_constants_that_the_code_makes_of_numbers_of_channels_are_compared() -> None:
    model: Any = NumpyConstant(lambda x: x)
    assert prunable(model).get("a", 0) == 0


class ScaledInEvaluation(nn.Module):
    """torch.export traces it, and only evaluation divides by the number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)
        x = torch.relu(self.a(x))
        return self.head((x if self.training else x / x.shape[1]).mean((2, 3)))


def test_numbers_of_evaluation_alone_count_too() -> None:
    assert prunable(ScaledInEvaluation()).get("a", 0) == 0


class Branch(nn.Module):
    """A residual branch beside code that torch.export alone traces and that divides by the number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.scaled, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.branch = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)
        x = torch.relu(self.scaled(self.stem(x)))
        return self.head(((x + self.branch(x)) / x.shape[1]).mean((2, 3)))


def test_numbers_are_compared_also_where_a_branch_is_removed() -> None:
    torch.manual_seed(0)
    model = Branch().eval()
    with torch.no_grad():
        for layer in (model.branch[0], model.branch[2]):
            layer.weight.zero_()
            layer.bias.zero_()
        model.scaled.weight[:3].zero_()
    images = torch.rand(2, *IMAGE)
    expected = model(images)
    surgery = reconfigure(model, find_groups(model, IMAGE))
    assert surgery.layers_removed
    assert torch.allclose(model(images), expected, atol=1e-6)


LIBRARY = torch.library.Library("ptsim_tests", "DEF")
LIBRARY.define("sigmoid(Tensor x) -> Tensor")
LIBRARY.impl("sigmoid", lambda x: x - x.amax(1, keepdim=True), "CompositeImplicitAutograd")


@pytest.mark.parametrize("exported", [False, True])
def test_an_operator_of_another_library_is_not_the_one_of_torch_that_is_called_so(exported: bool) -> None:
    mix: Any = torch.ops.ptsim_tests.sigmoid
    model: Any = Net(not_for_proxies(mix) if exported else mix)
    group = next(edge for edge in find_groups(model, IMAGE).edges() if "a (out)" in edge.members)
    assert not group.prunable
    assert exported or "sigmoid" in str(group.reason)
    assert ptsim.inspect(model, input_shape=IMAGE).exact


def test_what_the_code_makes_in_float32_does_not_end_the_proof() -> None:
    model: Any = Net(lambda x: torch.einsum("cd,ndhw->nchw", torch.eye(8), x).float())
    assert ptsim.inspect(model, input_shape=IMAGE).exact


class Numbered(nn.Module):
    """Layers called as torch.fx calls the second and third call of `F.conv2d`, which are other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Parameter(torch.randn(8, n, 3, 3) / 3) for n in (3, 8, 8))
        self.conv2d_1, self.conv2d_2 = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(F.relu(F.conv2d(F.relu(F.conv2d(x, self.first)), self.second)), self.third))
        return self.head((x + self.conv2d_2(F.relu(self.conv2d_1(x)))).mean((2, 3)))


def test_a_branch_goes_alone_also_where_functions_have_the_names_of_its_layers() -> None:
    torch.manual_seed(0)
    model = Numbered().double()
    with torch.no_grad():
        for parameter in (*model.conv2d_1.parameters(), model.conv2d_2.weight):
            parameter.zero_()
    images = torch.rand(2, *IMAGE, dtype=torch.float64)
    expected = model(images)
    surgery = reconfigure(model, find_groups(model, IMAGE))
    assert surgery.layers_removed == ("conv2d_1", "conv2d_2")
    assert [tuple(w.shape[:2]) for w in (model.first, model.second, model.third)] == [(8, 3), (8, 8), (8, 8)]
    assert torch.allclose(model(images), expected)


class Leaving(Net):
    """Leaves something in an attribute, and computes nothing with it."""

    def __init__(self, leave: Callable[[Any, Tensor], Any]) -> None:
        super().__init__(lambda x: x)
        self.aux, self.leave, self.left = nn.Linear(8, 4), leave, None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        self.left = self.leave(self, x)
        return self.head(self.b(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("leave", "expected"),
    [
        (lambda net, x: net.aux(x.mean((2, 3))), {"a": 8, "aux": 0}),  # further classes
        (lambda net, x: [{"more": torch.sigmoid(net.aux(x.mean((2, 3))))}], {"a": 8, "aux": 0}),
        (lambda net, x: x.abs().mean(), {"a": 0}),  # over all channels
        (lambda net, x: x.detach().abs().mean(), {"a": 8}),
        (lambda net, x: (x > 0).float().mean(), {"a": 8}),  # how many are alive: no gradient goes back
        (lambda net, x: x.shape, {"a": 8}),
        (lambda net, x: x, {"a": 8}),  # what the code itself goes on with
    ],
)
def test_what_the_code_leaves_for_a_loss_to_read_stays(leave: Any, expected: dict[str, int]) -> None:
    assert prunable(Leaving(leave)) == expected | {"b": 6, "head": 0}


class Store:
    """Where hooks of layers put what these give, until the network takes it, as timm's FeatureHooks."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def put(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.found["b"] = output

    def taken(self) -> list[Tensor]:
        found, self.found = self.found, {}
        return list(found.values())


class Collecting(Net):
    """Returns what a hook has collected, and perhaps the classes."""

    def __init__(self, classes: bool) -> None:
        super().__init__(lambda x: x)
        self.classes, self.store = classes, Store()
        self.b.register_forward_hook(self.store.put)

    def forward(self, x: Tensor) -> Any:
        x = super().forward(x)
        return [*self.store.taken(), x] if self.classes else self.store.taken()


@pytest.mark.parametrize("classes", [False, True])
def test_what_hooks_collect_for_the_output_is_refused(classes: bool) -> None:
    with pytest.raises(UnsupportedModelError, match="Collecting returns what hooks of its layers have collected"):
        find_groups(Collecting(classes), IMAGE)
