"""What many GPUs add to a step: constants from the fit, arithmetic by hand."""

from __future__ import annotations

import math

import msgspec
import pytest

from ptsim.costs import scaling
from ptsim.costs.scaling import contention_of, hook_seconds, load_scaling, widened
from ptsim.hardware.catalog import load_cluster


def test_one_gpu_and_cpus_have_no_hooks() -> None:
    cluster = load_cluster("dgx-a100")
    assert hook_seconds(cluster, 1) == 0
    assert hook_seconds(msgspec.structs.replace(cluster, library="gloo"), 2) == 0
    assert hook_seconds(cluster, 8) == hook_seconds(cluster, 64) == load_scaling().tensor_s > 0


def test_overlap_gains_nothing_over_pcie_and_the_network_decides_between_nodes() -> None:
    assert contention_of(load_cluster("rtx-3090-x8"), 8) == 1.0
    assert contention_of(load_cluster("rtx-3090-x8"), 16) == load_scaling().contention["tcp"]
    assert contention_of(load_cluster("dgx-a100"), 8) == load_scaling().contention["other"]


def test_the_interval_of_many_gpus_adds_their_own_spread_by_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    made = msgspec.structs.replace(load_scaling(), low=-0.3, high=0.4)
    monkeypatch.setattr(scaling, "load_scaling", lambda: made)
    low, high = widened(1.0, math.exp(-0.4), math.exp(0.3), 8)
    assert (math.log(low), math.log(high)) == pytest.approx((-0.5, 0.5))
    assert widened(1.0, 0.9, 1.1, 1) == (0.9, 1.1)
