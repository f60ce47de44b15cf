"""TF32's switches, old and new, on torch's own switches: they are there without a GPU as well."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ptsim.measure import tf32
from ptsim.measure.tf32 import convolutions_use_tf32, tf32_allowed
from ptsim.network import Precision

MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn
NEW = hasattr(MATMUL, "fp32_precision")
needs_new = pytest.mark.skipif(not NEW, reason="torch 2.9 brought the new switches")


def new_values() -> tuple[Any, ...]:
    return (MATMUL.fp32_precision, CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision) if NEW else ()


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    """The switches as torch has them at its start."""
    yield
    MATMUL.allow_tf32, CUDNN.allow_tf32 = False, True


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("tf32", True), ("bf16", True), ("fp16", True)])
@pytest.mark.parametrize("before", [(False, True), (True, False), (True, True), (False, False)])
def test_all_switches_are_as_the_precision_wants_them_and_put_back(
    precision: str, allowed: bool, before: tuple[bool, bool]
) -> None:
    MATMUL.allow_tf32, CUDNN.allow_tf32 = before
    with tf32_allowed(Precision(precision)):
        assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == (allowed, allowed)
        assert {value == "tf32" for value in new_values()} <= {allowed}
        assert convolutions_use_tf32() == allowed
    assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == before
    assert convolutions_use_tf32() == before[1]


def test_an_error_inside_puts_them_back_as_well() -> None:
    with contextlib.suppress(ZeroDivisionError), tf32_allowed(Precision.FP32):
        assert not CUDNN.allow_tf32
        raise ZeroDivisionError
    assert CUDNN.allow_tf32


# What torch recommends since 2.9, after which its old switches cannot be asked any more.
RECOMMENDED = {
    "convolutions exactly": (("conv", "ieee"),),
    "products in tf32": (("matmul", "tf32"),),
    "one of three": (("conv", "ieee"), ("matmul", "tf32")),
}


@needs_new
@pytest.mark.parametrize("said", RECOMMENDED)
@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("tf32", True)])
def test_switches_that_a_program_has_set_anew_are_followed_and_put_back(
    said: str, precision: str, allowed: bool
) -> None:
    parts = {"matmul": MATMUL, "conv": CUDNN.conv}
    for name, value in RECOMMENDED[said]:
        parts[name].fp32_precision = value
    with pytest.raises(RuntimeError, match="mix of the legacy and new"):
        _ = MATMUL.allow_tf32, CUDNN.allow_tf32
    before = new_values()
    assert convolutions_use_tf32() == (before[1] == "tf32")
    with tf32_allowed(Precision(precision)):
        assert {value == "tf32" for value in new_values()} == {allowed}
        assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == (allowed, allowed)  # torch's compiler asks these
    assert new_values() == before


@needs_new
def test_a_switch_for_everything_does_not_make_fp32_less_than_fp32() -> None:
    everything = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"
        with tf32_allowed(Precision.FP32):
            assert "tf32" not in new_values()
    finally:
        torch.backends.fp32_precision = everything


def test_torchs_warning_that_the_old_switches_will_go_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch._C._set_cudnn_allow_tf32
    CUDNN.allow_tf32 = True

    def warning(value: bool) -> None:  # as torch 2.9 to 2.11
        warnings.warn("Please use the new API settings to control TF32 behavior", UserWarning, stacklevel=2)
        real(value)

    monkeypatch.setattr(type(CUDNN).__dict__["allow_tf32"], "setter", warning)
    with tf32_allowed(Precision.FP32):
        assert not CUDNN.allow_tf32
        monkeypatch.undo()


def test_before_the_new_switches_the_old_ones_are_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tf32, "_new_switches", lambda: ())
    for value in (True, False):
        CUDNN.allow_tf32 = value
        assert convolutions_use_tf32() == value
        for precision, allowed in ((Precision.FP32, False), (Precision.TF32, True)):
            with tf32_allowed(precision):
                assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == (allowed, allowed)
            assert CUDNN.allow_tf32 == value
