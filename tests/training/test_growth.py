"""How far a mini-batch grows into the memory that fits, by hand: 32 images at a time, as in the paper."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from ptsim.network import Network, Precision
from ptsim.optimizers import kind_of
from ptsim.setting import StepSetting
from ptsim.training import growth, minibatch
from ptsim.training.config import make_config
from ptsim.training.measured import LastEpoch
from ptsim.training.prune_settings import make_settings
from ptsim.training.step import fits
from tests.traces import device_info, residual_network


def that_fit(monkeypatch: pytest.MonkeyPatch, module: Any, images: int) -> list[tuple[StepSetting, int]]:
    """So many images fit from now on; gives what was asked."""
    asked: list[tuple[StepSetting, int]] = []

    def largest_batch(network: Network, setting: StepSetting, *, capacity_bytes: int, device: object) -> int:
        asked.append((setting, capacity_bytes))
        return images

    monkeypatch.setattr(module, "largest_batch", largest_batch)
    return asked


@pytest.mark.parametrize(
    ("fitting", "ranks", "most", "images", "grown"),
    [
        (96, 1, None, 10**6, 96),  # the paper's ImageNet run: 64 → 96
        (95, 1, None, 10**6, 64),
        (159, 1, None, 10**6, 128),
        (20, 1, None, 10**6, 64),  # it never shrinks
        (400, 1, 160, 10**6, 160),
        (400, 2, 320, 10**6, 160),  # of both ranks together
        (400, 2, 300, 10**6, 128),
        (400, 2, None, 260, 128),  # 130 images for each rank
        (400, 2, 400, 260, 128),
        (400, 1, 500, 100, 96),
    ],
)
def test_a_run_grows_by_whole_multiples_as_far_as_memory_settings_and_images_go(
    monkeypatch: pytest.MonkeyPatch, fitting: int, ranks: int, most: int | None, images: int, grown: int
) -> None:
    asked = that_fit(monkeypatch, minibatch, fitting)
    limit = {} if most is None else {"max_batch": most}
    config = make_config({"dataset": "digits", "batch": 64, "dynamic_batch": True} | limit)
    found = minibatch.grown_batch(
        residual_network(), config, batch_per_gpu=64, world_size=ranks, num_train=images, capacity_bytes=7
    )
    assert found == grown
    assert asked == [(minibatch.step_setting(config, 64, ranks), 7)]


def test_the_rank_with_the_least_memory_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    that_fit(monkeypatch, minibatch, 160)  # on this rank, and 128 on another, where a trial finds that 96 do
    monkeypatch.setattr(minibatch, "fits", lambda *_: True)
    misfits_of_other = [1, 0]
    set_to: list[int] = []
    learner: Any = SimpleNamespace(
        config=make_config({"dataset": "digits", "batch": 128, "dynamic_batch": True}),
        batch=128,
        device=torch.device("cpu"),
        learning_rate_scale=1.5,
        set_batch=set_to.append,
        pruner=SimpleNamespace(average_bytes=0),
        team=SimpleNamespace(
            world_size=2, least=lambda mine: mine.clamp(max=128), sum=lambda misfits: misfits + misfits_of_other.pop(0)
        ),
        recorder=SimpleNamespace(
            meter=SimpleNamespace(info=lambda: device_info("a CPU")),
            architecture=residual_network(),
            resident_bytes=0,
        ),
    )
    grown = minibatch.BatchPolicy(learner, 10**6).grow()
    assert (grown.batch_per_gpu, grown.learning_rate_scale, set_to) == (96, 1.5, [192])


def test_a_runs_steps_are_reckoned_as_they_are_configured() -> None:
    changes = {"dataset": "digits", "precision": "bf16", "memory_format": "channels_last"}
    config = make_config(changes | {"optimizer": "rmsprop", "momentum": 0.5, "regularizer": "proximal"})
    assert minibatch.step_setting(config, 32, 4) == StepSetting(
        batch=32,
        precision=Precision.BF16,
        memory_format="channels_last",
        optimizer="rmsprop",
        momentum=0.5,
        proximal=True,
        regularizer="group_lasso",
        num_gpus=4,
    )
    dense = make_config({"dataset": "digits", "penalty_ratio": 0.0})
    assert minibatch.step_setting(dense, 8, 1) == StepSetting(batch=8)


def recording(optimizer: torch.optim.Optimizer, ranks: int = 1) -> Any:
    """A recorder of a loop with this optimizer, as far as a proposal asks it."""
    return SimpleNamespace(
        meter=SimpleNamespace(info=lambda: device_info("a CPU")),
        architecture=residual_network(),
        precision=Precision.FP32,
        memory_format="contiguous",
        optimizer=optimizer,
        regularizer=print,
        team=SimpleNamespace(world_size=ranks),
    )


@pytest.mark.parametrize(
    ("fitting", "passes", "ranks", "most", "images", "proposed"),
    [
        (96, 1, 1, None, 10**6, 96),
        (95, 1, 1, None, 10**6, 64),
        (20, 1, 1, None, 10**6, 64),
        (200, 2, 1, None, 10**6, 96),  # 100 images a pass
        (400, 1, 2, 320, 10**6, 160),
        (400, 1, 2, 300, 10**6, 128),
        (400, 1, 2, None, 130, 128),
        (400, 1, 1, None, 95, 64),
    ],
)
def test_an_own_loop_is_proposed_whole_multiples_more_for_each_pass(
    monkeypatch: pytest.MonkeyPatch,
    fitting: int,
    passes: int,
    ranks: int,
    most: int | None,
    images: int,
    proposed: int,
) -> None:
    asked = that_fit(monkeypatch, growth, fitting)
    recorder = recording(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.5), ranks)
    last = LastEpoch(passes=passes, images_per_rank=images, memory_bytes=7 * 2**30)
    settings = make_settings({} if most is None else {"max_batch": most})
    assert growth.proposed_batch(recorder, settings, 64, last, 2**30) == proposed
    step = StepSetting(batch=64 * passes, passes=passes, momentum=0.5, regularizer="group_lasso", num_gpus=ranks)
    assert asked == [(step, (7 if ranks == 1 else 6) * 2**30)]  # of the device, or the least of several, 1 GiB is taken
    recorder.regularizer = None
    settings = make_settings({"memory_budget_bytes": 5, "batch_granularity": 10**6, "regularizer": "proximal"})
    one_pass = msgspec.structs.replace(last, passes=1)
    assert growth.proposed_batch(recorder, settings, 64, one_pass, 2**30) == 64
    assert asked[1] == (StepSetting(batch=64, momentum=0.5, proximal=True, num_gpus=ranks), 5)


def test_buckets_beside_the_gradients_are_reckoned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = that_fit(monkeypatch, growth, 64)
    recorder = recording(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), ranks=2)
    for views in (True, False):
        last = LastEpoch(passes=1, images_per_rank=64, memory_bytes=None, bucket_views=views)
        growth.proposed_batch(recorder, make_settings({}), 64, last, 0)
    assert [setting.buckets_apart for setting, _ in asked] == [False, True]


def test_all_that_an_own_loops_optimizer_keeps_is_reckoned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam with amsgrad keeps three states, one more than its row says."""
    asked = that_fit(monkeypatch, growth, 64)
    weight, last = nn.Parameter(torch.zeros(2)), LastEpoch(passes=1, images_per_rank=64, memory_bytes=None)
    for amsgrad in (False, True):
        optimizer = torch.optim.Adam([weight], amsgrad=amsgrad)
        weight.grad = torch.ones(2)
        optimizer.step()
        growth.proposed_batch(recording(optimizer), make_settings({}), 64, last, 0)
    plain, more = (setting for setting, _ in asked)
    assert [kind_of(setting).states(setting.momentum) for setting in (plain, more)] == [2, 3]
    assert (plain.optimizer, plain.told_update, more.optimizer) == ("adam", None, "adam")


