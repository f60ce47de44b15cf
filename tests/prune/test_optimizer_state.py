"""The state of torch's and timm's optimizers after a cut: what stays of a weight goes on as if nothing had gone."""

import copy

import pytest
import torch
from torch import nn

from ptsim.prune.cut import Replacement, cut_optimizer

SHAPE = (6, 4, 3, 3)
KEPT = {0: torch.tensor([0, 2, 5]), 1: torch.tensor([1, 3])}

# Not for a convolution's weight: one state for all weights; sparse gradients; matrices only.
OTHER = {"LBFGS", "SparseAdam", "Muon", "Optimizer", "Adafactor"}
ELEMENTWISE = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in OTHER
)


def part(tensor):
    return tensor.detach()[KEPT[0]][:, KEPT[1]].clone()


def gradients(count):
    random = torch.Generator().manual_seed(1)
    return [torch.randn(SHAPE, generator=random) for _ in range(count)]


def cut(make):
    """An optimizer after three updates of a weight, and the same optimizer after a cut, each with its weight."""
    whole = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    optimizer = make([whole])
    for gradient in gradients(3):
        whole.grad = gradient.clone()
        optimizer.step()
    pruned = copy.deepcopy(optimizer)
    old = pruned.param_groups[0]["params"][0]
    new = nn.Parameter(part(old))
    cut_optimizer(pruned, [Replacement(old, new, KEPT)])
    return optimizer, whole, pruned, new


def step_both(optimizer, whole, pruned, new):
    (gradient,) = gradients(4)[3:]
    whole.grad, new.grad = gradient.clone(), part(gradient)
    optimizer.step()
    pruned.step()


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_every_elementwise_optimizer_of_torch_goes_on_with_what_is_kept(name):
    optimizer, whole, pruned, new = cut(lambda p: getattr(torch.optim, name)(p, lr=0.01))
    step_both(optimizer, whole, pruned, new)
    torch.testing.assert_close(new.detach(), part(whole), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{"fused": True}, {"foreach": True}, {"amsgrad": True}], ids=["fused", "foreach", "amsgrad"]
)
def test_every_form_of_adam_goes_on_with_what_is_kept(options):
    optimizer, whole, pruned, new = cut(lambda p: torch.optim.AdamW(p, lr=0.01, **options))
    step_both(optimizer, whole, pruned, new)
    torch.testing.assert_close(new.detach(), part(whole), rtol=0, atol=1e-7)


class Kept(torch.optim.Optimizer):
    """Keeps what it is told to, and updates nothing."""

    def __init__(self, parameters, state):
        super().__init__(parameters, {})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].update(state)

    def step(self):
        pass


def test_flat_and_factored_states_are_cut_where_their_axes_are_clear():
    values = torch.arange(6 * 4 * 9.0).view(SHAPE)
    old = nn.Parameter(values.clone())
    state = {"flat": values.flatten(), "rows": values[:, :, :, 0], "columns": values[0], "step": torch.tensor(3.0)}
    state["scale"] = values[:, :1, :1, :1]  # one for every output, in a tensor of as many axes
    optimizer = Kept([old], state)
    new = nn.Parameter(part(old))
    cut_optimizer(optimizer, [Replacement(old, new, KEPT)])
    kept = optimizer.state[new]
    assert torch.equal(kept["flat"], part(values).flatten())
    assert torch.equal(kept["rows"], part(values)[:, :, :, 0])
    assert torch.equal(kept["columns"], values[0][KEPT[1]])
    assert torch.equal(kept["scale"], values[:, :1, :1, :1][KEPT[0]])
    assert kept["step"] == 3


@pytest.mark.parametrize(
    "state",
    [
        {"row": torch.rand(4, 3, 3)},  # of a weight of 4 × 4 × 3 × 3: of its rows, or of its columns
        {"state1": torch.zeros(4, 4, 3, 3, dtype=torch.uint8), "qmap1": torch.rand(256)},  # bitsandbytes
        {"state1": torch.zeros(4, 4, 3, 3, dtype=torch.uint8)},
        {"state1": torch.zeros(4, 4, 3, 3, dtype=torch.int8)},
        {"factor": torch.rand(7, 7)},
        {"factors": [torch.rand(4, 4)]},
        {"precondition": torch.eye(4)},  # Shampoo's, of one axis; not of both
    ],
    ids=["ambiguous", "8-bit", "bytes", "signed bytes", "odd", "list", "square"],
)
def test_a_state_that_nobody_knows_how_to_cut_begins_anew_with_a_warning(state):
    old = nn.Parameter(torch.rand(4, 4, 3, 3))
    optimizer = Kept([old], state)
    new = nn.Parameter(torch.rand(3, 2, 3, 3))
    with pytest.warns(UserWarning, match="is not shaped like the weight"):
        cut_optimizer(optimizer, [Replacement(old, new, {0: torch.tensor([0, 1, 3]), 1: torch.tensor([1, 2])})])
    assert new not in optimizer.state


