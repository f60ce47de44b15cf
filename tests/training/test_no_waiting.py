"""The training step never waits for the device: no `.item()`, `.cpu()` or the like, but where the code says so.

Two stand-ins for a GPU. On the "meta" device nothing has a value, so whatever asks for one raises, and copies between
it and the host are counted. On the CPU everything is real, and what would wait on a GPU is counted. Calls that wait by
name (`synchronize`) are looked for in the code.
"""

import ast
import contextlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import ptsim
from ptsim.measure import timers
from ptsim.prune.criteria.group_lasso import GroupLasso
from ptsim.training import data as data_module
from ptsim.training import live, loop, misuse, step
from ptsim.training.data import ResidentData, Share
from ptsim.training.learner import Learner
from ptsim.training.losses import LossSum
from ptsim.training.watch import Watch
from tests.training.runs import settings

HOLLOW = torch.device("meta")
NEEDS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # the host must know the result
BY_MASK = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}
ONTO_THE_HOST = ("cpu", "tolist", "numpy", "__array__")
FROM_THE_HOST = (torch.tensor, torch.as_tensor, torch.asarray)


def waits(function, args):
    """Whether an operator would wait on a GPU; indexing does where a mask says how many elements there are."""
    if function in BY_MASK:
        masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        return bool(masks) and (len(args) < 3 or args[2].numel() > 1)
    return bool(NEEDS_VALUES & set(function.tags))


class Waits(TorchDispatchMode):
    """Counts operators that would wait for `device`, and copies between it and the host that are not told not to."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self._device = device
        self._calls = _Calls(self.seen)

    def __enter__(self):
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        copies = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        told = (kwargs or {}).get("non_blocking", function is torch.ops.aten.copy_.default and args[2:] == (True,))
        there = any(tensor.device.type == self._device.type for tensor in tensors)
        if (there and waits(function, args)) or (copies and len({t.device for t in tensors}) > 1 and not told):
            self.seen[str(function)] += 1
        return result


class _Calls(TorchFunctionMode):
    """Counts calls that operators do not show: reading memory, and making a tensor of the host's numbers."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        named = [str(value) for value in (*args[1:], *kwargs.values()) if isinstance(value, str | torch.device)]
        to_host = name == "to" and "cpu" in named
        made = function in FROM_THE_HOST and torch.device(kwargs.get("device") or "cpu").type != "cpu"
        if name in ONTO_THE_HOST or to_host or made:
            self._seen[name] += 1
        return function(*args, **kwargs)


# ---- on the CPU, counted -----------------------------------------------------------------------------------------


def waits_of_an_epoch(num_iterations, monkeypatch, tmp_path, **changes):
    seen: Counter[str] = Counter()
    train_epoch = loop.train_epoch

    def watched(*args, **kwargs):
        with Waits(torch.device("cpu")) as counted:
            result = train_epoch(*args, **kwargs)
        seen.update(counted.seen)
        return result

    monkeypatch.setattr(loop, "train_epoch", watched)
    chosen = settings(epochs=1, batch=4, train_limit=4 * num_iterations, interval=1) | changes
    if chosen["penalty_ratio"] == 0:
        chosen = {name: value for name, value in chosen.items() if name not in ("interval", "threshold")}
    loop.train(chosen, out=tmp_path / str(num_iterations))
    monkeypatch.setattr(loop, "train_epoch", train_epoch)
    return seen


@pytest.mark.parametrize(
    "changes",
    [{}, {"penalty_ratio": 0.0}, {"regularizer": "proximal"}],
    ids=lambda changes: "-".join(changes) or "group lasso",
)
def test_more_iterations_wait_no_more_often(changes, monkeypatch, tmp_path):
    few = waits_of_an_epoch(8, monkeypatch, tmp_path, **changes)
    many = waits_of_an_epoch(40, monkeypatch, tmp_path, **changes)
    assert many == few


def test_the_loss_is_looked_at_every_64_iterations(monkeypatch, tmp_path):
    few = waits_of_an_epoch(60, monkeypatch, tmp_path)
    many = waits_of_an_epoch(70, monkeypatch, tmp_path)
    assert sum(many.values()) == sum(few.values()) + 1


