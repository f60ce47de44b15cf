"""What real training scripts do, and which numbers of it the trace then holds."""

import copy
import itertools
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ptsim
from ptsim.errors import FileFormatError, UsageError
from ptsim.network import Precision
from ptsim.prune.cut import narrowed
from tests.training.test_other_loops import Around, Clock, clocked
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


def test_an_update_that_a_scaler_leaves_out_is_no_accumulation(tmp_path):
    """The update of the second of five mini-batches is left out: a step still is one pass of 16 images."""
    model = fresh()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE, record=tmp_path)
    for index, (images, labels) in enumerate(images_and_labels(5)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss * torch.inf if index == 1 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
    epoch = recorder.end_epoch()
    assert (epoch.batch_per_gpu, epoch.passes, epoch.num_iterations, epoch.num_images) == (16, 1, 4, 80)
    recorder.close()
    report = ptsim.cost(tmp_path)  # the trace can be read, and all five mini-batches were computed
    assert report.epochs[0].training_macs == 80 * report.training_macs_per_image
    assert len(ptsim.simulate(tmp_path, "aws-p3-16xlarge", [1, 8])) == 2


@pytest.mark.parametrize(("passes", "batch", "accumulated"), [(102, 2, 1), (103, 105, 53)])
def test_an_epoch_in_which_hardly_an_update_was_made_can_be_read(tmp_path, passes, batch, accumulated):
    """Two updates of two images, and no more since: up to 2 · 2 + 100 mini-batches can have been left out by a scaler.

    Of more than that the updates are said to have had their share of all: a 105th of 53 passes.
    """
    model = fresh()
    optimizer = sgd(model)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE, record=tmp_path)
    ((images, labels),) = images_and_labels(1, 2)
    for index in range(2 + passes):
        F.cross_entropy(model(images), labels).backward()
        if index < 2:
            optimizer.step()
    recorder.end_epoch()
    recorder.close()
    (epoch,) = ptsim.read_trace(tmp_path).epochs
    assert (epoch.num_iterations, epoch.num_images) == (2, 2 * (2 + passes))
    assert (epoch.batch_per_gpu, epoch.passes) == (batch, accumulated)


def accumulate(model, optimizer, batches, updates):
    """Updates of so many passes each; the batches that are left have none."""
    ends = list(itertools.accumulate(updates))
    for number, (images, labels) in enumerate(batches, 1):
        F.cross_entropy(model(images), labels).backward()
        if number in ends:
            optimizer.step()
            optimizer.zero_grad()


def test_an_epoch_in_which_some_updates_accumulate_more_passes_can_be_read(tmp_path):
    """Three updates of two passes, one of four: 10 passes of 8 images, where four usual updates hold 64."""
    model = fresh()
    optimizer = sgd(model)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE, record=tmp_path)
    accumulate(model, optimizer, images_and_labels(10, 8), (2, 2, 2, 4))
    recorder.end_epoch()
    recorder.close()
    (epoch,) = ptsim.read_trace(tmp_path).epochs
    assert (epoch.batch_per_gpu, epoch.passes, epoch.num_iterations, epoch.num_images) == (16, 2, 4, 80)


def test_one_larger_mini_batch_is_not_that_of_the_epoch(tmp_path):
    """As of a loader that puts what is left over to the last mini-batch: three of 8 images and one of 12."""
    model = fresh()
    optimizer = sgd(model)
    with ptsim.Recorder(model, optimizer, input_shape=IMAGE, record=tmp_path, profile=True) as recorder:
        batches = [*images_and_labels(3, 8), *images_and_labels(1, 12)]
        accumulate(model, optimizer, batches, (1, 1, 1, 1))
        recorder.end_epoch()
    trace = ptsim.read_trace(tmp_path)
    (epoch,), (profile,) = trace.epochs, trace.profiles
    assert (epoch.batch_per_gpu, epoch.passes, epoch.num_iterations, epoch.num_images) == (8, 1, 4, 36)
    assert (profile.batch, trace.run.hyperparameters["batch"]) == (8, 8)


