"""What a trace says of a run that nobody has described: seen on optimizer, network and images, by hand."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from ptsim.errors import TrainingError, UsageError
from ptsim.network import Precision
from ptsim.trace.schema import Dataset, Epoch
from ptsim.training.facts import (
    RunFacts,
    change_record,
    check_finite,
    check_numbers,
    checked_facts,
    checked_fraction,
    checked_loss,
    costed_optimizer,
    note_image_shape,
    num_outputs,
    reducer_settings,
    seen_settings,
    told_update,
    widths,
)
from tests.traces import residual_network, shrinking_records


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def test_settings_are_those_of_the_group_with_the_most_weights_and_the_first_groups_rate() -> None:
    groups: list[dict[str, Any]] = [
        {"params": [weight(2)], "weight_decay": 0.0, "lr": 0.2},
        {"params": [weight(3, 3)], "weight_decay": 1e-4},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    module = nn.Linear(1, 1)
    seen = seen_settings(optimizer, module, batch=32, rate=0.3)
    assert seen == {
        "batch": 32,
        "optimizer": "sgd",
        "optimizer_class": "SGD",
        "compile": False,
        "penalty_ratio": 0.0,
        "lr": 0.3,  # at the first update
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "nesterov": False,
    }
    assert seen_settings(optimizer, module, batch=32, rate=None)["lr"] == 0.2
    optimizer.param_groups[0]["initial_lr"] = 0.5  # before a schedule's warm-up
    assert seen_settings(optimizer, module, batch=32, rate=0.3)["lr"] == 0.5


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("sends", [False, True])
def test_what_ddp_was_told_is_seen(views: bool, sends: bool) -> None:
    reducer = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(reducer)
    reducer.gradient_as_bucket_view, reducer.broadcast_buffers = views, sends
    assert reducer_settings(reducer) == {"gradient_as_bucket_view": views, "broadcast_buffers": sends}
    assert reducer_settings(nn.Linear(1, 1)) == reducer_settings(None) == {}


class Theirs(torch.optim.Optimizer):
    """An optimizer that no table knows, which keeps what it is told to."""

    def __init__(self, state: dict[str, Any], **defaults: Any) -> None:
        super().__init__([weight(3, 2)], defaults)
        self.state[self.param_groups[0]["params"][0]].update(state)


FULL = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("state", "defaults", "stands_for"),
    [
        ({"step": torch.tensor(1.0), "rows": torch.zeros(3)}, {}, "sgd"),  # nothing for every weight
        ({"a": FULL}, {}, "rmsprop"),
        ({"a": FULL}, {"momentum": 0.9}, "sgd"),
        ({"a": FULL}, {"momentum": 0.0}, "rmsprop"),
        ({"a": FULL, "b": FULL, "step": 1}, {"momentum": 0.9}, "adam"),
        ({"a": FULL, "b": FULL, "c": FULL}, {}, "adam"),
    ],
)
def test_an_unknown_optimizer_is_costed_by_the_values_it_keeps_for_a_weight(
    state: dict[str, Any], defaults: dict[str, float], stands_for: str
) -> None:
    assert costed_optimizer(Theirs(state, **defaults)) == stands_for


@pytest.mark.parametrize(
    ("state", "defaults", "costs", "momentum"),
    [
        ({"a": FULL}, {"momentum": 0.9}, (1, 11, 5), 0.9),  # as SGD with momentum
        ({}, {}, (0, 6, 3), 0.0),  # as SGD without: nobody said that it has one
        ({"a": FULL}, {}, (1, 16, 5), None),
        ({"a": FULL, "b": FULL}, {}, (2, 21, 7), None),
        # As Adam and two states more: each is read, beside another operand, and written.
        ({"a": FULL, "b": FULL, "c": FULL, "d": FULL}, {}, (4, 21 + 2 * 3, 7 + 2 * 2), None),
    ],
)
def test_what_no_table_knows_is_told_by_what_it_keeps_and_what_keeps_nothing_has_no_momentum(
    state: dict[str, Any], defaults: dict[str, float], costs: tuple[int, int, int], momentum: float | None
) -> None:
    optimizer = Theirs(state, **defaults)
    assert told_update(None, optimizer) is None
    assert told_update(3, optimizer) is None
    told = told_update("Theirs", optimizer)
    assert told is not None
    assert (told.num_states, told.accesses, told.fused_accesses) == costs
    assert seen_settings(optimizer, nn.Linear(1, 1), batch=1, rate=0.1).get("momentum") == momentum


@pytest.mark.parametrize(
    ("name", "make", "told"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), None),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1), None),
        ("adamw", torch.optim.AdamW, None),
        ("rmsprop", lambda p: torch.optim.RMSprop(p, momentum=0.5), None),
        # The largest second moments, or the mean gradients: a state more.
        ("adam", lambda p: torch.optim.Adam(p, amsgrad=True), (3, 21 + 3, 7 + 2)),
        ("rmsprop", lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True), (3, 16 + 5 + 3, 5 + 2 + 2)),
        # Of the matrix it keeps rows and columns, of the vector all.
        ("rmsprop", torch.optim.Adafactor, (0, 16, 5)),
        ("theirs", torch.optim.Adafactor, (0, 16, 5)),
    ],
)
def test_ptsims_own_are_told_where_they_keep_other_than_their_row_says(
    name: str, make: Any, told: tuple[int, int, int] | None
) -> None:
    parameters = [weight(3, 2), weight(3)]
    optimizer = make(parameters)
    assert told_update(name, optimizer) is None or name == "theirs"  # before the first update nobody can see it
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = told_update(name, optimizer)
    assert (None if found is None else msgspec.structs.astuple(found)) == told


def test_a_change_between_two_epochs_counts_channels_and_names_layers() -> None:
    before = residual_network((16,), (1,))  # 16 channels in the stem and in both layers of the block, 10 classes
    after = residual_network((12,), (0,))
    assert widths(after) == {"conv1": 12, "fc": 10}
    event = change_record(before, after, epoch=3, batch=8)
    assert (event.epoch, event.batch_before, event.batch_after) == (3, 8, 8)
    assert (event.before, event.after) == (before.id, after.id)
    assert event.channels_removed == 3 * 16 - 12
    assert event.layers_removed == ("layer1.0.conv1", "layer1.0.conv2")
    grown = change_record(after, before, epoch=3, batch=8)
    assert (grown.channels_removed, grown.layers_removed) == (0, ())


def test_images_of_another_size_than_the_trace_says_are_told() -> None:
    note_image_shape(None, (3, 8, 8))
    note_image_shape((3, 8, 8), (3, 8, 8))
    with pytest.warns(UserWarning, match="had images of 3×16×8, input_shape and the trace say 3×8×8"):
        note_image_shape((3, 16, 8), (3, 8, 8))


@pytest.mark.parametrize("wrong", [1.01, -0.01, math.nan, "0.5", 71])
def test_a_fraction_is_from_0_to_1(wrong: object) -> None:
    assert [checked_fraction("accuracy", value) for value in (0, 1, None)] == [0.0, 1.0, None]
    with pytest.raises(UsageError, match=r"accuracy is .*, expected a fraction from 0 to 1"):
        checked_fraction("accuracy", wrong)


def test_a_loss_is_one_number() -> None:
    assert checked_loss(torch.full((1, 1), 2.0)).shape == ()
    assert checked_loss(0.5) == 0.5
    with pytest.raises(UsageError, match="the loss is a tensor of 2 numbers, expected one number"):
        checked_loss(torch.zeros(2))


@pytest.mark.parametrize("name", ["train_loss", "validation_loss", "penalty"])
@pytest.mark.parametrize("value", [math.nan, -math.inf, 2e30, -2e30])  # no trace holds the last two
def test_an_epoch_without_finite_losses_is_refused(name: str, value: float) -> None:
    epoch = next(record for record in shrinking_records(epochs=1) if isinstance(record, Epoch))
    check_finite(epoch)
    check_finite(msgspec.structs.replace(epoch, **{name: None}))
    check_finite(msgspec.structs.replace(epoch, **{name: 1e30}))
    says = re.escape(f"the {name.replace('_', ' ')} of epoch 0 is {value}")
    with pytest.raises(TrainingError, match=says):
        check_finite(msgspec.structs.replace(epoch, **{name: value}))


def test_weights_of_another_format_than_a_trace_assumes_are_refused() -> None:
    check_numbers(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="weight of this Linear is of float64, a trace describes float32"):
        check_numbers(nn.Linear(2, 2).double())
    with pytest.raises(UsageError, match="weight of this Linear is on meta, a trace is of a CPU or a CUDA GPU"):
        check_numbers(nn.Linear(2, 2, device="meta"))  # or on mps, xpu, …


class Giving(nn.Module):
    """Gives images of 6 channels in a tuple, or one number an image."""

    def __init__(self, *, image: bool) -> None:
        super().__init__()
        self.conv, self.image = nn.Conv2d(3, 6, 1), image

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        return (x, x.mean()) if self.image else x.mean((1, 2, 3))


def test_the_classes_are_the_first_outputs_channels() -> None:
    assert num_outputs(Giving(image=True).train(), (3, 4, 4)) == 6
    assert num_outputs(Giving(image=False), (3, 4, 4)) == 1


def test_what_is_told_of_a_run_goes_before_what_is_seen_and_after_the_pruners_own() -> None:
    seen, own = {"lr": 0.1, "batch": 8, "interval": 1}, {"interval": 5}
    told = RunFacts(hyperparameters={"lr": 0.2, "interval": 3})
    assert told.settings(seen, own) == {"lr": 0.2, "batch": 8, "interval": 5}
    named = RunFacts(hyperparameters={"optimizer": "mine", "interval": 3})
    seen |= {"optimizer": "sgd", "optimizer_class": "Mine", "momentum": 0.0}
    assert named.settings(seen, own) == {"optimizer": "mine", "lr": 0.1, "batch": 8, "momentum": 0.0, "interval": 5}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"hyperparameters": {"optimizer": {"name": "sgd"}}}, r"hyperparameters\.optimizer is .*, expected a text"),
        ({"hyperparameters": {"epochs": "90"}}, r"hyperparameters\.epochs is '90', expected a whole number"),
        ({"hyperparameters": {"momentum": (0.8, 0.9)}}, r"hyperparameters\.momentum is \[0\.8, .*, expected a number"),
        ({"hyperparameters": SimpleNamespace(lr=1)}, "hyperparameters is a SimpleNamespace, expected a dict"),
        ({"seed": 2**64}, "field 'seed' is out of range"),
        ({"seed": "first"}, "facts: seed: Expected int, got str"),
        ({"model": 3}, r"facts: model: Expected str \| null, got int"),
        ({"precision": "fp8"}, "precision is 'fp8', expected one of fp32"),
        ({"memory_format": "nchw"}, "facts: memory_format: Invalid enum value 'nchw'"),
        (
            {"dataset": Dataset(name="d", num_classes=0, num_train=1, num_validation=0, input_shape=(3, 8, 8))},
            r"facts: dataset\.num_classes: Expected int >= 1",
        ),
    ],
)
def test_facts_that_no_trace_can_hold_are_refused_before_anything_is_trained(
    wrong: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        checked_facts(RunFacts(**wrong))
    assert "\n" not in caught.value.message


def test_facts_are_taken_as_people_write_them() -> None:
    dataset = Dataset(name="d", num_classes=2, num_train=4, num_validation=0, input_shape=(3, 8, 8))
    told = {"lr": float("inf"), "parts": [float("nan"), 1.5], "more": {2: -math.inf}, "momentum": None}
    found = checked_facts(RunFacts(dataset=dataset, precision="amp", seed=torch.tensor(3), hyperparameters=told))
    assert (found.dataset, found.precision, found.seed) == (dataset, Precision.FP16, 3)
    assert found.hyperparameters == {"lr": "inf", "parts": ["nan", 1.5], "more": {"2": "-inf"}, "momentum": None}
    assert checked_facts(None) == RunFacts()
