from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ptsim.criteria import CRITERIA
from ptsim.errors import (
    FileFormatError,
    NewerVersionError,
    PtsimError,
    UnknownNameError,
    UsageError,
    lacks_gpu_memory,
    lacks_memory,
)


def test_an_unknown_name_lists_what_exists_and_guesses() -> None:
    error = UnknownNameError("model", "resnet5O", ["vgg11", "resnet50", "resnet20"])
    assert error.message == "unknown model 'resnet5O'; known: resnet20, resnet50, vgg11"
    assert error.hint is not None
    assert "resnet50" in error.hint


def test_of_many_names_only_the_close_ones_are_listed() -> None:
    error = UnknownNameError("device", "gpu7x", [f"gpu{i}" for i in range(100)])
    assert len(error.message) < 120
    assert error.message.endswith(" and 97 more")
    assert UnknownNameError("device", "?", [f"gpu{i}" for i in range(100)]).message.endswith(", gpu44 and 60 more")


def test_part_of_a_name_is_guessed_from() -> None:
    error = UnknownNameError("cluster", "P4d", ["aws-p4d-24xlarge", "aws-p5-48xlarge", "abci-a"])
    assert error.hint == "did you mean aws-p4d-24xlarge?"


def test_nothing_known_says_so() -> None:
    assert UnknownNameError("cluster", "x", []).message == "unknown cluster 'x'; known: none"


def test_a_file_error_names_file_and_line() -> None:
    error = FileFormatError(Path("a/trace.jsonl"), "field 'x' is 3, expected 4", line=12)
    assert str(error) == "a/trace.jsonl:12: field 'x' is 3, expected 4"
    assert (error.path, error.line) == (Path("a/trace.jsonl"), 12)


@pytest.mark.parametrize("kind", [UsageError, FileFormatError, NewerVersionError, UnknownNameError])
def test_every_error_is_one_that_the_command_line_prints(kind: type) -> None:
    assert issubclass(kind, PtsimError)


def test_a_wrong_argument_is_also_a_value_error() -> None:
    assert issubclass(UsageError, ValueError)


def test_a_name_that_a_trace_has_from_another_package_says_what_to_install() -> None:
    with pytest.raises(UnknownNameError, match="unknown criterion 'fancy'; known: group_lasso, slimming") as caught:
        CRITERIA.find("fancy")
    assert caught.value.hint == "if a package offers it (entry points 'ptsim.criteria'), install that package here"


# What torch says of a GPU without memory: its allocator, cuDNN without an algorithm, libraries without a place.
GPU_WITHOUT_MEMORY = [
    torch.OutOfMemoryError("no room"),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("FIND was unable to find an engine to execute this computation after trying 3 plans."),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
]
MACHINE_WITHOUT_MEMORY = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("can't start new thread"),
]


@pytest.mark.parametrize("error", GPU_WITHOUT_MEMORY, ids=lambda error: str(error)[:24])
def test_a_gpu_without_memory_is_told_however_it_is_said(error: Exception) -> None:
    assert lacks_gpu_memory(error)
    assert lacks_memory(error)


@pytest.mark.parametrize("error", MACHINE_WITHOUT_MEMORY, ids=lambda error: type(error).__name__)
def test_a_machine_without_memory_is_no_gpu_without_it(error: Exception) -> None:
    assert lacks_memory(error)
    assert not lacks_gpu_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"),
        ValueError("CUDA out of memory"),  # a text that only speaks of it
    ],
)
def test_another_error_is_no_lack_of_memory(error: Exception) -> None:
    assert not lacks_memory(error)
