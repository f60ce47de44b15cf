"""ptsim.train with a live network and live data sets."""

import pytest
import torch
from torch.utils.data import TensorDataset

import ptsim
from ptsim.errors import UnknownNameError, UsageError
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


def test_data_that_are_none_are_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="has to be a pair of map-style data sets"):
        ptsim.train(made(), out=tmp_path / "run", model=small(10), data=data()[0])
    flat = TensorDataset(torch.zeros(96, 4), torch.zeros(96))
    with pytest.raises(UsageError, match=r"no \(image, class\)"):
        ptsim.train(made(), out=tmp_path / "run", model=small(10), data=(flat, flat))
