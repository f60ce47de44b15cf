"""How a training step is run, whatever the network and the device: mini-batch, precision, layout, optimizer, GPUs."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import msgspec

from ptsim.errors import UnknownNameError, UsageError
from ptsim.network import MemoryFormat, Precision

Options = TypeVar("Options", bound=msgspec.Struct)
_Name = TypeVar("_Name", bound=str)
PrecisionName = Literal["fp32", "tf32", "fp16", "bf16", "amp"]
Sharding = Literal["none", "zero1", "zero2"]  # what every GPU keeps only its share of: nothing, state, gradients too
MEMORY_FORMATS: tuple[MemoryFormat, ...] = get_args(MemoryFormat)
SHARDINGS: tuple[Sharding, ...] = get_args(Sharding)
PRECISION_NAMES: tuple[PrecisionName, ...] = get_args(PrecisionName)


class TorchVersion(NamedTuple):
    """A version of PyTorch."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


GROUPED = TorchVersion(2, 0)  # since when gradients are let go after an update, which takes tensors together
OF_RUNS = TorchVersion(2, 8)  # the oldest that ptsim trains with, and so the oldest of any recorded or planned run


class ToldUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """What a recorded run says of an optimizer that no row of ptsim's own describes, the run's momentum included.

    Attributes:
        optimizer: its name.
        num_states, accesses, fused_accesses: as of `ptsim.optimizers.OptimizerKind`.
    """

    optimizer: str
    num_states: int
    accesses: int
    fused_accesses: int


class ToldPenalty(msgspec.Struct, frozen=True, kw_only=True):
    """What a recorded run says of the penalty of a criterion that is not ptsim's own, for one of its networks.

    Attributes:
        criterion: its name.
        architecture, num_parameters: of the network.
        num_bytes, num_launches: as of `ptsim.criteria.PenaltyWork`.
    """

    criterion: str
    architecture: str
    num_parameters: int
    num_bytes: int
    num_launches: int


