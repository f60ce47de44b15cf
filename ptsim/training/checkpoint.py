"""How the state of a run is stored and found again, so that a kill at any moment loses at most one epoch.

    checkpoints/epoch-0009/checkpoint.json        what the network is and where the run stood
                           weights.safetensors    parameters and buffers of the network, averaged if the run averages
                           state.safetensors      optimizer state, weights not averaged; only in the newest two

A checkpoint is written into a folder of another name, synchronised to disk and renamed, so it is there whole or not at
all. Nothing is pickled. `epoch-0009` holds the state after epoch 9 (counting from 0), reconfiguration included;
`start` the state before the first epoch.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
import safetensors
import safetensors.torch
from torch import Tensor

from ptsim.errors import FileFormatError, TrainingError, UsageError
from ptsim.textfile import decode_json, read_bytes, sync_folder, write_whole
from ptsim.trace.schema import Epoch
from ptsim.training.data import Normalization
from ptsim.training.recipe import Count, Recipe

FORMAT_VERSION = 1
_WEIGHTS, _STATE, _META = "weights.safetensors", "state.safetensors", "checkpoint.json"
_MOST_BYTES = 2**40  # of weights or state
PICKLE_TOLD_BY = 9  # first bytes of a file
_RESUMABLE = 2  # how many of the newest checkpoints keep what only resuming needs


# Bounds that nothing real exceeds, so that what is read can be counted on with.
Whole: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
NotNegative: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1e30)]
Number: TypeAlias = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]
Scalar: TypeAlias = bool | int | Number | str | None  # what an optimizer keeps of a parameter besides tensors,
Entry: TypeAlias = Scalar | list[Scalar | list[Scalar]]  # one or several under a name


class Totals(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the run has spent so far."""

    wall_s: NotNegative = 0.0
    num_iterations: Whole = 0
    energy_j: NotNegative | None = None

    def after(self, epoch: Epoch) -> Totals:
        """With the iterations and the energy of one more epoch; the energy stays None until one was measured."""
        energy_j = self.energy_j
        if epoch.device is not None and epoch.device.energy_j is not None:
            energy_j = (energy_j or 0.0) + epoch.device.energy_j
        return msgspec.structs.replace(
            self, num_iterations=self.num_iterations + epoch.num_iterations, energy_j=energy_j
        )


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about the state of a run but its tensors.

    Attributes:
        class_names: in the order of the classes; empty where the data set has none, and in older runs.
        next_epoch: the epoch to train next.
        structure: what pruning made of the recipe's network, as `ptsim.prune.structure` describes it.
        architecture: id of that network in the trace.
        penalty_coefficient: λ; None before the first mini-batch has decided it.
        batch: images per iteration over all ranks.
        learning_rate_scale: by which the mini-batch's growth has changed the plan's rate.
        validation_accuracy: after the last epoch.
        initial_channels, initial_weights: what the first network had, for the sparsity.
        optimizer: entries of the optimizer's state that are no tensors, by parameter and key; in a list None stands
            for a tensor.
        groups: what its parameter groups hold beside the run's settings, such as a count of updates; older checkpoints
            have none.
        weights_sha256, state_sha256: digests of the other two files; older checkpoints have none.
        sha256: digest of the fields that are written, itself left out; older checkpoints have none.
        trace_bytes, trace_sha256: length and digest of the trace when this was written; older runs have no digest.
    """

    format_version: int = FORMAT_VERSION
    recipe: Recipe
    normalization: Normalization
    class_names: tuple[str, ...] = ()
    next_epoch: Whole
    structure: dict[str, Any]
    architecture: str
    penalty_coefficient: NotNegative | None
    batch: Count
    learning_rate_scale: NotNegative
    validation_accuracy: NotNegative | None
    initial_channels: Count
    initial_weights: Count
    optimizer: dict[str, dict[str, Entry]]
    groups: list[dict[str, Any]] = []
    scaler: dict[str, Any]
    trace_bytes: Whole
    trace_sha256: str | None = None
    totals: Totals
    weights_sha256: str | None = None
    state_sha256: str | None = None
    sha256: str | None = None

    def signed(self) -> Checkpoint:
        """The same with its digest."""
        return msgspec.structs.replace(self, sha256=_digest(msgspec.json.encode(self)))


def _digest(description: bytes) -> str:
    """Of the fields that a description has, its own digest left out.

    Of the document and not of the record, so that a field that a newer ptsim knows does not change an older digest.
    """
    fields = msgspec.json.decode(description) | {"sha256": None}
    return hashlib.sha256(msgspec.json.encode(fields)).hexdigest()


_DECODER = msgspec.json.Decoder(Checkpoint)


class Folder:
    """The `checkpoints` folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(
        self, checkpoint: Checkpoint, weights: Mapping[str, Tensor], state: Mapping[str, Tensor], *, keep: bool
    ) -> None:
        """Write a checkpoint, then let older ones go: their state, and unless `keep` was said of them, their weights.

        Raises:
            TrainingError: the disk is full or not writable; older checkpoints are untouched.
        """
        target = self.path / _folder_name(checkpoint.next_epoch)
        unfinished = self.path / f".{target.name}.unfinished"
        files = {_WEIGHTS: safetensors.torch.save(_storable(weights)), _STATE: safetensors.torch.save(_storable(state))}
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        checkpoint = msgspec.structs.replace(checkpoint, weights_sha256=digests[_WEIGHTS], state_sha256=digests[_STATE])
        with writing(target):
            self.path.mkdir(exist_ok=True)
            self._sweep()
            unfinished.mkdir()
            try:
                for name, content in files.items():
                    write_whole(unfinished / name, content)
                if keep:
                    write_whole(unfinished / "keep", b"")
                write_whole(unfinished / _META, msgspec.json.format(msgspec.json.encode(checkpoint.signed())))
                sync_folder(unfinished)
                if target.exists():
                    _remove(target)
                unfinished.rename(target)
            except OSError:
                shutil.rmtree(unfinished, ignore_errors=True)  # gives the space back; the error goes on
                raise
            sync_folder(self.path)
            self._forget_old(checkpoint.next_epoch)

    def newest(self) -> Path | None:
        """The folder of the newest checkpoint that training can go on from."""
        resumable = [path for _, path in self._stored() if (path / _STATE).exists()]
        return resumable[-1] if resumable else None

    def of_epoch(self, epoch: int | None) -> Path:
        """The checkpoint after `epoch`, -1 being the start; the newest for None.

        Raises:
            UsageError: it is not stored; says which are.
        """
        stored = {next_epoch - 1: path for next_epoch, path in self._stored()}
        if not stored:
            raise UsageError(f"{self.path} holds no checkpoints")
        if epoch is None:
            epoch = max(stored)
        if epoch not in stored:
            raise UsageError(
                f"{self.path} holds no checkpoint of epoch {epoch}; stored: {', '.join(map(str, sorted(stored)))}"
            )
        return stored[epoch]

    def _stored(self) -> list[tuple[int, Path]]:
        """(next epoch, folder) of the whole checkpoints, oldest first."""
        found = []
        for path in self.path.iterdir() if self.path.is_dir() else ():
            if path.name == "start":
                found.append((0, path))
            elif path.name.startswith("epoch-") and path.name[6:].isdecimal():
                found.append((int(path.name[6:]) + 1, path))
        return sorted(found)

    def _sweep(self) -> None:
        """Remove what a killed process has left half written or half removed, and leave alone what is no folder."""
        for path in self.path.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)

    def _forget_old(self, newest: int) -> None:
        older = [path for next_epoch, path in self._stored() if next_epoch <= newest][: -_RESUMABLE or None]
        for path in older:
            if (path / "keep").exists():
                (path / _STATE).unlink(missing_ok=True)
            else:
                _remove(path)


