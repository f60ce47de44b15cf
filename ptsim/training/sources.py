"""Which data sets are there, which settings does each use, and who loads it? One row each.

Another package adds one by `DATASETS.add`, or through an entry point. Its value is a `DataSource`, or only the function
that loads the data::

    [project.entry-points."ptsim.datasets"]
    mine = "my_package.data:mine"               # DataRequest -> Data

The rows are read without torch: what loads a data set is imported when a run needs it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from ptsim.registry import Registry

if TYPE_CHECKING:
    from ptsim.training.data import Data
    from ptsim.training.datasets import DataRequest

DEFAULT = "cifar10"
SOME_USE = ("data_dir", "download", "num_workers", "data_memory_bytes", "validation_share")
"""Settings that not every data set uses."""
_ON_DISK = ("data_dir", "data_memory_bytes", "validation_share")


class DataSource(msgspec.Struct, frozen=True, kw_only=True):
    """One data set.

    Attributes:
        load: gives the data for a request; or "module:name" of such a function.
        uses: those of `SOME_USE` that it uses.
        needs: those of them without which it cannot be loaded.
        photographs: `augment = "auto"` crops and flips its images.
        by_name: it can be asked for in a configuration.
    """

    load: Callable[[DataRequest], Data] | str
    uses: tuple[str, ...] = SOME_USE
    needs: tuple[str, ...] = ()
    photographs: bool = False
    by_name: bool = True

    def data(self, request: DataRequest) -> Data:
        """What `load` gives."""
        if not isinstance(self.load, str):
            return self.load(request)
        module, _, name = self.load.partition(":")
        loaded: Data = getattr(importlib.import_module(module), name)(request)
        return loaded


DIGITS = DataSource(load="ptsim.training.datasets:digits", uses=())
CIFAR10 = DataSource(
    load="ptsim.training.datasets:cifar10", uses=("data_dir", "download"), needs=("data_dir",), photographs=True
)
CIFAR100 = msgspec.structs.replace(CIFAR10, load="ptsim.training.datasets:cifar100")
IMAGE_TREE = DataSource(
    load="ptsim.training.datasets:image_tree", uses=(*_ON_DISK, "num_workers"), needs=("data_dir",), photographs=True
)
HUGGING_FACE = DataSource(
    load="ptsim.training.huggingface_data:on_disk", uses=_ON_DISK, needs=("data_dir",), photographs=True
)
SYNTHETIC = DataSource(load="ptsim.training.datasets:synthetic", uses=())
LIVE = DataSource(load="ptsim.training.live:given_data", uses=("num_workers",), by_name=False)

DATASETS: Registry[DataSource | Callable[[DataRequest], Data]] = Registry(
    "data set",
    entry_points="ptsim.datasets",
    own={
        "digits": "ptsim.training.sources:DIGITS",
        "cifar10": "ptsim.training.sources:CIFAR10",
        "cifar100": "ptsim.training.sources:CIFAR100",
        "imagefolder": "ptsim.training.sources:IMAGE_TREE",
        "huggingface": "ptsim.training.sources:HUGGING_FACE",
        "synthetic": "ptsim.training.sources:SYNTHETIC",
        "live": "ptsim.training.sources:LIVE",
    },
)


def data_source(name: str) -> DataSource:
    """The data set called `name`.

    Raises:
        UnknownNameError: there is none.
    """
    entry = DATASETS.find(name)
    return entry if isinstance(entry, DataSource) else DataSource(load=entry)
