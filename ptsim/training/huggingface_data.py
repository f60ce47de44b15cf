"""How is a data set of Hugging Face's package datasets read from disk? Nothing is downloaded; images lie in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from PIL import Image
from torch import Tensor

from ptsim.errors import UsageError, on_one_line
from ptsim.training.data import Data, ResidentData, chosen_side, held_out, note_unused_share, resized_to, rgb, subset
from ptsim.training.datasets import SPLITS, DataRequest, quarter_of_memory_bytes


def on_disk(request: DataRequest) -> Data:
    """What `save_to_disk` wrote: a dict with a training split, or one data set, of which a share is held out.

    The image is the column of the type Image, the class the one of the type ClassLabel. Images of different sizes are
    scaled to the model's, or to `image_size`.

    Raises:
        UsageError: the package is not installed, the folder holds no such data set, it has no such columns, or an image
            is damaged or has no class.
    """
    config = request.config
    assert config.data_dir is not None, "checked with the configuration"
    loaded = _loaded(Path(config.data_dir))
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    train, validation = (next((splits[name] for name in names if name in splits), None) for names in SPLITS)
    if train is None:
        raise UsageError(f"{config.data_dir} holds no split train; its splits: {', '.join(sorted(splits))}")
    image, label = _columns(train, config.data_dir)
    for which, split in (("training", train), ("validation", validation)):
        if split is not None and not len(split):
            raise UsageError(f"the {which} split of {config.data_dir} is empty")
    if validation is None:
        kept, held = held_out(_classes(train, label, config.data_dir), config)
        train, validation = train.select(kept), train.select(held)
    elif _columns(validation, config.data_dir) != (image, label):
        raise UsageError(f"the splits of {config.data_dir} have different columns")
    elif validation.features[label].names != train.features[label].names:
        raise UsageError(f"the splits of {config.data_dir} have other classes, or the same in another order")
    else:
        note_unused_share(config, config.data_dir)
    train = _some(train, config.train_limit, config.seed)
    validation = _some(validation, config.validation_limit, config.seed)
    rows = range(0, len(train), max(1, len(train) // 16))
    sample = (_pixels(train, row, image, config.data_dir) for row in rows)
    side = chosen_side(sample, config, request.input_shape, config.data_dir)
    room = config.data_memory_bytes or quarter_of_memory_bytes(request.device)
    if (len(train) + len(validation)) * 3 * side * side > room:
        raise UsageError(
            f"the {len(train) + len(validation)} images of {config.data_dir} do not fit into {room / 2**30:.1f} GiB",
            hint="a smaller image_size or train_limit, or give the data set live: ptsim.train(…, data=(train, val))",
        )
    return ResidentData(
        Path(config.data_dir).name,
        train=_tensors(train, image, label, side, config.data_dir),
        validation=_tensors(validation, image, label, side, config.data_dir),
        num_classes=int(train.features[label].num_classes),
        class_names=train.features[label].names,
        config=msgspec.structs.replace(config, train_limit=None, validation_limit=None),  # applied above
        device=request.device,
    )


def _loaded(folder: Path) -> Any:
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise UsageError(
            "the data set 'huggingface' needs the package datasets", hint="pip install 'ptsim[huggingface]'"
        ) from error
    if not folder.is_dir():
        raise UsageError(f"there is no data folder {folder}")
    try:
        return load_from_disk(str(folder))
    except Exception as error:  # whatever pyarrow and datasets raise of a damaged folder
        reason = on_one_line(error, 200)
        raise UsageError(f"{folder} holds no data set that save_to_disk wrote: {reason}") from error


def _columns(split: Any, folder: str) -> tuple[str, str]:
    """The names of the image's column and of the class's."""
    kinds = {name: type(feature).__name__ for name, feature in split.features.items()}
    found = []
    for kind in ("Image", "ClassLabel"):
        name = next((name for name, its in kinds.items() if its == kind), None)
        if name is None:
            listed = ", ".join(f"{name} ({its})" for name, its in kinds.items())
            raise UsageError(f"the data set in {folder} has no column of the type {kind}; its columns: {listed}")
        found.append(name)
    return found[0], found[1]


def _some(split: Any, limit: int | None, seed: int) -> Any:
    kept = subset(len(split), limit, seed)
    return split if kept is None else split.select(kept.tolist())


def _classes(split: Any, column: str, folder: str) -> list[int]:
    """The class of every image; packages write −1 or nothing where a competition keeps it to itself."""
    classes = list(split[column])
    missing = sum(found is None or found < 0 for found in classes)
    if missing:
        raise UsageError(f"{missing} of {len(classes)} images of a split of {folder} have no class")
    return [int(found) for found in classes]


def _pixels(split: Any, index: int, column: str, folder: str) -> Tensor:
    """(3, H, W) bytes."""
    try:
        picture: Image.Image | None = split[index][column]
        if picture is None:
            raise ValueError("there is none")
        return torch.from_numpy(rgb(picture)).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all of them Pillow's
        reason = on_one_line(error, 200)
        raise UsageError(f"image {index} of a split of {folder} cannot be read: {reason}") from error


def _tensors(split: Any, image: str, label: str, side: int, folder: str) -> tuple[Tensor, Tensor]:
    """(N, 3, side, side) bytes and the classes."""
    labels = torch.tensor(_classes(split, label, folder))
    images = torch.empty((len(split), 3, side, side), dtype=torch.uint8)
    for index in range(len(split)):
        images[index] = resized_to(_pixels(split, index, image, folder), side)
    return images, labels
