"""Numbers as Python callers give them: of Python, of numpy, of torch, or none at all."""

import decimal
import fractions
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

import ptsim
from ptsim.errors import UsageError
from ptsim.network import Precision
from ptsim.setting import (
    StepSetting,
    as_plain,
    changed,
    image_shape,
    parse_memory_format,
    parse_precision,
    parse_sharding,
    positive_number,
    real_number,
    whole_number,
    whole_numbers,
)
from ptsim.training.config import make_config
from ptsim.training.prune_settings import checked_plan, make_settings

WHOLE = [np.int32, np.int64, np.array, torch.tensor]
REAL = [float, np.float32, np.float64, np.array, torch.tensor, lambda x: torch.tensor([x]), fractions.Fraction]


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_numbers_of_numpy_and_torch_are_whole_numbers(kind):
    assert type(whole_number("batch", kind(8))) is int
    assert positive_number("batch", kind(8)) == 8
    assert whole_numbers("gpus", [kind(1), kind(8)]) == [1, 8]
    assert image_shape([kind(3), kind(32), 24]) == (3, 32, 24)


def test_arrays_are_lists_of_numbers():
    for values in (np.array([1, 8]), torch.tensor([1, 8]), range(1, 9, 7), (1, 8)):
        assert whole_numbers("gpus", values) == [1, 8]
    for shape in (np.array([3, 32, 24]), torch.tensor([3, 32, 24]), torch.zeros(3, 32, 24).shape, [3, 32, 24]):
        assert image_shape(shape) == (3, 32, 24)


@pytest.mark.parametrize("wrong", [8.0, True, "8", None, np.float32(8), np.True_, torch.tensor(8.0), torch.ones(2), 1j])
def test_what_is_no_whole_number_is_one_sentence(wrong):
    with pytest.raises(UsageError, match=r"^batch is [^\n]*, expected a positive whole number$"):
        whole_number("batch", wrong)


@pytest.mark.parametrize("wrong", [8, 8.0, "1,8", None, {1: 8}, np.int64(8), torch.tensor(8)])
def test_what_is_no_list_of_whole_numbers_is_one_sentence(wrong):
    with pytest.raises(UsageError, match=r"^gpus is .*, expected whole numbers such as"):
        whole_numbers("gpus", wrong)


@pytest.mark.parametrize("wrong", ["0.25", None, True, [0.25], torch.ones(2), decimal.Decimal("0.25"), 1j, np.True_])
def test_what_is_no_number_is_one_sentence(wrong):
    with pytest.raises(UsageError, match=r"^penalty_ratio is .*, expected a number$"):
        real_number("penalty_ratio", wrong)


@pytest.mark.parametrize("kind", REAL)
def test_real_numbers_of_every_kind_are_floats(kind):
    assert real_number("penalty_ratio", kind(0.25)) == 0.25
    assert type(real_number("penalty_ratio", kind(0.25))) is float
    assert checked_plan(kind(0.25), np.int64(5)) == (0.25, 5)


@pytest.mark.parametrize("kind", [np.float32, torch.tensor])
def test_settings_and_options_take_them(kind):
    whole = torch.tensor if kind is torch.tensor else np.int64
    made = make_settings({"threshold": kind(0.125), "channel_multiple": whole(8), "profile": np.False_})
    assert (made.threshold, made.channel_multiple, made.profile) == (0.125, 8, False)
    asked = {"dataset": "digits", "lr": kind(0.125), "batch": whole(16), "lr_milestones": np.array([0.25, 0.5])}
    config = make_config(asked)
    assert (config.lr, config.batch, config.lr_milestones) == (0.125, 16, (0.25, 0.5))

    class Options(msgspec.Struct, frozen=True, kw_only=True):
        share: float = 0.0
        sizes: tuple[int, ...] = ()

    options = changed(Options(), {"share": kind(0.5), "sizes": torch.tensor([1, 8])})
    assert (options.share, options.sizes) == (0.5, (1, 8))
    assert as_plain({"data_dir": Path("data"), "mode": np.str_("union")}) == {"data_dir": "data", "mode": "union"}


