import msgspec
import pandas as pd
import pytest

import ptsim
from ptsim.hardware.catalog import load_cluster
from ptsim.hardware.spec import AllReduceTable
from ptsim.network import Precision
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


def test_utilisation_counts_what_runs_once_in_every_pass_of_every_gpu(facts: Facts) -> None:
    trace = facts.traces[0]
    network = trace.network_of(trace.epochs[0])
    *layers, last = network.layers
    once = msgspec.structs.replace(last, once=True, forward_macs=10**9)
    epochs = tuple(msgspec.structs.replace(epoch, passes=4) for epoch in trace.epochs)
    changed = msgspec.structs.replace(
        trace,
        epochs=epochs,
        networks={epochs[0].architecture: msgspec.structs.replace(network, layers=(*layers, once))},
    )
    projection = Projector(load_cluster("dgx-a100"), Options()).run(changed, 8)
    macs = 3 * (network.forward_macs - last.forward_macs) - network.layer("conv1").forward_macs
    total = macs * sum(epoch.num_images for epoch in epochs)
    total += 3 * 10**9 * 4 * 8 * sum(epoch.num_iterations for epoch in projection.epochs)
    steps_s = sum(epoch.total_s for epoch in projection.epochs)
    assert projection.mfu_fraction == pytest.approx(2 * total / (19.5e12 * 8 * steps_s))


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


def test_half_precision_is_also_shown_with_channels_in_whole_multiples(facts: Facts) -> None:
    """On tensor cores, where other channel counts are padded; nobody has trained that, so it has no accuracy."""
    traces = [
        msgspec.structs.replace(
            trace,
            run=msgspec.structs.replace(trace.run, precision=Precision.FP16, memory_format="channels_last"),
            profiles=(),
        )
        for trace in facts.traces
    ]
    projectors = [Projector(load_cluster(name), Options()) for name in ("dgx-a100", "v100-pcie-x4")]
    frame = Facts(traces, compare_runs(traces), projectors=projectors, sizes=[1], focus=1).scenarios
    rows = frame[frame.run.str.endswith(", channels in multiples of 8")]
    assert list(rows.cluster) == ["dgx-a100", "v100-pcie-x4"]
    for row in rows.itertuples():
        (simulated,) = ptsim.simulate(traces[1], row.cluster, [1], channel_multiple=8).to_dict("records")
        assert row.total_seconds == simulated["total_seconds"]
        (dense,) = frame[(frame.cluster == row.cluster) & (frame.run == "dense")].itertuples()
        assert row.saved_fraction == pytest.approx(1 - row.total_seconds / dense.total_seconds)
    assert rows.accuracy.isna().all()
    assert not facts.scenarios.run.str.contains("multiples").any()  # recorded in fp32


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


@pytest.mark.parametrize(("nodes", "connected", "most"), [(4, True, 32), (None, True, 8_000_000), (4, False, 8)])
def test_a_cluster_has_its_nodes_or_where_they_are_not_connected_one(
    nodes: int | None, connected: bool, most: int
) -> None:
    cluster = load_cluster("dgx-a100")  # 8 GPUs a node
    inter = cluster.inter if connected else None
    assert scenarios.most_gpus(msgspec.structs.replace(cluster, max_nodes=nodes, inter=inter)) == most


def test_a_cluster_with_fewer_gpus_is_shown_with_all_that_it_has(facts: Facts) -> None:
    small = msgspec.structs.replace(load_cluster("ethernet-1g"), max_nodes=1)  # 4 GPUs a node
    projectors = (facts.projectors[0], Projector(small, Options()))
    frame = Facts(facts.traces, facts.comparisons, projectors=projectors, sizes=[1, 8], focus=8).scenarios
    assert list(frame.gpus) == 3 * [8] + 3 * [4]
    assert list(frame.saved_fraction.isna()) == 2 * [True, False, False]


@pytest.mark.parametrize(
    ("sizes", "gbits"),
    [
        ([1, 8], ["37.5", "150", "600", "2,400", "9,600"]),  # within a node: 300 GB/s and its 64th to fourfold
        ([8, 16], ["25", "100", "400", "1,600", "6,400"]),  # between nodes: 1,600 Gbit/s
    ],
)
def test_the_levers_of_the_break_even_by_hand(facts: Facts, sizes: list[int], gbits: list[str]) -> None:
    focus = sizes[-1]
    there = Facts(facts.traces, facts.comparisons, projectors=facts.projectors[:1], sizes=sizes, focus=focus)
    points = {lever: list(rows.at_value) for lever, rows in there.break_even.groupby("lever")}
    counted = {1: "1 GPU", 8: "8 GPUs", 16: "16 GPUs"}
    assert points == {
        "GPUs": [counted[size] for size in sizes],
        "bandwidth": [f"{number} Gbit/s" for number in gbits],
        "mini-batch": [f"{images} images per GPU" for images in (16, 32, 64, 128, 256)],
    }
    by_lever = {lever: set(rows.gpus) for lever, rows in there.break_even.groupby("lever")}
    assert by_lever == {"GPUs": set(sizes), "bandwidth": {focus}, "mini-batch": {focus}}
    bandwidth = there.break_even[there.break_even.lever == "bandwidth"]
    assert bandwidth.dense_seconds.is_monotonic_decreasing
    assert bandwidth.dense_seconds.iloc[0] > bandwidth.dense_seconds.iloc[-1]


def test_the_smallest_mini_batch_is_one_image(facts: Facts) -> None:
    trace = facts.traces[0]
    for before, after in zip(trace.epochs, scenarios.with_batch(trace, 1e-3).epochs, strict=True):
        assert (after.batch_per_gpu, after.num_iterations) == (1, before.num_images)
    few = msgspec.structs.replace(trace.epochs[0], world_size=3, num_images=100)
    (quarter,) = scenarios.with_batch(msgspec.structs.replace(trace, epochs=(few,)), 1 / 4).epochs
    assert quarter.num_iterations == 3  # 100 images in steps of three times 16


def test_a_measured_table_holds_for_its_own_bandwidth_alone(facts: Facts) -> None:
    """All-reduces that were measured to take 0.1 s, on whatever links the lever would have."""
    table = AllReduceTable(
        num_gpus=8, num_nodes=1, size_bytes=(4, 2**30), seconds=(0.1, 0.1), relative_jitter=0.0, source="t"
    )
    measured = msgspec.structs.replace(load_cluster("dgx-a100"), tables=(table,))
    there = Facts(facts.traces, facts.comparisons, projectors=[Projector(measured, Options())], sizes=[8], focus=8)
    formula = facts.break_even[facts.break_even.lever == "bandwidth"]
    bandwidth = there.break_even[there.break_even.lever == "bandwidth"]
    assert list(bandwidth.dense_seconds) == list(formula.dense_seconds)
    batches = there.break_even[there.break_even.lever == "mini-batch"]
    steps = [epoch.num_iterations for epoch in there.projector.run(facts.traces[0], 8).epochs]
    assert batches[batches.value == 64].dense_seconds.iloc[0] > 0.1 * sum(steps)
