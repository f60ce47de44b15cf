"""What is optional is imported by those who use it, and its absence is one sentence that names the extra."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from ptsim.errors import UsageError
from ptsim.training.huggingface_data import on_disk
from ptsim.training.registries import LOGGERS


@pytest.mark.parametrize(
    ("module", "hidden", "extra"),
    [
        ("ptsim.integrations.lightning", ("lightning", "lightning.pytorch"), "lightning"),
        ("ptsim.integrations.huggingface", ("transformers",), "huggingface"),
    ],
)
def test_a_trainer_that_is_not_installed_is_named_with_its_extra(module, hidden, extra, monkeypatch):
    for name in hidden:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(UsageError, match=f"needs the package {hidden[0]}") as caught:
        importlib.import_module(module)
    assert caught.value.hint == f"pip install 'ptsim[{extra}]'"


@pytest.mark.parametrize(
    ("logger", "hidden"),
    [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")],
)
def test_a_logger_whose_package_is_not_installed_is_named_with_its_extra(logger, hidden, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, hidden, None)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    with pytest.raises(UsageError, match=f"the logger {logger} needs the package {logger}") as caught:
        LOGGERS.find(logger)(Path(tmp_path))
    assert caught.value.hint == f"pip install 'ptsim[{logger}]'"


def test_hugging_faces_data_sets_need_their_package(monkeypatch, tmp_path):
    from ptsim.training.config import make_config
    from ptsim.training.datasets import DataRequest

    monkeypatch.setitem(sys.modules, "datasets", None)
    config = make_config({"dataset": "huggingface", "data_dir": str(tmp_path)})
    with pytest.raises(UsageError, match="needs the package datasets"):
        on_disk(DataRequest(config=config, input_shape=(3, 32, 32), device="cpu"))


@pytest.mark.slow
def test_ptsims_own_training_imports_none_of_them():
    optional = ("lightning", "transformers", "accelerate", "timm", "wandb", "mlflow", "tensorboard", "datasets")
    program = f"import ptsim, sys; ptsim.PruneTrain; ptsim.train; print([m for m in {optional} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
