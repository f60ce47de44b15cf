import math
from pathlib import Path

import msgspec
import pandas as pd
import pytest

import ptsim
from ptsim.answers.repredict import device_profile_of
from ptsim.costs.saving import saving_errors
from ptsim.errors import UsageError
from ptsim.hardware.catalog import load_cluster
from ptsim.network import Layer, LayerKind
from ptsim.report import projected
from ptsim.report.build import make_report, money_sentences
from ptsim.report.facts import Facts
from ptsim.report.figures.layers import block_of, has_removed_blocks
from ptsim.report.projected import LabelledRun, Projector, labelled_runs
from ptsim.report.specs import PROJECTIONS, SAVINGS
from ptsim.report.tables import make_table
from ptsim.sim.options import HourPrice, Options
from ptsim.trace.pairs import compare_runs, first_epochs, held_dense
from ptsim.trace.schema import Epoch
from tests.report.simulated import FixedProjector, epoch_projection, run_projection
from tests.traces import NetworkBuilder, dense_trace, shrinking_trace

GPUS = [1, 8]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> list[ptsim.Trace]:
    folder = tmp_path_factory.mktemp("traces")
    paths = [dense_trace(folder / "dense.jsonl"), shrinking_trace(folder / "pruned.jsonl")]
    return [ptsim.read_trace(path) for path in paths]


@pytest.fixture(scope="module")
def projector() -> Projector:
    return Projector(load_cluster("dgx-a100"), Options(price_usd_per_gpu_hour=2.0))


def test_projections_are_the_simulators(traces: list[ptsim.Trace], projector: Projector) -> None:
    frame = projected.projections_frame(labelled_runs(traces, []), projector, GPUS)
    simulated = ptsim.simulate(traces[1], "dgx-a100", GPUS)
    ours = frame[frame.pruned].reset_index(drop=True)
    assert list(ours.total_seconds) == list(simulated.total_seconds)
    assert list(ours.cost_usd) == pytest.approx(
        [2.0 * s * g / 3600 for s, g in zip(ours.total_seconds, GPUS, strict=True)]
    )


def test_waiting_for_input_is_a_column_where_a_pipeline_feeds_the_gpus(traces: list[ptsim.Trace]) -> None:
    runs = labelled_runs(traces, [])
    starving = msgspec.structs.replace(load_cluster("dgx-a100"), cores_per_node=1)
    for pipeline, shown in (("none", False), ("torchvision", True)):
        projector = Projector(starving, Options(input=pipeline))
        frame = projected.projections_frame(runs, projector, GPUS)
        table = make_table(PROJECTIONS, frame)
        assert ("waiting for input" in [column.heading for column in table.columns]) == shown
        if shown:
            waits = [projector.run(run.trace, size).input_wait_s for run in runs for size in GPUS]
            assert list(frame.input_wait_seconds) == waits
            assert min(waits) > 0


def test_parts_of_a_saving_add_up_where_a_pipeline_feeds_the_gpus(traces: list[ptsim.Trace]) -> None:
    starving = msgspec.structs.replace(load_cluster("dgx-a100"), cores_per_node=1)
    for pipeline, shown in (("none", False), ("torchvision", True)):
        savings = projected.savings_frame(compare_runs(traces), Projector(starving, Options(input=pipeline)), GPUS)
        table = make_table(SAVINGS, savings)
        assert ("waiting for input" in [column.heading for column in table.columns]) == shown
        columns = [f"saved_{part}_seconds" for part in ("compute", "communication", "input_wait", "reconfiguration")]
        parts = savings[columns].fillna(0.0).sum(axis=1)
        assert list(parts) == pytest.approx(list(savings.saved_seconds), rel=1e-9, abs=1e-9)