@pytest.mark.parametrize("updates", [(1, 2), (2, 1)])
def test_of_two_mini_batches_that_are_as_frequent_the_larger_one_is_the_epochs(updates):
    """The last update of an epoch may have fewer passes: here one pass of 8 images, and two."""
    model = fresh()
    optimizer = sgd(model)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE)
    accumulate(model, optimizer, images_and_labels(3, 8), updates)
    epoch = recorder.end_epoch()
    assert (epoch.batch_per_gpu, epoch.passes, epoch.num_iterations, epoch.num_images) == (16, 2, 2, 24)


def test_passes_whose_gradients_wait_for_the_next_epoch_leave_a_trace_that_can_be_read(monkeypatch, tmp_path):
    """Five mini-batches, two to an update: the fifth has none in this epoch."""
    _, model = clocked(monkeypatch)
    optimizer = sgd(model)
    with ptsim.Recorder(model, optimizer, input_shape=IMAGE, record=tmp_path) as recorder:
        accumulate(model, optimizer, images_and_labels(5, 8), (2, 2))
        recorder.end_epoch()
    (epoch,) = ptsim.read_trace(tmp_path).epochs
    assert (epoch.batch_per_gpu, epoch.passes, epoch.num_iterations, epoch.num_images) == (16, 2, 2, 40)
    parts = epoch.time  # four passes of 1 and 2 s; what follows the last update counts as validation
    assert (parts.wall_s, parts.forward_s, parts.backward_s, parts.validation_s) == (12.0, 4.0, 8.0, 3.0)


@pytest.mark.parametrize("told", [False, True])
def test_validation_between_two_steps_is_no_part_of_the_training_time(monkeypatch, told):
    clock, model = clocked(monkeypatch)
    optimizer = sgd(model)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE)

    def batches():
        for batch in images_and_labels(3, 8):
            clock.passes(0.25)
            yield batch

    def validate():
        model.eval()
        with torch.no_grad():
            for images, _ in images_and_labels(2, 8):
                clock.passes(0.5)
                model(images)
        model.train()

    for i, (images, labels) in enumerate(recorder.data(batches()) if told else batches()):
        clock.passes(0.125)  # onto the device
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if i == 1:
            validate()  # 3 s
    validate()
    epoch = recorder.end_epoch()
    # Three steps of 3 s with their wait of 0.25 s. Of a loader that is not told of, all between two iterations is a
    # wait, and the first one is not seen.
    assert epoch.time.wall_s == (3 * 3.375 if told else 3 * 3.375 - 0.375)
    assert epoch.time.data_wait_s == (3 * 0.25 if told else 2 * 0.375)
    assert epoch.time.validation_s == 6.0
    assert epoch.step.p90_s <= 3.375


def test_validation_before_the_first_step_is_no_part_of_the_training_time(monkeypatch):
    """As loops do that validate every so many iterations, the first one included."""
    _, model = clocked(monkeypatch)
    optimizer = sgd(model)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE)
    for i, (images, labels) in enumerate(recorder.data(images_and_labels(3, 8))):
        if i % 2 == 0:
            model.eval()
            with torch.no_grad():
                model(images)
            model.train()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    epoch = recorder.end_epoch()
    assert (epoch.time.wall_s, epoch.time.validation_s) == (3 * 3.0, 2 * 1.0)
    assert (epoch.step.p10_s, epoch.step.p90_s) == (3.0, 3.0)
    assert (epoch.num_images, epoch.num_iterations) == (24, 3)


def test_the_rate_of_an_epoch_is_that_of_its_first_update_and_its_mini_batch_is_known_until_the_next():
    """As with a schedule that goes on at every update; two passes of 8 images each."""
    model = fresh()
    optimizer = sgd(model)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE)
    for rates in ((0.25, 0.5), (0.125, 0.0625)):
        for rate in rates:
            optimizer.param_groups[0]["lr"] = rate
            accumulate(model, optimizer, images_and_labels(2, 8), (2,))
        assert recorder.end_epoch().learning_rate == rates[0]
        assert recorder.batch_per_gpu == 16


