"""A run folder under attack: two writers, foreign or edited files, user code, interruptions."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import ptsim
from ptsim.cli.main import run as command
from ptsim.errors import FileFormatError, PtsimError, TrainingError, UsageError
from ptsim.measure.nvml import NullMeter, cpu_info
from ptsim.trace.io import TraceWriter, read_records
from ptsim.training import checkpoint, recorder, runfolder, step
from ptsim.training.data import decode
from ptsim.training.runfolder import MAY_CHANGE
from ptsim.usercode import source_files
from tests.training.runs import NETS, servant, settings, train_until_killed


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return ptsim.train(settings(epochs=2, profile=False), out=tmp_path_factory.mktemp("runs") / "finished").folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run of two epochs."""
    return shutil.copytree(finished, tmp_path / "run")


def longer(folder, **changes):
    return ptsim.train({"epochs": 3} | changes, resume=folder)


# Two writers


def test_a_second_process_that_would_write_the_trace_is_refused_and_changes_nothing(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with TraceWriter(run / "trace.jsonl", append=True), pytest.raises(UsageError, match="written by another process"):
        longer(run)
    assert before == {path: path.read_bytes() for path in before}
    assert longer(run).epochs == 3


def test_a_process_that_was_killed_does_not_keep_the_lock(tmp_path):
    folder = tmp_path / "run"
    process = servant().Process(target=train_until_killed, args=(folder, {}, ("train_epoch", 2)))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    assert ptsim.train(resume=folder).epochs == 6


# Foreign and edited files


def test_a_trace_that_is_a_link_is_refused_and_its_target_left_alone(run, tmp_path):
    shutil.move(run / "trace.jsonl", tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    (run / "trace.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileFormatError, match="found a link, expected the trace of this run"):
        longer(run)
    assert (tmp_path / "elsewhere").read_bytes() == before


def test_a_trace_that_is_no_file_is_named(run):
    (run / "trace.jsonl").unlink()
    os.mkfifo(run / "trace.jsonl")
    with pytest.raises(FileFormatError, match="found a pipe or a device, expected the trace of this run"):
        longer(run)
    (run / "trace.jsonl").unlink()
    (run / "trace.jsonl").mkdir()
    with pytest.raises(FileFormatError, match="found a folder, expected the trace of this run"):
        longer(run)


def test_the_trace_of_another_run_is_refused_before_anything_is_cut(run, tmp_path):
    other = ptsim.train(settings(epochs=3, profile=False, lr=0.04), out=tmp_path / "other").trace
    shutil.copy(other, run / "trace.jsonl")
    before = (run / "trace.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"the run began with lr = 0\.04, not 0\.05"):
        longer(run)
    lines = before.splitlines(keepends=True)
    own = (run / "config.toml").read_text()
    (run / "config.toml").write_text(own.replace("lr = 0.05", "lr = 0.04"))
    with pytest.raises(FileFormatError, match="the trace of another run than the checkpoint's"):
        longer(run)
    assert (run / "trace.jsonl").read_bytes() == b"".join(lines)


def test_a_configuration_that_was_edited_is_noticed(run):
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("penalty_ratio = 0.5", "penalty_ratio = 0.1"))
    with pytest.raises(UsageError, match=r"began with penalty_ratio = 0\.5, not 0\.1: .*config\.toml was edited"):
        longer(run)


def test_resuming_may_add_epochs_and_threads_but_no_other_rate(run):
    with pytest.raises(UsageError, match=r"began with lr = 0\.05, not 0\.3: --resume cannot change it") as caught:
        longer(run, lr=0.3)
    assert "epochs" in caught.value.hint
    assert longer(run, num_threads=1, keep_every=1).epochs == 3
    with pytest.raises(FileFormatError, match="has 3 epochs behind it, more than the 1 that the run is to have"):
        longer(run, epochs=1)
    assert ptsim.train(resume=run).epochs == 3  # the change stays
    assert ptsim.read_trace(run).complete


def test_help_and_docs_name_all_that_a_resumed_run_may_change(capsys):
    page = (Path(__file__).parents[2] / "docs" / "train.md").read_text()
    sentence = re.search(r"It may change how long the run trains.*?\((.*?)\)", page, re.DOTALL)[1]
    assert set(re.findall(r"\w+", sentence)) == MAY_CHANGE
    assert command(["train", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    said = re.search(r"Only these may change with it: (.*?)\.", words)[1]
    options = {"log": "loggers"}  # of two names
    named = {name.replace("-", "_") for name in re.findall(r"[a-z][a-z_-]+", said)} - {"and", "with", "set"}
    assert {options.get(name, name) for name in named} == MAY_CHANGE


def test_a_folder_that_holds_a_trace_alone_is_not_said_to_be_one_to_resume(run, tmp_path):
    with pytest.raises(UsageError, match="holds another run") as caught:
        ptsim.train(settings(epochs=1), out=run)
    assert caught.value.hint == f"`ptsim train --resume {run}` goes on with it"
    alone = tmp_path / "recorded in a loop"
    alone.mkdir()
    shutil.copy(run / "trace.jsonl", alone)
    with pytest.raises(UsageError, match="holds another run") as caught:
        ptsim.train(settings(epochs=1), out=alone)
    assert caught.value.hint == "choose another folder"
    assert [path.name for path in alone.iterdir()] == ["trace.jsonl"]


@pytest.mark.parametrize("name", ["weights.safetensors", "state.safetensors"])
def test_changed_bytes_of_a_checkpoint_are_refused(run, name):
    file = run / "checkpoints" / "epoch-0001" / name
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(FileFormatError, match="its content was changed since"):
        longer(run)


def test_weights_that_are_not_finite_are_refused(run):
    folder = run / "checkpoints" / "epoch-0001"
    weights = load_file(folder / "weights.safetensors")
    weights["fc.bias"][0] = torch.nan
    save_file(weights, folder / "weights.safetensors")
    description = json.loads((folder / "checkpoint.json").read_text())
    del description["weights_sha256"], description["sha256"]  # as an older ptsim wrote it
    (folder / "checkpoint.json").write_text(json.dumps(description))
    with pytest.raises(FileFormatError, match=r"fc\.bias holds numbers that are not finite"):
        ptsim.load_model(run, trust=True)


def test_what_a_killed_process_has_half_removed_goes_with_the_next_checkpoint(run):
    for name in (".start.doomed", ".epoch-0007.unfinished"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "file").write_text("")
    longer(run)
    assert not list(run.rglob(".*"))


def two_classes(root):
    """Photographs of noise, 8×8."""
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 200, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def whitened(root):
    Image.new("RGB", (8, 8), "white").save(root / "train" / "a" / "0.png")


def renamed(root):
    for split in ("train", "val"):
        (root / split / "b").rename(root / split / "c")


def fewer(root):
    (root / "val" / "b" / "3.png").unlink()


def as_it_was(root):
    pass


@pytest.mark.parametrize(
    ("change", "more", "says"),
    [
        (whitened, {}, r"the newest checkpoint is of images with the mean 0\.\d+, 0\.\d+, 0\.\d+, those of today have"),
        (as_it_was, {"data_memory_bytes": 1}, "those of today have 0.485, 0.456, 0.406"),  # read in every epoch now
        (renamed, {}, "has the class 'b' where the data of today have 'c'"),
        (fewer, {}, "the run began with 8 validation images, the data of today have 7"),
    ],
    ids=["other images", "no room", "other classes", "fewer images"],
)
def test_a_run_goes_on_with_the_images_that_it_began_with_alone(tmp_path, change, more, says):
    root = two_classes(tmp_path / "data")
    made = settings(dataset="imagefolder", data_dir=str(root), batch=4, epochs=1, profile=False, num_workers=0)
    del made["train_limit"]
    folder = ptsim.train(made, out=tmp_path / "run").folder
    trace = (folder / "trace.jsonl").read_bytes()
    elsewhere = shutil.copytree(root, tmp_path / "elsewhere")
    change(elsewhere)
    with pytest.raises(PtsimError, match=says):
        ptsim.train({"epochs": 2, "data_dir": str(elsewhere)} | more, resume=folder)
    assert (folder / "trace.jsonl").read_bytes() == trace
    assert ptsim.train({"epochs": 2}, resume=folder).epochs == 2


@pytest.mark.parametrize(
    ("other", "says"), [({"name": "another CPU"}, "on another CPU"), ({"num_threads": 77}, "with 77 threads")]
)
def test_a_run_that_goes_on_on_another_machine_says_whose_times_its_trace_mixes(run, monkeypatch, other, says):
    info = msgspec.structs.replace(cpu_info(), **other)
    monkeypatch.setattr(recorder, "open_meter", lambda _: NullMeter(info))
    with pytest.warns(UserWarning, match=f"which its trace names for every epoch, and goes on {says}: what is"):
        assert longer(run).epochs == 3


def test_a_run_that_goes_on_with_other_ranks_or_another_torch_says_so(run, monkeypatch):
    began = ptsim.read_trace(run).run
    torch_then = began.versions["torch"]
    runfolder.check_began_alike(run, began.dataset, began.device, 1)  # nothing is to be said
    monkeypatch.setattr(runfolder.importlib.metadata, "version", lambda _: "1.2.3")
    with pytest.warns(UserWarning, match="the run began with") as said:
        runfolder.check_began_alike(run, began.dataset, began.device, 2)
    mixes = "what is predicted from it mixes the times of both"
    assert [str(warning.message) for warning in said] == [
        f"the run began with 1 rank and goes on with 2 ranks: {mixes}",  # every epoch has its own number of ranks
        f"the run began with torch {torch_then}, which its trace names for every epoch, and goes on with torch 1.2.3: "
        + mixes,
    ]


def test_a_recorded_run_says_when_it_began_as_planned_runs_and_profiles_do(run):
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", ptsim.read_trace(run).run.created)


def test_a_hidden_file_among_the_checkpoints_is_left_alone(run):
    note = run / "checkpoints" / ".DS_Store"
    note.write_text("")
    assert longer(run).epochs == 3
    assert note.is_file()


# Code of users


def test_loading_runs_a_users_file_only_if_it_is_trusted(run, tmp_path):
    evil = tmp_path / "evil.py"
    evil.write_text("raise SystemExit('ran')\n")
    file = run / "checkpoints" / "epoch-0001" / "checkpoint.json"
    description = json.loads(file.read_text()) | {"sha256": None}
    description["recipe"]["model"] = f"{evil}:net"
    file.write_text(json.dumps(description))
    with pytest.raises(UsageError, match="loading it would run that file") as caught:
        ptsim.load_model(run)
    assert "trust=True" in caught.value.hint
    named = ptsim.load_model(run, model=f"{NETS}:small")  # another file that makes the same network
    assert named(torch.zeros(1, 3, 8, 8)).shape == (1, 10)


def test_a_run_holds_the_code_of_its_network_and_notices_an_edited_file(tmp_path):
    file = tmp_path / "net.py"
    shutil.copy(NETS, file)
    config = settings(model=f"{file}:small", epochs=1, profile=False)
    run = shutil.move(ptsim.train(config, out=tmp_path / "run").folder, tmp_path / "moved")
    assert (run / "code" / "net.py").read_bytes() == NETS.read_bytes()
    images = torch.rand(2, 3, 8, 8)
    before = ptsim.load_model(run, trust=True)(images)
    file.write_text(
        file.read_text() + "\n\ndef small(num_classes, in_channels=3):\n    return nn.Linear(3, num_classes)\n"
    )
    with pytest.warns(UserWarning, match=r"net\.py or what it imports was edited since the run"):
        assert torch.equal(ptsim.load_model(run, trust=True)(images), before)
    with pytest.raises(FileFormatError, match=r"another content of .*net\.py or its imports, which was edited"):
        longer(run)
    file.unlink()  # as on another machine
    assert torch.equal(ptsim.load_model(run, trust=True)(images), before)
    (run / "code" / "net.py").rename(run / "model.py")  # as older runs keep it
    assert torch.equal(ptsim.load_model(run, trust=True)(images), before)
    (run / "model.py").write_text("# something else\n")
    with pytest.raises(UsageError, match=r"neither .*net\.py nor .*model\.py is the file that made the network"):
        ptsim.load_model(run, trust=True)


def test_a_run_holds_the_modules_beside_the_users_file_and_notices_an_edited_one(tmp_path):
    project = tmp_path / "project"
    (project / "parts").mkdir(parents=True)
    (project / "net.py").write_text(
        "from sizes import WIDTH\n\n\n"
        "def make(num_classes):\n    from parts.body import Body\n    return Body(WIDTH, num_classes)\n"
    )
    (project / "sizes.py").write_text("WIDTH = 8\n")
    (project / "parts" / "__init__.py").write_text("")
    (project / "parts" / "body.py").write_text("from .base import nn, tail\n\n\n" + _BODY)
    (project / "parts" / "base.py").write_text(
        "from torch import nn\n\n\ndef tail(width, num_classes):\n    return nn.Linear(width, num_classes)\n"
    )
    (project / "unused.py").write_text("raise RuntimeError\n")
    run = ptsim.train(
        settings(model=f"{project / 'net.py'}:make", epochs=1, profile=False), out=tmp_path / "run"
    ).folder
    copied = {str(path.relative_to(run / "code")) for path in (run / "code").rglob("*.*")}
    assert copied == {"net.py", "sizes.py", "parts/__init__.py", "parts/body.py", "parts/base.py"}
    images = torch.rand(2, 3, 8, 8)
    before = ptsim.load_model(run, trust=True)(images)
    (project / "sizes.py").write_text("WIDTH = 16\n")
    with pytest.warns(UserWarning, match=r"net\.py or what it imports was edited since the run"):
        assert torch.equal(ptsim.load_model(run, trust=True)(images), before)
    with pytest.raises(FileFormatError, match="or its imports, which was edited since"):
        longer(run)
    wider = ptsim.inspect(f"{project / 'net.py'}:make", input_shape=(3, 8, 8))  # the edited one, in the same process
    assert wider.prunable_channels == 16
    shutil.rmtree(project)  # as on another machine
    assert torch.equal(ptsim.load_model(run, trust=True)(images), before)
    with pytest.raises(UsageError, match="loading it would run that file"):
        ptsim.load_model(run)
    (run / "code" / "sizes.py").write_text("WIDTH = 16\n")
    with pytest.raises(UsageError, match="is the file that made the network"):
        ptsim.load_model(run, trust=True)


def test_a_file_that_says_itself_where_its_imports_are_is_not_taken_for_edited(tmp_path, monkeypatch):
    """`sys.path.append` in the file: another process does not know of it before it runs the file."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "far_body.py").write_text(
        "from torch import nn\n\n\ndef tail(width, num_classes):\n    return nn.Linear(width, num_classes)\n\n\n"
        + _BODY
    )
    file = tmp_path / "net.py"
    file.write_text(
        f"import sys\n\nsys.path.append({str(tmp_path / 'lib')!r})\nfrom far_body import Body\n\n\n"
        "def make(num_classes):\n    return Body(8, num_classes)\n"
    )
    before_all = [*sys.path]
    monkeypatch.setattr("sys.path", [*sys.path])
    run = ptsim.train(settings(model=f"{file}:make", epochs=1, profile=False), out=tmp_path / "run").folder
    images = torch.rand(2, 3, 8, 8)
    before = ptsim.load_model(run, trust=True)(images)
    sys.path[:] = before_all  # as in another process
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ptsim.load_model(run, trust=True)(images), before)
    (tmp_path / "lib" / "far_body.py").write_text((tmp_path / "lib" / "far_body.py").read_text() + "# edited\n")
    sys.path[:] = before_all
    with pytest.warns(UserWarning, match=r"net\.py or what it imports was edited since the run"):
        assert torch.equal(ptsim.load_model(run, trust=True)(images), before)


def test_a_run_holds_what_the_users_file_imports_from_elsewhere(tmp_path, monkeypatch):
    """The file lies in a folder of the project, and imports by PYTHONPATH what lies in another one."""
    project = tmp_path / "project"
    (project / "nets").mkdir(parents=True)
    (project / "common_parts").mkdir()
    (project / "nets" / "net.py").write_text(
        "from common_parts.body import Body\n\n\ndef make(num_classes):\n    return Body(8, num_classes)\n"
    )
    (project / "common_parts" / "__init__.py").write_text("")
    (project / "common_parts" / "body.py").write_text("from .base import nn, tail\n\n\n" + _BODY)
    (project / "common_parts" / "base.py").write_text(
        "from torch import nn\n\n\ndef tail(width, num_classes):\n    return nn.Linear(width, num_classes)\n"
    )
    monkeypatch.syspath_prepend(project)
    config = settings(model=f"{project / 'nets' / 'net.py'}:make", epochs=1, profile=False)
    run = ptsim.train(config, out=tmp_path / "run").folder
    copied = {str(path.relative_to(run / "code")) for path in (run / "code").rglob("*.*")}
    assert copied == {"net.py", "common_parts/__init__.py", "common_parts/body.py", "common_parts/base.py"}
    images = torch.rand(2, 3, 8, 8)
    before = ptsim.load_model(run, trust=True)(images)
    monkeypatch.undo()
    for name in [name for name in sys.modules if name.partition(".")[0] == "common_parts"]:
        del sys.modules[name]
    shutil.rmtree(project)  # as on another machine
    assert torch.equal(ptsim.load_model(run, trust=True)(images), before)


_BODY = """class Body(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, width, 3), tail(width, num_classes)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))
"""


@pytest.mark.parametrize("name", ["site-packages", "dist-packages"])
def test_packages_of_another_installation_are_not_the_users(tmp_path, monkeypatch, name):
    packages = tmp_path / "home/.local/lib/python3.11" / name  # as pip's --user and a virtual environment's base have
    packages.mkdir(parents=True)
    (packages / "heavy_package.py").write_text("import heavy_part")
    (packages / "heavy_part.py").write_text("")
    (tmp_path / "net.py").write_text("import heavy_package")
    monkeypatch.syspath_prepend(str(packages))
    assert set(source_files(tmp_path / "net.py")) == {"net.py"}


def test_a_checkpoint_names_the_classes(tmp_path):
    run = ptsim.train(settings(dataset="digits", epochs=1, profile=False), out=tmp_path / "run").folder
    description = json.loads((run / "checkpoints" / "epoch-0000" / "checkpoint.json").read_text())
    assert description["class_names"] == list("0123456789")


# Starting from a stored network


def test_a_new_run_starts_from_a_stored_network(run, tmp_path):
    result = ptsim.train(
        settings(epochs=1, profile=False, penalty_ratio=0.1, start_from=str(run)), out=tmp_path / "new"
    )
    before, after = ptsim.read_trace(run), ptsim.read_trace(result.trace)
    assert after.epochs[0].architecture == before.final_network.id
    assert after.epochs[0].train_loss < before.epochs[0].train_loss
    assert ptsim.train({"epochs": 2}, resume=result.folder).epochs == 2
    own = {name: value for name, value in settings(epochs=1, profile=False).items() if name != "model"}
    ptsim.train(own | {"start_from": run}, out=tmp_path / "unnamed")  # the model need not be named again
    assert ptsim.read_trace(tmp_path / "unnamed").run.model == before.run.model
    with pytest.raises(UsageError, match=r"is for the model [^()]*, but this run is for the model resnet20$"):
        ptsim.train(settings(model="resnet20", image_size=32, start_from=str(run)), out=tmp_path / "other")


# Images


def test_sixteen_bits_become_the_upper_eight(tmp_path):
    values = np.array([[0, 255, 256, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert decode(tmp_path / "deep.png")[0].tolist() == [[0, 0, 1, 255]]
    assert decode(tmp_path / "deep.png").shape == (3, 1, 4)


def test_images_without_a_known_white_and_pipes_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "fractions.tif")
    with pytest.raises(UsageError, match="what is white is not known"):
        decode(tmp_path / "fractions.tif")
    Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(UsageError, match="beyond 16 bits"):
        decode(tmp_path / "wide.tif")
    for value, says in ((200, "of 32 bits and all below 256"), (300, None), (0, None)):
        Image.fromarray(np.full((4, 4), value, dtype=np.int32)).save(tmp_path / f"{value}.tif")
        if says is None:
            assert decode(tmp_path / f"{value}.tif").unique().tolist() == [value >> 8]
        else:
            with pytest.raises(UsageError, match=says):
                decode(tmp_path / f"{value}.tif")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UsageError, match="is not a regular file"):
        decode(tmp_path / "pipe.png")


def test_a_single_class_is_refused(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "cats").mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (8, 8), "white").save(tmp_path / split / "cats" / f"{index}.png")
    made = settings(dataset="imagefolder", data_dir=str(tmp_path), batch=2)
    del made["train_limit"]
    with pytest.raises(UsageError, match="has a single class"):
        ptsim.train(made, out=tmp_path / "run")


# Stops


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room, then"),
        (errno.EDQUOT, "make room, then"),
        (errno.EACCES, "let it be written, then"),
        (errno.EROFS, "let it be written, then"),
    ],
)
def test_only_a_full_disk_is_called_one(tmp_path, number, remedy):
    with pytest.raises(TrainingError, match="cannot be written") as caught, checkpoint.writing(tmp_path):
        raise OSError(number, os.strerror(number))
    assert caught.value.hint.startswith(remedy)


def test_a_mount_point_is_named_with_a_folder_that_would_do(tmp_path, monkeypatch):
    """As Docker's `-v runs:/out` makes one."""

    def replace(*_):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(UsageError, match="is a mount point, which no folder can replace") as caught:
        ptsim.train(settings(), out=tmp_path / "out")
    assert caught.value.hint == f"--out {tmp_path / 'out' / 'run'}"
    assert list(tmp_path.iterdir()) == []


def test_more_epochs_than_anybody_trains_are_refused(tmp_path):
    with pytest.raises(UsageError, match="setting 'epochs' is 2147483648, expected at most 100000"):
        ptsim.train(settings(epochs=2**31), out=tmp_path / "run")


@pytest.mark.parametrize(
    ("said", "where", "hint"),
    [
        (
            "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory",
            "this machine",
            "a smaller batch",
        ),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED", "cpu", "a smaller batch, or with dynamic_batch a max_batch"),
    ],
)
def test_a_device_without_memory_is_one_sentence(tmp_path, monkeypatch, said, where, hint):
    class Full:
        @staticmethod
        def cross_entropy(logits, labels, **_):
            raise RuntimeError(said)

    monkeypatch.setattr(step, "F", Full)
    with pytest.raises(TrainingError, match=f"a mini-batch of 16 needs more memory than {where} has left") as caught:
        ptsim.train(settings(profile=False), out=tmp_path / "run")
    assert caught.value.hint == hint
    end = ptsim.read_trace(tmp_path / "run").end
    assert (end.status, end.reason) == ("failed", caught.value.message)


def test_ctrl_c_on_the_command_line_says_in_one_line_how_to_go_on(tmp_path):
    folder = tmp_path / "run"
    options = [
        f"--set={k}={json.dumps(v) if isinstance(v, bool) else v}"
        for k, v in settings(epochs=400, profile=False).items()
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "ptsim", "train", *options, f"--out={folder}"], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "epoch-0001").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "SIGINT: the run ends after this iteration; once more ends it at once" in said
    assert said.splitlines()[-1] == f"interrupted (SIGINT); go on with: ptsim train --resume {folder}"
    assert "Traceback" not in said
    _, end = list(read_records(folder))[-1]
    assert end.status == "interrupted"
