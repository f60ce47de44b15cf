"""The tables of recorded runs, by hand: synthetic runs with round times, energies and accuracies."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pandas as pd
import pytest

import ptsim
from ptsim.network import Network
from ptsim.report import frames
from ptsim.trace.pairs import compare_runs
from ptsim.trace.schema import NO_DEVICE, LayerDensity
from ptsim.trace.trace import Trace
from tests.traces import dense_trace, shrinking_trace


def with_times(trace: Trace, walls: Sequence[float], *, regularizer_s: float = 0.0, surgery_s: float = 0.5) -> Trace:
    """The run with these seconds for its epochs, each with so much for the regulariser, and for its changes."""
    epochs = tuple(
        msgspec.structs.replace(
            epoch, measured_time=msgspec.structs.replace(epoch.time, wall_s=wall_s, regularizer_s=regularizer_s)
        )
        for epoch, wall_s in zip(trace.epochs, walls, strict=True)
    )
    events = tuple(msgspec.structs.replace(event, measured_duration_s=surgery_s) for event in trace.reconfigurations)
    return msgspec.structs.replace(trace, epochs=epochs, reconfigurations=events)


def training_macs(network: Network) -> int:
    """Of an image: forward and both gradients, but for that of the images."""
    return 3 * network.forward_macs - network.layer("conv1").forward_macs


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Three epochs of 10, 6 and 4 s, smaller from epoch to epoch; a second of each is the regulariser's."""
    path = shrinking_trace(tmp_path_factory.mktemp("frames") / "p.jsonl", epochs=3, interval=1, batch_step=0)
    return with_times(ptsim.read_trace(path), (10.0, 6.0, 4.0), regularizer_s=1.0)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Three epochs of 10 s."""
    path = dense_trace(tmp_path_factory.mktemp("frames") / "d.jsonl", epochs=3)
    return with_times(ptsim.read_trace(path), (10.0, 10.0, 10.0))


def row_of(frame: pd.DataFrame) -> dict[str, object]:
    (row,) = frame.to_dict("records")
    return {str(name): value for name, value in row.items()}


def test_a_runs_row_sums_what_was_recorded(pruned: Trace) -> None:
    epochs = tuple(
        msgspec.structs.replace(epoch, device=msgspec.structs.replace(epoch.device, energy_j=joules))
        for epoch, joules in zip(pruned.epochs, (1.0, 2.0, 4.0), strict=True)
    )
    row = row_of(frames.runs_frame([msgspec.structs.replace(pruned, epochs=epochs)]))
    first, last = pruned.network_of(pruned.epochs[0]), pruned.network_of(pruned.epochs[-1])
    assert (row["measured_seconds"], row["energy_joules"], row["reconfiguration_seconds"]) == (20.0, 7.0, 1.0)
    assert (row["epochs"], row["num_reconfigurations"], row["state"], row["judged"]) == (3, 2, "complete", True)
    assert (row["first_parameters"], row["last_parameters"]) == (first.num_parameters, last.num_parameters)
    assert (row["first_inference_macs_per_image"], row["last_inference_macs_per_image"]) == (
        first.forward_macs,
        last.forward_macs,
    )
    assert row["layers_removed"] == len(pruned.reconfigurations[1].layers_removed) > 0
    assert row["channels_removed"] == sum(event.channels_removed for event in pruned.reconfigurations)
    assert (row["first_batch_per_gpu"], row["last_batch_per_gpu"], row["final_accuracy"]) == (64, 64, 0.9)


def test_what_was_not_measured_of_a_run_is_missing(pruned: Trace) -> None:
    silent = (*pruned.epochs[:2], msgspec.structs.replace(pruned.epochs[2], device=None))
    first, second = pruned.reconfigurations
    untimed = first, msgspec.structs.replace(second, measured_duration_s=None)
    unseen = (*pruned.epochs[:2], msgspec.structs.replace(pruned.epochs[2], measured_time=None))
    planned = msgspec.structs.replace(pruned.run, origin="planned", device=NO_DEVICE)
    for changes, missing in (
        ({"epochs": silent}, {"energy_joules"}),
        ({"epochs": unseen}, {"measured_seconds"}),
        ({"reconfigurations": untimed}, {"reconfiguration_seconds"}),
        ({"run": planned}, {"measured_seconds", "reconfiguration_seconds"}),
    ):
        row = row_of(frames.runs_frame([msgspec.structs.replace(pruned, **changes)]))
        measured = ("energy_joules", "reconfiguration_seconds", "measured_seconds")
        assert {name for name in measured if pd.isna(row[name])} == missing


def test_a_run_that_stopped_before_its_last_network_was_validated_is_not_judged(pruned: Trace) -> None:
    first, second = pruned.reconfigurations
    late = msgspec.structs.replace(second, epoch=2, before=second.after, after=first.after)  # after the last epoch
    stopped = msgspec.structs.replace(pruned, reconfigurations=(first, second, late), end=None)
    row = row_of(frames.runs_frame([stopped]))
    assert (row["state"], row["judged"]) == ("cut off", False)
    assert row["last_parameters"] == pruned.networks[first.after].num_parameters
    row = row_of(frames.runs_frame([msgspec.structs.replace(pruned, end=None)]))  # right behind an epoch
    assert (row["state"], row["judged"]) == ("cut off", True)


def test_what_pruning_saved_where_it_was_recorded(pruned: Trace, dense: Trace) -> None:
    assert pruned.end is not None
    lower = msgspec.structs.replace(pruned, end=msgspec.structs.replace(pruned.end, final_accuracy=0.85))
    row = row_of(frames.measured_savings_frame(compare_runs([dense, lower])))
    assert (row["dense_seconds"], row["pruned_seconds"], row["reconfiguration_seconds"]) == (30.0, 20.0 + 1.0, 1.0)
    assert row["time_fraction"] == pytest.approx(21 / 30)
    assert row["own_start_fraction"] == pytest.approx(21 / (3 * (10 - 1)))  # its first epoch, less the regulariser
    assert row["pace_fraction"] == pytest.approx((10 - 1) / 10)
    macs = [training_macs(pruned.network_of(epoch)) for epoch in pruned.epochs]
    assert row["training_macs_fraction"] == pytest.approx(sum(macs) / (3 * macs[0]))
    assert (row["dense_accuracy"], row["pruned_accuracy"]) == (0.9, 0.85)
    assert row["accuracy_change"] == pytest.approx(-0.05)


def test_what_nobody_trained_or_timed_saved_nothing_that_anybody_measured(pruned: Trace, dense: Trace) -> None:
    (comparison,) = compare_runs([dense, pruned])
    for name in ("pruned", "baseline"):
        run = getattr(comparison, name)
        planned = msgspec.structs.replace(run, run=msgspec.structs.replace(run.run, origin="planned"))
        untimed = msgspec.structs.replace(run.epochs[1], measured_time=None)
        incomplete = msgspec.structs.replace(run, epochs=(run.epochs[0], untimed, run.epochs[2]))
        for other in (planned, incomplete):
            assert frames.measured_savings_frame([msgspec.structs.replace(comparison, **{name: other})]).empty


def test_nothing_is_saved_where_runs_differ_by_more_than_pruning(pruned: Trace, dense: Trace) -> None:
    (comparison,) = compare_runs([dense, pruned])
    device = msgspec.structs.replace(dense.run.device, name="another")
    elsewhere = msgspec.structs.replace(dense, run=msgspec.structs.replace(dense.run, device=device))
    assert frames.measured_savings_frame([msgspec.structs.replace(comparison, baseline=elsewhere)]).empty


def test_a_dense_run_that_nobody_trained_has_no_accuracy(pruned: Trace) -> None:
    (held,) = compare_runs([pruned])
    assert not held.trained
    assert frames.accuracies(held) == {"dense_accuracy": None, "pruned_accuracy": 0.9, "accuracy_change": None}


def test_what_every_epoch_costs(pruned: Trace) -> None:
    frame = frames.costs_frame([pruned])
    for epoch, row in zip(pruned.epochs, frame.to_dict("records"), strict=True):
        network = pruned.network_of(epoch)
        assert (row["epoch"], row["wall_seconds"], row["num_iterations"]) == (epoch.epoch, epoch.time.wall_s, 78)
        assert row["training_macs_per_image"] == training_macs(network)
        assert row["training_macs"] == 78 * 64 * training_macs(network)
        assert row["allreduce_payload_bytes"] == 78 * 4 * network.num_parameters  # whether or not it was reduced
        norms = sum(layer.output_elements for layer in network.layers if layer.kind == "batch_norm")
        assert row["bn_bytes_per_image"] == 8 * 4 * norms


def test_an_architectures_row_spans_its_epochs() -> None:
    epochs = pd.DataFrame(
        {
            "run": "a",
            "architecture": ["x", "x", "x", "x", "y"],
            "batch_per_gpu": 64,
            "passes": [1, 1, 1, 4, 4],
            "num_gpus": 1,
            "epoch": [0, 1, 2, 3, 4],
            "peak_memory_bytes": [10.0, 30.0, 20.0, 8.0, 5.0],
            "estimated_memory_bytes": [11.0, 31.0, 21.0, 9.0, 6.0],
            "projected_memory_bytes": [12.0, 32.0, 22.0, 10.0, 7.0],
            "wall_seconds": [9.0, 1.0, 2.0, 3.0, 1.0],
            "parameters": [7, 7, 7, 7, 3],
        }
    )
    counted = ["inference_macs_per_image", "training_macs_per_image", "bn_bytes_per_image", "allreduce_payload_bytes"]
    epochs[counted] = 1
    frame = frames.trained_architectures(epochs)
    spans = list(zip(frame.architecture, frame.passes, frame.first_epoch, frame.last_epoch, strict=True))
    assert spans == [("x", 1, 0, 2), ("x", 4, 3, 3), ("y", 4, 4, 4)]
    assert list(frame.peak_memory_bytes) == [30.0, 8.0, 5.0]
    assert list(frame.estimated_memory_bytes) == [
        31.0,
        9.0,
        6.0,
    ]  # the penalty takes memory, and may end with its phase
    assert list(frame.projected_memory_bytes) == [32.0, 10.0, 7.0]
    assert list(frame.epoch_seconds) == [2.0, 3.0, 1.0]  # of 9, 1 and 2 s the middle one
    assert list(frame.parameters) == [7, 7, 3]


def test_an_architecture_that_went_on_on_other_gpus_has_a_row_for_each_number_of_them(pruned: Trace) -> None:
    one = pruned.epochs[0]
    walls = zip((1, 1, 4), (9.0, 9.0, 3.0), strict=True)
    epochs = tuple(
        msgspec.structs.replace(
            one, epoch=i, world_size=gpus, measured_time=msgspec.structs.replace(one.time, wall_s=wall_s)
        )
        for i, (gpus, wall_s) in enumerate(walls)
    )
    costs = frames.costs_frame([msgspec.structs.replace(pruned, epochs=epochs, reconfigurations=())])
    frame = frames.trained_architectures(costs.assign(projected_memory_bytes=0))
    rows = list(zip(frame.num_gpus, frame.first_epoch, frame.last_epoch, frame.epoch_seconds, strict=True))
    assert rows == [(1, 0, 1, 9.0), (4, 2, 2, 3.0)]


def test_repeats_keep_words_and_truths_and_count_what_is_there() -> None:
    frame = pd.DataFrame(
        {
            "setting": ["a", "a", "a"],
            "shrank": [True, True, False],
            "tier": ["measured", "scaled", "scaled"],
            "low_seconds": [3.0, 1.0, 2.0],
            "high_seconds": [4.0, 6.0, 5.0],
            "slow_seconds": [1.0, 2.0, 6.0],
            "usd": [None, 1.0, 3.0],
        }
    )
    row = row_of(frames.averaged(frame, ["setting"]))
    assert (row["num_runs"], row["shrank"], row["tier"]) == (3, True, "measured")
    assert (row["low_seconds"], row["high_seconds"], row["slow_seconds"], row["usd"]) == (1.0, 6.0, 3.0, 2.0)


def test_repeats_of_what_has_no_name_are_a_row_too() -> None:
    frame = pd.DataFrame({"setting": ["a", None, None], "seconds": [1.0, 2.0, 4.0]})
    rows = frames.averaged(frame, ["setting"])
    assert (list(rows.num_runs), list(rows.seconds)) == ([1, 2], [1.0, 3.0])


def test_checked_epochs_stand_beside_what_was_measured(pruned: Trace) -> None:
    result = ptsim.validate([pruned])
    frame = frames.validation_frame([pruned], result)
    assert list(frame.measured_seconds) == [10.0, 6.0, 4.0]
    for row, check in zip(frame.to_dict("records"), result.runs[0].epochs, strict=True):
        assert row["epoch_error"] == pytest.approx(row["predicted_seconds"] / row["measured_seconds"] - 1)
        assert (row["low_seconds"], row["high_seconds"]) == (check.low_seconds, check.high_seconds)
        assert (row["epoch"], row["batch_per_gpu"], row["num_gpus"], row["tier"]) == (check.epoch, 64, 1, "measured")


def test_epochs_of_a_run_that_went_on_with_other_ranks_keep_their_own_number_of_gpus(pruned: Trace) -> None:
    """Its first line says one."""
    epochs = tuple(
        msgspec.structs.replace(epoch, world_size=gpus) for epoch, gpus in zip(pruned.epochs, (4, 4, 2), strict=True)
    )
    trace = msgspec.structs.replace(pruned, epochs=epochs)
    assert list(frames.validation_frame([trace], ptsim.validate([trace])).num_gpus) == [4, 4, 2]
    assert row_of(frames.runs_frame([trace]))["num_gpus"] == 4


def test_a_reconfiguration_has_its_networks_before_and_after(pruned: Trace) -> None:
    frame = frames.reconfigurations_frame([pruned])
    assert list(frame.after_epoch) == [0, 1]
    assert list(frame.duration_seconds) == [0.5, 0.5]
    assert list(frame.layers_removed) == [len(event.layers_removed) for event in pruned.reconfigurations]
    networks = [pruned.network_of(epoch) for epoch in pruned.epochs]
    assert list(frame.parameters_before) == [network.num_parameters for network in networks[:2]]
    assert list(frame.parameters_after) == [network.num_parameters for network in networks[1:]]
    assert list(frame.inference_macs_per_image_before) == [network.forward_macs for network in networks[:2]]
    assert list(frame.inference_macs_per_image_after) == [network.forward_macs for network in networks[1:]]


@pytest.mark.parametrize(("passes", "batch", "first"), [(1, 64, 1), (4, 256, 1), (4, 253, 1), (2, 64, None)])
def test_a_profile_is_of_the_first_epoch_whose_passes_it_timed(
    pruned: Trace, passes: int, batch: int, first: int | None
) -> None:
    """A pass of 64 images: a mini-batch of 64, or a quarter of 256 or, rounded up, of 253."""
    epochs = tuple(
        msgspec.structs.replace(
            e, passes=passes, batch_per_gpu=batch, architecture=pruned.epochs[min(e.epoch, 1)].architecture
        )
        for e in pruned.epochs
    )  # the last two alike
    frame = frames.profiles_frame([msgspec.structs.replace(pruned, epochs=epochs)])
    profile, network = pruned.profiles[1], pruned.network_of(pruned.epochs[1])
    rows = frame[frame.architecture == network.id]
    assert len(rows) == len(network.layers)
    assert set(rows.epoch.dropna()) == ({first} if first is not None else set())
    conv = rows[rows.layer == "conv1"].iloc[0]
    assert (conv.forward_seconds, conv.backward_seconds) == (profile.layers[0].forward_s, profile.layers[0].backward_s)
    assert (conv.batch_per_gpu, conv.in_channels, conv.out_channels) == (64, 3, network.layer("conv1").out_channels)
    assert rows[rows.layer == "flatten"].backward_seconds.isna().all()


def test_the_density_of_channels_is_that_of_inputs_times_that_of_outputs(pruned: Trace) -> None:
    density = LayerDensity(layer="conv1", input_channels=0.5, output_channels=0.8, weights=0.25)
    epochs = (msgspec.structs.replace(pruned.epochs[0], densities=(density,)),)
    row = row_of(frames.densities_frame([msgspec.structs.replace(pruned, epochs=epochs)]))
    assert row["channels"] == pytest.approx(0.4)
    assert (row["input_channels"], row["output_channels"], row["weights"]) == (0.5, 0.8, 0.25)


def test_backward_is_twice_forward_but_for_the_images_gradient(pruned: Trace) -> None:
    frame = frames.architectures_frame([pruned]).drop_duplicates("layer").set_index("layer")
    ratio = frame.backward_macs_per_image / frame.forward_macs_per_image
    assert (ratio["conv1"], ratio["layer1.0.conv1"], ratio["fc"]) == (1.0, 2.0, 2.0)
    assert frame.backward_macs_per_image["bn1"] == 0
