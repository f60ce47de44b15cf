"""How a stored network is built again: which model, for how many classes and image channels."""

from __future__ import annotations

import inspect
from typing import Annotated

import msgspec
import torch
from torch import nn

from ptsim import zoo
from ptsim.errors import UsageError, lacks_memory, on_one_line
from ptsim.units import format_shape

Count = Annotated[int, msgspec.Meta(ge=1)]


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Builds the dense network that a run began with.

    Attributes:
        in_channels: given to builders that take it; None for those that do not.
        input_shape: (channels, height, width) of the images of this run.
        source_sha256: digest of the user's file that makes the model and of what it imports from beside it, when the
            run began; None for models of other origins, and in older runs.
    """

    model: str
    num_classes: Count
    in_channels: Count | None
    input_shape: tuple[Count, Count, Count]
    source_sha256: str | None = None

    def difference(self, other: Recipe) -> str | None:
        """In words, how what `other` builds differs; None if it is the same network.

        The content of a user's file counts where both recipes know it.
        """
        for mine, its in zip(self._in_words(), other._in_words(), strict=True):
            if mine != its:
                return f"is for {mine}, but this run is for {its}"
        digests = {self.source_sha256, other.source_sha256} - {None}
        if len(digests) > 1:
            return f"was made with another content of {zoo.file_of(self.model)} or its imports, which was edited since"
        return None

    def _in_words(self) -> tuple[str, ...]:
        shape = format_shape(self.input_shape)
        channels = "" if self.in_channels is None else f" of {self.in_channels} channels"
        return f"the model {self.model}", f"{self.num_classes} classes", f"images{channels}", f"images of {shape}"

    def build(self) -> nn.Module:
        """A freshly initialised network in training mode, on the CPU; draws from torch's random state.

        Raises:
            UnknownNameError, UsageError: the model's name or file does not exist here, or its function fails.
        """
        entry = zoo.find(self.model)
        more = {} if self.in_channels is None else {"in_channels": self.in_channels}
        model: nn.Module = entry.build(num_classes=self.num_classes, **more)
        return model.train()


def takes_in_channels(entry: zoo.ModelEntry) -> bool:
    """Whether the model can be built for any number of image channels."""
    return "in_channels" in inspect.signature(entry.build).parameters


def _remedy(model: nn.Module, channels: int) -> str:
    """What helps a model that fails on images with so many channels."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or first.in_channels == channels:
        return "--set image_size=… scales the images"
    return (
        f"its first convolution takes {first.in_channels} channels, the images have {channels}: build it for those; "
        "data sets of your own may have others: ptsim.train(…, data=(train, val))"
    )


def check_fits(model: nn.Module, recipe: Recipe, batch: int = 2) -> None:
    """Run two images through the model in evaluation and in training mode, and one where `batch` is 1.

    It is left as it was.

    Raises:
        UsageError: it fails on images of this size or on a single one, gives another number of classes than the data
            has, or in training mode something else than one number per image and class.
    """
    channels, height, width = recipe.input_shape
    training, buffers = model.training, [(buffer, buffer.clone()) for buffer in model.buffers()]
    outputs: list[object] = []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for trains, count in ((False, 2), (True, 2), (True, 1))[: 3 if batch == 1 else 2]:
                outputs.append(model.train(trains)(torch.zeros(count, channels, height, width)))
    except Exception as error:  # the model's own code runs here
        if lacks_memory(error):
            raise
        reason = on_one_line(error, 200)
        if len(outputs) == 2:  # as BatchNorm of maps of one pixel
            problem = f"model {recipe.model!r} cannot be trained on one image at a time: {reason}"
            raise UsageError(problem, hint="a larger batch: two images for each rank") from error
        raise UsageError(
            f"model {recipe.model!r} does not take images of {channels}×{height}×{width}: {reason}",
            hint=_remedy(model, channels),
        ) from error
    finally:
        model.train(training)
        for buffer, before in buffers:
            buffer.detach().copy_(before)
    for output, mode in zip(outputs[:2], ("", " in training mode"), strict=True):
        if not isinstance(output, torch.Tensor) or output.shape != (2, recipe.num_classes):
            found = tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
            raise UsageError(
                f"model {recipe.model!r} gives {found} for an image{mode}, but the data set has "
                f"{recipe.num_classes} classes",
                hint="training takes one tensor; give a function that builds it without auxiliary outputs"
                if mode or not isinstance(output, torch.Tensor)
                else None,
            )
