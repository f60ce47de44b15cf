"""Laws of the decision and of the surgery, on random small architectures."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ptsim.prune.groups import component_maxima, find_groups
from ptsim.prune.reconfigure import reconfigure
from ptsim.prune.structure import apply_structure, structure_of
from tests.prune.helpers import enliven, same_function, zero_some

IMAGE = (3, 8, 8)


class Residual(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.a, self.an = nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.b, self.bn = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn(self.b(torch.relu_(self.an(self.a(x))))))


class Dense(nn.Module):
    """Concatenation of the input with new channels."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, growth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(nn.functional.relu(self.norm(x)))], 1)


class Inverted(nn.Module):
    """1×1, depthwise, squeeze and excite with a gate that does not map 0 to 0, 1×1."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.expand, self.en = nn.Conv2d(width, inner, 1), nn.BatchNorm2d(inner)
        self.depth, self.dn = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False), nn.BatchNorm2d(inner)
        self.squeeze, self.excite = nn.Conv2d(inner, 3, 1), nn.Conv2d(3, inner, 1)
        self.project, self.pn = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.silu(self.dn(self.depth(nn.functional.hardswish(self.en(self.expand(x))))))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return x + self.pn(self.project(gate * y))


class Grouped(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        inner = 3 * groups
        self.a, self.an = nn.Conv2d(width, inner, 1), nn.BatchNorm2d(inner)
        self.b = nn.Conv2d(inner, 2 * groups, 3, padding=1, groups=groups)
        self.c = nn.Conv2d(2 * groups, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(torch.relu(self.an(self.a(x))))) + x


class Gated(nn.Module):
    """chunk: halves multiply, so that they are pruned in step."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, 2 * inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.a(x).chunk(2, dim=1)
        return x + self.b(value * torch.sigmoid(gate))


class Shuffle(nn.Module):
    """A channel shuffle of the stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = self.norm(self.conv(x)).view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return torch.relu(x)


class Scaled(nn.Module):
    """A parameter used directly, and a pool."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1, width, 1, 1))
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(x + self.scale * self.conv(x), 3, 1, 1)


MADE: dict[str, Any] = {"residual": Residual, "inverted": Inverted, "grouped": Grouped, "gated": Gated}


class Generated(nn.Module):
    def __init__(self, stem: int, blocks: list[tuple[str, int]], flat: bool) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem)
        width, made = stem, []
        for kind, size in blocks:
            if kind == "dense":
                made.append(Dense(width, size))
                width += size
            elif kind in ("shuffle", "scaled"):
                made.append(Shuffle(width) if kind == "shuffle" and width % 2 == 0 else Scaled(width))
            else:
                made.append(MADE[kind](width, size))
        self.blocks = nn.Sequential(*made)
        self.pool = nn.AdaptiveAvgPool2d(2 if flat else 1)
        self.hidden, self.drop = nn.Linear(width * (4 if flat else 1), 6), nn.Dropout(0.0)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.pool(self.blocks(x)).flatten(1)
        return self.head(self.drop(torch.tanh(self.hidden(x))))


KINDS = ("residual", "dense", "inverted", "grouped", "gated", "shuffle", "scaled")
blocks = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(2, 6)), min_size=1, max_size=4)
architectures = st.tuples(st.integers(3, 8), blocks, st.booleans(), st.integers(0, 2**31))
laws = settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # a failing example is small enough as it is; shrinking takes minutes
)


def build(architecture: tuple[int, list[tuple[str, int]], bool, int]) -> nn.Module:
    stem, kinds, flat, seed = architecture
    torch.manual_seed(seed)
    model = Generated(stem, kinds, flat).double()
    enliven(model, seed)
    return model


