"""PruneTrain and Recorder in a loop that somebody else has written."""

import copy
import dataclasses
import errno
import gc
import os
import pickle

import msgspec
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import ptsim
from ptsim.errors import TrainingError, UnknownNameError, UnsupportedModelError, UsageError
from ptsim.prune.criteria.coefficient import proximal_shrinkages
from ptsim.trace.io import TraceWriter
from ptsim.training import loop
from ptsim.training.outcome import PruningSummary
from ptsim.training.wrapping import CompiledOnce
from tests.training.nets import Branching, small
from tests.training.runs import settings
from tests.training.test_resume import _without_times

IMAGE = (3, 8, 8)
# Networks as small as these lose a whole branch soon, with which the image has no way to the output.
pytestmark = pytest.mark.filterwarnings("ignore:the network has collapsed:UserWarning")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images_and_labels(num_batches=4, batch=16, seed=0):
    random = torch.Generator().manual_seed(seed)
    patterns = torch.rand(10, *IMAGE, generator=random)
    labels = torch.randint(10, (num_batches, batch), generator=random)
    return [(patterns[y] + 0.1 * torch.randn(len(y), *IMAGE, generator=random), y) for y in labels]


def sgd(model, **more):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, **more)


def fresh(seed=0):
    torch.manual_seed(seed)
    return small(10)


def steps(pruner, model, optimizer, batches, *, loss_of=F.cross_entropy):
    for images, labels in batches:
        loss = loss_of(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        pruner.step(loss)
        optimizer.step()


def train(pruner, model, optimizer, epochs, batches, *, loss_of=F.cross_entropy, accuracy=0.5):
    outcomes = []
    for _ in range(epochs):
        steps(pruner, model, optimizer, batches, loss_of=loss_of)
        outcomes.append(pruner.end_epoch(validation_accuracy=accuracy))
    return outcomes


def made(model, optimizer, **more):
    options = {"input_shape": IMAGE, "penalty_ratio": 0.5, "interval": 2, "threshold": 0.12} | more
    return ptsim.PruneTrain(model, optimizer, **options)


def test_a_collapse_is_said_of_the_line_that_ended_the_epoch():
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer, interval=1, threshold=1e6)
    steps(pruner, model, optimizer, images_and_labels(1))
    with pytest.warns(UserWarning, match="the network has collapsed") as said:
        pruner.end_epoch()
    assert [warning.filename for warning in said] == [__file__]


def test_a_summary_names_the_layers_that_went_in_all_reconfigurations(monkeypatch):
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer, interval=1, threshold=1e-9)
    prune, gone = pruner.prune, iter([("a",), (), ("b", "c")])
    monkeypatch.setattr(pruner, "prune", lambda: dataclasses.replace(prune(), layers_removed=next(gone)))
    train(pruner, model, optimizer, 3, images_and_labels(1))
    assert pruner.summary().layers_removed == ("a", "b", "c")
    assert pruner.summary().reconfigurations == 3


def test_the_same_run_by_ptsim_train_and_in_an_own_loop_is_the_same_to_the_bit(tmp_path):
    config = settings(epochs=5, profile=False, finetune_epochs=1, lr_milestones=[3])
    ours = ptsim.train(config, out=tmp_path / "ours")
    facts = ptsim.read_trace(ours.trace).run
    torch.manual_seed(0)
    resolved = loop.resolve(loop.make_config(config), device="cpu")
    data = loop.load_data(resolved, input_shape=(3, 32, 32), device=torch.device("cpu"))
    model = ptsim.zoo.create(config["model"], num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3])
    share = loop.Team(device=torch.device("cpu")).share
    pruner = made(
        model, optimizer, record=tmp_path / "theirs", facts=ptsim.RunFacts(
            model=facts.model, dataset=facts.dataset, hyperparameters=facts.hyperparameters
        )
    )  # fmt: skip
    for epoch in range(5):
        pruner.regularized = epoch < 4
        hits = 0
        for images, labels in data.training_batches(epoch, 16, share):
            optimizer.zero_grad()
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            pruner.step(loss)
            optimizer.step()
            hits += int((logits.argmax(1) == labels).sum())
        scheduler.step()
        model.eval()
        with torch.no_grad():
            logits, labels = map(
                torch.cat, zip(*[(model(x), y) for x, y in data.validation_batches(128, share)], strict=True)
            )
        model.train()
        pruner.end_epoch(
            int((logits.argmax(1) == labels).sum()) / len(labels),
            validation_loss=float(
                sum(
                    F.cross_entropy(a, b).double() * len(b)
                    for a, b in zip(logits.split(128), labels.split(128), strict=True)
                )
                / len(labels)
            ),
            train_accuracy=hits / 96,
        )
    pruner.close()
    theirs = ptsim.read_trace(tmp_path / "theirs")
    reference = ptsim.load_model(ours.folder, trust=True)
    assert len(theirs.networks) > 1
    for (name, p), (_, q) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    records = [
        [_without_times(record) for _, record in ptsim.trace.io.read_records(folder)]
        for folder in (ours.folder, tmp_path / "theirs")
    ]
    assert records[0] == records[1]


def test_the_readme_loop_prunes_and_its_trace_answers_cost_and_simulate(tmp_path):
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer, record=tmp_path / "mine")
    outcomes = train(pruner, model, optimizer, 4, images_and_labels())
    assert [o.reconfiguration is not None for o in outcomes] == [False, True, False, True]
    assert any(o.pruned for o in outcomes)
    assert outcomes[0].epoch.num_images == 64
    assert outcomes[0].epoch.num_iterations == 4
    assert outcomes[0].epoch.batch_per_gpu == 16
    time = outcomes[1].epoch.time
    assert min(time.forward_s, time.backward_s, time.regularizer_s, time.optimizer_s) > 0
    named = time.data_wait_s + time.forward_s + time.backward_s + time.regularizer_s + time.optimizer_s
    assert 0.8 * time.wall_s < named <= time.wall_s  # nothing of a step is left without a name
    summary = pruner.summary()
    assert (summary.epochs, summary.reconfigurations, summary.penalty_coefficient) == (4, 2, pruner.penalty_coefficient)
    # On 8×8 pixels, the last convolution on 4×4; 46 outputs of convolutions and of the linear layer.
    macs = 64 * 9 * (3 * 8 + 8 * 8 + 8 * 8) + 16 * 9 * 8 * 12 + 12 * 10
    assert (summary.channels[0], summary.parameters[0], summary.forward_macs[0]) == (46, 2442, macs)
    assert summary.parameters[1] == sum(p.numel() for p in model.parameters()) < 2442
    assert summary.forward_macs[1] == pruner.recorder.architecture.forward_macs < macs
    pruner.close()
    trace = ptsim.read_trace(tmp_path / "mine")
    assert trace.complete
    assert trace.run.hyperparameters["optimizer"] == "sgd"
    assert ptsim.cost(trace).parameters == sum(p.numel() for p in model.parameters())
    projection = ptsim.simulate(trace, "aws-p3-16xlarge", [1, 8])
    assert len(projection) == 2


