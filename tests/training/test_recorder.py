"""A recorder alone: dense runs, and runs that another library prunes."""

import copy
import pickle
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune as torch_prune

import ptsim
from ptsim.errors import TrainingError, UsageError
from ptsim.trace.schema import DeviceUse
from ptsim.training.checkpoint import Totals
from ptsim.training.formats import layout_of
from ptsim.training.measured import Unfinished
from tests.training.test_other_loops import Clock
from tests.training.test_own_loop import IMAGE, fresh, images_and_labels, one_thread, sgd  # noqa: F401 # a fixture


def train(recorder, model, optimizer, epochs=1, batches=None):
    for _ in range(epochs):
        for images, labels in recorder.data(batches or images_and_labels()):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(loss)
        recorder.end_epoch(validation_accuracy=0.25)


def test_a_dense_run_leaves_a_whole_trace_that_answers(tmp_path):
    model = fresh()
    optimizer = sgd(model)
    with ptsim.Recorder(model, optimizer, input_shape=IMAGE, record=tmp_path / "dense") as recorder:
        train(recorder, model, optimizer, epochs=2)
    trace = ptsim.read_trace(tmp_path / "dense")
    assert trace.complete
    assert not trace.is_pruned
    assert trace.end.final_accuracy == 0.25
    assert [epoch.num_images for epoch in trace.epochs] == [64, 64]
    time = trace.epochs[1].time
    named = time.data_wait_s + time.forward_s + time.backward_s + time.optimizer_s
    assert 0 < named <= time.wall_s
    assert time.regularizer_s == 0
    assert ptsim.cost(trace).parameters == sum(p.numel() for p in model.parameters())
    assert len(ptsim.simulate(trace, "aws-p3-16xlarge", [8])) == 1


def test_the_mean_loss_weighs_every_image_alike(tmp_path):
    """Mini-batches of 16 and 4 images: the mean is over images, not over mini-batches."""
    model = fresh()
    optimizer = sgd(model)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE)
    (large, labels), (small, few) = images_and_labels()[0], images_and_labels(1, 4, seed=1)[0]
    losses = []
    for images, y in ((large, labels), (small, few)):
        loss = F.cross_entropy(model(images), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recorder.step(loss)
        losses.append(loss.item())
    assert recorder.end_epoch().train_loss == pytest.approx((16 * losses[0] + 4 * losses[1]) / 20)


@pytest.mark.parametrize(("told", "weights"), [((1, 3), (1, 3)), ((None, 4), (16, 4)), ((None, None), (16, 16))])
def test_a_loss_weighs_as_many_images_as_the_loop_tells_and_else_as_were_seen(told, weights):
    model = fresh()
    optimizer = sgd(model)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE)
    losses = []
    for (images, labels), number in zip(images_and_labels(2), told, strict=True):
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        recorder.step(loss, number)
        losses.append(loss.item())
    mean = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    epoch = recorder.end_epoch()
    assert epoch.train_loss == pytest.approx(mean)
    assert epoch.num_images == 32


def test_what_a_run_has_spent_is_the_sum_of_its_sessions_and_epochs(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    model = fresh()
    recorder = ptsim.Recorder(model, sgd(model), input_shape=IMAGE)
    recorder.totals = Totals(wall_s=10.0, num_iterations=3)  # of the sessions before
    clock.passes(2.0)
    assert recorder.spend_time().wall_s == 12.0
    clock.passes(3.0)
    assert recorder._end("clean", None).wall_s == 15.0
    assert recorder.spend_time().wall_s == 15.0
    spent = recorder.totals
    uses = (None, DeviceUse(energy_j=5.0), DeviceUse(), DeviceUse(energy_j=2.5))
    for use, energy_j in zip(uses, (None, 5.0, 5.0, 7.5), strict=True):  # an epoch that nobody metered adds nothing
        spent = spent.after(SimpleNamespace(num_iterations=4, device=use))
        assert spent.energy_j == energy_j
    assert (spent.num_iterations, spent.wall_s) == (19, 15.0)


def test_data_that_nobody_described_are_as_many_images_as_the_first_epoch_has_also_in_two_parts(tmp_path):
    model = fresh()
    optimizer = sgd(model)
    with ptsim.Recorder(model, optimizer, input_shape=IMAGE, record=tmp_path) as recorder:
        recorder.continue_epoch(Unfinished(num_iterations=2, num_images=32, batch=16))
        train(recorder, model, optimizer)
    trace = ptsim.read_trace(tmp_path)
    assert trace.run.dataset.num_train == trace.epochs[0].num_images == 32 + 64


def test_validation_and_copies_are_not_part_of_the_training(tmp_path):
    model = fresh()
    optimizer = sgd(model)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE)
    teacher = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    images, labels = images_and_labels()[0]
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    teacher(images).sum().backward()
    model.eval()
    model(images)
    with torch.no_grad():
        model.train()(images)
    assert recorder.end_epoch().num_images == 16


