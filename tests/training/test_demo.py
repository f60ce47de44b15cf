import json

import pytest

import ptsim
from ptsim.cli.main import run as command
from tests.docs.test_pages import promised


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "out"


def test_the_demo_trains_both_projects_onto_two_clusters_and_writes_the_report(folder, capsys):
    assert command(["demo", f"--out={folder}", "--epochs=2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == promised("demo")[0]
    rows = [(row["cluster"], row["gpus"]) for row in document["savings"]]
    assert rows == [(cluster, gpus) for cluster in ("ethernet-10g", "dgx-a100") for gpus in (1, 8)]
    assert document["planned"]["headline"].startswith("Planned, not trained. Training torchvision:resnet50 on")
    assert (folder / "digits" / "index.html").is_file()
    page = (folder / "report" / "index.html").read_text()
    assert page.startswith("<!DOCTYPE html>") or page.startswith("<!doctype html>")
    for name in ("dense", "prunetrain"):
        trace = ptsim.read_trace(folder / name)
        assert trace.complete
        assert trace.run.dataset.name == "digits"
        assert document["runs"][name]["accuracy"] == trace.end.final_accuracy > 0.2  # twice what guessing reaches


def test_the_demo_refuses_a_used_folder(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert command(["demo", f"--out={tmp_path}"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert command(["demo", f"--out={tmp_path / 'new'}", "--epochs=0"]) == 2
    assert command(["demo", f"--out={tmp_path / 'new'}", "--price=-1"]) == 2
    assert command(["demo", f"--out={tmp_path / 'new'}", "--price=1e12"]) == 2  # which the report would refuse
    assert not (tmp_path / "new").exists()