def test_a_saving_is_dense_less_pruned(traces: list[ptsim.Trace], projector: Projector) -> None:
    savings = projected.savings_frame(compare_runs(traces), projector, GPUS)
    for row in savings.itertuples():
        dense, pruned = (projector.run(trace, row.gpus) for trace in traces)
        assert row.saved_seconds == dense.total_s - pruned.total_s
        assert row.saved_usd == pytest.approx(2.0 * row.gpus * row.saved_seconds / 3600)
        assert row.saved_fraction_low <= row.saved_fraction <= row.saved_fraction_high
        assert row.saved_seconds_low <= row.saved_seconds <= row.saved_seconds_high


def test_a_saving_has_one_interval_and_never_saves_more_than_the_dense_run_costs(
    traces: list[ptsim.Trace], projector: Projector
) -> None:
    savings = projected.savings_frame(compare_runs(traces), projector, GPUS)
    for row in savings.to_dict("records"):
        for unit in ("seconds", "usd", "joules"):
            for end in ("low", "high"):
                assert row[f"saved_{unit}_{end}"] < row[f"dense_{unit}"]
                # dense - pruned * (1 - s) / (pruned / dense) is dense * s where pruned / dense is the time's ratio
                share = 1 - row[f"saved_{unit}_{end}"] / row[f"dense_{unit}"]
                of_time = (1 - row[f"saved_fraction_{end}"]) / (1 - row["saved_fraction"])
                assert share == pytest.approx(row[f"pruned_{unit}"] / row[f"dense_{unit}"] * of_time)


def test_the_accuracy_is_that_of_what_the_run_handed_over(traces: list[ptsim.Trace], projector: Projector) -> None:
    # the builder's last epoch validates at 0.9; the end record holds what was measured after the last pruning
    dense, pruned = traces
    assert pruned.end is not None
    after = msgspec.structs.replace(pruned, end=msgspec.structs.replace(pruned.end, final_accuracy=0.85))
    (row,) = projected.savings_frame(compare_runs([dense, after]), projector, [1]).to_dict("records")
    assert row["pruned_accuracy"] == 0.85
    assert row["accuracy_change"] == pytest.approx(-0.05)


def test_the_inference_cost_is_of_the_network_that_the_accuracy_is_of(traces: list[ptsim.Trace]) -> None:
    """Beside a dense run of four epochs, of the six that prune after the second and the fourth."""
    dense, pruned = traces
    projector = FixedProjector({False: run_projection(), True: run_projection(80.0)})
    (row,) = projected.savings_frame(compare_runs([first_epochs(dense, 4), pruned]), projector, [4]).to_dict("records")
    first, fourth, last = (pruned.network_of(pruned.epochs[number]).forward_macs for number in (0, 3, 5))
    assert first > fourth > last
    assert (row["first_inference_macs_per_image"], row["last_inference_macs_per_image"]) == (first, fourth)
    assert row["pruned_accuracy"] == pruned.epochs[3].validation_accuracy


def test_a_layer_without_elements_is_removed_from_table_and_map(
    traces: list[ptsim.Trace], projector: Projector
) -> None:
    run = next(run for run in labelled_runs(traces, []) if run.trace.reconfigurations)
    epoch = run.trace.epochs[-1]
    network = run.trace.network_of(epoch)
    layers = tuple(
        msgspec.structs.replace(layer, out_channels=0, output_shape=(0, *layer.output_shape[1:]))
        if layer.name.startswith("layer2.1.")
        else layer
        for layer in network.layers
    )
    emptied = {**run.trace.networks, epoch.architecture: msgspec.structs.replace(network, layers=layers)}
    run = msgspec.structs.replace(run, trace=msgspec.structs.replace(run.trace, networks=emptied, profiles=()))
    frame = projected.layers_frame(run, projector)
    last = frame[frame.epoch == epoch.epoch]
    assert not last.layer.str.startswith("layer2.1.").any()
    table = projected.first_and_last_layers(frame).set_index("layer")
    assert table.loc["layer2.1.conv1", "last_channels"] == "removed"
    assert table.loc["layer2.1.conv1", "last_fraction"] == 0
    assert has_removed_blocks(frame)


