"""The fit of what many GPUs cost: it finds the constants that made the times."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

ANALYSIS = Path(__file__).parents[2] / "analysis"


@pytest.fixture
def fit_scaling(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ANALYSIS))
    yield importlib.import_module("fit_scaling")
    for name in ("fit_scaling", "public_rows"):
        sys.modules.pop(name, None)


def test_the_fit_finds_the_constants_that_made_the_times(fit_scaling: ModuleType) -> None:
    table = fit_scaling.rows()
    some = table[table.alone_images_per_s.notna() & (table.model == "resnet50")].groupby(["device", "num_gpus"]).head(1)
    made = fit_scaling.Scaling(tensor_s=80e-6, contention={"pcie": 0.6, "tcp": 0.05, "other": 0.2}, low=0.0, high=0.0)
    cases = [
        msgspec.structs.replace(case, seconds=case.predict(made, as_alone=True))
        for case in fit_scaling.cases(table=some.head(8))
    ]
    found = fit_scaling.fit(cases)
    assert found.tensor_s == pytest.approx(80e-6, rel=0.05)
    assert found.contention["pcie"] == pytest.approx(0.6, rel=0.1)


@pytest.mark.parametrize("name", ["training_many", "training_many_later"])
def test_rows_name_their_source_and_a_machine(fit_scaling: ModuleType, name: str) -> None:
    table = fit_scaling.rows(name)
    assert table[["source", "source_path", "source_rev"]].notna().all(axis=None)
    assert (table.num_gpus > 1).all()
    for _, row in table.drop_duplicates("device").iterrows():
        cluster = fit_scaling.cluster_of(row)
        assert cluster.device is not None
        assert cluster.device.name == row.device
        assert cluster.gpus_per_node == 8


def test_a_row_may_say_the_rate_of_its_own_network(fit_scaling: ModuleType) -> None:
    table = fit_scaling.rows("training_many_later")
    rates = {fit_scaling.cluster_of(row).inter.bandwidth_bytes_per_s for _, row in table.iterrows()}
    assert rates == {12.5e9, 50e9}  # one port of 100 Gbit/s, and the four of a DGX-1
