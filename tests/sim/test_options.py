"""The bounds of every option: the last value that is taken, and one beyond it that is named."""

from __future__ import annotations

import math
import re

import pytest

from ptsim.errors import UsageError
from ptsim.sim.options import Faults, Options

GIVEN = {"input_stored_pixels": {"input": "dali"}, "input_storage_bytes_per_s": {"input": "dali"}}


@pytest.mark.parametrize(
    ("name", "taken", "refused"),
    [
        *((name, 1, 0) for name in ("batch_granularity", "max_batch", "memory_bytes", "micro_batches", "bucket_bytes")),
        *((name, 1, 0) for name in ("first_bucket_bytes", "sampled_steps", "jobs", "channel_multiple")),
        *((name, 1, 0) for name in ("input_stored_pixels", "input_storage_bytes_per_s")),
        *((name, 0, -1) for name in ("one_time_epoch", "autotune_trials", "warmup_steps")),
        *((name, 0.0, -0.1) for name in ("contention", "surgery_s", "compile_s", "jitter", "straggler_fraction")),
        ("surgery_s", 1e300, math.inf),
        ("contention", 1.0, 1.1),
        ("channel_multiple", 65_536, 65_537),
        ("jitter", 2.0, 2.1),
        ("straggler_fraction", 1.0, 1.1),
        ("straggler_slowdown", 1.0, 0.9),
        ("jobs", 10_000, 10_001),
        ("price_usd_per_gpu_hour", 0.0, -0.1),
        ("compression", 1e-9, 0.0),
        ("compression", 1.0, 1.1),
        ("input_images_per_s", 1e-3, 9e-4),
        ("input_images_per_s", 1e12, 2e12),
    ],
)
def test_an_option_is_taken_up_to_its_bound(name: str, taken: float, refused: float) -> None:
    Options(**GIVEN.get(name, {}), **{name: taken}).check()  # type: ignore[arg-type] # any option
    with pytest.raises(UsageError, match=re.escape(f"{name} is {refused:g}, expected ")):
        Options(**GIVEN.get(name, {}), **{name: refused}).check()  # type: ignore[arg-type] # any option


@pytest.mark.parametrize(
    ("name", "taken", "refused"),
    [
        ("mtbf_gpu_hours", 1e12, 2e12),
        ("checkpoint_interval_s", 1e12, 2e12),
        ("checkpoint_interval_s", 1e-9, 0.0),
        ("checkpoint_s", 0.0, -1.0),
        ("restart_s", 0.0, -1.0),
        ("repair_s", 0.0, -1.0),
        ("repair_s", 1e12, 2e12),
        ("num_runs", 1, 0),
        ("num_runs", 100_000, 100_001),
    ],
)
def test_what_fails_is_taken_up_to_its_bound(name: str, taken: float, refused: float) -> None:
    Options(faults=Faults(**{"mtbf_gpu_hours": 1.0, name: taken})).check()  # type: ignore[arg-type] # any option
    with pytest.raises(UsageError, match=f"{name} is"):
        Options(faults=Faults(**{"mtbf_gpu_hours": 1.0, name: refused})).check()  # type: ignore[arg-type] # any option


@pytest.mark.parametrize(
    ("first", "others", "cap"), [(None, 25 << 20, 1 << 20), (None, 26 << 20, 26 << 20), (7, 25 << 20, 7), (7, 9, 7)]
)
def test_the_first_bucket_is_small_only_beside_torchs_own_cap(first: int | None, others: int, cap: int) -> None:
    assert Options(first_bucket_bytes=first, bucket_bytes=others).first_cap_bytes == cap
