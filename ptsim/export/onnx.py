"""How a trained network leaves ptsim: as ONNX, checked by another implementation before anybody relies on it.

The check runs in ONNX's own reference evaluator: NumPy, without telemetry (onnxruntime looks up a foreign host and
writes into the user's cache).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptsim.capture.graph import evaluation_mode, naming_the_image, output_tensors
from ptsim.errors import UnsupportedModelError, UsageError, on_one_line
from ptsim.textfile import write_whole

TOLERANCE = 1e-4  # of the largest output: fp32 sums in another order


def export_onnx(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
) -> float:
    """Write the network in evaluation mode, for mini-batches of any size; input "images", output "logits".

    The model is left in the mode that it is in.

    Args:
        model: on the CPU, for instance from `ptsim.load_model`.
        input_shape: (channels, height, width) of one image.
        path: the file.
        metadata: name → value, stored among the model's metadata; "model" also becomes the graph's name.

    Returns:
        The largest difference between the reference evaluator's outputs and torch's, relative to the largest output.

    Raises:
        UsageError: the packages for ONNX are missing, or the file cannot be written.
        UnsupportedModelError: the network gives more than its logits, torch cannot express it, or the file computes
            something else, or nothing finite.
    """
    path = Path(path)
    missing = [package for package in ("onnx", "onnxscript") if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(f"ONNX export needs {' and '.join(missing)}: pip install 'ptsim[onnx]'")
    import onnx

    images = torch.randn((3, *input_shape), generator=torch.Generator().manual_seed(0))
    with evaluation_mode(model), tempfile.TemporaryDirectory() as folder:
        with naming_the_image(model, input_shape):
            found = len(_outputs(model, images))
        if found != 1:
            raise UnsupportedModelError(
                f"{type(model).__name__} gives {found} tensors; a file holds a network with one output, its logits"
            )
        unchecked = Path(folder) / "network.onnx"
        _write(model, images, unchecked)
        content = onnx.load(unchecked)
        onnx.helper.set_model_props(content, dict(metadata or {}))
        if metadata and "model" in metadata:
            content.graph.name = metadata["model"]
        error = _difference(model, images, content)
    if math.isnan(error):
        raise UnsupportedModelError("the network's outputs are no finite numbers: an exported file cannot be checked")
    if not error <= TOLERANCE:
        raise UnsupportedModelError(f"the exported file computes something else than this network: {error:.1e} apart")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.SerializeToString())
    except OSError as failure:
        raise UsageError(f"{path} cannot be written: {failure.strerror}") from failure
    return error


def _outputs(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(output_tensors(model(images)))


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
        reason = on_one_line(error)
        raise UnsupportedModelError(f"torch cannot express this network in ONNX: {reason}") from error


def _difference(model: nn.Module, images: torch.Tensor, content: Any) -> float:
    from onnx.reference import ReferenceEvaluator

    evaluator: Any = ReferenceEvaluator(content)
    apart = []
    for batch in (images, images[:1]):  # another size than it was exported with
        (expected,) = _outputs(model, batch)
        (found,) = evaluator.run(None, {"images": batch.numpy()})
        apart.append((torch.from_numpy(found) - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    return float(torch.stack(apart).max())  # NaN if one is: Python's max would lose it
