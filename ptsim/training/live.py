"""A live network and live data sets in place of names, for `ptsim.train` from Python.

While `offered` is open, the network has the name `live:CLASS` in the zoo and the data the name `live` among the data
sets. A run folder holds the network's weights and structure, not its code: to go on, or to load it, give it again.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ptsim import zoo
from ptsim.capture.copies import copied
from ptsim.errors import UsageError
from ptsim.trace.schema import Dataset
from ptsim.training.config import Config
from ptsim.training.data import Batch, Normalization, Share, epoch_order, generator
from ptsim.training.datasets import DataRequest
from ptsim.training.facts import num_outputs
from ptsim.training.wrapping import refuse_spread
from ptsim.units import format_shape

DATASET = "live"
Datasets = tuple["torch.utils.data.Dataset[Any]", "torch.utils.data.Dataset[Any]"]  # training, validation
Collate = Callable[[list[Any]], Any]  # items -> (images, classes or shares of the classes)


class _Given(NamedTuple):
    data: Datasets
    model: nn.Module | None
    collate: Collate | None


_GIVEN: contextvars.ContextVar[_Given | None] = contextvars.ContextVar("data", default=None)


def name_of(model: nn.Module) -> str:
    """The name of a live network in a configuration."""
    return f"live:{type(model).__name__}"


@contextlib.contextmanager
def offered(model: nn.Module | None, data: Datasets | None, collate: Collate | None = None) -> Iterator[None]:
    """Inside, the network and the data can be asked for by name; every run trains a copy of the network.

    Raises:
        UsageError: the data are no pair of data sets with lengths, or there is something to collate without data.
    """
    if collate is not None and data is None:
        raise UsageError("collate= makes the mini-batches of data sets that are given live: data=(train, val)")
    if model is not None:
        refuse_spread(model)
    if data is not None and not (isinstance(data, tuple | list) and len(data) == 2 and all(map(_is_map_style, data))):
        raise UsageError("data has to be a pair of map-style data sets: (training, validation)")
    name = None if model is None else name_of(model)
    if model is not None and name is not None:
        pristine = copied(model)
        zoo.register(name, input_shape=(3, 224, 224), num_classes=1000)(lambda num_classes: copied(pristine))
    token = _GIVEN.set(None if data is None else _Given((data[0], data[1]), model, collate))
    try:
        yield
    finally:
        _GIVEN.reset(token)
        if name is not None:
            zoo.forget(name)


def _is_map_style(data: object) -> bool:
    """A length, and items by their number: no DataLoader, and no stream."""
    stream = isinstance(data, torch.utils.data.IterableDataset)
    return isinstance(data, Sized) and hasattr(type(data), "__getitem__") and not stream


def given_data(request: DataRequest) -> LiveData:
    """The data sets that `ptsim.train` was given.

    Raises:
        UsageError: it was given none.
    """
    given = _GIVEN.get()
    if given is None:
        raise UsageError(
            "this run was given its data sets live", hint="give them again: ptsim.train(…, data=(train, val))"
        )
    return LiveData(given.data, given.model, given.collate, config=request.config, device=request.device)


class LiveData:
    """Two map-style data sets whose items are (image, class), the image a tensor (C, H, W) as the network wants it.

    Bytes (uint8) are divided by 255; everything else is the work of the data sets' own transforms, and of `collate` for
    what acts on a whole mini-batch.
    """

    def __init__(
        self,
        data: Datasets,
        model: nn.Module | None,
        collate: Collate | None = None,
        *,
        config: Config,
        device: torch.device,
    ) -> None:
        """Looks at the first item; `collate` makes the mini-batches of training, as a DataLoader's `collate_fn`.

        Raises:
            UsageError: it is no image with a class, or one of the data sets is empty.
        """
        self._train, self._validation = data
        self._collate, self._config, self._device = collate, config, device
        for name, images in (("training", self._train), ("validation", self._validation)):
            if not len(cast("Sized", images)):
                raise UsageError(f"the {name} data set is empty")
        item = self._train[0]
        image = item[0] if isinstance(item, tuple | list) and len(item) == 2 else None
        if not isinstance(image, Tensor) or image.ndim != 3:
            raise UsageError(
                "an item of the training data is no (image, class) with the image a tensor (C, H, W)",
                hint="torchvision's transform v2.ToImage() makes a tensor of a PIL image",
            )
        self._pinned = device.type == "cuda" and image.device.type == "cpu"  # what lies on a GPU cannot be
        channels, height, width = image.shape
        classes = getattr(self._train, "classes", None)
        if classes is None and model is None:
            raise UsageError(
                "the training data set does not say how many classes it has",
                hint="give it an attribute `classes`, the list of their names",
            )
        shape = (channels, height, width)
        num_classes = len(classes) if classes is not None else num_outputs(cast("nn.Module", model), shape)
        self.class_names = tuple(map(str, () if classes is None else classes))
        theirs = getattr(self._validation, "classes", None)
        if theirs is not None and self.class_names and tuple(map(str, theirs)) != self.class_names:
            raise UsageError("the training and the validation data have other classes, or the same in another order")
        self.normalization = Normalization(mean=(0.0,) * channels, std=(1.0,) * channels)
        self.dataset = Dataset(
            name=type(self._train).__name__,
            num_classes=num_classes,
            num_train=len(cast("Sized", self._train)),
            num_validation=len(cast("Sized", self._validation)),
            input_shape=shape,
        )

    def training_batches(self, epoch: int, batch: int, share: Share) -> Iterator[Batch]:
        """This rank's part of every full mini-batch; the order belongs to (seed, epoch)."""
        order = epoch_order(self.dataset.num_train, self._config.seed, epoch)
        full_batches = order[: len(order) // batch * batch].view(-1, batch)
        mine = [share.of(indices).tolist() for indices in full_batches]
        yield from self._batches(self._train, mine, epoch, self._collate, rank=share.rank)

    def validation_batches(self, batch: int, share: Share) -> Iterator[Batch]:
        """This rank's part of the whole validation set."""
        total = self.dataset.num_validation
        starts = range(share.rank * batch, total, share.world_size * batch)
        mine = [list(range(start, min(start + batch, total))) for start in starts]
        yield from self._batches(self._validation, mine, 0, rank=share.rank)

    def _batches(
        self,
        data: torch.utils.data.Dataset[Any],
        batches: list[list[int]],
        epoch: int,
        collate: Collate | None = None,
        *,
        rank: int = 0,
    ) -> Iterator[Batch]:
        """Those `batches`; the workers' random numbers belong to (seed, epoch, rank)."""
        loader = torch.utils.data.DataLoader(
            data,
            batch_sampler=batches,
            num_workers=self._config.num_workers or 0,
            collate_fn=collate,
            pin_memory=self._pinned,
            generator=generator(self._config.seed, epoch, rank, stream=6),
        )
        channels_last = self._config.memory_format == "channels_last"
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        for batch in _of_one_size(loader):
            images, labels = self._checked(batch)
            moved = images.to(self._device, non_blocking=True)
            scaled = moved.float().div_(255) if moved.dtype == torch.uint8 else moved.float()
            kind = torch.float32 if labels.ndim == 2 else torch.int64  # cast there: a cast copy would not be pinned
            yield scaled.to(memory_format=memory_format), labels.to(self._device, non_blocking=True).to(kind)

    def _checked(self, batch: Any) -> Batch:
        """Images with their classes, or with the share of every class in each of them (CutMix, MixUp).

        Raises:
            UsageError: something else.
        """
        images, labels = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (None, None)
        classes = self.dataset.num_classes
        if not isinstance(images, Tensor) or images.ndim != 4 or not isinstance(labels, Tensor):
            raise UsageError("a mini-batch of the data is no (images (N, C, H, W), classes)")
        if labels.shape == (len(images), classes) and labels.is_floating_point():
            return images, labels
        if labels.shape != (len(images),):
            shape = format_shape(labels.shape)
            raise UsageError(
                f"the classes of {len(images)} images are a tensor of {shape}, expected {len(images)} numbers, or "
                f"{len(images)}×{classes} shares of the {classes} classes"
            )
        whole = labels.to(torch.int64)
        if not torch.equal(whole.to(labels.dtype), labels):
            raise UsageError("the classes of the data are no whole numbers")
        if len(whole) and not 0 <= int(whole.min()) <= int(whole.max()) < classes:
            wrong = int(whole.min()) if int(whole.min()) < 0 else int(whole.max())
            raise UsageError(f"an image of the data has the class {wrong}, but there are {classes} classes, from 0 on")
        return images, labels


def _of_one_size(batches: Iterable[Any]) -> Iterator[Any]:
    """The mini-batches, as long as the images of each can be put together.

    Raises:
        UsageError: they differ in size.
    """
    try:
        yield from batches
    except RuntimeError as error:
        if "stack expects each tensor to be equal size" not in str(error):
            raise
        hint = "scale and cut them: torchvision's transforms v2.Resize(64) and v2.CenterCrop(64), for instance"
        raise UsageError("the images of the data differ in size", hint=hint) from error
