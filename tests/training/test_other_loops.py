"""PruneTrain and Recorder in loops that are written in other ways than the usual one."""

import contextlib
import socket
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ptsim
from ptsim.errors import UsageError
from ptsim.prune.proof import zero_components
from ptsim.training.distributed import Team
from tests.training.test_own_loop import (  # noqa: F401 # a fixture
    IMAGE,
    fresh,
    images_and_labels,
    made,
    one_thread,
    sgd,
    steps,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:the network has collapsed:UserWarning")


class Clock:
    """Stands still but for what it is told."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s

    def passes(self, seconds):
        self.now_s += seconds


def clocked(monkeypatch):
    """A clock, and a network whose forward pass takes 1 s by it and its backward pass 2 s."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    model = fresh()
    model.register_forward_hook(lambda *_: clock.passes(1.0))
    model.fc.weight.register_hook(lambda _: clock.passes(2.0))
    return clock, model


def test_a_step_of_two_accumulated_passes_takes_the_time_of_both(monkeypatch):
    clock, model = clocked(monkeypatch)

    class Slow(torch.optim.SGD):
        def step(self, closure=None):
            clock.passes(0.5)
            return super().step(closure)

    sgd(model)  # from now on torch calls the hooks in `super().step`, too
    optimizer = Slow(model.parameters(), lr=0.05)

    def batches():
        for batch in images_and_labels(4, 8):
            clock.passes(0.25)
            yield batch

    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE)
    clock.passes(3.0)  # before the first mini-batch: no part of the epoch
    for i, (images, labels) in enumerate(recorder.data(batches())):
        (F.cross_entropy(model(images), labels) / 2).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    epoch = recorder.end_epoch()
    assert (epoch.num_iterations, epoch.passes, epoch.batch_per_gpu) == (2, 2, 16)
    # Two passes of 0.25 s of waiting, 1 s forward and 2 s backward, then an update of 0.5 s: 7 s, twice.
    assert (epoch.step.median_s, epoch.step.std_s, epoch.time.wall_s) == (7.0, 0.0, 14.0)
    assert (epoch.time.data_wait_s, epoch.time.forward_s, epoch.time.backward_s) == (1.0, 4.0, 8.0)
    assert epoch.time.optimizer_s == 1.0


def test_predictions_of_accumulated_steps_count_every_profiled_pass(tmp_path):
    """The last update of an epoch may have fewer passes: a step is the largest one."""
    model = fresh()
    optimizer = sgd(model)
    with ptsim.Recorder(model, optimizer, input_shape=IMAGE, record=tmp_path / "run", profile=True) as recorder:
        for i, (images, labels) in enumerate(images_and_labels(5, 8)):
            (F.cross_entropy(model(images), labels) / 2).backward()
            if i % 2 or i == 4:
                optimizer.step()
                optimizer.zero_grad()
        recorder.end_epoch()
    trace = ptsim.read_trace(tmp_path / "run")
    (profile,) = trace.profiles
    (epoch,) = trace.epochs
    assert (profile.batch, epoch.batch_per_gpu, epoch.passes, epoch.num_iterations) == (8, 16, 2, 3)
    checked = ptsim.validate([trace])
    updating_s = (1 + 3 / 11) * profile.optimizer_s  # a sum of gradients moves 3 values, an update with momentum 11
    expected_s = 3 * (2 * (profile.forward_s + profile.backward_s) + updating_s)
    beyond_s = checked.runs[0].epochs[0].predicted_seconds - expected_s  # the pace of the input
    assert beyond_s == pytest.approx(epoch.time.wall_s - _steps_s(epoch.time), abs=1e-4)


def _steps_s(times):
    return times.forward_s + times.backward_s + times.regularizer_s + times.optimizer_s