def test_a_summary_says_what_is_left_of_what_there_was():
    told = PruningSummary(
        network="Small", epochs=3, penalty_coefficient=0.00123, reconfigurations=2, channels=(46, 23),
        parameters=(2442, 1221), forward_macs=(100_000, 10_000), layers_removed=("a", "b"),
    )  # fmt: skip
    assert str(told) == (
        "Small after 3 epochs and 2 reconfigurations, λ 0.00123\n"
        "output channels 46 → 23 (50%)\n"
        "trainable parameters 2,442 → 1,221 (50%)\n"
        "multiply–accumulates per image 100,000 → 10,000 (10%)\n"
        "layers removed: a, b"
    )
    begun = msgspec.structs.replace(told, penalty_coefficient=None, layers_removed=())
    assert str(begun).splitlines()[0].endswith("λ not decided yet")
    assert "layers removed" not in str(begun)


def test_hyperparameters_that_the_loop_tells_hide_nothing_that_costs_depend_on(tmp_path):
    model = fresh()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    told = {"note": "a", "criterion": "cross_entropy"}  # what a loop calls a criterion is its loss
    pruner = made(model, optimizer, record=tmp_path / "mine", facts=ptsim.RunFacts(hyperparameters=told))
    train(pruner, model, optimizer, 1, images_and_labels())
    pruner.close()
    trace = ptsim.read_trace(tmp_path / "mine")
    assert trace.run.hyperparameters["note"] == "a"
    assert (trace.optimizer, trace.criterion, trace.penalty_ratio) == ("adam", "group_lasso", 0.5)
    assert ptsim.cost(trace).optimizer == "adam"


def test_a_told_optimizer_does_not_hide_what_else_costs_depend_on(tmp_path):
    """Slimming by proximal steps, SGD without momentum: 6 accesses an element, no state, 13 accesses of every γ."""
    model = fresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    told = {"optimizer": "sgd", "lr": 0.05, "criterion": "cross_entropy", "batch": "16"}  # as a parser of arguments has
    facts = ptsim.RunFacts(hyperparameters=told)
    how = {"criterion": "slimming", "regularizer": "proximal", "profile": True}
    pruner = made(model, optimizer, record=tmp_path, facts=facts, **how)
    train(pruner, model, optimizer, 1, images_and_labels())
    pruner.close()
    trace = ptsim.read_trace(tmp_path)
    assert (trace.criterion, trace.proximal, trace.momentum, trace.penalty_ratio) == ("slimming", True, 0.0, 0.5)
    report = ptsim.cost(trace)
    assert report.memory.optimizer_bytes == 0
    assert report.update_bytes == 6 * 4 * report.parameters
    assert report.regularizer_bytes == 13 * 4 * sum(m.num_features for m in model.modules() if hasattr(m, "momentum"))


def test_the_coefficient_is_equation_3_of_the_first_loss():
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer, penalty_ratio=0.25)
    penalty = float(pruner.criterion.value())
    images, labels = images_and_labels()[0]
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    pruner.step(loss)
    share = pruner.penalty_coefficient * penalty
    assert share / (loss.item() + share) == pytest.approx(0.25)


def test_the_step_adds_the_gradient_of_lambda_times_the_penalty():
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer)
    images, labels = images_and_labels()[0]
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    alone = {name: p.grad.clone() for name, p in model.named_parameters()}
    pruner.step(loss)
    by_autograd = torch.autograd.grad(
        pruner.penalty_coefficient * pruner.criterion.penalty(), list(model.parameters()), allow_unused=True
    )
    for (name, p), extra in zip(model.named_parameters(), by_autograd, strict=True):
        torch.testing.assert_close(p.grad, alone[name] if extra is None else alone[name] + extra, msg=name)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.5, centered=True),
        lambda p: torch.optim.Adagrad(p, lr=0.01),
        lambda p: torch.optim.NAdam(p, lr=0.01),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    ],
    ids=["adam", "amsgrad", "rmsprop", "adagrad", "nadam", "nesterov"],
)
def test_every_per_element_optimizer_goes_on_with_what_is_kept(make):
    """Its state after the cut has the new shapes; the groups hold the network's parameters and no others."""
    model = fresh()
    optimizer = make(model.parameters())
    pruner = made(model, optimizer)
    outcomes = train(pruner, model, optimizer, 3, images_and_labels())
    assert any(o.pruned for o in outcomes)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    for parameter, entries in optimizer.state.items():
        for value in entries.values():
            if torch.is_tensor(value) and value.ndim:
                assert value.shape == parameter.shape


def test_parameter_groups_schedulers_clipping_accumulation_and_an_average_go_along():
    model = fresh()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.SGD([{"params": decayed, "weight_decay": 1e-4}, {"params": others}], lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    pruner = made(model, optimizer, ema=average)
    batches = images_and_labels()
    pruned = False
    for _ in range(4):
        for first in range(0, len(batches), 2):
            optimizer.zero_grad()
            for images, labels in batches[first : first + 2]:
                loss = F.cross_entropy(model(images), labels)
                (loss / 2).backward()
            pruner.step(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(model)
        scheduler.step()
        outcome = pruner.end_epoch(validation_accuracy=0.1)
        assert (outcome.epoch.num_iterations, outcome.epoch.num_images, outcome.epoch.batch_per_gpu) == (2, 64, 32)
        pruned = pruned or outcome.pruned
    assert pruned
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-4, 0]
    assert all(p.ndim > 1 for p in optimizer.param_groups[0]["params"])
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in model.parameters()]
    assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0] < 0.05


def test_with_a_scaler_a_skipped_update_is_no_mistake():
    """The loss is infinite once: the scaler leaves that update out, and the loop goes on."""
    model = fresh()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    pruner = made(model, optimizer, scaler=scaler)
    for _ in range(2):
        for index, (images, labels) in enumerate(images_and_labels()):
            optimizer.zero_grad(set_to_none=index % 2 == 0)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(images), labels)
            if index == 2:
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            pruner.step(loss.nan_to_num(posinf=1.0))
            scaler.step(optimizer)
            scaler.update()
        outcome = pruner.end_epoch(validation_accuracy=0.1)
    assert outcome.reconfiguration is not None
    assert pruner.recorder.precision is ptsim.network.Precision.BF16


class WithSpare(nn.Module):
    """Has a convolution that forward never calls."""

    def __init__(self):
        super().__init__()
        self.body, self.spare = small(10), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.body(x)


