from __future__ import annotations

from pathlib import Path

import pytest

from ptsim.criteria import CRITERIA
from ptsim.errors import FileFormatError, NewerVersionError, PtsimError, UnknownNameError, UsageError


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
