"""Training starts from weights in a file: plain state dicts, training scripts' checkpoints, safetensors, caches."""

import os
import pickle

import pytest
import safetensors.torch
import torch
import torchvision

import ptsim
from ptsim.errors import FileFormatError, UsageError
from ptsim.training.config import make_config
from ptsim.training.schedule import epoch_plans
from ptsim.training.weights import load_weights, read_state_dict, weights_file
from tests.training.nets import small
from tests.training.runs import settings

pytestmark = pytest.mark.filterwarnings("ignore:the network has collapsed:UserWarning")


def equal(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def old_format(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("plain.pt", torch.save),
        ("old.pth", old_format),
        ("ddp.pt", lambda state, path: torch.save({f"module.{k}": v for k, v in state.items()}, path)),
        ("compiled.pt", lambda state, path: torch.save({f"_orig_mod.module.{k}": v for k, v in state.items()}, path)),
        ("script.pth.tar", lambda state, path: torch.save({"epoch": 3, "arch": "x", "state_dict": state}, path)),
        ("weights.safetensors", safetensors.torch.save_file),
        ("uncounted.pt", lambda s, path: torch.save({k: v for k, v in s.items() if "num_batches" not in k}, path)),
    ],
)
def test_every_usual_file_is_read(name, write, tmp_path):
    trained, fresh = small(10), small(10)
    assert not equal(trained, fresh)
    write(trained.state_dict(), tmp_path / name)
    load_weights(fresh, tmp_path / name)
    assert equal(trained, fresh)


def test_the_average_of_a_script_comes_before_its_weights_and_a_layer_called_module_is_no_wrapper(tmp_path):
    average, raw = {"module.weight": torch.ones(2), "head.weight": torch.ones(3)}, {"module.weight": torch.zeros(2)}
    torch.save({"state_dict": raw, "state_dict_ema": average}, tmp_path / "w.pt")
    found = read_state_dict(tmp_path / "w.pt")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "module.weight": [1, 1], "head.weight": [1, 1, 1]
    }  # fmt: skip


@pytest.mark.parametrize("header_bytes", [0x280, 0x380, 0x480, 0x580, 0x4B50])  # little-endian: \x80\x02, …, "PK"
def test_a_file_whose_header_is_as_long_as_a_pickle_begins_is_read(header_bytes, tmp_path):
    trained = small(10)
    path, state = tmp_path / "w.safetensors", trained.state_dict()
    bare = int.from_bytes(safetensors.torch.save(state, {"x": ""})[:8], "little")  # a multiple of 8
    while bare > header_bytes:
        state.popitem()
        bare = int.from_bytes(safetensors.torch.save(state, {"x": ""})[:8], "little")
    path.write_bytes(safetensors.torch.save(state, {"x": "a" * (header_bytes - bare)}))
    assert int.from_bytes(path.read_bytes()[:8], "little") == header_bytes
    read = read_state_dict(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_a_classifier_of_other_classes_keeps_its_fresh_weights(tmp_path):
    trained, fresh = small(100), small(10)
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    head = fresh.fc.weight.clone()
    with pytest.raises(UsageError) as caught:
        load_weights(fresh, tmp_path / "w.pt")
    assert caught.value.message == (
        f"the weights in {tmp_path / 'w.pt'} are not those of this Small: "
        "2 of another shape (fc.weight 100×12 for 10×12, fc.bias 100 for 10)"
    )
    assert caught.value.hint == "weights_skip = ['fc.'] leaves that layer as it is initialised"
    load_weights(fresh, tmp_path / "w.pt", skip=["fc."])
    with pytest.raises(UsageError, match=r"weights_skip names 'head\.', but no weight of .*w\.pt or of this Small"):
        load_weights(fresh, tmp_path / "w.pt", skip=["fc.", "head."])
    assert torch.equal(fresh.fc.weight, head)
    assert torch.equal(fresh.stem[0].weight, trained.stem[0].weight)


class Bomb:
    def __reduce__(self):
        return print, ("the pickle ran",)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({"conv.weight": torch.zeros(1)}, UsageError, "missing (stem.0.weight, stem.1.weight, stem.1.bias, …); 1 that"),
        ({"state_dict": 3}, FileFormatError, "found a dict, expected a state dict: tensors by name"),
        ([torch.zeros(1)], FileFormatError, "found a list, expected a state dict"),
        (Bomb(), FileFormatError, "found a pickle that is no plain state dict"),
    ],
)
def test_other_files_are_one_sentence_and_run_nothing(content, error, message, tmp_path, capsys):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(error) as caught:
        load_weights(small(10), tmp_path / "w.pt")
    assert message in caught.value.message
    assert "ran" not in capsys.readouterr().out


