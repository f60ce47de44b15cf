"""Today's recipes, and schedules, optimizers and data sets that another package brings."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from PIL import Image
from torch import nn

import ptsim
from ptsim.cli.main import run as command
from ptsim.costs.memory import iteration_memory
from ptsim.costs.traffic import update_traffic
from ptsim.criteria import CRITERIA
from ptsim.errors import UnknownNameError, UsageError
from ptsim.network import Precision
from ptsim.optimizers import OPTIMIZERS, OptimizerKind
from ptsim.prune.criteria.group_lasso import GroupLasso
from ptsim.setting import StepSetting
from ptsim.trace.io import write_trace
from ptsim.trace.schema import UpdateCosts
from ptsim.training import reference, step
from ptsim.training.config import SETTINGS, make_config, resolve
from ptsim.training.data import Share
from ptsim.training.datasets import load_data
from ptsim.training.datasets import synthetic as synthetic_data
from ptsim.training.distributed import Team
from ptsim.training.facts import RunFacts
from ptsim.training.registries import SCHEDULES
from ptsim.training.schedule import epoch_plans
from ptsim.training.sources import DATASETS
from ptsim.training.step import mix, mixed_loss, validate
from tests.training.nets import small
from tests.training.runs import settings


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rates(**changes):
    made = {"dataset": "digits", "lr": 0.4, "penalty_ratio": 0.0} | changes
    return [plan.learning_rate for plan in epoch_plans(make_config(made))]


def test_the_cosine_schedule_is_half_a_cosine():
    expected = [0.4 * (1 + math.cos(math.pi * epoch / 8)) / 2 for epoch in range(8)]
    assert rates(lr_schedule="cosine", epochs=8) == pytest.approx(expected)


def test_the_warm_up_grows_in_equal_steps_and_the_rest_of_the_cosine_follows():
    found = rates(lr_schedule="cosine", epochs=8, warmup_epochs=3)
    assert found[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert found[3:] == pytest.approx([0.4 * (1 + math.cos(math.pi * epoch / 5)) / 2 for epoch in range(5)])


def test_milestones_count_from_the_first_epoch_also_with_a_warm_up():
    assert rates(epochs=8, warmup_epochs=1, lr_milestones=[4]) == pytest.approx([0.2, *[0.4] * 3, *[0.04] * 4])
    assert rates(epochs=4, warmup_epochs=1, lr_milestones=[1]) == pytest.approx([0.2, 0.04, 0.04, 0.04])


def test_smoothed_and_mixed_losses_are_those_worked_out_by_hand():
    """Two classes with the log-probabilities ln ¾ and ln ¼."""
    logits = torch.log(torch.tensor([[0.75, 0.25]]))
    first, second = torch.tensor([0]), torch.tensor([1])
    plain = mixed_loss(logits, ((first, 1.0),), 0.2)
    assert plain.item() == pytest.approx(-(0.9 * math.log(0.75) + 0.1 * math.log(0.25)))
    mixed = mixed_loss(logits, ((first, 0.6), (second, 0.4)), 0.0)
    assert mixed.item() == pytest.approx(-(0.6 * math.log(0.75) + 0.4 * math.log(0.25)))


def test_validation_weighs_every_image_alike_and_a_share_counts_for_its_largest_class():
    """Probabilities ¾ and ¼: three hits, one miss, and one miss of a class with the share 0.8."""
    likely, cpu = torch.log(torch.tensor([0.75, 0.25])), torch.device("cpu")
    batches = [
        (likely.expand(3, 2), torch.zeros(3, dtype=torch.int64)),
        (likely.expand(1, 2), torch.ones(1, dtype=torch.int64)),
        (likely.expand(1, 2), torch.tensor([[0.2, 0.8]])),
    ]
    judge = nn.Identity().train()
    learner = SimpleNamespace(
        judged=judge, device=cpu, config=SimpleNamespace(precision=Precision.FP32), team=Team(device=cpu)
    )
    hit, miss = -math.log(0.75), -math.log(0.25)
    found = validate(learner, batches)
    assert found.loss == pytest.approx((3 * hit + miss + 0.2 * hit + 0.8 * miss) / 5)
    assert (found.accuracy, found.num_images, found.num_iterations) == (0.6, 5, 3)
    assert judge.training
    judge.eval()
    validate(learner, batches[:1])
    assert not judge.training


def test_mixed_images_are_the_weighted_sum_of_an_image_and_another_of_the_mini_batch():
    torch.manual_seed(0)
    images, labels = torch.rand(6, 3, 4, 4), torch.arange(6)
    blended, ((own, share), (others, rest)) = mix(images, labels, 0.4)
    assert share + rest == pytest.approx(1)
    assert own.equal(labels)
    torch.testing.assert_close(blended, share * images + rest * images[others])
    assert mix(images, labels, 0.0)[0] is images


def test_the_accuracy_of_mixed_images_is_that_of_the_larger_share(tmp_path, monkeypatch):
    """The weights stay where they are, so that the hits can be counted by hand."""

    def mixed(images, labels, _):
        return images, ((labels, 0.3), ((labels + 1) % 10, 0.7))

    monkeypatch.setattr(step, "mix", mixed)
    made = settings(epochs=1, profile=False, mixup=0.5, lr=1e-12, weight_decay=0.0)
    trace = ptsim.read_trace(ptsim.train(made, out=tmp_path / "run").trace)
    torch.manual_seed(0)
    model = ptsim.zoo.create(made["model"], num_classes=10)
    config = resolve(make_config(made), device="cpu")
    batches = load_data(config, input_shape=(3, 8, 8), device=torch.device("cpu")).training_batches(0, 16, Share())
    hits = sum(int((model.train()(images).argmax(1) == (labels + 1) % 10).sum()) for images, labels in batches)
    assert trace.epochs[0].train_accuracy == hits / 96


def test_clipped_gradients_move_the_weights_by_at_most_the_clip_times_the_rate(tmp_path):
    made = settings(epochs=1, profile=False, clip_norm=1e-6, momentum=0.0, weight_decay=0.0, threshold=1e-12)
    result = ptsim.train(made, out=tmp_path / "run")
    torch.manual_seed(0)
    initial = ptsim.zoo.create(made["model"], num_classes=10)
    trained = ptsim.load_model(result.folder, trust=True)
    pairs = zip(initial.parameters(), trained.parameters(), strict=True)
    moved = math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in pairs))
    assert 0 < moved <= 6 * 0.05 * 1e-6 * 1.01  # six updates


@pytest.mark.parametrize(
    "changes", [{"mixup": 0.2, "label_smoothing": 0.1}, {"lr_schedule": "cosine", "warmup_epochs": 1}]
)
def test_a_run_with_todays_recipes_ends_clean(tmp_path, changes):
    result = ptsim.train(settings(epochs=2, profile=False, **changes), out=tmp_path / "run")
    assert ptsim.read_trace(result.trace).complete


def test_a_share_of_every_class_validates_where_a_folder_has_no_validation_images(tmp_path):
    for label, count in (("cats", 20), ("dogs", 10)):
        (tmp_path / label).mkdir()
        for index in range(count):
            Image.new("RGB", (8, 8), (10 * index, 0, 0)).save(tmp_path / label / f"{index:02}.png")
    config = make_config({"dataset": "imagefolder", "data_dir": str(tmp_path), "validation_share": 0.2, "batch": 4})
    config = resolve(config, device="cpu")
    data = load_data(config, input_shape=(3, 8, 8), device=torch.device("cpu"))
    assert (data.dataset.num_train, data.dataset.num_validation) == (24, 6)
    labels = torch.cat([y for _, y in data.validation_batches(8, Share())])
    assert labels.bincount().tolist() == [4, 2]


def test_a_folder_with_too_few_images_to_hold_one_out_is_refused(tmp_path):
    for label in ("cats", "dogs"):
        (tmp_path / label).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / label / "only.png")
    config = resolve(make_config({"dataset": "imagefolder", "data_dir": str(tmp_path), "batch": 1}), device="cpu")
    with pytest.raises(UsageError, match="has 1 image, too few to hold one out"):
        load_data(config, input_shape=(3, 8, 8), device=torch.device("cpu"))


# From outside the package


def halving(epoch, num_epochs, config):
    return 0.5**epoch


def two_classes(request):
    """Somebody else's data set: the synthetic one under another name."""
    data = synthetic_data(request)
    data.dataset = msgspec.structs.replace(data.dataset, name="mine")
    return data