def test_a_layer_that_forward_never_calls_and_accumulation_leave_a_trace_that_can_be_read(tmp_path):
    torch.manual_seed(0)
    model = WithSpare()
    optimizer = sgd(model)
    pruner = made(model, optimizer, record=tmp_path / "run", channel_maxima=True)
    for _ in range(2):
        for images, labels in images_and_labels():
            for part in (slice(8), slice(8, 16)):
                loss = F.cross_entropy(model(images[part]), labels[part])
                (loss / 2).backward()
            pruner.step(loss)
            optimizer.step()
            optimizer.zero_grad()
        pruner.end_epoch(validation_accuracy=0.5)
    pruner.close()
    (first, _) = ptsim.read_trace(tmp_path / "run").epochs
    assert (first.num_iterations, first.num_images, first.batch_per_gpu, first.passes) == (4, 64, 16, 2)
    assert "spare" not in {density.layer for density in first.densities}


class TwoHeads(nn.Module):
    """Returns a dict; its second output is a tuple."""

    def __init__(self):
        super().__init__()
        self.body, self.more = small(10), nn.Linear(10, 3)

    def forward(self, x):
        logits = self.body(x)
        return {"logits": logits, "aux": (self.more(logits), logits.sum(1))}


def test_networks_that_return_dicts_and_tuples_with_several_losses(tmp_path):
    torch.manual_seed(0)
    model = TwoHeads()
    optimizer = sgd(model)
    pruner = made(model, optimizer, record=tmp_path / "run")

    def loss_of(output, labels):
        return F.cross_entropy(output["logits"], labels) + 0.3 * F.cross_entropy(output["aux"][0], labels % 3)

    outcomes = train(pruner, model, optimizer, 2, images_and_labels(), loss_of=loss_of)
    assert outcomes[-1].pruned
    pruner.close()
    assert ptsim.read_trace(tmp_path / "run").run.dataset.num_classes == 10


def test_frozen_layers_stay_as_they_are():
    model = fresh()
    model.stem.requires_grad_(False)
    before = copy.deepcopy(model.stem[0].weight)
    optimizer = sgd(nn.ParameterList(p for p in model.parameters() if p.requires_grad))
    pruner = made(model, optimizer)
    train(pruner, model, optimizer, 3, images_and_labels())
    assert torch.equal(model.stem[0].weight, before)


def test_a_state_restores_the_pruned_network_its_optimizer_and_the_course(tmp_path):
    """Stopped after three epochs and restored into fresh objects, the run ends as one that was never stopped."""
    batches = images_and_labels()
    model = fresh()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    whole = made(model, optimizer, record=tmp_path / "whole")
    train(whole, model, optimizer, 5, batches)
    whole.close()

    first = fresh()
    optimizer = torch.optim.AdamW(first.parameters(), lr=0.01)
    pruner = made(first, optimizer, record=tmp_path / "stopped")
    train(pruner, first, optimizer, 3, batches)
    torch.save(pruner.state_dict(), tmp_path / "state.pt")
    train(pruner, first, optimizer, 1, batches)  # what is lost
    pruner.recorder.abandon()  # as when its process dies

    second = fresh(seed=1)
    optimizer = torch.optim.AdamW(second.parameters(), lr=0.3)
    resumed = made(second, optimizer, record=tmp_path / "stopped")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [p.shape for p in second.parameters()] != [p.shape for p in fresh().parameters()]
    train(resumed, second, optimizer, 2, batches)
    resumed.close()
    for (name, p), q in zip(model.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q), name
    records = [
        [_without_times(record) for _, record in ptsim.trace.io.read_records(tmp_path / name)]
        for name in ("whole", "stopped")
    ]
    assert records[0] == records[1]


def test_a_state_restores_settings_that_are_negative_or_nothing():
    def adafactor(model):
        return torch.optim.Adafactor(model.parameters(), lr=0.01, beta2_decay=-0.7)

    model, other = fresh(), fresh(1)
    optimizer, second = adafactor(model), adafactor(other)
    second.param_groups[0] |= {"beta2_decay": -0.8, "lr": 0.02}
    made = [ptsim.PruneTrain(m, o, input_shape=IMAGE) for m, o in ((model, optimizer), (other, second))]
    train(made[0], model, optimizer, 1, images_and_labels(2))
    state = made[0].state_dict()
    made[1].load_state_dict(state)
    names = ("beta2_decay", "lr", "eps")
    assert [second.param_groups[0][n] for n in names] == [optimizer.param_groups[0][n] for n in names]
    state["groups"][0]["lr"] = -0.01
    with pytest.raises(UsageError, match=r"the optimizer's lr is -0\.01"):
        made[1].load_state_dict(state)
    state["groups"][0]["lr"] = 10**5000  # neither a float nor printed by Python
    with pytest.raises(UsageError, match="the optimizer's lr is a huge number"):
        made[1].load_state_dict(state)
    state["groups"][0]["lr"] = 2**63  # 1 minus it is no 64-bit number
    with pytest.raises(UsageError, match="the optimizer's lr is 9223372036854775808"):
        made[1].load_state_dict(state)
    with pytest.raises(UsageError, match="not a state of PruneTrain"):
        made[1].load_state_dict(state | {"architecture": "\udcff"})


