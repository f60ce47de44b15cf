"""Hooks, gradients of the code's own, and what a call leaves for the next: pruned is zeroed, or it is refused.

The other side of every comparison is the same network, made anew, with the weights of the pruned channels at zero.
"""

from __future__ import annotations

import functools
import io
import random
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ptsim.capture.calls import attributes_restored
from ptsim.capture.network import capture_network
from ptsim.errors import UnsupportedModelError
from ptsim.prune.cut import take
from ptsim.prune.groups import find_groups
from ptsim.prune.reconfigure import reconfigure
from tests.prune.helpers import enliven, zero_some

IMAGE = (3, 6, 6)


class Net(nn.Module):
    """Two convolutions of 6 and 5 channels with BatchNorms, and between them the model's own `mix`."""

    def __init__(self, prepare: Callable[[Any], object] = lambda model: None, mix: Any = lambda model, x: x) -> None:
        super().__init__()
        self.a, self.an = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.b, self.bn, self.head = nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.Linear(5, 4)
        self.mix, self.calls, self.tally, self.left = mix, 0, [0], None
        self.register_buffer("mean", torch.zeros(6))
        prepare(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self, torch.relu(self.an(self.a(x))))
        return self.head(torch.relu(self.bn(self.b(x))).mean((2, 3)))


