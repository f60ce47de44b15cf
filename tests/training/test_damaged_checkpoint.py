"""A checkpoint that somebody has edited is named in one sentence, whatever is wrong with it; nothing is a traceback."""

import copy
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import ptsim
from ptsim.cli.main import run as command
from ptsim.errors import PtsimError, UsageError
from ptsim.prune.structure import apply_structure, structure_of
from ptsim.training.stored import load_optimizer, optimizer_tensors
from tests.training.runs import settings

WRONG: tuple[Any, ...] = ("wrong", -1, None, [], {"wrong": 1})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gated run with all sorts of entries in its last checkpoint, to which a further epoch is then added."""
    folder = tmp_path_factory.mktemp("damaged") / "run"
    ptsim.train(settings(epochs=4, optimizer="adam", momentum=None, profile=False, mode="gating"), out=folder)
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace("epochs = 4", "epochs = 5"))
    return folder


def places(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths to what can be damaged: every field, and the first entry of every table of names."""
    found = []
    for index, (key, inner) in enumerate(value.items()):
        if path and path[0] in ("structure", "optimizer") and len(path) > 1 and index > 0:
            break
        found.append((*path, key))
        if isinstance(inner, dict):
            found += places(inner, (*path, key))
    return found


def test_every_field_that_is_missing_or_of_another_type_is_one_sentence(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    file = folder / "checkpoints" / "epoch-0003" / "checkpoint.json"
    whole = json.loads(file.read_text()) | {"sha256": None}  # as of an older ptsim, whose description has no digest
    trace = (folder / "trace.jsonl").read_bytes()
    refused = 0
    for place in places(whole):
        for wrong in (..., *WRONG):
            damaged = copy.deepcopy(whole)
            table = damaged
            for key in place[:-1]:
                table = table[key]
            if wrong is ...:
                del table[place[-1]]
            else:
                table[place[-1]] = wrong
            file.write_text(json.dumps(damaged))
            for act in (lambda: ptsim.load_model(folder, trust=True), lambda: ptsim.train(resume=folder)):
                message = None
                try:
                    act()
                except PtsimError as error:
                    message = error.message
                if message is None:  # the field may be left out, or what was put there is as good
                    shutil.rmtree(folder)
                    shutil.copytree(finished, folder)
                    continue
                refused += 1
                assert "\n" not in message, place
                assert (folder / "trace.jsonl").read_bytes() == trace, place
    assert refused > 150


def test_on_the_command_line_it_is_exit_2(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    file = folder / "checkpoints" / "epoch-0003" / "checkpoint.json"
    description = json.loads(file.read_text()) | {"sha256": None}
    del description["structure"]["tensors"]
    file.write_text(json.dumps(description))
    assert command(["train", f"--resume={folder}"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "tensors" in captured.err
    assert "Traceback" not in captured.err


def test_a_description_that_was_changed_since_it_was_written_is_refused(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    file = folder / "checkpoints" / "epoch-0003" / "checkpoint.json"
    description = json.loads(file.read_text())
    file.write_text(json.dumps(description))  # the same in another layout
    ptsim.load_model(folder, trust=True)
    file.write_text(json.dumps(description | {"penalty_coefficient": 2 * description["penalty_coefficient"]}))
    for act in (lambda: ptsim.load_model(folder, trust=True), lambda: ptsim.train(resume=folder)):
        with pytest.raises(PtsimError, match="not the description that this run wrote: it was changed since"):
            act()


def test_a_description_without_a_field_that_came_later_keeps_its_digest(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    file = folder / "checkpoints" / "epoch-0003" / "checkpoint.json"
    older = json.loads(file.read_text()) | {"sha256": None}
    del older["class_names"]  # which runs did not have at first
    digest = hashlib.sha256(msgspec.json.encode(older)).hexdigest()
    file.write_text(json.dumps(older | {"sha256": digest}))
    ptsim.load_model(folder, trust=True)


def test_a_network_that_its_images_do_not_go_through_is_refused_also_without_a_digest(tmp_path: Path) -> None:
    folder = ptsim.train(settings(epochs=1, profile=False, threshold=1e-9), out=tmp_path / "run").folder
    file = folder / "checkpoints" / "epoch-0000" / "checkpoint.json"
    description = json.loads(file.read_text()) | {"sha256": None}
    file.write_text(json.dumps(description))
    ptsim.load_model(folder, trust=True)
    other = copy.deepcopy(description)
    other["recipe"]["input_shape"] = [5, 8, 8]
    file.write_text(json.dumps(other))
    with pytest.raises(PtsimError, match="does not take images of 5×8×8"):
        ptsim.load_model(folder, trust=True)
    description["structure"]["groups"]["stem.0"] = 2**53
    file.write_text(json.dumps(description))
    with pytest.raises(PtsimError, match="8 channels in 9007199254740992 groups at stem"):
        ptsim.load_model(folder, trust=True)


def test_a_structure_with_another_kernel_is_refused() -> None:
    """Pruning removes channels, never a part of a kernel: one of 3 × 0 ends in torch's own words much later."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    structure = structure_of(network)
    structure["tensors"]["0.weight"] = [8, 3, 0, 3]
    with pytest.raises(UsageError, match=r"a kernel of \(0, 3\) at 0, the model \(3, 3\)"):
        apply_structure(network, structure)


@pytest.mark.parametrize(("shape", "says"), [((), "another form"), ((0,), "another form"), ((1, 1), "does not fit")])
def test_a_moment_of_another_form_than_its_parameter_is_refused(shape: tuple[int, ...], says: str) -> None:
    """A vector of one element is no scalar: Adam would end with torch's words in the next step."""
    network = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Linear(1, 2))
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    tensors = optimizer_tensors(network, optimizer)
    load_optimizer(network, optimizer, tensors, {})  # as it was
    tensors["optimizer/0.bias/exp_avg"] = torch.zeros(shape)
    with pytest.raises(UsageError, match=says):
        load_optimizer(network, optimizer, tensors, {})
