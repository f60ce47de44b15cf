import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import ptsim
from ptsim.cli.main import run as command
from ptsim.errors import (
    FileFormatError,
    MissingMeasurementError,
    TrainingError,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
)
from ptsim.prune.criteria.group_lasso import GroupLasso
from ptsim.prune.groups import find_groups
from ptsim.training import loop, profiling, pruning, step
from ptsim.training.config import Config
from ptsim.training.interruption import interruptible
from ptsim.training.storing import Storage
from tests.training.nets import small
from tests.training.runs import NETS, settings


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pruned_run(tmp_path_factory):
    """A run of six epochs with three reconfigurations."""
    folder = tmp_path_factory.mktemp("runs") / "pruned"
    return ptsim.train(settings(record_channel_maxima=True), out=folder)


def test_a_run_leaves_a_trace_that_is_whole_and_consistent(pruned_run):
    trace = ptsim.read_trace(pruned_run.trace)
    assert trace.complete
    assert [epoch.epoch for epoch in trace.epochs] == list(range(6))
    assert trace.end.final_accuracy == pruned_run.final_accuracy
    assert trace.end.num_iterations == 36  # 96 images in mini-batches of 16, six times
    assert trace.run.hyperparameters["penalty_ratio"] == 0.5
    assert [r.epoch for r in trace.reconfigurations] == [1, 3, 5]
    for epoch in trace.epochs:
        parts = epoch.time
        named = parts.data_wait_s + parts.forward_s + parts.backward_s + parts.regularizer_s + parts.optimizer_s
        assert 0 < named <= parts.wall_s
        assert epoch.channel_maxima is not None


def test_channels_really_go_and_every_new_architecture_is_described_and_profiled_once(pruned_run):
    trace = ptsim.read_trace(pruned_run.trace)
    assert sum(r.channels_removed for r in trace.reconfigurations) > 0
    sizes = [trace.network_of(epoch).num_parameters for epoch in trace.epochs]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
    profiled = [profile.architecture for profile in trace.profiles]
    trained = {epoch.architecture for epoch in trace.epochs}
    assert len(profiled) == len(set(profiled))
    assert set(profiled) == trained


def test_sparsity_counts_what_is_removed(pruned_run):
    trace = ptsim.read_trace(pruned_run.trace)
    last = trace.epochs[-1]
    network = trace.network_of(last)
    dense = sum(d.output_channels * network.layer(d.layer).out_channels for d in last.densities)
    first = trace.network_of(trace.epochs[0])
    total = sum(first.layer(d.layer).out_channels for d in trace.epochs[0].densities)
    assert last.channel_sparsity == pytest.approx(1 - dense / total)


def test_the_penalty_coefficient_is_equation_3_at_the_first_mini_batch(tmp_path):
    """r = λR/(ℓ₀ + λR), with R and ℓ₀ computed here from the same seed."""
    made = settings(epochs=1, penalty_ratio=0.3, profile=False)
    result = ptsim.train(made, out=tmp_path / "run")
    torch.manual_seed(0)
    model = ptsim.zoo.create(made["model"], num_classes=10)
    config = loop.resolve(loop.make_config(made), device="cpu")
    data = loop.load_data(config, input_shape=(3, 32, 32), device=torch.device("cpu"))
    images, labels = next(data.training_batches(0, 16, loop.Team(device=torch.device("cpu")).share))
    loss = F.cross_entropy(model.train()(images), labels).item()
    penalty = result.penalty_coefficient * GroupLasso(model, find_groups(model, (3, 8, 8))).value().item()
    assert penalty / (loss + penalty) == pytest.approx(0.3, rel=1e-5)


def test_the_penalty_coefficient_is_that_of_the_first_mini_batch_also_after_dense_pre_training(tmp_path):
    made = settings(epochs=2, profile=False, schedule="ssl", pretrain_epochs=1)
    del made["interval"]
    after_training = ptsim.train(made, out=tmp_path / "ssl").penalty_coefficient
    at_once = ptsim.train(settings(epochs=1, profile=False), out=tmp_path / "continuous").penalty_coefficient
    assert after_training == at_once > 0


