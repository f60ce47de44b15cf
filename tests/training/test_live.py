"""ptsim.train with a live network and live data sets."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate
from torchvision.transforms import v2

import ptsim
from ptsim.errors import UnknownNameError, UsageError
from ptsim.training.config import Config
from ptsim.training.data import Share
from ptsim.training.live import LiveData
from tests.training.nets import small
from tests.training.runs import settings


def data(count=96):
    random = torch.Generator().manual_seed(0)
    patterns = torch.rand(10, 3, 8, 8, generator=random)
    labels = torch.arange(count + 64) % 10
    images = (patterns[labels] + 0.1 * torch.randn(len(labels), 3, 8, 8, generator=random)).clamp(0, 1)
    pixels = (255 * images).to(torch.uint8)
    return TensorDataset(pixels[:count], labels[:count]), TensorDataset(pixels[count:], labels[count:])


def made(**changes):
    chosen = settings(profile=False, num_threads=1, num_workers=0, **changes)
    return {
        name: value for name, value in chosen.items() if name not in ("model", "dataset", "image_size", "train_limit")
    }


def test_a_live_network_and_live_data_are_trained_pruned_resumed_and_loaded(tmp_path):
    torch.manual_seed(0)
    network = small(10)
    before = [p.detach().clone() for p in network.parameters()]
    result = ptsim.train(made(epochs=4), out=tmp_path / "run", model=network, data=data())
    trace = ptsim.read_trace(result.trace)
    assert (trace.run.model, trace.run.dataset.name) == ("live:Small", "TensorDataset")
    assert (trace.run.dataset.num_classes, trace.run.dataset.num_train) == (10, 96)
    assert sum(event.channels_removed for event in trace.reconfigurations) > 0
    assert trace.epochs[-1].train_loss < trace.epochs[0].train_loss
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))  # a copy was trained
    with pytest.raises((UnknownNameError, UsageError), match="live"):
        ptsim.train({"epochs": 5}, resume=result.folder)
    again = ptsim.train({"epochs": 5}, resume=result.folder, model=network, data=data())
    assert again.epochs == 5
    loaded = ptsim.load_model(result.folder, model=network)
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in network.parameters())
    images, labels = data()[1].tensors
    hits = (loaded(images.float() / 255).argmax(1) == labels).double().mean().item()
    assert hits == again.final_accuracy


class Pictures(torch.utils.data.Dataset):
    """PIL images, as most data sets of torchvision give them."""

    classes = tuple("0123456789")

    def __init__(self, tensors, transform):
        self.pixels, self.labels = tensors.tensors
        self.transform = transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(v2.functional.to_pil_image(self.pixels[index])), int(self.labels[index])


def pictures():
    augment = [v2.RandomResizedCrop(8, scale=(0.7, 1), antialias=True), v2.RandomHorizontalFlip(), v2.RandAugment()]
    to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)]
    train, validation = data()
    return (
        Pictures(train, v2.Compose([v2.ToImage(), *augment, *to_float, v2.RandomErasing(p=0.5)])),
        Pictures(validation, v2.Compose([v2.ToImage(), *to_float])),
    )


def mixed(items):
    return v2.RandomChoice([v2.CutMix(num_classes=10), v2.MixUp(num_classes=10)])(*default_collate(items))


def test_any_transform_of_torchvision_trains_also_those_of_whole_mini_batches(tmp_path):
    torch.manual_seed(0)
    network = small(10)
    runs = []
    for name in ("one", "two"):
        config = made(epochs=3, label_smoothing=0.1)
        runs.append(ptsim.train(config, out=tmp_path / name, model=network, data=pictures(), collate=mixed))
    trace = ptsim.read_trace(runs[0].trace)
    assert trace.complete
    assert all(epoch.num_images == 96 for epoch in trace.epochs)
    first, second = (ptsim.load_model(run.folder, model=network).parameters() for run in runs)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))  # what is random belongs to the seed


class Shaken(Dataset):
    """Draws as many packages for augmentation do: from Python's generator, and from NumPy's."""

    def __init__(self, tensors):
        self.pixels, self.labels = tensors.tensors

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.pixels[index].float() / 255 + random.random() + np.random.rand(), int(self.labels[index])


def test_what_python_and_numpy_draw_belongs_to_the_seed_and_the_callers_numbers_go_on(tmp_path):
    network = small(10)
    train, validation = data()
    random.seed(7)
    np.random.seed(7)
    runs = [
        ptsim.train(made(epochs=1), out=tmp_path / name, model=network, data=(Shaken(train), validation))
        for name in ("one", "two")
    ]
    assert (random.random(), np.random.rand()) == (random.Random(7).random(), np.random.RandomState(7).rand())
    first, second = (ptsim.load_model(run.folder, model=network).parameters() for run in runs)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


class Drawn(Dataset):
    """Images of one random number each."""

    classes = ("a", "b")

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.rand(()).expand(3, 2, 2), 0


def test_the_workers_of_every_rank_draw_numbers_of_their_own():
    source = LiveData(
        (Drawn(), Drawn()), None, config=Config(dataset="live", num_workers=1), device=torch.device("cpu")
    )
    drawn = [
        [float(images[0, 0, 0, 0]) for images, _ in source.training_batches(0, 4, Share(rank=rank, world_size=2))]
        for rank in (0, 1, 1)
    ]
    assert drawn[1] == drawn[2]
    assert not set(drawn[0]) & set(drawn[1])


def test_classes_as_shares_train_as_the_classes_themselves(tmp_path):
    torch.manual_seed(0)
    network = small(10)

    def shares(items):
        images, labels = default_collate(items)
        return images, torch.nn.functional.one_hot(labels, 10).double()

    epochs = [
        ptsim.read_trace(
            ptsim.train(made(epochs=1), out=tmp_path / str(i), model=network, data=data(), collate=collate).trace
        ).epochs[0]
        for i, collate in enumerate((None, shares))
    ]
    assert epochs[1].train_loss == pytest.approx(epochs[0].train_loss, rel=1e-5)
    assert epochs[1].train_accuracy == epochs[0].train_accuracy


@pytest.mark.parametrize(
    ("collate", "message"),
    [
        (lambda items: torch.stack([image for image, _ in items]), r"no \(images \(N, C, H, W\), classes\)"),
        (lambda items: (default_collate(items)[0], torch.zeros(len(items), 3)), "expected 16 numbers, or 16×10 shares"),
        (
            lambda items: (default_collate(items)[0], torch.full((len(items),), 10)),
            "has the class 10, but there are 10",
        ),
        (lambda items: (default_collate(items)[0], torch.full((len(items),), 0.5)), "classes of the data are no whole"),
        (lambda items: default_collate([(torch.zeros(3, 8 + i, 8), 0) for i, _ in enumerate(items)]), "differ in size"),
    ],
)
def test_mini_batches_that_are_none_are_one_sentence(tmp_path, collate, message):
    with pytest.raises(UsageError, match=message):
        ptsim.train(made(batch=16), out=tmp_path / "run", model=small(10), data=data(), collate=collate)


class Stream(IterableDataset):
    def __len__(self):
        return 4

    def __iter__(self):
        return iter(())


def test_data_that_are_none_are_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="has to be a pair of map-style data sets"):
        ptsim.train(made(), out=tmp_path / "run", model=small(10), data=data()[0])
    for model, found in (("resnet20", "a str"), (type(small(10)), "the class ")):
        with pytest.raises(UsageError, match=f"the model is {found}"):
            ptsim.train(made(), out=tmp_path / "run", model=model, data=data())
    with pytest.raises(UsageError, match=r"collate= makes the mini-batches of data sets that are given live"):
        ptsim.train(made(), out=tmp_path / "run", model=small(10), collate=mixed)
    flat = TensorDataset(torch.zeros(96, 4), torch.zeros(96))
    with pytest.raises(UsageError, match=r"no \(image, class\)"):
        ptsim.train(made(), out=tmp_path / "run", model=small(10), data=(flat, flat))
    train, validation = data()
    for wrong in (DataLoader(train, batch_size=8), Stream()):
        with pytest.raises(UsageError, match="has to be a pair of map-style data sets"):
            ptsim.train(made(), out=tmp_path / "run", model=small(10), data=(wrong, validation))
    train.classes, validation.classes = list("0123456789"), list("1023456789")
    with pytest.raises(UsageError, match="other classes, or the same in another order"):
        ptsim.train(made(), out=tmp_path / "run", model=small(10), data=(train, validation))
    for pair, which in (((train, Subset(train, [])), "validation"), ((Subset(train, []), validation), "training")):
        with pytest.raises(UsageError, match=f"the {which} data set is empty"):
            ptsim.train(made(), out=tmp_path / "run", model=small(10), data=pair)