def test_a_schedule_an_optimizer_and_a_data_set_from_outside_are_one_line_each(tmp_path):
    adagrad = OptimizerKind(factory="torch.optim:Adagrad", num_states=3, accesses=12, fused_accesses=7)
    added = ((SCHEDULES, "halving", halving), (OPTIMIZERS, "adagrad", adagrad), (DATASETS, "mine", two_classes))
    for registry, name, entry in added:
        registry.add(name, entry)
    try:
        made = settings(epochs=3, profile=False, lr_schedule="halving", optimizer="adagrad", dataset="mine")
        trace = ptsim.read_trace(ptsim.train(made, out=tmp_path / "run").trace)
        assert [epoch.learning_rate for epoch in trace.epochs] == pytest.approx([0.05, 0.025, 0.0125])
        assert trace.run.dataset.name == "mine"
        assert trace.run.hyperparameters["optimizer"] == "adagrad"
        network = trace.final_network
        assert update_traffic(network, "adagrad") == 12 * 4 * network.num_parameters
        assert update_traffic(network, "adagrad", fused=True) == 7 * 4 * network.num_parameters
        need = iteration_memory(network, StepSetting(batch=4, optimizer="adagrad"))
        assert need.optimizer_bytes == 3 * 4 * network.num_parameters
        assert ptsim.predict(network, gpu="a100", batch=4, optimizer="adagrad").optimizer_seconds > 0
    finally:
        for registry, name, _ in added:
            registry.remove(name)
    with pytest.raises(UnknownNameError, match="unknown learning-rate schedule 'halving'; known: cosine, step"):
        make_config(settings(lr_schedule="halving"))