@pytest.mark.parametrize(
    ("begun", "goes_on", "missing"),
    [
        (torch.optim.SGD, torch.optim.Adam, "betas"),
        (torch.optim.Adam, torch.optim.SGD, "dampening"),
        (torch.optim.SGD, torch.optim.RMSprop, "alpha"),
    ],
)
def test_a_state_of_another_kind_of_optimizer_is_refused_before_anything_changes(begun, goes_on, missing):
    model, other = fresh(), fresh(1)
    first = ptsim.PruneTrain(model, begun(model.parameters(), lr=0.01), input_shape=IMAGE)
    second = ptsim.PruneTrain(other, goes_on(other.parameters(), lr=0.01), input_shape=IMAGE)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(UsageError, match=f"another kind of optimizer than {goes_on.__name__}, without '{missing}'"):
        second.load_state_dict(first.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


class Listing(torch.optim.SGD):
    """Keeps lists besides its momentum, as Shampoo and SOAP do."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                kept = self.state[parameter].setdefault("sides", [None, torch.eye(parameter.shape[0]), 0])
                kept[1], kept[2] = kept[1] * 1.5, kept[2] + 1
        return super().step(closure)


def test_a_state_restores_what_an_optimizer_keeps_in_lists():
    model, other = fresh(), fresh(1)
    optimizer, second = (Listing(m.parameters(), lr=0.05, momentum=0.9) for m in (model, other))
    pruners = [ptsim.PruneTrain(m, o, input_shape=IMAGE) for m, o in ((model, optimizer), (other, second))]
    train(pruners[0], model, optimizer, 1, images_and_labels(2))
    state = pruners[0].state_dict()
    pruners[1].load_state_dict({**state, "optimizer": msgspec.json.decode(msgspec.json.encode(state["optimizer"]))})
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        nothing, side, number = second.state[q]["sides"]
        assert (nothing, number) == (None, 2)
        assert torch.equal(side, 1.5**2 * torch.eye(p.shape[0]))
        assert torch.equal(second.state[q]["momentum_buffer"], optimizer.state[p]["momentum_buffer"])
    odd = {"optimizer/stem.0.weight/sides[7]": torch.zeros(1)}
    with pytest.raises(UsageError, match=r"sides\[7\]' belongs to a list"):
        pruners[1].load_state_dict({**state, "tensors": state["tensors"] | odd})


class Factored(torch.optim.Optimizer):
    """As LAMB counts in its group, Adafactor decides the rate and keeps row means, and SOAP leaves empty places."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": None})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group.setdefault("step", torch.tensor(0.0)).add_(1)
            for p in group["params"]:
                state = self.state[p]
                rows = state.setdefault("rows", torch.zeros(p.shape[:-1]))
                rows.mul_(0.9).add_(p.grad.square().mean(-1), alpha=0.1)
                state.setdefault("sides", [[], torch.zeros(2)])[1].add_(group["step"])
                p.sub_(p.grad / (rows.sqrt().unsqueeze(-1) + 1e-3), alpha=0.01 / float(group["step"]))


def test_a_run_goes_on_alike_with_an_optimizer_that_keeps_what_it_likes():
    model, other = fresh(), fresh(1)
    optimizer, second = Factored(model.parameters()), Factored(other.parameters())
    pruners = [ptsim.PruneTrain(m, o, input_shape=IMAGE) for m, o in ((model, optimizer), (other, second))]
    (first,) = train(pruners[0], model, optimizer, 1, images_and_labels(2))
    assert first.epoch.learning_rate is None
    state = pruners[0].state_dict()
    plain = {name: msgspec.json.decode(msgspec.json.encode(state[name])) for name in ("optimizer", "groups")}
    pruners[1].load_state_dict(state | plain)
    for pruner, m, o in ((pruners[0], model, optimizer), (pruners[1], other, second)):
        train(pruner, m, o, 1, images_and_labels(2))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert second.state[q]["sides"][0] == []
        assert torch.equal(second.state[q]["sides"][1], torch.full((2,), 1.0 + 2 + 3 + 4))
    second.state[other.fc.bias]["sides"] = {"left": torch.zeros(2)}
    with pytest.raises(UsageError, match=r"keeps 'sides' of fc\.bias in a dict, which ptsim cannot store"):
        pruners[1].state_dict()


def test_a_proximal_step_needs_a_rate():
    model = fresh()
    with pytest.raises(UsageError, match="needs a learning rate, which Factored decides by itself"):
        ptsim.PruneTrain(model, Factored(model.parameters()), input_shape=IMAGE, regularizer="proximal")


def test_a_proximal_step_follows_the_learning_rate_of_each_group():
    """A group that has come to rest stays to the bit; the others shrink as momentum and dampening carry a gradient."""
    model = fresh()
    resting, *moved = model.parameters()
    optimizer = torch.optim.SGD([{"params": moved}, {"params": [resting], "lr": 0.0}], lr=0.1, momentum=0.9)
    pruner = made(model, optimizer, regularizer="proximal")
    before = resting.detach().clone()
    train(pruner, model, optimizer, 1, images_and_labels(2))
    assert torch.equal(resting, before)
    for group, rate in zip(optimizer.param_groups, (0.2, 0.4), strict=True):
        group.update(lr=rate, dampening=0.5)
    shrinkages = proximal_shrinkages(optimizer, [moved[0], resting, before], 3.0)
    assert shrinkages == pytest.approx([0.2 * 3 * 0.5 / 0.1, 0.4 * 3 * 0.5 / 0.1, 0.0])


def test_a_state_without_tensors_is_json_and_goes_with_the_loops_own_checkpoints():
    batches = images_and_labels()
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer)
    train(pruner, model, optimizer, 2, batches)
    state = msgspec.json.decode(msgspec.json.encode(pruner.state_dict(tensors=False)))
    other = fresh(seed=1)
    second = sgd(other)
    made(other, second).load_state_dict(state)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    images, labels = batches[0]
    for network, its_optimizer in ((model, optimizer), (other, second)):
        its_optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        its_optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("most", "proposed"), [(40, 40), (None, 64)])  # 64: the images of an epoch
def test_a_larger_mini_batch_is_proposed_once_the_network_has_shrunk(most, proposed):
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer, memory_budget_bytes=2**30, batch_granularity=8, max_batch=most)
    assert pruner.batch is None
    train(pruner, model, optimizer, 2, images_and_labels())
    other = fresh(seed=1)
    resumed = made(other, sgd(other), memory_budget_bytes=2**30, batch_granularity=8, max_batch=most)
    resumed.load_state_dict(pruner.state_dict())
    for either in (pruner, resumed):  # a run that goes on is proposed the same
        assert (either.batch, either.learning_rate_scale) == (proposed, proposed / 16)


def test_accumulated_gradients_leave_room_for_a_smaller_pass_than_a_whole_step_would():
    proposals = []
    for parts in (1, 2):
        model = fresh()
        optimizer = sgd(model)
        pruner = made(model, optimizer, memory_budget_bytes=2**20, batch_granularity=1, interval=9)
        for images, labels in images_and_labels(32, 8):
            optimizer.zero_grad()
            for _ in range(parts):
                loss = F.cross_entropy(model(images), labels)
                (loss / parts).backward()
            pruner.step(loss)
            optimizer.step()
        pruner.end_epoch()
        proposals.append(pruner.batch)
    assert 8 < proposals[1] <= proposals[0]  # the gradients stay while the next pass runs


@pytest.mark.parametrize("taken", [True, False])
def test_a_proposal_never_shrinks_and_its_rate_counts_from_the_first_mini_batch(taken):
    """64 images in the first epoch; then one mini-batch of all of them, or two of 16 as before."""
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer, memory_budget_bytes=2**30, batch_granularity=8, interval=9)
    for batches in (images_and_labels(), images_and_labels(1, 64) if taken else images_and_labels(2)):
        train(pruner, model, optimizer, 1, batches)
        assert (pruner.batch, pruner.learning_rate_scale) == (64, 4.0)