def test_what_lies_between_backward_penalty_and_update_is_the_updates(monkeypatch):
    """Half a second of unscaling, a quarter of penalty, an eighth of clipping, and the update: 1 s."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    model = fresh()

    class Slow(torch.optim.SGD):
        def step(self, closure=None):
            clock.passes(1.0)
            return super().step(closure)

    optimizer = Slow(model.parameters(), lr=0.05)
    pruner = made(model, optimizer, interval=9)
    add_gradient = pruner.criterion.add_gradient
    monkeypatch.setattr(pruner.criterion, "add_gradient", lambda by: (clock.passes(0.25), add_gradient(by)))
    for images, labels in images_and_labels(4, 8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        clock.passes(0.5)
        pruner.step(loss)
        clock.passes(0.125)
        optimizer.step()
    parts = pruner.end_epoch().epoch.time
    assert (parts.regularizer_s, parts.optimizer_s, parts.wall_s) == (4 * 0.25, 4 * 1.625, 4 * 1.875)
    assert (parts.forward_s, parts.backward_s, parts.data_wait_s) == (0.0, 0.0, 0.0)


class CastsInside(nn.Module):
    """As Accelerate does: autocast begins within the network's call."""

    def __init__(self):
        super().__init__()
        self.body = fresh()

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x):
        return self.body(x).float()


def test_autocast_within_the_networks_call_is_seen():
    model = CastsInside()
    optimizer = sgd(model)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE)
    images, labels = images_and_labels()[0]
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    recorder.end_epoch()
    assert recorder.precision is Precision.BF16


@pytest.mark.slow
def test_autocast_within_a_compiled_networks_call_is_seen():
    model = CastsInside()
    optimizer = sgd(model)
    module = torch.compile(model, backend="aot_eager")
    recorder = ptsim.Recorder(module, optimizer, input_shape=IMAGE)
    for images, labels in images_and_labels(2):
        optimizer.zero_grad()
        F.cross_entropy(module(images), labels).backward()
        optimizer.step()
    recorder.end_epoch()
    assert recorder.precision is Precision.BF16
    torch._dynamo.reset()


def test_an_epoch_in_which_step_was_never_called_is_named():
    """As with timm's NativeScaler, which hides backward and update in one call."""
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer)
    (images, labels), *_ = images_and_labels()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    with pytest.raises(UsageError, match=r"pruner\.step was not called in this epoch, so nothing was penalised"):
        pruner.end_epoch()
    pruner.regularized = False
    assert pruner.end_epoch().epoch.num_iterations == 1


def test_updates_for_which_step_was_forgotten_are_told_at_the_end_of_their_epoch():
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer, interval=9)
    for index, (images, labels) in enumerate(images_and_labels(5)):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=index < 2)
        loss.backward()
        if index not in (0, 3):
            pruner.step(loss)
        optimizer.step()
    with pytest.warns(UserWarning, match="2 of this epoch's 5 updates came without pruner.step") as said:
        pruner.end_epoch()
    assert [warning.filename for warning in said] == [__file__]
    steps(pruner, model, optimizer, images_and_labels(2))
    pruner.end_epoch()  # nothing more is to be said


class OfAClassOfItsOwn(torch.optim.SGD):
    """Torch calls the hooks of this `step`, and of the one in it."""

    def step(self, closure=None):
        return super().step(closure)


def test_no_update_is_missed_that_needs_no_step():
    model = fresh()
    optimizer = OfAClassOfItsOwn(model.parameters(), lr=0.05)
    pruner = made(model, optimizer, interval=9)
    optimizer.step()  # there is no gradient yet
    for index, (images, labels) in enumerate(images_and_labels()):
        pruner.regularized = index != 2
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        if pruner.regularized:
            pruner.step(loss)
        optimizer.step()
        optimizer.step()  # with the same gradient, which has the penalty
    assert pruner.end_epoch().epoch.penalty_coefficient > 0


def test_what_a_loop_says_of_the_next_epoch_before_this_one_is_recorded_changes_no_record():
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer, interval=9)
    recorded = []
    for next_one in (False, True, True):
        steps(pruner, model, optimizer, images_and_labels(2))
        pruner.regularized = next_one
        recorded.append(pruner.end_epoch().epoch.penalty_coefficient)
    strength = pruner.penalty_coefficient
    assert recorded == [strength, 0.0, strength] != [0.0] * 3
    state = pruner.state_dict()
    steps(pruner, model, optimizer, images_and_labels(2))
    pruner.load_state_dict(state | {"regularized": False})  # the penalty of what is taken back counts no more
    steps(pruner, model, optimizer, images_and_labels(2))
    assert pruner.end_epoch().epoch.penalty_coefficient == 0.0


