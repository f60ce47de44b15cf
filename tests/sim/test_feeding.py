"""What feeds the GPUs of a projection, by hand.

torchvision decodes 113.5 million stored pixels a second and core, and crops 8.68 million pixels of the network's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from ptsim.sim.feeding import Feed
from ptsim.sim.options import Options
from ptsim.sim.run import change
from ptsim.sim.scenario import Scenario
from ptsim.trace.io import read_trace
from ptsim.trace.trace import Trace
from tests.sim.plans import cluster
from tests.traces import shrinking_trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return read_trace(shrinking_trace(tmp_path_factory.mktemp("run")))


def feed(trace: Trace, cores: int = 40, num_gpus: int = 8, **options: Any) -> Feed:
    """Of GPUs that share a node's cores; a node has 8."""
    where = msgspec.structs.replace(cluster(), cores_per_node=cores)
    return Feed(Scenario(trace, where, num_gpus, change(Options(), options)))


@pytest.mark.parametrize(
    ("height", "width", "options", "stored", "is_small"),
    [
        (224, 224, {}, 205_000, False),  # ImageNet's
        (128, 128, {}, 205_000, False),
        (128, 127, {}, 16_256, True),  # as large as they are seen
        (224, 224, {"input_stored_pixels": 160_300}, 160_300, False),
        (32, 32, {"input_stored_pixels": 4096}, 4096, True),
    ],
)
def test_small_images_are_stored_as_they_are_seen_and_large_ones_as_imagenets(
    trace: Trace, height: int, width: int, options: dict[str, Any], stored: int, is_small: bool
) -> None:
    dataset = msgspec.structs.replace(trace.run.dataset, input_shape=(3, height, width))
    seen = msgspec.structs.replace(trace, run=msgspec.structs.replace(trace.run, dataset=dataset))
    fed = feed(seen, input="torchvision", **options)
    core_s = stored / 113.5e6 + height * width / 8.68e6
    assert fed.images_per_s == pytest.approx(40 / 8 / core_s)
    assert any("the published rates of torchvision are of larger images" in n for n in fed.notes([1.0])) == is_small


def test_only_a_pipelines_own_rate_is_unsure(trace: Trace) -> None:
    """Another core may be 1.4 times as fast, or as slow."""
    piped, told, free = feed(trace, input="torchvision"), feed(trace, input_images_per_s=100.0), feed(trace)
    image_s = (1024 / 113.5e6 + 1024 / 8.68e6) * 8 / 40
    ends = [piped.interval_s(64, bound) for bound in ("low", "expected", "high")]
    assert ends == pytest.approx([64 * image_s / 1.4, 64 * image_s, 64 * image_s * 1.4])
    assert [told.interval_s(64, bound) for bound in ("low", "expected", "high")] == [0.64] * 3
    assert (free.images_per_s, free.interval_s(64, "high"), free.notes([1.0])) == (None, 0.0, [])
    assert (told.limiting_gpus([1e9]), free.limiting_gpus([1e9])) == (None, None)


@pytest.mark.parametrize(
    ("cores", "options", "needed", "says"),
    [
        # 2 / 8 / (1024 / 113.5e6 + 1024 / 8.68e6)
        (
            2,
            {"input": "torchvision"},
            [400.0],
            "torchvision gives each GPU up to 1,969 images/s (the 2 cores of a node); the GPU could take 400: "
            "the pipeline is no limit, even with all 8 GPUs of a node",
        ),
        # 807e6 / 1024 on the GPU itself
        (
            1000,
            {"input": "dali"},
            [400.0],
            "dali gives each GPU up to 788,086 images/s (what one GPU decodes); the "
            "GPU could take 400: the pipeline is no limit, even with all 8 GPUs of a node",
        ),
        # 1,000 images/s for all: 500 for each of two, 333 for each of three; the epoch that needs most decides
        (
            1000,
            {"input": "dali", "input_storage_bytes_per_s": 0.57 * 1024 * 1000},
            [300.0, 400.0, 200.0],
            "dali gives each GPU up to 125 images/s (the storage of a node); the GPU could take 400: "
            "the pipeline is the limit from 3 of 8 GPUs per node on",
        ),
    ],
)
def test_the_note_says_what_limits_the_pipeline_and_from_where_on(
    trace: Trace, cores: int, options: dict[str, Any], needed: Sequence[float], says: str
) -> None:
    assert feed(trace, cores, **options).notes(needed)[0] == says


