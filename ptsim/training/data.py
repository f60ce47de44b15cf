"""Which images a training iteration sees, in which order and form: a function of (seed, epoch), whoever asks.

Images that fit are kept as uint8 on the device and cropped, flipped and normalised there, a mini-batch at a time. An
image tree that does not fit is decoded by a `DataLoader` in every epoch. Either way the global mini-batch of an
iteration does not depend on the number of ranks: each rank takes its contiguous share.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ptsim.errors import UsageError, on_one_line
from ptsim.trace.schema import Dataset
from ptsim.training.config import Config

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
_DARK = 16  # of 256: what values of 12 bits reach whose place is the lower end of 16

# (N, C, H, W) normalised float32; (N,) class indices, or of live data (N, classes) shares of the classes
Batch = tuple[Tensor, Tensor]


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """Which part of a global mini-batch this process takes."""

    rank: int = 0
    world_size: int = 1

    def of(self, indices: Tensor) -> Tensor:
        """The contiguous share of `indices`, whose length is a multiple of the world size."""
        size = len(indices) // self.world_size
        return indices[self.rank * size : (self.rank + 1) * size]


class Normalization(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Per-channel mean and standard deviation of the training images, whose values are 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Data(Protocol):
    """Training and validation images of one run; names of the classes, in their order, stand in `class_names`."""

    dataset: Dataset
    normalization: Normalization

    def training_batches(self, epoch: int, batch: int, share: Share) -> Iterator[Batch]:
        """This rank's part of every full mini-batch of `batch` images of the epoch."""

    def validation_batches(self, batch: int, share: Share) -> Iterator[Batch]:
        """This rank's part of the whole validation set, each image on exactly one rank."""


def epoch_order(num_images: int, seed: int, epoch: int) -> Tensor:
    """The permutation of the training images in `epoch`."""
    return torch.randperm(num_images, generator=generator(seed, epoch, stream=0))


def generator(seed: int, epoch: int, *within: int, stream: int) -> torch.Generator:
    """Independent random numbers for every (seed, epoch, stream, …); NumPy's seed sequence mixes them."""
    return torch.Generator().manual_seed(mixed_seed(seed, epoch, stream, *within))


