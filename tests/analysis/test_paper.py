from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from ptsim.prune.trajectories.catalog import published_runs
from ptsim.trace.io import read_trace, write_trace
from tests.traces import shrinking_trace

ROOT = Path(__file__).parents[2]

# Lym et al., Table 1 and Table 4, as printed.
TABLE_1 = {
    "resnet32-cifar10": (0.81,),
    "resnet50-cifar10": (0.81,),
    "vgg11-cifar10": (0.57,),
    "vgg13-cifar10": (0.57,),
    "resnet32-cifar100": (0.88,),
    "resnet50-cifar100": (0.66,),
    "vgg11-cifar100": (0.74,),
    "vgg13-cifar100": (0.67,),
    "resnet50-imagenet-r0.25": (0.71, 0.66),
    "resnet50-imagenet-r0.2": (0.76, 0.72),
    "resnet50-imagenet-r0.1": (0.98, 0.98),
}
TABLE_4 = {"resnet50-cifar100": (0.57,), "resnet50-imagenet-r0.25": (0.66, 0.61)}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "analysis"))
    return importlib.import_module("paper")


def pair(script: ModuleType, name: str) -> object:
    return script.Pair(published_runs()[f"lym2019/{name}"], None, ())


def test_every_measured_ratio_is_the_printed_one(script: ModuleType) -> None:
    for where, table in (("Table 1", TABLE_1), ("Table 4", TABLE_4)):
        for name, printed in table.items():
            clusters = (script.PASCAL, script.VOLTA) if "imagenet" in name else (script.CIFAR,)
            found = tuple(script._measured(pair(script, name), cluster, where) for cluster in clusters)
            assert found == pytest.approx(printed), (where, name)


def test_plans_are_read_where_they_lie_and_compared(script: ModuleType, tmp_path: Path) -> None:
    name = "lym2019/vgg11-cifar10"
    trace = read_trace(shrinking_trace(tmp_path / "run.jsonl", batch=128))
    write_trace(tmp_path / f"{name.replace('/', '-')}-1.jsonl", trace)
    made = script.pairs(1, tmp_path, [name])
    table = script.times_table(made)
    assert table.measured.tolist() == [0.57]
    assert 0 < table.low[0] < table.predicted[0] < table.high[0]
    assert script.figure(table).axes


def test_the_summary_by_hand(script: ModuleType) -> None:
    table = pd.DataFrame({"error_points": [4.0, -2.0], "inside": [True, False]})
    assert script.summary(table) == "2 ratios: mean error 3.0 points, bias +1.0, 50% inside their 90 % intervals"
