"""Input pipelines: their published rates, and what cores, GPUs and storage make of them, by hand arithmetic."""

from __future__ import annotations

import msgspec
import pytest

from ptsim.costs.input import STORED_PIXELS, Pipeline, find_pipeline, limiting_gpus, pipelines, supply
from ptsim.errors import UnknownNameError, UsageError
from ptsim.hardware.catalog import cluster_names, load_cluster
from ptsim.hardware.spec import Cluster

OUTPUT = 224 * 224
FFCV_512 = 160_300  # pixels of ImageNet with a longest side of 512, as FFCV stores it


def cluster(**changes: object) -> Cluster:
    return msgspec.structs.replace(load_cluster("aws-p3dn-24xlarge"), **changes)


PLAIN = Pipeline(
    decode_pixels_per_s_core=100e6,
    output_pixels_per_s_core=10e6,
    decode_pixels_per_s_gpu=500e6,
    output_pixels_per_s_gpu=20e6,
    bytes_per_pixel=0.5,
    source="made up",
)


def test_a_core_decodes_what_is_stored_and_crops_what_is_seen() -> None:
    # 100,000 / 100e6 + 20,000 / 10e6 = 3 ms an image; 12 cores for 4 GPUs
    found = supply(PLAIN, cluster(cores_per_node=12), 4, output_pixels=20_000, stored_pixels=100_000)
    assert (found.images_per_s, found.limit) == (pytest.approx(1000.0), "cores")
    half = supply(PLAIN, cluster(cores_per_node=12), 4, output_pixels=20_000, stored_pixels=100_000, speed=0.5)
    assert half.images_per_s == pytest.approx(500.0)


def test_a_gpus_own_loader_and_decoder_are_not_shared() -> None:
    many = cluster(cores_per_node=10_000)
    for number in (1, 8, 64):  # 20e6 / 20,000 images handed over
        found = supply(PLAIN, many, number, output_pixels=20_000, stored_pixels=100_000)
        assert (found.images_per_s, found.limit) == (pytest.approx(1000.0), "GPU")
    large = supply(PLAIN, many, 1, output_pixels=20_000, stored_pixels=1_000_000)  # 500e6 / 1e6 decoded
    assert large.images_per_s == pytest.approx(500.0)


def test_storage_is_shared_by_the_gpus_of_a_node() -> None:
    # 0.5 bytes of 100,000 pixels: 50 kB an image; 80 MB/s are 1,600 images/s for 8 GPUs
    slow = cluster(storage_bandwidth_bytes_per_s=80e6, cores_per_node=10_000)
    found = supply(PLAIN, slow, 16, output_pixels=20_000, stored_pixels=100_000)
    assert (found.images_per_s, found.limit) == (pytest.approx(200.0), "storage")


def test_the_limit_begins_where_the_shares_fall_below_the_need() -> None:
    # 12 cores give 4,000 images/s; 900 for each of 4 GPUs, not for each of 5
    node = cluster(cores_per_node=12)
    begins = [
        limiting_gpus(PLAIN, node, needed, output_pixels=20_000, stored_pixels=100_000) for needed in (100, 900, 5000)
    ]
    assert begins == [None, 5, 1]


# FFCV documentation, ImageNet Benchmarks: all 48 cores of a p3dn.24xlarge, JPEG 90 %, longest side 512
def test_ffcv_gives_what_its_authors_measured() -> None:
    found = supply(find_pipeline("ffcv"), cluster(), 8, output_pixels=OUTPUT, stored_pixels=FFCV_512)
    assert 8 * found.images_per_s == pytest.approx(31_278, rel=0.01)


# The same page's figure: DALI on one GPU reaches 4,880 to 5,366 images/s; one loader process of PyTorch 3,955.
@pytest.mark.parametrize(("name", "low", "high"), [("dali", 4880, 5366), ("torchvision", 3950, 3960)])
def test_one_gpu_with_all_cores_gets_what_was_measured(name: str, low: float, high: float) -> None:
    found = supply(find_pipeline(name), cluster(), 1, output_pixels=OUTPUT, stored_pixels=FFCV_512)
    assert low <= found.images_per_s <= high
    assert found.limit == "GPU"


# A row that no rate was made from: MLPerf Training v2.1, ASUSTeK, 8 A100 and 2 x 64 cores, trained 25,049 images/s
# with DALI, so it must not be predicted to deliver less.
def test_dali_feeds_what_an_mlperf_run_trained() -> None:
    found = supply(find_pipeline("dali"), cluster(cores_per_node=128), 8, output_pixels=OUTPUT)
    assert 8 * found.images_per_s >= 25_049


