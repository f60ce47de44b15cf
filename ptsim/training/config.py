"""What decides a training run: one flat record, read from a TOML file, changed by `key=value` overrides, checked here.

Defaults are docs/method.md §4 for CIFAR. Settings that say "auto" or are absent are filled in by `resolve`, so the
trace holds what really ran. Rules between settings are in `_check`, settings that would do nothing in
`_without_effect`.
"""

from __future__ import annotations

import os
import typing
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import tomli_w

from ptsim.errors import FileFormatError, UnknownNameError, UsageError
from ptsim.network import MemoryFormat, Precision
from ptsim.optimizers import OPTIMIZERS
from ptsim.setting import PRECISION_NAMES, as_plain, parse_precision
from ptsim.textfile import read_toml
from ptsim.trace.schema import MOST_EPOCHS
from ptsim.training.registries import REGISTRIES
from ptsim.training.sources import DEFAULT as DEFAULT_DATASET
from ptsim.training.sources import SOME_USE, data_source
from ptsim.units import MIB, Bytes


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A training run.

    Attributes:
        model: zoo name, `torchvision:NAME` or `path/to/file.py:function`.
        dataset: what is trained on: digits, cifar10, cifar100, imagefolder, huggingface (a data set that `save_to_disk`
            of the package datasets wrote), synthetic, or another package's.
        data_dir: the folder of the data set; digits and synthetic need none.
        download: let torchvision fetch CIFAR into `data_dir`.
        train_limit: use only this many training images, drawn with the seed.
        validation_limit: use only this many validation images, drawn with the seed.
        image_size: side of the images that the network sees; None means the data set's own (the model's for images of
            files that differ in size or are not square, and for synthetic data).
        seed: decides weights, order of the images and augmentation.
        augment: "crop_flip" (random crop, and mirrored at random), "crop", or "none"; "auto" is "crop_flip" for
            photographs and "none" for digits and synthetic data.
        crop_padding: pixels of zeros around the image from which the random crop is taken; None is an eighth of the
            image's height. Images that are read from disk in every epoch have none.
        start_from: a run folder: training starts from its last stored network, pruned as it is, in place of a new one.
        weights: a state dict or safetensors file, or `torchvision:WEIGHTS` or `timm:MODEL` where they lie in those
            libraries' caches: training starts from these weights.
        weights_skip: weights whose names begin with one of these are not loaded, such as "fc." for other classes.
        num_workers: processes that load images, for image trees that do not fit in memory and for data sets given in
            Python; None is one per core, at most 16.
        validation_share: of an image tree or Hugging Face data set without validation images, this share of each class
            validates.
        epochs: number of epochs.
        batch: images per iteration over all ranks; a last mini-batch of an epoch that is not full is left out.
        lr: initial learning rate, for the mini-batch that the run begins with.
        lr_schedule: course of the learning rate: "step" falls at the milestones, "cosine", or another package's.
        warmup_epochs: number of first epochs in which the learning rate grows in equal steps to `lr`.
        lr_milestones: epochs at which the learning rate is multiplied by `lr_gamma`; below 1 a fraction of the epochs,
            at least one.
        lr_gamma: factor on the learning rate at every milestone.
        optimizer: one of sgd, adam, adamw, rmsprop, or another package's.
        nesterov: use Nesterov's momentum in SGD.
        weight_decay: factor of the weight decay, which acts on every parameter at every update.
        momentum: momentum of SGD (None: 0.9) and RMSprop (None: 0); Adam has its own.
        ema_decay: decay per iteration of an average of the weights, which validation then uses; 0 keeps none.
        label_smoothing: share of every label that is spread over all classes.
        mixup: parameter α of the Beta distribution that mixes pairs of images and their labels; 0 mixes nothing.
        clip_norm: gradients, the penalty's included, are scaled down to this Euclidean norm; None clips nothing.
        penalty_ratio: the penalty's share of the first loss (docs/method.md Eq. 3); 0 is the dense baseline.
        criterion: what pushes channels towards zero: "group_lasso", "slimming" (network slimming), or another
            package's.
        regularizer: the criterion's penalty acts as a "gradient", or as a "proximal" step after every update.
        interval: epochs between reconfigurations.
        threshold: a channel is sparse, and may be removed, when the largest |w| of its weights is below this.
        mode: what layers that meet at a sum keep: "union", the channels that any of them needs, or "gating", each
            branch its own, with gathers and scatters around it.
        channel_multiple: the number of channels that stay is rounded up to a multiple of this. In half precision 8
            saves convolutions the copies that pad other numbers.
        schedule: "continuous" reconfigures every interval and after the last epoch with the penalty; "one_time" once,
            after `reconfigure_epoch` epochs; "ssl" trains dense for `pretrain_epochs`, then with the penalty and a
            learning rate that starts anew, and prunes once at the end of that.
        reconfigure_epoch: epochs before the only reconfiguration of the schedule "one_time".
        pretrain_epochs: number of first epochs in which the network trains dense (schedules "ssl" and "continuous").
        finetune_epochs: number of last epochs, which train without the penalty.
        dynamic_batch: let the mini-batch grow at reconfigurations as memory allows (docs/train.md says how).
        memory_budget: memory that each rank may use, "8 GiB" or bytes; None is the device's memory.
        batch_granularity: the mini-batch of each rank grows by multiples of this.
        max_batch: largest mini-batch, of all ranks together.
        lr_rule: how the learning rate follows the mini-batch: in proportion ("linear") or with the square root
            ("sqrt").
        data_memory_bytes: an image tree larger than this when decoded is read from disk in every epoch, with random
            resized crops, and normalised with ImageNet's mean and deviation; a Hugging Face data set that is larger is
            refused. None is a quarter of the memory.
        device: one of "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        precision: number format of the matrix products: fp32, tf32, and bf16 or fp16 by autocast; amp is fp16.
        memory_format: layout of the images and weights, contiguous or channels_last. On a CPU with AVX-512 a
            pruned network may save more of the time in channels_last (docs/evidence.md).
        num_threads: threads of torch on a CPU; None is its own choice. Sums, and so the last bits of a run, depend on
            it; small networks are fastest with 1.
        sync_batch_norm: compute the statistics of BatchNorm over all ranks.
        compile: `torch.compile` the network, once per architecture.
        compile_backend: backend of torch.compile.
        profile: measure every new architecture, and every new mini-batch, layer by layer.
        record_channel_maxima: the largest weight of every output channel goes into the trace (`analysis/fig4.py`).
        keep_every: the weights of every n-th epoch are kept; those of reconfigured epochs and of the last one always.
        loggers: where else the numbers of every epoch go: csv, tensorboard, wandb, mlflow, or another package's.
    """

    model: str = "resnet32"
    dataset: str = DEFAULT_DATASET
    data_dir: str | None = None
    download: bool = False
    train_limit: int | None = None
    validation_limit: int | None = None
    image_size: int | None = None
    augment: Literal["auto", "crop_flip", "crop", "none"] = "auto"
    crop_padding: int | None = None
    num_workers: int | None = None
    validation_share: float = 0.1
    seed: int = 0
    start_from: str | None = None
    weights: str | None = None
    weights_skip: tuple[str, ...] = ()

    epochs: int = 182
    batch: int = 128
    lr: float = 0.1
    lr_schedule: str = "step"
    warmup_epochs: int = 0
    lr_milestones: tuple[float, ...] = (0.5, 0.75)
    lr_gamma: float = 0.1
    optimizer: str = "sgd"
    momentum: float | None = None
    nesterov: bool = False
    weight_decay: float = 5e-4
    ema_decay: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    clip_norm: float | None = None

    penalty_ratio: float = 0.25
    criterion: str = "group_lasso"
    regularizer: Literal["gradient", "proximal"] = "gradient"
    interval: int = 10
    threshold: float = 1e-4
    mode: Literal["union", "gating"] = "union"
    channel_multiple: int = 1
    schedule: Literal["continuous", "one_time", "ssl"] = "continuous"
    reconfigure_epoch: int | None = None
    pretrain_epochs: int | None = None
    finetune_epochs: int = 0

    dynamic_batch: bool = False
    memory_budget: int | str | None = None
    batch_granularity: int = 32
    max_batch: int | None = None
    lr_rule: Literal["linear", "sqrt"] = "linear"

    device: str = "auto"
    num_threads: int | None = None
    precision: Precision = Precision.FP32
    memory_format: MemoryFormat = "contiguous"
    compile: bool = False
    compile_backend: str = "inductor"
    sync_batch_norm: bool = False
    data_memory_bytes: int | None = None
    profile: bool = True
    record_channel_maxima: bool = False
    keep_every: int = 10
    loggers: tuple[str, ...] = ()

    @property
    def regularized(self) -> bool:
        """The run prunes; False is the dense baseline."""
        return self.penalty_ratio > 0

    @property
    def memory_budget_bytes(self) -> int | None:
        """The budget in bytes, None where the device's memory decides."""
        if isinstance(self.memory_budget, str):
            return int(Bytes.parse(self.memory_budget))
        return self.memory_budget


