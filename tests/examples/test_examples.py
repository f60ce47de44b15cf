"""Every example runs as its docstring shows it, and prints what it promises."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
PRINTS = {
    "own_model": r"pruning is exact: True",
    "project_trace": r"prunetrain-r0.2 +64 GPUs: +[\d.]+ s \([\d.]+ to [\d.]+ s\)",
    "train_and_record": r"epoch 1: .*\nλ = ",
    "own_cluster": r"the recorded run on 16 GPUs: [\d.]+ s, [\d.]+ USD",
    "own_loop": r"4 epochs, \d architectures",
    "timm_loop": r"3 epochs, 1 architectures",
}
TRAINING = ("timm_loop", "train_and_record")  # they take seconds


def test_every_example_is_tested_and_listed() -> None:
    scripts = {path.stem for path in FOLDER.glob("*.py")}
    assert scripts == set(PRINTS)
    listed = re.findall(r"\]\((\w+)\.py\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert set(listed) == scripts


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in TRAINING else []) for name in PRINTS]
)
def test_an_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "timm_loop":
        pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert re.search(PRINTS[name], capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the network has collapsed:UserWarning")
def test_the_loop_of_timm_prunes_network_and_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timm = pytest.importorskip("timm")
    main = runpy.run_path(str(FOLDER / "timm_loop.py"))["main"]
    average = main(tmp_path, threshold=0.075)  # so high that twelve steps show what ninety epochs do
    left = int(re.findall(r": ([\d,]+) parameters are left", capsys.readouterr().out)[-1].replace(",", ""))
    assert left == sum(p.numel() for p in average.module.parameters())
    assert left < sum(p.numel() for p in timm.create_model("resnet10t", num_classes=10).parameters())


@pytest.mark.slow
def test_projecting_needs_no_torch() -> None:
    script = str(FOLDER / "project_trace.py")
    program = f"import runpy, sys; sys.modules['torch'] = None; runpy.run_path({script!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
