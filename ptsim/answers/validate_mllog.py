"""How far is a prediction from what an MLPerf training run measured on a real cluster?"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from ptsim.answers.predict import Prediction, PredictOptions, predict
from ptsim.errors import UsageError
from ptsim.hardware.catalog import device_names, load_cluster
from ptsim.hardware.spec import Cluster
from ptsim.measure.mllog import MlperfRun, of_all_gpus, read_mllog
from ptsim.network import MemoryFormat, Network
from ptsim.optimizers import OPTIMIZERS
from ptsim.setting import PrecisionName

_SUBMISSIONS = "eager PyTorch is predicted; submissions often use fused kernels and other frameworks"
MODELS = {"resnet": "torchvision:resnet50"}  # MLPerf benchmark → what it trains

_SIDES = {"resnet": (224,), "ssd": (300, 800), "retinanet": (800,)}  # pixels of MLPerf's square images
_OTHER_SHAPES = {  # likewise; source: github.com/mlcommons/training, the README of each benchmark
    "maskrcnn": "images whose shorter side has 800 pixels",
    "unet3d": "volumes of 128 × 128 × 128 voxels",
}


class MllogCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One training step: measured in the log, and predicted.

    Attributes:
        low_seconds, high_seconds: 90 % interval of the predicted step.
        error: (predicted - measured) / measured time of a step.
        measured_mfu_fraction, predicted_mfu_fraction: model FLOPs utilisation, of the same FLOPs in either time; None
            where the device's peak for the precision is not known.
        inside: whether the interval holds what was measured.
        notes: what differs between the run and what is predicted.
    """

    log: str
    benchmark: str | None
    platform: str | None
    model: str
    cluster: str
    gpus: int
    batch: int
    measured_step_seconds: float
    predicted_step_seconds: float
    low_seconds: float
    high_seconds: float
    measured_images_per_second: float
    predicted_images_per_second: float
    measured_epoch_seconds: float
    error: float
    measured_mfu_fraction: float | None
    predicted_mfu_fraction: float | None
    inside: bool
    notes: tuple[str, ...]


def validate_mllog(
    path: str | Path,
    *,
    cluster: str | Path,
    model: str | Network | None = None,
    gpus: int | None = None,
    precision: PrecisionName = "amp",
    memory_format: MemoryFormat = "channels_last",
    torch_version: str | None = None,
) -> MllogCheck:
    """The prediction of a step beside the one that the log measured.

    Args:
        path: the run's result file with `:::MLLOG` lines.
        cluster: catalog name or TOML file of where it ran.
        model: what was trained; that of MLPerf's benchmark if None.
        gpus: how many; if None the mini-batch of all over that of one where the log has both and a step is one pass,
            else the nodes of the log's platform ("4xDGX A100") times the cluster's GPUs per node.
        precision: of the products; submissions train in half precision.
        memory_format: of the activations.
        torch_version: of the PyTorch that is predicted; today's if None (`PredictOptions`).

    Raises:
        PtsimError: a broken log, an unknown benchmark or cluster, a number of GPUs that does not divide the mini-batch,
            or that neither the log nor the caller says.
    """
    run = read_mllog(path)
    where = load_cluster(cluster)
    chosen = model or _network(run, path)
    count = _num_gpus(run, path, where, gpus)
    run = of_all_gpus(run, count)
    optimizer = run.optimizer if run.optimizer in OPTIMIZERS else "sgd"
    trained = PredictOptions(memory_format=memory_format, optimizer=optimizer, torch_version=torch_version)
    batch = run.global_batch // count
    expected = predict(chosen, batch=batch, precision=precision, cluster=cluster, gpus=count, options=trained)
    measured_s, used = run.step_seconds, expected.mfu_fraction
    notes = [note for note in (run.note, _other_gpus(run, where), _other_images(run, expected)) if note]
    if run.optimizer not in (None, optimizer):
        notes.append(f"the run's optimizer is {run.optimizer}; the update of {optimizer} is predicted")
    if run.num_epochs == 1:
        notes.append("the log has the time of one epoch only, whose first steps may be slower than those of others")
    if run.passes > 1:
        notes.append(f"the run added up gradients of {run.passes} passes; one of the whole mini-batch is predicted")
    return MllogCheck(
        log=str(path),
        benchmark=run.benchmark,
        platform=run.platform,
        model=expected.model,
        cluster=where.name,
        gpus=count,
        batch=expected.batch,
        measured_step_seconds=measured_s,
        predicted_step_seconds=expected.step_seconds,
        low_seconds=expected.low,
        high_seconds=expected.high,
        measured_images_per_second=run.images_per_second,
        predicted_images_per_second=expected.images_per_second,
        measured_epoch_seconds=run.epoch_seconds,
        error=expected.step_seconds / measured_s - 1,
        measured_mfu_fraction=None if used is None else used * expected.step_seconds / measured_s,
        predicted_mfu_fraction=used,
        inside=expected.low <= measured_s <= expected.high,
        notes=(_SUBMISSIONS, *notes, *expected.notes),
    )


