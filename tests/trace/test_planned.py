"""A planned run has architectures and iterations, and no measured quantity."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

import ptsim
from ptsim.answers.validate import validate
from ptsim.criteria import GROUP_LASSO
from ptsim.errors import FileFormatError, MissingMeasurementError, UsageError
from ptsim.network import Parameter
from ptsim.trace.io import read_trace, records_of, write_trace
from ptsim.trace.pace import input_s_per_image, reconfiguration_s
from ptsim.trace.pairs import compare_runs, held_dense
from ptsim.trace.schema import NO_DEVICE, SCHEMA_VERSION, Assumption, Draw, Profile
from ptsim.trace.trace import Trace
from tests.traces import shrinking_trace


def unmeasured(trace: Trace) -> Trace:
    """The trace as if nobody had trained it."""
    nothing = dict.fromkeys(
        ("train_loss", "penalty", "train_accuracy", "validation_loss", "validation_accuracy", "learning_rate")
    )
    return msgspec.structs.replace(
        trace,
        run=msgspec.structs.replace(
            trace.run,
            origin="planned",
            device=NO_DEVICE,
            assumed=(Assumption(what="half of the channels go", source="the caller"),),
        ),
        profiles=(),
        epochs=tuple(
            msgspec.structs.replace(
                epoch,
                **nothing,
                penalty_coefficient=None,
                measured_time=None,
                measured_step=None,
                peak_memory_bytes=None,
                device=None,
                densities=(),
            )
            for epoch in trace.epochs
        ),
        reconfigurations=tuple(
            msgspec.structs.replace(event, measured_duration_s=None) for event in trace.reconfigurations
        ),
        end=msgspec.structs.replace(trace.end, wall_s=None, final_accuracy=None, energy_j=None) if trace.end else None,
    )


@pytest.fixture
def planned(tmp_path: Path) -> Trace:
    recorded = read_trace(shrinking_trace(tmp_path / "recorded.jsonl", world_size=4))
    return read_trace(write_trace(tmp_path / "planned.jsonl", unmeasured(recorded)))


def test_a_trace_that_was_read_and_written_again_is_the_same_file(tmp_path: Path) -> None:
    recorded = read_trace(shrinking_trace(tmp_path / "a.jsonl"))
    again = read_trace(write_trace(tmp_path / "b.jsonl", recorded))
    assert msgspec.structs.replace(again, path=recorded.path) == recorded
    assert [type(r) for r in records_of(again)].count(Profile) == len(recorded.profiles)


def test_an_older_trace_that_is_written_again_is_of_todays_schema(tmp_path: Path) -> None:
    """Its epochs then have fields that programs of that time do not know: they say that it is too new for them."""
    recorded = read_trace(shrinking_trace(tmp_path / "a.jsonl"))
    older = msgspec.structs.replace(recorded, run=msgspec.structs.replace(recorded.run, schema_version=1))
    assert read_trace(write_trace(tmp_path / "b.jsonl", older)).run.schema_version == SCHEMA_VERSION


def test_its_times_are_null_in_the_file_and_raise_when_they_are_read(planned: Trace) -> None:
    epochs = [json.loads(line) for line in planned.path.read_text().splitlines() if '"record":"epoch"' in line]
    unknown = ("time", "step", "train_loss", "validation_accuracy", "learning_rate", "penalty_coefficient")
    assert all(epoch[name] is None for epoch in epochs for name in unknown)
    with pytest.raises(MissingMeasurementError, match="the time of epoch 0 was not measured"):
        _ = planned.epochs[0].time
    with pytest.raises(MissingMeasurementError, match="the steps of epoch 0"):
        _ = planned.epochs[0].step
    with pytest.raises(MissingMeasurementError, match="the reconfiguration after epoch"):
        _ = planned.reconfigurations[0].duration_s


def test_a_run_record_without_an_origin_is_a_recorded_run(tmp_path: Path) -> None:
    file = shrinking_trace(tmp_path / "trace.jsonl")
    first, *rest = file.read_text().splitlines()
    run = json.loads(first)
    del run["origin"], run["assumed"]
    run["schema_version"] = 2
    file.write_text("\n".join([json.dumps(run), *rest]) + "\n")
    assert read_trace(file).run.origin == "recorded"
    assert not read_trace(file).is_planned


def test_what_nobody_measured_has_no_pace(planned: Trace) -> None:
    assert planned.is_planned
    assert planned.is_pruned
    assert input_s_per_image(planned) is None
    assert reconfiguration_s(planned) is None
    assert held_dense(planned).epochs[0].measured_time is None
    (comparison,) = compare_runs([planned])
    assert not comparison.trained


def test_it_is_projected_and_its_notes_say_planned(planned: Trace) -> None:
    frame = ptsim.simulate(planned, "dgx-a100", gpus=[1, 8])
    assert (frame.total_seconds > 0).all()
    assert frame.notes.str.contains("the run is planned: nobody has trained it").all()


def test_it_cannot_be_validated(planned: Trace) -> None:
    with pytest.raises(UsageError, match="is a planned run: nobody has trained it and nothing in it is measured"):
        validate([planned])


def test_cost_takes_it_like_any_other(planned: Trace) -> None:
    assert ptsim.cost(planned).inference_macs_per_image == planned.final_network.forward_macs


def test_a_draw_reduces_the_gradients_that_its_networks_have(planned: Trace) -> None:
    idle = Parameter(name="idle", layer="", shape=(7,))  # gets no gradient
    networks = {
        name: msgspec.structs.replace(network, parameters=(*network.parameters, idle))
        for name, network in planned.networks.items()
    }
    first = planned.epochs[0]
    draw = Draw(seed=1, architectures=((0, first.architecture),))
    _, drawn = msgspec.structs.replace(planned, networks=networks, draws=(draw,)).drawn()
    gradients = sum(p.num_elements for p in planned.network_of(first).parameters)
    assert [epoch.allreduce_bytes for epoch in drawn.epochs] == [
        4 * gradients * epoch.num_iterations for epoch in planned.epochs
    ]


def test_a_draw_in_a_recorded_run_is_refused(tmp_path: Path) -> None:
    recorded = read_trace(shrinking_trace(tmp_path / "a.jsonl"))
    draw = Draw(seed=1, architectures=((0, recorded.epochs[0].architecture),))
    file = write_trace(tmp_path / "b.jsonl", msgspec.structs.replace(recorded, draws=(draw,)))
    with pytest.raises(FileFormatError, match="a draw in a run that is not planned"):
        read_trace(file)


@pytest.mark.parametrize("starts", [(1,), (0, 3, 2), (0, 2, 2), (1, 0)])
def test_the_networks_of_a_draw_ascend_from_the_first_epoch(
    planned: Trace, tmp_path: Path, starts: tuple[int, ...]
) -> None:
    name = planned.epochs[0].architecture
    draw = Draw(seed=1, architectures=tuple((start, name) for start in starts))
    file = write_trace(tmp_path / "draws.jsonl", msgspec.structs.replace(planned, draws=(draw,)))
    with pytest.raises(FileFormatError, match="expected ascending ones from 0"):
        read_trace(file)


def test_a_criterion_that_is_null_is_the_group_lasso_and_a_number_is_refused(tmp_path: Path) -> None:
    recorded = read_trace(shrinking_trace(tmp_path / "a.jsonl"))

    def again(criterion: object) -> Trace:
        settings = recorded.run.hyperparameters | {"criterion": criterion}
        run = msgspec.structs.replace(recorded.run, hyperparameters=settings)
        return read_trace(write_trace(tmp_path / "b.jsonl", msgspec.structs.replace(recorded, run=run)))

    assert again(None).criterion == GROUP_LASSO
    with pytest.raises(FileFormatError, match=r"hyperparameters\.criterion is 3, expected a text"):
        again(3)


@pytest.mark.parametrize(
    ("written", "problem"), [(-0.1, "out of range"), ("1" + 400 * "0", "out of range"), (True, "expected a number")]
)
def test_a_momentum_that_no_optimizer_has_is_refused(tmp_path: Path, written: object, problem: str) -> None:
    lines = shrinking_trace(tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    run = json.loads(lines[0])
    run["hyperparameters"]["momentum"] = int(written) if isinstance(written, str) else written
    file = tmp_path / "b.jsonl"
    file.write_text(json.dumps(run) + "\n" + "".join(lines[1:]))
    with pytest.raises(FileFormatError, match=f"hyperparameters.momentum is .*{problem}"):
        read_trace(file)