SETTINGS = Config.__struct_fields__
_CHOICES: dict[str, tuple[str, ...]] = {"precision": PRECISION_NAMES} | {
    name: typing.get_args(hint) for name, hint in typing.get_type_hints(Config).items() if "Literal" in str(hint)
}


def make_config(settings: Mapping[str, Any], *, source: str = "configuration", quiet: bool = False) -> Config:
    """The checked configuration that `settings` ask for; the rest are defaults.

    Warns of settings without effect unless `quiet`.

    Raises:
        UnknownNameError: a setting or a closed choice that does not exist.
        UsageError: a value of the wrong type or out of its bounds, or settings that contradict each other.
    """
    for name in settings:
        if name not in SETTINGS:
            raise UnknownNameError("setting", name, SETTINGS)
    for name, registry in REGISTRIES.items():
        value = settings.get(name)
        for entry in value if isinstance(value, list | tuple) else (value,):
            if isinstance(entry, str) and entry not in registry.names():
                raise UnknownNameError(registry.what, entry, registry.names())
    for name, known in _CHOICES.items():
        value = settings.get(name, known[0])
        if isinstance(value, str) and value not in known:
            raise UnknownNameError(name, value, known)
    asked = as_plain(dict(settings))
    if isinstance(asked.get("precision"), str):
        asked["precision"] = parse_precision(asked["precision"])
    try:
        config = msgspec.convert(asked, Config)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$.")
        raise UsageError(f"{source}: setting {place.rstrip('`')!r}: {problem.replace('`', '')}") from error
    _check(config)
    for problem in () if quiet else _without_effect(config, set(settings)):
        warnings.warn(problem, stacklevel=2)
    return config


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings of a TOML file, unchecked.

    Raises:
        FileFormatError: no such file, not TOML, or a table where a value is expected.
    """
    path = Path(path)
    settings = read_toml(path)
    for name, value in settings.items():
        if isinstance(value, dict):
            raise FileFormatError(path, f"found the table [{name}], expected plain `setting = value` lines")
    return settings


def to_settings(config: Config) -> dict[str, Any]:
    """The configuration as plain values that JSON and TOML hold; `make_config` takes it back."""
    settings: dict[str, Any] = msgspec.to_builtins(config)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def to_toml(config: Config) -> str:
    """The configuration as a TOML document; settings that are None are left out, which means the same."""
    return tomli_w.dumps({name: value for name, value in to_settings(config).items() if value is not None})


def from_recorded(settings: Mapping[str, Any]) -> Config:
    """A configuration that was checked and resolved when it was written (no warnings)."""
    return make_config(settings, source="recorded configuration", quiet=True)


def resolve(config: Config, *, device: str) -> Config:
    """Everything that "auto" and None leave open and that does not depend on the data, decided."""
    photographs = data_source(config.dataset).photographs
    augment = config.augment if config.augment != "auto" else "crop_flip" if photographs else "none"
    default = OPTIMIZERS.find(config.optimizer).momentum  # None for one that has its own
    momentum = default if default is None or config.momentum is None else config.momentum
    num_workers = config.num_workers if config.num_workers is not None else min(16, len(os.sched_getaffinity(0)))
    return msgspec.structs.replace(
        config,
        augment=augment,
        momentum=momentum,
        num_workers=num_workers,
        device=device,
        memory_budget=config.memory_budget_bytes,
    )


# Beyond it torch's sizes overflow, or a machine has no threads and processes.
_AT_MOST = {"epochs": MOST_EPOCHS, "image_size": 2**14, "crop_padding": 2**12, "num_threads": 4096, "num_workers": 4096}


def _check(config: Config) -> None:
    """Bounds of single settings, then the rules between settings."""
    _check_bounds(config)
    _check_recipe(config)
    _check_course(config)
    if config.nesterov and not (config.optimizer == "sgd" and config.momentum != 0):
        raise UsageError("setting 'nesterov' needs the optimizer sgd with a momentum")
    if config.sync_batch_norm and config.mode == "gating":
        raise UsageError(
            "setting 'sync_batch_norm' does not go with the mode gating, whose BatchNorms see few channels"
        )
    if config.weights is not None and config.start_from is not None:
        raise UsageError("settings 'weights' and 'start_from' both say what the network begins with; give one")
    if config.max_batch is not None and config.max_batch < config.batch:
        raise UsageError(f"setting 'max_batch' is {config.max_batch}, below the mini-batch of {config.batch}")
    _check_data(config)


def _check_bounds(config: Config) -> None:
    at_least_one = (
        "epochs", "batch", "interval", "channel_multiple", "batch_granularity", "train_limit", "image_size",
        "validation_limit", "max_batch", "keep_every", "reconfigure_epoch", "pretrain_epochs", "data_memory_bytes",
        "num_threads",
    )  # fmt: skip
    for name in at_least_one:
        value = getattr(config, name)
        _require(value is None or value >= 1, name, value, "at least 1")
    for name in ("num_workers", "warmup_epochs", "seed", "finetune_epochs", "crop_padding"):
        value = getattr(config, name)
        _require(value is None or value >= 0, name, value, "at least 0")
    for name, most in _AT_MOST.items():
        value = getattr(config, name)
        _require(value is None or value <= most, name, value, f"at most {most}")
    for name in ("threshold", "lr_gamma", "weight_decay"):
        _require(getattr(config, name) < float("inf"), name, getattr(config, name), "a finite number")
    _require(config.seed < 2**63, "seed", config.seed, "below 2**63")
    _require(0 <= config.penalty_ratio < 1, "penalty_ratio", config.penalty_ratio, "in [0, 1)")
    _require(0 < config.lr < float("inf"), "lr", config.lr, "positive")
    _require(config.threshold > 0, "threshold", config.threshold, "positive")
    _require(config.lr_gamma > 0, "lr_gamma", config.lr_gamma, "positive")
    _require(config.weight_decay >= 0, "weight_decay", config.weight_decay, "at least 0")
    _require(0 <= config.ema_decay < 1, "ema_decay", config.ema_decay, "in [0, 1)")
    _require(config.momentum is None or 0 <= config.momentum < 1, "momentum", config.momentum, "in [0, 1)")
    _require(
        all(m > 0 for m in config.lr_milestones) and list(config.lr_milestones) == sorted(config.lr_milestones),
        "lr_milestones", list(config.lr_milestones), "positive and ascending",
    )  # fmt: skip
    try:
        budget = config.memory_budget_bytes
    except ValueError as error:
        raise UsageError(f"setting 'memory_budget': {error}") from error
    _require(budget is None or budget >= 1, "memory_budget", config.memory_budget, "at least 1 byte")


def _check_course(config: Config) -> None:
    """Which epochs train dense, sparsify, prune and fine-tune."""
    if config.schedule == "one_time" and config.reconfigure_epoch is None:
        raise UsageError("schedule 'one_time' needs the setting 'reconfigure_epoch'")
    if config.schedule == "ssl" and config.pretrain_epochs is None:
        raise UsageError("schedule 'ssl' needs the setting 'pretrain_epochs'")
    if config.schedule != "continuous" and not config.regularized:
        raise UsageError(f"schedule {config.schedule!r} needs a penalty_ratio above 0")
    sparsifying = config.epochs - config.finetune_epochs - (config.pretrain_epochs or 0)
    if config.regularized and sparsifying < 1:
        raise UsageError(f"pretrain_epochs and finetune_epochs leave no epoch of {config.epochs} in which to sparsify")
    if config.reconfigure_epoch is not None and config.reconfigure_epoch > config.epochs - config.finetune_epochs:
        raise UsageError(
            f"setting 'reconfigure_epoch' is {config.reconfigure_epoch}, expected at most the "
            f"{config.epochs - config.finetune_epochs} epochs with a regulariser"
        )


def _check_data(config: Config) -> None:
    """What the data set cannot be loaded without."""
    source = data_source(config.dataset)
    for name in source.needs:
        if getattr(config, name) is None:
            hint = "--data-dir data --download" if "download" in source.uses else "--data-dir FOLDER"
            raise UsageError(f"data set {config.dataset!r} needs the setting {name!r}", hint=hint)


def _check_recipe(config: Config) -> None:
    """Bounds of the settings that today's recipes add."""
    _require(0 <= config.label_smoothing < 1, "label_smoothing", config.label_smoothing, "in [0, 1)")
    _require(0 <= config.mixup < float("inf"), "mixup", config.mixup, "at least 0")
    _require(config.clip_norm is None or 0 < config.clip_norm < float("inf"), "clip_norm", config.clip_norm, "positive")
    _require(0 < config.validation_share < 1, "validation_share", config.validation_share, "in (0, 1)")