def test_several_forward_passes_before_one_backward_are_one_pass(tmp_path):
    model = fresh()
    optimizer = sgd(model)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE)
    for images, labels in images_and_labels(2, 8):  # as a Siamese network does
        loss = F.cross_entropy(model(images), labels) + F.cross_entropy(model(images.flip(3)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    epoch = recorder.end_epoch()
    assert (epoch.num_images, epoch.num_iterations, epoch.batch_per_gpu, epoch.passes) == (32, 2, 16, 1)


class Scaled(nn.Module):
    """Takes more than images, and the images not first."""

    def __init__(self):
        super().__init__()
        self.body = fresh()

    def forward(self, images, *, scale=None, weights=None):
        logits = self.body(images)
        return logits if scale is None else logits * scale * weights[:1, None]


def test_the_images_are_counted_wherever_they_stand_among_the_arguments():
    model = Scaled()
    optimizer = sgd(model)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE)
    for images, labels in images_and_labels(2, 8):
        logits = model(scale=torch.tensor(2.0), weights=torch.ones(3), images=images)
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
    assert recorder.end_epoch().num_images == 16


def test_training_in_evaluation_mode_is_training_and_validation_with_gradients_is_not():
    """Frozen normalisation is trained in evaluation mode; a validation that forgets no_grad has no backward."""
    model = fresh().eval()
    optimizer = sgd(model)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE)
    for _ in range(2):
        for images, labels in images_and_labels():
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model(images)
        record = recorder.end_epoch()
        assert (record.num_images, record.num_iterations, record.batch_per_gpu) == (64, 4, 16)


def test_a_run_that_masks_weights_with_torch_and_removes_the_masks(tmp_path):
    """torch.nn.utils.prune keeps shapes: the trace has one network, and the zeros show as sparsity."""
    model = fresh()
    optimizer = sgd(model)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE, record=tmp_path / "run")
    train(recorder, model, optimizer)
    torch_prune.ln_structured(model.inner[0], "weight", amount=0.5, n=2, dim=0)
    torch_prune.remove(model.inner[0], "weight")
    optimizer = sgd(model, weight_decay=0.0)
    recorder.follow(optimizer=optimizer)
    for images, labels in images_and_labels(1):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        model.inner[0].weight.grad = None  # a frozen mask, as such loops have it
        optimizer.step()
    recorder.end_epoch(validation_accuracy=0.5)
    recorder.close()
    trace = ptsim.read_trace(tmp_path / "run")
    density = {d.layer: d for d in trace.epochs[1].densities}["inner.0"]
    assert density.output_channels == 0.5
    assert trace.epochs[1].channel_sparsity == pytest.approx(4 / (8 + 8 + 8 + 12 + 10))
    weights = 9 * (3 * 8 + 8 * 8 + 8 * 8 + 8 * 12) + 12 * 10  # and hardly one in a thousand happens to be near zero
    assert trace.epochs[1].weight_sparsity == pytest.approx(4 * 9 * 8 / weights, abs=0.005)
    assert len(trace.networks) == 1
    assert ptsim.cost(trace).parameters == sum(p.numel() for p in model.parameters())
    assert len(ptsim.simulate(trace, "aws-p3-16xlarge", [8])) == 1


def narrowed(model):
    """By hand what pruning libraries do: four channels of the inner width go, parameters are new objects."""
    first, norm, last = model.inner[0], model.inner[1], model.inner[3]
    first.weight, first.out_channels = nn.Parameter(first.weight[:4].detach().clone()), 4
    model.inner[1] = nn.BatchNorm2d(4)
    last.weight, last.in_channels = nn.Parameter(last.weight[:, :4].detach().clone()), 4
    assert norm.num_features == 8


def test_a_network_that_somebody_else_has_cut_is_recorded_with_the_change(tmp_path):
    model = fresh()
    optimizer = sgd(model)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE, record=tmp_path / "run")
    train(recorder, model, optimizer, epochs=2)
    narrowed(model)
    optimizer = sgd(model)
    recorder.follow(optimizer=optimizer)
    train(recorder, model, optimizer)
    recorder.close()
    trace = ptsim.read_trace(tmp_path / "run")
    (event,) = trace.reconfigurations
    assert (event.epoch, event.channels_removed, event.measured_duration_s) == (1, 4, None)
    assert [e.architecture for e in trace.epochs] == [event.before, event.before, event.after]
    assert ptsim.cost(trace).parameters == sum(p.numel() for p in model.parameters())
    assert trace.is_pruned