def test_the_parts_of_the_time_add_up_to_it(traces: list[ptsim.Trace], projector: Projector) -> None:
    runs = labelled_runs(traces, [])
    parts = projected.breakdown_frame(runs, projector, GPUS).groupby(["run", "gpus"]).seconds.sum()
    totals = projected.projections_frame(runs, projector, GPUS).set_index(["run", "gpus"]).total_seconds
    for key, seconds in totals.items():
        assert parts[key] == pytest.approx(seconds, rel=1e-9)


def test_one_gpu_communicates_nothing(traces: list[ptsim.Trace], projector: Projector) -> None:
    frame = projected.breakdown_frame(labelled_runs(traces, []), projector, [1])
    assert frame[frame.part == "exposed communication"].seconds.sum() == 0


def test_layers_that_are_gone_have_no_time_afterwards(traces: list[ptsim.Trace], projector: Projector) -> None:
    run = next(run for run in labelled_runs(traces, []) if run.trace.reconfigurations)
    layers = projected.layers_frame(run, projector)
    gone = {name for record in run.trace.reconfigurations for name in record.layers_removed}
    last = set(layers[layers.epoch == layers.epoch.max()].layer)
    assert gone
    assert not gone & last
    assert gone <= set(layers[layers.epoch == 0].layer)


def test_a_held_baseline_is_projected_but_was_not_trained(traces: list[ptsim.Trace], projector: Projector) -> None:
    comparisons = compare_runs(traces[1:])
    runs = labelled_runs(traces[1:], comparisons)
    assert [run.trained for run in runs] == [False, True]
    savings = projected.savings_frame(comparisons, projector, [1])
    assert savings.accuracy_change.isna().all()
    assert savings.dense_seconds[0] > savings.pruned_seconds[0] - projector.run(traces[1], 1).reconfiguration_s


def test_runs_of_different_length_are_shown_as_far_as_they_are_compared(traces: list[ptsim.Trace]) -> None:
    dense, pruned = traces
    short = first_epochs(pruned, 2)
    for given in ([dense, short], [short, dense]):
        runs = labelled_runs(given, compare_runs(given))
        assert [len(run.trace.epochs) for run in runs] == [2, 2]
    assert len(labelled_runs([dense], [])[0].trace.epochs) == len(dense.epochs) > 2


def test_runs_that_are_checked_keep_their_order_and_so_their_names(traces: list[ptsim.Trace]) -> None:
    dense, pruned = traces
    assert Facts([pruned, dense], compare_runs([pruned, dense])).trained == [pruned, dense]


def test_a_price_of_nothing_is_a_price() -> None:
    cluster = msgspec.structs.replace(load_cluster("dgx-a100"), price_usd_per_gpu_hour=3.0)
    given = Projector(cluster, Options(price_usd_per_gpu_hour=0.0)).price
    assert given == HourPrice(usd=0.0, source="given by the user")
    assert Projector(cluster, Options()).price == HourPrice(usd=3.0, source="not stated")


def test_the_page_says_cluster_by_cluster_whose_prices_its_money_is_at() -> None:
    file = Path(__file__).parents[2] / "examples" / "own_cluster.toml"
    names = ("aws-p3-16xlarge", file, "dgx-a100", "dgx-h100")
    listed, own, *unknown = [Projector(load_cluster(name), Options()) for name in names]
    assert money_sentences([listed, own, *unknown]) == (
        " Money on aws-p3-16xlarge is at a list price, whose day stands beside it; a price of your own can be given."
        f" Money on {own.cluster.name} is at the price that the cluster's file gives."
        " No price of a GPU-hour is known for dgx-a100 and dgx-h100."
    )
    assert money_sentences([own]) == " Money is at the price that the cluster's file gives."
    assert "no money is shown" in money_sentences(unknown)