def test_the_rate_follows_the_mini_batch_in_proportion_or_with_the_root() -> None:
    assert growth.learning_rate_scale(64, 96, "linear") == 1.5
    assert growth.learning_rate_scale(64, 256, "sqrt") == 2.0


class Refusing(nn.Module):
    """Ends a pass with an error."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return x


@pytest.mark.parametrize(
    ("error", "fitting"),
    [
        (None, True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("GET was unable to find an engine to execute this computation"), False),  # so says cuDNN
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), False),
        (MemoryError(), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)
def test_a_trial_fails_for_want_of_memory_however_it_is_said(error: Exception | None, fitting: bool | None) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 4), Refusing(error))
    learner: Any = SimpleNamespace(
        model=model,
        device=torch.device("cpu"),
        recipe=SimpleNamespace(input_shape=(3, 8, 8)),
        config=SimpleNamespace(precision=Precision.FP32),
        pruner=SimpleNamespace(criterion=SimpleNamespace(add_gradient=lambda _: None)),
    )
    statistics = model[1].running_mean.clone()
    if fitting is None:
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            fits(learner, 4)
    else:
        assert fits(learner, 4) == fitting
    assert torch.equal(model[1].running_mean, statistics)
    assert all(parameter.grad is None for parameter in model.parameters())
    if fitting:  # and what the penalty takes
        learner.pruner.criterion.add_gradient = Refusing(torch.OutOfMemoryError("CUDA out of memory"))
        assert not fits(learner, 4)


@pytest.mark.parametrize(("changes", "capacity_bytes"), [({}, 35 * 2**30), ({"memory_budget": "1 GiB"}, 2**30)])
def test_what_images_and_an_average_take_of_the_device_is_no_room_for_a_mini_batch(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], capacity_bytes: int
) -> None:
    """3 and 2 of 40 GiB; a budget is the iteration's alone."""
    asked = that_fit(monkeypatch, minibatch, 64)
    recorder = SimpleNamespace(
        meter=SimpleNamespace(info=device_info), architecture=residual_network(), resident_bytes=3 * 2**30
    )
    learner: Any = SimpleNamespace(
        config=make_config({"dataset": "digits", "batch": 64, "dynamic_batch": True} | changes),
        team=SimpleNamespace(world_size=1, agree=lambda *_: None, least=lambda mine: mine),
        recorder=recorder,
        device=torch.device("cpu"),
        pruner=SimpleNamespace(average_bytes=2 * 2**30),
        batch=64,
        set_batch=lambda _: None,
        learning_rate_scale=1.0,
    )
    assert minibatch.BatchPolicy(learner, 10**6).grow().batch_per_gpu == 64
    assert [capacity for _, capacity in asked] == [capacity_bytes]
