"""Networks of a model whose channels are taken out, without tracing it anew."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from ptsim.capture import resized
from ptsim.capture.graph import symbolic_graph
from ptsim.capture.network import capture_network
from ptsim.capture.resized import Recapture, thin_copy
from ptsim.prune.cut import cut_model
from ptsim.prune.groups import find_groups
from ptsim.prune.propagate import skeleton
from ptsim.prune.reconfigure import remove_channels


class _Scaled(nn.Module):
    """Its code takes another way once its width is below 8: a trace of the wide network does not hold any more."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 4, 1)
        self.narrow = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(x)) * torch.tensor(0.5)  # a tensor that no attribute holds
        return self.second(torch.tanh(y) if self.narrow else y).mean((2, 3))


@pytest.mark.parametrize("narrow", [False, True])
def test_a_model_is_traced_again_only_where_its_code_may_take_another_way(
    narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bones = skeleton(_Scaled())
    known = Recapture(bones, name="scaled", input_shape=(3, 8, 8), num_classes=4)
    groups = find_groups(bones, (3, 8, 8))
    sparse = torch.zeros(groups.num_components, dtype=torch.bool)
    sparse[torch.nonzero(groups.prunable).flatten()[:5]] = True
    remove_channels(bones, groups, sparse)
    bones.narrow = narrow
    traced, trace = [], resized.fullest_graph
    monkeypatch.setattr(resized, "fullest_graph", lambda *args: traced.append(1) or trace(*args))
    network = known.network(bones)
    assert len(traced) == (1 if narrow else 0)
    captured = capture_network(thin_copy(bones), name="scaled", input_shape=(3, 8, 8), num_classes=4)
    assert network.id == captured.id
    assert network.layers == captured.layers


class _Counting(nn.Module):
    """Its code writes into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.register_buffer("centre", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).mean((2, 3))
        with torch.no_grad():
            self.centre.mul_(0.9).add_(y.mean(0), alpha=0.1)
        return y - self.centre


def test_code_may_write_into_buffers_of_a_copy_without_storage() -> None:
    known = Recapture(skeleton(_Counting()), name="counting", input_shape=(3, 8, 8), num_classes=8)
    assert known.base.id == capture_network(_Counting(), name="counting", input_shape=(3, 8, 8), num_classes=8).id


class _Reading(nn.Module):
    """Its code looks at the width of one of its layers."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.second = nn.Conv2d(12, 4, 1)

    @property
    def narrow(self) -> bool:
        return self.first.out_channels < 12

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.first(x)))
        narrow = {
            "layer": lambda: self.second.in_channels < 12,
            "property": lambda: self.narrow,
            "function": lambda: _is_narrow(self.norm),
            "word": lambda: getattr(self.first, "out_channels") < 12,  # noqa: B009 - as users write it
        }
        return self.second(torch.tanh(y) if narrow[self.where]() else y).mean((2, 3))


def _is_narrow(norm: nn.BatchNorm2d) -> bool:
    return norm.num_features < 12


@pytest.mark.parametrize("where", ["layer", "property", "function", "word"])
def test_code_that_looks_at_a_layers_width_takes_its_way_at_every_width(where: str) -> None:
    bones = skeleton(_Reading(where))
    known = Recapture(bones, name="reading", input_shape=(3, 8, 8), num_classes=4)
    groups = find_groups(bones, (3, 8, 8))
    removed = torch.zeros(groups.num_components, dtype=torch.bool)
    removed[groups.axes["first.weight", 0][:5]] = True
    assert not groups.prunable[removed].any()  # training would leave them
    cut_model(bones, groups.cut_for(removed))
    network = known.network(bones)
    assert [layer.name for layer in network.layers] == ["first", "norm", "relu", "tanh", "second", "mean"]