def test_a_device_profile_is_used_on_the_clusters_with_that_gpu(traces: list[ptsim.Trace]) -> None:
    profile = device_profile_of(traces)
    bare = msgspec.structs.replace(traces[1], profiles=())
    there, elsewhere = (
        Projector(load_cluster(name), Options(), device_profile=profile) for name in ("dgx-a100", "aws-g4dn-12xlarge")
    )
    (row,) = ptsim.simulate(bare, "dgx-a100", [8], profile=profile).to_dict("records")
    assert (there.run(bare, 8).tier, there.run(bare, 8).total_s) == ("profiled", row["total_seconds"])
    assert there.step(bare, bare.epochs[0]).tier == "profiled"
    assert elsewhere.run(bare, 8).tier == "datasheet"
    assert there.changed(there.cluster, Options(channel_multiple=8)).run(bare, 8).tier == "profiled"


def test_a_profile_of_a_gpu_that_no_cluster_has_is_refused(traces: list[ptsim.Trace]) -> None:
    with pytest.raises(UsageError, match=r"profile was measured on 'NVIDIA A100.*clusters have t4"):
        make_report(traces, cluster="aws-g4dn-12xlarge", profile=device_profile_of(traces))


def test_plans_that_were_not_written_and_share_a_path_are_told_apart(traces: list[ptsim.Trace]) -> None:
    trace = traces[0]
    longer = msgspec.structs.replace(
        trace,
        run=msgspec.structs.replace(trace.run, seed=trace.run.seed + 1),
        epochs=tuple(msgspec.structs.replace(e, num_iterations=2 * e.num_iterations) for e in trace.epochs),
    )
    projector = Projector(load_cluster("dgx-a100"), Options())
    short_s, long_s = (projector.run(run, trace.run.world_size).compute_s for run in (trace, longer))
    assert long_s == pytest.approx(2 * short_s)


def test_a_run_its_beginning_and_its_held_first_network_are_told_apart(traces: list[ptsim.Trace]) -> None:
    """All three have the path and the facts of one trace."""
    pruned, cluster = traces[1], load_cluster("dgx-a100")
    shared = Projector(cluster, Options())
    runs = (pruned, held_dense(pruned), first_epochs(pruned, 3), held_dense(first_epochs(pruned, 3)))
    found = [shared.run(run, 8) for run in runs]
    assert found == [Projector(cluster, Options()).run(run, 8) for run in runs]
    assert len({projection.total_s for projection in found}) == 4


DATASHEET = saving_errors()["datasheet"]


def test_a_saving_by_hand() -> None:
    """80 of 100 s from a data sheet: the ratio's half-width is √(floor² + (share · ln 0.8)²)."""
    dense, pruned = run_projection(100.0), run_projection(80.0, energy_j=1.8e6)
    projector = FixedProjector(grid_grams_per_kwh=400.0)
    saved = projected.saved_columns(dense, pruned, projector)
    half = math.hypot(DATASHEET.floor, DATASHEET.share * math.log(0.8))
    fewest, most = math.exp(-half), math.exp(half)
    assert saved["saved_fraction"] == pytest.approx(0.2)
    assert (saved["saved_fraction_low"], saved["saved_fraction_high"]) == pytest.approx(
        (1 - 0.8 * most, 1 - 0.8 * fewest)
    )
    dollars = 4 * 2 / 3600  # a second of four GPUs; an hour of one kilowatt emits 400 g
    for unit, before, after in (
        ("seconds", 100.0, 80.0),
        ("joules", 3.6e6, 1.8e6),
        ("co2_grams", 400.0, 200.0),
        ("usd", 100 * dollars, 80 * dollars),
    ):
        assert (saved[f"dense_{unit}"], saved[f"pruned_{unit}"]) == pytest.approx((before, after))
        assert saved[f"saved_{unit}"] == pytest.approx(before - after)
        assert saved[f"saved_{unit}_low"] == pytest.approx(before - after * most)
        assert saved[f"saved_{unit}_high"] == pytest.approx(before - after * fewest)