def test_the_settings_of_a_run_are_those_of_its_weights_without_warm_up(tmp_path):
    """timm's first group has no weight decay; a schedule begins from a small learning rate; two passes an update."""
    model = fresh()
    vectors, weights = ([p for p in model.parameters() if (p.ndim > 1) is wide] for wide in (False, True))
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": weights, "weight_decay": 0.05}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1)
    recorder = ptsim.Recorder(model, optimizer, input_shape=IMAGE, record=tmp_path)
    for index, (images, labels) in enumerate(images_and_labels(4)):
        F.cross_entropy(model(images), labels).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert recorder.end_epoch().learning_rate == pytest.approx(0.001)
    recorder.close()
    settings = ptsim.read_trace(tmp_path).run.hyperparameters
    assert (settings["lr"], settings["weight_decay"], settings["batch"]) == (0.01, 0.05, 32)


def test_a_state_from_the_middle_of_an_epoch_goes_on_with_what_was_counted(tmp_path):
    batches = images_and_labels()

    def begun(folder):
        model = fresh()
        optimizer = sgd(model)
        return model, optimizer, made(model, optimizer, record=folder)

    model, optimizer, pruner = begun(tmp_path / "whole")
    (whole,) = train(pruner, model, optimizer, 1, batches)
    model, optimizer, broken = begun(tmp_path / "broken")
    for done in (3, 4):  # the epoch may be trained to its end
        steps(broken, model, optimizer, batches[:3] if done == 3 else batches[3:])
        state = copy.deepcopy(broken.state_dict())
        assert state["unfinished"]["num_iterations"] == done
        rest = batches[done:]
        fresh_model, fresh_optimizer, pruner = begun(tmp_path / f"on{done}")
        pruner.load_state_dict(state)
        fresh_optimizer.param_groups[0]["lr"] = 0.01  # as a schedule might, step by step: the epoch began with 0.05
        steps(pruner, fresh_model, fresh_optimizer, rest)
        epoch = pruner.end_epoch().epoch
        assert epoch.learning_rate == 0.05
        assert (epoch.num_iterations, epoch.num_images, epoch.batch_per_gpu) == (4, 64, 16)
        assert epoch.train_loss == pytest.approx(whole.epoch.train_loss, rel=1e-6)
        assert epoch.time.forward_s > state["unfinished"]["time"]["forward_s"] - 1e-9
        pruner.close()
        assert ptsim.read_trace(tmp_path / f"on{done}").run.dataset.num_train == 64


def test_a_run_whose_first_epoch_was_trained_to_its_end_knows_how_it_was_trained(tmp_path):
    """No pass follows the state: format, layout and rate are those of before it."""
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer)
    for images, labels in images_and_labels(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(images.to(memory_format=torch.channels_last)), labels)
        optimizer.zero_grad()
        loss.backward()
        pruner.step(loss)
        optimizer.step()
    other = fresh(seed=1)
    second = sgd(other)
    resumed = made(other, second, record=tmp_path)
    resumed.load_state_dict(pruner.state_dict())
    assert resumed.batch == 16
    second.param_groups[0]["lr"] = 0.01
    assert resumed.end_epoch().epoch.learning_rate == 0.05
    resumed.close()
    run = ptsim.read_trace(tmp_path).run
    assert (run.precision, run.memory_format) == (Precision.BF16, "channels_last")
    assert (run.hyperparameters["lr"], run.hyperparameters["batch"]) == (0.05, 16)


