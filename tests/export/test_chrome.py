import itertools
from pathlib import Path

import msgspec
import pytest

from ptsim.errors import UsageError
from ptsim.export.chrome import COMPUTE_STREAM, profile_timeline
from ptsim.trace.io import read_trace
from ptsim.trace.trace import Trace
from tests.export import trace_events
from tests.traces import dense_trace, shrinking_trace


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    return read_trace(shrinking_trace(tmp_path / "t.jsonl"))


def spans(trace: Trace, pid: int) -> list[dict[str, object]]:
    document = profile_timeline(trace).document()
    return [e for e in document["traceEvents"] if e["ph"] == "X" and e["pid"] == pid and e["tid"] == COMPUTE_STREAM]


def test_there_is_a_process_per_profile_and_an_event_per_measured_time(trace: Trace) -> None:
    document = profile_timeline(trace).document()
    assert {e["pid"] for e in document["traceEvents"]} == set(range(len(trace.profiles)))
    layers = trace.profiles[0].layers
    measured = len(layers) + sum(layer.backward_s is not None for layer in layers)
    assert len(spans(trace, 0)) == measured + 2  # regularizer and optimizer


def test_a_stream_does_one_thing_at_a_time(trace: Trace) -> None:
    events = spans(trace, 0)
    for before, after in itertools.pairwise(events):
        assert after["ts"] == pytest.approx(before["ts"] + before["dur"], abs=2e-3)  # rounded to nanoseconds


def test_durations_are_the_recorded_ones_in_microseconds(trace: Trace) -> None:
    first = spans(trace, 0)[0]
    assert first["name"] == "conv1 forward"
    assert first["dur"] == pytest.approx(trace.profiles[0].layers[0].forward_s * 1e6, abs=1e-3)


def test_what_is_kept_for_backward_is_all_given_back(trace: Trace) -> None:
    values = [
        event["args"]["bytes"]
        for event in profile_timeline(trace).document()["traceEvents"]
        if event["ph"] == "C" and event["pid"] == 0
    ]
    network, batch = trace.networks[trace.profiles[0].architecture], trace.profiles[0].batch
    peak = sum(layer.saved_elements for layer in network.layers) * 4 * batch
    fixed = sum(layer.saved_fixed_bytes for layer in network.layers)
    assert max(values) == peak + fixed
    assert values[0] == 0
    # a layer without a backward node (flatten) gives back nothing; it has kept nothing either
    assert values[-1] == pytest.approx(0)


def test_the_file_is_json_that_says_which_device(trace: Trace, tmp_path: Path) -> None:
    file = profile_timeline(trace).write(tmp_path / "new" / "trace.json")
    document = msgspec.json.decode(file.read_bytes())
    trace_events.check(document)
    assert document["deviceProperties"][0]["name"] == trace.run.device.name
    assert {event["ph"] for event in document["traceEvents"]} == {"M", "X", "C"}


def test_a_trace_without_profiles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no per-layer profile"):
        profile_timeline(read_trace(dense_trace(tmp_path / "t.jsonl", profiles=False)))