@pytest.mark.parametrize(
    ("changes", "half_width"),
    [
        ({}, math.hypot(math.log(1.04), math.log(80 / 79))),  # the wider side of each, as if independent
        ({"low_s": 60.0}, 0.117),  # no wider than calibrated ratios are
        ({"low_s": 0.0}, 0.117),
        ({"tier": "datasheet"}, math.hypot(DATASHEET.floor, DATASHEET.share * math.log(0.8))),  # the worse tier decides
        (
            {"tier": "datasheet", "draw_spread": 0.1},
            math.hypot(DATASHEET.floor, DATASHEET.share * math.log(0.8), 0.1645),
        ),
    ],
)
def test_a_calibrated_saving_is_as_sure_as_its_two_times(changes: dict[str, object], half_width: float) -> None:
    dense = run_projection(100.0, tier="measured")
    pruned = msgspec.structs.replace(run_projection(80.0, tier="measured", low_s=79.0, high_s=81.0), **changes)
    saved = projected.saved_columns(dense, pruned, FixedProjector())
    assert saved["saved_fraction_high"] == pytest.approx(1 - 0.8 * math.exp(-half_width))
    assert saved["saved_fraction_low"] == pytest.approx(1 - 0.8 * math.exp(half_width))


def test_what_is_not_known_of_both_runs_is_not_saved() -> None:
    saved = projected.saved_columns(run_projection(price=None), run_projection(80.0, energy_j=None), FixedProjector())
    for unit in ("joules", "co2_grams", "usd"):
        assert [saved[f"saved_{unit}{end}"] for end in ("", "_low", "_high")] == [None] * 3


def test_parts_of_a_saving_and_of_a_projection_by_hand(traces: list[ptsim.Trace]) -> None:
    dense = run_projection(100.0, compute_s=70.0, exposed_communication_s=20.0)
    pruned = run_projection(
        80.0, compute_s=60.0, exposed_communication_s=5.0, reconfiguration_s=6.0, startup_s=2.0, energy_low_j=None
    )
    projector = FixedProjector({False: dense, True: pruned}, grid_grams_per_kwh=400.0)
    (row,) = projected.savings_frame(compare_runs(traces), projector, [4]).to_dict("records")
    assert (row["saved_compute_seconds"], row["saved_communication_seconds"]) == (10.0, 15.0)
    assert row["saved_reconfiguration_seconds"] == (3.0 + 7.0) - (6.0 + 2.0)
    assert (row["whole_runs"], row["shrank"], row["pruned"]) == (True, True, True)
    cut = msgspec.structs.replace(traces[0], end=None)
    assert not projected.savings_frame(compare_runs([cut, traces[1]]), projector, [4]).whole_runs.any()
    frame = projected.projections_frame(labelled_runs(traces, []), projector, [4])
    first, last = frame.to_dict("records")
    assert (first["gpu_seconds"], last["gpu_seconds"]) == (400.0, 320.0)
    assert (first["co2_grams"], first["low_co2_grams"], first["high_co2_grams"]) == pytest.approx(
        (400.0, 3.0 / 3.6 * 400, 4.0 / 3.6 * 400)
    )
    assert math.isnan(last["low_co2_grams"])
    assert (first["accuracy"], first["epochs"], first["first_batch_per_gpu"]) == (0.9, 1, 64)


def tiny_run(trace: ptsim.Trace, *, batch: int = 2) -> ptsim.Trace:
    """The run as if it had trained a convolution of 6,912 MACs, a ReLU and a linear layer of 40 instead."""
    net = NetworkBuilder("tiny", (3, 8, 8), 10)
    x = net.average_pool("pool", net.relu("relu", net.conv("conv", None, 4)))
    net.linear("fc", net.flatten("flat", x), 10)
    network = net.build()
    epochs = tuple(
        msgspec.structs.replace(e, architecture=network.id, batch_per_gpu=batch, densities=()) for e in trace.epochs
    )
    return msgspec.structs.replace(trace, networks={network.id: network}, epochs=epochs, profiles=())