def test_a_dense_run_that_frees_a_layer_between_two_epochs_is_no_pruned_one(tmp_path):
    model = fresh()
    model.stem.requires_grad_(False)
    optimizer = sgd(model)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE, record=tmp_path)
    train(recorder, model, optimizer)
    model.stem.requires_grad_(True)
    train(recorder, model, optimizer)
    recorder.close()
    trace = ptsim.read_trace(tmp_path)
    (event,) = trace.reconfigurations
    assert (event.channels_removed, event.layers_removed) == (0, ())
    assert not trace.is_pruned


def test_an_optimizer_that_nobody_told_the_recorder_of_is_said(tmp_path):
    model = fresh()
    recorder = ptsim.Recorder(model, sgd(model), input_shape=IMAGE)
    other = sgd(model)
    for images, labels in images_and_labels():
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        other.step()
    with pytest.warns(UserWarning, match="the recorder's optimizer has not stepped in this epoch"):
        record = recorder.end_epoch()
    assert (record.num_iterations, record.num_images) == (4, 64)


@pytest.mark.slow
def test_torch_pruning_prunes_and_the_recorder_records(tmp_path):
    tp = pytest.importorskip("torch_pruning", reason="Torch-Pruning is not installed")
    model = fresh()
    optimizer = sgd(model)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE, record=tmp_path / "run")
    train(recorder, model, optimizer)
    pruner = tp.pruner.MagnitudePruner(
        model, torch.rand(2, *IMAGE), importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5,
        ignored_layers=[model.fc],
    )  # fmt: skip
    pruner.step()
    optimizer = sgd(model)
    recorder.follow(optimizer=optimizer)
    train(recorder, model, optimizer)
    recorder.close()
    trace = ptsim.read_trace(tmp_path / "run")
    assert len(trace.networks) == 2
    assert trace.reconfigurations[0].channels_removed == (8 + 8 + 8 + 12) // 2
    assert ptsim.cost(trace).parameters == sum(p.numel() for p in model.parameters())
    assert len(ptsim.simulate(trace, "aws-p3-16xlarge", [8])) == 1
    page = ptsim.write_report([tmp_path / "run"], tmp_path / "report", cluster="aws-p3-16xlarge", gpus=[1, 8])
    assert "Small" in page.read_text(encoding="utf-8")


def test_a_recorder_that_nobody_closes_ends_its_trace_when_the_program_ends(tmp_path):
    script = tmp_path / "loop.py"
    script.write_text(
        "import sys, torch, ptsim\n"
        "from tests.training.test_own_loop import fresh, sgd, images_and_labels, IMAGE\n"
        "from tests.training.test_recorder import train\n"
        "torch.set_num_threads(1)\n"
        "model = fresh(); optimizer = sgd(model)\n"
        "recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE, record=sys.argv[1])\n"
        "train(recorder, model, optimizer)\n"
        "if sys.argv[2] == 'fails': raise SystemExit(str(1 / 0))\n"
    )
    root = Path(__file__).parents[2]
    for how, complete in (("ends", True), ("fails", False)):
        folder = tmp_path / how
        subprocess.run(
            [sys.executable, str(script), str(folder), how], cwd=root, env={"PYTHONPATH": str(root)}, check=False
        )
        trace = ptsim.read_trace(folder)
        assert (len(trace.epochs), trace.complete) == (1, complete)


def test_a_mini_batch_that_is_told_may_shrink_from_one_epoch_to_the_next():
    model = fresh()
    optimizer = sgd(model)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE)
    for size in (16, 8):
        for images, labels in images_and_labels(2, size):
            loss = F.cross_entropy(model.forward(images), labels)  # past the hooks
            optimizer.zero_grad()
            loss.backward()
            recorder.step(loss, num_images=size)
            optimizer.step()
        epoch = recorder.end_epoch()
        assert (epoch.batch_per_gpu, epoch.passes, epoch.num_images) == (size, 1, 2 * size)