class StepSetting(msgspec.Struct, frozen=True, kw_only=True):
    """How a training step is run.

    Attributes:
        batch: images per device and step.
        precision: of the matrix products; half precision means autocast with fp32 weights.
        memory_format: layout of the activations.
        optimizer: a name of `ptsim.optimizers.OPTIMIZERS`; decides the update's traffic and state.
        momentum: of the optimizer; None for its own ("sgd": 0.9).
        regularizer: the criterion (`ptsim.criteria.CRITERIA`) whose penalty acts; None for none.
        proximal: the penalty acts as a proximal step after the update, not as a gradient.
        num_gpus: data-parallel size; from 2 on every GPU also holds the buckets of its all-reduces.
        bucket_views: gradients lie in these buckets, as `ptsim train` has it (`gradient_as_bucket_view`); by DDP's
            default there are both.
        sharding: "zero1": every GPU keeps and updates its share of the optimizer's state; "zero2": of the gradients
            too. Gradients are reduce-scattered and updated parameters all-gathered (Rajbhandari et al., SC 2020).
        passes: forward and backward passes over equal parts of the mini-batch, whose gradients accumulate into one
            update.
        told_update, told_penalties: what a recorded run says of another package's optimizer and criterion.
        torch_version: of the software; None where nobody said it. Memory and the data-sheet tier ask for it
            (`ptsim.costs.software`).
    """

    batch: int
    precision: Precision = Precision.FP32
    memory_format: MemoryFormat = "contiguous"
    optimizer: str = "sgd"
    momentum: float | None = None
    regularizer: str | None = None
    proximal: bool = False
    num_gpus: int = 1
    bucket_views: bool = True
    sharding: Sharding = "none"
    passes: int = 1
    told_update: ToldUpdate | None = None
    told_penalties: tuple[ToldPenalty, ...] = ()
    torch_version: TorchVersion | None = None

    @property
    def pass_batch(self) -> int:
        """Images of one forward pass."""
        return -(-self.batch // self.passes)

    @property
    def one_pass(self) -> StepSetting:
        """One of the passes, as a step of its own."""
        return self if self.passes == 1 else msgspec.structs.replace(self, batch=self.pass_batch, passes=1)

    @property
    def data_parallel(self) -> bool:
        """Whether gradients are all-reduced."""
        return self.num_gpus > 1

    @property
    def holds_gradients(self) -> bool:
        """Whether gradients are always there: in the buckets of all-reduces, from one pass to the next, or zeroed."""
        return (self.data_parallel and not self.buckets_apart) or self.passes > 1 or not self.groups_updates

    @property
    def buckets_apart(self) -> bool:
        """Whether buckets of all gradients are there beside the gradients; ZeRO-2 has two at a time, and no others."""
        return self.data_parallel and not self.bucket_views and self.sharding != "zero2"

    @property
    def groups_updates(self) -> bool:
        """Whether this PyTorch lets gradients go after an update, and updates tensors together."""
        return self.torch_version is None or self.torch_version >= GROUPED

    @property
    def half(self) -> bool:
        """Whether activations take two bytes: fp16 or bf16 autocast."""
        return self.precision.activation_bytes == 2

    @property
    def alone(self) -> StepSetting:
        """The same step on one GPU: all that its computation depends on."""
        return self if self.num_gpus == 1 else msgspec.structs.replace(self, num_gpus=1, sharding="none")

    @property
    def update_share(self) -> float:
        """Which part of the parameters a GPU updates, and whose optimizer state it keeps."""
        return 1.0 if self.sharding == "none" else 1 / self.num_gpus

    def with_batch(self, batch: int) -> StepSetting:
        """The same step with another mini-batch per device."""
        return msgspec.structs.replace(self, batch=batch)


def parse_precision(text: Precision | str) -> Precision:
    """The precision called `text`; "amp" is fp16 autocast. Every command and call that takes a precision uses this.

    Raises:
        UsageError: no such precision.
    """
    if text == "amp":
        return Precision.FP16
    try:
        return Precision(text)
    except ValueError as error:
        raise UsageError(f"precision is {text!r}, expected one of {', '.join(PRECISION_NAMES)}") from error


def parse_sharding(text: str) -> Sharding:
    """The sharding called `text`.

    Raises:
        UsageError: no such sharding.
    """
    return _one_of(SHARDINGS, "sharding", text)


def parse_memory_format(text: str) -> MemoryFormat:
    """The memory format called `text`.

    Raises:
        UsageError: no such memory format.
    """
    return _one_of(MEMORY_FORMATS, "memory_format", text)


def _one_of(known: tuple[_Name, ...], what: str, text: str) -> _Name:
    for name in known:
        if text == name:
            return name
    raise UsageError(f"{what} is {text!r}, expected one of {', '.join(known)}")


def whole_number(name: str, value: object) -> int:
    """`value` as an int; Python callers may have given anything, a number of numpy or torch for instance.

    Args:
        name: of the argument, for the message.
        value: what was given; 3.0 and True are no whole numbers.

    Raises:
        UsageError: not a whole number.
    """
    number = plain(value)
    if isinstance(number, bool) or not hasattr(number, "__index__"):
        raise UsageError(f"{name} is {value!r}, expected a positive whole number")
    return operator.index(number)


def positive_number(name: str, value: object) -> int:
    """`value` as an int, if it is a positive whole number.

    Raises:
        UsageError: not a whole number, or not positive.
    """
    number = whole_number(name, value)
    if number < 1:
        raise UsageError(f"{name} is {number}, expected a positive number")
    return number


def whole_numbers(name: str, values: object) -> list[int]:
    """`values` as a list of ints.

    Raises:
        UsageError: not several whole numbers.
    """
    given = plain(values)
    if isinstance(given, str | bytes | Mapping) or not hasattr(given, "__iter__"):
        raise UsageError(f"{name} is {values!r}, expected whole numbers such as [1, 8]")
    return [whole_number(name, value) for value in given]


def real_number(name: str, value: object) -> float:
    """`value` as a float: a number of Python, numpy or torch, or one that stands alone in an array.

    Raises:
        UsageError: not a number; NaN and infinity are left to the caller.
    """
    number = plain(value)
    while isinstance(number, list) and len(number) == 1 and number is not value:
        number = number[0]
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise UsageError(f"{name} is {value!r}, expected a number")
    return float(number)


def image_shape(value: object) -> tuple[int, int, int]:
    """An image's (channels, height, width), as every call takes it that has an `input_shape`.

    Raises:
        UsageError: not three positive whole numbers.
    """
    given = plain(value)
    if isinstance(given, Sequence) and not isinstance(given, str | bytes) and len(given) == 3:
        channels, height, width = (positive_number("input_shape", size) for size in given)
        return channels, height, width
    raise UsageError(f"input_shape is {value!r}, expected (channels, height, width) of one image")


def check_options(options: msgspec.Struct, changes: Mapping[str, Any]) -> None:
    """Make sure that a record of options has all that is to be changed.

    Raises:
        UnknownNameError: it has no such option.
    """
    for name in changes:
        if name not in options.__struct_fields__:
            raise UnknownNameError("option", str(name), options.__struct_fields__)


def changed(options: Options, changes: Mapping[str, Any]) -> Options:
    """A record of options with some replaced, as strictly checked as if they came from a file.

    Raises:
        UnknownNameError: an option that does not exist.
        UsageError: a value of a wrong type.
    """
    check_options(options, changes)
    given = {**as_plain(options), **as_plain(dict(changes))}
    try:
        return msgspec.convert(given, type(options))
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at ")
        raise UsageError(f"option {place.strip('`').removeprefix('$.')}: {problem}") from error


def as_plain(settings: Any) -> Any:
    """A record or a mapping of settings as values that a file could hold; of what no file holds, how it is written."""
    return msgspec.to_builtins(settings, enc_hook=_as_in_a_file)


def _as_in_a_file(value: Any) -> object:
    given = plain(value)
    if isinstance(given, PathLike):
        return fspath(given)
    return given if isinstance(given, str | bool | int | float | list) else repr(value)


def plain(value: Any) -> Any:
    """What Python callers give in place of a number or a list, as that: numpy's and torch's numbers and arrays."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, numbers.Integral):
        return value if isinstance(value, bool) else int(value)
    return float(value) if isinstance(value, numbers.Real) else value
