"""The fit of what many GPUs cost: it finds the constants that made the times."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import msgspec
import pandas as pd
import pytest

from ptsim.costs.collectives import all_reduce, nodes_for
from ptsim.costs.scaling import Scaling
from ptsim.costs.times import StepTime
from ptsim.hardware.spec import LinkKind

ANALYSIS = Path(__file__).parents[2] / "analysis"


@pytest.fixture
def fit_scaling(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ANALYSIS))
    yield importlib.import_module("fit_scaling")
    for name in ("fit_scaling", "public_rows"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_the_fit_finds_the_constants_that_made_the_times(fit_scaling: ModuleType) -> None:
    """Of rows over PCIe, NVLink and InfiniBand."""
    table = fit_scaling.many_table()
    table = table[table.alone_images_per_s.notna()]
    some = table.groupby(["source", "device", "num_gpus", "model", "precision"], sort=False).head(1)
    links = {"tcp": 0.05, "other": 0.2}
    made = Scaling(tensor_s=80e-6, slowdown=0.02, straggle=0.03, contention=links, low=0.0, high=0.0)
    cases = [
        msgspec.structs.replace(case, seconds=case.predict(made, as_alone=True))
        for case in fit_scaling.cases(table=some)
    ]
    found = fit_scaling.fit(cases)
    assert found.tensor_s == pytest.approx(80e-6, rel=0.05)
    assert found.slowdown == pytest.approx(0.02, rel=0.1)
    assert found.straggle == pytest.approx(0.03, rel=0.1)
    assert found.contention == pytest.approx(links, rel=0.1)


@pytest.mark.parametrize(
    ("images", "num_gpus", "steps"),
    [(math.nan, 8, 1), (4096, 1, 32), (4096, 8, 4), (4096, 64, 1), (2048, 3, 5)],
)
def test_a_program_may_update_after_several_steps(
    fit_scaling: ModuleType, images: float, num_gpus: int, steps: int
) -> None:
    """Of 128 images a GPU; fractions are cut off, and what is short of one step is every step."""
    row = pd.Series({"optimizer_batch": images, "batch": 128})
    assert fit_scaling.steps_per_update(row, num_gpus) == steps


def test_a_mean_step_has_its_share_of_an_update_and_of_the_sums_before_it(fit_scaling: ModuleType) -> None:
    step = StepTime(
        layers=(), optimizer_s=5.0, regularizer_s=0.0, overhead_s=3.0, low_s=4.0, high_s=16.0, tier="", again_s=1.0
    )
    mean = fit_scaling.mean_step(step, 4)
    assert (mean.overhead_s, mean.optimizer_s, mean.passes) == (3, (5 + 3 * 1) / 4, 1)
    assert (mean.low_s / mean.compute_s, mean.high_s / mean.compute_s) == (0.5, 2)
    assert fit_scaling.mean_step(step, 1) == step


def test_one_gpu_updates_less_often_than_eight_in_the_same_test(fit_scaling: ModuleType) -> None:
    """NVIDIA's program accumulates gradients up to as many images, however many GPUs there are."""
    table = fit_scaling.many_table()
    table = table[table.optimizer_batch.notna() & (table.num_gpus == 8)].head(3)
    for case in fit_scaling.cases(table=table):
        assert case.alone_expected_s < case.step.compute_s
        own = msgspec.structs.replace(case, alone_s=case.alone_expected_s)
        nothing = Scaling(tensor_s=0.0, slowdown=0.0, straggle=0.0, contention={"other": 0.0}, low=0.0, high=0.0)
        assert own.predict(nothing, as_alone=True) == pytest.approx(own.predict(nothing, as_alone=False))


@pytest.mark.parametrize("name", ["training_many", "training_unseen"])
def test_rows_name_their_source_and_a_machine(fit_scaling: ModuleType, name: str) -> None:
    table = fit_scaling.many_table(name)
    assert table[["source", "source_path", "source_rev"]].notna().all(axis=None)
    assert (table.num_gpus > 1).all()
    for _, row in table.drop_duplicates("device").iterrows():
        cluster = fit_scaling.cluster_of(row)
        assert cluster.device is not None
        assert cluster.device.name == row.device
        assert cluster.gpus_per_node == 8


def test_a_row_may_say_the_rate_of_its_own_network(fit_scaling: ModuleType) -> None:
    table = fit_scaling.many_table()
    table = table[table.cluster == "dgx-1-v100"]
    rates = {fit_scaling.cluster_of(row).inter.bandwidth_bytes_per_s for _, row in table.iterrows()}
    assert rates == {12.5e9, 50e9}  # one port of 100 Gbit/s, and the four of a DGX-1


