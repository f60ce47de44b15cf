"""A trace as tables: the same numbers as its records, and nothing where nothing was measured."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ptsim.trace.io import read_trace
from tests.traces import shrinking_trace


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