def test_a_network_that_is_compiled_in_place_is_watched_and_pruned():
    model = fresh()
    model.compile(backend="eager")
    optimizer = sgd(model)
    pruner = made(model, optimizer)
    outcomes = train(pruner, model, optimizer, 2, images_and_labels())
    plain = fresh()
    plain_optimizer = sgd(plain)
    expected = train(made(plain, plain_optimizer), plain, plain_optimizer, 2, images_and_labels())
    assert pruner.needs_rewrap
    for ours, theirs in zip(outcomes, expected, strict=True):
        assert ours.epoch.num_images == theirs.epoch.num_images == 64
        assert ours.epoch.train_loss == pytest.approx(theirs.epoch.train_loss, rel=1e-5)
        assert ours.epoch.time.forward_s > 0
        assert ours.epoch.architecture == theirs.epoch.architecture
    torch._dynamo.reset()
    model.compile(backend="eager")
    pruner.rewrapped(model)
    assert train(pruner, model, optimizer, 1, images_and_labels())[0].epoch.num_images == 64
    assert not pruner.needs_rewrap
    call = model._compiled_call_impl
    pruner.close()
    assert model._compiled_call_impl is not call  # torch's own again
    torch._dynamo.reset()


def test_of_two_recorders_of_a_network_compiled_in_place_the_closed_one_sees_nothing():
    model = fresh()
    model.compile(backend="eager")
    optimizer = sgd(model)
    first, second = (ptsim.Recorder(model, optimizer, input_shape=IMAGE) for _ in range(2))
    first.close()
    for images, labels in images_and_labels(2, 8):
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert (first.watch.num_images, second.watch.num_images) == (0, 16)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")  # LBFGS of torch 2.8
def test_an_optimizer_with_one_state_for_all_weights_is_refused_and_can_be_recorded():
    model = fresh()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    with pytest.raises(UsageError, match="LBFGS keeps one state for all weights together"):
        made(model, optimizer)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE)
    for images, labels in images_and_labels(2, 8):

        def closure(images=images, labels=labels):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            return loss

        recorder.step(optimizer.step(closure))
    epoch = recorder.end_epoch()
    assert (epoch.num_iterations, epoch.passes, epoch.num_images) == (2, 2, 32)  # two evaluations of 8 images a step


