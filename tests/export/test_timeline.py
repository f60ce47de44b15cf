from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from ptsim.cli.main import run
from ptsim.costs.buckets import ddp_buckets
from ptsim.errors import UsageError
from ptsim.export.timeline import write_timeline
from ptsim.sim.options import Options
from ptsim.sim.run import change, project
from ptsim.trace.io import read_trace
from tests.export import trace_events
from tests.sim.plans import cluster
from tests.traces import shrinking_trace

Events = list[dict[str, Any]]


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Events:
    folder = tmp_path_factory.mktemp("timeline")
    trace = read_trace(shrinking_trace(folder))
    options = Options(first_bucket_bytes=20_000, bucket_bytes=100_000, jitter=0.05)
    (file,) = write_timeline(folder / "steps.json", trace, cluster(), 4, options)
    events: Events = json.loads(file.read_text())["traceEvents"]
    return events


def complete(events: Events, category: str) -> Events:
    return [event for event in events if event["ph"] == "X" and event["cat"] == category]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"first_bucket_bytes": 20_000, "bucket_bytes": 50_000, "jitter": 0.2, "straggler_fraction": 0.3},
        {"micro_batches": 4, "overlap": False, "broadcast_buffers": True},
        {"mixed_devices": {"t4": 1}, "input_images_per_s": 300.0},
        {"jobs": 2, "gradient_format": "bf16", "find_unused_parameters": True},
        {"network": "links", "link_bandwidth": {"node 1": 0.01}, "contention": 1.0},
    ],
)
@pytest.mark.parametrize("gpus", [1, 12])
def test_what_perfetto_and_holistic_trace_analysis_want_holds(
    options: dict[str, Any], gpus: int, tmp_path: Path
) -> None:
    trace = read_trace(shrinking_trace(tmp_path))
    (file,) = write_timeline(tmp_path / "steps.json", trace, cluster(), gpus, change(Options(), options))
    events = trace_events.check(json.loads(file.read_text()))
    assert {event["pid"] for event in events} == set(range(min(gpus, 8)))


def test_a_process_is_a_gpu_with_two_streams(events: Events) -> None:
    kernels = complete(events, "kernel")
    assert {event["pid"] for event in kernels} == {0, 1, 2, 3}
    assert {event["args"]["stream"] for event in kernels} == {7, 20}
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in kernels} <= named


def test_a_stream_does_one_thing_at_a_time(events: Events) -> None:
    streams: dict[tuple[int, int], Events] = {}
    for event in complete(events, "kernel"):
        streams.setdefault((event["pid"], event["tid"]), []).append(event)
    for kernels in streams.values():
        kernels.sort(key=lambda event: event["ts"])
        for one, other in itertools.pairwise(kernels):
            assert one["ts"] + one["dur"] <= other["ts"] + 1e-6  # microseconds, kept with nanoseconds


def test_every_kernel_was_launched(events: Events) -> None:
    launches = [event["args"]["correlation"] for event in complete(events, "cuda_runtime")]
    kernels = [event["args"]["correlation"] for event in complete(events, "kernel")]
    assert sorted(launches) == sorted(kernels)
    assert len(set(kernels)) == len(kernels)


def test_arrows_go_from_a_layer_to_the_all_reduce_that_waited_for_it(events: Events) -> None:
    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert starts
    assert starts.keys() == ends.keys()
    for key, start in starts.items():
        assert (start["tid"], ends[key]["tid"]) == (7, 20)
        assert start["ts"] <= ends[key]["ts"]


def test_memory_rises_in_forward_and_returns_after_backward(events: Events) -> None:
    values = [e["args"]["bytes"] for e in events if e["ph"] == "C" and e["pid"] == 0]
    assert min(values) > 0
    assert max(values) > 2 * min(values)
    assert values[-1] == min(values)


def test_what_the_host_does_is_no_work_of_the_gpu(events: Events) -> None:
    assert any(e["name"] == "host and loss" for e in complete(events, "user_annotation"))
    assert not any(e["name"] == "host and loss" for e in complete(events, "kernel"))


def test_there_are_two_steps_of_every_architecture(events: Events) -> None:
    steps = [e for e in complete(events, "user_annotation") if e["pid"] == 0 and "architecture" in e["args"]]
    assert [e["name"] for e in steps] == [f"ProfilerStep#{i}" for i in range(6)]
    assert len({e["args"]["architecture"] for e in steps}) == 3


def test_steps_last_as_long_as_the_projection_says(tmp_path: Path) -> None:
    trace = read_trace(shrinking_trace(tmp_path))
    (file,) = write_timeline(tmp_path / "steps.json", trace, cluster(), 64)
    annotations = complete(json.loads(file.read_text())["traceEvents"], "user_annotation")
    steps = [e for e in annotations if e["name"].startswith("ProfilerStep")]
    projected = project(trace, cluster(), 64)
    assert steps[0]["dur"] == pytest.approx(projected.epochs[0].step_s * 1e6, abs=0.01)
    assert len({e["pid"] for e in steps}) == 8  # of 64 GPUs, the first eight are drawn