def test_what_a_test_of_many_gpus_says_of_one_is_taken_once(fit_scaling: ModuleType) -> None:
    """Rows of 2 to 8 GPUs repeat the rate of one; other tables have it, perhaps in other digits."""
    rows = importlib.import_module("public_rows")
    alone, known = rows.alone_table(), rows.training_table()
    keys = [*rows.SAME_TEST, "software", "images_per_s"]
    assert len(alone) > 20
    assert not alone.duplicated(keys).any()
    assert not alone.stepwise.any()
    both = alone.merge(known, on=rows.SAME_TEST, suffixes=("", "_known"))
    assert ((both.images_per_s / both.images_per_s_known - 1).abs() >= rows.SAME_SPEED).all()
    named = {*zip(alone.source, alone.images_per_s, strict=True)}
    many = rows.many_table()
    told = {*zip(many.source, many.alone_images_per_s, strict=True)}
    assert named <= told


def test_a_row_without_one_gpu_is_deduced_by_what_the_others_add(fit_scaling: ModuleType) -> None:
    """Times that were made by known constants give back the step on one GPU."""
    made = fit_scaling.Scaling(
        tensor_s=40e-6,
        slowdown=0.02,
        straggle=0.01,
        contention={"pcie": 1.0, "tcp": 0.05, "other": 0.2},
        low=0.0,
        high=0.0,
    )
    deduced = fit_scaling.deduced_rows(made)
    table = fit_scaling.many_table().loc[deduced.index]
    assert table.alone_images_per_s.isna().all()
    assert (table.num_gpus <= 8).all()
    assert deduced.deduced.all()
    one_s = deduced.batch / deduced.images_per_s
    for case, alone_s in zip(fit_scaling.cases(table=table), one_s, strict=True):
        again = msgspec.structs.replace(case, alone_s=alone_s, alone_expected_s=case.step.compute_s)
        assert again.predict(made, as_alone=True) == pytest.approx(case.seconds, rel=1e-6)
        assert alone_s < case.seconds / 1.02


def test_a_row_may_say_how_many_gpus_its_nodes_have(fit_scaling: ModuleType) -> None:
    table = fit_scaling.many_table("training_unseen")
    csc = table[table.gpus_per_node.notna()]
    assert {fit_scaling.cluster_of(row).gpus_per_node for _, row in csc.iterrows()} == {4}
    assert {fit_scaling.cluster_of(row).inter.bandwidth_bytes_per_s for _, row in csc.iterrows()} == {25e9}


def test_rows_of_unnamed_gpus_say_what_a_network_adds(fit_scaling: ModuleType) -> None:
    """The step of one GPU is as it was measured; without overlap all of the communication comes on top."""
    table = fit_scaling.network_table()
    found = fit_scaling.network_cases(table)
    nothing = Scaling(tensor_s=0.0, slowdown=0.0, straggle=0.0, contention={"other": 0.0}, low=0.0, high=0.0)
    for row, case in zip(table.itertuples(), found, strict=True):
        assert case.device == fit_scaling.UNNAMED
        assert case.alone_s == pytest.approx(64 / row.alone_images_per_s)
        assert case.seconds == pytest.approx(64 * row.num_gpus / row.images_per_s)
        link = case.cluster.intra if row.link == "pcie" else case.cluster.inter
        assert link.kind == row.link
        assert (nodes_for(case.cluster, case.num_gpus) > 1) == (row.link != "pcie")
        if row.link != "pcie":
            assert link.bandwidth_bytes_per_s == pytest.approx(row.gbit_per_s * 1e9 / 8)
        if row.reduction == "BSP":
            gradients = all_reduce(4 * 25_557_032, case.cluster, case.num_gpus).seconds
            buffers_s = case.predict(nothing, as_alone=True) - case.alone_s - gradients
            assert 0 < buffers_s < 0.002
    taken = fit_scaling.controls()
    assert len(taken) == 6
    assert {case.cluster.inter.kind for case in taken} == {LinkKind.INFINIBAND}


def test_every_doubling_of_the_nodes_makes_a_step_longer(fit_scaling: ModuleType) -> None:
    table = fit_scaling.network_table().query("link == 'infiniband' and reduction == 'BSP'")
    constants = {"tensor_s": 0.0, "slowdown": 0.25, "contention": {"other": 0.0}, "low": 0.0, "high": 0.0}
    for case in fit_scaling.network_cases(table):
        plain, slower = (case.predict(Scaling(**constants, straggle=share), as_alone=True) for share in (0.0, 0.125))
        doublings = {8: 1, 16: 2, 32: 3}[case.num_gpus]
        assert slower - plain == pytest.approx(0.125 * doublings * case.alone_s)