def test_an_epoch_without_the_penalty_ends_without_a_reconfiguration():
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer, interval=1)
    outcomes = []
    for regularized in (True, False, True):
        pruner.regularized = regularized
        outcomes += train(pruner, model, optimizer, 1, images_and_labels(2))
    assert [outcome.reconfiguration is not None for outcome in outcomes] == [True, False, True]


def proposed_after(calls, num_batches, budget):
    """What is proposed after an epoch of 8 images a mini-batch, each of which the network sees in so many calls."""
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer, memory_budget_bytes=budget, batch_granularity=1, interval=9)
    for images, labels in images_and_labels(num_batches, 8):
        optimizer.zero_grad()
        loss = sum(F.cross_entropy(model(images.roll(call, 3)), labels) for call in range(calls))
        loss.backward()
        pruner.step(loss)
        optimizer.step()
    pruner.end_epoch()
    return pruner.batch


def test_a_network_that_is_called_twice_before_backward_is_proposed_half_as_many_images_for_each_call():
    """As a Siamese network."""
    assert 8 < proposed_after(2, 32, 2**20) == proposed_after(1, 32, 2**20) // 2
    assert proposed_after(2, 4, 2**30) == 32  # an epoch's images, of which each was seen twice


def test_an_average_on_the_networks_device_takes_its_bytes_of_the_memory():
    """By hand 2442 parameters and 72 running statistics of 4 bytes, and 4 counts of mini-batches of 8."""
    model = fresh()
    average = copy.deepcopy(model)
    pruner = made(model, sgd(model), ema=average)
    assert pruner.average_bytes == 4 * (2442 + 72) + 4 * 8
    average.to("meta")  # in another place
    assert pruner.average_bytes == 0
    pruner.ema = None
    assert pruner.average_bytes == 0


def test_a_compiled_network_says_that_it_has_to_be_wrapped_again_or_does_it():
    for rewrap in (None, lambda network: CompiledOnce(network, backend="eager")):
        model = fresh()
        optimizer = sgd(model)
        module = CompiledOnce(model, backend="eager")
        pruner = made(module, optimizer, rewrap=rewrap)
        assert pruner.network is model
        outcomes = train(pruner, module, optimizer, 2, images_and_labels())
        assert outcomes[-1].pruned
        assert pruner.needs_rewrap is (rewrap is None)
        if rewrap is None:
            module = CompiledOnce(pruner.network, backend="eager")
            pruner.rewrapped(module)
        else:
            module = pruner.recorder.module
        train(pruner, module, optimizer, 1, images_and_labels())
        assert not pruner.needs_rewrap


@pytest.mark.parametrize("kind", ["DistributedDataParallel", "compiled module"])
def test_a_loop_that_goes_on_with_the_module_before_rewrap_is_told(kind, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    wrap = {
        "DistributedDataParallel": nn.parallel.DistributedDataParallel,
        "compiled module": lambda network: torch.compile(network, backend="eager"),
    }[kind]
    try:
        network = fresh()
        optimizer = sgd(network)
        first = wrap(network)
        pruner = made(first, optimizer, rewrap=wrap)
        assert pruner.module is first
        assert train(pruner, first, optimizer, 2, images_and_labels())[-1].pruned
        with pytest.raises(UsageError, match=f"the loop (still )?calls (the|a) {kind} that") as caught:
            train(pruner, first, optimizer, 1, images_and_labels())
        assert caught.value.hint.startswith("model = pruner.module after end_epoch")
        optimizer.zero_grad()
        train(pruner, pruner.module, optimizer, 1, images_and_labels())
    finally:
        torch.distributed.destroy_process_group()
        torch._dynamo.reset()


def test_a_bare_network_is_wrapped_at_once_where_rewrap_is_given(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        network = fresh()
        optimizer = sgd(network)
        pruner = made(network, optimizer, rewrap=nn.parallel.DistributedDataParallel, record=tmp_path / "run")
        first = pruner.module
        assert isinstance(first, nn.parallel.DistributedDataParallel)
        assert first.module is network
        assert train(pruner, first, optimizer, 2, images_and_labels())[-1].pruned
        assert pruner.module is not first
        train(pruner, pruner.module, optimizer, 1, images_and_labels())
        pruner.close()
        assert ptsim.read_trace(tmp_path / "run").broadcasts_buffers  # DistributedDataParallel's default
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("compiled", ["inside", "outside"])
def test_data_parallel_is_seen_inside_and_around_what_is_compiled(compiled, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    torch._dynamo.reset()
    try:
        network = fresh()
        optimizer = sgd(network)
        inner = torch.compile(network, backend="eager") if compiled == "inside" else network
        module = nn.parallel.DistributedDataParallel(inner, gradient_as_bucket_view=True)
        if compiled == "outside":
            module = torch.compile(module, backend="eager")
        recorder = ptsim.Recorder(module, optimizer, input_shape=IMAGE, record=tmp_path / "run")
        for images, labels in images_and_labels(1):
            for half in range(2):  # both reduce: nothing says no_sync
                F.cross_entropy(module(images[half::2]), labels[half::2]).backward()
            optimizer.step()
            optimizer.zero_grad()
        reductions = recorder.watch.num_reductions
        recorder.end_epoch()
        recorder.close()
        trace = ptsim.read_trace(tmp_path / "run")
        assert (trace.compiled, trace.bucket_views, trace.broadcasts_buffers) == (True, True, True)
        assert reductions == 2 * trace.epochs[0].num_iterations
    finally:
        torch.distributed.destroy_process_group()
        torch._dynamo.reset()


def test_data_parallel_has_to_be_wrapped_again_and_a_loop_that_forgets_it_is_told(tmp_path):
    batches = images_and_labels()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for given in ("wrapped", "bare"):
            network = fresh()
            module = nn.parallel.DistributedDataParallel(network)
            optimizer = sgd(network)
            pruner = made(module if given == "wrapped" else network, optimizer)
            assert pruner.network is network
            assert train(pruner, module, optimizer, 2, batches)[-1].pruned
            assert pruner.needs_rewrap
            with pytest.raises(UsageError, match="still calls the DistributedDataParallel that was made before"):
                train(pruner, module, optimizer, 1, batches)
            del module
            gc.collect()  # the failed call's frames hold it
            module = nn.parallel.DistributedDataParallel(pruner.network)
            optimizer.zero_grad()
            train(pruner, module, optimizer, 1, batches)
            assert not pruner.needs_rewrap
    finally:
        torch.distributed.destroy_process_group()


# Misuse


def test_a_step_before_backward_is_named():
    model = fresh()
    pruner = made(model, sgd(model))
    with pytest.raises(UsageError, match="before backward"):
        pruner.step(torch.tensor(2.3))


def test_a_step_after_the_update_is_named():
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer)
    images, labels = images_and_labels()[0]
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    with pytest.raises(UsageError, match=r"called after optimizer\.step: the penalty's gradient would be lost"):
        pruner.step(loss)
    F.cross_entropy(model(images), labels).backward()  # gradients that are kept are gradients
    pruner.step(loss)


def test_a_penalty_that_is_added_twice_is_named():
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer)
    images, labels = images_and_labels()[0]
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    pruner.step(loss)
    with pytest.raises(UsageError, match=r"added twice before optimizer\.step"):
        pruner.step(loss)


@pytest.mark.parametrize("again", [False, True], ids=["", "and another backward"])
@pytest.mark.parametrize("kept", [False, True], ids=["dropped", "filled"])
def test_gradients_that_are_zeroed_after_the_penalty_was_added_are_named(kept, again):
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer)
    images, labels = images_and_labels()[0]
    if not kept:  # zeros that are written over a gradient are looked for before the first update only
        steps(pruner, model, optimizer, images_and_labels(1))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    pruner.step(loss)
    optimizer.zero_grad(set_to_none=not kept)
    if again and not kept:
        F.cross_entropy(model(images), labels).backward()
    with pytest.raises(UsageError, match=r"zeroed between pruner\.step and optimizer\.step, so the penalty was lost"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))  # the update did not happen
    steps(pruner, model, optimizer, images_and_labels(1))