class Functional(nn.Module):
    """Its weight is in no layer of torch."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(10, 3))

    def forward(self, images):
        return F.linear(images.mean((2, 3)), self.matrix)


def test_a_network_without_layers_of_torch_is_recorded_as_dense(tmp_path):
    model = Functional()
    optimizer = sgd(model)
    with ptsim.Recorder(model, optimizer, input_shape=IMAGE, record=tmp_path) as recorder:
        train(recorder, model, optimizer)
    (epoch,) = ptsim.read_trace(tmp_path).epochs
    assert (epoch.channel_sparsity, epoch.weight_sparsity) == (0, 0)


def test_hyperparameters_that_no_file_holds_are_written_as_text(tmp_path):
    model = fresh()
    optimizer = sgd(model)
    told = {"smoothing": np.float32(0.5), "sizes": torch.tensor([1, 2]), "data": Path("x"), "loss": F.cross_entropy}
    recorder = ptsim.Recorder(
        model, optimizer, input_shape=IMAGE, record=tmp_path, facts=ptsim.RunFacts(hyperparameters=told),
        settings={"best": float("inf"), "epochs": np.int64(3)},
    )  # fmt: skip
    train(recorder, model, optimizer)
    recorder.close()
    found = ptsim.read_trace(tmp_path).run.hyperparameters
    assert (found["smoothing"], found["sizes"], found["data"]) == (0.5, [1, 2], "x")
    assert (found["best"], found["epochs"]) == ("inf", 3)
    assert found["loss"].startswith("<function cross_entropy")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"epochs": 90.0}, r"^settings\.epochs is 90\.0, expected a whole number"),
        ({"momentum": -1}, r"^settings\.momentum is out of range"),
        ([("lr", 0.1)], "^settings is a list, expected a dict"),
    ],
)
def test_settings_with_which_no_trace_could_be_read_are_refused_before_anything_is_trained(settings, problem):
    model = fresh()
    with pytest.raises(UsageError, match=problem):
        ptsim.Recorder(model, sgd(model), input_shape=IMAGE, settings=settings)


@pytest.mark.parametrize(
    ("images", "layout"),
    [
        (torch.zeros(2, 3, 4, 4), "contiguous"),
        (torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last), "channels_last"),
        (torch.zeros(2, 1, 4, 4).to(memory_format=torch.channels_last), "contiguous"),  # one channel lies both ways
        (torch.zeros(2, 3, 4, 5).transpose(2, 3), "contiguous"),
        (torch.zeros(2, 3), "contiguous"),
    ],
)
def test_the_layout_of_images_is_channels_last_where_they_lie_so_and_not_otherwise(images, layout):
    assert layout_of(images) == layout


def test_a_network_that_is_moved_after_its_recorder_was_made_is_named():
    model = fresh()
    recorder = ptsim.Recorder(model, sgd(model), input_shape=IMAGE)
    model.to("meta")
    with pytest.raises(UsageError, match="the network was moved from cpu to meta after its Recorder") as caught:
        model(torch.empty(2, *IMAGE, device="meta"))
    assert caught.value.hint == "model.to(device) first"
    recorder.close()


def test_a_mini_batch_that_is_told_as_text_hides_no_profile(tmp_path):
    model = fresh()
    optimizer = sgd(model)
    facts = ptsim.RunFacts(hyperparameters={"batch": "sixteen"})
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE, record=tmp_path, profile=True, facts=facts)
    train(recorder, model, optimizer, batches=images_and_labels(1))
    recorder.close()
    (profile,) = ptsim.read_trace(tmp_path).profiles
    assert profile.batch == 16


def test_a_network_that_somebody_widens_has_lost_nothing(tmp_path):
    model = fresh()
    optimizer = sgd(model)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE, record=tmp_path)
    train(recorder, model, optimizer, batches=images_and_labels(1))
    model.fc = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 10))
    optimizer = sgd(model)
    recorder.follow(optimizer=optimizer)
    train(recorder, model, optimizer, batches=images_and_labels(1))
    recorder.close()
    assert [epoch.channel_sparsity for epoch in ptsim.read_trace(tmp_path).epochs] == [0, 0]


def test_misuse_is_one_sentence(tmp_path):
    model = fresh()
    optimizer = sgd(model)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE, record=tmp_path / "run")
    with pytest.raises(UsageError, match="without a training step since the last one"):
        recorder.end_epoch()
    with pytest.raises(UsageError, match="holds another network"):
        recorder.follow(fresh())
    train(recorder, model, optimizer)
    recorder.close()
    with pytest.raises(UsageError, match="the recorder is closed"):
        recorder.end_epoch()
    again = ptsim.Recorder(model, optimizer, input_shape=IMAGE, record=tmp_path / "run")
    with pytest.raises(UsageError, match="holds the trace of another run"):
        train(again, model, optimizer)


def test_a_trace_that_could_not_be_opened_is_tried_again_at_the_next_epoch(tmp_path):
    """And not given up: both epochs' updates are in the one that is recorded."""
    model = fresh()
    optimizer = sgd(model)
    in_the_way = tmp_path / "runs"
    in_the_way.write_text("a file where the folder should be")
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE, record=in_the_way / "mine")
    with pytest.raises(TrainingError, match="runs"):
        train(recorder, model, optimizer)
    in_the_way.unlink()
    train(recorder, model, optimizer)
    recorder.close()
    (epoch,) = ptsim.read_trace(in_the_way / "mine").epochs
    assert epoch.num_images == 2 * 64