def test_a_recorded_loader_is_as_fast_as_in_the_fastest_epoch_that_waited_for_it(trace: Trace) -> None:
    """2,400 images by 4 ranks: 24 s are 40 ms an image of one rank, 12 s are 20 ms; in 6 s nothing was waited for."""
    epochs = tuple(
        msgspec.structs.replace(
            epoch,
            world_size=4,
            num_images=2400,
            measured_time=msgspec.structs.replace(epoch.time, wall_s=wall_s, data_wait_s=waited_s),
        )
        for epoch, wall_s, waited_s in zip(trace.epochs, (24.0, 12.0, 6.0), (5.0, 0.12, 0.05), strict=False)
    )
    waited = feed(msgspec.structs.replace(trace, epochs=epochs), input_images_per_s="recorded")
    assert waited.images_per_s == pytest.approx(50.0)
    assert waited.interval_s(64, "high") == pytest.approx(1.28)
    kept_up = feed(msgspec.structs.replace(trace, epochs=epochs[2:]), input_images_per_s="recorded")
    assert (kept_up.images_per_s, kept_up.interval_s(64)) == (None, 0.0)
    assert waited.notes([1.0]) == [
        "each GPU is given 50 images/s, the pace of the recorded run, which waited for data 1% of the time: a loader "
        "that was not busy the rest of the time can give more"
    ]
    assert kept_up.notes([1.0]) == [
        "the recorded run did not wait for data, so the projection has no waiting for input either"
    ]


def test_an_epoch_that_was_not_timed_or_had_no_images_tells_no_pace(trace: Trace) -> None:
    """Of 2,400 images by 4 ranks in 12 s; the others say nothing."""
    waited, untimed, empty = (
        msgspec.structs.replace(
            epoch,
            world_size=4,
            num_images=2400,
            measured_time=msgspec.structs.replace(epoch.time, wall_s=12.0, data_wait_s=6.0),
        )
        for epoch in trace.epochs[:3]
    )
    untimed = msgspec.structs.replace(untimed, measured_time=None)
    empty = msgspec.structs.replace(empty, num_images=0)
    for epochs, expected in (((waited, untimed, empty), pytest.approx(50.0)), ((untimed, empty), None)):
        fed = feed(msgspec.structs.replace(trace, epochs=epochs), input_images_per_s="recorded")
        assert fed.images_per_s == expected


def test_a_clusters_own_storage_feeds_where_no_other_is_given(trace: Trace) -> None:
    """0.57 bytes of each of 1,024 pixels: 8 GPUs share 1,000 images/s, or half of them if the option says so."""
    bytes_per_s = 0.57 * 1024 * 1000
    where = msgspec.structs.replace(cluster(), cores_per_node=1000, storage_bandwidth_bytes_per_s=bytes_per_s)
    for options, rate in (({}, 125.0), ({"input_storage_bytes_per_s": bytes_per_s / 2}, 62.5)):
        fed = Feed(Scenario(trace, where, 8, change(Options(), {"input": "dali", **options})))
        assert fed.images_per_s == pytest.approx(rate)


@pytest.mark.parametrize(
    ("gpus", "jobs", "network", "placement", "sharing"),
    [
        (2, 1, "formula", "packed", 2),
        (2, 3, "formula", "packed", 6),
        (2, 5, "links", "packed", 8),  # a node has no more
        (4, 2, "links", "striped", 8),
        (16, 2, "links", "packed", 8),
    ],
)
def test_the_jobs_beside_this_one_take_their_part_of_the_nodes_cores(
    trace: Trace, gpus: int, jobs: int, network: str, placement: str, sharing: int
) -> None:
    where = msgspec.structs.replace(cluster(), cores_per_node=40)
    options = {"input": "torchvision", "jobs": jobs, "network": network, "placement": placement}
    fed = Feed(Scenario(trace, where, gpus, change(Options(), options)))
    assert fed.images_per_s == pytest.approx(40 / sharing / (1024 / 113.5e6 + 1024 / 8.68e6))


@pytest.mark.parametrize(("num_gpus", "jobs", "supposed"), [(1, 1, True), (7, 1, True), (4, 2, False), (8, 1, False)])
def test_what_a_fuller_node_needs_is_said_to_be_supposed(
    trace: Trace, num_gpus: int, jobs: int, supposed: bool
) -> None:
    """A GPU among others computes more slowly than alone, so more of them may each take fewer images."""
    storage = {"input": "dali", "input_storage_bytes_per_s": 0.57 * 1024 * 1000, "jobs": jobs}  # 500 for each of two
    note = feed(trace, 1000, num_gpus, **storage).notes([400.0])[0]
    verdict = "the pipeline is the limit from 3 of 8 GPUs per node on"
    assert note.endswith(f": if every GPU takes as many, {verdict}" if supposed else f"400: {verdict}")