class _Attending(nn.Module):
    """Every place of an image reads 8 values of every place; queries and keys have 4 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.values, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Linear(8, 2)
        self.queries, self.keys = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        weights = torch.bmm(self.queries(x).flatten(2).transpose(1, 2), self.keys(x).flatten(2)).softmax(-1)
        return self.last(torch.bmm(self.values(x).flatten(2), weights.transpose(1, 2)).mean(2))


def test_a_product_of_activations_is_counted_anew_where_one_of_them_has_less_channels() -> None:
    """64 · 64 multiplications for each of 8 values: eight times the weights, and 64 times the values."""
    bones = skeleton(_Attending())
    known = Recapture(bones, name="attending", input_shape=(3, 8, 8), num_classes=2)
    groups = find_groups(bones, (3, 8, 8))
    removed = torch.zeros(groups.num_components, dtype=torch.bool)
    removed[groups.axes["values.weight", 0][:3]] = True
    assert groups.prunable[removed].all()
    cut_model(bones, groups.cut_for(removed))
    network = known.network(bones)
    assert [layer.forward_macs for layer in network.layers if layer.op == "bmm"] == [64 * 64 * 4, 64 * 64 * 5]


class _Noisy(nn.Module):
    """Adds a tensor that its code makes by the size of another one."""

    def __init__(self, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.make = make
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 1)
        self.last = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.last(torch.relu(self.second(x + self.make(x))).mean((2, 3)))


def _moved_along(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    out[..., 1:] = x[..., :-1]
    out[..., :1].zero_()
    return out


_MADE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "normal": lambda x: torch.normal(0.0, 1.0, x.shape),
    "normal by keyword": lambda x: torch.normal(mean=0.0, std=0.1, size=x.size()),
    "randn": lambda x: torch.randn(x.shape),
    "randn where the images are": lambda x: torch.randn(*x.shape, device=x.device),
    "randint": lambda x: torch.randint(0, 2, x.shape).float(),
    "exponential": lambda x: torch.empty(x.shape).exponential_(),
    "of NumPy": lambda x: torch.from_numpy(np.random.randn(*x.shape).astype("float32")),
    "a distribution": lambda x: torch.distributions.Normal(0.0, 1.0).sample(x.shape),
    "parts of it": _moved_along,
    "places": lambda x: torch.linspace(-1, 1, x.shape[3])[None, None, None],
}


_LONG = ("of NumPy", "a distribution")  # traced by torch.export


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in _LONG)) for name in _MADE])
def test_code_may_make_tensors_without_saying_where(name: str) -> None:
    """A network of weights without storage is described, and cut, as one with weights is."""
    live = _Noisy(_MADE[name])
    with torch.device("meta"):
        bones = skeleton(_Noisy(_MADE[name]))
    recapture = Recapture(bones, name="noisy", input_shape=(3, 8, 8), num_classes=4)
    assert recapture.base.id == capture_network(live, name="noisy", input_shape=(3, 8, 8), num_classes=4).id
    groups = find_groups(bones, (3, 8, 8))
    removed = torch.zeros(groups.num_components, dtype=torch.bool)
    removed[groups.axes["second.weight", 0][:5]] = True
    assert groups.prunable[removed].all()
    for model in (bones, live):
        cut_model(model, groups.cut_for(removed))
    network = recapture.network(bones)
    assert network.id == capture_network(live, name="noisy", input_shape=(3, 8, 8), num_classes=4).id
    assert network.forward_macs == 64 * (3 * 9 * 8 + 8 * 7) + 7 * 4


class _Skipping(_Noisy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(self.second(x if self.training and torch.rand(1) < 0.5 else self.norm(x)).mean((2, 3)))


def test_that_random_numbers_decide_is_said_once(recwarn: pytest.WarningsRecorder) -> None:
    """`ptsim plan` traces a network for its shapes, and captures it."""
    Recapture(skeleton(_Skipping(torch.clone)), name="skipping", input_shape=(3, 8, 8), num_classes=4)
    assert ["of the 2 ways" in str(warning.message) for warning in recwarn] == [True]


def test_noise_of_a_size_is_the_same_as_the_code_draws() -> None:
    traced = symbolic_graph(_Noisy(_MADE["normal"]).eval(), (2, 3, 8, 8))
    images, made = torch.rand(2, 3, 8, 8), []
    for run in (traced, _with_weights_of(traced)):
        torch.manual_seed(0)
        made.append(run(images))
    assert torch.equal(*made)


def _with_weights_of(traced: nn.Module) -> nn.Module:
    model = _Noisy(_MADE["normal"]).eval()
    model.load_state_dict(traced.state_dict())
    return model
