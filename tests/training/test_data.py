import contextlib
import os
import shutil

import msgspec
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from ptsim.errors import UsageError
from ptsim.training.config import make_config, resolve
from ptsim.training.data import ResidentData, Share, StreamedData, held_out, normalization_of
from ptsim.training.datasets import load_data, quarter_of_memory_bytes

CPU = torch.device("cpu")


def loaded(**settings):
    shape = settings.pop("input_shape", (3, 8, 8))
    any_channels = settings.pop("any_channels", True)
    settings.setdefault("batch", 8)
    config = resolve(make_config(settings), device="cpu")
    return load_data(config, input_shape=shape, any_channels=any_channels, device=CPU)


def epoch_of(data, epoch=0, batch=16, share=None):
    return list(data.training_batches(epoch, batch, share or Share()))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Three classes of 12×12 photographs of noise, each tinted; 10 for training, 4 for validation."""
    root = tmp_path_factory.mktemp("tree")
    random = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4)):
        for label, name in enumerate(("ant", "bee", "cow")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 200, (12, 12, 3), dtype=np.uint8)
                pixels[..., label] += 55
                Image.fromarray(pixels).save(folder / f"{index:03}.png")
    return root


def test_digits_are_the_1797_of_scikit_learn_split_by_class():
    data = loaded(dataset="digits")
    assert (data.dataset.num_train, data.dataset.num_validation) == (1437, 360)
    assert data.dataset.input_shape == (1, 8, 8)
    labels = torch.cat([labels for _, labels in data.validation_batches(100, Share())])
    assert torch.bincount(labels).tolist() == pytest.approx([36] * 10, abs=1)


def test_images_take_their_bytes_and_their_classes_eight_each():
    plain, cropped = (loaded(dataset="digits", augment=augment) for augment in ("none", "crop"))
    assert plain.resident_bytes == 1797 * (8 * 8 + 8)
    assert cropped.resident_bytes == 1437 * 10 * 10 + 360 * 8 * 8 + 1797 * 8  # a pixel of border around what trains


def test_images_in_memory_are_scaled_to_the_asked_size():
    data = loaded(dataset="digits", image_size=16)
    assert data.dataset.input_shape == (1, 16, 16)
    assert epoch_of(data)[0][0].shape == (16, 1, 16, 16)


def test_digits_have_three_equal_channels_for_a_model_that_needs_three():
    data = loaded(dataset="digits", any_channels=False)
    images, _ = epoch_of(data)[0]
    assert images.shape[1:] == (3, 8, 8)
    assert torch.equal(images[:, 0], images[:, 2])


def test_an_epoch_is_a_function_of_seed_and_epoch():
    settings = {"dataset": "synthetic", "train_limit": 64, "augment": "crop_flip"}
    first, again = loaded(**settings), loaded(**settings)
    for (images, labels), (same_images, same_labels) in zip(epoch_of(first, 3), epoch_of(again, 3), strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    assert not torch.equal(epoch_of(first, 3)[0][0], epoch_of(first, 4)[0][0])
    assert not torch.equal(epoch_of(first, 3)[0][0], epoch_of(loaded(seed=1, **settings), 3)[0][0])


def test_ranks_share_every_mini_batch_and_the_whole_validation_set():
    data = loaded(dataset="synthetic", train_limit=70, augment="crop_flip")
    whole = epoch_of(data, batch=16)
    shares = [epoch_of(data, batch=16, share=Share(rank=rank, world_size=4)) for rank in range(4)]
    assert len(whole) == 4  # 70 images are four full mini-batches
    for index, (images, labels) in enumerate(whole):
        assert torch.equal(torch.cat([share[index][0] for share in shares]), images)
        assert torch.equal(torch.cat([share[index][1] for share in shares]), labels)
    counts = [sum(len(y) for _, y in data.validation_batches(50, Share(rank=rank, world_size=3))) for rank in range(3)]
    assert sum(counts) == 512


def test_crops_and_flips_are_those_of_torchvision():
    """Every augmented image is a crop of torchvision's zero-padded image, mirrored or not."""
    data = loaded(dataset="synthetic", train_limit=16, augment="crop_flip", crop_padding=2)
    plain = loaded(dataset="synthetic", train_limit=16)
    originals = plain._images.float()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.normalization.mean, data.normalization.std))
    order = torch.cat([labels for _, labels in epoch_of(data)])  # 16 images, labels 0..9 repeat
    padded = torchvision.transforms.functional.pad(originals, [2, 2, 2, 2])
    mirrored = 0
    for image, label in zip(epoch_of(data)[0][0], order, strict=True):
        pixels = (image * std + mean) * 255
        candidates = [
            (flip, (crop.flip(-1) if flip else crop))
            for source in padded[int(label) :: 10]
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            for crop in (source[:, top : top + 8, left : left + 8],)
        ]
        matches = [flip for flip, crop in candidates if torch.allclose(crop, pixels, atol=1e-2)]
        assert matches
        mirrored += matches[0]
    assert 2 <= mirrored <= 14


