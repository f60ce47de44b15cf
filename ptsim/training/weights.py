"""How do weights that somebody else has trained get into a network? From a state dict or a safetensors file on disk.

Nothing is downloaded, and nothing is unpickled but tensors.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptsim.errors import FileFormatError, UsageError, on_one_line
from ptsim.textfile import read_bytes
from ptsim.training.checkpoint import PICKLE_TOLD_BY, is_pickle, parse_tensors
from ptsim.units import format_shape

_MOST_BYTES = 2**40
_INNER = ("state_dict_ema", "state_dict", "model_state_dict", "model")  # where training scripts keep the weights
_WRAPPERS = ("module.", "_orig_mod.")  # names inside DistributedDataParallel and torch.compile
_SHOWN = 3  # names in a sentence


def load_weights(model: nn.Module, weights: str | Path, *, skip: Sequence[str] = ()) -> None:
    """Put stored weights into a network.

    A state dict may lie in a training script's checkpoint under "state_dict" or "model"; names may begin with "module."
    or "_orig_mod.". Statistics that old files do not count (`num_batches_tracked`) stay as they are.

    Args:
        model: as it is built, not pruned; its parameters and buffers are overwritten.
        weights: a file, or a name that `weights_file` knows.
        skip: beginnings of names that keep what they have, such as "fc." for a classifier of other classes.

    Raises:
        UsageError: no such file, names or shapes that differ from the network's, or a `skip` that skips nothing.
        FileFormatError: the file holds something else than tensors.
    """
    path = weights_file(str(weights))
    given = read_state_dict(path)
    own = model.state_dict()
    skipped, network = tuple(skip), type(model).__name__
    for start in skipped:
        if not any(name.startswith(start) for name in (*own, *given)):
            raise UsageError(f"weights_skip names {start!r}, but no weight of {path} or of this {network} begins so")
    wanted = {name: tensor for name, tensor in own.items() if not (skipped and name.startswith(skipped))}
    found = {name: tensor for name, tensor in given.items() if not (skipped and name.startswith(skipped))}
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in wanted]
    other = [name for name in wanted if name in found and found[name].shape != wanted[name].shape]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})"
        for names, what in (
            (missing, "missing"),
            (unexpected, "that the network does not have"),
            ([f"{n} {_shape(found[n])} for {_shape(wanted[n])}" for n in other], "of another shape"),
        )
        if names
    ]
    if problems:
        layer, dot, name = other[0].rpartition(".") if other else ("", "", "")
        raise UsageError(
            f"the weights in {path} are not those of this {network}: {'; '.join(problems)}",
            hint=f"weights_skip = [{layer + dot or name!r}] leaves that layer as it is initialised" if other else None,
        )
    model.load_state_dict({name: found.get(name, tensor) for name, tensor in own.items()})


def weights_file(weights: str) -> Path:
    """The file of `weights`: a path; `torchvision:ResNet50_Weights.IMAGENET1K_V2`; `timm:resnet50.a1_in1k`.

    Names are looked up where torch and Hugging Face keep what they have downloaded.

    Raises:
        UsageError: no such file or name; says where it is expected.
    """
    library, colon, name = weights.partition(":")
    finder = {"torchvision": _torchvision_file, "timm": _timm_file}.get(library) if colon else None
    path = finder(name) if finder is not None else Path(weights)
    if not path.is_file():
        hint = "ptsim downloads nothing: put the file there, or name another" if finder is not None else None
        raise UsageError(f"there is no file of weights {path}", hint=hint)
    return path


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; half-precision and double weights as they are.

    Raises:
        FileFormatError: it holds something else than tensors.
    """
    with open(path, "rb") as file:
        start = file.read(PICKLE_TOLD_BY)
    if not is_pickle(start):
        return parse_tensors(path, read_bytes(path, most=_MOST_BYTES))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FileFormatError(
            path, "found a pickle that is no plain state dict; loading it could run any code, so it is not opened"
        ) from error
    except Exception as error:  # torch's readers raise anything at a damaged file
        reason = on_one_line(error, 200) or type(error).__name__
        raise FileFormatError(path, f"is damaged, or nothing that torch.load reads: {reason}") from error
    inner: Any = content
    for name in _INNER:
        if isinstance(inner, Mapping) and isinstance(inner.get(name), Mapping):
            inner = inner[name]
    if not isinstance(inner, Mapping) or not inner or not all(isinstance(t, Tensor) for t in inner.values()):
        raise FileFormatError(path, f"found a {type(inner).__name__}, expected a state dict: tensors by name")
    tensors = {str(name): tensor for name, tensor in inner.items()}
    for wrapper in _WRAPPERS * 2:
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors


def _torchvision_file(name: str) -> Path:
    import torchvision

    try:
        weights = torchvision.models.get_weight(name)
    except (ValueError, KeyError, AttributeError) as error:
        raise UsageError(
            f"torchvision has no weights {name!r}", hint="for instance torchvision:ResNet50_Weights.IMAGENET1K_V2"
        ) from error
    return Path(torch.hub.get_dir()) / "checkpoints" / str(weights.url).rpartition("/")[2]


def _timm_file(name: str) -> Path:
    """In Hugging Face's cache, whose layout is public: models--timm--NAME/snapshots/REVISION/model.safetensors."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--timm--{name}" / "snapshots"
    found = sorted(cache.glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else cache / "REVISION" / "model.safetensors"


def _shape(tensor: Tensor) -> str:
    return format_shape(tensor.shape) or "a number"