def test_a_dense_run_changes_no_shape_and_has_no_penalty(tmp_path):
    changes = {"penalty_ratio": 0.0, "epochs": 2}
    made = {k: v for k, v in settings(**changes).items() if k not in ("interval", "threshold")}
    result = ptsim.train(made, out=tmp_path / "run")
    trace = ptsim.read_trace(result.trace)
    assert result.penalty_coefficient == 0.0
    assert (len(trace.networks), trace.reconfigurations) == (1, ())


@pytest.mark.parametrize("decay", [0.0, 0.75])
def test_a_run_equals_a_training_loop_written_out_by_hand(tmp_path, decay):
    """SGD with momentum and weight decay plus autograd's gradient of λ times the penalty, for three epochs."""
    made = settings(epochs=3, interval=100, threshold=1e-12, profile=False, model=f"{NETS}:plain", lr_milestones=[2])
    made["ema_decay"] = decay
    result = ptsim.train(made, out=tmp_path / "run")
    torch.manual_seed(0)
    model = ptsim.zoo.create(made["model"], num_classes=10)
    config = loop.resolve(loop.make_config(made), device="cpu")
    data = loop.load_data(config, input_shape=(3, 32, 32), device=torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    averages = [parameter.detach().clone() for parameter in model.parameters()]
    lasso = GroupLasso(model, find_groups(model, (3, 8, 8)))
    losses = []
    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = 0.05 if epoch < 2 else 0.005
        for images, labels in data.training_batches(epoch, 16, loop.Team(device=torch.device("cpu")).share):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            (loss + result.penalty_coefficient * lasso.penalty()).backward()
            optimizer.step()
            losses.append(loss.item())
            averages = [decay * a + (1 - decay) * p.detach() for a, p in zip(averages, model.parameters(), strict=True)]
    trained = ptsim.load_model(result.folder, trust=True)
    for (name, ours), theirs in zip(trained.named_parameters(), averages, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-4, atol=1e-6, msg=name)
    first, *_, last = ptsim.read_trace(result.trace).epochs
    assert first.train_loss == pytest.approx(sum(losses[:6]) / 6, rel=1e-6)
    assert last.penalty == pytest.approx(result.penalty_coefficient * lasso.value().item(), rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adam", "lr": 0.01, "ema_decay": 0.9},
        {"optimizer": "adamw", "lr": 0.01},
        {"optimizer": "rmsprop", "lr": 0.001, "momentum": 0.5},
        {"nesterov": True, "regularizer": "proximal"},
        {"schedule": "one_time", "reconfigure_epoch": 2},
        {"schedule": "ssl", "pretrain_epochs": 1, "finetune_epochs": 1},
        {"precision": "bf16", "memory_format": "channels_last"},
        {"channel_multiple": 4},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_way_to_train_prunes_and_ends_clean(tmp_path, changes):
    made = settings(epochs=4, profile=False) | changes
    if made.get("schedule") in ("one_time", "ssl"):
        del made["interval"]
    result = ptsim.train(made, out=tmp_path / "run")
    trace = ptsim.read_trace(result.trace)
    assert trace.complete
    assert all(math.isfinite(epoch.train_loss) for epoch in trace.epochs)
    assert len(trace.reconfigurations) == (1 if "schedule" in made else 2)
    assert sum(r.channels_removed for r in trace.reconfigurations) > 0
    assert ptsim.load_model(result.folder, trust=True)(torch.zeros(1, 3, 8, 8)).shape == (1, 10)


def test_with_an_average_of_the_weights_validation_judges_the_average(tmp_path):
    made = settings(epochs=1, ema_decay=0.999999, profile=False, penalty_ratio=0.0)
    del made["interval"], made["threshold"]
    trace = ptsim.read_trace(ptsim.train(made, out=tmp_path / "run").trace)
    assert trace.epochs[0].validation_loss == pytest.approx(math.log(10), abs=0.6)  # as at the start
    assert trace.epochs[0].train_loss < trace.epochs[0].validation_loss + 1
    model = ptsim.load_model(tmp_path / "run", trust=True)  # and hands it over: it has hardly moved
    torch.manual_seed(0)
    initial = ptsim.zoo.create(made["model"], num_classes=10)
    for ours, theirs in zip(model.parameters(), initial.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    stored = tmp_path / "run" / "checkpoints" / "epoch-0000"
    given, state = (load_file(stored / name) for name in ("weights.safetensors", "state.safetensors"))
    statistics = [name for name in given if "running" in name]
    assert statistics  # which are averages already
    assert all(torch.equal(given[name], state[f"trained/{name}"]) for name in statistics)


def test_where_nothing_fits_beside_training_the_profile_is_left_out_with_a_warning(tmp_path, monkeypatch):
    def no_room(*_, **__):
        raise MissingMeasurementError("a second copy does not fit")

    monkeypatch.setattr(profiling, "profile_network", no_room)
    with pytest.warns(UserWarning, match="no profile of the architecture .*: a second copy does not fit"):
        result = ptsim.train(settings(epochs=1), out=tmp_path / "run")
    trace = ptsim.read_trace(result.trace)
    assert trace.complete
    assert trace.profiles == ()


@pytest.mark.parametrize("seed", [20_261_122, 2**63 - 1])
def test_large_seeds_are_seeds(tmp_path, seed):
    assert ptsim.train(settings(epochs=1, profile=False, seed=seed), out=tmp_path / "run").epochs == 1


def test_a_compiled_network_is_compiled_once_per_architecture(tmp_path):
    from torch._dynamo.utils import counters

    counters.clear()
    made = settings(compile=True, compile_backend="aot_eager", profile=False)
    trace = ptsim.read_trace(ptsim.train(made, out=tmp_path / "run").trace)
    trained = {epoch.architecture for epoch in trace.epochs}
    assert len(trained) > 1
    assert counters["stats"]["unique_graphs"] == len(trained)


def test_a_mini_batch_that_grows_without_pruning_is_compiled_anew(tmp_path):
    made = settings(compile=True, compile_backend="aot_eager", profile=False, epochs=4, threshold=1e-12)
    growth = {"dynamic_batch": True, "memory_budget": "1 GiB", "batch_granularity": 16, "max_batch": 32}
    trace = ptsim.read_trace(ptsim.train(made | growth, out=tmp_path / "run").trace)
    assert [epoch.batch_per_gpu for epoch in trace.epochs] == [16, 16, 32, 32]
    assert len(trace.networks) == 1


def test_the_mini_batch_grows_into_the_freed_memory_and_the_rate_with_it(tmp_path):
    made = settings(dynamic_batch=True, memory_budget="1 B", batch_granularity=8, max_batch=32, profile=False)
    stays = ptsim.read_trace(ptsim.train(made, out=tmp_path / "small").trace)
    assert {epoch.batch_per_gpu for epoch in stays.epochs} == {16}  # never below what it began with
    grows = ptsim.read_trace(ptsim.train(made | {"memory_budget": "1 GiB"}, out=tmp_path / "large").trace)
    assert [epoch.batch_per_gpu for epoch in grows.epochs] == [16, 16, 32, 32, 32, 32]
    assert [epoch.num_iterations for epoch in grows.epochs] == [6, 6, 3, 3, 3, 3]
    assert grows.epochs[2].learning_rate == pytest.approx(2 * 0.05)
    first = grows.reconfigurations[0]
    assert (first.batch_before, first.batch_after, first.learning_rate_scale) == (16, 32, 2.0)
    assert first.predicted_memory_bytes > 0
    rooted = ptsim.read_trace(
        ptsim.train(made | {"memory_budget": "1 GiB", "lr_rule": "sqrt"}, out=tmp_path / "root").trace
    )
    assert rooted.epochs[2].learning_rate == pytest.approx(math.sqrt(2) * 0.05)


def test_a_run_whose_mini_batch_grew_is_predicted_from_profiles_at_the_new_one(tmp_path):
    growth = {"dynamic_batch": True, "memory_budget": "1 GiB", "batch_granularity": 16, "max_batch": 32}
    for name, threshold in (("shrinks", 0.12), ("keeps its network", 1e-12)):
        made = settings(epochs=4, threshold=threshold, **growth)
        trace = ptsim.read_trace(ptsim.train(made, out=tmp_path / name).trace)
        profiled = [(profile.architecture, profile.batch) for profile in trace.profiles]
        assert profiled == list(dict.fromkeys((epoch.architecture, epoch.batch_per_gpu) for epoch in trace.epochs))
        assert [batch for _, batch in profiled] == [16, 32]
        assert ptsim.validate([trace]).tiers == ("measured",)


def test_a_run_that_is_given_more_epochs_profiles_the_network_that_was_not_to_be_trained(tmp_path):
    folder = ptsim.train(settings(epochs=2), out=tmp_path / "run").folder
    assert len(ptsim.read_trace(folder).profiles) == 1
    trace = ptsim.read_trace(ptsim.train({"epochs": 4}, resume=folder).trace)
    assert [p.architecture for p in trace.profiles] == list(dict.fromkeys(e.architecture for e in trace.epochs))
    assert len(trace.profiles) == 2
    assert ptsim.validate([trace]).tiers == ("measured",)


def test_where_a_copy_does_not_fit_with_a_grown_mini_batch_the_profile_is_at_the_one_before(tmp_path, monkeypatch):
    original = profiling.profile_network

    def little_room(*arguments, batch, **more):
        if batch > 16:
            raise MissingMeasurementError("a second copy does not fit")
        return original(*arguments, batch=batch, **more)

    monkeypatch.setattr(profiling, "profile_network", little_room)
    growth = {"dynamic_batch": True, "memory_budget": "1 GiB", "batch_granularity": 16, "max_batch": 32}
    trace = ptsim.read_trace(ptsim.train(settings(epochs=4, **growth), out=tmp_path / "run").trace)
    assert trace.epochs[-1].batch_per_gpu == 32
    assert [profile.batch for profile in trace.profiles] == [16, 16]


def test_a_mini_batch_that_does_not_fit_steps_back_and_the_run_is_as_if_it_had_never_been_tried(tmp_path):
    made = settings(model=f"{NETS}:hungry", dynamic_batch=True, memory_budget="1 GiB", batch_granularity=4, epochs=4)
    tried = ptsim.train(made | {"max_batch": 32, "profile": False}, out=tmp_path / "tried")  # more than 24 do not fit
    limited = ptsim.train(made | {"max_batch": 24, "profile": False}, out=tmp_path / "limited")
    traces = [ptsim.read_trace(run.trace) for run in (tried, limited)]
    assert [epoch.batch_per_gpu for epoch in traces[0].epochs] == [16, 16, 24, 24]
    assert [e.train_loss for e in traces[0].epochs] == [e.train_loss for e in traces[1].epochs]
    stored = [
        (run.folder / "checkpoints" / "epoch-0003" / "state.safetensors").read_bytes() for run in (tried, limited)
    ]
    assert stored[0] == stored[1]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")]
)
def test_running_out_of_memory_in_an_epoch_begins_it_again_with_a_smaller_mini_batch(tmp_path, monkeypatch, error):
    """An error that a CPU cannot have, raised in the third iteration of every epoch with 32 images."""
    original = loop.train_epoch

    def train_epoch(learner, batches, *arguments, **options):
        def limited():
            for index, batch in enumerate(batches):
                if index == 2 and len(batch[1]) > 24:
                    raise error
                yield batch

        return original(learner, limited(), *arguments, **options)

    monkeypatch.setattr(loop, "train_epoch", train_epoch)
    made = settings(dynamic_batch=True, memory_budget="1 GiB", batch_granularity=8, max_batch=32)
    trace = ptsim.read_trace(ptsim.train(made | {"epochs": 3}, out=tmp_path / "run").trace)
    assert trace.complete
    assert [epoch.batch_per_gpu for epoch in trace.epochs] == [16, 16, 24]
    back = trace.reconfigurations[1]
    assert (back.batch_before, back.batch_after, back.learning_rate_scale) == (32, 24, 1.5)
    assert "out of memory with 32 images" in back.notes[0]
    assert [profile.batch for profile in trace.profiles] == [16, 32, 24]


def test_stepping_back_holds_nothing_of_the_pass_that_ran_out_of_memory(tmp_path, monkeypatch):
    """What a failed pass has allocated is the memory that the state before it needs."""
    trial, activations, alive = [], [], []
    cross_entropy, restore = torch.nn.functional.cross_entropy, Storage.restore

    def failing(logits, labels, **_):
        if logits.requires_grad and len(labels) == 32 and not activations:
            trial.append(None)
            if len(trial) == 2:  # the first is the trial at the reconfiguration
                activations.append(weakref.ref(logits))
                raise torch.OutOfMemoryError("CUDA out of memory")
        return cross_entropy(logits, labels)

    def restored(storage, make):
        alive.append(activations[0]() is not None)
        return restore(storage, make)

    monkeypatch.setattr(step, "F", SimpleNamespace(cross_entropy=failing))
    monkeypatch.setattr(Storage, "restore", restored)
    made = settings(dynamic_batch=True, memory_budget="1 GiB", batch_granularity=8, max_batch=32, profile=False)
    trace = ptsim.read_trace(ptsim.train(made | {"epochs": 3}, out=tmp_path / "run").trace)
    assert [epoch.batch_per_gpu for epoch in trace.epochs] == [16, 16, 24]
    assert alive == [False]


def test_pruning_that_runs_out_of_memory_leaves_every_epoch_once_in_the_trace(tmp_path, monkeypatch):
    prune, calls = pruning.PruneTrain.prune, []

    def failing(pruner):
        calls.append(pruner.recorder.epoch)
        if len(calls) == 2:  # the mini-batch has grown, and the epoch is recorded already
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prune(pruner)

    monkeypatch.setattr(pruning.PruneTrain, "prune", failing)
    made = settings(dynamic_batch=True, memory_budget="1 GiB", batch_granularity=8, max_batch=32, profile=False)
    trace = ptsim.read_trace(ptsim.train(made, out=tmp_path / "run").trace)
    assert trace.complete
    assert [epoch.epoch for epoch in trace.epochs] == [0, 1, 2, 3, 4, 5]
    assert any("out of memory" in note for r in trace.reconfigurations for note in r.notes)


def test_a_first_mini_batch_that_does_not_fit_is_said_and_ends_the_trace(tmp_path):
    with pytest.raises(TrainingError, match="a mini-batch of 32 needs more memory than cpu has left"):
        ptsim.train(settings(model=f"{NETS}:hungry", batch=32, profile=False), out=tmp_path / "run")
    assert ptsim.read_trace(tmp_path / "run").end.status == "failed"


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("bf16", True)])
def test_backward_runs_with_the_tf32_switches_of_the_precision(tmp_path, monkeypatch, precision, allowed):
    seen = set()
    original = torch.Tensor.backward

    def backward(self, *arguments, **options):
        seen.add((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        original(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    ptsim.train(settings(epochs=1, precision=precision, profile=False), out=tmp_path / "run")
    assert seen == {(allowed, allowed)}
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


# What is stored


def test_any_stored_epoch_is_rebuilt_in_a_fresh_process_with_its_weights(pruned_run):
    """Validation accuracy of the loaded networks equals what the trace says."""
    script = f"""
import torch, ptsim
from ptsim.training import loop, runfolder
config = runfolder.recorded_config(loop.Path({str(pruned_run.folder)!r}))
data = loop.load_data(config, input_shape=(3, 32, 32), device=torch.device("cpu"))
for epoch in (2, 4, None):
    model = ptsim.load_model({str(pruned_run.folder)!r}, epoch, trust=True)
    batches = data.validation_batches(64, loop.Team(device="cpu").share)
    print(sum((model(x).argmax(1) == y).sum().item() for x, y in batches) / 512)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    trace = ptsim.read_trace(pruned_run.trace)
    expected = [trace.epochs[2].validation_accuracy, trace.epochs[4].validation_accuracy, pruned_run.final_accuracy]
    assert [float(line) for line in done.stdout.split()] == expected


def test_an_epoch_that_is_not_stored_lists_those_that_are(pruned_run):
    with pytest.raises(UsageError, match=r"no checkpoint of epoch 77; stored: .*5"):
        ptsim.load_model(pruned_run.folder, 77, trust=True)
    with pytest.raises(UsageError, match="holds no run"):
        ptsim.load_model(pruned_run.folder / "checkpoints", trust=True)


def test_nothing_in_a_run_folder_is_a_pickle(pruned_run):
    files = [path for path in pruned_run.folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")


def test_torchvision_models_train_and_load(tmp_path):
    made = settings(model="torchvision:mobilenet_v3_small", epochs=1, profile=False, image_size=32)
    result = ptsim.train(made, out=tmp_path / "run")
    assert ptsim.load_model(result.folder, trust=True)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


# Wrong input


def no_files(folder):
    return not folder.exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "resnet21"}, UnknownNameError, "unknown model 'resnet21'"),
        ({"dataset": "mnist"}, UnknownNameError, "unknown data set 'mnist'"),
        ({"device": "tpu"}, UsageError, "unknown device 'tpu'"),
        ({"dataset": "imagefolder", "data_dir": "nowhere"}, UsageError, "there is no data folder nowhere"),
        ({"model": f"{NETS}:nothing"}, UnknownNameError, "unknown function"),
        ({"model": f"{NETS}:untraceable"}, UnsupportedModelError, "torch.fx cannot trace Branching"),
        ({"model": "vgg11"}, UsageError, "'vgg11' does not take images of 3×8×8"),
        ({"penalty_ratio": 1.5}, UsageError, "penalty_ratio"),
        ({"interval": 0}, UsageError, "interval"),
        ({"batch": 97}, UsageError, "mini-batch of 97 is larger than the data set"),
        (
            {"batch": 1, "image_size": 1},
            UsageError,
            "cannot be trained on one image at a time: Expected",
        ),
        ({"sync_batch_norm": True}, UsageError, "needs CUDA"),
        ({"no_such": 1}, UnknownNameError, "unknown setting"),
        ({"seed": 2**63}, UsageError, "seed"),
        ({"model": f"{NETS}:failing"}, UsageError, "does not take images of 3×8×8: a tensor is no list"),
    ],
    ids=lambda value: str(next(iter(value.items()))) if isinstance(value, dict) else "",
)
def test_wrong_input_is_one_sentence_and_writes_nothing(tmp_path, changes, error, message):
    folder = tmp_path / "run"
    with pytest.raises(error, match=message) as caught:
        ptsim.train(settings(**changes), out=folder)
    assert "\n" not in caught.value.message
    assert no_files(folder)


def test_a_configuration_that_nobody_has_checked_is_checked(tmp_path):
    for wrong, says in (({"epochs": 0}, "'epochs' is 0"), ({"batch": 97}, "mini-batch of 97 is larger")):
        with pytest.raises(UsageError, match=says):
            ptsim.train(Config(**settings(**wrong)), out=tmp_path / "run")
    assert no_files(tmp_path / "run")
    assert ptsim.train(Config(**settings(epochs=1, profile=False)), out=tmp_path / "run").epochs == 1


def test_a_class_count_that_does_not_fit_is_said(tmp_path):
    file = tmp_path / "net.py"
    file.write_text("from torch import nn\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten())\n")
    with pytest.raises(UsageError, match=r"gives \(4,\) for an image, but the data set has 10 classes"):
        ptsim.train(settings(model=f"{file}:net"), out=tmp_path / "run")
    assert no_files(tmp_path / "run")


def test_an_output_folder_that_holds_another_run_is_refused_and_left_alone(pruned_run):
    before = pruned_run.trace.read_bytes()
    with pytest.raises(UsageError, match="holds another run") as caught:
        ptsim.train(settings(), out=pruned_run.folder)
    assert "--resume" in caught.value.hint
    assert pruned_run.trace.read_bytes() == before


def test_a_loss_that_becomes_nan_stops_the_run_says_when_and_keeps_the_last_good_state(tmp_path):
    # Six iterations an epoch: the ninth iteration of the run is iteration 2 of epoch 1.
    made = settings(model=f"{NETS}:exploding", profile=False)
    changed = NETS.read_text().replace("NAN_AT = 5", "NAN_AT = 8")
    (tmp_path / "nets.py").write_text(changed)
    made["model"] = f"{tmp_path / 'nets.py'}:exploding"
    with pytest.raises(TrainingError, match="not a finite number since iteration 2 of epoch 1"):
        ptsim.train(made, out=tmp_path / "run")
    trace = ptsim.read_trace(tmp_path / "run")
    assert (trace.end.status, trace.end.epochs) == ("failed", 1)
    assert "iteration 2 of epoch 1" in trace.end.reason
    good = ptsim.load_model(tmp_path / "run", 0, trust=True)
    assert all(parameter.isfinite().all() for parameter in good.parameters())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_trace_interrupted_and_the_run_can_go_on(tmp_path, number):
    made = settings(epochs=400, profile=False, interval=200)
    folder = tmp_path / "run"

    def interrupt():
        while not (folder / "checkpoints" / "epoch-0001").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        ptsim.train(made, out=folder)
    thread.join()
    trace = ptsim.read_trace(folder)
    assert (trace.end.status, trace.end.reason) == ("interrupted", number.name)
    assert 2 <= trace.end.epochs < 400
    result = ptsim.train({"epochs": trace.end.epochs + 2}, resume=folder)
    assert result.epochs == trace.end.epochs + 2
    assert ptsim.read_trace(folder).complete


def test_a_signal_that_ends_the_loaders_processes_interrupts_the_run(tmp_path):
    """As SLURM sends it: to every process of a job."""
    images = torch.utils.data.TensorDataset(torch.rand(32, 3, 8, 8), torch.arange(32) % 10)

    def collate(items):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")

    made = {"epochs": 2, "batch": 8, "num_workers": 0, "profile": False, "device": "cpu"}
    with pytest.raises(loop.TrainingInterrupted, match="SIGTERM"):
        ptsim.train(made, model=small(10), data=(images, images), collate=collate, out=tmp_path / "run")
    end = ptsim.read_trace(tmp_path / "run").end
    assert (end.status, end.reason) == ("interrupted", "SIGTERM")


@pytest.mark.parametrize(("epoch", "last"), [(1, False), (2, True)])
def test_a_signal_during_validation_costs_no_epoch(tmp_path, monkeypatch, epoch, last):
    validate, calls = loop.validate, []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == epoch + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(*arguments)

    monkeypatch.setattr(loop, "validate", interrupted)
    made = settings(epochs=3, profile=False, threshold=1e-9)
    if last:  # the run is over, whatever the signal wants
        assert ptsim.train(made, out=tmp_path / "run").epochs == 3
    else:
        with pytest.raises(loop.TrainingInterrupted, match="SIGTERM"):
            ptsim.train(made, out=tmp_path / "run")
    trace = ptsim.read_trace(tmp_path / "run")
    assert (trace.end.epochs, trace.complete) == (epoch + 1, last)
    assert (tmp_path / "run" / "checkpoints" / f"epoch-000{epoch}" / "state.safetensors").exists()
    assert ptsim.train(resume=tmp_path / "run").epochs == 3


def test_a_process_that_loads_data_leaves_ctrl_c_to_the_one_that_trains(capfd):
    with interruptible() as interruption:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(interruption.asked is not None)
        assert os.waitpid(child, 0)[1] == 0
    assert capfd.readouterr().err == ""


# Mixed precision


class Coarse(torch.amp.GradScaler):
    """Begins with a scale at which the gradients of the first updates are infinite in fp16."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, init_scale=2.0**22, **named)


class Gentle(torch.amp.GradScaler):
    """Begins with a scale at which no gradient of a tiny network is infinite in fp16."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, init_scale=2.0**10, **named)


def test_gradients_are_clipped_as_they_are_without_the_scale_of_the_loss(tmp_path, monkeypatch):
    """An epoch without the penalty and one with it: no gradient is as long as 100, with the scale of 1024 all are."""
    monkeypatch.setattr(torch.amp, "GradScaler", Gentle)
    made = settings(epochs=2, pretrain_epochs=1, precision="fp16", profile=False, threshold=1e-12)
    runs = [ptsim.train(made | {"clip_norm": clip}, out=tmp_path / f"{clip}") for clip in (None, 100.0)]
    assert [epoch.num_iterations for epoch in ptsim.read_trace(runs[1].trace).epochs] == [6, 6]
    plain, clipped = (ptsim.load_model(run.folder, trust=True).parameters() for run in runs)
    assert all(torch.equal(p, q) for p, q in zip(plain, clipped, strict=True))


def test_a_run_whose_first_updates_are_left_out_can_be_read_and_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", Coarse)
    run = ptsim.train(settings(epochs=1, precision="fp16", profile=False), out=tmp_path / "run")
    (epoch,) = ptsim.read_trace(run.trace).epochs
    assert epoch.num_iterations < 6
    assert epoch.num_images == 96
    assert ptsim.cost(run.trace).epochs[0].num_images == 96
    assert ptsim.train({"epochs": 2}, resume=run.folder).epochs == 2


# The command line


def test_the_command_prints_one_json_document_and_exits_0(tmp_path, capsys):
    options = [f"--{name.replace('_', '-')}={settings()[name]}" for name in ("model", "dataset", "batch", "lr")]
    more = [f"--set={k}={v}" for k, v in {"image_size": 8, "profile": "false", "train_limit": 96}.items()]
    status = command(["train", *options, *more, "--epochs=2", "--interval=1", f"--out={tmp_path / 'run'}", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert status == 0
    assert document["trace"] == str(tmp_path / "run" / "trace.jsonl")
    assert 0 <= document["final_accuracy"] <= 1
    assert document["penalty_coefficient"] > 0
    assert command(["train", f"--resume={tmp_path / 'run'}"]) == 0
    assert command(["train", f"--resume={tmp_path / 'run'}", "--lr=3"]) == 2


def test_the_command_line_overrides_the_file(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text("dataset = 'digits'\nepochs = 7\nbatch = 5000")
    assert command(["train", str(file), "--set", "batch=6000", "--out", str(tmp_path / "run")]) == 2
    assert "mini-batch of 6000" in capsys.readouterr().err
    assert no_files(tmp_path / "run")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model=nothing", "--dataset=digits"],
        ["--dataset=nothing"],
        ["--set=nothing=1", "--dataset=digits"],
        ["--set=mode=maybe", "--dataset=digits"],
        ["--interval=0", "--dataset=digits"],
        ["nowhere.toml"],
        ["--resume=nowhere"],
        ["--epochs=many"],
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_exit_2(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert command(["train", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert "Traceback" not in output.err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_named(pruned_run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(pruned_run.folder, folder)
    weights = folder / "checkpoints" / "epoch-0005" / "weights.safetensors"
    torch.save({"a": torch.zeros(1)}, weights)
    with pytest.raises(FileFormatError, match="found a pickle, expected safetensors"):
        ptsim.load_model(folder, trust=True)
    weights.write_bytes(b"nonsense")
    with pytest.raises(FileFormatError, match="not a safetensors file"):
        ptsim.load_model(folder, trust=True)
    (folder / "checkpoints" / "epoch-0005" / "checkpoint.json").write_text('{"format_version": 1}')
    with pytest.raises(FileFormatError, match=r"checkpoint\.json: not a checkpoint description"):
        ptsim.load_model(folder, trust=True)
