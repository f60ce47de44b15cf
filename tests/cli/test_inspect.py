"""`ptsim inspect` on the command line."""

import json
from pathlib import Path

import pytest

from ptsim.cli.main import run

MODEL = """
from torch import nn

def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2),
    )
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "user.py").write_text(MODEL)
    return f"{tmp_path / 'user.py'}:small"


def test_json_has_the_keys_that_scripts_rely_on(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", model, "--input", "3,8,8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exact"] is True
    assert found["prunable_channels"] == 12
    assert found["max_rel_error_eval"] <= 1e-9
    assert found["max_rel_error_train"] <= 1e-9
    assert [group["width"] for group in found["groups"] if group["prunable"]] == [8, 4]


def test_people_get_a_table(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", model, "--input", "3,8,8"]) == 0
    assert "12 channels can be pruned" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet19"], "unknown model 'resnet19'"),
        (["resnet20", "--input", "3,32"], "is not CHANNELS,HEIGHT,WIDTH"),
        (["resnet20", "--input", "1,32,32"], "fails on an image of 1×32×32"),
        (["resnet20", "--classes", "0"], "at least 1"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


def test_channels_that_go_together_or_evenly_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four outputs of a convolution in two groups become one channel of a larger image."""
    (tmp_path / "user.py").write_text(
        "from torch import nn\n\ndef shuffled():\n    return nn.Sequential(\n"
        "        nn.Conv2d(3, 6, 1), nn.Conv2d(6, 16, 1, groups=2), nn.PixelShuffle(2), nn.Conv2d(4, 5, 1),\n"
        "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2),\n    )\n"
    )
    arguments = ["inspect", f"{tmp_path / 'user.py'}:shuffled", "--input", "3,8,8"]
    assert run([*arguments, "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    found = {group["name"]: (group["width"], group["sets"], group["evenly"]) for group in groups}
    assert (found["0"], found["1"], found["3"]) == ((6, 6, ["1"]), (16, 4, ["1"]), (5, 5, []))
    monkeypatch.setenv("COLUMNS", "200")
    assert run(arguments) == 0
    printed = capsys.readouterr().out
    assert "yes, as many from every group of 1" in printed
    assert "yes, in 4 sets, as many from every group of 1" in printed


@pytest.mark.parametrize(
    "command", ["inspect", "cost", "predict --gpu a100 --batch 8", "plan --images 9 --epochs 1 --batch 1 -o x"]
)
def test_classes_of_which_a_users_function_knows_nothing_are_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, 2))\n"
    )
    name, *options = command.split()
    assert run([name, "m.py:net", *options, "--input", "3,2,2", "--classes", "5"]) == 2
    said = "m.py:net has no argument num_classes, and its network no layer of 5 outputs"
    assert said in capsys.readouterr().err
    if name != "inspect":  # which finds nothing to prune
        assert run([name, "m.py:net", *options, "--input", "3,2,2", "--classes", "2"]) == 0


@pytest.mark.parametrize(
    "command", ["cost", "predict --gpu a100 --batch 8", "plan --images 9 --epochs 1 --batch 1 -o x"]
)
def test_the_image_that_was_taken_is_said(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    net = "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(40, 2))\n"
    Path("m.py").write_text(f"{net}net.input_shape = 5, 4, 2\n")
    name, *options = command.split()
    assert run([name, "m.py:net", *options]) == 0
    assert " at 5×4×2" in capsys.readouterr().out
    assert run([name, "m.py:net", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["input_shape"] == [5, 4, 2]