def widths(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.slow
@laws
@given(architectures, st.sampled_from([1, 4]), st.sampled_from([0.3, 0.8]))
def test_pruned_equals_zeroed_and_can_be_rebuilt(architecture: Any, multiple: int, fraction: float) -> None:
    model = build(architecture)
    groups = find_groups(model, IMAGE)
    assert groups.prunable.any()
    zero_some(model, groups, fraction, seed=architecture[3] % 1000)
    zeroed, before = copy.deepcopy(model), widths(model)
    surgery = reconfigure(model, groups, channel_multiple=multiple)
    after = widths(model)
    same_function(model, zeroed, IMAGE)
    assert all(n <= m for name in after if name in before for n, m in zip(after[name], before[name], strict=True))
    assert not reconfigure(model, surgery.groups, channel_multiple=multiple).changed
    fresh = build(architecture)
    apply_structure(fresh, structure_of(model))
    fresh.load_state_dict(model.state_dict())
    same_function(fresh, model, IMAGE)


@pytest.mark.slow
@laws
@given(architectures)
def test_what_every_layer_uses_is_kept(architecture: Any) -> None:
    """Scattered zero channels, layer by layer: a component goes only if it is sparse wherever it appears."""
    model = build(architecture)
    groups = find_groups(model, IMAGE)
    generator = torch.Generator().manual_seed(architecture[3])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.shape[1] > 1:
                parameter[torch.rand(parameter.shape[0], generator=generator) < 0.5] = 0
                parameter[:, torch.rand(parameter.shape[1], generator=generator) < 0.5] = 0
    dense = torch.zeros(groups.num_components, dtype=torch.bool)
    parameters = dict(model.named_parameters())
    for layer in groups.layers:
        if not layer.decides:
            continue
        weight = parameters[layer.weight]
        for index, component in enumerate(layer.outputs.tolist()):
            dense[component] |= bool(weight[index].any())
        if layer.groups == 1:
            for index, component in enumerate(layer.inputs.tolist()):
                dense[component] |= bool(weight[:, index].any())
    for layer in groups.layers:
        if layer.groups > 1 and not layer.depthwise:  # a grouped convolution's inputs, by hand
            per_group = len(layer.inputs) // layer.groups
            W = parameters[layer.weight].reshape(layer.groups, -1, per_group, 9)
            for index, component in enumerate(layer.inputs.tolist()):
                dense[component] |= bool(W[index // per_group, :, index % per_group].any())
    assert torch.equal(component_maxima(model, groups) >= 1e-4, dense & (component_maxima(model, groups) >= 1e-4))
    surgery = reconfigure(model, groups)
    kept = sum(int((groups.prunable & dense)[layer.outputs].sum()) for layer in groups.layers)
    if not surgery.layers_removed:
        assert sum(len(layer.outputs) for layer in surgery.groups.layers) >= kept


@pytest.mark.slow
@laws
@given(architectures, st.sampled_from(["union", "gating"]))
def test_negating_all_weights_changes_no_decision(architecture: Any, mode: str) -> None:
    model = build(architecture)
    zero_some(model, find_groups(model, IMAGE), 0.5)
    negated = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in negated.parameters():
            parameter.neg_()
    for network in (model, negated):
        reconfigure(network, find_groups(network, IMAGE), mode=mode)  # type: ignore[arg-type] # a parameter of the test
    assert widths(model) == widths(negated)


@pytest.mark.slow
@laws
@given(architectures)
def test_gating_is_exact_layer_by_layer(architecture: Any) -> None:
    """Every layer loses channels of its own; only its own weights are zeroed."""
    model = build(architecture)
    generator = torch.Generator().manual_seed(architecture[3])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 4 and parameter.shape[1] > 2 and "blocks" in name:
                parameter[:, torch.randint(parameter.shape[1], (1,), generator=generator)] = 0
                parameter[torch.randint(parameter.shape[0], (1,), generator=generator)] = 0
    zeroed = copy.deepcopy(model)
    surgery = reconfigure(model, find_groups(model, IMAGE), mode="gating")
    same_function(model, zeroed, IMAGE)
    assert not reconfigure(model, surgery.groups, mode="gating").changed
    fresh = build(architecture)
    apply_structure(fresh, structure_of(model))
    fresh.load_state_dict(model.state_dict())
    same_function(fresh, model, IMAGE)
