"""The networks are the paper's, and every way to name one works."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision

from ptsim import zoo
from ptsim.errors import UnknownNameError, UsageError


@pytest.mark.parametrize("name", zoo.names())
def test_every_network_maps_an_image_to_its_classes(name: str) -> None:
    entry = zoo.find(name)
    logits = zoo.create(name, num_classes=7)(torch.rand(2, *entry.input_shape))
    assert logits.shape == (2, 7)


# Parameters counted by hand: stem, n blocks a stage of two 3×3 convolutions, BatchNorms, 1×1 short-cuts, linear layer.
@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 3), ("resnet32", 5), ("resnet56", 9), ("resnet110", 18)])
def test_basic_resnets_have_the_parameters_of_the_paper(name: str, blocks: int) -> None:
    stem = 3 * 16 * 9 + 2 * 16
    stages = 0
    channels = 16
    for width in (16, 32, 64):
        stages += channels * width * 9 + (2 * blocks - 1) * width * width * 9 + 2 * blocks * 2 * width
        stages += 0 if channels == width else channels * width + 2 * width
        channels = width
    expected = stem + stages + 64 * 10 + 10
    assert sum(p.numel() for p in zoo.create(name).parameters()) == expected


def test_resnet50_has_three_stages_of_eight_bottlenecks() -> None:
    """1×1, 3×3 and 1×1 with four times the width; the 3×3 halves the image, and only a stage's first block projects."""
    expected, channels = 3 * 16 * 9 + 2 * 16, 16
    for width in (16, 32, 64):
        for block in range(8):
            expected += channels * width + 9 * width * width + 4 * width * width + 2 * (width + width + 4 * width)
            expected += 0 if block else channels * 4 * width + 2 * 4 * width
            channels = 4 * width
    with torch.device("meta"):
        model = zoo.create("resnet50")
    assert sum(p.numel() for p in model.parameters()) == expected + 256 * 10 + 10
    strides = [
        [conv.stride[0] for conv in (stage[0].conv1, stage[0].conv2, stage[0].downsample[0], stage[1].conv2)]
        for stage in (model.layer1, model.layer2, model.layer3)
    ]
    assert strides == [[1, 1, 1, 1], [1, 2, 2, 1], [1, 2, 2, 1]]


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("vgg6", [[64], [128], [128, 128], [256]]),
        ("vgg11", [[64], [128], [256, 256], [512, 512], [512, 512]]),
        ("vgg13", [[64, 64], [128, 128], [256, 256], [512, 512], [512, 512]]),
        ("vgg16", [[64, 64], [128, 128], [256] * 3, [512] * 3, [512] * 3]),
        ("vgg19", [[64, 64], [128, 128], [256] * 4, [512] * 4, [512] * 4]),
    ],
)
def test_vggs_have_stages_of_3x3_convolutions_each_closed_by_a_pool(name: str, stages: list[list[int]]) -> None:
    with torch.device("meta"):
        model = zoo.find(name).build(num_classes=7, in_channels=2)
    found: list[list[int]] = [[]]
    for module in model.features:
        if isinstance(module, torch.nn.Conv2d):
            found[-1].append(module.out_channels)
        elif isinstance(module, torch.nn.MaxPool2d):
            found.append([])
    assert found == [*stages, []]
    expected, channels = 0, 2
    for width in (width for stage in stages for width in stage):
        expected, channels = expected + 9 * channels * width + 2 * width, width
    assert sum(p.numel() for p in model.parameters()) == expected + channels * 7 + 7


def test_convolutions_start_from_the_papers_distribution() -> None:
    weight = zoo.create("resnet50").layer3[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (3 * 3 * 64)) ** 0.5, rel=0.02)


def test_every_torchvision_classifier_has_a_name() -> None:
    from ptsim.models.torchvision_family import classifier_names

    assert set(classifier_names()) == set(torchvision.models.list_models(module=torchvision.models))


def test_a_torchvision_name_brings_its_own_image_size() -> None:
    assert zoo.find("torchvision:inception_v3").input_shape == (3, 299, 299)
    assert zoo.find("torchvision:resnet18").num_classes == 1000


def test_a_users_function_is_a_model(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import torch\ndef net(num_classes=3):\n    return torch.nn.Linear(4, num_classes)\n")
    assert zoo.create(f"{file}:net", num_classes=5).out_features == 5
    assert zoo.find(f"{file}:net").num_classes == zoo.create(f"{file}:net").out_features == 3  # its own default


def test_a_users_function_may_ignore_the_classes(tmp_path: Path) -> None:
    file = tmp_path / "fixed.py"
    file.write_text("import torch\ndef net():\n    return torch.nn.Linear(4, 2)\nnet.num_classes = 2\n")
    assert zoo.find(f"{file}:net").num_classes == 2
    assert zoo.create(f"{file}:net").out_features == 2
    assert zoo.create(f"{file}:net", num_classes=2).out_features == 2
    with pytest.raises(UsageError, match=r"fixed.py:net has no argument num_classes, and .* no layer of 5 outputs"):
        zoo.create(f"{file}:net", num_classes=5)


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown model 'resnet21'; known: .*resnet20") as caught:
        zoo.find("resnet21")
    assert "resnet20" in str(caught.value.hint)


def test_an_unknown_torchvision_name_suggests_close_ones() -> None:
    with pytest.raises(UnknownNameError, match="resnet18"):
        zoo.find("torchvision:resnet17")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("def net(: pass", "cannot be loaded: SyntaxError"),
        ("def other(): pass", "unknown function in .*known: other"),
        ("def net(): return 3", "returned a int, expected a torch.nn.Module"),
        ("import torch\nnet = torch.nn.Linear(4, 2)", ":net is a network, expected a function that makes one"),
        ("def net(): raise RuntimeError('no')", "failed: RuntimeError: no"),
        ("import sys\ndef net(): sys.exit(3)", "failed: SystemExit: 3"),
        ("def net(): raise RuntimeError('no\\nat frame #0')", "failed: RuntimeError: no at frame #0"),
        ("def net(): pass\nnet.input_shape = 64", r":net: its input_shape is 64, expected \(channels, height, width\)"),
        ("def net(): pass\nnet.input_shape = (64, 64)", r":net: its input_shape is \(64, 64\), expected"),
        ("def net(): pass\nnet.num_classes = '3'", ":net: its num_classes is '3', expected a positive whole number"),
    ],
)
def test_a_broken_model_file_is_one_sentence(tmp_path: Path, source: str, complaint: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(source)
    with pytest.raises(UsageError, match=complaint):
        zoo.create(f"{file}:net")


def test_a_missing_model_file_and_a_missing_function_are_one_sentence() -> None:
    with pytest.raises(UsageError, match="no model file"):
        zoo.find("nowhere/mine.py:net")
    with pytest.raises(UsageError, match=r"a model's file without its function; expected mine\.py:function"):
        zoo.find("mine.py")
