"""Networks that torch.fx cannot trace are traced by torch.export, and are the same networks."""

import functools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ptsim
from ptsim.capture.network import capture_network
from ptsim.errors import UnsupportedModelError
from ptsim.prune.groups import find_groups
from tests.prune.helpers import cut_twice

IMAGE = (3, 12, 12)


class Plain(nn.Module):
    """Residual, with a shuffle, a concatenation and a parameter that is used directly."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.inner, self.outer = nn.Conv2d(8, 10, 3, 1, 1), nn.Conv2d(10, 8, 1)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(16, 4)

    def features(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu_()
        x = x + self.outer(torch.relu(self.inner(x))) * self.scale.view(1, -1, 1, 1)
        x = torch.cat([x, torch.tanh(x)], 1)
        return nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.drop(self.features(x)))
        return result


class Checked(Plain):
    """torch.fx's stand-in is no tensor."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError("not an image")
        return super().forward(x)


class Keywords(Checked):
    """Returns a dict and takes anything."""

    def forward(self, x: Tensor, *rest: object, **options: object) -> dict[str, Tensor]:  # type: ignore[override]
        return {"out": super().forward(x)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is traced by torch.export")
@pytest.mark.parametrize("make", [Checked, Keywords])
def test_it_is_pruned_like_the_network_that_torch_fx_can_trace(make: type[Plain]) -> None:
    torch.manual_seed(0)
    plain, found = ptsim.inspect(Plain(), input_shape=IMAGE), ptsim.inspect(make(), input_shape=IMAGE)
    assert (plain.traced_by, found.traced_by) == ("torch.fx", "torch.export")
    assert plain.exact
    assert found.exact
    assert found.prunable_channels == plain.prunable_channels == 8 + 10


class Twice(Checked):
    """Siamese: every layer, a BatchNorm too, is called on two images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - super().forward(x.flip(-1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is traced by torch.export")
def test_layers_that_are_called_twice_are_exported() -> None:
    groups = find_groups(Twice(), IMAGE)
    assert groups.graph.meta["traced_by"] == "torch.export"
    assert groups.num_channels[0] == 8 + 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is traced by torch.export")
def test_it_is_reconfigured_twice_and_a_branch_goes() -> None:
    model = Checked().double()
    model.drop.p = 0.0
    cut_twice(model, IMAGE)
    assert model.inner.in_channels == model.stem.out_channels < 8  # the model's own layers have shrunk


@pytest.mark.slow
def test_it_costs_what_the_network_that_torch_fx_can_trace_costs() -> None:
    plain = capture_network(Plain(), name="plain", input_shape=IMAGE, num_classes=4)
    with pytest.warns(UserWarning, match="checked is traced by torch.export"):
        found = capture_network(Checked(), name="checked", input_shape=IMAGE, num_classes=4)
    convolutions = 144 * (8 * 3 * 9 + 10 * 8 * 9 + 8 * 10)
    for network in (plain, found):
        layers = {layer.name: layer for layer in network.layers}
        assert sum(layers[name].forward_macs for name in ("stem", "inner", "outer")) == convolutions
        assert layers["norm"].num_parameters == 16
    assert [p.name for p in found.parameters] == [p.name for p in plain.parameters]
    assert found.footprints == plain.footprints


class Valued(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        if y.sum() > 0:  # neither can follow this
            y = y * 2
        return self.head(y)


def test_a_branch_on_values_is_refused_with_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    message = r"cannot trace Valued: .*\(test_exported\.py, line \d+: if y\.sum\(\) > 0:.*\); nor can torch\.export$"
    with pytest.raises(UnsupportedModelError) as raised:
        ptsim.inspect(Valued(), input_shape=IMAGE)
    assert re.search(message, raised.value.message)
    assert capfd.readouterr() == ("", "")


class Storing(Plain):
    """Keeps an intermediate result, as layers with caches do."""

    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.features(x)
        return self.head(self.last)


def test_tracing_leaves_no_stand_in_behind() -> None:
    model = Storing()
    find_groups(model, IMAGE)
    assert "last" not in vars(model)
    capture_network(model, name="storing", input_shape=IMAGE, num_classes=4)
    assert "last" not in vars(model)


class Mapped(nn.Module):
    """torch.vmap cannot take stand-ins; its export opens and closes a level by calls that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.vmap(lambda image: image.mean((1, 2)))(self.stem(x).relu())
        result: Tensor = self.head(pooled)
        return result


@pytest.mark.filterwarnings("ignore:.*is traced by torch.export")
def test_channels_that_a_mapped_function_takes_stay_or_the_network_is_refused() -> None:
    try:
        torch.export.export(Mapped(), (torch.empty(2, *IMAGE),), strict=False)
    except AssertionError:  # torch 2.8 cannot export a mapped function
        with pytest.raises(UnsupportedModelError, match=r"nor can torch\.export"):
            find_groups(Mapped(), IMAGE)
        return
    groups = find_groups(Mapped(), IMAGE)
    assert not groups.prunable.any()
    assert any("has no rule" in reason for reason in groups.reasons)


@functools.cache
def blur(size: int, device: torch.device) -> Tensor:
    return torch.ones(1, 1, size, size, device=device) / size**2


class Blurred(Plain):
    """A function of the file makes the filter at its first call, and remembers it."""

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)
        return super().forward(F.conv2d(x, blur(3, x.device).expand(3, 1, 3, 3), padding=1, groups=3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is traced by torch.export")
def test_what_functions_remember_is_real_after_a_look() -> None:
    model = Blurred()
    assert find_groups(model, IMAGE).graph.meta["traced_by"] == "torch.export"
    held = blur(3, torch.device("cpu"))
    assert type(held) is Tensor
    assert type(model(torch.rand(1, *IMAGE))) is Tensor
    assert find_groups(model, IMAGE).graph.meta["traced_by"] == "torch.export"
    assert blur(3, torch.device("cpu")) is held  # what was remembered before is kept