def test_gradients_that_the_loop_replaces_or_gives_up_are_no_mistake():
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer)
    images, labels = images_and_labels()[0]
    for course in ("replaced", "given up", "without the penalty", "as ever"):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        pruner.regularized = course != "without the penalty"
        pruner.step(loss)
        if course == "given up":  # a loop that leaves an update out, for instance because the norm is infinite
            continue
        for parameter in model.parameters():
            parameter.grad = parameter.grad.clamp(-1, 1)
        optimizer.step()
    assert pruner.recorder.watch.num_steps == 3


def test_a_pruner_and_a_recorder_are_neither_copied_nor_pickled():
    model = fresh()
    pruner = made(model, sgd(model))
    stored = "state_dict() and load_state_dict() store it and go on with it"
    for thing, hint in ((pruner, stored), (pruner.recorder, None)):
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(UsageError, match="cannot be copied or pickled") as caught:
                attempt(thing)
            assert caught.value.hint == hint
    assert type(copy.deepcopy(model)) is type(model)


def test_a_recorder_of_another_training_is_named():
    model = fresh()
    optimizer = sgd(model)
    for network, updates, shape, what in (
        (other := fresh(), sgd(other), IMAGE, "network"),
        (model, sgd(model), IMAGE, "optimizer"),
        (model, optimizer, (3, 32, 24), "input_shape"),
    ):
        recorder = ptsim.Recorder(network, updates, input_shape=shape)
        with pytest.raises(UsageError, match=f"record= has another {what} than PruneTrain"):
            made(model, optimizer, record=recorder)
    fitting = ptsim.Recorder(model, optimizer, input_shape=IMAGE)
    for given in ({"facts": ptsim.RunFacts(model="mine")}, {"profile": True}, {"channel_maxima": True}):
        with pytest.raises(UsageError, match="facts, loggers, profile and channel_maxima belong to the Recorder"):
            made(model, optimizer, record=fitting, **given)
    assert made(model, optimizer, record=fitting).recorder is fitting


def test_the_trace_of_a_recorder_that_is_given_says_how_it_was_pruned(tmp_path):
    settings_of = []
    for given in (False, True):
        model = fresh()
        optimizer = sgd(model)
        folder = tmp_path / str(given)
        record = ptsim.Recorder(model, optimizer, input_shape=IMAGE, record=folder) if given else folder
        pruner = made(model, optimizer, record=record, regularizer="proximal")
        train(pruner, model, optimizer, 1, images_and_labels(2))
        pruner.close()
        trace = ptsim.read_trace(folder)
        assert (trace.penalty_ratio, trace.proximal) == (0.5, True)
        settings_of.append(trace.run.hyperparameters)
    assert settings_of[0] == settings_of[1]


def test_a_run_that_began_before_it_had_a_pruner_does_not_say_how_strong_the_penalty_is(tmp_path):
    model = fresh()
    optimizer = sgd(model)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE, record=tmp_path)
    for images, labels in images_and_labels(2):
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    recorder.end_epoch()
    assert ptsim.read_trace(tmp_path).penalty_ratio == 0
    pruner = made(model, optimizer, record=recorder)
    train(pruner, model, optimizer, 1, images_and_labels(2))
    pruner.close()
    assert ptsim.read_trace(tmp_path).penalty_ratio is None


def test_a_rewrap_that_gives_nothing_is_named_and_so_is_nothing_that_is_rewrapped():
    model = fresh()
    optimizer = sgd(model)
    with pytest.raises(UsageError, match="rewrap gave a NoneType, expected the module that the loop calls"):
        made(model, optimizer, rewrap=lambda network: None)
    given = [model]
    pruner = made(model, optimizer, rewrap=lambda network: given.pop() if given else None)
    with pytest.raises(UsageError, match="rewrap gave a NoneType, expected the module that the loop calls"):
        train(pruner, pruner.module, optimizer, 2, images_and_labels())
    with pytest.raises(UsageError, match="the model is a NoneType"):
        pruner.rewrapped(None)


def test_a_step_before_unscaling_is_named():
    model = fresh()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu")
    pruner = made(model, optimizer, scaler=scaler)
    images, labels = images_and_labels()[0]
    loss = F.cross_entropy(model(images), labels)
    scaler.scale(loss).backward()
    with pytest.raises(UsageError, match=r"before scaler\.unscale_"):
        pruner.step(loss)


def test_another_optimizer_is_named_whether_it_was_made_before_or_after_a_reconfiguration():
    batches = images_and_labels()
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer)
    with pytest.raises(UsageError, match="another optimizer than PruneTrain's has updated the network"):
        train(pruner, model, sgd(model), 1, batches)
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer)
    train(pruner, model, optimizer, 2, batches)
    with pytest.raises(UsageError, match="since the reconfiguration"):
        train(pruner, model, sgd(model), 1, batches)


@pytest.mark.parametrize(
    "use",
    [
        lambda kept: nn.utils.clip_grad_norm_(kept, 1.0),
        lambda kept: [parameter.grad.zero_() for parameter in kept if parameter.grad is not None],
        lambda kept: [setattr(parameter, "grad", None) for parameter in kept],
    ],
    ids=["clipped", "zeroed", "dropped"],
)
def test_a_list_of_parameters_from_before_a_reconfiguration_is_named(use):
    """It would clip or zero what nothing trains any more, and leave out the weights that have shrunk."""
    model = fresh()
    optimizer = sgd(model)
    kept = list(model.parameters())
    pruner = made(model, optimizer)
    use(kept)
    assert train(pruner, model, optimizer, 2, images_and_labels())[-1].pruned
    use(list(model.parameters()))
    with pytest.raises(UsageError, match="a parameter that pruning has replaced"):
        use(kept)
    again = fresh()
    kept = list(again.parameters())
    resumed = made(again, sgd(again))
    resumed.load_state_dict(pruner.state_dict())
    with pytest.raises(UsageError, match="a parameter that pruning has replaced"):
        use(kept)


