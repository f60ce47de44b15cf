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
from ptsim.training.sources import DATASETS

if TYPE_CHECKING:
    from ptsim.training.loggers import Logger
    from ptsim.training.rates import Schedule

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
