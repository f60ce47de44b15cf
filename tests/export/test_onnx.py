import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import ptsim
from ptsim import zoo
from ptsim.cli.main import run as command
from ptsim.errors import UnsupportedModelError, UsageError
from ptsim.export.onnx import export_onnx
from ptsim.training.runfolder import load_recipe
from tests.training.runs import settings


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "run"
    return ptsim.train(settings(profile=False), out=folder).folder


@pytest.mark.slow
def test_the_exported_network_gives_the_pruned_networks_outputs_in_onnxruntime(run, tmp_path, capsys):
    assert command(["export", str(run), "--format=onnx", f"--out={tmp_path / 'net.onnx'}", "--epoch=5", "--trust"]) == 0
    model = ptsim.load_model(run, 5, trust=True)
    earlier = ptsim.load_model(run, 2, trust=True)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in earlier.parameters()) + 1
    images = torch.randn(7, 3, 8, 8)
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": images.numpy()})
    np.testing.assert_allclose(found, model(images).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    stored = onnx.load(tmp_path / "net.onnx")
    properties = {entry.key: entry.value for entry in stored.metadata_props}
    recipe = load_recipe(run)
    assert stored.graph.name == properties["model"] == recipe.model
    assert properties["classes"] == str(recipe.num_classes)


def test_without_the_extra_one_sentence_names_it(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else find(name, *rest))
    with pytest.raises(UsageError, match=r"needs onnx: pip install 'ptsim\[onnx\]'"):
        export_onnx(zoo.create("resnet20"), (3, 32, 32), tmp_path / "net.onnx")


@pytest.mark.slow
def test_exporting_does_not_load_onnxruntime(tmp_path):
    code = (
        "import sys, torch\n"
        "from ptsim.export.onnx import export_onnx\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten())\n"
        f"export_onnx(model, (3, 4, 4), {str(tmp_path / 'a')!r})\n"
        "assert 'onnxruntime' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_zoos_networks_export(tmp_path):
    torch.manual_seed(0)
    assert export_onnx(zoo.create("resnet20"), (3, 32, 32), tmp_path / "net.onnx") <= 1e-4


@pytest.mark.slow
def test_a_wrong_export_is_one_sentence(run, tmp_path, capsys):
    assert command(["export", str(run), "--format=onnx", f"--out={tmp_path}"]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert command(["export", str(run), "--format=onnx", "--epoch=99", f"--out={tmp_path / 'a.onnx'}"]) == 2
    assert "no checkpoint of epoch 99" in capsys.readouterr().err
    assert command(["export", str(run), "--format=parquet", "--epoch=1", f"--out={tmp_path / 'a'}"]) == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        export_onnx(zoo.create("resnet20"), (3, 32, 32), tmp_path / "file" / "net.onnx")


class Scaled(nn.Module):
    """The images times a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.factor * images


def hand_over(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    """In torch's place: a file that hands the images on as they are."""
    shape = ["batch", 1, 2, 2]
    node = onnx.helper.make_node("Identity", ["images"], ["logits"])
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("images", "logits")]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", values[:1], values[1:])), path)


class Twice(Scaled):
    """Gives what it is given in another form: as several outputs, or in a dict."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override] # another network
        outputs = {"logits": super().forward(images), "features": images}
        return {name: outputs[name] for name in ("logits", "features")[: int(self.factor)]}


def test_a_network_with_several_outputs_is_named_and_one_in_a_dict_is_the_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptsim.export.onnx._write", hand_over)
    with pytest.raises(UnsupportedModelError, match="Twice gives 2 tensors"):
        export_onnx(Twice(2), (1, 2, 2), tmp_path / "net.onnx")
    model = Twice(1).train()
    assert export_onnx(model, (1, 2, 2), tmp_path / "net.onnx") == 0
    assert model.training


@pytest.mark.parametrize(
    ("factor", "problem"),
    [
        (1.00005, None),
        (1.0002, "computes something else than this network: 2.0e-04 apart"),
        (0.0, "computes something else"),
        (float("nan"), "outputs are no finite numbers"),
    ],
)
def test_a_file_is_compared_with_its_network_relative_to_the_largest_output(
    factor: float, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptsim.export.onnx._write", hand_over)
    path = tmp_path / "net.onnx"
    if problem is None:
        assert export_onnx(Scaled(factor), (1, 2, 2), path) == pytest.approx(1 - 1 / factor, rel=0.01)
    else:
        with pytest.raises(UnsupportedModelError, match=re.escape(problem)):
            export_onnx(Scaled(factor), (1, 2, 2), path)
    assert path.exists() == (problem is None)