@pytest.mark.parametrize("passes", [1, 2])
def test_a_roofline_by_hand(traces: list[ptsim.Trace], passes: int) -> None:
    """Two images; a layer takes 3 ms. The convolution moves 2 · (2 · (192 + 256) + 108) elements of four bytes.

    In two passes its 108 weights move twice as often. The bias of the linear layer has a gradient that reads 2 · 10.
    """
    trace = tiny_run(first_epochs(traces[0], 3))
    epochs = tuple(msgspec.structs.replace(epoch, passes=passes) for epoch in trace.epochs)
    trace = msgspec.structs.replace(trace, epochs=epochs)
    run = LabelledRun(label="a", setting="a", trace=trace)
    frame = projected.roofline_frame(run, FixedProjector())
    assert list(zip(frame.epoch, frame.layer, strict=True)) == [(0, "conv"), (0, "fc"), (2, "conv"), (2, "fc")]
    conv, linear = frame.iloc[0], frame.iloc[1]
    flops = 2 * 2 * (6912 + 6912)  # of two images, without their gradient
    assert conv.flops_per_byte == pytest.approx(flops / (4 * 2 * (2 * (192 + 256) + passes * 108)))
    assert conv.flops_per_second == pytest.approx(flops / 3e-3)
    assert linear.flops_per_byte == pytest.approx(2 * 2 * 3 * 40 / (4 * (3 * (2 * 14 + passes * 40) + 2 * 10)))
    assert linear.flops_per_second == pytest.approx(2 * 2 * 3 * 40 / 3e-3)
    assert (conv.peak_flops_per_second, conv.bandwidth_bytes_per_second) == (19.5e12, 1555e9)
    short = msgspec.structs.replace(run, trace=first_epochs(trace, 1))
    assert len(projected.roofline_frame(short, FixedProjector())) == 2
    without = FixedProjector()
    without.device = msgspec.structs.replace(without.device, peak_flops_per_s={})
    assert projected.roofline_frame(run, without).empty


def test_the_parts_of_an_epoch_and_of_a_run_by_hand(traces: list[ptsim.Trace]) -> None:
    short = run_projection(epochs=(epoch_projection(total_s=9.0),))
    projector = FixedProjector({False: run_projection(130.0), True: short})
    dense, pruned = labelled_runs(traces, [])
    expected = {
        "convolutions and linear layers": 50.0,
        "memory-bound layers": 25.0,
        "gradient hooks": 15.0,
        "optimizer and regulariser": 15.0,
        "exposed communication": 7.5,
        "input wait": 1.25,
        "loss and host gaps": 2.5,
        "other": 3.75,
    }
    epochs = projected.epoch_breakdown_frame(dense, projector, 4)
    assert dict(zip(epochs.part, epochs.seconds, strict=True)) == pytest.approx(expected)
    whole = projected.breakdown_frame([dense], projector, [4])
    assert dict(zip(whole.part, whole.seconds, strict=True)) == pytest.approx(
        {**expected, "start and reconfiguration": 7.0 + 3.0}
    )
    rounding = projected.epoch_breakdown_frame(pruned, projector, 4)  # parts of more than the whole: nothing is left
    assert rounding[rounding.part == "other"].seconds.iloc[0] == 0


def test_a_layers_time_is_that_of_an_image(traces: list[ptsim.Trace]) -> None:
    run = LabelledRun(label="a", setting="a", trace=tiny_run(first_epochs(traces[0], 2), batch=4))
    frame = projected.layers_frame(run, FixedProjector())
    row = frame[frame.layer == "conv"].iloc[0]
    assert (row.forward_seconds_per_image, row.backward_seconds_per_image) == pytest.approx((1e-3 / 4, 2e-3 / 4))
    assert row.seconds_per_image == pytest.approx(3e-3 / 4)
    assert (row.forward_macs_per_image, row.in_channels, row.out_channels) == (6912, 3, 4)
    assert list(frame.epoch.unique()) == [0, 1]


