import os
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import ptsim

FOLDER = Path(__file__).parents[2] / "analysis"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def images(folder: Path) -> Path:
    for part in ("train", "test"):
        for label in ("a", "b"):
            (folder / part / label).mkdir(parents=True)
            for index in range(40):
                Image.new("RGB", (32, 32), (index, 200 if label == "a" else 20, 7)).save(
                    folder / part / label / f"{index}.png"
                )
    return folder


@pytest.mark.slow
def test_a_pair_is_recorded_at_the_same_time_and_not_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import cpu_evidence

    pair = cpu_evidence.PAIRS["resnet32"]._replace(model="resnet20")
    monkeypatch.setitem(cpu_evidence.PAIRS, "resnet32", pair)
    common = ["--data", str(images(tmp_path / "data")), "--out", str(tmp_path / "runs"), "--only", "resnet32"]
    for _ in range(2):  # the second call finds nothing to do
        assert cpu_evidence.main([*common, "--epochs", "2", "--images", "64"]) == 0
    dense, pruned = (ptsim.read_trace(tmp_path / "runs" / f"resnet32-{run}") for run in pair.runs)
    assert dense.complete
    assert pruned.complete
    assert (dense.penalty_ratio, pruned.penalty_ratio) == (0.0, 0.25)
    assert (tmp_path / "runs" / "pieces.jsonl").read_text().count("load_before") == 1
    assert cpu_evidence.main([*common[2:], "--plan"]) == 0
    assert "2 of 2 runs complete" in capsys.readouterr().out


def test_wrong_input_is_one_sentence_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import cpu_evidence

    for arguments in (["--only", "vgg12"], ["--data", str(tmp_path / "none")]):
        with pytest.raises(SystemExit) as status:
            cpu_evidence.main(arguments)
        assert status.value.code == 2
    assert "vgg11" in capsys.readouterr().err


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two runs need a core each")
def test_the_core_of_a_run_that_has_ended_is_kept_busy_until_the_other_ends(tmp_path: Path) -> None:
    import processes

    cores = sorted(os.sched_getaffinity(0))[:2]
    beside = {
        core: [f"import time; open({str(tmp_path / str(core))!r}, 'x').close(); time.sleep(600)"] for core in cores
    }
    begun = time.monotonic()
    processes.run_together(
        {"short": ["pass"], "long": ["import time; time.sleep(7)"]},
        lambda: 60.0,
        lambda: None,
        cores=cores,
        program=(sys.executable, "-c"),
        neighbours=beside,
    )
    assert time.monotonic() - begun < 60
    assert [path.name for path in tmp_path.iterdir()] == [str(cores[0])]


def test_a_neighbour_trains_the_last_network_of_the_run_that_has_ended(tmp_path: Path) -> None:
    import cpu_evidence

    pair = cpu_evidence.PAIRS["vgg11-128"]
    told = cpu_evidence.neighbour_of(pair, "r0.25", tmp_path / "run", tmp_path / "data")
    settings = dict(part.split("=", 1) for part in told[told.index("--seed") + 2 :] if part != "--set")
    assert told[told.index("--out") + 1] == str(tmp_path / "run-neighbour")
    assert settings["start_from"] == str(tmp_path / "run")
    assert (settings["batch"], settings["penalty_ratio"], settings["lr"]) == ("128", "0.25", "0.001")