def test_every_place_of_a_crop_is_as_likely_as_the_others_and_half_are_mirrored():
    """Pixels 50 + 10 · row + column with a border of one: nine places, mirrored or not, of 1800 images 100 each."""
    settings = {"dataset": "synthetic", "augment": "crop_flip", "crop_padding": 1, "batch": 8}
    rows, columns = torch.arange(4)[:, None], torch.arange(4)
    images = (50 + 10 * rows + columns).to(torch.uint8).expand(1800, 1, 4, 4)
    labels = torch.zeros(1800, dtype=torch.int64)
    data = ResidentData(
        "places", train=(images, labels), validation=(images[:1], labels[:1]), num_classes=2,
        config=resolve(make_config(settings), device="cpu"), device=CPU,
    )  # fmt: skip
    ((seen, _),) = epoch_of(data, batch=1800)
    (mean,), (std,) = data.normalization.mean, data.normalization.std
    pixels = ((seen * std + mean) * 255).round().to(torch.int64)[:, 0]
    mirrored = pixels[:, 1, 1] > pixels[:, 1, 2]
    corner = torch.where(mirrored, pixels[:, 1, 2], pixels[:, 1, 1]) - 50  # 10 · top + left
    places, counts = torch.stack([corner, mirrored.long()]).unique(dim=1, return_counts=True)
    assert sorted(set(places[0].tolist())) == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    assert len(counts) == 18
    assert counts.min() > 60  # four standard deviations of 10
    assert counts.max() < 140
    assert 815 < mirrored.sum() < 985


def test_the_normalised_training_set_has_mean_0_and_deviation_1():
    data = loaded(dataset="synthetic", train_limit=256)
    images = torch.cat([images for images, _ in epoch_of(data, batch=256)])
    assert images.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert images.std((0, 2, 3), correction=0).tolist() == pytest.approx([1, 1, 1], abs=1e-5)


def test_normalisation_of_a_constant_channel_divides_by_something():
    images = torch.zeros(2, 2, 3, 3, dtype=torch.uint8)
    images[:, 1] = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1)
    statistics = normalization_of(images)
    assert statistics.mean == (0.0, 0.5)
    assert statistics.std == (1 / 255, 0.5)


def test_an_image_tree_is_read_with_its_classes_in_order(tree):
    data = loaded(dataset="imagefolder", data_dir=str(tree), augment="none", batch=8)
    assert data.dataset.num_classes == 3
    assert data.dataset.input_shape == (3, 12, 12)
    assert (data.dataset.num_train, data.dataset.num_validation) == (30, 12)
    for images, labels in data.validation_batches(4, Share()):
        assert torch.equal(images.mean((2, 3)).argmax(1), labels)  # the tint is the class


