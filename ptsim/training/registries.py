"""What the settings of a run name and other packages can add to: data sets, optimizers, schedules, criteria, loggers.

Only names are here, so that a wrong one is found before torch is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptsim.criteria import CRITERIA
from ptsim.optimizers import OPTIMIZERS
from ptsim.registry import Registry

if TYPE_CHECKING:
    from ptsim.training.data import Data
    from ptsim.training.datasets import DataRequest
    from ptsim.training.loggers import Logger
    from ptsim.training.rates import Schedule

DATASETS: Registry[Callable[[DataRequest], Data]] = Registry(
    "data set",
    entry_points="ptsim.datasets",
    own={
        "digits": "ptsim.training.datasets:digits",
        "cifar10": "ptsim.training.datasets:cifar",
        "cifar100": "ptsim.training.datasets:cifar",
        "imagefolder": "ptsim.training.datasets:image_tree",
        "huggingface": "ptsim.training.huggingface_data:on_disk",
        "synthetic": "ptsim.training.datasets:synthetic",
        "live": "ptsim.training.live:given_data",
    },
)
SCHEDULES: Registry[Schedule] = Registry(
    "learning-rate schedule",
    entry_points="ptsim.schedules",
    own={"step": "ptsim.training.rates:step", "cosine": "ptsim.training.rates:cosine"},
)
LOGGERS: Registry[Callable[[Path], Logger]] = Registry(
    "logger",
    entry_points="ptsim.loggers",
    own={
        "csv": "ptsim.training.loggers:Csv",
        "tensorboard": "ptsim.training.loggers:TensorBoard",
        "wandb": "ptsim.training.loggers:Wandb",
        "mlflow": "ptsim.training.loggers:Mlflow",
    },
)

REGISTRIES: dict[str, Registry[Any]] = {
    "dataset": DATASETS,
    "optimizer": OPTIMIZERS,
    "lr_schedule": SCHEDULES,
    "criterion": CRITERIA,
    "loggers": LOGGERS,
}