def test_an_epochs_layers_take_as_long_as_its_own_passes(traces: list[ptsim.Trace]) -> None:
    """The same mini-batch at once, and in four passes."""
    trace, projector = first_epochs(traces[0], 2), Projector(load_cluster("dgx-a100"), Options())
    epochs = tuple(msgspec.structs.replace(e, passes=n) for e, n in zip(trace.epochs, (1, 4), strict=True))

    def last(*trained: Epoch) -> list[float]:
        run = LabelledRun(label="a", setting="a", trace=msgspec.structs.replace(trace, epochs=trained))
        frame = projected.layers_frame(run, projector)
        return list(frame[frame.epoch == trained[-1].epoch].seconds_per_image)

    assert last(*epochs) == last(epochs[1]) != last(epochs[0])


def test_the_first_and_the_last_of_a_layer_by_hand() -> None:
    rows = [(0, "b.conv", 3, 8, 100, 0.4), (0, "b.gone", 8, 8, 50, 0.2), (1, "b.conv", 3, 8, 100, 0.3)]
    rows += [(2, "b.conv", 3, 6, 75, 0.1)]
    columns = ["epoch", "layer", "in_channels", "out_channels", "forward_macs_per_image", "seconds_per_image"]
    layers = pd.DataFrame(rows, columns=columns).assign(kind="batch_norm", tier="measured", gated=False)
    table = projected.first_and_last_layers(layers).set_index("layer")
    conv, gone = table.loc["b.conv"], table.loc["b.gone"]
    assert (conv.first_channels, conv.last_channels, gone.last_channels) == ("3 → 8", "3 → 6", "removed")
    assert (conv.first_macs_per_image, conv.last_macs_per_image) == (100, 75)
    assert (conv.first_seconds_per_image, conv.last_seconds_per_image) == (0.4, 0.1)
    assert (conv.last_fraction, gone.last_fraction) == (pytest.approx(0.25), 0.0)
    assert conv.kind == "batch norm"
    assert not has_removed_blocks(layers)  # something of block b is left
    assert has_removed_blocks(pd.concat([layers, layers[:1].assign(layer="fc")]))
    assert [block_of(name) for name in ("layer1.0.conv1", "fc")] == ["layer1.0", "fc"]


def test_a_gated_layer_is_kept_under_its_name_and_takes_the_time_of_its_gate_too(traces: list[ptsim.Trace]) -> None:
    """Of 16 inputs conv1 reads 9; every layer takes 3 ms, a gate too."""
    trace = first_epochs(traces[0], 2)
    network = trace.network_of(trace.epochs[0])
    conv, norm = "layer1.0.conv1", "layer1.0.bn1"
    parts: dict[str, dict[str, dict[str, object]]]
    parts = {conv: {"gather": {}, "layer": {"in_channels": 9}}, norm: {"norm": {}, "scatter": {}}}
    layers: list[Layer] = []
    for layer in network.layers:
        for part, changes in parts.get(layer.name, {"": {}}).items():
            is_gate = part in ("gather", "scatter")
            own: dict[str, object] = {"kind": LayerKind.RESHAPE, "op": part} if is_gate else changes
            layers.append(msgspec.structs.replace(layer, name=f"{layer.name}.{part}".rstrip("."), **own))
    begin, end = {conv: f"{conv}.gather", norm: f"{norm}.norm"}, {conv: f"{conv}.layer", norm: f"{norm}.scatter"}
    edges = [(end.get(source, source), begin.get(target, target)) for source, target in network.edges]
    edges += [(begin[name], end[name]) for name in parts]
    owners = {conv: f"{conv}.layer", norm: f"{norm}.norm"}
    weights = [msgspec.structs.replace(p, layer=owners.get(p.layer, p.layer)) for p in network.parameters]
    gated = msgspec.structs.replace(network, layers=tuple(layers), edges=tuple(edges), parameters=tuple(weights))
    first, last = trace.epochs
    epochs = first, msgspec.structs.replace(last, architecture=gated.id)
    trained = msgspec.structs.replace(trace, epochs=epochs, networks={**trace.networks, gated.id: gated})
    run = LabelledRun(label="a", setting="a", trace=trained)
    frame = projected.layers_frame(run, FixedProjector())
    assert list(frame[frame.epoch == 1].layer) == list(frame[frame.epoch == 0].layer)
    assert not has_removed_blocks(frame)
    table = projected.first_and_last_layers(frame).set_index("layer")
    assert (table.first_channels[conv], table.last_channels[conv]) == ("16 → 16", "9 → 16, gated")
    assert (table.last_channels[norm], table.kind[norm]) == ("16 → 16, gated", "batch norm")
    assert list(table.last_fraction[[conv, norm]]) == pytest.approx([2.0, 2.0])
    assert set(table.last_fraction.drop([conv, norm])) == {1.0}
    reached = projected.roofline_frame(run, FixedProjector())
    assert list(reached[reached.epoch == 1].layer) == list(reached[reached.epoch == 0].layer)