def test_an_image_tree_that_does_not_fit_is_streamed_with_the_same_order(tree):
    settings = {"dataset": "imagefolder", "data_dir": str(tree), "augment": "none", "batch": 8, "num_workers": 0}
    resident, streamed = loaded(**settings), loaded(**settings, data_memory_bytes=1000)
    assert isinstance(streamed, StreamedData)
    assert streamed.class_names == resident.class_names == tuple(sorted(p.name for p in (tree / "train").iterdir()))
    for (_, labels), (_, same) in zip(epoch_of(resident, batch=8), epoch_of(streamed, batch=8), strict=True):
        assert torch.equal(labels, same)
    again = loaded(**settings | {"augment": "crop_flip"}, data_memory_bytes=1000)
    first, second = (epoch_of(again, epoch=2, batch=8)[0][0] for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (8, 3, 12, 12)
    assert sum(len(y) for _, y in streamed.validation_batches(5, Share())) == 12


def test_of_images_that_do_not_fit_only_crop_flip_mirrors_some(tree):
    settings = {"dataset": "imagefolder", "data_dir": str(tree), "data_memory_bytes": 1000, "batch": 30}
    settings["num_workers"] = 0
    crops, flips = (epoch_of(loaded(**settings, augment=kind), batch=30)[0][0] for kind in ("crop", "crop_flip"))
    same = [torch.equal(crop, flip) for crop, flip in zip(crops, flips, strict=True)]
    assert 5 <= sum(same) <= 25
    for crop, flip, as_it_is in zip(crops, flips, same, strict=True):
        assert as_it_is or torch.equal(crop.flip(2), flip)
    with pytest.warns(UserWarning, match="'crop_padding' has no effect: images that do not fit in memory"):
        loaded(**settings, crop_padding=2)


def ramps(tmp_path, count):
    """An image of 100×80 pixels, so many times; red is twice the column and green twice the row of a pixel."""
    pixels = np.zeros((80, 100, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = 2 * np.arange(100), 2 * np.arange(80)[:, None]
    Image.fromarray(pixels).save(tmp_path / "ramps.png")
    config = resolve(make_config({"dataset": "imagefolder", "data_dir": "x", "num_workers": 0}), device="cpu")
    files = [(tmp_path / "ramps.png", 0)] * count
    return StreamedData(files, files, class_names=("a", "b"), side=8, config=config, device=CPU)


def pixels_of(data, images):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.normalization.mean, data.normalization.std))
    return (images * std + mean) * 255


def test_an_image_is_scaled_by_its_shorter_side_and_its_middle_validates(tmp_path):
    data = ramps(tmp_path, 1)
    ((images, _),) = data.validation_batches(1, Share())
    red, green, _ = pixels_of(data, images)[0]
    # 10×8 pixels of 10×10 each, without the first and the last column; the filter is cut off at the border.
    middles = torch.arange(1, 7) * 10 + 4.5
    torch.testing.assert_close(red[3, 1:7], 2 * (middles + 10), atol=1.1, rtol=0)
    torch.testing.assert_close(green[1:7, 3], 2 * middles, atol=1.1, rtol=0)


def test_random_crops_are_a_twelfth_to_all_of_the_image_of_any_place_and_shape(tmp_path):
    data = ramps(tmp_path, 200)
    ((images, _),) = data.training_batches(0, 200, Share())
    red, green, _ = pixels_of(data, images).unbind(1)
    across, down = (red[:, 3, 6] - red[:, 3, 1]) / 2, (green[:, 6, 3] - green[:, 1, 3]) / 2  # 5 of 8 parts of the crop
    width, height = across.abs() * 8 / 5, down * 8 / 5
    left = torch.minimum(red[:, 3, 1], red[:, 3, 6]) / 2 + 0.5 - 1.5 * width / 8
    top = green[:, 1, 3] / 2 + 0.5 - 1.5 * height / 8
    for start, size, whole in ((left, width, 100), (top, height, 80)):
        assert -2 < start.min() < 3
        assert whole - 3 < (start + size).max() < whole + 3
    area = width * height / 8000
    assert 0.06 < area.min() < 0.13
    assert 0.42 < area.mean() < 0.58  # 0.54 but for what would be higher or wider than the image
    assert area.max() > 0.85
    shape = (width / height)[area < 0.4].log()
    assert -0.45 < shape.min() < -0.18  # ln ¾ is −0.288, and what is read off the ramps is rounded
    assert 0.18 < shape.max() < 0.45
    assert abs(shape.mean()) < 0.08
    assert 70 < (across < 0).sum() < 130


def test_a_share_to_hold_out_that_nobody_needs_is_said(tree):
    with pytest.warns(UserWarning, match="setting 'validation_share' has no effect: .* has validation images"):
        assert loaded(dataset="imagefolder", data_dir=str(tree), validation_share=0.5).dataset.num_validation == 12


def test_images_are_scaled_to_the_asked_size(tree):
    data = loaded(dataset="imagefolder", data_dir=str(tree), image_size=20, batch=8)
    assert data.dataset.input_shape == (3, 20, 20)
    assert epoch_of(data, batch=8)[0][0].shape == (8, 3, 20, 20)


def photographs(root, pixels):
    """Two classes of the same images, (N, H, W) or (N, H, W, 3), for training and validation."""
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for index, image in enumerate(pixels):
                Image.fromarray(image).save(root / split / name / f"{index}.png")
    return {"dataset": "imagefolder", "data_dir": str(root), "batch": 2}


@pytest.mark.parametrize(
    ("size", "model", "side", "says"),
    [
        ((12, 16), (3, 8, 8), 8, r"scaled to 8×8, although they have 12×16 pixels each; the setting 'image_size'"),
        ((12, 16), (3, 8, 10), 8, r"scaled to 8×8, although its input_shape is of 8×10 pixels"),
        ((12, 12), (3, 8, 10), 12, None),  # their own
    ],
)
def test_images_that_are_cut_though_nobody_asked_for_it_are_named(tmp_path, size, model, side, says):
    made = photographs(tmp_path, np.full((3, *size), 200, dtype=np.uint8))
    with contextlib.nullcontext() if says is None else pytest.warns(UserWarning, match=says):
        assert loaded(**made, input_shape=model).dataset.input_shape == (3, side, side)
    assert loaded(**made, input_shape=model, image_size=8).dataset.input_shape == (3, 8, 8)  # asked for


@pytest.mark.parametrize(
    ("white", "says"),
    [
        (4095, "use 16 of 256 levels; of values of 16 bits the upper 8 count"),  # 12 bits
        (255, "are black; of values of 16 bits the upper 8 count"),
        (4096, None),
    ],
)
def test_images_whose_values_fill_a_part_of_their_bits_are_named(tmp_path, white, says):
    made = photographs(tmp_path, np.array([np.zeros((4, 4)), np.full((4, 4), white)], dtype=np.uint16))
    with contextlib.nullcontext() if says is None else pytest.warns(UserWarning, match=says):
        loaded(**made)


def test_train_limit_draws_with_the_seed(tree):
    data = loaded(dataset="imagefolder", data_dir=str(tree), train_limit=12, batch=4)
    assert data.dataset.num_train == 12
    digits = [loaded(dataset="digits", train_limit=100, seed=seed)._labels for seed in (0, 0, 1)]
    assert torch.equal(digits[0], digits[1])
    assert not torch.equal(digits[0], digits[2])


@pytest.mark.parametrize("make", ["nothing", "empty", "empty class", "other classes", "not an image"])
def test_a_wrong_image_tree_is_one_sentence(tree, tmp_path, make):
    root = tmp_path / "data"
    image = (tree / "train" / "ant" / "000.png").read_bytes()
    classes = {"train": ["a", "b"], "val": ["a", "b"]}
    expected = {
        "nothing": "there is no data folder",
        "empty": "holds no folder train",
        "empty class": "class folder .* holds no images",
        "other classes": "'c' is in only one of",
        "not an image": "cannot be read as an image",
    }[make]
    if make != "nothing":
        root.mkdir()
    if make in ("nothing", "empty"):
        classes = {}
    if make == "other classes":
        classes["val"].append("c")
    for split, names in classes.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            (root / split / name / "0.png").write_bytes(image if make != "not an image" else b"no image")
    if make == "empty class":
        (root / "train" / "b" / "0.png").unlink()
    with pytest.raises(UsageError, match=expected):
        loaded(dataset="imagefolder", data_dir=str(root), batch=1)


def test_images_of_kinds_that_are_not_read_are_told_and_other_files_are_not(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "data")
    for name in ("ant/0.GIF", "bee/1.jfif", "bee/2.jfif", "bee/Thumbs.db", "bee/labels.csv"):
        (tmp_path / "data" / "train" / name).write_bytes(b"x")
    told = r"^3 files are left out of .*train, whose 30 other images are read: \.gif and \.jfif$"
    with pytest.warns(UserWarning, match=told):
        data = loaded(dataset="imagefolder", data_dir=str(tmp_path / "data"))
    assert data.dataset.num_train == 30


@pytest.mark.parametrize("name", ["Train", "VAL", "testing", "validate"])
def test_a_split_that_is_written_otherwise_is_no_class(tree, tmp_path, name):
    shutil.copytree(tree / "train", tmp_path / name)
    others = [tmp_path / "more"] if name == "Train" else [tmp_path / "more", tmp_path / "train"]
    for other in others:  # beside classes, then beside a split of training images, which would be held out from
        shutil.copytree(tree / "val", other)
        with pytest.raises(UsageError, match=f"holds the folder {name}, which reads like a split"):
            loaded(dataset="imagefolder", data_dir=str(tmp_path))


def test_a_class_folder_whose_name_is_no_unicode_is_a_class_that_can_be_written_down(tree, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(tree / split, tmp_path / split)
        folder = os.fsencode(tmp_path / split)
        os.rename(folder + b"/cow", folder + b"/caf\xe9")
    data = loaded(dataset="imagefolder", data_dir=str(tmp_path))
    assert data.class_names == ("ant", "bee", "caf\N{REPLACEMENT CHARACTER}")
    assert msgspec.json.decode(msgspec.json.encode(data.class_names)) == list(data.class_names)


@pytest.mark.parametrize(
    ("share", "count", "held"),
    [(0.1, 10, 1), (0.01, 5, 1), (0.5, 3, 2), (0.9, 2, 1), (0.99, 10, 9)],  # 1.5 is rounded to 2
)
def test_every_class_gives_an_image_and_keeps_one(share, count, held):
    config = make_config({"dataset": "imagefolder", "data_dir": "somewhere", "validation_share": share})
    train, validation = held_out([0] * count, config)
    assert (len(train), len(validation)) == (count - held, held)
    assert sorted(train + validation) == list(range(count))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_breaks_while_streaming_is_one_sentence_whoever_decodes_it(tree, tmp_path, num_workers):
    root = tmp_path / "data"
    shutil.copytree(tree, root)
    broken = root / "val" / "bee" / "001.png"
    broken.write_bytes(broken.read_bytes()[:60])
    data = loaded(dataset="imagefolder", data_dir=str(root), data_memory_bytes=1000, num_workers=num_workers)
    with pytest.raises(UsageError) as caught:
        list(data.validation_batches(8, Share()))
    assert caught.value.message.startswith(f"{broken} cannot be read as an image")
    assert "\n" not in caught.value.message


def test_cifars_pixels_and_classes_stay_where_they_are(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)

    class Stored:
        data, targets, classes = pixels, [0, 1, 1, 1], ["cat", "dog"]

        def __init__(self, root, *, train, download):
            pass

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Stored)
    data = loaded(dataset="cifar10", data_dir=str(tmp_path), input_shape=(3, 32, 32), batch=2)
    ((images, labels),) = data.validation_batches(4, Share())
    assert labels.tolist() == [0, 1, 1, 1]
    found = pixels_of(data, images).round().to(torch.uint8)
    assert torch.equal(found.permute(0, 2, 3, 1), torch.from_numpy(pixels))
    assert (data.class_names, data.dataset.num_classes) == (("cat", "dog"), 2)


def test_a_limit_of_what_validates_is_its_own_and_its_images_take_memory_too(tree):
    """30 images of 12·12·3 bytes for training and 12 for validation: 18,144 bytes."""
    given = {"dataset": "imagefolder", "data_dir": str(tree)}
    limited = loaded(validation_limit=5, **given).dataset
    assert (limited.num_train, limited.num_validation) == (30, 5)
    for room, streamed in ((18_144, False), (18_143, True)):
        assert isinstance(loaded(data_memory_bytes=room, **given), StreamedData) == streamed


def test_images_may_take_a_quarter_of_the_machines_memory(monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 8, "SC_PHYS_PAGES": 100}.get)
    assert quarter_of_memory_bytes(CPU) == 200


def test_cifar_that_is_not_there_says_how_to_get_it(tmp_path):
    with pytest.raises(UsageError, match="no cifar10 in") as caught:
        loaded(dataset="cifar10", data_dir=str(tmp_path))
    assert caught.value.hint is not None
    assert "--download" in caught.value.hint


def test_a_mini_batch_larger_than_the_data_set_is_refused():
    with pytest.raises(UsageError, match="mini-batch of 128 is larger than the data set 'digits' with its 100"):
        loaded(dataset="digits", train_limit=100, batch=128)