def test_damaged_files_are_one_sentence(tmp_path):
    for name, content in (("a.pt", b"PK\x03\x04 cut"), ("b.safetensors", b"no"), ("c.pkl", pickle.dumps(3))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FileFormatError):
            load_weights(small(10), tmp_path / name)
    torch.save(small(10).state_dict(), tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:2000])
    with pytest.raises(FileFormatError, match=r"is damaged, or nothing that torch\.load reads: "):
        load_weights(small(10), tmp_path / "half.pt")
    for bent in (b"\x80\x02(.", b"\x80\x02].", b"\x80\x02)\x81.", b"\x80\x02h\x07.", b"\x80\x02}K\x01b."):
        (tmp_path / "bent.pt").write_bytes(bent)
        with pytest.raises(FileFormatError):
            load_weights(small(10), tmp_path / "bent.pt")
    with pytest.raises(UsageError, match="there is no file of weights"):
        load_weights(small(10), tmp_path / "none.pt")


def test_names_of_torchvision_and_timm_are_found_where_those_libraries_keep_their_files(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    name = "torchvision:ResNet18_Weights.IMAGENET1K_V1"
    with pytest.raises(UsageError, match=r"there is no file of weights .*checkpoints/resnet18-f37072fd\.pth"):
        weights_file(name)
    trained = torchvision.models.resnet18()
    (tmp_path / "checkpoints").mkdir()
    torch.save(trained.state_dict(), tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    fresh = torchvision.models.resnet18()
    load_weights(fresh, name)
    assert equal(trained, fresh)
    with pytest.raises(UsageError, match=r"torchvision has no weights 'ResNet18_Weights\.V9'"):
        weights_file("torchvision:ResNet18_Weights.V9")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--timm--resnet10t.c3_in1k" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    safetensors.torch.save_file(small(10).state_dict(), snapshot / "model.safetensors")
    assert weights_file("timm:resnet10t.c3_in1k") == snapshot / "model.safetensors"
    newer = snapshot.with_name("aaa") / "model.safetensors"
    newer.parent.mkdir()
    safetensors.torch.save_file(small(10).state_dict(), newer)
    os.utime(snapshot / "model.safetensors", (1, 1))
    assert weights_file("timm:resnet10t.c3_in1k") == newer


def test_a_run_prunes_from_trained_weights_at_once_or_after_dense_epochs(tmp_path):
    torch.manual_seed(1)
    trained = small(10)
    torch.save(trained.state_dict(), tmp_path / "trained.pt")
    more = {"weights": str(tmp_path / "trained.pt"), "lr": 1e-12, "threshold": 1e-9, "profile": False}
    again = ptsim.train(settings(epochs=1, **more), out=tmp_path / "again")
    loaded = ptsim.load_model(again.folder, trust=True)
    for (name, ours), theirs in zip(loaded.named_parameters(), trained.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6), name  # with so small a rate they are still those of the file
    later = ptsim.train(settings(epochs=3, pretrain_epochs=2, **more), out=tmp_path / "later")
    assert [e.regularized for e in ptsim.read_trace(later.trace).epochs] == [False, False, True]


def test_dense_epochs_come_before_a_continuous_schedule_and_leave_its_rate_alone():
    options = {"epochs": 6, "interval": 2, "lr": 1.0, "lr_milestones": [3], "lr_gamma": 0.1, "dataset": "digits"}
    plans = epoch_plans(make_config(options | {"pretrain_epochs": 2}))
    assert [plan.regularized for plan in plans] == [False, False, True, True, True, True]
    assert [plan.reconfigures for plan in plans] == [False, False, False, True, False, True]
    assert [plan.learning_rate for plan in plans] == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1])


def test_misuse_is_one_sentence():
    with pytest.raises(UsageError, match="settings 'weights' and 'start_from' both say"):
        make_config({"weights": "a", "start_from": "b", "dataset": "digits"})
    with pytest.warns(UserWarning, match="setting 'weights_skip' has no effect: there are no weights to load"):
        make_config({"weights_skip": ["fc."], "dataset": "digits"})