def mixed_seed(*numbers: int) -> int:
    """A seed of 64 bits from several numbers of any size, none negative."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class ResidentData:
    """Images in the device's memory.

    Shapes: N images, C channels, H×W pixels.
    """

    def __init__(
        self,
        name: str,
        *,
        train: tuple[Tensor, Tensor],
        validation: tuple[Tensor, Tensor],
        num_classes: int,
        class_names: Sequence[str] = (),
        config: Config,
        device: torch.device,
    ) -> None:
        """`train` and `validation` are (uint8 images (N, C, H, W), classes (N,)) on the CPU."""
        self.class_names = tuple(class_names)
        images, labels = limited(*train, config.train_limit, config.seed)
        validation = limited(*validation, config.validation_limit, config.seed)
        channels, height, width = images.shape[1:]
        self._side = config.image_size
        self.normalization = normalization_of(images)
        self.dataset = Dataset(
            name=name,
            num_classes=num_classes,
            num_train=len(images),
            num_validation=len(validation[0]),
            input_shape=(channels, self._side or height, self._side or width),
        )
        self._seed = config.seed
        self._flip = config.augment == "crop_flip"
        padding = config.crop_padding if config.crop_padding is not None else max(1, height // 8)  # 4 of 32 pixels
        self._padding = padding if config.augment in ("crop_flip", "crop") else 0
        self._images = F.pad(images, (self._padding,) * 4).to(device)  # black, before normalisation
        self._labels = labels.to(device)
        self._height, self._width = height, width
        self._validation = validation[0].to(device), validation[1].to(device)
        statistics = torch.tensor([self.normalization.mean, self.normalization.std], device=device)
        mean_C11, std_C11 = statistics.view(2, channels, 1, 1)
        self._scale, self._shift = 1 / (255 * std_C11), -mean_C11 / std_C11
        self._device = device
        self._channels_last = config.memory_format == "channels_last"

    @property
    def resident_bytes(self) -> int:
        """All images and classes, which are on the device as long as the run lasts."""
        return sum(tensor.nbytes for tensor in (self._images, self._labels, *self._validation))

    def training_batches(self, epoch: int, batch: int, share: Share) -> Iterator[Batch]:
        """This rank's part of every full mini-batch; crops and flips belong to (seed, epoch, image)."""
        num_images = len(self._images)
        order = epoch_order(num_images, self._seed, epoch)
        random = generator(self._seed, epoch, stream=1)
        offsets = torch.randint(0, 2 * self._padding + 1, (num_images, 2), generator=random).to(self._device)
        flips = (torch.rand(num_images, generator=random) < 0.5).to(self._device)
        full_batches = order[: num_images // batch * batch].view(-1, batch)
        mine = torch.stack([share.of(indices) for indices in full_batches]).to(self._device)
        for indices in mine:
            images = self._augmented(indices, offsets, flips) if self._padding or self._flip else self._images[indices]
            yield self._prepared(images), self._labels[indices]

    def validation_batches(self, batch: int, share: Share) -> Iterator[Batch]:
        """This rank's part of the whole validation set."""
        images, labels = self._validation
        for start in range(share.rank * batch, len(images), share.world_size * batch):
            yield self._prepared(images[start : start + batch]), labels[start : start + batch]

    def _augmented(self, indices: Tensor, offsets_N2: Tensor, flips_N: Tensor) -> Tensor:
        """Crops of the padded images, some mirrored, by one gather: column x of a mirrored image is width-1-x."""
        top, left = offsets_N2[indices].unbind(1)
        rows_NH = top[:, None] + torch.arange(self._height, device=self._device)
        columns_W = torch.arange(self._width, device=self._device)
        columns_NW = columns_W.expand(len(indices), -1)
        if self._flip:
            columns_NW = torch.where(flips_N[indices][:, None], columns_W.flip(0), columns_W)
        columns_NW = columns_NW + left[:, None]
        # One index per pixel of every image; the channels come along as the middle axis.
        picked_NHWC = self._images[indices[:, None, None], :, rows_NH[:, :, None], columns_NW[:, None, :]]
        return picked_NHWC.permute(0, 3, 1, 2)

    def _prepared(self, images_NCHW: Tensor) -> Tensor:
        memory_format = torch.channels_last if self._channels_last else torch.contiguous_format
        images = images_NCHW.to(torch.float32, memory_format=memory_format)
        if self._side is not None and (self._side, self._side) != (self._height, self._width):
            images = F.interpolate(images, size=(self._side, self._side), mode="bilinear", antialias=True)
        return images.mul_(self._scale).add_(self._shift)


class StreamedData:
    """An image tree that is decoded anew in every epoch: random resized crops, and centre crops for validation."""

    def __init__(
        self,
        train: Sequence[tuple[Path, int]],
        validation: Sequence[tuple[Path, int]],
        *,
        class_names: Sequence[str],
        side: int,
        config: Config,
        device: torch.device,
    ) -> None:
        self._train, self._validation, self.class_names = train, validation, tuple(class_names)
        if config.crop_padding is not None and config.augment != "none":
            why = "images that do not fit in memory get random resized crops"
            warnings.warn(f"setting 'crop_padding' has no effect: {why}", stacklevel=2)
        # Source: torchvision's ImageNet statistics; one pass over a tree that does not fit would take an epoch.
        self.normalization = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        self.dataset = Dataset(
            name="imagefolder",
            num_classes=len(class_names),
            num_train=len(train),
            num_validation=len(validation),
            input_shape=(3, side, side),
        )
        self._side = side
        self._config = config
        self._device = device
        statistics = torch.tensor([self.normalization.mean, self.normalization.std], device=device)
        mean_C11, std_C11 = statistics.view(2, 3, 1, 1)
        self._scale, self._shift = 1 / (255 * std_C11), -mean_C11 / std_C11

    def training_batches(self, epoch: int, batch: int, share: Share) -> Iterator[Batch]:
        """This rank's part of every full mini-batch; each image's crop belongs to (seed, epoch, image)."""
        order = epoch_order(len(self._train), self._config.seed, epoch)
        full_batches = order[: len(order) // batch * batch].view(-1, batch)
        mine = [share.of(indices).tolist() for indices in full_batches]
        augment = None if self._config.augment == "none" else (self._config.seed, epoch)
        files = _ImageFiles(self._train, self._side, augment, mirrors=self._config.augment == "crop_flip")
        yield from self._batches(files, mine)

    def validation_batches(self, batch: int, share: Share) -> Iterator[Batch]:
        """This rank's part of the whole validation set."""
        total = len(self._validation)
        starts = range(share.rank * batch, total, share.world_size * batch)
        mine = [list(range(start, min(start + batch, total))) for start in starts]
        yield from self._batches(_ImageFiles(self._validation, self._side, None), mine)

    def _batches(self, files: _ImageFiles, batches: list[list[int]]) -> Iterator[Batch]:
        on_gpu = self._device.type == "cuda"
        loader = torch.utils.data.DataLoader(
            files, batch_sampler=batches, num_workers=self._config.num_workers or 0, pin_memory=on_gpu
        )
        channels_last = self._config.memory_format == "channels_last"
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        try:
            for images, labels in loader:
                images = images.to(self._device, non_blocking=True).to(torch.float32, memory_format=memory_format)
                yield images.mul_(self._scale).add_(self._shift), labels.to(self._device, non_blocking=True)
        except UsageError as error:  # a worker's comes with its traceback as text in front
            raise UsageError(error.message.strip().rpartition("UsageError: ")[2]) from error


class _ImageFiles(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Decoded, cropped uint8 images; `augment` is (seed, epoch), None for the centre crop; half of the crops `mirrors`.

    Own crops, not torchvision's transforms: those draw from the worker's random state, and here an image's crop belongs
    to (seed, epoch, image), whichever worker decodes it.
    """

    def __init__(
        self, files: Sequence[tuple[Path, int]], side: int, augment: tuple[int, int] | None, *, mirrors: bool = False
    ) -> None:
        self._files, self._side, self._augment, self._mirrors = files, side, augment, mirrors

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self._files[index]
        image = decode(path)
        if self._augment is None:
            return resized_to(image, self._side), label
        random = generator(*self._augment, stream=2 + index)
        return _random_resized_crop(image, self._side, random, mirrors=self._mirrors), label

    def __len__(self) -> int:
        return len(self._files)


def normalization_of(images_NCHW: Tensor) -> Normalization:
    """Mean and standard deviation per channel; a constant channel gets the deviation 1/255, since it divides."""
    count = images_NCHW.numel() // images_NCHW.shape[1]
    histograms = [torch.bincount(images_NCHW[:, c].reshape(-1), minlength=256) for c in range(images_NCHW.shape[1])]
    values = torch.arange(256, dtype=torch.float64) / 255
    means = [float((h * values).sum() / count) for h in histograms]
    variances = [float((h * (values - m) ** 2).sum() / count) for h, m in zip(histograms, means, strict=True)]
    return Normalization(mean=tuple(means), std=tuple(max(math.sqrt(v), 1 / 255) for v in variances))


def decode(path: Path) -> Tensor:
    """The image as uint8 RGB (3, H, W).

    Values of 16 bits keep their upper 8; Pillow's own conversion would cut off all that is above 255.

    Raises:
        UsageError: the file is not an image, or one whose values have no known range; names it.
    """
    if not path.is_file():  # a pipe would wait for ever
        raise UsageError(f"{path} is not a regular file, expected an image")
    try:
        with Image.open(path) as image:
            return torch.from_numpy(rgb(image)).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all of them Pillow's
        raise UsageError(f"{path} cannot be read as an image: {on_one_line(error, 200)}") from error


def rgb(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels as (H, W, 3).

    Raises:
        ValueError: whole numbers beyond 16 bits, or fractions: what is white is not known.
    """
    if image.mode == "F":
        raise ValueError("its values are fractions, and what is white is not known")
    if image.mode.startswith("I"):
        values = np.array(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its values are beyond 16 bits")
        if image.mode == "I" and image.format == "TIFF" and 0 < values.max() < 256:
            raise ValueError("its values are of 32 bits and all below 256, and what is white is not known")
        return np.repeat((values.astype(np.uint16) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))


def chosen_side(sample: Iterable[Tensor], config: Config, input_shape: tuple[int, int, int], where: str) -> int:
    """The side of the squares that the network sees: `image_size`, that of square images of one size, or the model's.

    Warns where that cuts or scales images in a way that nobody has asked for, and of images that are almost black.

    Args:
        sample: some of the images, bytes (3, H, W).
        config: the run.
        input_shape: the model's.
        where: the images, in words.
    """
    brightest, sizes = 0, set[tuple[int, ...]]()
    for image_CHW in sample:
        brightest = max(brightest, int(image_CHW.max()))
        sizes.add(tuple(image_CHW.shape[1:]))
    if brightest < _DARK:
        levels = f"use {brightest + 1} of 256 levels" if brightest else "are black"
        problem = f"the images of {where} {levels}; of values of 16 bits the upper 8 count, so scale them to 0 to 65535"
        warnings.warn(problem, stacklevel=2)
    if config.image_size is not None:
        return config.image_size
    height, width = next(iter(sizes))
    if len(sizes) == 1 and height == width:
        return int(height)
    side, across = input_shape[1:]
    seen = f"the network sees the middle squares of the images of {where}, scaled to {side}×{side}"
    if side != across:
        warnings.warn(f"{seen}, although its input_shape is of {side}×{across} pixels", stacklevel=2)
    elif len(sizes) == 1:
        own = f"although they have {height}×{width} pixels each; the setting 'image_size' chooses another side"
        warnings.warn(f"{seen}, {own}", stacklevel=2)
    return side


def resized_to(image_CHW: Tensor, side: int) -> Tensor:
    """The image scaled so that its shorter side is `side`, then its central square."""
    height, width = image_CHW.shape[1:]
    if (height, width) != (side, side):
        scale = side / min(height, width)
        size = [max(side, round(height * scale)), max(side, round(width * scale))]
        image_CHW = F.interpolate(image_CHW[None], size=size, mode="bilinear", antialias=True)[0]
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        image_CHW = image_CHW[:, top : top + side, left : left + side]
    return image_CHW


def _random_resized_crop(image_CHW: Tensor, side: int, random: torch.Generator, *, mirrors: bool) -> Tensor:
    """A crop of 8–100 % of the area and 3:4–4:3 aspect, scaled to `side`; half of them are mirrored if asked.

    Source: Szegedy et al., CVPR 2015; the usual ImageNet augmentation.
    """
    height, width = image_CHW.shape[1:]
    area, aspect, y, x, mirror = torch.rand(5, generator=random).tolist()
    pixels = height * width * (0.08 + 0.92 * area)
    ratio = math.exp((2 * aspect - 1) * math.log(4 / 3))
    crop_height = min(height, max(1, round(math.sqrt(pixels / ratio))))
    crop_width = min(width, max(1, round(math.sqrt(pixels * ratio))))
    top, left = int(y * (height - crop_height + 1)), int(x * (width - crop_width + 1))
    crop = image_CHW[:, top : top + crop_height, left : left + crop_width]
    crop = F.interpolate(crop[None], size=(side, side), mode="bilinear", antialias=True)[0]
    return crop.flip(2) if mirrors and mirror < 0.5 else crop


def limited(images: Tensor, labels: Tensor, limit: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """The images and classes that a limit leaves."""
    kept = subset(len(images), limit, seed)
    return (images, labels) if kept is None else (images[kept], labels[kept])


def subset(num_images: int, limit: int | None, seed: int) -> Tensor | None:
    """Which images a limit leaves: drawn with the seed, in their old order; None for all of them."""
    if limit is None or limit >= num_images:
        return None
    chosen = torch.randperm(num_images, generator=generator(seed, 0, stream=3))
    return chosen[:limit].sort().values


def held_out(
    labels: Sequence[int], config: Config, where: Callable[[int], str] = lambda _: "a class"
) -> tuple[list[int], list[int]]:
    """(training, validation) indices: the share of every class that validates is drawn with the seed.

    Args:
        labels: the class of every image.
        config: its `validation_share`, of which every class gives and keeps at least one image, and its seed.
        where: the class of an image's index, in words.

    Raises:
        UsageError: a class has a single image.
    """
    train: list[int] = []
    validation: list[int] = []
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    for label, own in sorted(by_class.items()):
        if len(own) == 1:
            raise UsageError(f"{where(own[0])} has 1 image, too few to hold one out")
        count = min(max(1, round(config.validation_share * len(own))), len(own) - 1)
        order = torch.randperm(len(own), generator=generator(config.seed, label, stream=5)).tolist()
        validation += [own[index] for index in sorted(order[:count])]
        train += [own[index] for index in sorted(order[count:])]
    return train, validation


def note_unused_share(config: Config, where: str) -> None:
    """A warning where a share to hold out was asked for and `where` has validation images of its own."""
    if config.validation_share != Config().validation_share:
        problem = f"setting 'validation_share' has no effect: {where} has validation images"
        warnings.warn(problem, stacklevel=2)
