import itertools
from pathlib import Path

import msgspec
import pytest

from ptsim.errors import UsageError
from ptsim.export.chrome import COMMUNICATION_STREAM, COMPUTE_STREAM, Timeline, profile_timeline
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


def test_times_are_microseconds_kept_with_nanoseconds() -> None:
    timeline = Timeline(device_name="d", memory_bytes=7, world_size=4, rank=3)
    timeline.kernel("k", pid=2, start_s=1.0004e-6, duration_s=1.0004e-6, stream=COMMUNICATION_STREAM, bytes=5)
    timeline.launch(pid=2, time_s=1.5e-6)
    timeline.annotation("a", pid=2, start_s=2e-6, duration_s=3e-6, epoch=1)
    for _ in range(2):
        timeline.flow("f", pid=2, start=(7, 1e-6), end=(20, 2.5e-6))
    timeline.counter("c", pid=2, time_s=1e-3, bytes=9)
    document = timeline.document()
    kernel, launch, annotation, *flows, counter = document["traceEvents"]
    # both ends are rounded: 1000.4 and 2000.8 ns
    assert (kernel["ts"], kernel["dur"], kernel["tid"], kernel["cat"]) == (1.0, 1.001, 20, "kernel")
    assert kernel["args"] == {"device": 2, "stream": 20, "correlation": 1, "bytes": 5}
    assert (launch["ts"], launch["dur"], launch["tid"], launch["args"]) == (1.5, 0.0, 1, {"correlation": 1})
    assert (annotation["ts"], annotation["dur"], annotation["tid"], annotation["args"]) == (2.0, 3.0, 0, {"epoch": 1})
    assert [(e["ph"], e["id"], e["tid"], e["ts"]) for e in flows] == [
        ("s", 1, 7, 1.0),
        ("f", 1, 20, 2.5),
        ("s", 2, 7, 1.0),
        ("f", 2, 20, 2.5),
    ]
    assert (counter["ts"], counter["args"]) == (1000.0, {"bytes": 9})
    assert document["distributedInfo"] == {"backend": "nccl", "rank": 3, "world_size": 4}
    timeline.process(2, "p", (COMPUTE_STREAM, COMMUNICATION_STREAM))
    document = timeline.document()
    assert document["deviceProperties"] == [{"id": 2, "name": "d", "totalGlobalMem": 7}]
    threads = {e["tid"]: e["args"]["name"] for e in document["traceEvents"] if e["name"] == "thread_name"}
    assert threads == {0: "phases", 7: "stream 7: compute", 20: "stream 20: communication"}


def test_a_profiles_step_goes_forward_backward_and_updates(trace: Trace) -> None:
    events, profile = spans(trace, 0), trace.profiles[0]
    names = [layer.layer for layer in profile.layers]
    back = [layer.layer for layer in reversed(profile.layers) if layer.backward_s is not None]
    expected = [f"{name} forward" for name in names] + [f"{name} backward" for name in back]
    assert [event["name"] for event in events] == [*expected, "regularizer", "optimizer"]
    conv = events[0]["args"]
    assert (conv["input_shapes"], conv["output_shape"]) == ([[64, 3, 32, 32]], [64, 16, 32, 32])
    assert (conv["op"], conv["kind"]) == ("conv2d", "conv")
    assert events[-2]["dur"] == pytest.approx(profile.regularizer_s * 1e6, abs=2e-3)
    assert events[-1]["dur"] == pytest.approx(profile.optimizer_s * 1e6, abs=2e-3)
    last = events[-1]["ts"] + events[-1]["dur"]
    parts_s = profile.forward_s + profile.backward_s + profile.regularizer_s + profile.optimizer_s
    assert last == pytest.approx(parts_s * 1e6, abs=0.01)
    steps = [e for e in profile_timeline(trace).document()["traceEvents"] if e["name"] == "step"]
    assert [e["dur"] for e in steps] == pytest.approx([p.step_s * 1e6 for p in trace.profiles], abs=1e-3)


@pytest.mark.parametrize(
    ("passes", "batch", "span"),
    [(1, 64, "epochs 0 to 1"), (4, 256, "epochs 0 to 1"), (4, 253, "epochs 0 to 1"), (1, 65, "not trained")],
)
def test_a_profile_stands_for_the_epochs_whose_passes_it_timed(
    trace: Trace, passes: int, batch: int, span: str
) -> None:
    """Of 64 images: a quarter of 256 or, rounded up, of 253."""
    epochs = tuple(msgspec.structs.replace(e, passes=passes, batch_per_gpu=batch) for e in trace.epochs)
    document = profile_timeline(msgspec.structs.replace(trace, epochs=epochs)).document()
    names = [event["args"]["name"] for event in document["traceEvents"] if event["name"] == "process_name"]
    assert names[0] == f"resnet14 {trace.profiles[0].architecture}, mini-batch 64, {span}"


def test_a_profile_says_among_how_many_ranks_its_epochs_trained(trace: Trace) -> None:
    """The run's first line says one."""
    ranks = zip(trace.epochs, (1, 1, 4, 4, 2, 4), strict=True)
    epochs = tuple(msgspec.structs.replace(epoch, world_size=number) for epoch, number in ranks)
    document = profile_timeline(msgspec.structs.replace(trace, epochs=epochs)).document()
    names = [event["args"]["name"] for event in document["traceEvents"] if event["name"] == "process_name"]
    spans_of = [name.partition("mini-batch ")[2].partition(", ")[2] for name in names]
    assert spans_of == ["epochs 0 to 1, ranks: 1", "epochs 2 to 3, ranks: 4", "epochs 4 to 5, ranks: 2, then 4"]
    assert document["distributedInfo"]["world_size"] == 4
