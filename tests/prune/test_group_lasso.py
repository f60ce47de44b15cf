"""The group lasso: its value, its gradient in both forms, its proximal step and λ."""

import math
import time
import weakref
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptsim import zoo
from ptsim.capture.network import capture_network
from ptsim.criteria import penalty_work
from ptsim.errors import UsageError
from ptsim.prune.criteria.coefficient import penalty_coefficient, proximal_shrinkages
from ptsim.prune.criteria.group_lasso import GroupLasso
from ptsim.prune.criteria.slimming import Slimming
from ptsim.prune.groups import find_groups, weight_GOIK
from tests.prune.helpers import SMALL_IMAGE, small_resnet


def grouped_network() -> nn.Module:
    """Grouped, depthwise and transposed convolutions and a hidden linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ReLU(),
        nn.ConvTranspose2d(12, 5, 2, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 5),
    ).double()  # fmt: skip


def test_the_penalty_is_the_sum_of_all_norms_but_the_images_and_the_classes() -> None:
    model = zoo.create("resnet20").double().requires_grad_(False)
    expected = 0.0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        if name != "conv1.weight":
            expected += sum(float(parameter[:, c].square().sum() + 1e-8) ** 0.5 for c in range(parameter.shape[1]))
        if name != "fc.weight":
            expected += sum(float(parameter[k].square().sum() + 1e-8) ** 0.5 for k in range(parameter.shape[0]))
    lasso = GroupLasso(model, find_groups(model, (3, 32, 32)))
    assert float(lasso.value()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("form", "limits"),
    [("per_tensor", (0, 0)), ("gathered", (10**6, 10**6)), ("gathered", (0, 10**6)), ("gathered", (100, 60))],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("build", [small_resnet, grouped_network])
def test_the_hand_written_gradient_is_autograds(
    form: Literal["per_tensor", "gathered"], limits: tuple[int, int], layout: torch.memory_format, build: object
) -> None:
    """Each network has a weight of just 60 kernels: the largest of those that are gathered where that is the limit."""
    model = build().to(memory_format=layout)  # type: ignore[operator] # a parameter of the test
    lasso = GroupLasso(model, find_groups(model, SMALL_IMAGE), form=form, limits=limits)
    assert lasso.form == form
    (0.3 * lasso.penalty()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert expected
    model.zero_grad()
    lasso.add_gradient(0.1)
    lasso.add_gradient(0.2)  # it adds
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-13, atol=1e-13)
        else:
            assert parameter.grad is None


def test_a_weight_that_is_stored_in_another_order_gets_its_own_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    model[0].weight = nn.Parameter(torch.randn(4, 6, dtype=torch.float64).t())
    lasso = GroupLasso(model, find_groups(model, (4,)), form="gathered")
    (0.3 * lasso.penalty()).backward()
    expected = model[0].weight.grad.clone()
    model.zero_grad()
    lasso.add_gradient(0.3)
    torch.testing.assert_close(model[0].weight.grad, expected, rtol=1e-13, atol=1e-13)


def test_a_memory_format_that_changes_on_the_way_changes_no_gradient() -> None:
    model = small_resnet()
    lasso = GroupLasso(model, find_groups(model, SMALL_IMAGE), form="gathered")
    lasso.add_gradient(0.3)
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.to(memory_format=torch.channels_last)
    model.zero_grad()
    lasso.add_gradient(0.3)
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-12, atol=1e-12)


def test_a_network_without_channels_of_its_own_has_no_penalty() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    lasso = GroupLasso(model, find_groups(model, (3, 2, 2)))
    lasso.add_gradient(1.0)
    assert (float(lasso.value()), model[1].weight.grad) == (0, None)


def test_depthwise_convolutions_biases_and_batch_norms_are_not_penalised() -> None:
    model = grouped_network()
    lasso = GroupLasso(model, find_groups(model, SMALL_IMAGE))
    lasso.add_gradient(1.0)
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {"0.weight", "3.weight", "7.weight", "11.weight", "13.weight"}


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write, and what they hold of new memory at most. Views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0
        self.held: dict[int, int] = {}
        self.most_held = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        places = {leaf.untyped_storage().data_ptr() for leaf in given}
        new = [leaf for leaf in made if leaf.untyped_storage().data_ptr() not in places]
        for leaf in new:
            storage = leaf.untyped_storage()
            self.held[storage.data_ptr()] = storage.nbytes()
            weakref.finalize(storage, self.held.pop, storage.data_ptr(), None)
            self.most_held = max(self.most_held, sum(self.held.values()))
        if new or func._schema.is_mutable:
            written = made or given[: len(given) // 3]  # `_foreach_addcmul_` returns nothing: a third are gradients
            read = given
            if func is torch.ops.aten.index_select.default:  # of a table only what is looked up, and not from memory
                read = [given[1]] if given[0].numel() < made[0].numel() / 4 else [made[0], given[1]]
            if func is torch.ops.aten.copy_.default:  # what it overwrites is not read
                read = given[1:]
            self.num_bytes += sum(leaf.numel() * leaf.element_size() for leaf in [*read, *written])
        return out


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("width", [64, 350])  # 350 × 350 × 3 × 3 are more than 2**20: kernels are gathered
@pytest.mark.parametrize("gpu", [True, False])
def test_what_the_gradient_moves_and_holds_is_what_the_cost_model_says(kernel: int, width: int, gpu: bool) -> None:
    convolutions = [nn.Conv2d(width if i else 3, width, kernel) for i in range(6)]
    model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    network = capture_network(model, name="n", input_shape=(3, 16, 16), num_classes=5)
    lasso = GroupLasso(model, find_groups(model, (3, 16, 16)), form="gathered" if gpu else "per_tensor")
    lasso.add_gradient(1e-3)
    with Traffic() as seen:
        lasso.add_gradient(1e-3)
    work = penalty_work("group_lasso", network, gpu=gpu)
    assert seen.num_bytes == pytest.approx(work.num_bytes, rel=0.05)
    assert seen.most_held == pytest.approx(work.scratch_bytes, rel=0.05)
    gathered = lasso._gathered
    tables = [] if gathered is None else [gathered.order, gathered.output_of, gathered.input_of]
    assert sum(t.numel() * t.element_size() for t in tables) == pytest.approx(work.table_bytes, rel=0.05)


@pytest.mark.parametrize("kernel", [1, 3])
def test_what_the_proximal_step_moves_and_holds_is_what_the_cost_model_says(kernel: int) -> None:
    convolutions = [nn.Conv2d(64 if i else 3, 64, kernel) for i in range(20)]
    model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))
    network = capture_network(model, name="n", input_shape=(3, 64, 64), num_classes=5)
    lasso = GroupLasso(model, find_groups(model, (3, 64, 64)))
    with Traffic() as seen:
        lasso.proximal_step(1e-3)
    work = penalty_work("group_lasso", network, gpu=True, proximal=True)
    few = 0.05 if kernel > 1 else 0.1  # norms are few, not none
    assert seen.num_bytes == pytest.approx(work.num_bytes, rel=few)
    assert seen.most_held == pytest.approx(work.scratch_bytes, rel=few)
    assert work.table_bytes == 0


def test_slimmings_proximal_step_moves_what_the_cost_model_says() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.Flatten())
    network = capture_network(model, name="n", input_shape=(3, 3, 3), num_classes=5)
    slimming = Slimming(model, find_groups(model, (3, 3, 3)))
    with Traffic() as seen:
        slimming.proximal_step(1e-3)
    assert seen.num_bytes == penalty_work("slimming", network, gpu=True, proximal=True).num_bytes


def test_only_weights_that_are_not_large_are_gathered_on_a_gpu() -> None:
    model = nn.Sequential(nn.Linear(6000, 1000), nn.ReLU(), nn.Linear(1000, 10))
    network = capture_network(model, name="n", input_shape=(6000,), num_classes=10)
    work = penalty_work("group_lasso", network, gpu=True)
    assert work.table_bytes == 3 * 4 * 10_000
    assert work.num_bytes == 4 * (9 * 6_000_000 + 20 * 10_000)
    assert work.num_launches == 10 + 10 + 1 + 1
    assert work.scratch_bytes == 4 * 6_000_000


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("build", [small_resnet, grouped_network])
def test_the_proximal_step_shrinks_by_the_formula(layout: torch.memory_format, build: Callable[[], nn.Module]) -> None:
    """First every input channel, then every output channel, by 1 - 0.05 / norm, as its axes say."""
    model = build().to(memory_format=layout)
    lasso = GroupLasso(model, find_groups(model, SMALL_IMAGE))
    expected = []
    for layer, weight, inputs, outputs in lasso.terms:
        W = weight_GOIK(weight.detach().clone(), layer)
        for wanted, dims in ((inputs, (1, 3)), (outputs, (2, 3))):
            if wanted:
                W = W * (1 - 0.05 / W.square().sum(dims, keepdim=True).sqrt()).clamp_min(0)
        expected.append(W)
    lasso.proximal_step(0.05)
    for (layer, weight, *_), W in zip(lasso.terms, expected, strict=True):
        torch.testing.assert_close(weight_GOIK(weight.detach(), layer), W, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_zero_weights_is_zero() -> None:
    model = small_resnet()
    nn.init.zeros_(model.get_parameter("blocks.0.a.weight"))
    GroupLasso(model, find_groups(model, SMALL_IMAGE)).add_gradient(1.0)
    assert not model.get_parameter("blocks.0.a.weight").grad.any()


def test_the_proximal_step_shrinks_a_single_group_by_its_amount_and_gives_exact_zeros() -> None:
    """Two 1×1 convolutions of one channel in between: out-group and in-group of each are known by hand."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), nn.Conv2d(1, 2, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(0.5)
        model[2].weight.copy_(torch.tensor([3.0, 4.0]).view(2, 1, 1, 1))
    lasso = GroupLasso(model, find_groups(model, (1, 4, 4)))
    lasso.proximal_step(0.1)
    assert float(model[0].weight.detach()) == pytest.approx(0.4)
    assert model[2].weight.flatten().tolist() == pytest.approx([3 * 4.9 / 5, 4 * 4.9 / 5])
    lasso.proximal_step(0.4)
    assert float(model[0].weight.detach()) == 0.0