def test_public_calls_take_numpys_numbers():
    of_8, of_16 = ptsim.allreduce("dgx-a100", np.int64(8), np.float32(2**20)), torch.tensor(16)
    assert of_8 == ptsim.allreduce("dgx-a100", 8, 2**20)
    assert ptsim.allreduce("dgx-a100", of_16, 2**20).seconds > of_8.seconds
    with pytest.raises(UsageError, match="gpus is '8', expected a positive whole number"):
        ptsim.allreduce("dgx-a100", "8", 2**20)
    with pytest.raises(UsageError, match="message_bytes is 'many', expected a number"):
        ptsim.allreduce("dgx-a100", 8, "many")
    as_list = ptsim.cost("resnet20", input_shape=(3, 32, 32), batch=8)
    assert ptsim.cost("resnet20", input_shape=np.array([3, 32, 32]), batch=torch.tensor(8)) == as_list


def test_the_parts_of_a_mini_batch_are_rounded_up():
    whole = StepSetting(batch=10, passes=4, optimizer="adam")
    assert whole.one_pass == StepSetting(batch=3, optimizer="adam")  # 3, 3, 3 and 1 images
    assert StepSetting(batch=8, passes=4).pass_batch == 2
    assert StepSetting(batch=8).one_pass == StepSetting(batch=8)


def test_what_a_gpu_among_others_does_alone_and_keeps():
    alone = StepSetting(batch=8, precision=Precision.BF16)
    for sharding, share in (("none", 1), ("zero1", 1 / 4), ("zero2", 1 / 4)):
        setting = StepSetting(batch=8, precision=Precision.BF16, num_gpus=4, sharding=sharding)
        assert setting.alone == alone
        assert (setting.data_parallel, setting.update_share, setting.half) == (True, share, True)
    assert (alone.data_parallel, alone.update_share) == (False, 1)
    assert [StepSetting(batch=1, precision=precision).half for precision in Precision] == [False, False, True, True]


@pytest.mark.parametrize(
    ("parse", "text", "value", "message"),
    [
        (parse_precision, "amp", Precision.FP16, "precision is 'x', expected one of fp32, tf32, fp16, bf16, amp"),
        (parse_precision, "bf16", Precision.BF16, "precision is 'x', expected one of"),
        (parse_sharding, "zero2", "zero2", "sharding is 'x', expected one of none, zero1, zero2"),
        (parse_memory_format, "channels_last", "channels_last", "is 'x', expected one of contiguous, channels_last"),
    ],
)
def test_names_of_settings_are_read_or_all_told(parse, text, value, message):
    assert parse(text) == value
    with pytest.raises(UsageError, match=message):
        parse("x")


@pytest.mark.parametrize("name", ["channel_multiple", "batch_granularity", "max_batch", "memory_budget_bytes"])
def test_a_number_of_prunetrain_is_at_least_one(name):
    assert getattr(make_settings({name: 1}), name) == 1
    with pytest.raises(UsageError, match=f"setting '{name}' is 0, expected at least 1"):
        make_settings({name: 0})
    with pytest.raises(UsageError, match=f"setting '{name}'"):
        make_settings({name: 1.5})


def test_a_ratio_is_at_least_nothing_and_less_than_everything():
    assert checked_plan(0, 1) == (0.0, 1)
    for ratio in (-0.1, 1.0, float("nan")):
        with pytest.raises(UsageError, match=r"penalty_ratio is .*, expected in \[0, 1\)"):
            checked_plan(ratio, 1)


def test_what_nobody_sets_is_what_the_paper_has():
    """docs/method.md §2 and §3: a threshold of 1e-4, the union of channels, 32 images at a time, the linear rule."""
    made = make_settings({})
    assert (made.threshold, made.mode, made.channel_multiple) == (1e-4, "union", 1)
    assert (made.batch_granularity, made.max_batch, made.lr_rule) == (32, None, "linear")
    assert (made.criterion, made.regularizer) == ("group_lasso", "gradient")
