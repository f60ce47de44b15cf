"""How is each data set of `ptsim.training.sources` loaded? One function each."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ptsim.errors import UsageError, on_one_line
from ptsim.training.config import Config
from ptsim.training.data import (
    IMAGE_SUFFIXES,
    Data,
    ResidentData,
    StreamedData,
    chosen_side,
    decode,
    generator,
    held_out,
    note_unused_share,
    resized_to,
    subset,
)
from ptsim.training.sources import data_source
from ptsim.units import counted, listed

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

_DIGITS_VALIDATION = 360  # one fifth of scikit-learn's 1797 digits
_SYNTHETIC = (2048, 512, 10)  # training images, validation images, classes
SPLITS = (("train",), ("val", "valid", "validation", "test"))
# Other kinds of images, which are told where they stand among those that are read
_UNREAD_SUFFIXES = (".gif", ".jfif", ".jpe", ".jp2", ".heic", ".heif", ".avif", ".tga", ".svg", ".npy", ".dcm")
_Files = list[tuple[Path, int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataRequest:
    """What a data set is asked for.

    Attributes:
        config: the run.
        input_shape: of the model's registry entry; decides the size of images that have none of their own.
        any_channels: the model can be built for any number of image channels; otherwise grey images are repeated.
        device: where the images are to be.
    """

    config: Config
    input_shape: tuple[int, int, int]
    any_channels: bool = True
    device: torch.device


def load_data(
    config: Config, *, input_shape: tuple[int, int, int], any_channels: bool = True, device: torch.device
) -> Data:
    """The configured data set on `device`.

    Args:
        config: the run.
        input_shape: of the model's registry entry; decides the size of images that have none of their own.
        any_channels: the model can be built for any number of image channels; otherwise grey images are repeated.
        device: where the images are to be.

    Raises:
        UsageError: missing or empty folder, unreadable image, wrong split, or fewer images than one mini-batch.
    """
    request = DataRequest(config=config, input_shape=input_shape, any_channels=any_channels, device=device)
    data = data_source(config.dataset).data(request)
    if data.dataset.num_classes < 2:
        raise UsageError(f"the data set {data.dataset.name!r} has a single class: there is nothing to tell apart")
    if config.batch > data.dataset.num_train:
        raise UsageError(
            f"the mini-batch of {config.batch} is larger than the data set {data.dataset.name!r} "
            f"with its {data.dataset.num_train} training images"
        )
    return data


def digits(request: DataRequest) -> Data:
    """1797 handwritten digits of 8×8 pixels (UCI, from 43 writers), split by class with a fixed seed."""
    config, device = request.config, request.device
    channels = 1 if request.any_channels else request.input_shape[0]
    from sklearn.datasets import load_digits  # a second to import, only for this data set
    from sklearn.model_selection import train_test_split

    pixels, classes = load_digits(return_X_y=True)
    images = (
        torch.from_numpy((pixels * (255 / 16)).round().astype(np.uint8)).view(-1, 1, 8, 8).repeat(1, channels, 1, 1)
    )
    labels = torch.from_numpy(classes.astype(np.int64))
    train, validation = train_test_split(
        np.arange(len(images)), test_size=_DIGITS_VALIDATION, random_state=0, stratify=classes
    )
    return ResidentData(
        "digits",
        train=(images[train], labels[train]),
        validation=(images[validation], labels[validation]),
        num_classes=10,
        class_names=[str(digit) for digit in range(10)],
        config=config,
        device=device,
    )


def cifar10(request: DataRequest) -> Data:
    """CIFAR-10 as torchvision stores it."""
    from torchvision.datasets import CIFAR10  # seconds to import, only for these data sets

    return _cifar(request, CIFAR10)


def cifar100(request: DataRequest) -> Data:
    """CIFAR-100 as torchvision stores it, with its 100 fine classes."""
    from torchvision.datasets import CIFAR100

    return _cifar(request, CIFAR100)


def _cifar(request: DataRequest, source: type[CIFAR10]) -> Data:
    config, device = request.config, request.device
    assert config.data_dir is not None, "checked with the configuration"
    splits = []
    for train in (True, False):
        try:
            split = source(config.data_dir, train=train, download=config.download)
        except (RuntimeError, OSError) as error:
            reason = on_one_line(error, 200)
            raise UsageError(
                f"no {config.dataset} in {config.data_dir}: {reason}",
                hint="--download fetches it; image files are read with --dataset imagefolder",
            ) from error
        images = torch.from_numpy(np.ascontiguousarray(split.data)).permute(0, 3, 1, 2).contiguous()
        splits.append((images, torch.tensor(split.targets)))
    return ResidentData(
        config.dataset,
        train=splits[0],
        validation=splits[1],
        num_classes=len(split.classes),
        class_names=split.classes,
        config=config,
        device=device,
    )


def synthetic(request: DataRequest) -> Data:
    """Coarse random patterns, one per class, under noise: learnable, of any size, without files."""
    config, input_shape, device = request.config, request.input_shape, request.device
    num_train, num_validation, num_classes = _SYNTHETIC
    num_train = config.train_limit or num_train
    channels, height, width = input_shape
    height, width = (config.image_size or height), (config.image_size or width)
    random = generator(config.seed, 0, stream=4)
    coarse = torch.rand((num_classes, channels, 4, 4), generator=random)
    patterns = F.interpolate(coarse, size=(height, width), mode="bilinear")
    labels = torch.arange(num_train + num_validation) % num_classes
    images = torch.empty((len(labels), channels, height, width), dtype=torch.uint8)
    for start in range(0, len(labels), 256):
        chunk, chosen = images[start : start + 256], labels[start : start + 256]
        noise = 0.15 * torch.randn(chunk.shape, generator=random)
        chunk.copy_(((patterns[chosen] + noise).clamp(0, 1) * 255).round())
    return ResidentData(
        "synthetic",
        train=(images[:num_train], labels[:num_train]),
        validation=(images[num_train:], labels[num_train:]),
        num_classes=num_classes,
        config=config,
        device=device,
    )


def image_tree(request: DataRequest) -> Data:
    """Folders of images, one per class, in memory if they fit."""
    config, input_shape, device = request.config, request.input_shape, request.device
    assert config.data_dir is not None, "checked with the configuration"
    root = Path(config.data_dir)
    train, validation, classes = _splits(root, config)
    train = _some(train, config.train_limit, config.seed)
    validation = _some(validation, config.validation_limit, config.seed)
    sample = (decode(path) for path, _ in train[:: max(1, len(train) // 16)])
    side = chosen_side(sample, config, input_shape, str(root))
    limit_bytes = config.data_memory_bytes or quarter_of_memory_bytes(device)
    if (len(train) + len(validation)) * 3 * side * side > limit_bytes:
        return StreamedData(train, validation, class_names=classes, side=side, config=config, device=device)
    return ResidentData(
        "imagefolder",
        train=_decode_all(train, side),
        validation=_decode_all(validation, side),
        num_classes=len(classes),
        class_names=classes,
        config=msgspec.structs.replace(
            config, train_limit=None, validation_limit=None
        ),  # applied above, before decoding
        device=device,
    )


def _some(files: list[tuple[Path, int]], limit: int | None, seed: int) -> list[tuple[Path, int]]:
    kept = subset(len(files), limit, seed)
    return files if kept is None else [files[index] for index in kept.tolist()]


def _splits(root: Path, config: Config) -> tuple[_Files, _Files, list[str]]:
    """Training and validation images and the classes: from two folders, or one split with the seed, class by class."""
    if not root.is_dir():
        raise UsageError(f"there is no data folder {root}")
    folders = [next((root / name for name in names if (root / name).is_dir()), None) for names in SPLITS]
    if folders[1] is None and any(path.is_dir() for path in root.iterdir()):
        _refuse_other_splits(root)
        folders[0] = folders[0] or root
    if folders[0] is None:
        raise UsageError(f"{root} holds no folder train; expected train and val or test with one folder per class")
    train, folder_names = _list_images(folders[0])
    classes = [os.fsencode(name).decode(errors="replace") for name in folder_names]  # a folder's may be no Unicode
    if folders[1] is None:
        kept, held = held_out([label for _, label in train], config, lambda i: f"a class of {train[i][0].parent}")
        return [train[i] for i in kept], [train[i] for i in held], classes
    validation, validation_classes = _list_images(folders[1])
    if folder_names != validation_classes:
        odd = sorted(set(folder_names) ^ set(validation_classes))
        raise UsageError(f"{root}: the class folder {odd[0]!r} is in only one of the training and validation splits")
    note_unused_share(config, str(root))
    return train, validation, classes


def _refuse_other_splits(root: Path) -> None:
    """Make sure that no folder of a tree without validation images is a split that is written otherwise.

    Raises:
        UsageError: one is called "Train" or "testing", for instance.
    """
    known = {name for names in SPLITS for name in names}
    like = known | {"training", "testing", "validate"}
    folders = (path.name for path in root.iterdir() if path.is_dir())
    odd = sorted(name for name in folders if name.lower() in like and name not in known)
    if odd:
        raise UsageError(
            f"{root} holds the folder {odd[0]}, which reads like a split; expected train and val or test",
            hint="rename it, or put the class folders into a folder of their own",
        )


def _list_images(folder: Path) -> tuple[list[tuple[Path, int]], list[str]]:
    """Every image below `folder/<class>/` with its class index, and the classes' names, in sorted order.

    Warns of images of other kinds, which are left out.
    """
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        raise UsageError(f"{folder} holds no class folders; expected one folder of images per class")
    images = []
    unread: list[str] = []
    for label, name in enumerate(classes):
        found = [(path, path.suffix.lower()) for path in (folder / name).rglob("*")]
        files = sorted(path for path, kind in found if kind in IMAGE_SUFFIXES)
        if not files:
            ends = f"the name of an image ends in {', '.join(IMAGE_SUFFIXES)}"
            raise UsageError(f"the class folder {folder / name} holds no images", hint=ends)
        images += [(path, label) for path in files]
        unread += [kind for _, kind in found if kind in _UNREAD_SUFFIXES]
    if unread:
        kinds = listed(sorted(set(unread)))
        are = counted(len(unread), "file is", "files are")
        warnings.warn(f"{are} left out of {folder}, whose {len(images):,} other images are read: {kinds}", stacklevel=2)
    return images, classes


def _decode_all(files: Sequence[tuple[Path, int]], side: int) -> tuple[Tensor, Tensor]:
    """All images at once; decoding releases the interpreter lock, so threads share it out."""
    images = torch.empty((len(files), 3, side, side), dtype=torch.uint8)

    def read(start: int) -> None:
        for index in range(start, min(start + chunk, len(files))):
            images[index] = resized_to(decode(files[index][0]), side)

    chunk = 256
    _in_threads(read, range(0, len(files), chunk))
    return images, torch.tensor([label for _, label in files])


def _in_threads(work: Callable[[int], None], items: range) -> None:
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(work, items):  # raises what a worker raised
            pass


def quarter_of_memory_bytes(device: torch.device) -> int:
    """A quarter of the device's memory: what images may take."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // 4
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
