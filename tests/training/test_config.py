import math
import tomllib
import warnings

import pytest

from ptsim.errors import FileFormatError, UnknownNameError, UsageError
from ptsim.training.config import Config, from_recorded, make_config, read_config, resolve, to_toml
from ptsim.training.sources import DATASETS, DataSource

CIFAR = {"data_dir": "data"}


def test_the_defaults_are_the_papers_cifar_schedule():
    config = make_config(CIFAR)
    assert (config.epochs, config.batch, config.lr, config.weight_decay) == (182, 128, 0.1, 5e-4)
    assert resolve(config, device="cpu").momentum == 0.9
    assert resolve(config, device="cpu").augment == "crop_flip"


def test_an_unknown_setting_is_refused_by_name_with_the_close_one():
    with pytest.raises(UnknownNameError, match="unknown setting 'penalty_ration'") as caught:
        make_config({"penalty_ration": 0.2})
    assert caught.value.hint == "did you mean penalty_ratio?"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"penalty_ratio": 1.0}, r"'penalty_ratio' is 1.0, expected in \[0, 1\)"),
        ({"penalty_ratio": -0.1}, "penalty_ratio"),
        ({"interval": 0}, "'interval' is 0, expected at least 1"),
        ({"epochs": 0}, "'epochs' is 0"),
        ({"batch": 0}, "'batch' is 0"),
        ({"lr": 0.0}, "'lr' is 0.0, expected positive"),
        ({"lr": float("nan")}, "'lr' is nan"),
        ({"threshold": 0.0}, "threshold"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"lr_milestones": [20, 10]}, "lr_milestones"),
        ({"epochs": "many"}, "setting 'epochs': Expected int, got str"),
        ({"memory_budget": "8 apples", "dynamic_batch": True}, "memory_budget.*'apples'"),
        ({"memory_budget": "1e400 GiB", "dynamic_batch": True}, "memory_budget.*is not between 1 and"),
        ({"nesterov": True, "optimizer": "adam"}, "nesterov"),
        ({"schedule": "one_time"}, "reconfigure_epoch"),
        ({"schedule": "ssl"}, "pretrain_epochs"),
        ({"schedule": "ssl", "pretrain_epochs": 3, "penalty_ratio": 0.0}, "penalty_ratio above 0"),
        ({"epochs": 5, "finetune_epochs": 5}, "leave no epoch of 5"),
        ({"max_batch": 64, "dynamic_batch": True}, "'max_batch' is 64, below the mini-batch of 128"),
        ({"schedule": "one_time", "reconfigure_epoch": 9, "epochs": 10, "finetune_epochs": 2}, "at most the 8 epochs"),
        ({"crop_padding": 10**9}, "'crop_padding' is 1000000000, expected at most 4096"),
        ({"image_size": 10**6}, "'image_size' is 1000000, expected at most 16384"),
        ({"num_threads": 2**31}, "'num_threads' is 2147483648, expected at most"),
        ({"num_workers": 10**6}, "'num_workers' is 1000000, expected at most"),
        ({"threshold": math.inf}, "'threshold' is inf, expected a finite number"),
        ({"weight_decay": math.inf}, "'weight_decay' is inf, expected a finite number"),
    ],
)
def test_a_wrong_value_is_one_sentence_with_value_and_bound(changes, message):
    with pytest.raises(UsageError, match=message):
        make_config(CIFAR | changes)


@pytest.mark.parametrize(
    ("setting", "value", "what"),
    [("dataset", "mnist", "data set"), ("optimizer", "lion", "optimizer"), ("precision", "fp8", "precision")],
)
def test_an_unknown_choice_lists_those_that_exist(setting, value, what):
    with pytest.raises(UnknownNameError, match=f"unknown {what} '{value}'; known: "):
        make_config({setting: value})


@pytest.mark.parametrize("dataset", ["imagefolder", "cifar10"])
def test_files_need_a_folder(dataset):
    with pytest.raises(UsageError, match="needs the setting 'data_dir'") as caught:
        make_config({"dataset": dataset})
    assert str(caught.value.hint).startswith("--data-dir ")


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"penalty_ratio": 0.0, "interval": 5}, "interval"),
        ({"lr_rule": "sqrt"}, "lr_rule"),
        ({"dynamic_batch": True, "memory_budget": 8}, "memory_budget"),  # bytes
        ({"optimizer": "adam", "momentum": 0.8}, "momentum"),
        ({"compile_backend": "eager"}, "compile_backend"),
        ({"schedule": "one_time", "reconfigure_epoch": 9, "pretrain_epochs": 3}, "pretrain_epochs"),
        ({"penalty_ratio": 0.0, "pretrain_epochs": 3}, "pretrain_epochs"),
        ({"data_dir": "x"}, "data_dir"),
        ({"crop_padding": 2}, "crop_padding"),
        ({"num_workers": 2}, "num_workers"),
        ({"dataset": "live", "train_limit": 5}, "train_limit"),
        ({"dataset": "live", "augment": "crop"}, "augment"),
        ({"dataset": "live", "crop_padding": 2}, "crop_padding"),
    ],
)
def test_a_setting_without_effect_warns(changes, setting):
    with pytest.warns(UserWarning, match=f"setting '{setting}' has no effect") as caught:
        make_config({"dataset": "digits"} | changes)
    assert len(caught) == 1


def test_a_data_set_from_outside_says_what_it_uses_and_needs():
    photographs = DataSource(load="somewhere:load", uses=("data_dir",), needs=("data_dir",), photographs=True)
    DATASETS.add("birds", photographs)
    try:
        with pytest.raises(UsageError, match="data set 'birds' needs the setting 'data_dir'"):
            make_config({"dataset": "birds"})
        with pytest.warns(UserWarning, match="'download' has no effect: the data set birds does not use it"):
            config = make_config({"dataset": "birds", "data_dir": "x", "download": True})
        assert resolve(config, device="cpu").augment == "crop_flip"
    finally:
        DATASETS.remove("birds")


def test_a_resolved_configuration_survives_toml():
    changes = {"lr_milestones": (0.5, 41), "memory_budget": "2 GiB", "dynamic_batch": True}
    config = resolve(make_config(CIFAR | changes), device="cpu")
    assert config.memory_budget == 2 * 2**30
    assert from_recorded(tomllib.loads(to_toml(config))) == config


def test_a_recorded_configuration_does_not_warn_again():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_recorded({"dataset": "digits", "penalty_ratio": 0.0, "interval": 5})


def test_a_broken_configuration_file_is_named(tmp_path):
    file = tmp_path / "run.toml"
    with pytest.raises(FileFormatError, match=r"run\.toml.*cannot be read"):
        read_config(file)
    file.write_text("epochs = ")
    with pytest.raises(FileFormatError, match="not TOML"):
        read_config(file)
    file.write_text("[training]\nepochs = 3")
    with pytest.raises(FileFormatError, match=r"table \[training\]"):
        read_config(file)


def test_every_setting_is_documented():
    text = Config.__doc__ or ""
    self_explaining = {"seed", "epochs", "lr", "lr_gamma", "optimizer", "nesterov", "weight_decay", "device"}
    self_explaining |= {"precision", "memory_format", "compile_backend"}
    assert [name for name in Config.__struct_fields__ if name not in self_explaining and name not in text] == []