def test_a_price_is_a_number_and_words_with_what_is_billed() -> None:
    projector = Projector(load_cluster("aws-p3-16xlarge"), Options())  # whole instances of 8 GPUs
    few, whole = projector.price_columns(4), projector.price_columns(8)
    assert few["price_usd_per_gpu_hour"] == whole["price_usd_per_gpu_hour"] == 3.06
    assert str(few["price"]).endswith("for whole instances of 8 GPUs: 4 GPUs are billed as 8")
    assert str(whole["price"]).endswith("for whole instances of 8 GPUs")
    none = Projector(load_cluster("dgx-a100"), Options())
    assert none.price_columns(8) == {"price_usd_per_gpu_hour": None, "price": ""}
    assert none.grams(3.6e6) is None


def test_a_layer_that_runs_once_a_pass_computes_as_much_whatever_its_images_are(traces: list[ptsim.Trace]) -> None:
    """Two passes of 6,912 MACs and as many of the weights' gradient, in 3 ms."""
    trace = tiny_run(first_epochs(traces[0], 1), batch=8)
    (network,) = trace.networks.values()
    layers = tuple(msgspec.structs.replace(layer, once=layer.name == "conv") for layer in network.layers)
    once = msgspec.structs.replace(network, layers=layers)
    epochs = tuple(msgspec.structs.replace(epoch, architecture=once.id, passes=2) for epoch in trace.epochs)
    trace = msgspec.structs.replace(trace, networks={once.id: once}, epochs=epochs)
    frame = projected.roofline_frame(LabelledRun(label="a", setting="a", trace=trace), FixedProjector())
    assert list(frame.layer) == ["conv", "fc"]
    assert list(frame.flops_per_second) == pytest.approx([2 * 2 * 2 * 6912 / 3e-3, 2 * 8 * 3 * 40 / 3e-3])


def test_a_run_shrank_if_it_trained_more_than_one_network(traces: list[ptsim.Trace]) -> None:
    """Of two epochs with the penalty the network is still the first one."""
    short = [first_epochs(trace, 2) for trace in traces]
    assert short[1].is_pruned
    projector = FixedProjector({False: run_projection(), True: run_projection(80.0)})
    assert list(projected.savings_frame(compare_runs(short), projector, [4]).shrank) == [False]


def test_a_dense_run_is_shown_as_far_as_the_longest_run_that_it_is_compared_with(traces: list[ptsim.Trace]) -> None:
    dense, pruned = traces
    again = msgspec.structs.replace(first_epochs(pruned, 2), run=msgspec.structs.replace(pruned.run, seed=1))
    for given in ([dense, pruned, again], [dense, again, pruned]):
        runs = labelled_runs(given, compare_runs(given))
        assert [len(run.trace.epochs) for run in runs] == [6, *(len(trace.epochs) for trace in given[1:])]