def _network(run: MlperfRun, path: str | Path) -> str:
    """What the benchmark trains.

    Raises:
        UsageError: that is not known.
    """
    if run.benchmark not in MODELS:
        raise UsageError(
            f"{path} is of the benchmark {run.benchmark!r}, whose network is not known", hint="name it with --model"
        )
    return MODELS[run.benchmark]


def _other_images(run: MlperfRun, expected: Prediction) -> str | None:
    """What must be known where the model that was named does not take the images that the benchmark trains on."""
    _, height, width = expected.input_shape
    sides = _SIDES.get(run.benchmark or "", ())
    if height == width and height in sides:
        return None
    trained = f"images of {' or '.join(f'{side} × {side}' for side in sides)} pixels" if sides else None
    trained = trained or _OTHER_SHAPES.get(run.benchmark or "")
    if trained is None:
        return None
    return f"MLPerf's {run.benchmark} trains on {trained}, {expected.model} on images of {height} × {width}"


def _other_gpus(run: MlperfRun, cluster: Cluster) -> str | None:
    """What must be known where the log's platform names a GPU ("8xH100") that the cluster does not have."""
    models = {model for name in device_names() if (model := _model_of(name))}
    named = {model for model in models if re.search(rf"(?:^|[\W_]|\dx?){model}(?![^\W_])", run.platform or "")}
    device = cluster.device
    if device is None or not named or _model_of(device.name) in named:
        return None
    return f"the log's platform, {run.platform}, names {' and '.join(sorted(named))}; {cluster.name} has {device.name}"


def _model_of(device_name: str) -> str | None:
    """The part of a catalog name that names the model alone: h100, a5000 of rtx-a5000; None of rtx-3090."""
    return next((part for part in device_name.split("-") if re.match(r"[a-z]+\d", part)), None)


def _num_gpus(run: MlperfRun, path: str | Path, cluster: Cluster, named: int | None) -> int:
    """How many GPUs trained: as the caller says, else as the log's mini-batches or nodes say.

    Raises:
        UsageError: nobody says, or the mini-batch does not divide by it.
    """
    count = named
    of_one = run.batch_per_gpu if run.passes == 1 else None
    if count is None and of_one and run.global_batch % of_one == 0:
        count = run.global_batch // of_one
    elif count is None and run.num_nodes:
        count = run.num_nodes * cluster.gpus_per_node
    if count is None:
        raise UsageError(f"{path} does not say how many GPUs ran", hint="name them with --gpus")
    if count < 1 or run.global_batch % count:
        raise UsageError(
            f"a mini-batch of {run.global_batch} images does not share out evenly over {count} GPUs",
            hint=None if named else "--gpus names those that train, where others evaluate",
        )
    return count
