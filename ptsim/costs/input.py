"""How many images a second does an input pipeline deliver to one GPU, and what limits it?

A pipeline reads an image, decodes its JPEG, and crops, resizes and flips it. Decoding takes time in proportion to the
pixels that are stored, the rest to the pixels that the network sees. The node's cores and its storage are shared evenly
by the GPUs in use; what a GPU decodes itself, or what one loader process can hand over, is its own.

The rates are published ones of one machine (`input.toml`, docs/input.md). Other processors differ: `SPREAD`.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import msgspec

from ptsim.costs.shipped import shipped
from ptsim.errors import UnknownNameError, UsageError
from ptsim.hardware.spec import Cluster

Limit = Literal["cores", "GPU", "storage"]

# ImageNet's training images: 788.97 GB as raw RGB with a longest side of at most 1,600 pixels, of 1,281,167 images.
# Source: FFCV documentation, ImageNet Benchmarks, data set sizes.
STORED_PIXELS = 205_000

# The 90 % interval of a core's rate, as a factor up and down. A guess, wider than the one comparison there is: decoding
# alone was measured as 155 and 146 million pixels a second and core (FFCV on 12 cores; pytorch/vision pull request
# 8495, 551 x 676 pixels in 2.54 ms).
SPREAD = 1.4


class Pipeline(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one library does, all cores busy.

    Attributes:
        decode_pixels_per_s_core: stored pixels that a core decodes, or prepares for the GPU that does.
        output_pixels_per_s_core: pixels of the network's input that a core crops, resizes and hands over; None: the GPU
            does it.
        decode_pixels_per_s_gpu: stored pixels that a GPU decodes itself; None: it does not.
        output_pixels_per_s_gpu: pixels that the one loading process of a GPU can hand over; None: not known to limit.
        bytes_per_pixel: that are read per stored pixel.
        source: where the rates were published.
    """

    decode_pixels_per_s_core: float
    output_pixels_per_s_core: float | None = None
    decode_pixels_per_s_gpu: float | None = None
    output_pixels_per_s_gpu: float | None = None
    bytes_per_pixel: float
    source: str


class Supply(msgspec.Struct, frozen=True, kw_only=True):
    """What a pipeline delivers to every GPU.

    Attributes:
        images_per_s: to one GPU.
        limit: what keeps it from more.
    """

    images_per_s: float
    limit: Limit


@functools.cache
def pipelines() -> dict[str, Pipeline]:
    """The pipelines that ptsim knows, by name."""
    return shipped("input.toml", dict[str, Pipeline])


def find_pipeline(name: str) -> Pipeline:
    """The pipeline called `name`.

    Raises:
        UnknownNameError: there is none.
    """
    known = pipelines()
    if name not in known:
        raise UnknownNameError("input pipeline", name, (*known, "none"))
    return known[name]


def supply(
    pipeline: Pipeline,
    cluster: Cluster,
    num_gpus: int,
    *,
    output_pixels: int,
    stored_pixels: int = STORED_PIXELS,
    speed: float = 1.0,
) -> Supply:
    """What the pipeline delivers to each of the GPUs in use.

    Args:
        pipeline: the library.
        cluster: its nodes' cores and storage; storage that is not known is not a limit (the images lie in memory).
        num_gpus: of all jobs; the fullest node has the most of them.
        output_pixels: height times width of the network's input.
        stored_pixels: mean height times width of the images as they are stored.
        speed: of the cores, relative to the published machine's.

    Raises:
        UsageError: the cluster does not say how many cores a node has.
    """
    if cluster.cores_per_node is None:
        raise UsageError(
            f"the cluster {cluster.name} does not say how many cores its nodes have",
            hint="write cores_per_node = NUMBER into a cluster file; or, in ptsim simulate, give --input-images-per-s",
        )
    sharing = min(num_gpus, cluster.gpus_per_node)
    core_s = stored_pixels / pipeline.decode_pixels_per_s_core
    if pipeline.output_pixels_per_s_core is not None:
        core_s += output_pixels / pipeline.output_pixels_per_s_core
    rates: dict[Limit, float] = {"cores": speed * cluster.cores_per_node / sharing / core_s, "GPU": math.inf}
    if pipeline.decode_pixels_per_s_gpu is not None:
        rates["GPU"] = pipeline.decode_pixels_per_s_gpu / stored_pixels
    if pipeline.output_pixels_per_s_gpu is not None:
        rates["GPU"] = min(rates["GPU"], pipeline.output_pixels_per_s_gpu / output_pixels)
    if cluster.storage_bandwidth_bytes_per_s is not None:
        image_bytes = pipeline.bytes_per_pixel * stored_pixels
        rates["storage"] = cluster.storage_bandwidth_bytes_per_s / sharing / image_bytes
    limit = min(rates, key=lambda name: rates[name])
    return Supply(images_per_s=rates[limit], limit=limit)


def limiting_gpus(
    pipeline: Pipeline,
    cluster: Cluster,
    needed: float,
    *,
    among: float | None = None,
    output_pixels: int,
    stored_pixels: int = STORED_PIXELS,
) -> int | None:
    """From how many GPUs of one node on the pipeline delivers less than the GPUs could train on.

    Args:
        pipeline: the library.
        cluster: its nodes' cores and storage.
        needed: images per second that a GPU could train on.
        among: the same of one of several GPUs, if `needed` is of one that is alone.
        output_pixels: as in `supply`.
        stored_pixels: as in `supply`.

    Returns:
        None: not even with all GPUs of a node.

    Raises:
        UsageError: what `supply` raises.
    """
    for number in range(1, cluster.gpus_per_node + 1):
        found = supply(pipeline, cluster, number, output_pixels=output_pixels, stored_pixels=stored_pixels)
        if found.images_per_s < (needed if among is None or number == 1 else among):
            return number
    return None