def test_an_optimizer_whose_parameters_somebody_exchanged_is_named():
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer)
    optimizer.param_groups[0]["params"] = list(fresh().parameters())
    with pytest.raises(UsageError, match="holds none of the parameters of this Small"):
        train(pruner, model, optimizer, 1, images_and_labels())


def test_an_optimizer_of_another_network_is_named():
    with pytest.raises(UsageError, match="holds none of the parameters of this Small"):
        made(fresh(), sgd(fresh()))
    model = fresh()
    with pytest.raises(UsageError, match=r"does not hold inner\.0\.weight of this Small"):
        made(model, sgd(nn.ParameterList(p for n, p in model.named_parameters() if not n.startswith("inner"))))


def test_two_pruners_on_one_network_are_named_and_one_after_the_other_is_fine():
    model = fresh()
    optimizer = sgd(model)
    first = made(model, optimizer)
    with pytest.raises(UsageError, match="already has a PruneTrain"):
        made(model, optimizer)
    first.close()
    second = made(model, optimizer)
    del second
    gc.collect()
    made(model, optimizer)


def test_end_epoch_twice_is_named():
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer)
    train(pruner, model, optimizer, 1, images_and_labels())
    with pytest.raises(UsageError, match="without a training step since the last one"):
        pruner.end_epoch(validation_accuracy=0.5)


def test_a_percentage_is_no_accuracy():
    model = fresh()
    optimizer = sgd(model)
    with pytest.raises(UsageError, match="expected a fraction from 0 to 1"):
        train(made(model, optimizer), model, optimizer, 1, images_and_labels(), accuracy=71.2)


def test_what_is_no_network_and_no_optimizer_is_named():
    model = fresh()
    with pytest.raises(UsageError, match="the model is the class Branching, expected a network"):
        made(Branching, sgd(model))
    with pytest.raises(UsageError, match="the model is a SGD, expected a network"):
        made(sgd(model), model)
    for optimizer, kind in ((None, "NoneType"), ([sgd(model)], "list")):
        with pytest.raises(UsageError, match=f"the optimizer is a {kind}"):
            made(model, optimizer)
        with pytest.raises(UsageError, match=f"the optimizer is a {kind}"):
            ptsim.Recorder(model, optimizer, input_shape=IMAGE)
    with pytest.raises(UsageError, match="record is True, expected the folder for the trace"):
        made(model, sgd(model), record=True)
    with pytest.raises(UsageError, match="the model is a NoneType"):
        ptsim.Recorder(None, sgd(model), input_shape=IMAGE)
    with pytest.raises(UsageError, match="the model is the class Branching"):
        ptsim.load_pruned(Branching, made(model, sgd(model)).state_dict())


def test_a_second_pruner_on_a_part_or_the_whole_of_a_network_is_named():
    model = fresh()
    optimizer = sgd(model)
    first = made(model, optimizer)
    with pytest.raises(UsageError, match="already has a PruneTrain"):
        made(nn.Sequential(model), optimizer)
    first.close()
    made(nn.Sequential(model), optimizer)


def test_numbers_that_are_none_and_calls_after_close_are_named():
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer)
    steps(pruner, model, optimizer, images_and_labels(1))
    for wrong in ("0.5", [0.5], torch.tensor([0.1, 0.2])):
        with pytest.raises(UsageError, match="expected a fraction from 0 to 1"):
            pruner.end_epoch(wrong)
    with pytest.raises(UsageError, match="num_images is -3"):
        pruner.recorder.step(1.0, num_images=-3)
    assert pruner.end_epoch(0.5).epoch.num_iterations == 1  # the mistakes have spoilt nothing
    pruner.close()
    with pytest.raises(UsageError, match="the pruner is closed: step belongs before close"):
        pruner.step(1.0)


def test_a_layer_that_somebody_has_exchanged_is_named():
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer)
    steps(pruner, model, optimizer, images_and_labels(1))
    name, old = next((n, m) for n, m in model.named_children() if isinstance(m, nn.Linear))
    setattr(model, name, copy.deepcopy(old))
    with pytest.raises(UsageError, match="replaced after PruneTrain was made"):
        pruner.end_epoch()


def test_a_state_that_is_loaded_in_the_middle_of_an_epoch_takes_the_counts_back():
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer)
    batches = images_and_labels(3)
    steps(pruner, model, optimizer, batches[:1])
    state = pruner.state_dict()
    steps(pruner, model, optimizer, batches[1:])  # what follows is taken back
    pruner.load_state_dict(state)
    steps(pruner, model, optimizer, batches[1:2])
    epoch = pruner.end_epoch().epoch
    assert (epoch.num_iterations, epoch.num_images) == (2, 32)


def test_a_state_of_the_start_takes_back_what_the_optimizer_keeps():
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer)
    state, ends = pruner.state_dict(), []
    for _ in range(2):
        steps(pruner, model, optimizer, images_and_labels(2))
        ends.append([p.detach().clone() for p in model.parameters()])
        pruner.load_state_dict(state)
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize(("parts", "batch", "proposed"), [(1, 16, 16), (2, 32, 16 + 32)])  # up to an epoch's images
def test_an_epoch_has_its_own_mini_batch_also_where_a_state_left_it_only_a_few_images(parts, batch, proposed):
    """Two updates of 16 images a pass before the state, one of 4 after it; with one pass or two an update."""
    pruners = []
    for batches in (images_and_labels(2 * parts), images_and_labels(1, 4)):
        model = fresh()
        optimizer = sgd(model)
        pruner = made(model, optimizer)
        if pruners:
            pruner.load_state_dict(pruners[0].state_dict())
        for index, (images, labels) in enumerate(batches):
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            if len(images) == 4 or index % parts == parts - 1:
                pruner.step(loss)
                optimizer.step()
                optimizer.zero_grad()
        pruners.append(pruner)
    epoch = pruners[1].end_epoch().epoch
    assert (epoch.batch_per_gpu, epoch.passes, epoch.num_images) == (batch, parts, 2 * batch + 4)
    assert (pruners[1].batch, pruners[1].learning_rate_scale) == (proposed, proposed / 16)