def test_in_fp16_the_scaler_asks_once_an_iteration_whether_a_gradient_overflowed(monkeypatch, tmp_path):
    few = waits_of_an_epoch(8, monkeypatch, tmp_path, precision="fp16")
    many = waits_of_an_epoch(40, monkeypatch, tmp_path, precision="fp16")
    waited = many - few
    del waited["to"]  # the scaler's own, to the device that stands for the GPU here
    assert waited == Counter({"aten._local_scalar_dense.default": 40 - 8})


# ---- on a device without values ------------------------------------------------------------------------------------


class EpochOverError(Exception):
    """The epoch without values is over; there is nothing to validate or record."""


def emptied(module):
    """Parameters and buffers of the module, in place, on the device that has no values."""
    for tensor in (*module.parameters(), *module.buffers()):
        hollow = torch.empty_like(tensor.detach(), device=HOLLOW)
        is_weight = isinstance(tensor, nn.Parameter)
        torch.utils.swap_tensors(tensor, nn.Parameter(hollow, tensor.requires_grad) if is_weight else hollow)


def hollow_epoch(num_iterations, monkeypatch, tmp_path, **changes):
    """Copies and waits in an epoch of the own loop on the device without values; what asks for a value raises."""
    chosen = {"epochs": 2, "batch": 4, "train_limit": 4 * num_iterations, "augment": "crop_flip", "profile": False}
    config = settings(**chosen) | changes
    if config["penalty_ratio"] == 0:
        config = {name: value for name, value in config.items() if name not in ("interval", "threshold")}
    seen: Counter[str] = Counter()
    train_epoch = step.train_epoch

    def without_values(learner, batches, plan, *, consult):
        for network in (learner.model, learner.average):
            if network is not None:
                emptied(network)
        learner.device = learner.recorder.device = HOLLOW
        learner.recorder._losses = LossSum(HOLLOW)
        if learner.config.penalty_ratio:
            learner.pruner.penalty_coefficient = 0.1  # the first mini-batch of a run decides it, and waits
        images = torch.zeros(4 * num_iterations, 3, 8, 8, dtype=torch.uint8)
        labels = torch.zeros(4 * num_iterations, dtype=torch.int64)
        source = ResidentData(
            "hollow", train=(images, labels), validation=(images, labels), num_classes=4, config=learner.config,
            device=HOLLOW,
        )  # fmt: skip
        with Waits(HOLLOW) as counted:
            train_epoch(learner, source.training_batches(0, 4, Share()), plan, consult=consult)
        seen.update(counted.seen)
        raise EpochOverError

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_epoch", without_values)
        patch.setattr(misuse.Order, "_survives", True)  # the first update of a run looks, and waits
        patch.setattr(step, "number_format", lambda *_: contextlib.nullcontext())  # autocast knows no such device
        patch.setattr(step._Tally, "stop_if_bad", lambda *_: None)  # looks at a value now and then
        patch.setattr(step._Tally, "total", lambda *_: None)
        with pytest.raises(EpochOverError):
            loop.train(config, out=tmp_path / f"{num_iterations}-{len(list(tmp_path.iterdir()))}")
    return seen


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"penalty_ratio": 0.0},
        {"regularizer": "proximal"},
        {"criterion": "slimming"},
        {"ema_decay": 0.9, "clip_norm": 1.0, "mixup": 0.4, "label_smoothing": 0.1},
        {"optimizer": "adamw", "dynamic_batch": True, "max_batch": 8, "batch_granularity": 4},
    ],
    ids=lambda changes: "-".join(changes) or "group lasso",
)
def test_a_step_asks_the_device_for_no_value_and_copies_nothing(changes, monkeypatch, tmp_path):
    few = hollow_epoch(2, monkeypatch, tmp_path, **changes)
    many = hollow_epoch(6, monkeypatch, tmp_path, **changes)
    assert many == few


def test_losses_are_summed_without_a_copy(monkeypatch):
    monkeypatch.setattr("ptsim.training.losses._FOLD", 3)
    losses = LossSum(HOLLOW)
    with Waits(HOLLOW) as counted:
        for _ in range(7):
            losses.add(torch.empty((), device=HOLLOW), 4)
    assert counted.seen == {}


