"""A model that does not give one tensor of class scores in both modes is refused before a run begins."""

import msgspec
import pytest
import torch
from torch import Tensor, nn

from ptsim.errors import UsageError
from ptsim.training.recipe import Recipe, check_fits


class WithHead(nn.Module):
    """Gives a second output in training mode, as networks with auxiliary heads do."""

    def __init__(self, auxiliary: bool) -> None:
        super().__init__()
        self.norm, self.main, self.second = nn.BatchNorm2d(3), nn.Linear(3, 4), nn.Linear(3, 4)
        self.auxiliary = auxiliary

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.norm(x).mean((2, 3))
        return (self.main(x), self.second(x)) if self.auxiliary and self.training else self.main(x)


RECIPE = Recipe(model="net.py:build", num_classes=4, in_channels=None, input_shape=(3, 5, 5))


def test_a_second_output_in_training_is_refused_in_one_sentence() -> None:
    with pytest.raises(UsageError, match="gives a tuple for an image in training mode, but the data set has 4 classes"):
        check_fits(WithHead(auxiliary=True), RECIPE)


def test_the_check_leaves_statistics_and_random_numbers_as_they_were() -> None:
    model = WithHead(auxiliary=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    check_fits(model, RECIPE)
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({}, None),
        ({"model": "other.py:build"}, "is for the model net.py:build, but this run is for the model other.py:build"),
        ({"num_classes": 5}, "is for 4 classes, but this run is for 5 classes"),
        ({"in_channels": 3}, "is for images, but this run is for images of 3 channels"),
        ({"input_shape": (3, 6, 5)}, "is for images of 3×5×5, but this run is for images of 3×6×5"),
        ({"source_sha256": "b"}, "was made with another content of net.py or its imports, which was edited since"),
        ({"source_sha256": None}, None),  # a run of an older version does not know
    ],
)
def test_what_differs_between_two_recipes_is_said_and_is_no_difference_where_nobody_knows(
    changes: dict[str, object], difference: str | None
) -> None:
    mine = msgspec.structs.replace(RECIPE, source_sha256="a")
    assert mine.difference(msgspec.structs.replace(mine, **changes)) == difference


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(UsageError, match=r"gives \(4,\) for an image, but the data set has 5 classes"):
        check_fits(WithHead(auxiliary=False), msgspec.structs.replace(RECIPE, num_classes=5))


class Huge(nn.Module):
    """Has no room for an image."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory")


def test_a_machine_without_memory_is_no_fault_of_the_model() -> None:
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        check_fits(Huge(), RECIPE)


@pytest.mark.parametrize(
    ("channels", "height", "remedy"),
    [(1, 3, "its first convolution takes 1 channels, the images have 3: build it"), (3, 2, "--set image_size=…")],
)
def test_a_model_for_other_images_is_told_what_helps(channels: int, height: int, remedy: str) -> None:
    """A 3×3 convolution without padding fails on an image of 2×2."""
    model = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UsageError, match="does not take images of 3×") as caught:
        check_fits(model, msgspec.structs.replace(RECIPE, input_shape=(3, height, height)))
    assert str(caught.value.hint).startswith(remedy)


def test_one_image_at_a_time_is_tried_where_a_rank_trains_so() -> None:
    """A 5×5 convolution leaves one pixel of an image of 5×5: BatchNorm has one value of each channel."""
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.BatchNorm2d(4), nn.Flatten())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_fits(model, RECIPE)
    with pytest.raises(
        UsageError, match=r"'net\.py:build' cannot be trained on one image at a time: Expected"
    ) as caught:
        check_fits(model, RECIPE, 1)
    assert caught.value.hint == "a larger batch: two images for each rank"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    check_fits(WithHead(auxiliary=False), RECIPE, 1)  # 25 values
