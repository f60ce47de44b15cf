"""What the tests of pruning share: zeroing by hand, and training a zeroed network beside the pruned one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ptsim.prune.criteria.group_lasso import GroupLasso
from ptsim.prune.groups import ChannelGroups, find_groups
from ptsim.prune.reconfigure import reconfigure


def enliven(model: nn.Module, seed: int = 0) -> None:
    """Biases, BatchNorm parameters and statistics away from 0 and 1, so that lost constants are noticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor += 0.4 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) - 0.2


def zero_some(model: nn.Module, groups: ChannelGroups, fraction: float = 0.4, seed: int = 0) -> Tensor:
    """Zero random components in every producer and consumer; the test's own arithmetic, not the library's."""
    generator = torch.Generator().manual_seed(seed)
    chosen = groups.prunable & (torch.rand(groups.num_components, generator=generator) < fraction)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for layer in groups.layers:
            if not layer.decides:
                continue
            weight = parameters[layer.weight]
            if layer.transposed:
                weight = weight.transpose(0, 1)
            for index, component in enumerate(layer.outputs.tolist()):
                if chosen[component]:
                    weight[index] = 0
            if layer.groups == 1:
                for index, component in enumerate(layer.inputs.tolist()):
                    if chosen[component]:
                        weight[:, index] = 0
    return chosen


def nonzero_masks(model: nn.Module) -> dict[str, Tensor]:
    """Where the weights of at least two axes are not zero."""
    return {name: p.detach() != 0 for name, p in model.named_parameters() if p.ndim > 1}


def apply_masks(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Zero again what was zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in masks:
                parameter *= masks[name]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    image_shape: tuple[int, int, int],
    *,
    steps: int,
    coefficient: float = 1e-3,
    masks: dict[str, Tensor] | None = None,
    after_step: Callable[[], object] = lambda: None,
    seed: int = 1,
) -> list[float]:
    """Some training steps with the group lasso on; with `masks` what is zero stays zero."""
    generator = torch.Generator().manual_seed(seed)
    groups = find_groups(model, image_shape)
    lasso = GroupLasso(model, groups)
    losses = []
    model.train()
    for _ in range(steps):
        images = torch.rand(4, *image_shape, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 5, (4,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        lasso.add_gradient(coefficient)
        if masks is not None:
            for name, parameter in model.named_parameters():
                if name in masks and parameter.grad is not None:
                    parameter.grad *= masks[name]
        optimizer.step()
        if masks is not None:
            apply_masks(model, masks)
        after_step()
        losses.append(float(loss.detach()))
    return losses


class Block(nn.Module):
    """A residual block with in-place ReLUs and an in-place sum, as users write them."""

    def __init__(self, width: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.a = nn.Conv2d(width, inner, 3, padding=1, bias=bias)
        self.an = nn.BatchNorm2d(inner)
        self.b = nn.Conv2d(inner, width, 3, padding=1, bias=bias)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.b(self.relu(self.an(self.a(x)))))
        out += x
        return self.relu(out)


class SmallResNet(nn.Module):
    """Stem, three blocks, linear layer: quick to train in float64."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=bias)
        self.stem_norm = nn.BatchNorm2d(12)
        self.blocks = nn.Sequential(*(Block(12, 8, bias) for _ in range(3)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        return self.head(torch.flatten(self.pool(self.blocks(x)), 1))


SMALL_IMAGE = (3, 6, 6)


def small_resnet(seed: int = 0, *, bias: bool = False) -> nn.Module:
    """A SmallResNet in float64 with lively constants."""
    torch.manual_seed(seed)
    model = SmallResNet(bias).double()
    enliven(model, seed)
    return model


def same_function(a: nn.Module, b: nn.Module, image_shape: tuple[int, int, int], *, batch: int = 4) -> None:
    """Equal outputs in both modes; copies are compared, so that BatchNorm statistics stay."""
    images = torch.rand(batch, *image_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    for training in (True, False):
        outputs = [copy.deepcopy(model).train(training)(images) for model in (a, b)]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-11)


def cut_twice(model: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Zero and remove some channels of a live network, two times; each time it must stay the zeroed network."""
    enliven(model)
    for seed in (1, 2):
        groups = find_groups(model, image_shape)
        zero_some(model, groups, seed=seed)
        zeroed = copy.deepcopy(model)
        assert reconfigure(model, groups).changed
        same_function(model, zeroed, image_shape)
