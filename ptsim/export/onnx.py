"""How a trained network leaves ptsim: as ONNX, checked in onnxruntime before anybody relies on it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptsim.errors import UnsupportedModelError, UsageError

TOLERANCE = 1e-4  # of the largest output: fp32 sums in another order


def export_onnx(model: nn.Module, input_shape: tuple[int, int, int], path: str | Path) -> float:
    """Write the network in evaluation mode, for mini-batches of any size; input "images", output "logits".

    Args:
        model: on the CPU, for instance from `ptsim.load_model`.
        input_shape: (channels, height, width) of one image.
        path: the file.

    Returns:
        The largest difference between onnxruntime's outputs and torch's, relative to the largest output.

    Raises:
        UsageError: the packages for ONNX are missing, or the file cannot be written.
        UnsupportedModelError: torch cannot express the network, or onnxruntime computes something else.
    """
    path = Path(path)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"ONNX export needs the package {package}", hint="pip install 'ptsim[onnx]'")
    model = model.eval()
    images = torch.randn((3, *input_shape), generator=torch.Generator().manual_seed(0))
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write(model, images, unfinished)
            error = _difference(model, images, unfinished)
            if not error <= TOLERANCE:
                raise UnsupportedModelError(f"onnxruntime computes something else for this network: {error:.1e} apart")
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as failure:
        raise UsageError(f"{path} cannot be written: {failure.strerror}") from failure
    return error


def _write(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # torch's exporter warns of its own deprecations
            torch.onnx.export(
                model,
                (images,),
                path,
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedModelError(f"torch cannot express this network in ONNX: {reason}") from error


def _difference(model: nn.Module, images: torch.Tensor, path: Path) -> float:
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in (images, images[:1]):  # another size than it was exported with
        with torch.no_grad():
            expected = model(batch)
        (found,) = session.run(None, {"images": batch.numpy()})
        difference = (torch.from_numpy(found) - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
        worst = max(worst, float(difference))
    return worst