def read_checkpoint(folder: Path) -> Checkpoint:
    """The description in a checkpoint folder.

    Raises:
        FileFormatError: missing, broken, or of a newer format.
    """
    return parse_checkpoint(folder / _META, _read(folder / _META))


def parse_checkpoint(file: Path, content: bytes) -> Checkpoint:
    """The same from the file's content."""
    checkpoint = decode_json(file, content, _DECODER, what="a checkpoint description")
    if checkpoint.format_version != FORMAT_VERSION:
        raise FileFormatError(
            file, f"field 'format_version' is {checkpoint.format_version}, this ptsim reads {FORMAT_VERSION}"
        )
    if checkpoint.sha256 is not None and checkpoint.sha256 != _digest(content):
        raise FileFormatError(file, "not the description that this run wrote: it was changed since")
    return checkpoint


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Parameters and buffers of the stored network, by name.

    Raises:
        FileFormatError: the file was changed since it was written, or holds a number that is not finite.
    """
    tensors = parse_tensors(folder / _WEIGHTS, _read(folder / _WEIGHTS), read_checkpoint(folder).weights_sha256)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise FileFormatError(folder / _WEIGHTS, f"{name} holds numbers that are not finite")
    return tensors


def read_state_bytes(folder: Path) -> tuple[bytes, bytes, bytes]:
    """The three files of a checkpoint that can be resumed, as they are: description, weights, state."""
    return _read(folder / _META), _read(folder / _WEIGHTS), _read(folder / _STATE)


def is_pickle(start: bytes) -> bool:
    """Whether a file that begins so is a pickle or one of torch's archives of pickles.

    A safetensors file begins with the length of its header: a header of 640 bytes gives the first two bytes of a
    pickle. The header follows, an object of JSON, where neither kind of pickle has a brace.
    """
    return start[:2] in (b"PK", *(bytes((0x80, protocol)) for protocol in range(2, 6))) and start[8:9] != b"{"


def parse_tensors(file: Path, content: bytes, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, whose digest has to be the given one.

    Raises:
        FileFormatError: it is something else; a pickle is named as such, and not opened.
    """
    if is_pickle(content[:PICKLE_TOLD_BY]):
        raise FileFormatError(file, "found a pickle, expected safetensors; a pickle can run any code and is not opened")
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise FileFormatError(file, "not a safetensors file that this run wrote: its content was changed since")
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise FileFormatError(file, f"not a safetensors file: {error}") from error


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(path: Path, *, begun: bool = True) -> Iterator[None]:
    """Turns the operating system's refusal to write into a `TrainingError` that names the file.

    Only a full disk is called one. `begun`: there may be a checkpoint to go on from.
    """
    try:
        yield
    except OSError as error:
        remedy = "make room" if error.errno in _FULL else "let it be written"
        raise TrainingError(
            f"{path} cannot be written: {error.strerror}",
            hint=f"{remedy}, then go on with --resume; the last checkpoint is whole" if begun else remedy,
        ) from error


@contextlib.contextmanager
def belonging_to(path: Path) -> Iterator[None]:
    """Turns what does not fit a network into a `FileFormatError` that names the checkpoint."""
    try:
        yield
    except UsageError as error:
        raise FileFormatError(path, error.message) from error


def _folder_name(next_epoch: int) -> str:
    return "start" if next_epoch == 0 else f"epoch-{next_epoch - 1:04d}"


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU that share no memory, which safetensors asks for."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _remove(path: Path) -> None:
    """Remove a folder; renamed first, so that a kill in between leaves no half checkpoint under a valid name.

    What the system does not let go, such as a file that another process reads over NFS, goes with a later checkpoint.
    """
    if path.exists():
        doomed = path.with_name(f".{path.name}.doomed")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _read(file: Path) -> bytes:
    return read_bytes(file, most=_MOST_BYTES)
