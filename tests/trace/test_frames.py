"""A trace as tables: the same numbers as its records, and nothing where nothing was measured."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ptsim.network import Layer, LayerKind
from ptsim.trace.frames import epoch_rows, layer_rows
from ptsim.trace.io import read_trace
from ptsim.trace.schema import DeviceUse, EpochTime, Reconfiguration, StepDistribution
from tests.traces import shrinking_records, shrinking_trace


def test_epochs_have_a_row_each_with_what_was_recorded(tmp_path: Path) -> None:
    trace = read_trace(shrinking_trace(tmp_path / "t.jsonl"))
    frame = trace.epochs_frame()
    assert frame.epoch.tolist() == [epoch.epoch for epoch in trace.epochs]
    assert frame.wall_seconds.tolist() == [epoch.time.wall_s for epoch in trace.epochs]
    assert frame.parameters.tolist() == [trace.network_of(epoch).num_parameters for epoch in trace.epochs]
    paid = {record.epoch: record.duration_s for record in trace.reconfigurations}
    assert frame.reconfiguration_seconds.tolist() == [paid.get(epoch.epoch, 0.0) for epoch in trace.epochs]


def test_what_was_not_measured_is_missing_and_not_zero(tmp_path: Path) -> None:
    trace = read_trace(shrinking_trace(tmp_path / "t.jsonl", energy=False))
    epochs = tuple(msgspec.structs.replace(e, measured_time=None, measured_step=None) for e in trace.epochs)
    frame = msgspec.structs.replace(trace, epochs=epochs).epochs_frame()
    measured = [name for name in frame if name.endswith("_seconds") and name != "reconfiguration_seconds"]
    assert frame[[*measured, "energy_joules"]].isna().all(axis=None)


def test_architectures_have_a_row_for_every_layer(tmp_path: Path) -> None:
    trace = read_trace(shrinking_trace(tmp_path / "t.jsonl"))
    frame = trace.architectures_frame()
    assert list(frame.groupby("architecture", sort=False).size()) == [len(n.layers) for n in trace.networks.values()]
    for architecture, network in trace.networks.items():
        own = frame[frame.architecture == architecture]
        assert own.forward_macs_per_image.sum() == network.forward_macs
        assert own.parameters.sum() == pytest.approx(network.num_parameters)


def test_a_trace_without_epochs_gives_empty_tables(tmp_path: Path) -> None:
    trace = read_trace(shrinking_trace(tmp_path / "t.jsonl"))
    assert msgspec.structs.replace(trace, epochs=()).epochs_frame().empty


def test_every_column_of_an_epoch_holds_its_own_number(tmp_path: Path) -> None:
    trace = read_trace(shrinking_trace(tmp_path / "t.jsonl", epochs=1))
    (recorded,) = trace.epochs
    epoch = msgspec.structs.replace(
        recorded,
        num_iterations=21,
        passes=20,
        learning_rate=22.0,
        train_loss=23.0,
        penalty=24.0,
        train_accuracy=0.25,
        validation_loss=26.0,
        validation_accuracy=0.27,
        channel_sparsity=0.28,
        weight_sparsity=0.29,
        measured_time=EpochTime(
            wall_s=30.0, data_wait_s=31.0, forward_s=32.0, backward_s=33.0, regularizer_s=34.0, optimizer_s=35.0,
            exposed_communication_s=36.0, validation_s=37.0,
        ),
        measured_step=StepDistribution(median_s=38.0, p10_s=39.0, p90_s=40.0, std_s=41.0),
        allreduce_bytes=42,
        peak_memory_bytes=43,
        device=DeviceUse(energy_j=44.0, power_w=45.0, peak_memory_bytes=46),
    )  # fmt: skip
    event = msgspec.structs.replace(
        next(record for record in shrinking_records() if isinstance(record, Reconfiguration)),
        epoch=0,
        measured_duration_s=47.0,
    )
    network = trace.network_of(recorded)
    (row,) = epoch_rows(msgspec.structs.replace(trace, epochs=(epoch,), reconfigurations=(event,)))
    assert row == {
        "epoch": 0,
        "architecture": network.id,
        "batch_per_gpu": 64,
        "passes": 20,
        "num_gpus": 1,
        "num_iterations": 21,
        "learning_rate": 22.0,
        "train_loss": 23.0,
        "penalty": 24.0,
        "validation_accuracy": 0.27,
        "channel_sparsity": 0.28,
        "weight_sparsity": 0.29,
        "parameters": network.num_parameters,
        "inference_macs_per_image": network.forward_macs,
        "wall_seconds": 30.0,
        "data_wait_seconds": 31.0,
        "forward_seconds": 32.0,
        "backward_seconds": 33.0,
        "regularizer_seconds": 34.0,
        "optimizer_seconds": 35.0,
        "exposed_communication_seconds": 36.0,
        "reconfiguration_seconds": 47.0,
        "step_median_seconds": 38.0,
        "step_p10_seconds": 39.0,
        "step_p90_seconds": 40.0,
        "allreduce_bytes": 42,
        "peak_memory_bytes": 43,
        "energy_joules": 44.0,
        "power_watts": 45.0,
    }


def test_every_column_of_a_layer_holds_its_own_number(tmp_path: Path) -> None:
    trace = read_trace(shrinking_trace(tmp_path / "t.jsonl", epochs=1))
    ((name, network),) = trace.networks.items()
    layer = Layer(
        name="odd", kind=LayerKind.CONV, op="conv2d", in_channels=4, out_channels=6, input_shapes=((4, 5, 7),),
        output_shape=(6, 3, 7), kernel_size=(3, 1), groups=2, num_parameters=36, forward_macs=756, once=True,
    )  # fmt: skip
    pooled = msgspec.structs.replace(layer, name="pool", kind=LayerKind.POOL, op="max_pool2d")
    odd = msgspec.structs.replace(network, layers=(pooled, layer))
    rows = layer_rows(msgspec.structs.replace(trace, networks={name: odd}))
    assert rows[1] == {
        "architecture": name,
        "position": 1,
        "layer": "odd",
        "kind": "conv",
        "op": "conv2d",
        "in_channels": 4,
        "out_channels": 6,
        "kernel_height": 3,
        "kernel_width": 1,
        "groups": 2,
        "once": True,
        "input_elements": 4 * 5 * 7,
        "output_elements": 6 * 3 * 7,
        "parameters": 36,
        "forward_macs_per_image": 756,
    }
    assert rows[0]["forward_macs_per_image"] == 0  # it multiplies nothing


def test_a_planned_run_paid_nothing_that_anybody_knows(tmp_path: Path) -> None:
    recorded = read_trace(shrinking_trace(tmp_path / "t.jsonl"))  # 0.25 s after epochs 1 and 3
    planned = msgspec.structs.replace(recorded, run=msgspec.structs.replace(recorded.run, origin="planned"))
    assert recorded.epochs_frame().reconfiguration_seconds.tolist() == [0, 0.25, 0, 0.25, 0, 0]
    assert planned.epochs_frame().reconfiguration_seconds.isna().tolist() == [True, False, True, False, True, True]
