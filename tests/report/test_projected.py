from pathlib import Path

import msgspec
import pytest

import ptsim
from ptsim.answers.repredict import device_profile_of
from ptsim.errors import UsageError
from ptsim.hardware.catalog import load_cluster
from ptsim.report import projected
from ptsim.report.build import make_report, money_sentences
from ptsim.report.facts import Facts
from ptsim.report.projected import Projector, labelled_runs
from ptsim.report.specs import PROJECTIONS
from ptsim.report.tables import make_table
from ptsim.sim.options import HourPrice, Options
from ptsim.trace.pairs import compare_runs, first_epochs
from tests.traces import dense_trace, shrinking_trace

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
    assert projected.has_removed_blocks(frame)


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