class Around(torch.optim.Optimizer):
    """As SAM and Lookahead are usually written: an optimizer that holds another and shares its groups."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base_optimizer = base
        self.param_groups = base.param_groups

    def step(self):
        self.base_optimizer.step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["slow"] = parameter.detach().clone()


def test_the_state_of_an_optimizer_inside_another_is_cut_with_the_weights():
    model = fresh()
    inner = sgd(model)
    outer = Around(inner)
    pruner = made(model, outer)
    outcomes = train(pruner, model, outer, 2, images_and_labels())
    assert outcomes[-1].pruned
    assert [epoch.epoch.num_iterations for epoch in outcomes] == [4, 4]
    assert set(inner.state) == set(model.parameters())
    assert all(inner.state[p]["momentum_buffer"].shape == p.shape for p in model.parameters())
    assert set(outer.state) == set(model.parameters())  # it keeps a state of its own
    assert all(torch.equal(outer.state[p]["slow"], p) for p in model.parameters())
    assert len(outer.state_dict()["state"]) == len(list(model.parameters()))
    train(pruner, model, outer, 1, images_and_labels())


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_the_summary_right_after_a_reconfiguration_counts_the_older_weight_norm_as_it_is():
    model = fresh()
    nn.utils.weight_norm(model.down[0])
    optimizer = sgd(model)
    pruner = made(model, optimizer, interval=1, threshold=1e-4)
    steps(pruner, model, optimizer, images_and_labels())
    mask = pruner.groups.prunable & (torch.rand(pruner.groups.num_components, generator=_seeded()) < 0.5)
    zero_components(model, pruner.groups, mask)
    outcome = pruner.end_epoch()
    before, after = pruner.summary().channels
    model(images_and_labels()[0][0])
    assert pruner.summary().channels == (before, after)
    assert before - after == outcome.reconfiguration.channels_removed > 0
    assert model.down[0].weight.shape == model.down[0].weight_v.shape


def _seeded():
    return torch.Generator().manual_seed(3)


def accumulate(module, optimizer, batches, passes, *, no_sync):
    """An update of the gradients of every `passes` mini-batches; with `no_sync` only the last pass reduces them."""
    for index, (images, labels) in enumerate(batches, start=1):
        updates = index % passes == 0
        with contextlib.nullcontext() if updates or not no_sync else module.no_sync():
            F.cross_entropy(module(images), labels).backward()
        if updates:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(("passes", "no_sync", "reductions"), [(1, False, 4), (2, False, 4), (2, True, 2)])
def test_exposed_communication_is_told_apart_where_the_wrapping_came_after_the_recorder(passes, no_sync, reductions):
    """As trainers do: the recorder gets the bare network, and DistributedDataParallel is put around it later."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        model = fresh()
        optimizer = sgd(model)
        recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE)
        module = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            accumulate(module, optimizer, images_and_labels(), passes, no_sync=no_sync)
            epoch = recorder.end_epoch()
            assert (epoch.num_iterations, epoch.passes) == (4 // passes, passes)
        told = module._get_ddp_logging_data()
        exposed_ns = told["avg_backward_comm_time"] - told["avg_backward_compute_comm_overlap_time"]
        assert epoch.time.exposed_communication_s == pytest.approx(reductions * 1e-9 * exposed_ns, rel=0.4)
        assert epoch.time.exposed_communication_s > 0
        assert epoch.time.backward_s > 0
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("no_sync", "reductions"), [(False, 4), (True, 2)])
def test_gradients_that_were_reduced_before_a_state_was_stored_count_with_those_after_it(tmp_path, no_sync, reductions):
    """An update of two passes before the state, and one after it."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = fresh()
        optimizer, module = sgd(model), nn.parallel.DistributedDataParallel(model)
        two = Team(rank=0, world_size=2, backend="gloo", device=torch.device("cpu"))
        recorder = ptsim.Recorder(module, optimizer, input_shape=IMAGE, team=two)
        earlier = None
        for _ in range(2):
            recorder.watch.forget()
            recorder.continue_epoch(earlier)
            accumulate(module, optimizer, images_and_labels(2), 2, no_sync=no_sync)
            earlier = recorder.unfinished()
        epoch = recorder.end_epoch()
        assert (epoch.num_iterations, epoch.passes) == (2, 2)
        assert epoch.allreduce_bytes == reductions * recorder.architecture.gradient_bytes
    finally:
        torch.distributed.destroy_process_group()


def test_a_layer_that_is_frozen_later_stays_as_it_is_and_one_that_is_freed_is_pruned():
    model = fresh()
    model.down.requires_grad_(False)
    optimizer = sgd(model)
    pruner = made(model, optimizer, interval=1)
    batches = images_and_labels()
    train(pruner, model, optimizer, 1, batches)
    assert model.down[0].out_channels == 12
    coefficient = pruner.penalty_coefficient
    model.stem.requires_grad_(False)
    model.down.requires_grad_(True)
    before = [p.detach().clone() for p in model.stem.parameters()]
    outcomes = train(pruner, model, optimizer, 2, batches)
    # The stem's momentum must not move it either: SGD leaves alone what has no gradient.
    assert all(torch.equal(p, q) for p, q in zip(model.stem.parameters(), before, strict=True))
    assert any(outcome.reconfiguration.channels_removed for outcome in outcomes)
    assert model.down[0].out_channels < 12
    assert pruner.penalty_coefficient == coefficient


def test_a_scaler_that_pruner_was_not_told_of_is_named():
    model = fresh()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    pruner = made(model, optimizer)
    images, labels = images_and_labels()[0]
    loss = F.cross_entropy(model(images), labels)
    scaler.scale(loss).backward()
    pruner.step(loss)
    with pytest.raises(UsageError, match="was not told of the GradScaler") as caught:
        scaler.step(optimizer)
    assert "scaler=scaler" in caught.value.hint


def test_a_pruned_network_is_loaded_without_optimizer_or_pruner(tmp_path):
    model = fresh()
    optimizer = sgd(model)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    pruner = made(model, optimizer, ema=average)
    images, _ = images_and_labels()[0]
    for _ in range(2):
        for batch, classes in images_and_labels():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch), classes)
            loss.backward()
            pruner.step(loss)
            optimizer.step()
            average.update_parameters(model)
        outcome = pruner.end_epoch()
    assert outcome.pruned
    torch.save(pruner.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for of, trained in ((False, model), (True, average.module)):
        loaded = ptsim.load_pruned(fresh(seed=1), state, average=of)
        assert torch.equal(loaded.eval()(images), trained.eval()(images))
    shapes = ptsim.load_pruned(fresh(seed=1), pruner.state_dict(tensors=False))
    shapes.load_state_dict(model.state_dict())
    assert torch.equal(shapes.eval()(images), model(images))
    pruner.ema = None
    with pytest.raises(UsageError, match="holds no average"):
        ptsim.load_pruned(fresh(), pruner.state_dict(), average=True)
    with pytest.raises(UsageError, match="not a state of PruneTrain"):
        ptsim.load_pruned(fresh(), {})


class OwnNorm(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: a norm whose own code calls the functional one."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


def test_norms_with_code_of_their_own_on_maps_of_one_pixel_are_counted_and_pruned():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 8), OwnNorm(8), nn.ReLU(), nn.Conv2d(8, 4, 1), OwnNorm(4), nn.Flatten(), nn.Linear(4, 10)
    )
    optimizer = sgd(model)
    pruner = made(model, optimizer, interval=1, threshold=1e-4)
    images, labels = images_and_labels()[0]
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    pruner.step(loss)
    optimizer.step()
    mask = torch.zeros_like(pruner.groups.prunable)
    mask[pruner.groups.prunable.nonzero().flatten()[:3]] = True
    zero_components(model, pruner.groups, mask)
    before = model.eval()(images)
    assert pruner.end_epoch().pruned
    torch.testing.assert_close(model(images), before)
    products = {layer.name: layer.forward_macs for layer in pruner.recorder.architecture.layers}
    width, inner = model[0].out_channels, model[3].out_channels
    assert (width, inner) != (8, 4)
    assert products["0"] == width * 3 * 64
    assert (products["3"], products["6"]) == (width * inner, inner * 10)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at that of what it is given
def test_a_network_with_a_compiled_part_is_pruned_as_one_without():
    outcomes = []
    for compiled in (False, True):
        model = fresh()
        if compiled:
            model.inner = torch.compile(model.inner, backend="eager")
        optimizer = sgd(model)
        with made(model, optimizer) as pruner:
            outcomes.append(train(pruner, model, optimizer, 3, images_and_labels())[1:])
    for ours, theirs in zip(*outcomes, strict=True):
        assert ours.pruned == theirs.pruned
        assert ours.epoch.train_loss == pytest.approx(theirs.epoch.train_loss, rel=1e-5)
    plain, part = (found[0].reconfiguration for found in outcomes)
    assert plain.channels_removed == part.channels_removed > 0


def test_layers_that_are_trained_past_the_networks_forward_are_told():
    model = fresh()
    model.aux = nn.Conv2d(12, 10, 1)
    optimizer = sgd(model)

    class Both(nn.Module):
        def forward(self, x):
            features = model.down(torch.relu(model.stem(x)))
            return model(x) + model.aux(features).mean((2, 3))

    pruner = made(model, optimizer)
    with pytest.warns(UserWarning, match=r"the loop trains aux, which the forward of Small does not call"):
        steps(pruner, Both(), optimizer, images_and_labels(1))
    steps(pruner, Both(), optimizer, images_and_labels(1))  # said once