class Counting(torch.optim.Optimizer):
    """Counts its updates in the group, as LAMB does, and has a setting without end, as Prodigy."""

    def __init__(self, parameters, lr, weight_decay):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "growth_rate": math.inf})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"] / group["step"])


def test_an_optimizer_that_counts_its_updates_in_a_group_goes_on_counting(tmp_path):
    OPTIMIZERS.add("counting", OptimizerKind(factory=Counting, num_states=0, accesses=6, fused_accesses=3))
    try:
        made = settings(profile=False, optimizer="counting", lr_milestones=[90.0])
        whole = ptsim.train(made | {"epochs": 4}, out=tmp_path / "whole").folder
        halves = ptsim.train(made | {"epochs": 2}, out=tmp_path / "halves").folder
        ptsim.train({"epochs": 4}, resume=halves)
    finally:
        OPTIMIZERS.remove("counting")
    first, second = (ptsim.load_model(folder, trust=True).parameters() for folder in (whole, halves))
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


class Dear(GroupLasso):
    """Somebody else's criterion."""

    @classmethod
    def traffic(cls, network):
        return 400 * network.num_parameters

    @classmethod
    def launches(cls, network):
        return 7


def test_a_trace_is_enough_without_the_packages_of_its_optimizer_and_criterion(tmp_path, capsys):
    adagrad = OptimizerKind(factory="torch.optim:Adagrad", num_states=3, accesses=12, fused_accesses=7)
    added = (OPTIMIZERS, "theirs", adagrad), (CRITERIA, "dear", Dear)
    commands = (
        ["cost", "--gpu", "a100"], ["predict", "--gpu", "a100"], ["simulate", "--cluster", "dgx-a100", "--gpus", "1,8"],
    )  # fmt: skip

    def answers():
        found = []
        for name, *options in commands:
            assert command([name, str(trace.path), *options, "--json"]) == 0, capsys.readouterr().err
            found.append(json.loads(capsys.readouterr().out))
        return found

    for registry, name, entry in added:
        registry.add(name, entry)
    try:
        made = settings(epochs=3, profile=False, optimizer="theirs", criterion="dear", interval=1)
        trace = ptsim.read_trace(ptsim.train(made, out=tmp_path / "run").trace)
        here = answers()
    finally:
        for registry, name, _ in added:
            registry.remove(name)
    assert (trace.run.update.num_states, trace.run.update.accesses, trace.run.update.fused_accesses) == (3, 12, 7)
    assert len(trace.penalties) == len(trace.networks) > 1
    cost = here[0]
    assert cost["regularizer_bytes"] == 400 * cost["parameters"]
    assert cost["update_bytes"] == 12 * 4 * cost["parameters"]
    assert cost["memory"]["optimizer_bytes"] >= 3 * 4 * cost["parameters"]
    assert answers() == here
    wider = ["simulate", str(trace.path), "--cluster", "dgx-a100", "--channel-multiple", "8", "--json"]
    assert command(wider) == 0  # networks that the run did not have
    assert json.loads(capsys.readouterr().out)[0]["total_seconds"] > 0
    again = ptsim.read_trace(write_trace(tmp_path / "again.jsonl", trace))
    assert (again.penalties, again.run.update) == (trace.penalties, trace.run.update)
    assert command(["cost", str(trace.path), "--optimizer", "adam", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["update_bytes"] == 21 * 4 * cost["parameters"]


def test_an_optimizer_that_no_table_knows_is_told_by_its_states(tmp_path):
    class Lion(torch.optim.SGD):
        """Keeps one value for every weight."""

    model = small(10)
    optimizer = Lion(model.parameters(), lr=0.01, momentum=0.5)
    facts = RunFacts(hyperparameters={"optimizer": "Lion"})
    with ptsim.Recorder(model, optimizer, input_shape=(3, 8, 8), record=tmp_path / "run", facts=facts) as recorder:
        model(torch.rand(4, 3, 8, 8)).sum().backward()
        optimizer.step()
        recorder.end_epoch()
    trace = ptsim.read_trace(tmp_path / "run")
    assert trace.optimizer == "Lion"
    assert trace.run.update == UpdateCosts(num_states=1, accesses=11, fused_accesses=5)
    assert ptsim.cost(trace).memory.optimizer_bytes == 4 * trace.final_network.num_parameters


# The reference page


def test_every_setting_has_its_effect_on_the_reference_page_and_the_page_is_up_to_date():
    assert set(reference.effects()) == set(SETTINGS)
    file = Path(__file__).parents[2] / "docs" / "settings.md"
    assert file.read_text() == reference.page(), "python -m ptsim.training.reference > docs/settings.md"