class Around(Kept):
    """An optimizer around another, as Lookahead: each keeps a state of the same weight."""

    def __init__(self, inner, state):
        self.base_optimizer = inner
        super().__init__([p for group in inner.param_groups for p in group["params"]], state)


def test_an_optimizer_around_another_is_cut_with_it():
    values = torch.arange(6 * 4 * 9.0).view(SHAPE)
    old, other = nn.Parameter(values.clone()), nn.Parameter(torch.rand(3))
    inner = Kept([old, other], {})
    inner.state[old] = {"momentum": 2 * values}
    outer = Around(inner, {})
    outer.state[old] = {"slow": 3 * values}
    new = nn.Parameter(part(old))
    cut_optimizer(outer, [Replacement(old, new, KEPT)])
    for optimizer, name, factor in ((inner, "momentum", 2), (outer, "slow", 3)):
        (group,) = optimizer.param_groups
        assert [id(p) for p in group["params"]] == [id(new), id(other)]
        assert old not in optimizer.state
        assert torch.equal(optimizer.state[new][name], factor * part(values))


# Those of timm whose update of an element depends on that element alone. The others take norms or means over a weight
# (LAMB, LARS, NovoGrad, AdamP, the cautious forms), draw at random, or factorise.
TIMM = ["adabelief", "adamw", "adan", "adopt", "laprop", "lion", "madgrad", "nadamw", "radam", "rmsproptf", "sgdw"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timms_elementwise_optimizers_go_on_with_what_is_kept(name):
    optim = pytest.importorskip("timm.optim")
    optimizer, whole, pruned, new = cut(lambda p: optim.create_optimizer_v2(p, opt=name, lr=0.01))
    step_both(optimizer, whole, pruned, new)
    torch.testing.assert_close(new.detach(), part(whole), rtol=0, atol=1e-7)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:optimizer state:UserWarning", "ignore:.*opt_einsum:UserWarning")
def test_all_of_timms_optimizers_that_need_no_other_package_go_on_after_a_cut():
    optim = pytest.importorskip("timm.optim")
    tried = 0
    for name in optim.list_optimizers():
        try:
            optim.create_optimizer_v2([nn.Parameter(torch.rand(SHAPE))], opt=name, lr=0.01)
        except (AssertionError, ImportError, RuntimeError, TypeError):  # apex, bitsandbytes, a GPU, a learning rate
            continue
        if name == "adahessian":  # wants second derivatives
            continue
        optimizer, whole, pruned, new = cut(
            lambda p, name=name: optim.create_optimizer_v2(
                p, opt=name, lr=0.01
            )  # a lookahead's inner one has the state
        )
        step_both(optimizer, whole, pruned, new)
        assert new.isfinite().all(), name
        tried += 1
    assert tried >= 30


def test_the_state_of_a_grouped_convolution_is_cut_in_every_group_by_itself():
    """Outputs 0 and 1 keep their second input, outputs 2 and 3 their first."""
    values = torch.arange(8.0).view(4, 2, 1, 1)
    kept = {-1: torch.tensor([[1], [1], [0], [0]])}
    old, new = nn.Parameter(values.clone()), nn.Parameter(torch.zeros(4, 1, 1, 1))
    optimizer = Kept([old], {"momentum": values.clone(), "scale": values[:, :1]})
    cut_optimizer(optimizer, [Replacement(old, new, kept)])
    state = optimizer.state[new]
    assert state["momentum"].shape == (4, 1, 1, 1)
    assert state["momentum"].flatten().tolist() == [1, 3, 4, 6]
    assert state["scale"].flatten().tolist() == [0, 2, 4, 6]  # one for every output


def test_a_state_of_inputs_alone_begins_anew_where_every_output_keeps_others():
    kept = {-1: torch.tensor([[1], [1], [0], [0]])}
    old, new = nn.Parameter(torch.rand(4, 2, 1, 1)), nn.Parameter(torch.zeros(4, 1, 1, 1))
    optimizer = Kept([old], {"accumulator_1": torch.rand(1, 2, 1, 1)})
    with pytest.warns(UserWarning, match="optimizer state 'accumulator_1' is not shaped like the weight"):
        cut_optimizer(optimizer, [Replacement(old, new, kept)])
    assert new not in optimizer.state