def _require(holds: bool, name: str, value: object, bound: str) -> None:
    if not holds:
        raise UsageError(f"setting {name!r} is {value}, expected {bound}")


def _without_effect(config: Config, given: set[str]) -> list[str]:
    """One sentence for every given setting that this run will not use."""

    def unused(names: Sequence[str], because: str) -> list[str]:
        return [f"setting {name!r} has no effect: {because}" for name in names if name in given]

    problems: list[str] = []
    if not config.regularized:
        names = (
            "criterion",
            "regularizer",
            "interval",
            "threshold",
            "mode",
            "channel_multiple",
            "finetune_epochs",
            "pretrain_epochs",
            "dynamic_batch",
        )
        problems += unused(names, "penalty_ratio is 0 (dense)")
    if not config.dynamic_batch or not config.regularized:
        problems += unused(("memory_budget", "batch_granularity", "max_batch", "lr_rule"), "dynamic_batch is off")
    elif isinstance(config.memory_budget, int) and config.memory_budget < MIB:
        number = config.memory_budget
        problems += unused(("memory_budget",), f"in {number} bytes no mini-batch grows; '{number} GiB' has a unit")
    if config.schedule != "one_time":
        problems += unused(("reconfigure_epoch",), f"the schedule is {config.schedule}")
    if config.schedule == "one_time":
        problems += unused(("pretrain_epochs",), "the schedule is one_time")
    if config.weights is None:
        problems += unused(("weights_skip",), "there are no weights to load")
    if config.schedule != "continuous" and config.regularized:
        problems += unused(("interval",), f"the schedule {config.schedule} reconfigures once")
    if "momentum" in given and OPTIMIZERS.find(config.optimizer).momentum is None:
        problems += unused(("momentum",), f"{config.optimizer} has its own")
    if config.lr_schedule != "step":
        problems += unused(("lr_milestones", "lr_gamma"), f"the learning-rate schedule is {config.lr_schedule}")
    if not config.compile:
        problems += unused(("compile_backend",), "compile is off")
    source = data_source(config.dataset)
    unread = [name for name in SOME_USE if name not in source.uses]
    problems += unused(unread, f"the data set {config.dataset} does not use it")
    if not source.by_name:
        theirs = ("augment", "crop_padding", "image_size", "train_limit", "validation_limit")
        problems += unused(theirs, "data sets that are given live say themselves what they hold")
    elif config.augment == "none" or (config.augment == "auto" and not source.photographs):
        problems += unused(("crop_padding",), "there is no augmentation")
    return [p for p, value in ((p, getattr(config, p.split("'")[1])) for p in problems) if value not in (None, False)]