def in_own_loop(num_iterations):
    """Waits in a loop of somebody's own with `PruneTrain`, which records nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = ptsim.PruneTrain(model, optimizer, input_shape=(3, 8, 8))
    emptied(model)
    pruner.recorder.device, pruner.recorder._losses = HOLLOW, LossSum(HOLLOW)
    pruner.penalty_coefficient, pruner._order._survives = 0.1, True  # the first step decides and looks, and waits
    images = torch.empty(4, 3, 8, 8, device=HOLLOW)
    labels = torch.empty(4, dtype=torch.int64, device=HOLLOW)
    with Waits(HOLLOW) as counted:
        for _ in range(num_iterations):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            pruner.step(loss)
            optimizer.step()
    return counted.seen


def test_ones_own_loop_does_not_wait_either():
    assert in_own_loop(3) == {}


# ---- what would be noticed -----------------------------------------------------------------------------------------


def first_weight(criterion):
    return criterion.weights[0].detach()


# What somebody might add to a step: where, and what it does with the arguments of the call.
MUTANTS = {
    "item() of the loss": (step._Tally, "add", lambda tally, i, loss, *_: loss.item()),
    "float() of the loss": (LossSum, "add", lambda losses, loss, _: float(loss)),
    "if tensor": (step._Tally, "add", lambda tally, i, loss, *_: 1 if loss > 0 else 2),
    "tolist() of the hits": (step._Tally, "add", lambda tally, i, loss, logits, _: logits.argmax(1).tolist()),
    "int() of the labels": (step._Tally, "add", lambda tally, i, loss, logits, labels: int(labels.max())),
    "nonzero() in the penalty": (GroupLasso, "add_gradient", lambda lasso, _: first_weight(lasso).nonzero()),
    "a mask as index": (GroupLasso, "add_gradient", lambda lasso, _: first_weight(lasso)[first_weight(lasso) > 0]),
    "writing under a mask": (
        GroupLasso,
        "add_gradient",
        lambda lasso, _: first_weight(lasso).index_put_((first_weight(lasso) > 0,), torch.ones(2, device=HOLLOW)),
    ),
    "cpu() of the average": (Learner, "update_average", lambda learner: next(learner.model.parameters()).cpu()),
    "to('cpu')": (Learner, "update_average", lambda learner: next(learner.model.parameters()).to("cpu")),
    "numpy()": (misuse.Order, "penalty_is_added", lambda order: order._weights[0].detach().numpy()),
    "equal()": (misuse.Order, "before_penalty", lambda order: torch.equal(order._weights[0], order._weights[0])),
    "unique() in a hook": (Watch, "_update_ends", lambda watch, optimizer, *_: _weights(optimizer)[0].unique()),
    "bool() in backward": (Watch, "_backward_begins", lambda watch, _, gradient: bool(gradient.isnan().any())),
    "norm below a limit": (Watch, "_update_begins", lambda watch, o, *_: _weights(o)[0].norm() < 1 or None),
    "host numbers as a tensor": (step._Tally, "add", lambda *_: torch.tensor([1.0], device=HOLLOW)),
    "a copy from the host": (ResidentData, "_prepared", lambda source, images: torch.ones(3).to(images.device)),
    "a copy onto the device": (ResidentData, "_augmented", lambda source, i, *_: i.clone().copy_(torch.ones(len(i)))),
}  # fmt: skip


def _weights(optimizer):
    return optimizer.param_groups[0]["params"]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_what_waits_would_be_noticed(mutant, monkeypatch, tmp_path):
    place, name, act = MUTANTS[mutant]
    right = getattr(place, name)

    def wrong(*args, **kwargs):
        with torch.no_grad():
            act(*args, **kwargs)
        return right(*args, **kwargs)

    monkeypatch.setattr(place, name, wrong)
    try:
        few = hollow_epoch(2, monkeypatch, tmp_path, ema_decay=0.9)
        many = hollow_epoch(6, monkeypatch, tmp_path, ema_decay=0.9)
    except (RuntimeError, TypeError):
        return  # it asked for a value
    assert sum(many.values()) >= sum(few.values()) + 4


# ---- by name, and copies from files --------------------------------------------------------------------------------

WAITING_CALLS = {"synchronize", "wait_stream", "current_blas_handle"}
MAY_WAIT = {
    "training/pruning:_reconfigure": "once a reconfiguration, whose seconds are recorded",
    "measure/timers:__init__": "once an epoch, before its clock starts",
    "measure/timers:resolve": "once an epoch, at its end",
    "measure/timers:_resolve": "for an event that thousands of events have followed",
}


def test_no_function_of_a_step_waits_by_name():
    root = Path(ptsim.__file__).parent
    files = [*root.glob("training/*.py"), *root.glob("prune/criteria/*.py"), root / "measure" / "timers.py"]
    found = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(part, ast.Attribute) and part.attr in WAITING_CALLS for part in ast.walk(node)
            ):
                found.add(f"{path.relative_to(root).with_suffix('').as_posix()}:{node.name}")
    assert found == set(MAY_WAIT)


class Loader:
    """Takes a DataLoader's place: two mini-batches, and what it was asked for."""

    def __init__(self, *_, pin_memory, **__):
        self.asked.append(pin_memory)

    def __iter__(self):
        labels = torch.zeros(4, dtype=torch.int32) if self.classes is None else torch.zeros(4, self.classes)
        yield from [(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), labels)] * 2