@pytest.mark.parametrize("form", ["per_tensor", "gathered"])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_small_weights_in_half_precision_have_norms_too(
    form: Literal["per_tensor", "gathered"], kind: torch.dtype
) -> None:
    """1e-4, and 3e-4 beside 4e-4, whose squares float16 does not know: 1e-4/√(1e-8 + 1e-8), 3e-4/√(25e-8 + 1e-8)."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), nn.Conv2d(1, 2, 1, bias=False))
    lasso = GroupLasso(model.to(kind), find_groups(model, (1, 4, 4)), form=form)
    with torch.no_grad():
        model[0].weight.fill_(1e-4)
        model[2].weight.copy_(torch.tensor([3e-4, 4e-4]).view(2, 1, 1, 1))
    assert float(lasso.value()) == pytest.approx(1.41421e-4 + 5.09902e-4, rel=0.01)
    lasso.add_gradient(1.0)
    found = [float(g) for layer in (model[0], model[2]) for g in layer.weight.grad.flatten()]
    assert found == pytest.approx([0.70711, 0.58835, 0.78446], rel=0.02)
    lasso.proximal_step(0.5e-4)
    found = [float(w) for layer in (model[0], model[2]) for w in layer.weight.detach().flatten()]
    assert found == pytest.approx([0.5e-4, 2.7e-4, 3.6e-4], rel=0.02)


def test_the_coefficient_gives_the_ratio() -> None:
    assert penalty_coefficient(2.0, 10.0, 0.2) == pytest.approx(0.05)  # 0.2 · 2 / (0.8 · 10)
    assert penalty_coefficient(2.0, 0.5, 0.2) == pytest.approx(1.0)
    coefficient = penalty_coefficient(math.log(10), 1975.6, 0.25)
    assert coefficient * 1975.6 / (math.log(10) + coefficient * 1975.6) == pytest.approx(0.25)
    assert penalty_coefficient(2.3, 100.0, 0.0) == penalty_coefficient(0.0, 0.0, 0.0) == 0.0


@pytest.mark.parametrize(
    ("cross_entropy", "penalty", "ratio"),
    [
        (2.3, 10.0, 1.0),
        (2.3, 10.0, -0.1),
        (0.0, 10.0, 0.2),
        (-2.3, 10.0, 0.2),
        (math.nan, 10.0, 0.2),
        (math.inf, 10.0, 0.2),
        (2.3, 0.0, 0.2),
        (2.3, -10.0, 0.2),
        (2.3, math.inf, 0.2),
    ],
)
def test_impossible_ratios_are_refused(cross_entropy: float, penalty: float, ratio: float) -> None:
    with pytest.raises(UsageError):
        penalty_coefficient(cross_entropy, penalty, ratio)


def test_the_proximal_step_takes_inputs_then_outputs_each_weight_by_its_own_amount() -> None:
    model = nn.Sequential(
        nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)
    ).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0], [4.0]]))
        model[2].weight.copy_(torch.tensor([[3.0, 0.0], [4.0, 5.0]]))
        model[4].weight.copy_(torch.tensor([[0.5, 0.0]]))
    lasso = GroupLasso(model, find_groups(model, (1,)))
    lasso.proximal_step([2.0, 1.0, 1.0])
    assert model[0].weight.flatten().tolist() == pytest.approx([1, 2])  # its inputs are the image: rows of norm 3 and 4
    # columns of norm 5 become ⅘ of themselves: (2.4, 0) and (3.2, 4), whose norms are 2.4 and √26.24
    shrunk = 1 - 1 / math.sqrt(26.24)
    assert model[2].weight.flatten().tolist() == pytest.approx([1.4, 0, 3.2 * shrunk, 4 * shrunk])
    assert model[4].weight.flatten().tolist() == [0, 0]  # less than the amount, and nothing at all
    before = model[2].weight.detach().clone()
    lasso.proximal_step(0.0)  # a learning rate of 0: also groups that are zero stay as they are
    assert torch.equal(model[2].weight, before)
    assert model[4].weight.flatten().tolist() == [0, 0]


@pytest.mark.parametrize(
    ("settings", "shrinkage"),
    [
        ({"lr": 0.1, "momentum": 0.9}, 3.0),  # 0.1 · 3 / (1 − 0.9)
        ({"lr": 0.1, "momentum": 0.5, "dampening": 0.25}, 0.45),  # 0.1 · 3 · 0.75 / (1 − 0.5)
        ({"lr": 0.1, "momentum": 0.0, "dampening": 0.5}, 0.3),  # without momentum nothing is dampened
    ],
)
def test_a_proximal_step_shrinks_as_much_as_a_constant_gradient_moves(
    settings: dict[str, float], shrinkage: float
) -> None:
    weight, other = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    optimizer = torch.optim.SGD([weight], **settings)  # type: ignore[arg-type] # parameters of the test
    assert proximal_shrinkages(optimizer, [weight, other], 3.0) == pytest.approx([shrinkage, 0])
    for _ in range(200):
        before, weight.grad = weight.item(), torch.full_like(weight, 3.0)
        optimizer.step()
    assert before - weight.item() == pytest.approx(shrinkage)


def test_optimizers_without_dampening_or_a_learning_rate_have_a_shrinkage_too() -> None:
    weight, other = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.RMSprop([{"params": [weight], "momentum": 0.5}, {"params": [other]}], lr=0.1)
    assert proximal_shrinkages(optimizer, [weight, other], 3.0) == pytest.approx([0.6, 0.3])
    optimizer.param_groups[0]["momentum"] = 1.0  # which accumulates without end
    optimizer.param_groups[1]["lr"] = None  # as of an optimizer that chooses its own
    assert proximal_shrinkages(optimizer, [weight, other], 3.0) == pytest.approx([0.3, 0])


@pytest.mark.slow
def test_the_gradient_takes_no_longer_in_channels_last() -> None:
    """In turn, the least of several: sums over kernels of a CPU's strided weights once took eight times as long."""
    seconds: dict[torch.memory_format, list[float]] = {torch.contiguous_format: [], torch.channels_last: []}
    lassos = {}
    for layout in seconds:
        model = nn.Sequential(nn.Conv2d(256, 512, 3), nn.ReLU(), nn.Conv2d(512, 256, 3)).to(memory_format=layout)
        lassos[layout] = GroupLasso(model, find_groups(model, (256, 8, 8)))
    for _ in range(6):
        for layout, lasso in lassos.items():
            begin = time.perf_counter()
            lasso.add_gradient(1e-3)
            seconds[layout].append(time.perf_counter() - begin)
    assert min(seconds[torch.channels_last]) < 2 * min(seconds[torch.contiguous_format])
