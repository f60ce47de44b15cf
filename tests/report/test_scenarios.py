import pandas as pd
import pytest

import ptsim
from ptsim.hardware.catalog import load_cluster
from ptsim.report import scenarios
from ptsim.report.facts import Facts
from ptsim.report.projected import Projector
from ptsim.sim.options import Options
from ptsim.trace.pairs import compare_runs
from tests.traces import dense_trace, shrinking_trace


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    folder = tmp_path_factory.mktemp("traces")
    paths = [dense_trace(folder / "d.jsonl"), shrinking_trace(folder / "p.jsonl", batch_step=0)]
    traces = [ptsim.read_trace(path) for path in paths]
    projectors = [
        Projector(load_cluster(name), Options(price_usd_per_gpu_hour=2.0), grid_grams_per_kwh=400.0)
        for name in ("dgx-a100", "ethernet-1g")
    ]
    return Facts(traces, compare_runs(traces), projectors=projectors, sizes=[1, 8], focus=8)


def test_every_run_is_beside_the_others_on_every_cluster_and_with_a_growing_mini_batch(facts: Facts) -> None:
    frame = facts.scenarios
    names = ["dense", "PruneTrain r=0.2", "PruneTrain r=0.2, dynamic mini-batch"]
    assert list(frame.run) == 2 * names
    assert list(frame.cluster) == 3 * ["dgx-a100"] + 3 * ["ethernet-1g"]
    rows = frame.set_index(["cluster", "run"])
    for cluster in ("dgx-a100", "ethernet-1g"):
        dense, pruned = rows.loc[(cluster, names[0])], rows.loc[(cluster, names[1])]
        assert pruned.saved_fraction == pytest.approx(1 - pruned.total_seconds / dense.total_seconds)
        (simulated,) = ptsim.simulate(facts.traces[1], cluster, [8]).to_dict("records")
        assert pruned.total_seconds == simulated["total_seconds"]  # to the last digit
        assert pruned.co2_grams == pytest.approx(pruned.energy_joules / 3.6e6 * 400)
    growing, fixed = (rows.loc[("dgx-a100", name)] for name in (names[2], names[1]))
    assert growing.last_batch_per_gpu > fixed.last_batch_per_gpu


def test_utilisation_is_the_flops_over_what_the_gpus_could_do(facts: Facts) -> None:
    trace, projector = facts.traces[0], facts.projector
    projection = projector.run(trace, 8)
    epoch = trace.epochs[0]
    # products forward and backward: twice the forward MACs again, but for the first layer's input gradient
    network = trace.network_of(epoch)
    macs = 3 * network.forward_macs - network.layer("conv1").forward_macs
    images = sum(epoch.num_images for epoch in trace.epochs)
    steps_s = sum(epoch.total_s for epoch in projection.epochs)
    expected = 2 * macs * images / (19.5e12 * 8 * steps_s)
    assert projection.mfu_fraction == pytest.approx(expected)


def test_break_even_has_the_headlines_point_in_every_lever(facts: Facts) -> None:
    frame = facts.break_even
    assert list(dict.fromkeys(frame.lever)) == ["GPUs", "bandwidth", "mini-batch"]
    headline = facts.savings[facts.savings.gpus == 8].iloc[0].saved_fraction
    at = {"GPUs": 8.0, "mini-batch": 64.0}
    for lever, value in at.items():
        (row,) = frame[(frame.lever == lever) & (frame.value == value)].to_dict("records")
        assert row["saved_fraction"] == pytest.approx(headline)


def test_a_mini_batch_that_nobody_trained_has_no_accuracy(facts: Facts) -> None:
    dynamic = facts.scenarios.run.str.endswith("dynamic mini-batch")
    assert dynamic.any()
    assert facts.scenarios[dynamic].accuracy.isna().all()
    assert facts.scenarios[~dynamic].accuracy.notna().all()


def test_one_number_of_gpus_is_no_lever(facts: Facts) -> None:
    one = Facts(facts.traces, facts.comparisons, projectors=facts.projectors[:1], sizes=[1], focus=1)
    assert list(dict.fromkeys(one.break_even.lever)) == ["mini-batch"]


def test_a_run_with_another_mini_batch_sees_the_same_images(facts: Facts) -> None:
    trace = facts.traces[0]
    doubled = scenarios.with_batch(trace, 2.0)
    for before, after in zip(trace.epochs, doubled.epochs, strict=True):
        assert after.batch_per_gpu == 2 * before.batch_per_gpu
        assert after.num_images == before.num_images
        assert after.num_iterations == -(-before.num_images // (2 * before.batch_per_gpu))


@pytest.mark.parametrize(
    ("intervals", "says"),
    [
        ([(0.1, 0.2), (0.1, 0.3), (0.2, 0.4)], "pays wherever it was tried, from 1 GPU to 64 GPUs"),
        ([(-0.2, -0.1), (-0.3, -0.1), (-0.1, 0.0)], "does not pay wherever it was tried, from 1 GPU to 64 GPUs"),
        ([(-0.2, -0.1), (-0.1, 0.1), (0.1, 0.2)], "pays at 64 GPUs, may pay at 8 GPUs and does not pay at 1 GPU"),
        ([(-0.1, 0.2), (0.1, 0.2), (0.2, 0.3)], "pays from 8 GPUs on and may pay at 1 GPU"),
        ([(0.1, 0.2), (0.1, 0.2), (-0.3, -0.1)], "pays up to 8 GPUs and does not pay at 64 GPUs"),
        ([(-0.1, 0.1), (0.1, 0.2), (0.0, 0.1)], "pays at 8 GPUs and may pay at 1 GPU and at 64 GPUs"),
    ],
)
def test_the_sentence_says_where_it_pays_for_sure_and_where_perhaps(
    intervals: list[tuple[float, float]], says: str
) -> None:
    values = [1.0, 8.0, 64.0]
    frame = pd.DataFrame(
        {
            "lever": "GPUs",
            "value": values,
            "at_value": ["1 GPU", "8 GPUs", "64 GPUs"],
            "outcome": [scenarios.outcome(low, high) for low, high in intervals],
        }
    )
    sentence, meaning = scenarios.break_even_sentences(frame)
    assert sentence == f"Number of GPUs: pruning {says}."
    assert "whole 90 % interval" in meaning


def test_a_mini_batch_whose_tensors_fit_but_whose_process_does_not_is_left_out(
    facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    projector = facts.projector.changed(facts.projector.cluster, facts.projector.options)
    need = projector.run(scenarios.with_batch(facts.traces[0], 2.0), 8).epochs[0]
    assert need.batch_per_gpu == 128
    assert need.peak_memory_bytes < need.needed_memory_bytes
    between = (need.peak_memory_bytes + need.needed_memory_bytes) // 2
    monkeypatch.setattr(scenarios, "usable_bytes", lambda _: between)
    frame = scenarios.break_even_frame(facts)
    assert list(frame[frame.lever == "mini-batch"].value) == [16, 32, 64]