def test_optimizers_of_named_parameters_keep_names_and_parameters_together():
    def of(model):
        named = list(model.named_parameters())
        groups = [
            {"params": [(n, p) for n, p in named if p.ndim > 1], "weight_decay": 1e-4},
            {"params": [(n, p) for n, p in named if p.ndim == 1], "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)

    def check(model, optimizer):
        """The user's names; what pruning puts in has the network's."""
        names = {id(p): getattr(p, "name_at_first", name) for name, p in model.named_parameters()}
        for group in optimizer.param_groups:
            assert group["param_names"] == [names[id(p)] for p in group["params"]]

    def named():
        model = fresh()
        for name, parameter in model.named_parameters():
            parameter.name_at_first = name
        return model

    model = named()
    optimizer = of(model)
    pruner = made(model, optimizer)
    assert train(pruner, model, optimizer, 2, images_and_labels())[-1].pruned
    check(model, optimizer)
    again = named()
    optimizer = of(again)
    made(again, optimizer).load_state_dict(pruner.state_dict())
    check(again, optimizer)


def test_hooks_and_notes_on_a_parameter_outlive_its_pruning():
    model = fresh()
    optimizer = sgd(model)
    seen, done = [], []
    model.down[0].weight.no_decay = True
    handle = model.down[0].weight.register_hook(lambda gradient: seen.append(tuple(gradient.shape)))
    model.down[0].weight.register_post_accumulate_grad_hook(lambda weight: done.append(tuple(weight.grad.shape)))
    pruner = made(model, optimizer)
    assert train(pruner, model, optimizer, 2, images_and_labels())[-1].pruned
    seen.clear()
    done.clear()
    train(pruner, model, optimizer, 1, images_and_labels())
    assert seen == done == [tuple(model.down[0].weight.shape)] * 4
    assert model.down[0].weight.no_decay
    handle.remove()
    train(pruner, model, optimizer, 1, images_and_labels())
    assert (len(seen), len(done)) == (4, 8)


def test_hooks_of_a_frozen_parameter_are_there_once_it_is_trained_again():
    old = nn.Parameter(torch.ones(4, 2))
    old.register_hook(lambda gradient: 3 * gradient)
    new = narrowed(old.requires_grad_(False), {0: torch.tensor([0, 2])})
    assert not new.requires_grad
    new.requires_grad_(True).sum().backward()
    assert torch.equal(new.grad, torch.full((2, 2), 3.0))


def test_a_closure_that_adds_the_penalty_is_a_step():
    results = []
    for with_closure in (False, True):
        model = fresh()
        optimizer = sgd(model)
        pruner = made(model, optimizer)
        for images, labels in images_and_labels():

            def closure(images=images, labels=labels, model=model, optimizer=optimizer, pruner=pruner):
                optimizer.zero_grad(set_to_none=False)
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                pruner.step(loss)
                return loss

            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        assert pruner.end_epoch().epoch.num_iterations == 4
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_a_scaler_that_unscales_an_optimizer_around_another_is_followed():
    model = fresh()
    outer = Around(sgd(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    pruner = made(model, outer, scaler=scaler)
    images, labels = images_and_labels()[0]
    for unscaled in (True, False):
        outer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        if not unscaled:
            with pytest.raises(UsageError, match=r"before scaler\.unscale_"):
                pruner.step(loss)
            return
        scaler.unscale_(outer)
        pruner.step(loss)
        scaler.step(outer)
        scaler.update()


class Keeper(nn.Module):
    """As timm's ModelEmaV3: keeps the average as `module`."""

    def __init__(self, model):
        super().__init__()
        self.module = copy.deepcopy(model).requires_grad_(False)


def test_the_proximal_step_of_an_epochs_last_update_is_among_its_times():
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer, regularizer="proximal")
    steps(pruner, model, optimizer, images_and_labels(1))
    assert pruner.end_epoch().epoch.time.regularizer_s > 0


def test_an_average_is_found_in_what_keeps_it_and_another_networks_is_refused():
    model = fresh()
    optimizer = sgd(model)
    keeper = Keeper(model)
    pruner = made(model, optimizer, ema=keeper)
    assert train(pruner, model, optimizer, 2, images_and_labels())[-1].pruned
    assert [p.shape for p in keeper.module.parameters()] == [p.shape for p in model.parameters()]
    again = fresh(seed=1)
    kept = Keeper(again)
    made(again, sgd(again), ema=kept).load_state_dict(pruner.state_dict())
    for ours, theirs in zip(kept.module.parameters(), keeper.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    other = fresh()
    for wrong in (nn.Linear(3, 3), object()):
        with pytest.raises(UsageError, match="holds no average of this Small"):
            made(other, sgd(other), ema=wrong)


def test_an_average_that_a_state_lacks_begins_with_its_weights_and_one_that_a_run_lacks_is_told():
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer)
    assert train(pruner, model, optimizer, 2, images_and_labels())[-1].pruned
    again = fresh(seed=1)
    keeper = Keeper(again)
    averaging = made(again, sgd(again), ema=keeper)
    with pytest.warns(UserWarning, match="the state holds no average of the weights: it begins anew with the weights"):
        averaging.load_state_dict(pruner.state_dict())
    for name, tensor in keeper.module.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    last = fresh(seed=1)
    with pytest.warns(UserWarning, match="holds an average of the weights, which does not go on: PruneTrain"):
        made(last, sgd(last)).load_state_dict(averaging.state_dict())


def test_a_compiled_module_of_before_the_pruning_is_named_at_the_next_step():
    model = fresh()
    optimizer = sgd(model)
    module = torch.compile(model, backend="eager")
    pruner = made(module, optimizer)
    batches = images_and_labels()
    assert train(pruner, module, optimizer, 2, batches)[-1].pruned
    with pytest.raises(UsageError, match="calls a compiled module that PruneTrain was not told of"):
        steps(pruner, module, optimizer, batches)
    torch._dynamo.reset()
    module = torch.compile(pruner.network, backend="eager")
    pruner.rewrapped(module)
    optimizer.zero_grad()
    assert train(pruner, module, optimizer, 1, batches)[0].epoch.num_images == 64
    torch._dynamo.reset()


def test_data_parallel_on_one_device_needs_no_wrapping_and_several_are_refused():
    model = fresh()
    optimizer = sgd(model)
    module = nn.DataParallel(model)
    pruner = made(module, optimizer)
    outcomes = train(pruner, module, optimizer, 3, images_and_labels())
    assert outcomes[1].pruned
    assert not pruner.needs_rewrap
    assert [outcome.epoch.num_images for outcome in outcomes] == [64, 64, 64]
    other = fresh()
    several = nn.DataParallel(other)
    several.device_ids = [0, 1]
    for make in (made, lambda m, o: ptsim.Recorder(m, o, input_shape=IMAGE)):
        with pytest.raises(UsageError, match="DataParallel runs a network on several GPUs"):
            make(several, sgd(other))
    recorder = ptsim.Recorder(other, sgd(other), input_shape=IMAGE)
    replica = other._replicate_for_data_parallel()
    with pytest.raises(UsageError, match="DataParallel runs a network on several GPUs"):
        replica(images_and_labels()[0][0])
    recorder.close()


def test_a_network_that_lies_in_parts_on_the_ranks_is_refused(tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = fresh()
        zero = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.SGD, lr=0.1)
        with pytest.raises(UsageError, match="ZeroRedundancyOptimizer spreads its state over the ranks"):
            made(model, zero)
        older = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # its constructor wants a GPU
        nn.Module.__init__(older)
        older.inner = model
        newer = fully_shard(fresh(), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        for module, optimizer in ((older, sgd(model)), (newer, sgd(newer))):
            for make in (made, lambda m, o: ptsim.Recorder(m, o, input_shape=IMAGE)):
                with pytest.raises(UsageError, match="every rank holds only a part of the network"):
                    make(module, optimizer)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_trace_of_other_numbers_than_float32_is_refused(tmp_path, kind):
    model = fresh().to(kind)
    optimizer = sgd(model)
    with pytest.raises(UsageError, match=r"stem\.0\.weight of this Small is of (float64|bfloat16)"):
        made(model, optimizer, record=tmp_path / "run")
    pruner = made(model, optimizer)  # without a trace it is only pruned
    pruner.close()


def test_a_trained_norm_that_another_optimizer_holds_is_named():
    """Pruning would replace its parameters, and the other optimizer would go on with the old ones."""
    model = fresh()
    convolutions = [p for p in model.parameters() if p.ndim > 1]
    with pytest.raises(UsageError, match=r"does not hold stem\.1\.weight of this Small"):
        made(model, torch.optim.SGD(convolutions, lr=0.1))


def test_images_of_another_size_than_the_trace_says_are_told(tmp_path):
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer, record=tmp_path)
    (images, labels), *_ = images_and_labels()
    steps(pruner, model, optimizer, [(images[..., :6, :6], labels)])
    with pytest.warns(UserWarning, match=r"had images of 3×6×6, input_shape and the trace say 3×8×8"):
        pruner.end_epoch()


def test_a_network_that_runs_inside_a_compiled_function_is_named_at_the_first_step():
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer)
    hidden = torch.compile(lambda images, labels: F.cross_entropy(model(images), labels), backend="eager")
    batch = images_and_labels()[0]
    loss = hidden(*batch)
    loss.backward()
    with pytest.raises(UsageError, match="no training pass of the network was seen"):
        pruner.step(loss)
    pruner.step(loss, num_images=16)
    optimizer.step()
    assert pruner.end_epoch().epoch.num_images == 16
    torch._dynamo.reset()


def test_a_trace_that_is_not_there_to_go_on_with_is_named_at_the_first_pass(tmp_path):
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer, record=tmp_path / "here")
    train(pruner, model, optimizer, 1, images_and_labels())
    again = fresh(seed=1)
    elsewhere = made(again, sgd(again), record=tmp_path / "elsewhere")
    elsewhere.load_state_dict(pruner.state_dict())  # to look at it is no training
    again.eval()(images_and_labels()[0][0])
    again.train()
    with pytest.raises(FileFormatError, match="found nothing, expected the trace of this run") as caught:
        again(images_and_labels()[0][0])
    assert caught.value.hint == "go on in the folder of the run that the checkpoint is of, or copy its trace"


def test_a_run_that_nobody_has_recorded_from_its_beginning_gets_no_trace(tmp_path):
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer)
    train(pruner, model, optimizer, 2, images_and_labels(2))
    again = fresh(seed=1)
    recorded = made(again, sgd(again), record=tmp_path / "run")
    with pytest.raises(UsageError, match=r"the 2 epochs before this state were not recorded") as caught:
        recorded.load_state_dict(pruner.state_dict())
    assert caught.value.hint == "without record= the run goes on; with it the run has to begin anew"
    recorded.close()
    made(again, sgd(again)).load_state_dict(pruner.state_dict())
    other = fresh()
    optimizer = sgd(other)
    begun = made(other, optimizer)
    steps(begun, other, optimizer, images_and_labels(1))
    last = fresh(seed=1)
    made(last, sgd(last), record=tmp_path / "begun").load_state_dict(begun.state_dict())  # in its first epoch


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_state_that_is_stored_after_the_end_of_its_trace_goes_on_with_it(tmp_path, interrupted):
    """After close, or in a handler of Ctrl-C around the loop."""
    model = fresh()
    optimizer = sgd(model)
    pruner = made(model, optimizer, record=tmp_path, interval=9)
    try:
        with pruner:
            train(pruner, model, optimizer, 1, images_and_labels(2))
            if interrupted:
                steps(pruner, model, optimizer, images_and_labels(1))
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert ptsim.read_trace(tmp_path).end is not None
    other = fresh(seed=1)
    second = sgd(other)
    resumed = made(other, second, record=tmp_path, interval=9)
    resumed.load_state_dict(pruner.state_dict())
    train(resumed, other, second, 1, images_and_labels(1))
    resumed.close()
    trace = ptsim.read_trace(tmp_path)
    assert ([epoch.num_iterations for epoch in trace.epochs], trace.complete) == ([2, 1 + interrupted], True)