@pytest.mark.parametrize("source", ["files", "live", "live shares"])
def test_images_from_a_loader_are_copied_without_waiting(source, monkeypatch):
    asked: list[bool] = []
    classes = 10 if source == "live shares" else None
    monkeypatch.setattr(Loader, "asked", asked, raising=False)
    monkeypatch.setattr(Loader, "classes", classes, raising=False)
    monkeypatch.setattr(torch.utils.data, "DataLoader", Loader)
    config = ptsim.training.config.Config(model="resnet20", dataset="digits")
    pixels = torch.utils.data.TensorDataset(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4))
    pixels.classes = [str(number) for number in range(10)]  # type: ignore[attr-defined] # as torchvision's have
    for device in (HOLLOW, torch.device("cuda")):
        if source == "files":
            made = object.__new__(data_module.StreamedData)
            made._config, made._device = config, device
            made._scale, made._shift = (torch.empty(3, 1, 1, device=HOLLOW) for _ in range(2))
            batches = made._batches([], [[0]])
        else:
            batches = live.LiveData((pixels, pixels), None, config=config, device=device)._batches(pixels, [[0]], 0)
        if device is HOLLOW:
            with Waits(HOLLOW) as counted:
                found = list(batches)
            assert {tensor.device for batch in found for tensor in batch} == {HOLLOW}
            assert {kind for kind in counted.seen if "_to_copy" in kind} == set()
        else:
            with contextlib.suppress(RuntimeError, AssertionError):  # there is no such device here
                next(batches)
    assert asked == [False, True]


def test_images_that_lie_on_a_gpu_are_not_pinned(monkeypatch):
    """Only what is on the host can be: torch would refuse."""
    monkeypatch.setattr(Loader, "asked", [], raising=False)
    monkeypatch.setattr(Loader, "classes", None, raising=False)
    monkeypatch.setattr(torch.utils.data, "DataLoader", Loader)
    config = ptsim.training.config.Config(model="resnet20", dataset="digits")
    pixels = torch.utils.data.TensorDataset(torch.zeros(4, 3, 8, 8, device=HOLLOW), torch.zeros(4))
    pixels.classes = ["a", "b"]  # type: ignore[attr-defined] # as torchvision's have
    data = live.LiveData((pixels, pixels), None, config=config, device=torch.device("cuda"))
    with contextlib.suppress(RuntimeError, AssertionError):  # there is no such device here
        next(data._batches(pixels, [[0]], 0))
    assert Loader.asked == [False]


class Event:
    """A CUDA event that passes when it is recorded."""

    clock = 0.0
    waits: tuple["Event", ...] = ()

    def record(self, _stream):
        Event.clock += 1.0
        self.at = Event.clock

    def elapsed_time(self, other):
        return other.at - self.at

    def synchronize(self):
        Event.waits += (self,)


def test_the_gpus_clock_waits_only_for_what_is_long_past(monkeypatch):
    waits_for_all = []
    monkeypatch.setattr(Event, "waits", ())
    monkeypatch.setattr(Event, "clock", 0.0)
    monkeypatch.setattr(timers, "cuda_event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", waits_for_all.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    timer = timers.StepTimer("cuda")
    marks = [timer.mark() for _ in range(timers._CudaClock._BLOCK - 2)]  # the timer has one of its own
    assert (len(waits_for_all), len(Event.waits)) == (1, 0)  # at the start alone
    timer.mark()
    assert len(waits_for_all) == 1
    assert [Event.clock - event.at for event in Event.waits] == [timers._CudaClock._BLOCK // 2]
    timer.add("forward", marks[1], marks[-1])
    timer.end_step()
    seconds, _ = timer.finish()
    assert seconds.forward_s == pytest.approx((len(marks) - 2) / 1e3)  # one millisecond between two events
    assert len(waits_for_all) == 2