def centred(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def centre(weight: Tensor) -> None:
    with torch.no_grad():
        weight.sub_(weight.mean(1, keepdim=True))


def centre_b(model: Any, *_: Any) -> None:
    centre(model.b.weight)


def hook(*places: str, **hooks: Any) -> Callable[[Any], object]:
    """Register hooks, each given the model as well, at modules or parameters."""

    def prepare(model: Any) -> None:
        for place in places:
            for method, call in hooks.items():
                getattr(functools.reduce(getattr, place.split("."), model), method)(functools.partial(call, model))

    return prepare


def closure(model: Any) -> None:
    """Another forward around the layer's own."""
    inner = model.a.forward
    model.a.forward = lambda x: 2 * inner(x)


def around_the_network(model: Any) -> None:
    inner = model.forward
    model.forward = lambda x: inner(x) * 2


def sometimes(model: Any, module: Any, inputs: Any, outputs: Any) -> Any:
    model.tally[0] += 1
    return (centred(inputs[0]),) if model.tally[0] > 2 else None


def filled(model: Any, module: Any, inputs: Any, output: Tensor) -> None:
    model.mean.copy_(output.detach().mean((0, 2, 3)).cumsum(0))


def scaled(model: Any, x: Tensor) -> Tensor:
    return x * model.mean.view(1, -1, 1, 1)


class Centred(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return centred(gradient)


class Straight(torch.autograd.Function):
    """Sign, with the gradient of the identity where x is small."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() < 1)


def with_hooked_gradient(model: Any, x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(centred)
    return x


def running(model: Any, x: Tensor) -> Tensor:
    if model.training:
        model.mean = 0.9 * model.mean + 0.1 * x.detach().mean((0, 2, 3))
    return x - model.mean.view(1, -1, 1, 1)


def written_past_autograd(model: Any, x: Tensor) -> Tensor:
    model.b.weight.data = model.b.weight.data - model.b.weight.data.mean(1, keepdim=True)
    return x


def shrunk_in_place(model: Any, x: Tensor) -> Tensor:
    weight = model.b.weight.data
    weight -= weight.mean(1, keepdim=True)
    return x


def noted_as_text(model: Any, x: Tensor) -> Tensor:
    model.left = f"{x.detach().mean().item()}"
    return x


# what is done · how many channels may go: 6 of `a`, 5 of `b`
CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "nothing": (Net, 11),
    "hook writes into another layer": (lambda: Net(hook("a", register_forward_hook=centre_b)), 0),
    "hook of the network writes": (lambda: Net(lambda m: m.register_forward_pre_hook(lambda *_: centre_b(m))), 0),
    "hook writes into a buffer": (lambda: Net(hook("an", register_forward_hook=filled), scaled), 5),
    "closure around a forward": (lambda: Net(closure), 11),
    "closure around the network": (lambda: Net(around_the_network), 11),
    "hook changes the gradient at times": (lambda: Net(hook("b", register_full_backward_hook=sometimes)), 0),
    "hook of a parameter mixes": (lambda: Net(hook("b.weight", register_hook=lambda m, g: centred(g))), 0),
    "hook of a parameter scales": (lambda: Net(hook("b.weight", register_hook=lambda m, g: g.clamp(-0.1, 0.1))), 11),
    "backward of its own mixes": (lambda: Net(mix=lambda m, x: Centred.apply(x)), 5),
    "backward of its own keeps apart": (lambda: Net(mix=lambda m, x: Straight.apply(x)), 11),
    "backward of its own for a constant": (lambda: Net(mix=lambda m, x: x * Straight.apply(torch.ones(1))), 11),
    "hook in the code": (lambda: Net(mix=with_hooked_gradient), 5),
    "code asks for gradients": (lambda: Net(mix=lambda m, x: x.cumsum(1) if x.requires_grad else x), 5),
    "code asks for the mode": (lambda: Net(mix=lambda m, x: x.cumsum(1) if torch.is_grad_enabled() else x), 5),
    "buffer is assigned": (lambda: Net(mix=running), 11),
    "weight is assigned": (lambda: Net(mix=written_past_autograd), 0),
    "weight is changed in place": (lambda: Net(mix=shrunk_in_place), 5),
    "mean is noted": (lambda: Net(mix=noted_as_text), 11),
}  # fmt: skip


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = CASES[name][0]().double()
    enliven(model)
    return model


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", CASES)
def test_pruned_is_zeroed_call_after_call_or_the_channels_stay(name: str) -> None:
    pruned, zeroed = made(name), made(name)
    groups = find_groups(pruned, IMAGE)
    assert groups.num_channels[0] == CASES[name][1]
    for model in (pruned, zeroed):
        chosen = zero_some(model, groups)
    kept = groups.cut_for(chosen).by_tensor()
    assert reconfigure(pruned, groups).changed == bool(chosen.any())
    generator = torch.Generator().manual_seed(3)
    for call in range(6):
        images = torch.rand(4, *IMAGE, dtype=torch.float64, generator=generator)
        outputs, gradients = [], []
        for model in (pruned, zeroed):
            model.train(call % 3 != 2)
            model.zero_grad()
            outputs.append(model(images))
            (outputs[-1] * torch.arange(16.0).cos().view(4, 4)).sum().backward()
            gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-11)
        for key, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, take(gradients[1][key], kept.get(key, {})), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_of_a_parameter_that_writes_to_a_log_is_not_tried(method: str) -> None:
    log = io.StringIO()
    model = Net(hook("b.weight", **{method: lambda model, gradient: log.write("called") and None}))
    assert find_groups(model, IMAGE).num_channels[0] == 11
    assert not log.getvalue()


def test_a_mask_that_is_found_through_the_module_is_no_reason_to_stay() -> None:
    model: Any = Net(hook("b.weight", register_hook=lambda model, gradient: gradient * model.b.weight.mask))
    model.b.weight.mask = torch.ones_like(model.b.weight)
    assert find_groups(model, IMAGE).num_channels[0] == 11


DICE = random.Random(5)


def skipped_by_a_generator_in_the_file(model: Any, x: Tensor) -> Tensor:
    return x if model.training and DICE.random() < 0.5 else torch.relu(x * 2)


@pytest.mark.filterwarnings("ignore:random numbers decide")
def test_a_network_that_draws_from_a_generator_in_the_file_is_described_by_its_fullest_way() -> None:
    before = DICE.getstate()
    network = capture_network(Net(mix=skipped_by_a_generator_in_the_file), name="n", input_shape=IMAGE, num_classes=4)
    assert [layer.op for layer in network.layers].count("relu") == 3
    assert DICE.getstate() == before


@pytest.mark.filterwarnings("error:random numbers decide")
def test_noise_is_one_way() -> None:
    noisy = Net(mix=lambda model, x: x * torch.rand(1).item() + torch.rand(x.shape[0], 1, 1, 1))
    assert capture_network(noisy, name="n", input_shape=IMAGE, num_classes=4).layers


def noted(seen: list[Any], note: Callable[[Tensor], object]) -> Callable[[Any], object]:
    def prepare(model: Any) -> None:
        model.a.register_forward_hook(lambda module, inputs, output: seen.append(note(output)))
        model.b.register_full_backward_hook(lambda module, inputs, outputs: seen.append(note(outputs[0])))

    return prepare


@pytest.mark.parametrize(
    "note",
    [lambda x: x.norm().item(), lambda x: x.detach().numpy(), lambda x: x.shape, lambda x: x, torch.Tensor.tolist],
    ids=["item", "numpy", "shape", "tensor", "list"],
)
def test_hooks_that_look_on_cost_nothing_and_their_lists_stay_empty(note: Callable[[Tensor], object]) -> None:
    seen: list[Any] = []
    assert find_groups(Net(noted(seen, note)), IMAGE).num_channels == find_groups(Net(), IMAGE).num_channels
    with_hooks, without = (
        capture_network(model, name="n", input_shape=IMAGE, num_classes=4) for model in (Net(noted(seen, note)), Net())
    )
    assert with_hooks.layers == without.layers
    assert not seen


def counted(model: Any, x: Tensor) -> Tensor:
    model.calls += 1
    return x.cumsum(1) if model.calls > 1000 else x


def counted_in_a_list(model: Any, x: Tensor) -> Tensor:
    model.tally[0] += 1
    return x.cumsum(1) if model.tally[0] > 3 else x


def remembered(model: Any, x: Tensor) -> Tensor:
    before, model.left = model.left, x.mean(1, keepdim=True)
    return x if before is None else x + before


def first_of_all(model: Any, x: Tensor) -> Tensor:
    if model.left is None:
        model.left = True
        return x.cumsum(1)
    return x


@pytest.mark.parametrize("mix", [counted, counted_in_a_list, remembered, first_of_all])
def test_what_is_not_the_same_at_every_call_is_refused(mix: Any) -> None:
    for look in (
        lambda: find_groups(Net(mix=mix), IMAGE),
        lambda: capture_network(Net(mix=mix), name="n", input_shape=IMAGE, num_classes=4),
    ):
        with pytest.raises(UnsupportedModelError, match="does not compute the same at every call: it goes by Net"):
            look()


def test_counting_calls_alone_is_no_other_way() -> None:
    def counting(model: Any, x: Tensor) -> Tensor:
        model.calls += 1
        model.left = x
        return x * (1 / model.calls)

    assert find_groups(Net(mix=counting), IMAGE).num_channels == find_groups(Net(), IMAGE).num_channels


@pytest.mark.parametrize("question", [lambda x: type(x) is Tensor, lambda x: type(x).__name__ == "Tensor"])
def test_code_that_asks_for_the_very_class_of_a_tensor_is_not_followed_elsewhere(question: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="the code asks what kind of thing a value is"):
        find_groups(Net(mix=lambda model, x: x.cumsum(1) if question(x) else x), IMAGE)


@pytest.mark.parametrize("listed", [False, True])
def test_a_hook_cannot_hand_a_tensor_to_the_code(*, listed: bool) -> None:
    def leave(model: Any, output: Tensor) -> None:
        if listed:
            model.left.append(centred(output))
        else:
            model.left = centred(output)

    def prepare(model: Any) -> None:
        earlier = torch.zeros(2, 1, 6, 6)
        model.left = deque([earlier], maxlen=1) if listed else earlier
        model.a.register_forward_hook(lambda module, inputs, output: leave(model, output))

    with pytest.raises(UnsupportedModelError, match=r"a hook leaves a tensor in Net.left, which the code of Net reads"):
        find_groups(Net(prepare, mix=lambda model, x: x + (model.left[0] if listed else model.left)), IMAGE)


def test_a_hook_that_takes_itself_off_does_so_in_the_copy_alone() -> None:
    model, handles = Net(), []
    handles.append(model.a.register_forward_hook(lambda *_: handles[0].remove()))
    find_groups(model, IMAGE)
    assert len(model.a._forward_hooks) == 1


def test_a_copy_of_a_network_with_closures_leaves_the_weights_alone() -> None:
    model = made("hook writes into another layer")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_groups(model, IMAGE)
    capture_network(model.float(), name="n", input_shape=IMAGE, num_classes=4)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name].to(tensor.dtype))


def test_layers_without_gradients_keep_nothing_for_backward() -> None:
    """A frozen part of a network, as people write it."""

    class Frozen(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = torch.relu(self.an(self.a(x)))
            return self.head(self.b(x).mean((2, 3)))

    network = capture_network(Frozen(), name="n", input_shape=IMAGE, num_classes=4)
    kept = {layer.name: layer.saved_elements for layer in network.layers}
    assert (kept["a"], kept["an"], kept["relu"]) == (0, 0, 0)
    assert kept["b"] == 6 * 36, "its input"


def test_a_call_may_have_the_name_of_a_modules_method() -> None:
    network = capture_network(
        Net(mix=lambda model, x: x.to(x.dtype).float()), name="n", input_shape=IMAGE, num_classes=4
    )
    assert [layer.forward_macs for layer in network.layers if layer.name == "a"] == [3 * 9 * 6 * 36]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_checkpoint_is_looked_through(use_reentrant: bool) -> None:
    def prepare(model: Any) -> None:
        model.again = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU())

    model = Net(prepare, mix=lambda model, x: checkpoint(model.again, x, use_reentrant=use_reentrant))
    assert find_groups(model, IMAGE).num_channels[0] == 6 + 6 + 5


class Counted(nn.Module):
    """Counts its calls in a buffer, and in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.calls = 0
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += len(x)
        result: Tensor = self.head(self.conv(x).mean((2, 3)))
        return result


def test_looking_at_a_network_leaves_its_counters_as_they_are() -> None:
    model = Counted()
    find_groups(model, (3, 8, 8))
    capture_network(model, name="counted", input_shape=(3, 8, 8), num_classes=4)
    assert (model.calls, int(model.seen)) == (0, 0)


class Notes:
    """An object of a user's own."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[int, Any]] = {"cpu": {}}
        self.last: Any = None


def test_what_code_leaves_in_objects_and_nested_dicts_is_gone_after_a_look() -> None:
    model: Any = Net()
    model.notes, model.found = Notes(), {"a": [[1]]}
    seen, inner = model.notes.seen, model.notes.seen["cpu"]
    with attributes_restored(model):
        model.notes.last, model.notes.more = 1, 2
        seen["cpu"][3], seen["meta"], model.found["a"][0][0] = 4, {}, 5
    assert (model.notes.last, hasattr(model.notes, "more"), model.found) == (None, False, {"a": [[1]]})
    assert (model.notes.seen is seen, seen, seen["cpu"] is inner) == (True, {"cpu": {}}, True)


class Pair(NamedTuple):
    """What a user's code may keep of a call."""

    calls: int
    mean: Any


class Keeping(Net):
    """Keeps in containers of other kinds than lists and dicts, and counts on theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.recent: deque[Any] = deque(maxlen=2)
        self.sizes: defaultdict[int, int] = defaultdict(int)
        self.seen: set[Any] = set()
        self.last = Pair(0, None)

    def forward(self, x: Tensor) -> Tensor:
        self.sizes[len(self.recent)] += 1
        self.last = Pair(self.last.calls + 1, x.detach().mean())
        self.recent.append(x.detach().mean())
        self.seen.add(x.detach().max())
        return super().forward(x)


def test_code_may_keep_deques_sets_counters_and_named_tuples() -> None:
    model = Keeping()
    assert find_groups(model, IMAGE).num_channels == find_groups(Net(), IMAGE).num_channels
    capture_network(model, name="keeping", input_shape=IMAGE, num_classes=4)
    assert (len(model.recent), model.sizes, model.seen, model.last) == (0, {}, set(), Pair(0, None))
    model.recent.extend(("kept", "too"))
    kept = model.recent
    with attributes_restored(model) as changes:
        model.recent.append("more")
        assert list(changes()["", "recent"][1]) == ["too", "more"]
    assert (model.recent is kept, list(kept)) == (True, ["kept", "too"])


class Noting(Net):
    """Keeps what it has computed, with its history, in containers of containers and in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: dict[str, list[Any]] = {"means": []}
        self.recent: deque[Any] = deque(maxlen=1)
        self.notes = Notes()

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.noted["means"], self.notes.last = [y.mean()], y
        self.recent.append((y, [y]))
        return y


def test_a_network_may_have_been_called_that_keeps_what_it_computes() -> None:
    model = Noting()
    model(torch.rand(2, *IMAGE))
    last = model.notes.last
    network = capture_network(model, name="noting", input_shape=IMAGE, num_classes=4)
    assert network.forward_macs == capture_network(Net(), name="net", input_shape=IMAGE, num_classes=4).forward_macs
    find_groups(model, IMAGE)
    assert model.notes.last is last is model.recent[0][0]


REMEMBERED: dict[str, Any] = {}


def ramp(model: Any, x: Tensor, store: dict[str, Any]) -> Tensor:
    if "ramp" not in store:
        store["ramp"] = torch.linspace(0, 1, 6, device=x.device, dtype=x.dtype)
    return x + store["ramp"]


@pytest.mark.parametrize("where", ["file", "class"])
def test_tensors_that_code_remembers_for_all_networks_are_real_after_a_look(where: str) -> None:
    class Remembering(Net):
        known: ClassVar[dict[str, Any]] = {}

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(ramp(self, x, REMEMBERED if where == "file" else self.known))

    model = Remembering().double()
    assert find_groups(model, IMAGE).num_channels == find_groups(Net(), IMAGE).num_channels
    assert not REMEMBERED
    assert not Remembering.known
    assert type(model(torch.rand(2, *IMAGE, dtype=torch.float64))) is Tensor
    REMEMBERED.clear()