def test_a_network_that_cannot_be_traced_is_named():
    model = Branching()
    with pytest.raises(UnsupportedModelError, match=r"torch\.fx cannot trace Branching"):
        made(model, sgd(model))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"penalty_ratio": 1.0}, UsageError, "penalty_ratio is 1, expected in"),
        ({"penalty_ratio": "0.2"}, UsageError, "penalty_ratio is '0.2'"),
        ({"rewrap": 3}, UsageError, "rewrap is 3, expected a function"),
        ({"scaler": "amp"}, UsageError, "scaler is a str"),
        ({"facts": {"model": "mine"}}, UsageError, "facts is a dict, expected ptsim.RunFacts"),
        ({"interval": 0}, UsageError, "interval"),
        ({"interval": 2.5}, UsageError, "interval"),
        ({"input_shape": 224}, UsageError, "input_shape is 224"),
        ({"input_shape": (3, 8)}, UsageError, "input_shape"),
        ({"thresold": 1e-3}, UnknownNameError, "unknown setting of PruneTrain 'thresold'"),
        ({"mode": "both"}, UsageError, "setting 'mode'"),
        ({"threshold": 0.0}, UsageError, "threshold"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_settings_are_one_sentence(changes, error, message):
    model = fresh()
    with pytest.raises(error, match=message) as caught:
        made(model, sgd(model), **changes)
    assert "\n" not in caught.value.message


def test_a_folder_that_holds_another_runs_trace_is_refused(tmp_path):
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer, record=tmp_path / "run")
    train(pruner, model, optimizer, 1, images_and_labels())
    pruner.close()
    with pytest.raises(UsageError, match="holds the trace of another run") as caught:
        train(made(model, optimizer, record=tmp_path / "run"), model, optimizer, 1, images_and_labels())
    assert caught.value.hint.startswith("choose another folder; a PruneTrain goes on with that run")


def test_a_trace_that_cannot_be_written_advises_nothing_that_an_own_loop_lacks(tmp_path, monkeypatch):
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer, record=tmp_path / "run")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TraceWriter, "write", full)
    with pytest.raises(TrainingError, match=r"trace\.jsonl cannot be written: No space left") as caught:
        train(pruner, model, optimizer, 1, images_and_labels())
    assert caught.value.hint == "make room"  # there is no --resume
    monkeypatch.undo()
    pruner.close()


class Pyramid(nn.Module):
    """A backbone with torchvision's feature pyramid, and a head on each of its levels, as detectors have."""

    def __init__(self):
        super().__init__()
        stages = [(3, 8), (8, 12), (12, 16)]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in stages
        )
        self.pyramid = torchvision.ops.FeaturePyramidNetwork([b for _, b in stages], 8)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        levels = {}
        for level, stage in enumerate(self.stages):
            x = stage(x)
            levels[str(level)] = x
        return {name: self.head(features) for name, features in self.pyramid(levels).items()}


def test_a_backbone_with_a_feature_pyramid_and_a_loss_per_level_is_pruned_exactly(tmp_path):
    torch.manual_seed(0)
    model = Pyramid()
    found = ptsim.inspect(model, input_shape=(3, 32, 32))
    assert found.exact
    assert found.prunable_channels > 0
    optimizer = sgd(model)
    pruner = made(
        model, optimizer, input_shape=(3, 32, 32), penalty_ratio=0.8, threshold=0.2, interval=1, record=tmp_path
    )
    for _ in range(3):
        images = torch.randn(4, 3, 32, 32)
        loss = sum(level.square().mean() for level in model(images).values())
        optimizer.zero_grad()
        loss.backward()
        pruner.step(loss)
        optimizer.step()
        pruner.end_epoch()
    pruner.close()
    assert pruner.summary().channels[1] < pruner.summary().channels[0]
    shapes = {name: tuple(level.shape) for name, level in model(torch.randn(2, 3, 32, 32)).items()}
    assert shapes == {"0": (2, 5, 16, 16), "1": (2, 5, 8, 8), "2": (2, 5, 4, 4)}
    assert ptsim.cost(ptsim.read_trace(tmp_path)).parameters > 0


@pytest.mark.parametrize("name", ["fcn_resnet50", "lraspp_mobilenet_v3_large"])
def test_segmentation_networks_of_torchvision_are_traced_whole_and_pruned_exactly(name):
    model = getattr(torchvision.models.segmentation, name)(weights=None, weights_backbone=None)
    found = ptsim.inspect(model, input_shape=(3, 64, 64))
    assert found.exact
    assert found.traced_by == "torch.fx"
    assert found.prunable_channels > 1000  # of a few thousand: the backbone goes, not the classes alone


class Detector(nn.Module):
    """Its loss depends on what was found, as a detector's does: torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.backbone, self.boxes = Pyramid(), nn.Linear(5, 4)

    def forward(self, images):
        found = torch.cat([level.flatten(2) for level in self.backbone(images).values()], 2).transpose(1, 2)
        kept = found[found.sum(2) > 0]
        return self.boxes(kept).square().mean() if len(kept) else found.sum() * 0


def test_the_backbone_of_a_detector_that_cannot_be_traced_is_pruned_and_restored():
    def begun():
        torch.manual_seed(0)
        model = Detector()
        optimizer = sgd(model)
        options = {"input_shape": (3, 32, 32), "threshold": 1e-4, "interval": 1}
        return model, optimizer, made(model.backbone, optimizer, **options)

    with pytest.raises(UnsupportedModelError):
        ptsim.PruneTrain(Detector(), sgd(Detector()), input_shape=(3, 32, 32))
    model, optimizer, pruner = begun()
    images, body = torch.randn(4, 3, 32, 32), model.backbone
    loss = model(images)
    loss.backward()
    pruner.step(loss + 1)
    optimizer.step()
    with torch.no_grad():  # three channels of the second stage, with all that makes and reads them
        body.stages[1][0].weight[:3] = 0
        body.stages[1][1].weight[:3] = 0
        body.stages[1][1].bias[:3] = 0
        body.stages[2][0].weight[:, :3] = 0
        body.pyramid.inner_blocks[1][0].weight[:, :3] = 0
    pruner.end_epoch()
    assert body.stages[1][0].out_channels == 9
    assert model.boxes.weight.shape == (4, 5)
    again, _, other = begun()
    other.load_state_dict(pruner.state_dict())
    again.boxes.load_state_dict(model.boxes.state_dict())
    assert torch.equal(again.eval()(images), model.eval()(images))


def test_what_cannot_be_pruned_at_all_is_refused_with_the_reason_of_its_layers() -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(8 * 36, 4))
    with pytest.raises(UsageError, match=r"nothing of this Sequential can be pruned: .*computes its weight"):
        ptsim.PruneTrain(model, torch.optim.SGD(model.parameters(), 0.1), input_shape=(3, 8, 8))
