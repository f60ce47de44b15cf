"""A data set that Hugging Face's package has saved trains as an image tree does."""

import numpy as np
import pytest
import torch
from PIL import Image

from ptsim.errors import UsageError
from ptsim.training.config import make_config, resolve
from ptsim.training.data import Share
from ptsim.training.datasets import load_data

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.slow  # the package takes seconds to import


def pictures(count):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    labels = [index % 4 for index in range(count)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list("abcd"))})
    rows = {"img": [Image.fromarray(p) for p in pixels], "label": labels}
    return datasets.Dataset.from_dict(rows, features=features), pixels, labels


def load(folder, **more):
    settings = {"dataset": "huggingface", "data_dir": str(folder), "batch": 4, "augment": "none"} | more
    config = resolve(make_config(settings), device="cpu")
    return load_data(config, input_shape=(3, 32, 32), device=torch.device("cpu"))


def test_splits_of_the_data_set_are_used_as_they_are(tmp_path):
    train, pixels, labels = pictures(40)
    datasets.DatasetDict({"train": train, "test": train.select(range(8))}).save_to_disk(tmp_path / "d")
    data = load(tmp_path / "d")
    assert (data.dataset.num_train, data.dataset.num_validation, data.dataset.num_classes) == (40, 8, 4)
    assert data.dataset.input_shape == (3, 8, 8)
    ((images, classes),) = data.validation_batches(8, Share())
    assert classes.tolist() == labels[:8]
    scale, shift = (torch.tensor(v)[:, None, None] for v in (data.normalization.std, data.normalization.mean))
    expected = torch.from_numpy(pixels[:8]).permute(0, 3, 1, 2)
    assert torch.equal(((images * scale + shift) * 255).round().to(torch.uint8), expected)


def test_a_share_of_every_class_is_held_out_where_there_is_one_split(tmp_path):
    pictures(40)[0].save_to_disk(tmp_path / "d")
    held = []
    for seed in (0, 0, 1):
        data = load(tmp_path / "d", validation_share=0.2, seed=seed)
        assert (data.dataset.num_train, data.dataset.num_validation) == (32, 8)
        ((images, classes),) = data.validation_batches(8, Share())
        assert sorted(classes.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
        held.append(images)
    assert torch.equal(held[0], held[1])
    assert not torch.equal(held[0], held[2])


@pytest.mark.parametrize(
    ("labels", "broken", "message"),
    [
        ([0, 1, -1, None], None, "2 of 4 images of a split of .* have no class"),
        (
            [0, 1, 2, 3],
            {"bytes": b"no image", "path": None},
            "image 3 of a split of .* cannot be read: cannot identify",
        ),
    ],
)
def test_images_without_a_class_or_content_are_one_sentence(labels, broken, message, tmp_path):
    train, _, _ = pictures(16)
    rows = {"img": [train[i]["img"] for i in range(len(labels))], "label": labels}
    if broken is not None:
        rows["img"][-1] = broken
    test = datasets.Dataset.from_dict(rows, features=train.features)
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "d")
    with pytest.raises(UsageError, match=message):
        load(tmp_path / "d")


def test_splits_with_other_classes_and_empty_ones_are_one_sentence(tmp_path):
    train, _, _ = pictures(8)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list("abdc"))})
    rows = {name: list(train[name]) for name in ("img", "label")}
    other = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": train, "test": other}).save_to_disk(tmp_path / "other")
    with pytest.raises(UsageError, match="have other classes, or the same in another order"):
        load(tmp_path / "other")
    splits = datasets.DatasetDict({"train": train, "test": train.select([])})
    splits.save_to_disk(tmp_path / "empty", num_shards={"train": 1, "test": 1})
    with pytest.raises(UsageError, match=r"the validation split of .* is empty"):
        load(tmp_path / "empty")
    train.select([]).save_to_disk(tmp_path / "nothing", num_shards=1)
    with pytest.raises(UsageError, match=r"the training split of .* is empty"):
        load(tmp_path / "nothing")


def test_misuse_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="there is no data folder"):
        load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no data set that save_to_disk wrote"):
        load(tmp_path / "empty")
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).save_to_disk(tmp_path / "text")
    with pytest.raises(UsageError, match=r"has no column of the type Image; its columns: text \(Value\), label"):
        load(tmp_path / "text")
    pictures(8)[0].save_to_disk(tmp_path / "d")
    with pytest.raises(UsageError, match=r"the 8 images of .* do not fit into 0\.0 GiB"):
        load(tmp_path / "d", data_memory_bytes=1000)
    with pytest.raises(UsageError, match="data set 'huggingface' needs the setting 'data_dir'"):
        make_config({"dataset": "huggingface"})
