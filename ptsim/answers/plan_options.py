"""What a planned run is asked to be: one record for `ptsim.plan` and `ptsim plan`."""

from __future__ import annotations

import msgspec

from ptsim.network import MemoryFormat


class PlanOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is planned. A published run says what is None here and stands in its record.

    Attributes:
        images: images of the training set.
        num_classes: number of classes; the model's usual number.
        dataset: what the data are called; the name that a published data set of this size has, else its size.
        epochs: how many.
        batch: images per GPU and step.
        gpus: data-parallel size; 1 unless a published run says otherwise.
        interval: epochs between reconfigurations; a published run's or 5, or all of a shorter run.
        pruning: none; targets as training=0.60,inference=0.47 with bn=, layers=, saturates= if wanted; like:TRACE;
            a published run as lym2019/resnet50-imagenet-r0.25, which also says what is not given here; or a TOML file.
        input_shape: (channels, height, width) of an image; the model's usual one.
        precision: fp32, tf32, bf16, fp16 or amp.
        memory_format: of the activations.
        optimizer: sgd, adam, adamw or rmsprop; whose state and update are counted.
        draws: trajectories that agree with the pruning; their spread goes into every interval of a projection.
        seed: which of the trajectories that agree with the pruning; 0 is the typical one.
    """

    images: int | None = None
    num_classes: int | None = None
    dataset: str | None = None
    epochs: int | None = None
    batch: int | None = None
    gpus: int | None = None
    interval: int | None = None
    pruning: str = "none"
    input_shape: tuple[int, int, int] | None = None
    precision: str = "fp32"
    memory_format: MemoryFormat = "contiguous"
    optimizer: str = "sgd"
    draws: int = 1
    seed: int = 0