def test_what_is_not_known_is_said() -> None:
    with pytest.raises(UnknownNameError, match="dali"):
        find_pipeline("webdataset")
    with pytest.raises(UsageError, match="does not say how many cores"):
        supply(PLAIN, load_cluster("ethernet-25g"), 1, output_pixels=1)


def test_every_rate_and_core_count_has_a_source() -> None:
    assert all(len(pipeline.source) > 50 for pipeline in pipelines().values())
    named = [load_cluster(name) for name in cluster_names()]
    known = [found for found in named if found.cores_per_node is not None]
    assert len(known) >= 30
    assert all(found.sources["cores_per_node"] for found in known)


# 1/512 s to decode 1,024 stored pixels and as long to crop 256: 256 images/s a core, 4,096 of 16 cores.
EXACT = Pipeline(decode_pixels_per_s_core=2**19, output_pixels_per_s_core=2**17, bytes_per_pixel=0.5, source="made up")


def exact_supply(pipeline: Pipeline, number: int, **changes: object) -> tuple[float, str]:
    node = cluster(**({"cores_per_node": 16} | changes))
    found = supply(pipeline, node, number, output_pixels=256, stored_pixels=1024)
    return found.images_per_s, found.limit


@pytest.mark.parametrize(
    ("changes", "number", "expected"),
    [
        ({}, 1, (4096.0, "cores")),
        ({}, 8, (512.0, "cores")),
        ({}, 9, (512.0, "cores")),  # on the second node
        ({"output_pixels_per_s_core": None}, 8, (1024.0, "cores")),  # the GPU crops
        ({"decode_pixels_per_s_gpu": 2**18}, 8, (256.0, "GPU")),
        ({"output_pixels_per_s_gpu": 2**15}, 8, (128.0, "GPU")),
        ({"decode_pixels_per_s_gpu": 2**18, "output_pixels_per_s_gpu": 2**15}, 1, (128.0, "GPU")),
        ({"decode_pixels_per_s_gpu": 2**16, "output_pixels_per_s_gpu": 2**15}, 1, (64.0, "GPU")),
    ],
)
def test_what_each_part_lets_through(changes: dict[str, object], number: int, expected: tuple[float, str]) -> None:
    assert exact_supply(msgspec.structs.replace(EXACT, **changes), number) == expected


def test_storage_gives_every_gpu_its_share_of_the_bytes() -> None:
    # 512 bytes an image: 2 MiB/s are 4,096 images/s, as many as the cores', which are named first
    for bandwidth, expected in ((2**21, (1024.0, "cores")), (2**20, (512.0, "storage"))):
        assert exact_supply(EXACT, 4, storage_bandwidth_bytes_per_s=float(bandwidth)) == expected


@pytest.mark.parametrize(("needed", "number"), [(512.0, None), (512.5, 8), (4096.0, 2), (4096.5, 1)])
def test_the_limit_begins_at_the_first_count_that_gets_less(needed: float, number: int | None) -> None:
    node = cluster(cores_per_node=16)
    assert limiting_gpus(EXACT, node, needed, output_pixels=256, stored_pixels=1024) == number


@pytest.mark.parametrize(
    ("alone", "among", "number"),
    [(4096.5, 100.0, 1), (100.0, 2048.5, 2), (4096.0, 1024.0, None), (4096.0, 1024.5, 4)],
)
def test_a_gpu_among_others_may_need_less_than_one_that_is_alone(
    alone: float, among: float, number: int | None
) -> None:
    """One GPU has all 4,096 images/s and is compared with what it trains on alone; 2 have 2,048 each, 4 have 1,024."""
    node = cluster(cores_per_node=16, gpus_per_node=4)
    assert limiting_gpus(EXACT, node, alone, among=among, output_pixels=256, stored_pixels=1024) == number


def test_imagenets_images_have_as_many_pixels_as_its_raw_size_says() -> None:
    """FFCV's documentation: 788.97 GB of 3 bytes a pixel in 1,281,167 images."""
    assert pytest.approx(788.97e9 / 3 / 1_281_167, rel=0.002) == STORED_PIXELS
    whole = supply(EXACT, cluster(cores_per_node=16), 1, output_pixels=256)
    assert whole == supply(EXACT, cluster(cores_per_node=16), 1, output_pixels=256, stored_pixels=205_000)