def test_a_folder_gets_a_file_per_gpu_that_names_its_rank(tmp_path: Path) -> None:
    trace = read_trace(shrinking_trace(tmp_path))
    files = write_timeline(tmp_path / "ranks", trace, cluster(), 2)
    assert [file.name for file in files] == ["rank_0.json", "rank_1.json"]
    for rank, file in enumerate(files):
        text = file.read_text()
        assert re.search(r'"rank":\s+(\d+)', text)[1] == str(rank)  # type: ignore[index] # as HolisticTraceAnalysis looks for it
        assert json.loads(text)["distributedInfo"] == {"backend": "nccl", "rank": rank, "world_size": 2}


def test_ranks_of_an_earlier_projection_are_not_left_among_those_of_this_one(tmp_path: Path) -> None:
    """HolisticTraceAnalysis reads every file of the folder."""
    trace, out = read_trace(shrinking_trace(tmp_path)), tmp_path / "ranks"
    write_timeline(out, trace, cluster(), 2)
    with pytest.raises(UsageError, match=r"holds rank_1\.json of an earlier job of more ranks"):
        write_timeline(out, trace, cluster(), 1)
    assert len(write_timeline(out, trace, cluster(), 2)) == 2


def test_the_command_line_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = shrinking_trace(tmp_path)
    out = tmp_path / "t.json"
    assert run(["simulate", str(trace), "--cluster", "dgx-a100", "--gpus", "2", "--json", "--timeline", str(out)]) == 0
    assert json.loads(out.read_text())["traceEvents"]
    assert json.loads(capsys.readouterr().out)  # stdout holds the document alone


def test_a_file_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    trace = read_trace(shrinking_trace(tmp_path))
    (tmp_path / "taken").write_text("")
    with pytest.raises(UsageError, match=r"neither a \.json file nor a folder"):
        write_timeline(tmp_path / "taken", trace, cluster(), 2)


@pytest.mark.parametrize("passes", [1, 4])
def test_memory_is_that_of_one_pass_at_a_time(passes: int, tmp_path: Path) -> None:
    """Weights, gradients, momentum and buffers always; what layers keep of 64 images, or of 16 at a time, on top."""
    trace = read_trace(shrinking_trace(tmp_path, epochs=1))
    options = Options(micro_batches=passes)
    (file,) = write_timeline(tmp_path / "steps.json", trace, cluster(), 1, options)
    events: Events = json.loads(file.read_text())["traceEvents"]
    values = [e["args"]["bytes"] for e in events if e["ph"] == "C"]
    network = trace.network_of(trace.epochs[0])
    norms = [layer.out_channels for layer in network.layers if layer.kind == "batch_norm"]
    buffers = sum(2 * 4 * channels + 8 for channels in norms)  # mean and variance, and how many batches there were
    assert min(values) == values[0] == values[-1] == 3 * 4 * network.num_parameters + buffers
    kept = sum(
        64 // passes * (4 * layer.saved_elements + layer.saved_other_bytes) + layer.saved_fixed_bytes
        for layer in network.layers
    )
    assert max(values) - min(values) == kept
    steps = [e for e in complete(events, "user_annotation") if e["name"].startswith("ProfilerStep")]
    assert [e["args"]["batch_per_gpu"] for e in steps] == [64, 64]


def test_a_millisecond_lies_between_two_architectures_and_none_between_two_steps(events: Events) -> None:
    steps = [e for e in complete(events, "user_annotation") if e["pid"] == 0 and e["name"].startswith("ProfilerStep")]
    ends = [step["ts"] + step["dur"] for step in steps]
    gaps = [after["ts"] - end for end, after in zip(ends[1::2], steps[2::2], strict=False)]
    assert gaps == pytest.approx([1000.0, 1000.0], abs=0.01)
    assert steps[0]["ts"] == 0


def test_the_memory_of_a_sharded_update_is_that_of_the_buckets_in_use(tmp_path: Path) -> None:
    """Weights and buffers; a quarter of momentum and gradients each; two buckets in a row of 20,000 bytes or more."""
    trace = read_trace(shrinking_trace(tmp_path, epochs=1))
    options = Options(sharding="zero2", bucket_bytes=20_000)
    (file,) = write_timeline(tmp_path / "steps.json", trace, cluster(), 4, options, shown=1)
    events: Events = json.loads(file.read_text())["traceEvents"]
    network = trace.network_of(trace.epochs[0])
    norms = [layer.out_channels for layer in network.layers if layer.kind == "batch_norm"]
    buffers = sum(2 * 4 * channels + 8 for channels in norms)
    weights = 4 * network.num_parameters
    sizes = [b.num_bytes for b in ddp_buckets(network, first_bucket_bytes=20_000, bucket_bytes=20_000)]
    assert 64 * 64 * 9 * 4 <= max(sizes) < 64 * 64 * 9 * 4 + 20_000
    two = max(one + next_one for one, next_one in itertools.pairwise(sizes))
    held = next(e["args"]["bytes"] for e in events if e["ph"] == "C")
    assert held == weights + buffers + 2 * math.ceil(weights / 4) + two