def test_a_trace_does_not_go_on_behind_an_epoch_that_nobody_has_recorded(tmp_path):
    state = None
    for folder in (tmp_path / "run", None):
        model = fresh()
        optimizer = sgd(model)
        pruner = made(model, optimizer, record=folder, interval=9)
        if state is not None:
            pruner.load_state_dict(state)
        train(pruner, model, optimizer, 1, images_and_labels(2))
        state = pruner.state_dict()
        pruner.close()
    model = fresh()
    pruner = made(model, sgd(model), record=tmp_path / "run", interval=9)
    with pytest.raises(UsageError, match="the 2 epochs before this state were not recorded"):
        pruner.load_state_dict(state)


def test_a_setting_of_an_optimizer_that_is_infinite_comes_back():
    """As Prodigy's growth_rate."""
    model, other = fresh(), fresh(seed=1)
    optimizers = [sgd(m) for m in (model, other)]
    for optimizer in optimizers:
        optimizer.param_groups[0]["growth_rate"] = float("inf")
    pruners = [made(m, o) for m, o in zip((model, other), optimizers, strict=True)]
    train(pruners[0], model, optimizers[0], 1, images_and_labels(2))
    pruners[1].load_state_dict(pruners[0].state_dict())
    assert optimizers[1].param_groups[0]["growth_rate"] == float("inf")
    state = pruners[0].state_dict()
    state["groups"][0]["lr"] = float("inf")
    with pytest.raises(UsageError, match="the optimizer's lr is inf"):
        pruners[1].load_state_dict(state)
